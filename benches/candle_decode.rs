//! candle-transformers' stock Llama over the weights of the decode bench: prefill and
//! greedy decode tokens/s with a static batch of equal lengths, in f32 (its bf16
//! products on the CPU widen the weights at every call).
//! `cargo bench --bench candle_decode`.

mod support;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};

const PROMPT: usize = 128;
const NEW: usize = 64;
const ROUNDS: usize = 3;

fn main() -> candle_core::Result<()> {
    let dir = support::random_model(support::SHAPE_110M, false);
    let text = std::fs::read_to_string(dir.join("config.json"))?;
    let config: LlamaConfig = serde_json::from_str(&text).map_err(candle_core::Error::wrap)?;
    let config = config.into_config(false);
    let files = [dir.join("model.safetensors")];
    // SAFETY: nobody rewrites the bench's own model file.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &Device::Cpu)? };
    let model = Llama::load(vb, &config)?;
    println!("candle-transformers, f32, {}", dir.display());
    println!("batch  prefill tok/s  decode tok/s");
    for batch in [1, 4, 16, 32] {
        let mut best = (0f64, 0f64);
        for _ in 0..ROUNDS {
            let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu)?;
            let ids: Vec<u32> = (0..batch)
                .flat_map(|s| (0..PROMPT).map(move |i| ((i + s * 31) * 7919 % 31_000 + 10) as u32))
                .collect();
            let prompt = Tensor::from_vec(ids, (batch, PROMPT), &Device::Cpu)?;
            let start = Instant::now();
            let mut logits = model.forward(&prompt, 0, &mut cache)?;
            let prefill = (batch * PROMPT) as f64 / start.elapsed().as_secs_f64();
            let start = Instant::now();
            for i in 0..NEW {
                let token = logits.argmax(1)?.unsqueeze(1)?;
                logits = model.forward(&token, PROMPT + i, &mut cache)?;
            }
            let decode = (batch * NEW) as f64 / start.elapsed().as_secs_f64();
            best = (best.0.max(prefill), best.1.max(decode));
        }
        println!("{batch:>5}  {:>13.0}  {:>12.1}", best.0, best.1);
    }
    Ok(())
}
