//! `config.json` as it is written, for all families, and the decoder that most of its
//! fields describe alike.
//!
//! Both spellings of the rotary configuration are read: `rope_theta` with
//! `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;

use crate::kernels::ops::Activation;
use crate::model::config::{Block, ModelConfig, NormKind, Positions, RopeConfig, RopeScaling};
use crate::model::names::LLAMA;
use crate::{Error, Result};

/// The fields of `config.json` that any family reads.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct RawConfig {
    pub model_type: Option<String>,
    pub hidden_size: Option<usize>,
    pub intermediate_size: Option<usize>,
    pub num_hidden_layers: Option<usize>,
    pub num_attention_heads: Option<usize>,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub vocab_size: Option<usize>,
    pub rms_norm_eps: Option<f32>,
    pub layer_norm_epsilon: Option<f32>,
    pub max_position_embeddings: Option<usize>,
    pub original_max_position_embeddings: Option<usize>,
    pub rope_theta: Option<f64>,
    pub rope_local_base_freq: Option<f64>,
    pub rope_scaling: Option<RawRope>,
    pub rope_parameters: Option<RawRopes>,
    pub partial_rotary_factor: Option<f64>,
    pub tie_word_embeddings: Option<bool>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub hidden_act: Option<String>,
    pub sliding_window: Option<usize>,
    pub use_sliding_window: Option<bool>,
    pub max_window_layers: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    pub sliding_window_pattern: Option<usize>,
    pub query_pre_attn_scalar: Option<f64>,
    pub attn_logit_softcapping: Option<f32>,
    pub final_logit_softcapping: Option<f32>,
    pub use_bidirectional_attention: Option<bool>,
    // Falcon.
    pub alibi: Option<bool>,
    pub bias: Option<bool>,
    pub multi_query: Option<bool>,
    pub parallel_attn: Option<bool>,
    pub new_decoder_architecture: Option<bool>,
    pub num_ln_in_parallel_attn: Option<usize>,
    pub ffn_hidden_size: Option<usize>,
    // Experts.
    pub num_local_experts: Option<usize>,
    pub num_experts_per_tok: Option<usize>,
    pub moe_intermediate_size: Option<usize>,
    pub norm_topk_prob: Option<bool>,
    pub decoder_sparse_step: Option<usize>,
    pub mlp_only_layers: Option<BTreeSet<usize>>,
    pub quantization_config: Option<serde_json::Value>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
pub(super) struct RawRope {
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
    short_factor: Option<Vec<f32>>,
    long_factor: Option<Vec<f32>>,
    /// Divisors of a GGUF file (never in a config.json).
    divisors: Option<Vec<f32>>,
}

/// Fields that families spell in several ways; files may hold more than one of them.
const SPELLINGS: [(&str, &[&str]); 5] = [
    ("num_hidden_layers", &["n_layer"]),
    ("num_attention_heads", &["n_head"]),
    ("num_key_value_heads", &["num_kv_heads", "n_head_kv"]),
    ("hidden_act", &["hidden_activation", "activation"]),
    ("num_local_experts", &["num_experts"]),
];

/// Gives every field the spelling that [`RawConfig`] reads.
pub(super) fn respell(config: &mut serde_json::Value) {
    let Some(fields) = config.as_object_mut() else { return };
    for (name, others) in SPELLINGS {
        for other in others {
            if let Some(value) = fields.get(*other).filter(|value| !value.is_null()).cloned()
                && fields.get(name).is_none_or(serde_json::Value::is_null)
            {
                fields.insert(name.to_owned(), value);
            }
        }
    }
}

/// `rope_parameters`: one for all layers, or one a kind of layer.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
pub(super) enum RawRopes {
    Kinds(HashMap<String, RawRope>),
    All(Box<RawRope>),
}

impl RawRopes {
    fn of(&self, kind: &str) -> Option<RawRope> {
        match self {
            RawRopes::All(rope) => Some((**rope).clone()),
            RawRopes::Kinds(kinds) => kinds.get(kind).cloned(),
        }
    }
}

fn missing(name: &str) -> Error {
    Error::input(format!("{name} is missing"))
}

impl RawConfig {
    /// The name of the family.
    pub fn family(&self) -> &str {
        self.model_type.as_deref().unwrap_or("llama")
    }

    /// Number of layers, within reason: lists a layer are made of it.
    pub fn layers(&self) -> Result<usize> {
        match self.num_hidden_layers.ok_or_else(|| missing("num_hidden_layers"))? {
            n @ 1..=10_000 => Ok(n),
            n => Err(Error::input(format!("num_hidden_layers {n} is out of range"))),
        }
    }

    /// A Llama with this configuration's sizes: where families begin. The defaults are
    /// those of transformers' LlamaConfig.
    pub fn llama(&self) -> Result<ModelConfig> {
        self.decoder(self.head_dim, self.intermediate_size.or(self.moe_intermediate_size))
    }

    /// The same with these sizes; heads share the width of the stream where none is given.
    pub fn decoder(
        &self,
        head_dim: Option<usize>,
        intermediate_size: Option<usize>,
    ) -> Result<ModelConfig> {
        let hidden_size = self.hidden_size.ok_or_else(|| missing("hidden_size"))?;
        let heads = self.num_attention_heads.ok_or_else(|| missing("num_attention_heads"))?;
        let head_dim = head_dim.unwrap_or(hidden_size / heads.max(1));
        let layers = self.layers()?;
        Ok(ModelConfig {
            model_type: self.family().to_owned(),
            hidden_size,
            intermediate_size: intermediate_size.ok_or_else(|| missing("intermediate_size"))?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim,
            vocab_size: self.vocab_size.ok_or_else(|| missing("vocab_size"))?,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(2048),
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            norm: NormKind::Rms,
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            qk_norm: false,
            attention_bias: self.attention_bias.unwrap_or(false),
            output_bias: self.attention_bias.unwrap_or(false),
            mlp_bias: self.mlp_bias.unwrap_or(false),
            block: Block::Sequential,
            activation: self.activation(Activation::Silu)?,
            gated_mlp: true,
            experts: None,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attn_logit_softcapping: None,
            final_logit_softcapping: None,
            embedding_scale: None,
            layer_windows: vec![None; layers],
            positions: Positions::Rotary { global: self.rope(head_dim, 10_000.0)?, local: None },
            names: LLAMA,
            hf_names: LLAMA,
        })
    }

    /// The activation of the MLP.
    pub fn activation(&self, default: Activation) -> Result<Activation> {
        Ok(match self.hidden_act.as_deref() {
            None => default,
            Some("silu" | "swish") => Activation::Silu,
            Some("gelu") => Activation::Gelu,
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Activation::GeluTanh,
            Some(other) => {
                return Err(Error::input(format!("hidden_act {other:?} is not supported")));
            }
        })
    }

    /// The window of the layers that `layer_types` calls sliding; without the list, of
    /// those that `is_sliding` says.
    pub fn windows(&self, is_sliding: impl Fn(usize) -> bool) -> Result<Vec<Option<usize>>> {
        let layers = self.layers()?;
        let Some(window) = self.sliding_window else { return Ok(vec![None; layers]) };
        if window == 0 {
            return Err(Error::input("sliding_window 0 is out of range"));
        }
        let Some(types) = &self.layer_types else {
            return Ok((0..layers).map(|i| is_sliding(i).then_some(window)).collect());
        };
        if types.len() != layers {
            return Err(Error::input(format!(
                "layer_types has {} entries for {layers} layers",
                types.len()
            )));
        }
        let of = |kind: &String| match kind.as_str() {
            "sliding_attention" => Ok(Some(window)),
            "full_attention" => Ok(None),
            other => Err(Error::input(format!("layer_types: {other:?} is not supported"))),
        };
        types.iter().map(of).collect()
    }

    /// The rotary embedding of all layers, or of those without a window.
    pub fn rope(&self, head_dim: usize, default_theta: f64) -> Result<RopeConfig> {
        let new = self.rope_parameters.as_ref().and_then(|ropes| ropes.of("full_attention"));
        let raw = new.or(self.rope_scaling.clone()).unwrap_or_default();
        self.rope_of(&raw, head_dim, raw.rope_theta.or(self.rope_theta).unwrap_or(default_theta))
    }

    /// That of the layers with a window, which is never scaled but by its own parameters.
    pub fn local_rope(&self, head_dim: usize, default_theta: f64) -> Result<RopeConfig> {
        let new = self.rope_parameters.as_ref().and_then(|ropes| ropes.of("sliding_attention"));
        let raw = new.unwrap_or_default();
        let theta = raw.rope_theta.or(self.rope_local_base_freq).unwrap_or(default_theta);
        self.rope_of(&raw, head_dim, theta)
    }

    fn rope_of(&self, raw: &RawRope, head_dim: usize, theta: f64) -> Result<RopeConfig> {
        let share = raw.partial_rotary_factor.or(self.partial_rotary_factor).unwrap_or(1.0);
        let rotary_dim = (head_dim as f64 * share) as usize;
        let scaling = raw.scaling(self)?;
        if !(theta.is_finite() && theta > 0.0) {
            return Err(Error::input(format!("rope_theta {theta} is out of range")));
        }
        Ok(RopeConfig { theta, rotary_dim, interleaved: false, scaling })
    }
}

impl RawRope {
    fn scaling(&self, config: &RawConfig) -> Result<RopeScaling> {
        if let Some(divisors) = &self.divisors {
            return Ok(RopeScaling::Divisors(divisors.clone()));
        }
        let kind = self.rope_type.as_deref().or(self.old_type.as_deref()).unwrap_or("default");
        let need = |value: Option<f64>, name: &str| {
            value.ok_or_else(|| Error::input(format!("rope_type {kind:?} needs {name}")))
        };
        let max_positions = config.max_position_embeddings.unwrap_or(2048);
        let original = self
            .original_max_position_embeddings
            .or(config.original_max_position_embeddings)
            .unwrap_or(max_positions)
            .max(1);
        let stretch = self.factor.unwrap_or(max_positions as f64 / original as f64);
        Ok(match kind {
            "default" | "mrope" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: need(self.factor, "factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: need(self.factor, "factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: need(self.factor, "factor")?,
                low_freq_factor: need(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, "high_freq_factor")?,
                original_max_position_embeddings: original,
            },
            "yarn" => RopeScaling::Yarn {
                factor: stretch,
                original_max_position_embeddings: original,
                beta_fast: self.beta_fast.unwrap_or(32.0),
                beta_slow: self.beta_slow.unwrap_or(1.0),
                attention_factor: self.yarn_attention_factor(stretch),
                truncate: self.truncate.unwrap_or(true),
            },
            // "su" is the name of Phi-3's first files.
            "longrope" | "su" => self.long_rope(stretch, original)?,
            other => {
                return Err(Error::input(format!(
                    "rope_type {other:?} is not supported; supported: default, linear, dynamic, \
                     llama3, yarn, longrope"
                )));
            }
        })
    }

    /// `_compute_longrope_parameters` in transformers' modeling_rope_utils.py.
    fn long_rope(&self, factor: f64, original: usize) -> Result<RopeScaling> {
        let need = |factors: &Option<Vec<f32>>, name: &str| {
            factors.clone().ok_or_else(|| Error::input(format!("rope_type longrope needs {name}")))
        };
        let by_length = match factor {
            f if f <= 1.0 => 1.0,
            f => (1.0 + f.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short_factor: need(&self.short_factor, "short_factor")?,
            long_factor: need(&self.long_factor, "long_factor")?,
            original_max_position_embeddings: original,
            attention_factor: self.attention_factor.unwrap_or(by_length),
        })
    }

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
