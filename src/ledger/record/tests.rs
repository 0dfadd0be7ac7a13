//! The output form is a contract with users' scripts: whole lines are compared.

use serde_json::{Value, json};

use super::*;
use crate::engine::SamplingParams;
use crate::prompts::{
    Defaults, ErrorCode, OpenAiEndpoint, Preparer, Prompt, PromptReader, ReadOptions, Request,
};

fn run() -> RunInfo {
    RunInfo { key: "k".into(), created_unix_seconds: 7, model: "m".into() }
}

fn prepared(openai: Option<OpenAiEndpoint>) -> Prepared {
    Prepared {
        request: Request {
            index: 3,
            line: 4,
            id: "a\n".into(),
            prompt: Prompt::Text("p".into()),
            params: SamplingParams::default(),
            adapter: None,
            metadata: None,
            openai,
        },
        prompt_text: "p".into(),
        prompt_token_ids: vec![1, 2],
    }
}

fn completion(text: &str) -> Completion {
    Completion {
        text: text.into(),
        token_ids: vec![8, 9],
        finish_reason: FinishReason::Stop,
        logprobs: None,
    }
}

fn text(line: Vec<u8>) -> String {
    let line = String::from_utf8(line).unwrap();
    let (content, end) = line.split_at(line.len() - 1);
    assert_eq!(end, "\n");
    assert!(!content.contains(['\n', '\r']), "one line: {content}");
    content.to_string()
}

#[test]
fn a_generated_record() {
    let line = text(completion_line(&run(), &prepared(None), &[completion("x\n\"é")]));
    assert_eq!(
        line,
        r#"{"id":"a\n","index":3,"prompt":"p","text":"x\n\"é","finish_reason":"stop","usage":{"prompt_tokens":2,"completion_tokens":2}}"#
    );
}

#[test]
fn optional_fields_keep_their_order() {
    let mut record = prepared(None);
    record.request.metadata = Some(r#"{"big":1e400,"z":{}}"#.into());
    record.request.params.return_token_ids = true;
    let top = vec![TopLogprob { token: "u".into(), token_id: 5, logprob: -0.25 }];
    let logprobs =
        vec![TokenLogprob { token: "t".into(), token_id: 8, logprob: f32::NEG_INFINITY, top }];
    let completion = Completion { logprobs: Some(logprobs), ..completion("x") };
    let line = text(completion_line(&run(), &record, &[completion]));
    assert!(
        line.ends_with(
            r#""completion_tokens":2},"token_ids":[8,9],"logprobs":[{"token":"t","token_id":8,"logprob":null,"top":[{"token":"u","token_id":5,"logprob":-0.25}]}],"metadata":{"big":1e400,"z":{}}}"#
        ),
        "{line}"
    );
}

#[test]
fn several_completions_are_listed_and_counted() {
    let line = text(completion_line(&run(), &prepared(None), &[completion("x"), completion("y")]));
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&line["text"], &line["usage"]["completion_tokens"]), (&json!("x"), &json!(4)));
    assert_eq!(
        line["completions"],
        json!([{"index": 0, "text": "x", "finish_reason": "stop"},
               {"index": 1, "text": "y", "finish_reason": "stop"}])
    );
}

fn record_error(id: Option<&str>, openai: bool) -> RecordError {
    RecordError {
        code: ErrorCode::NoPrompt,
        message: "no \"prompt\"".into(),
        file: "p.jsonl".into(),
        line: 12,
        index: 11,
        id: id.map(str::to_string),
        openai,
    }
}

#[test]
fn an_error_record_names_file_and_line() {
    let line = text(error_line(&run(), &record_error(None, false)));
    assert_eq!(
        line,
        r#"{"id":"11","index":11,"prompt":null,"text":null,"finish_reason":"error","usage":{"prompt_tokens":0,"completion_tokens":0},"error":{"code":"no_prompt","message":"no \"prompt\"","file":"p.jsonl","line":12}}"#
    );
    let line = text(error_line(&run(), &record_error(Some("mine"), false)));
    assert!(line.starts_with(r#"{"id":"mine","index":11,"#));
}

#[test]
fn a_score_is_added_to_the_record() {
    let score = Score::new(&[-1.0, -3.0]);
    let line = text(score_line(&run(), &prepared(None), &score));
    let line: Value = serde_json::from_str(&line).unwrap();
    let expected = json!({"logprob": -4.0, "tokens": 2, "perplexity": 2f64.exp(),
        "token_logprobs": [null, -1.0, -3.0]});
    assert_eq!(line["score"], expected);
    assert_eq!(Score::new(&[]).perplexity, None);
}

#[test]
fn openai_chat_answers() {
    let record = prepared(Some(OpenAiEndpoint::ChatCompletions));
    let line = text(completion_line(&run(), &record, &[completion("x")]));
    assert_eq!(line, text(completion_line(&run(), &record, &[completion("x")])), "reruns agree");
    let line: Value = serde_json::from_str(&line).unwrap();
    let keys: Vec<_> = line.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["id", "custom_id", "response", "error"]);
    assert!(line["id"].as_str().unwrap().starts_with("batch_req_"));
    let response = &line["response"];
    assert_eq!((&response["status_code"], &line["error"]), (&json!(200), &Value::Null));
    let body = &response["body"];
    assert_eq!(
        (&body["object"], &body["created"], &body["model"]),
        (&json!("chat.completion"), &json!(7), &json!("m"))
    );
    let choice = json!([{"index": 0, "message": {"role": "assistant", "content": "x", "refusal": null},
        "logprobs": null, "finish_reason": "stop"}]);
    assert_eq!(body["choices"], choice);
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4});
    assert_eq!(body["usage"], usage);
}

#[test]
fn openai_completion_logprobs_and_errors() {
    let token = |token: &str| TokenLogprob {
        token: token.into(),
        token_id: 1,
        logprob: -0.1,
        top: vec![TopLogprob { token: "t".into(), token_id: 2, logprob: -0.25 }],
    };
    let completion =
        Completion { logprobs: Some(vec![token("éa"), token("b")]), ..completion("éab") };
    let record = prepared(Some(OpenAiEndpoint::Completions));
    let line = text(completion_line(&run(), &record, &[completion]));
    let line: Value = serde_json::from_str(&line).unwrap();
    let logprobs = json!({"tokens": ["éa", "b"], "token_logprobs": [-0.1, -0.1],
        "top_logprobs": [{"t": -0.25}, {"t": -0.25}], "text_offset": [0, 2]});
    assert_eq!(line["response"]["body"]["choices"][0]["logprobs"], logprobs);

    let line: Value =
        serde_json::from_str(&text(error_line(&run(), &record_error(Some("c"), true)))).unwrap();
    assert_eq!((&line["custom_id"], &line["response"]), (&json!("c"), &Value::Null));
    assert_eq!(line["error"]["line"], 12);
}

/// 50 good lines and 20 bad ones of every kind: 70 lines out, in order, 20 of them
/// errors that name the line.
#[test]
fn bad_lines_harm_no_others() {
    let dir = tempfile::tempdir().unwrap();
    crate::model::tokenizer::testing::write_words(dir.path());
    let bad: [&[u8]; 10] = [
        b"{\"prompt\":",
        b"[1, 2]",
        b"\"hello\"",
        b"{\"prompt\": 5}",
        b"{\"prompt\": \"hello\", \"temperature\": -1}",
        b"{\"prompt\": \"hello\", \"max_tokens\": \"many\"}",
        b"{\"prompt\": \"\xff\"}",
        b"{\"id\": \"x\"}",
        b"{\"prompt\": \"hello hello hello hello hello\"}",
        &[b'x'; 300],
    ];
    let (mut input, mut bad_lines) = (Vec::new(), Vec::new());
    for i in 0..70 {
        let number = input.iter().filter(|&&byte| byte == b'\n').count() as u64 + 1;
        if i % 7 < 2 {
            bad_lines.push(number);
            input.extend_from_slice(bad[bad_lines.len() % bad.len()]);
        } else {
            input.extend_from_slice(b"{\"prompt\": \"hello world\"}");
        }
        input.extend_from_slice(if i % 5 == 0 { b"\r\n\n" } else { b"\n" });
    }
    let path = dir.path().join("p.jsonl");
    std::fs::write(&path, input).unwrap();

    let preparer = Preparer {
        tokenizer: crate::model::tokenizer::Tokenizer::from_dir(dir.path()).unwrap().into(),
        template: None,
        defaults: Defaults { file: "p.jsonl".into(), ..Defaults::default() },
        max_seq_len: 5,
        reserved_tokens: 1,
        guides: crate::engine::Guides::new(Vec::new, &[]).into(),
        vocab_size: 6,
    };
    let options = ReadOptions { max_record_bytes: 200, ..ReadOptions::default() };
    let lines: Vec<Value> = PromptReader::open(&path, &options)
        .unwrap()
        .map(|raw| match preparer.prepare(&raw.unwrap()) {
            Ok(prepared) => completion_line(&run(), &prepared, &[completion("x")]),
            Err(error) => error_line(&run(), &error),
        })
        .map(|line| serde_json::from_str(&text(line)).unwrap())
        .collect();
    let indices: Vec<_> = lines.iter().map(|line| line["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, (0..70).collect::<Vec<_>>());
    let errors: Vec<_> = lines.iter().filter(|line| line["finish_reason"] == "error").collect();
    let named: Vec<_> = errors.iter().filter_map(|line| line["error"]["line"].as_u64()).collect();
    assert_eq!(named, bad_lines);
}
