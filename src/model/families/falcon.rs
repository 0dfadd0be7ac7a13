//! Falcon in its shapes: 7B (parallel block, all heads share one key), 40B, 180B and 11B
//! (the "new decoder architecture": parallel block, groups of heads share a key), and the
//! RW models (sequential block, ALiBi, biases).

use super::raw::RawConfig;
use crate::Result;
use crate::kernels::ops::Activation;
use crate::model::config::{Block, ModelConfig, NormKind, Positions};
use crate::model::names::{GateUp, LLAMA, Names, Qkv};

/// 7B, and the RW models but for the order of rows in the fused projection.
const NAMES: Names = Names {
    embed_tokens: "transformer.word_embeddings",
    norm: "transformer.ln_f",
    input_norm: "transformer.h.{}.input_layernorm",
    mlp_norm: "transformer.h.{}.post_attention_layernorm",
    qkv: Qkv::Concatenated("transformer.h.{}.self_attention.query_key_value"),
    o_proj: "transformer.h.{}.self_attention.dense",
    gate_up: GateUp::Up("transformer.h.{}.mlp.dense_h_to_4h"),
    down_proj: "transformer.h.{}.mlp.dense_4h_to_h",
    ..LLAMA
};

const GROUPED: Names =
    Names { qkv: Qkv::Grouped("transformer.h.{}.self_attention.query_key_value"), ..NAMES };

/// 40B and 180B: two norms before a parallel block.
const TWO_NORMS: Names = Names {
    input_norm: "transformer.h.{}.ln_attn",
    mlp_norm: "transformer.h.{}.ln_mlp",
    ..GROUPED
};

pub(super) fn falcon(raw: &RawConfig) -> Result<ModelConfig> {
    let new = raw.new_decoder_architecture.unwrap_or(false);
    let multi_query = raw.multi_query.unwrap_or(true);
    let parallel = new || raw.parallel_attn.unwrap_or(true);
    let bias = raw.bias.unwrap_or(false);
    let two_norms = new && raw.num_ln_in_parallel_attn.unwrap_or(2) == 2;
    let names = match (new, multi_query) {
        (true, _) if two_norms => TWO_NORMS,
        (false, true) => NAMES,
        _ => GROUPED,
    };
    let four_times = raw.hidden_size.map(|n| n.saturating_mul(4));
    let config = raw.decoder(None, raw.ffn_hidden_size.or(four_times))?;
    let heads = config.num_attention_heads;
    Ok(ModelConfig {
        model_type: "falcon".into(),
        num_key_value_heads: match (new, multi_query) {
            (true, _) => raw.num_key_value_heads.unwrap_or(heads),
            (false, true) => 1,
            (false, false) => heads,
        },
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(true),
        norm: NormKind::Layer,
        norm_eps: raw.layer_norm_epsilon.unwrap_or(1e-5),
        attention_bias: bias,
        output_bias: bias,
        mlp_bias: bias,
        block: match (parallel, two_norms) {
            (true, true) => Block::ParallelTwoNorms,
            (true, false) => Block::Parallel,
            (false, _) => Block::Sequential,
        },
        activation: raw.activation(Activation::Gelu)?,
        gated_mlp: false,
        positions: match raw.alibi.unwrap_or(false) {
            true => Positions::Alibi,
            false => config.positions,
        },
        names,
        hf_names: names,
        ..config
    })
}
