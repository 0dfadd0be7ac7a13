//! Flags of `farm finetune`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::BoolishValueParser;

use super::values::{at_least_one, duration, fraction, non_negative, one_to, positive};
use super::{LogArgs, ParallelismArgs, ScheduleName, StagingArgs, WeightsArgs};
use crate::train::lora::TargetModules;
use crate::train::model::Recompute;

/// `farm finetune`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct FinetuneArgs {
    /// What is trained on.
    #[command(flatten)]
    pub data: DataArgs,
    /// The frozen model.
    #[command(flatten)]
    pub model: WeightsArgs,
    /// What is trained.
    #[command(flatten)]
    pub lora: LoraArgs,
    /// How.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Where it goes.
    #[command(flatten)]
    pub output: FinetuneOutputArgs,
    /// Ranks and threads.
    #[command(flatten)]
    pub parallelism: ParallelismArgs,
    /// Where the model is staged.
    #[command(flatten)]
    pub staging: StagingArgs,
    /// The log on stderr.
    #[command(flatten)]
    pub log: LogArgs,
}

const EXAMPLES: &str = "\
Examples:
  In a Slurm job, data parallel over all tasks:
    srun --mpi=pmix farm finetune --model /scratch/ai/llms/mistral-7b --train train.jsonl \\
      --val-fraction 0.02 --adapter-out adapters/support-bot
  A 13B model, each layer split over four ranks:
    srun --mpi=pmix farm finetune --model DIR --train train.jsonl --tensor-parallel 4 \\
      --adapter-out DIR
  Then:
    srun --mpi=pmix farm --model DIR --adapter adapters/support-bot --prompts-file p.jsonl …
    farm merge --model DIR --adapter adapters/support-bot --output merged";

/// Flags of the data.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Training data: .jsonl, .csv or .txt
    ///
    /// A record is {"messages": […]}, {"prompt", "completion"}, {"instruction", "input",
    /// "output"} (Alpaca), {"conversations": […]} (ShareGPT) or {"text"}; a CSV file has such
    /// columns, a text file one text a line. Completions and assistant's turns are trained on.
    /// Bad records are left out, counted, and listed in bad_records.jsonl.
    #[arg(long, env = "FARM_TRAIN", value_name = "FILE")]
    pub train: PathBuf,
    /// Validation data, of the same forms
    #[arg(long, env = "FARM_VAL", value_name = "FILE", conflicts_with = "val_fraction")]
    pub val: Option<PathBuf>,
    /// Keep this share of the training data for validation
    #[arg(long, env = "FARM_VAL_FRACTION", value_name = "SHARE", value_parser = fraction)]
    pub val_fraction: Option<f32>,
    /// Train on prompts and users' turns too
    #[arg(long, env = "FARM_TRAIN_ON_PROMPT", value_parser = BoolishValueParser::new())]
    pub train_on_prompt: bool,
    /// Longest example; longer ones are cut [default: 2048, or the model's context if shorter]
    #[arg(long, env = "FARM_MAX_SEQ_LEN", value_name = "N", value_parser = at_least_one())]
    pub max_seq_len: Option<usize>,
    /// Fill sequences of --max-seq-len tokens with examples; none sees another
    #[arg(long, env = "FARM_PACKING", value_parser = BoolishValueParser::new())]
    pub packing: bool,
}

/// Flags of the adapter.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Adapter")]
pub struct LoraArgs {
    /// Rank
    #[arg(long, env = "FARM_LORA_R", value_name = "N", default_value_t = 16)]
    #[arg(value_parser = one_to(1 << 14))]
    pub lora_r: usize,
    /// The products are scaled by alpha / rank
    #[arg(long, env = "FARM_LORA_ALPHA", value_name = "X", default_value_t = 32.0)]
    #[arg(value_parser = positive)]
    pub lora_alpha: f32,
    /// Share of a module's inputs that its product does not see
    #[arg(long, env = "FARM_LORA_DROPOUT", value_name = "P", default_value_t = 0.0)]
    #[arg(value_parser = dropout)]
    pub lora_dropout: f32,
    /// all-linear, names between commas (q_proj,v_proj), or a regular expression
    #[arg(long, env = "FARM_TARGET_MODULES", value_name = "MODULES", default_value = "all-linear")]
    #[arg(value_parser = TargetModules::parse)]
    pub target_modules: TargetModules,
    /// Only these layers, as 0-7,30,31 [default: all]
    #[arg(long, env = "FARM_LAYERS_TO_TRANSFORM", value_name = "LAYERS", value_parser = layers)]
    pub layers_to_transform: Option<Layers>,
    /// Train these as a whole: embed_tokens, lm_head
    #[arg(long, env = "FARM_MODULES_TO_SAVE", value_name = "NAMES", value_delimiter = ',')]
    pub modules_to_save: Vec<String>,
    /// Scale by alpha / √rank (rsLoRA)
    #[arg(long, env = "FARM_USE_RSLORA", value_parser = BoolishValueParser::new())]
    pub use_rslora: bool,
    /// Train magnitudes apart from directions (DoRA)
    #[arg(long, env = "FARM_USE_DORA", value_parser = BoolishValueParser::new())]
    pub use_dora: bool,
}

/// The numbers of some layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers(pub std::collections::BTreeSet<usize>);

/// Flags of the training.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Times that every example is seen
    #[arg(long, env = "FARM_EPOCHS", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = one_to(1 << 20))]
    pub epochs: usize,
    /// Stop after this many optimiser steps, whatever the epochs
    #[arg(long, env = "FARM_MAX_STEPS", value_name = "N", value_parser = at_least_one())]
    pub max_steps: Option<usize>,
    /// Sequences an optimiser step, over all ranks
    #[arg(long, env = "FARM_BATCH_SIZE", value_name = "N", default_value_t = 16)]
    #[arg(value_parser = one_to(1 << 20))]
    pub batch_size: usize,
    /// Sequences that a rank computes at once; more take more memory
    #[arg(long, env = "FARM_MICRO_BATCH_SIZE", value_name = "N", default_value_t = 4)]
    #[arg(value_parser = one_to(1 << 20))]
    pub micro_batch_size: usize,
    /// Peak learning rate
    #[arg(long, env = "FARM_LEARNING_RATE", value_name = "LR", default_value_t = 2e-4)]
    #[arg(value_parser = learning_rate)]
    pub learning_rate: f64,
    /// What the learning rate does after the warm-up
    #[arg(long, env = "FARM_SCHEDULE", value_name = "NAME", default_value = "cosine")]
    pub schedule: ScheduleName,
    /// Share of the steps in which the learning rate rises
    #[arg(long, env = "FARM_WARMUP_RATIO", value_name = "SHARE", default_value_t = 0.03)]
    #[arg(value_parser = fraction)]
    pub warmup_ratio: f32,
    /// Decoupled weight decay of AdamW
    #[arg(long, env = "FARM_WEIGHT_DECAY", value_name = "X", default_value_t = 0.0)]
    #[arg(value_parser = non_negative)]
    pub weight_decay: f32,
    /// Scale gradients down to this norm; 0 does not
    #[arg(long, env = "FARM_MAX_GRAD_NORM", value_name = "X", default_value_t = 1.0)]
    #[arg(value_parser = non_negative)]
    pub max_grad_norm: f32,
    /// The learning rate of B is this times that of A (LoRA+)
    #[arg(long, env = "FARM_LORAPLUS_RATIO", value_name = "X", default_value_t = 1.0)]
    #[arg(value_parser = positive)]
    pub loraplus_ratio: f32,
    /// Layers computed again on the way back, to save memory: full, none, or the first N
    #[arg(long, env = "FARM_RECOMPUTE", value_name = "full|none|N", default_value = "none")]
    pub recompute: Recompute,
    /// Seeds the order of the data, the first values and the dropout
    #[arg(long, env = "FARM_SEED", value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Train an adapter for each combination: "r=8,16 lr=1e-4,2e-4"
    ///
    /// Names: r, alpha, dropout, lr, batch (--batch-size), epochs, targets, seed. Ranks are
    /// shared out over the combinations; each has its own folder below --adapter-out.
    #[arg(long, env = "FARM_SWEEP", value_name = "NAME=A,B…")]
    pub sweep: Option<String>,
}

/// Flags of what is written.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub struct FinetuneOutputArgs {
    /// The adapter's directory: PEFT's files, metrics, checkpoints
    #[arg(long, env = "FARM_ADAPTER_OUT", value_name = "DIR")]
    pub adapter_out: PathBuf,
    /// The adapter's form; gguf adds adapter.gguf, for llama.cpp
    #[arg(long, env = "FARM_FORMAT", value_name = "FORM", default_value = "peft")]
    pub format: super::AdapterFormat,
    /// Steps between checkpoints; 0 saves only where the run stops
    #[arg(long, env = "FARM_SAVE_STEPS", value_name = "N", default_value_t = 100)]
    pub save_steps: u64,
    /// Checkpoints that are kept, the best one apart
    #[arg(long, env = "FARM_KEEP_CHECKPOINTS", value_name = "N", default_value_t = 2)]
    #[arg(value_parser = one_to(1 << 20))]
    pub keep_checkpoints: usize,
    /// Steps between validations [default: those between checkpoints]
    #[arg(long, env = "FARM_EVAL_STEPS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub eval_steps: Option<u64>,
    /// Stop when the validation loss has not fallen for so many validations, and keep the best
    #[arg(long, env = "FARM_EARLY_STOPPING_PATIENCE", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub early_stopping_patience: Option<u32>,
    /// Go on with the run in the directory; this is the default
    #[arg(long, env = "FARM_RESUME", value_parser = BoolishValueParser::new())]
    pub resume: bool,
    /// Begin anew; what the directory holds is moved to set-aside-N/ in it
    #[arg(long, env = "FARM_FORCE_NEW", value_parser = BoolishValueParser::new())]
    #[arg(conflicts_with = "resume")]
    pub force_new: bool,
    /// Stop in time before this much has passed: 90 (minutes), 30s, 2h, HH:MM:SS, D-HH
    #[arg(long, env = "FARM_TIME_LIMIT", value_name = "TIME", value_parser = duration)]
    pub time_limit: Option<std::time::Duration>,
    /// Exit code of a run that a signal or the time limit stopped
    #[arg(long, env = "FARM_INTERRUPTED_EXIT_CODE", value_name = "CODE", default_value_t = 75)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..))]
    pub interrupted_exit_code: u8,
}

fn dropout(text: &str) -> Result<f32, String> {
    fraction(text).and_then(|p| if p < 1.0 { Ok(p) } else { Err("must be below 1".into()) })
}

fn learning_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("must be a number above 0".into()),
    }
}

fn layers(text: &str) -> Result<Layers, String> {
    let number = |text: &str| text.trim().parse::<usize>().map_err(|e| format!("{text}: {e}"));
    let mut all = std::collections::BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last > 10_000 {
            return Err(format!("{part} is no range of layers"));
        }
        all.extend(first..=last);
    }
    Ok(Layers(all))
}
