//! Qwen2 and 2.5 (Llama with biases on queries, keys and values) and Qwen3 (with norms of
//! queries and keys instead).

use super::raw::RawConfig;
use crate::Result;
use crate::model::config::ModelConfig;

pub(super) fn qwen2(raw: &RawConfig) -> Result<ModelConfig> {
    Ok(ModelConfig {
        attention_bias: true,
        output_bias: false,
        layer_windows: windows(raw)?,
        ..raw.llama()?
    })
}

pub(super) fn qwen3(raw: &RawConfig) -> Result<ModelConfig> {
    // The default of transformers' Qwen3Config, whatever the width.
    let config = raw.decoder(raw.head_dim.or(Some(128)), raw.intermediate_size)?;
    Ok(ModelConfig { qk_norm: true, layer_windows: windows(raw)?, ..config })
}

/// A window only where `use_sliding_window` says so, from layer `max_window_layers` on.
fn windows(raw: &RawConfig) -> Result<Vec<Option<usize>>> {
    if !raw.use_sliding_window.unwrap_or(false) {
        return Ok(vec![None; raw.layers()?]);
    }
    raw.windows(|layer| layer >= raw.max_window_layers.unwrap_or(28))
}
