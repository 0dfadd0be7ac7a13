//! Answers in OpenAI's batch output form.
//!
//! <https://platform.openai.com/docs/api-reference/batch/request-output>, with the
//! bodies of `chat.completion` and `text_completion`. Ids derive from the run's key
//! and the record's index, `created` is the run's start: reruns agree. Where a
//! record asks for token ids, each choice has them, as vLLM's answers do.

use serde_json::{Map, Value, json};

use super::{Completion, ErrorBody, RunInfo, Score, TokenLogprob, Usage};
use crate::prompts::{OpenAiEndpoint, Prepared, RecordError};

pub(super) fn completion(
    run: &RunInfo,
    prepared: &Prepared,
    endpoint: OpenAiEndpoint,
    completions: &[Completion],
) -> Value {
    let (prefix, object) = match endpoint {
        OpenAiEndpoint::ChatCompletions => ("chatcmpl", "chat.completion"),
        OpenAiEndpoint::Completions => ("cmpl", "text_completion"),
    };
    let ids = prepared.request.params.return_token_ids;
    let choices: Vec<Value> = completions
        .iter()
        .enumerate()
        .map(|(index, completion)| choice(endpoint, index, completion, ids))
        .collect();
    let mut body = body(run, prepared, prefix, object, completions);
    body["choices"] = Value::Array(choices);
    answer(run, prepared, body)
}

/// OpenAI has no such request; the body is a completion's with `score` for `choices`.
pub(super) fn score(run: &RunInfo, prepared: &Prepared, score: &Score) -> Value {
    let mut body = body(run, prepared, "score", "score", &[]);
    body["score"] = json!(score);
    answer(run, prepared, body)
}

pub(super) fn error(run: &RunInfo, error: &RecordError) -> Value {
    json!({
        "id": format!("batch_req_{}", digest(run, error.index)),
        "custom_id": error.id,
        "response": null,
        "error": ErrorBody::of(error),
    })
}

fn answer(run: &RunInfo, prepared: &Prepared, body: Value) -> Value {
    let digest = digest(run, prepared.request.index);
    json!({
        "id": format!("batch_req_{digest}"),
        "custom_id": prepared.request.id,
        "response": {"status_code": 200, "request_id": digest, "body": body},
        "error": null,
    })
}

/// A body without its content, which goes to `choices` or `score` before `usage`.
fn body(
    run: &RunInfo,
    prepared: &Prepared,
    prefix: &str,
    object: &str,
    completions: &[Completion],
) -> Value {
    let Usage { prompt_tokens, completion_tokens } = Usage::of(prepared, completions);
    json!({
        "id": format!("{prefix}-{}", digest(run, prepared.request.index)),
        "object": object,
        "created": run.created_unix_seconds,
        "model": prepared.request.adapter.as_ref().map_or(run.model.as_str(), |a| &*a.name),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    })
}

fn choice(
    endpoint: OpenAiEndpoint,
    index: usize,
    completion: &Completion,
    token_ids: bool,
) -> Value {
    let logprobs = completion.logprobs.as_deref();
    let mut choice = match endpoint {
        OpenAiEndpoint::ChatCompletions => json!({
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": null},
            "logprobs": logprobs.map(chat_logprobs),
            "finish_reason": completion.finish_reason,
        }),
        OpenAiEndpoint::Completions => json!({
            "text": completion.text,
            "index": index,
            "logprobs": logprobs.map(text_logprobs),
            "finish_reason": completion.finish_reason,
        }),
    };
    if token_ids {
        choice["token_ids"] = json!(completion.token_ids);
    }
    choice
}

fn chat_logprobs(tokens: &[TokenLogprob]) -> Value {
    let entry = |token: &str, logprob: f32| json!({"token": token, "logprob": number(logprob), "bytes": token.as_bytes()});
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let mut content = entry(&token.token, token.logprob);
            content["top_logprobs"] =
                token.top.iter().map(|top| entry(&top.token, top.logprob)).collect();
            content
        })
        .collect();
    json!({"content": content, "refusal": null})
}

fn text_logprobs(tokens: &[TokenLogprob]) -> Value {
    let offsets = tokens.iter().scan(0, |offset, token| {
        let start = *offset;
        *offset += token.token.chars().count();
        Some(start)
    });
    let top = |token: &TokenLogprob| -> Map<String, Value> {
        token.top.iter().map(|top| (top.token.clone(), number(top.logprob))).collect()
    };
    json!({
        "tokens": tokens.iter().map(|token| token.token.as_str()).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| number(token.logprob)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets.collect::<Vec<_>>(),
    })
}

/// The shortest decimal of an f32; widening it to f64 would show digits that are noise.
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// 24 hex digits that name a record of a run.
fn digest(run: &RunInfo, index: u64) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&index.to_le_bytes()).update(run.key.as_bytes());
    hasher.finalize().to_hex()[..24].to_string()
}
