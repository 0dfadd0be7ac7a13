//! The job that farm runs in: what Slurm and the MPI launcher say about it, and
//! this rank's share of its node's CPUs and memory.
//!
//! Everything that decides is a pure function over texts and numbers; thin
//! wrappers read the environment, `/proc` and `/sys` and run Slurm's commands
//! ([`query`]). [`partitions`] and [`sbatch`] are the texts that a submission reads
//! and writes.

pub mod cgroup;
pub mod job_env;
pub mod memory;
pub mod oom;
pub mod partitions;
pub mod query;
pub mod sbatch;
pub mod threads;
pub mod time;

pub use job_env::{JobEnv, launcher_local_ranks, launcher_rank};
pub use memory::{MemoryBudget, memory_for_rank};
pub use oom::OomWatch;
pub use threads::{RankCpus, guess_threads, init_threads, limit_library_threads, threads_for_rank};
pub use time::time_seconds;
