//! Activations rounded to 8 bits, by blocks as long as the weights'.

use std::cell::Cell;

use super::super::super::parallel::{self, SharedMut};
use super::super::super::simd::{LANES, Simd};
use super::super::QuantMatrix;
use super::super::format::MAX_LEN;
use super::lanes::Integers;
use super::strip::{Layout, Strip};
use super::{Kernel, Kind, in_kind};

/// Magnitudes below this round to zero: their scale's inverse would not be finite.
const LEAST_SCALE: f32 = 1e-30;
/// Floating-point operations a value, about.
const FLOPS: usize = 8;

/// Rows of activations. Value i of a block is its byte times the block's scale.
#[derive(Default)]
pub(super) struct Activations {
    /// Rows of whole blocks; outside of the matrix' columns zeros.
    pub(super) bytes: Vec<i8>,
    /// What each block of each row has besides, [`words`] each: its scale; then pairs of
    /// its groups' sums in 16 bits, or without groups what the product begins with:
    /// minus the zero point times the sum, or the sum times the scale as a float.
    pub(super) blocks: Vec<i32>,
}

/// Words that a block has in [`Activations::blocks`].
pub(super) const fn words<L: Layout>() -> usize {
    if L::GROUPS == 0 { 2 } else { 1 + L::GROUPS / 2 }
}

thread_local! {
    static ACTIVATIONS: Cell<Activations> = Cell::default();
}

impl Activations {
    /// Calls `work` with the `m` rows of `x`, inputs of `w`, rounded.
    pub(super) fn with<F: Strip>(
        kind: Kind,
        x: &[f32],
        m: usize,
        w: &QuantMatrix<'_>,
        work: impl FnOnce(&Self),
    ) {
        // Taken, not borrowed: a thread that waits for others may begin another product.
        let mut all = ACTIVATIONS.take();
        let (cols, blocks) = (w.cols, w.row_blocks());
        let (row_bytes, row_words) = (blocks * F::LEN, blocks * words::<F::L>());
        all.bytes.resize(all.bytes.len().max(m * row_bytes), 0);
        all.blocks.resize(all.blocks.len().max(m * row_words), 0);
        let (bytes, words) = (SharedMut::new(&mut all.bytes), SharedMut::new(&mut all.blocks));
        parallel::for_each(m, FLOPS * m * cols, |row| {
            let x = &x[row * cols..][..cols];
            // SAFETY: row by row, inside of what was resized.
            let (bytes, blocks) =
                unsafe { (bytes.get().add(row * row_bytes), words.get().add(row * row_words)) };
            let row = Row::<F> { x, skip: w.skip, bytes, blocks, format: std::marker::PhantomData };
            // SAFETY: as above.
            unsafe { in_kind(kind, row) };
        });
        work(&all);
        ACTIVATIONS.set(all);
    }
}

struct Row<'a, F> {
    x: &'a [f32],
    skip: usize,
    bytes: *mut i8,
    blocks: *mut i32,
    format: std::marker::PhantomData<F>,
}

impl<F: Strip> Kernel for Row<'_, F> {
    #[inline(always)]
    unsafe fn run<T: Integers, const M: usize>(self) {
        let mut padded = [0.0; MAX_LEN];
        for b in 0..(self.skip + self.x.len()).div_ceil(F::LEN) {
            let (start, end) = ((b * F::LEN).max(self.skip), (b + 1) * F::LEN);
            let values = &self.x[start - self.skip..self.x.len().min(end - self.skip)];
            let values = if values.len() == F::LEN {
                values.as_ptr()
            } else {
                padded.fill(0.0);
                padded[start - b * F::LEN..][..values.len()].copy_from_slice(values);
                padded.as_ptr()
            };
            // SAFETY: a block of values; the row has this block.
            unsafe {
                let blocks = self.blocks.add(b * words::<F::L>());
                block::<T, F>(values, self.bytes.add(b * F::LEN), blocks);
            }
        }
    }
}

#[inline(always)]
unsafe fn block<T: Integers, F: Strip>(x: *const f32, bytes: *mut i8, words: *mut i32) {
    // SAFETY: the caller's.
    unsafe {
        let (mut largest, mut not_finite) = (T::S::splat(0.0), T::S::splat(0.0));
        for v in 0..F::LEN / LANES {
            let x = T::S::load(x.add(v * LANES));
            largest = T::S::max(largest, T::S::max(x, T::S::sub(T::S::splat(0.0), x)));
            // Zero, or NaN from an infinity or a NaN.
            not_finite = T::S::fma(x, T::S::splat(0.0), not_finite);
        }
        let mut lanes = [0.0; LANES];
        T::S::store(lanes.as_mut_ptr(), largest);
        let scale = lanes.into_iter().fold(0f32, f32::max) / 127.0;
        let (scale, inverse) = if scale >= LEAST_SCALE { (scale, 1.0 / scale) } else { (0.0, 0.0) };
        // A block that is not finite makes NaN of all it meets.
        let scale = scale + T::S::sum(not_finite);
        for v in 0..F::LEN / LANES {
            let x = T::S::mul(T::S::load(x.add(v * LANES)), T::S::splat(inverse));
            T::store_bytes(bytes.add(v * LANES), T::S::round(x));
        }
        words.write(scale.to_bits() as i32);
        let groups = if F::L::GROUPS == 0 { 1 } else { F::L::GROUPS };
        let len = F::LEN / groups;
        let mut sums = [0i32; 16];
        for g in 0..groups {
            let group = std::slice::from_raw_parts(bytes.add(g * len), len);
            sums[g] = group.iter().map(|x| i32::from(*x)).sum();
        }
        if F::L::GROUPS > 0 {
            for g in 0..groups / 2 {
                words.add(1 + g).write(sums[2 * g] & 0xffff | sums[2 * g + 1] << 16);
            }
        } else if F::L::MIN {
            words.add(1).write((sums[0] as f32 * scale).to_bits() as i32);
        } else {
            words.add(1).write(-F::ZERO * sums[0]);
        }
    }
}
