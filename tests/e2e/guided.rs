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

/// What people extract from documents: nested, lists with bounds, enums, numbers, references,
/// alternatives, optional parts.
fn an_invoice() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Invoice",
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4,6}$"},
            "currency": {"enum": ["EUR", "USD", "GBP", "CHF"]},
            "issued": {"type": "string", "format": "date"},
            "paid": {"type": ["boolean", "null"]},
            "seller": {"$ref": "#/$defs/party"},
            "buyer": {"anyOf": [{"$ref": "#/$defs/party"}, {"type": "null"}]},
            "lines": {
                "type": "array", "minItems": 1, "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "item": {"type": "string", "minLength": 3, "maxLength": 20},
                        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
                        "price": {"type": "number", "minimum": 0},
                        "discounts": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
                    },
                    "required": ["item", "quantity", "price"], "additionalProperties": false,
                },
            },
            "notes": {"type": "string", "maxLength": 60},
        },
        "required": ["number", "currency", "seller", "buyer", "lines"],
        "additionalProperties": false,
        "$defs": {"party": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 24},
                "country": {"type": "string", "pattern": "^[A-Z]{2}$"},
                "contacts": {
                    "type": "array", "minItems": 2, "maxItems": 3,
                    "items": {"anyOf": [
                        {"type": "object", "properties": {"phone": {"type": "integer"}},
                         "required": ["phone"], "additionalProperties": false},
                        {"type": "string", "maxLength": 8},
                    ]},
                },
            },
            "required": ["name", "country"], "additionalProperties": false,
        }},
    })
}

/// With every amount of room from nothing to plenty, greedy and at temperature 1: as soon as
/// one text can be whole, all that have as much room are; and none that ends is anything else.
#[test]
fn a_schema_from_life_is_followed_in_any_room() {
    let scratch = Scratch::new();
    let schema = an_invoice();
    let file = scratch.file("invoice.json", schema.to_string());
    let rooms: Vec<usize> = [1, 60, 120, 130, 140, 150, 160, 170, 250].to_vec();
    let lines: Vec<String> = rooms
        .iter()
        .flat_map(|room| [0, 1].map(|temperature| (room, temperature)))
        .map(|(room, temperature)| {
            let prompt = format!("An invoice of {room} items");
            json!({"prompt": prompt, "max_new_tokens": room, "temperature": temperature})
                .to_string()
        })
        .collect();
    let prompts = scratch.file("rooms.jsonl", lines.join("\n"));
    let run = |name: &str, launch: Launch, batch: &str| {
        let farm = scratch.farm(name, launch, "generate").model(tiny()).prompts(&prompts);
        let farm = farm.flag("--json-schema", &file).flag("--max-batch-size", batch);
        farm.ends_with(0);
        farm
    };
    let farm = run("rooms", Launch::Alone, "16");
    let mut suffices = false;
    for record in farm.records() {
        let text = record["text"].as_str().expect("a text");
        let whole = record["finish_reason"] == "stop";
        assert!(whole || !suffices, "{record}");
        suffices = whole;
        if whole {
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert_eq!(schema::validate(&schema, &schema, &value), Ok(()), "{text}");
        }
    }
    assert!(suffices);
    assert!(farm.output() == run("other", Launch::Threads(2), "3").output());
}

/// What is longer than the shortest text by nothing, and choices of all kinds.
#[test]
fn patterns_and_choices_end_in_time() {
    let scratch = Scratch::new();
    let choices = json!(["a", "ab", "ab", "größer", "日本", "😀!", " a", "x, y", "a\\\"b"]);
    let mut lines = Vec::new();
    for room in 1..=20 {
        lines.push(json!({"prompt": "A", "regex": "[0-9]+x", "max_new_tokens": room}));
        lines.push(json!({"prompt": "A", "regex": "(yes|no)[.!]*", "max_new_tokens": room}));
        lines.push(json!({"prompt": "A", "choices": choices, "max_new_tokens": room}));
    }
    let prompts: Vec<String> = lines.iter().map(Value::to_string).collect();
    let prompts = scratch.file("prompts.jsonl", prompts.join("\n"));
    let farm = farm(&scratch, "ends").prompts(prompts);
    farm.ends_with(0);
    for (line, record) in lines.iter().zip(farm.records()) {
        let (text, room) = (record["text"].as_str().expect("a text"), &line["max_new_tokens"]);
        if room.as_u64() < Some(12) && record["finish_reason"] == "length" {
            assert!(room.as_u64() < Some(4), "{line}: {record}");
            continue;
        }
        assert_eq!(record["finish_reason"], "stop", "{line}: {record}");
        let follows = match line["regex"].as_str() {
            Some("[0-9]+x") => schema::matches("[0-9]+x", text),
            Some(_) => {
                let rest = text.strip_prefix("yes").or(text.strip_prefix("no"));
                rest.is_some_and(|rest| rest.chars().all(|c| ".!".contains(c)))
            }
            None => choices.as_array().expect("a list").contains(&json!(text)),
        };
        assert!(follows, "{line}: {record}");
    }
}

/// OpenAI's `response_format` in every kind of record.
#[test]
fn response_formats_hold_in_all_kinds_of_records() {
    let scratch = Scratch::new();
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let model = scratch.path("model");
    std::fs::create_dir(&model).expect("a folder");
    for entry in std::fs::read_dir(tiny()).expect("the model") {
        let file = entry.expect("a file").path();
        std::fs::copy(&file, model.join(file.file_name().expect("a name"))).expect("a copy");
    }
    std::fs::write(model.join("chat_template.jinja"), template).expect("a template");
    let strict = json!({"type": "json_schema",
        "json_schema": {"name": "n", "strict": true, "schema": a_schema()}});
    let formats = [strict, json!({"type": "json_object"}), json!({"type": "text"})];
    let messages = json!([{"role": "user", "content": "Once"}]);
    let mut lines = Vec::new();
    for format in &formats {
        lines.push(json!({"prompt": "Once", "response_format": format}));
        lines.push(json!({"messages": messages, "response_format": format}));
        for (url, field, prompt) in [
            ("/v1/completions", "prompt", json!("Once")),
            ("/v1/chat/completions", "messages", messages.clone()),
        ] {
            let body = json!({"model": "m", field: prompt, "response_format": format});
            lines.push(json!({"custom_id": "c", "method": "POST", "url": url, "body": body}));
        }
    }
    let wrong = json!({"type": "grammar"});
    lines.push(json!({"messages": messages, "response_format": wrong}));
    let prompts: Vec<String> = lines.iter().map(Value::to_string).collect();
    let prompts = scratch.file("formats.jsonl", prompts.join("\n"));
    let farm = scratch.farm("formats", Launch::Alone, "generate").model(&model);
    // Every record has its own format in the place of this.
    let farm = farm.prompts(prompts).args(["--max-new-tokens", "60", "--choices", "flag"]);
    farm.ends_with(4);
    let records = farm.records();
    let schema = a_schema();
    for (i, record) in records[..12].iter().enumerate() {
        let choice = &record["response"]["body"]["choices"][0];
        let texts = [&record["text"], &choice["text"], &choice["message"]["content"]];
        let text = texts.iter().find_map(|text| text.as_str()).expect("a text");
        let object = json!({"type": "object"});
        let schema = match i / 4 {
            0 => &schema,
            1 => &object,
            _ => {
                assert_ne!(text, "flag", "{record}");
                continue;
            }
        };
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {record}"));
        assert_eq!(schema::validate(schema, schema, &value), Ok(()), "{text}");
    }
    assert_eq!(records[12]["error"]["code"], "unsupported_field");
}

/// A score writes no text: what it should be does not matter.
#[test]
fn a_score_makes_no_grammar() {
    let scratch = Scratch::new();
    let lines = [
        json!({"prompt": "Once upon", "regex": "("}),
        json!({"prompt": "Once upon", "choices": ["a"]}),
    ];
    let prompts = scratch.file("p.jsonl", lines.map(|line| line.to_string()).join("\n"));
    let farm = scratch.farm("score", Launch::Alone, "score").model(tiny()).prompts(prompts);
    farm.ends_with(0);
    assert!(farm.records().iter().all(|record| record["score"]["tokens"].is_u64()));
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
    let unique = scratch.file("unique.json", r#"{"type": "array", "uniqueItems": true}"#);
    for (name, flag, value, code, word) in [
        ("file", "--json-schema", bad.to_str().expect("a path"), 3, "bad.json"),
        ("missing", "--json-schema", "/none/s.json", 3, "/none/s.json"),
        ("keyword", "--json-schema", unique.to_str().expect("a path"), 3, "\"uniqueItems\""),
        ("keywords", "--json-schema", unique.to_str().expect("a path"), 3, "minItems"),
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
