//! From a record's bytes to a [`Request`]: pure, and total over all bytes.
//!
//! A JSON record holds exactly one of `prompt` (a string), `messages` (objects with
//! `role` and `content`) and `prompt_token_ids`; maybe an `id` (a string or a number);
//! sampling overrides (see [`super::overrides`]); an `adapter` (see [`super::adapter`]); and other fields, which travel
//! untouched into the output's `metadata`. OpenAI batch lines are recognised by
//! `body` beside `custom_id`, `url` or `method`.

use serde_json::{Map, Value, json};

use super::overrides::{self, wrong_type};
use super::{
    AdapterNames, ErrorCode, Problem, Prompt, RawBody, RawRecord, RecordError, Request, adapter,
    openai, raw_json,
};
use crate::engine::SamplingParams;

/// What a record is read against.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Defaults {
    /// Resolved flags, generation config and farm defaults; see
    /// [`super::generation_config::resolve`].
    pub params: SamplingParams,
    /// `--chat`: a plain prompt is one user message.
    pub chat: bool,
    /// The run's adapters.
    pub adapters: AdapterNames,
    /// The input file, for error records ([`super::PromptReader::name`]).
    pub file: String,
}

/// Reads one record. Any bytes give either a request or an error that says where.
pub fn parse(raw: &RawRecord, defaults: &Defaults) -> Result<Request, RecordError> {
    match &raw.body {
        RawBody::Bad { code, message } => Err(Problem::new(*code, message.as_str())),
        RawBody::Text(bytes) => utf8(bytes).map(|text| {
            let prompt = as_chat(Prompt::Text(text.to_string()), defaults.chat);
            let adapter = defaults.adapters.by_default();
            Request { adapter, ..request(raw, prompt, defaults.params.clone()) }
        }),
        RawBody::Json(bytes) => match utf8(bytes).and_then(|text| Ok((text, object(text)?))) {
            Ok((text, fields)) => return parse_object(raw, text, &fields, defaults),
            Err(problem) => Err(problem),
        },
    }
    .map_err(|problem| RecordError::at(raw, &defaults.file, problem))
}

fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes).map_err(|error| {
        let message = format!("not valid UTF-8 at byte {} of the record", error.valid_up_to());
        Problem::new(ErrorCode::NotUtf8, message)
    })
}

fn object(text: &str) -> Result<Map<String, Value>, Problem> {
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => {
            let message =
                format!("the line is not a JSON object, it is {}", overrides::shortened(&other));
            Err(Problem::new(ErrorCode::NotAnObject, message))
        }
        Err(error) => {
            // The line number within the record is always 1 and would mislead.
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            let message = format!("not valid JSON: {reason} at column {}", error.column());
            Err(Problem::new(ErrorCode::BadJson, message))
        }
    }
}

fn request(raw: &RawRecord, prompt: Prompt, params: SamplingParams) -> Request {
    Request {
        index: raw.index,
        line: raw.line,
        id: raw.index.to_string(),
        prompt,
        params,
        adapter: None,
        metadata: None,
        openai: None,
    }
}

fn parse_object(
    raw: &RawRecord,
    text: &str,
    fields: &Map<String, Value>,
    defaults: &Defaults,
) -> Result<Request, RecordError> {
    let openai = openai::is_batch_line(fields);
    let members = raw_json::members(text);
    let id_field = if openai { "custom_id" } else { "id" };
    let id = record_id(id_field, fields, &members);
    let known_id = id.clone().unwrap_or(None);
    let fill = |request: Request| match &known_id {
        Some(id) => Request { id: id.clone(), ..request },
        None => request,
    };
    let parsed = id.and_then(|_| {
        if openai {
            let (endpoint, prompt, body) = openai::read(fields)?;
            let params = overrides::apply(&defaults.params, body)?;
            let adapter = defaults.adapters.of_body(body)?;
            return Ok(Request { adapter, openai: Some(endpoint), ..request(raw, prompt, params) });
        }
        let prompt = as_chat(own_prompt(fields)?, defaults.chat);
        let params = overrides::apply(&defaults.params, fields)?;
        let adapter = defaults.adapters.of_record(fields)?;
        Ok(Request { adapter, metadata: metadata(&members), ..request(raw, prompt, params) })
    });
    parsed.map(fill).map_err(|problem| RecordError {
        id: known_id.clone(),
        openai,
        ..RecordError::at(raw, &defaults.file, problem)
    })
}

/// The record's id; a number as it is spelled, which may exceed 64 bits.
fn record_id(
    field: &str,
    fields: &Map<String, Value>,
    members: &[(&str, &str)],
) -> Result<Option<String>, Problem> {
    match fields.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) => Ok(Some(id.clone())),
        Some(Value::Number(number)) => {
            // The last one wins, as for the parsed fields.
            let spelled = members.iter().rfind(|(key, _)| key_is(key, field));
            Ok(Some(spelled.map_or_else(|| number.to_string(), |(_, value)| value.to_string())))
        }
        Some(other) => Err(wrong_type(field, "a string or a number", other)),
    }
}

/// Whether a key, quoted and maybe escaped, spells `name`.
fn key_is(key: &str, name: &str) -> bool {
    if key.contains('\\') {
        return serde_json::from_str::<String>(key).is_ok_and(|key| key == name);
    }
    key.strip_prefix('"').and_then(|key| key.strip_suffix('"')) == Some(name)
}

/// The fields that are neither prompt nor id nor sampling, as they are spelled.
fn metadata(members: &[(&str, &str)]) -> Option<String> {
    let known = |key: &str| {
        ["id", "prompt", "messages", "prompt_token_ids", adapter::FIELD]
            .iter()
            .chain(&overrides::FIELDS)
            .any(|name| key_is(key, name))
    };
    let others: Vec<_> = members.iter().copied().filter(|(key, _)| !known(key)).collect();
    (!others.is_empty()).then(|| raw_json::object(&others))
}

/// Exactly one of the three kinds of prompt; `null` counts as absent.
fn own_prompt(fields: &Map<String, Value>) -> Result<Prompt, Problem> {
    let given: Vec<(&str, &Value)> = ["prompt", "messages", "prompt_token_ids"]
        .into_iter()
        .filter_map(|field| Some((field, fields.get(field).filter(|value| !value.is_null())?)))
        .collect();
    match given.as_slice() {
        [] => Err(Problem::new(
            ErrorCode::NoPrompt,
            "the record has none of \"prompt\", \"messages\" and \"prompt_token_ids\"",
        )),
        [("prompt", Value::String(text))] => Ok(Prompt::Text(text.clone())),
        [("prompt", other)] => Err(wrong_type("prompt", "a string", other)),
        [("messages", value)] => messages(value).map(Prompt::Messages),
        [(field, value)] => token_ids(field, value).map(Prompt::TokenIds),
        [(first, _), (second, _), ..] => Err(Problem::new(
            ErrorCode::AmbiguousPrompt,
            format!("the record has both {first:?} and {second:?}; keep one"),
        )),
    }
}

fn as_chat(prompt: Prompt, chat: bool) -> Prompt {
    match prompt {
        Prompt::Text(text) if chat => {
            Prompt::Messages(vec![json!({"role": "user", "content": text})])
        }
        other => other,
    }
}

pub(crate) fn token_ids(field: &str, value: &Value) -> Result<Vec<u32>, Problem> {
    let expected = "a list of token ids (integers from 0 to 4294967295)";
    let items = value.as_array().ok_or_else(|| wrong_type(field, expected, value))?;
    items
        .iter()
        .map(|item| {
            let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| wrong_type(field, expected, item))
        })
        .collect()
}

/// Checks messages and turns OpenAI's lists of text parts into strings, joined by
/// line breaks as vLLM does for templates that expect strings.
pub(crate) fn messages(value: &Value) -> Result<Vec<Value>, Problem> {
    let items = value.as_array().ok_or_else(|| {
        wrong_type("messages", "a list of objects with \"role\" and \"content\"", value)
    })?;
    if items.is_empty() {
        return Err(Problem::new(ErrorCode::NoPrompt, "\"messages\" is empty"));
    }
    items.iter().enumerate().map(|(i, item)| message(i, item)).collect()
}

fn message(i: usize, item: &Value) -> Result<Value, Problem> {
    let Value::Object(fields) = item else {
        return Err(wrong_type(&format!("messages[{i}]"), "an object", item));
    };
    let field = |name: &str| fields.get(name).unwrap_or(&Value::Null);
    if !field("role").is_string() {
        return Err(wrong_type(&format!("messages[{i}].role"), "a string", field("role")));
    }
    let name = format!("messages[{i}].content");
    let content = match field("content") {
        Value::String(_) => return Ok(item.clone()),
        // A tool call has no text; the template has its own way with it.
        Value::Null if fields.contains_key("tool_calls") => return Ok(item.clone()),
        Value::Array(parts) => {
            parts.iter().map(|part| text_part(&name, part)).collect::<Result<Vec<_>, _>>()?
        }
        other => return Err(wrong_type(&name, "a string or a list of text parts", other)),
    };
    let mut fields = fields.clone();
    fields.insert("content".to_string(), Value::String(content.join("\n")));
    Ok(Value::Object(fields))
}

fn text_part<'a>(name: &str, part: &'a Value) -> Result<&'a str, Problem> {
    match (part.get("type").and_then(Value::as_str), part.get("text")) {
        (Some("text"), Some(Value::String(text))) => Ok(text),
        (Some("text") | None, _) => {
            Err(wrong_type(name, "a list of {\"type\": \"text\", \"text\": …}", part))
        }
        (Some(other), _) => Err(Problem::new(
            ErrorCode::UnsupportedField,
            format!("{name} has a part of type {other:?}; farm takes text only"),
        )),
    }
}

#[cfg(test)]
mod tests;
