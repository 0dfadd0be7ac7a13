//! From a process to ranks: MPI, threads of one process, or this process alone;
//! their CPU threads, their log, and the one error message and exit code at the end.

use std::sync::Arc;

use crate::cli::{LogArgs, ParallelismArgs};
use crate::comm::{Communicator, Launch, LaunchKind, LocalComm, World, agree, world};
use crate::commands::logging::{self, RankName};
use crate::error::say;
use crate::slurm::{
    JobEnv, RankCpus, guess_threads, init_threads, launcher_local_ranks, limit_library_threads,
    threads_for_rank,
};
use crate::{Error, ErrorKind, Result};

/// One rank of the job.
pub struct Rank {
    /// All ranks.
    pub world: Arc<dyn Communicator>,
    /// What Slurm says about the job.
    pub job: JobEnv,
    /// Threads of this process.
    pub threads: usize,
}

/// How to start.
pub struct Start<'a> {
    local_ranks: Option<usize>,
    threads: Option<usize>,
    log: &'a LogArgs,
}

impl<'a> Start<'a> {
    /// As the flags say.
    pub fn of(parallelism: &ParallelismArgs, log: &'a LogArgs) -> Self {
        Self { local_ranks: parallelism.local_ranks, threads: parallelism.threads, log }
    }

    /// For a command without flags for ranks and threads.
    pub fn plain(log: &'a LogArgs) -> Self {
        Self { local_ranks: None, threads: None, log }
    }
}

/// Runs `body` on every rank and returns the exit code of this process.
///
/// `body` must fail alike on all ranks (see [`agree`]); rank 0 prints the error.
/// All ranks leave together after a last barrier.
///
/// # Errors
/// What `body` returned, already printed.
pub fn on_ranks(start: &Start, body: impl Fn(&Rank) -> Result<i32> + Sync) -> Result<i32> {
    let job = JobEnv::from_env();
    let local = launcher_local_ranks(|name| std::env::var(name).ok()).unwrap_or(1);
    let guess = guess_threads(start.threads, &RankCpus::probe(&job), local);
    // SAFETY: nothing has started a thread yet.
    unsafe { limit_library_threads(guess) };
    let launch = Launch::of_this_process();
    let threads = start.local_ranks.filter(|&ranks| ranks > 1);
    match (threads, launch.kind()) {
        (Some(ranks), LaunchKind::Alone) => on_threads(start, &job, ranks, body),
        _ => {
            let world = world(&launch).inspect_err(|error| {
                if launch.is_first_task() {
                    print_error(error);
                }
            })?;
            on_processes(start, job, &world, |rank| {
                threads.map_or(Ok(()), refuse_local_ranks)?;
                body(rank)
            })
        }
    }
}

fn refuse_local_ranks(ranks: usize) -> Result<()> {
    Err(Error::usage(format!(
        "--local-ranks {ranks} is for a start without srun or mpirun; a launcher makes the ranks \
         itself (-n {ranks})"
    )))
}

fn on_processes(
    start: &Start,
    job: JobEnv,
    world: &World,
    body: impl Fn(&Rank) -> Result<i32>,
) -> Result<i32> {
    let comm = world.comm.clone();
    let name = || RankName { rank: comm.rank(), host: comm.host().to_owned() };
    let prepared =
        logging::init(start.log.log_format, start.log.quiet, (comm.size() > 1).then(name))
            .map(|()| RankCpus::probe(&job));
    let run = || {
        let cpus = agree(&*comm, prepared)?;
        let threads = agree(&*comm, start_threads(start, &*comm.split_shared_memory(), &cpus))?;
        body(&Rank { world: comm.clone(), job, threads })
    };
    let outcome = run();
    if let Err(error) = &outcome
        && comm.rank() == 0
    {
        print_error(error);
    }
    comm.barrier();
    outcome
}

/// Starts this process's threads: its share of what the node's processes may use.
fn start_threads(start: &Start, node: &dyn Communicator, cpus: &RankCpus) -> Result<usize> {
    let all = node.all_gather(&cpus.to_bytes());
    let all = all.iter().map(|bytes| RankCpus::from_bytes(bytes)).collect::<Result<Vec<_>>>()?;
    let threads = start.threads.unwrap_or_else(|| threads_for_rank(&all, node.rank()));
    init_threads(threads)?;
    Ok(threads)
}

fn on_threads(
    start: &Start,
    job: &JobEnv,
    ranks: usize,
    body: impl Fn(&Rank) -> Result<i32> + Sync,
) -> Result<i32> {
    let prepare = || {
        logging::init(start.log.log_format, start.log.quiet, None)?;
        let threads = start.threads.unwrap_or_else(|| threads_for_rank(&[RankCpus::probe(job)], 0));
        init_threads(threads)?;
        Ok(threads)
    };
    let threads = prepare().inspect_err(print_error)?;
    let outcomes = LocalComm::run(ranks, |world| {
        logging::name_thread(RankName { rank: world.rank(), host: world.host().to_owned() });
        body(&Rank { world, job: job.clone(), threads })
    });
    let outcome = outcomes.into_iter().next().unwrap_or(Ok(0));
    outcome.inspect_err(print_error)
}

fn print_error(error: &Error) {
    match error.kind {
        // Asked for, and nothing is wrong.
        ErrorKind::Interrupted => say(format_args!("farm: {error}")),
        _ => say(format_args!("farm: error: {error}")),
    }
}
