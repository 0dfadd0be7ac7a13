//! The kernel's out-of-memory killer: it leaves no message in the job's output, only a
//! dead process and a counter in its control group.
//!
//! The counter is `oom_kill` in `memory.events` (version 2) or `memory.oom_control`
//! (version 1). Seen are the processes of this job on this node; version 1 does not count
//! those in control groups beside this process's own.

use std::path::{Path, PathBuf};

use super::cgroup::{self, Hierarchy, ReadFile};

/// Counts processes that the killer has ended since this was made.
#[derive(Debug, Clone)]
pub struct OomWatch {
    /// The text of `/proc/self/cgroup`.
    groups: String,
    kills_at_start: u64,
}

impl OomWatch {
    /// Starts counting at the job's processes on this node.
    pub fn start() -> Self {
        Self::with(&cgroup::read_file)
    }

    /// Processes of this job on this node that were killed since; 0 where the kernel does
    /// not tell.
    pub fn new_kills(&self) -> u64 {
        self.new_kills_with(&cgroup::read_file)
    }

    /// What to tell the user; `None` where nothing was killed.
    pub fn message(&self, host: &str) -> Option<String> {
        (self.new_kills() > 0).then(|| oom_message(host))
    }

    fn with(read: ReadFile) -> Self {
        let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
        let kills_at_start = kills(&groups, read);
        Self { groups, kills_at_start }
    }

    fn new_kills_with(&self, read: ReadFile) -> u64 {
        kills(&self.groups, read).saturating_sub(self.kills_at_start)
    }
}

/// What happened on `host`, and what helps.
pub fn oom_message(host: &str) -> String {
    format!(
        "the kernel's out-of-memory killer ended a process of this job on {host}: ask for more \
         memory (--mem), start fewer ranks a node, or lower --max-batch-size or --kv-cache-memory"
    )
}

/// Kills so far. A group of version 2 counts those below it, so the highest counts; one of
/// version 1 counts its own only, so they are summed.
fn kills(groups: &str, read: ReadFile) -> u64 {
    let counters = |hierarchy, file: &str| {
        let counter = |dir: &PathBuf| cgroup::stat_field(&read(&dir.join(file))?, "oom_kill");
        own_and_the_jobs(groups, hierarchy).iter().filter_map(counter).collect::<Vec<_>>()
    };
    let v2 = counters(Hierarchy::V2, "memory.events").last().copied().unwrap_or(0);
    let v1 = counters(Hierarchy::V1("memory"), "memory.oom_control").iter().sum::<u64>();
    v2.saturating_add(v1)
}

/// This process's group and those above it up to the job's (Slurm names it `job_ID`); the
/// groups above that are of other jobs, too. Outside of Slurm: its own alone.
fn own_and_the_jobs(groups: &str, hierarchy: Hierarchy) -> Vec<PathBuf> {
    let mut directories = cgroup::directories(groups, hierarchy);
    let is_job = |dir: &PathBuf| {
        dir.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("job_"))
    };
    let job = directories.iter().position(is_job).unwrap_or(0);
    directories.truncate(job + 1);
    directories
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLURM_V2: &str = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n";
    const SLURM_V1: &str = "4:memory:/slurm/uid_1000/job_7/step_0\n";
    const SESSION: &str = "0::/user.slice/session-3.scope\n";
    const JOB: &str = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.events";
    const TASK: &str =
        "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.events";
    const NODE: &str = "/sys/fs/cgroup/system.slice/memory.events";
    const V1_STEP: &str = "/sys/fs/cgroup/memory/slurm/uid_1000/job_7/step_0/memory.oom_control";
    const V1_JOB: &str = "/sys/fs/cgroup/memory/slurm/uid_1000/job_7/memory.oom_control";

    /// A file system of counters, `oom_kill` of each file.
    fn root<'a>(
        groups: &'a str,
        kills: &'a [(&'a str, u64)],
    ) -> impl Fn(&Path) -> Option<String> + 'a {
        move |path| {
            if path == Path::new("/proc/self/cgroup") {
                return Some(groups.to_owned());
            }
            let (_, count) = kills.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(match path.ends_with("memory.events") {
                true => format!("low 0\nhigh 0\nmax 9\noom 3\noom_kill {count}\n"),
                false => format!("oom_kill_disable 0\nunder_oom 0\noom_kill {count}\n"),
            })
        }
    }

    #[test]
    fn kills_since_the_start_are_those_of_the_job_alone() {
        let session = "/sys/fs/cgroup/user.slice/session-3.scope/memory.events";
        for (name, groups, before, after, expected) in [
            ("nothing", SLURM_V2, vec![(JOB, 2), (TASK, 1)], vec![(JOB, 2), (TASK, 1)], 0),
            ("this task's", SLURM_V2, vec![(JOB, 0), (TASK, 0)], vec![(JOB, 1), (TASK, 1)], 1),
            ("another task's", SLURM_V2, vec![(JOB, 1), (TASK, 0)], vec![(JOB, 3), (TASK, 0)], 2),
            ("another job's", SLURM_V2, vec![(NODE, 0), (JOB, 0)], vec![(NODE, 5), (JOB, 0)], 0),
            ("no counter at the job", SLURM_V2, vec![(TASK, 0)], vec![(TASK, 1)], 1),
            ("version 1", SLURM_V1, vec![(V1_STEP, 0)], vec![(V1_STEP, 1), (V1_JOB, 1)], 2),
            ("a session", SESSION, vec![(session, 4)], vec![(session, 5)], 1),
            ("a group that is gone", SLURM_V2, vec![(JOB, 2)], vec![], 0),
            ("no control groups", "", vec![], vec![(JOB, 2)], 0),
        ] {
            let watch = OomWatch::with(&root(groups, &before));
            assert_eq!(watch.new_kills_with(&root(groups, &after)), expected, "{name}");
        }
    }

    #[test]
    fn nobody_is_killed_here() {
        let watch = OomWatch::start();
        assert_eq!(watch.message("node01").is_some(), watch.new_kills() > 0);
    }

    #[test]
    fn the_message_says_where_and_what_helps() {
        let text = oom_message("node01");
        for part in ["node01", "--mem", "--max-batch-size", "--kv-cache-memory"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
