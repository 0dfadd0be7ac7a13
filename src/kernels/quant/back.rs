//! The product of a backward pass with quantized weights: rows are dequantized as
//! they are packed into a task's cache, never the whole matrix.

use super::super::gemm::LINE_BYTES;
use super::super::gemm::back::{AHEAD, Left, Panels, Right, SCRATCH, product};
use super::super::simd::Simd;
use super::super::{Tier, tier};
use super::QuantMatrix;
use super::format::{MAX_LEN, with_format};
use super::linear::dequantize;

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
        scratch: *mut f32,
    ) {
        const { assert!(2 * MAX_LEN <= SCRATCH) };
        let (start, len) = (self.skip + first, self.quant.block_len());
        let blocks = start / len..(start + cols).div_ceil(len);
        // SAFETY: the row has these columns, so these blocks too; the scratch holds them.
        unsafe {
            let from = row * self.stride + blocks.start * self.quant.block_bytes();
            let from = self.data.as_ptr().add(from);
            let next = from.wrapping_add(AHEAD * self.stride);
            for at in (0..blocks.len() * self.quant.block_bytes()).step_by(LINE_BYTES) {
                S::prefetch(next.wrapping_add(at));
            }
            with_format!(self.quant, F => dequantize::<F>(tier, from, blocks.len(), scratch));
            panels.pack::<S, f32>(scratch.add(start - blocks.start * len), cols);
        }
    }
}
