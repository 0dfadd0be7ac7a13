//! Adapters through the binary: which record gets which, and what is refused.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::farm::{Farm, Launch, Scratch, golden};

const NAMES: [&str; 4] = ["lora_qv", "rslora", "dora", "saved_lm_head"];

fn adapter(name: &str) -> PathBuf {
    golden("adapters").join(name)
}

fn farm(scratch: &Scratch, name: &str, launch: Launch) -> Farm {
    let farm = scratch.farm(name, launch, "generate").model(golden("llama_gqa"));
    farm.args(["--max-new-tokens", "12", "--logprobs", "2", "--ignore-eos"])
}

fn with_adapters(farm: Farm) -> Farm {
    NAMES.iter().fold(farm, |farm, name| farm.args(["--adapter".into(), adapter(name)]))
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

/// What a record says, without where it stands and who answered.
fn answer(record: &Value) -> Value {
    json!([record["text"], record["logprobs"], record["usage"]])
}

const PROMPTS: [&str; 3] = ["The cat", "Once upon a time", "naïve café"];

/// One run with four adapters answers each record as a run with that adapter alone does, and
/// those without one as the model alone.
#[test]
fn many_adapters_in_one_run_answer_as_each_alone() {
    let scratch = Scratch::new();
    let plain: Vec<Value> = PROMPTS.iter().map(|text| json!({"prompt": text})).collect();
    let plain = scratch.file("plain.jsonl", lines(&plain));
    let mut alone: Vec<Vec<Value>> = Vec::new();
    for name in NAMES {
        let farm = farm(&scratch, name, Launch::Alone).prompts(&plain);
        let farm = farm.flag("--adapter", adapter(name));
        farm.ends_with(0);
        assert!(farm.records().iter().all(|record| record["adapter"] == name));
        alone.push(farm.records());
    }
    let base = farm(&scratch, "base", Launch::Alone).prompts(&plain);
    base.ends_with(0);
    assert!(base.records().iter().all(|record| record.get("adapter").is_none()));

    let named = |text: &&str, name: &str| json!({"prompt": text, "adapter": name, "k": 1});
    let mut mixed: Vec<Value> = Vec::new();
    for text in &PROMPTS {
        mixed.extend(NAMES.iter().map(|name| named(text, name)));
        mixed.push(json!({"prompt": text}));
        mixed.push(json!({"prompt": text, "adapter": null}));
    }
    let mixed = scratch.file("mixed.jsonl", lines(&mixed));
    for launch in Launch::all(&[2], &[2]) {
        for parallel in ["1", "2"] {
            let farm = farm(&scratch, &format!("mixed {launch:?} {parallel}"), launch);
            if parallel == "2" && launch == Launch::Alone {
                continue;
            }
            let farm = with_adapters(farm).prompts(&mixed).flag("--tensor-parallel", parallel);
            farm.ends_with(0);
            let records = farm.records();
            for (i, record) in records.iter().enumerate() {
                let (prompt, which) = (i / (NAMES.len() + 2), i % (NAMES.len() + 2));
                let want = alone.get(which).map_or(&base.records()[prompt], |r| &r[prompt]).clone();
                // Another split of the model sums in another order.
                match parallel {
                    "1" => assert_eq!(answer(record), answer(&want), "{launch:?} {record}"),
                    _ => assert_eq!(record["text"], want["text"], "{launch:?} {record}"),
                }
                assert_eq!(record.get("adapter"), want.get("adapter"));
                assert_eq!(record["metadata"].get("adapter"), None, "{record}");
            }
        }
    }
}

#[test]
fn a_body_names_an_adapter_as_its_model_and_an_unknown_one_is_an_error_record() {
    let scratch = Scratch::new();
    let body = |model: &str| {
        json!({"custom_id": model, "method": "POST", "url": "/v1/completions",
               "body": {"model": model, "prompt": "The cat"}})
    };
    let prompts = [
        body("dora"),
        body("gpt"),
        json!({"prompt": "The cat", "adapter": "dora"}),
        json!({"prompt": "The cat"}),
        json!({"prompt": "The cat", "adapter": "sql"}),
        json!({"prompt": "The cat", "adapter": 7}),
    ];
    let prompts = scratch.file("prompts.jsonl", lines(&prompts));
    let farm = with_adapters(farm(&scratch, "bodies", Launch::Alone)).prompts(prompts);
    farm.ends_with(4);
    let records = farm.records();
    let body = |record: &Value| record["response"]["body"].clone();
    assert_eq!(body(&records[0])["model"], "dora");
    assert_eq!(body(&records[0])["choices"][0]["text"], records[2]["text"]);
    assert_eq!(body(&records[1])["model"], "llama_gqa");
    assert_eq!(body(&records[1])["choices"][0]["text"], records[3]["text"]);
    assert_ne!(records[2]["text"], records[3]["text"]);
    assert_eq!(records[4]["error"]["code"], "unknown_adapter");
    let message = records[4]["error"]["message"].as_str().unwrap();
    assert!(message.contains(r#""sql""#) && message.contains(r#""rslora""#), "{message}");
    assert_eq!(records[5]["error"]["code"], "wrong_type");
    // The same adapters again, from the run's own record of its flags.
    farm.retry().ends_with(4);
}

/// A rerun with the same adapters, in any order and from anywhere, is the same run; with
/// others it is refused.
#[test]
fn adapters_are_part_of_the_run() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.jsonl", lines(&[json!({"prompt": "The cat"})]));
    let farm = farm(&scratch, "run", Launch::Alone).prompts(prompts);
    let named = |name: &str, dir: &str| format!("{name}={}", adapter(dir).display());
    let first = farm.clone().args(["--adapter", &named("a", "dora")]);
    let first = first.args(["--adapter", &named("b", "lora_qv")]);
    first.ends_with(0);
    let swapped = farm.clone().args(["--adapter", &named("b", "lora_qv")]);
    swapped.args(["--adapter", &named("a", "dora")]).ends_with(0);
    for other in [named("a", "rslora"), named("c", "dora")] {
        let ended = farm.clone().args(["--adapter", &other]).ends_with(3);
        assert!(ended.stderr.contains("adapter"), "{}", ended.stderr);
    }
    let score = scratch.farm("score", Launch::Alone, "score").model(golden("llama_gqa"));
    let prompts = scratch.file("score.jsonl", lines(&[json!({"prompt": "The cat"})]));
    let score = score.prompts(prompts).args(["--adapter", &named("a", "dora")]);
    score.ends_with(0);
    assert_eq!(score.records()[0]["adapter"], "a");
}

/// Killed in its middle and continued by other ranks, a run with several adapters comes to
/// the same bytes; with another file in the place of one it is another run.
#[test]
fn a_killed_run_with_adapters_goes_on_with_the_same_ones() {
    let scratch = Scratch::new();
    let own = scratch.path("own");
    std::fs::create_dir(&own).expect("a folder");
    let copy = |from: &str, files: &[&str]| {
        for file in files {
            std::fs::copy(adapter(from).join(file), own.join(file)).expect("a copy");
        }
    };
    copy("lora_qv", &["adapter_config.json", "adapter_model.safetensors"]);
    let names = ["own", "dora", "saved_lm_head"];
    let prompt = |i: usize| match names.get(i % 4) {
        Some(name) => json!({"prompt": format!("{i} cats and"), "adapter": name}),
        None => json!({"prompt": format!("{i} cats and")}),
    };
    let prompts = scratch.file("prompts.jsonl", lines(&(0..80).map(prompt).collect::<Vec<_>>()));
    let run = |name: &str, launch: Launch| {
        let farm = scratch.farm(name, launch, "generate").model(golden("llama_gqa"));
        let farm = farm.args(["--ignore-eos", "--max-new-tokens", "150", "--temperature", "0.7"]);
        let farm = farm.args(["--max-batch-size", "6", "--quiet"]).prompts(&prompts);
        let farm = farm.args(["--adapter".into(), own.clone()]);
        names[1..].iter().fold(farm, |farm, name| farm.args(["--adapter".into(), adapter(name)]))
    };
    let whole = run("whole", Launch::Alone);
    whole.ends_with(0);
    let killed = run("killed", Launch::Threads(2));
    let mut running = killed.start();
    assert!(running.reaches(|| killed.done() >= 8), "it ended too early");
    running.kill_all();
    assert!(!killed.out().exists());
    copy("rslora", &["adapter_config.json", "adapter_model.safetensors"]);
    let refused = killed.ends_with(3);
    assert!(refused.stderr.contains("adapter.own: "), "{}", refused.stderr);
    assert!(!refused.stderr.contains("adapter.dora: "), "{}", refused.stderr);
    copy("lora_qv", &["adapter_config.json", "adapter_model.safetensors"]);
    killed.clone().launched(Launch::Alone).ends_with(0);
    assert!(killed.output() == whole.output());
    assert_eq!(killed.journals().duplicates(), 0);
}

#[test]
fn adapters_that_do_not_fit_are_refused_before_any_work() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.jsonl", lines(&[json!({"prompt": "The cat"})]));
    let refused = |name: &str, value: PathBuf, words: &[&str]| {
        let farm = farm(&scratch, name, Launch::Threads(2)).prompts(&prompts);
        let ended = farm.flag("--adapter", value).ends_with(3);
        for word in words {
            assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
        }
    };
    refused("other", adapter("falcon_qkv"), &["falcon_qkv", "adapter_model", "another model"]);
    refused("missing", "/no/such/adapter".into(), &["/no/such/adapter"]);
    refused("model", golden("llama_gqa"), &["adapter_config.json"]);
}
