//! What a tile multiplies: values as they lie in memory, and a step of its sums.
//!
//! [`Wide`] widens weights to f32 and takes activations as they are. [`Pairs`] takes both
//! in bf16, two products a lane: the operation of AVX-512's `vdpbf16ps`, which other CPUs
//! carry out in two fused multiply-adds with the same bits (values below 1.2e-38 aside,
//! which the instruction takes for zero).

use std::marker::PhantomData;

use half::{bf16, f16};

use super::super::simd::{LANES, Simd};

/// A type that weights are stored in.
pub trait Element: Copy + Send + Sync + 'static {
    /// Zero.
    const ZERO: Self;
    /// Widens one value, exactly.
    fn to_f32(self) -> f32;
    /// Widens 16 values, exactly.
    ///
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
}

impl Element for f32 {
    const ZERO: Self = 0.0;

    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(p) }
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(p) }
    }
}

impl Element for f16 {
    const ZERO: Self = f16::ZERO;

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_f16(p) }
    }
}

/// Most values that a vector of a [`Product`] takes from a row.
pub(super) const MAX_STEP: usize = 2 * LANES;

/// How a tile multiplies.
///
/// # Safety
/// Methods need the CPU features of `S` and of the product, and pointers to
/// [`STEP`](Self::STEP) values.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Product {
    /// Activations.
    type X: Element;
    /// Weights.
    type W: Element;
    /// Values that a vector takes from a row.
    const STEP: usize;
    /// A vector of activations.
    unsafe fn activations<S: Simd>(p: *const Self::X) -> S::V;
    /// A vector of weights.
    unsafe fn weights<S: Simd>(p: *const Self::W) -> S::V;
    /// The sums `c` with the products of `x` and `w` added.
    unsafe fn add<S: Simd>(x: S::V, w: S::V, c: S::V) -> S::V;
}

/// Activations in f32, weights widened to it.
pub(super) struct Wide<E>(PhantomData<E>);

impl<E: Element> Product for Wide<E> {
    type X = f32;
    type W = E;
    const STEP: usize = LANES;

    #[inline(always)]
    unsafe fn activations<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn weights<S: Simd>(p: *const E) -> S::V {
        // SAFETY: the caller's.
        unsafe { E::load::<S>(p) }
    }
    #[inline(always)]
    unsafe fn add<S: Simd>(x: S::V, w: S::V, c: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::fma(x, w, c) }
    }
}

/// Activations and weights in bf16; lane i adds values 2i + 1 and 2i of each step. With
/// `NATIVE` by the CPU's own instruction (AVX-512 BF16), else in f32.
pub(super) struct Pairs<const NATIVE: bool>;

impl<const NATIVE: bool> Product for Pairs<NATIVE> {
    type X = bf16;
    type W = bf16;
    const STEP: usize = 2 * LANES;

    #[inline(always)]
    unsafe fn activations<S: Simd>(p: *const bf16) -> S::V {
        // SAFETY: the caller's; 32 bf16s are the bytes of 16 lanes.
        unsafe { S::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn weights<S: Simd>(p: *const bf16) -> S::V {
        // SAFETY: as above.
        unsafe { S::load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn add<S: Simd>(x: S::V, w: S::V, c: S::V) -> S::V {
        // SAFETY: the caller's.
        unsafe { if NATIVE { S::dot_bf16_native(x, w, c) } else { S::dot_bf16(x, w, c) } }
    }
}

/// The first `n` values, then zeros.
#[inline(always)]
pub(in crate::kernels) unsafe fn padded<E: Element>(p: *const E, n: usize) -> [E; MAX_STEP] {
    // SAFETY: the caller gives `n` readable values.
    std::array::from_fn(|i| if i < n { unsafe { *p.add(i) } } else { E::ZERO })
}

/// Widens `n` elements to f32.
pub fn widen<E: Element>(from: &[E], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// Rounds to bf16, to nearest and ties to even; what would be a denormal becomes zero, as
/// the pair products take it.
pub(super) fn round(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let rounded = match bits & 0x7fff_ffff {
            0..0x0080_0000 => bits >> 16 & 0x8000,
            0x0080_0000..=0x7f80_0000 => nearest,
            // Not a number: stays one.
            _ => bits >> 16 | 0x40,
        };
        *to = bf16::from_bits(rounded as u16);
    }
}
