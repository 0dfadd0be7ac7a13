//! JSON values for templates, and Python's `json.dumps` of template values.

use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// A JSON value as a template sees it; objects keep their order, as in Python.
pub(crate) fn to_template(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (_, Some(value)) => Value::from(value),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(to_template).collect::<Vec<_>>()),
        Json::Object(fields) => Value::from_object(OrderedMap(
            fields.iter().map(|(key, value)| (key.clone(), to_template(value))).collect(),
        )),
    }
}

/// A map in the order of its source; the template engine's own sorts its keys.
#[derive(Debug)]
struct OrderedMap(Vec<(String, Value)>);

impl Object for OrderedMap {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(key, _)| Value::from(key.as_str())).collect())
    }
}

/// The `tojson` filter as transformers defines it: `json.dumps(value,
/// ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, without
/// Jinja's own HTML escapes and sorting.
pub(crate) fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<usize>,
    options: Kwargs,
) -> Result<Value, Error> {
    let named_indent: Option<usize> = options.get("indent")?;
    let named_ascii: Option<bool> = options.get("ensure_ascii")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let indent = named_indent.or(indent);
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: two separators are needed",
            ));
        }
        None if indent.is_some() => (",".to_string(), ": ".to_string()),
        None => (", ".to_string(), ": ".to_string()),
    };
    let style = JsonStyle {
        indent,
        comma,
        colon,
        sort_keys: sort_keys.unwrap_or(false),
        ensure_ascii: named_ascii.or(ensure_ascii).unwrap_or(false),
    };
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(Value::from(out))
}

struct JsonStyle {
    indent: Option<usize>,
    comma: String,
    colon: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl JsonStyle {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.write_text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_items(out, ('[', ']'), &items, depth, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_items(out, ('{', '}'), &keys, depth, |out, key| {
                    self.write_text(out, &key.to_string());
                    out.push_str(&self.colon);
                    self.write(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                let message = format!("tojson: a value of type {kind} is not JSON");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        out: &mut String,
        (open, close): (char, char),
        items: &[Value],
        depth: usize,
        mut item: impl FnMut(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(open);
        for (i, value) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.comma);
            }
            new_line(out, depth + 1);
            item(out, value)?;
        }
        if !items.is_empty() {
            new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn write_text(&self, out: &mut String, text: &str) {
        let quoted = Json::from(text).to_string();
        if !self.ensure_ascii {
            return out.push_str(&quoted);
        }
        for character in quoted.chars() {
            if character.is_ascii() {
                out.push(character);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

/// Python's `repr` of a float: scientific from 1e16 and below 1e-4, with a sign and
/// two digits in the exponent.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        let sign = if value < 0.0 { "-" } else { "" };
        return if value.is_nan() { "NaN".to_string() } else { format!("{sign}Infinity") };
    }
    let scientific = format!("{value:e}");
    match scientific.split_once('e').map(|(digits, exponent)| (digits, exponent.parse::<i32>())) {
        Some((digits, Ok(exponent))) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;
    use serde_json::json;

    use super::*;

    fn dumped(value: Json, call: &str) -> String {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        let context = Value::from_object(OrderedMap(vec![("v".into(), to_template(&value))]));
        env.render_str(&format!("{{{{ v | {call} }}}}"), context).unwrap()
    }

    /// Expected values are CPython's `json.dumps`.
    #[test]
    fn tojson_is_pythons_json_dumps() {
        let value =
            json!({"z": [1, -2.0, true, null], "a": {"é<'&": "\"\n\u{7f}\u{1}"}, "e": [], "o": {}});
        assert_eq!(
            dumped(value.clone(), "tojson"),
            "{\"z\": [1, -2.0, true, null], \"a\": {\"é<'&\": \"\\\"\\n\u{7f}\\u0001\"}, \"e\": [], \"o\": {}}"
        );
        assert_eq!(
            dumped(json!({"b": [1, {"c": 2}], "e": []}), "tojson(indent=2)"),
            "{\n  \"b\": [\n    1,\n    {\n      \"c\": 2\n    }\n  ],\n  \"e\": []\n}"
        );
        assert_eq!(
            dumped(
                json!({"b": 1, "a": "é🐄"}),
                "tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':'))"
            ),
            r#"{"a":"\u00e9\ud83d\udc04","b":1}"#
        );
    }

    #[test]
    fn floats_are_spelled_as_python_does() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e16, "1e+16"),
            (1.5e15, "1500000000000000.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-1.25e-7, "-1.25e-07"),
            (1e300, "1e+300"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (value, expected) in cases {
            assert_eq!(python_float(value), expected);
        }
    }
}
