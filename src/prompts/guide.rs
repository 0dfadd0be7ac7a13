//! What a text must be: the fields of a record and the flags that say so.
//!
//! A record says it in OpenAI's form, `response_format`, or by `json_schema` (a schema),
//! `regex` (a pattern) or `choices` (a list of texts). Whether the model can follow it
//! is found out by [`crate::engine::Guides`].

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::overrides::{shortened, wrong_type};
use super::{ErrorCode, Problem};
use crate::engine::{Guide, guide};
use crate::{Error, Result};

/// The fields of a record that hold a guide; at most one of them may.
pub const FIELDS: [&str; 4] = ["response_format", "json_schema", "regex", "choices"];

/// The guide that a record's fields ask for: `Some(None)` where they ask for plain
/// text, whatever the flags say; `None` where they are silent.
pub(super) fn of_record(fields: &Map<String, Value>) -> Result<Option<Option<Guide>>, Problem> {
    let mut given = FIELDS
        .into_iter()
        .filter_map(|field| Some((field, fields.get(field).filter(|value| !value.is_null())?)));
    let Some((field, value)) = given.next() else { return Ok(None) };
    if let Some((other, _)) = given.next() {
        let message = format!("the record has both {field:?} and {other:?}; keep one");
        return Err(Problem::new(ErrorCode::BadGuide, message));
    }
    let guide = match field {
        "response_format" => return response_format(value).map(Some),
        "json_schema" => schema(field, value)?,
        "regex" => match value {
            Value::String(pattern) => Guide::Regex(pattern.clone()),
            other => return Err(wrong_type(field, "a string (a regular expression)", other)),
        },
        _ => Guide::Choices(texts(field, value)?),
    };
    Ok(Some(Some(guide)))
}

/// OpenAI's `response_format`. Its `strict` changes nothing: a schema is always kept to.
fn response_format(value: &Value) -> Result<Option<Guide>, Problem> {
    let expected = "an object with \"type\": \"text\", \"json_object\" or \"json_schema\"";
    let unsupported = |what: &str| {
        let message =
            format!("{what} of \"response_format\" is not supported, got {}", shortened(value));
        Problem::new(ErrorCode::UnsupportedField, message)
    };
    let fields = value.as_object().ok_or_else(|| wrong_type("response_format", expected, value))?;
    match fields.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") if fields.contains_key("schema") => {
            Err(unsupported("a \"schema\" beside type \"json_object\" (use type \"json_schema\")"))
        }
        Some("json_object") => Ok(Some(Guide::JsonObject)),
        Some("json_schema") => {
            let wrapped = fields.get("json_schema").and_then(|wrapper| wrapper.get("schema"));
            let name = "response_format.json_schema.schema";
            schema(name, wrapped.unwrap_or(&Value::Null)).map(Some)
        }
        Some(other) => Err(unsupported(&format!("the type {other:?}"))),
        None => Err(wrong_type("response_format", expected, value)),
    }
}

fn schema(field: &str, value: &Value) -> Result<Guide, Problem> {
    match value {
        Value::Object(_) | Value::Bool(_) => Ok(Guide::json_schema(value)),
        other => Err(wrong_type(field, "a JSON schema (an object)", other)),
    }
}

fn texts(field: &str, value: &Value) -> Result<Vec<String>, Problem> {
    let expected = "a list of strings";
    let items = value.as_array().ok_or_else(|| wrong_type(field, expected, value))?;
    let text = |item: &Value| item.as_str().map(str::to_owned);
    items.iter().map(|item| text(item).ok_or_else(|| wrong_type(field, expected, item))).collect()
}

/// The guide of the flags, of which the command line lets at most one be given. The
/// grammar is made once here, so that nothing begins with one that cannot be followed.
///
/// # Errors
/// A file that is not a usable schema (input); a bad pattern or list (usage).
pub fn of_flags(
    json_schema: Option<&Path>,
    regex: Option<&str>,
    choices: &[String],
) -> Result<Option<Guide>> {
    if let Some(path) = json_schema {
        let guide =
            read_schema(path).and_then(|schema| guide::check(&schema).map(|()| schema)).map_err(
                |reason| Error::input(format!("--json-schema {}: {reason}", path.display())),
            )?;
        return Ok(Some(guide));
    }
    let (flag, guide) = match regex {
        Some(pattern) => ("--regex", Guide::Regex(pattern.to_owned())),
        None if choices.is_empty() => return Ok(None),
        None => {
            let choices = choices.iter().flat_map(|list| split_choices(list)).collect();
            ("--choices", Guide::Choices(choices))
        }
    };
    guide::check(&guide).map_err(|reason| Error::usage(format!("{flag}: {reason}")))?;
    Ok(Some(guide))
}

fn read_schema(path: &Path) -> Result<Guide, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    // One byte more than is taken: a longer one is refused by its length.
    let most = Guide::MAX_BYTES as u64 * 4;
    file.take(most + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > most {
        return Err(format!("more than {most} bytes"));
    }
    let schema = serde_json::from_str(&text).map_err(|error| format!("not valid JSON: {error}"))?;
    schema_of_file(&schema)
}

fn schema_of_file(schema: &Value) -> Result<Guide, String> {
    self::schema("the file", schema).map_err(|problem| problem.message)
}

/// The choices of one `--choices`: separated by commas; `\,` is a comma within one and
/// `\\` a backslash. Blanks count.
fn split_choices(list: &str) -> Vec<String> {
    let mut choices = vec![String::new()];
    let mut characters = list.chars().peekable();
    while let Some(character) = characters.next() {
        let escaped = characters.peek().copied().filter(|next| matches!(next, ',' | '\\'));
        let last = choices.last_mut().expect("there is at least one");
        match (character, escaped) {
            ('\\', Some(next)) => {
                characters.next();
                last.push(next);
            }
            (',', _) => choices.push(String::new()),
            _ => last.push(character),
        }
    }
    choices
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(fields: Value) -> Result<Option<Option<Guide>>, &'static str> {
        let Value::Object(fields) = fields else { panic!("an object") };
        of_record(&fields).map_err(|problem| problem.code.as_str())
    }

    #[test]
    fn every_form_of_a_record() {
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let kept =
            Guide::JsonSchema(r#"{"type":"object","properties":{"b":{},"a":{}}}"#.to_owned());
        let format = |format: Value| record(json!({"response_format": format}));
        assert_eq!(record(json!({"prompt": "x", "regex": null})), Ok(None));
        assert_eq!(format(json!({"type": "text"})), Ok(Some(None)));
        assert_eq!(format(json!({"type": "json_object"})), Ok(Some(Some(Guide::JsonObject))));
        let wrapped = json!({"name": "n", "strict": true, "schema": schema});
        let wrapped = json!({"type": "json_schema", "json_schema": wrapped});
        assert_eq!(format(wrapped), Ok(Some(Some(kept.clone()))));
        assert_eq!(record(json!({"json_schema": schema})), Ok(Some(Some(kept))));
        assert_eq!(record(json!({"regex": "a+"})), Ok(Some(Some(Guide::Regex("a+".into())))));
        let choices = Guide::Choices(vec!["a".into(), "b, c".into()]);
        assert_eq!(record(json!({"choices": ["a", "b, c"]})), Ok(Some(Some(choices))));
        for (fields, code) in [
            (json!({"response_format": "json"}), "wrong_type"),
            (json!({"response_format": {}}), "wrong_type"),
            (json!({"response_format": {"type": "grammar"}}), "unsupported_field"),
            (
                json!({"response_format": {"type": "json_object", "schema": {}}}),
                "unsupported_field",
            ),
            (json!({"response_format": {"type": "json_schema"}}), "wrong_type"),
            (json!({"json_schema": "{}"}), "wrong_type"),
            (json!({"regex": 1}), "wrong_type"),
            (json!({"choices": "a,b"}), "wrong_type"),
            (json!({"choices": [1]}), "wrong_type"),
            (json!({"regex": "a", "choices": ["a"]}), "bad_guide"),
        ] {
            assert_eq!(record(fields.clone()), Err(code), "{fields}");
        }
    }

    #[test]
    fn choices_are_split_at_commas() {
        for (list, expected) in [
            ("a", &["a"][..]),
            ("a,b", &["a", "b"]),
            (r"a\,b,c", &["a,b", "c"]),
            (r"\\,\n", &["\\", "\\n"]),
            ("a, b", &["a", " b"]),
            ("a,", &["a", ""]),
        ] {
            assert_eq!(split_choices(list), expected, "{list}");
        }
    }

    #[test]
    fn flags_that_cannot_be_followed_name_the_flag_and_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.json");
        let by_file = |text: &str| {
            std::fs::write(&path, text).unwrap();
            of_flags(Some(&path), None, &[])
        };
        assert_eq!(by_file(" {\"type\": \"null\"}\n").unwrap(), {
            Some(Guide::JsonSchema("{\"type\":\"null\"}".into()))
        });
        for (text, word) in
            [("{", "not valid JSON"), ("[]", "an object"), (r#"{"type": 3}"#, "type")]
        {
            let error = by_file(text).unwrap_err();
            assert_eq!(error.kind, crate::ErrorKind::Input);
            assert!(error.message.contains("s.json") && error.message.contains(word), "{error}");
        }
        let missing = of_flags(Some(&dir.path().join("none")), None, &[]).unwrap_err();
        assert!(missing.message.contains("none"), "{missing}");
        let pattern = of_flags(None, Some("("), &[]).unwrap_err();
        assert_eq!(pattern.kind, crate::ErrorKind::Usage);
        assert!(pattern.message.contains("--regex"), "{pattern}");
        let empty = of_flags(None, None, &["a,,b".into()]).unwrap_err();
        assert!(empty.message.contains("--choices"), "{empty}");
        let lists = of_flags(None, None, &["a,b".into(), "c".into()]).unwrap();
        assert_eq!(lists, Some(Guide::Choices(["a", "b", "c"].map(String::from).to_vec())));
        assert_eq!(of_flags(None, None, &[]).unwrap(), None);
    }
}
