//! Every kind of tokenizer against the library it belongs to, over the 5,000 texts of
//! `tests/golden/tokenizers` (see its `generate.py`).

use std::path::PathBuf;

use serde_json::Value;

use super::{Tokenizer, read_json};
use crate::model::checkpoint::gguf::{self, Metadata};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers")
}

fn texts() -> Vec<String> {
    let lines = std::fs::read_to_string(folder().join("texts.jsonl")).expect("texts.jsonl");
    lines.lines().map(|line| serde_json::from_str(line).expect("a JSON string")).collect()
}

/// Key-value pairs as the GGUF reader gives them.
fn metadata(values: &Value) -> Metadata {
    let value = |value: &Value| match value {
        Value::Bool(b) => gguf::Value::Bool(*b),
        Value::Number(n) => gguf::Value::Int(n.as_i64().expect("an integer")),
        Value::String(s) => gguf::Value::String(s.clone()),
        Value::Array(list) if list.iter().all(Value::is_string) => {
            gguf::Value::Strings(list.iter().map(|s| s.as_str().unwrap().to_string()).collect())
        }
        Value::Array(list) if list.iter().all(Value::is_i64) => {
            gguf::Value::Ints(list.iter().map(|n| n.as_i64().unwrap()).collect())
        }
        Value::Array(list) => {
            gguf::Value::Floats(list.iter().map(|x| x.as_f64().unwrap() as f32).collect())
        }
        other => panic!("no GGUF value: {other}"),
    };
    let pairs = values.as_object().expect("an object").iter();
    Metadata(pairs.map(|(key, v)| (key.clone(), value(v))).collect())
}

fn open(reference: &Value) -> Tokenizer {
    let dir = folder().join(reference["kind"].as_str().expect("kind"));
    if let Some(pairs) = read_json(&dir.join("metadata.json")).unwrap() {
        let mut metadata = metadata(&pairs);
        metadata.0.extend(self::metadata(&reference["metadata"]).0);
        let file = dir.join("model.gguf");
        return Tokenizer::open(&file, None, Some(&metadata)).unwrap();
    }
    if reference["legacy"] == true {
        let copy = tempfile::tempdir().unwrap();
        let file = copy.path().join("tokenizer.model");
        std::fs::copy(dir.join("tokenizer.model"), file).unwrap();
        super::testing::write(copy.path(), "tokenizer_config.json", r#"{"legacy": true}"#);
        return Tokenizer::from_dir(copy.path()).unwrap();
    }
    Tokenizer::from_dir(&dir).unwrap()
}

fn ids(list: &Value) -> Vec<u32> {
    serde_json::from_value(list.clone()).expect("token ids")
}

fn crc32(ids: &[u32]) -> u32 {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    crc32fast::hash(&bytes)
}

/// Whether the reference gets text `index` back from its ids.
fn comes_back(reference: &Value, index: usize) -> bool {
    let Some(bits) = reference["round_trips"].as_str() else { return false };
    let byte = u8::from_str_radix(&bits[index / 8 * 2..][..2], 16).expect("hexadecimal");
    byte >> (index % 8) & 1 == 1
}

/// Compares one tokenizer; an error shows the first texts that differ.
fn check(name: &str, reference: &Value, texts: &[String]) -> Result<(), String> {
    let tokenizer = open(reference);
    let special = reference["add_special_tokens"] == true;
    let sums = std::fs::read(folder().join(format!("{name}.crc32"))).expect("checksums");
    let full: Vec<Vec<u32>> = reference["ids"].as_array().unwrap().iter().map(ids).collect();
    assert_eq!(sums.len(), texts.len() * 4, "{name}");
    let mut wrong = Vec::new();
    for (index, (text, sum)) in texts.iter().zip(sums.chunks_exact(4)).enumerate() {
        let got = tokenizer.encode(text, special).unwrap();
        if crc32(&got) != u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]) {
            let pieces: Vec<_> = got.iter().filter_map(|&id| tokenizer.id_to_token(id)).collect();
            wrong.push(format!("{index}: {text:?}: {pieces:?}, want {:?}", full.get(index)));
        }
        if comes_back(reference, index) && tokenizer.decode(&got, true).unwrap() != *text {
            wrong.push(format!("{index}: {text:?} does not come back from {got:?}"));
        }
    }
    let mut problems = wrong.iter().take(8).cloned().collect::<Vec<_>>();
    if let Some(ends) = reference.get("ends") {
        let mut got = tokenizer.eos_token_ids().to_vec();
        got.sort_unstable();
        if got != ids(ends) {
            problems.push(format!("a text ends at {got:?}, there at {ends}"));
        }
    }
    let differing = wrong.len();
    match problems.is_empty() {
        true => Ok(()),
        false => Err(format!("{name}: {differing} texts differ\n{}", problems.join("\n"))),
    }
}

#[test]
fn ids_are_those_of_the_library_that_each_form_belongs_to() {
    let texts = texts();
    assert_eq!(texts.len(), 5000);
    let references = read_json(&folder().join("references.json")).unwrap().expect("references");
    let only = std::env::var("FARM_GOLDEN_TOKENIZER").ok();
    let mut failures = Vec::new();
    for (name, reference) in references.as_object().expect("an object") {
        if only.as_ref().is_none_or(|only| only == name) {
            failures.extend(check(name, reference, &texts).err());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
