//! Models: configuration, weights, layers, families, and the step they compute.

pub mod adapter;
pub mod attention;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod device;
pub mod families;
pub mod kv_cache;
pub mod layers;
pub mod mlp;
pub mod moe;
pub mod names;
pub mod ops;
pub mod preflight;
pub mod quantization;
pub mod rope;
pub mod runner;
pub mod sampling;
pub mod small_file;
pub mod step;
pub mod tokenizer;
pub mod weights;

pub use adapter::{Adapter, AdapterSource};
pub use batch::{BatchSequence, LogitsWanted, StepBatch};
pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use preflight::Preflight;
pub use runner::{LoadOptions, ModelRunner};
pub use sampling::{
    Draw, LogitsError, Logprobs, MAX_TOP_LOGPROBS, Penalties, RowChoice, RowChoices, RowSampling,
    TokenSampling,
};
pub use weights::{Activations, WeightDtype};

use crate::{Error, Result};

/// Logits of a step on the host: `rows × vocab_size`, row-major, f32.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Logits {
    /// Row-major values.
    pub data: Vec<f32>,
    /// Columns.
    pub vocab_size: usize,
}

impl Logits {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.vocab_size..(i + 1) * self.vocab_size]
    }
}

/// What the engine needs of a model: its shape and one step.
pub trait Runner {
    /// Number of KV cache blocks.
    fn num_blocks(&self) -> usize;
    /// Tokens a block.
    fn block_size(&self) -> usize;
    /// Size of the vocabulary (columns of the logits).
    fn vocab_size(&self) -> usize;
    /// Longest sequence, prompt and new tokens together.
    fn max_seq_len(&self) -> usize;
    /// Runs one step; logits rows in the order of `batch` (see [`StepBatch::num_logits_rows`]).
    fn forward(&mut self, batch: &StepBatch) -> Result<Logits>;

    /// Whether it chooses tokens itself ([`Runner::forward_and_choose`]).
    fn chooses(&self) -> bool {
        false
    }

    /// Runs one step and does with each row of logits what `rows` say, in their order. A
    /// row's result depends on the row and what is wanted of it alone. EOS tokens beyond
    /// the vocabulary are none.
    fn forward_and_choose(
        &mut self,
        _batch: &StepBatch,
        _rows: &[RowSampling<'_>],
        _eos_token_ids: &[u32],
    ) -> Result<RowChoices> {
        Err(Error::fault("this runner leaves the choice of tokens to the engine"))
    }
}
