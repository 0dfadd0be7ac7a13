//! Checkpoints: named tensors in files, whatever the format.
//!
//! A reader of a format turns a mapped file into a table of [`StoredTensor`]s; what is done
//! with them (a rank's slice, conversion, quantization) is the same for all: [`TensorTable`].
//!
//! The configuration comes with the checkpoint, since GGUF keeps it in the same file and
//! Meta's form in a file of its own; all take HF's form on the way (see
//! [`super::families`]).

mod files;
pub mod gguf;
mod gguf_model;
pub mod meta;
mod safetensors;
mod table;
pub mod torch;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

pub use files::{Format, ModelFiles};
use table::MappedFile;
pub use table::TensorTable;

use super::config::ModelConfig;
use super::names::META;
use crate::kernels::quant::QuantType;
use crate::{Error, Result};

/// What stored values are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredDtype {
    /// 32-bit floats.
    F32,
    /// IEEE halves.
    F16,
    /// bfloat16.
    Bf16,
    /// ggml's blocks.
    Quant(QuantType),
    /// Something that no weight may be (integers, f64, FP8 …), by its name in the file.
    Other(String),
}

impl StoredDtype {
    /// The name that people know.
    pub fn name(&self) -> &str {
        match self {
            StoredDtype::F32 => "f32",
            StoredDtype::F16 => "f16",
            StoredDtype::Bf16 => "bf16",
            StoredDtype::Quant(quant) => quant.name(),
            StoredDtype::Other(name) => name,
        }
    }

    /// Values and bytes of the smallest part that can be cut out.
    fn unit(&self) -> Option<(usize, usize)> {
        match self {
            StoredDtype::F32 => Some((1, 4)),
            StoredDtype::F16 | StoredDtype::Bf16 => Some((1, 2)),
            StoredDtype::Quant(quant) => Some((quant.block_len(), quant.block_bytes())),
            StoredDtype::Other(_) => None,
        }
    }
}

/// A tensor in a file: contiguous, row-major, outermost dimension first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name in the file.
    pub name: String,
    /// What the values are.
    pub dtype: StoredDtype,
    /// Lengths, outermost dimension first (as torch and safetensors show them).
    pub shape: Vec<usize>,
    /// Byte offset of the first value in the file; the reader has checked that the whole
    /// tensor lies inside (except for [`StoredDtype::Other`]).
    pub offset: usize,
}

/// A tensor of the model: stored whole, or (Meta's form) in pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// What the values are.
    pub dtype: StoredDtype,
    /// Lengths, outermost dimension first.
    pub shape: Vec<usize>,
    /// Rectangles of the matrix of all leading dimensions by the last one.
    pub(in crate::model) pieces: Vec<Piece>,
}

/// A contiguous row-major array that fills a rectangle of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Which of the files.
    pub file: usize,
    /// Byte offset of its first value in the file.
    pub offset: usize,
    /// Rows of the tensor.
    pub rows: Range<usize>,
    /// Columns of the tensor.
    pub cols: Range<usize>,
}

impl Tensor {
    fn whole(file: usize, stored: StoredTensor) -> Self {
        let [rows, cols] = matrix_shape(&stored.shape);
        let piece = Piece { file, offset: stored.offset, rows: 0..rows, cols: 0..cols };
        Self { dtype: stored.dtype, shape: stored.shape, pieces: vec![piece] }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> Option<u64> {
        let (unit_len, unit_bytes) = self.dtype.unit()?;
        Some((self.len() / unit_len * unit_bytes) as u64)
    }
}

/// All leading dimensions by the last one; a vector is one row.
fn matrix_shape(shape: &[usize]) -> [usize; 2] {
    match shape {
        [] => [1, 1],
        [leading @ .., cols] => [leading.iter().product(), *cols],
    }
}

/// A model's files, the table of their tensors, and its configuration.
pub struct Checkpoint {
    files: ModelFiles,
    table: TensorTable,
    config: ModelConfig,
    metadata: Option<gguf::Metadata>,
}

impl Checkpoint {
    /// Opens the model at `model`, a directory or a GGUF file: reads its headers and its
    /// configuration.
    ///
    /// # Errors
    /// Input errors that name the file: no weights, a shard missing, a damaged header, a
    /// file shorter than its header says, a configuration that is not supported.
    pub fn open(model: &Path) -> Result<Self> {
        let files = ModelFiles::find(model)?;
        let mapped = MappedFile::open_all(&files.weights)?;
        match files.format {
            Format::Safetensors => Self::of_tables(files, mapped, safetensors::read),
            Format::Torch => Self::of_tables(files, mapped, torch::read),
            Format::Meta => Self::of_meta(files, mapped),
            Format::Gguf => Self::of_gguf(files, mapped),
        }
    }

    /// HF's form: tensors in files, the configuration beside them.
    fn of_tables(
        files: ModelFiles,
        mapped: Vec<MappedFile>,
        read: impl Fn(&[u8]) -> Result<Vec<StoredTensor>>,
    ) -> Result<Self> {
        let mut tensors = HashMap::new();
        for (i, file) in mapped.iter().enumerate() {
            let table = file.read(&read)?.into_iter();
            tensors.extend(table.map(|t| (language_model_name(&t.name), Tensor::whole(i, t))));
        }
        let config = ModelConfig::from_dir(&files.dir)?;
        Ok(Self { files, table: TensorTable::new(mapped, tensors), config, metadata: None })
    }

    /// Meta's form: each matrix is cut over the files.
    fn of_meta(files: ModelFiles, mapped: Vec<MappedFile>) -> Result<Self> {
        let path = files.dir.join("params.json");
        let bad = |e: &dyn std::fmt::Display| Error::input(format!("{}: {e}", path.display()));
        let text = std::fs::read(&path).map_err(|e| bad(&e))?;
        let params = serde_json::from_slice(&text).map_err(|e| bad(&e))?;
        let tables = mapped.iter().map(|file| file.read(torch::read)).collect::<Result<_>>()?;
        let merged = meta::merge(tables, &params).map_err(|e| e.context(files.dir.display()))?;
        let tensors: HashMap<String, Tensor> = merged
            .into_iter()
            .map(|m| (m.name, Tensor { dtype: m.dtype, shape: m.shape, pieces: m.pieces }))
            .collect();
        let shapes = |name: &str| tensors.get(name).map(|t| t.shape.clone());
        let config = meta::hf_config(&params, shapes, None)
            .and_then(ModelConfig::from_json)
            .map_err(|e| e.context(path.display()))?;
        let config = ModelConfig { names: META, ..config.with_interleaved_pairs() };
        Ok(Self { files, table: TensorTable::new(mapped, tensors), config, metadata: None })
    }

    /// GGUF: everything is in the file, or in the parts of a split one.
    fn of_gguf(files: ModelFiles, mapped: Vec<MappedFile>) -> Result<Self> {
        let first = files.weights.first().map(|p| p.display().to_string()).unwrap_or_default();
        let parts = mapped.iter().map(|file| file.read(gguf::read)).collect::<Result<_>>()?;
        let gguf::Merged { metadata, tensors } =
            gguf::merge(parts).map_err(|e| e.context(&first))?;
        let tensors = tensors.into_iter().map(|(i, t)| (t.name.clone(), Tensor::whole(i, t)));
        let table = TensorTable::new(mapped, tensors.collect());
        let config = gguf_model::config(&metadata, &table).map_err(|e| e.context(&first))?;
        Ok(Self { files, table, config, metadata: Some(metadata) })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files that it is in.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// The tensors.
    pub fn tensors(&self) -> &TensorTable {
        &self.table
    }

    /// The metadata of a GGUF file.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.metadata.as_ref()
    }
}

/// Multimodal models keep the language model under a prefix.
fn language_model_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("language_model.") {
        return rest.to_owned();
    }
    match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}"),
        None => name.to_owned(),
    }
}
