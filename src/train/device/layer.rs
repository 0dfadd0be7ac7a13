//! One decoder layer on a device, forward and backward: see [`crate::train::layer`], which
//! says what is kept and what is computed again.
//!
//! Queries, keys and values are columns of one matrix, as are the two halves of the MLP,
//! whether one linear layer makes them or several.

use super::linear::{InputGradient, Kept as LinearKept, Linear};
use super::{Pass, Place, of};
use crate::Result;
use crate::device::Array;
use crate::device::ops::{self, Norm};
use crate::device::train::{self as kernel, Attention as Heads, Qkv, Rows};
use crate::kernels::ops::Activation;
use crate::model::config::Block;
use crate::train::layer as host;
use crate::train::linear::{Linear as HostLinear, Split};
use crate::train::parameters::Parameters;

/// A layer.
pub struct Layer {
    block: Block,
    input_norm: Norm,
    attention: Attention,
    post_attention_norm: Option<Norm>,
    mlp_norm: Option<Norm>,
    mlp: Mlp,
    post_mlp_norm: Option<Norm>,
}

/// What a layer keeps of a forward pass.
pub struct Kept {
    /// The layer's input, f32.
    input: Array,
    rest: Option<Rest>,
}

struct Rest {
    attention: AttentionKept,
    /// Attention's output, where it is normed.
    attended: Option<Array>,
    /// The MLP's input before its norm, where that is not the layer's input.
    middle: Option<Array>,
    mlp: MlpKept,
    /// The MLP's output, where it is normed.
    transformed: Option<Array>,
}

impl Layer {
    /// The host's layer.
    ///
    /// # Errors
    /// No memory on the device.
    pub fn new(place: &Place, from: &host::Layer, parameters: &Parameters) -> Result<Self> {
        let norm = |norm: &Option<_>| norm.as_ref().map(|norm| place.norm(norm)).transpose();
        Ok(Self {
            block: from.block,
            input_norm: place.norm(&from.input_norm)?,
            attention: Attention::new(place, &from.attention, parameters)?,
            post_attention_norm: norm(&from.post_attention_norm)?,
            mlp_norm: norm(&from.mlp_norm)?,
            mlp: Mlp::new(place, &from.mlp, parameters)?,
            post_mlp_norm: norm(&from.post_mlp_norm)?,
        })
    }

    /// Values of a head.
    pub fn head_dim(&self) -> usize {
        self.attention.heads.heads.head_dim
    }

    /// Every linear layer, to bring up to date.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let Attention { qkv, o_proj, .. } = &mut self.attention;
        let Mlp { gate_up, down_proj, .. } = &mut self.mlp;
        let (qkv, gate_up) = (&mut qkv.linears, &mut gate_up.linears);
        qkv.iter_mut().chain([&mut o_proj.linear]).chain(gate_up).chain([&mut down_proj.linear])
    }

    /// f32 `[m, hidden]` → the same, and what the backward pass needs: all of it, or, where it
    /// is to be `recomputed`, the input.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn forward(&self, pass: &Pass, x: Array, recomputed: bool) -> Result<(Array, Kept)> {
        let (out, rest) = self.run(pass, &x, true)?;
        Ok((out, Kept { input: x, rest: (!recomputed).then_some(rest) }))
    }

    /// The output (anything, if it is not `wanted`) and what is kept.
    fn run(&self, pass: &Pass, x: &Array, wanted: bool) -> Result<(Array, Rest)> {
        let device = pass.device();
        let normed = pass.normed(x, &self.input_norm)?;
        let (attended, attention) = self.attention.forward(pass, &normed)?;
        if matches!(self.block, Block::Parallel | Block::ParallelTwoNorms) {
            let own = self.mlp_norm.as_ref().map(|norm| pass.normed(x, norm)).transpose()?;
            let (out, mlp) = self.mlp.forward(pass, own.as_ref().unwrap_or(&normed), wanted)?;
            if wanted {
                ops::add(device, &attended, &out)?;
                ops::add(device, x, &out)?;
            }
            let rest = Rest { attention, attended: None, middle: None, mlp, transformed: None };
            return Ok((out, rest));
        }
        drop(normed);
        let (middle, attended) = post_normed(pass, &self.post_attention_norm, attended)?;
        ops::add(device, x, &middle)?;
        let input = self.mlp_input(pass, &middle)?;
        // Without a norm after it, nothing is made of the MLP's output but the layer's.
        let is_kept = wanted || self.post_mlp_norm.is_some();
        let (transformed, mlp) = self.mlp.forward(pass, &input, is_kept)?;
        let (out, transformed) = post_normed(pass, &self.post_mlp_norm, transformed)?;
        if wanted {
            ops::add(device, &middle, &out)?;
        }
        Ok((out, Rest { attention, attended, middle: Some(middle), mlp, transformed }))
    }

    fn mlp_input(&self, pass: &Pass, middle: &Array) -> Result<Array> {
        match &self.mlp_norm {
            Some(norm) => pass.normed(middle, norm),
            None => pass.place.narrowed(middle),
        }
    }

    /// The gradient of the input from that of the output, if it is `wanted`; those of the
    /// trained tensors are added to theirs.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn backward(
        &self,
        pass: &Pass,
        kept: Kept,
        dy: Array,
        wanted: bool,
    ) -> Result<Array> {
        let Kept { input: x, rest } = kept;
        let rest = match rest {
            Some(rest) => rest,
            None => self.run(pass, &x, false)?.1,
        };
        match rest.middle.is_some() {
            true => self.sequential_backward(pass, &x, rest, &dy, wanted)?,
            false => self.parallel_backward(pass, &x, rest, &dy, wanted)?,
        }
        Ok(dy)
    }

    /// Makes `dy` the gradient of the input.
    fn sequential_backward(
        &self,
        pass: &Pass,
        x: &Array,
        rest: Rest,
        dy: &Array,
        wanted: bool,
    ) -> Result<()> {
        let Rest { attention, attended, middle, mlp, transformed } = rest;
        let middle = middle.as_ref().unwrap_or(x);
        let d = through(pass, &self.post_mlp_norm, &transformed, dy)?;
        let input = self.mlp_input(pass, middle)?;
        let of_mlp = self.mlp.backward(pass, &input, mlp, &d)?;
        drop((input, transformed, d));
        match &self.mlp_norm {
            Some(norm) => pass.norm_backward(middle, norm, &of_mlp, dy, true)?,
            None => ops::add(pass.device(), &of_mlp, dy)?,
        }
        drop(of_mlp);
        let d = through(pass, &self.post_attention_norm, &attended, dy)?;
        let normed = pass.normed(x, &self.input_norm)?;
        match self.attention.backward(pass, &normed, attention, &d, wanted)? {
            Some(d) => pass.norm_backward(x, &self.input_norm, &d, dy, true),
            None => Ok(()),
        }
    }

    fn parallel_backward(
        &self,
        pass: &Pass,
        x: &Array,
        rest: Rest,
        dy: &Array,
        wanted: bool,
    ) -> Result<()> {
        let normed = pass.normed(x, &self.input_norm)?;
        let own = self.mlp_norm.as_ref().map(|norm| pass.normed(x, norm)).transpose()?;
        let d = pass.place.narrowed(dy)?;
        let of_mlp = self.mlp.backward(pass, own.as_ref().unwrap_or(&normed), rest.mlp, &d)?;
        let of_both = self.attention.backward(pass, &normed, rest.attention, &d, wanted)?;
        let Some(of_both) = of_both else { return Ok(()) };
        match &self.mlp_norm {
            Some(norm) => pass.norm_backward(x, norm, &of_mlp, dy, true)?,
            None => ops::add(pass.device(), &of_mlp, &of_both)?,
        }
        pass.norm_backward(x, &self.input_norm, &of_both, dy, true)
    }
}

/// `x` through the norm, if there is one, and then what went in.
fn post_normed(pass: &Pass, norm: &Option<Norm>, x: Array) -> Result<(Array, Option<Array>)> {
    let Some(norm) = norm else { return Ok((x, None)) };
    let out = pass.place.floats(x.len())?;
    ops::norm(pass.device(), &x, norm, &out)?;
    Ok((out, Some(x)))
}

/// The gradient before the norm of `x`, if there is one, as an operand of products.
fn through(pass: &Pass, norm: &Option<Norm>, x: &Option<Array>, dy: &Array) -> Result<Array> {
    let (Some(norm), Some(x)) = (norm, x) else { return pass.place.narrowed(dy) };
    let dx = pass.place.floats(dy.len())?;
    pass.norm_backward(x, norm, dy, &dx, false)?;
    pass.place.narrowed(&dx)
}

/// Attention of a layer, or this rank's heads of it.
struct Attention {
    heads: Heads,
    qkv: Projections,
    qk_norms: Option<[Norm; 2]>,
    o_proj: Output,
    /// Whether the gradient of the input is a part of a sum over the ranks.
    is_split: bool,
}

struct AttentionKept {
    linears: Vec<LinearKept>,
    /// Queries, keys and values, `[m, all]`; where queries and keys are normed, before that.
    qkv: Array,
    /// Queries and keys after their norms, where they have some.
    normed: Option<Array>,
    out: Array,
    log_sum_exp: Array,
    o_proj: LinearKept,
}

impl Attention {
    fn new(place: &Place, from: &host::Attention, parameters: &Parameters) -> Result<Self> {
        let h = from.heads;
        let widths = [h.heads, h.kv_heads, h.kv_heads].map(|heads| heads * h.head_dim);
        let slopes = from.slopes.as_ref().map(|slopes| place.device.upload(slopes)).transpose()?;
        let norms = from
            .qk_norms
            .as_ref()
            .map(|[q, k]| Ok::<_, crate::Error>([place.norm(q)?, place.norm(k)?]));
        Ok(Self {
            heads: Heads { heads: h, window: from.window, softcap: from.softcap, slopes },
            qkv: Projections::new(place, &from.qkv, widths.iter().sum(), parameters)?,
            qk_norms: norms.transpose()?,
            o_proj: Output::new(place, &from.o_proj, parameters)?,
            is_split: from.split == Split::Column,
        })
    }

    /// Queries' and keys' values of a row.
    fn qk_width(&self) -> usize {
        let h = self.heads.heads;
        (h.heads + h.kv_heads) * h.head_dim
    }

    /// Queries, keys and values among what is kept.
    fn views(&self, qkv: &Array, normed: Option<&Array>) -> Qkv {
        let h = self.heads.heads;
        let all = Rows::new(qkv, self.qkv.width);
        let q = normed.map_or_else(|| all.clone(), |normed| Rows::new(normed, self.qk_width()));
        Qkv { k: q.from_column(h.heads * h.head_dim), q, v: all.from_column(self.qk_width()) }
    }

    fn rotate(&self, pass: &Pass, qkv: &Qkv, back: bool) -> Result<()> {
        let h = self.heads.heads;
        let [global, local] = &pass.rotations;
        let table = if self.heads.window.is_some() { local } else { global };
        let Some(table) = table else { return Ok(()) };
        // Keys follow queries, in the same rows.
        let heads = [h.heads + h.kv_heads, h.head_dim];
        kernel::rotate(pass.device(), table, &qkv.q, heads, back)
    }

    /// The queries and keys of all rows, normed.
    fn normed(&self, pass: &Pass, qkv: &Array) -> Result<Option<Array>> {
        let Some([q_norm, k_norm]) = &self.qk_norms else { return Ok(None) };
        let h = self.heads.heads;
        let normed = pass.place.values(pass.rows * self.qk_width())?;
        let (from, to) = (self.views(qkv, None), self.views(qkv, Some(&normed)));
        let device = pass.device();
        kernel::head_norm(device, &from.q, of(q_norm), [pass.rows, h.heads], &to.q)?;
        kernel::head_norm(device, &from.k, of(k_norm), [pass.rows, h.kv_heads], &to.k)?;
        Ok(Some(normed))
    }

    /// f32 `[m, hidden]`.
    fn forward(&self, pass: &Pass, x: &Array) -> Result<(Array, AttentionKept)> {
        let h = self.heads.heads;
        let (qkv, linears) = self.qkv.forward(pass, x)?;
        let normed = self.normed(pass, &qkv)?;
        let views = self.views(&qkv, normed.as_ref());
        self.rotate(pass, &views, false)?;
        let out = pass.place.values(pass.rows * h.heads * h.head_dim)?;
        let log_sum_exp = pass.place.floats(pass.rows * h.heads)?;
        self.heads.forward(pass.device(), &views, &pass.segments, &out, &log_sum_exp)?;
        let (y, o_proj) = self.o_proj.forward(pass, &out)?;
        Ok((y, AttentionKept { linears, qkv, normed, out, log_sum_exp, o_proj }))
    }

    /// The gradient of `x`, f32, if it is `wanted`.
    fn backward(
        &self,
        pass: &Pass,
        x: &Array,
        kept: AttentionKept,
        dy: &Array,
        wanted: bool,
    ) -> Result<Option<Array>> {
        let AttentionKept { linears, qkv, normed, out, log_sum_exp, o_proj } = kept;
        let dout = pass.place.values(out.len())?;
        self.o_proj.backward(pass, &out, &o_proj, dy, &dout)?;
        let d = pass.place.values(qkv.len())?;
        let gradients = self.views(&d, None);
        let delta = pass.place.floats(log_sum_exp.len())?;
        self.heads.backward(
            pass.device(),
            &self.views(&qkv, normed.as_ref()),
            &pass.segments,
            [&out, &dout],
            &log_sum_exp,
            &delta,
            &gradients,
        )?;
        drop((normed, out, dout));
        self.rotate(pass, &gradients, true)?;
        self.through_norms(pass, &self.views(&qkv, None), &gradients)?;
        drop(qkv);
        let dx = wanted.then(|| pass.place.floats(x.len())).transpose()?;
        self.qkv.backward(pass, x, &linears, &d, dx.as_ref())?;
        if let Some(dx) = dx.as_ref().filter(|_| self.is_split) {
            pass.place.sum(dx)?;
        }
        Ok(dx)
    }

    /// Makes the gradients of queries and keys those before their norms.
    fn through_norms(&self, pass: &Pass, qkv: &Qkv, gradients: &Qkv) -> Result<()> {
        let Some([q_norm, k_norm]) = &self.qk_norms else { return Ok(()) };
        let h = self.heads.heads;
        let of_each =
            [(&qkv.q, q_norm, h.heads, &gradients.q), (&qkv.k, k_norm, h.kv_heads, &gradients.k)];
        for (x, norm, heads, d) in of_each {
            let shape = [pass.rows, heads];
            kernel::norm_backward(pass.device(), x, of(norm), shape, d, &d.values, false)?;
        }
        Ok(())
    }
}

/// Linear layers over one input, whose outputs lie side by side.
struct Projections {
    linears: Vec<Linear>,
    /// Outputs of all.
    width: usize,
    bias: Option<Array>,
}

impl Projections {
    fn new(
        place: &Place,
        from: &host::Projections,
        width: usize,
        parameters: &Parameters,
    ) -> Result<Self> {
        let linears = from.linears().iter().map(|linear| Linear::new(place, linear, parameters));
        let biases: Vec<f32> = from.linears().iter().flat_map(bias_or_zeros).collect();
        let has_bias = from.linears().iter().any(|linear| linear.bias.is_some());
        let bias = has_bias.then(|| place.device.upload(&biases)).transpose()?;
        Ok(Self { linears: linears.collect::<Result<_>>()?, width, bias })
    }

    /// The layers and the columns where their outputs begin.
    fn placed(&self) -> impl Iterator<Item = (&Linear, usize)> {
        let mut first = 0;
        self.linears.iter().map(move |linear| {
            let column = first;
            first += linear.outputs();
            (linear, column)
        })
    }

    /// `[m, width]`.
    fn forward(&self, pass: &Pass, x: &Array) -> Result<(Array, Vec<LinearKept>)> {
        let y = pass.place.values(pass.rows * self.width)?;
        let rows = Rows::new(&y, self.width);
        let numbers = pass.numbers.as_ref();
        let kept = self
            .placed()
            .map(|(linear, first)| linear.forward(pass, x, numbers, &rows.from_column(first)));
        let kept = kept.collect::<Result<_>>()?;
        if let Some(bias) = &self.bias {
            ops::add_bias(pass.device(), &y, bias)?;
        }
        Ok((y, kept))
    }

    /// Writes the gradient of `x` to `dx`, f32, if it is wanted.
    fn backward(
        &self,
        pass: &Pass,
        x: &Array,
        kept: &[LinearKept],
        dy: &Array,
        dx: Option<&Array>,
    ) -> Result<()> {
        let dy = Rows::new(dy, self.width);
        for ((linear, first), kept) in self.placed().zip(kept) {
            let to = dx.map(|values| InputGradient { values, is_added: first > 0 });
            let dy = dy.from_column(first);
            linear.backward(pass, x, kept, &dy, pass.numbers.as_ref(), to)?;
        }
        Ok(())
    }
}

fn bias_or_zeros(linear: &HostLinear) -> Vec<f32> {
    linear.bias.clone().unwrap_or_else(|| vec![0.0; linear.outputs()])
}

/// A linear layer back to the residual stream.
struct Output {
    linear: Linear,
    bias: Option<Array>,
    /// Whether its outputs are parts of a sum over the ranks.
    is_split: bool,
}

impl Output {
    fn new(place: &Place, from: &HostLinear, parameters: &Parameters) -> Result<Self> {
        let bias = from.bias.as_ref().map(|bias| place.device.upload(bias)).transpose()?;
        let linear = Linear::new(place, from, parameters)?;
        Ok(Self { linear, bias, is_split: from.split == Split::Row })
    }

    /// f32 `[m, hidden]`.
    fn forward(&self, pass: &Pass, x: &Array) -> Result<(Array, LinearKept)> {
        let outputs = self.linear.outputs();
        let y = pass.place.floats(pass.rows * outputs)?;
        let rows = Rows::new(&y, outputs);
        let kept = self.linear.forward(pass, x, pass.numbers.as_ref(), &rows)?;
        if let Some(bias) = &self.bias {
            ops::add_bias(pass.device(), &y, bias)?;
        }
        if self.is_split {
            pass.place.sum(&y)?;
        }
        Ok((y, kept))
    }

    /// No output, and what the backward pass needs. Not collective.
    fn keep(&self, pass: &Pass, x: &Array) -> Result<(Array, LinearKept)> {
        let kept = self.linear.keep(pass, x, pass.numbers.as_ref())?;
        Ok((pass.place.floats(0)?, kept))
    }

    /// Writes the gradient of `x` to `dx`, both of the device's type, as `dy` is.
    fn backward(
        &self,
        pass: &Pass,
        x: &Array,
        kept: &LinearKept,
        dy: &Array,
        dx: &Array,
    ) -> Result<()> {
        let dy = Rows::new(dy, self.linear.outputs());
        let to = Some(InputGradient { values: dx, is_added: false });
        self.linear.backward(pass, x, kept, &dy, pass.numbers.as_ref(), to)
    }
}

/// The MLP of a layer, or this rank's inner features of it.
struct Mlp {
    activation: Activation,
    gate_up: Projections,
    /// Inner features on this rank.
    inner: usize,
    down_proj: Output,
}

struct MlpKept {
    linears: Vec<LinearKept>,
    /// Outputs of gate and up side by side, or of up alone.
    outputs: Array,
    down_proj: LinearKept,
}

impl Mlp {
    fn new(place: &Place, from: &host::Mlp, parameters: &Parameters) -> Result<Self> {
        let width = from.gate_up.linears().iter().map(HostLinear::outputs).sum();
        Ok(Self {
            activation: from.activation,
            gate_up: Projections::new(place, &from.gate_up, width, parameters)?,
            inner: from.down_proj.inputs(),
            down_proj: Output::new(place, &from.down_proj, parameters)?,
        })
    }

    fn is_gated(&self) -> bool {
        self.gate_up.width > self.inner
    }

    fn inner(&self, pass: &Pass, outputs: &Array) -> Result<Array> {
        let inner = pass.place.values(pass.rows * self.inner)?;
        let device = pass.device();
        match self.is_gated() {
            true => ops::gated(device, self.activation, outputs, self.inner, &inner)?,
            false => ops::activate(device, self.activation, outputs, &inner)?,
        }
        Ok(inner)
    }

    /// f32 `[m, hidden]`, empty if it is not `wanted`.
    fn forward(&self, pass: &Pass, x: &Array, wanted: bool) -> Result<(Array, MlpKept)> {
        let (outputs, linears) = self.gate_up.forward(pass, x)?;
        let inner = self.inner(pass, &outputs)?;
        let (y, down_proj) = match wanted {
            true => self.down_proj.forward(pass, &inner)?,
            false => self.down_proj.keep(pass, &inner)?,
        };
        Ok((y, MlpKept { linears, outputs, down_proj }))
    }

    /// The gradient of `x`, f32.
    fn backward(&self, pass: &Pass, x: &Array, kept: MlpKept, dy: &Array) -> Result<Array> {
        let MlpKept { linears, outputs, down_proj } = kept;
        let inner = self.inner(pass, &outputs)?;
        let d = pass.place.values(inner.len())?;
        self.down_proj.backward(pass, &inner, &down_proj, dy, &d)?;
        drop(inner);
        let d = match self.is_gated() {
            true => {
                let both = pass.place.values(outputs.len())?;
                let (device, act) = (pass.device(), self.activation);
                kernel::gated_backward(device, act, &outputs, self.inner, &d, &both)?;
                both
            }
            false => {
                kernel::activate_backward(pass.device(), self.activation, &outputs, &d)?;
                d
            }
        };
        drop(outputs);
        let dx = pass.place.floats(x.len())?;
        self.gate_up.backward(pass, x, &linears, &d, Some(&dx))?;
        pass.place.sum(&dx)?;
        Ok(dx)
    }
}
