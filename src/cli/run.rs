//! Flags of the run directory, and of the commands that look at one or go on with it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::BoolishValueParser;

use super::values::{at_least_one, duration};
use super::{LogArgs, ParallelismArgs, StagingArgs};

/// How the run is kept safe, and shared with other jobs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Run")]
pub struct RunArgs {
    /// Stop in time before this much has passed: 90 (minutes), 30s, 2h, HH:MM:SS, D-HH
    ///
    /// Unfinished texts are saved and the same command goes on with them. The end of a Slurm
    /// job is known without this flag; the earlier of the two counts.
    #[arg(long, env = "FARM_TIME_LIMIT", value_name = "TIME", value_parser = duration)]
    pub time_limit: Option<Duration>,
    /// End with the code of a stopped run where only records that other jobs work on are left
    #[arg(long, env = "FARM_NO_WAIT", value_parser = BoolishValueParser::new())]
    pub no_wait: bool,
    /// Bring finished records to the disk at least every N records …
    #[arg(long, env = "FARM_SYNC_RECORDS", value_name = "N", default_value_t = 256)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub sync_records: u64,
    /// … and at least this often
    #[arg(long, env = "FARM_SYNC_SECONDS", value_name = "SECONDS", default_value_t = 5)]
    pub sync_seconds: u64,
    /// A job on the same run that gave no sign for so long is gone, and its records are free
    #[arg(long, env = "FARM_HEARTBEAT_TIMEOUT", value_name = "SECONDS", default_value_t = 120)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub heartbeat_timeout: u64,
}

/// `farm status`.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// The run directory
    #[arg(value_name = "RUN_DIR")]
    pub run_dir: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long, env = "FARM_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
    /// Print again every so many seconds, until the run is complete
    #[arg(long, env = "FARM_WATCH", value_name = "SECONDS", value_parser = at_least_one())]
    pub watch: Option<usize>,
}

/// `farm retry`.
#[derive(Debug, Clone, Args)]
pub struct RetryArgs {
    /// The run directory; prompts, model, sampling and output are those of the command that
    /// began the run
    #[arg(value_name = "RUN_DIR")]
    pub run_dir: PathBuf,
    /// Ranks and threads.
    #[command(flatten)]
    pub parallelism: ParallelismArgs,
    /// Where the model is staged.
    #[command(flatten)]
    pub staging: StagingArgs,
    /// How the run is kept safe.
    #[command(flatten)]
    pub run: RunArgs,
    /// The log on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}
