//! Checkpoints: named tensors in files, whatever the format.
//!
//! A reader of a format turns a mapped file into a table of [`StoredTensor`]s; what is done
//! with them (a rank's slice, conversion, quantization) is the same for all: [`TensorTable`].
//!
//! The configuration comes with the checkpoint, since GGUF keeps it in the same file and
//! Meta's form in a file of its own; all take HF's form on the way (see
//! [`super::families`]).

mod contents;
mod files;
pub mod gguf;
pub(super) mod gguf_model;
pub mod meta;
mod quantized;
mod safetensors;
mod source;
mod table;
pub mod torch;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

pub use contents::Contents;
pub(crate) use contents::language_model_name;
pub use files::{Format, ModelFiles};
pub use quantized::{QuantizedFile, VERSION as QUANTIZER_VERSION};
pub use source::Source;
pub use table::TensorTable;

use super::config::ModelConfig;
use crate::Result;
use crate::kernels::quant::QuantType;

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

    /// Bytes of a tensor of `shape`, where the type is known.
    pub fn bytes_of(&self, shape: &[usize]) -> Option<u64> {
        let (unit_len, unit_bytes) = self.unit()?;
        let len = shape.iter().fold(1, |len: usize, n| len.saturating_mul(*n));
        Some((len / unit_len).saturating_mul(unit_bytes) as u64)
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
        self.shape.iter().fold(1, |len: usize, n| len.saturating_mul(*n))
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Which of the files it lies in, in order.
    pub fn files(&self) -> BTreeSet<usize> {
        self.pieces.iter().map(|piece| piece.file).collect()
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> Option<u64> {
        self.dtype.bytes_of(&self.shape)
    }
}

/// All leading dimensions by the last one; a vector is one row.
fn matrix_shape(shape: &[usize]) -> [usize; 2] {
    match shape {
        [] => [1, 1],
        [leading @ .., cols] => {
            [leading.iter().fold(1, |rows: usize, n| rows.saturating_mul(*n)), *cols]
        }
    }
}

/// A model's files, the table of their tensors, and its configuration.
pub struct Checkpoint {
    contents: Contents,
    config: ModelConfig,
}

impl Checkpoint {
    /// Opens the model at `model`, a directory or a GGUF file: reads its headers and its
    /// configuration.
    ///
    /// # Errors
    /// Input errors that name the file: no weights, a shard missing, a damaged header, a
    /// file shorter than its header says, a configuration that is not supported.
    pub fn open(model: &Path) -> Result<Self> {
        let contents = Contents::open(model)?;
        let config = contents.config()?;
        Ok(Self { contents, config })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of a weight as it is stored, on average.
    pub fn bytes_a_weight(&self) -> f64 {
        let tensors = || self.tensors().iter().map(|(_, tensor)| tensor);
        let bytes: u64 = tensors().filter_map(Tensor::bytes).sum();
        bytes as f64 / tensors().map(Tensor::len).sum::<usize>().max(1) as f64
    }

    /// What the files hold.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// The files that it is in.
    pub fn files(&self) -> &ModelFiles {
        &self.contents.files
    }

    /// The tensors.
    pub fn tensors(&self) -> &TensorTable {
        &self.contents.tensors
    }

    /// The metadata of a GGUF file.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.contents.metadata.as_ref()
    }
}
