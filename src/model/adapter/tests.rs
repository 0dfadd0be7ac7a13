//! What an adapter on the command line means, and that each kind of bad one is an input
//! error that names the file and what is wrong.

use std::collections::BTreeMap;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::ErrorKind;
use crate::model::Checkpoint;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn config_of(model: &str) -> ModelConfig {
    Checkpoint::open(&golden(model)).unwrap().config().clone()
}

/// A tensor: its type and shape; the values are zeros.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>)>;

const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A sound adapter of q_proj of llama_gqa, with `change` done to it.
fn adapter(change: impl FnOnce(&mut Value, &mut Tensors)) -> TempDir {
    let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"});
    let mut tensors = Tensors::from([
        (format!("{Q}.lora_A.weight"), (Dtype::F32, vec![4, 64])),
        (format!("{Q}.lora_B.weight"), (Dtype::F32, vec![64, 4])),
    ]);
    change(&mut config, &mut tensors);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let zeros = vec![0; 1 << 20];
    let views = tensors.iter().map(|(name, (dtype, shape))| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, TensorView::new(*dtype, shape.clone(), &zeros[..bytes]).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
    dir
}

fn open(path: &Path, model: &str) -> Result<Adapter> {
    let source = AdapterSource { name: "mine".into(), path: path.to_owned() };
    Adapter::open(&source, &config_of(model))
}

fn refused(path: &Path, model: &str, words: &[&str]) {
    let error = open(path, model).err().unwrap_or_else(|| panic!("{words:?} was taken"));
    assert_eq!(error.kind, ErrorKind::Input, "{error}");
    for word in words {
        assert!(error.message.contains(word), "{word:?} is not in: {error}");
    }
}

#[test]
fn the_command_lines_words() {
    let parse = |text: &str| AdapterSource::parse(OsStr::new(text)).map(|s| (s.name, s.path));
    let of = |name: &str, path: &str| Ok((name.to_owned(), PathBuf::from(path)));
    assert_eq!(parse("sql=/a/b"), of("sql", "/a/b"));
    assert_eq!(parse("/a/v1.5/"), of("v1.5", "/a/v1.5/"));
    assert_eq!(parse("/a/sql.v2.gguf"), of("sql.v2", "/a/sql.v2.gguf"));
    assert_eq!(parse("./a=b"), of("a=b", "./a=b"));
    assert_eq!(parse("x=a=b"), of("x", "a=b"));
    for bad in ["", "x=", "=x", "/", ".."] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    for text in ["/a/b", "sql=/a/b", "x=/a/y=z", "/a/b.gguf"] {
        let source = AdapterSource::parse(OsStr::new(text)).unwrap();
        assert_eq!(AdapterSource::parse(&source.word()), Ok(source), "{text}");
    }
}

#[test]
fn settings_that_farm_does_not_compute_are_refused_by_name() {
    assert!(open(adapter(|_, _| ()).path(), "llama_gqa").is_ok());
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", json!(null)),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([1])),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("trainable_token_indices", json!([5])),
        ("layer_replication", json!([[0, 1]])),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("r", json!(0)),
        ("r", json!(-1)),
        ("r", json!(1e300)),
        ("r", json!("four")),
        ("lora_alpha", json!({})),
        ("rank_pattern", json!([])),
        ("rank_pattern", json!({"(": 4})),
        ("alpha_pattern", json!({"q_proj": null})),
    ] {
        let dir = adapter(|config, _| config[key] = value);
        refused(dir.path(), "llama_gqa", &["adapter mine", "adapter_config.json", key]);
    }
    let dora = adapter(|config, _| config["use_dora"] = json!(true));
    refused(dora.path(), "llama_gqa", &["q_proj", "lora_magnitude_vector", "use_dora"]);
}

#[test]
fn a_rank_that_the_settings_do_not_say_is_refused() {
    let b = format!("{Q}.lora_B.weight");
    let dir = adapter(|config, _| config["r"] = json!(8));
    refused(dir.path(), "llama_gqa", &[&b, "rank is 4", "says 8"]);
    // The first pattern that matches counts; one matches from a dot on.
    let pattern = json!({"_proj": 2, "layers.[0-9].self_attn.q_proj": 4, ".*q_proj": 9});
    let dir = adapter(|config, _| {
        config["r"] = json!(1);
        config["rank_pattern"] = pattern;
    });
    assert!(open(dir.path(), "llama_gqa").is_ok());
    let dir = adapter(|_, tensors| {
        tensors.insert(format!("{Q}.lora_A.weight"), (Dtype::F32, vec![3, 64]));
    });
    refused(dir.path(), "llama_gqa", &[&format!("{Q}.lora_A.weight"), "[3, 64]", "[4, 64]"]);
}

#[test]
fn tensors_that_do_not_belong_are_refused_by_name() {
    let name = |part: &str| format!("{Q}.{part}");
    let without = |part: &str| adapter(|_, tensors| drop(tensors.remove(&name(part))));
    let with = |tensor: &str, dtype: Dtype, shape: &[usize]| {
        adapter(|_, tensors| drop(tensors.insert(tensor.to_owned(), (dtype, shape.to_vec()))))
    };
    let a = name("lora_A.weight");
    refused(without("lora_B.weight").path(), "llama_gqa", &[&a, "B is not", "safetensors"]);
    refused(without("lora_A.weight").path(), "llama_gqa", &["lora_B", "A is not"]);
    let none = adapter(|_, tensors| tensors.clear());
    refused(none.path(), "llama_gqa", &["no tensors"]);
    for (tensor, shape) in [
        ("base_model.model.score.weight", vec![2, 64]),
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", vec![4, 64]),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", vec![64]),
        ("base_model.model.model.layers.0.self_attn.q_proj.ia3_l", vec![64]),
        ("base_model.model.model.layers.0.mlp.up_proj.weight", vec![96, 64]),
        ("base_model.model.model.norm.weight", vec![64]),
    ] {
        refused(with(tensor, Dtype::F32, &shape).path(), "llama_gqa", &[tensor]);
    }
    for shape in [vec![5, 64], vec![4, 63], vec![64], vec![2, 4, 64], vec![0, 64], vec![]] {
        refused(with(&a, Dtype::F32, &shape).path(), "llama_gqa", &[&a, &format!("{shape:?}")]);
    }
    let b = name("lora_B.weight");
    refused(with(&b, Dtype::F32, &[64, 0]).path(), "llama_gqa", &[&b]);
    refused(with(&a, Dtype::I32, &[4, 64]).path(), "llama_gqa", &[&a, "I32"]);
    let magnitude = name("lora_magnitude_vector");
    let dir = with(&magnitude, Dtype::F32, &[64]);
    refused(dir.path(), "llama_gqa", &["use_dora is false"]);
    let head = "base_model.model.lm_head.weight";
    refused(with(head, Dtype::F32, &[273, 64]).path(), "llama_gqa", &[head, "273 tokens"]);
    let embedding = "base_model.model.model.embed_tokens.lora_A.weight";
    refused(with(embedding, Dtype::F32, &[4, 64]).path(), "llama_gqa", &[embedding]);
}

#[test]
fn adapters_of_other_models_are_refused() {
    refused(
        &golden("adapters/lora_qv"),
        "falcon_7b",
        &["adapter_model.safetensors", "_proj", "another model"],
    );
    refused(&golden("adapters/lora_qv"), "llama_head_dim", &["_proj", "shape"]);
    refused(&golden("adapters/falcon_qkv"), "falcon_7b", &["shape"]);
    let gguf = golden("gguf/llama_lora.gguf");
    refused(&gguf, "llama_gqa", &["llama_lora.gguf", "blk.", "shape"]);
    refused(&gguf, "qwen3", &["architecture", "llama", "qwen3"]);
    refused(&golden("gguf/llama_f32.gguf"), "llama_gqa", &["not an adapter"]);
}

#[test]
fn files_that_are_missing_or_damaged_are_named() {
    let config = "adapter_config.json";
    let weights = "adapter_model.safetensors";
    for (file, content) in
        [(config, "{"), (config, "[]"), (config, "\"x\""), (weights, ""), (weights, "abcdefghijkl")]
    {
        let dir = adapter(|_, _| ());
        std::fs::write(dir.path().join(file), content).unwrap();
        refused(dir.path(), "llama_gqa", &["adapter mine", file]);
    }
    for file in [config, weights] {
        let dir = adapter(|_, _| ());
        std::fs::remove_file(dir.path().join(file)).unwrap();
        refused(dir.path(), "llama_gqa", &[file]);
    }
    let dir = adapter(|_, _| ());
    let whole = std::fs::read(dir.path().join(weights)).unwrap();
    for len in (0..whole.len()).step_by(97) {
        std::fs::write(dir.path().join(weights), &whole[..len]).unwrap();
        refused(dir.path(), "llama_gqa", &[weights]);
    }
    refused(Path::new("/no/such/adapter"), "llama_gqa", &["/no/such/adapter"]);
    let file = dir.path().join(weights);
    refused(&file, "llama_gqa", &["neither a PEFT directory nor a .gguf file"]);
    let gguf = std::fs::read(golden("gguf/llama_lora.gguf")).unwrap();
    let cut = dir.path().join("cut.gguf");
    for len in (0..gguf.len()).step_by(211) {
        std::fs::write(&cut, &gguf[..len]).unwrap();
        refused(&cut, "llama_gqa", &["cut.gguf"]);
    }
}

/// Whatever the bytes are, there is an answer; one that is taken also loads.
#[test]
fn damaged_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("a.gguf");
    let peft = dir.path().join("peft");
    std::fs::create_dir(&peft).unwrap();
    let from = golden("adapters/dora");
    let names = ["adapter_config.json", "adapter_model.safetensors"];
    for name in names {
        std::fs::copy(from.join(name), peft.join(name)).unwrap();
    }
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % n
    };
    for (file, source, opened, model) in [
        (&gguf, golden("gguf/llama_lora.gguf"), &gguf, "gguf/llama_f32.gguf"),
        (&peft.join(names[0]), from.join(names[0]), &peft, "llama_gqa"),
        (&peft.join(names[1]), from.join(names[1]), &peft, "llama_gqa"),
    ] {
        let whole = std::fs::read(&source).unwrap();
        let config = config_of(model);
        for _ in 0..300 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random(3) {
                let at = random(whole.len().min(1500));
                bytes[at] = [random(256) as u8, 0, 255, b'9'][random(4)];
            }
            std::fs::write(file, &bytes).unwrap();
            let source = AdapterSource { name: "mine".into(), path: opened.clone() };
            if let Ok(adapter) = Adapter::open(&source, &config) {
                assert!(!adapter.summary().is_empty());
            }
        }
        std::fs::write(file, &whole).unwrap();
        assert!(open(opened, model).is_ok());
    }
}

#[test]
fn another_vocabulary_is_said_to_be_one() {
    let head = "base_model.model.lm_head";
    for (name, shape) in [
        (format!("{head}.weight"), vec![700, 64]),
        ("base_model.model.model.embed_tokens.weight".into(), vec![700, 64]),
        ("base_model.model.model.embed_tokens.lora_embedding_A".into(), vec![4, 700]),
        (format!("{head}.lora_B.weight"), vec![700, 4]),
    ] {
        let dir = adapter(|_, tensors| {
            let mut add = |name: &str, shape| tensors.insert(name.into(), (Dtype::F32, shape));
            add(&name, shape.clone());
            if name.ends_with("lora_B.weight") {
                add(&format!("{head}.lora_A.weight"), vec![4, 64]);
            }
            if name.ends_with("embedding_A") {
                add(&name.replace("embedding_A", "embedding_B"), vec![64, 4]);
            }
        });
        refused(dir.path(), "llama_gqa", &["700 tokens", "vocabulary", "merge"]);
    }
}

/// The file without its header; of an embedding, A once more by token.
#[test]
fn memory_is_that_of_the_tensors() {
    for (name, more) in [("lora_qv", 0), ("dora", 0), ("lora_embedding", 1)] {
        let dir = golden("adapters").join(name);
        let adapter = open(&dir, "llama_gqa").unwrap();
        let file = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
        let by_token = more * config_of("llama_gqa").vocab_size as u64 * 4 * 4;
        let rest = adapter.memory_bytes() - (file.len() as u64 - header);
        assert!(rest == 0 && more == 0 || rest >= by_token && more == 1, "{name}: {rest}");
    }
}

#[test]
fn the_identity_is_of_names_and_bytes_in_any_order() {
    let (one, two) = (adapter(|_, _| ()), adapter(|config, _| config["lora_alpha"] = json!(9)));
    let source = |name: &str, dir: &TempDir| AdapterSource {
        name: name.into(),
        path: dir.path().to_owned(),
    };
    let of = |sources: &[AdapterSource]| identity(sources).unwrap();
    assert_eq!(of(&[]), Value::Null);
    let both = of(&[source("a", &one), source("b", &two)]);
    assert_eq!(both, of(&[source("b", &two), source("a", &one)]));
    assert_ne!(both, of(&[source("a", &two), source("b", &one)]));
    assert_ne!(of(&[source("a", &one)]), of(&[source("b", &one)]));
    let copy = adapter(|_, _| ());
    assert_eq!(of(&[source("a", &one)]), of(&[source("a", &copy)]), "the same bytes elsewhere");
    let twice = Adapter::open_all(&[source("a", &one), source("a", &two)], &config_of("llama_gqa"));
    assert!(twice.err().unwrap().message.contains("two are called a"));
}
