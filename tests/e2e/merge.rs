//! `farm merge`: a merged model answers as the model with its adapter, in each form; what is
//! kept as it was; what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use farm::model::Checkpoint;
use farm::model::adapter::write::{AdapterFile, WrittenModule, WrittenSettings, write_peft};
use farm::model::adapter::write_gguf::write_gguf;
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
    let peft = |base: &Path, parts: &[&str], dora: bool| {
        let dir = scratch.path(&format!("{} {dora}", base.file_stem().unwrap().display()));
        write_peft(&dir, &made(base, parts, dora)).unwrap();
        dir
    };
    for (file, parts) in [
        ("llama_f32.gguf", &["q_proj", "k_proj", "o_proj", "up_proj"][..]),
        ("llama_split-00002-of-00003.gguf", &["q_proj", "down_proj"]),
        ("llama_quantized_q4_k.gguf", &["q_proj", "gate_proj"]),
        ("falcon_40b.gguf", &["query_key_value", "dense"]),
        ("phi3.gguf", &["qkv_proj", "gate_up_proj"]),
        ("mixtral.gguf", &["experts.1.w1", "experts.2.w2", "gate"]),
    ] {
        for dora in [false, true] {
            let base = gguf(file);
            merged_answers_alike(
                &scratch,
                &format!("{file} {dora}"),
                &base,
                &peft(&base, parts, dora),
            );
        }
    }
    merged_answers_alike(&scratch, "gguf", &gguf("llama_f32.gguf"), &gguf("llama_lora.gguf"));
}

/// One adapter in both forms changes the model's own form alike.
#[test]
fn both_forms_of_an_adapter_merge_to_the_same_bytes() {
    let scratch = Scratch::new();
    for (base, parts) in [
        ("llama_gqa", &["q_proj", "v_proj", "down_proj"][..]),
        ("falcon_40b", &["query_key_value"]),
        ("phi3", &["qkv_proj", "down_proj"]),
        ("gemma2", &["k_proj", "o_proj"]),
    ] {
        let model = golden(base);
        let adapter = made(&model, parts, false);
        let [peft, gguf] =
            ["peft", "lora.gguf"].map(|name| scratch.path(&format!("{base} {name}")));
        write_peft(&peft, &adapter).unwrap();
        write_gguf(&gguf, &adapter, Checkpoint::open(&model).unwrap().config()).unwrap();
        let [a, b] = [peft, gguf].map(|adapter| {
            let output = adapter.with_extension("merged");
            merge(&model, &adapter, &output, &[], 0);
            let files = files_below(&output).into_iter();
            files.map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()
        });
        assert!(a == b, "{base}");
    }
}

/// An adapter with arbitrary factors of the modules of `base`'s first layer whose names end
/// with one of `parts`.
fn made(base: &Path, parts: &[&str], use_dora: bool) -> AdapterFile {
    let mut state = 1_u32;
    let mut random = |n: usize, scale: f32| -> Vec<f32> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        (0..n).map(next).collect()
    };
    let config = Checkpoint::open(base).unwrap().config().clone();
    let modules = farm::model::adapter::linear_modules(&config).into_iter().filter(|(name, _)| {
        let in_layer = !name.contains("layers.1") && !name.contains("h.1");
        in_layer && parts.iter().any(|part| name.ends_with(&format!(".{part}")) || name == part)
    });
    let modules: Vec<WrittenModule> = modules
        .map(|(name, [outputs, inputs])| WrittenModule {
            name,
            inputs,
            outputs,
            rank: 4,
            a: random(4 * inputs, 0.5),
            b: random(outputs * 4, 0.5),
            magnitude: use_dora.then(|| random(outputs, 2.0)),
        })
        .collect();
    assert_eq!(modules.len(), parts.len(), "{parts:?}");
    let settings = WrittenSettings {
        r: 4,
        lora_alpha: 2.0,
        lora_dropout: 0.0,
        target_modules: modules.iter().map(|m| m.name.clone()).collect(),
        use_rslora: true,
        use_dora,
        layers_to_transform: None,
        modules_to_save: Vec::new(),
        base_model_name_or_path: base.display().to_string(),
    };
    AdapterFile { settings, modules, saved: Vec::new() }
}

/// One matrix for embedding and output projection becomes two where only one changes.
#[test]
fn a_tied_matrix_is_cut_in_two_where_its_uses_differ() {
    let scratch = Scratch::new();
    let base = golden("llama_tied");
    let head = scratch.path("head");
    write_peft(&head, &made(&base, &["lm_head"], false)).unwrap();
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
    let adapter = scratch.path("adapter");
    let base = golden("gguf/llama_quantized_q8_0.gguf");
    write_peft(&adapter, &made(&base, &["gate_proj"], false)).unwrap();
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
}
