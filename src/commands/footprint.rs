//! How much memory a rank's share of a model takes, from the model's shape and its headers.

use crate::kernels::attention::BLOCK_SIZE;
use crate::model::checkpoint::{StoredDtype, Tensor, TensorTable};
use crate::model::quantization::{Role, dtype_for, role};
use crate::model::{ModelConfig, WeightDtype};

/// Bytes of a rank's weight matrices, estimated: norms, biases and padding left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankWeights {
    /// All of them.
    pub bytes: u64,
    /// Those that the rank copies; the others it maps from the file.
    pub owned: u64,
}

/// Bytes of a value: in the layers, and in embedding and output projection.
struct Widths {
    layers: f64,
    vocabulary: f64,
}

/// The share of a rank in a tensor-parallel group of `size`, which works for the model;
/// `dtype` as in [`LoadOptions`](crate::model::LoadOptions).
pub fn weights(
    config: &ModelConfig,
    tensors: &TensorTable,
    dtype: Option<WeightDtype>,
    size: usize,
) -> RankWeights {
    let stored = stored_widths(config, tensors);
    // Blocks are not quantized again: a copy that was quantized when it was staged is mapped.
    let dtype = dtype.filter(|dtype| !is_quantized(*dtype, config, tensors));
    let widths = dtype.map_or(stored, widths);
    let bytes = |values: u64, width: f64| (values as f64 * width) as u64;
    let [column_parallel, row_parallel] = layer_values(config, size);
    let has_head = tensors.contains(&format!("{}.weight", config.names.lm_head));
    let matrices = if config.tie_word_embeddings && !has_head { 1 } else { 2 };
    let rows = config.vocab_size.div_ceil(size) as u64;
    let vocabulary = matrices * rows * config.hidden_size as u64;
    let all =
        bytes(column_parallel + row_parallel, widths.layers) + bytes(vocabulary, widths.vocabulary);
    let owned = match dtype {
        Some(_) => all,
        // Rows are mapped, columns of a matrix are not contiguous.
        None if size > 1 => bytes(row_parallel, widths.layers),
        None => 0,
    };
    RankWeights { bytes: all, owned }
}

/// Bytes of the keys and values of `sequences` of `len` tokens on such a rank.
pub fn kv_cache(config: &ModelConfig, size: usize, len: usize, sequences: usize) -> u64 {
    let block = config.kv_block_bytes(config.local_kv_heads(size), BLOCK_SIZE) as u64;
    block.saturating_mul(len.div_ceil(BLOCK_SIZE) as u64).saturating_mul(sequences as u64)
}

/// A rank's values in all layers: of matrices cut by rows of the matrix (or not at all), and
/// of those cut by columns.
fn layer_values(config: &ModelConfig, size: usize) -> [u64; 2] {
    let (h, d) = (config.hidden_size as u64, config.head_dim as u64);
    let heads = config.local_heads(size) as u64;
    let kv_heads = config.local_kv_heads(size) as u64;
    let inward = if config.gated_mlp { 2 } else { 1 };
    let mut values = [0, 0];
    for layer in 0..config.num_hidden_layers {
        values[0] += h * d * (heads + 2 * kv_heads);
        values[1] += h * d * heads;
        match &config.experts {
            Some(e) if !e.dense_layers.contains(&layer) => {
                // Whole experts on a rank, and the router on each.
                let experts = e.num_experts.div_ceil(size) as u64;
                let width = e.moe_intermediate_size as u64;
                values[0] += experts * (inward + 1) * h * width + h * e.num_experts as u64;
            }
            _ => {
                let width = (config.intermediate_size / size) as u64;
                values[0] += inward * h * width;
                values[1] += h * width;
            }
        }
    }
    values
}

fn widths(asked: WeightDtype) -> Widths {
    // Of rows that every type of blocks divides.
    const WIDTH: usize = 256;
    let of = |role| dtype_for(asked, role, WIDTH).unwrap_or(asked).bytes_a_value();
    Widths { layers: of(Role::Layer), vocabulary: of(Role::Vocabulary) }
}

/// Whether the layers are what `dtype` would make them: blocks.
pub fn is_quantized(dtype: WeightDtype, config: &ModelConfig, tensors: &TensorTable) -> bool {
    let in_layer = |name: &str| role(config, name) == Some(Role::Layer);
    let is_blocks = |tensor: &Tensor| {
        // Rows that no block divides keep their type.
        let stays = |width: &usize| dtype_for(dtype, Role::Layer, *width).is_none();
        matches!(tensor.dtype, StoredDtype::Quant(_)) || tensor.shape.last().is_some_and(stays)
    };
    let mut layers = tensors.iter().filter(|(name, _)| in_layer(name));
    matches!(dtype, WeightDtype::Quant(_)) && layers.all(|(_, tensor)| is_blocks(tensor))
}

/// Means over the checkpoint's matrices.
fn stored_widths(config: &ModelConfig, tensors: &TensorTable) -> Widths {
    let vocabulary = [config.names.embed_tokens, config.names.lm_head];
    let is_vocabulary =
        |name: &str| name.strip_suffix(".weight").is_some_and(|name| vocabulary.contains(&name));
    let mean = |vocabulary: bool| {
        let wanted = |(name, t): &(&str, &Tensor)| {
            is_vocabulary(name) == vocabulary && t.shape.len() > 1 && is_weight(t)
        };
        let of = tensors.iter().filter(wanted);
        let (bytes, values) = of.fold((0, 0), |(bytes, values), (_, t)| {
            (bytes + t.bytes().unwrap_or(0), values + t.len() as u64)
        });
        if values == 0 { 2.0 } else { bytes as f64 / values as f64 }
    };
    Widths { layers: mean(false), vocabulary: mean(true) }
}

fn is_weight(tensor: &Tensor) -> bool {
    !matches!(tensor.dtype, StoredDtype::Other(_))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::comm::NoTensorComm;
    use crate::kernels::quant::QuantType;
    use crate::model::{Activations, Checkpoint, LoadOptions, ModelRunner};

    /// Estimates against what a loaded model says of itself, alone in its group; nothing of the
    /// checkpoint is read twice.
    #[test]
    fn estimates_are_what_is_loaded() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let quant = |quant| Some(WeightDtype::Quant(quant));
        for (case, dtype) in [
            ("llama_bf16", None),
            ("llama_tied", None),
            ("falcon_7b", None),
            ("qwen3_moe_mixed", None),
            ("gguf/llama_quantized_q4_k_m.gguf", None),
            ("gguf/llama_quantized_f16.gguf", quant(QuantType::Q6_K)),
            ("gguf/llama_quantized_f16.gguf", quant(QuantType::Q4_K)),
            ("llama_bf16", Some(WeightDtype::F32)),
            ("llama_bf16", quant(QuantType::Q8_0)),
            ("gguf/mixtral.gguf", None),
            ("phi3", None),
        ] {
            let checkpoint = Checkpoint::open(&goldens.join(case)).unwrap();
            let options = LoadOptions {
                dtype,
                activations: Activations::default(),
                max_seq_len: 16,
                num_blocks: 1,
                device: None,
            };
            let runner = ModelRunner::load(&checkpoint, &options, Arc::new(NoTensorComm)).unwrap();
            let loaded = (runner.weight_bytes() as f64, runner.owned_weight_bytes());
            let guess = weights(checkpoint.config(), checkpoint.tensors(), dtype, 1);
            let error = guess.bytes as f64 / loaded.0 - 1.0;
            assert!(error.abs() < 0.01, "{case}: {} for {}", guess.bytes, loaded.0);
            let stored: u64 = checkpoint.tensors().iter().filter_map(|(_, t)| t.bytes()).sum();
            assert!(runner.bytes_read() <= stored, "{case}: {} of {stored}", runner.bytes_read());
            let owned = if dtype.is_some() { guess.bytes } else { 0 };
            assert_eq!((guess.owned, loaded.1 == 0), (owned, dtype.is_none()), "{case}");
        }
    }
}
