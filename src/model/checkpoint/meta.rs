//! Meta's own form of Llama 1, 2 and 3: `params.json` and `consolidated.NN.pth`, one file for
//! each rank of the model parallelism that it was trained with.
//!
//! `params.json` is turned into HF's config.json form, and the files' tensors into one table
//! of merged tensors that say which file holds which rows and columns; no value is touched.
//! Names stay Meta's, and so does the order of the rows of wq and wk (rotated in interleaved
//! pairs). The cuts are those of Meta's `Transformer` (llama/model.py): wq, wk, wv, w1, w3 and
//! output are column-parallel, wo and w2 row-parallel, the embedding is cut in its columns
//! (Llama 1, 2: ParallelEmbedding) or rows (Llama 3: VocabParallelEmbedding).
//!
//! Left out: mixtures of experts, vision models, quantized and adapter checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Piece, StoredDtype, StoredTensor};
use crate::{Error, Result};

#[cfg(test)]
#[path = "meta_tests.rs"]
mod tests;

/// Vocabulary of Llama 3: 128,000 tokens and 256 special ones.
const LLAMA3_VOCAB: usize = 128_256;
/// Sizes above are mistakes, and could overflow when multiplied.
const MAX_SIZE: u64 = 1 << 30;

/// A tensor put together from the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Meta's name: `layers.0.attention.wq.weight`, `tok_embeddings.weight` …
    pub name: String,
    /// Lengths of the whole tensor.
    pub shape: Vec<usize>,
    /// What the values are, the same in all files.
    pub dtype: StoredDtype,
    /// Where the values are; together they fill the tensor, none twice.
    pub pieces: Vec<Piece>,
}

// ------------------------------------------------------------------------------------- files

/// `consolidated.00.pth`, `consolidated.01.pth` … of `dir`, in order; None without any.
///
/// # Errors
/// Input errors: the directory cannot be read, a file of the sequence is missing, their number
/// is no power of two.
pub fn paths(dir: &Path) -> Result<Option<Vec<PathBuf>>> {
    let io = |e: std::io::Error| Error::input(format!("{}: {e}", dir.display()));
    let mut count = 0_usize;
    let mut last = 0;
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if let Some(number) = name.to_str().and_then(file_number) {
            count += 1;
            last = last.max(number);
        }
    }
    if count == 0 {
        return Ok(None);
    }
    // Of what is there, not up to `last`: that may be any number.
    let files: Vec<PathBuf> = (0..count).map(|file| dir.join(file_name(file))).collect();
    if let Some(missing) = files.iter().find(|path| !path.is_file()) {
        return Err(Error::input(format!(
            "{}: missing, while there is a {}: is the download complete?",
            missing.display(),
            file_name(last)
        )));
    }
    if !count.is_power_of_two() {
        return Err(Error::input(format!(
            "{}: {count} files consolidated.NN.pth, where Meta writes 1, 2, 4, 8 or 16: is the \
             download complete?",
            dir.display()
        )));
    }
    Ok(Some(files))
}

fn file_name(file: usize) -> String {
    format!("consolidated.{file:02}.pth")
}

/// The number of a file that is called just as [`file_name`] would.
fn file_number(name: &str) -> Option<usize> {
    let number = name.strip_prefix("consolidated.")?.strip_suffix(".pth")?.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

// ------------------------------------------------------------------------------------ params

/// What `params.json` says (Meta's `ModelArgs`).
struct Params {
    dim: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    has_kv_heads: bool,
    head_dim: usize,
    /// None for -1: as many as the tokenizer has.
    vocab_size: Option<usize>,
    norm_eps: f64,
    rope_theta: Option<f64>,
    /// The factor of Llama 3.1's scaling where it is on; Some(None) where none is given.
    scaled_rope: Option<Option<f64>>,
    multiple_of: Option<usize>,
    ffn_dim_multiplier: Option<f64>,
    hidden_dim: Option<usize>,
}

impl Params {
    fn parse(params: &Value) -> Result<Self> {
        let fields = Fields::of(params)?;
        fields.refuse_unsupported()?;
        let (dim, n_heads) = (fields.size("dim")?, fields.size("n_heads")?);
        let n_kv_heads = fields.optional_size("n_kv_heads")?;
        let parsed = Self {
            dim,
            n_layers: fields.size("n_layers")?,
            n_heads,
            n_kv_heads: n_kv_heads.unwrap_or(n_heads),
            has_kv_heads: n_kv_heads.is_some(),
            head_dim: fields.optional_size("head_dim")?.unwrap_or(dim / n_heads),
            vocab_size: match fields.get("vocab_size").and_then(Value::as_i64) {
                Some(-1) => None,
                _ => fields.optional_size("vocab_size")?,
            },
            norm_eps: fields.number("norm_eps")?.unwrap_or(1e-5),
            rope_theta: fields.number("rope_theta")?,
            scaled_rope: match fields.get("use_scaled_rope") {
                None | Some(Value::Bool(false)) => None,
                Some(Value::Bool(true)) => Some(fields.number("rope_scaling_factor")?),
                Some(_) => return Err(wrong("use_scaled_rope")),
            },
            multiple_of: fields.optional_size("multiple_of")?,
            ffn_dim_multiplier: fields.number("ffn_dim_multiplier")?,
            hidden_dim: fields.optional_size("hidden_dim")?,
        };
        parsed.check_heads()?;
        Ok(parsed)
    }

    fn check_heads(&self) -> Result<()> {
        if self.head_dim == 0 || !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return Err(Error::input(format!(
                "params.json: dim {}, n_heads {} and n_kv_heads {} do not fit together",
                self.dim, self.n_heads, self.n_kv_heads
            )));
        }
        Ok(())
    }

    /// Width of the MLP by the formula of Meta's `FeedForward`, where its factors are given.
    fn ffn_width(&self) -> Option<usize> {
        let multiple_of = self.multiple_of?;
        let width = 2 * (4 * self.dim) / 3;
        let width = match self.ffn_dim_multiplier {
            Some(multiplier) => (multiplier * width as f64) as usize,
            None => width,
        };
        width.div_ceil(multiple_of).checked_mul(multiple_of)
    }

    /// The trained context, which `params.json` does not say. Told by what differs: Llama 3.1
    /// and later scale their rotary embedding; Llama 3's base is 500,000, CodeLlama's a
    /// million; Llama 1 has an epsilon of 1e-6, or (65B) 64 heads without grouped KV heads.
    fn max_position_embeddings(&self, vocab_size: usize) -> usize {
        let theta = self.theta(vocab_size);
        if self.scaled_rope.is_some() {
            131_072
        } else if theta == 500_000.0 || vocab_size == LLAMA3_VOCAB {
            8_192
        } else if theta == 1_000_000.0 {
            16_384
        } else if self.norm_eps < 5e-6 || (self.dim == 8_192 && !self.has_kv_heads) {
            2_048
        } else {
            4_096
        }
    }

    fn theta(&self, vocab_size: usize) -> f64 {
        let default = if vocab_size == LLAMA3_VOCAB { 500_000.0 } else { 10_000.0 };
        self.rope_theta.unwrap_or(default)
    }

    /// Factor of the scaling: as given, else 32 for the two small models of Llama 3.2 (whose
    /// params.json leaves it out), else Llama 3.1's 8.
    fn scaling_factor(&self, given: Option<f64>) -> f64 {
        given.unwrap_or(if self.dim <= 3_072 { 32.0 } else { 8.0 })
    }
}

/// The fields of `params.json`; some tools put them under "model".
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn of(params: &'a Value) -> Result<Self> {
        let object = params.get("model").unwrap_or(params).as_object();
        object.map(Self).ok_or_else(|| Error::input("params.json: not a JSON object"))
    }

    /// The value of `key`; null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str) -> Result<usize> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| Error::input(format!("params.json: {key} is missing")))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().filter(|n| (1..=MAX_SIZE).contains(n));
        size.map(|n| Some(n as usize)).ok_or_else(|| wrong(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|n| *n > 0.0 && *n <= 1e12);
        number.map(Some).ok_or_else(|| wrong(key))
    }

    /// Keys that change what is computed. Others (max_batch_size, max_seq_len, names …) are
    /// passed over; tensors that they would bring are refused by [`merge`].
    fn refuse_unsupported(&self) -> Result<()> {
        let is_off = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
        let changes = |key: &str| {
            key.starts_with("moe")
                || key.starts_with("vision")
                || key.starts_with("quantization")
                || matches!(
                    key,
                    "lora_args" | "sliding_window" | "use_qk_norm" | "nope_layer_interval"
                )
        };
        match self.0.iter().find(|(key, value)| changes(key) && !is_off(value)) {
            None => Ok(()),
            Some((key, _)) => Err(Error::input(format!(
                "params.json: {key} is not supported in Meta's form: use the model's Hugging Face \
                 form"
            ))),
        }
    }
}

fn wrong(key: &str) -> Error {
    Error::input(format!("params.json: {key} is out of range or of the wrong type"))
}

/// `params.json` in HF's config.json form (`model_type` "llama"). `shapes` gives the shapes of
/// [`merge`]'s tensors by name.
///
/// Width of the MLP and the vocabulary are those of the weights, and must be what
/// `params.json` says; whether the tokenizer fits them is seen where it is opened. Token ids
/// of begin and end are set for Llama 3's vocabulary only; other tokenizers name theirs.
///
/// # Errors
/// Input errors that name the key or tensor: missing, out of range, not supported,
/// contradicted by the weights.
pub fn hf_config(params: &Value, shapes: impl Fn(&str) -> Option<Vec<usize>>) -> Result<Value> {
    let params = Params::parse(params)?;
    let rows = |name: &str| match shapes(name).as_deref() {
        Some([rows, _]) => Ok(*rows),
        Some(other) => Err(Error::input(format!("tensor {name} has shape {other:?}"))),
        None => Err(Error::input(format!("the model has no tensor {name}"))),
    };
    let w1 = "layers.0.feed_forward.w1.weight";
    let intermediate_size = rows(w1)?;
    for said in [params.ffn_width(), params.hidden_dim].into_iter().flatten() {
        must_agree(said == intermediate_size, "the MLP's width", said, w1, intermediate_size)?;
    }
    let embedding = "tok_embeddings.weight";
    let vocab_size = rows(embedding)?;
    if let Some(said) = params.vocab_size {
        must_agree(said == vocab_size, "vocab_size", said, embedding, vocab_size)?;
    }
    let last = format!("layers.{}.attention_norm.weight", params.n_layers - 1);
    if shapes(&last).is_none() {
        return Err(Error::input(format!(
            "params.json gives {} for n_layers, but the model has no tensor {last}",
            params.n_layers
        )));
    }
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": params.dim,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads,
        "head_dim": params.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": params.max_position_embeddings(vocab_size),
        "rms_norm_eps": params.norm_eps,
        "rope_theta": params.theta(vocab_size),
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": shapes("output.weight").is_none(),
    });
    if let Some(given) = params.scaled_rope {
        config["rope_scaling"] = json!({
            "rope_type": "llama3",
            "factor": params.scaling_factor(given),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
    }
    if vocab_size == LLAMA3_VOCAB {
        // <|begin_of_text|>; <|end_of_text|>, <|eom_id|> (3.1), <|eot_id|>. Models that were
        // not instructed never write the last two.
        config["bos_token_id"] = json!(128_000);
        config["eos_token_id"] = json!([128_001, 128_008, 128_009]);
    }
    Ok(config)
}

fn must_agree(agree: bool, what: &str, said: usize, tensor: &str, rows: usize) -> Result<()> {
    if agree {
        return Ok(());
    }
    Err(Error::input(format!(
        "params.json gives {said} for {what}, but {tensor} has {rows} rows: do they belong to the \
         same model?"
    )))
}

// ------------------------------------------------------------------------------------- merge

/// How a tensor is spread over the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// The same in all files.
    Replicated,
    Rows,
    Cols,
    /// In rows by whole KV heads; with fewer heads than files, several hold the same one.
    KvHeads,
    Embedding,
}

/// What a tensor of Meta's form must look like.
struct Expected {
    cut: Cut,
    shape: Vec<usize>,
}

/// The sizes that shapes follow from.
struct Sizes {
    params: Params,
    files: usize,
    ffn: usize,
    vocab: usize,
}

impl Sizes {
    /// What Meta's model has under `name`; None if it has nothing.
    fn expect(&self, name: &str) -> Option<Expected> {
        let p = &self.params;
        // Below 2^60, by MAX_SIZE.
        let (q, kv) = (p.n_heads * p.head_dim, p.n_kv_heads * p.head_dim);
        let whole = |cut, rows, cols| Some(Expected { cut, shape: vec![rows, cols] });
        let norm = || Some(Expected { cut: Cut::Replicated, shape: vec![p.dim] });
        match name.strip_suffix(".weight")? {
            "tok_embeddings" => whole(Cut::Embedding, self.vocab, p.dim),
            "output" => whole(Cut::Rows, self.vocab, p.dim),
            "norm" => norm(),
            of_layer => {
                let (layer, part) = of_layer.strip_prefix("layers.")?.split_once('.')?;
                layer.parse::<usize>().ok().filter(|layer| *layer < p.n_layers)?;
                match part {
                    "attention.wq" => whole(Cut::Rows, q, p.dim),
                    "attention.wk" | "attention.wv" => whole(Cut::KvHeads, kv, p.dim),
                    "attention.wo" => whole(Cut::Cols, p.dim, q),
                    "feed_forward.w1" | "feed_forward.w3" => whole(Cut::Rows, self.ffn, p.dim),
                    "feed_forward.w2" => whole(Cut::Cols, p.dim, self.ffn),
                    "attention_norm" | "ffn_norm" => norm(),
                    _ => None,
                }
            }
        }
    }
}

/// The tensors of the model from those of its `files`, in the order of the first file.
/// `rope.freqs` is left out: the frequencies are computed.
///
/// # Errors
/// Input errors that name file and tensor: missing in one, of another dtype or shape than in
/// the others or than `params` asks for, unknown to Meta's model.
pub fn merge(files: Vec<Vec<StoredTensor>>, params: &Value) -> Result<Vec<Merged>> {
    let files: Vec<Vec<StoredTensor>> = files.into_iter().map(without_frequencies).collect();
    let by_name: Vec<HashMap<&str, &StoredTensor>> =
        files.iter().map(|file| file.iter().map(|t| (t.name.as_str(), t)).collect()).collect();
    let Some(first) = files.first() else {
        return Err(Error::input("no consolidated.NN.pth files"));
    };
    for (number, file) in files.iter().enumerate() {
        if let Some(extra) = file.iter().find(|t| !by_name[0].contains_key(t.name.as_str())) {
            return Err(in_file(number, &extra.name, format!("not in {} too", file_name(0))));
        }
    }
    let sizes = sizes(Params::parse(params)?, &by_name)?;
    first
        .iter()
        .map(|tensor| {
            let parts = same_in_all(&tensor.name, &by_name)?;
            let expected = sizes.expect(&tensor.name).ok_or_else(|| {
                in_file(0, &tensor.name, "Llama has no such tensor in Meta's form".into())
            })?;
            let pieces = pieces(&sizes, &expected, &parts).ok_or_else(|| {
                in_file(
                    0,
                    &tensor.name,
                    format!(
                        "shape {:?} does not fit params.json, which asks for {:?} over {} files",
                        tensor.shape, expected.shape, sizes.files
                    ),
                )
            })?;
            Ok(Merged {
                name: tensor.name.clone(),
                shape: expected.shape,
                dtype: tensor.dtype.clone(),
                pieces,
            })
        })
        .collect()
}

fn without_frequencies(file: Vec<StoredTensor>) -> Vec<StoredTensor> {
    file.into_iter().filter(|t| t.name != "rope.freqs").collect()
}

fn in_file(file: usize, tensor: &str, what: String) -> Error {
    Error::input(format!("{}: tensor {tensor}: {what}", file_name(file)))
}

/// The parts of tensor `name`, one a file, of one shape and dtype.
fn same_in_all<'a>(
    name: &str,
    files: &[HashMap<&str, &'a StoredTensor>],
) -> Result<Vec<&'a StoredTensor>> {
    let mut parts: Vec<&StoredTensor> = Vec::with_capacity(files.len());
    for (number, file) in files.iter().enumerate() {
        let part = *file.get(name).ok_or_else(|| in_file(number, name, "missing".into()))?;
        let first = parts.first().copied().unwrap_or(part);
        if part.shape != first.shape || part.dtype != first.dtype {
            return Err(in_file(
                number,
                name,
                format!(
                    "shape {:?} of {:?}, but {:?} of {:?} in {}",
                    part.shape,
                    part.dtype,
                    first.shape,
                    first.dtype,
                    file_name(0)
                ),
            ));
        }
        parts.push(part);
    }
    Ok(parts)
}

/// Adds to `params` what only the weights tell: the width of the MLP, and the vocabulary
/// where `params.json` leaves it to the tokenizer (the output's rows, which are always cut;
/// without an output those of the embedding).
fn sizes(params: Params, files: &[HashMap<&str, &StoredTensor>]) -> Result<Sizes> {
    let dims = |name: &str| match files[0].get(name).map(|t| t.shape.as_slice()) {
        Some(&[rows, cols]) => Some((rows, cols)),
        _ => None,
    };
    let times = |rows: usize| rows.checked_mul(files.len()).filter(|n| *n as u64 <= MAX_SIZE);
    let missing = |name: &str| in_file(0, name, "missing, or no matrix".into());
    let w1 = "layers.0.feed_forward.w1.weight";
    let ffn = dims(w1).and_then(|(rows, _)| times(rows)).ok_or_else(|| missing(w1))?;
    let embedding = "tok_embeddings.weight";
    let vocab = match (params.vocab_size, dims("output.weight"), dims(embedding)) {
        (Some(said), ..) => Some(said),
        (None, Some((rows, _)), _) => times(rows),
        (None, None, Some((rows, cols))) if cols == params.dim => times(rows),
        (None, None, rows) => rows.map(|(rows, _)| rows),
    };
    let vocab = vocab.ok_or_else(|| missing(embedding))?;
    Ok(Sizes { params, files: files.len(), ffn, vocab })
}

/// Where each part goes; None if their shape does not fit.
fn pieces(sizes: &Sizes, expected: &Expected, parts: &[&StoredTensor]) -> Option<Vec<Piece>> {
    let shape = parts[0].shape.as_slice();
    let whole = expected.shape.as_slice();
    if shape == whole {
        return may_be_whole(expected.cut, parts.len()).then(|| vec![whole_piece(whole, parts[0])]);
    }
    let (&[rows, cols], &[all_rows, all_cols]) = (shape, whole) else { return None };
    let is_cut = |part: usize, all: usize| part.checked_mul(parts.len()) == Some(all);
    let by_rows = cols == all_cols && is_cut(rows, all_rows);
    let by_cols = rows == all_rows && is_cut(cols, all_cols);
    let heads = sizes.params.n_kv_heads;
    match expected.cut {
        Cut::Rows | Cut::KvHeads | Cut::Embedding if by_rows => Some(stacked(parts, rows, cols)),
        Cut::Cols | Cut::Embedding if by_cols => Some(side_by_side(parts, rows, cols)),
        // Fewer heads than files: neighbours hold the same head, and the first one's counts.
        Cut::KvHeads
            if cols == all_cols
                && rows == sizes.params.head_dim
                && parts.len().is_multiple_of(heads) =>
        {
            let firsts: Vec<_> = parts.iter().step_by(parts.len() / heads).copied().collect();
            let mut pieces = stacked(&firsts, rows, cols);
            pieces.iter_mut().for_each(|piece| piece.file *= parts.len() / heads);
            Some(pieces)
        }
        _ => None,
    }
}

/// Whether every one of `files` may hold a tensor whole.
fn may_be_whole(cut: Cut, files: usize) -> bool {
    files == 1 || matches!(cut, Cut::Replicated | Cut::KvHeads | Cut::Embedding)
}

fn whole_piece(shape: &[usize], part: &StoredTensor) -> Piece {
    let (rows, cols) = match shape {
        [rows, cols] => (*rows, *cols),
        _ => (1, shape[0]),
    };
    Piece { file: 0, offset: part.offset, rows: 0..rows, cols: 0..cols }
}

fn stacked(parts: &[&StoredTensor], rows: usize, cols: usize) -> Vec<Piece> {
    let piece = |(file, part): (usize, &&StoredTensor)| Piece {
        file,
        offset: part.offset,
        rows: file * rows..(file + 1) * rows,
        cols: 0..cols,
    };
    parts.iter().enumerate().map(piece).collect()
}

fn side_by_side(parts: &[&StoredTensor], rows: usize, cols: usize) -> Vec<Piece> {
    let piece = |(file, part): (usize, &&StoredTensor)| Piece {
        file,
        offset: part.offset,
        rows: 0..rows,
        cols: file * cols..(file + 1) * cols,
    };
    parts.iter().enumerate().map(piece).collect()
}
