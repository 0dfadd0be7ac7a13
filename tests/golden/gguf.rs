//! Parity with llama.cpp on GGUF files (tests/golden/gguf/generate.py made them and the
//! answers with llama.cpp's own tools).

use std::path::{Path, PathBuf};

use farm::kernels::quant::QuantType;
use farm::model::checkpoint::StoredDtype;
use farm::model::{Activations, Checkpoint, LogitsWanted, ModelRunner, WeightDtype};
use serde::Deserialize;

use super::{greedy, step, tensor_parallel_sizes, with_loaded, with_model_as};

/// llama.cpp rounds attention to halves; farm does not.
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

pub(super) fn cosine(a: &[f32], b: &[f32]) -> f64 {
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
                let body = |runner: &mut ModelRunner| {
                    let last = step(runner, 0, ids, ids.len(), LogitsWanted::Last).remove(0);
                    assert_eq!(last.len(), prompt.last_logits.len(), "{what}");
                    let cosine = cosine(&last, &prompt.last_logits);
                    assert!(cosine >= MIN_COSINE, "{what}: cosine {cosine}");
                    if stable {
                        let ours = greedy(runner, ids, prompt.greedy.len());
                        assert_eq!(ours, prompt.greedy, "{what}: greedy ids");
                    }
                };
                for activations in [Activations::Rounded, Activations::F32] {
                    with_loaded(&model, &[], size, None, activations, body);
                }
            }
        }
    }
}

/// `--quantize`: what llama.cpp's own quantizer makes of the same file, the same at every
/// tensor-parallel size, and as small as the type promises. Rows of 64 values take Q8_0 for
/// want of 256.
#[test]
fn weights_quantized_while_loading_are_llama_cpps_and_split_alike() {
    let wide = folder().join("llama_quantized_f16.gguf");
    let narrow = folder().join("../llama_bf16");
    let quantized = |name: &str| folder().join(format!("llama_quantized_{name}.gguf"));
    for (model, quant, reference, min_cosine, max_share) in [
        (&wide, QuantType::Q8_0, quantized("q8_0"), 0.9999, 0.54),
        (&wide, QuantType::Q6_K, quantized("q6_k"), 0.999, 0.42),
        // Here the embedding, which is the output too, keeps six bits; and four are few for
        // random weights.
        (&wide, QuantType::Q4_K, quantized("q4_k"), 0.97, 0.34),
        (&narrow, QuantType::Q4_K, narrow.clone(), 0.999, 0.54),
    ] {
        let what = format!("{} as {}", model.display(), quant.name());
        let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 270).collect();
        let run = |model: &Path, size: usize, dtype: Option<WeightDtype>| {
            with_model_as(model, size, dtype, |runner| {
                let logits = step(runner, 0, &ids, ids.len(), LogitsWanted::Last).remove(0);
                (logits, runner.weight_bytes())
            })
        };
        let (_, stored_bytes) = run(model, 1, None);
        let (expected, _) = run(&reference, 1, None);
        let (whole, bytes) = run(model, 1, Some(WeightDtype::Quant(quant)));
        let cosine = cosine(&expected, &whole);
        assert!(cosine >= min_cosine, "{what}: {cosine}");
        let share = bytes as f64 / stored_bytes as f64;
        assert!(share <= max_share, "{what}: {share} of the bytes");
        for size in [2, 4] {
            let (split, _) = run(model, size, Some(WeightDtype::Quant(quant)));
            let worst = whole.iter().zip(&split).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4, "{what} TP {size}: logits differ by {worst}");
        }
    }
}
