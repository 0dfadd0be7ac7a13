//! A GPU's limits, and the models and prompts of tests/gpu.sh:
//!
//! ```text
//! cargo bench --features cuda --bench device                    the limits: products, copies
//! cargo bench --features cuda --bench device -- make 7b DIR     a random Llama in bf16, for this and for transformers
//! cargo bench --features cuda --bench device -- prompts 256 128 FILE     256 prompts of 128 random tokens
//! ```
//!
//! `--emulator` (feature `emulator`) takes the tests' device instead, at sizes that it can do.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use farm::Result;
use farm::device::{self, Array, Device, Dtype, Gemm};
use half::bf16;
use rayon::prelude::*;

/// Shape of a random Llama.
struct Shape {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
}

const VOCAB: usize = 32_000;
const CONTEXT: usize = 4096;

/// TinyLlama 1.1B, Llama 7B and 13B, and one that anything can run.
const SHAPES: [Shape; 4] = [
    Shape { name: "tiny", hidden: 128, intermediate: 256, layers: 2, heads: 4, kv_heads: 2 },
    Shape { name: "1.1b", hidden: 2048, intermediate: 5632, layers: 22, heads: 32, kv_heads: 4 },
    Shape { name: "7b", hidden: 4096, intermediate: 11008, layers: 32, heads: 32, kv_heads: 32 },
    Shape { name: "13b", hidden: 5120, intermediate: 13824, layers: 40, heads: 40, kv_heads: 40 },
];

/// The best of so many rounds counts.
const ROUNDS: usize = 5;

fn main() {
    let all: Vec<String> = std::env::args().skip(1).collect();
    let emulator = all.iter().any(|word| word == "--emulator");
    let words: Vec<&str> =
        all.iter().map(String::as_str).filter(|w| !w.starts_with("--")).collect();
    let done = match words[..] {
        [] | ["limits"] => limits(emulator),
        ["make", shape, dir] => make(shape, Path::new(dir)),
        ["prompts", count, length, file] => prompts(count, length, Path::new(file)),
        _ => {
            Err(farm::Error::usage("device [limits] | make SHAPE DIR | prompts COUNT LENGTH FILE"))
        }
    };
    if let Err(error) = done {
        eprintln!("device: {error}");
        std::process::exit(1);
    }
}

// ---------------------------------------------------------------- limits

fn limits(emulator: bool) -> Result<()> {
    let device = open(emulator)?;
    let properties = device.properties();
    let (major, minor) = properties.compute_capability;
    println!("device {}", properties.name);
    println!("capability {major}.{minor}");
    println!("memory_gib {:.1}", properties.memory_bytes as f64 / (1u64 << 30) as f64);
    let shapes: &[[usize; 3]] = match emulator {
        true => &[[32, 32, 32]],
        false => {
            &[[4096, 4096, 4096], [8192, 8192, 8192], [4096, 11008, 4096], [4096, 4096, 11008]]
        }
    };
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        if dtype == Dtype::Bf16 && !properties.has_bf16() {
            continue;
        }
        let rates = shapes.iter().map(|&shape| product_rate(&device, dtype, shape));
        let best = rates.collect::<Result<Vec<f64>>>()?.into_iter().fold(0.0, f64::max);
        println!("product_tflops_{} {:.2}", dtype.suffix(), best / 1e12);
    }
    let bytes = if emulator { 1 << 16 } else { 2usize << 30 };
    println!("copy_gb_per_second {:.1}", copy_rate(&device, bytes)? / 1e9);
    println!("upload_gb_per_second {:.1}", upload_rate(&device, bytes)? / 1e9);
    Ok(())
}

fn open(emulator: bool) -> Result<Device> {
    #[cfg(feature = "emulator")]
    if emulator {
        return Ok(Device::emulated());
    }
    if emulator {
        return Err(farm::Error::usage("--emulator: this bench was built without it"));
    }
    device::visible().map_err(|missing| farm::Error::usage(missing.to_string()))?;
    device::open(0)
}

/// Floating-point operations a second of `[m, n] = [m, k] · [n, k]ᵀ`.
fn product_rate(device: &Device, dtype: Dtype, [m, n, k]: [usize; 3]) -> Result<f64> {
    let (x, w) = (device.array(dtype, m * k)?, device.array(dtype, n * k)?);
    let out = device.array(dtype, m * n)?;
    let repeats = if device.properties().emulated { 1 } else { 10 };
    let work = || device.gemm(&Gemm::linear(&x, &w, &out, [m, n, k]));
    Ok((2 * m * n * k) as f64 / seconds(device, repeats, work)?)
}

/// Bytes read and written a second.
fn copy_rate(device: &Device, bytes: usize) -> Result<f64> {
    let (from, to): (Array, Array) =
        (device.array(Dtype::U8, bytes)?, device.array(Dtype::U8, bytes)?);
    Ok(2.0 * bytes as f64 / seconds(device, 4, || device.copy(&from, &to))?)
}

/// Bytes a second from memory of the host.
fn upload_rate(device: &Device, bytes: usize) -> Result<f64> {
    let (from, to) = (vec![1u8; bytes], device.array(Dtype::U8, bytes)?);
    Ok(bytes as f64 / seconds(device, 1, || device.write(&to, &from))?)
}

/// Seconds of one `work`, from the best of some rounds of `repeats`.
fn seconds(device: &Device, repeats: usize, work: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        device.synchronize()?;
        let start = Instant::now();
        (0..repeats).try_for_each(|_| work())?;
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / repeats as f64);
    }
    Ok(best)
}

// ---------------------------------------------------------------- models and prompts

/// Writes config.json and model.safetensors unless they are there, and prints the parameters.
fn make(name: &str, dir: &Path) -> Result<()> {
    let shape = SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
        let names: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
        farm::Error::usage(format!("no shape {name}, but {}", names.join(", ")))
    })?;
    let tensors = tensors(shape);
    let values = |dims: &[usize]| dims.iter().product::<usize>();
    let all: usize = tensors.iter().map(|(_, dims)| values(dims)).sum();
    println!("parameters {all}");
    println!("layer_parameters {}", all - 2 * VOCAB * shape.hidden);
    let weights = dir.join("model.safetensors");
    if weights.is_file() {
        return Ok(());
    }
    std::fs::create_dir_all(dir).map_err(|error| farm::Error::io(dir, error))?;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    });
    let config_file = dir.join("config.json");
    std::fs::write(&config_file, config.to_string())
        .map_err(|e| farm::Error::io(&config_file, e))?;
    let partial = dir.join("model.safetensors.partial");
    write_weights(&partial, &tensors)
        .and_then(|()| std::fs::rename(&partial, &weights))
        .map_err(|error| farm::Error::io(&weights, error))
}

fn tensors(shape: &Shape) -> Vec<(String, Vec<usize>)> {
    let (h, d) = (shape.hidden, shape.hidden / shape.heads);
    let mut list = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, h]),
        ("model.norm.weight".to_owned(), vec![h]),
        ("lm_head.weight".to_owned(), vec![VOCAB, h]),
    ];
    for layer in 0..shape.layers {
        let mut add = |name: &str, dims: &[usize]| {
            list.push((format!("model.layers.{layer}.{name}.weight"), dims.to_vec()));
        };
        add("input_layernorm", &[h]);
        add("post_attention_layernorm", &[h]);
        add("self_attn.q_proj", &[h, h]);
        add("self_attn.k_proj", &[shape.kv_heads * d, h]);
        add("self_attn.v_proj", &[shape.kv_heads * d, h]);
        add("self_attn.o_proj", &[h, h]);
        add("mlp.gate_proj", &[shape.intermediate, h]);
        add("mlp.up_proj", &[shape.intermediate, h]);
        add("mlp.down_proj", &[h, shape.intermediate]);
    }
    list
}

fn write_weights(path: &Path, tensors: &[(String, Vec<usize>)]) -> std::io::Result<()> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({ "format": "pt" }));
    let mut at = 0;
    for (name, dims) in tensors {
        let end = at + 2 * dims.iter().product::<usize>();
        let entry =
            serde_json::json!({ "dtype": "BF16", "shape": dims, "data_offsets": [at, end] });
        header.insert(name.clone(), entry);
        at = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(text.len() as u64).to_le_bytes())?;
    file.write_all(&text)?;
    for (number, (_, dims)) in tensors.iter().enumerate() {
        file.write_all(&values(number as u64, dims))?;
    }
    file.flush()
}

/// Values of a tensor: 1 in norms, else between ±0.035, from the tensor's number and the place.
fn values(number: u64, dims: &[usize]) -> Vec<u8> {
    const PIECE: usize = 1 << 16;
    let len: usize = dims.iter().product();
    let mut bytes = vec![0u8; 2 * len];
    bytes.par_chunks_mut(2 * PIECE).enumerate().for_each(|(piece, bytes)| {
        let mut state = ((number << 32) | (piece as u64 + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for pair in bytes.chunks_exact_mut(2) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let value = if dims.len() == 1 { 1.0 } else { 0.07 * uniform };
            pair.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
        }
    });
    bytes
}

/// Prompts of random tokens; the tokens of one are not those of another.
fn prompts(count: &str, length: &str, path: &Path) -> Result<()> {
    let number =
        |text: &str| text.parse::<usize>().map_err(|e| farm::Error::usage(format!("{text}: {e}")));
    let (count, length) = (number(count)?, number(length)?);
    let token = |prompt: usize, place: usize| (prompt * 31 + place) * 7919 % (VOCAB - 100) + 50;
    let lines: Vec<String> = (0..count)
        .map(|prompt| {
            let ids: Vec<usize> = (0..length).map(|place| token(prompt, place)).collect();
            serde_json::json!({ "prompt_token_ids": ids }).to_string()
        })
        .collect();
    std::fs::write(path, lines.join("\n") + "\n").map_err(|error| farm::Error::io(path, error))
}
