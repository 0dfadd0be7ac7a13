//! Parity with llama.cpp on GGUF files (tests/golden/gguf/generate.py made them and the
//! answers with llama.cpp's own tools).

use std::path::{Path, PathBuf};

use farm::kernels::quant::QuantType;
use farm::model::checkpoint::StoredDtype;
use farm::model::{Checkpoint, LogitsWanted};
use serde::Deserialize;

use super::{greedy, step, tensor_parallel_sizes, with_model};

/// llama.cpp rounds activations to 8 bits and attention to halves; farm does not.
const MIN_COSINE: f64 = 0.999;

#[derive(Deserialize)]
struct Golden {
    files: Vec<String>,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    prompt_token_ids: Vec<u32>,
    last_logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf")
}

fn cases() -> Vec<(PathBuf, Golden)> {
    let mut answers: Vec<PathBuf> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    answers.sort();
    assert!(answers.len() >= 25, "GGUF cases are missing");
    let read = |path: &PathBuf| {
        let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        (folder().join(&golden.files[0]), golden)
    };
    // An adapter has a base beside it and is tested with the other adapters.
    answers.iter().filter(|path| !path.ends_with("llama_lora.json")).map(read).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// With fewer bits llama.cpp's rounding of activations can turn a near tie.
fn has_stable_greedy(model: &Path) -> bool {
    let checkpoint = Checkpoint::open(model).unwrap();
    checkpoint.tensors().iter().all(|(_, tensor)| {
        !matches!(&tensor.dtype, StoredDtype::Quant(quant) if *quant != QuantType::Q8_0)
    })
}

#[test]
fn gguf_files_give_llama_cpps_logits_and_text() {
    for (model, golden) in cases() {
        let stable = has_stable_greedy(&model);
        for size in tensor_parallel_sizes(&model) {
            for prompt in &golden.prompts {
                let what = format!("{} TP {size} {:?}", model.display(), prompt.text);
                let ids = &prompt.prompt_token_ids;
                with_model(&model, size, |runner| {
                    let last = step(runner, 0, ids, ids.len(), LogitsWanted::Last).remove(0);
                    assert_eq!(last.len(), prompt.last_logits.len(), "{what}");
                    let cosine = cosine(&last, &prompt.last_logits);
                    assert!(cosine >= MIN_COSINE, "{what}: cosine {cosine}");
                    if stable {
                        let ours = greedy(runner, ids, prompt.greedy.len());
                        assert_eq!(ours, prompt.greedy, "{what}: greedy ids");
                    }
                });
            }
        }
    }
}
