//! What rank 0 checks and decides before anything is staged, so that bad input ends
//! the job in seconds: the model's files, the prompts, the sampling, the run
//! directory. The other ranks get the decisions as a [`RunPlan`].

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::{self, GenerationConfigSource};
use crate::commands::deadline::{Deadline, job_seconds_left};
use crate::commands::device::Devices;
use crate::commands::generate::Job;
use crate::commands::launch::Rank;
use crate::commands::load;
use crate::engine::{Mode, SamplingParams};
use crate::ledger::claims::{Claims, Evidence, HostEvidence, JobRef, LaunchId, Standing};
use crate::ledger::{
    self, ExistingRun, Journals, Membership, OrderedOutput, OutputCounts, OutputTarget, RunDir,
    RunFile, RunIdentity, membership,
};
use crate::model::checkpoint::StoredDtype;
use crate::model::{Activations, Adapter, Checkpoint, ModelConfig, WeightDtype, adapter};
use crate::prompts::{
    GenerationConfig, InputIdentity, PromptFormat, PromptReader, ReadOptions, SamplingFlags,
    generation_config, guide, spool_stdin,
};
use crate::stage::manifest::Manifest;
use crate::{Error, Result, kernels, slurm};

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
    /// This launch's number on the run.
    pub launch: LaunchId,
    /// Whether every record is done already.
    pub finished: bool,
    /// When the job's time ends, in seconds since this launch's start.
    pub end_seconds: Option<f64>,
}

/// What rank 0 alone holds of the run.
pub struct RunOwner {
    /// The open run directory.
    pub run: RunDir,
    /// Opens the input once more, from its start.
    pub prompts: PromptsSource,
    /// This launch on the run, until the work begins.
    pub session: Option<Session>,
    /// What there was to go on from.
    pub resumed: Resumed,
}

/// What a launch goes on from.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Resumed {
    /// Records that are done.
    pub records_done: u64,
    /// Unfinished texts that go on.
    pub records_saved: u64,
    /// Records that were in work when their launch ended, to be generated again.
    pub records_lost: u64,
}

/// A launch's hold on the run.
pub struct Session {
    /// Its place among the launches.
    pub membership: Membership,
    /// Its claims.
    pub claims: Claims,
    /// What all launches have done.
    pub journals: Journals,
    /// The output.
    pub output: OrderedOutput,
}

/// What can be known of a run without a place in it: on a login node, say.
pub struct Checked {
    /// What decides the records.
    pub identity: RunIdentity,
    /// The run directory, as the flag says or by default.
    pub run_dir: PathBuf,
    prompts: PromptsSource,
    params: SamplingParams,
    max_seq_len: usize,
    model_name: String,
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

    /// The same as a function, for as long as the input is needed.
    pub fn opener(&self) -> Box<dyn FnMut() -> Result<ledger::Source>> {
        let (path, options) = (self.path.clone(), self.options.clone());
        Box::new(move || Ok(Box::new(PromptReader::open(&path, &options)?)))
    }

    /// Records in a claim block: so many blocks that jobs can share them evenly, so few that
    /// claiming them costs nothing.
    fn claim_records(&self) -> Result<u64> {
        const BLOCKS: u64 = 256;
        const SAMPLE_RECORDS: usize = 1000;
        let mut reader = self.open()?;
        let sampled = reader.by_ref().take(SAMPLE_RECORDS).count() as u64;
        let bytes_a_record = reader.bytes_read().max(1) / sampled.max(1);
        let records = reader.size_bytes() / bytes_a_record.max(1);
        Ok((records / BLOCKS).next_power_of_two().clamp(4, 4096))
    }

    /// The format, by the flag or found out: both ways it is the same run.
    fn format(&self) -> Result<PromptFormat> {
        Ok(self.open()?.format())
    }
}

/// Checks what the flags name: model, prompts, sampling, output.
///
/// # Errors
/// Input and usage errors that name the file or the flag.
pub fn check(job: &Job) -> Result<Checked> {
    check_output(job)?;
    let manifest = Manifest::read(&job.sources())?;
    let checkpoint = open_checkpoint(job, &manifest)?;
    let max_seq_len = max_seq_len(job, checkpoint.config())?;
    let params = resolve_sampling(job, &checkpoint)?;
    let (prompts, input) = open_prompts(job)?;
    let mut identity = RunIdentity {
        command: job.command.to_owned(),
        prompts: json!({
            "size_bytes": input.size_bytes, "modified_ns": input.modified_ns,
            "digest": input.digest, "format": format!("{:?}", prompts.format()?),
            "column": prompts.options.prompt_column, "chat": job.input.chat,
        }),
        model: manifest.key,
        adapter: adapter::identity(&job.model.adapter)?,
        sampling: json!({
            "params": params, "max_seq_len": max_seq_len,
            "dtype": job.dtype().map_or("auto", WeightDtype::name),
        }),
    };
    if rounds_activations(job, &checkpoint) {
        identity.sampling["activations"] = json!("rounded");
    }
    let run_dir = run_dir_path(job, &identity);
    Ok(Checked { identity, run_dir, prompts, params, max_seq_len, model_name: manifest.name })
}

/// Whether a CPU would round activations: runs without a word of it took them as they are.
fn rounds_activations(job: &Job, checkpoint: &Checkpoint) -> bool {
    let is_rounding = match job.dtype() {
        Some(dtype) => matches!(dtype, WeightDtype::Bf16 | WeightDtype::Quant(_)),
        None => checkpoint
            .tensors()
            .iter()
            .any(|(_, tensor)| matches!(tensor.dtype, StoredDtype::Bf16 | StoredDtype::Quant(_))),
    };
    is_rounding && job.activations() == Activations::Rounded
}

/// Checks everything on rank 0, opens the run directory and takes a place in it.
///
/// # Errors
/// Input and usage errors that name the file, the flag or the difference to the run
/// that the directory holds.
pub fn plan(
    job: &Job,
    rank: &Rank,
    devices: &Devices,
    start: Instant,
) -> Result<(RunPlan, RunOwner)> {
    let job_seconds_left = job_seconds_left(&rank.job);
    let now_seconds = start.elapsed().as_secs_f64();
    let deadline = Deadline::new(job.run.time_limit, job_seconds_left, now_seconds);
    let mut checked = check(job)?;
    let launch = this_launch(rank, devices);
    let run = open_run(job, &checked, launch.clone())?;
    checked.prompts.keep_in(run.path())?;
    let (mut session, resumed) = join(job, rank, &run, &launch)?;
    let finished = is_finished(job, &session);
    if !finished {
        warn_of_other_floats(&mut session.claims, &launch)?;
    }
    let plan = RunPlan {
        run_dir: std::path::absolute(run.path()).map_err(|e| Error::io(run.path(), e))?,
        run_key: checked.identity.short_key(),
        started_unix_seconds: run.started_unix_seconds(),
        params: checked.params,
        max_seq_len: checked.max_seq_len,
        prompts_name: run.file().prompts_name.clone(),
        model_name: checked.model_name,
        launch: session.membership.launch(),
        finished,
        end_seconds: deadline.end_seconds(),
    };
    let session = Some(session);
    Ok((plan, RunOwner { run, prompts: checked.prompts, session, resumed }))
}

/// What this launch records of itself.
pub fn this_launch(rank: &Rank, devices: &Devices) -> ledger::Launch {
    ledger::Launch {
        farm_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_tier: kernels::tier().name().to_owned(),
        device_kinds: devices.kinds(),
        devices: devices.summary(),
        slurm_job_id: rank.job.job_id.map(|id| id.to_string()),
        ranks: rank.world.size(),
        host: rank.world.host().to_owned(),
        started_unix_seconds: now_unix_seconds(),
    }
}

fn open_run(job: &Job, checked: &Checked, launch: ledger::Launch) -> Result<RunDir> {
    let existing = if job.output.force_new { ExistingRun::SetAside } else { ExistingRun::Resume };
    let path = &checked.run_dir;
    if existing == ExistingRun::SetAside
        && let Some(file) = membership::look(path, evidence())?.live.first()
    {
        let owner = membership::who(&file.owner);
        return Err(Error::input(format!(
            "--force-new: {owner} is working on the run in {}: wait for it, cancel it, or give \
             another --run-dir",
            path.display()
        )));
    }
    let claim_records = checked.prompts.claim_records()?;
    let arguments =
        job.arguments()?.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let prompts_name = job.input.prompts_file.display().to_string();
    let identity = checked.identity.clone();
    let new = RunFile::new(identity, prompts_name, claim_records, launch, arguments);
    RunDir::open(path, new, existing)
}

/// Takes a place on the run and reads what is done.
fn join(
    job: &Job,
    rank: &Rank,
    run: &RunDir,
    launch: &ledger::Launch,
) -> Result<(Session, Resumed)> {
    let (membership, mut claims) =
        Membership::join(run.path(), job_ref(rank), launch, evidence(), job.claims_config())?;
    let run_key = run.file().identity.short_key();
    let mut journals = Journals::new(&RunDir::journal_of(run.path()), &run_key);
    let owners = claims.owners(0.0)?.into_iter();
    let gone: Vec<LaunchId> =
        owners.filter(|seen| seen.gone.is_some()).map(|seen| seen.file.launch).collect();
    gone.iter().for_each(|&launch| journals.finish_launch(launch));
    journals.refresh()?;
    let resumed = report_resume(&mut journals, &gone);
    let output = open_output(job, run, &mut claims, &journals)?;
    Ok((Session { membership, claims, journals, output }, resumed))
}

/// The job as other launches know it.
pub fn job_ref(rank: &Rank) -> Option<JobRef> {
    let job = &rank.job;
    Some(JobRef {
        cluster: job.cluster.clone(),
        job_id: job.job_id?,
        restart_count: job.restart_count.unwrap_or_default(),
        step_id: job.step_id,
        user_id: Some(user_id()),
    })
}

/// What this host and Slurm know about other launches.
pub fn evidence() -> Box<dyn Evidence> {
    Box::new(HostEvidence::new(|job: &JobRef| {
        // A site may hide the jobs of other users, and then says that there are none.
        if job.user_id != Some(user_id()) {
            return None;
        }
        slurm::query::step_has_ended(
            job.cluster.as_deref(),
            job.job_id,
            job.step_id,
            job.restart_count,
        )
    }))
}

fn user_id() -> u32 {
    rustix::process::getuid().as_raw()
}

/// Says in what other launches of the run differ so that their floating point may, too.
fn warn_of_other_floats(claims: &mut Claims, launch: &ledger::Launch) -> Result<()> {
    let owners = claims.owners(0.0)?.into_iter();
    let launches: Vec<ledger::Launch> =
        owners.filter_map(|seen| serde_json::from_value(seen.file.owner.facts).ok()).collect();
    type Fact = fn(&ledger::Launch) -> &str;
    let facts: [(&str, Fact); 2] = [
        ("farm's version", |launch| &launch.farm_version),
        ("computed on", |launch| &launch.device_kinds),
    ];
    for (name, fact) in facts {
        let now = fact(launch);
        let mut others: Vec<&str> = launches.iter().map(fact).filter(|o| *o != now).collect();
        others.sort_unstable();
        others.dedup();
        for other in others {
            tracing::warn!(
                "{name}: {other} earlier in the run, {now} now; floating point may differ"
            );
        }
    }
    Ok(())
}

/// Says what is damaged, and what there is to go on from.
fn report_resume(journals: &mut Journals, gone: &[LaunchId]) -> Resumed {
    journals.take_warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
    let tails = journals.torn_tails().into_iter().filter(|tail| gone.contains(&tail.launch));
    tails.for_each(|tail| tracing::warn!("{tail}"));
    let resumed = Resumed {
        records_done: journals.done().len(),
        records_saved: journals.saved_records(),
        records_lost: journals.lost_by(|launch| gone.contains(&launch)),
    };
    let Resumed { records_done, records_saved, records_lost } = resumed;
    if records_done + records_saved + records_lost > 0 {
        tracing::info!(
            "going on with the run: {records_done} records are done, {records_saved} unfinished \
             texts go on, {records_lost} records that were in work when their job ended are \
             generated again"
        );
    }
    resumed
}

fn is_finished(job: &Job, session: &Session) -> bool {
    let (records, errors) = (session.journals.done().len(), session.journals.failed().len());
    session.membership.merged() == Some(OutputCounts { records, errors })
        && !(job.retry && errors > 0)
}

/// Reads what a load would stumble over: configuration, tensors, tokenizer, adapters.
fn open_checkpoint(job: &Job, manifest: &Manifest) -> Result<Checkpoint> {
    let checkpoint = load::usable(&manifest.in_place)?;
    checkpoint.config().check_tensor_parallel(job.parallelism.tensor_parallel)?;
    Adapter::open_all(&job.model.adapter, checkpoint.config())?;
    Ok(checkpoint)
}

fn max_seq_len(job: &Job, config: &ModelConfig) -> Result<usize> {
    let context = config.max_context();
    match job.model.max_seq_len {
        Some(n) if n > context => Err(Error::input(format!(
            "--max-seq-len {n} is more than the model's context of {context}"
        ))),
        given => Ok(given.unwrap_or(context)),
    }
}

fn resolve_sampling(job: &Job, checkpoint: &Checkpoint) -> Result<SamplingParams> {
    let model = match job.sampling.generation_config {
        // What lies beside one GGUF file of many need not be its own.
        GenerationConfigSource::Model if !job.model.weights.model.is_file() => {
            GenerationConfig::from_dir(&checkpoint.files().dir)?
        }
        _ => GenerationConfig::default(),
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
        guide: guide::of_flags(
            flags.json_schema.as_deref(),
            flags.regex.as_deref(),
            &flags.choices,
        )?,
    };
    let params = generation_config::resolve(&flags, &model)?;
    // A score depends on no sampling parameter: two runs with other defaults are one.
    Ok(if job.mode == Mode::Score { SamplingParams::default() } else { params })
}

/// Before anything is staged: an output that cannot be, or that would take the prompts'
/// place.
fn check_output(job: &Job) -> Result<()> {
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

fn open_prompts(job: &Job) -> Result<(PromptsSource, InputIdentity)> {
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

/// Opened before any work, so that an output that cannot be written costs no staging. One
/// launch at a time writes lines as they come, and only while it has the run to itself.
fn open_output(
    job: &Job,
    run: &RunDir,
    claims: &mut Claims,
    journals: &Journals,
) -> Result<OrderedOutput> {
    let target = match &job.output.output {
        Some(file) => OutputTarget::File(file.clone()),
        None => OutputTarget::Stream(Box::new(std::io::stdout())),
    };
    let alone = !job.retry
        && claims.live_others(0.0)?.is_empty()
        && claims.claim("partial", 0.0)? == Standing::Mine;
    if !alone {
        return OrderedOutput::create_for_merge(target, run.path());
    }
    let output = OrderedOutput::create(target, run.path(), OrderedOutput::EARLY_BYTES_MAX)?;
    Ok(output.with_stored(journals.lines()?))
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

fn run_dir_path(job: &Job, identity: &RunIdentity) -> PathBuf {
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
