//! The forms of models: every form of one model gives its text, staged or in place, whole or
//! split; what is damaged or not supported is refused by name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::farm::{Farm, Launch, Scratch, golden};
use crate::common::run;

const PROMPTS: &str = "The cat\nOnce upon a time\nnaïve café → 東京\nfarm 12\n";
/// Forms differ in the longest context that they name.
const COMMON: [&str; 5] = ["--max-new-tokens", "12", "--max-seq-len", "96", "--return-token-ids"];

fn farm(scratch: &Scratch, name: &str, launch: Launch, model: &Path) -> Farm {
    let prompts = scratch.file("prompts.txt", PROMPTS);
    scratch.farm(name, launch, "generate").model(model).prompts(prompts).args(COMMON)
}

/// The texts that it generates, staged; nothing may be left of the copy.
#[track_caller]
fn texts(farm: &Farm) -> Vec<Value> {
    farm.ends_with(0);
    assert_eq!(farm.staged_files(), Vec::<PathBuf>::new());
    assert!(farm.stats()["stage"]["bytes_staged"].as_u64() > Some(0));
    farm.records().into_iter().map(|mut record| record["text"].take()).collect()
}

/// One rank, and a group of two.
fn launches() -> [(Launch, &'static [&'static str]); 2] {
    [(Launch::Alone, &[]), (Launch::Threads(2), &["--tensor-parallel", "2"])]
}

/// Without their own, they take the tokenizer that `golden_from` names.
#[test]
fn safetensors_pytorch_and_metas_form_of_a_model_give_its_text() {
    let scratch = Scratch::new();
    let source = golden("llama_bf16");
    let expected = texts(&farm(&scratch, "source", Launch::Alone, &source));
    assert!(expected.iter().all(|text| text.as_str().is_some_and(|text| !text.is_empty())));
    for case in ["llama_bf16", "llama_bin", "meta_mp1", "meta_mp2", "meta_mp4", "meta_mp8"] {
        for (launch, flags) in launches() {
            println!("{case} {launch:?}");
            let name = format!("{case} {launch:?}");
            let farm = farm(&scratch, &name, launch, &golden(case)).args(flags);
            let farm = farm.flag("--tokenizer", &source);
            assert_eq!(texts(&farm), expected, "{case} {launch:?}");
        }
    }
}

/// What activations become shapes a text, so another kind is another run.
#[test]
fn activations_are_rounded_for_texts_and_belong_to_the_run() {
    let scratch = Scratch::new();
    let model = golden("llama_bf16");
    let rounded = farm(&scratch, "rounded", Launch::Alone, &model);
    let expected = texts(&rounded);
    let spelled_out = rounded.clone().flag("--activations", "rounded").ends_with(0);
    assert!(spelled_out.stderr.contains("done before"), "{}", spelled_out.stderr);
    let refused = rounded.clone().flag("--activations", "f32").ends_with(3);
    assert!(refused.stderr.contains("activations"), "{}", refused.stderr);
    let exact = farm(&scratch, "exact", Launch::Alone, &model).flag("--activations", "f32");
    let [logprobs, exact_logprobs] = [rounded, exact].map(|farm| {
        let farm = farm.flag("--logprobs", "0").args(["--force-new"]);
        assert_eq!(texts(&farm).len(), expected.len());
        farm.records().into_iter().map(|mut record| record["logprobs"].take()).collect::<Vec<_>>()
    });
    assert_ne!(logprobs, exact_logprobs);
}

/// llama.cpp's answers, which it gives with margins that rounding does not cross.
#[track_caller]
fn assert_answers_of_llama_cpp(farm: &Farm, case: &str) {
    let golden = fs::read(golden(&format!("gguf/{case}.json"))).expect("a golden");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let records = farm.records();
    let prompts = golden["prompts"].as_array().expect("prompts");
    let mut compared = 0;
    for prompt in prompts {
        let same = |record: &&Value| record["prompt"] == prompt["text"];
        let Some(record) = records.iter().find(same) else { continue };
        let greedy = prompt["greedy"].as_array().expect("token ids");
        assert_eq!(record["token_ids"].as_array().expect("token ids")[..], greedy[..12], "{case}");
        compared += 1;
    }
    assert!(compared > 0, "no prompt of {case} is among {PROMPTS:?}");
}

#[test]
fn gguf_files_whole_and_split_bring_all_they_need() {
    let scratch = Scratch::new();
    for (case, file) in [
        ("llama_f16", "llama_f16.gguf"),
        ("llama_split", "llama_split-00002-of-00003.gguf"),
        ("llama_quantized_q4_k_m", "llama_quantized_q4_k_m.gguf"),
        ("llama_spm", "llama_spm.gguf"),
    ] {
        let model = golden(&format!("gguf/{file}"));
        let mut expected = None;
        for (launch, flags) in launches() {
            println!("{case} {launch:?}");
            let farm = farm(&scratch, &format!("{case} {launch:?}"), launch, &model).args(flags);
            let texts = texts(&farm);
            if !case.contains("quantized") {
                assert_answers_of_llama_cpp(&farm, case);
            }
            assert_eq!(*expected.get_or_insert(texts.clone()), texts, "{case} {launch:?}");
        }
    }
}

#[test]
fn a_directory_with_one_gguf_model_is_that_model() {
    let scratch = Scratch::new();
    let dir = scratch.path("model");
    fs::create_dir(&dir).expect("a folder");
    for part in 1..=3 {
        let name = format!("llama_split-0000{part}-of-00003.gguf");
        fs::copy(golden("gguf").join(&name), dir.join(&name)).expect("a part");
    }
    let farm = farm(&scratch, "run", Launch::Alone, &dir);
    texts(&farm);
    assert_answers_of_llama_cpp(&farm, "llama_split");
    fs::copy(golden("gguf/llama_f16.gguf"), dir.join("other.gguf")).expect("another model");
    let ended = farm.args(["--force-new"]).ends_with(3);
    assert!(ended.stderr.contains("other.gguf"), "{}", ended.stderr);
}

/// The layout of Hugging Face's cache, by the snapshot and by the repository.
#[test]
fn a_model_in_the_cache_of_hugging_face_is_found() {
    let scratch = Scratch::new();
    let repository = scratch.path("models--org--name");
    let snapshot = repository.join("snapshots/0123abcd");
    fs::create_dir_all(repository.join("blobs")).expect("blobs");
    fs::create_dir_all(repository.join("refs")).expect("refs");
    fs::create_dir_all(&snapshot).expect("a snapshot");
    fs::write(repository.join("refs/main"), "0123abcd").expect("a ref");
    for (i, entry) in fs::read_dir(golden("llama_bf16")).expect("a model").enumerate() {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), repository.join(format!("blobs/{i}"))).expect("a blob");
        symlink(format!("../../blobs/{i}"), snapshot.join(entry.file_name())).expect("a link");
    }
    let expected = texts(&farm(&scratch, "source", Launch::Alone, &golden("llama_bf16")));
    for (name, model) in [("repository", &repository), ("snapshot", &snapshot)] {
        let staged = farm(&scratch, name, Launch::Alone, model);
        assert_eq!(texts(&staged), expected);
        let in_place = farm(&scratch, &format!("{name} in place"), Launch::Threads(2), model);
        in_place.clone().args(["--no-stage"]).ends_with(0);
        assert_eq!(in_place.output(), staged.output());
    }
}

/// Meta's downloads keep one tokenizer above several models. Staged or not, its text is the
/// same; the run goes on only with the same tokenizer.
/// A tokenizer.model of Llama 3's kind in which each byte is a token.
fn bytes_as_tokens() -> String {
    let digits: Vec<char> =
        ('A'..='Z').chain('a'..='z').chain('0'..='9').chain(['+', '/']).collect();
    let line = |byte: usize| format!("{}{}== {byte}\n", digits[byte >> 2], digits[(byte & 3) << 4]);
    (0..256).map(line).collect()
}

#[test]
fn a_tokenizer_with_more_ids_than_the_model_is_refused_before_staging() {
    let scratch = Scratch::new();
    let model = scratch.model("meta_mp2");
    let above = scratch.path("tokenizer.model");
    fs::copy(golden("tokenizers/spm_bpe/tokenizer.model"), &above).expect("a tokenizer");
    for command in ["generate", "stage"] {
        let farm = match command {
            "stage" => scratch
                .farm(command, Launch::Alone, command)
                .without("--output")
                .without("--run-dir")
                .model(&model),
            _ => farm(&scratch, command, Launch::Alone, &model),
        };
        let ended = farm.ends_with(3);
        for what in ["800 tokens", "272 rows", "another model's tokenizer"] {
            assert!(ended.stderr.contains(what), "{what}:\n{}", ended.stderr);
        }
        assert_eq!(farm.staged_files(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_tokenizer_from_elsewhere_is_staged_and_belongs_to_the_run() {
    let scratch = Scratch::new();
    let model = scratch.model("meta_mp2");
    let above = scratch.path("tokenizer.model");
    fs::write(&above, bytes_as_tokens()).expect("a tokenizer");
    let staged = farm(&scratch, "staged", Launch::Threads(2), &model);
    assert_eq!(texts(&staged).len(), 4);
    let in_place = farm(&scratch, "in place", Launch::Alone, &model).args(["--no-stage"]);
    in_place.ends_with(0);
    assert_eq!(staged.output(), in_place.output());

    let given = staged.flag("--tokenizer", golden("llama_bf16"));
    let ended = given.ends_with(3);
    assert!(ended.stderr.contains("model"), "says what differs:\n{}", ended.stderr);
    let file = given.flag("--tokenizer", golden("llama_bf16/tokenizer.json")).args(["--force-new"]);
    assert_eq!(texts(&file).len(), 4);
}

#[test]
fn weights_quantized_when_they_are_staged_are_shared_and_else_each_rank_makes_the_same() {
    let scratch = Scratch::new();
    let model = golden("llama_bf16");
    let plain = farm(&scratch, "plain", Launch::Alone, &model);
    texts(&plain);
    let mut expected = None;
    for (launch, flags) in launches() {
        let name = format!("{launch:?}");
        // Near ties fall one way whatever a rank's columns only without rounding.
        let farm = farm(&scratch, &name, launch, &model).args(flags).flag("--activations", "f32");
        let farm = farm.flag("--quantize", "q8_0");
        let texts = texts(&farm);
        assert_eq!(*expected.get_or_insert(texts.clone()), texts, "{launch:?}");
        let [stats, whole] = [farm.stats(), plain.stats()];
        let bytes = |stats: &Value, name: &str| stats[name].as_u64().expect("a number");
        let weights = bytes(&stats, "weight_bytes_max");
        let alone = launch == Launch::Alone;
        let ranks = if alone { 1 } else { 2 };
        assert!(weights * 16 * ranks < bytes(&whole, "weight_bytes_max") * 9, "{stats}");
        assert_eq!(stats["stage"]["quantized"], "q8_0");
        // Of columns a rank has a copy.
        assert_eq!(bytes(&stats, "owned_weight_bytes_max") > 0, !alone);
        assert_eq!(bytes(&whole, "owned_weight_bytes_max"), 0);
        let in_place = farm.clone().args(["--no-stage", "--force-new"]);
        in_place.ends_with(0);
        let own = in_place.stats();
        assert_eq!(bytes(&own, "owned_weight_bytes_max"), bytes(&own, "weight_bytes_max"));
        let again = in_place.records().into_iter().map(|mut record| record["text"].take());
        assert_eq!(again.collect::<Vec<_>>(), texts);
    }
    // Other weights are another run; with both flags it is not clear which is meant.
    let ended = plain.clone().flag("--quantize", "q8_0").ends_with(3);
    assert!(ended.stderr.contains("q8_0"), "{}", ended.stderr);
    plain.flag("--quantize", "q8_0").args(["--dtype", "f32"]).ends_with(2);
}

/// Cuts the end of a file off.
fn truncate(file: &Path) {
    let bytes = fs::metadata(file).expect("a file").len();
    let file = fs::OpenOptions::new().write(true).open(file).expect("a file");
    file.set_len(bytes - 1000).expect("a shorter file");
}

#[test]
fn a_damaged_file_of_each_form_is_named() {
    let garbage = |path: &Path| fs::write(path, b"\0\xff{{").expect("garbage");
    let remove = |path: &Path| fs::remove_file(path).expect("one less");
    // (model, its damaged file, the damage)
    type Damage<'a> = &'a dyn Fn(&Path);
    let table: [(&str, &str, Damage); 12] = [
        ("llama_bf16", "model.safetensors", &truncate),
        ("llama_bin", "pytorch_model-00002-of-00002.bin", &truncate),
        ("llama_bin", "pytorch_model-00001-of-00002.bin", &garbage),
        ("llama_bin", "pytorch_model-00001-of-00002.bin", &remove),
        ("llama_bin", "pytorch_model.bin.index.json", &garbage),
        ("meta_mp2", "consolidated.01.pth", &truncate),
        ("meta_mp4", "consolidated.02.pth", &remove),
        ("meta_mp2", "params.json", &garbage),
        ("meta_mp2", "params.json", &remove),
        ("gguf/llama_f16.gguf", "llama_f16.gguf", &truncate),
        ("gguf/llama_quantized_q4_k_m.gguf", "llama_quantized_q4_k_m.gguf", &garbage),
        ("gguf/llama_spm.gguf", "llama_spm.gguf", &|path: &Path| {
            fs::write(path, b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f").expect("a header");
        }),
    ];
    for (case, file, damage) in table {
        println!("{case} {file}");
        let scratch = Scratch::new();
        let (model, file_path) = if case.ends_with(".gguf") {
            let copy = scratch.path(file);
            fs::copy(golden(case), &copy).expect("a copy");
            (copy.clone(), copy)
        } else {
            let model = scratch.model(case);
            (model.clone(), model.join(file))
        };
        damage(&file_path);
        let farm = farm(&scratch, "run", Launch::Alone, &model);
        let farm = farm.flag("--tokenizer", golden("llama_bf16"));
        let ended = farm.ends_with(3);
        assert!(ended.stderr.contains(file), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches("error:").count(), 1, "{}", ended.stderr);
        let inspected = run(&mut Farm::plain([Path::new("inspect"), &model]));
        assert_eq!(inspected.code, Some(3));
        assert!(inspected.stderr.contains(file), "{}", inspected.stderr);
    }
}

#[test]
fn a_damaged_tokenizer_from_elsewhere_is_named() {
    let scratch = Scratch::new();
    for (name, content, code) in [
        ("tokenizer.json", Some("{}"), 3),
        ("pieces.model", Some("\n\u{7f}"), 3),
        ("missing.json", None, 3),
        ("model.gguf", Some("GGUF"), 2),
    ] {
        let path = scratch.path(name);
        if let Some(content) = content {
            fs::write(&path, content).expect("a tokenizer");
        }
        let farm = farm(&scratch, "run", Launch::Alone, &golden("meta_mp1"));
        let ended = farm.flag("--tokenizer", path).ends_with(code);
        assert!(ended.stderr.contains(name), "{}", ended.stderr);
    }
}

#[test]
fn a_model_quantized_for_other_programs_is_refused_by_name_and_inspected() {
    let scratch = Scratch::new();
    let model = scratch.model("llama_bf16");
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("a config")).unwrap();
    config["quantization_config"] = serde_json::json!({"quant_method": "awq", "bits": 4});
    fs::write(&path, config.to_string()).expect("a config");
    let ended = farm(&scratch, "run", Launch::Alone, &model).ends_with(3);
    assert!(ended.stderr.contains("quantized by \"awq\""), "{}", ended.stderr);

    let inspect = |flags: &[&str]| {
        let mut command = Farm::plain(["inspect"]);
        command.arg(&model).args(flags);
        run(&mut command)
    };
    let text = inspect(&[]);
    let shown = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(shown.contains("awq, 4 bits") && shown.contains("2 layers × 64"), "{shown}");
    assert!(text.code == Some(3) && text.stderr.contains("awq"), "{}", text.stderr);
    let json: Value = serde_json::from_slice(&inspect(&["--json"]).stdout).expect("JSON");
    assert_eq!((&json["family"], &json["quantization"]), (&"llama".into(), &"awq, 4 bits".into()));
}

#[test]
fn inspect_leaves_with_0_for_a_model_that_runs() {
    let mut command = Farm::plain(["inspect", "--tensors", "--tokenizer"]);
    command.arg(golden("llama_bf16")).arg(golden("meta_mp8"));
    let ended = run(&mut command).with_code(0);
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    for what in ["meta", "consolidated.07.pth", "layers.1.attention.wq.weight", "[64, 64]"] {
        assert!(text.contains(what), "{what}:\n{text}");
    }
}
