//! How much memory a rank of a training takes, by formula: before it starts, and for shapes
//! that are not at hand. Pure.
//!
//! ```text
//! weights   the rank's share of the model, as it is in memory (mapped where nothing converts it)
//! trained   16 bytes a value: the value, its gradient, AdamW's two moments
//! kept      what all layers keep of the forward pass, for each row of a micro-batch
//! live      one layer on its way back, and what it is computed from where it is recomputed
//! logits    the rows of the loss that are held at once
//! saving    rank 0: a checkpoint's tensors, gathered, while nothing of a pass is there
//! ```
//!
//! The terms follow [`super::layer`], [`super::linear`], [`super::loss`] and [`super::model`]
//! line by line; whoever keeps another tensor there adds it here. Attention's tiles and the
//! kernels' buffers are some hundred KiB a thread and left out, as are large data.
//!
//! On a device ([`super::device`]) the same tensors are kept, most of them in the type that
//! products are taken of, and the moments stay on the host: 8 bytes a trained value and one of
//! that type. What the driver and its libraries take, some hundred MiB, is left out.

use std::collections::BTreeSet;

use super::lora::LoraConfig;
use super::model::{Recompute, saved, targets};
use super::{device, loss};
use crate::Result;
use crate::device::Dtype;
use crate::model::attention::Group;
use crate::model::config::{Block, ModelConfig};
use crate::model::layers::share;
use crate::model::names::at;

/// Bytes of a value in a pass.
const VALUE: usize = size_of::<f32>();
/// The program with a tokenizer and little data, as measured.
const PROGRAM: u64 = 28 << 20;

/// What the memory of a training depends on.
#[derive(Debug, Clone, Copy)]
pub struct Setting<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// The adapter.
    pub lora: &'a LoraConfig,
    /// Ranks that share the model.
    pub tensor_parallel: usize,
    /// Most tokens of a micro-batch.
    pub tokens: usize,
    /// Layers computed again on the way back.
    pub recompute: Recompute,
    /// Bytes of a weight in memory: 2 for bf16, 8.5 / 8 for q8_0.
    pub bytes_a_weight: f64,
    /// What products are taken of on a device; `None` on the host.
    pub device: Option<Dtype>,
}

impl Setting<'_> {
    /// Bytes of an operand of products.
    fn narrow(&self) -> usize {
        self.device.map_or(VALUE, Dtype::bytes)
    }

    /// Bytes of a copy of f32 values as operands; f32 ones need none.
    fn copied(&self) -> usize {
        if self.narrow() == VALUE { 0 } else { self.narrow() }
    }
}

/// Bytes on the rank that takes most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// The frozen weights; ranks on a node share the pages of those that are mapped.
    pub weights: u64,
    /// Trained values, gradients and moments.
    pub trained: u64,
    /// What the layers keep.
    pub kept: u64,
    /// One layer on its way back.
    pub live: u64,
    /// The loss: hidden states and logits.
    pub logits: u64,
    /// Writing a checkpoint, on rank 0.
    pub saving: u64,
}

impl Estimate {
    /// The most that a forward and a backward pass take: the loss and a layer's way back do
    /// not meet.
    pub fn pass(&self) -> u64 {
        self.kept + self.live.max(self.logits)
    }

    /// The peak of the process.
    pub fn total(&self) -> u64 {
        PROGRAM + self.weights + self.trained + self.pass().max(self.saving)
    }

    /// The peak of a device's memory.
    pub fn total_on_device(&self) -> u64 {
        self.weights + self.trained + self.pass()
    }
}

/// What a rank takes.
///
/// # Errors
/// Input errors: modules that the model does not have.
pub fn estimate(setting: &Setting) -> Result<Estimate> {
    let Setting { model, lora, tensor_parallel: size, tokens, .. } = *setting;
    let targets = targets(model, lora)?;
    let saved = saved(model, lora)?;
    let layers: Vec<Layer> =
        (0..model.num_hidden_layers).map(|layer| Layer::new(model, size, layer)).collect();
    let (hidden, ids) = (model.hidden_size, share(model.vocab_size, 0, size).len());
    let head = Linear { name: model.hf_names.lm_head.to_owned(), outputs: ids, inputs: hidden };

    let matrices = if model.tie_word_embeddings { 1 } else { 2 };
    let weights = layers.iter().map(Layer::weights).sum::<usize>() + matrices * ids * hidden;
    let all = || layers.iter().flat_map(|layer| &layer.linears).chain([&head]);
    let adapted = || all().filter(|linear| targets.contains(&linear.name));
    let trained = adapted().map(|linear| linear.trained(lora)).sum::<usize>();
    let trained = trained + saved.len() * ids * hidden;
    let whole = trained_of_whole(model, lora, &targets, saved.len());

    let first = match saved.contains(model.hf_names.embed_tokens) {
        true => Some(0),
        false => (0..layers.len()).find(|i| layers[*i].is_trained(&targets)),
    };
    let trained_layers = first.unwrap_or(layers.len())..layers.len();
    let row = |layer: &Layer| layer.kept(lora, &targets, setting.narrow());
    let is_recomputed = |layer: usize| setting.recompute.includes(layer);
    let kept = trained_layers.clone().map(|i| match is_recomputed(i) {
        true => VALUE * hidden,
        false => VALUE * hidden + row(&layers[i]),
    });
    // The last layer goes back first, when all is kept yet.
    let live = trained_layers.clone().next_back().map_or(0, |last| {
        let again = if is_recomputed(last) { row(&layers[last]) } else { 0 };
        again
            + match setting.device {
                None => VALUE * layers[last].live(lora, size),
                Some(_) => layers[last].live_on_device(setting),
            }
    });
    let capped = usize::from(model.final_logit_softcapping.is_some());
    let (logits, a_trained) = match setting.device {
        None => (loss::rows_at_once(ids).min(tokens) * ids * VALUE * (1 + capped), 4 * VALUE),
        Some(_) => {
            let rows = device::rows_at_once(ids).min(tokens);
            (rows * ids * (VALUE + setting.copied()), 2 * VALUE + setting.copied())
        }
    };
    Ok(Estimate {
        weights: (weights as f64 * setting.bytes_a_weight) as u64,
        trained: (a_trained * trained) as u64,
        kept: (tokens * kept.sum::<usize>()) as u64,
        live: (tokens * live) as u64,
        // Hidden states, normed, and their gradient.
        logits: (logits + (2 * VALUE + setting.narrow()) * tokens * hidden) as u64,
        // Values and moments, the adapter's tensors, and their bytes in its file.
        saving: (5 * VALUE * whole) as u64,
    })
}

/// Trained values of the whole adapter.
fn trained_of_whole(
    model: &ModelConfig,
    lora: &LoraConfig,
    targets: &BTreeSet<String>,
    saved: usize,
) -> usize {
    let layers = (0..model.num_hidden_layers).flat_map(|layer| Layer::new(model, 1, layer).linears);
    let [outputs, inputs] = [model.vocab_size, model.hidden_size];
    let head = Linear { name: model.hf_names.lm_head.to_owned(), outputs, inputs };
    let adapted = layers.chain([head]).filter(|linear| targets.contains(&linear.name));
    adapted.map(|linear| linear.trained(lora)).sum::<usize>() + saved * outputs * inputs
}

/// A rank's share of a linear layer, in Hugging Face's form.
struct Linear {
    name: String,
    outputs: usize,
    inputs: usize,
}

impl Linear {
    fn trained(&self, lora: &LoraConfig) -> usize {
        let magnitudes = if lora.use_dora { self.outputs } else { 0 };
        lora.r * (self.inputs + self.outputs) + magnitudes
    }
}

/// A rank's share of a layer: widths of its tensors.
struct Layer {
    linears: Vec<Linear>,
    hidden: usize,
    /// Queries; keys, and values, alike.
    q: usize,
    kv: usize,
    heads: usize,
    /// Inner features.
    inner: usize,
    /// Inner features of gate and up, or of up alone.
    outputs: usize,
    block: Block,
    has_qk_norm: bool,
    /// Gate and up are one matrix.
    is_fused: bool,
}

impl Layer {
    fn new(model: &ModelConfig, size: usize, layer: usize) -> Self {
        let names = &model.hf_names;
        let (hidden, d) = (model.hidden_size, model.head_dim);
        let group = Group { rank: 0, size };
        let mut linears: Vec<Linear> = Vec::new();
        let mut add = |name: String, outputs: usize, inputs: usize| match linears.last_mut() {
            Some(last) if last.name == name => last.outputs += outputs,
            _ => linears.push(Linear { name, outputs, inputs }),
        };
        for place in group.qkv_places(model, names, layer) {
            add(place.name.clone(), place.len(), hidden);
        }
        let (heads, kv_heads) = (model.local_heads(size), model.local_kv_heads(size));
        add(at(names.o_proj, layer), hidden, heads * d);
        let features = share(model.intermediate_size, 0, size);
        let inner = features.len();
        let (gate, up) = names.gate_up.places(layer, model.intermediate_size, features);
        let is_fused = gate.as_ref().is_some_and(|gate| gate.name == up.name);
        let outputs = if gate.is_some() { 2 * inner } else { inner };
        for place in gate.into_iter().chain([up]) {
            add(place.name.clone(), place.len(), hidden);
        }
        add(at(names.down_proj, layer), hidden, inner);
        let (q, kv) = (heads * d, kv_heads * d);
        let (block, has_qk_norm) = (model.block, model.qk_norm);
        Self { linears, hidden, q, kv, heads, inner, outputs, block, has_qk_norm, is_fused }
    }

    fn weights(&self) -> usize {
        self.linears.iter().map(|linear| linear.outputs * linear.inputs).sum()
    }

    fn is_trained(&self, targets: &BTreeSet<String>) -> bool {
        self.linears.iter().any(|linear| targets.contains(&linear.name))
    }

    /// Bytes that a row keeps besides the layer's input, those of operands `narrow` a value.
    fn kept(&self, lora: &LoraConfig, targets: &BTreeSet<String>, narrow: usize) -> usize {
        let attention = 2 * self.q + 2 * self.kv;
        let unnormed = if self.has_qk_norm { self.q + self.kv } else { 0 };
        let residual = match self.block {
            Block::Parallel | Block::ParallelTwoNorms => 0,
            Block::Sequential => self.hidden,
            Block::PostNorms => 3 * self.hidden,
        };
        let of_linear = |linear: &Linear| lora.r + if lora.use_dora { linear.outputs } else { 0 };
        let adapted = self.linears.iter().filter(|linear| targets.contains(&linear.name));
        let adapted = adapted.map(of_linear).sum::<usize>();
        narrow * (attention + unnormed + self.outputs + adapted) + VALUE * (self.heads + residual)
    }

    /// Bytes of a row on a device, as [`Layer::live`] counts values of the host.
    fn live_on_device(&self, setting: &Setting) -> usize {
        let Self { hidden, q, kv, heads, inner, outputs, block, .. } = *self;
        let (narrow, copied, lora) = (setting.narrow(), setting.copied(), setting.lora);
        // The gradient of the layer's output, where it is normed its own, and its copy.
        let posts = if block == Block::PostNorms { VALUE } else { 0 };
        let residual = (VALUE + posts + copied) * hidden;
        let widest = hidden.max(inner).max(q);
        let dropped = if lora.lora_dropout > 0.0 { narrow * widest } else { 0 };
        let gained = if lora.use_dora { narrow * outputs.max(hidden).max(q + 2 * kv) } else { 0 };
        // The input normed, the gradients of inner features, gate and up, and of the input.
        let mlp = narrow * (hidden + inner + inner.max(outputs)) + VALUE * hidden;
        // The input normed, the gradients of out, queries, keys and values, of the input.
        let attention = narrow * (hidden + 2 * q + 2 * kv) + VALUE * (heads + hidden);
        // What a parallel block has of its MLP.
        let beside = match block {
            Block::Parallel | Block::ParallelTwoNorms => (VALUE + narrow) * hidden,
            Block::Sequential | Block::PostNorms => 0,
        };
        residual + dropped + gained + mlp.max(attention + beside)
    }

    /// Values of a row that come on top of what is kept while the layer goes back: at the
    /// MLP's gradients or at attention's, whichever are more.
    fn live(&self, lora: &LoraConfig, size: usize) -> usize {
        let Self { hidden, q, kv, inner, outputs, .. } = *self;
        // The loss's gradient before and after the last norm, that of the layer's output, of
        // the MLP's output, the MLP's input normed, its gradient.
        let residual = match self.block {
            Block::Parallel => 5,
            _ => 6,
        } * hidden;
        let dropped = if lora.lora_dropout > 0.0 { hidden } else { 0 };
        let gained = if lora.use_dora { inner } else { 0 };
        let joined = if self.is_fused { outputs } else { 0 };
        let mlp = residual + inner + outputs + joined + gained + dropped;
        // What a rank sends and what it receives.
        let exchanged = if size > 1 { 2 * hidden } else { 0 };
        // Four or five gradients of the residual stream, two normed inputs; the MLP's outputs
        // and its input are gone by then.
        let freed = outputs + if self.block == Block::Sequential { hidden } else { 0 };
        let attention = (10 * hidden + 2 * q + 2 * kv + exchanged).saturating_sub(freed);
        mlp.max(residual + inner + exchanged).max(attention)
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
