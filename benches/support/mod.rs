//! What the benches share: random models of a given shape, and this machine's
//! limits (memory read and fused multiply-add rates) to set figures beside.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use farm::kernels::Tier;
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Shape of a random Llama model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab: usize,
}

/// 110M parameters, embeddings tied.
pub const SHAPE_110M: Shape = Shape {
    name: "110m",
    hidden: 768,
    intermediate: 2048,
    layers: 12,
    heads: 12,
    kv_heads: 12,
    vocab: 32000,
};

/// Makes the model below `target/bench-models` unless it is there, and returns its folder.
pub fn random_model(shape: Shape, bf16_weights: bool) -> PathBuf {
    let dtype = if bf16_weights { "bf16" } else { "f32" };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench-models");
    let dir = root.join(format!("{}-{dtype}", shape.name));
    if dir.join("model.safetensors").is_file() {
        return dir;
    }
    std::fs::create_dir_all(&dir).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": if bf16_weights { "bfloat16" } else { "float32" },
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, dims: Vec<usize>, norm: bool| {
        let n = dims.iter().product::<usize>();
        let mut value = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if norm { 1.0 } else { ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.07 }
        };
        let bytes = (0..n).flat_map(|_| {
            let v = value();
            let (b, len) = if bf16_weights {
                let [a, b] = bf16::from_f32(v).to_le_bytes();
                ([a, b, 0, 0], 2)
            } else {
                (v.to_le_bytes(), 4)
            };
            b.into_iter().take(len)
        });
        tensors.push((name, dims, bytes.collect()));
    };
    let (h, d) = (shape.hidden, shape.hidden / shape.heads);
    add("model.embed_tokens.weight".into(), vec![shape.vocab, h], false);
    add("model.norm.weight".into(), vec![h], true);
    for i in 0..shape.layers {
        let p = format!("model.layers.{i}");
        add(format!("{p}.input_layernorm.weight"), vec![h], true);
        add(format!("{p}.post_attention_layernorm.weight"), vec![h], true);
        for (name, rows, cols) in [
            ("self_attn.q_proj", shape.heads * d, h),
            ("self_attn.k_proj", shape.kv_heads * d, h),
            ("self_attn.v_proj", shape.kv_heads * d, h),
            ("self_attn.o_proj", h, shape.heads * d),
            ("mlp.gate_proj", shape.intermediate, h),
            ("mlp.up_proj", shape.intermediate, h),
            ("mlp.down_proj", h, shape.intermediate),
        ] {
            add(format!("{p}.{name}.weight"), vec![rows, cols], false);
        }
    }
    let dtype = if bf16_weights { Dtype::BF16 } else { Dtype::F32 };
    let views = tensors
        .iter()
        .map(|(name, dims, bytes)| (name, TensorView::new(dtype, dims.clone(), bytes).unwrap()));
    let meta = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(meta), &dir.join("model.safetensors")).unwrap();
    dir
}

/// Memory read rate in bytes/s: all threads take interleaved 1 MiB chunks of 1 GiB;
/// the best of five passes.
pub fn memory_bytes_per_second(threads: usize) -> f64 {
    const CHUNK: usize = 1 << 17;
    let data = vec![1u64; 1 << 27];
    let sum = AtomicU64::new(0);
    let passes = (0..5).map(|_| {
        let next = AtomicUsize::new(0);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut local = 0u64;
                    while let Some(chunk) =
                        data.chunks(CHUNK).nth(next.fetch_add(1, Ordering::Relaxed))
                    {
                        local = chunk.iter().fold(local, |a, b| a.wrapping_add(*b));
                    }
                    sum.fetch_add(local, Ordering::Relaxed);
                });
            }
        });
        (data.len() * 8) as f64 / start.elapsed().as_secs_f64()
    });
    let best = passes.fold(0.0, f64::max);
    assert!(sum.into_inner() > 0);
    best
}

/// f32 fused multiply-adds in registers, operations/s (two each); the best of five.
pub fn fma_flops(threads: usize) -> f64 {
    const ROUNDS: usize = 20_000_000;
    let one = || {
        let start = Instant::now();
        let lanes_times_chains = match farm::kernels::tier() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the tier in use was detected.
            Tier::Avx512 => unsafe { x86::chains_avx512(ROUNDS) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Tier::Avx2 => unsafe { x86::chains_avx2(ROUNDS) },
            _ => return 0.0,
        };
        (2 * ROUNDS * lanes_times_chains) as f64 / start.elapsed().as_secs_f64()
    };
    let all = || {
        std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
            handles.into_iter().map(|h| h.join().unwrap()).sum::<f64>()
        })
    };
    (0..5).map(|_| all()).fold(0.0, f64::max)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn chains_avx512(rounds: usize) -> usize {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut acc = [b; 12];
        for _ in 0..rounds {
            for x in &mut acc {
                *x = _mm512_fmadd_ps(*x, a, b);
            }
        }
        black_box(acc);
        16 * 12
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn chains_avx2(rounds: usize) -> usize {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut acc = [b; 12];
        for _ in 0..rounds {
            for x in &mut acc {
                *x = _mm256_fmadd_ps(*x, a, b);
            }
        }
        black_box(acc);
        8 * 12
    }
}
