//! Mixtures of experts: Mixtral (Mistral with experts) and Qwen3-MoE (Qwen3 with experts).

use super::raw::RawConfig;
use crate::model::config::{ExpertsConfig, ModelConfig};
use crate::model::names::{ExpertNames, LLAMA, Names};
use crate::{Error, Result};

pub(super) const MIXTRAL: Names = Names {
    router: "model.layers.{}.block_sparse_moe.gate",
    experts: ExpertNames::Each([
        "model.layers.{}.block_sparse_moe.experts.{e}.w1",
        "model.layers.{}.block_sparse_moe.experts.{e}.w3",
        "model.layers.{}.block_sparse_moe.experts.{e}.w2",
    ]),
    ..LLAMA
};

fn experts(raw: &RawConfig, norm_topk_prob: bool) -> Result<ExpertsConfig> {
    let missing = |name: &str| Error::input(format!("{name} is missing"));
    let layers = raw.layers()?;
    let step = raw.decoder_sparse_step.unwrap_or(1).max(1);
    let mut dense_layers = raw.mlp_only_layers.clone().unwrap_or_default();
    dense_layers.extend((0..layers).filter(|layer| !(layer + 1).is_multiple_of(step)));
    Ok(ExpertsConfig {
        num_experts: raw.num_local_experts.ok_or_else(|| missing("num_experts"))?,
        num_experts_per_tok: raw
            .num_experts_per_tok
            .ok_or_else(|| missing("num_experts_per_tok"))?,
        moe_intermediate_size: raw
            .moe_intermediate_size
            .or(raw.intermediate_size)
            .ok_or_else(|| missing("moe_intermediate_size"))?,
        norm_topk_prob,
        dense_layers,
    })
}

pub(super) fn mixtral(raw: &RawConfig) -> Result<ModelConfig> {
    Ok(ModelConfig {
        norm_eps: raw.rms_norm_eps.unwrap_or(1e-5),
        layer_windows: raw.windows(|_| true)?,
        experts: Some(experts(raw, true)?),
        names: MIXTRAL,
        hf_names: MIXTRAL,
        ..raw.llama()?
    })
}

pub(super) fn qwen3_moe(raw: &RawConfig) -> Result<ModelConfig> {
    Ok(ModelConfig {
        qk_norm: true,
        // Unlike Qwen2 and 3: all layers, whatever max_window_layers says.
        layer_windows: match raw.use_sliding_window {
            Some(true) => raw.windows(|_| true)?,
            _ => vec![None; raw.layers()?],
        },
        experts: Some(experts(raw, raw.norm_topk_prob.unwrap_or(false))?),
        ..raw.llama()?
    })
}
