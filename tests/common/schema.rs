//! A validator of JSON for the schemas of the tests: the keywords that they use, and
//! a panic on any other, so that nothing passes unchecked. Written without a look at
//! the library that farm follows schemas with.

use serde_json::Value;

/// Why `value` is not what `schema` (a part of `root`) asks for.
pub fn validate(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let fields = match schema {
        Value::Bool(true) => return Ok(()),
        Value::Bool(false) => return Err(format!("{value}: nothing is allowed here")),
        other => other.as_object().expect("a schema is an object"),
    };
    for (keyword, wanted) in fields {
        if !holds(root, fields, keyword, wanted, value)? {
            return Err(format!("{value} against {keyword}: {wanted}"));
        }
    }
    Ok(())
}

fn holds(
    root: &Value,
    fields: &serde_json::Map<String, Value>,
    keyword: &str,
    wanted: &Value,
    value: &Value,
) -> Result<bool, String> {
    let list = || wanted.as_array().expect("a list");
    let limit = || wanted.as_f64().expect("a number");
    let count = |count: usize| count as f64;
    Ok(match (keyword, value) {
        ("$defs" | "title" | "description" | "$schema", _) => true,
        ("type", _) => match wanted {
            Value::String(name) => is_type(name, value),
            names => names.as_array().unwrap().iter().any(|n| is_type(n.as_str().unwrap(), value)),
        },
        ("enum", _) => list().contains(value),
        ("const", _) => wanted == value,
        ("anyOf", _) => list().iter().any(|schema| validate(root, schema, value).is_ok()),
        ("$ref", _) => {
            let path = wanted.as_str().unwrap().strip_prefix('#').expect("a local reference");
            validate(root, root.pointer(path).expect("a definition"), value)?;
            true
        }
        ("properties", Value::Object(object)) => {
            for (name, schema) in wanted.as_object().unwrap() {
                object.get(name).map_or(Ok(()), |value| validate(root, schema, value))?;
            }
            true
        }
        ("required", Value::Object(object)) => {
            list().iter().all(|name| object.contains_key(name.as_str().unwrap()))
        }
        ("additionalProperties", Value::Object(object)) => {
            let known = fields.get("properties").and_then(Value::as_object);
            for (name, value) in object {
                if !known.is_some_and(|known| known.contains_key(name)) {
                    validate(root, wanted, value)?;
                }
            }
            true
        }
        ("items", Value::Array(items)) => {
            items.iter().try_for_each(|item| validate(root, wanted, item))?;
            true
        }
        ("minItems", Value::Array(items)) => count(items.len()) >= limit(),
        ("maxItems", Value::Array(items)) => count(items.len()) <= limit(),
        ("minLength", Value::String(text)) => count(text.chars().count()) >= limit(),
        ("maxLength", Value::String(text)) => count(text.chars().count()) <= limit(),
        ("format", Value::String(text)) if wanted == "date" => {
            matches("[0-9]{4}-[0-9]{2}-[0-9]{2}", text)
        }
        ("pattern", Value::String(text)) => matches(wanted.as_str().unwrap(), text),
        ("minimum", Value::Number(number)) => number.as_f64().unwrap() >= limit(),
        ("maximum", Value::Number(number)) => number.as_f64().unwrap() <= limit(),
        (
            "properties"
            | "required"
            | "additionalProperties"
            | "items"
            | "minItems"
            | "maxItems"
            | "minLength"
            | "maxLength"
            | "pattern"
            | "format"
            | "minimum"
            | "maximum",
            _,
        ) => true,
        (other, _) => panic!("the tests' validator does not know {other}"),
    })
}

fn is_type(name: &str, value: &Value) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("no such type: {other}"),
    }
}

/// Whether `pattern` matches all of `text`: `^`, `$`, plain characters, classes like
/// `[a-z0-9]`, and `{n}`, `{m,n}`, `+`, `*`, `?` after either; no alternatives. Takes as
/// many as it can each time, without turning back.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut pattern = pattern.trim_start_matches('^').trim_end_matches('$');
    let mut text = text.chars().peekable();
    while let Some(first) = pattern.chars().next() {
        let (class, rest) = match first {
            '[' => pattern[1..].split_once(']').expect("the end of a class"),
            '\\' => pattern[1..].split_at(1),
            _ => pattern.split_at(first.len_utf8()),
        };
        let (least, most, rest) = repetition(rest);
        let mut count = 0;
        while count < most && text.peek().is_some_and(|&character| in_class(class, character)) {
            text.next();
            count += 1;
        }
        if count < least {
            return false;
        }
        pattern = rest;
    }
    text.next().is_none()
}

fn repetition(pattern: &str) -> (usize, usize, &str) {
    match pattern.chars().next() {
        Some('+') => (1, usize::MAX, &pattern[1..]),
        Some('*') => (0, usize::MAX, &pattern[1..]),
        Some('?') => (0, 1, &pattern[1..]),
        Some('{') => {
            let (counts, rest) = pattern[1..].split_once('}').expect("the end of a repetition");
            let (least, most) = counts.split_once(',').unwrap_or((counts, counts));
            (least.parse().unwrap(), most.parse().unwrap(), rest)
        }
        _ => (1, 1, pattern),
    }
}

fn in_class(class: &str, character: char) -> bool {
    let class: Vec<char> = class.chars().collect();
    let range = |part: &[char]| part[1] == '-' && (part[0]..=part[2]).contains(&character);
    let is_plain = class.contains(&character) && (character != '-' || class.len() == 1);
    is_plain || class.windows(3).any(range)
}
