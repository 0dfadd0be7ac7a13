//! The decoder: embedding, layers on a residual stream, projection to logits. One for all
//! families; what they differ in is in [`ModelConfig`].

use candle_core::Tensor;

use super::attention::{Attention, GroupedQkv};
use super::batch::{LogitsWanted, StepBatch};
use super::config::{Block, ModelConfig};
use super::kv_cache::{KvCache, LayerCache};
use super::layers::{Loader, Norm, VocabParallel};
use super::mlp::FeedForward;
use super::names::at;
use super::ops;
use super::step::{Rotations, Step};
use super::weights::Weight;
use crate::Result;
use crate::kernels::attention::Heads;
use crate::kernels::ops as kernel;

/// A model, or a tensor-parallel rank's share of one.
pub struct Decoder {
    heads: Heads,
    embed_tokens: VocabParallel,
    embedding_scale: Option<f32>,
    layers: Vec<DecoderLayer>,
    norm: Norm,
    lm_head: VocabParallel,
    final_logit_softcapping: Option<f32>,
    rotations: Rotations,
}

/// One layer.
pub(super) struct DecoderLayer {
    pub(super) block: Block,
    pub(super) input_norm: Norm,
    pub(super) attention: Attention,
    /// Norm of attention's output (Gemma).
    pub(super) post_attention_norm: Option<Norm>,
    /// Norm before the MLP; a parallel block with one norm has none.
    pub(super) mlp_norm: Option<Norm>,
    pub(super) mlp: FeedForward,
    /// Norm of the MLP's output (Gemma).
    pub(super) post_mlp_norm: Option<Norm>,
}

impl Decoder {
    /// Loads this rank's share.
    ///
    /// # Errors
    /// A tensor-parallel size that does not divide the model; a tensor that is
    /// missing or of another shape.
    pub fn load(l: &Loader) -> Result<Self> {
        let config = l.source.config();
        config.check_tensor_parallel(l.comm.size())?;
        let names = config.names;
        let (embed_tokens, lm_head) = load_vocabulary(l)?;
        let embed_tokens = embed_tokens.with_embedding_adapters(l)?;
        let lm_head = lm_head.with_logits_adapters(l)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| DecoderLayer::load(l, config, i, GroupedQkv::AsStored))
            .collect::<Result<_>>()?;
        Ok(Self {
            heads: Attention::heads(config, l.comm.size()),
            embed_tokens,
            embedding_scale: config.embedding_scale,
            layers,
            norm: Norm::load(l, config, names.norm, config.hidden_size)?,
            lm_head,
            final_logit_softcapping: config.final_logit_softcapping,
            rotations: Rotations::new(config),
        })
    }

    /// Heads on this rank.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// The weight matrices of this rank, each once.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        let tied = self.lm_head.shares_weight_with(&self.embed_tokens);
        let embed_tokens = (!tied).then_some(self.embed_tokens.weight());
        self.step_weights().chain(embed_tokens)
    }

    /// Those that a step streams: all but the embedding's look-ups.
    pub fn step_weights(&self) -> impl Iterator<Item = &Weight> {
        self.layers.iter().flat_map(DecoderLayer::weights).chain([self.lm_head.weight()])
    }

    /// One step: logits of the wanted rows, row-major over the vocabulary.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, batch: &StepBatch, cache: &mut KvCache) -> Result<Vec<f32>> {
        let step = Step::new(batch, &self.rotations);
        let mut x =
            self.embed_tokens.embed(&batch.token_ids, self.embedding_scale, &step.adapters)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &step, cache.layer(i))?;
        }
        let wanted = wanted_rows(batch);
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let x = self.norm.forward(&ops::select_rows(&x, &wanted)?)?;
        let mut logits = self.lm_head.logits(&x, &step.adapters.among(&wanted))?;
        if let Some(cap) = self.final_logit_softcapping {
            kernel::softcap(&mut logits, cap);
        }
        Ok(logits)
    }
}

/// Embedding and output projection, which may be one.
///
/// # Errors
/// See [`VocabParallel::load`].
pub fn load_vocabulary(l: &Loader) -> Result<(VocabParallel, VocabParallel)> {
    let config = l.source.config();
    let names = config.names;
    let shape = [config.vocab_size, config.hidden_size];
    let embed_tokens = VocabParallel::load(l, names.embed_tokens, shape)?;
    // Some tied checkpoints carry the output projection all the same.
    let has_head = l.source.contains(&format!("{}.weight", names.lm_head));
    let lm_head = if config.tie_word_embeddings && !has_head {
        embed_tokens.tied()
    } else {
        VocabParallel::load(l, names.lm_head, shape)?
    };
    Ok((embed_tokens, lm_head))
}

/// The rows whose logits are wanted, in order.
pub(super) fn wanted_rows(batch: &StepBatch) -> Vec<usize> {
    let mut rows = Vec::with_capacity(batch.num_logits_rows());
    let mut end = 0;
    for s in &batch.sequences {
        let first = end;
        end += s.num_tokens;
        match s.logits {
            LogitsWanted::None => {}
            LogitsWanted::Last => rows.push(end - 1),
            LogitsWanted::All => rows.extend(first..end),
        }
    }
    rows
}

impl DecoderLayer {
    /// Loads this rank's share of layer `layer`.
    pub(super) fn load(
        l: &Loader,
        config: &ModelConfig,
        layer: usize,
        grouped: GroupedQkv,
    ) -> Result<Self> {
        let names = config.names;
        let norm = |name: &str| Norm::load(l, config, &at(name, layer), config.hidden_size);
        let optional = |wanted: bool, name: &str| wanted.then(|| norm(name)).transpose();
        let post = config.block == Block::PostNorms;
        Ok(Self {
            block: config.block,
            input_norm: norm(names.input_norm)?,
            attention: Attention::load(l, config, layer, grouped)?,
            post_attention_norm: optional(post, names.post_norms[0])?,
            mlp_norm: optional(config.block != Block::Parallel, names.mlp_norm)?,
            mlp: FeedForward::load(l, config, layer)?,
            post_mlp_norm: optional(post, names.post_norms[1])?,
        })
    }

    fn forward(&self, x: &Tensor, step: &Step, cache: &mut LayerCache) -> Result<Tensor> {
        let normed = self.input_norm.forward(x)?;
        let attended = self.attention.forward(&normed, step, cache)?;
        if matches!(self.block, Block::Parallel | Block::ParallelTwoNorms) {
            let normed = match &self.mlp_norm {
                Some(norm) => norm.forward(x)?,
                None => normed,
            };
            let mut out = self.mlp.forward(&normed, &step.adapters)?;
            kernel::add_assign(&mut out, &attended);
            return ops::residual(x, out);
        }
        let x = ops::residual(x, post_normed(&self.post_attention_norm, attended)?)?;
        let normed = match &self.mlp_norm {
            Some(norm) => norm.forward(&x)?,
            None => x.clone(),
        };
        let out = self.mlp.forward(&normed, &step.adapters)?;
        ops::residual(&x, post_normed(&self.post_mlp_norm, out)?)
    }

    fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.attention.weights().chain(self.mlp.weights())
    }
}

fn post_normed(norm: &Option<Norm>, x: Vec<f32>) -> Result<Vec<f32>> {
    Ok(match norm {
        Some(norm) => norm.rows(&x),
        None => x,
    })
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
