//! Block-quantized weights as GGUF files hold them (ggml's types), used as they are.
//!
//! A row is a whole number of blocks. Formats and their arithmetic: ggml's
//! ggml-common.h and ggml-quants.c. A value is dequantized to the bits that ggml
//! gives it, and [`linear`] takes it from there as an f32 weight: its result has
//! the bits of [`gemm`](super::gemm) on the dequantized rows. [`int8`] rounds the
//! activations, as llama.cpp does, and multiplies integers.
//!
//! Left out: the types with codebooks (iq*) and importance matrices.

mod back;
mod format;
pub mod int8;
mod linear;
mod quantize;

pub use back::multiply;
pub use linear::linear;
pub use quantize::quantize_rows;

use super::{Tier, tier};
use format::with_format;

/// A type of block-quantized values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the field")]
pub enum QuantType {
    /// 32 values: f16 scale, 4 bits each, symmetric.
    Q4_0,
    /// 32 values: f16 scale and minimum, 4 bits each.
    Q4_1,
    /// 32 values: f16 scale, 5 bits each, symmetric.
    Q5_0,
    /// 32 values: f16 scale and minimum, 5 bits each.
    Q5_1,
    /// 32 values: f16 scale, 8 bits each.
    Q8_0,
    /// 256 values in 16 groups, 2 bits each.
    Q2_K,
    /// 256 values in 16 groups, 3 bits each.
    Q3_K,
    /// 256 values in 8 groups, 4 bits each.
    Q4_K,
    /// 256 values in 8 groups, 5 bits each.
    Q5_K,
    /// 256 values in 16 groups, 6 bits each.
    Q6_K,
}

use QuantType::*;

impl QuantType {
    /// All types.
    pub const ALL: [QuantType; 10] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K];

    /// The type with ggml's number `id` (`enum ggml_type`).
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Some(match id {
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            10 => Q2_K,
            11 => Q3_K,
            12 => Q4_K,
            13 => Q5_K,
            14 => Q6_K,
            _ => return None,
        })
    }

    /// ggml's number of the type.
    pub fn ggml_id(self) -> u32 {
        match self {
            Q4_0 => 2,
            Q4_1 => 3,
            Q5_0 => 6,
            Q5_1 => 7,
            Q8_0 => 8,
            Q2_K => 10,
            Q3_K => 11,
            Q4_K => 12,
            Q5_K => 13,
            Q6_K => 14,
        }
    }

    /// The name that `--quantize` takes and logs show.
    pub fn name(self) -> &'static str {
        match self {
            Q4_0 => "q4_0",
            Q4_1 => "q4_1",
            Q5_0 => "q5_0",
            Q5_1 => "q5_1",
            Q8_0 => "q8_0",
            Q2_K => "q2_k",
            Q3_K => "q3_k",
            Q4_K => "q4_k",
            Q5_K => "q5_k",
            Q6_K => "q6_k",
        }
    }

    /// Values of a block.
    pub fn block_len(self) -> usize {
        match self {
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => 32,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Q4_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Bytes of a row of `cols` values, a whole number of blocks.
    pub fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_len() * self.block_bytes()
    }
}

/// A borrowed quantized weight matrix `[rows, cols]`.
///
/// A row may be a cut of a longer stored row: `data` then starts at the first block
/// that the cut touches, and `skip` values of it belong to the cut's left neighbour.
#[derive(Clone, Copy)]
pub struct QuantMatrix<'a> {
    /// The blocks, at any alignment.
    pub data: &'a [u8],
    /// Their type.
    pub quant: QuantType,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Values of each row's first block that come before its column 0; less than a block.
    pub skip: usize,
    /// Bytes between the starts of two rows.
    pub stride: usize,
}

impl QuantMatrix<'_> {
    /// Blocks that a row touches.
    fn row_blocks(&self) -> usize {
        if self.cols == 0 { 0 } else { (self.skip + self.cols).div_ceil(self.quant.block_len()) }
    }

    /// Panics unless every row lies inside `data`.
    fn check(&self) {
        assert!(self.skip < self.quant.block_len());
        let row = self.row_blocks() * self.quant.block_bytes();
        assert!(self.stride >= row);
        let last = self.rows.saturating_sub(1).checked_mul(self.stride);
        let end = last.and_then(|last| last.checked_add(row));
        assert!(self.rows == 0 || end.is_some_and(|end| end <= self.data.len()));
    }
}

/// Dequantizes whole blocks: `out` gets their values, bit for bit as ggml's
/// `dequantize_row_*` (a NaN's payload aside).
///
/// # Panics
/// If `out` is not a whole number of blocks, or `blocks` not as many.
pub fn dequantize_row(quant: QuantType, blocks: &[u8], out: &mut [f32]) {
    dequantize_in_tier(tier(), quant, blocks, out);
}

fn dequantize_in_tier(tier: Tier, quant: QuantType, blocks: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % quant.block_len(), 0);
    assert_eq!(blocks.len(), quant.row_bytes(out.len()));
    // SAFETY: both hold the same number of whole blocks.
    with_format!(quant, F => unsafe {
        linear::dequantize::<F>(tier, blocks.as_ptr(), out.len() / quant.block_len(), out.as_mut_ptr());
    });
}

/// Dequantizes row `row` of `w` into `out`, `w.cols` values.
///
/// # Panics
/// If the row is not there or the lengths do not fit together (a bug, not bad input).
pub fn read_row(w: QuantMatrix<'_>, row: usize, out: &mut [f32]) {
    w.check();
    assert!(row < w.rows);
    assert_eq!(out.len(), w.cols);
    let (len, bytes) = (w.quant.block_len(), w.quant.block_bytes());
    let blocks = &w.data[row * w.stride..][..w.row_blocks() * bytes];
    let mut values = [0.0; format::MAX_LEN];
    let values = &mut values[..len];
    let (mut done, mut from) = (0, w.skip);
    for block in blocks.chunks_exact(bytes) {
        dequantize_row(w.quant, block, values);
        let n = (len - from).min(w.cols - done);
        out[done..done + n].copy_from_slice(&values[from..from + n]);
        (done, from) = (done + n, 0);
    }
}

#[cfg(test)]
mod tests;
