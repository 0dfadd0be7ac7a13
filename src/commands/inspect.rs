//! `farm inspect`: what a model is, and the memory that it needs, from its headers alone.
//!
//! What farm cannot use is said beside what is known of it. Left out: the memory of
//! activations.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cli::{BatchLimits, InspectArgs};
use crate::commands::{footprint, load, print};
use crate::model::checkpoint::{Contents, Format, StoredDtype};
use crate::model::tokenizer::{Tokenizer, read_json};
use crate::model::{ModelConfig, Preflight};
use crate::stage::manifest::Manifest;
use crate::stage::sources::ModelPaths;
use crate::{Error, Result};

mod text;

/// What is known of a model.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// Where it is.
    pub model: PathBuf,
    /// Its name in answers.
    pub name: String,
    /// The form of its files.
    pub format: &'static str,
    /// Its weight files.
    pub files: Vec<FileInfo>,
    /// Bytes of those.
    pub bytes: u64,
    /// HF's name of the family, or the file's own where farm does not know it.
    pub family: Option<String>,
    /// The shape in a line.
    pub architecture: Option<String>,
    /// Parameters of all matrices.
    pub parameters: Option<u64>,
    /// Types of the stored values, the commonest first.
    pub dtypes: Vec<DtypeShare>,
    /// How the weights are quantized.
    pub quantization: Option<String>,
    /// Longest sequence.
    pub context_length: Option<usize>,
    /// Rows of the embedding.
    pub vocab_size: Option<usize>,
    /// The tokenizer.
    pub tokenizer: Option<TokenizerInfo>,
    /// Sequences of a full batch in `memory`.
    pub batch_size: usize,
    /// Memory of a rank at each tensor-parallel size that works.
    pub memory: Vec<RankMemory>,
    /// Every tensor, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensors: Option<Vec<TensorInfo>>,
    /// Tensors that farm does not read, if there are some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unused: Option<Unused>,
    /// Why farm cannot run it; empty if it can.
    pub problems: Vec<String>,
}

/// A weight file.
#[derive(Debug, Serialize)]
pub struct FileInfo {
    /// Its name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
}

/// What is stored in one type.
#[derive(Debug, Serialize)]
pub struct DtypeShare {
    /// The type.
    pub dtype: String,
    /// Tensors of it.
    pub tensors: usize,
    /// Values in them.
    pub values: u64,
    /// Of all values.
    pub share: f64,
}

/// A tokenizer.
#[derive(Debug, Serialize)]
pub struct TokenizerInfo {
    /// Its algorithm and where it comes from.
    pub kind: String,
    /// Highest id plus one.
    pub vocab_size: usize,
    /// Whether there is a chat template.
    pub chat_template: bool,
    /// Tokens that end a text.
    pub eos: Vec<Token>,
    /// The token that begins one.
    pub bos: Option<Token>,
}

/// A token.
#[derive(Debug, Serialize)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its text, if it has one.
    pub token: Option<String>,
}

/// Memory of one rank, bytes.
#[derive(Debug, Serialize)]
pub struct RankMemory {
    /// Ranks that share the model.
    pub tensor_parallel: usize,
    /// Weights of a rank.
    pub weight_bytes: u64,
    /// KV cache of one sequence of the whole context.
    pub kv_sequence_bytes: u64,
    /// KV cache of a full batch of those.
    pub kv_batch_bytes: u64,
}

/// A tensor.
#[derive(Debug, Serialize)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Lengths, outermost dimension first.
    pub shape: Vec<usize>,
    /// What the values are.
    pub dtype: String,
    /// Bytes, where the type is known.
    pub bytes: Option<u64>,
    /// The file, or the first and the number of the others.
    pub file: String,
}

/// Tensors of the files that a load does not read: another part of a multimodal model, say.
#[derive(Debug, Serialize)]
pub struct Unused {
    /// How many.
    pub tensors: usize,
    /// The first of them by name.
    pub examples: Vec<String>,
}

impl Unused {
    fn of(names: &[String]) -> Option<Self> {
        let examples = names.iter().take(3).cloned().collect();
        (!names.is_empty()).then_some(Self { tensors: names.len(), examples })
    }
}

/// Prints what is known of the model.
///
/// # Errors
/// Input errors: the files cannot be read, or (after printing) farm cannot run the model.
pub fn run(args: &InspectArgs) -> Result<()> {
    let inspection = inspect(args)?;
    if args.json {
        let json = serde_json::to_string_pretty(&inspection).map_err(Error::fault)?;
        print(&format!("{json}\n"))?;
    } else {
        print(&text::render(&inspection))?;
    }
    match inspection.problems.as_slice() {
        [] => Ok(()),
        problems => Err(Error::input(problems.join("; "))),
    }
}

fn inspect(args: &InspectArgs) -> Result<Inspection> {
    let sources =
        ModelPaths { tokenizer: args.tokenizer.clone(), ..ModelPaths::of(args.model.path()) };
    let manifest = Manifest::read(&sources)?;
    let contents = Contents::open(&manifest.in_place.model)?;
    let mut problems = Vec::new();
    let config = config(&contents, &mut problems);
    let is_read = problems.is_empty();
    let given = manifest.in_place.tokenizer.as_deref();
    let vocab_size = config.as_ref().map(|config| config.vocab_size);
    let tokenizer = match load::tokenizer(&contents, given) {
        Ok(tokenizer) => {
            let fits = vocab_size.map_or(Ok(()), |vocab_size| tokenizer.check_fits(vocab_size));
            problems.extend(fits.err().map(|error| error.message));
            tokenizer_info(&tokenizer, &contents, given)
        }
        Err(error) => Err(error),
    };
    let tokenizer = tokenizer.map_err(|error| problems.push(error.message)).ok();
    let mut unused = None;
    // Of weights in a form that is not read, the names tell nothing.
    if let (Some(config), true) = (&config, is_read) {
        let preflight = Preflight::new(config, &contents.tensors)?;
        problems.extend(preflight.problem());
        unused = Unused::of(preflight.unused());
    }
    let files = weight_files(&contents)?;
    Ok(Inspection {
        name: manifest.name,
        format: contents.files.format.name(),
        bytes: files.iter().map(|file| file.bytes).sum(),
        files,
        family: config.as_ref().map(|c| c.model_type.clone()).or_else(|| family(&contents)),
        architecture: config.as_ref().map(text::architecture),
        parameters: config.as_ref().map(ModelConfig::parameters),
        dtypes: dtypes(&contents),
        quantization: quantization(&contents),
        context_length: config.as_ref().map(ModelConfig::max_context),
        vocab_size,
        tokenizer,
        batch_size: BatchLimits::ON_CPU.sequences,
        memory: config.as_ref().map(|config| memory(config, &contents)).unwrap_or_default(),
        tensors: args.tensors.then(|| tensors(&contents)),
        unused,
        problems,
        model: manifest.in_place.model,
    })
}

/// The model's shape, as far as it is known: of weights in a form that farm does not read
/// the configuration still says what they make.
fn config(contents: &Contents, problems: &mut Vec<String>) -> Option<ModelConfig> {
    let error = match contents.config() {
        Ok(config) => return Some(config),
        Err(error) => error,
    };
    problems.push(error.message);
    let mut json = raw_config(contents)?;
    json.as_object_mut()?.remove("quantization_config")?;
    ModelConfig::from_json(json).ok()
}

/// `config.json`, where the model has one.
fn raw_config(contents: &Contents) -> Option<serde_json::Value> {
    match contents.files.format {
        Format::Safetensors | Format::Torch => {
            read_json(&contents.files.dir.join("config.json")).ok().flatten()
        }
        Format::Meta | Format::Gguf => None,
    }
}

/// What the files call their family.
fn family(contents: &Contents) -> Option<String> {
    if let Some(metadata) = &contents.metadata {
        return metadata.str("general.architecture").map(str::to_owned);
    }
    raw_config(contents)?.get("model_type")?.as_str().map(str::to_owned)
}

fn weight_files(contents: &Contents) -> Result<Vec<FileInfo>> {
    let info = |(i, path): (usize, &PathBuf)| {
        let meta = std::fs::metadata(path).map_err(|error| Error::io(path, error))?;
        Ok(FileInfo { file: file_name(contents, i), bytes: meta.len() })
    };
    contents.files.weights.iter().enumerate().map(info).collect()
}

fn file_name(contents: &Contents, file: usize) -> String {
    let name = contents.files.weights.get(file).and_then(|path| path.file_name());
    name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn dtypes(contents: &Contents) -> Vec<DtypeShare> {
    let mut by_name: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for (_, tensor) in contents.tensors.iter() {
        let (tensors, values) = by_name.entry(tensor.dtype.name()).or_default();
        *tensors += 1;
        *values += tensor.len() as u64;
    }
    let all: u64 = by_name.values().map(|(_, values)| values).sum();
    let share = |(dtype, (tensors, values)): (&str, (usize, u64))| DtypeShare {
        dtype: dtype.to_owned(),
        tensors,
        values,
        share: values as f64 / all.max(1) as f64,
    };
    let mut shares: Vec<DtypeShare> = by_name.into_iter().map(share).collect();
    shares.sort_by_key(|share| std::cmp::Reverse(share.values));
    shares
}

/// The method that `quantization_config` names, or the commonest type of blocks.
fn quantization(contents: &Contents) -> Option<String> {
    if let Some(config) = raw_config(contents)
        .and_then(|mut c| c.get_mut("quantization_config").map(serde_json::Value::take))
    {
        let method = config.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unnamed");
        let bits = config.get("bits").and_then(serde_json::Value::as_u64);
        return Some(
            bits.map_or_else(|| method.to_owned(), |bits| format!("{method}, {bits} bits")),
        );
    }
    let is_quantized = |dtype: &StoredDtype| matches!(dtype, StoredDtype::Quant(_));
    let names: Vec<&str> = contents
        .tensors
        .iter()
        .filter(|(_, t)| is_quantized(&t.dtype))
        .map(|(_, t)| t.dtype.name())
        .collect();
    dtypes(contents).into_iter().map(|share| share.dtype).find(|d| names.contains(&d.as_str()))
}

fn tokenizer_info(
    tokenizer: &Tokenizer,
    contents: &Contents,
    given: Option<&Path>,
) -> Result<TokenizerInfo> {
    let token = |id: u32| Token { id, token: tokenizer.id_to_token(id) };
    Ok(TokenizerInfo {
        kind: tokenizer_kind(contents, given),
        vocab_size: tokenizer.vocab_size(),
        chat_template: load::chat_template(contents, given, 0)?.is_some(),
        eos: tokenizer.eos_token_ids().iter().map(|id| token(*id)).collect(),
        bos: tokenizer.bos_token_id().map(token),
    })
}

/// The algorithm and the file.
fn tokenizer_kind(contents: &Contents, given: Option<&Path>) -> String {
    #[derive(Deserialize)]
    struct Json {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        #[serde(rename = "type")]
        kind: Option<String>,
    }
    let of_gguf = contents.metadata.as_ref().and_then(|m| m.str("tokenizer.ggml.model"));
    if let (None, Some(kind)) = (given, of_gguf) {
        return format!("{kind} (GGUF)");
    }
    let place = given.unwrap_or(&contents.files.dir);
    let candidates = match place.is_dir() {
        true => ["tokenizer.json", "tokenizer.model"].map(|name| place.join(name)).to_vec(),
        false => vec![place.to_owned()],
    };
    let Some((path, bytes)) =
        candidates.iter().find_map(|path| Some((path, std::fs::read(path).ok()?)))
    else {
        return "unknown".to_owned();
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let kind = match serde_json::from_slice::<Json>(&bytes) {
        Ok(json) => json.model.kind.unwrap_or_else(|| "BPE".to_owned()),
        // The first field of SentencePiece's message is a list of pieces.
        Err(_) if bytes.first() == Some(&0x0a) => "SentencePiece".to_owned(),
        Err(_) => "tiktoken".to_owned(),
    };
    format!("{kind} ({name})")
}

fn memory(config: &ModelConfig, contents: &Contents) -> Vec<RankMemory> {
    let sizes = 1..=config.num_attention_heads;
    let works = |size: &usize| config.can_split(*size);
    let kv = |size, sequences| footprint::kv_cache(config, size, config.max_context(), sequences);
    let of_size = |size| RankMemory {
        tensor_parallel: size,
        weight_bytes: footprint::weights(config, &contents.tensors, None, size).bytes,
        kv_sequence_bytes: kv(size, 1),
        kv_batch_bytes: kv(size, BatchLimits::ON_CPU.sequences),
    };
    sizes.filter(works).map(of_size).collect()
}

fn tensors(contents: &Contents) -> Vec<TensorInfo> {
    let info = |(name, tensor): (&str, &crate::model::checkpoint::Tensor)| {
        let files = tensor.files();
        let first = files.first().map(|file| file_name(contents, *file)).unwrap_or_default();
        let others = files.len().saturating_sub(1);
        TensorInfo {
            name: name.to_owned(),
            shape: tensor.shape.clone(),
            dtype: tensor.dtype.name().to_owned(),
            bytes: tensor.bytes(),
            file: if others == 0 { first } else { format!("{first} and {others} more") },
        }
    };
    let mut tensors: Vec<TensorInfo> = contents.tensors.iter().map(info).collect();
    tensors.sort_by_cached_key(|tensor| by_numbers(&tensor.name));
    tensors
}

/// Layer 2 comes before layer 10: words and numbers in turn.
fn by_numbers(name: &str) -> Vec<(String, u64)> {
    let parts = name.split('.').map(|part| match part.parse() {
        Ok(number) => (String::new(), number),
        Err(_) => (part.to_owned(), 0),
    });
    parts.collect()
}

#[cfg(test)]
mod tests;
