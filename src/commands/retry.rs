//! `farm retry RUN_DIR`: the failed records of a run again, with the run's own flags.

use std::path::Path;

use crate::cli::{Cli, Command, GenerateArgs, RetryArgs, ScoreArgs};
use crate::commands::generate::Job;
use crate::ledger::RunFile;
use crate::{Error, Result};

/// The job that does it: prompts, model, sampling and output as `run.json` has them; ranks,
/// staging and log as given now.
///
/// # Errors
/// Input errors where the directory holds no run that can be started again.
pub fn job(args: &RetryArgs) -> Result<Job> {
    let run = recorded(&args.run_dir)?;
    let mut words = vec!["farm".to_owned(), run.identity.command.clone()];
    words.extend(run.arguments.iter().map(|word| spooled(word, &args.run_dir)));
    words.push(format!("--run-dir={}", args.run_dir.display()));
    let cli = Cli::parse_args(words.into_iter().map(Into::into).collect()).map_err(|error| {
        let file = args.run_dir.join("run.json");
        Error::input(format!("{}: its arguments cannot be used: {error}", file.display()))
    })?;
    let (parallelism, staging) = (args.parallelism.clone(), args.staging.clone());
    let (run, log) = (args.run.clone(), args.log.clone());
    let job = match cli.command {
        Command::Generate(given) => {
            Job::generate(&GenerateArgs { parallelism, staging, run, log, ..*given }, &cli.given)
        }
        Command::Score(given) => {
            Job::score(&ScoreArgs { parallelism, staging, run, log, ..*given }, &cli.given)
        }
        _ => return Err(Error::input("run.json names a command that makes no records")),
    };
    Ok(Job { retry: true, ..job })
}

fn recorded(run_dir: &Path) -> Result<RunFile> {
    RunFile::read(run_dir)?.ok_or_else(|| {
        Error::input(format!(
            "{}: no run of farm (there is no run.json); name the run directory, the folder under \
             farm-runs/",
            run_dir.display()
        ))
    })
}

/// Standard input was kept in the run directory.
fn spooled(word: &str, run_dir: &Path) -> String {
    match word {
        "--prompts-file=-" => format!("--prompts-file={}", run_dir.join("stdin").display()),
        word => word.to_owned(),
    }
}
