//! What Slurm itself says about a job: how long it may still run, whether a step of it
//! is over.
//!
//! Slurm's commands are run with a time limit, since they try for minutes to reach a
//! controller that does not answer; what they print is read by pure functions, tested on
//! the output of Slurm 22.05. Not knowing is an answer (`None`) and never an error: farm
//! runs without Slurm, and in containers without its commands. Each question may block for
//! [`ANSWER_TIME_MAX`]: ask from one rank, and not between two steps of the model.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;
use std::time::Duration;

use super::time_seconds;

/// How long one of Slurm's commands may take.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);

/// More output than this is cut off, bytes: a job array of 10,000 tasks has some 13 MB.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// The user's settings that would filter or decorate what the commands print.
const DISTURBING_VARIABLES: [&str; 9] = [
    "SLURM_CLUSTERS",
    "SQUEUE_ACCOUNT",
    "SQUEUE_LICENSES",
    "SQUEUE_NAMES",
    "SQUEUE_PARTITION",
    "SQUEUE_QOS",
    "SQUEUE_RESERVATION",
    "SQUEUE_STATES",
    "SQUEUE_USERS",
];

/// Step ids from here up are Slurm's own (batch script, `salloc` shell), which it lists nowhere.
const SPECIAL_STEPS: u64 = 0xffff_fff0;

/// States of a job whose processes are no more (squeue(1), "JOB STATE CODES"). `PENDING`:
/// it was requeued. Not `COMPLETING`: its processes may still be saving their work.
const STATES_WITHOUT_PROCESSES: [&str; 13] = [
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PENDING",
    "PREEMPTED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "TIMEOUT",
];

/// Seconds until the time limit ends the job; `None` where it has no limit or Slurm does
/// not tell. May block for [`ANSWER_TIME_MAX`].
pub fn seconds_left(job_id: u64) -> Option<u64> {
    let id = job_id.to_string();
    seconds_left_in(&answer("squeue", &["-h", "-a", "-j", &id, "-o", "%A %L"])?, job_id)
}

/// Whether Slurm knows that a launch's processes are gone: `Some(true)` when its step or its
/// job is over, or the job was started again since; `Some(false)` while it may live; `None`
/// where Slurm cannot be asked here, on another cluster than `cluster`
/// (`SLURM_CLUSTER_NAME` of the launch) among it.
///
/// Without a `step_id` (a batch script, and mpirun inside one) the job decides.
/// `restart_count` is the launch's `SLURM_RESTART_COUNT`: after a requeue, job and step ids
/// are the same ones again. Ids are raw (`SLURM_JOB_ID`), those of array tasks too.
///
/// Where a site hides the jobs of others (`PrivateData=jobs`) Slurm denies that they exist:
/// ask only about launches of this user. May block for three times [`ANSWER_TIME_MAX`].
pub fn step_has_ended(
    cluster: Option<&str>,
    job_id: u64,
    step_id: Option<u64>,
    restart_count: u64,
) -> Option<bool> {
    if cluster? != own_cluster()? {
        return None;
    }
    // The job first: should it be requeued in between, the step is missing or a new one.
    let job = answer("scontrol", &["-a", "-o", "show", "job", &job_id.to_string()])?;
    match (job_has_ended_in(&job, job_id, restart_count), step_id) {
        (Some(false), Some(step)) if step < SPECIAL_STEPS => {
            let step = format!("{job_id}.{step}");
            step_has_ended_in(&answer("scontrol", &["-a", "-o", "show", "step", &step])?)
        }
        (ended, _) => ended,
    }
}

/// The cluster that this machine's Slurm commands ask: a job's variable, on a login node
/// the configuration (asked once).
fn own_cluster() -> Option<&'static str> {
    static CLUSTER: OnceLock<Option<String>> = OnceLock::new();
    let find = || {
        let named = std::env::var("SLURM_CLUSTER_NAME").ok().filter(|name| !name.is_empty());
        named.or_else(|| cluster_name_in(&answer("scontrol", &["show", "config"])?))
    };
    CLUSTER.get_or_init(find).as_deref()
}

fn cluster_name_in(config: &str) -> Option<String> {
    let (_, rest) = config.lines().find_map(|l| l.strip_prefix("ClusterName")?.split_once('='))?;
    Some(rest.trim().to_owned())
}

/// From lines `ID TIME-LEFT`. Asked for the id of an array's last task, which is also that
/// of the array, Slurm prints all tasks.
fn seconds_left_in(squeue: &str, job_id: u64) -> Option<u64> {
    squeue.lines().find_map(|line| {
        let (id, left) = line.trim().split_once(' ')?;
        (id.parse() == Ok(job_id)).then(|| time_seconds(left.trim()))?
    })
}

/// From `scontrol -o show job`, a job a line (all tasks of an array, as above).
fn job_has_ended_in(scontrol: &str, job_id: u64, restart_count: u64) -> Option<bool> {
    if is_unknown_job(scontrol) {
        return Some(true);
    }
    let line = scontrol.lines().find(|line| field(line, "JobId") == Some(&job_id.to_string()))?;
    let state = field(line, "JobState")?;
    if STATES_WITHOUT_PROCESSES.contains(&state) {
        return Some(true);
    }
    let restarts: u64 = field(line, "Restarts").and_then(|n| n.parse().ok()).unwrap_or(0);
    // A requeue counts at once, while what it ended may still be saving its work.
    let ending = u64::from(state == "COMPLETING");
    Some(restarts > restart_count.saturating_add(ending))
}

/// From `scontrol -o show step`; it lists only steps that have processes.
fn step_has_ended_in(scontrol: &str) -> Option<bool> {
    let missing = is_unknown_job(scontrol)
        || scontrol.lines().any(|l| l.starts_with("Job step ") && l.ends_with(" not found"));
    let state = scontrol.lines().find_map(|line| field(line, "State"));
    if missing { Some(true) } else { state.map(|s| STATES_WITHOUT_PROCESSES.contains(&s)) }
}

/// Slurm forgets a job some minutes after its end (`MinJobAge`).
fn is_unknown_job(scontrol: &str) -> bool {
    scontrol.lines().any(|line| line.ends_with(" error: Invalid job id specified"))
}

/// The value of `Name=value` in a line of scontrol's.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

/// What `program` prints on both streams. `None` where there is no such program, and where
/// it takes longer than [`ANSWER_TIME_MAX`]; it is then killed.
pub(super) fn answer(program: &str, args: &[&str]) -> Option<String> {
    answer_within(ANSWER_TIME_MAX, program, args)
}

fn answer_within(limit: Duration, program: &str, args: &[&str]) -> Option<String> {
    let (reader, writer) = std::io::pipe().ok()?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(writer.try_clone().ok()?).stderr(writer);
    for name in DISTURBING_VARIABLES {
        command.env_remove(name);
    }
    let mut child = command.spawn().ok()?;
    // It holds our copies of the pipe's end, and the reader waits for all to be closed.
    drop(command);
    let (sender, receiver) = mpsc::channel();
    // Not joined: a wrapper's own child may keep the pipe open after the wrapper was killed.
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = reader.take(ANSWER_BYTES_MAX).read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    let bytes = receiver.recv_timeout(limit);
    let _ = child.kill();
    let _ = child.wait();
    Some(String::from_utf8_lossy(&bytes.ok()?).into_owned())
}

#[cfg(test)]
mod tests;
