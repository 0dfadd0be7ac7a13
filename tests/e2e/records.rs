//! Forms of the input, bad lines among good ones, and where records go.

use serde_json::{Value, json};

use crate::common::Running;
use crate::common::farm::{Farm, Launch, Scratch, files_below, golden, records};

fn generate(scratch: &Scratch, name: &str, launch: Launch) -> Farm {
    let farm = scratch.farm(name, launch, "generate").model(golden("llama_gqa"));
    farm.args(["--max-new-tokens", "6"])
}

/// 50 good lines and 20 bad ones, with the code that each bad one must get.
fn good_and_bad() -> (Vec<u8>, Vec<Option<&'static str>>) {
    let long = format!(r#"{{"prompt":"{}"}}"#, "far too long ".repeat(400));
    let bad: [(&[u8], &str); 20] = [
        (b"{\"prompt\": \"cut", "bad_json"),
        (b"not json", "bad_json"),
        (b"{\"prompt\": \"x\"} y", "bad_json"),
        (b"{'prompt': 'x'}", "bad_json"),
        (b"[\"prompt\"]", "not_an_object"),
        (b"\"prompt\"", "not_an_object"),
        (b"17", "not_an_object"),
        (b"{\"prompt\": 5}", "wrong_type"),
        (b"{\"prompt\": \"x\", \"max_new_tokens\": \"many\"}", "wrong_type"),
        (b"{\"messages\": \"hello\"}", "wrong_type"),
        (b"{\"prompt\": \"x\", \"stop\": 3}", "wrong_type"),
        (b"{\"prompt\": \"x\", \"temperature\": -1}", "out_of_range"),
        (b"{\"prompt\": \"x\", \"top_p\": 1.5}", "out_of_range"),
        (b"{\"prompt\": \"x\", \"max_new_tokens\": 0}", "out_of_range"),
        (b"{\"prompt\": \"x\", \"n\": 17}", "out_of_range"),
        (b"{\"prompt\": \"\xff\xfe\"}", "not_utf8"),
        (b"\x80", "not_utf8"),
        (b"{\"id\": \"nothing to do\"}", "no_prompt"),
        (b"{}", "no_prompt"),
        (long.as_bytes(), "prompt_too_long"),
    ];
    let mut text = Vec::new();
    let mut codes = Vec::new();
    let mut bad = bad.into_iter();
    for index in 0..70 {
        // Bad ones at 0, 3, 6, …, and the last two at the end.
        let line = match bad.len() {
            left if index % 3 == 0 && left > 2 || index >= 68 => bad.next(),
            _ => None,
        };
        match line {
            Some((line, code)) => {
                text.extend_from_slice(line);
                codes.push(Some(code));
            }
            None => {
                text.extend_from_slice(
                    format!(r#"{{"id":"good {index}","prompt":"{index}"}}"#).as_bytes(),
                );
                codes.push(None);
            }
        }
        text.push(b'\n');
    }
    (text, codes)
}

#[test]
fn bad_lines_become_error_records_and_the_rest_goes_on() {
    let (text, codes) = good_and_bad();
    assert_eq!(codes.iter().filter(|code| code.is_some()).count(), 20);
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.jsonl", text);
    for launch in Launch::all(&[2], &[2]) {
        let farm = generate(&scratch, &format!("{launch:?}"), launch).prompts(&prompts);
        farm.ends_with(4);
        let records = farm.records();
        assert_eq!(records.len(), 70);
        for (index, (record, code)) in records.iter().zip(&codes).enumerate() {
            assert_eq!(record["index"], index);
            match code {
                None => {
                    assert_eq!(record["id"], format!("good {index}"));
                    assert!(
                        record["text"].is_string() && record.get("error").is_none(),
                        "{record}"
                    );
                }
                Some(code) => {
                    let error = &record["error"];
                    assert_eq!(error["code"], *code, "{record}");
                    assert_eq!(error["line"], index + 1, "{record}");
                    assert_eq!(error["file"], prompts.to_str().expect("a path"));
                    assert_eq!(record["finish_reason"], "error");
                }
            }
        }
        let stats = farm.stats();
        assert_eq!((&stats["records"], &stats["records_failed"]), (&json!(70), &json!(20)));
    }
}

fn texts(farm: &Farm) -> Vec<Value> {
    farm.records().iter().map(|record| record["text"].clone()).collect()
}

/// The same three prompts in every form.
#[test]
fn every_form_of_input_gives_the_same_records() {
    const TEXT: &[u8] = b"The cat\n\nOnce upon a time\r\nthree, \"quoted\"\n";
    const JSONL: &[u8] = b"{\"prompt\":\"The cat\"}\n{\"prompt\":\"Once upon a time\"}\n\n\
        {\"prompt\":\"three, \\\"quoted\\\"\"}";
    const CSV: &[u8] = b"id,question\na,The cat\nb,Once upon a time\nc,\"three, \"\"quoted\"\"\"\n";
    let scratch = Scratch::new();
    let run = |name: &str, content: &[u8], flags: &[&str]| {
        let file = scratch.file(name, content);
        let farm = generate(&scratch, &format!("run of {name}"), Launch::Alone);
        let farm = farm.prompts(file).args(flags);
        farm.ends_with(0);
        farm
    };
    let text = run("prompts.txt", TEXT, &[]);
    let expected = texts(&text);
    assert_eq!(expected.len(), 3);
    let csv = run("prompts.csv", CSV, &["--prompt-column", "question"]);
    assert_eq!(csv.records()[2]["id"], "c");
    for farm in [
        run("prompts.jsonl", JSONL, &[]),
        csv,
        run("prompts.data", TEXT, &["--prompts-format", "txt"]),
    ] {
        assert_eq!(texts(&farm), expected);
    }
    for launch in Launch::all(&[2], &[2]) {
        for (input, format) in [(TEXT, "txt"), (JSONL, "auto"), (CSV, "csv")] {
            let farm = generate(&scratch, &format!("stdin {launch:?} {format}"), launch);
            let farm = farm.prompts("-").flag("--prompts-format", format);
            let farm =
                if format == "csv" { farm.flag("--prompt-column", "question") } else { farm };
            Running::start(&mut farm.command(), input).wait().with_code(0);
            assert_eq!(texts(&farm), expected, "{launch:?} {format}");
        }
    }
}

/// Fields that farm does not know travel into the output; overrides count.
#[test]
fn metadata_and_overrides_of_a_record() {
    let scratch = Scratch::new();
    let prompts = scratch.file(
        "prompts.jsonl",
        "{\"id\":7,\"prompt\":\"The cat\",\"max_new_tokens\":3,\"topic\":{\"a\":[1.50]},\"x\":null}\n",
    );
    let farm = generate(&scratch, "run", Launch::Alone).prompts(prompts);
    farm.ends_with(0);
    let record = farm.records().remove(0);
    assert_eq!((&record["id"], &record["index"]), (&json!("7"), &json!(0)));
    assert_eq!(record["usage"], json!({"prompt_tokens": 5, "completion_tokens": 3}));
    let output = String::from_utf8(farm.output()).expect("UTF-8");
    assert!(output.contains("\"metadata\":{\"topic\":{\"a\":[1.50]},\"x\":null}"), "{output}");
}

/// Only records go to standard output: a user pipes it into another program.
#[test]
fn without_output_stdout_has_the_records_and_nothing_else() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.txt", "The cat\nOnce\n");
    let expected = generate(&scratch, "expected", Launch::Alone).prompts(&prompts);
    expected.ends_with(0);
    for launch in Launch::all(&[2], &[2]) {
        for flags in [&["--stats"][..], &["--quiet"], &["--log-format", "json"]] {
            let farm = generate(&scratch, &format!("{launch:?}{flags:?}"), launch);
            let farm = farm.prompts(&prompts).without("--output").args(flags);
            let ended = farm.ends_with(0);
            assert_eq!(records(&ended.stdout), expected.records(), "{launch:?} {flags:?}");
            assert!(!farm.out().exists());
            assert!(flags != ["--quiet"] || ended.stderr.is_empty(), "{}", ended.stderr);
        }
    }
}

/// Without --run-dir the same command finds its run again, beside the output.
#[test]
fn the_run_directory_is_found_again() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.txt", "The cat\nOnce\n");
    let farm = generate(&scratch, "run", Launch::Alone).prompts(&prompts).without("--run-dir");
    farm.ends_with(0);
    let folder = farm.out().with_file_name("farm-runs");
    let stats = || -> Vec<_> {
        let files = files_below(&folder).into_iter();
        files.filter(|file| file.ends_with("stats.json")).collect()
    };
    assert_eq!(stats().len(), 1, "{:?}", files_below(&folder));
    let ended = farm.ends_with(0);
    assert!(ended.stderr.contains("all 2 records were done before"), "{}", ended.stderr);
    assert_eq!(stats().len(), 1);
}
