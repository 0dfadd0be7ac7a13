//! OpenAI batch lines: `custom_id`, `method`, `url`, `body`.
//!
//! <https://platform.openai.com/docs/guides/batch> and the API reference of the two
//! endpoints. The body's `model` may name an adapter ([`super::adapter`]) and else is not
//! looked at: the run has one.

use serde_json::{Map, Value};

use super::overrides::{shortened, wrong_type};
use super::request::{messages, token_ids};
use super::{ErrorCode, OpenAiEndpoint, Problem, Prompt};

/// What a body may ask for that farm does not do; ignoring it would give a wrong answer.
const UNSUPPORTED: [&str; 8] =
    ["tools", "functions", "logit_bias", "echo", "suffix", "stream", "audio", "prediction"];

/// Whether a record is a batch line. A record with a prompt of its own is not, so
/// that `url` and `body` may be anyone's field names.
pub(crate) fn is_batch_line(fields: &Map<String, Value>) -> bool {
    let has = |field: &str| fields.contains_key(field);
    has("body")
        && (has("custom_id") || has("url") || has("method"))
        && !(has("prompt") || has("messages") || has("prompt_token_ids"))
}

/// The endpoint, the prompt and the body (for its sampling fields) of a batch line.
pub(crate) fn read(
    fields: &Map<String, Value>,
) -> Result<(OpenAiEndpoint, Prompt, &Map<String, Value>), Problem> {
    if let Some(method) = fields.get("method").filter(|method| *method != "POST") {
        return Err(wrong_type("method", "\"POST\"", method));
    }
    let endpoint = match fields.get("url") {
        Some(Value::String(url)) if url == "/v1/chat/completions" => {
            OpenAiEndpoint::ChatCompletions
        }
        Some(Value::String(url)) if url == "/v1/completions" => OpenAiEndpoint::Completions,
        Some(Value::String(url)) => {
            let message = format!(
                "url {url:?} is not answered; farm answers /v1/chat/completions and /v1/completions"
            );
            return Err(Problem::new(ErrorCode::UnsupportedUrl, message));
        }
        url => return Err(wrong_type("url", "a string", url.unwrap_or(&Value::Null))),
    };
    let body = match &fields["body"] {
        Value::Object(body) => body,
        other => return Err(wrong_type("body", "an object", other)),
    };
    refuse_unsupported(body)?;
    let prompt = match endpoint {
        OpenAiEndpoint::ChatCompletions => match body.get("messages") {
            Some(value) => Prompt::Messages(messages(value)?),
            None => return Err(Problem::new(ErrorCode::NoPrompt, "the body has no \"messages\"")),
        },
        OpenAiEndpoint::Completions => match body.get("prompt") {
            Some(value) => completion_prompt(value)?,
            None => return Err(Problem::new(ErrorCode::NoPrompt, "the body has no \"prompt\"")),
        },
    };
    Ok((endpoint, prompt, body))
}

/// A string, token ids, or a list of exactly one of these.
fn completion_prompt(value: &Value) -> Result<Prompt, Problem> {
    match value {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(items) => match items.as_slice() {
            [Value::String(text)] => Ok(Prompt::Text(text.clone())),
            [inner @ Value::Array(_)] => token_ids("prompt", inner).map(Prompt::TokenIds),
            [Value::String(_) | Value::Array(_), ..] => Err(Problem::new(
                ErrorCode::UnsupportedField,
                format!("\"prompt\" lists {} prompts; give each a line of its own", items.len()),
            )),
            _ => token_ids("prompt", value).map(Prompt::TokenIds),
        },
        other => Err(wrong_type("prompt", "a string or a list of token ids", other)),
    }
}

fn refuse_unsupported(body: &Map<String, Value>) -> Result<(), Problem> {
    let idle = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    };
    let asked = UNSUPPORTED.iter().find_map(|field| {
        body.get(*field).filter(|value| !idle(value)).map(|value| (*field, value))
    });
    match asked {
        Some((field, value)) => Err(Problem::new(
            ErrorCode::UnsupportedField,
            format!("{field:?} is not supported, got {}", shortened(value)),
        )),
        None => Ok(()),
    }
}
