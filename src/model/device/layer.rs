//! One layer on the device.

use super::inputs::Inputs;
use super::linear::{AdapterGroup, Context, Linear};
use super::rotations::RotationTables;
use super::upload::Uploader;
use crate::device::attention::{self, Cache, Chunks, Norms, Rows, Rule, Shape};
use crate::device::experts::{self, ExpertMatrices, Routing};
use crate::device::{Array, Device, DeviceComm, Dtype, ops};
use crate::kernels::ops::Activation;
use crate::model::attention::{Attention, OutputProjection};
use crate::model::config::Block;
use crate::model::decoder::DecoderLayer;
use crate::model::layers::ColumnParallelLinear;
use crate::model::mlp::{FeedForward, Mlp as HostMlp};
use crate::model::moe::Experts as HostExperts;
use crate::{Error, Result};

/// A layer, or a rank's share of it.
pub struct Layer {
    block: Block,
    input_norm: ops::Norm,
    post_attention_norm: Option<ops::Norm>,
    mlp_norm: Option<ops::Norm>,
    post_mlp_norm: Option<ops::Norm>,
    qkv: Linear,
    qk_norms: Option<[ops::Norm; 2]>,
    window: Option<usize>,
    softcap: Option<f32>,
    slopes: Option<Array>,
    o_proj: Output,
    mlp: FeedForwardOnDevice,
}

/// A projection back to the residual stream.
struct Output {
    linear: Linear,
    /// The ranks' products are summed.
    is_split: bool,
}

enum FeedForwardOnDevice {
    Dense { gate_up: Linear, is_gated: bool, activation: Activation, down: Output },
    Experts { router: Linear, experts: experts::Experts },
}

/// Arrays that all layers of a step use, for its number of rows.
pub struct Workspace {
    /// The residual stream, f32 `[rows, hidden]`.
    pub x: Array,
    /// `[rows, hidden]`.
    pub normed: Array,
    /// The other norm of a parallel block.
    pub normed_too: Array,
    /// What a part adds to the stream, f32 `[rows, hidden]`.
    pub added: Array,
    /// Queries, keys, values.
    pub qkv: Array,
    /// `[rows, heads · head_dim]`.
    pub attended: Array,
    /// `[rows, 2 · inner]`.
    pub gate_up: Array,
    /// `[rows, inner]`.
    pub inner: Array,
    /// A router's scores, f32 `[rows, experts]`.
    pub scores: Array,
}

/// A step as the layers see it.
pub struct Pass<'a> {
    /// The device.
    pub device: &'a Device,
    /// The tensor-parallel group.
    pub comm: &'a dyn DeviceComm,
    /// Heads on this rank.
    pub heads: Shape,
    /// The step's integers.
    pub inputs: &'a Inputs,
    /// Row length of the block tables.
    pub max_blocks: usize,
    /// Every sequence has one row.
    pub is_decode: bool,
    /// The rotary embedding.
    pub rotations: &'a RotationTables,
    /// The rows' adapters.
    pub adapters: &'a [AdapterGroup],
    /// The arrays of this step's size.
    pub work: &'a Workspace,
    /// Scratch memory of projections.
    pub scratch: &'a Array,
    /// Scratch memory of the attention.
    pub attention_scratch: &'a Array,
    /// Scratch memory of the experts.
    pub experts_scratch: Option<&'a experts::Scratch>,
}

/// Widths of what a layer computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Widths {
    /// Queries, keys and values.
    pub qkv: usize,
    /// Queries.
    pub queries: usize,
    /// Gate and up.
    pub gate_up: usize,
    /// Inner features of a dense MLP.
    pub inner: usize,
    /// Experts.
    pub scores: usize,
}

impl Widths {
    /// Room for both.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            qkv: self.qkv.max(other.qkv),
            queries: self.queries.max(other.queries),
            gate_up: self.gate_up.max(other.gate_up),
            inner: self.inner.max(other.inner),
            scores: self.scores.max(other.scores),
        }
    }
}

impl Workspace {
    /// The same for fewer rows: the starts of its arrays. `rows` of `self` are `capacity`.
    #[must_use]
    pub fn first(&self, rows: usize, capacity: usize) -> Self {
        let part = |array: &Array| array.first(array.len() / capacity * rows);
        Self {
            x: part(&self.x),
            normed: part(&self.normed),
            normed_too: part(&self.normed_too),
            added: part(&self.added),
            qkv: part(&self.qkv),
            attended: part(&self.attended),
            gate_up: part(&self.gate_up),
            inner: part(&self.inner),
            scores: part(&self.scores),
        }
    }
}

impl Layer {
    /// Moves a layer to the device.
    ///
    /// # Errors
    /// No memory; a fault of the driver; an adapter of experts.
    pub(in crate::model) fn load(uploader: &Uploader, host: &DecoderLayer) -> Result<Self> {
        let norm = |norm: &Option<_>| norm.as_ref().map(|n| uploader.norm(n)).transpose();
        let Attention { window, softcap, slopes, qkv, qk_norms, o_proj, .. } = &host.attention;
        let qkv: Vec<&ColumnParallelLinear> = qkv.linears().iter().collect();
        let qk_norms = qk_norms
            .as_ref()
            .map(|[q, k]| -> Result<_> { Ok([uploader.norm(q)?, uploader.norm(k)?]) });
        Ok(Self {
            block: host.block,
            input_norm: uploader.norm(&host.input_norm)?,
            post_attention_norm: norm(&host.post_attention_norm)?,
            mlp_norm: norm(&host.mlp_norm)?,
            post_mlp_norm: norm(&host.post_mlp_norm)?,
            qkv: Linear::columns(uploader, &qkv)?,
            qk_norms: qk_norms.transpose()?,
            window: *window,
            softcap: *softcap,
            slopes: slopes.as_deref().map(|slopes| uploader.vector(slopes)).transpose()?,
            o_proj: match o_proj {
                OutputProjection::Split(row) => {
                    Output { linear: Linear::row(uploader, row)?, is_split: true }
                }
                OutputProjection::Replicated(column) => {
                    Output { linear: Linear::columns(uploader, &[column])?, is_split: false }
                }
            },
            mlp: match &host.mlp {
                FeedForward::Dense(mlp) => load_mlp(uploader, mlp)?,
                FeedForward::Experts(experts) => load_experts(uploader, experts)?,
            },
        })
    }

    /// What it computes, this wide.
    pub fn widths(&self, heads: Shape) -> Widths {
        let mut widths = Widths {
            qkv: self.qkv.outputs(),
            queries: heads.heads * heads.head_dim,
            ..Widths::default()
        };
        match &self.mlp {
            FeedForwardOnDevice::Dense { gate_up, is_gated, .. } => {
                widths.gate_up = gate_up.outputs();
                widths.inner = gate_up.outputs() / if *is_gated { 2 } else { 1 };
            }
            FeedForwardOnDevice::Experts { router, .. } => widths.scores = router.outputs(),
        }
        widths
    }

    /// Bytes of weights that a step streams.
    pub fn bytes(&self) -> usize {
        let mlp = match &self.mlp {
            FeedForwardOnDevice::Dense { gate_up, down, .. } => {
                gate_up.bytes() + down.linear.bytes()
            }
            FeedForwardOnDevice::Experts { router, experts } => router.bytes() + experts.bytes(),
        };
        self.qkv.bytes() + self.o_proj.linear.bytes() + mlp
    }

    /// Scratch memory of its projections.
    pub fn scratch_bytes(&self, dtype: Dtype, rows: usize) -> usize {
        let mlp = match &self.mlp {
            FeedForwardOnDevice::Dense { gate_up, down, .. } => vec![gate_up, &down.linear],
            FeedForwardOnDevice::Experts { router, .. } => vec![router],
        };
        let all = [&self.qkv, &self.o_proj.linear].into_iter().chain(mlp);
        all.map(|linear| linear.scratch_bytes(dtype, rows)).max().unwrap_or(0)
    }

    /// Its experts, where it has some.
    pub fn experts(&self) -> Option<&experts::Experts> {
        match &self.mlp {
            FeedForwardOnDevice::Dense { .. } => None,
            FeedForwardOnDevice::Experts { experts, .. } => Some(experts),
        }
    }

    /// The norm that its input passes first.
    pub fn input_norm(&self) -> &ops::Norm {
        &self.input_norm
    }

    /// Adds its part to the stream; [`Workspace::normed`] holds the stream after
    /// [`Layer::input_norm`], and afterwards that after `next`, the following layer's.
    ///
    /// # Errors
    /// A fault of the driver or of the group.
    pub fn forward(&self, pass: &Pass, cache: Cache, next: Option<&ops::Norm>) -> Result<()> {
        let Workspace { x, normed, normed_too, .. } = pass.work;
        if matches!(self.block, Block::Parallel | Block::ParallelTwoNorms) {
            let for_mlp = match &self.mlp_norm {
                Some(norm) => {
                    ops::norm(pass.device, x, norm, normed_too)?;
                    normed_too
                }
                None => normed,
            };
            self.attend(pass, normed, cache, None)?;
            return self.feed_forward(pass, for_mlp, next);
        }
        self.attend(pass, normed, cache, self.mlp_norm.as_ref())?;
        self.feed_forward(pass, normed, next)
    }

    fn attend(
        &self,
        pass: &Pass,
        input: &Array,
        cache: Cache,
        next: Option<&ops::Norm>,
    ) -> Result<()> {
        let (device, heads, inputs) = (pass.device, pass.heads, pass.inputs);
        let Workspace { qkv, attended, .. } = pass.work;
        self.qkv.forward(&pass.context(), input, qkv, self.qkv.outputs())?;
        let norms = self.qk_norms.as_ref().map(|[q, k]| Norms {
            q_weight: &q.weight,
            k_weight: &k.weight,
            eps: q.eps,
        });
        let (global, local) = (&inputs.table_rows, &inputs.local_table_rows);
        let rotation = pass.rotations.of_layer(self.window.is_some(), global, local);
        attention::rope_and_cache(
            device,
            heads,
            qkv,
            norms.as_ref(),
            rotation.as_ref(),
            qkv,
            cache,
            &inputs.slots,
        )?;
        let rule =
            Rule { window: self.window, softcap: self.softcap, slopes: self.slopes.as_ref() };
        let rows = Rows {
            sequence_of_row: &inputs.sequence_of_row,
            positions: &inputs.positions,
            block_tables: &inputs.block_tables,
            max_blocks: pass.max_blocks,
            list: (!pass.is_decode).then_some(&inputs.row_list),
        };
        let scratch = pass.attention_scratch;
        attention::attend_rows(device, heads, &rule, qkv, cache, &rows, scratch, attended)?;
        if !inputs.tiles.is_empty() {
            let chunks = Chunks {
                tiles: &inputs.tiles,
                first_row: &inputs.first_row,
                num_rows: &inputs.num_rows,
                start_position: &inputs.start_position,
                block_tables: &inputs.block_tables,
                max_blocks: pass.max_blocks,
            };
            let count = inputs.positions.len();
            attention::attend_chunks(device, heads, &rule, qkv, cache, &chunks, count, attended)?;
        }
        self.o_proj.forward(pass, attended, self.post_attention_norm.as_ref(), next)
    }

    fn feed_forward(&self, pass: &Pass, input: &Array, next: Option<&ops::Norm>) -> Result<()> {
        let post = self.post_mlp_norm.as_ref();
        match &self.mlp {
            FeedForwardOnDevice::Dense { gate_up, is_gated, activation, down } => {
                let Workspace { gate_up: both, inner, .. } = pass.work;
                gate_up.forward(&pass.context(), input, both, gate_up.outputs())?;
                match is_gated {
                    true => {
                        let width = gate_up.outputs() / 2;
                        ops::gated(pass.device, *activation, both, width, inner)?;
                    }
                    false => ops::activate(pass.device, *activation, both, inner)?,
                }
                down.forward(pass, inner, post, next)
            }
            FeedForwardOnDevice::Experts { router, experts } => {
                let Workspace { scores, added, .. } = pass.work;
                router.forward(&pass.context(), input, scores, router.outputs())?;
                let scratch = pass.experts_scratch.ok_or_else(|| Error::fault("no scratch"))?;
                experts.forward(pass.device, scores, input, added, scratch)?;
                pass.add(true, post, next)
            }
        }
    }
}

impl Output {
    /// Adds the product to the stream: straight, where nothing has to happen to it before.
    fn forward(
        &self,
        pass: &Pass,
        input: &Array,
        post: Option<&ops::Norm>,
        next: Option<&ops::Norm>,
    ) -> Result<()> {
        let Workspace { x, normed, added, .. } = pass.work;
        let is_summed = self.is_split && pass.comm.size() > 1;
        let is_adapted = self.linear.is_adapted() && !pass.adapters.is_empty();
        if is_summed || is_adapted || post.is_some() {
            self.linear.forward(&pass.context(), input, added, self.linear.outputs())?;
            return pass.add(is_summed, post, next);
        }
        self.linear.accumulate(&pass.context(), input, x)?;
        next.map_or(Ok(()), |next| ops::norm(pass.device, x, next, normed))
    }
}

impl Pass<'_> {
    fn context(&self) -> Context<'_> {
        Context { device: self.device, scratch: self.scratch, adapters: self.adapters }
    }

    /// Adds [`Workspace::added`] to the stream, summed over the ranks and normed by `post`; then
    /// norms the stream by `next`.
    fn add(
        &self,
        is_summed: bool,
        post: Option<&ops::Norm>,
        next: Option<&ops::Norm>,
    ) -> Result<()> {
        let (device, Workspace { x, normed, added, .. }) = (self.device, self.work);
        if is_summed && self.comm.size() > 1 {
            self.comm.all_reduce_sum(device, added)?;
        }
        match (post, next) {
            (None, None) => ops::add(device, added, x),
            (None, Some(next)) => ops::add_norm(device, added, x, next, normed),
            (Some(post), None) => ops::norm_add(device, added, post, x),
            (Some(post), Some(next)) => ops::norm_add_norm(device, added, post, x, next, normed),
        }
    }
}

fn load_mlp(uploader: &Uploader, mlp: &HostMlp) -> Result<FeedForwardOnDevice> {
    let both: Vec<&ColumnParallelLinear> = mlp.gate_proj.iter().chain([&mlp.up_proj]).collect();
    Ok(FeedForwardOnDevice::Dense {
        gate_up: Linear::columns(uploader, &both)?,
        is_gated: mlp.gate_proj.is_some(),
        activation: mlp.activation,
        down: Output { linear: Linear::row(uploader, &mlp.down_proj)?, is_split: true },
    })
}

fn load_experts(uploader: &Uploader, host: &HostExperts) -> Result<FeedForwardOnDevice> {
    let adapted = |layer: &ColumnParallelLinear| !layer.deltas.0.is_empty();
    if host.weights.iter().any(|e| adapted(&e.gate) || adapted(&e.up) || adapted(&e.down)) {
        return Err(Error::input(
            "an adapter of routed experts does not run on a device: merge it (farm merge) or use \
             --device cpu",
        ));
    }
    let matrices = host.weights.iter().map(|e| -> Result<ExpertMatrices> {
        Ok(ExpertMatrices {
            gate: uploader.matrix(e.gate.weight())?,
            up: uploader.matrix(e.up.weight())?,
            down: uploader.matrix(e.down.weight())?,
        })
    });
    let matrices = matrices.collect::<Result<Vec<_>>>()?;
    let router = uploader.matrix_as_stored(host.router.weight())?;
    let num_experts = router.rows();
    let routing =
        Routing { num_experts, per_token: host.per_token, norm_topk_prob: host.norm_topk_prob };
    let mine = host.mine.clone();
    Ok(FeedForwardOnDevice::Experts {
        router: Linear::of_matrix(uploader, router, &host.router.deltas)?,
        experts: experts::Experts::new(uploader.device, mine, matrices, routing, host.activation)?,
    })
}
