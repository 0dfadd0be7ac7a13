//! What rank 0 checks and decides before anything is staged, so that bad input ends
//! the job in seconds: the model's files, the prompts, the sampling, the run
//! directory. The other ranks get the decisions as a [`RunPlan`].

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::{self, GenerationConfigSource};
use crate::commands::generate::Job;
use crate::commands::launch::Rank;
use crate::engine::{Mode, SamplingParams};
use crate::ledger::{self, ExistingRun, OrderedOutput, OutputTarget, RunDir, RunIdentity};
use crate::model::source::Safetensors;
use crate::model::tokenizer::Tokenizer;
use crate::model::{ModelConfig, WeightDtype};
use crate::prompts::{
    GenerationConfig, InputIdentity, PromptFormat, PromptReader, ReadOptions, SamplingFlags,
    generation_config, spool_stdin,
};
use crate::stage::manifest::Manifest;
use crate::{Error, Result, kernels};

/// What every rank needs to know of the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunPlan {
    /// The run directory, absolute.
    pub run_dir: PathBuf,
    /// The run's key: OpenAI ids derive from it.
    pub run_key: String,
    /// Start of the run's first launch.
    pub started_unix_seconds: u64,
    /// Sampling parameters of a record that says nothing itself.
    pub params: SamplingParams,
    /// Longest sequence.
    pub max_seq_len: usize,
    /// The prompts file's name, for error records.
    pub prompts_name: String,
    /// The model's name as answers show it: its directory's.
    pub model_name: String,
}

/// What rank 0 alone holds of the run.
pub struct RunOwner {
    /// The open run directory.
    pub run: RunDir,
    /// Opens the input once more, from its start.
    pub prompts: PromptsSource,
    /// The output, until the work begins.
    pub output: Option<OrderedOutput>,
}

/// Where the prompts are read from (standard input: its copy in the run directory).
pub struct PromptsSource {
    path: PathBuf,
    options: ReadOptions,
    spool: Option<Spool>,
}

/// The copy of standard input until it is moved into the run directory: gone if the run
/// is refused before.
struct Spool(PathBuf);

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl PromptsSource {
    /// A reader from the start.
    ///
    /// # Errors
    /// See [`PromptReader::open`].
    pub fn open(&self) -> Result<PromptReader> {
        PromptReader::open(&self.path, &self.options)
    }

    /// The format, by the flag or found out: both ways it is the same run.
    pub(crate) fn format(&self) -> Result<PromptFormat> {
        Ok(self.open()?.format())
    }
}

/// Checks everything on rank 0 and opens the run directory.
///
/// # Errors
/// Input and usage errors that name the file, the flag or the difference to the run
/// that the directory holds.
pub fn plan(job: &Job, rank: &Rank) -> Result<(RunPlan, RunOwner)> {
    check_output(job)?;
    let dir = &job.model.model;
    let manifest = Manifest::read(dir)?;
    let config = check_model(job)?;
    let max_seq_len = max_seq_len(job, &config)?;
    let params = resolve_sampling(job)?;
    let (mut prompts, input) = open_prompts(job)?;
    let identity = RunIdentity {
        command: job.command.to_owned(),
        prompts: json!({
            "size_bytes": input.size_bytes, "modified_ns": input.modified_ns,
            "digest": input.digest, "format": format!("{:?}", prompts.format()?),
            "column": prompts.options.prompt_column, "chat": job.input.chat,
        }),
        model: manifest.key.clone(),
        adapter: None,
        sampling: json!({
            "params": params, "max_seq_len": max_seq_len,
            "dtype": job.dtype().map_or("auto", WeightDtype::name),
        }),
    };
    let started = now_unix_seconds();
    let launch = ledger::Launch {
        farm_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_tier: kernels::tier().name().to_owned(),
        slurm_job_id: rank.job.job_id.map(|id| id.to_string()),
        ranks: rank.world.size(),
        host: rank.world.host().to_owned(),
        started_unix_seconds: started,
    };
    let path = run_dir_path(job, &identity);
    let existing = if job.output.force_new { ExistingRun::SetAside } else { ExistingRun::Resume };
    let run = RunDir::open(&path, &identity, launch, existing)?;
    run.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
    prompts.keep_in(run.path())?;
    let plan = RunPlan {
        run_dir: std::path::absolute(run.path()).map_err(|e| Error::io(run.path(), e))?,
        run_key: identity.short_key(),
        started_unix_seconds: run.started_unix_seconds(),
        params,
        max_seq_len,
        prompts_name: job.input.prompts_file.display().to_string(),
        model_name: manifest.name,
    };
    let output = Some(open_output(job, &run)?);
    Ok((plan, RunOwner { run, prompts, output }))
}

/// Reads what a load would stumble over: configuration, headers, tokenizer.
pub(crate) fn check_model(job: &Job) -> Result<ModelConfig> {
    let dir = &job.model.model;
    if dir.is_file() {
        return Err(Error::input(format!(
            "--model {}: a single file is not read yet (GGUF); give a directory with config.json, \
             tokenizer.json and *.safetensors",
            dir.display()
        )));
    }
    let config = ModelConfig::from_dir(dir)?;
    config.check_tensor_parallel(job.parallelism.tensor_parallel)?;
    Safetensors::open(dir, None)?;
    Tokenizer::from_dir(dir)?;
    Ok(config)
}

pub(crate) fn max_seq_len(job: &Job, config: &ModelConfig) -> Result<usize> {
    let context = config.max_context();
    match job.model.max_seq_len {
        Some(n) if n > context => Err(Error::input(format!(
            "--max-seq-len {n} is more than the model's context of {context}"
        ))),
        given => Ok(given.unwrap_or(context)),
    }
}

pub(crate) fn resolve_sampling(job: &Job) -> Result<SamplingParams> {
    let model = match job.sampling.generation_config {
        GenerationConfigSource::Model => GenerationConfig::from_dir(&job.model.model)?,
        GenerationConfigSource::Ignore => GenerationConfig::default(),
    };
    let flags = &job.sampling;
    let flags = SamplingFlags {
        max_new_tokens: flags.max_new_tokens,
        temperature: flags.temperature,
        top_p: flags.top_p,
        top_k: flags.top_k,
        min_p: flags.min_p,
        repetition_penalty: flags.repetition_penalty,
        presence_penalty: flags.presence_penalty,
        frequency_penalty: flags.frequency_penalty,
        seed: flags.seed,
        stop: flags.stop.clone(),
        ignore_eos: flags.ignore_eos,
        logprobs: job.record.logprobs,
        return_token_ids: job.record.return_token_ids,
    };
    let params = generation_config::resolve(&flags, &model)?;
    // A score depends on no sampling parameter: two runs with other defaults are one.
    Ok(if job.mode == Mode::Score { SamplingParams::default() } else { params })
}

/// Before anything is staged: an output that cannot be, or that would take the prompts'
/// place.
pub(crate) fn check_output(job: &Job) -> Result<()> {
    let Some(output) = &job.output.output else { return Ok(()) };
    let refused = |why| Error::input(format!("--output {}: {why}", output.display()));
    if output.is_dir() {
        return Err(refused("is a directory; give the name of a file"));
    }
    let mut partial = output.clone().into_os_string();
    partial.push(".partial");
    let prompts = std::fs::canonicalize(&job.input.prompts_file);
    let is_prompts = |path: &Path| {
        prompts.as_ref().is_ok_and(|prompts| {
            prompts.is_file() && std::fs::canonicalize(path).is_ok_and(|path| path == *prompts)
        })
    };
    if is_prompts(output) || is_prompts(Path::new(&partial)) {
        return Err(refused("would overwrite the prompts file; give another name"));
    }
    Ok(())
}

pub(crate) fn open_prompts(job: &Job) -> Result<(PromptsSource, InputIdentity)> {
    let format = match job.input.prompts_format {
        cli::PromptsFormat::Auto => None,
        cli::PromptsFormat::Txt => Some(PromptFormat::Text),
        cli::PromptsFormat::Jsonl => Some(PromptFormat::JsonLines),
        cli::PromptsFormat::Csv => Some(PromptFormat::Csv),
    };
    let mut options = ReadOptions {
        format,
        prompt_column: job.input.prompt_column.clone(),
        ..ReadOptions::default()
    };
    let file = &job.input.prompts_file;
    let (path, identity, spool) = if file == Path::new("-") {
        options.name = Some("-".to_owned());
        options.format = format.or(Some(PromptFormat::JsonLines));
        let path = spool_path(job)?;
        let spool = Spool(path.clone());
        let identity = spool_stdin(&path)?;
        PromptReader::check(&path, &options)?;
        (path, identity, Some(spool))
    } else {
        // What is not a regular file (a FIFO) is refused before its content is looked at.
        PromptReader::check(file, &options)?;
        (file.clone(), InputIdentity::of_file(file)?, None)
    };
    Ok((PromptsSource { path, options, spool }, identity))
}

/// Opened before any work, so that an output that cannot be written costs no staging.
fn open_output(job: &Job, run: &RunDir) -> Result<OrderedOutput> {
    let target = match &job.output.output {
        Some(file) => OutputTarget::File(file.clone()),
        None => OutputTarget::Stream(Box::new(std::io::stdout())),
    };
    OrderedOutput::create(target, &run.spill(), OrderedOutput::EARLY_BYTES_MAX)
}

/// Standard input waits here until the run directory is known. The folder is created.
fn spool_path(job: &Job) -> Result<PathBuf> {
    let folder = match &job.output.run_dir {
        Some(dir) => dir.clone(),
        None => run_folder(job),
    };
    std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
    Ok(folder.join(format!(".stdin-{}", std::process::id())))
}

impl PromptsSource {
    /// Moves spooled standard input into the run directory.
    fn keep_in(&mut self, run_dir: &Path) -> Result<()> {
        if let Some(spool) = self.spool.take() {
            let kept = run_dir.join("stdin");
            std::fs::rename(&spool.0, &kept).map_err(|error| Error::io(&kept, error))?;
            self.path = kept;
        }
        Ok(())
    }
}

pub(crate) fn run_dir_path(job: &Job, identity: &RunIdentity) -> PathBuf {
    job.output.run_dir.clone().unwrap_or_else(|| {
        let file = &job.input.prompts_file;
        let stem = match file.file_stem() {
            Some(stem) if file != Path::new("-") => stem.to_string_lossy().into_owned(),
            _ => "stdin".to_owned(),
        };
        ledger::default_path(job.output.output.as_deref(), &stem, &identity.short_key())
    })
}

/// The folder of default run directories.
fn run_folder(job: &Job) -> PathBuf {
    let some_run = ledger::default_path(job.output.output.as_deref(), "", "");
    some_run.parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// Seconds since 1970.
pub fn now_unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
