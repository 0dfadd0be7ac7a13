//! `out = x · Wᵀ (+ bias)`: activations times a weight matrix as it lies in the
//! checkpoint, rows of `in_features` contiguous values.
//!
//! Weights are f32, bf16 or f16. [`linear`] widens them to f32 in registers (exactly), so
//! a half-precision model costs half the memory traffic and gives the bits of the
//! same model converted to f32. [`linear_bf16`] rounds the activations instead and takes
//! two products at once. Each output is one dot product with 16 running sums, whatever the
//! tile it is computed in.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed in two dimensions at once")]

pub(super) mod back;

pub use back::{gradient, multiply};

mod product;

pub(super) use product::padded;
pub use product::{Element, widen};

use std::cell::{Cell, RefCell};

use half::bf16;

use super::parallel::{self, SharedMut};
use super::simd::{LANES, Simd};
use super::{Tier, tier};
use product::{Pairs, Product, Wide};

/// A borrowed weight matrix `[rows, cols]` with `stride` elements from row to row.
#[derive(Clone, Copy)]
pub struct Matrix<'a, E> {
    /// At least `(rows - 1) * stride + cols` elements.
    pub data: &'a [E],
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Elements between the starts of two rows; at least `cols`.
    pub stride: usize,
}

/// Bytes of weights that one task streams: large enough for the prefetcher, small
/// enough that all threads finish together.
const TASK_BYTES: usize = 256 << 10;
/// Bytes of activations kept in the second-level cache while weights pass by.
pub(super) const ACTIVATION_BYTES: usize = 384 << 10;
/// Bytes of activations that tasks share in the last cache while weights pass by.
const SHARED_BYTES: usize = 4 << 20;
/// Rows of activations that a task has at least, if there are so many: weights are
/// fetched, or dequantized, once for them.
const LEAST_ROWS: usize = 48;
/// Tasks for each thread, so that all finish together.
const TASKS_PER_THREAD: usize = 4;
/// Bytes of a line of the caches.
pub(super) const LINE_BYTES: usize = 64;
/// Rows of a weight tile.
pub(super) const TILE_ROWS: usize = 4;

/// `out[m, rows] = x[m, cols] · wᵀ + bias`, on the rank's threads.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn linear<E: Element>(
    x: &[f32],
    m: usize,
    w: Matrix<'_, E>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    linear_in_tier(tier(), x, m, w, bias, out);
}

/// As [`linear`], with the activations rounded to bf16: twice as fast where the CPU
/// multiplies such pairs itself (AVX-512 BF16).
///
/// # Panics
/// As [`linear`].
pub fn linear_bf16(
    x: &[f32],
    m: usize,
    w: Matrix<'_, bf16>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    linear_bf16_in_tier(tier(), x, m, w, bias, out);
}

pub(super) fn linear_in_tier<E: Element>(
    tier: Tier,
    x: &[f32],
    m: usize,
    w: Matrix<'_, E>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    // SAFETY: the panel's pointers are valid for its shape.
    in_panels(x, m, w, bias, out, |panel| unsafe { run_panel(tier, panel) });
}

fn linear_bf16_in_tier(
    tier: Tier,
    x: &[f32],
    m: usize,
    w: Matrix<'_, bf16>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    with_rounded(x, |x| {
        // SAFETY: as above.
        in_panels(x, m, w, bias, out, |panel| unsafe { run_pairs(tier, panel) });
    });
}

/// Cuts a product into panels and runs them on the rank's threads; those of many rows of
/// activations over a copy of their weights.
fn in_panels<X: Element, E: Element>(
    x: &[X],
    m: usize,
    w: Matrix<'_, E>,
    bias: Option<&[f32]>,
    out: &mut [f32],
    run: impl Fn(&Panel<E, X>) + Sync,
) {
    assert_eq!(x.len(), m * w.cols);
    assert_eq!(out.len(), m * w.rows);
    assert!(bias.is_none_or(|b| b.len() == w.rows));
    assert!(w.stride >= w.cols);
    assert!(w.rows == 0 || w.data.len() >= (w.rows - 1) * w.stride + w.cols);
    let row_bytes = (w.cols * size_of::<E>()).max(1);
    let task_rows = (TASK_BYTES / row_bytes).next_multiple_of(TILE_ROWS).clamp(TILE_ROWS, 256);
    let row_tasks = w.rows.div_ceil(task_rows);
    let task_m = activation_rows(m, w.cols, row_tasks);
    let out = SharedMut::new(out);
    parallel::for_each(row_tasks * m.div_ceil(task_m), 2 * m * w.rows * w.cols, |task| {
        let (start, first) = (task / row_tasks * task_m, task % row_tasks * task_rows);
        let panel = Panel {
            x: x[start * w.cols..].as_ptr(),
            m: task_m.min(m - start),
            // SAFETY: `first < rows`, and the data hold every row (asserted above).
            w: unsafe { w.data.as_ptr().add(first * w.stride) },
            rows: task_rows.min(w.rows - first),
            cols: w.cols,
            stride: w.stride,
            // SAFETY: as long as the rows (asserted above).
            bias: bias.map_or(std::ptr::null(), |b| unsafe { b.as_ptr().add(first) }),
            // SAFETY: inside `out`; tasks write disjoint rows or columns.
            out: unsafe { out.get().add(start * w.rows + first) },
            out_stride: w.rows,
        };
        if panel.m < LEAST_ROWS {
            run(&panel);
        } else {
            // SAFETY: the panel lies inside the slices.
            unsafe { with_copied(&panel, &run) };
        }
    });
}

thread_local! {
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static ROUNDED: Cell<Vec<bf16>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with `len` values of this thread, whatever they are, that begin at a line
/// of the cache: vectors that cross lines load half as fast. The memory is kept.
pub(super) fn with_buffer(len: usize, work: impl FnOnce(&mut [f32])) {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len + LANES {
            buffer.resize(len + LANES, 0.0);
        }
        let start = buffer.as_ptr().align_offset(LINE_BYTES).min(LANES);
        work(&mut buffer[start..start + len]);
    });
}

/// Calls `work` with `x` rounded to bf16, in memory that this thread keeps.
fn with_rounded(x: &[f32], work: impl FnOnce(&[bf16])) {
    /// Values that one thread rounds at a time.
    const PART: usize = 16 << 10;
    // Taken out for the while: a task of another product may run on this thread meanwhile.
    let mut rounded = ROUNDED.take();
    if rounded.len() < x.len() {
        rounded.resize(x.len(), bf16::ZERO);
    }
    let to = SharedMut::new(&mut rounded);
    parallel::for_each(x.len().div_ceil(PART), x.len(), |part| {
        let from = &x[part * PART..x.len().min((part + 1) * PART)];
        // SAFETY: parts are disjoint, and the buffer is as long as `x`.
        let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(part * PART), from.len()) };
        product::round(from, to);
    });
    work(&rounded[..x.len()]);
    ROUNDED.set(rounded);
}

/// Calls `run` with a copy of the panel's weights whose rows begin at lines of the cache, and
/// not a power of two apart, which would put them all into the same few sets of it.
unsafe fn with_copied<X, E: Element>(p: &Panel<E, X>, run: impl FnOnce(&Panel<E, X>)) {
    let line = LINE_BYTES / size_of::<E>();
    let stride = p.cols.next_multiple_of(line) + line;
    with_buffer((p.rows * stride * size_of::<E>()).div_ceil(size_of::<f32>()), |buffer| {
        let w: *mut E = buffer.as_mut_ptr().cast();
        // SAFETY: the panel's rows are the caller's, and the buffer holds them; elements are
        // no wider than its values.
        unsafe {
            for row in 0..p.rows {
                w.add(row * stride).copy_from_nonoverlapping(p.w.add(row * p.stride), p.cols);
            }
        }
        run(&Panel { w, stride, ..*p });
    });
}

/// Rows of activations in a task, where weights are cut into `row_tasks`: few enough to
/// stay in the last cache, and for all threads to have work.
pub(super) fn activation_rows(m: usize, cols: usize, row_tasks: usize) -> usize {
    let near = SHARED_BYTES / (cols * size_of::<f32>()).max(1);
    let parts = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(row_tasks.max(1));
    near.min(m.div_ceil(parts)).max(LEAST_ROWS)
}

/// Some rows of the weights against all activations.
pub(super) struct Panel<E, X = f32> {
    pub(super) x: *const X,
    pub(super) m: usize,
    pub(super) w: *const E,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
    pub(super) bias: *const f32,
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

/// # Safety
/// The panel's pointers are valid for its shape.
pub(super) unsafe fn run_panel<E: Element>(tier: Tier, panel: &Panel<E>) {
    // SAFETY: the caller's.
    unsafe { run_product::<Wide<E>>(tier, panel) }
}

/// As [`run_panel`], by pairs.
unsafe fn run_pairs(tier: Tier, panel: &Panel<bf16, bf16>) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")]
    unsafe fn native(panel: &Panel<bf16, bf16>) {
        // SAFETY: the features are on; the panel's pointers are the caller's.
        unsafe { panel_in_tiles::<super::simd::Avx512, Pairs<true>, 6>(panel) }
    }
    #[cfg(target_arch = "x86_64")]
    if tier == Tier::Avx512 && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the instructions are there; the panel is the caller's.
        return unsafe { native(panel) };
    }
    // SAFETY: the caller's.
    unsafe { run_product::<Pairs<false>>(tier, panel) }
}

unsafe fn run_product<P: Product>(tier: Tier, panel: &Panel<P::W, P::X>) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn avx512<P: Product>(panel: &Panel<P::W, P::X>) {
        // SAFETY: the features are on; the panel's pointers are the caller's.
        unsafe { panel_in_tiles::<super::simd::Avx512, P, 6>(panel) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2<P: Product>(panel: &Panel<P::W, P::X>) {
        // SAFETY: as above.
        unsafe { panel_in_tiles::<super::simd::Avx2, P, 1>(panel) }
    }
    match tier {
        // SAFETY: `Tier::detect` has seen these instructions; the panel is in bounds.
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => unsafe { avx512::<P>(panel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 => unsafe { avx2::<P>(panel) },
        // SAFETY: as above; no features needed.
        _ => unsafe { panel_in_tiles::<super::simd::Scalar, P, 1>(panel) },
    }
}

/// Tiles of up to `MR` rows of activations by [`TILE_ROWS`] rows of weights; `MR`
/// is what the tier's registers hold.
#[inline(always)]
unsafe fn panel_in_tiles<S: Simd, P: Product, const MR: usize>(p: &Panel<P::W, P::X>) {
    let block =
        (ACTIVATION_BYTES / (p.cols * size_of::<P::X>()).max(1)).next_multiple_of(MR).max(MR);
    for block_start in (0..p.m).step_by(block) {
        let block_end = (block_start + block).min(p.m);
        for row in (0..p.rows).step_by(TILE_ROWS) {
            let nr = TILE_ROWS.min(p.rows - row);
            let mut i = block_start;
            while i < block_end {
                let mr = MR.min(block_end - i);
                // SAFETY: rows `i..i+mr` and `row..row+nr` are inside the panel.
                unsafe {
                    match (mr, nr == TILE_ROWS) {
                        (6, true) => tile::<S, P, 6, TILE_ROWS>(p, i, row),
                        (5, true) => tile::<S, P, 5, TILE_ROWS>(p, i, row),
                        (4, true) => tile::<S, P, 4, TILE_ROWS>(p, i, row),
                        (3, true) => tile::<S, P, 3, TILE_ROWS>(p, i, row),
                        (2, true) => tile::<S, P, 2, TILE_ROWS>(p, i, row),
                        (1, true) => tile::<S, P, 1, TILE_ROWS>(p, i, row),
                        _ => {
                            for (i, row) in
                                (i..i + mr).flat_map(|i| (row..row + nr).map(move |r| (i, r)))
                            {
                                tile::<S, P, 1, 1>(p, i, row);
                            }
                        }
                    }
                }
                i += mr;
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, P: Product, const M: usize, const N: usize>(
    p: &Panel<P::W, P::X>,
    i: usize,
    row: usize,
) {
    // SAFETY: the caller keeps `i + M <= m` and `row + N <= rows`; the tail is
    // copied into padded arrays before it is loaded.
    unsafe {
        let x = p.x.add(i * p.cols);
        let w = p.w.add(row * p.stride);
        let mut acc = [[S::splat(0.0); N]; M];
        let whole = p.cols / P::STEP * P::STEP;
        // The first tile that passes over these weights brings the next rows near, else
        // memory would idle while the other tiles multiply. A single row multiplies so
        // fast that it must look further ahead.
        let first = i < M;
        let ahead = if M == 1 { 3 * N } else { N };
        let mut k = 0;
        while k < whole {
            let mut xs = [S::splat(0.0); M];
            for m in 0..M {
                xs[m] = P::activations::<S>(x.add(m * p.cols + k));
            }
            for n in 0..N {
                if first {
                    S::prefetch(w.wrapping_add((n + ahead) * p.stride + k));
                }
                let wv = P::weights::<S>(w.add(n * p.stride + k));
                for m in 0..M {
                    acc[m][n] = P::add::<S>(xs[m], wv, acc[m][n]);
                }
            }
            k += P::STEP;
        }
        if whole < p.cols {
            for m in 0..M {
                let tail = padded(x.add(m * p.cols + whole), p.cols - whole);
                let xv = P::activations::<S>(tail.as_ptr());
                for n in 0..N {
                    let wv = padded(w.add(n * p.stride + whole), p.cols - whole);
                    acc[m][n] = P::add::<S>(xv, P::weights::<S>(wv.as_ptr()), acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                let bias = if p.bias.is_null() { 0.0 } else { *p.bias.add(row + n) };
                *p.out.add((i + m) * p.out_stride + row + n) = S::sum(acc[m][n]) + bias;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{random, tiers};
    use half::f16;

    fn reference(x: &[f32], m: usize, w: &[f32], n: usize, k: usize) -> Vec<f64> {
        let dot = |i: usize, j: usize| {
            (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c])).sum()
        };
        (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| dot(i, j)).collect()
    }

    #[test]
    fn close_to_the_exact_product_for_every_tile_remainder() {
        for (m, n, k) in [(1, 1, 1), (1, 7, 16), (3, 9, 40), (6, 4, 64), (13, 30, 50), (70, 5, 32)]
        {
            let (x, w) = (random(m * k, 1), random(n * k, 2));
            let mut out = vec![0.0; m * n];
            let matrix = Matrix { data: &w, rows: n, cols: k, stride: k };
            linear(&x, m, matrix, None, &mut out);
            for (got, want) in out.iter().zip(reference(&x, m, &w, n, k)) {
                assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want} at {m} {n} {k}");
            }
        }
    }

    /// Invariant 4: a row's result has the same bits alone and in any batch, on any tier.
    #[test]
    fn rows_and_tiers_do_not_change_bits() {
        let (m, n, k) = (32, 41, 100);
        let (x, w) = (random(m * k, 3), random(n * k, 4));
        let bias = random(n, 5);
        let matrix = Matrix { data: &w, rows: n, cols: k, stride: k };
        let mut all = vec![0.0; m * n];
        linear_in_tier(Tier::Scalar, &x, m, matrix, Some(&bias), &mut all);
        for tier in tiers() {
            for batch in [1, 2, 3, 5, 6, 7, 32] {
                for start in (0..m).step_by(batch) {
                    let rows = batch.min(m - start);
                    let mut part = vec![0.0; rows * n];
                    let x = &x[start * k..(start + rows) * k];
                    linear_in_tier(tier, x, rows, matrix, Some(&bias), &mut part);
                    assert_eq!(part, all[start * n..(start + rows) * n], "{tier:?} batch {batch}");
                }
            }
        }
    }

    /// Many rows go over copied weights in several tasks.
    #[test]
    fn many_rows_have_the_bits_of_one() {
        let (m, n, k) = (LEAST_ROWS * 5, 37, 300);
        let (x, w) = (random(m * k, 11), random(n * (k + 3), 12));
        let matrix = Matrix { data: &w, rows: n, cols: k, stride: k + 3 };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for tier in tiers() {
            let mut all = vec![0.0; m * n];
            pool.install(|| linear_in_tier(tier, &x, m, matrix, None, &mut all));
            for i in [0, 47, 48, 200, m - 1] {
                let mut one = vec![0.0; n];
                linear_in_tier(tier, &x[i * k..(i + 1) * k], 1, matrix, None, &mut one);
                assert_eq!(one, all[i * n..(i + 1) * n], "{tier:?} row {i}");
            }
        }
    }

    #[test]
    fn half_precision_weights_give_the_bits_of_their_f32_values() {
        let (m, n, k) = (3, 10, 70);
        let x = random(m * k, 6);
        let halves: Vec<bf16> = random(n * k, 7).into_iter().map(bf16::from_f32).collect();
        let f16s: Vec<f16> = random(n * k, 8).into_iter().map(f16::from_f32).collect();
        for tier in tiers() {
            let mut a = vec![0.0; m * n];
            let mut b = a.clone();
            let wide: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
            let shape = |data| Matrix { data, rows: n, cols: k, stride: k };
            linear_in_tier(tier, &x, m, shape(&wide), None, &mut a);
            let narrow = Matrix { data: &halves, rows: n, cols: k, stride: k };
            linear_in_tier(tier, &x, m, narrow, None, &mut b);
            assert_eq!(a, b);
            let wide: Vec<f32> = f16s.iter().map(|h| h.to_f32()).collect();
            linear_in_tier(tier, &x, m, shape(&wide), None, &mut a);
            let narrow = Matrix { data: &f16s, rows: n, cols: k, stride: k };
            linear_in_tier(tier, &x, m, narrow, None, &mut b);
            assert_eq!(a, b);
        }
    }

    /// The formula of a product by pairs, one value after another.
    fn by_pairs(x: &[f32], w: &[bf16]) -> f32 {
        let x: Vec<f32> = x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        let mut lanes = [0f32; LANES];
        for (x, w) in x.chunks(2 * LANES).zip(w.chunks(2 * LANES)) {
            for (i, lane) in lanes.iter_mut().enumerate() {
                for k in [2 * i + 1, 2 * i] {
                    if k < x.len() {
                        *lane = x[k].mul_add(w[k].to_f32(), *lane);
                    }
                }
            }
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    #[test]
    fn products_by_pairs_have_the_bits_of_their_formula_in_every_batch_and_tier() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for (m, n, k) in [(7, 9, 100), (13, 41, 64), (3, 5, 1), (2 * LEAST_ROWS + 5, 37, 333)] {
            let x = random(m * k, 13);
            let w: Vec<bf16> = random(n * (k + 3), 14).into_iter().map(bf16::from_f32).collect();
            let matrix = Matrix { data: &w, rows: n, cols: k, stride: k + 3 };
            let bias = random(n, 15);
            let row = |i: usize, j: usize| {
                by_pairs(&x[i * k..(i + 1) * k], &w[j * (k + 3)..][..k]) + bias[j]
            };
            let formula: Vec<f32> = (0..m * n).map(|at| row(at / n, at % n)).collect();
            for tier in tiers() {
                for batch in [1, 2, 6, m] {
                    for start in (0..m).step_by(batch) {
                        let rows = batch.min(m - start);
                        let mut part = vec![0.0; rows * n];
                        let x = &x[start * k..(start + rows) * k];
                        pool.install(|| {
                            linear_bf16_in_tier(tier, x, rows, matrix, Some(&bias), &mut part);
                        });
                        assert_eq!(part, formula[start * n..][..rows * n], "{tier:?} {batch}");
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_and_keeps_what_is_not_a_number() {
        let mut values = random(1000, 16);
        values.extend([0.0, -0.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1.0 + 1.0 / 256.0]);
        let mut rounded = vec![bf16::ZERO; values.len()];
        product::round(&values, &mut rounded);
        for (value, rounded) in values.iter().zip(rounded) {
            assert_eq!(rounded.to_bits(), bf16::from_f32(*value).to_bits(), "{value}");
        }
        let mut odd = [bf16::ONE; 4];
        product::round(&[f32::NAN, f32::from_bits(u32::MAX), 1e-39, -1e-39], &mut odd);
        assert!(odd[0].is_nan() && odd[1].is_nan());
        assert!(odd[2..].iter().all(|x| x.to_f32() == 0.0));
    }

    #[test]
    fn a_strided_matrix_is_read_by_its_stride() {
        let w = random(4 * 48, 9);
        let x = random(16, 10);
        let narrow: Vec<f32> = (0..4).flat_map(|r| w[r * 48 + 16..r * 48 + 32].to_vec()).collect();
        let (mut a, mut b) = (vec![0.0; 4], vec![0.0; 4]);
        linear(&x, 1, Matrix { data: &w[16..], rows: 4, cols: 16, stride: 48 }, None, &mut a);
        linear(&x, 1, Matrix { data: &narrow, rows: 4, cols: 16, stride: 16 }, None, &mut b);
        assert_eq!(a, b);
    }
}
