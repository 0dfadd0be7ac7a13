//! Who a launch is, and when it is gone: a pure decision over gathered evidence.

use std::collections::HashMap;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::comm::host_name;

/// Number of a launch on its run, from 1, in the order of their starts.
pub type LaunchId = u32;

/// Stands for a launch that cannot be named: its claim is not readable (yet).
pub const UNKNOWN_LAUNCH: LaunchId = 0;

/// A process, so that no later one can be taken for it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// The host's name.
    pub host: String,
    /// The kernel's id of this boot; a process id means something within one boot only.
    pub boot_id: String,
    /// The pid namespace, `pid:[4026531836]`: containers count processes on their own.
    pub pid_namespace: Option<String>,
    /// The process id in that namespace.
    pub pid: u32,
    /// Clock ticks from the boot to the process's start: tells it from a later one of the
    /// same id.
    pub pid_start: Option<u64>,
}

impl ProcessId {
    fn this_process() -> Self {
        let pid = std::process::id();
        Self {
            host: host_name(),
            boot_id: boot_id(),
            pid_namespace: std::fs::read_link("/proc/self/ns/pid")
                .ok()
                .map(|link| link.to_string_lossy().into_owned()),
            pid,
            pid_start: ProcStat::of(pid).map(|stat| stat.start),
        }
    }
}

/// A Slurm job's step, as far as its environment tells.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct JobRef {
    /// The cluster's name: job ids count per cluster.
    pub cluster: Option<String>,
    /// `SLURM_JOB_ID`.
    pub job_id: u64,
    /// `SLURM_RESTART_COUNT`, 0 where the job was never requeued.
    pub restart_count: u64,
    /// `SLURM_STEP_ID`; `None` in a batch script.
    pub step_id: Option<u64>,
    /// The user: Slurm may hide the jobs of others.
    #[serde(default)]
    pub user_id: Option<u32>,
}

impl JobRef {
    /// Whether this is a later start of `other`'s job. Steps of one start run side by side.
    pub(super) fn is_newer_restart_of(&self, other: &Self) -> bool {
        self.cluster == other.cluster
            && self.job_id == other.job_id
            && self.restart_count > other.restart_count
    }
}

/// Who a launch is.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Owner {
    /// The process that beats for it: rank 0.
    pub process: ProcessId,
    /// Its Slurm step, if there is one.
    pub job: Option<JobRef>,
    /// What the launch records of itself (version, ranks, kernel tier …); not read here.
    #[serde(default)]
    pub facts: Value,
}

impl Owner {
    /// This process, as part of `job`.
    pub fn this_process(job: Option<JobRef>, facts: Value) -> Self {
        Self { process: ProcessId::this_process(), job, facts }
    }
}

/// How far a launch is, as of its last heartbeat.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct OwnerProgress {
    /// Records that this launch finished, failed ones included.
    pub records_done: u64,
    /// Error records among them.
    pub records_failed: u64,
    /// Records of the input, once this launch has read it to its end.
    pub records_total: Option<u64>,
    /// Tokens that this launch generated.
    pub new_tokens: u64,
    /// Its present rate.
    pub tokens_per_second: f64,
    /// Its present rate.
    pub records_per_second: f64,
    /// What it is doing, a word for people.
    pub phase: String,
    /// When its heartbeat was, by the launch's own clock.
    pub updated_unix_seconds: u64,
}

/// Whether a launch has said good-bye.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum OwnerState {
    /// Not as far as it knew itself.
    Running,
    /// Yes: what it held is free.
    Left,
}

/// The content of `owner-LLLLL.json`.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct OwnerFile {
    /// The launch's number.
    pub launch: LaunchId,
    /// Who it is.
    pub owner: Owner,
    /// Whether it has left.
    pub state: OwnerState,
    /// How it left: a word for people.
    #[serde(default)]
    pub left_with: Option<String>,
    /// How far it was at its last heartbeat.
    #[serde(default)]
    pub progress: OwnerProgress,
}

impl OwnerFile {
    /// The file of a running launch.
    pub(super) fn running(launch: LaunchId, owner: Owner, progress: OwnerProgress) -> Self {
        Self { launch, owner, state: OwnerState::Running, left_with: None, progress }
    }

    /// The name in `claims/`.
    pub(in crate::ledger) fn name(launch: LaunchId) -> String {
        format!("owner-{launch:05}.json")
    }

    /// The launch whose file is called `name`, if it is an owner file's name.
    pub(super) fn launch_of(name: &str) -> Option<LaunchId> {
        let launch = name.strip_prefix("owner-")?.strip_suffix(".json")?.parse().ok()?;
        (Self::name(launch) == name).then_some(launch)
    }

    pub(in crate::ledger) fn to_bytes(&self) -> Vec<u8> {
        // Strings, numbers and a JSON value: nothing in it can fail to be JSON.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }
}

/// What is known about an owner at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Its file says that it left.
    pub left: bool,
    /// Whether its process is no more; `None` = cannot be told from here.
    pub process_is_gone: Option<bool>,
    /// A launch of the same job with a higher restart count has an owner file.
    pub newer_restart: bool,
    /// Whether Slurm says that its step has ended; `None` = unknown.
    pub step_has_ended: Option<bool>,
    /// Its heartbeat has stopped (see the [module](super)).
    pub heartbeat_stopped: bool,
}

/// Why an owner counts as gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It said so.
    Left,
    /// Its process is no more.
    ProcessEnded,
    /// Its job was started again.
    Restarted,
    /// Slurm has ended its step.
    StepEnded,
    /// It has not been heard of for too long; it may come back.
    HeartbeatStopped,
}

impl Gone {
    /// Whether nothing can bring the owner back.
    pub fn is_final(self) -> bool {
        self != Self::HeartbeatStopped
    }
}

/// Whether an owner is gone, and why. A process that is seen alive outweighs what Slurm
/// and restart counts suggest, but not a stopped heartbeat: it may be suspended for hours.
pub fn judge(findings: &Findings) -> Option<Gone> {
    let hearsay = findings.process_is_gone != Some(false);
    if findings.left {
        Some(Gone::Left)
    } else if findings.process_is_gone == Some(true) {
        Some(Gone::ProcessEnded)
    } else if hearsay && findings.newer_restart {
        Some(Gone::Restarted)
    } else if hearsay && findings.step_has_ended == Some(true) {
        Some(Gone::StepEnded)
    } else if findings.heartbeat_stopped {
        Some(Gone::HeartbeatStopped)
    } else {
        None
    }
}

/// What this host and Slurm know about another launch's owner; injected, so that tests and
/// a simulator can answer.
pub trait Evidence: Send {
    /// Whether that process is no more; `None` = cannot be told from here.
    fn process_is_gone(&mut self, process: &ProcessId) -> Option<bool>;

    /// Whether that step has ended; `None` = unknown.
    fn step_has_ended(&mut self, job: &JobRef, now_seconds: f64) -> Option<bool>;
}

/// Asks Slurm whether a step has ended; `None` where it does not say.
type AskSlurm = Box<dyn FnMut(&JobRef) -> Option<bool> + Send>;

/// How often Slurm's controller is asked about one step.
const SLURM_SECONDS: f64 = 10.0;

/// The real [`Evidence`]: `/proc`, and Slurm as the caller asks it.
pub struct HostEvidence {
    here: ProcessId,
    ask_slurm: AskSlurm,
    /// Slurm's answer on a step, and until when it is good.
    answers: HashMap<JobRef, (Option<bool>, f64)>,
}

impl HostEvidence {
    /// Evidence from this host. `ask_slurm` may take its time: it is called at most every
    /// 10 seconds for a step, and never again once that has ended.
    pub fn new(ask_slurm: impl FnMut(&JobRef) -> Option<bool> + Send + 'static) -> Self {
        let here = ProcessId::this_process();
        Self { here, ask_slurm: Box::new(ask_slurm), answers: HashMap::new() }
    }
}

impl Evidence for HostEvidence {
    fn process_is_gone(&mut self, process: &ProcessId) -> Option<bool> {
        process_is_gone(process, &self.here, look_up)
    }

    fn step_has_ended(&mut self, job: &JobRef, now_seconds: f64) -> Option<bool> {
        match self.answers.get(job) {
            Some(&(answer, until)) if now_seconds < until => answer,
            _ => {
                let answer = (self.ask_slurm)(job);
                let good_for = if answer == Some(true) { f64::INFINITY } else { SLURM_SECONDS };
                self.answers.insert(job.clone(), (answer, now_seconds + good_for));
                answer
            }
        }
    }
}

/// What this host says about one of its process ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PidIs {
    Unused,
    /// In use by a process that started at this tick.
    StartedAt(u64),
    /// In use, and no more can be seen (`/proc` mounted with `hidepid`).
    Hidden,
}

fn process_is_gone(
    process: &ProcessId,
    here: &ProcessId,
    look_up: impl Fn(u32) -> PidIs,
) -> Option<bool> {
    if process.host != here.host {
        return None;
    }
    if process.boot_id != here.boot_id {
        return Some(true);
    }
    if process.pid_namespace.is_none() || process.pid_namespace != here.pid_namespace {
        return None;
    }
    match (look_up(process.pid), process.pid_start) {
        (PidIs::Unused, _) => Some(true),
        (PidIs::StartedAt(start), Some(recorded)) => Some(start != recorded),
        (PidIs::StartedAt(_), None) | (PidIs::Hidden, _) => None,
    }
}

fn look_up(pid: u32) -> PidIs {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return PidIs::Hidden;
    };
    if test_kill_process(id) == Err(Errno::SRCH) {
        return PidIs::Unused;
    }
    match ProcStat::of(pid) {
        Some(stat) if stat.is_dead => PidIs::Unused,
        Some(stat) => PidIs::StartedAt(stat.start),
        None => PidIs::Hidden,
    }
}

/// What farm needs of `/proc/PID/stat`, proc(5).
#[derive(Debug, PartialEq, Eq)]
struct ProcStat {
    /// Killed, and its parent has not fetched its exit code (or never will).
    is_dead: bool,
    /// Clock ticks from the boot to its start.
    start: u64,
}

impl ProcStat {
    /// `None` if there is no such process, or it is hidden.
    fn of(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The second field, the command's name, may hold spaces; it ends at the last ')'.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let threads: u64 = fields.get(17)?.parse().ok()?;
        // A zombie with threads left is a main thread that ended before the others.
        let is_dead = matches!(*fields.first()?, "Z" | "X" | "x") && threads <= 1;
        Some(Self { is_dead, start: fields.get(19)?.parse().ok()? })
    }
}

fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn an_owner_is_gone_on_proof_or_when_its_heartbeat_stops() {
        let nothing = Findings::default();
        let alive = Findings { process_is_gone: Some(false), ..nothing };
        let table = [
            (nothing, None),
            (Findings { left: true, ..nothing }, Some(Gone::Left)),
            (Findings { left: true, ..alive }, Some(Gone::Left)),
            (Findings { process_is_gone: Some(true), ..nothing }, Some(Gone::ProcessEnded)),
            (Findings { newer_restart: true, ..nothing }, Some(Gone::Restarted)),
            (Findings { step_has_ended: Some(true), ..nothing }, Some(Gone::StepEnded)),
            (Findings { step_has_ended: Some(false), ..nothing }, None),
            (Findings { heartbeat_stopped: true, ..nothing }, Some(Gone::HeartbeatStopped)),
            // Seen alive on this host: hearsay does not count, a stopped heartbeat does.
            (Findings { newer_restart: true, step_has_ended: Some(true), ..alive }, None),
            (Findings { heartbeat_stopped: true, ..alive }, Some(Gone::HeartbeatStopped)),
            // Slurm believes in a step whose host hangs.
            (
                Findings { step_has_ended: Some(false), heartbeat_stopped: true, ..nothing },
                Some(Gone::HeartbeatStopped),
            ),
        ];
        for (findings, expected) in table {
            assert_eq!(judge(&findings), expected, "{findings:?}");
        }
    }

    #[test]
    fn a_process_is_known_by_host_boot_namespace_id_and_start() {
        let here = ProcessId {
            host: "n1".into(),
            boot_id: "b".into(),
            pid_namespace: Some("pid:[1]".into()),
            pid: 1,
            pid_start: Some(5),
        };
        let it = ProcessId { pid: 70, pid_start: Some(900), ..here.clone() };
        let same = PidIs::StartedAt(900);
        let table = [
            (it.clone(), same, Some(false)),
            (it.clone(), PidIs::Unused, Some(true)),
            (it.clone(), PidIs::StartedAt(901), Some(true)),
            (it.clone(), PidIs::Hidden, None),
            (ProcessId { pid_start: None, ..it.clone() }, same, None),
            (ProcessId { pid_start: None, ..it.clone() }, PidIs::Unused, Some(true)),
            (ProcessId { boot_id: "a".into(), ..it.clone() }, same, Some(true)),
            (ProcessId { host: "n2".into(), ..it.clone() }, PidIs::Unused, None),
            (
                ProcessId { host: "n2".into(), boot_id: "a".into(), ..it.clone() },
                PidIs::Unused,
                None,
            ),
            (
                ProcessId { pid_namespace: Some("pid:[2]".into()), ..it.clone() },
                PidIs::Unused,
                None,
            ),
            (ProcessId { pid_namespace: None, ..it.clone() }, PidIs::Unused, None),
        ];
        for (process, pid_is, expected) in table {
            assert_eq!(
                process_is_gone(&process, &here, |_| pid_is),
                expected,
                "{process:?} {pid_is:?}"
            );
        }
    }

    #[test]
    fn this_process_is_alive_and_one_that_ended_is_gone_even_unreaped() {
        let mut evidence = HostEvidence::new(|_| None);
        let me = Owner::this_process(None, Value::Null).process;
        assert_eq!(evidence.process_is_gone(&me), Some(false));
        let later = ProcessId { pid_start: me.pid_start.map(|start| start + 1), ..me.clone() };
        assert_eq!(evidence.process_is_gone(&later), Some(true));
        for pid in [0, u32::MAX] {
            assert_eq!(evidence.process_is_gone(&ProcessId { pid, ..me.clone() }), None);
        }

        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid_start = ProcStat::of(child.id()).map(|stat| stat.start);
        let process = ProcessId { pid: child.id(), pid_start, ..me };
        assert_eq!(evidence.process_is_gone(&process), Some(false));
        child.kill().unwrap();
        while evidence.process_is_gone(&process) != Some(true) {
            std::thread::yield_now(); // the signal is on its way
        }
        child.wait().unwrap();
        assert_eq!(evidence.process_is_gone(&process), Some(true));
    }

    #[test]
    fn the_stat_line_is_read_past_any_command_name() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 0 THREADS 0 4711 0";
        let line = |name: &str, state: &str, threads: &str| {
            format!("9 ({name}) {state} {}", rest.replace("THREADS", threads))
        };
        let parse = |name, state, threads| ProcStat::parse(&line(name, state, threads)).unwrap();
        assert_eq!(parse("a b) R (c", "S", "8"), ProcStat { is_dead: false, start: 4711 });
        assert!(parse("farm", "Z", "1").is_dead);
        assert!(!parse("farm", "Z", "3").is_dead, "other threads are running");
        assert_eq!(ProcStat::parse("9 (farm) S 1 2"), None);
        assert_eq!(ProcStat::parse(""), None);
    }

    #[test]
    fn slurm_is_asked_every_10_seconds_until_the_step_has_ended() {
        let asked = Arc::new(AtomicU32::new(0));
        let answer = Arc::new(Mutex::new(None));
        let (count, reply) = (asked.clone(), answer.clone());
        let mut evidence = HostEvidence::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            *reply.lock().unwrap()
        });
        let job = JobRef { job_id: 4, step_id: Some(0), ..JobRef::default() };
        let table = [
            (0.0, None, None, 1),
            (9.0, Some(false), None, 1),
            (10.0, Some(false), Some(false), 2),
            (19.0, Some(true), Some(false), 2),
            (21.0, Some(true), Some(true), 3),
            (1e6, None, Some(true), 3),
        ];
        for (now, slurm_says, expected, asked_by_now) in table {
            *answer.lock().unwrap() = slurm_says;
            assert_eq!(evidence.step_has_ended(&job, now), expected, "at {now}");
            assert_eq!(asked.load(Ordering::Relaxed), asked_by_now, "at {now}");
        }
        evidence.step_has_ended(&JobRef { step_id: Some(1), ..job }, 1e6);
        assert_eq!(asked.load(Ordering::Relaxed), 4, "another step is another question");
    }

    #[test]
    fn only_a_later_start_of_the_same_job_replaces_an_owner() {
        let old =
            JobRef { cluster: Some("c".into()), job_id: 4, restart_count: 1, ..JobRef::default() };
        let newer = JobRef { restart_count: 2, ..old.clone() };
        assert!(newer.is_newer_restart_of(&old));
        assert!(!old.is_newer_restart_of(&newer));
        assert!(!JobRef { step_id: Some(1), ..old.clone() }.is_newer_restart_of(&old));
        assert!(!JobRef { job_id: 5, ..newer.clone() }.is_newer_restart_of(&old));
        assert!(!JobRef { cluster: None, ..newer }.is_newer_restart_of(&old));
    }

    #[test]
    fn owner_files_are_told_by_their_names() {
        assert_eq!(OwnerFile::name(7), "owner-00007.json");
        for launch in [1, 99_999, 100_000, u32::MAX] {
            assert_eq!(OwnerFile::launch_of(&OwnerFile::name(launch)), Some(launch));
        }
        for other in ["owner-7.json", "owner-+0007.json", "merge.0001", "wish-00001", "owner-.json"]
        {
            assert_eq!(OwnerFile::launch_of(other), None, "{other}");
        }
    }
}
