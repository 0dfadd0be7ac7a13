//! Gemma 2 and 3 (text): norms around every part, windows on most layers, scaled
//! embeddings, soft-capped scores (2) or normed queries and keys with two rotary bases (3).

use super::raw::RawConfig;
use crate::kernels::ops::Activation;
use crate::model::config::{Block, ModelConfig, NormKind, Positions};
use crate::model::names::{LLAMA, Names};
use crate::{Error, Result};

pub(super) const NAMES: Names = Names {
    mlp_norm: "model.layers.{}.pre_feedforward_layernorm",
    post_norms: [
        "model.layers.{}.post_attention_layernorm",
        "model.layers.{}.post_feedforward_layernorm",
    ],
    ..LLAMA
};

fn gemma(raw: &RawConfig) -> Result<ModelConfig> {
    if raw.use_bidirectional_attention == Some(true) {
        return Err(Error::input("use_bidirectional_attention is not supported"));
    }
    let config = raw.decoder(raw.head_dim.or(Some(256)), raw.intermediate_size)?;
    let scalar = raw.query_pre_attn_scalar.unwrap_or(256.0);
    Ok(ModelConfig {
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(true),
        norm: NormKind::RmsPlusOne,
        block: Block::PostNorms,
        // What the models were trained with, whatever older files call it.
        activation: Activation::GeluTanh,
        attention_scale: (1.0 / scalar.sqrt()) as f32,
        embedding_scale: Some((config.hidden_size as f64).sqrt() as f32),
        names: NAMES,
        hf_names: NAMES,
        ..config
    })
}

pub(super) fn gemma2(raw: &RawConfig) -> Result<ModelConfig> {
    Ok(ModelConfig {
        attn_logit_softcapping: raw.attn_logit_softcapping,
        final_logit_softcapping: raw.final_logit_softcapping,
        layer_windows: raw.windows(|layer| layer % 2 == 0)?,
        ..gemma(raw)?
    })
}

pub(super) fn gemma3(raw: &RawConfig) -> Result<ModelConfig> {
    let config = gemma(raw)?;
    let pattern = raw.sliding_window_pattern.unwrap_or(6).max(1);
    let d = config.head_dim;
    Ok(ModelConfig {
        qk_norm: true,
        attn_logit_softcapping: raw.attn_logit_softcapping,
        final_logit_softcapping: raw.final_logit_softcapping,
        layer_windows: raw.windows(|layer| !(layer + 1).is_multiple_of(pattern))?,
        positions: Positions::Rotary {
            global: raw.rope(d, 1_000_000.0)?,
            local: Some(raw.local_rope(d, 10_000.0)?),
        },
        ..config
    })
}
