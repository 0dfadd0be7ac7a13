//! A GGUF file's metadata in the form of HF's `config.json`.
//!
//! What follows is what llama.cpp's converter (`conversion/*.py`, gguf-py's
//! `tensor_mapping.py`) writes and its loader (`src/models/*.cpp`) expects, in mid-2026.
//!
//! # Tensors
//!
//! All architectures have `token_embd.weight`, `output_norm.weight` and, unless the output
//! is the embedding, `output.weight`. Layer N has `blk.N.…`, with the suffix `.weight` (or
//! `.bias`):
//!
//! | general.architecture | norms | attention | MLP |
//! |---|---|---|---|
//! | llama (also Mistral, Mixtral) | attn_norm, ffn_norm | attn_q, attn_k, attn_v, attn_output; biases on all four or none | ffn_gate, ffn_up, ffn_down; biases on all three or none |
//! | … with experts (Mixtral) | the same | the same | ffn_gate_inp, ffn_gate_exps, ffn_up_exps, ffn_down_exps |
//! | qwen2 | attn_norm, ffn_norm | attn_q, attn_k, attn_v with biases; attn_output without | ffn_gate, ffn_up, ffn_down |
//! | qwen3 | attn_norm, ffn_norm, attn_q_norm, attn_k_norm (of a head) | attn_q, attn_k, attn_v, attn_output | ffn_gate, ffn_up, ffn_down |
//! | qwen3moe | as qwen3 | as qwen3 | as Mixtral |
//! | phi3 | attn_norm, ffn_norm | attn_qkv (rows of q, then k, then v), attn_output | ffn_up (rows of gate, then up), ffn_down |
//! | gemma2 | attn_norm, post_attention_norm, ffn_norm, post_ffw_norm | attn_q, attn_k, attn_v, attn_output | ffn_gate, ffn_up, ffn_down |
//! | gemma3 | as gemma2, and attn_q_norm, attn_k_norm (of a head) | as gemma2 | as gemma2 |
//! | falcon | attn_norm, output_norm, both with biases; with two norms a layer also attn_norm_2 with bias | attn_qkv, attn_output | ffn_up, ffn_down |
//!
//! - Every architecture but falcon and phi3 may have its q, k and v fused into one `attn_qkv`
//!   (rows of q, then k, then v; the converter's `--fuse-qkv`), with the bias fused too.
//! - Experts are three-dimensional: ffn_gate_exps and ffn_up_exps [experts, moe_intermediate,
//!   hidden], ffn_down_exps [experts, hidden, moe_intermediate]; HF's w1, w3, w2. The router
//!   ffn_gate_inp is [experts, hidden]. Files of before April 2024 have a tensor for each
//!   expert (`ffn_gate.E`), newer ones may have `ffn_gate_up_exps`: both are refused.
//! - Falcon's attn_qkv is *not* HF's: the converter takes the groups (queries of a group, its
//!   key, its value) apart into all q, all k, all v. In the layers with two norms, attn_norm
//!   is HF's `ln_mlp` and attn_norm_2 is `ln_attn`; attention and MLP are parallel. Falcons
//!   with ALiBi, biases or sequential layers (falcon-rw) cannot be converted.
//! - `attn_norm` is HF's input_layernorm. `ffn_norm` is post_attention_layernorm, except for
//!   Gemma, where it is pre_feedforward_layernorm; there post_attention_norm and
//!   post_ffw_norm are post_attention_layernorm and post_feedforward_layernorm.
//!
//! # What the loader must know
//!
//! | | rows of q and k permuted | pairs of the rotary embedding | norm weights |
//! |---|---|---|---|
//! | llama | yes: within a head, row 2i is HF's row i, row 2i+1 is HF's i + head_dim/2; biases too | interleaved (2i, 2i+1) | as in HF |
//! | falcon, qwen2, qwen3, qwen3moe, phi3 | no | halves (i, i + n/2) | as in HF |
//! | gemma2, gemma3 | no | halves | stored as 1 + w: multiply by them as they are, unlike HF's w |
//!
//! - For llama, Mistral's own format comes interleaved and stays so: always interleaved.
//! - `rope_freqs.weight` [head_dim/2], f32 (llama only): each frequency is *divided* by its
//!   entry. This is how Llama 3's scaling is stored; the metadata then says nothing of it
//!   and [`hf_config`] gives no `rope_scaling`.
//! - `rope_factors_long.weight`, `rope_factors_short.weight` [rotated dimensions / 2], f32
//!   (phi3; llama if its scaling is longrope): divisors too, HF's long_factor and
//!   short_factor. [`hf_config`] sees names and shapes only, so `rope_scaling` is then of type
//!   "longrope" *without* these two lists: the loader takes them from the tensors. HF takes
//!   the long ones when the sequence is longer than original_max_position_embeddings;
//!   llama.cpp when its context is.
//! - phi3 rotates `rope.dimension_count` dimensions, the first of each head
//!   (partial_rotary_factor); all others whole heads.
//! - Gemma multiplies embeddings by sqrt(hidden_size), as in HF.
//!
//! # Metadata that files lack
//!
//! - Queries of Gemma are scaled by hidden_size / heads in the 27B models (46 layers of
//!   gemma2, 62 of gemma3), by head_dim in all others; no key says so.
//! - gemma2's layers alternate, beginning with a window (4096 if not given); gemma3 has five
//!   windows, then one full. An array `attention.sliding_window_pattern` overrides it. gemma3's
//!   windowed layers have a base of 10000 and no scaling; `rope.freq_base_swa` overrides it.
//! - gemma2's soft caps are 50 (attention) and 30 (output) if not given; gemma3 has none.
//! - phi3's window is written (0 for none) but ignored by llama.cpp; HF applies it, and so
//!   does this reader. Mistral's window is not written at all.
//! - Falcon's rotary base and context are not written: 10000 and 2048, wrong for Falcon 2 11B.
//! - `rope.freq_base` is 10000 if missing, `attention.head_count_kv` head_count,
//!   `attention.key_length` hidden / heads, `rope.scaling.type` linear, its factor 1.
//! - YaRN: llama.cpp ignores `yarn_ext_factor`, `yarn_attn_factor`, `yarn_beta_fast`,
//!   `yarn_beta_slow` for these architectures; HF's model has them, and so has this reader.
//!   `rope.scaling.attn_factor` multiplies cos and sin.
//! - Mixtral and qwen3moe normalize the chosen experts' weights.
//! - Activations: SiLU; Gemma the tanh form of GELU. For falcon HF has the exact GELU (given
//!   here), llama.cpp the tanh form.
//! - EOS: HF's lists of several ids are not written. As llama.cpp, this reader adds the ids
//!   of "eot" and "eom" and control tokens that are known to end a turn.

use serde_json::{Map, Value as Json, json};

use super::{Metadata, Value, shown};
use crate::{Error, Result};

/// The values of `general.architecture` that [`hf_config`] knows.
pub const ARCHITECTURES: [&str; 8] =
    ["llama", "falcon", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3"];

/// Largest size (heads, width, vocabulary …) that is believed.
const SIZE_MAX: u64 = 1 << 30;
/// Most layers that are believed (llama.cpp: 512).
const LAYERS_MAX: u64 = 4096;
/// The default of llama.cpp and HF.
const ROPE_THETA: f64 = 10_000.0;

/// The rotary embedding turns neighbours (2i, 2i+1) and not halves (i, i + n/2).
pub fn interleaved_rope(metadata: &Metadata) -> bool {
    metadata.str("general.architecture") == Some("llama")
}

/// HF's `config.json` for a model; `tensors` gives the shape of a tensor of that name,
/// outermost dimension first.
///
/// The module's documentation says what is taken from where, and what the result cannot
/// say. Lists and factors of the rotary embedding that lie in tensors are left out.
///
/// # Errors
/// Input errors that name the key: an architecture that is not supported (with those that
/// are), missing or impossible values, layers that differ, features without support.
pub fn hf_config(
    metadata: &Metadata,
    tensors: impl Fn(&str) -> Option<Vec<usize>>,
) -> Result<Json> {
    if super::is_adapter(metadata) {
        return Err(Error::input("the GGUF file is an adapter (LoRA), not a model"));
    }
    let arch = metadata
        .str("general.architecture")
        .ok_or_else(|| Error::input("general.architecture is missing from the GGUF file"))?;
    if !ARCHITECTURES.contains(&arch) {
        return Err(Error::input(format!(
            "GGUF architecture {} is not supported; these are: {}",
            shown(arch),
            ARCHITECTURES.join(", ")
        )));
    }
    let file = File { arch, metadata, shape: &tensors };
    file.refuse_unsupported()?;
    let sizes = Sizes::of(&file)?;
    let mut config = common(&file, &sizes)?;
    match arch {
        "llama" => llama(&file, &sizes, &mut config)?,
        "falcon" => falcon(&file, &sizes, &mut config)?,
        "qwen2" => qwen2(&file, &mut config)?,
        "qwen3" | "qwen3moe" => qwen3(&file, &sizes, &mut config)?,
        "phi3" => phi3(&file, &sizes, &mut config)?,
        _ => gemma(&file, &sizes, &mut config)?,
    }
    Ok(Json::Object(config))
}

type Config = Map<String, Json>;

fn set(config: &mut Config, key: &str, value: impl Into<Json>) {
    config.insert(key.to_owned(), value.into());
}

/// What the configuration is made from. Keys are given without the architecture.
struct File<'a> {
    arch: &'a str,
    metadata: &'a Metadata,
    shape: &'a dyn Fn(&str) -> Option<Vec<usize>>,
}

impl File<'_> {
    fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.0.get(&format!("{}.{key}", self.arch))
    }

    fn wrong(&self, key: &str, what: impl std::fmt::Display) -> Error {
        Error::input(format!("GGUF key {}.{key} {what}", self.arch))
    }

    fn has(&self, tensor: &str) -> bool {
        (self.shape)(tensor).is_some()
    }

    fn uint(&self, key: &str) -> Result<Option<u64>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Int(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(_) => Err(self.wrong(key, "is no integer ≥ 0")),
        }
    }

    /// A finite number, as it was written: the shortest one that has the same f32.
    fn float(&self, key: &str) -> Result<Option<f64>> {
        let x = match self.value(key) {
            None => return Ok(None),
            Some(Value::Float(x)) => *x,
            Some(Value::Int(n)) => *n as f64,
            Some(_) => return Err(self.wrong(key, "is no number")),
        };
        if !x.is_finite() {
            return Err(self.wrong(key, "is not finite"));
        }
        let short = || (x as f32).to_string().parse().ok();
        Ok(if x == x as f32 as f64 { short() } else { Some(x) })
    }

    fn positive_float(&self, key: &str) -> Result<Option<f64>> {
        match self.float(key)? {
            Some(x) if x <= 0.0 => Err(self.wrong(key, format!("is {x}, it must be above 0"))),
            x => Ok(x),
        }
    }

    /// A size: an integer, or an array with the same integer for every layer.
    fn size(&self, key: &str, layers: u64) -> Result<Option<u64>> {
        let n = match self.value(key) {
            Some(Value::Ints(ints)) => {
                if ints.len() as u64 != layers {
                    let what = format!("has {} entries for {layers} layers", ints.len());
                    return Err(self.wrong(key, what));
                }
                let first = ints.first().copied().unwrap_or(0);
                if ints.iter().any(|&n| n != first) {
                    return Err(self.wrong(key, "differs between layers: that is not supported"));
                }
                first.max(0) as u64
            }
            _ => match self.uint(key)? {
                Some(n) => n,
                None => return Ok(None),
            },
        };
        if n == 0 || n > SIZE_MAX {
            return Err(self.wrong(key, "is out of range"));
        }
        Ok(Some(n))
    }

    fn needed<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.wrong(key, "is missing"))
    }

    /// Refuses what would silently give another model than the file's.
    fn refuse_unsupported(&self) -> Result<()> {
        let zero = [
            "nextn_predict_layers",
            "attention.max_alibi_bias",
            "attention.clamp_kqv",
            "attention.scale",
            "attention.q_lora_rank",
            "attention.kv_lora_rank",
            "leading_dense_block_count",
            "embedding_scale",
            "residual_scale",
            "logit_scale",
        ];
        for key in zero {
            if self.float(key)?.is_some_and(|x| x != 0.0) {
                return Err(self.wrong(key, "is set: that is not supported"));
            }
        }
        if self.value("attention.causal") == Some(&Value::Bool(false)) {
            return Err(self.wrong("attention.causal", "is false: only causal models generate"));
        }
        let one = ["expert_weights_scale", "expert_group_count", "rope.scaling.yarn_ext_factor"];
        for key in one {
            if self.float(key)?.is_some_and(|x| x != 1.0 && x != 0.0) {
                return Err(self.wrong(key, "is not 1: that is not supported"));
            }
        }
        if self.has("cls.output.weight") {
            return Err(Error::input("the GGUF file is a classifier or reranker (cls.output)"));
        }
        Ok(())
    }
}

/// The sizes that all architectures have.
struct Sizes {
    layers: u64,
    hidden: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    intermediate: u64,
    vocab: u64,
    context: u64,
}

impl Sizes {
    fn of(file: &File) -> Result<Self> {
        let layers = file.needed("block_count", file.size("block_count", 0)?)?;
        if layers > LAYERS_MAX {
            return Err(file.wrong("block_count", "is out of range"));
        }
        let size = |key: &str| file.size(key, layers);
        let hidden = file.needed("embedding_length", size("embedding_length")?)?;
        let heads = file.needed("attention.head_count", size("attention.head_count")?)?;
        let kv_heads = size("attention.head_count_kv")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let what = format!("is {kv_heads}, which does not divide the {heads} heads");
            return Err(file.wrong("attention.head_count_kv", what));
        }
        Ok(Self {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim: head_dim(file, layers, hidden, heads)?,
            intermediate: intermediate(file, layers)?,
            vocab: vocab(file, hidden)?,
            context: file.needed("context_length", size("context_length")?)?,
        })
    }
}

fn head_dim(file: &File, layers: u64, hidden: u64, heads: u64) -> Result<u64> {
    let head_dim = match file.size("attention.key_length", layers)? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let what = format!("is {heads}, which does not divide the width {hidden}");
            return Err(file.wrong("attention.head_count", what));
        }
    };
    for key in ["value_length", "key_length_swa", "value_length_swa"] {
        let key = format!("attention.{key}");
        if file.size(&key, layers)?.is_some_and(|n| n != head_dim) {
            let what = format!("is not {head_dim}, the width of keys: that is not supported");
            return Err(file.wrong(&key, what));
        }
    }
    Ok(head_dim)
}

/// Width of the MLP; of a model with experts only, theirs.
fn intermediate(file: &File, layers: u64) -> Result<u64> {
    let dense = match file.size("feed_forward_length", layers)? {
        None => file.size("expert_feed_forward_length", layers)?,
        dense => dense,
    };
    file.needed("feed_forward_length", dense)
}

fn vocab(file: &File, hidden: u64) -> Result<u64> {
    let name = "token_embd.weight";
    let shape = (file.shape)(name)
        .ok_or_else(|| Error::input(format!("tensor {name:?} is missing from the GGUF file")))?;
    match shape[..] {
        [rows, columns] if columns as u64 == hidden && rows as u64 <= SIZE_MAX => Ok(rows as u64),
        _ => Err(Error::input(format!(
            "tensor {name:?} has the shape {shape:?}, its rows should have {hidden} values \
             ({}.embedding_length)",
            file.arch
        ))),
    }
}

fn common(file: &File, sizes: &Sizes) -> Result<Config> {
    let mut config = Map::new();
    set(&mut config, "model_type", file.arch);
    set(&mut config, "vocab_size", sizes.vocab);
    set(&mut config, "hidden_size", sizes.hidden);
    set(&mut config, "intermediate_size", sizes.intermediate);
    set(&mut config, "num_hidden_layers", sizes.layers);
    set(&mut config, "num_attention_heads", sizes.heads);
    set(&mut config, "num_key_value_heads", sizes.kv_heads);
    set(&mut config, "head_dim", sizes.head_dim);
    set(&mut config, "hidden_act", "silu");
    set(&mut config, "max_position_embeddings", sizes.context);
    set(&mut config, "tie_word_embeddings", !file.has("output.weight"));
    if file.arch != "falcon" {
        let key = "attention.layer_norm_rms_epsilon";
        set(&mut config, "rms_norm_eps", file.needed(key, file.positive_float(key)?)?);
    }
    rope(file, sizes, &mut config)?;
    token_ids(file.metadata, sizes.vocab, &mut config);
    Ok(config)
}

// --- rotary embedding -------------------------------------------------------------------

fn rope(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    let rotated = file.size("rope.dimension_count", sizes.layers)?.unwrap_or(sizes.head_dim);
    if rotated > sizes.head_dim || (file.arch != "phi3" && rotated != sizes.head_dim) {
        let what = format!("is {rotated}, but heads have {} dimensions", sizes.head_dim);
        return Err(file.wrong("rope.dimension_count", what));
    }
    if rotated != sizes.head_dim {
        set(config, "partial_rotary_factor", fraction(rotated, sizes.head_dim));
    }
    let theta = file.positive_float("rope.freq_base")?.unwrap_or(ROPE_THETA);
    set(config, "rope_theta", theta);
    if let Some(scaling) = rope_scaling(file, sizes, rotated)? {
        set(config, "rope_scaling", scaling);
    }
    if file.arch == "llama" {
        check_factors(file, "rope_freqs.weight", rotated)?;
    }
    Ok(())
}

/// part / whole, such that `(whole * fraction) as usize`, as HF computes it, is `part`.
fn fraction(part: u64, whole: u64) -> f64 {
    let exact = part as f64 / whole as f64;
    if ((exact * whole as f64) as u64) < part { exact.next_up() } else { exact }
}

fn rope_scaling(file: &File, sizes: &Sizes, rotated: u64) -> Result<Option<Json>> {
    let kind = match file.value("rope.scaling.type") {
        // The converter does not write it for phi3.
        None if file.arch == "phi3" && file.has("rope_factors_long.weight") => "longrope",
        None => "linear",
        Some(Value::String(kind)) => kind,
        Some(_) => return Err(file.wrong("rope.scaling.type", "is no text")),
    };
    let factor = match file.float("rope.scaling.factor")? {
        None => file.float("rope.scale_linear")?, // the old name
        factor => factor,
    };
    // llama.cpp takes 0 for none.
    let factor = factor.filter(|&x| x != 0.0).unwrap_or(1.0);
    if factor < 0.0 {
        return Err(file.wrong("rope.scaling.factor", "is negative"));
    }
    let attention = file.positive_float("rope.scaling.attn_factor")?;
    match kind {
        "yarn" => yarn(file, sizes, factor, attention).map(Some),
        "longrope" if matches!(file.arch, "llama" | "phi3") => {
            longrope(file, sizes, rotated, attention).map(Some)
        }
        "linear" | "none" if attention.is_some_and(|x| x != 1.0) => {
            Err(file.wrong("rope.scaling.attn_factor", "is not 1: that is not supported"))
        }
        "linear" if factor != 1.0 => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        "linear" | "none" => Ok(None),
        other => {
            let what = format!("is {}: that is not supported", shown(other));
            Err(file.wrong("rope.scaling.type", what))
        }
    }
}

fn original_context(file: &File, sizes: &Sizes) -> Result<u64> {
    let key = "rope.scaling.original_context_length";
    Ok(file.size(key, sizes.layers)?.unwrap_or(sizes.context))
}

fn yarn(file: &File, sizes: &Sizes, factor: f64, attention: Option<f64>) -> Result<Json> {
    let key = |name: &str| format!("rope.scaling.yarn_{name}");
    let mut scaling = Map::new();
    set(&mut scaling, "rope_type", "yarn");
    set(&mut scaling, "factor", factor);
    set(&mut scaling, "original_max_position_embeddings", original_context(file, sizes)?);
    for name in ["beta_fast", "beta_slow"] {
        if let Some(beta) = file.positive_float(&key(name))? {
            set(&mut scaling, name, beta);
        }
    }
    // HF's get_mscale, the default if no factor is given.
    let mscale = |m: f64| if factor > 1.0 { 0.1 * m * factor.ln() + 1.0 } else { 1.0 };
    let log = file.float(&key("log_multiplier"))?.filter(|&x| x > 0.0);
    let own = match (file.positive_float(&key("attn_factor"))?, log) {
        (Some(own), _) => Some(own),
        (None, Some(log)) => Some(mscale(1.0) / mscale(log)),
        (None, None) => None,
    };
    if own.is_some() || attention.is_some() {
        let product = own.unwrap_or_else(|| mscale(1.0)) * attention.unwrap_or(1.0);
        set(&mut scaling, "attention_factor", product);
    }
    Ok(Json::Object(scaling))
}

fn longrope(file: &File, sizes: &Sizes, rotated: u64, attention: Option<f64>) -> Result<Json> {
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if !check_factors(file, name, rotated)? {
            return Err(Error::input(format!(
                "tensor {name:?} is missing, which longrope scaling needs"
            )));
        }
    }
    let mut scaling = Map::new();
    set(&mut scaling, "rope_type", "longrope");
    set(&mut scaling, "original_max_position_embeddings", original_context(file, sizes)?);
    if let Some(attention) = attention {
        set(&mut scaling, "attention_factor", attention);
    }
    Ok(Json::Object(scaling))
}

/// Whether the tensor exists; it must then have an entry for each pair.
fn check_factors(file: &File, name: &str, rotated: u64) -> Result<bool> {
    match (file.shape)(name) {
        None => Ok(false),
        Some(shape) if shape.len() == 1 && shape[0] as u64 * 2 == rotated => Ok(true),
        Some(shape) => Err(Error::input(format!(
            "tensor {name:?} has the shape {shape:?}, [{}] is expected",
            rotated / 2
        ))),
    }
}

// --- tokens -----------------------------------------------------------------------------

/// Texts of tokens that end a turn, whatever the metadata say (llama.cpp's list, without
/// those that are ordinary text in some vocabularies).
const TURN_ENDS: [&str; 10] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// Types of tokens that are not text of the vocabulary: control and user-defined.
const SPECIAL: [i64; 2] = [3, 4];

fn token_ids(metadata: &Metadata, vocab: u64, config: &mut Config) {
    // Files have 2^32 - 1 where there is none.
    let id = |name: &str| {
        metadata.uint(&format!("tokenizer.ggml.{name}_token_id")).filter(|&id| id < vocab)
    };
    if let Some(bos) = id("bos") {
        set(config, "bos_token_id", bos);
    }
    let mut ends: Vec<u64> = ["eos", "eot", "eom"].into_iter().filter_map(id).collect();
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap_or_default();
    let types = metadata.ints("tokenizer.ggml.token_type").unwrap_or_default();
    let special =
        tokens.iter().zip(types).zip(0..vocab).filter(|((text, kind), _)| {
            SPECIAL.contains(kind) && TURN_ENDS.contains(&text.as_str())
        });
    ends.extend(special.map(|(_, id)| id));
    let mut seen = std::collections::HashSet::new();
    ends.retain(|id| seen.insert(*id));
    match ends[..] {
        [] => {}
        [one] => set(config, "eos_token_id", one),
        _ => set(config, "eos_token_id", ends),
    }
}

// --- architectures ----------------------------------------------------------------------

/// Number of experts and how many are used for a token; `None` for a dense model.
fn experts(file: &File, sizes: &Sizes) -> Result<Option<(u64, u64)>> {
    let Some(experts) = file.uint("expert_count")?.filter(|&n| n > 0) else { return Ok(None) };
    let key = "expert_used_count";
    let used = file.needed(key, file.size(key, sizes.layers)?)?;
    if used > experts || experts > SIZE_MAX {
        return Err(file.wrong(key, format!("is {used} of {experts} experts")));
    }
    // 1 is softmax; 0 and absence mean the architecture's own, which is softmax for all here.
    if file.uint("expert_gating_func")?.is_some_and(|n| n > 1) {
        return Err(file.wrong("expert_gating_func", "is not softmax: that is not supported"));
    }
    if file.has("blk.0.ffn_down.0.weight") || file.has("blk.0.ffn_gate_up_exps.weight") {
        return Err(Error::input(
            "the experts of this GGUF file are stored as separate tensors or with gate and up \
             fused: convert the model again with the defaults of a current llama.cpp",
        ));
    }
    Ok(Some((experts, used)))
}

fn refuse_experts(file: &File) -> Result<()> {
    match file.uint("expert_count")? {
        Some(1..) => Err(file.wrong("expert_count", "is set: that is not supported here")),
        _ => Ok(()),
    }
}

/// Width of an expert; llama.cpp's default if it is not given.
fn expert_width(file: &File, sizes: &Sizes, used: u64) -> Result<u64> {
    let width = file.size("expert_feed_forward_length", sizes.layers)?;
    Ok(width.unwrap_or(sizes.intermediate / used).max(1))
}

fn has_qkv_bias(file: &File) -> bool {
    file.has("blk.0.attn_q.bias") || file.has("blk.0.attn_qkv.bias")
}

fn refuse_qkv_bias(file: &File) -> Result<()> {
    if has_qkv_bias(file) {
        return Err(Error::input(format!(
            "a bias of the attention (blk.0.attn_q.bias) is not supported for {}",
            file.arch
        )));
    }
    Ok(())
}

fn llama(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    let bias = has_qkv_bias(file);
    if bias != file.has("blk.0.attn_output.bias") {
        return Err(Error::input(
            "biases of q, k, v without one of attn_output (or the reverse) are not supported \
             for llama",
        ));
    }
    set(config, "attention_bias", bias);
    set(config, "mlp_bias", file.has("blk.0.ffn_up.bias"));
    if let Some((experts, used)) = experts(file, sizes)? {
        set(config, "model_type", "mixtral");
        set(config, "num_local_experts", experts);
        set(config, "num_experts_per_tok", used);
    } else if let Some(window) = window(file, sizes)? {
        set(config, "model_type", "mistral");
        set(config, "sliding_window", window);
    }
    Ok(())
}

/// Positions that a layer with a window sees, itself included; `None` for all.
fn window(file: &File, sizes: &Sizes) -> Result<Option<u64>> {
    match file.value("attention.sliding_window") {
        Some(Value::Int(0)) => Ok(None),
        _ => file.size("attention.sliding_window", sizes.layers),
    }
}

fn falcon(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    refuse_experts(file)?;
    refuse_qkv_bias(file)?;
    let two_norms = file.has("blk.0.attn_norm_2.weight");
    let new = two_norms || sizes.kv_heads > 1;
    let key = "attention.layer_norm_epsilon";
    set(config, "layer_norm_epsilon", file.needed(key, file.positive_float(key)?)?);
    set(config, "num_kv_heads", sizes.kv_heads);
    set(config, "new_decoder_architecture", new);
    set(config, "multi_query", sizes.kv_heads == 1);
    set(config, "parallel_attn", true);
    set(config, "num_ln_in_parallel_attn", if two_norms { 2 } else { 1 });
    set(config, "bias", false);
    set(config, "alibi", false);
    set(config, "ffn_hidden_size", sizes.intermediate);
    set(config, "activation", "gelu");
    for key in ["num_key_value_heads", "intermediate_size", "hidden_act"] {
        config.shift_remove(key); // not Falcon's names
    }
    Ok(())
}

fn qwen2(file: &File, config: &mut Config) -> Result<()> {
    set(config, "use_sliding_window", false);
    refuse_experts(file)
}

fn qwen3(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    refuse_qkv_bias(file)?;
    set(config, "use_sliding_window", false);
    set(config, "attention_bias", false);
    if file.arch == "qwen3" {
        return refuse_experts(file);
    }
    set(config, "model_type", "qwen3_moe");
    qwen_experts(file, sizes, config)
}

fn qwen_experts(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    let experts = experts(file, sizes)?;
    let (experts, used) = file.needed("expert_count", experts)?;
    set(config, "num_experts", experts);
    set(config, "num_experts_per_tok", used);
    set(config, "moe_intermediate_size", expert_width(file, sizes, used)?);
    set(config, "norm_topk_prob", true);
    set(config, "decoder_sparse_step", 1);
    set(config, "mlp_only_layers", json!([]));
    Ok(())
}

fn phi3(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    refuse_experts(file)?;
    refuse_qkv_bias(file)?;
    set(config, "original_max_position_embeddings", original_context(file, sizes)?);
    if let Some(window) = window(file, sizes)? {
        set(config, "sliding_window", window);
    }
    Ok(())
}

fn gemma(file: &File, sizes: &Sizes, config: &mut Config) -> Result<()> {
    refuse_experts(file)?;
    refuse_qkv_bias(file)?;
    let second = file.arch == "gemma2";
    let model_type = if second { "gemma2" } else { "gemma3_text" };
    set(config, "model_type", model_type);
    config.shift_remove("hidden_act"); // Gemma's name is another
    set(config, "hidden_activation", "gelu_pytorch_tanh");
    set(config, "attention_bias", false);
    let scalar = match (second, sizes.layers) {
        (true, 46) | (false, 62) => sizes.hidden / sizes.heads,
        _ => sizes.head_dim,
    };
    set(config, "query_pre_attn_scalar", scalar.max(1));
    gemma_windows(file, sizes, second, config)?;
    gemma_caps(file, second, config)
}

fn gemma_windows(file: &File, sizes: &Sizes, second: bool, config: &mut Config) -> Result<()> {
    let window = match file.value("attention.sliding_window") {
        None if second => Some(4096),
        _ => window(file, sizes)?,
    };
    let local = match window {
        Some(_) => windowed_layers(file, sizes.layers, if second { 2 } else { 6 })?,
        None => vec![false; sizes.layers as usize],
    };
    let name = |&local: &bool| if local { "sliding_attention" } else { "full_attention" };
    set(config, "sliding_window", window);
    set(config, "layer_types", local.iter().map(name).collect::<Vec<_>>());
    let base = file.positive_float("rope.freq_base_swa")?;
    if !second {
        set(config, "rope_local_base_freq", base.unwrap_or(ROPE_THETA));
    } else if base.is_some() && config.get("rope_theta") != base.map(Json::from).as_ref() {
        return Err(file.wrong("rope.freq_base_swa", "is not rope.freq_base"));
    }
    Ok(())
}

/// Which layers have a window: all but every `pattern`th, or as the file lists them.
fn windowed_layers(file: &File, layers: u64, pattern: u64) -> Result<Vec<bool>> {
    let key = "attention.sliding_window_pattern";
    if let Some(Value::Ints(listed)) = file.value(key) {
        if listed.len() as u64 != layers {
            let what = format!("has {} entries for {layers} layers", listed.len());
            return Err(file.wrong(key, what));
        }
        return Ok(listed.iter().map(|&n| n != 0).collect());
    }
    let pattern = file.uint(key)?.unwrap_or(pattern);
    Ok((0..layers).map(|i| pattern == 0 || i % pattern < pattern - 1).collect())
}

fn gemma_caps(file: &File, second: bool, config: &mut Config) -> Result<()> {
    let defaults = if second { (Some(50.0), Some(30.0)) } else { (None, None) };
    let cap = |key: &str, default: Option<f64>| -> Result<Option<f64>> {
        Ok(file.float(key)?.or(default).filter(|&x| x > 0.0))
    };
    // llama.cpp has no soft cap of the attention for gemma3.
    let attention = if second { cap("attn_logit_softcapping", defaults.0)? } else { None };
    set(config, "attn_logit_softcapping", attention);
    set(config, "final_logit_softcapping", cap("final_logit_softcapping", defaults.1)?);
    Ok(())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
