//! Sixteen 32-bit integer lanes, one for each row of a strip of weights, beside the f32
//! lanes of [`Simd`]. A lane is also four bytes, or two 16-bit halves.
//!
//! All operations are exact, so every implementation gives the same values.

use super::super::super::simd::{LANES, Scalar, Simd};

/// Integer lanes.
///
/// # Safety
/// Every method needs the CPU features of its implementation; pointers must be valid for
/// what the method reads or writes, at any alignment.
#[allow(clippy::missing_safety_doc)]
pub(super) trait Integers: Copy {
    /// The lanes for floats.
    type S: Simd;
    /// The lanes.
    type I: Copy;

    /// All lanes `x`.
    unsafe fn splat(x: i32) -> Self::I;
    /// 16 values from memory.
    unsafe fn load(p: *const i32) -> Self::I;
    /// 16 values to memory.
    unsafe fn store(p: *mut i32, v: Self::I);
    /// The bits of both.
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// The bits of either.
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// The bits of one of both.
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// `a + b`.
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    /// `a - b`.
    unsafe fn sub(a: Self::I, b: Self::I) -> Self::I;
    /// The low 32 bits of `a * b`.
    unsafe fn mul(a: Self::I, b: Self::I) -> Self::I;
    /// Bits moved up by `n`.
    unsafe fn up(a: Self::I, n: u32) -> Self::I;
    /// Bits moved down by `n`, zeros behind them.
    unsafe fn down(a: Self::I, n: u32) -> Self::I;
    /// `sum` plus the products of the two signed halves of `a` and `b`.
    unsafe fn dot_halves(a: Self::I, b: Self::I, sum: Self::I) -> Self::I;
    /// `sum` plus the products of the four unsigned bytes of each of `u` and the four signed
    /// ones of each of `x`. Bytes of `u` go up to 63, of `x` up to 127; with `wide` all of `u`.
    unsafe fn dot(wide: bool, u: [Self::I; 2], x: [Self::I; 2], sum: Self::I) -> Self::I;
    /// The nearest floats.
    unsafe fn to_f32(a: Self::I) -> <Self::S as Simd>::V;
    /// The f16s in the low halves, widened exactly.
    unsafe fn low_f16(a: Self::I) -> <Self::S as Simd>::V;
    /// 16 whole numbers within -127..=127, as bytes.
    unsafe fn store_bytes(p: *mut i8, v: <Self::S as Simd>::V);
    /// 16 bytes at `p` and at each of the 15 places `stride` apart after it: lane r of vector
    /// i holds bytes `4 i..` of place r.
    unsafe fn gather(p: *const u8, stride: usize) -> [Self::I; 4];
}

fn map(a: [i32; LANES], b: [i32; LANES], f: impl Fn(i32, i32) -> i32) -> [i32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Integers for Scalar {
    type S = Scalar;
    type I = [i32; LANES];

    #[inline(always)]
    unsafe fn splat(x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const i32) -> Self::I {
        // SAFETY: the caller gives 16 readable values.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut i32, v: Self::I) {
        // SAFETY: the caller gives room for 16 values.
        unsafe { p.cast::<Self::I>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        map(a, b, |a, b| a & b)
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        map(a, b, |a, b| a | b)
    }
    #[inline(always)]
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I {
        map(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I {
        map(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::I, b: Self::I) -> Self::I {
        map(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::I, b: Self::I) -> Self::I {
        map(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    unsafe fn up(a: Self::I, n: u32) -> Self::I {
        a.map(|a| a << n)
    }
    #[inline(always)]
    unsafe fn down(a: Self::I, n: u32) -> Self::I {
        a.map(|a| (a as u32 >> n) as i32)
    }
    #[inline(always)]
    unsafe fn dot_halves(a: Self::I, b: Self::I, sum: Self::I) -> Self::I {
        let low = |v: i32| i32::from(v as i16);
        let products = map(a, b, |a, b| low(a) * low(b) + (a >> 16) * (b >> 16));
        map(products, sum, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn dot(_: bool, u: [Self::I; 2], x: [Self::I; 2], sum: Self::I) -> Self::I {
        let one = |u: i32, x: i32| {
            let products = u.to_le_bytes().into_iter().zip(x.to_le_bytes());
            products.map(|(u, x)| i32::from(u) * i32::from(x as i8)).sum::<i32>()
        };
        map(
            sum,
            map(map(u[0], x[0], one), map(u[1], x[1], one), i32::wrapping_add),
            i32::wrapping_add,
        )
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> [f32; LANES] {
        a.map(|a| a as f32)
    }
    #[inline(always)]
    unsafe fn low_f16(a: Self::I) -> [f32; LANES] {
        a.map(|a| half::f16::from_bits(a as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut i8, v: [f32; LANES]) {
        // SAFETY: the caller gives room for 16 bytes.
        unsafe { p.cast::<[i8; LANES]>().write(v.map(|v| v as i8)) }
    }
    #[inline(always)]
    unsafe fn gather(p: *const u8, stride: usize) -> [Self::I; 4] {
        // SAFETY: the caller's places.
        let row = |r: usize| unsafe { p.add(r * stride).cast::<[i32; 4]>().read_unaligned() };
        let rows: [[i32; 4]; LANES] = std::array::from_fn(row);
        std::array::from_fn(|i| std::array::from_fn(|r| rows[r][i].to_le()))
    }
}
