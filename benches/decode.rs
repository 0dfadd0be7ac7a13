//! Decode and prefill tokens/s of a random 110M-parameter model on the CPU, beside
//! the machine's limits. `cargo bench --bench decode [-- f32|bf16]`;
//! benches/transformers_decode.py runs HF transformers over the same weights.

mod support;

use std::sync::Arc;
use std::time::Instant;

use farm::comm::NoTensorComm;
use farm::engine::{Engine, EngineConfig, EngineRequest, Generated};
use farm::engine::{Mode, SamplingParams, TokenDecoder};
use farm::model::{Activations, Checkpoint, LoadOptions, ModelConfig, ModelRunner};

const PROMPT: usize = 128;
const NEW: usize = 64;
/// The best of these counts: the machine may have other tenants.
const ROUNDS: usize = 5;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let memory = support::memory_bytes_per_second(threads);
    let flops = support::fma_flops(threads);
    println!(
        "limits, {threads} threads, {}: memory read {:.1} GB/s, f32 FMA {:.0} GFLOP/s",
        farm::kernels::tier().name(),
        memory / 1e9,
        flops / 1e9
    );
    for bf16 in [false, true] {
        let name = if bf16 { "bf16" } else { "f32" };
        if args.iter().any(|a| a == "f32" || a == "bf16") && !args.iter().any(|a| a == name) {
            continue;
        }
        bench(bf16, memory, flops);
    }
}

fn bench(bf16: bool, memory: f64, flops: f64) {
    let dir = support::random_model(support::SHAPE_110M, bf16);
    let config = ModelConfig::from_dir(&dir).unwrap();
    println!("model {}", dir.display());
    println!("batch  prefill tok/s  of FLOPs  decode tok/s  of memory  of FLOPs");
    for batch in [1, 4, 16, 32] {
        let options = LoadOptions {
            dtype: None,
            activations: Activations::default(),
            max_seq_len: 256,
            num_blocks: 32 * 16,
            device: None,
        };
        let runner =
            ModelRunner::load(&Checkpoint::open(&dir).unwrap(), &options, Arc::new(NoTensorComm))
                .unwrap();
        let weight_bytes = runner.step_weight_bytes() as f64;
        let limits = EngineConfig { max_batch_size: batch, ..EngineConfig::default() };
        let mut engine = Engine::new(runner, Arc::new(NoText), limits).unwrap();
        let mut best = (0f64, 0f64);
        for _ in 0..ROUNDS {
            let (prefill, decode) = run(&mut engine, batch);
            best = (best.0.max(prefill), best.1.max(decode));
        }
        let (prefill, decode) = best;
        let per_token = config.flops_per_token() as f64;
        let context = PROMPT + NEW / 2;
        let kv_bytes = config.kv_block_bytes(config.num_key_value_heads, 16) * context / 16;
        let bytes_per_step = weight_bytes + (kv_bytes * batch) as f64;
        let decode_flops = per_token + config.attention_flops(context) as f64;
        println!(
            "{batch:>5}  {prefill:>13.0}  {:>7.0}%  {decode:>12.1}  {:>8.0}%  {:>7.0}%",
            100.0 * prefill * per_token / flops,
            100.0 * decode / batch as f64 * bytes_per_step / memory,
            100.0 * decode * decode_flops / flops,
        );
    }
}

/// Prefill and decode tokens/s of one batch, through the engine: scheduling and greedy
/// sampling included. Steps that mix both count as prefill.
fn run(engine: &mut Engine<ModelRunner>, batch: usize) -> (f64, f64) {
    for s in 0..batch {
        engine.add(EngineRequest {
            key: s as u64,
            record_index: s as u64,
            completion: 0,
            prompt_token_ids: (0..PROMPT)
                .map(|i| ((i + s * 31) * 7919 % 31_000 + 10) as u32)
                .collect(),
            adapter: None,
            generated: Generated::default(),
            params: SamplingParams {
                max_new_tokens: NEW,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            mode: Mode::Generate,
        });
    }
    let (mut prefill, mut decode) = ((0, 0.0), (0, 0.0));
    while engine.has_work() {
        let start = Instant::now();
        let outcome = engine.step().unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let phase = if outcome.prefill_tokens > 0 { &mut prefill } else { &mut decode };
        phase.0 += outcome.prefill_tokens + outcome.decode_tokens;
        phase.1 += seconds;
    }
    (prefill.0 as f64 / prefill.1, decode.0 as f64 / decode.1)
}

/// Random ids have no text.
struct NoText;

impl TokenDecoder for NoText {
    fn decode(&self, _ids: &[u32]) -> String {
        String::new()
    }
}
