//! The shape of a model: one description of a decoder, in HF's names, that every family
//! and every checkpoint format comes down to.
//!
//! What families differ in are switches here; how a family's `config.json` sets them is
//! said in [`super::families`], and what a format changes (names, the order of rotated
//! pairs) in [`super::checkpoint`].

use std::collections::BTreeSet;

use super::names::Names;
use crate::kernels::ops::Activation;
use crate::{Error, Result};

/// Shape of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// HF's name of the family.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the dense MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context of the positions as trained.
    pub max_position_embeddings: usize,
    /// The output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// The norms of the residual stream (and of queries and keys).
    pub norm: NormKind,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Queries and keys are normed, head by head, before they are rotated.
    pub qk_norm: bool,
    /// Q, K and V have biases.
    pub attention_bias: bool,
    /// The attention's output projection has a bias.
    pub output_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// How attention and MLP hang on the residual stream.
    pub block: Block,
    /// The MLP's activation.
    pub activation: Activation,
    /// The MLP multiplies its activation by a second projection.
    pub gated_mlp: bool,
    /// Routed experts in place of the MLP of some layers.
    pub experts: Option<ExpertsConfig>,
    /// Factor of the attention scores.
    pub attention_scale: f32,
    /// Scores become `cap·tanh(score / cap)` (Gemma 2).
    pub attn_logit_softcapping: Option<f32>,
    /// Logits likewise.
    pub final_logit_softcapping: Option<f32>,
    /// Factor of the embeddings (Gemma).
    pub embedding_scale: Option<f32>,
    /// Keys that a token sees, its own included, a layer; `None` sees all before it.
    pub layer_windows: Vec<Option<usize>>,
    /// How positions enter.
    pub positions: Positions,
    /// Where the tensors lie in the checkpoint.
    pub names: Names,
    /// Where they lie in the Hugging Face form of the family (adapters name those).
    pub hf_names: Names,
}

/// A kind of norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `weight · x / rms(x)`.
    Rms,
    /// `(1 + weight) · x / rms(x)` (Gemma's checkpoints).
    RmsPlusOne,
    /// Mean and variance, with a bias.
    Layer,
}

/// How attention and MLP hang on the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// `x += attn(norm(x)); x += mlp(norm(x))`.
    Sequential,
    /// The same with a norm of each output before the sum (Gemma).
    PostNorms,
    /// `x += attn(norm(x)) + mlp(norm(x))` with one norm (Falcon 7B).
    Parallel,
    /// The same with a norm each (Falcon 40B).
    ParallelTwoNorms,
}

/// Routed experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that a token passes.
    pub num_experts_per_tok: usize,
    /// Width of an expert.
    pub moe_intermediate_size: usize,
    /// The weights of a token's experts are made to sum to one.
    pub norm_topk_prob: bool,
    /// Layers that have a dense MLP instead.
    pub dense_layers: BTreeSet<usize>,
}

/// How positions enter the attention.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotated queries and keys; `local` for layers with a window where it differs.
    Rotary {
        /// All layers, or those without a window.
        global: RopeConfig,
        /// Layers with a window (Gemma 3).
        local: Option<RopeConfig>,
    },
    /// A bias that grows with the distance (Press et al. 2021).
    Alibi,
}

/// Rotary embedding: its base and how it is stretched.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Leading values of a head that are rotated; even.
    pub rotary_dim: usize,
    /// Pairs are neighbours (Meta's and llama.cpp's order of rows), not halves (HF's).
    pub interleaved: bool,
    /// How long contexts are scaled.
    pub scaling: RopeScaling,
}

/// HF's `rope_type`s (transformers' modeling_rope_utils.py).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// NTK-aware: the base grows with the length of the sequence.
    Dynamic {
        /// Stretch.
        factor: f64,
    },
    /// Llama 3.1's piecewise frequencies.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths above original / this are stretched whole.
        low_freq_factor: f64,
        /// Wavelengths below original / this are kept.
        high_freq_factor: f64,
        /// Context of the first training.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Stretch.
        factor: f64,
        /// Context of the first training.
        original_max_position_embeddings: usize,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Factor of cos and sin.
        attention_factor: f64,
        /// Correction range rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (Ding et al. 2024): a divisor a frequency, two sets by length.
    LongRope {
        /// Divisors up to the original context.
        short_factor: Vec<f32>,
        /// Divisors beyond it.
        long_factor: Vec<f32>,
        /// Context of the first training.
        original_max_position_embeddings: usize,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
    /// A divisor a frequency, as GGUF's `rope_freqs.weight` holds them.
    Divisors(Vec<f32>),
}

impl ModelConfig {
    /// Refuses sizes that cannot be or do not fit together.
    ///
    /// # Errors
    /// An input error that names the setting.
    pub fn check_sizes(&self) -> Result<()> {
        // Beyond any model, and so small that their products fit.
        let bounded = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 22),
            ("num_hidden_layers", self.num_hidden_layers, 10_000),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 14),
            ("vocab_size", self.vocab_size, 1 << 26),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 30),
        ];
        if let Some((name, n, _)) = bounded.iter().find(|(_, n, max)| !(1..=*max).contains(n)) {
            return Err(Error::input(format!("{name} {n} is out of range")));
        }
        if !(0.0..1.0).contains(&self.norm_eps) {
            return Err(Error::input(format!("the norms' eps {} is out of range", self.norm_eps)));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::input(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::input(format!("head_dim {} is odd", self.head_dim)));
        }
        if let Positions::Rotary { global, local } = &self.positions {
            for rope in std::iter::once(global).chain(local) {
                rope.check(self.head_dim)?;
            }
        }
        if let Some(experts) = &self.experts {
            experts.check()?;
        }
        Ok(())
    }

    /// Longest sequence that the positions allow, prompt and new tokens together.
    pub fn max_context(&self) -> usize {
        let stretched = |n: usize, factor: f64| (n as f64 * factor) as usize;
        let Positions::Rotary { global, .. } = &self.positions else {
            return self.max_position_embeddings;
        };
        match global.scaling {
            // Gemma 3 and others name the stretched context already.
            RopeScaling::Linear { .. } if self.model_type.starts_with("gemma") => {
                self.max_position_embeddings
            }
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                stretched(self.max_position_embeddings, factor.max(1.0))
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings: n, .. } => {
                stretched(n, factor).max(self.max_position_embeddings)
            }
            _ => self.max_position_embeddings,
        }
    }

    /// How the heads are shared out over a tensor-parallel group of `size`.
    pub fn attention_split(&self, size: usize) -> Option<AttentionSplit> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let kv_fits = kv_heads.is_multiple_of(size) || size.is_multiple_of(kv_heads);
        if heads.is_multiple_of(size) && kv_fits {
            return Some(AttentionSplit::Heads);
        }
        // Falcon 7B has 71 heads over one: no size divides them, and its attention is a
        // small part of its weights.
        (kv_heads == 1).then_some(AttentionSplit::Replicated)
    }

    /// Whether the model can be split over a tensor-parallel group of `size`.
    pub fn can_split(&self, size: usize) -> bool {
        let mlp = |n: usize| match &self.experts {
            Some(experts) => experts.num_experts.is_multiple_of(n),
            None => self.intermediate_size.is_multiple_of(n),
        };
        size >= 1 && mlp(size) && self.attention_split(size).is_some()
    }

    /// Refuses tensor-parallel sizes that the model cannot be split over.
    ///
    /// # Errors
    /// An input error that lists the sizes that work.
    pub fn check_tensor_parallel(&self, size: usize) -> Result<()> {
        if self.can_split(size) {
            return Ok(());
        }
        let sizes = (1..=self.num_attention_heads).filter(|n| self.can_split(*n));
        let sizes: Vec<String> = sizes.map(|n| n.to_string()).collect();
        let mlp = match &self.experts {
            Some(experts) => format!("{} experts", experts.num_experts),
            None => format!("intermediate size {}", self.intermediate_size),
        };
        Err(Error::input(format!(
            "--tensor-parallel {size} does not divide this model ({} heads, {} KV heads, {mlp}); \
             sizes that work: {}",
            self.num_attention_heads,
            self.num_key_value_heads,
            sizes.join(", ")
        )))
    }

    /// Query heads of a rank in a tensor-parallel group of `size`.
    pub fn local_heads(&self, size: usize) -> usize {
        match self.attention_split(size) {
            Some(AttentionSplit::Heads) => self.num_attention_heads / size,
            _ => self.num_attention_heads,
        }
    }

    /// KV heads of a rank; one is copied to several ranks where the group is larger.
    pub fn local_kv_heads(&self, size: usize) -> usize {
        match self.attention_split(size) {
            Some(AttentionSplit::Heads) => (self.num_key_value_heads / size).max(1),
            _ => self.num_key_value_heads,
        }
    }

    /// The same shape with another order of rotated pairs.
    pub fn with_interleaved_pairs(mut self) -> Self {
        if let Positions::Rotary { global, local } = &mut self.positions {
            for rope in std::iter::once(global).chain(local) {
                rope.interleaved = true;
            }
        }
        self
    }

    /// Floating-point operations of one token's matrix products (two a parameter),
    /// without attention over the context.
    pub fn flops_per_token(&self) -> u64 {
        2 * self.matrix_parameters(|experts| experts.num_experts_per_tok)
    }

    /// Floating-point operations of attention for one token that sees `context` keys.
    pub fn attention_flops(&self, context: usize) -> u64 {
        let seen = |window: &Option<usize>| window.map_or(context, |w| w.min(context)) as u64;
        let keys: u64 = self.layer_windows.iter().map(seen).sum();
        4 * (self.num_attention_heads * self.head_dim) as u64 * keys
    }

    /// Parameters of all matrices: the embedding counted once where it is tied.
    pub fn parameters(&self) -> u64 {
        let embedding = (self.hidden_size * self.vocab_size) as u64;
        let embedding = if self.tie_word_embeddings { 0 } else { embedding };
        self.matrix_parameters(|experts| experts.num_experts) + embedding
    }

    /// Parameters of the layers' matrices, with `count` of the experts, and of the output
    /// projection.
    fn matrix_parameters(&self, count: impl Fn(&ExpertsConfig) -> usize) -> u64 {
        let (h, d) = (self.hidden_size as u64, self.head_dim as u64);
        let heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) as u64;
        let matrices = if self.gated_mlp { 3 } else { 2 };
        let mlp = |width: usize| matrices * h * width as u64;
        let layer = |i: usize| match &self.experts {
            Some(e) if !e.dense_layers.contains(&i) => {
                count(e) as u64 * mlp(e.moe_intermediate_size) + h * e.num_experts as u64
            }
            _ => mlp(self.intermediate_size),
        };
        let layers: u64 = (0..self.num_hidden_layers).map(|i| h * d * heads + layer(i)).sum();
        layers + h * self.vocab_size as u64
    }

    /// Bytes of one KV cache block of `block_size` tokens over all layers, with
    /// `kv_heads` heads on this rank in f32.
    pub fn kv_block_bytes(&self, kv_heads: usize, block_size: usize) -> usize {
        let values = self.num_hidden_layers * kv_heads * self.head_dim;
        (2 * block_size * size_of::<f32>()).saturating_mul(values)
    }
}

/// How attention is shared out over a tensor-parallel group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionSplit {
    /// Each rank has some heads.
    Heads,
    /// Each rank has all of them.
    Replicated,
}

impl RopeConfig {
    fn check(&self, head_dim: usize) -> Result<()> {
        let pairs = self.rotary_dim / 2;
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > head_dim
        {
            return Err(Error::input(format!(
                "partial_rotary_factor: {} of a head's {head_dim} values cannot be rotated",
                self.rotary_dim
            )));
        }
        let factor = match self.scaling {
            RopeScaling::Linear { factor }
            | RopeScaling::Dynamic { factor }
            | RopeScaling::Llama3 { factor, .. }
            | RopeScaling::Yarn { factor, .. } => factor,
            _ => 1.0,
        };
        if !(factor > 0.0 && factor <= 1e6) {
            return Err(Error::input(format!("the rotary factor {factor} is out of range")));
        }
        let sets: Vec<&Vec<f32>> = match &self.scaling {
            RopeScaling::LongRope { short_factor, long_factor, .. } => {
                vec![short_factor, long_factor]
            }
            RopeScaling::Divisors(divisors) => vec![divisors],
            _ => vec![],
        };
        match sets.iter().find(|set| set.len() != pairs) {
            Some(set) => Err(Error::input(format!(
                "the rotary embedding has {} factors for {pairs} pairs of values",
                set.len()
            ))),
            None => Ok(()),
        }
    }
}

impl ExpertsConfig {
    fn check(&self) -> Result<()> {
        let n = self.num_experts;
        if n == 0 || n > 1 << 12 || !(1..=n).contains(&self.num_experts_per_tok) {
            return Err(Error::input(format!(
                "{} of {n} experts a token is out of range",
                self.num_experts_per_tok
            )));
        }
        if self.moe_intermediate_size == 0 || self.moe_intermediate_size > 1 << 20 {
            return Err(Error::input("moe_intermediate_size is out of range"));
        }
        Ok(())
    }
}
