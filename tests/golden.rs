//! Parity with HF transformers: logits, greedy ids and log-likelihoods of tiny
//! random models (tests/golden/generate.py made them), at tensor-parallel sizes 1,
//! 2 and 4, in whole prefills and in chunks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farm::comm::{HostTensorComm, LocalComm, NoTensorComm, TensorComm};
use farm::engine::{Engine, EngineConfig, EngineOutput, EngineRequest, Generated, Mode};
use farm::engine::{SamplingParams, TokenDecoder};
use farm::model::config::AttentionSplit;
use farm::model::{Activations, BatchSequence, Checkpoint, LoadOptions, LogitsWanted, ModelRunner};
use farm::model::{Adapter, AdapterSource};
use farm::model::{Runner, StepBatch, WeightDtype};
use serde::Deserialize;

#[path = "golden/adapters.rs"]
mod adapters;
#[cfg(any(feature = "emulator", feature = "cuda"))]
#[path = "golden/device.rs"]
mod device;
#[path = "golden/finetune.rs"]
mod finetune;
#[path = "golden/gguf.rs"]
mod gguf;

const LOGITS_TOLERANCE: f32 = 1e-4;
const LOGPROB_TOLERANCE: f64 = 1e-3;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    prompt_token_ids: Vec<u32>,
    greedy: Vec<u32>,
    greedy_use_cache: Option<Vec<u32>>,
    last_logits: Vec<f32>,
    logits: Option<Vec<Vec<f32>>>,
    logprobs: Vec<f64>,
}

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("golden.json").is_file() || p.join("golden_from").is_file())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 10, "golden cases are missing");
    dirs
}

/// The answers for a model; `golden_from` names the case that holds the same weights in
/// another form.
fn golden(dir: &Path) -> Golden {
    if let Ok(case) = std::fs::read_to_string(dir.join("golden_from")) {
        return golden(&dir.with_file_name(case.trim()));
    }
    serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap()
}

/// Runs `body` as the leader of a group of `size` ranks that hold the model, activations as
/// they are.
fn with_model<T: Send>(dir: &Path, size: usize, body: impl Fn(&mut ModelRunner) -> T + Sync) -> T {
    with_model_as(dir, size, None, body)
}

/// The same with weights converted while they are loaded.
fn with_model_as<T: Send>(
    dir: &Path,
    size: usize,
    dtype: Option<WeightDtype>,
    body: impl Fn(&mut ModelRunner) -> T + Sync,
) -> T {
    with_loaded(dir, &[], size, dtype, Activations::F32, body)
}

/// The same with adapters.
fn with_adapted<T: Send>(
    dir: &Path,
    adapters: &[AdapterSource],
    size: usize,
    body: impl Fn(&mut ModelRunner) -> T + Sync,
) -> T {
    with_loaded(dir, adapters, size, None, Activations::F32, body)
}

fn with_loaded<T: Send>(
    dir: &Path,
    adapters: &[AdapterSource],
    size: usize,
    dtype: Option<WeightDtype>,
    activations: Activations,
    body: impl Fn(&mut ModelRunner) -> T + Sync,
) -> T {
    let options = |_: Arc<dyn TensorComm>| LoadOptions {
        dtype,
        activations,
        max_seq_len: 512,
        num_blocks: 64,
        device: None,
    };
    with_options(dir, adapters, size, options, body)
}

/// The same with these options, which may take the group.
fn with_options<T: Send>(
    dir: &Path,
    adapters: &[AdapterSource],
    size: usize,
    options: impl Fn(Arc<dyn TensorComm>) -> LoadOptions + Sync,
    body: impl Fn(&mut ModelRunner) -> T + Sync,
) -> T {
    let results = LocalComm::run(size, |world| {
        let rank = world.rank();
        let comm: Arc<dyn TensorComm> = Arc::new(HostTensorComm::new(world));
        let options = options(comm.clone());
        let checkpoint = Checkpoint::open(dir).unwrap();
        let adapters = Adapter::open_all(adapters, checkpoint.config()).unwrap();
        let mut runner = ModelRunner::load_adapted(&checkpoint, &adapters, &options, comm).unwrap();
        if rank > 0 {
            runner.follow(|_, _| {}).unwrap();
            return None;
        }
        let result = body(&mut runner);
        runner.finish();
        Some(result)
    });
    results.into_iter().flatten().next().unwrap()
}

/// Feeds `tokens` from `start` on; the block table is out of order on purpose.
fn step(
    runner: &mut impl Runner,
    start: usize,
    tokens: &[u32],
    prompt_len: usize,
    logits: LogitsWanted,
) -> Vec<Vec<f32>> {
    let blocks = (start + tokens.len()).div_ceil(runner.block_size());
    let sequence = BatchSequence {
        start_position: start,
        num_tokens: tokens.len(),
        block_table: (0..blocks as u32).map(|b| (b * 5 + 7) % 64).collect(),
        logits,
        prompt_len,
        adapter: None,
    };
    let batch = StepBatch { token_ids: tokens.to_vec(), sequences: vec![sequence] };
    let out = runner.forward(&batch).unwrap();
    out.data.chunks(out.vocab_size).map(<[f32]>::to_vec).collect()
}

fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.unwrap().0 as u32
}

fn greedy(runner: &mut impl Runner, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut logits = step(runner, 0, prompt, prompt.len(), LogitsWanted::Last).remove(0);
    let mut ids = Vec::new();
    while ids.len() < n {
        let id = argmax(&logits);
        ids.push(id);
        let position = prompt.len() + ids.len() - 1;
        logits = step(runner, position, &[id], prompt.len(), LogitsWanted::Last).remove(0);
    }
    ids
}

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    let worst = worst(got, want);
    assert!(worst <= LOGITS_TOLERANCE, "{what}: logits differ by {worst}");
}

/// The largest difference.
fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max)
}

fn log_softmax_at(row: &[f32], id: u32) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = row.iter().map(|l| (f64::from(*l) - max).exp()).sum();
    f64::from(row[id as usize]) - max - sum.ln()
}

fn tensor_parallel_sizes(dir: &Path) -> Vec<usize> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let config = checkpoint.config();
    [1, 2, 4].into_iter().filter(|n| config.check_tensor_parallel(*n).is_ok()).collect()
}

#[test]
fn logits_greedy_ids_and_log_likelihoods_equal_transformers() {
    for dir in cases() {
        for size in tensor_parallel_sizes(&dir) {
            for prompt in golden(&dir).prompts {
                let what = format!("{} TP {size} {:?}", dir.display(), prompt.text);
                with_model(&dir, size, |runner| check(runner, &prompt, &what));
            }
        }
    }
}

fn check(runner: &mut impl Runner, prompt: &Prompt, what: &str) {
    let ids = &prompt.prompt_token_ids;
    let rows = step(runner, 0, ids, ids.len(), LogitsWanted::All);
    assert_close(rows.last().unwrap(), &prompt.last_logits, what);
    for (got, want) in rows.iter().zip(prompt.logits.iter().flatten()) {
        assert_close(got, want, what);
    }
    let scored = rows.iter().zip(&ids[1..]).map(|(row, id)| log_softmax_at(row, *id));
    for (got, want) in scored.zip(&prompt.logprobs) {
        assert!((got - want).abs() <= LOGPROB_TOLERANCE, "{what}: logprob {got} {want}");
    }
    // Dynamic RoPE is the one case in which HF's own greedy ids depend on its cache.
    let want = prompt.greedy_use_cache.as_ref().unwrap_or(&prompt.greedy);
    assert_eq!(&greedy(runner, ids, want.len()), want, "{what}: greedy ids");
}

/// What CPUs do by default with bf16 weights costs no more than those weights' own rounding:
/// the bound is that of bf16 on devices.
#[test]
fn rounded_activations_stay_near_transformers() {
    for dir in cases() {
        for size in [1, 2] {
            for prompt in golden(&dir).prompts {
                let ids = &prompt.prompt_token_ids;
                let body = |runner: &mut ModelRunner| {
                    let last = step(runner, 0, ids, ids.len(), LogitsWanted::Last).remove(0);
                    let largest = last.iter().fold(0f32, |max, l| max.max(l.abs()));
                    let worst = worst(&last, &prompt.last_logits) / largest;
                    assert!(worst <= 4e-2, "{} TP {size}: {worst}", dir.display());
                };
                with_loaded(&dir, &[], size, None, Activations::Rounded, body);
            }
        }
    }
}

/// Invariant 4: chunks of the prefill do not change a bit of the logits.
#[test]
fn chunked_prefill_gives_the_same_bits() {
    for dir in cases() {
        let golden = golden(&dir);
        let prompt = golden.prompts.iter().max_by_key(|p| p.prompt_token_ids.len()).unwrap();
        let ids = &prompt.prompt_token_ids;
        let body = |runner: &mut ModelRunner| {
            let whole = step(runner, 0, ids, ids.len(), LogitsWanted::Last);
            for chunk in [1, 5, 16] {
                let mut last = Vec::new();
                for (i, part) in ids.chunks(chunk).enumerate() {
                    last = step(runner, i * chunk, part, ids.len(), LogitsWanted::Last);
                }
                assert_eq!(last, whole, "{} in chunks of {chunk}", dir.display());
            }
        };
        for activations in [Activations::Rounded, Activations::F32] {
            with_loaded(&dir, &[], 1, None, activations, body);
        }
    }
}

struct NoText;

impl TokenDecoder for NoText {
    fn decode(&self, _ids: &[u32]) -> String {
        String::new()
    }
}

/// Runs `requests` in a newly loaded engine; after `steps` steps they are taken out
/// and go on in another.
fn run_cut(dir: &Path, mut requests: Vec<EngineRequest>, steps: usize) -> Vec<EngineOutput> {
    let new_engine = || {
        let options = LoadOptions {
            dtype: None,
            activations: Activations::default(),
            max_seq_len: 512,
            num_blocks: 64,
            device: None,
        };
        let comm = Arc::new(NoTensorComm);
        let runner = ModelRunner::load(&Checkpoint::open(dir).unwrap(), &options, comm).unwrap();
        Engine::new(runner, Arc::new(NoText), EngineConfig::default()).unwrap()
    };
    let mut first = new_engine();
    requests.iter().for_each(|request| first.add(request.clone()));
    for _ in 0..steps {
        assert!(first.step().unwrap().finished.is_empty());
    }
    for (request, unfinished) in requests.iter_mut().zip(first.take_unfinished()) {
        assert_eq!((request.key, steps), (unfinished.key, unfinished.generated.token_ids.len()));
        request.generated = unfinished.generated;
    }
    let mut second = new_engine();
    requests.into_iter().for_each(|request| second.add(request));
    let mut outputs = Vec::new();
    while second.has_work() {
        outputs.extend(second.step().unwrap().finished);
    }
    outputs
}

/// A generation that is cut and prefilled with its own tokens goes on with the same
/// bits, greedy and sampled, whatever the architecture: dynamic RoPE too, which
/// depends on where the prompt ended.
#[test]
fn a_continued_generation_gives_the_same_tokens_and_bits() {
    for dir in cases() {
        let golden = golden(&dir);
        let prompt = golden.prompts.iter().max_by_key(|p| p.prompt_token_ids.len()).unwrap();
        let request = |(key, temperature)| EngineRequest {
            key,
            record_index: 5,
            completion: 0,
            prompt_token_ids: prompt.prompt_token_ids.clone(),
            adapter: None,
            generated: Generated::default(),
            params: SamplingParams {
                max_new_tokens: 20,
                ignore_eos: true,
                temperature,
                logprobs: Some(3),
                ..SamplingParams::default()
            },
            mode: Mode::Generate,
        };
        let requests: Vec<EngineRequest> = [(0, 0.0), (1, 0.8)].map(request).into();
        let whole = run_cut(&dir, requests.clone(), 0);
        assert_ne!(whole[0].token_ids, whole[1].token_ids, "{}", dir.display());
        let bits = |outputs: &[EngineOutput]| -> Vec<u32> {
            let entries = outputs.iter().flat_map(|output| output.logprobs.iter().flatten());
            let values = entries.flat_map(|e| e.top.iter().map(|t| t.1).chain([e.logprob]));
            values.map(f32::to_bits).collect()
        };
        for steps in [1, 9, 19] {
            let cut = run_cut(&dir, requests.clone(), steps);
            assert_eq!(cut, whole, "{} cut after {steps} tokens", dir.display());
            assert_eq!(bits(&cut), bits(&whole), "{}", dir.display());
        }
    }
}

/// Each of two tensor-parallel ranks holds and reads about half of the weights.
#[test]
fn two_ranks_hold_half_of_the_weights_each() {
    for dir in cases() {
        let split = Checkpoint::open(&dir).unwrap().config().attention_split(2);
        // Attention that cannot be split (Falcon 7B's 71 heads over one key) is on each.
        if split != Some(AttentionSplit::Heads) {
            continue;
        }
        let held = |size: usize| with_model(&dir, size, |r| (r.weight_bytes(), r.bytes_read()));
        let (whole, half) = (held(1), held(2));
        let share = |half: u64, whole: u64| half as f64 / whole as f64;
        assert!(share(half.0, whole.0) <= 0.55, "{}: {half:?} of {whole:?}", dir.display());
        assert!(share(half.1, whole.1) <= 0.55, "{}: {half:?} of {whole:?}", dir.display());
    }
}
