//! `config.json`: the shape of a model, in HF's names.
//!
//! Both spellings of the rotary configuration are read: `rope_theta` with
//! `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).

use std::path::Path;

use serde::Deserialize;

use crate::{Error, Result};

/// Shape of a Llama-architecture model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// HF's name of the family.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
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
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f32,
    /// Longest context of the positions as trained.
    pub max_position_embeddings: usize,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// The output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Q, K, V and O have biases.
    pub attention_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// EOS ids that config.json names.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary embedding: its base and how it is stretched.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How long contexts are scaled.
    pub scaling: RopeScaling,
}

/// HF's `rope_type`s for Llama (transformers' modeling_rope_utils.py).
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
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f32,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    quantization_config: Option<serde_json::Value>,
    eos_token_id: Option<OneOrMany>,
}

// The defaults of transformers' LlamaConfig.
fn default_eps() -> f32 {
    1e-6
}
fn default_positions() -> usize {
    2048
}
const DEFAULT_THETA: f64 = 10_000.0;

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

#[derive(Deserialize, Default, Clone)]
struct RawRope {
    rope_type: Option<String>,
    /// The oldest spelling of `rope_type`.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

impl ModelConfig {
    /// Reads `DIR/config.json`.
    ///
    /// # Errors
    /// Input errors that name the file: missing, not JSON, a family or a setting
    /// that is not supported, sizes that do not fit together.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
        Self::parse(&text).map_err(|e| e.context(path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|e| Error::input(format!("not usable: {e}")))?;
        raw.refuse_unsupported()?;
        let heads = raw.num_attention_heads;
        let config = Self {
            model_type: raw.model_type.clone().unwrap_or_else(|| "llama".into()),
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / heads.max(1)),
            vocab_size: raw.vocab_size,
            rms_norm_eps: raw.rms_norm_eps,
            max_position_embeddings: raw.max_position_embeddings,
            rope: raw.rope()?,
            tie_word_embeddings: raw.tie_word_embeddings,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            eos_token_ids: match raw.eos_token_id {
                None => Vec::new(),
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
            },
        };
        config.check_sizes()?;
        Ok(config)
    }

    fn check_sizes(&self) -> Result<()> {
        let positive = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, n)| *n == 0 || *n > 1 << 30) {
            return Err(Error::input(format!("{name} is out of range")));
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
        Ok(())
    }

    /// Longest sequence that the positions allow, prompt and new tokens together.
    pub fn max_context(&self) -> usize {
        let stretched = |n: usize, factor: f64| (n as f64 * factor) as usize;
        match self.rope.scaling {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => {
                stretched(self.max_position_embeddings, factor.max(1.0))
            }
            RopeScaling::Yarn { factor, original_max_position_embeddings: n, .. } => {
                stretched(n, factor).max(self.max_position_embeddings)
            }
            _ => self.max_position_embeddings,
        }
    }

    /// Refuses tensor-parallel sizes that do not divide the model.
    ///
    /// # Errors
    /// An input error that lists the sizes that work.
    pub fn check_tensor_parallel(&self, size: usize) -> Result<()> {
        let works = |n: usize| {
            let kv = self.num_key_value_heads;
            self.num_attention_heads.is_multiple_of(n)
                && self.intermediate_size.is_multiple_of(n)
                && (kv.is_multiple_of(n) || n.is_multiple_of(kv))
        };
        if size >= 1 && works(size) {
            return Ok(());
        }
        let sizes: Vec<String> =
            (1..=self.num_attention_heads).filter(|n| works(*n)).map(|n| n.to_string()).collect();
        Err(Error::input(format!(
            "--tensor-parallel {size} does not divide this model ({} heads, {} KV heads, \
             intermediate size {}); sizes that work: {}",
            self.num_attention_heads,
            self.num_key_value_heads,
            self.intermediate_size,
            sizes.join(", ")
        )))
    }

    /// Floating-point operations of one token's matrix products (two a parameter),
    /// without attention over the context.
    pub fn flops_per_token(&self) -> u64 {
        2 * self.matrix_parameters()
    }

    /// Floating-point operations of attention for one token that sees `context` keys.
    pub fn attention_flops(&self, context: usize) -> u64 {
        4 * (self.num_hidden_layers * self.num_attention_heads * self.head_dim * context) as u64
    }

    /// Parameters of the matrices that every token passes, the output projection
    /// included, the embedding (a look-up) not.
    pub fn matrix_parameters(&self) -> u64 {
        let (h, d) = (self.hidden_size as u64, self.head_dim as u64);
        let heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) as u64;
        let layer = h * d * heads + 3 * h * self.intermediate_size as u64;
        layer * self.num_hidden_layers as u64 + h * self.vocab_size as u64
    }

    /// Bytes of one KV cache block of `block_size` tokens over all layers, with
    /// `kv_heads` heads on this rank in f32.
    pub fn kv_block_bytes(&self, kv_heads: usize, block_size: usize) -> usize {
        2 * self.num_hidden_layers * kv_heads * self.head_dim * block_size * size_of::<f32>()
    }
}

impl RawConfig {
    fn refuse_unsupported(&self) -> Result<()> {
        let family = self.model_type.as_deref().unwrap_or("llama");
        if !matches!(family, "llama" | "mistral") {
            return Err(Error::input(format!(
                "model_type {family:?} is not supported; supported: llama, mistral (without a \
                 sliding window)"
            )));
        }
        if let Some(window) = self.sliding_window
            && window < self.max_position_embeddings
        {
            return Err(Error::input(format!("sliding_window {window} is not supported")));
        }
        if self.quantization_config.is_some() {
            return Err(Error::input("quantization_config: quantized checkpoints are not read"));
        }
        match self.hidden_act.as_deref() {
            None | Some("silu" | "swish") => Ok(()),
            Some(other) => Err(Error::input(format!("hidden_act {other:?} is not supported"))),
        }
    }

    fn rope(&self) -> Result<RopeConfig> {
        let raw = self.rope_parameters.clone().or(self.rope_scaling.clone()).unwrap_or_default();
        let theta = raw.rope_theta.or(self.rope_theta).unwrap_or(DEFAULT_THETA);
        if raw.partial_rotary_factor.is_some_and(|f| f != 1.0) {
            return Err(Error::input("partial_rotary_factor is not supported"));
        }
        let kind = raw.rope_type.as_deref().or(raw.old_type.as_deref()).unwrap_or("default");
        let need = |value: Option<f64>, name: &str| {
            value.ok_or_else(|| Error::input(format!("rope_type {kind:?} needs {name}")))
        };
        let original = raw.original_max_position_embeddings.unwrap_or(self.max_position_embeddings);
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: need(raw.factor, "factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: need(raw.factor, "factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need(raw.factor, "factor")?,
                low_freq_factor: need(raw.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(raw.high_freq_factor, "high_freq_factor")?,
                original_max_position_embeddings: original,
            },
            "yarn" => {
                let factor =
                    raw.factor.unwrap_or(self.max_position_embeddings as f64 / original as f64);
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: raw.beta_fast.unwrap_or(32.0),
                    beta_slow: raw.beta_slow.unwrap_or(1.0),
                    attention_factor: raw.yarn_attention_factor(factor),
                    truncate: raw.truncate.unwrap_or(true),
                }
            }
            other => {
                return Err(Error::input(format!(
                    "rope_type {other:?} is not supported; supported: default, linear, dynamic, \
                     llama3, yarn"
                )));
            }
        };
        Ok(RopeConfig { theta, scaling })
    }
}

impl RawRope {
    /// `_compute_yarn_parameters` in transformers' modeling_rope_utils.py.
    fn yarn_attention_factor(&self, factor: f64) -> f64 {
        let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(given), ..) => given,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
            _ => mscale(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: &str = r#""hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100"#;

    fn parse(rest: &str) -> Result<ModelConfig> {
        ModelConfig::parse(&format!("{{{SHAPE}, {rest}}}"))
    }

    #[test]
    fn both_spellings_of_the_rotary_configuration_mean_the_same() {
        let old = parse(
            r#""rope_theta": 5e5, "max_position_embeddings": 4096, "rope_scaling":
               {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                "original_max_position_embeddings": 1024}"#,
        );
        let new = parse(
            r#""max_position_embeddings": 4096, "rope_parameters":
               {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "low_freq_factor": 1,
                "high_freq_factor": 4, "original_max_position_embeddings": 1024}"#,
        );
        assert_eq!(old.unwrap(), new.unwrap());
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (json, word) in [
            (r#""model_type": "gpt2""#, "gpt2"),
            (r#""rope_scaling": {"rope_type": "longrope"}"#, "longrope"),
            (r#""rope_scaling": {"rope_type": "linear"}"#, "factor"),
            (r#""quantization_config": {}"#, "quantization_config"),
            (r#""hidden_act": "gelu""#, "gelu"),
            (r#""model_type": "mistral", "sliding_window": 16"#, "sliding_window"),
            (r#""head_dim": 3"#, "head_dim"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.message.contains(word), "{error}");
            assert_eq!(error.kind, crate::ErrorKind::Input);
        }
    }

    #[test]
    fn tensor_parallel_sizes_that_do_not_divide_are_refused_with_those_that_do() {
        let config = parse(r#""rope_theta": 1e4"#).unwrap();
        for good in [1, 2, 4, 8] {
            config.check_tensor_parallel(good).unwrap();
        }
        let error = config.check_tensor_parallel(3).unwrap_err();
        assert!(error.message.ends_with("sizes that work: 1, 2, 4, 8"), "{error}");
    }
}
