//! One decoder layer, forward and backward: the counterpart of [`crate::model::attention`],
//! [`crate::model::mlp`] and the layer in [`crate::model::decoder`], on whole examples and
//! without a KV cache.
//!
//! A layer keeps its input, queries, keys and values, attention's output and the two halves
//! of the MLP; norms and activations are computed again, since they cost next to nothing. A
//! layer that is recomputed keeps its input only.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::linear::{Kept, Linear, Split, Tokens, Whole};
use super::lora::LoraConfig;
use super::parameters::Parameters;
use crate::comm::TensorComm;
use crate::kernels::attention::{Heads, Rule, alibi_slopes};
use crate::kernels::ops::{self as kernel, Activation};
use crate::kernels::{backward, segments};
use crate::model::adapter::rotated_rows_in_hf;
use crate::model::attention::{Attention as Inference, Group};
use crate::model::config::{AttentionSplit, Block, ModelConfig, Positions};
use crate::model::layers::{Loader, Norm};
use crate::model::names::{GateUp, Names, Place, Qkv, at};
use crate::model::step::Step;
use crate::{Error, Result};

/// What layers are loaded with.
pub struct Builder<'a> {
    /// Where the frozen weights come from.
    pub loader: &'a Loader<'a>,
    /// The adapter's settings.
    pub config: &'a LoraConfig,
    /// The modules that are trained.
    pub targets: BTreeSet<String>,
    /// What dropout is keyed by.
    pub seed: u64,
    /// The trained tensors.
    pub parameters: Parameters,
}

/// What a linear layer is besides its place.
struct Kind {
    width: usize,
    cols: Range<usize>,
    bias: bool,
    split: Split,
    /// Leading output features that are heads of this width which are rotated.
    rotated: Option<(usize, usize)>,
}

impl Builder<'_> {
    fn model(&self) -> &ModelConfig {
        self.loader.source.config()
    }

    fn linear(&mut self, place: &dyn Fn(&Names) -> Place, kind: Kind) -> Result<Linear> {
        let l = self.loader;
        let model = l.source.config();
        let base = place(&model.names);
        let weight = l.matrix(&base, kind.width, kind.cols.clone())?;
        // Only one rank adds the bias, before the sum.
        let adds_bias = kind.bias && (kind.split != Split::Row || l.comm.rank() == 0);
        let bias = adds_bias.then(|| l.bias(&base)).transpose()?;
        let linear = Linear::frozen(Arc::new(weight), bias, kind.split, l.comm.clone());
        let hf = place(&model.hf_names);
        if !self.targets.contains(&hf.name) {
            return Ok(linear);
        }
        let whole = Whole {
            module: &hf.name,
            shape: [hf.stored_rows, kind.width],
            rows: rows_in_hf(model, &hf, kind.rotated),
            cols: kind.cols,
        };
        Ok(linear.with_lora(&whole, self.config, self.seed, &mut self.parameters))
    }

    /// The projection to logits over the vocabulary's `ids`.
    pub fn head(&mut self, linear: Linear, ids: Range<usize>) -> Linear {
        let model = self.model();
        let name = model.hf_names.lm_head;
        if !self.targets.contains(name) {
            return linear;
        }
        let [outputs, inputs] = [model.vocab_size, model.hidden_size];
        let shape = [outputs, inputs];
        let whole = Whole { module: name, shape, rows: ids.collect(), cols: 0..inputs };
        linear.with_lora(&whole, self.config, self.seed, &mut self.parameters)
    }
}

/// Where this rank's rows lie in Hugging Face's form; the first of them are rotated heads.
fn rows_in_hf(model: &ModelConfig, place: &Place, rotated: Option<(usize, usize)>) -> Vec<usize> {
    let all: Vec<usize> = place.rows.iter().cloned().flatten().collect();
    let Some((count, head_dim)) = rotated else { return all };
    let mut rows = rotated_rows_in_hf(model, &all[..count], head_dim);
    rows.extend_from_slice(&all[count..]);
    rows
}

/// A micro-batch as the layers see it.
pub struct Pass<'a> {
    /// The trained values.
    pub parameters: &'a mut Parameters,
    /// The rotations of its rows.
    pub step: &'a Step<'a>,
    /// The rows of its examples.
    pub segments: &'a [Range<usize>],
    /// What dropout needs.
    pub tokens: &'a Tokens,
}

/// A layer.
pub struct Layer {
    pub(super) block: Block,
    pub(super) input_norm: Norm,
    pub(super) attention: Attention,
    pub(super) post_attention_norm: Option<Norm>,
    pub(super) mlp_norm: Option<Norm>,
    pub(super) mlp: Mlp,
    pub(super) post_mlp_norm: Option<Norm>,
}

/// What a layer keeps of a forward pass.
pub struct LayerKept {
    /// The layer's input.
    pub input: Vec<f32>,
    rest: Option<LayerRest>,
}

struct LayerRest {
    attention: AttentionKept,
    /// Attention's output, where it is normed.
    attended: Option<Vec<f32>>,
    /// The MLP's input before its norm, where that is not the layer's input.
    middle: Option<Vec<f32>>,
    mlp: MlpKept,
    /// The MLP's output, where it is normed.
    transformed: Option<Vec<f32>>,
}

impl Layer {
    /// Loads layer `layer` of a model that [`check_trains`](super::model::check_trains) allows.
    ///
    /// # Errors
    /// See [`crate::model::checkpoint::TensorTable::matrix`].
    pub fn load(b: &mut Builder, layer: usize) -> Result<Self> {
        let (l, model) = (b.loader, b.loader.source.config());
        let names = model.names;
        let norm = |name: &str| Norm::load(l, model, &at(name, layer), model.hidden_size);
        let optional = |wanted: bool, name: &str| wanted.then(|| norm(name)).transpose();
        let post = model.block == Block::PostNorms;
        Ok(Self {
            block: model.block,
            input_norm: norm(names.input_norm)?,
            attention: Attention::load(b, layer)?,
            post_attention_norm: optional(post, names.post_norms[0])?,
            mlp_norm: optional(model.block != Block::Parallel, names.mlp_norm)?,
            mlp: Mlp::load(b, layer)?,
            post_mlp_norm: optional(post, names.post_norms[1])?,
        })
    }

    /// Every linear layer.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attention.linears().chain(self.mlp.linears())
    }

    /// The same, to bring up to date.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.attention.linears_mut().chain(self.mlp.linears_mut())
    }

    /// `[m, hidden]` → the same, and what the backward pass needs: all of it, or, where it is
    /// to be `recomputed`, the input.
    pub fn forward(&self, pass: &Pass, x: Vec<f32>, recomputed: bool) -> (Vec<f32>, LayerKept) {
        let (out, rest) = self.run(pass, &x, true);
        (out, LayerKept { input: x, rest: (!recomputed).then_some(rest) })
    }

    fn is_parallel(&self) -> bool {
        matches!(self.block, Block::Parallel | Block::ParallelTwoNorms)
    }

    /// The output (only if it is `wanted`) and what is kept.
    fn run(&self, pass: &Pass, x: &[f32], wanted: bool) -> (Vec<f32>, LayerRest) {
        let normed = self.input_norm.rows(x);
        let (attended, attention) = self.attention.forward(pass, &normed);
        if self.is_parallel() {
            let input = self.mlp_norm.as_ref().map_or(normed, |norm| norm.rows(x));
            let (mut out, mlp) = self.mlp.forward(pass, &input, wanted);
            if wanted {
                kernel::add_assign(&mut out, &attended);
                kernel::add_assign(&mut out, x);
            }
            let rest =
                LayerRest { attention, attended: None, middle: None, mlp, transformed: None };
            return (out, rest);
        }
        let (mut middle, attended) = post_normed(&self.post_attention_norm, attended);
        kernel::add_assign(&mut middle, x);
        drop(normed);
        let normed = self.mlp_norm.as_ref().map(|norm| norm.rows(&middle));
        let input = normed.as_deref().unwrap_or(&middle);
        // Without a norm after it, nothing is made of the MLP's output but the layer's.
        let wanted = wanted || self.post_mlp_norm.is_some();
        let (transformed, mlp) = self.mlp.forward(pass, input, wanted);
        let (mut out, transformed) = post_normed(&self.post_mlp_norm, transformed);
        if wanted {
            kernel::add_assign(&mut out, &middle);
        }
        (out, LayerRest { attention, attended, middle: Some(middle), mlp, transformed })
    }

    /// The gradient of the input from that of the output, if it is `wanted`; those of the
    /// trained tensors are added to theirs.
    pub fn backward(
        &self,
        pass: &mut Pass,
        kept: LayerKept,
        dy: Vec<f32>,
        wanted: bool,
    ) -> Vec<f32> {
        let LayerKept { input: x, rest } = kept;
        let rest = rest.unwrap_or_else(|| self.run(pass, &x, false).1);
        match rest.middle.is_some() {
            true => self.sequential_backward(pass, &x, rest, dy, wanted),
            false => self.parallel_backward(pass, &x, rest, dy, wanted),
        }
    }

    fn sequential_backward(
        &self,
        pass: &mut Pass,
        x: &[f32],
        rest: LayerRest,
        mut dy: Vec<f32>,
        wanted: bool,
    ) -> Vec<f32> {
        let middle = rest.middle.unwrap_or_default();
        let through = |norm: &Option<Norm>, x: &Option<Vec<f32>>, dy: &[f32]| match (norm, x) {
            (Some(norm), Some(x)) => norm.backward(x, dy),
            _ => dy.to_vec(),
        };
        let d = through(&self.post_mlp_norm, &rest.transformed, &dy);
        let normed = self.mlp_norm.as_ref().map(|norm| norm.rows(&middle));
        let input = normed.as_deref().unwrap_or(&middle);
        let d = self.mlp.backward(pass, input, rest.mlp, &d);
        let d = through(&self.mlp_norm, &Some(middle), &d);
        kernel::add_assign(&mut dy, &d);
        let d = through(&self.post_attention_norm, &rest.attended, &dy);
        let normed = self.input_norm.rows(x);
        let d = self.attention.backward(pass, &normed, rest.attention, &d, wanted);
        if wanted {
            kernel::add_assign(&mut dy, &self.input_norm.backward(x, &d));
        }
        dy
    }

    fn parallel_backward(
        &self,
        pass: &mut Pass,
        x: &[f32],
        rest: LayerRest,
        mut dy: Vec<f32>,
        wanted: bool,
    ) -> Vec<f32> {
        let normed = self.input_norm.rows(x);
        let own = self.mlp_norm.as_ref().map(|norm| norm.rows(x));
        let of_mlp = self.mlp.backward(pass, own.as_deref().unwrap_or(&normed), rest.mlp, &dy);
        let mut of_both = self.attention.backward(pass, &normed, rest.attention, &dy, wanted);
        if !wanted {
            return dy;
        }
        match &self.mlp_norm {
            Some(norm) => kernel::add_assign(&mut dy, &norm.backward(x, &of_mlp)),
            None => kernel::add_assign(&mut of_both, &of_mlp),
        }
        kernel::add_assign(&mut dy, &self.input_norm.backward(x, &of_both));
        dy
    }
}

/// `x` through the norm, if there is one, and then what went in.
fn post_normed(norm: &Option<Norm>, x: Vec<f32>) -> (Vec<f32>, Option<Vec<f32>>) {
    match norm {
        Some(norm) => (norm.rows(&x), Some(x)),
        None => (x, None),
    }
}

/// Attention of a layer, or this rank's heads of it.
pub(super) struct Attention {
    pub(super) heads: Heads,
    pub(super) window: Option<usize>,
    pub(super) softcap: Option<f32>,
    pub(super) slopes: Option<Vec<f32>>,
    pub(super) qkv: Projections,
    pub(super) qk_norms: Option<[Norm; 2]>,
    pub(super) o_proj: Linear,
    pub(super) split: Split,
    group: Arc<dyn TensorComm>,
}

/// Linear layers over one input: one for each output, or one for all.
pub(super) enum Projections {
    Each(Vec<Linear>),
    Fused(Box<Linear>, Vec<usize>),
}

struct AttentionKept {
    qkv: Vec<Kept>,
    /// Queries and keys before their norms, where they have some.
    unnormed: Option<[Vec<f32>; 2]>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    log_sum_exp: Vec<f32>,
    o_proj: Kept,
}

impl Attention {
    fn load(b: &mut Builder, layer: usize) -> Result<Self> {
        let l = b.loader;
        let model = l.source.config();
        let group = Group::of(l);
        let heads = Inference::heads(model, group.size);
        let is_split = model.attention_split(group.size) == Some(AttentionSplit::Heads);
        let split = if is_split { Split::Column } else { Split::Whole };
        let qkv = Projections::load_qkv(b, layer, group, split)?;
        let d = model.head_dim;
        let norm = |name: &str| Norm::load(l, model, &at(name, layer), d);
        let names = model.names;
        let qk_norms = || Ok::<_, Error>([norm(names.qk_norms[0])?, norm(names.qk_norms[1])?]);
        let (q, _) = group.heads(model);
        let hidden = model.hidden_size;
        let out = |names: &Names| Place::new(at(names.o_proj, layer), hidden, 0..hidden);
        let kind = Kind {
            width: model.num_attention_heads * d,
            cols: q.start * d..q.end * d,
            bias: model.output_bias,
            split: if is_split { Split::Row } else { Split::Whole },
            rotated: None,
        };
        Ok(Self {
            heads,
            window: model.layer_windows[layer],
            softcap: model.attn_logit_softcapping,
            slopes: (model.positions == Positions::Alibi)
                .then(|| alibi_slopes(model.num_attention_heads)[q.clone()].to_vec()),
            qkv,
            qk_norms: model.qk_norm.then(qk_norms).transpose()?,
            o_proj: b.linear(&out, kind)?,
            split,
            group: l.comm.clone(),
        })
    }

    fn rule(&self) -> Rule<'_> {
        Rule { window: self.window, softcap: self.softcap, slopes: self.slopes.as_deref() }
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.qkv.linears().iter().chain([&self.o_proj])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.qkv.linears_mut().iter_mut().chain([&mut self.o_proj])
    }

    fn rotate(&self, step: &Step, q: &mut [f32], k: &mut [f32], back: bool) {
        let h = self.heads;
        for (x, heads) in [(q, h.heads), (k, h.kv_heads)] {
            let width = heads * h.head_dim;
            match back {
                false => step.rotate(x, width, h.head_dim, self.window.is_some()),
                true => step.rotate_back(x, width, h.head_dim, self.window.is_some()),
            }
        }
    }

    fn forward(&self, pass: &Pass, x: &[f32]) -> (Vec<f32>, AttentionKept) {
        let (outputs, qkv) = self.qkv.forward(pass, x);
        let [mut q, mut k, v] = three(outputs);
        let unnormed = self.qk_norms.as_ref().map(|[q_norm, k_norm]| {
            let normed = [q_norm.rows(&q), k_norm.rows(&k)];
            let [normed_q, normed_k] = normed;
            [std::mem::replace(&mut q, normed_q), std::mem::replace(&mut k, normed_k)]
        });
        self.rotate(pass.step, &mut q, &mut k, false);
        let h = self.heads;
        let mut out = vec![0.0; q.len()];
        let mut log_sum_exp = vec![0.0; q.len() / h.head_dim];
        let rule = self.rule();
        segments::attention(h, rule, &q, &k, &v, pass.segments, &mut out, &mut log_sum_exp);
        let (y, o_proj) = self.o_proj.forward(pass.parameters, &out, pass.tokens);
        (y, AttentionKept { qkv, unnormed, q, k, v, out, log_sum_exp, o_proj })
    }

    /// The gradient of `x`, if it is `wanted`.
    fn backward(
        &self,
        pass: &mut Pass,
        x: &[f32],
        kept: AttentionKept,
        dy: &[f32],
        wanted: bool,
    ) -> Vec<f32> {
        let AttentionKept { qkv, unnormed, q, k, v, out, log_sum_exp, o_proj } = kept;
        let mut dout = vec![0.0; out.len()];
        let (p, tokens) = (&mut *pass.parameters, pass.tokens);
        self.o_proj.backward(p, &out, &o_proj, dy, tokens, Some(&mut dout));
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        segments::attention_backward(
            self.heads,
            self.rule(),
            &q,
            &k,
            &v,
            &out,
            &log_sum_exp,
            &dout,
            pass.segments,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        drop((q, k, v, out, dout));
        self.rotate(pass.step, &mut dq, &mut dk, true);
        if let (Some([q_norm, k_norm]), Some([q, k])) = (&self.qk_norms, &unnormed) {
            (dq, dk) = (q_norm.backward(q, &dq), k_norm.backward(k, &dk));
        }
        let mut dx = vec![0.0; if wanted { x.len() } else { 0 }];
        self.qkv.backward(pass, x, &qkv, vec![dq, dk, dv], wanted.then_some(&mut dx));
        if self.split == Split::Column {
            self.group.all_reduce_sum(&mut dx);
        }
        dx
    }
}

impl Projections {
    fn load_qkv(b: &mut Builder, layer: usize, group: Group, split: Split) -> Result<Self> {
        let model = b.loader.source.config();
        let (hidden, bias, d) = (model.hidden_size, model.attention_bias, model.head_dim);
        let places = |names: &Names| group.qkv_places(model, names, layer);
        let widths = places(&model.names).map(|place| place.len());
        let kind = |rotated| Kind { width: hidden, cols: 0..hidden, bias, split, rotated };
        if let Qkv::Split(_) = model.hf_names.qkv {
            let each = [0, 1, 2].map(|part| {
                let rotated = (part < 2).then_some((widths[part], d));
                b.linear(&|names| places(names)[part].clone(), kind(rotated))
            });
            return Ok(Self::Each(each.into_iter().collect::<Result<_>>()?));
        }
        let all = |names: &Names| {
            let [q, k, v] = places(names);
            q.and(k).and(v)
        };
        let linear = b.linear(&all, kind(Some((widths[0] + widths[1], d))))?;
        Ok(Self::Fused(Box::new(linear), widths.to_vec()))
    }

    fn load_gate_up(b: &mut Builder, layer: usize, share: Range<usize>) -> Result<Self> {
        let model = b.loader.source.config();
        let (hidden, inner, bias) = (model.hidden_size, model.intermediate_size, model.mlp_bias);
        let kind =
            || Kind { width: hidden, cols: 0..hidden, bias, split: Split::Column, rotated: None };
        let places = |names: &Names| names.gate_up.places(layer, inner, share.clone());
        let up = |names: &Names| places(names).1;
        let gate = |names: &Names| places(names).0.unwrap_or_else(|| up(names));
        Ok(match model.hf_names.gate_up {
            GateUp::Up(_) => Self::Each(vec![b.linear(&up, kind())?]),
            GateUp::Split(_) => Self::Each(vec![b.linear(&gate, kind())?, b.linear(&up, kind())?]),
            GateUp::Concatenated(_) => {
                let both = |names: &Names| gate(names).and(up(names));
                Self::Fused(Box::new(b.linear(&both, kind())?), vec![share.len(); 2])
            }
        })
    }

    pub(super) fn linears(&self) -> &[Linear] {
        match self {
            Self::Each(linears) => linears,
            Self::Fused(linear, _) => std::slice::from_ref(&**linear),
        }
    }

    fn linears_mut(&mut self) -> &mut [Linear] {
        match self {
            Self::Each(linears) => linears,
            Self::Fused(linear, _) => std::slice::from_mut(&mut **linear),
        }
    }

    fn forward(&self, pass: &Pass, x: &[f32]) -> (Vec<Vec<f32>>, Vec<Kept>) {
        let forward = |linear: &Linear| linear.forward(pass.parameters, x, pass.tokens);
        match self {
            Self::Each(linears) => linears.iter().map(forward).unzip(),
            Self::Fused(linear, widths) => {
                let (y, kept) = forward(linear);
                (split_columns(&y, widths), vec![kept])
            }
        }
    }

    fn backward(
        &self,
        pass: &mut Pass,
        x: &[f32],
        kept: &[Kept],
        dy: Vec<Vec<f32>>,
        mut dx: Option<&mut Vec<f32>>,
    ) {
        let dy = match self {
            Self::Each(_) => dy,
            Self::Fused(_, widths) => vec![joined_columns(&dy, widths)],
        };
        for ((linear, kept), dy) in self.linears().iter().zip(kept).zip(dy) {
            let dx = dx.as_deref_mut().map(Vec::as_mut_slice);
            linear.backward(pass.parameters, x, kept, &dy, pass.tokens, dx);
        }
    }
}

fn three(outputs: Vec<Vec<f32>>) -> [Vec<f32>; 3] {
    outputs.try_into().unwrap_or_else(|_| unreachable!("queries, keys and values"))
}

fn split_columns(y: &[f32], widths: &[usize]) -> Vec<Vec<f32>> {
    let total: usize = widths.iter().sum();
    let mut first = 0;
    let part = |width: &usize| {
        let cols = first..first + width;
        first = cols.end;
        y.chunks_exact(total).flat_map(|row| &row[cols.clone()]).copied().collect()
    };
    widths.iter().map(part).collect()
}

fn joined_columns(parts: &[Vec<f32>], widths: &[usize]) -> Vec<f32> {
    let rows = parts[0].len() / widths[0];
    let mut all = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for row in 0..rows {
        for (part, width) in parts.iter().zip(widths) {
            all.extend_from_slice(&part[row * width..(row + 1) * width]);
        }
    }
    all
}

/// The MLP of a layer, or this rank's inner features of it.
pub(super) struct Mlp {
    pub(super) activation: Activation,
    pub(super) gate_up: Projections,
    pub(super) down_proj: Linear,
    group: Arc<dyn TensorComm>,
}

struct MlpKept {
    gate_up: Vec<Kept>,
    /// Outputs of gate and up, or of up alone.
    outputs: Vec<Vec<f32>>,
    down_proj: Kept,
}

impl Mlp {
    fn load(b: &mut Builder, layer: usize) -> Result<Self> {
        let l = b.loader;
        let model = l.source.config();
        let (hidden, inner) = (model.hidden_size, model.intermediate_size);
        let share = l.share(inner);
        let gate_up = Projections::load_gate_up(b, layer, share.clone())?;
        let down = |names: &Names| Place::new(at(names.down_proj, layer), hidden, 0..hidden);
        let kind = Kind {
            width: inner,
            cols: share,
            bias: model.mlp_bias,
            split: Split::Row,
            rotated: None,
        };
        let down_proj = b.linear(&down, kind)?;
        Ok(Self { activation: model.activation, gate_up, down_proj, group: l.comm.clone() })
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.gate_up.linears().iter().chain([&self.down_proj])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.gate_up.linears_mut().iter_mut().chain([&mut self.down_proj])
    }

    fn inner(&self, outputs: &[Vec<f32>]) -> Vec<f32> {
        match outputs {
            [gate, up] => {
                let mut inner = vec![0.0; up.len()];
                kernel::gated(self.activation, gate, up, &mut inner);
                inner
            }
            others => {
                let mut inner = others.concat();
                kernel::activate(self.activation, &mut inner);
                inner
            }
        }
    }

    /// Without the output (all zeros) if it is not `wanted`.
    fn forward(&self, pass: &Pass, x: &[f32], wanted: bool) -> (Vec<f32>, MlpKept) {
        let (outputs, gate_up) = self.gate_up.forward(pass, x);
        let inner = self.inner(&outputs);
        let (y, down_proj) = match wanted {
            true => self.down_proj.forward(pass.parameters, &inner, pass.tokens),
            false => (Vec::new(), self.down_proj.keep(pass.parameters, &inner, pass.tokens)),
        };
        (y, MlpKept { gate_up, outputs, down_proj })
    }

    /// The gradient of `x`.
    fn backward(&self, pass: &mut Pass, x: &[f32], kept: MlpKept, dy: &[f32]) -> Vec<f32> {
        let MlpKept { gate_up, outputs, down_proj } = kept;
        let inner = self.inner(&outputs);
        let mut d = vec![0.0; inner.len()];
        let (p, tokens) = (&mut *pass.parameters, pass.tokens);
        self.down_proj.backward(p, &inner, &down_proj, dy, tokens, Some(&mut d));
        drop(inner);
        let d = match outputs.as_slice() {
            [gate, up] => {
                let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; up.len()]);
                backward::gated(self.activation, gate, up, &d, &mut dgate, &mut dup);
                vec![dgate, dup]
            }
            others => {
                backward::activate(self.activation, &others.concat(), &mut d);
                vec![d]
            }
        };
        let mut dx = vec![0.0; x.len()];
        self.gate_up.backward(pass, x, &gate_up, d, Some(&mut dx));
        self.group.all_reduce_sum(&mut dx);
        dx
    }
}
