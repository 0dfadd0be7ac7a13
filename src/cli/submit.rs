//! The flags of `farm submit`: those of the batch jobs, and all of the run's.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};

use super::values::at_least_one;
use super::{BoolishValueParser, GenerateArgs};
use crate::slurm::partitions;

/// What people copy first.
const EXAMPLES: &str = "\
Examples:
  Look at the batch scripts, then submit them to all partitions:
    farm submit --partitions all --prompts-file prompts.jsonl --model DIR --stats --dry-run
    farm submit --partitions all --prompts-file prompts.jsonl --model DIR --stats
  Two nodes of each of two partitions, on a project's account:
    farm submit --partitions main,gpu --nodes 2 --time 08:00:00 --account PROJECT \\
      --prompts-file prompts.jsonl --model DIR --output out.jsonl

All jobs work on one run and share its prompts. Without --output the records go to
RUN_DIR/output.jsonl; each job's log goes to RUN_DIR/logs. The same command, given again,
submits more jobs to the same run. Flags and FARM_... variables are written into the jobs;
the other variables of this shell go with them too, as sbatch does by default.
--prompts-file -, --local-ranks and --force-new do not fit batch jobs and are refused.";

/// `farm submit`: batch jobs for a run, one a partition.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES, after_long_help = EXAMPLES)]
pub struct SubmitArgs {
    /// The run that the jobs work on. (First, so that its examples are not this command's.)
    #[command(flatten)]
    pub run: GenerateArgs,
    /// The jobs.
    #[command(flatten)]
    pub jobs: JobArgs,
}

/// Flags of the batch jobs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Batch jobs")]
pub struct JobArgs {
    /// Partitions to submit one job each to, by name, or all
    ///
    /// all is every partition that is up, has nodes that are not down or drained, and is shown
    /// to you by sinfo. Partitions may share nodes: each gets its job all the same, and the
    /// jobs share the work once they start. A partition that refuses the job is named and the
    /// others go on.
    #[arg(long, env = "FARM_PARTITIONS", value_name = "all|NAME,…", value_delimiter = ',')]
    #[arg(required = true, value_parser = NonEmptyStringValueParser::new())]
    pub partitions: Vec<String>,
    /// Nodes of each job [default: the template's, 1]
    #[arg(long, env = "FARM_NODES", value_name = "N", value_parser = at_least_one())]
    pub nodes: Option<usize>,
    /// Ranks on each node [default: 1, or the GPUs of a node]
    #[arg(long, env = "FARM_NTASKS_PER_NODE", value_name = "N", value_parser = at_least_one())]
    pub ntasks_per_node: Option<usize>,
    /// Most time of each job, as sbatch takes it; never beyond a partition's limit
    ///
    /// What a job has not finished by then it goes on with after it has queued itself again.
    /// [default: the template's, one hour]
    #[arg(long, env = "FARM_TIME", value_name = "TIME", value_parser = time)]
    pub time: Option<String>,
    /// Account (project) that pays for the jobs
    #[arg(long, env = "FARM_ACCOUNT", value_name = "NAME")]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub account: Option<String>,
    /// Quality of service of the jobs
    #[arg(long, env = "FARM_QOS", value_name = "NAME")]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub qos: Option<String>,
    /// One more argument for sbatch, as --constraint=FEATURE; may be given several times
    #[arg(long, env = "FARM_SBATCH_ARG", value_name = "ARG", allow_hyphen_values = true)]
    #[arg(value_parser = sbatch_argument)]
    pub sbatch_arg: Vec<String>,
    /// What the jobs do with the prompts
    #[arg(long, env = "FARM_COMMAND", value_name = "COMMAND", default_value = "generate")]
    pub command: RunCommand,
    /// Print the batch scripts and submit nothing
    #[arg(long, env = "FARM_DRY_RUN", value_parser = BoolishValueParser::new())]
    pub dry_run: bool,
}

/// The subcommands that work on a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RunCommand {
    /// `farm generate`.
    Generate,
    /// `farm score`.
    Score,
}

fn time(text: &str) -> Result<String, String> {
    match partitions::seconds(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("must be a time such as 90 (minutes), 01:30:00 or 1-12:00:00".into()),
    }
}

fn sbatch_argument(text: &str) -> Result<String, String> {
    match text.starts_with('-') {
        true => Ok(text.to_owned()),
        false => Err("must begin with -, as --constraint=FEATURE".into()),
    }
}
