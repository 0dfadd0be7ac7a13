//! One file a subcommand, each a story that reads on one screen.
//!
//! [`launch`] starts the ranks and ends them with one exit code; [`generate`] is the
//! main job (and `farm score`), in the steps [`plan`], [`load`], [`work`] and
//! [`summary`].

pub mod deadline;
pub mod device;
pub mod finetune;
pub mod footprint;
pub mod generate;
pub mod inspect;
pub mod launch;
pub mod load;
pub mod logging;
pub mod merge;
pub mod plan;
pub mod records;
pub mod report;
pub mod retry;
pub mod signals;
pub mod stage;
pub mod status;
pub mod submit;
pub mod summary;
pub mod work;

use std::io::Write;

use crate::cli::{Cli, Command, RetryArgs};
use crate::error::say;
use crate::{Error, ErrorKind, Result, slurm};
use launch::Start;

/// Runs the command and returns the process's exit code. Call first in `main`: it
/// sets environment variables before any thread starts.
pub fn run(cli: &Cli) -> i32 {
    let interrupted = cli.interrupted_exit_code();
    let exit_code = |error: Error| match error.kind {
        ErrorKind::Interrupted => interrupted,
        kind => kind.exit_code(),
    };
    let outcome = match &cli.command {
        Command::Generate(args) => {
            let job = generate::Job::generate(args, &cli.given);
            launch::on_ranks(&Start::of(&args.parallelism, &args.log), |rank| job.run(rank))
        }
        Command::Score(args) => {
            let job = generate::Job::score(args, &cli.given);
            launch::on_ranks(&Start::of(&args.parallelism, &args.log), |rank| job.run(rank))
        }
        Command::Finetune(args) => {
            launch::on_ranks(&Start::of(&args.parallelism, &args.log), |rank| {
                finetune::run(args, rank)
            })
        }
        Command::Retry(args) => retry_job(args).and_then(|job| {
            launch::on_ranks(&Start::of(&args.parallelism, &args.log), |rank| job.run(rank))
        }),
        Command::Status(args) => without_ranks(status::run(args)),
        Command::Stage(args) => {
            launch::on_ranks(&Start::plain(&args.log), |rank| stage::run(args, rank))
        }
        Command::Merge(args) => without_ranks(merge::run(args)),
        Command::Submit(args) => without_ranks(submit::run(args, &cli.given)),
        Command::Inspect(args) => without_ranks(inspect::run(args)),
        Command::Report(args) => without_ranks(report::run(args)),
    };
    outcome.unwrap_or_else(exit_code)
}

/// The job of `farm retry`; of the ranks that a launcher started only the first one says
/// what is wrong.
fn retry_job(args: &RetryArgs) -> Result<generate::Job> {
    retry::job(args).inspect_err(|error| {
        if slurm::launcher_rank(|name| std::env::var(name).ok()).unwrap_or(0) == 0 {
            say(format_args!("farm: error: {error}"));
        }
    })
}

/// The exit code of a command that is one process; prints its error.
fn without_ranks(outcome: Result<()>) -> Result<i32> {
    outcome.map(|()| 0).inspect_err(|error| say(format_args!("farm: error: {error}")))
}

/// Writes `text` to standard output.
///
/// # Errors
/// A fault; not where the reader (`head`, say) has seen enough.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| Error::fault(format!("standard output: {error}"))),
    }
}
