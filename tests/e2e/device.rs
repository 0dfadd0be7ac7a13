//! A device through the binary, from `--device` to the statistics: on the tests' emulator, or
//! with FARM_TEST_DEVICE=cuda on a GPU.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::farm::{Farm, Launch, Scratch, golden};

/// What `--device` gets.
fn device() -> String {
    std::env::var("FARM_TEST_DEVICE").unwrap_or_else(|_| "emulator".into())
}

/// Every way of choosing tokens, in 16 lines.
fn prompts() -> String {
    let words = "the quick brown fox counts seven small stones";
    let mut lines = String::new();
    for i in 0..2 {
        let text: String = words.chars().cycle().take(7 + 41 * i).collect();
        for fields in [
            "",
            r#","max_new_tokens":1"#,
            r#","logprobs":2,"return_token_ids":true"#,
            r#","repetition_penalty":1.3,"frequency_penalty":0.2"#,
            r#","stop":["/","8"]"#,
            r#","n":2,"temperature":0.9,"seed":3"#,
            r#","temperature":0.7,"top_k":5,"top_p":0.8"#,
            r#","temperature":0.7,"min_p":0.1,"ignore_eos":true"#,
        ] {
            lines += &format!("{{\"prompt\":\"{text}\"{fields}}}\n");
        }
    }
    lines
}

struct Case {
    scratch: Scratch,
    prompts: PathBuf,
}

impl Case {
    fn new(prompts: &str) -> Self {
        let scratch = Scratch::new();
        let prompts = scratch.file("prompts.jsonl", prompts);
        Self { scratch, prompts }
    }

    fn farm(&self, model: &Path, launch: Launch, subcommand: &str, flags: &[&str]) -> Farm {
        let name = format!("{launch:?} {subcommand} {}", flags.join(" ").replace('/', "_"));
        let farm = self.scratch.farm(&name, launch, subcommand);
        farm.model(model).prompts(&self.prompts).args(flags)
    }

    fn records(&self, model: &Path, launch: Launch, flags: &[&str]) -> Vec<Value> {
        let farm = self.farm(model, launch, "generate", flags);
        farm.ends_with(0);
        farm.records()
    }
}

/// All but the last bits of the log-probabilities.
fn without_logprobs(mut records: Vec<Value>) -> Vec<Value> {
    records.iter_mut().filter_map(Value::as_object_mut).for_each(|record| {
        record.remove("logprobs");
    });
    records
}

#[test]
fn texts_are_those_of_the_cpu_whatever_the_batch() {
    let case = Case::new(&prompts());
    let model = golden("llama_gqa");
    let sampling = ["--max-new-tokens", "8", "--dtype", "f32"];
    let flags = |more: &[&'static str]| [&sampling[..], more].concat();
    let cpu = case.records(&model, Launch::Alone, &flags(&["--device", "cpu"]));
    let cpu = without_logprobs(cpu);
    let device = device();
    let on_device = ["--device", device.as_str()];
    for more in [&[][..], &["--max-batch-size", "3", "--max-batched-tokens", "16"]] {
        let flags = [&sampling[..], &on_device, more].concat();
        let got = without_logprobs(case.records(&model, Launch::Alone, &flags));
        assert_eq!(got, cpu, "{more:?}");
    }
    let farm = case.farm(&model, Launch::Alone, "generate", &[&sampling[..], &on_device].concat());
    let stats = farm.stats();
    assert!(stats["devices"].as_str().is_some_and(|name| !name.is_empty()), "{stats}");
}

/// Two ranks with half of each layer, through the host's sums; ranks may share a GPU.
#[test]
fn tensor_parallel_ranks_give_the_same_greedy_text() {
    let line = |text: &str| format!("{{\"prompt\":\"{text}\",\"return_token_ids\":true}}\n");
    let case = Case::new(&(line("Once upon a time") + &line("farm") + &line("a b c d e f g h")));
    let model = golden("llama_gqa");
    let device = device();
    let sampling = ["--max-new-tokens", "8", "--dtype", "f32", "--device", device.as_str()];
    let alone = case.records(&model, Launch::Alone, &sampling);
    let flags = [&sampling[..], &["--tensor-parallel", "2", "--share-device"]].concat();
    for launch in [Launch::Threads(2)].into_iter().chain(Launch::all(&[], &[2]).into_iter().skip(1))
    {
        assert_eq!(case.records(&model, launch, &flags), alone, "{launch:?}");
    }
}

#[test]
fn half_precision_and_quantized_weights_run_to_the_end() {
    let device = device();
    for model in ["llama_bf16", "gemma3", "mixtral"] {
        let case = Case::new("{\"prompt\":\"Once upon a time\"}\n{\"prompt\":\"farm\"}\n");
        for more in [["--dtype", "bf16"], ["--dtype", "f16"], ["--quantize", "q8_0"]] {
            let device = ["--max-new-tokens", "4", "--device", device.as_str()];
            let flags = [&device[..], &more].concat();
            assert_eq!(case.records(&golden(model), Launch::Alone, &flags).len(), 2);
        }
    }
}

#[test]
fn scores_are_those_of_the_cpu() {
    let case = Case::new("{\"prompt\":\"Once upon a time there was\"}\n{\"prompt\":\"farm\"}\n");
    let scores = |device: &str| -> Vec<f64> {
        let flags = ["--dtype", "f32", "--device", device];
        let farm = case.farm(&golden("llama_gqa"), Launch::Alone, "score", &flags);
        farm.ends_with(0);
        let records = farm.records();
        records.iter().map(|record| record["score"]["logprob"].as_f64().unwrap()).collect()
    };
    let (cpu, device) = (scores("cpu"), scores(&device()));
    for (cpu, device) in cpu.iter().zip(&device) {
        assert!((cpu - device).abs() < 1e-3, "{device} for {cpu}");
    }
}

/// Adapters of several kinds in one batch, each on its own rows.
#[test]
fn adapters_answer_as_on_the_cpu() {
    let folder = golden("adapters");
    for adapter in ["lora_qv", "dora", "phi3_fused", "saved_lm_head", "lora_embedding"] {
        let text = std::fs::read_to_string(folder.join(adapter).join("golden.json")).unwrap();
        let base: Value = serde_json::from_str(&text).unwrap();
        let model = golden(base["base"].as_str().unwrap());
        let case = Case::new(
            "{\"prompt\":\"Once upon a time\",\"adapter\":\"a\"}\n{\"prompt\":\"Once upon a time\"}\n\
             {\"prompt\":\"farm\",\"adapter\":\"a\"}\n",
        );
        let named = format!("a={}", folder.join(adapter).display());
        let records = |device: &str| {
            let flags = [
                "--max-new-tokens",
                "6",
                "--dtype",
                "f32",
                "--adapter",
                &named,
                "--device",
                device,
            ];
            case.records(&model, Launch::Alone, &flags)
        };
        assert_eq!(records(&device()), records("cpu"), "{adapter}");
    }
}
