//! A strip of weights against rows of activations.

use std::marker::PhantomData;

use super::super::super::simd::{LANES, Simd};
use super::Kernel;
use super::activations::words;
use super::lanes::Integers;
use super::strip::Layout;

/// Rows of activations, from some block on.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) bytes: *const i8,
    /// Bytes between two rows.
    pub(super) stride: usize,
    pub(super) words: *const i32,
    /// Words between two rows.
    pub(super) word_stride: usize,
    pub(super) m: usize,
}

/// Adds `count` blocks of sixteen rows of weights to the sums of all rows of activations.
pub(super) struct Dot<L> {
    pub(super) rows: Rows,
    pub(super) panel: *const i32,
    pub(super) count: usize,
    /// A lane a row of weights, by rows of activations.
    pub(super) sums: *mut f32,
    pub(super) layout: PhantomData<L>,
}

impl<L: Layout> Kernel for Dot<L> {
    #[inline(always)]
    unsafe fn run<T: Integers, const M: usize>(self) {
        let mut i = 0;
        while i < self.rows.m {
            let left = self.rows.m - i;
            // SAFETY: rows `i..` up to the tile's are there.
            i += unsafe {
                if left >= M {
                    tile::<T, L, M>(&self, i)
                } else if left >= 4 {
                    tile::<T, L, 4>(&self, i)
                } else if left >= 2 {
                    tile::<T, L, 2>(&self, i)
                } else {
                    tile::<T, L, 1>(&self, i)
                }
            };
        }
    }
}

/// `M` rows of activations from `i`; returns `M`.
#[inline(always)]
unsafe fn tile<T: Integers, L: Layout, const M: usize>(d: &Dot<L>, i: usize) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let sums = d.sums.add(i * LANES);
        let mut acc = [T::S::splat(0.0); M];
        for m in 0..M {
            acc[m] = T::S::load(sums.add(m * LANES));
        }
        for b in 0..d.count {
            let w = d.panel.add(b * L::WORDS);
            let x = d.rows.bytes.add(i * d.rows.stride + b * L::LEN);
            let words = d.rows.words.add(i * d.rows.word_stride + b * words::<L>());
            if L::GROUPS > 0 {
                groups::<T, L, M>(d, w, x, words, &mut acc);
            } else {
                plain::<T, L, M>(d, w, x, words, &mut acc);
            }
        }
        for m in 0..M {
            T::S::store(sums.add(m * LANES), acc[m]);
        }
        M
    }
}

/// A block without groups.
#[inline(always)]
unsafe fn plain<T: Integers, L: Layout, const M: usize>(
    d: &Dot<L>,
    w: *const i32,
    x: *const i8,
    words: *const i32,
    acc: &mut [<T::S as Simd>::V; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sum = [T::splat(0); M];
        if !L::MIN {
            for m in 0..M {
                sum[m] = T::splat(*words.add(m * d.rows.word_stride + 1));
            }
        }
        dots::<T, L, M>(w, x, d.rows.stride, L::QUADS, &mut sum);
        let scale = T::S::load(w.add(L::SCALE * LANES).cast());
        for m in 0..M {
            let words = words.add(m * d.rows.word_stride).cast::<f32>();
            let scale = T::S::mul(scale, T::S::splat(*words));
            acc[m] = T::S::fma(T::to_f32(sum[m]), scale, acc[m]);
            if L::MIN {
                let min = T::S::load(w.add((L::SCALE + 1) * LANES).cast());
                acc[m] = T::S::fma(T::S::splat(*words.add(1)), min, acc[m]);
            }
        }
    }
}

/// A block with groups.
#[inline(always)]
unsafe fn groups<T: Integers, L: Layout, const M: usize>(
    d: &Dot<L>,
    w: *const i32,
    x: *const i8,
    words: *const i32,
    acc: &mut [<T::S as Simd>::V; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sum = [T::splat(0); M];
        let (quads, scales) = (L::QUADS / L::GROUPS, w.add(L::SCALES * LANES));
        for g in 0..L::GROUPS {
            let mut group = [T::splat(0); M];
            let (w, x) = (w.add(g * quads * LANES), x.add(g * quads * 4));
            dots::<T, L, M>(w, x, d.rows.stride, quads, &mut group);
            let scale = T::load(scales.add(g * LANES));
            for m in 0..M {
                sum[m] = T::add(sum[m], T::mul(group[m], scale));
            }
        }
        let scale = T::S::load(w.add(L::SCALE * LANES).cast());
        for m in 0..M {
            let words = words.add(m * d.rows.word_stride);
            let mut offset = T::splat(0);
            for g in 0..L::GROUPS / 2 {
                let pair = T::load(w.add((L::OFFSETS + g) * LANES));
                offset = T::dot_halves(pair, T::splat(*words.add(1 + g)), offset);
            }
            let x_scale = T::S::splat(*words.cast::<f32>());
            let scale = T::S::mul(scale, x_scale);
            if L::MIN {
                acc[m] = T::S::fma(T::to_f32(sum[m]), scale, acc[m]);
                let min = T::S::load(w.add((L::SCALE + 1) * LANES).cast());
                acc[m] = T::S::fma(T::to_f32(offset), T::S::mul(min, x_scale), acc[m]);
            } else {
                acc[m] = T::S::fma(T::to_f32(T::sub(sum[m], offset)), scale, acc[m]);
            }
        }
    }
}

/// `quads` times four values of sixteen rows of weights with those of `M` activations.
#[inline(always)]
unsafe fn dots<T: Integers, L: Layout, const M: usize>(
    w: *const i32,
    x: *const i8,
    stride: usize,
    quads: usize,
    sum: &mut [T::I; M],
) {
    for q in (0..quads).step_by(2) {
        // SAFETY: the caller's.
        unsafe {
            let u = [T::load(w.add(q * LANES)), T::load(w.add((q + 1) * LANES))];
            for m in 0..M {
                let x = x.add(m * stride + q * 4).cast::<i32>();
                let x = [T::splat(x.read_unaligned()), T::splat(x.add(1).read_unaligned())];
                sum[m] = T::dot(L::WIDE, u, x, sum[m]);
            }
        }
    }
}
