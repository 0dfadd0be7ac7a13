//! What is trained on: a file becomes examples of token ids, and an epoch an order of them.
//!
//! [`Dataset::read`] takes the file apart record by record, renders conversations through
//! the model's chat template, tokenizes, and marks which tokens are predicted. [`Batches`]
//! says which examples an optimiser step trains on, [`share`] which of them a data-parallel
//! group takes, in which micro-batches. Both are pure functions of lengths and a seed: every
//! rank computes them for itself and comes to the same.
//!
//! | a record's fields (a CSV file's columns)       | trained on                              |
//! |------------------------------------------------|-----------------------------------------|
//! | `messages`: a list of `{"role", "content"}`    | the assistant's turns                   |
//! | `conversations`: a list of `{"from", "value"}` | the assistant's turns (ShareGPT)        |
//! | `prompt`, `completion`: strings                | the completion and EOS                  |
//! | `prompt`, `completion`: lists of messages      | the assistant's turns of the completion |
//! | `instruction`, `output`, maybe `input`         | the output and its end (Alpaca)         |
//! | `text`; a line of a `.txt` file                | everything, and EOS                     |
//!
//! The first row that a record has decides; other fields are ignored.
//! Left out: streaming. Every rank holds the whole set, 5 bytes a token.

mod dataset;
mod marks;
mod order;
mod read;
mod record;
mod tokens;
mod turns;

pub use dataset::Dataset;
pub use marks::mark_generation;
pub use order::{BatchConfig, Batches, Place, Sequence, share};

use serde::{Deserialize, Serialize};

use crate::model::tokenizer::Tokenizer;
use crate::prompts::ChatTemplate;

/// One tokenized record. `is_target[i]` says that token `i` is predicted from those before
/// it and counts in the loss; index 0 never is, for want of anything before it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// The tokens, at least two.
    pub token_ids: Vec<u32>,
    /// As long as `token_ids`, with at least one `true`.
    pub is_target: Vec<bool>,
}

/// An [`Example`] inside a [`Dataset`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExampleRef<'a> {
    /// See [`Example::token_ids`].
    pub token_ids: &'a [u32],
    /// See [`Example::is_target`].
    pub is_target: &'a [bool],
}

/// A record that cannot be trained on; the others are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRecord {
    /// Line in the file where it starts, from 1.
    pub line: u64,
    /// Stable code: one of [`crate::prompts::ErrorCode`], or `no_example` (no known set of
    /// fields), `empty` (nothing to learn in it), `no_targets` (no token to predict).
    pub code: String,
    /// What is wrong and, where it helps, what would be right.
    pub message: String,
}

/// How records become tokens.
pub struct Formatting<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template, if it has one.
    pub template: Option<&'a ChatTemplate>,
    /// The same template with its `{% generation %}` blocks written out as marks
    /// ([`mark_generation`]); `None` where it has none, and then renderings are compared.
    pub marked: Option<&'a ChatTemplate>,
    /// Longer examples are cut at the end, and counted.
    pub max_seq_len: usize,
    /// Every token but the first is a target, prompts and users' turns too.
    pub train_on_prompt: bool,
    /// Token ids that the model knows: rows of its embedding.
    pub vocab_size: usize,
}
