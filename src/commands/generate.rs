//! `farm generate` and `farm score`: the main job, from a prompts file to ordered
//! JSONL and statistics.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cli::{self, GenerateArgs, ScoreArgs};
use crate::comm::{Topology, agree, broadcast_vec};
use crate::commands::launch::Rank;
use crate::commands::load::{Decoder, Loaded, load};
use crate::commands::plan::{RunOwner, RunPlan, plan};
use crate::commands::records::Records;
use crate::commands::signals::StopSignal;
use crate::commands::summary::{self, Phases};
use crate::commands::work::{Metered, Worker, progress_state};
use crate::engine::{Engine, EngineConfig, Mode};
use crate::error::EXIT_SOME_RECORDS_FAILED;
use crate::ledger::record::RunInfo;
use crate::ledger::{
    Coordinator, Handout, HandoutConfig, OrderedOutput, OutputCounts, OutputTarget, PartWriter,
    RemoteLink, RunDir, WorkerLink, estimate_cost,
};
use crate::model::{ModelRunner, WeightDtype};
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
    /// What is said on stderr.
    pub log: cli::LogArgs,
}

impl Job {
    /// `farm generate`.
    pub fn generate(args: &GenerateArgs) -> Self {
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
            log: args.log,
        }
    }

    /// `farm score`.
    pub fn score(args: &ScoreArgs) -> Self {
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
            log: args.log,
        }
    }

    /// What matrices are converted to; `None` leaves them as they are. (All arithmetic
    /// on the CPU is f32; half-precision weights are widened exactly.)
    pub fn dtype(&self) -> Option<WeightDtype> {
        match self.model.dtype {
            cli::Dtype::Auto => None,
            cli::Dtype::F32 => Some(WeightDtype::F32),
            cli::Dtype::Bf16 => Some(WeightDtype::Bf16),
            cli::Dtype::F16 => Some(WeightDtype::F16),
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
        let stop = agree(world, StopSignal::listen())?;
        agree(world, pin_kernels(self.model.kernel_tier))?;
        let mut events = EventLog::new(world.rank(), world.host());
        events.emit(start.elapsed(), events::START, json!({ "ranks": world.size() }));

        let topology = Topology::new(rank.world.clone(), self.parallelism.tensor_parallel)?;
        let (plan, owner) = self.plan_together(rank)?;
        let attached = owner.as_ref().map_or(Ok(()), |_| events.attach(&plan.run_dir));
        agree(world, attached)?;
        phases.start_seconds = start.elapsed().as_secs_f64();

        let staged = self.stage(&topology, &mut events, start)?;
        phases.stage_seconds = start.elapsed().as_secs_f64() - phases.start_seconds;

        let loaded = agree(world, load(self, rank, &topology, &plan, &staged))?;
        phases.ready_at_seconds = start.elapsed().as_secs_f64();
        phases.load_seconds = phases.ready_at_seconds - phases.start_seconds - phases.stage_seconds;
        phases.weight_bytes = loaded.runner.weight_bytes();
        events.emit(start.elapsed(), "load", json!({ "weight_bytes": phases.weight_bytes }));
        world.barrier();

        let mut meter = Meter::new(model_cost(&loaded.runner));
        let run = Run { job: self, topology: &topology, plan: &plan, stop: &stop, start };
        let outcome = run.work(loaded, owner.as_ref(), &mut meter, &mut events);
        // Statistics are written also after a failure; its error counts more than theirs.
        let closed = run.close(rank, owner.as_ref(), &staged, &phases, meter, events, &outcome);
        staged.finish(&topology);
        let code = outcome.and_then(|ended| match world.rank() {
            0 => exit_code(ended),
            _ => Ok(0),
        });
        let code = agree(world, code.and_then(|code| closed.map(|()| code)))?;
        let code = broadcast_vec(world, 0, code.to_le_bytes().to_vec());
        Ok(i32::from_le_bytes(code.try_into().unwrap_or_default()))
    }

    /// Rank 0 plans; all get the plan or the error.
    fn plan_together(&self, rank: &Rank) -> Result<(RunPlan, Option<RunOwner>)> {
        let world = &*rank.world;
        let planned = match world.rank() {
            0 => plan(self, rank).map(Some),
            _ => Ok(None),
        };
        let planned = agree(world, planned)?;
        let mine = planned.as_ref().map(|(plan, _)| serde_json::to_vec(plan));
        let bytes =
            broadcast_vec(world, 0, mine.transpose().map_err(Error::fault)?.unwrap_or_default());
        let plan = serde_json::from_slice(&bytes).map_err(Error::fault);
        Ok((agree(world, plan)?, planned.map(|(_, owner)| owner)))
    }

    fn stage(&self, topology: &Topology, events: &mut EventLog, start: Instant) -> Result<Staged> {
        let options = StageOptions {
            keep: self.staging.keep_staged,
            fallback: match self.staging.stage_fallback {
                cli::StageFallback::Error => StageFallback::Error,
                cli::StageFallback::InPlace => StageFallback::InPlace,
            },
            no_stage: self.staging.no_stage,
            ..StageOptions::new(&self.model.model, &self.staging.stage_dir)
        };
        let staged = stage::stage(topology, &options)?;
        events.emit(start.elapsed(), "stage", json!(staged.report));
        if let (Some(reason), 0) = (&staged.report.in_place, topology.world.rank()) {
            tracing::warn!("the model is read where it lies: {reason}");
        }
        Ok(staged)
    }
}

fn pin_kernels(tier: cli::KernelTier) -> Result<()> {
    match tier {
        cli::KernelTier::Auto => Ok(()),
        cli::KernelTier::Scalar => kernels::pin_tier(kernels::Tier::Scalar),
        cli::KernelTier::Avx2 => kernels::pin_tier(kernels::Tier::Avx2),
        cli::KernelTier::Avx512 => kernels::pin_tier(kernels::Tier::Avx512),
    }
}

fn model_cost(runner: &ModelRunner) -> ModelCost {
    let (config, heads) = (runner.config(), runner.heads());
    let ranks = (config.num_attention_heads / heads.heads) as u64;
    let lm_head = (config.hidden_size * config.vocab_size) as u64;
    ModelCost {
        layer_params: (config.matrix_parameters() - lm_head) / ranks,
        lm_head_params: lm_head / ranks,
        step_weight_bytes: runner.step_weight_bytes(),
        ..ModelCost::default()
    }
    .with_attention(
        config.num_hidden_layers,
        heads.heads,
        heads.kv_heads,
        heads.head_dim,
        size_of::<f32>(),
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

fn exit_code(ended: Ended) -> Result<i32> {
    match ended.written {
        Some(counts) if counts.errors > 0 => Ok(EXIT_SOME_RECORDS_FAILED),
        Some(_) => Ok(0),
        None => Err(Error {
            kind: ErrorKind::Interrupted,
            message: "stopped before the end; the same command goes on where it stopped".into(),
        }),
    }
}

/// The ranks at work.
struct Run<'a> {
    job: &'a Job,
    topology: &'a Topology,
    plan: &'a RunPlan,
    stop: &'a StopSignal,
    start: Instant,
}

impl Run<'_> {
    /// Works until the run's end: leaders generate, the others follow their leader.
    fn work(
        &self,
        loaded: Loaded,
        owner: Option<&RunOwner>,
        meter: &mut Meter,
        events: &mut EventLog,
    ) -> Result<Ended> {
        let outcome = match &self.topology.data_parallel {
            Some(_) => self.lead(loaded, owner, meter, events),
            None => {
                self.follow(loaded, meter);
                Ok(Ended::default())
            }
        };
        events.emit(self.start.elapsed(), "done", json!({}));
        outcome
    }

    /// A follower that cannot go on leaves its leader in the middle of a sum: the job ends.
    fn follow(&self, loaded: Loaded, meter: &mut Meter) {
        let mut runner = loaded.runner;
        let ran = |batch: &_, took: Duration| {
            meter.step(&StepWork::of(batch), took, self.start.elapsed());
        };
        if let Err(error) = runner.follow(ran) {
            let world = &self.topology.world;
            eprintln!("farm: error: rank {} on {}: {error}", world.rank(), world.host());
            world.abort(error.kind.exit_code());
        }
    }

    fn lead(
        &self,
        loaded: Loaded,
        owner: Option<&RunOwner>,
        meter: &mut Meter,
        events: &mut EventLog,
    ) -> Result<Ended> {
        let leaders = self.topology.data_parallel.clone().expect("a leader");
        let stored = agree(&*leaders, owner.map(|owner| owner.run.stored()).transpose())?;
        let part = PartWriter::open(&RunDir::parts_of(&self.plan.run_dir), leaders.rank());
        let mut part = agree(&*leaders, part)?;
        let engine = self.engine(loaded.runner, &loaded.preparer, loaded.eos_token_ids);
        let run_info = RunInfo {
            key: self.plan.run_key.clone(),
            created_unix_seconds: self.plan.started_unix_seconds,
            model: self.job.model_name(),
        };
        let mut worker = Worker {
            engine: agree(&*leaders, engine)?,
            records: Records::new(self.job.mode, run_info, loaded.preparer),
            part: &mut part,
            slots: self.job.model.max_batch_size,
            meter,
            events,
            progress: None,
            stop: self.stop,
            start: self.start,
        };
        let (Some(owner), Some(stored)) = (owner, stored) else {
            agree(&*leaders, Ok(()))?;
            let mut link = RemoteLink::new(leaders);
            let worked = worker.run(&mut link);
            let closed = link.close();
            return worked.and(closed).map(|()| Ended::default());
        };
        stored.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let coordinator = self.coordinator(leaders.clone(), owner, stored);
        let mut coordinator = agree(&*leaders, coordinator)?;
        worker.progress = coordinator.progress().map(|state| {
            let mode = self.job.output.progress(&self.job.log);
            Progress::new(mode, self.start.elapsed(), progress_state(state))
        });
        let worked = worker.run(&mut coordinator);
        let closed = coordinator.close();
        let progress = coordinator.progress().unwrap_or_default();
        let records_resumed = coordinator.counts().skipped;
        let written = coordinator.finish();
        worked.and(closed).and(written).map(|written| Ended {
            written,
            records_total: progress.records_total,
            records_resumed,
        })
    }

    fn engine(
        &self,
        runner: ModelRunner,
        preparer: &crate::prompts::Preparer,
        eos_token_ids: Vec<u32>,
    ) -> Result<Engine<Metered>> {
        let config = EngineConfig {
            max_batch_size: self.job.model.max_batch_size,
            max_batched_tokens: self.job.model.max_batched_tokens,
            eos_token_ids,
            ..EngineConfig::default()
        };
        let decoder = Arc::new(Decoder(preparer.tokenizer.clone()));
        Engine::new(Metered::new(runner), decoder, config)
    }

    /// Rank 0's hand-out, with what earlier launches have finished.
    fn coordinator(
        &self,
        leaders: Arc<dyn crate::comm::Communicator>,
        owner: &RunOwner,
        stored: crate::ledger::parts::Stored,
    ) -> Result<Coordinator> {
        let workers = leaders.size();
        let config = HandoutConfig::for_workers(workers);
        let handout = Handout::new(config, workers, stored.indices());
        let target = match &self.job.output.output {
            Some(file) => OutputTarget::File(file.clone()),
            None => OutputTarget::Stream(Box::new(std::io::stdout())),
        };
        let output =
            OrderedOutput::create(target, &owner.run.spill(), OrderedOutput::EARLY_BYTES_MAX)?
                .with_stored(stored);
        let max_new = match self.job.mode {
            Mode::Generate => self.plan.params.max_new_tokens as u64,
            Mode::Score => 0,
        };
        let max_seq_len = self.plan.max_seq_len as u64;
        let estimate = Box::new(move |record: &_| estimate_cost(record, max_new, max_seq_len));
        let prompts = Box::new(owner.prompts.open()?);
        Ok(Coordinator::new(leaders, handout, prompts, estimate, output))
    }

    /// Gathers and writes the statistics. Collective.
    #[allow(clippy::too_many_arguments)]
    fn close(
        &self,
        rank: &Rank,
        owner: Option<&RunOwner>,
        staged: &Staged,
        phases: &Phases,
        meter: Meter,
        events: EventLog,
        outcome: &Result<Ended>,
    ) -> Result<()> {
        let facts = summary::Facts {
            job: self.job,
            rank,
            topology: self.topology,
            plan: self.plan,
            owner,
            staged,
            phases,
            ended: outcome.as_ref().ok().copied().unwrap_or_default(),
            total_seconds: self.start.elapsed().as_secs_f64(),
        };
        summary::close(&facts, meter, events)
    }
}

impl Job {
    /// The model's name as answers show it: its directory's.
    pub fn model_name(&self) -> String {
        let path: &Path = &self.model.model;
        let absolute = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        absolute.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }
}
