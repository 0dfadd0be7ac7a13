//! An optimiser step over all ranks: micro-batches forward and backward, the gradients summed
//! over the replicas and inside the tensor-parallel groups, clipped, AdamW.
//!
//! The loss is the mean over the counted tokens of the whole step, however they fall on
//! micro-batches and ranks. Sums are taken in rank order, so the same layout gives the same
//! bits; another one differs by rounding.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::adamw::{AdamW, clip_factor};
use super::batch::MicroBatch;
use super::model::TrainedModel;
use super::parameters::{Parameter, Part};
use super::schedule::Schedule;
use crate::Result;
use crate::comm::{Communicator, HostTensorComm, TensorComm, agree};

/// How the trained values change.
#[derive(Debug, Clone)]
pub struct Optimisation {
    /// The optimiser.
    pub adamw: AdamW,
    /// Its learning rate, by step.
    pub schedule: Schedule,
    /// Gradients are scaled down to this norm; 0 leaves them.
    pub max_grad_norm: f64,
    /// The learning rate of B is this times that of A (LoRA+, Hayou et al. 2024).
    pub loraplus_ratio: f64,
}

/// How far the training is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimiser steps that are done, skipped ones included.
    pub step: u64,
    /// Steps that changed the values.
    pub updates: u64,
    /// Steps that were skipped, since their loss or gradients were not numbers.
    pub skipped: u64,
}

/// What a step gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    /// Mean loss of the counted tokens.
    pub loss: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// The values stayed as they were.
    pub skipped: bool,
}

/// The model with its optimiser, on one rank.
pub struct Trainer {
    /// The model.
    pub model: TrainedModel,
    /// How far it is.
    pub progress: Progress,
    optimisation: Optimisation,
    world: Arc<dyn Communicator>,
    /// The ranks with this one's shard.
    replicas: Arc<dyn Communicator>,
}

impl Trainer {
    /// A trainer at step 0. `replicas` are the ranks with the same shard of the model.
    pub fn new(
        model: TrainedModel,
        optimisation: Optimisation,
        world: Arc<dyn Communicator>,
        replicas: Arc<dyn Communicator>,
    ) -> Self {
        Self { model, progress: Progress::default(), optimisation, world, replicas }
    }

    /// One step over this rank's `micro_batches`; `targets` are the counted tokens of all
    /// ranks. Collective; fails alike on all ranks.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn step(&mut self, micro_batches: &[MicroBatch], targets: u64) -> Result<StepOutcome> {
        let parameters = &mut self.model.parameters;
        parameters.gradients.fill(0.0);
        let weight = (1.0 / targets.max(1) as f64) as f32;
        let losses = micro_batches.iter().map(|batch| self.model.train(batch, weight));
        let own: Result<f64> = losses.sum();
        let own = own.and_then(|loss| self.model.collect_gradients().map(|()| loss));
        let own = agree(&*self.world, self.or_end(own))?;
        let loss = sum(&*self.replicas, own) / targets.max(1) as f64;
        let grad_norm = self.reduce();
        let learning_rate = self.optimisation.schedule.learning_rate(self.progress.step);
        self.progress.step += 1;
        let skipped = !loss.is_finite() || !grad_norm.is_finite();
        if skipped {
            self.progress.skipped += 1;
        } else {
            self.progress.updates += 1;
            self.update(grad_norm, learning_rate);
            agree(&*self.world, self.model.refresh())?;
        }
        Ok(StepOutcome { loss, grad_norm, learning_rate, skipped })
    }

    /// The mean loss over `micro_batches` of all ranks, which hold `targets` counted tokens.
    /// Collective; fails alike on all ranks.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn evaluate(&mut self, micro_batches: &[MicroBatch], targets: u64) -> Result<f64> {
        let own: Result<f64> = micro_batches.iter().map(|b| self.model.evaluate(b)).sum();
        let own = agree(&*self.world, self.or_end(own))?;
        Ok(sum(&*self.replicas, own) / targets.max(1) as f64)
    }

    /// A rank whose device fails leaves the others of its group in the middle of a sum: the job
    /// ends.
    fn or_end(&self, passed: Result<f64>) -> Result<f64> {
        if let Err(error) = &passed
            && self.model.group().size() > 1
        {
            tracing::error!("rank {} on {}: {error}", self.world.rank(), self.world.host());
            self.world.abort(error.kind.exit_code());
        }
        passed
    }

    /// Sums the gradients over all ranks; returns their norm.
    fn reduce(&mut self) -> f64 {
        let parameters = &mut self.model.parameters;
        if self.replicas.size() > 1 {
            HostTensorComm::new(self.replicas.clone()).all_reduce_sum(&mut parameters.gradients);
        }
        let group = self.model.group().clone();
        self.model.parameters.sum_partial_gradients(&*group);
        self.model.parameters.gradient_norm(&*group)
    }

    fn update(&mut self, grad_norm: f64, learning_rate: f64) {
        let Optimisation { adamw, max_grad_norm, loraplus_ratio, .. } = &self.optimisation;
        let parameters = &mut self.model.parameters;
        if *max_grad_norm > 0.0 {
            let factor = clip_factor(grad_norm, *max_grad_norm);
            parameters.gradients.iter_mut().for_each(|g| *g *= factor);
        }
        let rate = |tensor: &Parameter| match tensor.part {
            Part::B => learning_rate * loraplus_ratio,
            _ => learning_rate,
        };
        let steps: Vec<_> =
            parameters.tensors().iter().map(|t| (t.span.clone(), rate(t))).collect();
        for (span, rate) in steps {
            adamw.step(
                self.progress.updates,
                rate,
                &mut parameters.values[span.clone()],
                &parameters.gradients[span.clone()],
                &mut parameters.m[span.clone()],
                &mut parameters.v[span],
            );
        }
    }
}

/// The ranks' values summed in rank order, on all of them. Collective.
pub fn sum(comm: &dyn Communicator, own: f64) -> f64 {
    let all = comm.all_gather(&own.to_le_bytes());
    let values =
        all.iter().filter_map(|bytes| Some(f64::from_le_bytes(bytes.as_slice().try_into().ok()?)));
    values.sum()
}
