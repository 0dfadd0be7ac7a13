//! Every kind of bad record, and that any bytes at all give one answer.

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
    let request = parsed(r#"{"prompt":"hi","id":"a","max_tokens":3,"k":1,"z":{"y":[]}}"#).unwrap();
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
    let record =
        "{\"a\\u0041\": 1.10, \"prompt\" : \"x\",\t\"big\":98765432109876543210987,\r\"e\":1E5}";
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
        (chat(r#""response_format":{"type":"xml"}"#), "unsupported_field"),
        (chat(r#""response_format":{"type":"json_object"},"regex":"a""#), "bad_guide"),
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
