//! `farm finetune`: what it leaves, what it refuses, and that neither kills nor ranks change
//! the adapter.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use farm::train::metrics::{Metrics, read_metrics};
use rustix::process::Signal;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::common::farm::{Farm, Launch, Scratch, golden, records};

const STEPS: usize = 20;
const EXAMPLES: usize = 60;

/// A command line of `farm finetune`, and its adapter's directory.
#[derive(Clone)]
struct Training {
    farm: Farm,
    dir: PathBuf,
}

impl Training {
    /// A short training with everything that a resume must get right: several epochs,
    /// packing, dropout, validation, and checkpoints that fall between.
    fn new(scratch: &Scratch, name: &str, launch: Launch) -> Self {
        let farm = scratch.farm(name, launch, "finetune").without("--output").without("--run-dir");
        let farm = farm.model(golden("llama_gqa")).flag("--train", cats(scratch));
        let settings = "--val-fraction 0.1 --packing --max-seq-len 64 --lora-dropout 0.1 --max-steps 20 \
            --batch-size 4 --micro-batch-size 2 --learning-rate 0.002 --save-steps 3 --eval-steps 4";
        Self { farm: farm.args(settings.split_whitespace()), dir: PathBuf::new() }
            .into_dir(scratch.path(name))
    }

    /// The same, into the adapter directory `folder/adapter`.
    fn into_dir(self, folder: PathBuf) -> Self {
        let dir = folder.join("adapter");
        Self { farm: self.farm.flag("--adapter-out", &dir), dir }
    }

    fn flag(self, flag: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        Self { farm: self.farm.flag(flag, value), ..self }
    }

    fn args(self, args: &[&str]) -> Self {
        Self { farm: self.farm.args(args), ..self }
    }

    fn launched(&self, launch: Launch) -> Self {
        Self { farm: self.farm.clone().launched(launch), dir: self.dir.clone() }
    }

    /// The adapter's weights.
    #[track_caller]
    fn adapter(&self) -> Vec<u8> {
        let path = self.dir.join("adapter_model.safetensors");
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[track_caller]
    fn metrics(&self) -> Metrics {
        read_metrics(&self.dir).expect("metrics")
    }

    /// `finetune.json`.
    fn run_file(&self) -> Value {
        let text = fs::read(self.dir.join("finetune.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn is_complete(&self) -> bool {
        self.run_file()["is_complete"] == true
    }

    /// As a kill between the last step and the adapter leaves it.
    fn unfinish(&self) {
        let mut run = self.run_file();
        run["is_complete"] = false.into();
        fs::write(self.dir.join("finetune.json"), run.to_string()).expect("finetune.json");
        fs::remove_file(self.dir.join("adapter_model.safetensors")).expect("an adapter");
    }
}

/// Examples of a rule that no model was taught.
fn cats(scratch: &Scratch) -> PathBuf {
    let line =
        |i| format!("{}\n", json!({"prompt": format!("{i} cats and"), "completion": " dogs"}));
    scratch.file("cats.jsonl", (0..EXAMPLES).map(line).collect::<String>())
}

/// What decides the losses, step by step; times differ.
fn losses(metrics: &Metrics) -> Vec<(u64, f64, f64, f64)> {
    let train = metrics.train.iter().map(|m| (m.step, m.loss, m.learning_rate, m.grad_norm));
    train.chain(metrics.eval.iter().map(|m| (m.step, m.loss, m.perplexity, 0.0))).collect()
}

/// Equal losses to 1e-5, and equal values of the adapters to 1e-4 of each tensor's largest.
#[track_caller]
fn alike(training: &Training, other: &Training) {
    let (a, b) = (losses(&training.metrics()), losses(&other.metrics()));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.0, b.0);
        assert!((a.1 - b.1).abs() <= 1e-5 * a.1.abs(), "{a:?} {b:?} of {}", other.dir.display());
    }
    let (a, b) = (training.adapter(), other.adapter());
    let (a, b) = (SafeTensors::deserialize(&a).unwrap(), SafeTensors::deserialize(&b).unwrap());
    assert_eq!(a.len(), b.len());
    for (name, a) in a.tensors() {
        let (a, b) = (floats(a.data()), floats(b.tensor(&name).unwrap().data()));
        let largest = a.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let worst = a.iter().zip(&b).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst <= 1e-4 * largest, "{name}: {worst} of {largest}, {}", other.dir.display());
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[test]
fn a_training_leaves_all_its_files_and_is_not_repeated() {
    let scratch = Scratch::new();
    let training = Training::new(&scratch, "run", Launch::Alone).args(&["--format", "gguf"]);
    let said = training.farm.ends_with(0).stderr;
    assert!(said.contains("20 steps"), "{said}");
    let files = ["adapter_config.json", "adapter.gguf", "metrics.csv", "loss.svg"];
    assert!(files.iter().all(|file| training.dir.join(file).exists()));
    let checkpoint = |step| training.dir.join(format!("checkpoints/checkpoint-{step}"));
    assert!(checkpoint(18).exists() && checkpoint(20).exists() && !checkpoint(3).exists());
    let metrics = training.metrics();
    assert!(metrics.train.iter().map(|m| m.step).eq(1..=STEPS as u64));
    assert!(metrics.eval.iter().map(|m| m.step).eq([4, 8, 12, 16, 20]));
    let (first, last) = (metrics.train[0].loss, metrics.train[STEPS - 1].loss);
    assert!(last < first / 2.0, "nothing learned: {first} {last}");
    assert!(training.is_complete());
    let adapter = training.adapter();
    let said = training.farm.ends_with(0).stderr;
    assert!(said.contains("nothing is left to do"), "{said}");
    assert!(training.adapter() == adapter && losses(&training.metrics()) == losses(&metrics));
}

/// Another training never goes into the same directory.
#[test]
fn other_flags_and_other_data_are_refused() {
    let scratch = Scratch::new();
    let training = Training::new(&scratch, "run", Launch::Alone).flag("--max-steps", "4");
    training.farm.ends_with(0);
    let adapter = training.adapter();
    let other = training.clone().flag("--learning-rate", "0.02");
    let said = other.farm.ends_with(3).stderr;
    assert!(said.contains("learning_rate: 0.002 there, 0.02 now"), "{said}");
    let more = scratch.file("more.jsonl", "{\"text\":\"a b\"}\n{\"text\":\"c d\"}\n");
    let said = training.clone().flag("--train", more).farm.ends_with(3).stderr;
    assert!(said.contains("data:"), "a complete run's data are compared too: {said}");
    assert!(training.adapter() == adapter);
    other.clone().args(&["--force-new"]).farm.ends_with(0);
    assert!(training.adapter() != adapter);
    let aside = training.dir.join("set-aside-1");
    assert!(fs::read(aside.join("adapter_model.safetensors")).expect("the old one") == adapter);
    other.farm.ends_with(0);
}

#[test]
fn bad_records_are_left_out_and_listed() {
    let scratch = Scratch::new();
    let good = "{\"prompt\":\"a\",\"completion\":\" b\"}\n";
    let lines = [good, "not json\n", good, "{\"prompt\":\"a\"}\n", "{\"text\":7}\n", good].concat();
    for launch in Launch::all(&[2], &[2]) {
        let training = Training::new(&scratch, &format!("{launch:?}"), launch);
        let training = training.flag("--train", scratch.file("mixed.jsonl", &lines));
        let said = training.flag("--max-steps", "2");
        let ended = said.farm.ends_with(0);
        assert!(ended.stderr.contains("3 records cannot be trained on"), "{}", ended.stderr);
        let bad = records(&fs::read(said.dir.join("bad_records.jsonl")).expect("a list"));
        let lines: Vec<u64> = bad.iter().map(|record| record["line"].as_u64().unwrap()).collect();
        assert_eq!(lines, [2, 4, 5], "{launch:?}");
        assert!(bad.iter().all(|record| !record["message"].as_str().unwrap().is_empty()));
    }
}

#[test]
fn what_cannot_be_trained_is_refused_once() {
    let scratch = Scratch::new();
    let empty = scratch.file("empty.jsonl", "");
    let bad = scratch.file("bad.jsonl", "not json\n{}\n");
    let cases = [
        ("--train", scratch.path("missing.jsonl"), 3, "missing.jsonl"),
        ("--train", empty, 3, "empty.jsonl"),
        ("--train", bad, 3, "bad.jsonl"),
        ("--model", scratch.path("no-model"), 3, "no-model"),
        ("--max-seq-len", "100000".into(), 3, "--max-seq-len"),
        ("--target-modules", "no_such_proj".into(), 3, "no_such_proj"),
        ("--lora-dropout", "1".into(), 2, "--lora-dropout"),
        ("--sweep", "colour=1,2".into(), 2, "colour"),
        ("--tensor-parallel", "3".into(), 2, "tensor"),
    ];
    for launch in Launch::all(&[], &[2]) {
        for (number, (flag, value, code, what)) in cases.iter().enumerate() {
            let training = Training::new(&scratch, &format!("{launch:?} {number}"), launch);
            let ended = training.flag(flag, value).farm.ends_with(*code);
            assert!(ended.stderr.contains(what), "names {what}: {}", ended.stderr);
            assert_eq!(ended.stderr.matches("error:").count(), 1, "{}", ended.stderr);
        }
    }
}

/// Before anything is written: an adapter's directory that a refused run has begun would be in
/// the way of the next.
#[test]
fn a_model_that_cannot_be_trained_leaves_no_directory() {
    let scratch = Scratch::new();
    let another = golden("tokenizers/json_llama3/tokenizer.json");
    let cases = [
        ("--model", golden("mixtral"), "routed experts"),
        ("--model", golden("gguf/qwen3_moe.gguf"), "routed experts"),
        ("--model", golden("gguf/llama_lora.gguf"), "llama_lora.gguf"),
        ("--tokenizer", another, "another model's tokenizer"),
        ("--target-modules", "no_such_proj".into(), "no_such_proj"),
    ];
    for (number, (flag, value, what)) in cases.into_iter().enumerate() {
        let training = Training::new(&scratch, &number.to_string(), Launch::Alone);
        let training = training.flag(flag, value);
        let ended = training.farm.ends_with(3);
        assert!(ended.stderr.contains(what), "names {what}: {}", ended.stderr);
        assert!(!training.dir.exists(), "{}", training.dir.display());
    }
}

/// Draws for the moments at which a run is disturbed (xorshift64*).
struct Draws(u64);

impl Draws {
    /// Seeded by TEST_SEED, or by the clock; says by what.
    fn new() -> Self {
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
        let seed = std::env::var("TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(clock.as_nanos() as u64 % 1_000_000);
        println!("TEST_SEED={seed}");
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % n
    }
}

/// Starts `training`, and kills or signals it at a random moment.
fn disturb(training: &Training, launch: Launch, longest: Duration, draws: &mut Draws) {
    let mut running = training.farm.start();
    thread::sleep(Duration::from_micros(draws.below(longest.as_micros() as u64)));
    // mpirun does not hand SIGTERM on in time: job templates send USR1.
    let term = if matches!(launch, Launch::Mpirun(_)) { Signal::USR1 } else { Signal::TERM };
    let signal = [None, Some(Signal::USR1), Some(term)][draws.below(3) as usize];
    let Some(signal) = signal else { return running.kill_all() };
    running.signal(signal);
    let ended = running.wait();
    // Before farm listens, a signal ends it as it ends any program; mpirun then says 138.
    let is_known = [None, Some(138), Some(0), Some(75)].contains(&ended.code);
    assert!(is_known, "{:?} {}", ended.code, ended.stderr);
    assert_eq!(ended.code == Some(0), training.is_complete(), "{}", ended.stderr);
}

/// Byte for byte: order of the data, dropout, optimiser, learning rate, early stopping.
#[track_caller]
fn disturbed_ends_alike(scratch: &Scratch, launch: Launch, kills: usize, draws: &mut Draws) {
    let name = |name: &str| scratch.path(&format!("{name} {launch:?}"));
    let expected = Training::new(scratch, &format!("whole {launch:?}"), launch);
    let start = Instant::now();
    expected.farm.ends_with(0);
    let longest = start.elapsed() / 2;
    let (adapter, metrics) = (expected.adapter(), losses(&expected.metrics()));
    let mut killed = 0;
    for round in 0.. {
        let training = expected.clone().into_dir(name(&format!("killed {round}")));
        while killed < kills && !training.is_complete() {
            disturb(&training, launch, longest, draws);
            killed += 1;
        }
        training.farm.ends_with(0);
        assert!(training.adapter() == adapter, "{launch:?}: another adapter after kills");
        assert_eq!(losses(&training.metrics()), metrics, "{launch:?}: each step once");
        if killed >= kills {
            return;
        }
    }
}

#[test]
fn killed_at_ten_random_moments_the_adapter_is_the_same() {
    disturbed_ends_alike(&Scratch::new(), Launch::Alone, 10, &mut Draws::new());
}

#[test]
fn killed_ranks_go_on_to_the_same_adapter() {
    let (scratch, mut draws) = (Scratch::new(), Draws::new());
    for launch in Launch::all(&[2], &[2]).into_iter().skip(1) {
        disturbed_ends_alike(&scratch, launch, 3, &mut draws);
    }
}

/// A job that comes back may have other nodes.
#[test]
fn a_training_goes_on_with_other_ranks() {
    let scratch = Scratch::new();
    let expected = Training::new(&scratch, "whole", Launch::Alone);
    expected.farm.ends_with(0);
    for (ranks, tensor_parallel) in [(2, "1"), (2, "2"), (4, "2")] {
        let name = format!("{ranks} ranks, {tensor_parallel}");
        let training = Training::new(&scratch, &name, Launch::Alone);
        let mut running = training.farm.start();
        assert!(running.reaches(|| training.dir.join("checkpoints/checkpoint-3").exists()));
        running.signal(Signal::USR1);
        let code = running.wait().code;
        assert!([Some(0), Some(75)].contains(&code), "{code:?}");
        let other =
            training.launched(Launch::Threads(ranks)).flag("--tensor-parallel", tensor_parallel);
        other.farm.ends_with(0);
        alike(&expected, &other);
    }
}

#[test]
fn every_layout_trains_the_same_adapter() {
    let scratch = Scratch::new();
    let expected = Training::new(&scratch, "alone", Launch::Alone);
    expected.farm.ends_with(0);
    let mut layouts = vec![
        (Launch::Threads(2), "1"),
        (Launch::Threads(4), "1"),
        (Launch::Threads(2), "2"),
        (Launch::Threads(4), "2"),
    ];
    layouts.extend(Launch::all(&[], &[2]).into_iter().skip(1).flat_map(|l| [(l, "1"), (l, "2")]));
    for (launch, tensor_parallel) in layouts {
        let name = format!("{launch:?} {tensor_parallel}");
        let training = Training::new(&scratch, &name, launch);
        let training = training.flag("--tensor-parallel", tensor_parallel);
        training.farm.ends_with(0);
        alike(&expected, &training);
    }
}

/// With dropout, packing, validation, and going on from a checkpoint.
#[cfg(feature = "emulator")]
#[test]
fn a_device_trains_the_hosts_adapter() {
    let scratch = Scratch::new();
    let of = |name: &str, device: &str| {
        let training = Training::new(&scratch, name, Launch::Alone);
        training.flag("--device", device).flag("--dtype", "f32").flag("--max-steps", "6")
    };
    let host = of("host", "cpu");
    host.farm.ends_with(0);
    let device = of("device", "emulator");
    device.farm.ends_with(0);
    alike(&host, &device);
    let again = of("again", "emulator");
    let mut running = again.farm.start();
    assert!(running.reaches(|| again.dir.join("checkpoints/checkpoint-3").exists()));
    running.signal(Signal::USR1);
    let code = running.wait().code;
    assert!([Some(0), Some(75)].contains(&code), "{code:?}");
    again.farm.ends_with(0);
    assert!(again.adapter() == device.adapter());
}

/// Memory saved changes no bit.
#[test]
fn recomputed_layers_give_the_same_adapter() {
    let scratch = Scratch::new();
    let run = |recompute: &str| {
        let training = Training::new(&scratch, recompute, Launch::Alone);
        let training = training.flag("--recompute", recompute).flag("--max-steps", "6");
        training.farm.ends_with(0);
        training.adapter()
    };
    let expected = run("none");
    assert!(run("full") == expected && run("1") == expected);
}

/// The same adapters, whether the combinations are trained in turn or at once.
#[test]
fn a_sweep_leaves_an_adapter_each_and_a_table() {
    let scratch = Scratch::new();
    let folders = ["r=2,lr=1e-3", "r=2,lr=1e-2", "r=4,lr=1e-3", "r=4,lr=1e-2"];
    let mut expected = None;
    for launch in Launch::all(&[2], &[2]) {
        let sweep = Training::new(&scratch, &format!("{launch:?}"), launch);
        let sweep = sweep.flag("--sweep", "r=2,4 lr=1e-3,1e-2").flag("--max-steps", "5");
        sweep.farm.ends_with(0);
        let file = |folder| sweep.dir.join(folder).join("adapter_model.safetensors");
        let adapters = folders.map(|folder| fs::read(file(folder)).expect("an adapter"));
        assert!(adapters[0] != adapters[1]);
        let table = fs::read_to_string(sweep.dir.join("sweep.csv")).expect("a table");
        let rows: Vec<&str> = table.lines().skip(1).collect();
        assert!(
            rows.iter().zip(folders).all(|(row, name)| row.starts_with(&format!("\"{name}\",5,"))),
            "{table}"
        );
        let first = expected.get_or_insert((adapters.clone(), table.clone()));
        assert!(*first == (adapters, table), "{launch:?}");
        // Again: complete.
        assert!(sweep.farm.ends_with(0).stderr.contains("nothing is left to do"));
    }
}

#[test]
fn early_stopping_keeps_the_best_and_is_remembered() {
    let scratch = Scratch::new();
    let other =
        scratch.file("other.jsonl", "{\"prompt\":\"two dogs\",\"completion\":\" and a cat\"}\n");
    let training = Training::new(&scratch, "run", Launch::Alone);
    let training = Training { farm: training.farm.without("--val-fraction"), ..training };
    let training =
        training.flag("--val", other).flag("--eval-steps", "1").flag("--max-steps", "400");
    let training = training.flag("--early-stopping-patience", "2").flag("--schedule", "constant");
    let training = training.flag("--learning-rate", "0.01");
    training.farm.ends_with(0);
    let metrics = training.metrics();
    assert!(metrics.train.len() < 400, "it did not stop early");
    let best = metrics.eval.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).expect("validations");
    assert_eq!(best.step + 2, metrics.train.len() as u64);
    let folder = training.dir.join(format!("checkpoints/checkpoint-{}", best.step));
    let adapter = training.adapter();
    assert!(fs::read(folder.join("adapter_model.safetensors")).expect("the best") == adapter);
    // Killed before the adapter was written, it does not train on.
    training.unfinish();
    training.farm.ends_with(0);
    assert!(training.adapter() == adapter);
    assert_eq!(losses(&training.metrics()), losses(&metrics));
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let scratch = Scratch::new();
    let training = Training::new(&scratch, "run", Launch::Alone);
    training.farm.ends_with(0);
    let (adapter, metrics) = (training.adapter(), training.metrics());
    let newest = training.dir.join("checkpoints/checkpoint-20/optimizer.safetensors");
    let mut bytes = fs::read(&newest).expect("a checkpoint");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 64;
    fs::write(&newest, bytes).expect("a damaged checkpoint");
    training.unfinish();
    let said = training.farm.ends_with(0).stderr;
    assert!(said.contains("checkpoint-20") && said.contains("going on after step 18"), "{said}");
    assert!(training.adapter() == adapter);
    assert_eq!(losses(&training.metrics()), losses(&metrics));
}

/// The end of the job's time is a signal that nobody has to send.
#[test]
fn a_time_limit_stops_the_training_with_its_work_saved() {
    let scratch = Scratch::new();
    let training = Training::new(&scratch, "run", Launch::Threads(2)).flag("--max-steps", "100000");
    let training = training.flag("--save-steps", "0");
    let ended = training.clone().args(&["--time-limit", "2s"]).farm.ends_with(75);
    assert!(ended.stderr.contains("the same command goes on"), "{}", ended.stderr);
    let steps = training.metrics().train.len();
    assert!(training.dir.join(format!("checkpoints/checkpoint-{steps}")).exists(), "{steps}");
    let ended =
        training.args(&["--time-limit", "2s", "--interrupted-exit-code", "99"]).farm.ends_with(99);
    assert!(ended.stderr.contains(&format!("going on after step {steps}")), "{}", ended.stderr);
}

/// What was learned is what farm answers with the adapter; the base may be quantized.
#[test]
fn the_adapter_answers_as_it_was_taught() {
    let scratch = Scratch::new();
    let gguf = golden("gguf");
    let bases = [
        (golden("llama_gqa"), None),
        (golden("llama_gqa"), Some("q8_0")),
        (gguf.join("llama_quantized_q4_k.gguf"), None),
    ];
    for (number, (base, quantize)) in bases.iter().enumerate() {
        let training = Training::new(&scratch, &format!("training {number}"), Launch::Alone);
        let training = training
            .flag("--model", base)
            .flag("--max-steps", "25")
            .flag("--learning-rate", "0.01");
        let given = |farm: Farm| match quantize {
            Some(kind) => farm.flag("--quantize", kind),
            None => farm,
        };
        given(training.farm.clone()).ends_with(0);
        let with = answers(&scratch, given, base, Some(&training.dir), number);
        assert_ne!(answers(&scratch, given, base, None, number), with);
        assert_eq!(with, [" dogs", " dogs"], "{} {quantize:?}", base.display());
    }
}

fn answers(
    scratch: &Scratch,
    given: impl Fn(Farm) -> Farm,
    base: &Path,
    adapter: Option<&Path>,
    number: usize,
) -> Vec<String> {
    let prompts = scratch
        .file("prompts.jsonl", "{\"prompt\":\"7 cats and\"}\n{\"prompt\":\"71 cats and\"}\n");
    let name = format!("answers {number} {}", adapter.is_some());
    let farm = given(scratch.farm(&name, Launch::Alone, "generate").model(base).prompts(prompts));
    let farm = farm.args(["--max-new-tokens", "12", "--temperature", "0"]);
    let farm = match adapter {
        Some(adapter) => farm.flag("--adapter", adapter),
        None => farm,
    };
    farm.ends_with(0);
    let text = |record: &Value| record["text"].as_str().expect("a text").to_owned();
    farm.records().iter().map(text).collect()
}
