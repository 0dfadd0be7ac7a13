//! LoRA adapters (Hu et al. 2021) beside a model at inference: low-rank products that are
//! added to the outputs of its linear layers, for the rows of a step that ask for them.
//!
//! ```text
//! y = W x + bias + s · B (A x)                         A [r, in]   B [out, r]
//! y = m / ‖W + s · B A‖ · (W x + s · B (A x)) + bias    DoRA (Liu et al. 2024), by row
//! ```
//!
//! [`Adapter::open`] reads PEFT's directories (`peft.rs`) and llama.cpp's files (`gguf.rs`)
//! and checks every tensor against the model, whatever the model's own form; [`Deltas`] are
//! a rank's share of them at one layer. A tensor-parallel rank has B's rows where it has the
//! layer's rows, and A's columns where it has the layer's columns; the latter's products are
//! added before the ranks' sum. [`mod@write`] writes the adapters that training makes.
//!
//! Left out: adapters of norms and biases, several adapters on one row, and staging (every
//! rank maps the files where they lie).

mod delta;
mod gguf;
pub mod merge;
pub mod modules;
mod peft;
mod rows;
mod slots;
pub mod write;
pub mod write_gguf;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use delta::{Deltas, EmbeddingDeltas, Layer};
pub use rows::{AdapterRows, RowAdapters};

use super::checkpoint::TensorTable;
use super::config::{ModelConfig, Positions};
use super::names::{Names, Place};
use crate::{Error, Result};
use modules::Shape;

/// An adapter as the command line names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSource {
    /// What records call it.
    pub name: String,
    /// A PEFT directory or a GGUF file.
    pub path: PathBuf,
}

impl AdapterSource {
    /// Reads `[NAME=]PATH`. Without a name it is the directory's, or the file's without its
    /// ending; what comes before a `=` and holds a `/` is part of the path.
    ///
    /// # Errors
    /// The name or the path is empty, or the path has no name.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let split = bytes.iter().position(|b| *b == b'=');
        let named = split.map(|at| (&bytes[..at], OsStr::from_bytes(&bytes[at + 1..])));
        let (name, path) = match named.filter(|(name, _)| !name.contains(&b'/')) {
            Some((name, path)) => (Some(name), Path::new(path)),
            None => (None, Path::new(text)),
        };
        if path.as_os_str().is_empty() {
            return Err("must be NAME=PATH or PATH".into());
        }
        let name = match name {
            Some(name) => std::str::from_utf8(name).map_err(|_| "the name is not UTF-8")?.into(),
            None => own_name(path).ok_or("has no name of its own; give NAME=PATH")?,
        };
        if name.is_empty() {
            return Err("the name before = is empty".into());
        }
        Ok(Self { name, path: path.to_owned() })
    }

    /// The text that [`AdapterSource::parse`] reads as this; the path must be absolute.
    pub fn word(&self) -> OsString {
        let mut word = OsString::new();
        if own_name(&self.path).as_ref() != Some(&self.name) {
            word.push(&self.name);
            word.push("=");
        }
        word.push(&self.path);
        word
    }
}

fn own_name(path: &Path) -> Option<String> {
    let is_file = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let name = if is_file { path.file_stem() } else { path.file_name() };
    Some(name?.to_string_lossy().into_owned())
}

/// An open adapter that fits a model.
pub struct Adapter {
    source: AdapterSource,
    table: TensorTable,
    /// Where it keeps the model's modules.
    names: Names,
    /// Rows of queries and keys lie in another order than the model's.
    reorder: Option<Reorder>,
    /// By the module's name in the adapter.
    modules: BTreeMap<String, Module>,
}

/// What must be done to rows of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reorder {
    /// The adapter has a head's halves one after the other, the model their rows in turn.
    Interleave,
    /// The other way round.
    Separate,
}

impl Reorder {
    /// `rows`, which are whole heads of width `d`, in the other order.
    fn apply(self, rows: &[usize], d: usize) -> Vec<usize> {
        let half = d / 2;
        let from = |at: usize| match self {
            Reorder::Interleave => at % 2 * half + at / 2,
            Reorder::Separate => at % half * 2 + at / half,
        };
        let heads = rows.chunks_exact(d);
        heads.flat_map(|head| (0..d).map(move |at| head[from(at)])).collect()
    }
}

/// What an adapter holds for one module: full names of tensors.
#[derive(Debug, Clone, Default, PartialEq)]
struct Module {
    /// A low-rank product is added.
    low_rank: Option<LowRankTensors>,
    /// The module's matrix is replaced as a whole.
    replaced: Option<String>,
    shape: Shape,
}

#[derive(Debug, Clone, PartialEq)]
struct LowRankTensors {
    a: String,
    b: String,
    rank: usize,
    scale: f32,
    /// DoRA's magnitudes.
    magnitude: Option<String>,
    /// The embedding's A has a row a token, not a column (GGUF).
    a_by_token: bool,
}

/// What a format's reader finds in an adapter.
struct Contents {
    table: TensorTable,
    names: Names,
    /// Queries and keys as Meta and llama.cpp order them.
    interleaved: bool,
    modules: BTreeMap<String, Module>,
}

impl Adapter {
    /// Opens an adapter of the model `base` and checks that all of it fits.
    ///
    /// # Errors
    /// Input errors that name the file and the tensor or setting: not an adapter, one of
    /// another kind than LoRA, a setting that farm does not compute, a tensor that is missing
    /// or that belongs to no module of this model, or one of another shape.
    pub fn open(source: &AdapterSource, base: &ModelConfig) -> Result<Self> {
        let path = &source.path;
        let meta = std::fs::metadata(path)
            .map_err(|error| Error::input(format!("--adapter {}: {error}", path.display())))?;
        let contents = match meta.is_dir() {
            true => peft::open(path, base),
            false => gguf::open(path, base),
        }
        .map_err(|error| error.context(format_args!("adapter {}", source.name)))?;
        let Contents { table, names, interleaved, modules } = contents;
        let reorder = match (interleaved, is_interleaved(base)) {
            (false, true) => Some(Reorder::Interleave),
            (true, false) => Some(Reorder::Separate),
            _ => None,
        };
        Ok(Self { source: source.clone(), table, names, reorder, modules })
    }

    /// Opens the adapters of a run.
    ///
    /// # Errors
    /// See [`Adapter::open`]; two of one name.
    pub fn open_all(sources: &[AdapterSource], base: &ModelConfig) -> Result<Vec<Self>> {
        for (i, source) in sources.iter().enumerate() {
            if sources[..i].iter().any(|earlier| earlier.name == source.name) {
                let name = &source.name;
                return Err(Error::input(format!(
                    "--adapter: two are called {name}; name one of them, as other={}",
                    source.path.display()
                )));
            }
        }
        sources.iter().map(|source| Self::open(source, base)).collect()
    }

    /// What records call it.
    pub fn name(&self) -> &str {
        &self.source.name
    }

    /// Memory that a rank may need for it: its tensors, and once more, widened, what an
    /// embedding's A is turned into.
    pub fn memory_bytes(&self) -> u64 {
        let stored: u64 = self.table.iter().filter_map(|(_, tensor)| tensor.bytes()).sum();
        let embedding = self.module(self.names.embed_tokens);
        let by_token = embedding.and_then(|module| {
            Some(module.shape.rows as u64 * module.low_rank.as_ref()?.rank as u64 * 4)
        });
        stored + by_token.unwrap_or(0)
    }

    /// What it changes, for people.
    pub fn summary(&self) -> String {
        let low_rank: Vec<_> = self.modules.values().filter_map(|m| m.low_rank.as_ref()).collect();
        let ranks = || low_rank.iter().map(|tensors| tensors.rank);
        let dora = if low_rank.iter().any(|t| t.magnitude.is_some()) { " (DoRA)" } else { "" };
        let replaced = self.modules.values().filter(|m| m.replaced.is_some()).count();
        format!(
            "{} modules of rank {} to {}{dora}, {replaced} replaced as a whole",
            low_rank.len(),
            ranks().min().unwrap_or(0),
            ranks().max().unwrap_or(0)
        )
    }

    fn module(&self, name: &str) -> Option<&Module> {
        self.modules.get(name)
    }

    /// The rows of `place`, which are heads of width `head_dim` where they are queries or
    /// keys, in the model's order.
    fn in_base_order(&self, place: Place, head_dim: Option<usize>) -> Place {
        let (Some(reorder), Some(d)) = (self.reorder, head_dim) else { return place };
        let rows: Vec<usize> = place.rows.into_iter().flatten().collect();
        let rows = reorder.apply(&rows, d).into_iter().map(|row| row..row + 1);
        Place { rows: rows.collect(), ..place }
    }
}

/// Where rows of queries or keys of this model, in its order, lie in Hugging Face's form:
/// `rows` are those rows there, whole heads of width `head_dim`, in that form's order.
pub fn rotated_rows_in_hf(base: &ModelConfig, rows: &[usize], head_dim: usize) -> Vec<usize> {
    match is_interleaved(base) {
        true => Reorder::Interleave.apply(rows, head_dim),
        false => rows.to_vec(),
    }
}

fn is_interleaved(config: &ModelConfig) -> bool {
    matches!(&config.positions, Positions::Rotary { global, .. } if global.interleaved)
}

/// The linear layers of a model and its output projection, by their names in Hugging Face's
/// form: `[rows, columns]` of each.
pub fn linear_modules(config: &ModelConfig) -> BTreeMap<String, [usize; 2]> {
    let all = modules::modules(config, &config.hf_names).into_iter();
    let linear = all.filter(|(_, shape)| shape.role != modules::Role::Embedding);
    linear.map(|(name, shape)| (name, [shape.rows, shape.cols])).collect()
}

/// What tells one set of adapters from another, in whatever order they are given: by their
/// names, a hash of their files' bytes; null where there are none.
///
/// # Errors
/// A file that cannot be read.
pub fn identity(sources: &[AdapterSource]) -> Result<Value> {
    if sources.is_empty() {
        return Ok(Value::Null);
    }
    let mut sources: Vec<&AdapterSource> = sources.iter().collect();
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hashes = Map::new();
    for source in sources {
        let files = match source.path.is_dir() {
            true => peft::files(&source.path)?.to_vec(),
            false => vec![source.path.clone()],
        };
        let mut hasher = blake3::Hasher::new();
        for path in files {
            let unreadable = |e| Error::input(format!("{}: {e}", path.display()));
            let mut file = std::fs::File::open(&path).map_err(unreadable)?;
            let mut of_file = blake3::Hasher::new();
            std::io::copy(&mut file, &mut of_file).map_err(unreadable)?;
            hasher.update(of_file.finalize().as_bytes());
        }
        let hash = hasher.finalize().to_hex()[..16].to_owned();
        hashes.insert(source.name.clone(), hash.into());
    }
    Ok(Value::Object(hashes))
}
