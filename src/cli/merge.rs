//! Flags of `farm merge`.

use std::path::PathBuf;

use clap::Args;

use super::Dtype;
use super::values::adapter;
use crate::model::AdapterSource;

/// `farm merge`.
#[derive(Debug, Clone, Args)]
pub struct MergeArgs {
    /// The model: a directory (Hugging Face's form) or a GGUF file
    #[arg(long, env = "FARM_MODEL", value_name = "DIR|FILE.gguf")]
    pub model: PathBuf,
    /// The LoRA adapter: a PEFT directory or a GGUF file
    #[arg(long, env = "FARM_ADAPTER", value_name = "[NAME=]PATH", value_parser = adapter())]
    pub adapter: AdapterSource,
    /// Where the merged model goes; must not exist
    ///
    /// A directory for a model directory: safetensors in the same shards, with all that lies
    /// beside them. A .gguf file for a GGUF model: in one file, with the same metadata.
    #[arg(long, env = "FARM_OUTPUT", value_name = "DIR|FILE.gguf")]
    pub output: PathBuf,
    /// Type of the weights written; auto keeps each tensor's own
    ///
    /// Of a GGUF model it is that of the matrices that change alone; with auto those of a block
    /// format that farm cannot write (all but q8_0, q4_k and q6_k) become f16.
    #[arg(long, env = "FARM_DTYPE", value_name = "DTYPE", default_value = "auto")]
    pub dtype: Dtype,
}
