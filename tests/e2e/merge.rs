//! `farm merge`: a merged model answers as the model with its adapter, in each form; what is
//! kept as it was; what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use farm::model::Checkpoint;
use farm::model::adapter::write::{AdapterFile, WrittenModule, WrittenSettings, write_peft};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::common::Running;
use crate::common::farm::{Farm, Launch, Scratch, files_below, golden};

fn adapter(name: &str) -> PathBuf {
    golden("adapters").join(name)
}

/// Merges and returns what it said; it must end with `code`.
#[track_caller]
fn merge(model: &Path, adapter: &Path, output: &Path, extra: &[&str], code: i32) -> String {
    let mut command = Farm::plain(["merge"]);
    command.arg("--model").arg(model).arg("--adapter").arg(adapter);
    command.arg("--output").arg(output).args(extra);
    let ended = Running::start(&mut command, b"").wait();
    assert_eq!(ended.code, Some(code), "{command:?}\n{}", ended.stderr);
    ended.stderr
}

/// What a model says, with its probabilities.
fn answers(scratch: &Scratch, name: &str, model: &Path, adapter: Option<&Path>) -> Vec<Value> {
    let prompts: String = ["The cat", "Once upon a time", "naïve café"]
        .iter()
        .map(|text| format!("{}\n", json!({"prompt": text})))
        .collect();
    let farm = scratch.farm(name, Launch::Alone, "generate").model(model);
    let farm = farm.prompts(scratch.file("prompts.jsonl", prompts));
    let farm = farm.args(["--max-new-tokens", "8", "--logprobs", "2", "--ignore-eos"]);
    let farm = farm.flag("--tokenizer", golden("llama_gqa")).flag("--dtype", "f32");
    let farm = match adapter {
        Some(adapter) => farm.flag("--adapter", adapter),
        None => farm,
    };
    farm.ends_with(0);
    farm.records().iter().map(|record| json!([record["text"], record["logprobs"]])).collect()
}

/// The same texts and, within rounding, the same numbers.
fn alike(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 2e-3
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|((k, a), (l, b))| k == l && alike(a, b))
        }
        _ => a == b,
    }
}

/// Merges in f32 and compares the answers; returns the merged model.
#[track_caller]
fn merged_answers_alike(scratch: &Scratch, name: &str, base: &Path, adapter: &Path) -> PathBuf {
    let ending = if base.is_dir() { "" } else { ".gguf" };
    let output = scratch.path(&format!("merged {name}{ending}"));
    merge(base, adapter, &output, &["--dtype", "f32"], 0);
    let want = answers(scratch, &format!("{name} adapter"), base, Some(adapter));
    let got = answers(scratch, &format!("{name} merged"), &output, None);
    let same = want.iter().zip(&got).all(|(want, got)| alike(want, got));
    assert!(same, "{name}: {want:?}\n{got:?}");
    assert_ne!(want, answers(scratch, &format!("{name} base"), base, None), "{name} does nothing");
    output
}

/// LoRA, rsLoRA, DoRA, whole matrices, an embedding, fused tensors of two layouts.
#[test]
fn a_merged_model_answers_as_the_model_with_its_adapter() {
    let scratch = Scratch::new();
    for (name, base) in [
        ("lora_qv", "llama_gqa"),
        ("rslora", "llama_gqa"),
        ("dora", "llama_gqa"),
        ("lora_embedding", "llama_gqa"),
        ("saved_lm_head", "llama_gqa"),
        ("tied_saved_embedding", "llama_tied"),
        ("phi3_fused", "phi3"),
        ("falcon_qkv", "falcon_40b"),
        ("lora_qv_bin", "llama_bin"),
    ] {
        merged_answers_alike(&scratch, name, &golden(base), &adapter(name));
    }
}

/// Either form of adapter, for models whose rows have another order or are fused otherwise.
#[test]
fn a_merged_gguf_model_answers_as_the_model_with_its_adapter() {
    let scratch = Scratch::new();
    let gguf = |name: &str| golden("gguf").join(name);
    for (name, base, adapter) in [
        ("peft", gguf("llama_f32.gguf"), adapter("lora_qv")),
        ("dora", gguf("llama_f32.gguf"), adapter("dora")),
        ("gguf", gguf("llama_f32.gguf"), gguf("llama_lora.gguf")),
        ("gguf on hf", golden("llama_gqa"), gguf("llama_lora.gguf")),
        ("split", gguf("llama_split-00002-of-00003.gguf"), adapter("lora_qv")),
        ("falcon", gguf("falcon_40b.gguf"), adapter("falcon_qkv")),
        ("phi3", gguf("phi3.gguf"), adapter("phi3_fused")),
        ("quantized", gguf("llama_quantized_q4_k.gguf"), adapter_of_quantized(&scratch)),
    ] {
        merged_answers_alike(&scratch, name, &base, &adapter);
    }
}

/// An adapter of some modules of a model with the factors of a random one.
fn made(scratch: &Scratch, name: &str, modules: &[(&str, [usize; 2])]) -> PathBuf {
    let mut state = 1_u32;
    let mut random = |n: usize| -> Vec<f32> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    };
    let mut module = |(name, [outputs, inputs]): &(&str, [usize; 2])| WrittenModule {
        name: (*name).to_owned(),
        inputs: *inputs,
        outputs: *outputs,
        rank: 4,
        a: random(4 * inputs),
        b: random(outputs * 4),
        magnitude: None,
    };
    let modules: Vec<_> = modules.iter().map(&mut module).collect();
    let settings = WrittenSettings {
        r: 4,
        lora_alpha: 1.0,
        lora_dropout: 0.0,
        target_modules: modules.iter().map(|m| m.name.clone()).collect(),
        use_rslora: false,
        use_dora: false,
        layers_to_transform: None,
        modules_to_save: Vec::new(),
        base_model_name_or_path: "base".into(),
    };
    let dir = scratch.path(name);
    write_peft(&dir, &AdapterFile { settings, modules, saved: Vec::new() }).unwrap();
    dir
}

fn adapter_of_quantized(scratch: &Scratch) -> PathBuf {
    let base = Checkpoint::open(&golden("gguf/llama_quantized_q4_k.gguf")).unwrap();
    let (hidden, inner) = (base.config().hidden_size, base.config().intermediate_size);
    made(scratch, "for quantized", &[("model.layers.0.mlp.gate_proj", [inner, hidden])])
}

/// An expert is a tensor of its own in one form and part of a stack in the other.
#[test]
fn experts_are_found_in_either_form() {
    let scratch = Scratch::new();
    let config = Checkpoint::open(&golden("mixtral")).unwrap().config().clone();
    let (hidden, inner) = (config.hidden_size, config.experts.unwrap().moe_intermediate_size);
    let expert = |part: &str| format!("model.layers.0.block_sparse_moe.experts.1.{part}");
    let [w1, w2] = ["w1", "w2"].map(expert);
    let adapter = made(&scratch, "adapter", &[(&w1, [inner, hidden]), (&w2, [hidden, inner])]);
    merged_answers_alike(&scratch, "hf", &golden("mixtral"), &adapter);
    merged_answers_alike(&scratch, "gguf", &golden("gguf/mixtral.gguf"), &adapter);
}

/// One matrix for embedding and output projection becomes two where only one changes.
#[test]
fn a_tied_matrix_is_cut_in_two_where_its_uses_differ() {
    let scratch = Scratch::new();
    let base = golden("llama_tied");
    let config = Checkpoint::open(&base).unwrap().config().clone();
    let head = made(&scratch, "head", &[("lm_head", [config.vocab_size, config.hidden_size])]);
    let merged = merged_answers_alike(&scratch, "head of", &base, &head);
    let config: Value =
        serde_json::from_slice(&fs::read(merged.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(config["dtype"].as_str().or(config["torch_dtype"].as_str()), Some("float32"));
}

type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn tensors(file: &Path) -> Tensors {
    let bytes = fs::read(file).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let of = |view: &safetensors::tensor::TensorView| {
        (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec())
    };
    parsed.iter().map(|(name, view)| (name.to_owned(), of(&view))).collect()
}

/// Files, tensors, types and bytes, but for the matrices that the adapter changes.
#[test]
fn what_does_not_change_is_kept() {
    let scratch = Scratch::new();
    let (base, output) = (golden("llama_gqa"), scratch.path("merged"));
    let said = merge(&base, &adapter("lora_qv"), &output, &[], 0);
    assert!(said.contains("lora_qv") && said.contains("4 matrices"), "{said}");
    let mut changed = Vec::new();
    for path in files_below(&output) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let from = base.join(&name);
        if !name.ends_with(".safetensors") {
            let json = |path: &Path| -> Value {
                serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
            };
            assert_eq!(json(&path)["weight_map"], json(&from)["weight_map"], "{name}");
            assert!(name.contains("index") || fs::read(&path).unwrap() == fs::read(&from).unwrap());
            continue;
        }
        let (ours, theirs) = (tensors(&path), tensors(&from));
        assert!(ours.keys().eq(theirs.keys()), "{name}");
        for ((name, ours), theirs) in ours.iter().zip(theirs.values()) {
            assert_eq!((&ours.0, &ours.1), (&theirs.0, &theirs.1), "{name}");
            if ours != theirs {
                changed.push(name.clone());
            }
        }
    }
    changed.sort();
    let module = |layer, part| format!("model.layers.{layer}.self_attn.{part}_proj.weight");
    assert_eq!(changed, [module(0, "q"), module(0, "v"), module(1, "q"), module(1, "v")]);
    let files = |dir: &Path| {
        files_below(dir).iter().map(|f| f.file_name().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let theirs = files(&base).into_iter().filter(|name| name != "golden.json");
    let ours = files(&output).into_iter().filter(|name| name != "golden.json");
    assert!(ours.eq(theirs));
}

/// Types that farm can write stay; the others become f16, which is said.
#[test]
fn a_quantized_model_keeps_the_types_that_farm_writes() {
    let scratch = Scratch::new();
    let types = |path: &Path| -> BTreeMap<String, String> {
        let model = Checkpoint::open(path).unwrap();
        let named = |(name, t): (&str, &farm::model::checkpoint::Tensor)| {
            (name.to_owned(), t.dtype.name().to_owned())
        };
        model.tensors().iter().map(named).collect()
    };
    let adapter = adapter_of_quantized(&scratch);
    for (name, kept) in [("q8_0", true), ("q4_k", true), ("q5_0", false)] {
        let base = golden("gguf").join(format!("llama_quantized_{name}.gguf"));
        let output = scratch.path(&format!("{name}.gguf"));
        let said = merge(&base, &adapter, &output, &[], 0);
        assert_eq!(said.contains("became f16"), !kept, "{said}");
        let (mut ours, theirs) = (types(&output), types(&base));
        let changed = ours.get_mut("blk.0.ffn_gate.weight").unwrap();
        assert_eq!(*changed, if kept { name } else { "f16" });
        *changed = name.to_owned();
        assert_eq!(ours, theirs);
        let metadata = |path: &Path| Checkpoint::open(path).unwrap().metadata().unwrap().clone();
        assert_eq!(metadata(&output), metadata(&base));
    }
}

#[test]
fn what_cannot_be_merged_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    let (out, gguf) = (scratch.path("out"), scratch.path("out.gguf"));
    let llama = golden("llama_gqa");
    let qv = adapter("lora_qv");
    for (model, adapter, output, words) in [
        (&llama, &qv, &gguf, "becomes a directory"),
        (&golden("gguf/llama_f32.gguf"), &qv, &out, "becomes a file"),
        (&golden("meta_mp1"), &qv, &out, "Meta's form"),
        (&golden("qwen3"), &qv, &out, "made for another model"),
        (&llama, &scratch.path("none"), &out, "none"),
        (&llama, &qv, &scratch.file("there", "mine"), "exists already"),
    ] {
        let said = merge(model, adapter, output, &[], 3);
        assert!(said.contains(words), "{words:?} is not in: {said}");
    }
    assert_eq!(files_below(&scratch.path("")), [scratch.path("there")]);
    assert_eq!(fs::read(scratch.path("there")).unwrap(), b"mine");
    let said = merge(&llama, &qv, &scratch.path("no/such/folder"), &[], 1);
    assert!(said.contains("no/such"), "{said}");
}
