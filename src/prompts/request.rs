//! From a record's bytes to a [`Request`]: pure, and total over all bytes.
//!
//! A JSON record holds exactly one of `prompt` (a string), `messages` (objects with
//! `role` and `content`) and `prompt_token_ids`; maybe an `id` (a string or a number);
//! sampling overrides (see [`super::overrides`]); and other fields, which travel
//! untouched into the output's `metadata`. OpenAI batch lines are recognised by
//! `body` beside `custom_id`, `url` or `method`.

use serde_json::{Map, Value, json};

use super::overrides::{self, wrong_type};
use super::{
    ErrorCode, Problem, Prompt, RawBody, RawRecord, RecordError, Request, openai, raw_json,
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
    /// The input file, for error records ([`super::PromptReader::name`]).
    pub file: String,
}

/// Reads one record. Any bytes give either a request or an error that says where.
pub fn parse(raw: &RawRecord, defaults: &Defaults) -> Result<Request, RecordError> {
    match &raw.body {
        RawBody::Bad { code, message } => Err(Problem::new(*code, message.as_str())),
        RawBody::Text(bytes) => utf8(bytes).map(|text| {
            let prompt = as_chat(Prompt::Text(text.to_string()), defaults.chat);
            request(raw, prompt, defaults.params.clone())
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
            return Ok(Request { openai: Some(endpoint), ..request(raw, prompt, params) });
        }
        let prompt = as_chat(own_prompt(fields)?, defaults.chat);
        let params = overrides::apply(&defaults.params, fields)?;
        Ok(Request { metadata: metadata(&members), ..request(raw, prompt, params) })
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
        ["id", "prompt", "messages", "prompt_token_ids"]
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
mod tests {
    use proptest::prelude::*;

    use super::super::OpenAiEndpoint;
    use super::*;

    fn json_record(bytes: &[u8]) -> RawRecord {
        RawRecord { index: 4, line: 9, body: RawBody::Json(bytes.to_vec()) }
    }

    fn parsed(text: &str) -> Result<Request, RecordError> {
        let defaults = Defaults { file: "p.jsonl".into(), ..Defaults::default() };
        parse(&json_record(text.as_bytes()), &defaults)
    }

    #[test]
    fn a_record_carries_its_id_overrides_and_metadata() {
        let request =
            parsed(r#"{"prompt":"hi","id":"a","max_tokens":3,"k":1,"z":{"y":[]}}"#).unwrap();
        assert_eq!((request.index, request.line, request.id.as_str()), (4, 9, "a"));
        assert_eq!(request.prompt, Prompt::Text("hi".into()));
        assert_eq!(request.params.max_new_tokens, 3);
        assert_eq!(request.metadata.as_deref(), Some(r#"{"k":1,"z":{"y":[]}}"#));
        let plain = parsed(r#"{"prompt":"hi"}"#).unwrap();
        assert_eq!((plain.id.as_str(), plain.metadata), ("4", None));
        let number = parsed(r#"{"prompt":"","id":123456789012345678901234567890}"#).unwrap();
        assert_eq!(number.id, "123456789012345678901234567890");
    }

    /// "Untouched" means the spelling too: a Value would round these.
    #[test]
    fn metadata_keeps_what_a_number_type_would_lose() {
        let record = "{\"a\\u0041\": 1.10, \"prompt\" : \"x\",\t\"big\":98765432109876543210987,\r\"e\":1E5}";
        let request = parsed(record).unwrap();
        let expected = r#"{"a\u0041":1.10,"big":98765432109876543210987,"e":1E5}"#;
        assert_eq!(request.metadata.as_deref(), Some(expected));
    }

    #[test]
    fn messages_and_chat() {
        let request = parsed(
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","name":"n",
            "content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#,
        )
        .unwrap();
        let expected = vec![
            json!({"role": "system", "content": "s"}),
            json!({"role": "user", "name": "n", "content": "a\nb"}),
        ];
        assert_eq!(request.prompt, Prompt::Messages(expected));

        let chat = Defaults { chat: true, ..Defaults::default() };
        let user = Prompt::Messages(vec![json!({"role": "user", "content": "hi"})]);
        for body in [RawBody::Text(b"hi".to_vec()), RawBody::Json(br#"{"prompt":"hi"}"#.to_vec())] {
            let raw = RawRecord { index: 0, line: 1, body };
            assert_eq!(parse(&raw, &chat).unwrap().prompt, user);
        }
    }

    #[test]
    fn openai_batch_lines() {
        let chat = r#"{"custom_id":"c1","method":"POST","url":"/v1/chat/completions","body":
            {"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":5,"stream":false}}"#;
        let request = parsed(chat).unwrap();
        assert_eq!((request.id.as_str(), request.metadata), ("c1", None));
        assert_eq!(request.openai, Some(OpenAiEndpoint::ChatCompletions));
        assert_eq!(request.params.max_new_tokens, 5);
        let completion = |prompt: &str| {
            parsed(&format!(
                r#"{{"custom_id":"c","url":"/v1/completions","body":{{"prompt":{prompt}}}}}"#
            ))
            .map(|request| request.prompt)
            .map_err(|error| error.code)
        };
        assert_eq!(completion(r#""hi""#), Ok(Prompt::Text("hi".into())));
        assert_eq!(completion(r#"["hi"]"#), Ok(Prompt::Text("hi".into())));
        assert_eq!(completion("[1,2]"), Ok(Prompt::TokenIds(vec![1, 2])));
        assert_eq!(completion("[[1,2]]"), Ok(Prompt::TokenIds(vec![1, 2])));
        assert_eq!(completion(r#"["a","b"]"#), Err(ErrorCode::UnsupportedField));
        let own = parsed(r#"{"prompt":"x","url":"u","body":"b","custom_id":"c"}"#).unwrap();
        assert_eq!((own.openai, own.id.as_str()), (None, "4"));
    }

    /// Every kind of bad record that a JSON line can be, with its stable code.
    #[test]
    fn bad_records_have_stable_codes() {
        let batch = |rest: &str| format!(r#"{{"custom_id":"c","method":"POST",{rest}}}"#);
        let chat = |rest: &str| {
            let message = r#""messages":[{"role":"user","content":"x"}]"#;
            batch(&format!(r#""url":"/v1/chat/completions","body":{{{message},{rest}}}"#))
        };
        let cases: Vec<(String, &str)> = vec![
            ("{".into(), "bad_json"),
            ("{\"prompt\":\"x\"} {}".into(), "bad_json"),
            ("{\"prompt\":NaN}".into(), "bad_json"),
            (r#"{"prompt":"\ud800"}"#.into(), "bad_json"),
            ("[".repeat(200_000), "bad_json"),
            ("[1]".into(), "not_an_object"),
            ("\"x\"".into(), "not_an_object"),
            ("null".into(), "not_an_object"),
            ("{}".into(), "no_prompt"),
            (r#"{"prompt":null}"#.into(), "no_prompt"),
            (r#"{"messages":[]}"#.into(), "no_prompt"),
            (r#"{"prompt":"x","messages":[]}"#.into(), "ambiguous_prompt"),
            (r#"{"prompt":"x","prompt_token_ids":[1]}"#.into(), "ambiguous_prompt"),
            (r#"{"prompt":7}"#.into(), "wrong_type"),
            (r#"{"prompt":["x"]}"#.into(), "wrong_type"),
            (r#"{"prompt":"x","id":[]}"#.into(), "wrong_type"),
            (r#"{"prompt":"x","temperature":"hot"}"#.into(), "wrong_type"),
            (r#"{"prompt":"x","top_p":2}"#.into(), "out_of_range"),
            (r#"{"messages":"x"}"#.into(), "wrong_type"),
            (r#"{"messages":["x"]}"#.into(), "wrong_type"),
            (r#"{"messages":[{"content":"x"}]}"#.into(), "wrong_type"),
            (r#"{"messages":[{"role":"user"}]}"#.into(), "wrong_type"),
            (r#"{"messages":[{"role":"user","content":["x"]}]}"#.into(), "wrong_type"),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#.into(),
                "unsupported_field",
            ),
            (r#"{"prompt_token_ids":[-1]}"#.into(), "wrong_type"),
            (r#"{"prompt_token_ids":[4294967296]}"#.into(), "wrong_type"),
            (batch(r#""url":"/v1/embeddings","body":{}"#), "unsupported_url"),
            (batch(r#""url":3,"body":{}"#), "wrong_type"),
            (batch(r#""url":"/v1/completions","body":3"#), "wrong_type"),
            (batch(r#""url":"/v1/completions","body":{}"#), "no_prompt"),
            (batch(r#""url":"/v1/chat/completions","body":{}"#), "no_prompt"),
            (chat(r#""tools":[{"type":"function"}]"#), "unsupported_field"),
            (chat(r#""response_format":{"type":"json_object"}"#), "unsupported_field"),
            (chat(r#""n":17"#), "out_of_range"),
            (
                r#"{"custom_id":"c","method":"GET","url":"/v1/completions","body":{}}"#.into(),
                "wrong_type",
            ),
        ];
        for (line, code) in cases {
            let error = parsed(&line).expect_err(&line);
            assert_eq!(error.code.as_str(), code, "{line:.80}: {error}");
            assert_eq!((error.file.as_str(), error.line, error.index), ("p.jsonl", 9, 4));
            assert!(error.message.len() < 300, "a message stays readable: {error}");
            assert_eq!(error.openai, line.contains("\"custom_id\""));
            assert_eq!(error.id.as_deref(), error.openai.then_some("c"));
        }
        let defaults = Defaults::default();
        let bad = RawBody::Bad { code: ErrorCode::LineTooLong, message: "too long".into() };
        for (body, code) in [
            (RawBody::Text(vec![b'a', 0xff]), "not_utf8"),
            (RawBody::Json(b"{\"prompt\":\"\xff\"}".to_vec()), "not_utf8"),
            (bad, "line_too_long"),
        ] {
            let error = parse(&RawRecord { index: 0, line: 1, body }, &defaults).unwrap_err();
            assert_eq!(error.code.as_str(), code);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Whatever a line holds, it is one request or one error, and never a panic.
        #[test]
        fn any_bytes_give_one_answer(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let defaults = Defaults::default();
            for body in [RawBody::Text(bytes.clone()), RawBody::Json(bytes)] {
                let _ = parse(&RawRecord { index: 0, line: 1, body }, &defaults);
            }
        }

        /// The same for lines that look like records, which get further in.
        #[test]
        fn any_near_record_gives_one_answer(
            parts in prop::collection::vec(prop::sample::select(vec![
                "{", "}", "[", "]", ",", ":", "\"prompt\"", "\"messages\"", "\"id\"", "\"body\"",
                "\"url\"", "\"custom_id\"", "\"stop\"", "\"n\"", "\"é\\\"\"", "1e999", "-1", "null", " ",
            ]), 0..14),
        ) {
            let _ = parsed(&parts.concat());
            let _ = parsed(&format!("{{\"prompt\":\"x\",{}}}", parts.concat()));
        }

        /// Metadata goes through as it came: value, order and spelling.
        #[test]
        fn metadata_is_untouched(
            entries in prop::collection::vec(("m[a-z\"\\\\é]{0,4}", "\\PC{0,8}", any::<f64>()), 1..5),
        ) {
            let members: Vec<String> = entries
                .iter()
                .map(|(key, text, number)| format!("{}:[{},{}]", json!(key), json!(text), json!(number)))
                .collect();
            let object = format!("{{{}}}", members.join(","));
            let line = format!("{{\"prompt\":\"x\",{},\"seed\":1}}", members.join(","));
            prop_assert_eq!(parsed(&line).unwrap().metadata, Some(object));
        }
    }
}
