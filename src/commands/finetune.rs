//! `farm finetune`: trains a LoRA adapter over all ranks, and goes on where it stopped.
//!
//! Rank 0 checks everything and reads the data (`plan`); the model is staged; every rank
//! loads its share and trains (`training`); rank 0 writes checkpoints, metrics and the
//! adapter (`results`). A sweep shares the ranks out over several trainings (`sweep`).

mod plan;
mod results;
mod sweep;
mod training;

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::cli::FinetuneArgs;
use crate::comm::{Communicator, HostTensorComm, Topology, agree, broadcast_vec};
use crate::commands::deadline::Deadline;
use crate::commands::device::Devices;
use crate::commands::generate::{pin_kernels, stage_model};
use crate::commands::launch::Rank;
use crate::commands::signals::StopSignal;
use crate::model::Checkpoint;
use crate::train::data::Dataset;
use crate::{Error, ErrorKind, Result};
use plan::Plan;
pub use plan::RunFile;
use training::Training;

/// What all trainings of a launch share.
pub struct Shared<'a> {
    /// The ranks.
    pub rank: &'a Rank,
    /// What they compute on.
    pub devices: &'a Devices,
    /// Whether a signal asked to stop.
    pub stop: &'a StopSignal,
    /// When the job ends.
    pub deadline: Deadline,
    /// When this launch began.
    pub start: Instant,
    /// What is trained on.
    pub train: Dataset,
    /// What is validated on; may be empty.
    pub validation: Dataset,
    /// The staged model.
    pub checkpoint: Checkpoint,
}

/// How a training ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// To its end.
    Complete(results::Summary),
    /// Asked to stop; the same command goes on.
    Stopped,
}

/// The whole run on one rank; returns the exit code.
///
/// # Errors
/// Alike on all ranks.
pub fn run(args: &FinetuneArgs, rank: &Rank) -> Result<i32> {
    let world = &*rank.world;
    world.barrier();
    let start = Instant::now();
    let stop = &agree(world, StopSignal::listen(args.output.interrupted_exit_code.into()))?;
    agree(world, pin_kernels(args.model.kernel_tier))?;
    let trials = sweep::trials(args)?;
    let groups = sweep::Groups::new(&rank.world, args.parallelism.tensor_parallel, trials.len())?;
    let topology = Topology::new(rank.world.clone(), args.parallelism.tensor_parallel)?;
    let devices = &Devices::choose(&args.model, rank, &topology)?;
    let mut held = None;
    let plans = together(world, || {
        let (plans, member) = plan::plan(args, &trials, rank, devices, start)?;
        held = Some(member);
        Ok(plans)
    })?;
    let (train, validation) = data(world, args, &plans)?;
    if plans.iter().all(|plan| plan.is_complete) {
        if world.rank() == 0 {
            tracing::info!("{} is complete: nothing is left to do", plans[0].dir.display());
        }
        return Ok(0);
    }
    let staged = stage_model(&args.staging, &args.model, &topology)?;
    let checkpoint = agree(world, Checkpoint::open(&staged.model_path))?;
    let deadline = plans[0].deadline;
    let shared = Shared { rank, devices, stop, deadline, start, train, validation, checkpoint };
    let outcomes = sweep::run(&groups, &trials, &plans, |trial, plan, comm| {
        let topology = Topology::new(comm, args.parallelism.tensor_parallel)?;
        Training::new(&shared, &trial.args, plan, topology)?.run()
    });
    staged.finish(&topology);
    if let Some(member) = &mut held {
        member.leave(if outcomes.is_ok() { "ended" } else { "failed" });
    }
    let outcomes = agree(world, outcomes)?;
    let outcomes = agree(world, sweep::gathered(world, &groups, outcomes))?;
    if outcomes.iter().any(|(_, outcome)| *outcome == Outcome::Stopped) {
        return Err(Error {
            kind: ErrorKind::Interrupted,
            message: "stopped before the end; the same command goes on where it stopped".into(),
        });
    }
    let written = if world.rank() == 0 { sweep::report(args, &trials, &outcomes) } else { Ok(()) };
    agree(world, written).map(|()| 0)
}

/// What rank 0 makes, on all ranks; its error is nobody's in particular. Collective.
fn together<T>(world: &dyn Communicator, make: impl FnOnce() -> Result<T>) -> Result<T>
where
    T: Serialize + serde::de::DeserializeOwned,
{
    let made = (world.rank() == 0).then(make);
    let bytes = made.map(|made| serde_json::to_vec(&made).unwrap_or_default());
    let bytes = broadcast_vec(world, 0, bytes.unwrap_or_default());
    let made: Result<Result<T>> = serde_json::from_slice(&bytes).map_err(Error::fault);
    agree(world, made)?
}

/// The data on all ranks: rank 0 reads them. Collective.
fn data(
    world: &dyn Communicator,
    args: &FinetuneArgs,
    plans: &[Plan],
) -> Result<(Dataset, Dataset)> {
    let read = || {
        let (train, validation) = plan::data(args, &plans[0])?;
        plan::check_data(plans, &(train.identity() + &validation.identity()))?;
        Ok([train, validation])
    };
    let nothing = || Ok([Dataset::default(), Dataset::default()]);
    let [train, validation] = agree(world, if world.rank() == 0 { read() } else { nothing() })?;
    let on_all = |data: Dataset| {
        let bytes = if world.rank() == 0 { data.to_bytes() } else { Vec::new() };
        let bytes = broadcast_vec(world, 0, bytes);
        agree(world, if world.rank() == 0 { Ok(data) } else { Dataset::from_bytes(&bytes) })
    };
    Ok((on_all(train)?, on_all(validation)?))
}

/// The tensor-parallel group's sums.
fn tensor_comm(topology: &Topology) -> Arc<HostTensorComm> {
    Arc::new(HostTensorComm::new(topology.tensor_parallel.clone()))
}
