//! Sixteen rows of blocks taken apart: unsigned bytes, a lane a row, and what their
//! groups and blocks share.
//!
//! Where a type's values are signed they are stored with a zero point added, which the
//! product takes off again: 8 for q4_0, 16 for q5_0, 128 for q8_0, 4 for q3_k, 32 for q6_k.

use super::super::super::simd::{LANES, Simd};
use super::super::format::{Format, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
use super::lanes::Integers;

/// How the parts of a strip's block follow one another, in vectors of a lane a row:
/// four values each; scales of groups; their offsets in pairs; the block's scale; its
/// minimum.
pub(super) trait Layout {
    /// Values of a block.
    const LEN: usize;
    /// Groups with integer scales and offsets; 0 where a block has neither.
    const GROUPS: usize;
    /// Whether the block has a minimum as a float: added once for each activation
    /// (without groups), or times the groups' offsets.
    const MIN: bool;
    /// Whether bytes go beyond 63.
    const WIDE: bool;

    /// Vectors of values.
    const QUADS: usize = Self::LEN / 4;
    /// Where the scales of groups are.
    const SCALES: usize = Self::QUADS;
    /// Where their offsets are.
    const OFFSETS: usize = Self::SCALES + Self::GROUPS;
    /// Where the block's scale is; its minimum follows.
    const SCALE: usize = Self::OFFSETS + Self::GROUPS / 2;
    /// Words of a strip's block.
    const WORDS: usize = (Self::SCALE + 1 + Self::MIN as usize) * LANES;
}

/// 32 values that share a scale.
pub(super) struct Blocks32<const MIN: bool, const WIDE: bool>;

impl<const MIN: bool, const WIDE: bool> Layout for Blocks32<MIN, WIDE> {
    const LEN: usize = 32;
    const GROUPS: usize = 0;
    const MIN: bool = MIN;
    const WIDE: bool = WIDE;
}

/// 256 values in groups.
pub(super) struct Blocks256<const GROUPS: usize, const MIN: bool>;

impl<const GROUPS: usize, const MIN: bool> Layout for Blocks256<GROUPS, MIN> {
    const LEN: usize = 256;
    const GROUPS: usize = GROUPS;
    const MIN: bool = MIN;
    const WIDE: bool = false;
}

/// A type whose blocks come apart.
pub(super) trait Strip: Format {
    /// Into what.
    type L: Layout;
    /// What is added to values where a block has no groups.
    const ZERO: i32 = 0;

    /// Takes the blocks at `p` and at the 15 places `stride` apart after it apart.
    ///
    /// # Safety
    /// The CPU features of `T`; the blocks are there, and [`Layout::WORDS`] at `to`.
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32);
}

/// [`Integers::gather`]; brings four of the next sixteen rows near, by turns, so that a line of
/// each comes once. All at once would fill the core's buffers for misses, and it would wait.
#[inline(always)]
unsafe fn gather<T: Integers>(p: *const u8, stride: usize) -> [T::I; 4] {
    let first = p as usize / 16 % 4 * 4;
    for r in first..first + 4 {
        T::S::prefetch_far(p.wrapping_add((LANES + r) * stride));
    }
    // SAFETY: the caller's.
    unsafe { T::gather(p, stride) }
}

/// Each byte `b`.
const fn bytes(b: u8) -> i32 {
    i32::from_le_bytes([b; 4])
}

/// The bits `mask` of every byte, after a move down by `n`.
#[inline(always)]
unsafe fn bits<T: Integers>(v: T::I, n: u32, mask: u8) -> T::I {
    // SAFETY: the caller's.
    unsafe { T::and(T::down(v, n), T::splat(bytes(mask))) }
}

/// `v` as vector `i` of the strip's block.
#[inline(always)]
unsafe fn put<T: Integers>(to: *mut i32, i: usize, v: T::I) {
    // SAFETY: the caller's.
    unsafe { T::store(to.add(i * LANES), v) }
}

/// As [`put`], of floats.
#[inline(always)]
unsafe fn put_floats<T: Integers>(to: *mut i32, i: usize, v: <T::S as Simd>::V) {
    // SAFETY: the caller's; floats are words.
    unsafe { T::S::store(to.add(i * LANES).cast(), v) }
}

/// The scale from the low half of `head`, and from its high half, times `sign`, the minimum.
#[inline(always)]
unsafe fn put_scale_and_min<T: Integers, L: Layout>(to: *mut i32, head: T::I, sign: f32) {
    // SAFETY: the caller's.
    unsafe {
        put_floats::<T>(to, L::SCALE, T::low_f16(head));
        let min = T::low_f16(T::down(head, 16));
        put_floats::<T>(to, L::SCALE + 1, T::S::mul(min, T::S::splat(sign)));
    }
}

/// Two numbers of 16 bits in one lane.
#[inline(always)]
unsafe fn pair<T: Integers>(first: T::I, second: T::I) -> T::I {
    // SAFETY: the caller's.
    unsafe { T::or(T::and(first, T::splat(0xffff)), T::up(second, 16)) }
}

/// Vectors of four values: the low four bits of `v` from quad `at`, the high ones `apart` later.
#[inline(always)]
unsafe fn put_nibbles<T: Integers>(to: *mut i32, at: usize, apart: usize, v: [T::I; 4]) {
    for i in 0..4 {
        // SAFETY: the caller's.
        unsafe {
            put::<T>(to, at + i, bits::<T>(v[i], 0, 15));
            put::<T>(to, at + apart + i, bits::<T>(v[i], 4, 15));
        }
    }
}

/// Four times eight values of four bits, with a fifth bit each from `high`.
#[inline(always)]
unsafe fn put_five_bits<T: Integers>(to: *mut i32, v: [T::I; 4], high: T::I) {
    for i in 0..8 {
        // SAFETY: the caller's.
        unsafe {
            let low = bits::<T>(v[i % 4], i as u32 / 4 * 4, 15);
            // Bit b of four goes to bit 4 of byte b: no other product meets the mask.
            let four = T::and(T::down(high, 4 * i as u32), T::splat(15));
            let fifth = T::and(T::mul(four, T::splat(0x0204_0810)), T::splat(bytes(16)));
            put::<T>(to, i, T::or(low, fifth));
        }
    }
}

impl Strip for Q4_0 {
    type L = Blocks32<false, false>;
    const ZERO: i32 = 8;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: the caller's; reads stay inside the block.
        unsafe {
            put_floats::<T>(to, Self::L::SCALE, T::low_f16(gather::<T>(p, stride)[0]));
            put_nibbles::<T>(to, 0, 4, gather::<T>(p.add(2), stride));
        }
    }
}

impl Strip for Q4_1 {
    type L = Blocks32<true, false>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            put_scale_and_min::<T, Self::L>(to, gather::<T>(p, stride)[0], 1.0);
            put_nibbles::<T>(to, 0, 4, gather::<T>(p.add(4), stride));
        }
    }
}

impl Strip for Q5_0 {
    type L = Blocks32<false, false>;
    const ZERO: i32 = 16;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            put_floats::<T>(to, Self::L::SCALE, T::low_f16(gather::<T>(p, stride)[0]));
            let high = gather::<T>(p.add(2), stride)[0];
            put_five_bits::<T>(to, gather::<T>(p.add(6), stride), high);
        }
    }
}

impl Strip for Q5_1 {
    type L = Blocks32<true, false>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            let head = gather::<T>(p, stride);
            put_scale_and_min::<T, Self::L>(to, head[0], 1.0);
            put_five_bits::<T>(to, gather::<T>(p.add(8), stride), head[1]);
        }
    }
}

impl Strip for Q8_0 {
    type L = Blocks32<false, true>;
    const ZERO: i32 = 128;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            put_floats::<T>(to, Self::L::SCALE, T::low_f16(gather::<T>(p, stride)[0]));
            for half in 0..2 {
                let v = gather::<T>(p.add(2 + 16 * half), stride);
                for i in 0..4 {
                    put::<T>(to, 4 * half + i, T::xor(v[i], T::splat(bytes(128))));
                }
            }
        }
    }
}

/// Byte `i` of every lane, unsigned.
#[inline(always)]
unsafe fn byte<T: Integers>(v: T::I, i: usize) -> T::I {
    // SAFETY: the caller's.
    unsafe { T::and(T::down(v, 8 * i as u32), T::splat(255)) }
}

/// The scales of groups from `4 at`, a byte each in `scales`, and their offsets.
#[inline(always)]
unsafe fn put_groups<T: Integers, L: Layout>(to: *mut i32, at: usize, scales: T::I, mins: T::I) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..4 {
            put::<T>(to, L::SCALES + 4 * at + i, byte::<T>(scales, i));
        }
        for i in 0..2 {
            let pair = pair::<T>(byte::<T>(mins, 2 * i), byte::<T>(mins, 2 * i + 1));
            put::<T>(to, L::OFFSETS + 2 * at + i, pair);
        }
    }
}

/// As [`put_groups`], of scales `bias` above the true ones, for values with the zero point
/// `1 << zero`.
#[inline(always)]
unsafe fn put_signed_groups<T: Integers, L: Layout>(
    to: *mut i32,
    at: usize,
    scales: T::I,
    bias: i32,
    zero: u32,
) {
    // SAFETY: the caller's.
    unsafe {
        for i in 0..2 {
            let first = T::sub(byte::<T>(scales, 2 * i), T::splat(bias));
            let second = T::sub(byte::<T>(scales, 2 * i + 1), T::splat(bias));
            put::<T>(to, L::SCALES + 4 * at + 2 * i, first);
            put::<T>(to, L::SCALES + 4 * at + 2 * i + 1, second);
            let pair = pair::<T>(T::up(first, zero), T::up(second, zero));
            put::<T>(to, L::OFFSETS + 2 * at + i, pair);
        }
    }
}

/// 32 bytes of every row.
#[inline(always)]
unsafe fn gather_32<T: Integers>(p: *const u8, stride: usize) -> [T::I; 8] {
    // SAFETY: the caller's.
    unsafe {
        let [a, b, c, d] = gather::<T>(p, stride);
        let [e, f, g, h] = gather::<T>(p.add(16), stride);
        [a, b, c, d, e, f, g, h]
    }
}

impl Strip for Q2_K {
    type L = Blocks256<16, true>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            put_scale_and_min::<T, Self::L>(to, gather::<T>(p.add(68), stride)[3], -1.0);
            let groups = gather::<T>(p, stride);
            for at in 0..4 {
                let (scales, mins) = (bits::<T>(groups[at], 0, 15), bits::<T>(groups[at], 4, 15));
                put_groups::<T, Self::L>(to, at, scales, mins);
            }
            for half in 0..2 {
                let two = gather_32::<T>(p.add(16 + 32 * half), stride);
                for j in 0..4 {
                    for i in 0..8 {
                        put::<T>(to, 32 * half + 8 * j + i, bits::<T>(two[i], 2 * j as u32, 3));
                    }
                }
            }
        }
    }
}

impl Strip for Q3_K {
    type L = Blocks256<16, false>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            let scale = T::down(gather::<T>(p.add(94), stride)[3], 16);
            put_floats::<T>(to, Self::L::SCALE, T::low_f16(scale));
            let [_, a, b, high] = gather::<T>(p.add(92), stride);
            for at in 0..4 {
                let low = bits::<T>(if at % 2 == 0 { a } else { b }, at as u32 / 2 * 4, 15);
                let scales = T::or(low, T::up(bits::<T>(high, 2 * at as u32, 3), 4));
                put_signed_groups::<T, Self::L>(to, at, scales, 32, 2);
            }
            let third = gather_32::<T>(p, stride);
            for half in 0..2 {
                let two = gather_32::<T>(p.add(32 + 32 * half), stride);
                for j in 0..4 {
                    for i in 0..8 {
                        let high = T::up(bits::<T>(third[i], (4 * half + j) as u32, 1), 2);
                        let low = bits::<T>(two[i], 2 * j as u32, 3);
                        put::<T>(to, 32 * half + 8 * j + i, T::or(low, high));
                    }
                }
            }
        }
    }
}

/// The first 16 bytes of q4_k and q5_k.
#[inline(always)]
unsafe fn put_six_bit_groups<T: Integers, L: Layout>(p: *const u8, stride: usize, to: *mut i32) {
    // SAFETY: the caller's.
    unsafe {
        let [head, a, b, c] = gather::<T>(p, stride);
        put_scale_and_min::<T, L>(to, head, -1.0);
        put_groups::<T, L>(to, 0, bits::<T>(a, 0, 63), bits::<T>(b, 0, 63));
        let scales = T::or(bits::<T>(c, 0, 15), bits::<T>(a, 2, 48));
        let mins = T::or(bits::<T>(c, 4, 15), bits::<T>(b, 2, 48));
        put_groups::<T, L>(to, 1, scales, mins);
    }
}

impl Strip for Q4_K {
    type L = Blocks256<8, true>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            put_six_bit_groups::<T, Self::L>(p, stride, to);
            for i in 0..8 {
                let v = gather::<T>(p.add(16 + 16 * i), stride);
                put_nibbles::<T>(to, i / 2 * 16 + i % 2 * 4, 8, v);
            }
        }
    }
}

impl Strip for Q5_K {
    type L = Blocks256<8, true>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            put_six_bit_groups::<T, Self::L>(p, stride, to);
            let fifth = gather_32::<T>(p.add(16), stride);
            for j in 0..4 {
                let four = gather_32::<T>(p.add(48 + 32 * j), stride);
                for half in 0..2 {
                    for i in 0..8 {
                        let low = bits::<T>(four[i], 4 * half as u32, 15);
                        let high = T::up(bits::<T>(fifth[i], (2 * j + half) as u32, 1), 4);
                        put::<T>(to, 16 * j + 8 * half + i, T::or(low, high));
                    }
                }
            }
        }
    }
}

impl Strip for Q6_K {
    type L = Blocks256<16, false>;

    #[inline(always)]
    unsafe fn take_apart<T: Integers>(p: *const u8, stride: usize, to: *mut i32) {
        // SAFETY: as above.
        unsafe {
            let scale = T::down(gather::<T>(p.add(194), stride)[3], 16);
            put_floats::<T>(to, Self::L::SCALE, T::low_f16(scale));
            let scales = gather::<T>(p.add(192), stride);
            for at in 0..4 {
                // Signed bytes, 128 added.
                let scales = T::xor(scales[at], T::splat(bytes(128)));
                put_signed_groups::<T, Self::L>(to, at, scales, 128, 5);
            }
            for half in 0..2 {
                let high = gather_32::<T>(p.add(128 + 32 * half), stride);
                for j in 0..2 {
                    let low = gather_32::<T>(p.add(64 * half + 32 * j), stride);
                    for i in 0..8 {
                        let at = 32 * half + 8 * j + i;
                        let two = bits::<T>(high[i], 2 * j as u32, 3);
                        put::<T>(to, at, T::or(bits::<T>(low[i], 0, 15), T::up(two, 4)));
                        let two = bits::<T>(high[i], 4 + 2 * j as u32, 3);
                        put::<T>(to, at + 16, T::or(bits::<T>(low[i], 4, 15), T::up(two, 4)));
                    }
                }
            }
        }
    }
}
