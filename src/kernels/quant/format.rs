//! How each type's blocks come apart: small integers, and a scale (and a minimum)
//! for each group of them.
//!
//! The code is plain loops over bytes that the compiler turns into vectors of the
//! tier it is inlined in; the arithmetic on floats is left to the callers, but for
//! the scales, whose products are rounded as ggml rounds them.

#![allow(non_camel_case_types, reason = "the names of the field")]
#![allow(clippy::needless_range_loop, reason = "loops over several arrays at once")]

use super::super::simd::{LANES, Simd};

/// Values of the longest block.
pub(super) const MAX_LEN: usize = 256;

/// A block taken apart: value i is `q[i] * scale[g] - min[g]`, each operation
/// rounded, where g is its group.
pub(super) struct Unpacked {
    pub(super) q: [i8; MAX_LEN],
    pub(super) scale: [f32; MAX_LEN / 16],
    pub(super) min: [f32; MAX_LEN / 16],
}

impl Unpacked {
    pub(super) const ZERO: Self = Self { q: [0; MAX_LEN], scale: [0.0; 16], min: [0.0; 16] };
}

/// A type of blocks.
pub(super) trait Format {
    /// A block's bytes.
    type Block;
    /// Values of a block.
    const LEN: usize;
    /// Values of a group, 16 or 32.
    const GROUP: usize;
    /// Whether values have a minimum taken off.
    const MIN: bool;
    /// For types of four bits: the values that the bits 0 to 15 stand for. A product
    /// is then looked up rather than computed.
    const CODES: Option<[f32; LANES]> = None;
    /// Where a block holds its integers as they are; [`Unpacked::q`] then stays unset.
    const BYTES_AT: Option<usize> = None;

    /// Takes a block apart.
    ///
    /// # Safety
    /// The CPU features of `S`.
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked);
}

/// Runs `$body` with `$f` as the [`Format`] of a [`super::QuantType`].
macro_rules! with_format {
    ($quant:expr, $f:ident => $body:expr) => {
        $crate::kernels::quant::format::with_format!(@ $quant, $f, $body,
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K)
    };
    (@ $quant:expr, $f:ident, $body:expr, $($name:ident)*) => {
        match $quant {
            $($crate::kernels::quant::QuantType::$name => {
                type $f = $crate::kernels::quant::format::$name;
                $body
            })*
        }
    };
}
pub(super) use with_format;

/// The two f16s from `at`; types with one f16 ignore their neighbour's bytes.
///
/// # Safety
/// The CPU features of `S`.
#[inline(always)]
unsafe fn halves<S: Simd>(block: &[u8], at: usize) -> (f32, f32) {
    // SAFETY: the caller's.
    unsafe { S::f16_pair(u32::from_le_bytes(*part(block, at))) }
}

/// Low and high halves of 16 bytes: values 0..16 and 16..32.
#[inline(always)]
fn nibbles(bytes: &[u8; 16], q: &mut [i8; MAX_LEN]) {
    for l in 0..16 {
        q[l] = (bytes[l] & 15) as i8;
        q[l + 16] = (bytes[l] >> 4) as i8;
    }
}

/// As [`nibbles`], with bit i of the 32 of `high` as value i's fifth, less `zero`.
///
/// # Safety
/// The CPU features of `S`.
#[inline(always)]
unsafe fn five_bits<S: Simd>(high: u32, bytes: &[u8; 16], zero: i8, q: &mut [i8; MAX_LEN]) {
    // SAFETY: the caller's.
    let fifth = unsafe { S::fifth_bits(high) };
    for l in 0..16 {
        q[l] = (bytes[l] & 15 | fifth[l]) as i8 - zero;
        q[l + 16] = (bytes[l] >> 4 | fifth[l + 16]) as i8 - zero;
    }
}

/// A fixed range of a block.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..at + N].try_into().expect("N bytes")
}

const UNSIGNED: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// f16 scale, 16 bytes of nibbles; value = (nibble - 8) * scale.
pub(super) struct Q4_0;

impl Format for Q4_0 {
    type Block = [u8; 18];
    const LEN: usize = 32;
    const GROUP: usize = 32;
    const MIN: bool = false;
    const CODES: Option<[f32; LANES]> = Some([
        -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0,
    ]);

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        (to.scale[0], _) = unsafe { halves::<S>(block, 0) };
        nibbles(part(block, 2), &mut to.q);
    }
}

/// f16 scale and offset, 16 bytes of nibbles; value = nibble * scale + offset.
pub(super) struct Q4_1;

impl Format for Q4_1 {
    type Block = [u8; 20];
    const LEN: usize = 32;
    const GROUP: usize = 32;
    const MIN: bool = true;
    const CODES: Option<[f32; LANES]> = Some(UNSIGNED);

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        (to.scale[0], to.min[0]) = unsafe { halves::<S>(block, 0) };
        // Subtracting the negated offset is adding it.
        to.min[0] = -to.min[0];
        nibbles(part(block, 4), &mut to.q);
    }
}

/// f16 scale, 32 fifth bits, 16 bytes of nibbles; value = (5 bits - 16) * scale.
pub(super) struct Q5_0;

impl Format for Q5_0 {
    type Block = [u8; 22];
    const LEN: usize = 32;
    const GROUP: usize = 32;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        (to.scale[0], _) = unsafe { halves::<S>(block, 0) };
        let high = u32::from_le_bytes(*part(block, 2));
        // SAFETY: the caller's.
        unsafe { five_bits::<S>(high, part(block, 6), 16, &mut to.q) };
    }
}

/// f16 scale and offset, 32 fifth bits, 16 bytes of nibbles; value = 5 bits * scale + offset.
pub(super) struct Q5_1;

impl Format for Q5_1 {
    type Block = [u8; 24];
    const LEN: usize = 32;
    const GROUP: usize = 32;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        (to.scale[0], to.min[0]) = unsafe { halves::<S>(block, 0) };
        to.min[0] = -to.min[0];
        let high = u32::from_le_bytes(*part(block, 4));
        // SAFETY: the caller's.
        unsafe { five_bits::<S>(high, part(block, 8), 0, &mut to.q) };
    }
}

/// f16 scale, 32 signed bytes; value = byte * scale.
pub(super) struct Q8_0;

impl Format for Q8_0 {
    type Block = [u8; 34];
    const LEN: usize = 32;
    const GROUP: usize = 32;
    const MIN: bool = false;
    const BYTES_AT: Option<usize> = Some(2);

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        (to.scale[0], _) = unsafe { halves::<S>(block, 0) };
    }
}

/// 16 bytes of scale (low nibble) and minimum (high nibble), 64 bytes of 2-bit
/// values, f16 scales of the scales and of the minimums.
pub(super) struct Q2_K;

impl Format for Q2_K {
    type Block = [u8; 84];
    const LEN: usize = 256;
    const GROUP: usize = 16;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        let (d, dmin) = unsafe { halves::<S>(block, 80) };
        for g in 0..16 {
            to.scale[g] = d * f32::from(block[g] & 15);
            to.min[g] = dmin * f32::from(block[g] >> 4);
        }
        two_bits(part(block, 16), &mut to.q);
    }
}

/// 2-bit values: byte l of each 32 holds values l, l + 32, l + 64 and l + 96.
#[inline(always)]
fn two_bits(bytes: &[u8; 64], q: &mut [i8; MAX_LEN]) {
    for half in 0..2 {
        let bytes: &[u8; 32] = part(bytes, half * 32);
        for j in 0..4 {
            let q = &mut q[half * 128 + j * 32..][..32];
            for l in 0..32 {
                q[l] = (bytes[l] >> (2 * j) & 3) as i8;
            }
        }
    }
}

/// 32 bytes of third bits (inverted sign), 64 bytes of 2-bit values, 16 scales of 6
/// bits in 12 bytes, f16 scale of the scales; value = (3 bits - 4) * scale.
pub(super) struct Q3_K;

impl Format for Q3_K {
    type Block = [u8; 110];
    const LEN: usize = 256;
    const GROUP: usize = 16;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        let (_, d) = unsafe { halves::<S>(block, 106) };
        // Scale g: its low nibble in byte g % 8, its high bits in byte 8 + g % 4.
        let a = u32::from_le_bytes(*part(block, 96));
        let b = u32::from_le_bytes(*part(block, 100));
        let high = u32::from_le_bytes(*part(block, 104));
        let low = [a, b, a >> 4, b >> 4];
        for j in 0..4 {
            let scales = low[j] & 0x0f0f_0f0f | (high >> (2 * j) & 0x0303_0303) << 4;
            let scales = scales.to_le_bytes();
            for l in 0..4 {
                to.scale[4 * j + l] = d * f32::from(scales[l] as i8 - 32);
            }
        }
        two_bits(part(block, 32), &mut to.q);
        let third: &[u8; 32] = part(block, 0);
        for j in 0..8 {
            let q = &mut to.q[j * 32..][..32];
            for l in 0..32 {
                q[l] += ((third[l] >> j & 1) << 2) as i8 - 4;
            }
        }
    }
}

/// Scales and minimums of 8 groups, 6 bits each in 12 bytes, as q4_k and q5_k hold them.
#[inline(always)]
fn six_bit_scales(packed: &[u8; 12], d: f32, dmin: f32, to: &mut Unpacked) {
    for g in 0..4 {
        let (a, b, c) = (packed[g], packed[g + 4], packed[g + 8]);
        to.scale[g] = d * f32::from(a & 63);
        to.min[g] = dmin * f32::from(b & 63);
        to.scale[g + 4] = d * f32::from(c & 15 | a >> 6 << 4);
        to.min[g + 4] = dmin * f32::from(c >> 4 | b >> 6 << 4);
    }
}

/// Low and high halves of 4 times 32 bytes: values 0..32 and 32..64 of each 64.
#[inline(always)]
fn wide_nibbles(bytes: &[u8; 128], q: &mut [i8; MAX_LEN]) {
    for j in 0..4 {
        let bytes: &[u8; 32] = part(bytes, j * 32);
        let q = &mut q[j * 64..][..64];
        for l in 0..32 {
            q[l] = (bytes[l] & 15) as i8;
            q[l + 32] = (bytes[l] >> 4) as i8;
        }
    }
}

/// f16 scales of the scales and of the minimums, 12 bytes of both, 128 bytes of nibbles.
pub(super) struct Q4_K;

impl Format for Q4_K {
    type Block = [u8; 144];
    const LEN: usize = 256;
    const GROUP: usize = 32;
    const MIN: bool = true;
    const CODES: Option<[f32; LANES]> = Some(UNSIGNED);

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        let (d, dmin) = unsafe { halves::<S>(block, 0) };
        six_bit_scales(part(block, 4), d, dmin, to);
        wide_nibbles(part(block, 16), &mut to.q);
    }
}

/// As q4_k, with 32 bytes of fifth bits before the nibbles: bit g of byte l is of
/// value l of group g.
pub(super) struct Q5_K;

impl Format for Q5_K {
    type Block = [u8; 176];
    const LEN: usize = 256;
    const GROUP: usize = 32;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        let (d, dmin) = unsafe { halves::<S>(block, 0) };
        six_bit_scales(part(block, 4), d, dmin, to);
        wide_nibbles(part(block, 48), &mut to.q);
        let fifth: &[u8; 32] = part(block, 16);
        for g in 0..8 {
            let q = &mut to.q[g * 32..][..32];
            for l in 0..32 {
                q[l] |= ((fifth[l] >> g & 1) << 4) as i8;
            }
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of high 2 bits, 16 signed scales, f16 scale of
/// the scales; value = (6 bits - 32) * scale.
pub(super) struct Q6_K;

impl Format for Q6_K {
    type Block = [u8; 210];
    const LEN: usize = 256;
    const GROUP: usize = 16;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn unpack<S: Simd>(block: &Self::Block, to: &mut Unpacked) {
        // SAFETY: the caller's.
        let (_, d) = unsafe { halves::<S>(block, 206) };
        for g in 0..16 {
            to.scale[g] = d * f32::from(block[192 + g] as i8);
        }
        for half in 0..2 {
            let low: &[u8; 64] = part(block, half * 64);
            let high: &[u8; 32] = part(block, 128 + half * 32);
            let q = &mut to.q[half * 128..][..128];
            for l in 0..32 {
                let (a, b, h) = (low[l], low[l + 32], high[l]);
                q[l] = (a & 15 | (h & 3) << 4) as i8 - 32;
                q[l + 32] = (b & 15 | (h >> 2 & 3) << 4) as i8 - 32;
                q[l + 64] = (a >> 4 | (h >> 4 & 3) << 4) as i8 - 32;
                q[l + 96] = (b >> 4 | (h >> 6) << 4) as i8 - 32;
            }
        }
    }
}
