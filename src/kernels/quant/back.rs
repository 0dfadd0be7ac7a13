//! The product of a backward pass with quantized weights: rows are dequantized as
//! they are packed into a task's cache, never the whole matrix.

use super::super::gemm::back::{Left, Panels, Right, product};
use super::super::simd::Simd;
use super::super::{Tier, tier};
use super::QuantMatrix;
use super::format::with_format;
use super::linear::{BUFFER, dequantize};

/// `out[m, cols] (+)= y[m, rows] · w[rows, cols]`, on the rank's threads; the bits of
/// [`gemm::multiply`](crate::kernels::gemm::multiply) over the dequantized rows.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn multiply(y: &[f32], m: usize, w: QuantMatrix<'_>, accumulate: bool, out: &mut [f32]) {
    multiply_in_tier(tier(), y, m, w, accumulate, out);
}

pub(super) fn multiply_in_tier(
    tier: Tier,
    y: &[f32],
    m: usize,
    w: QuantMatrix<'_>,
    accumulate: bool,
    out: &mut [f32],
) {
    w.check();
    // SAFETY: the matrix has its rows and columns (checked above).
    unsafe { product(tier, Left::rows_of(y, m, w.rows), &w, w.cols, accumulate, out) };
}

impl Right for QuantMatrix<'_> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(
        &self,
        tier: Tier,
        row: usize,
        first: usize,
        cols: usize,
        panels: Panels,
    ) {
        let (start, len) = (self.skip + first, self.quant.block_len());
        let blocks = start / len..(start + cols).div_ceil(len);
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < blocks.len() * len {
                buffer.resize(blocks.len() * len, 0.0);
            }
            // SAFETY: the row has these columns, so these blocks too; the buffer holds them.
            unsafe {
                let from = row * self.stride + blocks.start * self.quant.block_bytes();
                with_format!(self.quant, F => dequantize::<F>(
                    tier,
                    self.data.as_ptr().add(from),
                    blocks.len(),
                    buffer.as_mut_ptr(),
                ));
                panels.pack::<S, f32>(buffer.as_ptr().add(start - blocks.start * len), cols);
            }
        });
    }
}
