//! What farm refuses before it does anything: exit codes 2 and 3, one message, on every
//! rank, and nothing left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::farm::{Farm, Launch, Scratch, files_below, golden};
use crate::common::{Running, mpirun, run, without_launcher};

const HEADER_BYTES: u64 = 8;

/// Damages a model in the folder.
type Damage = fn(&Path);

/// Ways to spoil a model, and what the message must name.
const DAMAGES: [(&str, Damage, &str); 16] = [
    ("no model", |model| fs::remove_dir_all(model).unwrap(), "model"),
    ("no config", |model| fs::remove_file(model.join("config.json")).unwrap(), "config.json"),
    (
        "garbage config",
        |model| fs::write(model.join("config.json"), b"\0\xff{{").unwrap(),
        "config.json",
    ),
    ("no tokenizer", |model| fs::remove_file(model.join("tokenizer.json")).unwrap(), "tokenizer"),
    (
        "corrupt header",
        |model| overwrite(&shard(model, 2), HEADER_BYTES, b"\xff\xff}{"),
        "00002-of",
    ),
    ("huge header", |model| overwrite(&shard(model, 2), 0, &[0xff; 8]), "00002-of"),
    ("truncated shard", |model| truncate(&shard(model, 3)), "00003-of"),
    ("missing shard", |model| fs::remove_file(shard(model, 4)).unwrap(), "00004-of"),
    (
        "missing tensor",
        |model| {
            for number in 1..=4 {
                replace(&shard(model, number), "layers.1.mlp.up_proj", "layers.1.mlp.ip_proj");
            }
        },
        "tensor model.layers.1.mlp.up_proj.weight is missing (there is model.layers.1.mlp.ip_proj",
    ),
    (
        "another model's shape",
        |model| {
            replace(
                &model.join("config.json"),
                "\"num_key_value_heads\": 4",
                "\"num_key_value_heads\": 2",
            )
        },
        "self_attn.k_proj.weight has shape",
    ),
    (
        "another model's tokenizer",
        |model| {
            let larger = golden("tokenizers/json_llama3/tokenizer.json");
            fs::copy(larger, model.join("tokenizer.json")).map(drop).unwrap();
        },
        "is it another model's tokenizer",
    ),
    (
        "endless config",
        |model| link(Path::new("/dev/zero"), &model.join("config.json")),
        "config.json",
    ),
    (
        "looping config",
        |model| link(Path::new("config.json"), &model.join("config.json")),
        "config.json",
    ),
    (
        "absurd size",
        |model| {
            replace(&model.join("config.json"), "\"hidden_size\": ", "\"hidden_size\": 99999999999")
        },
        "hidden_size",
    ),
    (
        "shard elsewhere",
        |model| replace(&index(model), "model-00001", "../../../../etc/passwd-"),
        "leaves the directory",
    ),
    (
        "index of itself",
        |model| {
            replace(
                &index(model),
                "model-00001-of-00004.safetensors",
                "model.safetensors.index.json",
            )
        },
        "model.safetensors.index.json",
    ),
];

fn index(model: &Path) -> PathBuf {
    model.join("model.safetensors.index.json")
}

/// Puts a link to `to` in the place of `file`.
fn link(to: &Path, file: &Path) {
    fs::remove_file(file).expect("a file");
    std::os::unix::fs::symlink(to, file).expect("a link");
}

/// Writes `new` wherever the file has `old`.
fn replace(file: &Path, old: &str, new: &str) {
    let bytes = fs::read(file).expect("a file");
    let mut replaced = Vec::with_capacity(bytes.len());
    let mut rest = &bytes[..];
    while let Some(first) = rest.first() {
        match rest.strip_prefix(old.as_bytes()) {
            Some(after) => {
                replaced.extend(new.as_bytes());
                rest = after;
            }
            None => {
                replaced.push(*first);
                rest = &rest[1..];
            }
        }
    }
    fs::write(file, replaced).expect("a write");
}

fn shard(model: &Path, number: usize) -> PathBuf {
    model.join(format!("model-0000{number}-of-00004.safetensors"))
}

fn overwrite(file: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(file).expect("a shard");
    file.write_all_at(bytes, offset).expect("a write");
}

fn truncate(file: &Path) {
    let bytes = fs::metadata(file).expect("a shard").len();
    let file = fs::OpenOptions::new().write(true).open(file).expect("a shard");
    file.set_len(bytes - 100).expect("a shorter shard");
}

/// Runs `farm`, which must be refused with `code` and one message that names `what`, and
/// must leave neither a copy nor an output.
#[track_caller]
fn refused(farm: &Farm, code: i32, what: &str) {
    let ended = farm.ends_with(code);
    // What mpirun adds about a rank's exit code does not begin like farm's own message.
    let messages: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("error:")).collect();
    assert_eq!(messages.len(), 1, "one message:\n{}", ended.stderr);
    assert!(ended.stderr.contains(what), "names {what}:\n{}", ended.stderr);
    assert!(ended.stdout.is_empty(), "{}", String::from_utf8_lossy(&ended.stdout));
    assert_eq!(farm.staged_files(), Vec::<PathBuf>::new());
    let partial = farm.out().with_file_name("out.jsonl.partial");
    assert!(!farm.out().exists() && !partial.exists());
}

#[test]
fn an_unusable_model_is_refused() {
    for (name, damage, what) in DAMAGES {
        let scratch = Scratch::new();
        let prompts = scratch.file("prompts.txt", "The cat\n");
        let model = scratch.model("llama_gqa");
        damage(&model);
        for launch in Launch::all(&[2], &[2]) {
            println!("{name} {launch:?}");
            let farm = scratch.farm(&format!("{launch:?}"), launch, "generate");
            refused(&farm.model(&model).prompts(&prompts), 3, what);
        }
    }
}

#[test]
fn a_tensor_parallel_size_that_does_not_divide_is_refused_with_those_that_do() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.txt", "The cat\n");
    for launch in Launch::all(&[3], &[3]).into_iter().skip(1) {
        let farm = scratch.farm(&format!("{launch:?}"), launch, "generate");
        let farm = farm.model(golden("llama_gqa")).prompts(&prompts);
        refused(&farm.clone().args(["--tensor-parallel", "3"]), 3, "1, 2, 4");
    }
}

/// srun reports each rank's code, and a site's epilog may look at any of them.
#[test]
fn every_rank_leaves_with_the_same_code() {
    if !crate::common::has_mpirun() {
        return;
    }
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.txt", "The cat\n");
    let model = scratch.model("llama_gqa");
    truncate(&shard(&model, 1));
    let mut command = mpirun(2);
    let codes = scratch.path("code");
    let script = format!("\"$@\"; echo $? > {}-$OMPI_COMM_WORLD_RANK", codes.display());
    command.args(["sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_farm")]);
    command.arg("--model").arg(model).arg("--prompts-file").arg(prompts);
    command.arg("--stage-dir").arg(scratch.path("stage"));
    run(&mut command);
    for rank in 0..2 {
        let code = fs::read_to_string(scratch.path(&format!("code-{rank}"))).expect("a code");
        assert_eq!(code.trim(), "3", "rank {rank}");
    }
}

#[test]
fn unusable_prompts_are_refused() {
    let scratch = Scratch::new();
    let files = [
        (scratch.file("empty.jsonl", ""), "empty"),
        (scratch.file("blank.txt", "\n \n\r\n"), "blank"),
        (scratch.path("missing.jsonl"), "missing.jsonl"),
        (golden("llama_gqa"), "directory"),
    ];
    for (prompts, what) in files {
        for launch in Launch::all(&[], &[2]) {
            println!("{} {launch:?}", prompts.display());
            let farm = scratch.farm(&format!("{what} {launch:?}"), launch, "generate");
            refused(&farm.model(golden("llama_gqa")).prompts(&prompts), 3, what);
        }
    }
    let farm = scratch.farm("csv", Launch::Alone, "generate").model(golden("llama_gqa"));
    let csv = scratch.file("prompts.csv", "id,text\n1,hello\n");
    refused(&farm.prompts(csv), 3, "--prompt-column");
    let farm = scratch.farm("stdin", Launch::Alone, "generate").model(golden("llama_gqa"));
    let farm = farm.prompts("-");
    let ended = Running::start(&mut farm.command(), b"").wait().with_code(3);
    assert!(ended.stderr.contains("standard input"), "{}", ended.stderr);
    assert_eq!(files_below(&farm.run_dir()), Vec::<PathBuf>::new());
}

#[test]
fn a_wrong_command_line_is_refused() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.txt", "The cat\n");
    let wrong: [(&[&str], &str); 9] = [
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--temperature", "-1"], "--temperature"),
        (&["--top-p", "1.5"], "--top-p"),
        (&["--max-new-tokens", "0"], "--max-new-tokens"),
        (&["--max-batch-size", "many"], "--max-batch-size"),
        (&["--dtype", "int4"], "--dtype"),
        (&["--kv-cache-memory", "8 parsecs"], "--kv-cache-memory"),
        (&["--interrupted-exit-code", "0"], "--interrupted-exit-code"),
        (&["--force-new", "--resume"], "--resume"),
    ];
    for (flags, what) in wrong {
        let farm = scratch.farm("run", Launch::Alone, "generate");
        let farm = farm.model(golden("llama_gqa")).prompts(&prompts);
        refused(&farm.args(flags), 2, what);
    }
    for launch in Launch::all(&[], &[2]) {
        println!("{launch:?}");
        let farm = scratch.farm("run", launch, "generate");
        let farm = farm.model(golden("llama_gqa")).prompts(&prompts);
        refused(&farm.clone().args(["--top-k", "x"]), 2, "--top-k");
        refused(&farm.clone().without("--model"), 2, "--model");
        refused(&farm.clone().without("--prompts-file"), 2, "--prompts-file");
        // Ranks that do not make whole groups.
        refused(&farm.clone().args(["--tensor-parallel", "4"]), 2, "srun -n 4");
        refused(&farm.clone().args(["--tensor-parallel", "4"]), 2, "--local-ranks 4");
    }
    for launch in Launch::all(&[], &[2]).into_iter().skip(1) {
        let farm = scratch.farm("run", launch, "generate");
        let farm = farm.model(golden("llama_gqa")).prompts(&prompts);
        refused(&farm.args(["--local-ranks", "2"]), 2, "--local-ranks");
    }
}

/// A slip in the command line must not cost the user the prompts.
#[test]
fn an_output_in_the_place_of_the_prompts_or_of_a_directory_is_refused() {
    let scratch = Scratch::new();
    let prompts = scratch.file("prompts.txt", "The cat\n");
    let partial = scratch.file("answers.partial", "The cat\n");
    let folder = scratch.path("folder");
    fs::create_dir(&folder).expect("a folder");
    let link = scratch.path("link");
    std::os::unix::fs::symlink(&prompts, &link).expect("a link");
    let cases = [
        (&prompts, prompts.clone(), "overwrite"),
        (&prompts, link, "overwrite"),
        (&partial, scratch.path("answers"), "overwrite"),
        (&prompts, folder, "directory"),
    ];
    for (prompts, output, what) in cases {
        let farm = scratch.farm("run", Launch::Alone, "generate").model(golden("llama_gqa"));
        refused(&farm.prompts(prompts).flag("--output", output), 3, what);
        assert_eq!(fs::read_to_string(prompts).expect("the prompts"), "The cat\n");
    }
}

/// `farm` alone says how it is used.
#[test]
fn no_argument_is_a_wrong_command_line() {
    let ended = run(&mut without_launcher(Command::new(env!("CARGO_BIN_EXE_farm")))).with_code(2);
    assert!(ended.stderr.contains("Usage"), "{}", ended.stderr);
}
