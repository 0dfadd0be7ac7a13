//! Phi-3, 3.5 and 4-mini: Llama with fused projections, LongRoPE and, in 4-mini, heads
//! that are rotated in part.

use super::raw::RawConfig;
use crate::Result;
use crate::model::config::ModelConfig;
use crate::model::names::{GateUp, LLAMA, Names, Qkv};

pub(super) const NAMES: Names = Names {
    qkv: Qkv::Concatenated("model.layers.{}.self_attn.qkv_proj"),
    gate_up: GateUp::Concatenated("model.layers.{}.mlp.gate_up_proj"),
    ..LLAMA
};

pub(super) fn phi3(raw: &RawConfig) -> Result<ModelConfig> {
    Ok(ModelConfig {
        norm_eps: raw.rms_norm_eps.unwrap_or(1e-5),
        layer_windows: raw.windows(|_| true)?,
        names: NAMES,
        hf_names: NAMES,
        ..raw.llama()?
    })
}
