//! The feed-forward part of a layer: a dense MLP, or routed experts.

use candle_core::Tensor;

use super::adapter::RowAdapters;
use super::config::{ExpertsConfig, ModelConfig};
use super::layers::{ColumnParallelLinear, Loader, RowParallelLinear};
use super::moe::{ExpertWeights, Experts};
use super::names::{ExpertNames, GateUp, Names, Place, at, at_expert};
use super::ops;
use super::weights::Weight;
use crate::Result;
use crate::kernels::ops::Activation;

/// What follows attention in a layer.
pub enum FeedForward {
    /// `down(act(gate(x)) · up(x))`, or `down(act(up(x)))`.
    Dense(Box<Mlp>),
    /// Some of several such, as a router says.
    Experts(Experts),
}

/// A dense MLP, or a rank's inner features of one.
pub struct Mlp {
    pub(super) activation: Activation,
    pub(super) gate_proj: Option<ColumnParallelLinear>,
    pub(super) up_proj: ColumnParallelLinear,
    pub(super) down_proj: RowParallelLinear,
}

impl FeedForward {
    /// Loads this rank's share of layer `layer`.
    ///
    /// # Errors
    /// See [`super::checkpoint::TensorTable::matrix`].
    pub fn load(l: &Loader, config: &ModelConfig, layer: usize) -> Result<Self> {
        match &config.experts {
            Some(experts) if !experts.dense_layers.contains(&layer) => {
                Ok(Self::Experts(load_experts(l, config, experts, layer)?))
            }
            _ => Ok(Self::Dense(Box::new(Mlp::load(l, config, layer)?))),
        }
    }

    /// `[m, hidden]` → the same, on every rank.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        match self {
            Self::Dense(mlp) => mlp.forward(x, adapters),
            Self::Experts(experts) => experts.forward(x, adapters),
        }
    }

    /// The weight matrices of this rank.
    pub fn weights(&self) -> Box<dyn Iterator<Item = &Weight> + '_> {
        match self {
            Self::Dense(mlp) => Box::new(
                mlp.gate_proj
                    .iter()
                    .map(ColumnParallelLinear::weight)
                    .chain([mlp.up_proj.weight(), mlp.down_proj.weight()]),
            ),
            Self::Experts(experts) => Box::new(experts.weights()),
        }
    }
}

impl Mlp {
    fn load(l: &Loader, config: &ModelConfig, layer: usize) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let share = l.share(inner);
        let places = |names: &Names| names.gate_up.places(layer, inner, share.clone());
        let column = |place: &dyn Fn(&Names) -> Place| {
            ColumnParallelLinear::load(l, place, hidden, config.mlp_bias, None)
        };
        let gate = |names: &Names| places(names).0.unwrap_or_else(|| places(names).1);
        let has_gate = !matches!(config.names.gate_up, GateUp::Up(_));
        let gate_proj = has_gate.then(|| column(&gate)).transpose()?;
        let up_proj = column(&|names| places(names).1)?;
        let down = |names: &Names| Place::new(at(names.down_proj, layer), hidden, 0..hidden);
        let down_proj = RowParallelLinear::load(l, &down, inner, share.clone(), config.mlp_bias)?;
        Ok(Self { activation: config.activation, gate_proj, up_proj, down_proj })
    }

    fn forward(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        let mut up = self.up_proj.forward(x, adapters)?;
        let cols = self.up_proj.weight().rows();
        let inner = match &self.gate_proj {
            Some(gate) => ops::gated(self.activation, &gate.forward(x, adapters)?, &up, cols)?,
            None => {
                crate::kernels::ops::activate(self.activation, &mut up);
                ops::from_values(up, cols)?
            }
        };
        self.down_proj.forward(&inner, adapters)
    }
}

/// Whole experts a rank; the router is everywhere.
fn load_experts(
    l: &Loader,
    config: &ModelConfig,
    experts: &ExpertsConfig,
    layer: usize,
) -> Result<Experts> {
    let (hidden, inner) = (config.hidden_size, experts.moe_intermediate_size);
    let n = experts.num_experts;
    let router_place = |names: &Names| Place::new(at(names.router, layer), n, 0..n);
    // Its scores choose: it keeps the precision that it has.
    let router = l.source.matrix(&l.base(&router_place), hidden, 0..hidden, None)?;
    let router = ColumnParallelLinear::of_weight(l, &router_place, router)?;
    let whole = |part: usize, expert: usize| {
        let (rows, width) = if part == 2 { (hidden, inner) } else { (inner, hidden) };
        let place = |names: &Names| match names.experts {
            ExpertNames::Each(parts) => {
                Place::new(at_expert(parts[part], layer, expert), rows, 0..rows)
            }
            ExpertNames::Stacked(parts) => {
                let first = expert * rows;
                Place::new(at(parts[part], layer), n * rows, first..first + rows)
            }
        };
        ColumnParallelLinear::load(l, &place, width, false, None)
    };
    let mine = l.share(n);
    let weights = mine
        .clone()
        .map(|e| Ok(ExpertWeights { gate: whole(0, e)?, up: whole(1, e)?, down: whole(2, e)? }));
    let weights = weights.collect::<Result<Vec<_>>>()?;
    Ok(Experts::new(router, mine, weights, experts, config.activation, l.comm.clone()))
}
