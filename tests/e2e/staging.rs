//! The model's way to the node: copied once, reused, mended, removed.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::farm::{Farm, Launch, Scratch, golden};
use crate::common::has_mpirun;

fn farm(scratch: &Scratch, name: &str, launch: Launch) -> Farm {
    let prompts = scratch.file("prompts.txt", "The cat\nOnce upon a time\n");
    let farm = scratch.farm(name, launch, "generate").model(golden("llama_gqa"));
    farm.prompts(prompts).args(["--max-new-tokens", "8"])
}

/// Runs it anew: what it wrote before is generated again.
fn run(farm: &Farm) -> serde_json::Value {
    farm.clone().args(["--force-new"]).ends_with(0);
    farm.stats()["stage"].take()
}

/// The copied weights below the stage directory.
fn shards(farm: &Farm) -> Vec<PathBuf> {
    let files = farm.staged_files().into_iter();
    files.filter(|file| file.extension().is_some_and(|ending| ending == "safetensors")).collect()
}

fn model_bytes(model: &Path) -> u64 {
    let files = fs::read_dir(model).expect("a model").map(|file| file.expect("a file"));
    let needed = files.filter(|file| file.file_name() != "golden.json");
    needed.map(|file| file.metadata().expect("a file").len()).sum()
}

#[test]
fn a_copy_is_read_once_reused_mended_and_removed() {
    for launch in Launch::all(&[2], &[2]) {
        println!("{launch:?}");
        let scratch = Scratch::new();
        let farm = farm(&scratch, "run", launch);
        let bytes = model_bytes(&golden("llama_gqa"));
        // Removed at the end.
        let first = run(&farm);
        let expected = farm.output();
        assert_eq!(farm.staged_files(), Vec::<PathBuf>::new());
        let read = first["bytes_read_source"].as_u64().expect("a number");
        assert!(read <= bytes + bytes / 20, "read {read} of {bytes} bytes");

        // Kept, and then not read again.
        let kept = farm.clone().args(["--keep-staged"]);
        assert_eq!(run(&kept)["bytes_read_source"], read);
        assert_eq!(shards(&farm).len(), 4);
        let second = run(&kept);
        assert_eq!((&second["bytes_read_source"], &second["bytes_staged"]), (&0.into(), &0.into()));
        assert_eq!(second["bytes_reused"], first["bytes_staged"]);

        // A flipped byte is found and mended, the rest is not read.
        let shard = &shards(&farm)[1];
        let original = fs::read(shard).expect("a staged shard");
        flip(shard, original.len() / 2);
        let mended = run(&kept);
        let mended_bytes = mended["bytes_read_source"].as_u64().expect("a number");
        assert!(0 < mended_bytes && mended_bytes <= original.len() as u64, "{mended}");
        assert_eq!(fs::read(shard).expect("a staged shard"), original);
        assert_eq!(farm.output(), expected);

        // A kept copy stays until it is cleared; a damaged record of it is not trusted.
        let record = farm.staged_files().into_iter().find(|file| file.ends_with("manifest.json"));
        flip(&record.expect("the copy's record"), 100);
        assert_eq!(run(&farm)["bytes_read_source"], read);
        assert_eq!(farm.output(), expected);
    }
}

fn flip(file: &Path, offset: usize) {
    let mut byte = [0];
    let file = fs::OpenOptions::new().read(true).write(true).open(file).expect("a staged file");
    file.read_exact_at(&mut byte, offset as u64).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], offset as u64).expect("a write");
}

#[test]
fn no_stage_reads_the_model_where_it_lies() {
    let scratch = Scratch::new();
    let staged = farm(&scratch, "staged", Launch::Alone);
    staged.ends_with(0);
    for launch in Launch::all(&[2], &[2]) {
        let farm = farm(&scratch, &format!("{launch:?}"), launch).args(["--no-stage"]);
        farm.ends_with(0);
        assert_eq!(farm.output(), staged.output());
        assert!(farm.stats()["stage"].is_null() && !farm.stage_dir().exists());
    }
}

/// `farm stage` brings the model there for the runs that follow.
#[test]
fn farm_stage_leaves_a_copy_for_later_runs() {
    let scratch = Scratch::new();
    let farm = farm(&scratch, "run", Launch::Alone);
    let model = golden("llama_gqa");
    // As `farm inspect` has it, as the other commands have it, and by the environment.
    let mut by_argument = Farm::plain(["stage"]);
    by_argument.arg(&model).env("FARM_MODEL", "/elsewhere");
    let mut by_flag = Farm::plain(["stage"]);
    by_flag.arg("--model").arg(&model);
    for mut stage in [by_argument, by_flag] {
        stage.arg("--stage-dir").arg(farm.stage_dir());
        let ended = crate::common::run(&mut stage).with_code(0);
        let copy = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(copy.starts_with(farm.stage_dir().to_str().expect("a path")), "{copy}");
        assert_eq!(shards(&farm).len(), 4);
    }
    crate::common::run(Farm::plain(["inspect"]).env("FARM_MODEL", &model)).with_code(0);
    crate::common::run(Farm::plain(["inspect", "--model"]).arg(&model)).with_code(0);
    crate::common::run(&mut Farm::plain(["inspect"])).with_code(2);
    assert_eq!(run(&farm)["bytes_read_source"], 0);
    assert_eq!(shards(&farm).len(), 4);
}

/// A model of whole blocks of 256, quantized when it is staged: one copy that ranks map.
#[test]
fn a_quantized_copy_is_made_once_shared_and_found_again() {
    let scratch = Scratch::new();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny");
    let quantized = |name: &str, launch: Launch| {
        farm(&scratch, name, launch).model(&model).args(["--quantize", "q4_k"])
    };
    let in_place = quantized("in place", Launch::Alone).args(["--no-stage"]);
    in_place.ends_with(0);
    for launch in Launch::all(&[2], &[2]) {
        println!("{launch:?}");
        let farm = quantized(&format!("{launch:?}"), launch);
        let mut stage = Farm::plain(["stage", "--quantize", "q4_k"]);
        // However its path is spelled.
        stage.arg("--model").arg("models/tiny").arg("--stage-dir").arg(farm.stage_dir());
        stage.current_dir(env!("CARGO_MANIFEST_DIR"));
        let ended = crate::common::run(&mut stage).with_code(0);
        let line = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(line.contains("tiny-q4_k-") && line.contains(" in q4_k on 1 node"), "{line}");
        let [weights] = &shards(&farm)[..] else { panic!("{:?}", farm.staged_files()) };
        let [whole, staged] = [&model.join("model.safetensors"), weights]
            .map(|file| file.metadata().expect("weights").len());
        assert!(staged * 3 < whole, "{staged} of {whole} bytes");

        let stats = run(&farm);
        assert_eq!((&stats["bytes_read_source"], &stats["reused"]), (&0.into(), &true.into()));
        assert_eq!(farm.stats()["owned_weight_bytes_max"], 0);
        assert_eq!(farm.output(), in_place.output());
        // The copy is a model of its own; another type, or none, is another copy.
        let copy = weights.parent().expect("a directory");
        let by_path = farm.clone().model(copy).args(["--no-stage"]);
        run(&by_path);
        assert_eq!(farm.output(), in_place.output());
        let mut inspect = Farm::plain(["inspect"]);
        let ended = crate::common::run(inspect.arg(copy)).with_code(0);
        assert!(String::from_utf8_lossy(&ended.stdout).contains("q4_k"));
        let other = run(&farm.clone().flag("--quantize", "q8_0"));
        assert!(other["bytes_read_source"].as_u64() > Some(whole), "{other}");
        assert!(run(&farm.clone().model(golden("llama_bf16")))["reused"] == false);
    }
}

/// With a tokenizer from elsewhere the copy is another, and has that.
#[test]
fn farm_stage_brings_the_tokenizer_along() {
    let scratch = Scratch::new();
    let tokenizer = golden("llama_bf16");
    let farm = farm(&scratch, "run", Launch::Alone).model(golden("meta_mp2"));
    let farm = farm.flag("--tokenizer", &tokenizer).args(["--max-seq-len", "64"]);
    let mut stage = Farm::plain(["stage"]);
    stage.arg("--model").arg(golden("meta_mp2")).arg("--tokenizer").arg(&tokenizer);
    crate::common::run(stage.arg("--stage-dir").arg(farm.stage_dir())).with_code(0);
    let staged = farm.staged_files();
    assert!(staged.iter().any(|file| file.ends_with("tokenizer/tokenizer.json")), "{staged:?}");
    assert_eq!(run(&farm)["bytes_read_source"], 0);
}

/// A model that takes a moment to copy: the golden one with a tensor that nobody uses.
fn padded_model(scratch: &Scratch, bytes: usize) -> PathBuf {
    let model = scratch.model("llama_tied");
    let weights = model.join("model.safetensors");
    let content = fs::read(&weights).expect("weights");
    let (size, rest) = content.split_first_chunk::<8>().expect("a header");
    let (header, data) = rest.split_at(u64::from_le_bytes(*size) as usize);
    let mut header: serde_json::Value = serde_json::from_slice(header).expect("a header");
    header["padding"] = serde_json::json!({
        "dtype": "U8", "shape": [bytes], "data_offsets": [data.len(), data.len() + bytes],
    });
    let header = header.to_string();
    let padding = vec![7; bytes];
    let size = (header.len() as u64).to_le_bytes();
    fs::write(&weights, [&size, header.as_bytes(), data, &padding].concat()).expect("weights");
    model
}

#[test]
fn a_kill_while_staging_leaves_nothing_that_is_trusted() {
    let scratch = Scratch::new();
    let model = padded_model(&scratch, 300 << 20);
    for launch in Launch::all(&[], &[2]) {
        println!("{launch:?}");
        let farm = farm(&scratch, &format!("{launch:?}"), launch).model(&model);
        let farm = farm.args(["--keep-staged"]);
        let mut running = farm.start();
        let is_copying = || shards(&farm).iter().any(|file| written(file) > 16 << 20);
        assert!(running.reaches(is_copying), "it ended too early");
        running.kill_all();
        let left = shards(&farm);
        let partial = |file: &PathBuf| file.to_string_lossy().contains(".partial/");
        assert!(!left.is_empty() && left.iter().all(partial), "{left:?}");

        farm.ends_with(0);
        let stage = farm.stats()["stage"].take();
        assert_eq!(stage["bytes_reused"], 0, "{stage}");
        assert_eq!(shards(&farm).len(), 1);
        let copy = fs::read(&shards(&farm)[0]).expect("the copy");
        assert!(copy == fs::read(model.join("model.safetensors")).expect("the model"));
        fs::remove_dir_all(farm.stage_dir()).expect("room for the next");
    }
}

/// Bytes of a file that are there; its length may be set before.
fn written(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(file).map_or(0, |file| file.blocks() * 512)
}

/// A small file system in memory, unmounted at the end.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None`, said why, where mounting is not allowed.
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&path).expect("a mount point");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path);
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self(path)),
            Ok(output) => {
                let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                println!("skipped: no tmpfs to fill: {reason}");
                None
            }
            Err(error) => {
                println!("skipped: no tmpfs to fill: mount: {error}");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_stage_directory_stops_the_job_or_is_gone_round() {
    let scratch = Scratch::new();
    let Some(tmpfs) = Tmpfs::mount(scratch.path("small"), "200k") else { return };
    for launch in Launch::all(&[2], &[2]) {
        println!("{launch:?}");
        let farm = farm(&scratch, &format!("{launch:?}"), launch).flag("--stage-dir", &tmpfs.0);
        let ended = farm.ends_with(1);
        for what in ["the model needs 0.4 MB", "are free", "--stage-fallback in-place"] {
            assert!(ended.stderr.contains(what), "says {what}:\n{}", ended.stderr);
        }
        assert_eq!(ended.stderr.matches("error:").count(), 1, "{}", ended.stderr);
        assert!(!farm.out().exists());

        let in_place = farm.flag("--stage-fallback", "in-place");
        let ended = in_place.ends_with(0);
        assert!(ended.stderr.contains("read where it lies"), "{}", ended.stderr);
        assert_eq!(in_place.records().len(), 2);
    }
}

/// Two jobs on a node share one copy, and the last one removes it.
#[test]
fn two_jobs_share_a_copy() {
    let scratch = Scratch::new();
    let stage = scratch.path("stage");
    let launch = if has_mpirun() { Launch::Mpirun(2) } else { Launch::Threads(2) };
    let farms = ["a", "b", "c"].map(|name| {
        farm(&scratch, name, launch).flag("--stage-dir", &stage).args(["--ignore-eos"])
    });
    let running = farms.each_ref().map(Farm::start);
    for running in running {
        running.wait().with_code(0);
    }
    assert!(farms.iter().all(|farm| farm.output() == farms[0].output()));
    assert_eq!(crate::common::farm::files_below(&stage), Vec::<PathBuf>::new());
}
