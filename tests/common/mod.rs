//! What the tests that start processes share: a limit against hangs, signals, mpirun.
// Each test binary uses a part of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

pub mod farm;

/// Far beyond what any process here takes: who reaches it hangs.
const LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(5);

/// How a process ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ended {
    /// This, if the process left with `code`; else the test fails with what it said.
    #[track_caller]
    pub fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stderr:\n{}", self.stderr);
        self
    }
}

/// A process whose output is read while it runs; ended with all its descendants if the
/// test is done with it before.
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Running {
    /// Starts `command`; `input` is its standard input, else that is empty.
    pub fn start(command: &mut Command, input: &[u8]) -> Self {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: a Ctrl-C on the tests is dealt with by the tests.
        let mut child = piped.process_group(0).spawn().unwrap_or_else(|error| {
            panic!("{}: {error}", command.get_program().display());
        });
        let (mut stdin, input) = (child.stdin.take().expect("piped"), input.to_vec());
        // Who does not read its input closes it: no matter.
        thread::spawn(move || stdin.write_all(&input).is_ok());
        let stdout = child.stdout.take().map(|pipe| thread::spawn(move || read_all(pipe)));
        let stderr = child.stderr.take().map(|pipe| thread::spawn(move || read_all(pipe)));
        Self { child, stdout, stderr }
    }

    /// Waits for the end; a process that hangs fails the test with what it has said.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let status = self.status_within(LIMIT);
        if status.is_none() {
            self.kill_all();
        }
        let text = |reader: &mut Option<JoinHandle<Vec<u8>>>| {
            reader.take().and_then(|reader| reader.join().ok()).unwrap_or_default()
        };
        let stdout = text(&mut self.stdout);
        let stderr = String::from_utf8_lossy(&text(&mut self.stderr)).into_owned();
        let status = status.unwrap_or_else(|| panic!("not done after {LIMIT:?}:\n{stderr}"));
        Ended { code: status.code(), stdout, stderr }
    }

    fn status_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.child.try_wait().expect("a child can be waited for") {
                Some(status) => return Some(status),
                None if Instant::now() > deadline => return None,
                None => thread::sleep(POLL),
            }
        }
    }

    /// Waits until `condition` holds while the process runs; whether it came to hold.
    pub fn reaches(&mut self, condition: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + LIMIT;
        while !condition() {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return condition();
            }
            assert!(Instant::now() < deadline, "waited for {LIMIT:?} in vain");
            thread::sleep(POLL);
        }
        true
    }

    /// Sends `signal` to the process alone.
    pub fn signal(&self, signal: Signal) {
        kill(self.child.id(), signal);
    }

    /// SIGKILL to the process and all its descendants, as at the end of a Slurm job.
    pub fn kill_all(&mut self) {
        // mpirun first: it must not clean up after its ranks.
        for pid in with_descendants(self.child.id()) {
            kill(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.kill_all();
        }
    }
}

/// Runs `command` to its end.
#[track_caller]
pub fn run(command: &mut Command) -> Ended {
    Running::start(command, b"").wait()
}

/// `mpirun -n ranks`, to be followed by a program. Containers and CI run as root, with
/// fewer cores than ranks.
pub fn mpirun(ranks: usize) -> Command {
    let mut command = without_launcher(Command::new("mpirun"));
    command
        .args(["--oversubscribe", "-n", &ranks.to_string()])
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_mpi_yield_when_idle", "1")
        .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
        .env("OMPI_MCA_hwloc_base_binding_policy", "none");
    command
}

/// Whether there is an mpirun; says so if not.
pub fn has_mpirun() -> bool {
    let found =
        Command::new("mpirun").arg("--version").output().is_ok_and(|out| out.status.success());
    if !found {
        println!("skipped: no mpirun on PATH");
    }
    found && cfg!(feature = "mpi")
}

fn kill(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // It may be gone by now.
    let _ = pid.map(|pid| kill_process(pid, signal));
}

/// `root` and all processes below it, parents first.
fn with_descendants(root: u32) -> Vec<u32> {
    let processes: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, parent(&entry.path())?))
        })
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        found.extend(processes.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| child));
        next += 1;
    }
    found
}

/// The parent of the process that `/proc/PID` is about (field 4 of `stat`, proc(5)).
fn parent(process: &Path) -> Option<u32> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn read_all(mut pipe: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = pipe.read_to_end(&mut bytes);
    bytes
}

/// `command` without what would decide in the environment how farm runs: its flags'
/// twins, and the launcher that the tests themselves may run under.
pub fn without_launcher(mut command: Command) -> Command {
    const PREFIXES: [&str; 6] = ["FARM_", "SLURM_", "OMPI_", "PMIX_", "PMI_", "PRTE_"];
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command
}
