//! One training on one rank: from its checkpoint to its end, or until it is asked to stop.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::plan::{batches, lora_config, optimisation};
use super::results::{self, Results, Summary};
use super::{Outcome, Plan, RunFile, Shared, tensor_comm};
use crate::cli::FinetuneArgs;
use crate::comm::{TensorComm, Topology, agree};
use crate::commands::deadline::Measured;
use crate::commands::load::on_device;
use crate::device::choice::Stored;
use crate::model::layers::Loader;
use crate::model::{Activations, WeightDtype};
use crate::stats::format;
use crate::stats::process::peak_resident_bytes;
use crate::train::batch::MicroBatch;
use crate::train::data::{Batches, Dataset, Sequence, share};
use crate::train::device::Place;
use crate::train::early_stopping::EarlyStopping;
use crate::train::memory::{Estimate, Setting, estimate};
use crate::train::metrics::{EvalMetrics, TrainMetrics};
use crate::train::model::TrainedModel;
use crate::train::trainer::{Progress, StepOutcome, Trainer, sum};
use crate::{Error, Result};

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// How far the training is.
    pub progress: Progress,
    /// The validation losses so far.
    pub early_stopping: EarlyStopping,
    /// Tokens trained on so far.
    pub tokens: u64,
}

/// The training.
pub struct Training<'a> {
    shared: &'a Shared<'a>,
    args: &'a FinetuneArgs,
    plan: &'a Plan,
    topology: Topology,
    trainer: Trainer,
    batches: Batches,
    total_steps: u64,
    lengths: Vec<usize>,
    state: State,
    /// Of rank 0 alone.
    results: Option<Results>,
    measured: Measured,
    /// Floating-point operations a second that all ranks are able to.
    flops_limit: f64,
    flops_a_token: f64,
}

/// How often the steps so far are looked at to say when the end is.
const SAY_EVERY_SECONDS: f64 = 30.0;

impl<'a> Training<'a> {
    /// Loads the model and goes on from the newest checkpoint, if there is one. Collective;
    /// fails alike on all ranks of `topology`.
    ///
    /// # Errors
    /// Input errors that name the file or flag.
    pub fn new(
        shared: &'a Shared<'a>,
        args: &'a FinetuneArgs,
        plan: &'a Plan,
        topology: Topology,
    ) -> Result<Self> {
        let world = &*topology.world;
        let lengths = shared.train.lengths();
        let (batches, total_steps) = batches(args, plan, &lengths)?;
        let comm: Arc<dyn TensorComm> = tensor_comm(&topology);
        let place = place(shared, args, &topology, &comm)?;
        let memory = check_memory(shared, args, plan, &topology, place.as_ref());
        agree(world, memory)?;
        let dtype = dtype_in_memory(args, place.as_ref());
        // Gradients go back through the products that the passes forward take.
        let activations = Activations::F32;
        let source = &shared.checkpoint;
        let loader = Loader { source, comm, dtype, activations, adapters: &[] };
        let (training, config) = (&args.training, lora_config(args));
        let (seed, recompute) = (training.seed, training.recompute);
        let model = TrainedModel::load(&loader, &config, seed, recompute, place.as_ref());
        let model = agree(world, model)?;
        let flops_a_token = model.flops_a_token();
        let optimisation = optimisation(args, total_steps);
        let replicas = topology.data_parallel.clone();
        let mut trainer = Trainer::new(model, optimisation, topology.world.clone(), replicas);
        let mut state = State {
            progress: Progress::default(),
            early_stopping: EarlyStopping::new(args.output.early_stopping_patience, 0.0),
            tokens: 0,
        };
        world.barrier();
        let peak_flops = agree(world, trainer.model.peak_flops())?;
        let flops_limit = sum(world, peak_flops.unwrap_or(f64::NAN));
        if let Some(resumed) = results::load(world, &plan.dir, &mut trainer)? {
            state = resumed;
            // Patience is no part of what is trained: it may change from launch to launch.
            state.early_stopping.patience = args.output.early_stopping_patience;
            trainer.progress = state.progress;
        }
        let is_first = world.rank() == 0;
        let results = is_first.then(|| {
            let model = shared.checkpoint.config();
            Results::open(args, plan, model, &trainer.model, state.progress)
        });
        let results = agree(world, results.transpose())?;
        let mut training = Self {
            shared,
            args,
            plan,
            topology,
            trainer,
            batches,
            total_steps,
            lengths,
            state,
            results,
            measured: Measured::default(),
            flops_limit,
            flops_a_token,
        };
        training.say_what_there_is();
        Ok(training)
    }

    fn say_what_there_is(&mut self) {
        if self.results.is_none() {
            return;
        }
        let parameters = self.trainer.model.parameters.whole_len();
        tracing::info!(
            "{parameters} trained values; {} steps of {} sequences over {} ranks",
            self.total_steps,
            self.args.training.batch_size,
            self.topology.world.size(),
        );
        if self.state.progress.step > 0 {
            tracing::info!("going on after step {}", self.state.progress.step);
        }
    }

    /// Trains to the end or until asked to stop. Collective; fails alike on all ranks.
    ///
    /// # Errors
    /// A fault: files that cannot be written.
    pub fn run(mut self) -> Result<Outcome> {
        if self.plan.is_complete {
            return Ok(Outcome::Complete(self.summary()));
        }
        let mut said = Instant::now();
        let (begun, first) = (Instant::now(), self.state.progress.step);
        while !self.is_over() {
            self.step()?;
            let step = self.state.progress.step;
            let save_steps = self.args.output.save_steps;
            let is_due = save_steps > 0 && step.is_multiple_of(save_steps);
            // Before the validation, which may take longer than there is left.
            if is_due {
                self.save()?;
            }
            let is_evaluated = step == self.total_steps || step.is_multiple_of(self.eval_steps());
            let is_best = is_evaluated && self.validate()?;
            if said.elapsed().as_secs_f64() > SAY_EVERY_SECONDS {
                said = Instant::now();
                self.say_how_far(begun, first);
            }
            let (is_asked, is_last) = (self.is_asked_to_stop(), self.is_over());
            // What was just saved is saved again where validation has changed it.
            let has_news =
                is_best || (is_due && is_evaluated && !self.shared.validation.is_empty());
            if has_news || (!is_due && (is_last || is_asked)) {
                self.save()?;
            }
            if is_asked && !is_last {
                return Ok(Outcome::Stopped);
            }
        }
        self.finish()
    }

    /// Whether no step is left; a checkpoint knows it too, so that a run that is killed after
    /// its last one does not go on.
    fn is_over(&self) -> bool {
        self.state.progress.step >= self.total_steps || self.state.early_stopping.should_stop()
    }

    fn eval_steps(&self) -> u64 {
        let output = &self.args.output;
        let by_saving = Some(output.save_steps).filter(|steps| *steps > 0);
        output.eval_steps.or(by_saving).unwrap_or(u64::MAX)
    }

    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let step = self.state.progress.step;
        let sequences = self.batches.step(step);
        let train = &self.shared.train;
        let micro_batches = self.micro_batches(train, &sequences, step, &self.lengths);
        let examples = || sequences.iter().flatten().map(|e| train.example(*e as usize));
        let is_target = |target: &&bool| **target;
        let targets =
            examples().map(|e| e.is_target.iter().filter(is_target).count()).sum::<usize>();
        let tokens: usize = examples().map(|e| e.token_ids.len()).sum();
        let outcome = self.trainer.step(&micro_batches, targets as u64)?;
        self.state.progress = self.trainer.progress;
        self.state.tokens += tokens as u64;
        let took = start.elapsed();
        self.measured.step(took);
        self.record(&outcome, tokens as u64, took.as_secs_f64())
    }

    /// This group's part of `sequences`.
    fn micro_batches(
        &self,
        data: &Dataset,
        sequences: &[Sequence],
        step: u64,
        lengths: &[usize],
    ) -> Vec<MicroBatch> {
        let replicas = &self.topology.data_parallel;
        let size = self.args.training.micro_batch_size;
        let shares = share(sequences, lengths, replicas.size(), size);
        let of_group = shares.into_iter().nth(replicas.rank()).unwrap_or_default();
        of_group.iter().map(|members| micro_batch(data, sequences, members, step)).collect()
    }

    fn record(&mut self, outcome: &StepOutcome, tokens: u64, step_seconds: f64) -> Result<()> {
        let memory = peak_resident_bytes().unwrap_or(0);
        let world = &*self.topology.world;
        let of_all = world.gather(0, &memory.to_le_bytes());
        let memory_peak_bytes = of_all
            .unwrap_or_default()
            .iter()
            .filter_map(|bytes| Some(u64::from_le_bytes(bytes.as_slice().try_into().ok()?)))
            .max();
        let rate = tokens as f64 / step_seconds;
        let place = self.batches.place(self.state.progress.step - 1);
        let metrics = TrainMetrics {
            step: self.state.progress.step,
            epoch: place.epoch as f64 + (place.step + 1) as f64 / place.steps as f64,
            loss: outcome.loss,
            learning_rate: outcome.learning_rate,
            grad_norm: outcome.grad_norm,
            tokens,
            tokens_per_second: rate,
            flop_share: Some(rate * self.flops_a_token / self.flops_limit)
                .filter(|s| s.is_finite()),
            memory_peak_bytes: memory_peak_bytes.filter(|bytes| *bytes > 0),
            step_seconds,
            skipped: outcome.skipped,
        };
        let recorded = self.results.as_mut().map_or(Ok(()), |results| results.log.train(&metrics));
        agree(world, recorded)
    }

    fn say_how_far(&self, begun: Instant, first: u64) {
        let Some(results) = &self.results else { return };
        let step = self.state.progress.step;
        let seconds_a_step = begun.elapsed().as_secs_f64() / (step - first).max(1) as f64;
        let left = seconds_a_step * (self.total_steps - step) as f64;
        let losses = results.log.metrics().train_losses();
        let loss = losses.last().map_or(f64::NAN, |(_, loss)| *loss);
        tracing::info!(
            "step {step} of {}, loss {loss:.4}, about {} left",
            self.total_steps,
            format::seconds(left)
        );
    }

    /// Notes the loss on the validation data, if there are any; whether it is the lowest so
    /// far.
    fn validate(&mut self) -> Result<bool> {
        let data = &self.shared.validation;
        if data.is_empty() {
            return Ok(false);
        }
        let start = Instant::now();
        // Some examples at a time, so that they take no more memory than a training step.
        let all: Vec<Sequence> = (0..data.len() as u32).map(|example| vec![example]).collect();
        let lengths = data.lengths();
        let micro_batches = self.micro_batches(data, &all, 0, &lengths);
        let targets = data.num_targets() as u64;
        let loss = self.trainer.evaluate(&micro_batches, targets)?;
        let step = self.state.progress.step;
        let is_best = self.state.early_stopping.update(step, loss);
        self.measured.step(start.elapsed());
        let metrics = EvalMetrics::new(step, loss, targets);
        let recorded = self.results.as_mut().map_or(Ok(()), |results| {
            tracing::info!("step {step}: validation loss {loss:.4}");
            results.log.eval(&metrics)
        });
        agree(&*self.topology.world, recorded).map(|()| is_best)
    }

    /// Whether a signal came to any rank, or the job's time is ending.
    fn is_asked_to_stop(&self) -> bool {
        let world = &*self.topology.world;
        let now = self.shared.start.elapsed().as_secs_f64();
        let is_late = world.rank() == 0 && self.shared.deadline.should_drain(now, &self.measured);
        sum(world, f64::from(u8::from(self.shared.stop.is_set() || is_late))) > 0.0
    }

    fn save(&mut self) -> Result<()> {
        let start = Instant::now();
        let saved =
            results::save(&self.topology, &self.trainer, &self.state, self.results.as_ref());
        self.measured.sync(start.elapsed());
        agree(&*self.topology.world, saved)
    }

    /// Writes the adapter.
    fn finish(self) -> Result<Outcome> {
        let summary = self.summary();
        let group = self.trainer.model.group();
        let parameters = &self.trainer.model.parameters;
        let whole = parameters.gathered(&parameters.values, &**group);
        let written = self.results.as_ref().map_or(Ok(()), |results| {
            results.finish(&self.trainer, &whole, &self.state)?;
            let run = RunFile::read(&self.plan.dir)?.ok_or_else(|| {
                Error::fault(format!("{}: finetune.json is gone", self.plan.dir.display()))
            })?;
            RunFile { is_complete: true, ..run }.write(&self.plan.dir)
        });
        agree(&*self.topology.world, written)?;
        Ok(Outcome::Complete(summary))
    }

    fn summary(&self) -> Summary {
        let losses = self.results.as_ref().map(|r| r.log.metrics().train_losses());
        Summary {
            steps: self.state.progress.step,
            skipped: self.state.progress.skipped,
            tokens: self.state.tokens,
            loss: losses.and_then(|losses| losses.last().map(|(_, loss)| *loss)),
            best: self.state.early_stopping.best().map(|best| (best.step, best.loss)),
        }
    }
}

/// The device that this rank trains on; `None` on a CPU. Collective.
fn place(
    shared: &Shared,
    args: &FinetuneArgs,
    topology: &Topology,
    comm: &Arc<dyn TensorComm>,
) -> Result<Option<Place>> {
    let (devices, checkpoint) = (shared.devices, &shared.checkpoint);
    let opened = on_device::open(&args.model, devices, topology, checkpoint, comm)?;
    Ok(opened.map(|on_device::Opened { device, comm, dtype }| Place { device, dtype, comm }))
}

/// What matrices become on the host. A device makes floats its own type when they get there.
fn dtype_in_memory(args: &FinetuneArgs, place: Option<&Place>) -> Option<WeightDtype> {
    let dtype = args.model.dtype_in_memory();
    dtype.filter(|dtype| place.is_none() || matches!(dtype, WeightDtype::Quant(_)))
}

/// Says before anything is loaded what a rank will take, so that a job that is killed for its
/// memory tells why.
///
/// # Errors
/// An input error: a device that has less in all.
fn check_memory(
    shared: &Shared,
    args: &FinetuneArgs,
    plan: &Plan,
    topology: &Topology,
    place: Option<&Place>,
) -> Result<()> {
    let (training, replicas) = (&args.training, topology.data_parallel.size());
    let sequences = training.micro_batch_size.min(training.batch_size.div_ceil(replicas));
    let mut lengths = shared.train.lengths();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let longest: usize = match args.data.packing {
        true => (sequences * plan.max_seq_len).min(lengths.iter().sum()),
        false => lengths.iter().take(sequences).sum(),
    };
    let setting = Setting {
        model: shared.checkpoint.config(),
        lora: &lora_config(args),
        tensor_parallel: args.parallelism.tensor_parallel,
        tokens: longest,
        recompute: training.recompute,
        bytes_a_weight: bytes_a_weight(shared, args, place),
        device: place.map(|place| place.dtype),
    };
    // Modules that are not there are said to be when they are loaded.
    let Ok(estimate) = estimate(&setting) else { return Ok(()) };
    let memory = format::memory;
    let total = match place {
        None => estimate.total(),
        Some(_) => estimate.total_on_device(),
    };
    if topology.world.rank() == 0 {
        let Estimate { weights, trained, kept, live, logits, .. } = estimate;
        tracing::info!(
            "a rank takes about {} of {}: weights {}, trained values {}, activations of \
             {longest} tokens {} kept and {} at work",
            memory(total),
            if place.is_some() { "its device's memory" } else { "memory" },
            memory(weights),
            memory(trained),
            memory(kept),
            memory(live.max(logits)),
        );
    }
    let has = shared.devices.memory_bytes().filter(|_| place.is_some());
    match has {
        Some(has) if total > has => Err(Error::input(format!(
            "training takes about {} of the device's memory, which is {}: --micro-batch-size, \
             --recompute full, --quantize or a larger --tensor-parallel make it less",
            memory(total),
            memory(has),
        ))),
        _ => Ok(()),
    }
}

/// Bytes of a weight where products take it.
fn bytes_a_weight(shared: &Shared, args: &FinetuneArgs, place: Option<&Place>) -> f64 {
    let stored = shared.checkpoint.bytes_a_weight();
    match (place, dtype_in_memory(args, place)) {
        (_, Some(dtype)) => dtype.bytes_a_value(),
        (Some(place), None) if on_device::stored(&shared.checkpoint) != Stored::Quantized => {
            place.dtype.bytes() as f64
        }
        _ => stored,
    }
}

/// The sequences `members` of a step. Draws for a row are keyed by step, sequence and place,
/// which no split changes.
fn micro_batch(data: &Dataset, sequences: &[Sequence], members: &[usize], step: u64) -> MicroBatch {
    let mut batch = MicroBatch::default();
    for &member in members {
        let mut first = (step << 40) + ((member as u64) << 20);
        for example in &sequences[member] {
            let example = data.example(*example as usize);
            batch.push(example.token_ids, example.is_target, first);
            first += example.token_ids.len() as u64;
        }
    }
    batch
}
