//! Invariant 4: the output is the same bytes whatever the ranks, the batch size, the
//! chunks of a prefill and the size of the KV cache.

use std::path::{Path, PathBuf};

use crate::common::farm::{Farm, Launch, Scratch, golden, records};

/// Every kind of record that farm reads, bad ones among them, in 43 lines.
fn mixed_prompts() -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = Vec::new();
    let words = "the quick brown fox counts seven small stones beside a slow river at night";
    for i in 0..6 {
        let text: String = words.chars().cycle().take(7 + 41 * i).collect();
        let batch_line = |url: &str, body: &str| {
            format!(r#"{{"custom_id":"o{i}","method":"POST","url":"{url}","body":{{{body}}}}}"#)
        };
        let good = [
            format!(r#"{{"prompt":"{text}"}}"#),
            format!(r#"{{"id":"chat-{i}","messages":[{{"role":"user","content":"{text}"}}]}}"#),
            format!(r#"{{"prompt":"{text}","n":2,"temperature":0.9,"seed":{i},"topic":[{i}]}}"#),
            format!(r#"{{"prompt":"naïve {text}","stop":["/","8"],"max_new_tokens":30}}"#),
            format!(r#"{{"prompt":"{text}","logprobs":2,"return_token_ids":true,"top_k":5}}"#),
            batch_line(
                "/v1/chat/completions",
                r#""messages":[{"role":"user","content":"hello"}],"max_tokens":9,"n":2"#,
            ),
            batch_line("/v1/completions", r#""prompt":"The cat","max_tokens":5"#),
        ];
        lines.extend(good.map(String::into_bytes));
    }
    lines.insert(3, b"{\"prompt\": ".to_vec());
    lines.insert(11, b"\xff\xfe".to_vec());
    lines.insert(20, br#"{"prompt":"x","temperature":"hot"}"#.to_vec());
    lines.push(format!(r#"{{"prompt":"{}"}}"#, "long ".repeat(600)).into_bytes());
    lines.iter().flat_map(|line| [line, b"\n".as_slice()].concat()).collect()
}

/// OpenAI's `created` is the start of the run, which differs between two runs.
fn without_start(output: &[u8]) -> String {
    const FIELD: &str = "\"created\":";
    let text = std::str::from_utf8(output).expect("the output is UTF-8");
    let mut pieces = text.split(FIELD);
    let mut rest = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        rest += FIELD;
        rest += "0";
        rest += piece.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    rest
}

struct Case {
    scratch: Scratch,
    prompts: PathBuf,
}

impl Case {
    fn new(prompts: &[u8]) -> Self {
        let scratch = Scratch::new();
        let prompts = scratch.file("prompts.jsonl", prompts);
        Self { scratch, prompts }
    }

    fn farm(&self, model: &Path, launch: Launch, flags: &[&str]) -> Farm {
        let name = format!("{launch:?} {}", flags.join(" ").replace('/', "_"));
        let farm = self.scratch.farm(&name, launch, "generate");
        farm.model(model).prompts(&self.prompts).args(flags)
    }

    /// Runs it (four of the records are bad: exit code 4) and gives its output.
    fn output(&self, model: &Path, launch: Launch, flags: &[&str]) -> String {
        let farm = self.farm(model, launch, flags);
        farm.ends_with(4);
        without_start(&farm.output())
    }
}

/// How to start, with which flags.
fn ways() -> Vec<(Launch, &'static [&'static str])> {
    let mut ways: Vec<(Launch, &[&str])> = vec![
        (Launch::Alone, &["--max-batch-size", "1"]),
        (Launch::Alone, &["--max-batched-tokens", "33", "--max-batch-size", "7"]),
        (Launch::Threads(3), &[]),
        (Launch::Threads(2), &["--max-batched-tokens", "16", "--threads", "1"]),
    ];
    for launch in Launch::all(&[], &[1, 2, 3, 4]).into_iter().skip(1) {
        ways.push((launch, &["--max-batch-size", "32"]));
        ways.push((launch, &["--max-batch-size", "1"]));
    }
    ways
}

fn same_for_all_ways(sampling: &[&'static str]) {
    let case = Case::new(&mixed_prompts());
    let model = golden("llama_gqa");
    let expected = case.output(&model, Launch::Alone, sampling);
    let lines = records(expected.as_bytes());
    assert_eq!(lines.len(), 46);
    assert!(lines.iter().any(|line| line["text"].as_str().is_some_and(|text| text.len() > 20)));
    for (launch, flags) in ways() {
        let got = case.output(&model, launch, &[sampling, flags].concat());
        assert!(got == expected, "{launch:?} {flags:?}:\n{got}\nexpected:\n{expected}");
    }
}

#[test]
fn greedy_output_is_the_same_bytes_however_farm_is_started() {
    same_for_all_ways(&["--max-new-tokens", "24"]);
}

#[test]
fn sampled_output_is_the_same_bytes_however_farm_is_started() {
    same_for_all_ways(&["--max-new-tokens", "24", "--temperature", "0.8", "--seed", "7"]);
}

/// A KV cache that holds one sequence at its longest but not the whole batch: sequences
/// are put back and recomputed, and nobody sees it in the output.
#[test]
fn preemption_changes_no_byte() {
    let case = Case::new(&mixed_prompts());
    let model = golden("llama_gqa");
    let flags = ["--max-new-tokens", "90", "--ignore-eos", "--temperature", "0.5"];
    let expected = case.output(&model, Launch::Alone, &flags);
    for launch in Launch::all(&[2], &[2]) {
        let flags = [&flags[..], &["--kv-cache-memory", "256KiB"]].concat();
        assert!(case.output(&model, launch, &flags) == expected, "{launch:?}");
        let stats = case.farm(&model, launch, &flags).stats();
        assert!(stats["preemptions"].as_u64() > Some(0), "{launch:?}: {stats}");
    }
}

/// Within a tier of the kernels: another tier may differ in the last bits.
#[test]
fn scalar_kernels_give_the_same_bytes_too() {
    let case = Case::new(&mixed_prompts());
    let model = golden("llama_tied");
    let scalar = ["--kernel-tier", "scalar", "--max-new-tokens", "12"];
    let expected = case.output(&model, Launch::Alone, &scalar);
    for launch in Launch::all(&[3], &[2]).into_iter().skip(1) {
        let flags = [&scalar[..], &["--max-batch-size", "1"]].concat();
        assert!(case.output(&model, launch, &flags) == expected, "{launch:?}");
    }
    let stats = case.farm(&model, Launch::Alone, &scalar).run_dir().join("ranks.csv");
    assert!(std::fs::read_to_string(stats).expect("ranks.csv").contains("scalar"));
}

/// Sums over ranks are rounded otherwise: the text is the same, not the last bits of the
/// log-probabilities.
#[test]
fn tensor_parallel_ranks_give_the_same_greedy_text() {
    let model = golden("llama_gqa");
    let prompts: String = (0..12)
        .map(|i| {
            let text: String =
                "Once upon a time there was a farm".chars().take(4 + 2 * i).collect();
            format!("{{\"prompt\":\"{text}\",\"return_token_ids\":true}}\n")
        })
        .collect();
    let case = Case::new(prompts.as_bytes());
    let run = |launch, flags: &[&str]| {
        let farm = case.farm(&model, launch, &[&["--max-new-tokens", "32"], flags].concat());
        farm.ends_with(0);
        (farm.output(), farm.stats())
    };
    let (expected, whole) = run(Launch::Alone, &[]);
    let threads = [(Launch::Threads(2), 2), (Launch::Threads(4), 2), (Launch::Threads(4), 4)];
    let processes = Launch::all(&[], &[2, 4]).into_iter().skip(1).map(|launch| (launch, 2));
    for (launch, size) in threads.into_iter().chain(processes) {
        let (got, stats) = run(launch, &["--tensor-parallel", &size.to_string()]);
        assert!(got == expected, "{launch:?} TP {size}");
        let share = |stats: &serde_json::Value| stats["weight_bytes_max"].as_f64();
        let share = share(&stats).zip(share(&whole)).map(|(part, whole)| part / whole);
        assert!(share <= Some(1.1 / size as f64), "{launch:?} TP {size} holds {share:?}");
    }
}
