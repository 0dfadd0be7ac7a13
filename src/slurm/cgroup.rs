//! Control groups: which directories limit this process, and what they say.
//!
//! Formats: Linux `Documentation/admin-guide/cgroup-v2.rst` and
//! `cgroup-v1/{memory,cpusets}.rst`, `scheduler/sched-bwc.rst`. Files are read by
//! a function that the caller passes, so that tests need no kernel.

use std::path::{Path, PathBuf};

/// Reads a small file; `None` where it is missing or unreadable.
pub type ReadFile<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// [`ReadFile`] of the real file system.
pub fn read_file(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// A hierarchy that may limit this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hierarchy {
    /// The unified hierarchy.
    V2,
    /// The hierarchy of one version 1 controller, `memory` or `cpu`.
    V1(&'static str),
}

/// The directories that limit this process in `hierarchy`, from its own group up
/// to the root; empty where the process is in none. `proc_self_cgroup` is the text
/// of `/proc/self/cgroup` (lines `id:controllers:path`).
///
/// In a container the path can be the host's and not be mounted; its files are
/// then missing and the walk still ends at the root, which is the container's group.
pub fn directories(proc_self_cgroup: &str, hierarchy: Hierarchy) -> Vec<PathBuf> {
    let group = proc_self_cgroup.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let found = match hierarchy {
            Hierarchy::V2 => id == "0" && controllers.is_empty(),
            Hierarchy::V1(name) => controllers.split(',').any(|c| c == name),
        };
        found.then_some(path)
    });
    let Some(group) = group else { return Vec::new() };
    let root = match hierarchy {
        Hierarchy::V2 => PathBuf::from("/sys/fs/cgroup"),
        Hierarchy::V1(name) => Path::new("/sys/fs/cgroup").join(name),
    };
    // A path that leaves the namespace ("/../x") has no directory here.
    let inside = !Path::new(group).components().any(|c| c == std::path::Component::ParentDir);
    let relative = if inside { group.trim_start_matches('/') } else { "" };
    Path::new(relative).ancestors().map(|path| root.join(path)).collect()
}

/// Whole and fractional CPUs that the tightest quota up the tree allows: `cpu.max`
/// of version 2 (`quota period` or `max period`), `cpu.cfs_quota_us` and
/// `cpu.cfs_period_us` of version 1. `None` without a quota.
pub fn cpu_quota(proc_self_cgroup: &str, read: ReadFile) -> Option<f64> {
    let v2 = directories(proc_self_cgroup, Hierarchy::V2).into_iter().filter_map(|dir| {
        let text = read(&dir.join("cpu.max"))?;
        let mut words = text.split_whitespace();
        ratio(words.next()?, words.next()?)
    });
    let v1 = directories(proc_self_cgroup, Hierarchy::V1("cpu")).into_iter().filter_map(|dir| {
        ratio(&read(&dir.join("cpu.cfs_quota_us"))?, &read(&dir.join("cpu.cfs_period_us"))?)
    });
    v2.chain(v1).min_by(f64::total_cmp)
}

/// `quota / period`; `None` for "max", -1 and nonsense.
fn ratio(quota: &str, period: &str) -> Option<f64> {
    let (quota, period): (f64, f64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// Bytes that the tightest memory limit up the tree leaves: limit − current use, where
/// page cache that the kernel would drop first (inactive file pages) does not count as
/// use. `None` without a limit.
pub fn memory_left_bytes(proc_self_cgroup: &str, read: ReadFile) -> Option<u64> {
    const V2: [&str; 3] = ["memory.max", "memory.current", "inactive_file"];
    const V1: [&str; 3] = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
    let left = |hierarchy, [limit, usage, inactive]: [&str; 3]| {
        directories(proc_self_cgroup, hierarchy)
            .into_iter()
            .filter_map(|dir| {
                let number = |name: &str| read(&dir.join(name))?.trim().parse::<u64>().ok();
                // "max" does not parse; version 1 writes about 2^63 for "no limit".
                let limit = number(limit).filter(|&limit| limit < 1 << 62)?;
                let stat = read(&dir.join("memory.stat")).unwrap_or_default();
                let droppable = stat_field(&stat, inactive).unwrap_or(0);
                Some(limit.saturating_sub(number(usage)?.saturating_sub(droppable)))
            })
            .min()
    };
    [left(Hierarchy::V2, V2), left(Hierarchy::V1("memory"), V1)].into_iter().flatten().min()
}

/// The number after `name` in a file of `name number` lines.
pub(super) fn stat_field(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files<'a>(files: &'a [(&'a str, &'a str)]) -> impl Fn(&Path) -> Option<String> + 'a {
        move |path| {
            files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).into())
        }
    }

    const SLURM_V2: &str = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n";
    const V1: &str = "5:cpuacct,cpu:/slurm/job_7\n4:memory:/slurm/job_7\n0::/init.scope\n";

    #[test]
    fn directories_go_from_the_own_group_to_the_root() {
        let shown = |text, hierarchy| {
            directories(text, hierarchy).iter().map(|d| d.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(
            shown(V1, Hierarchy::V1("memory")),
            [
                "/sys/fs/cgroup/memory/slurm/job_7",
                "/sys/fs/cgroup/memory/slurm",
                "/sys/fs/cgroup/memory/"
            ]
        );
        assert_eq!(shown("0::/\n", Hierarchy::V2), ["/sys/fs/cgroup/"]);
        assert_eq!(shown("0::/../outside\n", Hierarchy::V2), ["/sys/fs/cgroup/"]);
        assert!(shown("", Hierarchy::V2).is_empty());
        assert!(shown(SLURM_V2, Hierarchy::V1("cpu")).is_empty());
    }

    #[test]
    fn the_tightest_cpu_quota_counts() {
        let job = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/cpu.max";
        let scope = "/sys/fs/cgroup/system.slice/slurmstepd.scope/cpu.max";
        let tree = [(job, "150000 100000\n"), (scope, "max 100000\n")];
        assert_eq!(cpu_quota(SLURM_V2, &files(&tree)), Some(1.5));
        assert_eq!(cpu_quota(SLURM_V2, &files(&[(scope, "max 100000\n")])), None);
        let v1 = [
            ("/sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_quota_us", "-1\n"),
            ("/sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_period_us", "100000\n"),
            ("/sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us", "400000\n"),
            ("/sys/fs/cgroup/cpu/slurm/cpu.cfs_period_us", "100000\n"),
        ];
        assert_eq!(cpu_quota(V1, &files(&v1)), Some(4.0));
    }

    #[test]
    fn the_tightest_memory_limit_counts_and_droppable_cache_is_free() {
        let root = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7";
        let [max, current, stat] = ["max", "current", "stat"].map(|f| format!("{root}/memory.{f}"));
        let step = format!("{root}/step_0/memory.max");
        let tree = [
            (step.as_str(), "max\n"),
            (max.as_str(), "1000\n"),
            (current.as_str(), "700\n"),
            (stat.as_str(), "anon 300\ninactive_file 100\n"),
        ];
        assert_eq!(memory_left_bytes(SLURM_V2, &files(&tree)), Some(400));
        let v1 = [
            ("/sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", "500\n"),
            ("/sys/fs/cgroup/memory/slurm/memory.usage_in_bytes", "600\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "600\n"),
        ];
        assert_eq!(memory_left_bytes(V1, &files(&v1)), Some(0), "over the limit is nothing left");
        assert_eq!(memory_left_bytes("0::/\n", &files(&[])), None);
    }
}
