//! Sixteen rows of weights with a single activation, in AVX-512 with VNNI.
//!
//! A strip brings every row's bytes into a lane, which pays when several activations use
//! them. One activation reads weights once, as fast as they come from memory: here four rows at
//! a time are read along themselves. A block's products stay whole integers whatever their
//! order; the sums of four rows then become lanes, and join the floats as a strip's do.
//! So outputs have the same bits.
//!
//! Left out: other types and other tiers, which take strips for one activation too.

use std::arch::x86_64::*;

use super::super::super::simd::{Avx512, LANES, Simd};
use super::super::format::{Q4_0, Q4_K, Q5_K, Q6_K, Q8_0};
use super::super::{QuantMatrix, QuantType};
use super::Kind;
use super::activations::{Activations, words};
use super::strip::Strip;

/// Rows that are read together.
const ROWS: usize = 4;
/// Bytes of a cache line.
const LINE: usize = 64;

/// The products of rows `row..row + 16` of `w`, which are there, with activation `i`, where
/// type and tier have a kernel for that.
pub(super) fn sixteen(
    kind: Kind,
    x: &Activations,
    i: usize,
    w: &QuantMatrix<'_>,
    row: usize,
) -> Option<[f32; LANES]> {
    if kind != Kind::Vnni {
        return None;
    }
    // SAFETY: the kind was detected; the matrix has these rows.
    unsafe {
        match w.quant {
            QuantType::Q4_0 => in_fours::<Q4_0>(x, i, w, row),
            QuantType::Q8_0 => in_fours::<Q8_0>(x, i, w, row),
            QuantType::Q4_K => in_fours::<Q4_K>(x, i, w, row),
            QuantType::Q5_K => in_fours::<Q5_K>(x, i, w, row),
            QuantType::Q6_K => in_fours::<Q6_K>(x, i, w, row),
            _ => None,
        }
    }
}

/// None where a row is not a whole number of [`Streamed::STEP`]s.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn in_fours<F: Streamed>(
    x: &Activations,
    i: usize,
    w: &QuantMatrix<'_>,
    row: usize,
) -> Option<[f32; LANES]> {
    let blocks = w.row_blocks();
    if !blocks.is_multiple_of(F::STEP) {
        return None;
    }
    let mut sums = [0.0; LANES];
    for (four, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        // SAFETY: the rows are there, and the activation's blocks.
        unsafe {
            let mut p = w.data.as_ptr().add((row + four * ROWS) * w.stride);
            let mut x_bytes = x.bytes.as_ptr().add(i * blocks * F::LEN);
            let mut x_words = x.blocks.as_ptr().add(i * blocks * words::<F::L>());
            let mut sum = _mm_setzero_ps();
            for _ in (0..blocks).step_by(F::STEP) {
                prefetch(p, w.stride, F::STEP * size_of::<F::Block>());
                sum = F::add(p, w.stride, x_bytes, x_words, sum);
                p = p.add(F::STEP * size_of::<F::Block>());
                x_bytes = x_bytes.add(F::STEP * F::LEN);
                x_words = x_words.add(F::STEP * words::<F::L>());
            }
            _mm_storeu_ps(sums.as_mut_ptr(), sum);
        }
    }
    Some(sums)
}

/// Brings the lines that begin in `bytes` of each of the four rows after the next four near.
#[inline(always)]
fn prefetch(p: *const u8, stride: usize, bytes: usize) {
    for r in 2 * ROWS..3 * ROWS {
        let from = p as usize + r * stride;
        let mut line = from.next_multiple_of(LINE);
        while line < from + bytes {
            Avx512::prefetch_far(p.wrapping_add(line - p as usize));
            line += LINE;
        }
    }
}

/// A type whose rows can be read along themselves.
trait Streamed: Strip {
    /// Blocks that are read at once.
    const STEP: usize;

    /// Adds [`Self::STEP`] blocks to `sums`, a lane for each of the rows that begin at `p`,
    /// `stride` apart.
    ///
    /// # Safety
    /// The CPU features of AVX-512 with VNNI; the blocks are there, and `x` and its `words`.
    unsafe fn add(
        p: *const u8,
        stride: usize,
        x: *const i8,
        words: *const i32,
        sums: __m128,
    ) -> __m128;
}

/// The sums of each row's lanes 0 to 3, 4 to 7 and so on: lane r of each four is row r's.
#[inline(always)]
unsafe fn sums_of_lanes([a, b, c, d]: [__m512i; ROWS]) -> __m512i {
    // SAFETY: the caller's features.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// The sums of all lanes of each row, as floats.
#[inline(always)]
unsafe fn sums_of_rows(rows: [__m512i; ROWS]) -> __m128 {
    // SAFETY: the caller's features.
    unsafe {
        let v = sums_of_lanes(rows);
        let v = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
        let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        _mm_cvtepi32_ps(v)
    }
}

/// Four bytes of each row.
#[inline(always)]
unsafe fn word_of_rows(p: *const u8, stride: usize) -> __m128i {
    // SAFETY: the caller's rows.
    let word = |r: usize| unsafe { p.add(r * stride).cast::<i32>().read_unaligned() };
    // SAFETY: the caller's features.
    unsafe { _mm_set_epi32(word(3), word(2), word(1), word(0)) }
}

/// The f16s in the low halves.
#[inline(always)]
unsafe fn low_f16(v: __m128i) -> __m128 {
    // SAFETY: the caller's features.
    unsafe { _mm_cvtph_ps(_mm_cvtepi32_epi16(v)) }
}

/// The low and the high four bits of every byte.
#[inline(always)]
unsafe fn nibbles(v: __m512i) -> [__m512i; 2] {
    // SAFETY: the caller's features.
    unsafe {
        let low = _mm512_set1_epi8(15);
        [_mm512_and_si512(v, low), _mm512_and_si512(_mm512_srli_epi16::<4>(v), low)]
    }
}

/// `v` with the bits `mask` of `high`, moved up by `up[0]` in the lower half and by `up[1]`
/// in the upper one; less than zero is down.
#[inline(always)]
unsafe fn with_high_bits(v: __m512i, high: __m512i, up: [i32; 2], mask: i8) -> __m512i {
    // SAFETY: the caller's features.
    unsafe {
        let (lower, upper) = (_mm256_set1_epi32(up[0]), _mm256_set1_epi32(up[1]));
        let up = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper);
        // Rotated, as the mask leaves nothing of what comes from other bytes.
        let high = _mm512_and_si512(_mm512_rolv_epi32(high, up), _mm512_set1_epi8(mask));
        _mm512_or_si512(v, high)
    }
}

/// 32 bytes, twice.
#[inline(always)]
unsafe fn twice(p: *const u8) -> __m512i {
    // SAFETY: the caller's features and bytes.
    unsafe { _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())) }
}

/// `sum` plus the products of `u` and `x` times the scales in lanes' low halves: sums of four
/// products of bytes up to 63 and 127 fit into 16 bits.
#[inline(always)]
unsafe fn add_scaled(sum: __m512i, u: __m512i, x: __m512i, scales: __m512i) -> __m512i {
    // SAFETY: the caller's features.
    unsafe { _mm512_dpwssd_epi32(sum, _mm512_dpbusd_epi32(_mm512_setzero_si512(), u, x), scales) }
}

/// Four blocks of 32 values; `bytes` reads two, as [`Strip::take_apart`] stores them.
#[inline(always)]
unsafe fn add_blocks_of_32<F: Strip>(
    p: *const u8,
    stride: usize,
    x: *const i8,
    words: *const i32,
    sums: __m128,
    bytes: impl Fn(*const u8) -> __m512i,
) -> __m128 {
    // SAFETY: the caller's.
    unsafe {
        let block = size_of::<F::Block>();
        let mut pairs = [[_mm512_setzero_si512(); ROWS]; 2];
        for (i, pair) in pairs.iter_mut().enumerate() {
            let x = _mm512_loadu_si512(x.add(64 * i).cast());
            for (r, sum) in pair.iter_mut().enumerate() {
                *sum = _mm512_dpbusd_epi32(*sum, bytes(p.add(r * stride + 2 * i * block)), x);
            }
        }
        let (first, second) = (sums_of_lanes(pairs[0]), sums_of_lanes(pairs[1]));
        let even = _mm512_shuffle_i64x2::<0b10_00_10_00>(first, second);
        let odd = _mm512_shuffle_i64x2::<0b11_01_11_01>(first, second);
        let words = _mm512_castsi256_si512(_mm256_loadu_si256(words.cast()));
        let scales_at = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
        let offsets_at = _mm512_add_epi32(scales_at, _mm512_set1_epi32(1));
        let offsets = _mm512_permutexvar_epi32(offsets_at, words);
        let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_add_epi32(even, odd), offsets));
        let scale = |i: usize| p.add(i % ROWS * stride + i / ROWS * block).cast::<i16>();
        let scale = |i: usize| scale(i).read_unaligned();
        let half = |i| {
            let (a, b, c, d) = (scale(i), scale(i + 1), scale(i + 2), scale(i + 3));
            let (e, f, g, h) = (scale(i + 4), scale(i + 5), scale(i + 6), scale(i + 7));
            _mm_set_epi16(h, g, f, e, d, c, b, a)
        };
        let scales = _mm512_cvtph_ps(_mm256_set_m128i(half(8), half(0)));
        let x_scales = _mm512_castsi512_ps(_mm512_permutexvar_epi32(scales_at, words));
        let scales = _mm512_mul_ps(scales, x_scales);
        let sums = _mm_fmadd_ps(_mm512_castps512_ps128(sum), _mm512_castps512_ps128(scales), sums);
        let (s, t) = (_mm512_extractf32x4_ps::<1>(sum), _mm512_extractf32x4_ps::<1>(scales));
        let sums = _mm_fmadd_ps(s, t, sums);
        let (s, t) = (_mm512_extractf32x4_ps::<2>(sum), _mm512_extractf32x4_ps::<2>(scales));
        let sums = _mm_fmadd_ps(s, t, sums);
        let (s, t) = (_mm512_extractf32x4_ps::<3>(sum), _mm512_extractf32x4_ps::<3>(scales));
        _mm_fmadd_ps(s, t, sums)
    }
}

impl Streamed for Q8_0 {
    const STEP: usize = 4;

    #[inline(always)]
    unsafe fn add(
        p: *const u8,
        stride: usize,
        x: *const i8,
        words: *const i32,
        sums: __m128,
    ) -> __m128 {
        // SAFETY: the caller's; reads stay inside the blocks.
        unsafe {
            add_blocks_of_32::<Self>(p, stride, x, words, sums, |p| {
                let first = _mm512_castsi256_si512(_mm256_loadu_si256(p.add(2).cast()));
                let second = _mm256_loadu_si256(p.add(size_of::<Self::Block>() + 2).cast());
                let both = _mm512_inserti64x4::<1>(first, second);
                _mm512_xor_si512(both, _mm512_set1_epi8(-128))
            })
        }
    }
}

impl Streamed for Q4_0 {
    const STEP: usize = 4;

    #[inline(always)]
    unsafe fn add(
        p: *const u8,
        stride: usize,
        x: *const i8,
        words: *const i32,
        sums: __m128,
    ) -> __m128 {
        // SAFETY: as above.
        unsafe {
            add_blocks_of_32::<Self>(p, stride, x, words, sums, |p| {
                let first = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.add(2).cast()));
                let second = _mm_loadu_si128(p.add(size_of::<Self::Block>() + 2).cast());
                let second = _mm256_broadcastsi128_si256(second);
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
                let down = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
                _mm512_and_si512(_mm512_srlv_epi64(both, down), _mm512_set1_epi8(15))
            })
        }
    }
}

/// The scales and the minimums of the eight groups of q4_k and q5_k, a byte each.
#[inline(always)]
unsafe fn six_bits(p: *const u8) -> [i64; 2] {
    // SAFETY: the caller's bytes.
    let word = |at| unsafe { u32::from_le(p.add(at).cast::<u32>().read_unaligned()) };
    let (a, b, c) = (word(4), word(8), word(12));
    let all = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32) as i64;
    let high = |low: u32, c: u32| low >> 2 & 0x3030_3030 | c & 0x0f0f_0f0f;
    [all(a & 0x3f3f_3f3f, high(a, c)), all(b & 0x3f3f_3f3f, high(b, c >> 4))]
}

/// Where [`add_six_bit_groups`] finds the scales of the lanes' groups: the even groups of 128
/// values, then the odd ones. A byte from 128 is zero.
const GROUP_OF_LANES: [[u8; 64]; 4] = {
    let mut all = [[128; 64]; 4];
    let mut i = 0;
    while i < 64 {
        let (v, lane) = (i / 16, i % 16);
        all[v][4 * lane] = (v / 2 * 4 + v % 2 + lane / 8 * 2) as u8;
        i += 1;
    }
    all
};

/// A block of q4_k, or with `FIFTH` bits of q5_k.
#[inline(always)]
unsafe fn add_six_bit_groups<const FIFTH: bool>(
    p: *const u8,
    stride: usize,
    x: *const i8,
    words: *const i32,
    sums: __m128,
) -> __m128 {
    // SAFETY: the caller's.
    unsafe {
        let load = |at: usize| _mm512_loadu_si512(x.add(at).cast());
        let even = |at| _mm512_shuffle_i64x2::<0b01_00_01_00>(load(at), load(at + 64));
        let odd = |at| _mm512_shuffle_i64x2::<0b11_10_11_10>(load(at), load(at + 64));
        let x = [even(0), odd(0), even(128), odd(128)];
        let (mut dots, mut mins) = ([_mm512_setzero_si512(); ROWS], [0; ROWS]);
        for r in 0..ROWS {
            let p = p.add(r * stride);
            let [scales, row_mins] = six_bits(p);
            mins[r] = row_mins;
            for half in 0..2 {
                let four = p.add(if FIFTH { 48 } else { 16 } + 64 * half);
                let [mut low, mut high] = nibbles(_mm512_loadu_si512(four.cast()));
                if FIFTH {
                    let (fifth, up) = (twice(p.add(16)), 4 - 4 * half as i32);
                    low = with_high_bits(low, fifth, [up, up - 2], 16);
                    high = with_high_bits(high, fifth, [up - 1, up - 3], 16);
                }
                for (i, u) in [(2 * half, low), (2 * half + 1, high)] {
                    let at = _mm512_loadu_si512(GROUP_OF_LANES[i].as_ptr().cast());
                    let scales = _mm512_shuffle_epi8(_mm512_set1_epi64(scales), at);
                    dots[r] = add_scaled(dots[r], u, x[i], scales);
                }
            }
        }
        let x_sums = _mm512_broadcast_i32x4(_mm_loadu_si128(words.add(1).cast()));
        let mins = _mm512_cvtepu8_epi16(_mm256_set_epi64x(mins[3], mins[2], mins[1], mins[0]));
        let offset = _mm512_madd_epi16(mins, x_sums);
        let offset = _mm512_add_epi32(offset, _mm512_shuffle_epi32::<0b10_11_00_01>(offset));
        let offset = _mm512_add_epi32(offset, _mm512_shuffle_epi32::<0b01_00_11_10>(offset));
        // Row r's is in every lane of four r.
        let offset =
            _mm512_permutexvar_epi32(_mm512_castsi128_si512(_mm_set_epi32(12, 8, 4, 0)), offset);
        let offset = _mm_cvtepi32_ps(_mm512_castsi512_si128(offset));
        let (head, x_scale) = (word_of_rows(p, stride), _mm_set1_ps(words.cast::<f32>().read()));
        let scale = _mm_mul_ps(low_f16(head), x_scale);
        let min = _mm_mul_ps(low_f16(_mm_srli_epi32::<16>(head)), _mm_set1_ps(-1.0));
        let sums = _mm_fmadd_ps(sums_of_rows(dots), scale, sums);
        _mm_fmadd_ps(offset, _mm_mul_ps(min, x_scale), sums)
    }
}

impl Streamed for Q4_K {
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn add(
        p: *const u8,
        stride: usize,
        x: *const i8,
        words: *const i32,
        sums: __m128,
    ) -> __m128 {
        // SAFETY: as above.
        unsafe { add_six_bit_groups::<false>(p, stride, x, words, sums) }
    }
}

impl Streamed for Q5_K {
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn add(
        p: *const u8,
        stride: usize,
        x: *const i8,
        words: *const i32,
        sums: __m128,
    ) -> __m128 {
        // SAFETY: as above.
        unsafe { add_six_bit_groups::<true>(p, stride, x, words, sums) }
    }
}

impl Streamed for Q6_K {
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn add(
        p: *const u8,
        stride: usize,
        x: *const i8,
        words: *const i32,
        sums: __m128,
    ) -> __m128 {
        // SAFETY: as above.
        unsafe {
            let x_sums = _mm256_loadu_si256(words.add(1).cast());
            let minus_x_sums = _mm256_sub_epi16(_mm256_setzero_si256(), x_sums);
            let mut dots = [_mm512_setzero_si512(); ROWS];
            for r in 0..ROWS {
                let p = p.add(r * stride);
                let scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.add(192).cast()));
                // 32 times, for the zero point.
                let offset = _mm256_slli_epi32::<5>(_mm256_madd_epi16(scales, minus_x_sums));
                dots[r] = _mm512_zextsi256_si512(offset);
                let scales = _mm512_cvtepu16_epi32(scales);
                for half in 0..2 {
                    let [low, high] = nibbles(_mm512_loadu_si512(p.add(64 * half).cast()));
                    let two = twice(p.add(128 + 32 * half));
                    let low = with_high_bits(low, two, [4, 2], 0x30);
                    let high = with_high_bits(high, two, [0, -2], 0x30);
                    for (i, u) in [(2 * half, low), (2 * half + 1, high)] {
                        let at = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                        let at = _mm512_add_epi32(at, _mm512_set1_epi32(4 * i as i32));
                        let scales = _mm512_permutexvar_epi32(at, scales);
                        let x = _mm512_loadu_si512(x.add(64 * i).cast());
                        dots[r] = add_scaled(dots[r], u, x, scales);
                    }
                }
            }
            let x_scale = _mm_set1_ps(words.cast::<f32>().read());
            let scale = low_f16(_mm_srli_epi32::<16>(word_of_rows(p.add(206), stride)));
            _mm_fmadd_ps(sums_of_rows(dots), _mm_mul_ps(scale, x_scale), sums)
        }
    }
}
