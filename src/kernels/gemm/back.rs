//! The products of backward passes: `out (+)= a · b`, rows of `b` contiguous.
//!
//! [`multiply`] takes gradients back through [`linear`](super::linear) to its input,
//! [`gradient`] gives that of its weights. Each output is one chain of fused
//! multiply-adds in index order, from zero or from the value that is added to, so
//! its bits depend on no tile, block, thread or tier.
//!
//! Blocks as Goto and van de Geijn 2008: a task packs a block of `b` (widened to f32)
//! and one of `a` into its second-level cache and multiplies them in tiles of
//! registers; between blocks along the sums, these wait in `out`.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed in two dimensions at once")]

use super::super::parallel::{self, SharedMut};
use super::super::simd::{LANES, Simd};
use super::super::{Tier, tier};
use super::{Element, LINE_BYTES, Matrix, TASKS_PER_THREAD, padded, with_buffer};

/// Products of a sum that a block holds: its panels are near the first-level cache's size.
const DEPTH: usize = 256;
/// Values between two rows of a packed block of `a`; no power of two, which would put
/// all rows into the same few sets of the cache.
const A_STRIDE: usize = DEPTH + LANES;
/// Rows of the tallest tile.
const MOST_ROWS: usize = 8;
/// Rows of `a` in a task.
const TASK_ROWS: usize = 256;
/// Columns of `b` in a task.
const TASK_COLS: usize = 768;
/// Values of scratch that packing gets beside the columns of a task: blocks of quantized
/// values stand out on both sides.
pub(in crate::kernels) const SCRATCH: usize = 512;

/// Columns from which on turning a gradient over would cost more than it saves.
const NARROW: usize = 128;
/// Rows that prefetching looks ahead in packing.
pub(in crate::kernels) const AHEAD: usize = 2;

/// `out[m, cols] (+)= y[m, rows] · w[rows, cols]`, on the rank's threads: what `y`, a
/// gradient of `linear`'s output, is for its input. With `accumulate` it is added to `out`.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn multiply<E: Element>(
    y: &[f32],
    m: usize,
    w: Matrix<'_, E>,
    accumulate: bool,
    out: &mut [f32],
) {
    multiply_in_tier(tier(), y, m, w, accumulate, out);
}

fn multiply_in_tier<E: Element>(
    tier: Tier,
    y: &[f32],
    m: usize,
    w: Matrix<'_, E>,
    accumulate: bool,
    out: &mut [f32],
) {
    assert!(w.stride >= w.cols);
    assert!(w.rows == 0 || w.data.len() >= (w.rows - 1) * w.stride + w.cols);
    let left = Left::rows_of(y, m, w.rows);
    // SAFETY: the matrix has the rows and columns that are asked for (asserted above).
    unsafe { product(tier, left, &w, w.cols, accumulate, out) };
}

/// `out[a_cols, b_cols] (+)= aᵀ · b` of `a[m, a_cols]` and `b[m, b_cols]`, on the rank's
/// threads: the gradient of weights from that of their output and their input. With
/// `accumulate` it is added to `out`.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn gradient(a: &[f32], b: &[f32], m: usize, accumulate: bool, out: &mut [f32]) {
    gradient_in_tier(tier(), a, b, m, accumulate, out);
}

fn gradient_in_tier(tier: Tier, a: &[f32], b: &[f32], m: usize, accumulate: bool, out: &mut [f32]) {
    if m == 0 || out.is_empty() {
        if !accumulate {
            out.fill(0.0);
        }
        return;
    }
    let (a_cols, b_cols) = (a.len() / m, b.len() / m);
    assert_eq!((a.len(), b.len()), (m * a_cols, m * b_cols));
    assert_eq!(out.len(), a_cols * b_cols);
    if a_cols <= b_cols || b_cols >= NARROW {
        let b = Matrix { data: b, rows: m, cols: b_cols, stride: b_cols };
        // SAFETY: the matrix is `b`, whole.
        unsafe { product(tier, Left::columns_of(a, m, a_cols), &b, b_cols, accumulate, out) };
        return;
    }
    // Vectors better run along the wide one; factors commute, so the bits are the same.
    let mut turned = vec![0.0; out.len()];
    if accumulate {
        transpose(out, a_cols, b_cols, &mut turned);
    }
    let a = Matrix { data: a, rows: m, cols: a_cols, stride: a_cols };
    // SAFETY: the matrix is `a`, whole.
    unsafe { product(tier, Left::columns_of(b, m, b_cols), &a, a_cols, accumulate, &mut turned) };
    transpose(&turned, b_cols, a_cols, out);
}

/// `to[cols, rows]` from `from[rows, cols]`.
fn transpose(from: &[f32], rows: usize, cols: usize, to: &mut [f32]) {
    /// Squares whose lines stay in the first-level cache even where they fall into one set.
    const SIDE: usize = 8;
    for i in (0..rows).step_by(SIDE) {
        for j in (0..cols).step_by(SIDE) {
            for i in i..(i + SIDE).min(rows) {
                for j in j..(j + SIDE).min(cols) {
                    to[j * rows + i] = from[i * cols + j];
                }
            }
        }
    }
}

/// The left factor `[rows, depth]`; value (i, k) lies at `i * row_step + k * depth_step`.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Left<'a> {
    data: &'a [f32],
    rows: usize,
    depth: usize,
    row_step: usize,
    depth_step: usize,
}

impl<'a> Left<'a> {
    /// `data[rows, depth]`.
    pub(in crate::kernels) fn rows_of(data: &'a [f32], rows: usize, depth: usize) -> Self {
        assert_eq!(data.len(), rows * depth);
        Self { data, rows, depth, row_step: depth, depth_step: 1 }
    }

    /// `data[depth, rows]`, transposed.
    fn columns_of(data: &'a [f32], depth: usize, rows: usize) -> Self {
        assert_eq!(data.len(), rows * depth);
        Self { data, rows, depth, row_step: 1, depth_step: rows }
    }

    /// Packs rows `first..first + rows`, of each `depth` values from `k`, and makes up
    /// whole tiles of `tile` rows with zeros.
    fn pack<S: Simd>(
        &self,
        first: usize,
        rows: usize,
        k: usize,
        depth: usize,
        tile: usize,
        to: &mut [f32],
    ) {
        let data = &self.data[first * self.row_step + k * self.depth_step..];
        if self.depth_step == 1 {
            for i in 0..rows {
                let next = data.as_ptr().wrapping_add((i + 2 * AHEAD) * self.row_step);
                for at in (0..depth).step_by(LANES) {
                    S::prefetch(next.wrapping_add(at));
                }
                to[i * A_STRIDE..][..depth].copy_from_slice(&data[i * self.row_step..][..depth]);
            }
        } else {
            for k in 0..depth {
                let column = &data[k * self.depth_step..][..rows];
                for (i, value) in column.iter().enumerate() {
                    to[i * A_STRIDE + k] = *value;
                }
            }
        }
        to[rows * A_STRIDE..rows.next_multiple_of(tile) * A_STRIDE].fill(0.0);
    }
}

/// The right factor: rows that widen to f32.
pub(in crate::kernels) trait Right: Sync {
    /// Packs `cols` values from column `first` of row `row` into the panels of a block.
    ///
    /// # Safety
    /// The values are there, `panels` are of a block that holds them, and `scratch` has
    /// room for [`SCRATCH`] values more; the CPU features of `S`, which `tier` names too.
    unsafe fn pack<S: Simd>(
        &self,
        tier: Tier,
        row: usize,
        first: usize,
        cols: usize,
        panels: Panels,
        scratch: *mut f32,
    );
}

impl<E: Element> Right for Matrix<'_, E> {
    #[inline(always)]
    unsafe fn pack<S: Simd>(
        &self,
        _tier: Tier,
        row: usize,
        first: usize,
        cols: usize,
        panels: Panels,
        _scratch: *mut f32,
    ) {
        // What follows in a row, the CPU sees coming; the next rows it does not.
        let next = self.data.as_ptr().wrapping_add((row + AHEAD) * self.stride + first);
        for at in (0..cols).step_by(LINE_BYTES / size_of::<E>()) {
            S::prefetch(next.wrapping_add(at));
        }
        // SAFETY: the caller's.
        unsafe { panels.pack::<S, E>(self.data.as_ptr().add(row * self.stride + first), cols) }
    }
}

/// Where one row of a packed block goes. A block is cut into panels as wide as a tile;
/// of a panel, the rows lie one after the other.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Panels {
    block: *mut f32,
    /// Rows of the block.
    depth: usize,
    /// Vectors of one of its rows.
    vectors: usize,
    /// Vectors of a whole panel's row.
    width: usize,
    /// The row in the block.
    row: usize,
}

impl Panels {
    /// Packs a row of `cols` values, and zeros up to a whole vector.
    ///
    /// # Safety
    /// The values are there, the block holds them; the CPU features of `S`.
    #[inline(always)]
    pub(in crate::kernels) unsafe fn pack<S: Simd, E: Element>(self, from: *const E, cols: usize) {
        for first in (0..self.vectors).step_by(self.width) {
            let width = self.width.min(self.vectors - first);
            // SAFETY: the caller's; the panel of `width` vectors begins after `first`
            // vectors of each row.
            unsafe {
                let to = self.block.add((first * self.depth + self.row * width) * LANES);
                for v in 0..width {
                    let at = (first + v) * LANES;
                    let value = if at + LANES <= cols {
                        E::load::<S>(from.add(at))
                    } else {
                        E::load::<S>(padded(from.add(at), cols - at).as_ptr())
                    };
                    S::store(to.add(v * LANES), value);
                }
            }
        }
    }
}

/// `out[left.rows, cols] (+)= left · right[left.depth, cols]`.
///
/// # Safety
/// `right` has `left.depth` rows of `cols` values.
pub(in crate::kernels) unsafe fn product<R: Right>(
    tier: Tier,
    left: Left<'_>,
    right: &R,
    cols: usize,
    accumulate: bool,
    out: &mut [f32],
) {
    assert_eq!(out.len(), left.rows * cols);
    if left.depth == 0 && !accumulate {
        out.fill(0.0);
    }
    if out.is_empty() || left.depth == 0 {
        return;
    }
    let (task_rows, task_cols) = task_shape(left.rows, cols, rayon::current_num_threads());
    let row_tasks = left.rows.div_ceil(task_rows);
    let tasks = row_tasks * cols.div_ceil(task_cols);
    let out = SharedMut::new(out);
    parallel::for_each(tasks, 2 * left.rows * left.depth * cols, |task| {
        // Tasks that run together share columns of the right factor in the last cache.
        let (row, col) = (task % row_tasks * task_rows, task / row_tasks * task_cols);
        let block = Block {
            left,
            right,
            row,
            rows: task_rows.min(left.rows - row),
            col,
            cols: task_cols.min(cols - col),
            accumulate,
            // SAFETY: inside `out`; tasks write disjoint rows or columns.
            out: unsafe { out.get().add(row * cols + col) },
            out_stride: cols,
        };
        // SAFETY: the factors are the caller's; the block lies inside of `out`.
        unsafe { block.run(tier) };
    });
}

/// Rows and columns of a task: large, so that packing is little beside the products,
/// but enough tasks for all threads.
fn task_shape(rows: usize, cols: usize, threads: usize) -> (usize, usize) {
    let (mut task_rows, mut task_cols) = (TASK_ROWS, TASK_COLS);
    let too_few = |r, c| rows.div_ceil(r) * cols.div_ceil(c) < TASKS_PER_THREAD * threads;
    while too_few(task_rows, task_cols) && task_rows > TASK_ROWS / 4 {
        if task_cols > TASK_COLS / 4 {
            task_cols /= 2;
        } else {
            task_rows /= 2;
        }
    }
    (task_rows, task_cols)
}

/// The part of a product that a task computes.
struct Block<'a, R> {
    left: Left<'a>,
    right: &'a R,
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
    accumulate: bool,
    out: *mut f32,
    out_stride: usize,
}

impl<R: Right> Block<'_, R> {
    /// # Safety
    /// `out` is valid for the block's shape; the factors have its rows and columns;
    /// `tier` was detected.
    unsafe fn run(&self, tier: Tier) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512<R: Right>(block: &Block<'_, R>, buffer: &mut [f32]) {
            // SAFETY: the features are on; the rest is the caller's.
            unsafe { block.in_tiles::<crate::kernels::simd::Avx512, 8, 3>(Tier::Avx512, buffer) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<R: Right>(block: &Block<'_, R>, buffer: &mut [f32]) {
            // SAFETY: as above.
            unsafe { block.in_tiles::<crate::kernels::simd::Avx2, 6, 1>(Tier::Avx2, buffer) }
        }
        let a_len = (self.rows + MOST_ROWS) * A_STRIDE;
        let b_len = self.cols.next_multiple_of(LANES) * DEPTH;
        // (A closure inside of those would not be compiled with the tier's instructions.)
        with_buffer(a_len + b_len + self.cols + SCRATCH, |buffer| match tier {
            // SAFETY: `Tier::detect` has seen these instructions.
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => unsafe { avx512(self, buffer) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => unsafe { avx2(self, buffer) },
            // SAFETY: no features needed.
            _ => unsafe { self.in_tiles::<crate::kernels::simd::Scalar, 2, 1>(tier, buffer) },
        });
    }

    /// Tiles of `M` rows by `N` vectors, what the tier's registers hold.
    #[inline(always)]
    unsafe fn in_tiles<S: Simd, const M: usize, const N: usize>(
        &self,
        tier: Tier,
        buffer: &mut [f32],
    ) {
        const { assert!(M <= MOST_ROWS) };
        let vectors = self.cols.div_ceil(LANES);
        let (a, rest) = buffer.split_at_mut(self.rows.next_multiple_of(M) * A_STRIDE);
        let (b, scratch) = rest.split_at_mut(vectors * LANES * DEPTH);
        let mut k = 0;
        while k < self.left.depth {
            let depth = DEPTH.min(self.left.depth - k);
            self.left.pack::<S>(self.row, self.rows, k, depth, M, a);
            // SAFETY: the right factor has these rows and columns; the buffer holds the
            // block, and `out` the results.
            unsafe {
                for row in 0..depth {
                    let panels = Panels { block: b.as_mut_ptr(), depth, vectors, width: N, row };
                    let (row, scratch) = (k + row, scratch.as_mut_ptr());
                    self.right.pack::<S>(tier, row, self.col, self.cols, panels, scratch);
                }
                let add = self.accumulate || k > 0;
                self.multiply_packed::<S, M, N>(a.as_ptr(), b.as_ptr(), depth, add);
            }
            k += depth;
        }
    }

    /// A packed block of `a` times one of `b`, a panel at a time.
    #[inline(always)]
    unsafe fn multiply_packed<S: Simd, const M: usize, const N: usize>(
        &self,
        a: *const f32,
        b: *const f32,
        depth: usize,
        add: bool,
    ) {
        let vectors = self.cols.div_ceil(LANES);
        for first in (0..vectors).step_by(N) {
            let width = N.min(vectors - first);
            for row in (0..self.rows).step_by(M) {
                // SAFETY: rows up to a whole tile and panels up to a whole vector are
                // packed; results outside of the block are not stored.
                unsafe {
                    let tile = Tile {
                        a: a.add(row * A_STRIDE),
                        b: b.add(first * depth * LANES),
                        depth,
                        add,
                        out: self.out.add(row * self.out_stride + first * LANES),
                        stride: self.out_stride,
                    };
                    let rows = M.min(self.rows - row);
                    let cols = (width * LANES).min(self.cols - first * LANES);
                    match width {
                        1 => tile.run_part::<S, M, 1>(rows, cols),
                        2 if N > 2 => tile.run_part::<S, M, 2>(rows, cols),
                        _ => tile.run_part::<S, M, N>(rows, cols),
                    }
                }
            }
        }
    }
}

/// A tile of results from packed factors.
#[derive(Clone, Copy)]
struct Tile {
    a: *const f32,
    b: *const f32,
    depth: usize,
    /// Whether `out` is added to.
    add: bool,
    out: *mut f32,
    stride: usize,
}

impl Tile {
    /// The first `rows` and `cols` of the tile's results; `out` holds no more.
    #[inline(always)]
    unsafe fn run_part<S: Simd, const M: usize, const N: usize>(self, rows: usize, cols: usize) {
        // SAFETY: the caller's; a part goes through a whole tile in `whole`.
        unsafe {
            if rows == M && cols == N * LANES {
                return self.run::<S, M, N>();
            }
            let mut whole = [[[0.0; LANES]; N]; M];
            let to: *mut f32 = whole.as_mut_ptr().cast();
            for i in 0..if self.add { rows } else { 0 } {
                to.add(i * N * LANES).copy_from_nonoverlapping(self.out.add(i * self.stride), cols);
            }
            Tile { out: to, stride: N * LANES, ..self }.run::<S, M, N>();
            for i in 0..rows {
                self.out.add(i * self.stride).copy_from_nonoverlapping(to.add(i * N * LANES), cols);
            }
        }
    }

    #[inline(always)]
    unsafe fn run<S: Simd, const M: usize, const N: usize>(self) {
        // SAFETY: the caller's.
        unsafe {
            // The next tile's results, while this one multiplies.
            for m in M..2 * M {
                for n in 0..N {
                    S::prefetch(self.out.wrapping_add(m * self.stride + n * LANES));
                }
            }
            let mut sums = [[S::splat(0.0); N]; M];
            if self.add {
                for m in 0..M {
                    for n in 0..N {
                        sums[m][n] = S::load(self.out.add(m * self.stride + n * LANES));
                    }
                }
            }
            for k in 0..self.depth {
                let mut b = [S::splat(0.0); N];
                for n in 0..N {
                    b[n] = S::load(self.b.add((k * N + n) * LANES));
                }
                for m in 0..M {
                    let a = S::splat(*self.a.add(m * A_STRIDE + k));
                    for n in 0..N {
                        sums[m][n] = S::fma(a, b[n], sums[m][n]);
                    }
                }
            }
            for m in 0..M {
                for n in 0..N {
                    S::store(self.out.add(m * self.stride + n * LANES), sums[m][n]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::kernels::tests::{random, tiers};

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// What the sums are by definition: one chain in index order from the old value.
    fn chains(y: &[f32], m: usize, w: &[f32], cols: usize, old: Option<&[f32]>) -> Vec<f32> {
        let rows = y.len() / m;
        let chain = |i: usize, j: usize| {
            let start = old.map_or(0.0, |old| old[i * cols + j]);
            (0..rows).fold(start, |sum, k| y[i * rows + k].mul_add(w[k * cols + j], sum))
        };
        (0..m).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| chain(i, j)).collect()
    }

    /// Odd sizes of every kind: parts of tiles, several blocks along the sums, several tasks.
    const SHAPES: [(usize, usize, usize); 9] = [
        (1, 1, 1),
        (3, 7, 16),
        (9, 40, 8),
        (6, 257, 50),
        (8, 20, 96),
        (17, 600, 33),
        (70, 5, 100),
        (300, 260, 20),
        (5, 9, 1600),
    ];

    #[test]
    fn each_result_is_one_chain_in_every_tier() {
        for (m, rows, cols) in SHAPES {
            let (y, w) = (random(m * rows, 1), random(rows * cols, 2));
            let old = random(m * cols, 3);
            let matrix = Matrix { data: &w, rows, cols, stride: cols };
            for accumulate in [false, true] {
                let want = chains(&y, m, &w, cols, accumulate.then_some(&old));
                for tier in tiers() {
                    let mut got = old.clone();
                    multiply_in_tier(tier, &y, m, matrix, accumulate, &mut got);
                    assert_eq!(bits(&got), bits(&want), "{tier:?} {m} {rows} {cols}");
                }
            }
        }
    }

    #[test]
    fn gradient_is_the_product_with_the_transpose() {
        for (a_cols, m, b_cols) in
            SHAPES.into_iter().chain([(100, 70, 5), (1600, 9, 5), (300, 9, 130)])
        {
            let (a, b) = (random(m * a_cols, 4), random(m * b_cols, 5));
            let old = random(a_cols * b_cols, 6);
            let mut turned = vec![0.0; a.len()];
            transpose(&a, m, a_cols, &mut turned);
            for accumulate in [false, true] {
                let want = chains(&turned, a_cols, &b, b_cols, accumulate.then_some(&old));
                for tier in tiers() {
                    let mut got = old.clone();
                    gradient_in_tier(tier, &a, &b, m, accumulate, &mut got);
                    assert_eq!(bits(&got), bits(&want), "{tier:?} {a_cols} {m} {b_cols}");
                }
            }
        }
    }

    #[test]
    fn close_to_the_exact_product() {
        let (m, rows, cols) = (30, 500, 70);
        let (y, w) = (random(m * rows, 7), random(rows * cols, 8));
        let mut out = vec![f32::NAN; m * cols];
        multiply(&y, m, Matrix { data: &w, rows, cols, stride: cols }, false, &mut out);
        for (at, got) in out.iter().enumerate() {
            let (i, j) = (at / cols, at % cols);
            let exact: f64 =
                (0..rows).map(|k| f64::from(y[i * rows + k]) * f64::from(w[k * cols + j])).sum();
            assert!((f64::from(*got) - exact).abs() < 1e-4, "{got} {exact} at {i} {j}");
        }
    }

    /// Invariant 4: what is computed with a row, and on how many threads, leaves no trace.
    #[test]
    fn company_and_threads_do_not_change_bits() {
        let (m, rows, cols) = (300, 150, 900);
        let (y, w) = (random(m * rows, 9), random(rows * cols, 10));
        let matrix = Matrix { data: &w, rows, cols, stride: cols };
        let mut all = vec![0.0; m * cols];
        multiply(&y, m, matrix, false, &mut all);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for batch in [7, 64, 300] {
                let mut parts = vec![0.0; m * cols];
                pool.install(|| {
                    for (y, part) in y.chunks(batch * rows).zip(parts.chunks_mut(batch * cols)) {
                        multiply(y, y.len() / rows, matrix, false, part);
                    }
                });
                assert!(parts == all, "{threads} threads, {batch} rows at once");
            }
        }
    }

    #[test]
    fn half_precision_weights_give_the_bits_of_their_f32_values() {
        fn check<E: Element>(from: impl Fn(f32) -> E) {
            let (m, rows, cols) = (9, 140, 75);
            let y = random(m * rows, 11);
            let narrow: Vec<E> = random(rows * cols, 12).into_iter().map(from).collect();
            let wide: Vec<f32> = narrow.iter().map(|w| w.to_f32()).collect();
            let want = chains(&y, m, &wide, cols, None);
            for tier in tiers() {
                let mut got = vec![0.0; m * cols];
                let matrix = Matrix { data: &narrow, rows, cols, stride: cols };
                multiply_in_tier(tier, &y, m, matrix, false, &mut got);
                assert_eq!(bits(&got), bits(&want), "{tier:?}");
            }
        }
        check(bf16::from_f32);
        check(f16::from_f32);
    }

    #[test]
    fn a_strided_matrix_is_read_by_its_stride() {
        let (w, y) = (random(4 * 48, 13), random(3 * 4, 14));
        let narrow: Vec<f32> = w.chunks(48).flat_map(|row| row[16..37].to_vec()).collect();
        let mut got = vec![0.0; 3 * 21];
        // No longer than it must be: nothing beyond the last row is read.
        let matrix = Matrix { data: &w[16..3 * 48 + 37], rows: 4, cols: 21, stride: 48 };
        multiply(&y, 3, matrix, false, &mut got);
        assert_eq!(got, chains(&y, 3, &narrow, 21, None));
    }

    #[test]
    fn an_empty_sum_is_zero_or_what_was_there() {
        let matrix = Matrix { data: &[0f32; 0], rows: 0, cols: 3, stride: 3 };
        let mut out = vec![1.0; 6];
        multiply(&[], 2, matrix, true, &mut out);
        gradient(&[], &[], 0, true, &mut out);
        assert_eq!(out, [1.0; 6]);
        gradient(&[], &[], 0, false, &mut out);
        assert_eq!(out, [0.0; 6]);
        out.fill(1.0);
        multiply(&[], 2, matrix, false, &mut out);
        assert_eq!(out, [0.0; 6]);
        multiply::<f32>(&[], 0, matrix, false, &mut []);
    }
}
