//! A GGUF file as a model: its configuration and the names of its tensors.

use serde_json::{Value, json};

use super::{TensorTable, gguf};
use crate::Result;
use crate::model::config::{Block, ModelConfig, NormKind, Positions, RopeScaling};
use crate::model::names::{
    GGUF, GGUF_FALCON, GGUF_FALCON_TWO_NORMS, GGUF_FUSED_QKV, GGUF_PHI3, Names,
};

/// The model's shape, with what llama.cpp's converter has done to the weights (see
/// [`gguf::config`]).
///
/// # Errors
/// See [`gguf::hf_config`] and [`ModelConfig::from_json`].
pub fn config(metadata: &gguf::Metadata, table: &TensorTable) -> Result<ModelConfig> {
    let mut json = gguf::hf_config(metadata, |name| table.shape(name))?;
    add_rope_factors(&mut json, table)?;
    let mut config = ModelConfig::from_json(json)?;
    config.names = names(&config, table.contains("blk.0.attn_qkv.weight"));
    if gguf::interleaved_rope(metadata) {
        config = config.with_interleaved_pairs();
    }
    if config.norm == NormKind::RmsPlusOne {
        config.norm = NormKind::Rms;
    }
    if let Some(divisors) = vector(table, "rope_freqs.weight")?
        && let Positions::Rotary { global, .. } = &mut config.positions
    {
        global.scaling = RopeScaling::Divisors(divisors);
    }
    config.check_sizes()?;
    Ok(config)
}

/// The names of a GGUF file of the model, or of an adapter of it; `fused_qkv` where it has
/// `attn_qkv` in place of three.
pub(in crate::model) fn names(config: &ModelConfig, fused_qkv: bool) -> Names {
    match (config.model_type.as_str(), config.block) {
        ("falcon", Block::ParallelTwoNorms) => GGUF_FALCON_TWO_NORMS,
        ("falcon", _) => GGUF_FALCON,
        ("phi3", _) => GGUF_PHI3,
        _ if fused_qkv => Names { qkv: GGUF_FUSED_QKV, ..GGUF },
        _ => GGUF,
    }
}

/// LongRoPE's two lists are tensors here.
fn add_rope_factors(config: &mut Value, table: &TensorTable) -> Result<()> {
    let Some(scaling) = config.get_mut("rope_scaling").and_then(Value::as_object_mut) else {
        return Ok(());
    };
    for (field, name) in
        [("short_factor", "rope_factors_short.weight"), ("long_factor", "rope_factors_long.weight")]
    {
        if let Some(factors) = vector(table, name)? {
            scaling.insert(field.into(), json!(factors));
        }
    }
    Ok(())
}

fn vector(table: &TensorTable, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(shape) = table.shape(name) else { return Ok(None) };
    let len = shape.iter().product();
    table.vector(name, len, std::slice::from_ref(&(0..len))).map(Some)
}
