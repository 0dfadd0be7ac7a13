//! A model directory as another one: safetensors in the same shards, under the same names,
//! and copies of what describes the model. PyTorch's files become safetensors.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::Output;
use crate::files::{replace_file, sync_folder};
use crate::model::Checkpoint;
use crate::model::adapter::merge::Merge;
use crate::model::checkpoint::{Format, StoredDtype, language_model_name, torch};
use crate::{Error, Result};

/// Endings of files that hold weights, of whatever form, and are not copied.
const WEIGHTS: [&str; 9] =
    ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx", "ot"];

/// A file of weights of the result.
struct Shard<'a> {
    file: String,
    metadata: Option<HashMap<String, String>>,
    tensors: Vec<Planned<'a>>,
}

/// A tensor of the result.
struct Planned<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    content: Content<'a>,
}

enum Content<'a> {
    /// As it lies.
    Bytes(&'a [u8]),
    /// The tensor of this name in the model's table, written as this type.
    Stored(String, StoredDtype),
    /// The module's matrix.
    Merged(String, StoredDtype),
}

/// Writes the result into the directory `dir`, which is made, and returns what the user
/// should know of it.
pub fn write(
    dir: &Path,
    base: &Checkpoint,
    merge: &Merge,
    dtype: Option<StoredDtype>,
) -> Result<Vec<String>> {
    let mut remarks = Vec::new();
    let shards = shards(base, merge, dtype.as_ref(), &mut remarks)?;
    fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
    for shard in &shards {
        write_shard(dir, shard, base, merge)?;
    }
    if shards.len() > 1 || index_of(base).is_file() {
        write_index(dir, base, &shards)?;
    }
    copy_others(dir, base, merge, dtype.as_ref())?;
    sync_folder(&dir.join("config.json"));
    Ok(remarks)
}

fn shards<'a>(
    base: &'a Checkpoint,
    merge: &Merge,
    dtype: Option<&StoredDtype>,
    remarks: &mut Vec<String>,
) -> Result<Vec<Shard<'a>>> {
    let mut shards = Vec::new();
    for (path, bytes) in base.tensors().files() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let read = match base.files().format {
            Format::Torch => of_torch(&name, bytes, remarks),
            _ => of_safetensors(name, bytes),
        };
        let mut shard = read.map_err(|error| error.context(path.display()))?;
        let added = shard.tensors.iter().find_map(|tensor| added_head(tensor, base, merge));
        shard.tensors.extend(added);
        shard.tensors.iter_mut().for_each(|tensor| plan(tensor, merge, dtype));
        shards.push(shard);
    }
    Ok(shards)
}

/// The tensors in the order in which they lie.
fn of_safetensors(file: String, bytes: &[u8]) -> Result<Shard<'_>> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(Error::input)?;
    let parsed = SafeTensors::deserialize(bytes).map_err(Error::input)?;
    let tensors = header.offset_keys().into_iter().map(|name| {
        let view = parsed.tensor(&name).map_err(Error::input)?;
        let (dtype, shape) = (view.dtype(), view.shape().to_vec());
        Ok(Planned { name, dtype, shape, content: Content::Bytes(view.data()) })
    });
    let tensors = tensors.collect::<Result<_>>()?;
    Ok(Shard { file, metadata: header.metadata().clone(), tensors })
}

/// Weights are floats; what else is in such a file (masks, positions) is made anew by those
/// who load the model.
fn of_torch<'a>(file: &str, bytes: &[u8], remarks: &mut Vec<String>) -> Result<Shard<'a>> {
    let stem = file.strip_prefix("pytorch_").unwrap_or(file);
    let file = Path::new(stem).with_extension("safetensors").to_string_lossy().into_owned();
    let mut tensors = Vec::new();
    for stored in torch::read(bytes)? {
        let Some(dtype) = safetensors_dtype(&stored.dtype) else {
            let (name, dtype) = (&stored.name, stored.dtype.name());
            remarks.push(format!("tensor {name} of type {dtype} is left out"));
            continue;
        };
        let content = Content::Stored(language_model_name(&stored.name), stored.dtype);
        tensors.push(Planned { name: stored.name, dtype, shape: stored.shape, content });
    }
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    Ok(Shard { file, metadata, tensors })
}

/// The output projection, beside the embedding that it is no longer one with.
fn added_head<'a>(
    embedding: &Planned<'a>,
    base: &Checkpoint,
    merge: &Merge,
) -> Option<Planned<'a>> {
    let head = merge.added()?;
    let module = format!("{}.weight", base.config().names.embed_tokens);
    if language_model_name(&embedding.name) != module {
        return None;
    }
    let prefix = embedding.name.strip_suffix(&module).unwrap_or_default();
    Some(Planned {
        name: format!("{prefix}{head}.weight"),
        dtype: embedding.dtype,
        shape: embedding.shape.clone(),
        content: Content::Bytes(&[]),
    })
}

/// Decides what is written for a tensor, of whose type `dtype` was asked for.
fn plan(tensor: &mut Planned, merge: &Merge, dtype: Option<&StoredDtype>) {
    let Some(own) = stored_dtype(tensor.dtype) else { return };
    let written = dtype.cloned().unwrap_or_else(|| own.clone());
    let name = language_model_name(&tensor.name);
    let module = name.strip_suffix(".weight").filter(|module| merge.changes(module));
    if let Some(module) = module {
        tensor.content = Content::Merged(module.to_owned(), written.clone());
    } else if written != own || matches!(tensor.content, Content::Stored(..)) {
        tensor.content = Content::Stored(name, written.clone());
    }
    tensor.dtype = safetensors_dtype(&written).unwrap_or(tensor.dtype);
}

fn stored_dtype(dtype: Dtype) -> Option<StoredDtype> {
    match dtype {
        Dtype::F32 => Some(StoredDtype::F32),
        Dtype::F16 => Some(StoredDtype::F16),
        Dtype::BF16 => Some(StoredDtype::Bf16),
        _ => None,
    }
}

fn safetensors_dtype(dtype: &StoredDtype) -> Option<Dtype> {
    match dtype {
        StoredDtype::F32 => Some(Dtype::F32),
        StoredDtype::F16 => Some(Dtype::F16),
        StoredDtype::Bf16 => Some(Dtype::BF16),
        StoredDtype::Quant(_) | StoredDtype::Other(_) => None,
    }
}

impl Planned<'_> {
    fn bytes(&self) -> u64 {
        match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Stored(_, dtype) | Content::Merged(_, dtype) => {
                dtype.bytes_of(&self.shape).unwrap_or_default()
            }
        }
    }
}

fn write_shard(dir: &Path, shard: &Shard, base: &Checkpoint, merge: &Merge) -> Result<()> {
    let mut out = Output::create(dir.join(&shard.file))?;
    out.bytes(&header(shard)?)?;
    for tensor in &shard.tensors {
        let in_tensor = |error: Error| error.context(&tensor.name);
        match &tensor.content {
            Content::Bytes(bytes) => out.bytes(bytes)?,
            Content::Stored(name, dtype) => {
                let cols = tensor.shape.last().copied().unwrap_or(1);
                let shape = [tensor.shape.iter().rev().skip(1).product(), cols];
                let read = |rows: Range<usize>, out: &mut [f32]| {
                    let part = base.tensors().part(name, shape, &[rows], 0..cols)?;
                    let out = out.chunks_exact_mut(cols.max(1));
                    out.enumerate().for_each(|(row, out)| part.read_row(row, out));
                    Ok(())
                };
                out.rows(shape, dtype, read).map_err(in_tensor)?;
            }
            Content::Merged(module, dtype) => {
                let matrix = merge.matrix(module)?;
                out.rows(matrix.shape(), dtype, |rows, out| matrix.read(rows, out))
                    .map_err(in_tensor)?;
            }
        }
    }
    out.finish()
}

/// The format's beginning: the length of a JSON object, which is filled up to eight bytes.
fn header(shard: &Shard) -> Result<Vec<u8>> {
    let mut fields = Map::new();
    if let Some(metadata) = &shard.metadata {
        let sorted: BTreeMap<_, _> = metadata.iter().collect();
        fields.insert("__metadata__".to_owned(), json!(sorted));
    }
    let mut offset = 0;
    for tensor in &shard.tensors {
        let end = offset + tensor.bytes();
        let entry = json!({
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]
        });
        fields.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut json = serde_json::to_vec(&fields).map_err(Error::fault)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// The model's own index, if it has one.
fn index_of(base: &Checkpoint) -> PathBuf {
    base.files().dir.join(match base.files().format {
        Format::Torch => "pytorch_model.bin.index.json",
        _ => "model.safetensors.index.json",
    })
}

fn write_index(dir: &Path, base: &Checkpoint, shards: &[Shard]) -> Result<()> {
    let mut index = read_object(&index_of(base))?;
    let tensors = || shards.iter().flat_map(|shard| shard.tensors.iter().map(move |t| (shard, t)));
    let mut metadata =
        index.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
    let total: u64 = tensors().map(|(_, tensor)| tensor.bytes()).sum();
    metadata.insert("total_size".to_owned(), json!(total));
    let map: BTreeMap<_, _> =
        tensors().map(|(shard, tensor)| (&tensor.name, &shard.file)).collect();
    index.insert("metadata".to_owned(), Value::Object(metadata));
    index.insert("weight_map".to_owned(), json!(map));
    write_object(&dir.join("model.safetensors.index.json"), index)
}

/// Copies what lies beside the weights: configuration, tokenizer, licence; no folders.
fn copy_others(
    dir: &Path,
    base: &Checkpoint,
    merge: &Merge,
    dtype: Option<&StoredDtype>,
) -> Result<()> {
    let from = &base.files().dir;
    for entry in fs::read_dir(from).map_err(|error| Error::io(from, error))? {
        let path = entry.map_err(|error| Error::io(from, error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        let is_weights = ending.is_some_and(|ending| WEIGHTS.contains(&ending.as_str()));
        if !path.is_file() || is_weights || name.ends_with(".index.json") || name.starts_with('.') {
            continue;
        }
        let to = dir.join(&name);
        if name == "config.json" && (merge.unties() || dtype.is_some()) {
            write_object(&to, config(read_object(&path)?, merge, dtype))?;
        } else {
            fs::copy(&path, &to).map_err(|error| Error::io(&path, error))?;
        }
    }
    Ok(())
}

/// The configuration with what the merge has changed of it.
fn config(
    mut config: Map<String, Value>,
    merge: &Merge,
    dtype: Option<&StoredDtype>,
) -> Map<String, Value> {
    if merge.unties() {
        config.insert("tie_word_embeddings".to_owned(), json!(false));
    }
    let torch_name = dtype.map(|dtype| match dtype {
        StoredDtype::Bf16 => "bfloat16",
        StoredDtype::F16 => "float16",
        _ => "float32",
    });
    if let Some(name) = torch_name {
        for key in ["torch_dtype", "dtype"] {
            if let Some(value) = config.get_mut(key) {
                *value = json!(name);
            }
        }
    }
    if let Some(Value::Object(text)) = config.get_mut("text_config") {
        *text = self::config(std::mem::take(text), merge, dtype);
    }
    config
}

/// The JSON object in a file; an empty one if there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(Error::io(path, error)),
    };
    serde_json::from_slice(&text)
        .map_err(|error| Error::input(format!("{}: {error}", path.display())))
}

fn write_object(path: &Path, object: Map<String, Value>) -> Result<()> {
    let mut text = serde_json::to_string_pretty(&object).map_err(Error::fault)?;
    text.push('\n');
    replace_file(path, text.as_bytes())
}
