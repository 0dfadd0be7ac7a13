//! One job at a time on a run directory.
//!
//! `flock` on `RUN_DIR/lock`: the kernel lets go of it when the owner dies, on NFS when
//! its client does. The file's content says who owns it. Where the file system has no
//! `flock` (Lustre mounted without it) the content alone decides: an owner on this host
//! whose process is gone is gone, any other is believed. With Lustre's `localflock` two
//! hosts do not see each other's lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::comm::host_name;
use crate::{Error, Result};

/// Held while this job works on the run directory.
#[derive(Debug)]
pub(super) struct RunLock {
    file: File,
}

/// Who works on the run, for the message to the one who comes too late.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    job: Option<String>,
    host: String,
    pid: u32,
    /// A process id means something within one boot of its host only.
    boot_id: String,
    /// Clock ticks from the boot to the process's start: tells it from a later one of the
    /// same id.
    pid_start: Option<u64>,
}

impl Owner {
    fn this_process(job: Option<&str>) -> Self {
        let pid = std::process::id();
        Self {
            job: job.map(str::to_owned),
            host: host_name(),
            pid,
            boot_id: boot_id(),
            pid_start: pid_start(pid),
        }
    }

    /// Whether this owner is surely gone.
    fn is_gone(&self) -> bool {
        self.host == host_name()
            && (self.boot_id != boot_id() || self.pid_start != pid_start(self.pid))
    }
}

fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Field 22 of `/proc/PID/stat` (proc(5)); `None` if there is no such process.
fn pid_start(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the command's name, may hold spaces; it ends at the last ')'.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

impl RunLock {
    /// Takes the lock `path`, or says who has it.
    pub(super) fn take(path: &Path, job: Option<&str>) -> Result<Self> {
        let io = |error| Error::io(path, error);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .open(path)
            .map_err(|error| Error::input(format!("--run-dir: {}: {error}", path.display())))?;
        let mut content = String::new();
        let locked = file.try_lock();
        file.read_to_string(&mut content).map_err(io)?;
        let owner: Option<Owner> = serde_json::from_str(&content).ok();
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use(path, owner.as_ref(), "")),
            Err(TryLockError::Error(_)) => {
                if let Some(owner) = owner.filter(|owner| !owner.is_gone()) {
                    let help = format!("; if that job is gone, remove {}", path.display());
                    return Err(in_use(path, Some(&owner), &help));
                }
            }
        }
        let owner = serde_json::to_string(&Owner::this_process(job)).map_err(Error::fault)?;
        file.rewind().map_err(io)?;
        file.set_len(0).map_err(io)?;
        file.write_all(owner.as_bytes()).map_err(io)?;
        Ok(Self { file })
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The file stays: removing it would let two later owners lock two files of one name.
        let _ = self.file.set_len(0);
        let _ = self.file.unlock();
    }
}

fn in_use(path: &Path, owner: Option<&Owner>, help: &str) -> Error {
    let run = path.parent().unwrap_or(path).display();
    let owner = match owner {
        Some(Owner { job: Some(job), host, .. }) => format!("job {job} on host {host}"),
        Some(Owner { pid, host, .. }) => format!("process {pid} on host {host}"),
        None => "another process".to_owned(),
    };
    Error::input(format!(
        "the run {run} is in use by {owner}: wait for it, or give this one another --run-dir{help}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time_and_the_second_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = RunLock::take(&path, Some("4711")).unwrap();
        let error = RunLock::take(&path, None).unwrap_err();
        assert!(error.message.contains("in use by job 4711 on host"), "{error}");
        assert_eq!(error.kind.exit_code(), 3);
        drop(first);
        drop(RunLock::take(&path, None).unwrap());
    }

    #[test]
    fn an_owner_that_died_is_gone() {
        let alive = Owner::this_process(None);
        assert!(!alive.is_gone());
        assert!(Owner { pid_start: Some(1), ..alive.clone() }.is_gone(), "another process by now");
        assert!(Owner { boot_id: "before".into(), ..alive.clone() }.is_gone(), "rebooted");
        assert!(!Owner { host: "elsewhere".into(), pid_start: None, ..alive }.is_gone());
    }
}
