//! Products of quantized weights with activations rounded to 8 bits, in integers.
//!
//! Activations have a scale for each block of weights: 32 values, or 256 of the k types,
//! as in llama.cpp. Inside a block everything is exact: products of bytes, times the
//! groups' scales, minus what zero points and minimums take off, all in 32 bits. A block
//! then adds to the output's f32 by one fused multiply-add (two with minimums), in the order
//! of the blocks. So an output has the same bits in every tier and beside any others.
//!
//! Weights are taken apart sixteen rows at a time, a row a lane (`strip`), into bytes that stay
//! in the caches, for as many activations as there are. For one activation, rows of some
//! types are read along themselves instead (`rows`, in AVX-512 with VNNI), to the same bits.

#![allow(clippy::needless_range_loop, reason = "loops over several arrays at once")]

mod activations;
mod dot;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod rows;
mod strip;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::marker::PhantomData;

use super::super::gemm;
use super::super::parallel::{self, SharedMut};
use super::super::simd::{LANES, Scalar};
use super::super::{Tier, tier};
use super::QuantMatrix;
use super::format::with_format;
use activations::{Activations, words};
use dot::{Dot, Rows};
use lanes::Integers;
use strip::{Layout, Strip};
#[cfg(target_arch = "x86_64")]
use {super::super::simd::Avx2, x86::Integers512};

/// Quantized bytes that one task streams.
const TASK_BYTES: usize = 64 << 10;
/// Values of a row that are taken apart at once for few activations: they stay in the
/// first-level cache.
const NEAR_VALUES: usize = 256;
/// As [`NEAR_VALUES`] for many activations: the second-level cache.
const FAR_VALUES: usize = 8192;

/// `out[m, rows] = x[m, cols] · wᵀ + bias` with `x` rounded to 8 bits, on the rank's threads.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn linear(x: &[f32], m: usize, w: QuantMatrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    linear_of_kind(Kind::of(tier()), x, m, w, bias, out);
}

/// A tier of integer instructions.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Scalar,
    Avx2,
    Avx512,
    /// AVX-512 with VNNI.
    Vnni,
}

impl Kind {
    fn of(tier: Tier) -> Self {
        match tier {
            Tier::Scalar => Kind::Scalar,
            Tier::Avx2 => Kind::Avx2,
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 if is_x86_feature_detected!("avx512vnni") => Kind::Vnni,
            Tier::Avx512 => Kind::Avx512,
        }
    }
}

/// Work compiled once for each kind; `M` is how many rows of activations its registers hold.
trait Kernel {
    /// # Safety
    /// The CPU features of `T`, and what the kernel itself asks for.
    unsafe fn run<T: Integers, const M: usize>(self);
}

/// # Safety
/// What the kernel asks for; `kind` was detected.
unsafe fn in_kind<K: Kernel>(kind: Kind, kernel: K) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn vnni<K: Kernel>(kernel: K) {
        // SAFETY: the features are on.
        unsafe { kernel.run::<Integers512<true>, 8>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn avx512<K: Kernel>(kernel: K) {
        // SAFETY: the features are on.
        unsafe { kernel.run::<Integers512<false>, 4>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<K: Kernel>(kernel: K) {
        // SAFETY: the features are on.
        unsafe { kernel.run::<Avx2, 2>() }
    }
    match kind {
        // SAFETY: `Kind::of` has seen these instructions.
        #[cfg(target_arch = "x86_64")]
        Kind::Vnni => unsafe { vnni(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2(kernel) },
        // SAFETY: no features needed.
        _ => unsafe { kernel.run::<Scalar, 1>() },
    }
}

fn linear_of_kind(
    kind: Kind,
    x: &[f32],
    m: usize,
    w: QuantMatrix<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    w.check();
    assert_eq!(x.len(), m * w.cols);
    assert_eq!(out.len(), m * w.rows);
    assert!(bias.is_none_or(|b| b.len() == w.rows));
    with_format!(w.quant, F => Activations::with::<F>(kind, x, m, &w, |x| {
        product::<F>(kind, x, m, w, bias, out);
    }));
}

fn product<F: Strip>(
    kind: Kind,
    x: &Activations,
    m: usize,
    w: QuantMatrix<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let row_bytes = w.row_blocks() * size_of::<F::Block>();
    let task_rows = (TASK_BYTES / row_bytes.max(1)).next_multiple_of(LANES).clamp(LANES, 256);
    let row_tasks = w.rows.div_ceil(task_rows);
    let task_m = gemm::activation_rows(m, w.cols, row_tasks);
    let out = SharedMut::new(out);
    parallel::for_each(row_tasks * m.div_ceil(task_m), 2 * m * w.rows * w.cols, |task| {
        let (start, first) = (task / row_tasks * task_m, task % row_tasks * task_rows);
        let m = task_m.min(m - start);
        for row in (first..w.rows.min(first + task_rows)).step_by(LANES) {
            let rows = LANES.min(w.rows - row);
            strip::<F>(kind, x, start, m, &w, row, |i, sums| {
                for n in 0..rows {
                    let value = sums[n] + bias.map_or(0.0, |bias| bias[row + n]);
                    // SAFETY: inside `out`; tasks write disjoint rows or columns.
                    unsafe { out.get().add((start + i) * w.rows + row + n).write(value) };
                }
            });
        }
    });
}

/// The products of rows `row..` of the weights, a lane each, with `m` rows of activations
/// from `start`; `done` gets each one's sums.
fn strip<F: Strip>(
    kind: Kind,
    x: &Activations,
    start: usize,
    m: usize,
    w: &QuantMatrix<'_>,
    row: usize,
    mut done: impl FnMut(usize, &[f32; LANES]),
) {
    #[cfg(target_arch = "x86_64")]
    if m == 1
        && row + LANES <= w.rows
        && let Some(sums) = rows::sixteen(kind, x, start, w, row)
    {
        return done(0, &sums);
    }
    let (blocks, block_bytes) = (w.row_blocks(), size_of::<F::Block>());
    let values = if m <= 8 { NEAR_VALUES } else { FAR_VALUES };
    let at_once = (values / F::LEN).min(blocks);
    let words = words::<F::L>();
    // Rows past the last are copies of zeros.
    let tail = (row + LANES > w.rows).then(|| {
        let mut copy = vec![0; LANES * blocks * block_bytes];
        for (row, copy) in (row..w.rows).zip(copy.chunks_exact_mut((blocks * block_bytes).max(1))) {
            copy.copy_from_slice(&w.data[row * w.stride..][..copy.len()]);
        }
        copy
    });
    let (data, stride) = match &tail {
        Some(copy) => (copy.as_ptr(), blocks * block_bytes),
        // SAFETY: the data hold every row.
        None => (unsafe { w.data.as_ptr().add(row * w.stride) }, w.stride),
    };
    gemm::with_buffer(at_once * F::L::WORDS + m * LANES, |buffer| {
        let (sums, panel) = buffer.split_at_mut(m * LANES);
        sums.fill(0.0);
        for first in (0..blocks).step_by(at_once.max(1)) {
            let count = at_once.min(blocks - first);
            let panel: *mut i32 = panel.as_mut_ptr().cast();
            // SAFETY: sixteen rows have these blocks, the activations too; the buffer holds
            // the strip's.
            unsafe {
                let p = data.add(first * block_bytes);
                in_kind(kind, Unpack::<F> { p, stride, count, panel, format: PhantomData });
                let rows = Rows {
                    bytes: x.bytes.as_ptr().add((start * blocks + first) * F::LEN),
                    stride: blocks * F::LEN,
                    words: x.blocks.as_ptr().add((start * blocks + first) * words),
                    word_stride: blocks * words,
                    m,
                };
                let sums = sums.as_mut_ptr();
                in_kind(kind, Dot::<F::L> { rows, panel, count, sums, layout: PhantomData });
            }
        }
        sums.as_chunks().0.iter().enumerate().for_each(|(i, sums)| done(i, sums));
    });
}

/// Takes `count` blocks of sixteen rows apart.
struct Unpack<F> {
    p: *const u8,
    stride: usize,
    count: usize,
    panel: *mut i32,
    format: PhantomData<F>,
}

impl<F: Strip> Kernel for Unpack<F> {
    #[inline(always)]
    unsafe fn run<T: Integers, const M: usize>(self) {
        for b in 0..self.count {
            // SAFETY: the blocks are there, and room for them.
            unsafe {
                let p = self.p.add(b * size_of::<F::Block>());
                F::take_apart::<T>(p, self.stride, self.panel.add(b * F::L::WORDS));
            }
        }
    }
}

#[cfg(test)]
mod tests;
