//! How many threads a rank runs (invariant 9: from the affinity mask and Slurm's
//! variables, shared among the node's ranks).
//!
//! Hardware threads count as CPUs; where a site has SMT on, `--threads` or
//! `--hint=nomultithread` halves the number.

use std::path::Path;

use rayon::ThreadPoolBuilder;
use serde::{Deserialize, Serialize};

use super::JobEnv;
use super::cgroup;
use crate::{Error, Result};

/// The CPUs that one rank may use, as it sees them itself; ranks of a node exchange it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RankCpus {
    /// Numbers of the CPUs in the affinity mask.
    pub mask: Vec<usize>,
    /// `SLURM_CPUS_PER_TASK`.
    pub cpus_per_task: Option<usize>,
    /// `SLURM_CPUS_ON_NODE`.
    pub cpus_on_node: Option<usize>,
    /// CPUs that the control groups' quota allows (to all ranks of the node together).
    pub cgroup_cpus: Option<f64>,
}

impl RankCpus {
    /// Asks the kernel and Slurm for this process's CPUs.
    pub fn probe(job: &JobEnv) -> Self {
        let groups = cgroup::read_file(Path::new("/proc/self/cgroup")).unwrap_or_default();
        Self {
            mask: affinity(),
            cpus_per_task: job.cpus_per_task,
            cpus_on_node: job.cpus_on_node,
            cgroup_cpus: cgroup::cpu_quota(&groups, &cgroup::read_file),
        }
    }

    /// As bytes for [`crate::comm::Communicator::all_gather`] over the node.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data serialises")
    }

    /// Reads [`RankCpus::to_bytes`]; an error is a fault (ranks of unequal versions).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::fault(format!("CPU mask of a rank of this node: {error}")))
    }
}

/// The affinity mask; the first n CPUs where the kernel does not tell (more than 1024 CPUs).
fn affinity() -> Vec<usize> {
    let mask = rustix::thread::sched_getaffinity(None).map(|set| {
        (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect::<Vec<_>>()
    });
    mask.ok().filter(|mask| !mask.is_empty()).unwrap_or_else(|| {
        (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
    })
}

/// Threads of process `local_rank` among the processes of its node.
///
/// A CPU that k processes may use counts 1/k for each: bound ranks (disjoint masks)
/// use their own mask whole, unbound ones divide the node. Slurm's
/// `SLURM_CPUS_PER_TASK`, an even share of `SLURM_CPUS_ON_NODE` and of the control
/// groups' quota are upper bounds, for sites that do not bind tasks. Rounded down,
/// at least 1.
pub fn threads_for_rank(node: &[RankCpus], local_rank: usize) -> usize {
    let own = &node[local_rank];
    let ranks = node.len() as f64;
    let users = |cpu| node.iter().filter(|rank| rank.mask.contains(&cpu)).count().max(1);
    let mut share: f64 = own.mask.iter().map(|&cpu| 1.0 / users(cpu) as f64).sum();
    if let Some(cpus) = own.cpus_per_task {
        share = share.min(cpus as f64);
    }
    if let Some(cpus) = own.cpus_on_node {
        share = share.min(cpus as f64 / ranks);
    }
    if let Some(cpus) = own.cgroup_cpus {
        share = share.min(cpus / ranks);
    }
    // 1/3 + 1/3 + 1/3 can be a hair below 1.
    ((share + 1e-9) as usize).max(1)
}

/// A first guess of this process's threads, before MPI runs: `--threads`, else the share
/// among `local_ranks` processes with the same mask as this one, or the whole mask
/// where Slurm bound it (`SLURM_CPUS_PER_TASK` equals its size).
pub fn guess_threads(requested: Option<usize>, own: &RankCpus, local_ranks: usize) -> usize {
    let bound = own.cpus_per_task == Some(own.mask.len());
    let alike = if bound { 1 } else { local_ranks.max(1) };
    requested.unwrap_or_else(|| threads_for_rank(&vec![own.clone(); alike], 0))
}

/// Tells libraries that count CPUs themselves to use `threads`: candle reads
/// `CANDLE_NUM_THREADS`, it and tokenizers' rayon `RAYON_NUM_THREADS`.
///
/// # Safety
/// Changes the environment: call it first in `main`, before any other thread runs
/// (MPI starts some).
pub unsafe fn limit_library_threads(threads: usize) {
    let threads = threads.to_string();
    // NCCL registers buffers of recorded work, which all ranks of a group must do or none; each
    // decides on its own what it records.
    if std::env::var_os("NCCL_GRAPH_REGISTER").is_none() {
        // SAFETY: as below.
        unsafe { std::env::set_var("NCCL_GRAPH_REGISTER", "0") };
    }
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        // SAFETY: no other thread runs, as this function's own contract asks.
        unsafe { std::env::set_var(name, &threads) };
    }
}

/// Builds the process's one rayon pool with `threads` threads. The ranks of
/// `--local-ranks` share it.
///
/// # Errors
/// A fault where the pool exists already with another size.
pub fn init_threads(threads: usize) -> Result<()> {
    let built = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("farm-{index}"))
        .build_global();
    match built {
        Err(error) if rayon::current_num_threads() != threads => {
            Err(Error::fault(format!("starting {threads} threads: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cpus(mask: std::ops::Range<usize>) -> RankCpus {
        RankCpus { mask: mask.collect(), ..RankCpus::default() }
    }

    /// Too many threads a node is the commonest way to lose half its speed.
    #[test]
    fn shares() {
        let per_task = |n| RankCpus { cpus_per_task: Some(n), ..cpus(0..16) };
        let on_node = RankCpus { cpus_on_node: Some(4), ..cpus(0..64) };
        let quota = RankCpus { cgroup_cpus: Some(1.5), ..cpus(0..8) };
        for (name, node, rank, expected) in [
            ("alone on a workstation", vec![cpus(0..8)], 0, 8),
            ("unbound ranks divide the node", vec![cpus(0..8); 4], 3, 2),
            ("a remainder is left over", vec![cpus(0..10); 4], 0, 2),
            ("more ranks than CPUs", vec![cpus(0..2); 4], 0, 1),
            ("three on three", vec![cpus(0..3); 3], 1, 1),
            ("bound ranks keep their masks", vec![cpus(0..4), cpus(4..8)], 1, 4),
            ("partly shared", vec![cpus(0..4), cpus(2..6)], 0, 3),
            ("unbound, with --cpus-per-task", vec![per_task(2), per_task(2)], 0, 2),
            ("a wish above the share", vec![per_task(16); 4], 0, 4),
            ("part of a node, not enforced", vec![on_node.clone(), on_node], 1, 2),
            ("a container's quota", vec![quota], 0, 1),
            ("an empty mask", vec![cpus(0..0)], 0, 1),
        ] {
            assert_eq!(threads_for_rank(&node, rank), expected, "{name}");
        }
    }

    #[test]
    fn guess_before_mpi() {
        let bound = RankCpus { cpus_per_task: Some(4), ..cpus(4..8) };
        assert_eq!(guess_threads(None, &bound, 2), 4);
        assert_eq!(guess_threads(None, &cpus(0..8), 2), 4);
        assert_eq!(guess_threads(None, &cpus(0..8), 0), 8);
        assert_eq!(guess_threads(Some(3), &cpus(0..8), 2), 3);
    }

    #[test]
    fn masks_travel_between_ranks() {
        let own = RankCpus::probe(&JobEnv::default());
        assert!(!own.mask.is_empty());
        assert_eq!(RankCpus::from_bytes(&own.to_bytes()), Ok(own));
        assert!(RankCpus::from_bytes(b"{").is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever the masks, a node with at least as many CPUs as ranks is not oversubscribed.
        #[test]
        fn never_oversubscribes(masks in prop::collection::vec(prop::collection::btree_set(0usize..24, 1..24), 1..6)) {
            let node: Vec<_> = masks.iter()
                .map(|mask| RankCpus { mask: mask.iter().copied().collect(), ..RankCpus::default() })
                .collect();
            let all: std::collections::BTreeSet<_> = masks.iter().flatten().collect();
            let threads: Vec<_> = (0..node.len()).map(|rank| threads_for_rank(&node, rank)).collect();
            let at_minimum = threads.iter().filter(|&&n| n == 1).count();
            prop_assert!(threads.iter().sum::<usize>() <= all.len() + at_minimum);
        }
    }
}
