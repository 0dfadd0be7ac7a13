//! The command line: flags and subcommands as plain structs.
//!
//! Nothing is resolved here. An `Option` that is `None` was neither on the
//! command line nor in its `FARM_…` environment twin, so that `commands` can
//! apply the precedence record > flag > `generation_config.json` > default.
//! `generate` is the default subcommand: `farm --prompts-file p.jsonl …` is
//! `farm generate --prompts-file p.jsonl …`. A wrong command line leaves with
//! exit code 2.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use clap::builder::{BoolishValueParser, NonEmptyStringValueParser};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::model::{AdapterSource, WeightDtype};
use crate::slurm;
pub use crate::stats::progress::ProgressMode;

mod choices;
mod finetune;
mod given;
mod merge;
mod run;
mod submit;
mod text;
pub mod values;

#[cfg(test)]
mod tests;

pub use choices::{
    ActivationType, AdapterFormat, DeviceKind, Dtype, GenerationConfigSource, KernelTier,
    LogFormat, PromptsFormat, Quantize, ScheduleName, StageFallback,
};
pub use finetune::{DataArgs, FinetuneArgs, FinetuneOutputArgs, Layers, LoraArgs, TrainingArgs};
pub use given::{GivenFlag, flag_word, given_flags};
pub use merge::MergeArgs;
pub use run::{RetryArgs, RunArgs, StatusArgs};
pub use submit::{JobArgs, RunCommand, SubmitArgs};
use values::{
    at_least_one, bytes, fraction, non_negative, nucleus_mass, one_to, penalty, positive,
};

/// The `--version` text: which optional parts this binary was built with.
static VERSION: LazyLock<String> = LazyLock::new(text::version);

/// Batch inference of language models under Slurm and MPI.
///
/// Stages a model to every node's memory, shards a prompts file over ranks,
/// generates with continuous batching and gathers ordered JSONL and statistics
/// at rank 0. Without a subcommand farm generates; `farm generate --help` lists
/// its flags. Every flag has an environment twin, so that a modulefile or a job
/// script can set defaults: FARM_MAX_NEW_TOKENS for --max-new-tokens.
#[derive(Debug, Clone, Parser)]
#[command(name = "farm", version = VERSION.as_str(), after_help = text::EXAMPLES)]
#[command(after_long_help = text::examples_and_exit_codes())]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// The subcommand's flags that the command line or the environment gave.
    #[arg(skip)]
    pub given: Vec<GivenFlag>,
}

/// The subcommands of this version.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Continue every prompt (the default command)
    Generate(Box<GenerateArgs>),
    /// Give every prompt's log-probability and perplexity
    Score(Box<ScoreArgs>),
    /// Train a LoRA adapter for a model
    Finetune(Box<FinetuneArgs>),
    /// Work on the failed records of a run again
    Retry(Box<RetryArgs>),
    /// Show how far a run is, who works on it, and when it may end
    Status(StatusArgs),
    /// Submit batch jobs that work on one run together, one a Slurm partition
    Submit(Box<SubmitArgs>),
    /// Write an adapter into its model's weights: a model that needs no adapter
    Merge(MergeArgs),
    /// Copy a model to the memory of every node and keep it there
    Stage(StageCommandArgs),
    /// Show what a model is, and the memory that it needs
    Inspect(InspectArgs),
    /// Print the tables of a finished run, or how a training goes, and write an HTML page
    Report(ReportArgs),
}

/// `farm generate`.
#[derive(Debug, Clone, Args)]
#[command(after_help = text::EXAMPLES)]
pub struct GenerateArgs {
    /// Where the prompts are.
    #[command(flatten)]
    pub input: InputArgs,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Model, precision and batch sizes.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Ranks and threads.
    #[command(flatten)]
    pub parallelism: ParallelismArgs,
    /// Where the model is staged.
    #[command(flatten)]
    pub staging: StagingArgs,
    /// What a record holds besides its text.
    #[command(flatten)]
    pub record: RecordArgs,
    /// Where records go.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How the run is kept safe and shared.
    #[command(flatten)]
    pub run: RunArgs,
    /// The log on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

/// `farm score`: as `generate` without the sampling flags.
#[derive(Debug, Clone, Args)]
pub struct ScoreArgs {
    /// Where the prompts are.
    #[command(flatten)]
    pub input: InputArgs,
    /// Model, precision and batch sizes.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Ranks and threads.
    #[command(flatten)]
    pub parallelism: ParallelismArgs,
    /// Where the model is staged.
    #[command(flatten)]
    pub staging: StagingArgs,
    /// Where records go.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How the run is kept safe and shared.
    #[command(flatten)]
    pub run: RunArgs,
    /// The log on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

/// A model that a command is about: `farm inspect MODEL`, or by the flag that the others have.
#[derive(Debug, Clone, Args)]
pub struct OneModelArgs {
    /// The model: a directory or a GGUF file
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    argument: Option<PathBuf>,
    /// The model, where no MODEL is given
    #[arg(long = "model", id = "model_flag", env = "FARM_MODEL", value_name = "DIR|FILE.gguf")]
    #[arg(help_heading = "Model")]
    flag: Option<PathBuf>,
}

impl OneModelArgs {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.argument.as_deref().or(self.flag.as_deref()).unwrap_or(Path::new(""))
    }
}

impl From<PathBuf> for OneModelArgs {
    fn from(path: PathBuf) -> Self {
        Self { argument: Some(path), flag: None }
    }
}

/// `farm stage`.
#[derive(Debug, Clone, Args)]
pub struct StageCommandArgs {
    /// The model.
    #[command(flatten)]
    pub model: OneModelArgs,
    /// Tokenizer from elsewhere: tokenizer.json, tokenizer.model, or a directory with one
    #[arg(long, env = "FARM_TOKENIZER", value_name = "FILE|DIR", help_heading = "Model")]
    pub tokenizer: Option<PathBuf>,
    /// Node-local directory that receives the model; created where missing
    #[arg(long, env = "FARM_STAGE_DIR", value_name = "DIR", help_heading = "Staging")]
    #[arg(default_value = DEFAULT_STAGE_DIR)]
    pub stage_dir: PathBuf,
    /// Quantize the weights on their way, for jobs with the same --quantize
    #[arg(long, env = "FARM_QUANTIZE", value_name = "FORMAT", help_heading = "Model")]
    pub quantize: Option<Quantize>,
    /// The log on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

/// `farm inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// The model.
    #[command(flatten)]
    pub model: OneModelArgs,
    /// Tokenizer from elsewhere: tokenizer.json, tokenizer.model, or a directory with one
    #[arg(long, env = "FARM_TOKENIZER", value_name = "FILE|DIR")]
    pub tokenizer: Option<PathBuf>,
    /// List every tensor: name, shape, type, bytes, file
    #[arg(long, env = "FARM_TENSORS", value_parser = BoolishValueParser::new())]
    pub tensors: bool,
    /// Print one JSON object instead of text
    #[arg(long, env = "FARM_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,
}

/// `farm report`.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// The run directory (holds stats.json and ranks.csv), or an adapter's (finetune.json)
    #[arg(value_name = "RUN_DIR")]
    pub run_dir: PathBuf,
    /// Where the HTML page goes [default: RUN_DIR/report.html]
    #[arg(long, env = "FARM_HTML", value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
}

/// Flags of the prompts file.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Input")]
pub struct InputArgs {
    /// Prompts: .txt (one a line), .jsonl, .csv, or - for standard input
    ///
    /// A .jsonl line is {"prompt": …}, {"messages": […]}, {"prompt_token_ids": […]} or an
    /// OpenAI batch line. Fields with the names of the sampling flags override those for that
    /// record (score checks them and uses none).
    #[arg(long, env = "FARM_PROMPTS_FILE", value_name = "FILE|-")]
    pub prompts_file: PathBuf,
    /// Format of the prompts; auto goes by the file's ending (standard input: JSONL)
    #[arg(long, env = "FARM_PROMPTS_FORMAT", value_name = "FORMAT", default_value = "auto")]
    pub prompts_format: PromptsFormat,
    /// Column of a CSV file that holds the prompt
    #[arg(long, env = "FARM_PROMPT_COLUMN", value_name = "NAME", default_value = "prompt")]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub prompt_column: String,
    /// Wrap a plain prompt as one user message for the model's chat template
    #[arg(long, env = "FARM_CHAT", value_parser = BoolishValueParser::new())]
    pub chat: bool,
}

/// Sampling flags; `None` = not given.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Most tokens to generate for a record [default: 256]
    #[arg(long, env = "FARM_MAX_NEW_TOKENS", value_name = "N", value_parser = at_least_one())]
    pub max_new_tokens: Option<usize>,
    /// Sampling temperature; 0 is greedy [default: 0]
    #[arg(long, env = "FARM_TEMPERATURE", value_name = "T", value_parser = non_negative)]
    #[arg(allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the most likely tokens that hold this probability, in (0, 1] [default: 1]
    #[arg(long, env = "FARM_TOP_P", value_name = "P", value_parser = nucleus_mass)]
    #[arg(allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Sample from this many most likely tokens; 0 is off [default: 0]
    #[arg(long, env = "FARM_TOP_K", value_name = "K")]
    pub top_k: Option<usize>,
    /// Drop tokens below this share of the best one's probability, in [0, 1] [default: 0]
    #[arg(long, env = "FARM_MIN_P", value_name = "P", value_parser = fraction)]
    #[arg(allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divide the score of tokens seen before, prompt included (as HF) [default: 1]
    #[arg(long, env = "FARM_REPETITION_PENALTY", value_name = "R", value_parser = positive)]
    #[arg(allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtract this from the score of every token seen before, -2 to 2 [default: 0]
    #[arg(long, env = "FARM_PRESENCE_PENALTY", value_name = "R", value_parser = penalty)]
    #[arg(allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtract this for every time that a token was seen before, -2 to 2 [default: 0]
    #[arg(long, env = "FARM_FREQUENCY_PENALTY", value_name = "R", value_parser = penalty)]
    #[arg(allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Seed; a record's tokens depend on it and on the record's index alone [default: 0]
    #[arg(long, env = "FARM_SEED", value_name = "S")]
    pub seed: Option<u64>,
    /// End a text before this string; may be given several times
    #[arg(long, env = "FARM_STOP", value_name = "STR", allow_hyphen_values = true)]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Never stop at an end-of-sequence token
    #[arg(long, env = "FARM_IGNORE_EOS", value_parser = BoolishValueParser::new())]
    pub ignore_eos: bool,
    /// Write JSON that the schema in this file allows; fields of a record override it
    ///
    /// Properties come in the schema's order, on one line. A text that runs out of room is
    /// led to its end in time where that can be; finish_reason tells (length: it is cut off).
    /// At most one of --json-schema, --regex and --choices.
    #[arg(long, env = "FARM_JSON_SCHEMA", value_name = "FILE")]
    pub json_schema: Option<PathBuf>,
    /// Write a text that this regular expression matches as a whole
    #[arg(long, env = "FARM_REGEX", value_name = "PATTERN", allow_hyphen_values = true)]
    #[arg(value_parser = NonEmptyStringValueParser::new(), conflicts_with = "json_schema")]
    pub regex: Option<String>,
    /// Write one of these texts; \, is a comma; may be given several times
    #[arg(long, env = "FARM_CHOICES", value_name = "A,B,…", allow_hyphen_values = true)]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    #[arg(conflicts_with_all = ["json_schema", "regex"])]
    pub choices: Vec<String>,
    /// Whether the model's generation_config.json sets sampling defaults
    #[arg(long, env = "FARM_GENERATION_CONFIG", value_name = "SOURCE", default_value = "model")]
    pub generation_config: GenerationConfigSource,
}

/// Flags of what a generated record holds besides its text.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Output")]
pub struct RecordArgs {
    /// Add each token's log-probability and those of the N best alternatives, 0 to 20
    #[arg(long, env = "FARM_LOGPROBS", value_name = "N")]
    #[arg(value_parser = values::logprobs())]
    pub logprobs: Option<usize>,
    /// Add the new tokens' ids to each record
    #[arg(long, env = "FARM_RETURN_TOKEN_IDS")]
    #[arg(value_parser = BoolishValueParser::new())]
    pub return_token_ids: bool,
}

/// Flags of the model alone.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct WeightsArgs {
    /// Model: a directory (Hugging Face's or Meta's form) or a GGUF file
    ///
    /// A directory holds config.json and *.safetensors or pytorch_model*.bin, or params.json and
    /// consolidated.*.pth, or one GGUF model. Of a split GGUF model any part will do. A repository
    /// in the cache of Hugging Face (models--ORG--NAME) stands for its main snapshot. What is in
    /// it: farm inspect MODEL.
    #[arg(long, env = "FARM_MODEL", value_name = "DIR|FILE.gguf")]
    pub model: PathBuf,
    /// Tokenizer from elsewhere: tokenizer.json, tokenizer.model, or a directory with one
    ///
    /// It takes the place of the model's own, and its chat template, if it has one, too.
    #[arg(long, env = "FARM_TOKENIZER", value_name = "FILE|DIR")]
    pub tokenizer: Option<PathBuf>,
    /// What to compute on; auto takes a GPU where there is one that this farm can use
    ///
    /// A rank takes one GPU of those that its node shows it (CUDA_VISIBLE_DEVICES, Slurm's
    /// --gpus-per-node). cuda is an error, with the reason, where auto would take the CPU.
    #[arg(long, env = "FARM_DEVICE", value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceKind,
    /// Let several ranks of a node compute on one GPU
    #[arg(long, env = "FARM_SHARE_DEVICE", value_parser = BoolishValueParser::new())]
    pub share_device: bool,
    /// Type of the weights in memory; auto keeps the checkpoint's
    ///
    /// On a CPU all arithmetic is f32. A GPU computes in this type, with sums in f32; one that
    /// has no bf16 (below compute capability 8.0) takes f16 instead and says so.
    #[arg(long, env = "FARM_DTYPE", value_name = "DTYPE", default_value = "auto")]
    pub dtype: Dtype,
    /// Quantize the weights by llama.cpp's block formats, to save memory
    ///
    /// It is done while the model is staged: the ranks of all nodes work on it together, and those
    /// of a node share one copy, which a later job with the same format finds. A GGUF model, and
    /// one that is not staged, is quantized by each rank while it loads, to the same bytes.
    /// Matrices that are quantized already stay as they are; rows that the format's blocks do not
    /// divide take q8_0, or keep their type. With q4_k embedding and output projection take q6_k.
    #[arg(long, env = "FARM_QUANTIZE", value_name = "FORMAT", conflicts_with = "dtype")]
    pub quantize: Option<Quantize>,
    /// CPU kernels; auto takes the best of each rank's CPU (all give the same bits)
    #[arg(long, env = "FARM_KERNEL_TIER", value_name = "TIER", default_value = "auto")]
    pub kernel_tier: KernelTier,
}

/// Flags of the model and of the batches that it runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// The model's weights.
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// What weights are multiplied with on a CPU: activations rounded to suit them, or f32
    ///
    /// rounded takes them to 8 bits beside quantized weights, as llama.cpp does, and to bf16 beside
    /// bf16 weights, as transformers does, which is up to twice as fast; f32 computes what the same
    /// weights would as f32. auto is rounded for texts and f32 for scores. Weights in f32 and f16,
    /// and GPUs, do not use it.
    #[arg(long, env = "FARM_ACTIVATIONS", value_name = "TYPE", default_value = "auto")]
    pub activations: ActivationType,
    /// LoRA adapter: a PEFT directory or a GGUF file; may be given several times
    ///
    /// NAME is what records call it ("adapter": "NAME"; in an OpenAI line also "model");
    /// default is the directory's name, or the file's without .gguf. The only adapter of a run
    /// answers all records that do not say otherwise ("adapter": null is the model alone); of
    /// several, a record that names none is answered by the model alone.
    #[arg(long, env = "FARM_ADAPTER", value_name = "[NAME=]PATH")]
    #[arg(value_parser = values::adapter())]
    pub adapter: Vec<AdapterSource>,
    /// Most records that a rank works on at once [default: 32, on a GPU 256]
    #[arg(long, env = "FARM_MAX_BATCH_SIZE", value_name = "N", value_parser = one_to(1 << 16))]
    pub max_batch_size: Option<usize>,
    /// Longest sequence, prompt and new tokens together [default: the model's context]
    #[arg(long, env = "FARM_MAX_SEQ_LEN", value_name = "N", value_parser = at_least_one())]
    pub max_seq_len: Option<usize>,
    /// Most tokens in one step; longer prompts come in chunks [default: 512, on a GPU 4096]
    #[arg(long, env = "FARM_MAX_BATCHED_TOKENS", value_name = "N", value_parser = one_to(1 << 20))]
    pub max_batched_tokens: Option<usize>,
    /// Memory of a rank's KV cache, as 8GiB [default: from the batch size and free memory]
    #[arg(long, env = "FARM_KV_CACHE_MEMORY", value_name = "BYTES", value_parser = bytes)]
    pub kv_cache_memory: Option<u64>,
}

/// Flags of ranks and threads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Parallelism")]
pub struct ParallelismArgs {
    /// Split every layer over this many ranks, for a model that one rank cannot hold
    #[arg(long, env = "FARM_TENSOR_PARALLEL", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = at_least_one())]
    pub tensor_parallel: usize,
    /// Run this many ranks as threads of one process, where there is no launcher
    #[arg(long, env = "FARM_LOCAL_RANKS", value_name = "N", value_parser = one_to(1024))]
    pub local_ranks: Option<usize>,
    /// Threads of a process [default: its share of the node's CPUs in the job]
    #[arg(long, env = "FARM_THREADS", value_name = "N", value_parser = one_to(1024))]
    pub threads: Option<usize>,
}

/// Flags of staging.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Staging")]
pub struct StagingArgs {
    /// Node-local directory that receives the model; created where missing
    #[arg(long, env = "FARM_STAGE_DIR", value_name = "DIR", default_value = DEFAULT_STAGE_DIR)]
    pub stage_dir: PathBuf,
    /// Read the model where it lies; no copy (wins over the other staging flags)
    #[arg(long, env = "FARM_NO_STAGE", value_parser = BoolishValueParser::new())]
    pub no_stage: bool,
    /// Leave the copy on the nodes for the next run
    #[arg(long, env = "FARM_KEEP_STAGED", value_parser = BoolishValueParser::new())]
    pub keep_staged: bool,
    /// What to do where the model does not fit into the stage directory
    #[arg(long, env = "FARM_STAGE_FALLBACK", value_name = "WHAT", default_value = "error")]
    pub stage_fallback: StageFallback,
}

/// Flags of the output, the run directory and what is shown of the run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Output JSONL, in input order; FILE.partial grows meanwhile [default: standard output]
    #[arg(long, env = "FARM_OUTPUT", value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Finished records and statistics [default: farm-runs/PROMPTS-KEY beside the output]
    #[arg(long, env = "FARM_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Go on with the run in the run directory; this is the default
    #[arg(long, env = "FARM_RESUME", value_parser = BoolishValueParser::new())]
    pub resume: bool,
    /// Begin anew; what the run directory holds is moved to set-aside-N/ in it
    #[arg(long, env = "FARM_FORCE_NEW", value_parser = BoolishValueParser::new())]
    #[arg(conflicts_with = "resume")]
    pub force_new: bool,
    /// Exit code of a run that a signal stopped (for the site's requeueing)
    #[arg(long, env = "FARM_INTERRUPTED_EXIT_CODE", value_name = "CODE", default_value_t = 75)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..))]
    pub interrupted_exit_code: u8,
    /// Print the closing table on stderr even where progress is off
    #[arg(long, env = "FARM_STATS", value_parser = BoolishValueParser::new())]
    pub stats: bool,
    /// Progress on stderr; auto is a bar on a terminal and a line every 30 s elsewhere
    #[arg(long, env = "FARM_PROGRESS", value_name = "FORM", default_value = "auto")]
    pub progress: ProgressMode,
}

/// Flags of the log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct LogArgs {
    /// Form of the log on stderr; its level is set by FARM_LOG (error, warn, info, debug)
    #[arg(long, env = "FARM_LOG_FORMAT", value_name = "FORM", default_value = "text")]
    pub log_format: LogFormat,
    /// Say nothing but warnings and errors
    #[arg(long, env = "FARM_QUIET", value_parser = BoolishValueParser::new())]
    pub quiet: bool,
}

impl WeightsArgs {
    /// What matrices are converted to; `None` leaves them as they are. (All arithmetic on a
    /// CPU is f32; half-precision weights are widened exactly.)
    pub fn dtype_in_memory(&self) -> Option<WeightDtype> {
        if let Some(quantize) = self.quantize {
            return Some(WeightDtype::Quant(quantize.into()));
        }
        match self.dtype {
            Dtype::Auto => None,
            Dtype::F32 => Some(WeightDtype::F32),
            Dtype::Bf16 => Some(WeightDtype::Bf16),
            Dtype::F16 => Some(WeightDtype::F16),
        }
    }
}

/// How much a rank takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most sequences.
    pub sequences: usize,
    /// Most tokens in one step.
    pub tokens: usize,
}

impl BatchLimits {
    /// On a CPU unless told otherwise.
    pub const ON_CPU: Self = Self { sequences: 32, tokens: 512 };
    /// On a GPU, which reads its weights as fast for hundreds of sequences as for one.
    pub const ON_DEVICE: Self = Self { sequences: 256, tokens: 4096 };
}

impl ModelArgs {
    /// The flags, else the defaults of what is computed on.
    pub fn batch_limits(&self, on_device: bool) -> BatchLimits {
        let default = if on_device { BatchLimits::ON_DEVICE } else { BatchLimits::ON_CPU };
        BatchLimits {
            sequences: self.max_batch_size.unwrap_or(default.sequences),
            tokens: self.max_batched_tokens.unwrap_or(default.tokens),
        }
    }
}

impl OutputArgs {
    /// The progress to show: none under `--quiet`.
    pub fn progress(&self, log: &LogArgs) -> ProgressMode {
        if log.quiet { ProgressMode::None } else { self.progress }
    }

    /// Whether the closing table is printed.
    pub fn closing_table(&self, log: &LogArgs) -> bool {
        self.stats || self.progress(log) != ProgressMode::None
    }
}

/// Where models are staged unless told otherwise.
pub const DEFAULT_STAGE_DIR: &str = "/dev/shm";

impl Cli {
    /// Parses this process's arguments. On `--help`, `--version` or a wrong command
    /// line it prints and leaves (0, or 2 for a usage error); of the ranks that a
    /// launcher started, only the first one prints.
    pub fn parse_or_exit() -> Self {
        let args = with_default_command(std::env::args_os().collect(), |name| {
            std::env::var_os(name).is_some()
        });
        Self::parse_args(args).unwrap_or_else(|error| {
            if slurm::launcher_rank(|name| std::env::var(name).ok()).unwrap_or(0) == 0 {
                error.exit()
            }
            // Launchers end the job at the first bad exit code: let rank 0 print first.
            std::thread::sleep(Duration::from_millis(500));
            std::process::exit(error.exit_code())
        })
    }

    /// Parses a command line whose first word is the program's name.
    pub(crate) fn parse_args(args: Vec<OsString>) -> Result<Self, clap::Error> {
        // The environment twins follow one rule: naming each would double the help.
        let mut command = Self::command().mut_subcommands(|c| c.mut_args(|a| a.hide_env(true)));
        let matches = command.try_get_matches_from_mut(args)?;
        let mut cli =
            Self::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
        let parsed = matches.subcommand().and_then(|(name, matches)| {
            command.find_subcommand(name).map(|command| given_flags(command, matches))
        });
        cli.given = parsed.unwrap_or_default();
        Ok(cli)
    }

    /// Exit code of a run that was stopped early.
    pub fn interrupted_exit_code(&self) -> i32 {
        match &self.command {
            Command::Generate(args) => args.output.interrupted_exit_code.into(),
            Command::Score(args) => args.output.interrupted_exit_code.into(),
            Command::Finetune(args) => args.output.interrupted_exit_code.into(),
            _ => crate::ErrorKind::Interrupted.exit_code(),
        }
    }
}

/// Puts `generate` in front of the flags where no subcommand is named. A bare
/// `farm` generates where the environment names a prompts file, else it shows help.
fn with_default_command(
    mut args: Vec<OsString>,
    has_variable: impl Fn(&str) -> bool,
) -> Vec<OsString> {
    const OWN: [&str; 4] = ["-h", "--help", "-V", "--version"];
    let generate = match args.get(1) {
        Some(first) => {
            first.as_encoded_bytes().starts_with(b"-")
                && !OWN.iter().any(|own| first == OsStr::new(own))
        }
        None => has_variable("FARM_PROMPTS_FILE"),
    };
    if generate {
        args.insert(args.len().min(1), "generate".into());
    }
    args
}
