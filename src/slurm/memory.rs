//! How much memory this rank may still take, for the size of the KV cache.

use std::path::Path;

use super::JobEnv;
use super::cgroup::{self, ReadFile};

/// This rank's share of what is left on its node, and which limit decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Bytes for this rank.
    pub bytes: u64,
    /// The deciding limit, for the log: `MemAvailable`, `cgroup` or `SLURM_MEM_PER_NODE`.
    pub limited_by: &'static str,
}

/// Memory for one of `local_ranks` ranks of this node: the least of the kernel's
/// `MemAvailable`, what the control groups leave, and Slurm's limit less what the
/// job holds already (`job_in_use_bytes`: the staged model, since memory in
/// `/dev/shm` counts against the job), divided evenly. `None` where nothing is known
/// (`/proc` is not mounted).
pub fn memory_for_rank(
    job: &JobEnv,
    local_ranks: usize,
    job_in_use_bytes: u64,
) -> Option<MemoryBudget> {
    budget(job, local_ranks, job_in_use_bytes, &cgroup::read_file)
}

fn budget(job: &JobEnv, local_ranks: usize, in_use: u64, read: ReadFile) -> Option<MemoryBudget> {
    let text = |path: &str| read(Path::new(path)).unwrap_or_default();
    let limits = [
        (mem_available_bytes(&text("/proc/meminfo")), "MemAvailable"),
        (cgroup::memory_left_bytes(&text("/proc/self/cgroup"), read), "cgroup"),
        (job.memory_limit_bytes().map(|limit| limit.saturating_sub(in_use)), "SLURM_MEM_PER_NODE"),
    ];
    let known = limits.into_iter().filter_map(|(bytes, name)| Some((bytes?, name)));
    let (bytes, limited_by) = known.min_by_key(|(bytes, _)| *bytes)?;
    Some(MemoryBudget { bytes: bytes / local_ranks.max(1) as u64, limited_by })
}

/// `MemAvailable` of `/proc/meminfo` (proc_meminfo(5), in KiB there), bytes.
pub fn mem_available_bytes(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:    8192 kB\n";

    #[test]
    fn meminfo_is_in_kib() {
        assert_eq!(mem_available_bytes(MEMINFO), Some(8 << 20));
        assert_eq!(mem_available_bytes("MemTotal: 1 kB\n"), None);
        assert_eq!(mem_available_bytes("MemAvailable: many kB\n"), None);
    }

    /// A KV cache larger than any of the limits would get the job killed.
    #[test]
    fn the_least_limit_is_shared_among_the_ranks() {
        let read = |path: &Path| match path.to_str()? {
            "/proc/meminfo" => Some(MEMINFO.to_owned()),
            "/proc/self/cgroup" => Some("0::/job\n".to_owned()),
            "/sys/fs/cgroup/job/memory.max" => Some("6291456\n".to_owned()),
            "/sys/fs/cgroup/job/memory.current" => Some("0\n".to_owned()),
            _ => None,
        };
        let open = JobEnv::default();
        let of = |job: &JobEnv, ranks, used, read: ReadFile| {
            budget(job, ranks, used, read).map(|b| (b.bytes, b.limited_by))
        };
        assert_eq!(of(&open, 2, 0, &read), Some((3 << 20, "cgroup")));
        let slurm = JobEnv { mem_per_node_mib: Some(5), ..JobEnv::default() };
        assert_eq!(of(&slurm, 1, 1 << 20, &read), Some((4 << 20, "SLURM_MEM_PER_NODE")));
        assert_eq!(of(&slurm, 1, 9 << 20, &read), Some((0, "SLURM_MEM_PER_NODE")));
        assert_eq!(of(&open, 1, 0, &|_| None), None);
        let bare = |path: &Path| (path == Path::new("/proc/meminfo")).then(|| MEMINFO.to_owned());
        assert_eq!(of(&open, 0, 0, &bare), Some((8 << 20, "MemAvailable")));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(memory_for_rank(&JobEnv::default(), 1, 0).is_some_and(|budget| budget.bytes > 0));
    }
}
