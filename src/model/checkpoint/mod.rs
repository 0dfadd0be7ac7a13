//! Checkpoints: named tensors in files, whatever the format.
//!
//! A reader of a format turns a mapped file into a table of [`StoredTensor`]s; what is done
//! with them (slices for a rank, conversion, quantization) is the same for all.

pub mod gguf;
pub mod meta;
pub mod torch;

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
