//! Products with quantized weights.
//!
//! A few rows of activations go through the blocks as they are taken apart, values
//! in registers; many rows go over rows dequantized once into a buffer, through
//! [`gemm`]'s tiles. Both add up as gemm does: 16 running sums, one fixed tree.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed in two dimensions at once")]

use std::marker::PhantomData;
use std::ops::Range;

use super::super::gemm::{self, ACTIVATION_BYTES, Panel, TILE_ROWS, padded};
use super::super::parallel::{self, SharedMut};
#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::super::simd::{LANES, Scalar, Simd};
use super::super::{Tier, tier};
use super::QuantMatrix;
use super::format::{Format, MAX_LEN, Unpacked, with_format};

/// Quantized bytes that one task streams.
const TASK_BYTES: usize = 64 << 10;
/// Bytes of dequantized weights that a task keeps in the second-level cache.
const BUFFER_BYTES: usize = 256 << 10;

/// Tiles of rows that prefetching looks ahead.
const AHEAD: usize = 4;
/// Rows of activations that a tile of [`TILE_ROWS`] rows of weights leaves room for in
/// the 32 registers of AVX-512.
const TILE_AVX512: usize = 4;

/// `out[m, rows] = x[m, cols] · wᵀ + bias`, on the rank's threads; the bits of
/// [`gemm::linear`] over the dequantized rows.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn linear(x: &[f32], m: usize, w: QuantMatrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    linear_in_tier(tier(), x, m, w, bias, out);
}

pub(super) fn linear_in_tier(
    tier: Tier,
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
    // In registers, the vectors of a row and those of its blocks must begin together.
    let fused = w.skip.is_multiple_of(LANES) && m <= max_fused(tier);
    let row_bytes = if fused {
        w.row_blocks() * w.quant.block_bytes()
    } else {
        w.row_blocks() * w.quant.block_len() * size_of::<f32>()
    };
    let task_bytes = if fused { TASK_BYTES } else { BUFFER_BYTES };
    let task_rows =
        (task_bytes / row_bytes.max(1)).next_multiple_of(TILE_ROWS).clamp(TILE_ROWS, 256);
    let row_tasks = w.rows.div_ceil(task_rows);
    let task_m = gemm::activation_rows(m, w.cols, row_tasks);
    let out = SharedMut::new(out);
    parallel::for_each(row_tasks * m.div_ceil(task_m), 2 * m * w.rows * w.cols, |task| {
        let (start, first) = (task / row_tasks * task_m, task % row_tasks * task_rows);
        let panel = Quantized {
            panel: Panel {
                x: x[start * w.cols..].as_ptr(),
                m: task_m.min(m - start),
                // SAFETY: `first < rows`, and the data hold every row (checked above).
                w: unsafe { w.data.as_ptr().add(first * w.stride) },
                rows: task_rows.min(w.rows - first),
                cols: w.cols,
                stride: w.stride,
                // SAFETY: as long as the rows (asserted above).
                bias: bias.map_or(std::ptr::null(), |b| unsafe { b.as_ptr().add(first) }),
                // SAFETY: inside `out`; tasks write disjoint rows or columns.
                out: unsafe { out.get().add(start * w.rows + first) },
                out_stride: w.rows,
            },
            skip: w.skip,
            blocks: w.row_blocks(),
        };
        // SAFETY: the pointers above.
        with_format!(w.quant, F => unsafe {
            if fused { run_fused::<F>(tier, &panel) } else { run_buffered::<F>(tier, &panel) }
        });
    });
}

/// Rows of activations up to which values stay in registers: taking blocks apart for
/// two tiles is still no dearer than the way through a buffer.
fn max_fused(tier: Tier) -> usize {
    if tier == Tier::Avx512 { 2 * TILE_AVX512 } else { 1 }
}

/// Some rows of quantized weights against all activations; the panel's stride is in bytes.
struct Quantized {
    panel: Panel<u8>,
    skip: usize,
    blocks: usize,
}

/// What the values of a group share.
#[derive(Clone, Copy)]
struct Group<S: Simd> {
    /// The products of the 16 codes, or the scale.
    table: S::V,
    min: S::V,
}

#[inline(always)]
unsafe fn group<S: Simd, F: Format>(u: &Unpacked, v: usize) -> Group<S> {
    let g = v * LANES / F::GROUP;
    // SAFETY: the features are the caller's.
    unsafe {
        let (scale, min) = (S::splat(u.scale[g]), S::splat(u.min[g]));
        match F::CODES {
            Some(codes) => {
                let table = S::mul(S::load(codes.as_ptr()), scale);
                Group { table: if F::MIN { S::sub(table, min) } else { table }, min }
            }
            None => Group { table: scale, min },
        }
    }
}

/// Values `16 v ..` of the block, of its group `group`.
#[inline(always)]
unsafe fn values<S: Simd, F: Format>(
    group: &Group<S>,
    block: *const u8,
    u: &Unpacked,
    v: usize,
) -> S::V {
    // SAFETY: `v` is inside the block; the features are the caller's.
    unsafe {
        let q = match F::BYTES_AT {
            Some(at) => block.add(at).cast(),
            None => u.q.as_ptr(),
        };
        let q = q.add(v * LANES);
        if F::CODES.is_some() {
            return S::lookup(group.table, q);
        }
        let product = S::mul(S::load_i8(q), group.table);
        if F::MIN { S::sub(product, group.min) } else { product }
    }
}

/// Work compiled once for each tier; `M` is how many rows of activations the tier's
/// registers hold beside four rows of weights.
trait Kernel {
    /// # Safety
    /// The CPU features of `S`, and what the kernel itself asks for.
    unsafe fn run<S: Simd, const M: usize>(self);
}

/// # Safety
/// What the kernel asks for; `tier` was detected.
unsafe fn in_tier<K: Kernel>(tier: Tier, kernel: K) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn avx512<K: Kernel>(kernel: K) {
        // SAFETY: the features are on.
        unsafe { kernel.run::<Avx512, TILE_AVX512>() }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<K: Kernel>(kernel: K) {
        // SAFETY: as above.
        unsafe { kernel.run::<Avx2, 1>() }
    }
    match tier {
        // SAFETY: `Tier::detect` has seen these instructions.
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => unsafe { avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 => unsafe { avx2(kernel) },
        // SAFETY: no features needed.
        _ => unsafe { kernel.run::<Scalar, 1>() },
    }
}

/// `count` blocks from `blocks` to `out`.
///
/// # Safety
/// Both are valid for `count` blocks.
pub(super) unsafe fn dequantize<F: Format>(
    tier: Tier,
    blocks: *const u8,
    count: usize,
    out: *mut f32,
) {
    struct Dequantize<F> {
        blocks: *const u8,
        count: usize,
        out: *mut f32,
        format: PhantomData<F>,
    }
    impl<F: Format> Kernel for Dequantize<F> {
        #[inline(always)]
        unsafe fn run<S: Simd, const M: usize>(self) {
            let mut u = Unpacked::ZERO;
            for b in 0..self.count {
                // SAFETY: the caller's; a block of bytes needs no alignment.
                unsafe {
                    let block = self.blocks.add(b * size_of::<F::Block>());
                    F::unpack::<S>(&*block.cast(), &mut u);
                    for v in 0..F::LEN / LANES {
                        let w = values::<S, F>(&group::<S, F>(&u, v), block, &u, v);
                        S::store(self.out.add(b * F::LEN + v * LANES), w);
                    }
                }
            }
        }
    }
    let kernel = Dequantize::<F> { blocks, count, out, format: PhantomData };
    // SAFETY: the caller's.
    unsafe { in_tier(tier, kernel) }
}

/// Dequantizes rows into this thread's buffer and multiplies them there.
unsafe fn run_buffered<F: Format>(tier: Tier, w: &Quantized) {
    let p = &w.panel;
    // Rows a power of two apart would fall into the same few sets of the cache.
    let stride = w.blocks * F::LEN + LANES;
    // While all activations stay near, so may a tile's weights.
    let near = p.m * p.cols * size_of::<f32>() <= ACTIVATION_BYTES;
    let step = if near { TILE_ROWS } else { p.rows };
    gemm::with_buffer(step * stride, |buffer| {
        for first in (0..p.rows).step_by(step) {
            let rows = step.min(p.rows - first);
            // SAFETY: rows `first..first + rows` are in the panel, and the buffer holds them.
            unsafe {
                for row in 0..rows {
                    let blocks = p.w.add((first + row) * p.stride);
                    let to = buffer.as_mut_ptr().add(row * stride);
                    dequantize::<F>(tier, blocks, w.blocks, to);
                }
                let bias = if p.bias.is_null() { p.bias } else { p.bias.add(first) };
                let (w, out) = (buffer.as_ptr().add(w.skip), p.out.add(first));
                let Panel { x, m, cols, out_stride, .. } = *p;
                gemm::run_panel(
                    tier,
                    &Panel { x, m, w, rows, cols, stride, bias, out, out_stride },
                );
            }
        }
    });
}

/// Multiplies values in the registers they are dequantized in.
unsafe fn run_fused<F: Format>(tier: Tier, w: &Quantized) {
    struct Fused<'a, F>(&'a Quantized, PhantomData<F>);
    impl<F: Format> Kernel for Fused<'_, F> {
        #[inline(always)]
        unsafe fn run<S: Simd, const M: usize>(self) {
            // SAFETY: the caller's.
            unsafe { fused_tiles::<S, F, M>(self.0) }
        }
    }
    // SAFETY: the caller's.
    unsafe { in_tier(tier, Fused::<F>(w, PhantomData)) }
}

#[inline(always)]
unsafe fn fused_tiles<S: Simd, F: Format, const M: usize>(w: &Quantized) {
    let p = &w.panel;
    let mut unpacked = [const { Unpacked::ZERO }; TILE_ROWS];
    for row in (0..p.rows).step_by(TILE_ROWS) {
        let nr = TILE_ROWS.min(p.rows - row);
        let mut i = 0;
        while i < p.m {
            let mr = M.min(p.m - i);
            // SAFETY: rows `i..i+mr` and `row..row+nr` are inside the panel.
            unsafe {
                match (mr, nr == TILE_ROWS) {
                    (4, true) if M >= 4 => tile::<S, F, 4, TILE_ROWS>(w, i, row, &mut unpacked),
                    (3, true) if M >= 3 => tile::<S, F, 3, TILE_ROWS>(w, i, row, &mut unpacked),
                    (2, true) if M >= 2 => tile::<S, F, 2, TILE_ROWS>(w, i, row, &mut unpacked),
                    (1, true) => tile::<S, F, 1, TILE_ROWS>(w, i, row, &mut unpacked),
                    _ => {
                        for (i, row) in
                            (i..i + mr).flat_map(|i| (row..row + nr).map(move |r| (i, r)))
                        {
                            let one = unpacked.first_chunk_mut::<1>().expect("four");
                            tile::<S, F, 1, 1>(w, i, row, one);
                        }
                    }
                }
            }
            i += mr;
        }
    }
}

/// `M` rows of activations from `i` by `N` rows of weights from `row`.
#[inline(always)]
unsafe fn tile<S: Simd, F: Format, const M: usize, const N: usize>(
    w: &Quantized,
    i: usize,
    row: usize,
    unpacked: &mut [Unpacked; N],
) {
    let p = &w.panel;
    // SAFETY: the caller keeps `i + M <= m` and `row + N <= rows`; a row of weights has
    // `blocks` blocks, and of their values only `skip..skip + cols` meet activations.
    unsafe {
        let rows = p.w.add(row * p.stride);
        // Where column 0 of the blocks would be.
        let x = p.x.add(i * p.cols).wrapping_sub(w.skip);
        let end = w.skip + p.cols;
        let mut held = [[S::splat(0.0); N]; M];
        let mut b = 0;
        if w.skip > 0 {
            unpack::<S, F, N>(rows, p.stride, unpacked);
            let values = w.skip..end.min(F::LEN);
            part_of_block::<S, F, M, N>(&mut held, p, x, rows, unpacked, values);
            b = 1;
        }
        while (b + 1) * F::LEN <= end {
            let block = rows.add(b * size_of::<F::Block>());
            unpack::<S, F, N>(block, p.stride, unpacked);
            // While a long block is taken apart the sums wait in memory, else the constants
            // of that leave too few registers for the multiplications.
            if F::LEN == MAX_LEN {
                std::hint::black_box(&mut held);
            }
            let mut acc = held;
            for v in (0..F::LEN / LANES).step_by(F::GROUP / LANES) {
                let mut groups = [group::<S, F>(&unpacked[0], v); N];
                for n in 1..N {
                    groups[n] = group::<S, F>(&unpacked[n], v);
                }
                for v in v..v + F::GROUP / LANES {
                    // (A closure might not be compiled with the tier's instructions.)
                    let mut xs = [S::splat(0.0); M];
                    for m in 0..M {
                        xs[m] = S::load(x.wrapping_add(b * F::LEN + v * LANES + m * p.cols));
                    }
                    for n in 0..N {
                        let w =
                            values::<S, F>(&groups[n], block.add(n * p.stride), &unpacked[n], v);
                        for m in 0..M {
                            acc[m][n] = S::fma(xs[m], w, acc[m][n]);
                        }
                    }
                }
            }
            held = acc;
            b += 1;
        }
        if b < w.blocks {
            let block = rows.add(b * size_of::<F::Block>());
            unpack::<S, F, N>(block, p.stride, unpacked);
            let (x, values) = (x.wrapping_add(b * F::LEN), 0..end - b * F::LEN);
            part_of_block::<S, F, M, N>(&mut held, p, x, block, unpacked, values);
        }
        for m in 0..M {
            for n in 0..N {
                let bias = if p.bias.is_null() { 0.0 } else { *p.bias.add(row + n) };
                *p.out.add((i + m) * p.out_stride + row + n) = S::sum(held[m][n]) + bias;
            }
        }
    }
}

/// Takes a block of each of `N` rows apart, and brings those of the next rows near.
#[inline(always)]
unsafe fn unpack<S: Simd, F: Format, const N: usize>(
    block: *const u8,
    stride: usize,
    unpacked: &mut [Unpacked; N],
) {
    for n in 0..N {
        for line in (0..size_of::<F::Block>()).step_by(64) {
            S::prefetch(block.wrapping_add((AHEAD * N + n) * stride + line));
        }
        // SAFETY: the rows are the caller's; a block of bytes needs no alignment.
        unsafe { F::unpack::<S>(&*block.add(n * stride).cast::<F::Block>(), &mut unpacked[n]) };
    }
}

/// Adds up `range` of the values of a block; it starts at a multiple of 16.
#[inline(always)]
unsafe fn part_of_block<S: Simd, F: Format, const M: usize, const N: usize>(
    acc: &mut [[S::V; N]; M],
    p: &Panel<u8>,
    x: *const f32,
    block: *const u8,
    unpacked: &[Unpacked; N],
    range: Range<usize>,
) {
    for v in range.start / LANES..range.end.div_ceil(LANES) {
        let left = LANES.min(range.end - v * LANES);
        // SAFETY: activations up to the range's end are the caller's; no more are read.
        unsafe {
            for n in 0..N {
                let (group, block) = (group::<S, F>(&unpacked[n], v), block.add(n * p.stride));
                let mut w = [0.0; LANES];
                S::store(w.as_mut_ptr(), values::<S, F>(&group, block, &unpacked[n], v));
                let w = S::load(padded(w.as_ptr(), left).as_ptr());
                for m in 0..M {
                    let x = padded(x.wrapping_add(v * LANES + m * p.cols), left);
                    acc[m][n] = S::fma(S::load(x.as_ptr()), w, acc[m][n]);
                }
            }
        }
    }
}
