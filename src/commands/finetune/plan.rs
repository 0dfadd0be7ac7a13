//! What rank 0 checks and decides before anything is staged.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::sweep::Trial;
use crate::cli::{AdapterFormat, FinetuneArgs, ScheduleName};
use crate::commands::deadline::{Deadline, job_seconds_left};
use crate::commands::device::Devices;
use crate::commands::generate::sources;
use crate::commands::launch::Rank;
use crate::commands::load;
use crate::commands::plan::{evidence, job_ref, now_unix_seconds, this_launch};
use crate::files::replace_file;
use crate::ledger::claims::ClaimsConfig;
use crate::ledger::{Membership, membership};
use crate::model::{Checkpoint, ModelConfig, WeightDtype};
use crate::stage::manifest::Manifest;
use crate::train::adamw::AdamW;
use crate::train::data::{BatchConfig, Batches, Dataset, Formatting, mark_generation};
use crate::train::lora::LoraConfig;
use crate::train::model::{check_trains, targets};
use crate::train::schedule::{Schedule, ScheduleKind};
use crate::train::trainer::Optimisation;
use crate::{Error, Result};

/// Longest example unless the flag says otherwise.
const DEFAULT_MAX_SEQ_LEN: usize = 2048;
const RUN_FILE: &str = "finetune.json";

/// What every rank needs to know of one training.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The adapter's directory, absolute.
    pub dir: PathBuf,
    /// Longest example.
    pub max_seq_len: usize,
    /// When the job ends.
    pub deadline: Deadline,
    /// Start of the first launch.
    pub started_unix_seconds: u64,
    /// Nothing is left to do.
    pub is_complete: bool,
    /// What decides the adapter, but for the data.
    pub identity: Value,
}

/// `finetune.json`: what the adapter's directory is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunFile {
    /// Version of farm that began it.
    pub farm_version: String,
    /// When.
    pub started_unix_seconds: u64,
    /// The adapter is written.
    pub is_complete: bool,
    /// What decides the adapter: a run goes on only where all of it is the same.
    pub identity: Value,
    /// Identity of the data, once they were read.
    #[serde(default)]
    pub data: Option<String>,
}

impl RunFile {
    /// Reads it; `None` where there is none.
    ///
    /// # Errors
    /// An input error: it is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(RUN_FILE);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| Error::input(format!("{}: {e}", path.display())))?,
        };
        let file = serde_json::from_slice(&bytes);
        file.map(Some).map_err(|e| {
            Error::input(format!(
                "{}: {e}; give another --adapter-out, or --force-new",
                path.display()
            ))
        })
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(Error::fault)?;
        replace_file(&dir.join(RUN_FILE), &text)
    }
}

/// Checks the model and the flags, takes hold of the adapter's directory, and begins the
/// trainings there or finds them.
///
/// # Errors
/// Input and usage errors that name the file or the flag.
pub fn plan(
    args: &FinetuneArgs,
    trials: &[Trial],
    rank: &Rank,
    devices: &Devices,
    start: Instant,
) -> Result<(Vec<Plan>, Membership)> {
    let manifest = Manifest::read(&sources(&args.model))?;
    let checkpoint = load::usable(&manifest.in_place)?;
    let model = checkpoint.config();
    check_trains(model, args.parallelism.tensor_parallel)?;
    let context = model.max_context();
    let max_seq_len = match args.data.max_seq_len {
        Some(n) if n > context => {
            return Err(Error::input(format!(
                "--max-seq-len {n} is more than the model's context of {context}"
            )));
        }
        given => given.unwrap_or(DEFAULT_MAX_SEQ_LEN.min(context)),
    };
    trials.iter().try_for_each(|trial| check_flags(&trial.args, model))?;
    for path in std::iter::once(&args.data.train).chain(&args.data.val) {
        std::fs::File::open(path).map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
    }
    let seconds_left = job_seconds_left(&rank.job);
    let now_seconds = start.elapsed().as_secs_f64();
    let deadline = Deadline::new(args.output.time_limit, seconds_left, now_seconds);
    let held = hold(&args.output.adapter_out, rank, devices)?;
    let plan = |trial: &Trial| {
        let identity = identity(&trial.args, &manifest.key, max_seq_len);
        let dir = std::path::absolute(&trial.args.output.adapter_out).map_err(Error::input)?;
        let run = open(&dir, &identity, args.output.force_new)?;
        Ok(Plan {
            dir,
            max_seq_len,
            deadline,
            started_unix_seconds: run.started_unix_seconds,
            is_complete: run.is_complete,
            identity,
        })
    };
    Ok((trials.iter().map(plan).collect::<Result<_>>()?, held))
}

/// Refuses flags that do not fit the model or each other, before hours of training.
fn check_flags(args: &FinetuneArgs, model: &ModelConfig) -> Result<()> {
    let (lora, output, layers) = (&args.lora, &args.output, model.num_hidden_layers);
    if let Some(beyond) = lora.layers_to_transform.as_ref().and_then(|l| l.0.last().copied())
        && beyond >= layers
    {
        return Err(Error::input(format!(
            "--layers-to-transform: there is no layer {beyond}, the model has 0 to {}",
            layers - 1
        )));
    }
    targets(model, &lora_config(args))?;
    if output.format == AdapterFormat::Gguf && (lora.use_dora || !lora.modules_to_save.is_empty()) {
        return Err(Error::usage(
            "--format gguf has no place for --use-dora and --modules-to-save: leave one out, or \
             train for PEFT's form and farm merge",
        ));
    }
    if output.early_stopping_patience.is_some() {
        if args.data.val.is_none() && args.data.val_fraction.is_none_or(|share| share == 0.0) {
            return Err(Error::usage(
                "--early-stopping-patience needs validation data: --val or --val-fraction",
            ));
        }
        if output.save_steps == 0 && output.eval_steps.is_none() {
            return Err(Error::usage(
                "--early-stopping-patience with --save-steps 0 needs --eval-steps",
            ));
        }
    }
    Ok(())
}

/// A place on the adapter's directory that no other job has: two that write the same
/// checkpoints would spoil them. One that has been killed gives no sign any more; this waits
/// until that is certain.
fn hold(dir: &Path, rank: &Rank, devices: &Devices) -> Result<Membership> {
    let refused = |e| Error::input(format!("--adapter-out {}: {e}", dir.display()));
    std::fs::create_dir_all(dir).map_err(refused)?;
    let config = ClaimsConfig::default();
    let most_seconds = config.heartbeat_timeout_seconds + 30.0;
    let (member, mut claims) =
        Membership::join(dir, job_ref(rank), &this_launch(rank, devices), evidence(), config)?;
    let start = Instant::now();
    let mut has_said = false;
    loop {
        let now_seconds = start.elapsed().as_secs_f64();
        let others = claims.live_others(now_seconds)?;
        let Some(other) = others.iter().find(|other| other.launch < member.launch()) else {
            return Ok(member);
        };
        let who = membership::who(&other.owner);
        if now_seconds > most_seconds {
            return Err(Error::input(format!(
                "--adapter-out {}: {who} is training there: wait for it, cancel it, or give \
                 another directory",
                dir.display()
            )));
        }
        if !has_said {
            tracing::info!("waiting for {who}, which trained in {} or still does", dir.display());
            has_said = true;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Begins the run in `dir`, or finds that it is the same.
fn open(dir: &Path, identity: &Value, force_new: bool) -> Result<RunFile> {
    let refused = |e| Error::input(format!("--adapter-out {}: {e}", dir.display()));
    std::fs::create_dir_all(dir).map_err(refused)?;
    if force_new {
        set_aside(dir)?;
    }
    let Some(run) = RunFile::read(dir)? else {
        if let Some(name) = OWN.iter().find(|name| dir.join(name).exists()) {
            return Err(Error::input(format!(
                "--adapter-out {}: {name} is there, and no {RUN_FILE}: it is another adapter's; \
                 give another directory, or --force-new to set it aside",
                dir.display()
            )));
        }
        let run = RunFile {
            farm_version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_seconds: now_unix_seconds(),
            is_complete: false,
            identity: identity.clone(),
            data: None,
        };
        run.write(dir)?;
        return Ok(run);
    };
    // Data that could not be read began nothing.
    if run.data.is_none() && !dir.join("checkpoints").exists() {
        let run = RunFile { identity: identity.clone(), ..run };
        run.write(dir)?;
        return Ok(run);
    }
    check_same(dir, &run.identity, identity)?;
    Ok(run)
}

/// Refuses what would train another adapter than the one in the directory.
///
/// # Errors
/// An input error with each field that differs.
fn check_same(dir: &Path, recorded: &Value, now: &Value) -> Result<()> {
    let empty = serde_json::Map::new();
    let (recorded, now) =
        (recorded.as_object().unwrap_or(&empty), now.as_object().unwrap_or(&empty));
    let differs = |(name, value): (&String, &Value)| {
        let theirs = recorded.get(name).filter(|theirs| *theirs != value)?;
        Some(format!("\n  {name}: {theirs} there, {value} now"))
    };
    let differences: String = now.iter().filter_map(differs).collect();
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::input(format!(
        "--adapter-out {}: another training is there:{differences}\ngive another directory, or \
         --force-new to set it aside",
        dir.display()
    )))
}

/// Refuses other data than those that the trainings began with, complete ones too.
///
/// # Errors
/// An input error that names the directory.
pub fn check_data(plans: &[Plan], data: &str) -> Result<()> {
    for Plan { dir, .. } in plans {
        let run = RunFile::read(dir)?
            .ok_or_else(|| Error::fault(format!("{}: {RUN_FILE} is gone", dir.display())))?;
        match &run.data {
            Some(theirs) => check_same(dir, &json!({ "data": theirs }), &json!({ "data": data }))?,
            None => RunFile { data: Some(data.to_owned()), ..run }.write(dir)?,
        }
    }
    Ok(())
}

/// What a training leaves in its directory.
const OWN: [&str; 10] = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "adapter.gguf",
    "checkpoints",
    "metrics.jsonl",
    "metrics.csv",
    "loss.svg",
    "bad_records.jsonl",
    "report.html",
    RUN_FILE,
];

fn set_aside(dir: &Path) -> Result<()> {
    let io = |path: &Path, e| Error::io(path, e);
    let entries = std::fs::read_dir(dir).map_err(|e| io(dir, e))?;
    let is_own = |name: &str| OWN.contains(&name) || name.starts_with("events.out.tfevents");
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| is_own(name))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    // While the run's file is there the directory is still the old run's.
    names.sort_by_key(|name| name == RUN_FILE);
    let folder = (1..).map(|n: u64| dir.join(format!("set-aside-{n}"))).find(|f| !f.exists());
    let folder = folder.unwrap_or_else(|| dir.join("set-aside"));
    std::fs::create_dir(&folder).map_err(|e| io(&folder, e))?;
    for name in names {
        std::fs::rename(dir.join(&name), folder.join(&name)).map_err(|e| io(&dir.join(name), e))?;
    }
    Ok(())
}

/// What decides the adapter, but for the data.
fn identity(args: &FinetuneArgs, model: &str, max_seq_len: usize) -> Value {
    let (data, training) = (&args.data, &args.training);
    json!({
        "model": model,
        "dtype": args.model.dtype_in_memory().map_or("auto", WeightDtype::name),
        "lora": lora_config(args),
        "max_seq_len": max_seq_len,
        "packing": data.packing,
        "train_on_prompt": data.train_on_prompt,
        "val_fraction": data.val_fraction,
        "epochs": training.epochs,
        "max_steps": training.max_steps,
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "schedule": format!("{:?}", training.schedule).to_lowercase(),
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "loraplus_ratio": training.loraplus_ratio,
        "seed": training.seed,
    })
}

/// The adapter's settings by the flags.
pub fn lora_config(args: &FinetuneArgs) -> LoraConfig {
    let lora = &args.lora;
    LoraConfig {
        r: lora.lora_r,
        lora_alpha: lora.lora_alpha.into(),
        lora_dropout: lora.lora_dropout,
        target_modules: lora.target_modules.clone(),
        use_rslora: lora.use_rslora,
        use_dora: lora.use_dora,
        layers_to_transform: lora.layers_to_transform.as_ref().map(|layers| layers.0.clone()),
        modules_to_save: lora.modules_to_save.clone(),
    }
}

/// The steps over the data by the flags, and how many there are in all.
///
/// # Errors
/// See [`Batches::new`].
pub fn batches(args: &FinetuneArgs, plan: &Plan, lengths: &[usize]) -> Result<(Batches, u64)> {
    let config = BatchConfig {
        batch_size: args.training.batch_size,
        packing: args.data.packing,
        max_seq_len: plan.max_seq_len,
        seed: args.training.seed,
    };
    let mut batches = Batches::new(lengths, &config)?;
    let steps = match args.training.max_steps {
        Some(steps) => steps as u64,
        None => batches.steps_of_epochs(args.training.epochs as u64),
    };
    Ok((batches, steps))
}

/// How the values change, by the flags.
pub fn optimisation(args: &FinetuneArgs, total_steps: u64) -> Optimisation {
    let training = &args.training;
    let kind = match training.schedule {
        ScheduleName::Constant => ScheduleKind::Constant,
        ScheduleName::Linear => ScheduleKind::Linear,
        ScheduleName::Cosine => ScheduleKind::Cosine,
    };
    let warmup_ratio = decimal(training.warmup_ratio);
    let mut schedule = Schedule::new(kind, training.learning_rate, warmup_ratio, total_steps);
    // A run of one step would have a rate of 0 and learn nothing.
    schedule.warmup_steps = schedule.warmup_steps.min(total_steps.saturating_sub(1));
    Optimisation {
        adamw: AdamW { weight_decay: decimal(training.weight_decay), ..AdamW::default() },
        schedule,
        max_grad_norm: decimal(training.max_grad_norm),
        loraplus_ratio: decimal(training.loraplus_ratio),
    }
}

/// The f64 nearest to what was typed, 0.03 and not 0.029999999329447746.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Reads the data: for training, and for validation (maybe none).
///
/// # Errors
/// Input errors that name the file.
pub fn data(args: &FinetuneArgs, plan: &Plan) -> Result<(Dataset, Dataset)> {
    let paths = Manifest::read(&sources(&args.model))?.in_place;
    let checkpoint = Checkpoint::open(&paths.model)?;
    let contents = checkpoint.contents();
    let given = paths.tokenizer.as_deref();
    let tokenizer = load::tokenizer(contents, given)?;
    let template = load::chat_template(contents, given, plan.started_unix_seconds)?;
    let marked = template.as_ref().and_then(|template| template.changed(mark_generation));
    let formatting = Formatting {
        tokenizer: &tokenizer,
        template: template.as_ref(),
        marked: marked.as_ref(),
        max_seq_len: plan.max_seq_len,
        train_on_prompt: args.data.train_on_prompt,
        vocab_size: checkpoint.config().vocab_size,
    };
    let train = Dataset::read(&args.data.train, &formatting)?;
    let seed = args.training.seed;
    let (train, validation) = match (&args.data.val, args.data.val_fraction) {
        (Some(path), _) => (train, Dataset::read(path, &formatting)?),
        (None, Some(fraction)) if fraction > 0.0 => train.split_off(decimal(fraction), seed)?,
        (None, _) => (train, Dataset::default()),
    };
    report(args, plan, &train, &validation)?;
    Ok((train, validation))
}

/// Says what there is, and lists the bad records.
fn report(args: &FinetuneArgs, plan: &Plan, train: &Dataset, validation: &Dataset) -> Result<()> {
    tracing::info!(
        "{} examples of {} tokens, {} of them trained on; {} for validation",
        train.len(),
        train.num_tokens(),
        train.num_targets(),
        validation.len()
    );
    if train.truncated() > 0 {
        let (cut, longest) = (train.truncated(), plan.max_seq_len);
        tracing::warn!("{cut} examples are longer than {longest} tokens and were cut");
    }
    let files = [
        (&args.data.train, train),
        (args.data.val.as_ref().unwrap_or(&args.data.train), validation),
    ];
    let mut lines = Vec::new();
    for (path, record) in
        files.iter().flat_map(|(path, data)| data.bad().iter().map(move |b| (path, b)))
    {
        let line = json!({
            "file": path, "line": record.line, "code": record.code, "message": record.message,
        });
        serde_json::to_writer(&mut lines, &line).map_err(Error::fault)?;
        lines.push(b'\n');
    }
    if lines.is_empty() {
        return Ok(());
    }
    let bad = train.bad().len() + validation.bad().len();
    let path = plan.dir.join("bad_records.jsonl");
    tracing::warn!("{bad} records cannot be trained on and are left out: {}", path.display());
    replace_file(&path, &lines)
}
