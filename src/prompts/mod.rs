//! From a prompts file to token ids: what rank 0 reads ([`reader`]), and what every
//! rank makes of it ([`request`], [`chat_template`], [`prepare`]).
//!
//! Rank 0 streams [`RawRecord`]s and hands them out unparsed; the rank that
//! generates a record parses it into a [`Request`], renders its messages and
//! tokenizes. A bad record becomes a [`RecordError`] and harms no other.
//! Left out: what is written ([`crate::ledger::record`]).

pub mod adapter;
pub mod chat_template;
mod csv_rows;
pub mod error;
pub mod generation_config;
pub mod guide;
pub mod identity;
mod jinja_values;
mod lines;
mod openai;
pub mod overrides;
pub mod prepare;
mod raw_json;
pub mod reader;
pub mod request;
mod strftime;

pub use adapter::{AdapterNames, ChosenAdapter};
pub use chat_template::ChatTemplate;
pub use error::{ErrorCode, Problem, RecordError};
pub use generation_config::{GenerationConfig, SamplingFlags};
pub use identity::{InputIdentity, spool_stdin};
pub use prepare::{Prepared, Preparer};
pub use reader::{PromptFormat, PromptReader, ReadOptions};
pub use request::{Defaults, parse};

use serde_json::Value;

use crate::engine::SamplingParams;

/// One record as rank 0 reads it from the input and hands it out: unparsed, so
/// that parsing, templating and tokenizing run on all ranks.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RawRecord {
    /// Position among the records of the input, from 0 (blank lines do not count).
    pub index: u64,
    /// Line in the file where the record starts, from 1.
    pub line: u64,
    /// The record: a line of text or a JSON object (a CSV row arrives as one).
    pub body: RawBody,
}

/// The body of a [`RawRecord`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum RawBody {
    /// A plain prompt (`.txt`), maybe not valid UTF-8.
    Text(Vec<u8>),
    /// A JSON line, maybe not valid.
    Json(Vec<u8>),
    /// The reader could not make a record of it (a malformed CSV row, say).
    Bad {
        /// Why, as the output will say it.
        code: ErrorCode,
        /// The same for people.
        message: String,
    },
}

/// What is to be continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Raw text; the tokenizer adds its own special tokens.
    Text(String),
    /// Chat messages for the model's template: objects with a string `role` and a
    /// string `content`; other fields are as the record had them.
    Messages(Vec<Value>),
    /// Already tokenized.
    TokenIds(Vec<u32>),
}

/// A record ready to be tokenized and generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// See [`RawRecord::index`].
    pub index: u64,
    /// See [`RawRecord::line`].
    pub line: u64,
    /// The record's own id (OpenAI's `custom_id`), else its index.
    pub id: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Resolved sampling parameters.
    pub params: SamplingParams,
    /// The adapter that answers; `None` is the model alone.
    pub adapter: Option<ChosenAdapter>,
    /// Fields that travel untouched to the output: a JSON object on one line, spelled
    /// exactly as in the record (numbers of any size, the order, escapes); `None` if
    /// there are none.
    pub metadata: Option<String>,
    /// Set if the answer takes OpenAI's batch form: what was asked for.
    pub openai: Option<OpenAiEndpoint>,
}

/// The requests of OpenAI's batch files that farm answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenAiEndpoint {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
}
