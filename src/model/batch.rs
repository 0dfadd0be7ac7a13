//! One step of the model over a ragged batch, as plain data.
//!
//! The leader of a tensor-parallel group builds it and broadcasts it, so that
//! every rank of the group runs the same step.

use serde::{Deserialize, Serialize};

/// Which rows of a sequence need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogitsWanted {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last row: the next token is sampled from it.
    Last,
    /// Every row: scoring.
    All,
}

/// One sequence's rows in a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchSequence {
    /// Position of the first row: the number of tokens already in the KV cache.
    pub start_position: usize,
    /// Number of rows (tokens) of this step.
    pub num_tokens: usize,
    /// Blocks of the KV cache, enough for `start_position + num_tokens` tokens.
    pub block_table: Vec<u32>,
    /// Which rows need logits.
    pub logits: LogitsWanted,
    /// Tokens of the record's prompt (without generated ones), which dynamic RoPE
    /// scaling depends on.
    pub prompt_len: usize,
    /// The number of the adapter that answers it; `None` is the model alone.
    #[serde(default)]
    pub adapter: Option<u32>,
}

/// One step: the rows of all sequences, concatenated in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepBatch {
    /// Token ids of all rows; `sum(num_tokens)` long.
    pub token_ids: Vec<u32>,
    /// The sequences, in row order.
    pub sequences: Vec<BatchSequence>,
}

impl StepBatch {
    /// Number of logits rows that the step yields.
    pub fn num_logits_rows(&self) -> usize {
        self.sequences
            .iter()
            .map(|s| match s.logits {
                LogitsWanted::None => 0,
                LogitsWanted::Last => 1,
                LogitsWanted::All => s.num_tokens,
            })
            .sum()
    }
}
