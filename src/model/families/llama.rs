//! Llama 1 to 3.x, and Mistral: Llama with a window over the keys (v0.1) or a head
//! dimension of its own (Nemo).

use super::raw::RawConfig;
use crate::Result;
use crate::model::config::ModelConfig;

pub(super) fn llama(raw: &RawConfig) -> Result<ModelConfig> {
    raw.llama()
}

pub(super) fn mistral(raw: &RawConfig) -> Result<ModelConfig> {
    Ok(ModelConfig { layer_windows: raw.windows(|_| true)?, ..raw.llama()? })
}
