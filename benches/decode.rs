//! Decode and prefill tokens/s of a random 110M-parameter model on the CPU, beside
//! the machine's limits. `cargo bench --bench decode [-- f32|bf16]`;
//! benches/transformers_decode.py runs HF transformers over the same weights.

mod support;

use std::sync::Arc;
use std::time::Instant;

use farm::comm::NoTensorComm;
use farm::model::{BatchSequence, LoadOptions, LogitsWanted, ModelConfig, ModelRunner};
use farm::model::{Runner, StepBatch};

const PROMPT: usize = 128;
const NEW: usize = 64;

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
        let options = LoadOptions { dtype: None, max_seq_len: 256, num_blocks: 32 * 16 };
        let comm = Arc::new(NoTensorComm);
        let mut runner = ModelRunner::load(&dir, &config, &options, comm).unwrap();
        let mut best = (0f64, 0f64);
        for _ in 0..3 {
            let (prefill, decode) = run(&mut runner, batch);
            best = (best.0.max(prefill), best.1.max(decode));
        }
        let (prefill, decode) = best;
        let per_token = config.flops_per_token() as f64;
        let context = PROMPT + NEW / 2;
        let kv = config.kv_block_bytes(config.num_key_value_heads, 16) * context / 16;
        let bytes_per_step = runner.weight_bytes() as f64 + (kv * batch) as f64;
        let decode_flops = per_token + config.attention_flops(context) as f64;
        println!(
            "{batch:>5}  {prefill:>13.0}  {:>7.0}%  {decode:>12.1}  {:>8.0}%  {:>7.0}%",
            100.0 * prefill * per_token / flops,
            100.0 * decode / batch as f64 * bytes_per_step / memory,
            100.0 * decode * decode_flops / flops,
        );
    }
}

fn run(runner: &mut ModelRunner, batch: usize) -> (f64, f64) {
    let blocks = |s: usize| (0..16).map(|b| (s * 16 + b) as u32).collect::<Vec<u32>>();
    let sequence = |s: usize, start, num_tokens| BatchSequence {
        start_position: start,
        num_tokens,
        block_table: blocks(s),
        logits: LogitsWanted::Last,
        prompt_len: PROMPT,
    };
    let token = |i: usize| ((i * 7919) % 31_000 + 10) as u32;
    let start = Instant::now();
    for s in 0..batch {
        let token_ids = (0..PROMPT).map(|i| token(i + s * 31)).collect();
        runner.forward(&StepBatch { token_ids, sequences: vec![sequence(s, 0, PROMPT)] }).unwrap();
    }
    let prefill = (batch * PROMPT) as f64 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for i in 0..NEW {
        let token_ids = (0..batch).map(|s| token(i * 3 + s)).collect();
        let sequences = (0..batch).map(|s| sequence(s, PROMPT + i, 1)).collect();
        runner.forward(&StepBatch { token_ids, sequences }).unwrap();
    }
    (prefill, (batch * NEW) as f64 / start.elapsed().as_secs_f64())
}
