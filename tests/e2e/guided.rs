//! Texts that must be something: by flags, by fields of a record, in OpenAI's form.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::farm::{Farm, Launch, Scratch};

#[path = "../common/schema.rs"]
mod schema;

fn tiny() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

fn farm(scratch: &Scratch, name: &str) -> Farm {
    let farm = scratch.farm(name, Launch::Alone, "generate").model(tiny());
    farm.args(["--max-new-tokens", "48", "--temperature", "1", "--seed", "5"])
}

fn a_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 30},
            "score": {"type": "integer", "minimum": 0, "maximum": 10},
            "tags": {"type": "array", "items": {"enum": ["old", "new", null]}, "maxItems": 3},
            "by": {"$ref": "#/$defs/person"},
        },
        "required": ["title", "score", "by"], "additionalProperties": false,
        "$defs": {"person": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"}},
            "required": ["name"], "additionalProperties": false,
        }},
    })
}

fn prompts(scratch: &Scratch, count: usize) -> PathBuf {
    let lines: Vec<String> = (0..count)
        .map(|i| json!({"prompt": format!("Once upon a time {i}")}).to_string())
        .collect();
    scratch.file("prompts.jsonl", lines.join("\n"))
}

#[test]
fn two_hundred_records_follow_the_schema_of_the_flag() {
    let scratch = Scratch::new();
    let schema = a_schema();
    let file = scratch.file("schema.json", schema.to_string());
    let prompts = prompts(&scratch, 200);
    let farm = farm(&scratch, "schema").prompts(prompts).flag("--json-schema", file);
    farm.ends_with(0);
    let records = farm.records();
    assert_eq!(records.len(), 200);
    for record in records {
        let text = record["text"].as_str().expect("a text");
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(schema::validate(&schema, &schema, &value), Ok(()), "{text}");
        assert_eq!(record["finish_reason"], "stop", "{text}");
    }
}

#[test]
fn records_say_themselves_what_they_want() {
    let scratch = Scratch::new();
    let body = |format: Value| {
        json!({"custom_id": "c", "method": "POST", "url": "/v1/completions",
               "body": {"prompt": "A", "response_format": format}})
    };
    let wrapped =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": a_schema()}});
    let lines = [
        json!({"prompt": "A", "regex": "[0-9]{3}-[a-f]+"}),
        json!({"prompt": "A", "choices": ["red", "dark red", "blue"]}),
        json!({"prompt": "A", "json_schema": a_schema()}),
        json!({"prompt": "A", "response_format": {"type": "text"}, "n": 1, "max_new_tokens": 5}),
        json!({"prompt": "A"}),
        json!({"prompt": "A", "regex": "("}),
        json!({"prompt": "A", "json_schema": {"type": "array", "uniqueItems": true}}),
        body(wrapped),
        body(json!({"type": "json_object"})),
    ];
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    let prompts = scratch.file("own.jsonl", lines.join("\n"));
    let farm = farm(&scratch, "own").prompts(prompts).args(["--choices", r"yes,no\, never"]);
    farm.ends_with(4);
    let records = farm.records();
    let text = |i: usize| records[i]["text"].as_str().expect("a text");
    assert!(schema::matches("[0-9]{3}-[a-f]+", text(0)), "{}", text(0));
    assert!(["red", "dark red", "blue"].contains(&text(1)), "{}", text(1));
    let schema = a_schema();
    let by_field: Value = serde_json::from_str(text(2)).expect("JSON");
    assert_eq!(schema::validate(&schema, &schema, &by_field), Ok(()));
    assert!(!["yes", "no, never"].contains(&text(3)), "{}", text(3));
    assert!(["yes", "no, never"].contains(&text(4)), "{}", text(4));
    for i in [5, 6] {
        assert_eq!(records[i]["error"]["code"], "bad_guide", "{}", records[i]);
    }
    for (i, schema) in [(7, schema), (8, json!({"type": "object"}))] {
        let text = records[i]["response"]["body"]["choices"][0]["text"].as_str().expect("a text");
        let value: Value = serde_json::from_str(text).expect("JSON");
        assert_eq!(schema::validate(&schema, &schema, &value), Ok(()), "{text}");
    }
}

/// The schema's content is part of the run, its name is not.
#[test]
fn another_schema_is_another_run() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch, 3);
    let run = |name: &str, schema: Value| {
        let file = scratch.file(name, schema.to_string());
        farm(&scratch, "run").prompts(&prompts).flag("--json-schema", file)
    };
    let ordered = |first: &str, second: &str| {
        json!({"type": "object", "properties": {first: {"type": "null"}, second: {"type": "null"}},
               "required": [first, second], "additionalProperties": false})
    };
    let first = run("a.json", ordered("x", "y"));
    first.ends_with(0);
    let output = first.output();
    assert_eq!(first.records()[0]["text"], r#"{"x": null, "y": null}"#);
    let same = run("b.json", ordered("x", "y"));
    same.ends_with(0);
    assert_eq!(same.output(), output);
    let refused = run("c.json", ordered("y", "x")).ends_with(3);
    assert!(refused.stderr.contains("guide"), "{}", refused.stderr);
}

#[test]
fn what_cannot_be_followed_is_refused_before_any_work() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch, 1);
    let bad = scratch.file("bad.json", r#"{"type": "strin"}"#);
    for (name, flag, value, code, word) in [
        ("file", "--json-schema", bad.to_str().expect("a path"), 3, "bad.json"),
        ("missing", "--json-schema", "/none/s.json", 3, "/none/s.json"),
        ("pattern", "--regex", "(", 2, "--regex"),
        ("choices", "--choices", "a,,b", 2, "--choices"),
    ] {
        let farm = farm(&scratch, name).prompts(&prompts).flag(flag, value);
        let ended = farm.ends_with(code);
        assert!(ended.stderr.contains(word), "{}", ended.stderr);
        assert!(!farm.out().exists());
    }
    let both = farm(&scratch, "both").prompts(&prompts).args(["--regex", "a", "--choices", "b"]);
    both.ends_with(2);
}
