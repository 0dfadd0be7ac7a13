//! Inspections of the golden models, and of models that farm cannot run.

use std::fs;

use serde_json::json;

use super::*;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn look(model: &Path, tokenizer: Option<PathBuf>) -> Inspection {
    let args = InspectArgs { model: model.to_owned().into(), tokenizer, tensors: true, json: true };
    inspect(&args).unwrap_or_else(|error| panic!("{}: {error}", model.display()))
}

/// All golden models: directories with weights and GGUF files, but for the adapter.
fn goldens() -> Vec<(PathBuf, Option<PathBuf>)> {
    let entries = |dir: &Path| -> Vec<PathBuf> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let mut models = Vec::new();
    for dir in entries(&golden("")) {
        let source = fs::read_to_string(dir.join("golden_from")).ok();
        if source.is_some() || dir.join("golden.json").is_file() {
            models.push((dir, source.map(|source| golden(source.trim()))));
        }
    }
    for file in entries(&golden("gguf")) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".gguf") && name != "llama_lora.gguf" {
            models.push((file, None));
        }
    }
    models
}

#[test]
fn every_golden_model_is_known() {
    let models = goldens();
    assert!(models.len() > 60, "{}", models.len());
    for (model, tokenizer) in models {
        let inspection = look(&model, tokenizer);
        let name = model.display();
        assert_eq!(inspection.problems, Vec::<String>::new(), "{name}");
        let json: serde_json::Value =
            serde_json::from_str(&serde_json::to_string(&inspection).unwrap()).unwrap();
        assert!(json["family"].is_string() && json["parameters"].is_u64(), "{name}: {json}");
        assert!(json["tokenizer"]["eos"][0]["id"].is_u64(), "{name}: {json}");
        let shares: f64 = inspection.dtypes.iter().map(|dtype| dtype.share).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{name}: {shares}");
        // What the shape says is what the files hold, but for norms, biases and alignment.
        let tensors = inspection.tensors.as_ref().unwrap();
        let stored: u64 =
            tensors.iter().filter(|t| t.shape.len() > 1).filter_map(|t| t.bytes).sum();
        let alone = &inspection.memory[0];
        assert_eq!(alone.tensor_parallel, 1);
        let error = alone.weight_bytes as f64 / stored as f64 - 1.0;
        assert!(error.abs() < 0.01, "{name}: {} for {stored}", alone.weight_bytes);
        assert!(inspection.memory.windows(2).all(|m| m[0].weight_bytes > m[1].weight_bytes));
        let text = text::render(&inspection);
        assert!(text.contains("\ntensors\n") && text.contains(&tensors[0].name), "{name}");
    }
}

#[test]
fn what_is_shown_is_what_the_files_say() {
    // (model, tokenizer, lines of the text)
    let table: [(&str, Option<&str>, &[&str]); 5] = [
        (
            "llama_bf16",
            None,
            &[
                "format         safetensors, 195 kB, model.safetensors\n",
                "family         llama\n",
                "architecture   2 layers × 64, 8 heads of 8 over 4 KV heads, MLP 96 (gated silu)",
                "parameters     96,256\n",
                "stored as      bf16 100.0%\n",
                "quantized      no\n",
                "context        512 tokens\n",
                "tokenizer      BPE (tokenizer.json), 272 tokens\n",
                "ends a text    2 \"</s>\"\n",
            ],
        ),
        (
            "meta_mp8",
            Some("tokenizers/spm_bpe"),
            &["consolidated.00.pth … consolidated.07.pth (8 files)", "SentencePiece"],
        ),
        ("meta_mp1", Some("tokenizers/tiktoken"), &["format         meta", "tiktoken"]),
        (
            "gguf/llama_quantized_q4_k_m.gguf",
            None,
            &["q4_k 64.6%, q6_k 35.2%, f32 0.2%", "quantized      q4_k\n", "gpt2 (GGUF)"],
        ),
        ("qwen3_moe", None, &["experts of", "a token", "QK norm", "chat template  yes"]),
    ];
    for (case, tokenizer, lines) in table {
        let text = text::render(&look(&golden(case), tokenizer.map(golden)));
        for line in lines {
            assert!(text.contains(line), "{case}: {line}\n{text}");
        }
    }
}

/// A copy of a golden model with other fields in its configuration.
fn with_config(fields: serde_json::Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden("llama_bf16")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut config = read_json(&path).unwrap().unwrap();
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    fs::write(&path, config.to_string()).unwrap();
    dir
}

#[test]
fn what_farm_cannot_run_is_said_beside_what_is_known() {
    let dir = with_config(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}));
    let inspection = look(dir.path(), None);
    assert_eq!(inspection.quantization.as_deref(), Some("gptq, 4 bits"));
    assert!(inspection.architecture.is_some() && !inspection.memory.is_empty());
    assert!(inspection.problems[0].contains("gptq"), "{:?}", inspection.problems);
    assert!(text::render(&inspection).contains("\nnot usable     "));

    let dir = with_config(json!({"model_type": "gpt2"}));
    let inspection = look(dir.path(), None);
    assert_eq!(inspection.family.as_deref(), Some("gpt2"));
    assert!(inspection.architecture.is_none() && inspection.problems[0].contains("gpt2"));
    assert!(inspection.tokenizer.is_some() && !inspection.dtypes.is_empty());

    let inspection = look(&golden("meta_mp2"), None);
    assert!(inspection.tokenizer.is_none() && inspection.problems[0].contains("--tokenizer"));
}

#[test]
fn weights_of_a_type_that_is_not_read_are_named() {
    use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
    let dir = with_config(json!({}));
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let norm = [0; 64];
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    for (name, view) in &mut tensors {
        if name == "model.norm.weight" {
            *view = TensorView::new(Dtype::F8_E4M3, vec![64], &norm).unwrap();
        }
    }
    for name in ["vision.positions", "model.layers.0.self_attn.rotary_emb.inv_freq"] {
        tensors.push((name.into(), TensorView::new(Dtype::U8, vec![64], &norm).unwrap()));
    }
    fs::write(&path, serialize(tensors, None).unwrap()).unwrap();
    let inspection = look(dir.path(), None);
    let problem = "tensor model.norm.weight has type F8_E4M3, which is not supported";
    assert!(inspection.problems[0].starts_with(problem), "{:?}", inspection.problems);
    let unused = inspection.unused.as_ref().unwrap();
    assert_eq!((unused.tensors, &unused.examples[..]), (1, &["vision.positions".to_owned()][..]));
    let text = text::render(&inspection);
    assert!(text.contains("not used       1 tensor: vision.positions\n"), "{text}");
}

#[test]
fn layers_come_in_the_order_of_their_numbers() {
    let mut names = ["a.10.w", "a.2.w", "a.2.b", "a", "b.1"];
    names.sort_by_cached_key(|name| by_numbers(name));
    assert_eq!(names, ["a", "a.2.b", "a.2.w", "a.10.w", "b.1"]);
}
