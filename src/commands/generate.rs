//! `farm generate` and `farm score`: the main job, from a prompts file to ordered
//! JSONL and statistics.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::{self, BatchLimits, GenerateArgs, ScoreArgs};
use crate::comm::{Communicator, Topology, agree, broadcast_vec};
use crate::commands::deadline::{Deadline, Measured};
use crate::commands::device::Devices;
use crate::commands::launch::Rank;
use crate::commands::load::{Decoder, Loaded, load};
use crate::commands::plan::{RunOwner, RunPlan, Session, now_unix_seconds, plan};
use crate::commands::records::Records;
use crate::commands::signals::StopSignal;
use crate::commands::summary::{self, Phases};
use crate::commands::work::{Metered, Worker, progress_state};
use crate::device::usage::DeviceUsage;
use crate::engine::{Engine, EngineConfig, Mode};
use crate::error::{EXIT_SOME_RECORDS_FAILED, say};
use crate::ledger::claims::ClaimsConfig;
use crate::ledger::record::RunInfo;
use crate::ledger::{
    Coordinator, CoordinatorParts, Feed, FeedConfig, Handout, HandoutConfig, JournalHeader,
    JournalWriter, Journals, OutputCounts, RemoteLink, RunDir, SyncPolicy, WorkerLink,
    estimate_cost, merge,
};
use crate::model::{Activations, AdapterSource, ModelRunner, WeightDtype};
use crate::slurm::OomWatch;
use crate::stage::sources::ModelPaths;
use crate::stage::{self, StageFallback, StageOptions, Staged};
use crate::stats::events::{self, EventLog};
use crate::stats::meter::{Meter, ModelCost, StepWork};
use crate::stats::progress::Progress;
use crate::{Error, ErrorKind, Result, kernels};

/// The flags of a run.
pub struct Job {
    /// The subcommand's name.
    pub command: &'static str,
    /// Generate or score.
    pub mode: Mode,
    /// Where the prompts are.
    pub input: cli::InputArgs,
    /// How tokens are chosen.
    pub sampling: cli::SamplingArgs,
    /// What a record holds besides its text.
    pub record: cli::RecordArgs,
    /// Model, precision, batch sizes.
    pub model: cli::ModelArgs,
    /// Ranks and threads.
    pub parallelism: cli::ParallelismArgs,
    /// Where the model is staged.
    pub staging: cli::StagingArgs,
    /// Where records go.
    pub output: cli::OutputArgs,
    /// How the run is kept safe and shared.
    pub run: cli::RunArgs,
    /// What is said on stderr.
    pub log: cli::LogArgs,
    /// Work on the failed records again.
    pub retry: bool,
    /// The flags that were given.
    pub given: Vec<cli::GivenFlag>,
}

impl Job {
    /// `farm generate`.
    pub fn generate(args: &GenerateArgs, given: &[cli::GivenFlag]) -> Self {
        let args = args.clone();
        Self {
            command: "generate",
            mode: Mode::Generate,
            input: args.input,
            sampling: args.sampling,
            record: args.record,
            model: args.model,
            parallelism: args.parallelism,
            staging: args.staging,
            output: args.output,
            run: args.run,
            log: args.log,
            retry: false,
            given: given.to_vec(),
        }
    }

    /// `farm score`.
    pub fn score(args: &ScoreArgs, given: &[cli::GivenFlag]) -> Self {
        let args = args.clone();
        Self {
            command: "score",
            mode: Mode::Score,
            input: args.input,
            sampling: cli::SamplingArgs::default(),
            record: cli::RecordArgs::default(),
            model: args.model,
            parallelism: args.parallelism,
            staging: args.staging,
            output: args.output,
            run: args.run,
            log: args.log,
            retry: false,
            given: given.to_vec(),
        }
    }

    /// See [`cli::WeightsArgs::dtype_in_memory`].
    pub fn dtype(&self) -> Option<WeightDtype> {
        self.model.weights.dtype_in_memory()
    }

    /// What weights are multiplied with.
    pub fn activations(&self) -> Activations {
        match (self.model.activations, self.mode) {
            (cli::ActivationType::Auto, Mode::Generate) | (cli::ActivationType::Rounded, _) => {
                Activations::Rounded
            }
            (cli::ActivationType::Auto, Mode::Score) | (cli::ActivationType::F32, _) => {
                Activations::F32
            }
        }
    }

    /// The files that the flags name: model, tokenizer.
    pub fn sources(&self) -> ModelPaths {
        sources(&self.model.weights)
    }

    /// The flags for another start on the same run: with absolute paths, without those of the
    /// run directory.
    ///
    /// # Errors
    /// A fault where the current directory is not known.
    pub fn arguments(&self) -> Result<Vec<OsString>> {
        const OWN: [&str; 3] = ["run-dir", "resume", "force-new"];
        const PATHS: [&str; 6] =
            ["prompts-file", "model", "tokenizer", "output", "stage-dir", "json-schema"];
        let flags = self.given.iter().filter(|flag| !OWN.contains(&flag.name.as_str()));
        let word = |flag: &cli::GivenFlag| match &flag.value {
            Some(path) if PATHS.contains(&flag.name.as_str()) && path != "-" => {
                let path = std::path::absolute(path).map_err(Error::fault)?;
                Ok(cli::flag_word(&flag.name, Some(path.as_os_str())))
            }
            Some(given) if flag.name == "adapter" => {
                let source = AdapterSource::parse(given).map_err(Error::fault)?;
                let path = std::path::absolute(&source.path).map_err(Error::fault)?;
                let value = AdapterSource { path, ..source }.word();
                Ok(cli::flag_word(&flag.name, Some(&value)))
            }
            _ => Ok(flag.word()),
        };
        flags.map(word).collect()
    }

    /// How launches on one run see each other.
    pub fn claims_config(&self) -> ClaimsConfig {
        let heartbeat_timeout_seconds = self.run.heartbeat_timeout as f64;
        ClaimsConfig {
            heartbeat_seconds: (heartbeat_timeout_seconds / 8.0).min(5.0),
            heartbeat_timeout_seconds,
        }
    }

    /// The whole run on one rank; returns the exit code.
    ///
    /// # Errors
    /// Alike on all ranks.
    pub fn run(&self, rank: &Rank) -> Result<i32> {
        let world = &*rank.world;
        world.barrier();
        let start = Instant::now();
        let mut phases = Phases::default();
        let stop = agree(world, StopSignal::listen(self.output.interrupted_exit_code.into()))?;
        agree(world, pin_kernels(self.model.weights.kernel_tier))?;
        let mut events = EventLog::new(world.rank(), world.host());
        events.emit(start.elapsed(), events::START, json!({ "ranks": world.size() }));

        let topology = Topology::new(rank.world.clone(), self.parallelism.tensor_parallel)?;
        let devices = Devices::choose(&self.model.weights, rank, &topology)?;
        let (plan, mut owner) = self.plan_together(rank, &devices, start)?;
        let attached = owner.as_ref().map_or(Ok(()), |_| events.attach(&plan.run_dir));
        agree(world, attached)?;
        if let Some(owner) = &owner {
            events.emit(start.elapsed(), "resume", json!(owner.resumed));
        }
        phases.start_seconds = start.elapsed().as_secs_f64();
        if plan.finished {
            return write_again(world, owner, &plan.run_dir, &|| stop.is_set());
        }
        let deadline = Deadline::new(plan.end_seconds.map(Duration::from_secs_f64), None, 0.0);

        let staged = self.stage(&topology, &mut events, start)?;
        phases.stage_seconds = start.elapsed().as_secs_f64() - phases.start_seconds;

        // What a signal asked for meanwhile: loading could take longer than its grace time.
        let asked = if stop.is_set() { Err(interrupted()) } else { Ok(()) };
        agree(world, asked)?;

        let loaded = load(self, rank, &topology, &devices, &plan, &staged)?;
        phases.ready_at_seconds = start.elapsed().as_secs_f64();
        phases.load_seconds = phases.ready_at_seconds - phases.start_seconds - phases.stage_seconds;
        phases.weight_bytes = loaded.runner.weight_bytes();
        phases.owned_weight_bytes = loaded.runner.owned_weight_bytes();
        phases.checkpoint_bytes = loaded.runner.bytes_read();
        let loaded_bytes = json!({
            "weight_bytes": phases.weight_bytes,
            "owned_weight_bytes": phases.owned_weight_bytes,
            "checkpoint_bytes": phases.checkpoint_bytes,
            "load_seconds": phases.load_seconds,
        });
        events.emit(start.elapsed(), "load", loaded_bytes);
        world.barrier();

        let mut meter = Meter::new(model_cost(&loaded.runner));
        let topology = &topology;
        let oom = &OomWatch::start();
        let run = Run {
            job: self,
            rank,
            topology,
            devices: &devices,
            limits: devices.batch_limits(&self.model),
            plan: &plan,
            stop: &stop,
            deadline: &deadline,
            oom,
            start,
        };
        let watch = devices.watch();
        let outcome = run.work(loaded, owner.as_mut(), &mut meter, &mut events);
        let usage = watch.finish();
        // Statistics are written also after a failure; its error counts more than theirs.
        let closed =
            run.close(rank, owner.as_ref(), &staged, &phases, usage, meter, events, &outcome);
        staged.finish(topology);
        // A fault on any rank counts more than that the run stopped for it.
        let ended = agree(world, outcome.and_then(|ended| closed.map(|()| ended)))?;
        exit_code(world, ended, &plan.run_dir)
    }

    /// Rank 0 plans; all get the plan or the error, which is no matter of rank 0: its
    /// message stays without it.
    fn plan_together(
        &self,
        rank: &Rank,
        devices: &Devices,
        start: Instant,
    ) -> Result<(RunPlan, Option<RunOwner>)> {
        let world = &*rank.world;
        let planned = match world.rank() {
            0 => plan(self, rank, devices, start).map(Some),
            _ => Ok(None),
        };
        let (plan, owner) = match planned {
            Ok(planned) => {
                planned.map_or((Ok(None), None), |(p, owner)| (Ok(Some(p)), Some(owner)))
            }
            Err(error) => (Err(error), None),
        };
        let bytes = serde_json::to_vec(&plan).unwrap_or_default();
        let plan = serde_json::from_slice(&broadcast_vec(world, 0, bytes)).map_err(Error::fault);
        let plan: Result<Option<RunPlan>> = agree(world, plan)?;
        Ok((plan?.ok_or_else(|| Error::fault("rank 0 sent no plan"))?, owner))
    }

    fn stage(&self, topology: &Topology, events: &mut EventLog, start: Instant) -> Result<Staged> {
        let staged = stage_model(&self.staging, &self.model.weights, topology)?;
        events.emit(start.elapsed(), "stage", json!(staged.report));
        Ok(staged)
    }
}

/// The files that the flags name: model, tokenizer.
pub fn sources(weights: &cli::WeightsArgs) -> ModelPaths {
    ModelPaths { model: weights.model.clone(), tokenizer: weights.tokenizer.clone() }
}

/// Stages as the flags say. Collective.
///
/// # Errors
/// See [`stage::stage`].
pub fn stage_model(
    flags: &cli::StagingArgs,
    weights: &cli::WeightsArgs,
    topology: &Topology,
) -> Result<Staged> {
    let options = StageOptions {
        keep: flags.keep_staged,
        fallback: match flags.stage_fallback {
            cli::StageFallback::Error => StageFallback::Error,
            cli::StageFallback::InPlace => StageFallback::InPlace,
        },
        no_stage: flags.no_stage,
        quantize: weights.quantize.map(Into::into),
        ..StageOptions::new(sources(weights), &flags.stage_dir)
    };
    let staged = stage::stage(topology, &options)?;
    if let (Some(reason), false, 0) =
        (&staged.report.in_place, flags.no_stage, topology.world.rank())
    {
        tracing::warn!("the model is read where it lies: {reason}");
    }
    Ok(staged)
}

/// Every record was done before: only the output is written again, from the journals.
fn write_again(
    world: &dyn Communicator,
    owner: Option<RunOwner>,
    run_dir: &Path,
    stop: &dyn Fn() -> bool,
) -> Result<i32> {
    let write = |session: Session| {
        let Session { mut membership, mut claims, journals, mut output } = session;
        let total = journals.done().len();
        tracing::info!("all {total} records were done before; the output is written again");
        let file = output.file().map(Path::to_owned);
        let written = merge(&mut claims, &mut membership, file.as_deref(), 0.0, stop, || {
            output.merge(journals.lines()?, total)
        });
        // Another launch may have written it meanwhile: what was begun here goes.
        if matches!(written, Ok(Some(_))) {
            output.abandon();
        }
        membership.leave(if written.is_ok() { "complete" } else { "failed" });
        written
    };
    let session = owner.and_then(|owner| owner.session);
    let written = agree(world, session.map(write).transpose())?.flatten();
    let ended = Ended { written, ..Ended::default() };
    exit_code(world, ended, run_dir)
}

/// Rank 0's exit code, on all ranks. Says where failed records are.
fn exit_code(world: &dyn Communicator, ended: Ended, run_dir: &Path) -> Result<i32> {
    if let Some(OutputCounts { records, errors: failed @ 1.. }) = ended.written {
        let run = run_dir.display();
        tracing::warn!(
            "{failed} of {records} records failed: {run}/errors.jsonl says why; farm retry {run} \
             works on them again"
        );
    }
    let code = broadcast_vec(world, 0, ended.exit_code().to_le_bytes().to_vec());
    match i32::from_le_bytes(code.try_into().unwrap_or_default()) {
        STOPPED => Err(interrupted()),
        code => Ok(code),
    }
}

/// Pins the kernels as the flag says.
///
/// # Errors
/// See [`kernels::pin_tier`].
pub fn pin_kernels(tier: cli::KernelTier) -> Result<()> {
    match tier {
        cli::KernelTier::Auto => Ok(()),
        cli::KernelTier::Scalar => kernels::pin_tier(kernels::Tier::Scalar),
        cli::KernelTier::Avx2 => kernels::pin_tier(kernels::Tier::Avx2),
        cli::KernelTier::Avx512 => kernels::pin_tier(kernels::Tier::Avx512),
    }
}

fn model_cost(runner: &ModelRunner) -> ModelCost {
    let (config, heads) = (runner.config(), runner.heads());
    let ranks = runner.group_size() as u64;
    let lm_head = (config.hidden_size * config.vocab_size) as u64;
    ModelCost {
        layer_params: (config.flops_per_token() / 2 - lm_head) / ranks,
        lm_head_params: lm_head / ranks,
        step_weight_bytes: runner.step_weight_bytes(),
        ..ModelCost::default()
    }
    .with_attention(
        config.num_hidden_layers,
        heads.heads,
        heads.kv_heads,
        heads.head_dim,
        runner.kv_value_bytes(),
    )
}

/// How the run ended, as rank 0 knows it; the other ranks say [`Ended::default`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Ended {
    /// The output's lines; `None` if the run was stopped early.
    pub written: Option<OutputCounts>,
    /// Records of the input, if it was read to its end.
    pub records_total: Option<u64>,
    /// Records that earlier launches had finished.
    pub records_resumed: u64,
}

/// Stands for an exit code where the run stopped early.
const STOPPED: i32 = -1;

impl Ended {
    fn exit_code(self) -> i32 {
        match self.written {
            Some(counts) if counts.errors > 0 => EXIT_SOME_RECORDS_FAILED,
            Some(_) => 0,
            None => STOPPED,
        }
    }
}

fn interrupted() -> Error {
    Error {
        kind: ErrorKind::Interrupted,
        message: "stopped before the end; the same command goes on where it stopped".into(),
    }
}

/// The ranks at work.
struct Run<'a> {
    job: &'a Job,
    rank: &'a Rank,
    topology: &'a Topology,
    devices: &'a Devices,
    limits: BatchLimits,
    plan: &'a RunPlan,
    stop: &'a StopSignal,
    deadline: &'a Deadline,
    oom: &'a OomWatch,
    start: Instant,
}

impl Run<'_> {
    /// Works until the run's end: leaders generate, the others follow their leader. What
    /// can fail before that is agreed on by the world: a follower waits for its leader.
    fn work(
        &self,
        loaded: Loaded,
        owner: Option<&mut RunOwner>,
        meter: &mut Meter,
        events: &mut EventLog,
    ) -> Result<Ended> {
        let world = &*self.topology.world;
        let leaders = self.topology.group_leaders();
        let journal = agree(world, leaders.map(|all| self.journal(all.rank())).transpose())?;
        let coordinator =
            owner.zip(leaders).map(|(owner, all)| self.coordinator(all.clone(), owner)).transpose();
        let coordinator = agree(world, coordinator)?;
        let Loaded { runner, preparer, eos_token_ids } = loaded;
        let (engine, follower) = match leaders {
            Some(_) => (self.engine(runner, &preparer, eos_token_ids).map(Some), None),
            None => (Ok(None), Some(runner)),
        };
        let engine = agree(world, engine)?;
        let outcome = match (leaders, engine, journal) {
            (Some(leaders), Some(engine), Some(mut journal)) => {
                let worker = Worker {
                    engine,
                    records: Records::new(self.job.mode, self.run_info(), preparer),
                    journal: &mut journal,
                    run_key: &self.plan.run_key,
                    waiting: VecDeque::new(),
                    in_work: HashMap::new(),
                    slots: self.limits.sequences,
                    meter,
                    events: &mut *events,
                    progress: None,
                    stop: self.stop,
                    deadline: self.deadline,
                    oom: self.oom,
                    measured: Measured::default(),
                    start: self.start,
                };
                self.lead(worker, leaders.clone(), coordinator)
            }
            _ => {
                follower.into_iter().for_each(|runner| self.follow(runner, meter));
                Ok(Ended::default())
            }
        };
        events.emit(self.start.elapsed(), "done", json!({}));
        outcome
    }

    /// A follower that cannot go on leaves its leader in the middle of a sum: the job ends.
    fn follow(&self, mut runner: ModelRunner, meter: &mut Meter) {
        let ran = |batch: &_, took: Duration| {
            meter.step(&StepWork::of(batch), took, self.start.elapsed());
        };
        if let Err(error) = runner.follow(ran) {
            let world = &self.topology.world;
            say(format_args!("farm: error: rank {} on {}: {error}", world.rank(), world.host()));
            world.abort(error.kind.exit_code());
        }
    }

    fn lead(
        &self,
        mut worker: Worker,
        leaders: Arc<dyn Communicator>,
        coordinator: Option<Coordinator>,
    ) -> Result<Ended> {
        let Some(mut coordinator) = coordinator else {
            let mut link = RemoteLink::new(leaders);
            let worked = self.or_end(worker.run(&mut link));
            let closed = link.close();
            return worked.and(closed).map(|()| Ended::default());
        };
        worker.progress = coordinator.progress().map(|state| {
            let mode = self.job.output.progress(&self.job.log);
            Progress::new(mode, self.start.elapsed(), progress_state(state))
        });
        let worked = self.or_end(worker.run(&mut coordinator));
        let closed = coordinator.close();
        let progress = coordinator.progress().unwrap_or_default();
        let records_resumed = coordinator.records_resumed();
        let written = coordinator.finish(&|| self.stop.is_set() || self.time_is_up());
        worked.and(closed).and(written).map(|written| Ended {
            written,
            records_total: progress.records_total,
            records_resumed,
        })
    }

    /// A leader whose device fails leaves its followers in the middle of a sum: the job ends.
    fn or_end(&self, worked: Result<()>) -> Result<()> {
        if let Err(error) = &worked
            && error.kind == ErrorKind::Fault
            && self.devices.on_device()
            && self.topology.tensor_parallel.size() > 1
        {
            let world = &self.topology.world;
            say(format_args!("farm: error: rank {} on {}: {error}", world.rank(), world.host()));
            world.abort(error.kind.exit_code());
        }
        worked
    }

    fn time_is_up(&self) -> bool {
        self.deadline.should_drain(self.start.elapsed().as_secs_f64(), &Measured::default())
    }

    fn run_info(&self) -> RunInfo {
        RunInfo {
            key: self.plan.run_key.clone(),
            created_unix_seconds: self.plan.started_unix_seconds,
            model: self.plan.model_name.clone(),
        }
    }

    fn engine(
        &self,
        runner: ModelRunner,
        preparer: &crate::prompts::Preparer,
        eos_token_ids: Vec<u32>,
    ) -> Result<Engine<Metered>> {
        let config = EngineConfig {
            max_batch_size: self.limits.sequences,
            max_batched_tokens: self.limits.tokens,
            eos_token_ids,
            ..EngineConfig::default()
        };
        let decoder = Arc::new(Decoder(preparer.tokenizer.clone()));
        let engine = Engine::new(Metered::new(runner), decoder, config)?;
        Ok(engine.with_guides(preparer.guides.clone()))
    }

    /// The journal of this leader.
    fn journal(&self, leader: usize) -> Result<JournalWriter> {
        let header = JournalHeader {
            run_key: self.plan.run_key.clone(),
            launch: self.plan.launch,
            rank: leader,
            host: self.topology.world.host().to_owned(),
            slurm_job_id: self.rank.job.job_id.map(|id| id.to_string()),
            started_unix_seconds: now_unix_seconds(),
        };
        let run = &self.job.run;
        let policy = SyncPolicy { records: run.sync_records, seconds: run.sync_seconds as f64 };
        JournalWriter::create(&RunDir::journal_of(&self.plan.run_dir), &header, policy)
    }

    /// Rank 0's hand-out, with what earlier launches have finished.
    fn coordinator(
        &self,
        leaders: Arc<dyn Communicator>,
        owner: &mut RunOwner,
    ) -> Result<Coordinator> {
        let session = owner.session.take();
        let Session { membership, claims, journals, output } =
            session.ok_or_else(|| Error::fault("the run is not open"))?;
        let config = FeedConfig {
            claim_records: owner.run.file().claim_records,
            run_key: self.plan.run_key.clone(),
            retry: self.job.retry,
            take_records: (2 * self.limits.sequences * leaders.size()) as u64,
        };
        let stored = Some(journals.lines()?);
        let journals = Box::new(journals);
        let feed = Feed::new(config, owner.prompts.opener(), claims, journals, stored);
        let max_new = match self.job.mode {
            Mode::Generate => self.plan.params.max_new_tokens as u64,
            Mode::Score => 0,
        };
        let max_seq_len = self.plan.max_seq_len as u64;
        let (journal_dir, run_key) =
            (RunDir::journal_of(&self.plan.run_dir), self.plan.run_key.clone());
        let parts = CoordinatorParts {
            handout: Handout::new(HandoutConfig::for_workers(leaders.size()), leaders.size()),
            feed,
            membership,
            estimate: Box::new(move |record| estimate_cost(record, max_new, max_seq_len)),
            output,
            read_stored: Box::new(move || {
                let mut journals = Journals::new(&journal_dir, &run_key);
                journals.refresh()?;
                journals.lines()
            }),
            no_wait: self.job.run.no_wait,
        };
        Ok(Coordinator::new(leaders, parts))
    }

    /// Gathers and writes the statistics. Collective.
    #[allow(clippy::too_many_arguments)]
    fn close(
        &self,
        rank: &Rank,
        owner: Option<&RunOwner>,
        staged: &Staged,
        phases: &Phases,
        usage: DeviceUsage,
        meter: Meter,
        events: EventLog,
        outcome: &Result<Ended>,
    ) -> Result<()> {
        let facts = summary::Facts {
            job: self.job,
            rank,
            topology: self.topology,
            devices: self.devices,
            plan: self.plan,
            owner,
            staged,
            phases,
            usage,
            ended: outcome.as_ref().ok().copied().unwrap_or_default(),
            total_seconds: self.start.elapsed().as_secs_f64(),
        };
        summary::close(&facts, meter, events)
    }
}

#[cfg(test)]
mod tests;
