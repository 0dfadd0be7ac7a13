//! `farm score` against the log-likelihoods of HF transformers.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::farm::{Launch, Scratch, golden};

const TOLERANCE: f64 = 1e-3;

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn scores_equal_transformers() {
    for case in [
        "llama_bf16",
        "llama_bias",
        "llama_f16",
        "llama_gqa",
        "llama_head_dim",
        "llama_mha",
        "llama_modern",
        "llama_tied",
        "rope_dynamic",
        "rope_linear",
        "rope_llama3",
        "rope_yarn",
    ] {
        let scratch = Scratch::new();
        let golden_file = json_file(&golden(case).join("golden.json"));
        let prompts: Vec<&Value> = golden_file["prompts"]
            .as_array()
            .expect("prompts")
            .iter()
            // Farm bounds the context of dynamic RoPE, transformers does not.
            .filter(|p| {
                case != "rope_dynamic"
                    || p["prompt_token_ids"].as_array().is_some_and(|ids| ids.len() < 64)
            })
            .collect();
        let lines: String =
            prompts.iter().map(|p| json!({ "prompt": p["text"] }).to_string() + "\n").collect();
        let file = scratch.file("prompts.jsonl", lines);
        let config = json_file(&golden(case).join("config.json"));
        let heads = config["num_attention_heads"].as_u64().expect("heads");
        for launch in [Launch::Alone, Launch::Threads(2)] {
            let ranks = if launch == Launch::Alone || heads % 2 == 1 { 1 } else { 2 };
            let farm = scratch.farm(&format!("{launch:?}"), launch, "score");
            let farm = farm.model(golden(case)).prompts(&file);
            let farm = farm.flag("--tensor-parallel", ranks.to_string());
            farm.ends_with(0);
            for (record, prompt) in farm.records().iter().zip(&prompts) {
                check(&record["score"], prompt, &format!("{case} TP {ranks}"));
            }
            assert_eq!(farm.records().len(), prompts.len());
        }
    }
}

fn check(score: &Value, prompt: &Value, what: &str) {
    let close = |got: &Value, want: &Value, tolerance: f64| {
        let (got, want) = (got.as_f64().expect("a number"), want.as_f64().expect("a number"));
        assert!((got - want).abs() <= tolerance, "{what} {}: {got}, not {want}", prompt["text"]);
    };
    let tokens = score["token_logprobs"].as_array().expect("a list");
    let wanted = prompt["logprobs"].as_array().expect("a list");
    assert_eq!((tokens.len(), &tokens[0]), (wanted.len() + 1, &Value::Null), "{what}");
    for (got, want) in tokens[1..].iter().zip(wanted) {
        close(got, want, TOLERANCE);
    }
    close(&score["logprob"], &prompt["logprob"], TOLERANCE);
    assert_eq!(score["tokens"], wanted.len());
    let logprob = score["logprob"].as_f64().expect("a number");
    let perplexity = (-logprob / wanted.len() as f64).exp();
    close(&score["perplexity"], &json!(perplexity), perplexity * 1e-6);
}
