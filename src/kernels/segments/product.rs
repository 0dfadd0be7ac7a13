//! The products of matrices in tiles of queries and keys, which lie in the nearest caches.
//!
//! Numbers of pairs, be they scores or gradients, are `[keys][QUERIES]`, a query a lane.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed in two dimensions at once")]

use std::ops::Range;

use super::QUERIES;
use crate::kernels::Tier;
use crate::kernels::simd::{self, LANES, Simd};

/// The lanes of the vectors that hold these.
pub(super) fn vectors(lanes: &Range<usize>) -> Range<usize> {
    lanes.start / LANES * LANES..lanes.end.next_multiple_of(LANES)
}

/// `pairs[key, lane] = x[key] · y[lane]` for the vectors that hold `lanes`, with `x`
/// `[keys][width]` and `y` `[head_dim][QUERIES]`: unscaled scores of keys and queries, or what
/// values and a gradient give.
pub(super) fn score(
    tier: Tier,
    lanes: &Range<usize>,
    (x, width): (&[f32], usize),
    y: &[f32],
    pairs: &mut [f32],
) {
    let (lanes, keys, head_dim) = (vectors(lanes), x.len() / width, y.len() / QUERIES);
    assert!(lanes.end <= QUERIES && head_dim <= width && pairs.len() >= keys * QUERIES);
    let product = Product {
        a: x.as_ptr(),
        a_row: width,
        a_col: 1,
        b: y[lanes.start..].as_ptr(),
        b_row: QUERIES,
        c: pairs[lanes.start..].as_mut_ptr(),
        c_row: QUERIES,
        m: keys,
        n: lanes.len(),
        k: head_dim,
        accumulate: false,
    };
    // SAFETY: the slices hold that many keys, lanes and dimensions.
    unsafe { product.run(tier) };
}

/// `sums[lane] += Σ pairs[key, lane] * x[key]` for `lanes`, with `x` `[keys][width]` and `sums`
/// `[QUERIES][width]`.
pub(super) fn add_keys(
    tier: Tier,
    lanes: &Range<usize>,
    pairs: &[f32],
    (x, width): (&[f32], usize),
    sums: &mut [f32],
) {
    let keys = x.len() / width;
    assert!(lanes.end <= QUERIES && width.is_multiple_of(LANES));
    assert!(pairs.len() >= keys * QUERIES && sums.len() >= QUERIES * width);
    let product = Product {
        a: pairs[lanes.start..].as_ptr(),
        a_row: 1,
        a_col: QUERIES,
        b: x.as_ptr(),
        b_row: width,
        c: sums[lanes.start * width..].as_mut_ptr(),
        c_row: width,
        m: lanes.len(),
        n: width,
        k: keys,
        accumulate: true,
    };
    // SAFETY: the slices hold that many lanes, keys and widths.
    unsafe { product.run(tier) };
}

/// `sums[key] += Σ pairs[key, lane] * x[lane]` over `lanes`, with `x` `[QUERIES][width]` and
/// `sums` `[keys][width]`.
pub(super) fn add_queries(
    tier: Tier,
    lanes: &Range<usize>,
    pairs: &[f32],
    (x, width): (&[f32], usize),
    sums: &mut [f32],
) {
    let keys = sums.len() / width;
    assert!(lanes.end <= QUERIES && width.is_multiple_of(LANES));
    assert!(pairs.len() >= keys * QUERIES && x.len() >= QUERIES * width);
    let product = Product {
        a: pairs[lanes.start..].as_ptr(),
        a_row: QUERIES,
        a_col: 1,
        b: x[lanes.start * width..].as_ptr(),
        b_row: width,
        c: sums.as_mut_ptr(),
        c_row: width,
        m: keys,
        n: width,
        k: lanes.len(),
        accumulate: true,
    };
    // SAFETY: the slices hold that many keys, lanes and widths.
    unsafe { product.run(tier) };
}

/// `c[m, n] (+)= a[m, k] · b[k, n]`. An element of `c` is one chain of fused
/// multiply-adds over `k` in index order, continued where the last product left it.
struct Product {
    /// Element `(i, k)` is at `i * a_row + k * a_col`: a matrix or its transpose.
    a: *const f32,
    a_row: usize,
    a_col: usize,
    /// Rows `b_row` apart.
    b: *const f32,
    b_row: usize,
    /// Rows `c_row` apart.
    c: *mut f32,
    c_row: usize,
    m: usize,
    /// Whole vectors.
    n: usize,
    k: usize,
    /// Add to what `c` holds.
    accumulate: bool,
}

impl Product {
    /// # Safety
    /// The pointers are valid for the shape, `c` overlaps neither `a` nor `b`, and the CPU has
    /// the tier's instructions.
    unsafe fn run(&self, tier: Tier) {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512(p: &Product) {
            // SAFETY: the features are on; the pointers are the caller's.
            unsafe { in_columns::<simd::Avx512, 4>(p) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2(p: &Product) {
            // SAFETY: as above.
            unsafe { in_columns::<simd::Avx2, 1>(p) }
        }
        // SAFETY: the caller's contract.
        unsafe {
            match tier {
                #[cfg(target_arch = "x86_64")]
                Tier::Avx512 => avx512(self),
                #[cfg(target_arch = "x86_64")]
                Tier::Avx2 => avx2(self),
                _ => in_columns::<simd::Scalar, 1>(self),
            }
        }
    }
}

/// Columns of `WIDE` vectors, as many as the tier's registers hold, then single ones.
#[inline(always)]
unsafe fn in_columns<S: Simd, const WIDE: usize>(p: &Product) {
    // SAFETY: columns `j..` are inside the product.
    unsafe {
        let mut j = 0;
        while j + WIDE * LANES <= p.n {
            in_rows::<S, WIDE>(p, j);
            j += WIDE * LANES;
        }
        while j < p.n {
            in_rows::<S, 1>(p, j);
            j += LANES;
        }
    }
}

/// Six rows at a time: with four vectors of columns, 24 sums in AVX-512's 32 registers.
#[inline(always)]
unsafe fn in_rows<S: Simd, const N: usize>(p: &Product, j: usize) {
    // SAFETY: rows `i..` are inside the product.
    unsafe {
        let mut i = 0;
        while i < p.m {
            match p.m - i {
                1 => tile::<S, 1, N>(p, i, j),
                2 => tile::<S, 2, N>(p, i, j),
                3 => tile::<S, 3, N>(p, i, j),
                4 => tile::<S, 4, N>(p, i, j),
                5 => tile::<S, 5, N>(p, i, j),
                _ => tile::<S, 6, N>(p, i, j),
            }
            i += 6;
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const N: usize>(p: &Product, i: usize, j: usize) {
    // SAFETY: the caller keeps the tile inside the product.
    unsafe {
        let c = p.c.add(i * p.c_row + j);
        let mut acc = [[S::splat(0.0); N]; M];
        if p.accumulate {
            for m in 0..M {
                for n in 0..N {
                    acc[m][n] = S::load(c.add(m * p.c_row + n * LANES));
                }
            }
        }
        let (mut a, mut b) = (p.a.add(i * p.a_row), p.b.add(j));
        for _ in 0..p.k {
            let bs: [S::V; N] = std::array::from_fn(|n| S::load(b.add(n * LANES)));
            for m in 0..M {
                let value = S::splat(*a.add(m * p.a_row));
                for n in 0..N {
                    acc[m][n] = S::fma(value, bs[n], acc[m][n]);
                }
            }
            // Past the last element after the last turn: not read.
            (a, b) = (a.wrapping_add(p.a_col), b.wrapping_add(p.b_row));
        }
        for m in 0..M {
            for n in 0..N {
                S::store(c.add(m * p.c_row + n * LANES), acc[m][n]);
            }
        }
    }
}
