//! One file a subcommand, each a story that reads on one screen.
//!
//! [`launch`] starts the ranks and ends them with one exit code; [`generate`] is the
//! main job (and `farm score`), in the steps [`plan`], [`load`], [`work`] and
//! [`summary`].

pub mod deadline;
pub mod generate;
pub mod launch;
pub mod load;
pub mod logging;
pub mod plan;
pub mod records;
pub mod report;
pub mod signals;
pub mod stage;
pub mod summary;
pub mod work;

use std::io::Write;

use crate::cli::{Cli, Command};
use crate::error::say;
use crate::{Error, ErrorKind, Result};
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
            let job = generate::Job::generate(args);
            launch::on_ranks(&Start::of(&args.parallelism, &args.log), |rank| job.run(rank))
        }
        Command::Score(args) => {
            let job = generate::Job::score(args);
            launch::on_ranks(&Start::of(&args.parallelism, &args.log), |rank| job.run(rank))
        }
        Command::Stage(args) => {
            launch::on_ranks(&Start::plain(&args.log), |rank| stage::run(args, rank))
        }
        Command::Report(args) => {
            let outcome = report::run(args).map(|()| 0);
            outcome.inspect_err(|error| say(format_args!("farm: error: {error}")))
        }
    };
    outcome.unwrap_or_else(exit_code)
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
