//! From a prompts file to [`Request`]s.

use serde_json::{Map, Value};

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
    Bad(String),
}

/// What is to be continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Raw text; the tokenizer adds its own special tokens.
    Text(String),
    /// Chat messages for the model's template.
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
    /// The record's own id, else its index.
    pub id: String,
    /// What to continue.
    pub prompt: Prompt,
    /// Resolved sampling parameters.
    pub params: SamplingParams,
    /// Fields that travel untouched to the output.
    pub metadata: Map<String, Value>,
    /// Whether the answer takes OpenAI's batch form (and the request's url).
    pub openai_url: Option<String>,
}
