//! Whole files, on the tiny model's tokenizer and template.

use std::path::PathBuf;

use super::*;
use crate::ErrorKind;
use crate::model::tokenizer::Tokenizer;
use crate::prompts::ChatTemplate;

fn read(name: &str, content: &[u8]) -> Result<Dataset> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let tokenizer = Tokenizer::from_dir(&model).unwrap();
    let template = ChatTemplate::from_dir(&model, 0).unwrap();
    Dataset::read(
        &path,
        &Formatting {
            tokenizer: &tokenizer,
            template: template.as_ref(),
            marked: None,
            max_seq_len: 40,
            train_on_prompt: false,
            vocab_size: 512,
        },
    )
}

fn codes(dataset: &Dataset) -> Vec<(u64, &str)> {
    dataset.bad().iter().map(|record| (record.line, record.code.as_str())).collect()
}

#[test]
fn one_file_may_mix_formats_and_bad_records_cost_no_other() {
    let long = format!(r#"{{"text":"{}"}}"#, "x ".repeat(100));
    let lines = [
        r#"{"prompt":"a =>","completion":" a"}"#,
        "{broken",
        "",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"a"}]}"#,
        r#"{"messages":[{"role":"user","content":"a"}]}"#,
        r#"{"instruction":"a","output":"a"}"#,
        r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"a"}]}"#,
        &long,
    ];
    let mut content = lines.join("\n").into_bytes();
    content.extend(b"\n{\"text\":\"\xff\"}\n");
    let dataset = read("train.jsonl", &content).unwrap();
    assert_eq!(codes(&dataset), [(2, "bad_json"), (5, "no_targets"), (9, "not_utf8")]);
    assert_eq!((dataset.len(), dataset.truncated()), (5, 1));
    assert_eq!(dataset.example(4).token_ids.len(), 40);
    // The same conversation in three spellings.
    assert_eq!(dataset.example(1), dataset.example(2));
    assert_eq!(dataset.example(1), dataset.example(3));
    assert!(dataset.examples().all(|example| !example.is_target[0]));
}

/// Chunks and threads must not change the order.
#[test]
fn examples_keep_the_order_of_the_file() {
    let count = CHUNK + 500;
    let line = |i| format!("{{\"prompt\":\"{i}\",\"completion\":\"{i}\"}}\n");
    let content: String = (0..count).map(line).collect();
    let dataset = read("train.jsonl", content.as_bytes()).unwrap();
    assert_eq!(dataset.len(), count);
    let alone = read("train.jsonl", line(CHUNK + 7).as_bytes()).unwrap();
    assert_eq!(dataset.example(CHUNK + 7), alone.example(0));
}

#[test]
fn columns_of_a_csv_file_are_fields() {
    let pair = read("t.jsonl", br#"{"prompt":"a =>","completion":" a"}"#).unwrap();
    let alpaca = read("t.jsonl", br#"{"instruction":"a","input":"b","output":"c"}"#).unwrap();
    let text = read("t.jsonl", br#"{"text":"a b"}"#).unwrap();
    let cases = [
        ("prompt,completion\na =>, a\n", &pair),
        ("\u{feff}id,completion,prompt\r\n1, a,a =>\r\n", &pair),
        ("instruction,input,output\na,b,c\n", &alpaca),
        (" output ,seed,input,instruction,text\nc,x,b,a,t\n", &alpaca),
        ("text\na b\n", &text),
        ("text,label\n\"a b\",1\n", &text),
    ];
    for (content, expected) in cases {
        assert_eq!(&read("t.csv", content.as_bytes()).unwrap(), expected, "{content:?}");
    }
    let dataset = read("t.csv", b"prompt,completion\na,b,c\na,\"open\n\n\na,\na,b\n").unwrap();
    assert_eq!(codes(&dataset), [(2, "bad_csv"), (3, "bad_csv"), (6, "empty")]);
    assert_eq!(dataset.len(), 1);
}

#[test]
fn lines_of_text_are_examples() {
    let dataset = read("t.txt", b"a b\r\n\r\n  \n c d\n").unwrap();
    let same = read("t.jsonl", b"{\"text\":\"a b\"}\n{\"text\":\" c d\"}\n").unwrap();
    assert_eq!(dataset, same);
}

#[test]
fn an_unusable_file_is_an_input_error_that_names_it() {
    let cases: [(&str, &[u8], &str); 6] = [
        ("t.jsonl", b"", "no records"),
        ("t.jsonl", b"\n\n", "no records"),
        ("t.csv", b"", "empty"),
        ("t.jsonl", b"{}\n{", "none of its 2 records"),
        ("t.parquet", b"PAR1", "extension"),
        ("t.json", b"[{\"text\":\"a\"}]", "JSON array"),
    ];
    for (name, content, reason) in cases {
        let error = read(name, content).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Input, "{error}");
        assert!(error.message.starts_with("training data /"), "{error}");
        assert!(error.message.contains(name) && error.message.contains(reason), "{error}");
    }
}
