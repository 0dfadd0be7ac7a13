//! The model in training: the frozen decoder with its trained products, forward to the loss
//! and backward to their gradients.

use std::collections::BTreeSet;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use super::batch::MicroBatch;
use super::device::{self, Place};
use super::layer::{Builder, Layer, LayerKept, Pass};
use super::linear::{Linear, Split};
use super::lora::{LoraConfig, layer_of};
use super::loss::LossHead;
use super::parameters::{Cut, ParameterId, Parameters, Part, Sharing};
use crate::comm::TensorComm;
use crate::kernels::ops as kernel;
use crate::kernels::parallel::peak_flops;
use crate::model::adapter::RowAdapters;
use crate::model::adapter::modules::{Role, modules};
use crate::model::config::ModelConfig;
use crate::model::decoder::load_vocabulary;
use crate::model::layers::{Loader, Norm, VocabParallel};
use crate::model::names::{GateUp, Qkv};
use crate::model::ops;
use crate::model::step::{Rotations, Step};
use crate::{Error, Result};

/// Which layers keep their input only and are computed again on the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// None: fastest.
    None,
    /// All: least memory.
    Full,
    /// The first so many.
    Layers(usize),
}

impl Recompute {
    /// Whether a layer is computed again.
    pub fn includes(self, layer: usize) -> bool {
        match self {
            Self::None => false,
            Self::Full => true,
            Self::Layers(n) => layer < n,
        }
    }
}

impl FromStr for Recompute {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "full" => Ok(Self::Full),
            number => number
                .parse()
                .map(Self::Layers)
                .map_err(|_| format!("{number} is neither full, none nor a number of layers")),
        }
    }
}

/// The model, or a tensor-parallel rank's share of it.
pub struct TrainedModel {
    passes: Passes,
    flops_a_token: f64,
    group: Arc<dyn TensorComm>,
    /// The trained tensors.
    pub parameters: Parameters,
}

/// Where passes run.
enum Passes {
    Host(Box<HostModel>),
    Device(Box<device::Model>),
}

/// What a model is made of besides its layers.
pub(super) struct Frame {
    pub(super) embed_tokens: VocabParallel,
    /// The embedding's own values, where it is trained.
    pub(super) trained_embedding: Option<ParameterId>,
    pub(super) embedding_scale: Option<f32>,
    pub(super) norm: Norm,
    pub(super) head: LossHead,
    pub(super) rotations: Rotations,
    /// The first layer with something to train; nothing goes back beyond it.
    pub(super) first_trained: usize,
    pub(super) recompute: Recompute,
}

/// The model in the host's memory.
struct HostModel {
    frame: Frame,
    layers: Vec<Layer>,
    group: Arc<dyn TensorComm>,
}

impl TrainedModel {
    /// Loads this rank's share, with fresh trained tensors, to a device if one is given.
    /// Collective.
    ///
    /// # Errors
    /// Input errors: modules that the model does not have, a model that farm does not train or
    /// not split so, a tensor that is missing or of another shape; no memory on the device.
    pub fn load(
        l: &Loader,
        config: &LoraConfig,
        seed: u64,
        recompute: Recompute,
        place: Option<&Place>,
    ) -> Result<Self> {
        let model = l.source.config();
        check_trains(model, l.comm.size())?;
        let targets = targets(model, config)?;
        let parameters = Parameters::default();
        let mut b = Builder { loader: l, config, targets, seed, parameters };
        let (embed_tokens, lm_head) = load_vocabulary(l)?;
        let (mut layers, mut on_device, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..model.num_hidden_layers {
            let layer = Layer::load(&mut b, layer)?;
            weights.push(layer.linears().map(num_weights).sum::<f64>());
            match place {
                None => layers.push(layer),
                Some(place) => on_device.push(device::Layer::new(place, &layer, &b.parameters)?),
            }
        }
        let frame = load_frame(&mut b, embed_tokens, &lm_head, recompute)?;
        let mut parameters = b.parameters;
        parameters.draw(seed);
        let flops_a_token = flops_a_token(&frame, &weights) * l.comm.size() as f64;
        let group = l.comm.clone();
        let passes = match place {
            None => Passes::Host(Box::new(HostModel { frame, layers, group: group.clone() })),
            Some(place) => {
                Passes::Device(Box::new(device::Model::new(place, on_device, frame, &parameters)?))
            }
        };
        let mut trained = Self { passes, flops_a_token, group, parameters };
        trained.refresh()?;
        Ok(trained)
    }

    /// To call after every change of the trained tensors. Collective.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn refresh(&mut self) -> Result<()> {
        match &mut self.passes {
            Passes::Host(model) => {
                model.refresh(&self.parameters);
                Ok(())
            }
            Passes::Device(model) => model.refresh(&self.parameters),
        }
    }

    /// The loss of a micro-batch, summed over its counted tokens; `weight` times its gradients
    /// are added to the trained tensors' by the next
    /// [`collect_gradients`](Self::collect_gradients). Collective in the tensor-parallel group.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn train(&mut self, batch: &MicroBatch, weight: f32) -> Result<f64> {
        self.run(batch, Some(weight))
    }

    /// The loss alone, without dropout.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn evaluate(&mut self, batch: &MicroBatch) -> Result<f64> {
        self.run(batch, None)
    }

    fn run(&mut self, batch: &MicroBatch, weight: Option<f32>) -> Result<f64> {
        match &self.passes {
            Passes::Host(model) => model.run(&mut self.parameters, batch, weight),
            Passes::Device(model) => model.run(batch, weight),
        }
    }

    /// Adds what is still on a device to the trained tensors' gradients: to call once after
    /// the micro-batches of a step.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn collect_gradients(&mut self) -> Result<()> {
        match &self.passes {
            Passes::Host(_) => Ok(()),
            Passes::Device(model) => model.collect_gradients(&mut self.parameters),
        }
    }

    /// Floating-point operations that a trained token needs at least, over all ranks of the
    /// group: 2 a weight forward, 2 backward for the inputs' gradients (none below the first
    /// trained layer). Products of rank r, attention and recomputation come on top.
    pub fn flops_a_token(&self) -> f64 {
        self.flops_a_token
    }

    /// Floating-point operations a second that this rank is able to, where that is known.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn peak_flops(&self) -> Result<Option<f64>> {
        match &self.passes {
            Passes::Host(_) => Ok(Some(peak_flops())),
            Passes::Device(model) => model.peak_flops(),
        }
    }

    /// The ranks that share the model.
    pub fn group(&self) -> &Arc<dyn TensorComm> {
        &self.group
    }
}

fn num_weights(linear: &Linear) -> f64 {
    (linear.outputs() * linear.inputs()) as f64
}

/// Of one rank, from the weights of its layers.
fn flops_a_token(frame: &Frame, weights: &[f64]) -> f64 {
    let layers = weights.iter().enumerate().map(|(i, weights)| {
        let factor = if i < frame.first_trained { 2.0 } else { 4.0 };
        factor * weights
    });
    layers.sum::<f64>() + 4.0 * num_weights(&frame.head.linear)
}

/// All but the layers, which are loaded.
fn load_frame(
    b: &mut Builder,
    embed_tokens: VocabParallel,
    lm_head: &VocabParallel,
    recompute: Recompute,
) -> Result<Frame> {
    let l = b.loader;
    let model = l.source.config();
    let (weight, ids) = lm_head.shared();
    let saved = saved(model, b.config)?;
    let linear = match saved.contains(model.hf_names.lm_head) {
        true => {
            let id = add_whole(&mut b.parameters, model, model.hf_names.lm_head, lm_head);
            Linear::trained(id, [ids.len(), model.hidden_size], l.comm.clone())
        }
        false => {
            let head = Linear::frozen(weight, None, Split::Column, l.comm.clone());
            b.head(head, ids.clone())
        }
    };
    let trained_embedding = saved
        .contains(model.hf_names.embed_tokens)
        .then(|| add_whole(&mut b.parameters, model, model.hf_names.embed_tokens, &embed_tokens));
    let first = match trained_embedding {
        Some(_) => Some(0),
        None => b.targets.iter().filter_map(|name| layer_of(name)).min(),
    };
    Ok(Frame {
        embed_tokens,
        trained_embedding,
        embedding_scale: model.embedding_scale,
        norm: Norm::load(l, model, model.names.norm, model.hidden_size)?,
        head: LossHead { linear, ids, softcap: model.final_logit_softcapping },
        rotations: Rotations::new(model),
        first_trained: first.unwrap_or(model.num_hidden_layers),
        recompute,
    })
}

impl HostModel {
    fn refresh(&mut self, parameters: &Parameters) {
        let Self { layers, frame, .. } = self;
        let linears = layers.iter_mut().flat_map(Layer::linears_mut);
        linears.chain([&mut frame.head.linear]).for_each(|linear| linear.refresh(parameters));
    }

    fn run(
        &self,
        parameters: &mut Parameters,
        batch: &MicroBatch,
        weight: Option<f32>,
    ) -> Result<f64> {
        let Frame { norm, head, first_trained, recompute, .. } = &self.frame;
        let (first_trained, recompute) = (*first_trained, *recompute);
        let (rows, targets) = batch.targets();
        let as_step = batch.as_step();
        let step = Step::new(&as_step, &self.frame.rotations);
        let tokens = batch.tokens(weight.is_some());
        let mut x = self.embedded(parameters, &batch.token_ids)?;
        let segments = &batch.segments;
        let mut pass = Pass { parameters, step: &step, segments, tokens: &tokens };

        let mut kept = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let recomputed = weight.is_none() || recompute.includes(i);
            let (out, layer_kept) = layer.forward(&pass, x, recomputed);
            if weight.is_some() && i >= first_trained {
                kept.push(layer_kept);
            }
            x = out;
        }
        let width = norm.width();
        let selected = select(&x, &rows, width);
        let len = x.len();
        drop(x);
        let normed = norm.rows(&selected);
        let numbers = rows.iter().map(|row| tokens.numbers[*row]).collect();
        let of_rows = super::linear::Tokens { training: tokens.training, numbers };
        let p = &mut *pass.parameters;
        let loss = head.run(p, &*self.group, &normed, &targets, &of_rows, weight);
        if !kept.is_empty() {
            let dx = norm.backward(&selected, &loss.dx);
            drop((selected, normed));
            let dx = spread(&dx, &rows, width, len);
            self.go_back(&mut pass, batch, kept, dx);
        }
        Ok(loss.sum)
    }

    /// From the gradient of the last layer's output to the first thing that is trained.
    fn go_back(
        &self,
        pass: &mut Pass,
        batch: &MicroBatch,
        mut kept: Vec<LayerKept>,
        mut dx: Vec<f32>,
    ) {
        let Frame { embed_tokens, trained_embedding, embedding_scale, first_trained, .. } =
            &self.frame;
        for (i, layer) in self.layers.iter().enumerate().skip(*first_trained).rev() {
            let Some(kept) = kept.pop() else { break };
            let wanted = i > *first_trained || trained_embedding.is_some();
            dx = layer.backward(pass, kept, dx, wanted);
        }
        if let Some(id) = trained_embedding {
            let (_, ids) = embed_tokens.shared();
            let factor = embedding_scale.unwrap_or(1.0);
            let gradient = pass.parameters.gradient_of(*id);
            add_to_rows(gradient, &batch.token_ids, ids, &dx, factor);
        }
    }

    fn embedded(&self, parameters: &Parameters, token_ids: &[u32]) -> Result<Vec<f32>> {
        let Frame { embed_tokens, trained_embedding, embedding_scale, norm, .. } = &self.frame;
        let Some(id) = *trained_embedding else {
            let none = RowAdapters::default();
            let x = embed_tokens.embed(token_ids, *embedding_scale, &none)?;
            return ops::with_values(&x, <[f32]>::to_vec);
        };
        let (width, (_, ids)) = (norm.width(), embed_tokens.shared());
        let values = parameters.values_of(id);
        let mut x = vec![0.0; token_ids.len() * width];
        for (id, x) in token_ids.iter().zip(x.chunks_exact_mut(width)) {
            if let Some(row) = (*id as usize).checked_sub(ids.start).filter(|row| *row < ids.len())
            {
                x.copy_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
        self.group.all_reduce_sum(&mut x);
        kernel::scale(&mut x, embedding_scale.unwrap_or(1.0));
        Ok(x)
    }
}

/// The modules that get a product.
///
/// # Errors
/// See [`LoraConfig::targets`].
pub fn targets(model: &ModelConfig, config: &LoraConfig) -> Result<BTreeSet<String>> {
    named(model, |names| config.targets(names))
}

/// The modules that are trained as a whole.
///
/// # Errors
/// See [`LoraConfig::saved`].
pub fn saved(model: &ModelConfig, config: &LoraConfig) -> Result<BTreeSet<String>> {
    named(model, |names| config.saved(names))
}

fn named(
    model: &ModelConfig,
    choose: impl for<'a> Fn(&[(&'a str, Role)]) -> Result<Vec<&'a str>>,
) -> Result<BTreeSet<String>> {
    let modules = modules(model, &model.hf_names);
    let names: Vec<(&str, Role)> =
        modules.iter().map(|(name, shape)| (name.as_str(), shape.role)).collect();
    Ok(choose(&names)?.into_iter().map(str::to_owned).collect())
}

/// Adds this rank's rows of a matrix over the vocabulary, as they are, to the trained tensors.
fn add_whole(
    parameters: &mut Parameters,
    model: &ModelConfig,
    module: &str,
    matrix: &VocabParallel,
) -> ParameterId {
    let (weight, ids) = matrix.shared();
    let shape = [model.vocab_size, model.hidden_size];
    let cut = Cut { rows: ids.collect(), cols: 0..model.hidden_size };
    let id = parameters.add(module, Part::Whole, shape, cut, Sharing::Sharded);
    let span = parameters.of(id).span.clone();
    parameters.values[span].copy_from_slice(&weight.to_f32());
    id
}

/// Whether a model can be trained on a tensor-parallel group of `size`. A rank must have KV heads
/// of its own: shared ones would have their gradients in parts.
///
/// # Errors
/// An input error: the sizes that work; routed experts; a form that keeps apart what the
/// family's adapters take as one matrix.
pub fn check_trains(model: &ModelConfig, size: usize) -> Result<()> {
    let mut layers = 0..model.num_hidden_layers;
    if model.experts.as_ref().is_some_and(|e| layers.any(|i| !e.dense_layers.contains(&i))) {
        return Err(Error::input(format!(
            "farm finetune does not train {} models: gradients do not go through routed experts \
             yet",
            model.model_type
        )));
    }
    let (own, hf) = (&model.names, &model.hf_names);
    let splits_qkv = matches!(own.qkv, Qkv::Split(_)) && !matches!(hf.qkv, Qkv::Split(_));
    let is_fused = |gate_up: &GateUp| matches!(gate_up, GateUp::Concatenated(_));
    if splits_qkv || (is_fused(&hf.gate_up) && !is_fused(&own.gate_up)) {
        return Err(Error::input(format!(
            "this form of a {} model keeps apart what its adapters take as one matrix; train on \
             its Hugging Face form",
            model.model_type
        )));
    }
    model.check_tensor_parallel(size)?;
    let kv_heads = model.num_key_value_heads;
    if size > kv_heads && model.local_heads(size) < model.num_attention_heads {
        return Err(Error::input(format!(
            "--tensor-parallel {size} is more than the model's {kv_heads} KV heads, which farm \
             finetune does not split; use {kv_heads} or less"
        )));
    }
    Ok(())
}

/// `rows[id] += factor · d` for each token's gradient `d`, of the ids that are here.
fn add_to_rows(rows: &mut [f32], token_ids: &[u32], ids: Range<usize>, d: &[f32], factor: f32) {
    let width = d.len() / token_ids.len().max(1);
    for (id, d) in token_ids.iter().zip(d.chunks_exact(width.max(1))) {
        let id = *id as usize;
        if ids.contains(&id) {
            let row = &mut rows[(id - ids.start) * width..][..width];
            row.iter_mut().zip(d).for_each(|(row, d)| *row += factor * d);
        }
    }
}

fn select(x: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|row| &x[row * width..(row + 1) * width]).copied().collect()
}

fn spread(selected: &[f32], rows: &[usize], width: usize, len: usize) -> Vec<f32> {
    let mut all = vec![0.0; len];
    for (row, values) in rows.iter().zip(selected.chunks_exact(width)) {
        all[row * width..(row + 1) * width].copy_from_slice(values);
    }
    all
}
