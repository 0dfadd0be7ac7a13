//! The model in training: the frozen decoder with its trained products, forward to the loss
//! and backward to their gradients.

use std::collections::BTreeSet;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use super::batch::MicroBatch;
use super::layer::{Builder, Layer, Pass};
use super::linear::{Linear, Split};
use super::lora::{LoraConfig, layer_of};
use super::loss::LossHead;
use super::parameters::{Cut, ParameterId, Parameters, Part, Sharing};
use crate::comm::TensorComm;
use crate::kernels::ops as kernel;
use crate::model::adapter::RowAdapters;
use crate::model::adapter::modules::{Role, modules};
use crate::model::config::ModelConfig;
use crate::model::decoder::load_vocabulary;
use crate::model::layers::{Loader, Norm, VocabParallel};
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
    embed_tokens: VocabParallel,
    /// The embedding's own values, where it is trained.
    trained_embedding: Option<ParameterId>,
    embedding_scale: Option<f32>,
    layers: Vec<Layer>,
    norm: Norm,
    head: LossHead,
    rotations: Rotations,
    /// The first layer with something to train; nothing goes back beyond it.
    first_trained: usize,
    recompute: Recompute,
    group: Arc<dyn TensorComm>,
    /// The trained tensors.
    pub parameters: Parameters,
}

impl TrainedModel {
    /// Loads this rank's share, with fresh trained tensors. Collective.
    ///
    /// # Errors
    /// Input errors: modules that the model does not have, a model that farm does not train or
    /// not split so, a tensor that is missing or of another shape.
    pub fn load(l: &Loader, config: &LoraConfig, seed: u64, recompute: Recompute) -> Result<Self> {
        let model = l.source.config();
        check_split(model, l.comm.size())?;
        let targets = targets(model, config)?;
        let parameters = Parameters::default();
        let mut b = Builder { loader: l, config, targets, seed, parameters };
        let (embed_tokens, lm_head) = load_vocabulary(l)?;
        let layers = (0..model.num_hidden_layers)
            .map(|layer| Layer::load(&mut b, layer))
            .collect::<Result<Vec<_>>>()?;
        let (weight, ids) = lm_head.shared();
        let saved = saved(model, config)?;
        let head = match saved.contains(model.hf_names.lm_head) {
            true => {
                let id = add_whole(&mut b.parameters, model, model.hf_names.lm_head, &lm_head);
                Linear::trained(id, [ids.len(), model.hidden_size], l.comm.clone())
            }
            false => {
                let head = Linear::frozen(weight, None, Split::Column, l.comm.clone());
                b.head(head, ids.clone())
            }
        };
        let trained_embedding = saved.contains(model.hf_names.embed_tokens).then(|| {
            add_whole(&mut b.parameters, model, model.hf_names.embed_tokens, &embed_tokens)
        });
        let first = match trained_embedding {
            Some(_) => Some(0),
            None => b.targets.iter().filter_map(|name| layer_of(name)).min(),
        };
        let mut parameters = b.parameters;
        parameters.draw(seed);
        let mut trained = Self {
            embed_tokens,
            trained_embedding,
            embedding_scale: model.embedding_scale,
            first_trained: first.unwrap_or(layers.len()),
            layers,
            norm: Norm::load(l, model, model.names.norm, model.hidden_size)?,
            head: LossHead { linear: head, ids, softcap: model.final_logit_softcapping },
            rotations: Rotations::new(model),
            recompute,
            group: l.comm.clone(),
            parameters,
        };
        trained.refresh();
        Ok(trained)
    }

    /// To call after every change of the trained tensors. Collective.
    pub fn refresh(&mut self) {
        let Self { layers, head, parameters, .. } = self;
        let linears = layers.iter_mut().flat_map(Layer::linears_mut).chain([&mut head.linear]);
        linears.for_each(|linear| linear.refresh(parameters));
    }

    /// The loss of a micro-batch, summed over its counted tokens, and `weight` times its
    /// gradients added to the trained tensors'. Collective in the tensor-parallel group.
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
        let (rows, targets) = batch.targets();
        let as_step = batch.as_step();
        let step = Step::new(&as_step, &self.rotations);
        let tokens = batch.tokens(weight.is_some());
        let mut x = self.embedded(&batch.token_ids)?;
        let Self { layers, parameters, .. } = self;
        let segments = &batch.segments;
        let mut pass = Pass { parameters, step: &step, segments, tokens: &tokens };

        let mut kept = Vec::new();
        for (i, layer) in layers.iter().enumerate() {
            let recomputed = weight.is_none() || self.recompute.includes(i);
            let (out, layer_kept) = layer.forward(&pass, x, recomputed);
            if weight.is_some() && i >= self.first_trained {
                kept.push(layer_kept);
            }
            x = out;
        }
        let width = self.norm.width();
        let selected = select(&x, &rows, width);
        let len = x.len();
        drop(x);
        let normed = self.norm.rows(&selected);
        let numbers = rows.iter().map(|row| tokens.numbers[*row]).collect();
        let of_rows = super::linear::Tokens { training: tokens.training, numbers };
        let p = &mut *pass.parameters;
        let loss = self.head.run(p, &*self.group, &normed, &targets, &of_rows, weight);
        if !kept.is_empty() {
            let dx = self.norm.backward(&selected, &loss.dx);
            drop((selected, normed));
            let mut dx = spread(&dx, &rows, width, len);
            for (i, layer) in layers.iter().enumerate().skip(self.first_trained).rev() {
                let Some(kept) = kept.pop() else { break };
                let wanted = i > self.first_trained || self.trained_embedding.is_some();
                dx = layer.backward(&mut pass, kept, dx, wanted);
            }
            if let Some(id) = self.trained_embedding {
                let (_, ids) = self.embed_tokens.shared();
                let factor = self.embedding_scale.unwrap_or(1.0);
                let gradient = pass.parameters.gradient_of(id);
                add_to_rows(gradient, &batch.token_ids, ids, &dx, factor);
            }
        }
        Ok(loss.sum)
    }

    fn embedded(&self, token_ids: &[u32]) -> Result<Vec<f32>> {
        let Some(id) = self.trained_embedding else {
            let none = RowAdapters::default();
            let x = self.embed_tokens.embed(token_ids, self.embedding_scale, &none)?;
            return ops::with_values(&x, <[f32]>::to_vec);
        };
        let (width, (_, ids)) = (self.norm.width(), self.embed_tokens.shared());
        let values = self.parameters.values_of(id);
        let mut x = vec![0.0; token_ids.len() * width];
        for (id, x) in token_ids.iter().zip(x.chunks_exact_mut(width)) {
            if let Some(row) = (*id as usize).checked_sub(ids.start).filter(|row| *row < ids.len())
            {
                x.copy_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
        self.group.all_reduce_sum(&mut x);
        kernel::scale(&mut x, self.embedding_scale.unwrap_or(1.0));
        Ok(x)
    }

    /// Floating-point operations that a trained token needs at least, over all ranks of the
    /// group: 2 a weight forward, 2 backward for the inputs' gradients (none below the first
    /// trained layer). Products of rank r, attention and recomputation come on top.
    pub fn flops_a_token(&self) -> f64 {
        let weights = |linear: &Linear| (linear.outputs() * linear.inputs()) as f64;
        let layers = self.layers.iter().enumerate().map(|(i, layer)| {
            let factor = if i < self.first_trained { 2.0 } else { 4.0 };
            factor * layer.linears().map(weights).sum::<f64>()
        });
        let own = layers.sum::<f64>() + 4.0 * weights(&self.head.linear);
        own * self.group.size() as f64
    }

    /// The ranks that share the model.
    pub fn group(&self) -> &Arc<dyn TensorComm> {
        &self.group
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

/// A rank must have KV heads of its own: shared ones would have their gradients in parts.
///
/// # Errors
/// An input error with the sizes that work.
pub fn check_split(model: &ModelConfig, size: usize) -> Result<()> {
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
