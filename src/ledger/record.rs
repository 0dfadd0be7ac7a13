//! Output lines: what became of a record, as one JSON object on one line.
//!
//! Farm's own form, fields in this order:
//! `{"id","index","prompt","text","finish_reason","usage","error"?,"token_ids"?,
//! "logprobs"?,"completions"?,"score"?,"adapter"?,"metadata"?}`.
//! `prompt` is always a string: what the model was given (messages as rendered).
//! With `n` above 1, `text` and its neighbours are the first completion's, so that
//! every line has the same columns, and `completions` lists all of them; `usage`
//! counts all. An error line has `null` for `prompt` and `text`.
//! OpenAI batch lines are answered in OpenAI's form (`openai.rs`).
//!
//! A line is a pure function of its arguments: no clock, so that reruns agree.

mod openai;

use serde::Serialize;

use crate::prompts::{Prepared, RecordError};

/// What the lines of a run share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunInfo {
    /// The run's key; OpenAI ids derive from it and the record's index.
    pub key: String,
    /// The run's start, seconds since 1970-01-01 UTC: OpenAI's `created`.
    pub created_unix_seconds: u64,
    /// The model's name, as OpenAI answers show it.
    pub model: String,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An EOS token or a stop string.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
}

/// One finished generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The new text, without what stopped it.
    pub text: String,
    /// The new tokens.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry a token, where the record asked for them.
    pub logprobs: Option<Vec<TokenLogprob>>,
}

/// The log-probability (natural) of a token that was chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenLogprob {
    /// The token's text.
    pub token: String,
    /// Its id.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The best alternatives, best first, as many as were asked for.
    pub top: Vec<TopLogprob>,
}

/// One of the best tokens at a position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TopLogprob {
    /// The token's text.
    pub token: String,
    /// Its id.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// How likely the model finds a record's prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// Sum of the tokens' log-probabilities (natural).
    pub logprob: f64,
    /// Number of tokens that were scored: all but the first.
    pub tokens: usize,
    /// `exp(-logprob / tokens)`; `null` where nothing was scored.
    pub perplexity: Option<f64>,
    /// One entry a token of the prompt; the first has none.
    pub token_logprobs: Vec<Option<f32>>,
}

impl Score {
    /// The score of a prompt from the log-probabilities of its tokens from the second
    /// on.
    pub fn new(logprobs: &[f32]) -> Self {
        let logprob: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
        let tokens = logprobs.len();
        Self {
            logprob,
            tokens,
            perplexity: (tokens > 0).then(|| (-logprob / tokens as f64).exp()),
            token_logprobs: std::iter::once(None)
                .chain(logprobs.iter().copied().map(Some))
                .collect(),
        }
    }
}

/// The line of a generated record: JSON and `\n`. `completions` are the record's `n`,
/// in order.
pub fn completion_line(run: &RunInfo, prepared: &Prepared, completions: &[Completion]) -> Vec<u8> {
    if let Some(endpoint) = prepared.request.openai {
        return to_line(&openai::completion(run, prepared, endpoint, completions), None);
    }
    let first = completions.first();
    let ids = prepared.request.params.return_token_ids;
    let line = Line {
        text: first.map(|completion| completion.text.as_str()),
        finish_reason: first.map_or("length", |completion| completion.finish_reason.as_str()),
        usage: Usage::of(prepared, completions),
        token_ids: first.filter(|_| ids).map(|completion| completion.token_ids.as_slice()),
        logprobs: first.and_then(|completion| completion.logprobs.as_deref()),
        completions: (completions.len() > 1).then(|| choices(completions, ids)),
        ..Line::of(prepared)
    };
    to_line(&line, prepared.request.metadata.as_deref())
}

/// The line of a scored record.
pub fn score_line(run: &RunInfo, prepared: &Prepared, score: &Score) -> Vec<u8> {
    if prepared.request.openai.is_some() {
        return to_line(&openai::score(run, prepared, score), None);
    }
    let line = Line { text: Some(""), score: Some(score), ..Line::of(prepared) };
    to_line(&line, prepared.request.metadata.as_deref())
}

/// The line of a record that failed.
pub fn error_line(run: &RunInfo, error: &RecordError) -> Vec<u8> {
    if error.openai {
        return to_line(&openai::error(run, error), None);
    }
    let id = error.id.clone().unwrap_or_else(|| error.index.to_string());
    let line = Line {
        id: &id,
        index: error.index,
        finish_reason: "error",
        error: Some(ErrorBody::of(error)),
        ..Line::default()
    };
    to_line(&line, None)
}

impl FinishReason {
    /// The reason as the output spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// Farm's own form; the fields' order is the output's.
#[derive(Default, Serialize)]
struct Line<'a> {
    id: &'a str,
    index: u64,
    prompt: Option<&'a str>,
    text: Option<&'a str>,
    finish_reason: &'a str,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [TokenLogprob]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completions: Option<Vec<Choice<'a>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<&'a Score>,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<&'a str>,
}

impl<'a> Line<'a> {
    fn of(prepared: &'a Prepared) -> Self {
        Self {
            id: &prepared.request.id,
            index: prepared.request.index,
            prompt: Some(&prepared.prompt_text),
            finish_reason: "stop",
            usage: Usage::of(prepared, &[]),
            adapter: prepared.request.adapter.as_ref().map(|adapter| &*adapter.name),
            ..Self::default()
        }
    }
}

#[derive(Default, Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Usage {
    fn of(prepared: &Prepared, completions: &[Completion]) -> Self {
        Self {
            prompt_tokens: prepared.prompt_token_ids.len(),
            completion_tokens: completions.iter().map(|c| c.token_ids.len()).sum(),
        }
    }
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'static str,
    message: &'a str,
    file: &'a str,
    line: u64,
}

impl<'a> ErrorBody<'a> {
    fn of(error: &'a RecordError) -> Self {
        let RecordError { code, message, file, line, .. } = error;
        Self { code: code.as_str(), message, file, line: *line }
    }
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    finish_reason: FinishReason,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [TokenLogprob]>,
}

fn choices(completions: &[Completion], token_ids: bool) -> Vec<Choice<'_>> {
    completions
        .iter()
        .enumerate()
        .map(|(index, completion)| Choice {
            index,
            text: &completion.text,
            finish_reason: completion.finish_reason,
            token_ids: token_ids.then_some(completion.token_ids.as_slice()),
            logprobs: completion.logprobs.as_deref(),
        })
        .collect()
}

/// One line; `metadata`, already JSON text, becomes its last field.
fn to_line(value: &impl Serialize, metadata: Option<&str>) -> Vec<u8> {
    // These types have string keys and no fallible Serialize: writing to memory
    // cannot fail.
    let mut line = serde_json::to_vec(value).expect("output lines are serializable");
    if let Some(metadata) = metadata {
        line.pop();
        line.extend_from_slice(b",\"metadata\":");
        line.extend_from_slice(metadata.as_bytes());
        line.push(b'}');
    }
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests;
