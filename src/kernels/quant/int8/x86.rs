//! [`Integers`] in AVX2, in AVX-512, and in AVX-512 with VNNI, whose one instruction does
//! what takes the others three.

use std::arch::x86_64::*;

use super::super::super::simd::{Avx2, Avx512};
use super::lanes::Integers;

/// The low four bits of a byte.
const LOW: i8 = 15;

// SAFETY of the intrinsics below: the trait's contract (features, valid pointers).
impl Integers for Avx2 {
    type S = Avx2;
    type I = (__m256i, __m256i);

    #[inline(always)]
    unsafe fn splat(x: i32) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_set1_epi32(x), _mm256_set1_epi32(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const i32) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut i32, v: Self::I) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_si256(p.cast(), v.0);
            _mm256_storeu_si256(p.add(8).cast(), v.1);
        }
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_and_si256(a.0, b.0), _mm256_and_si256(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_xor_si256(a.0, b.0), _mm256_xor_si256(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_sub_epi32(a.0, b.0), _mm256_sub_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { (_mm256_mullo_epi32(a.0, b.0), _mm256_mullo_epi32(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn up(a: Self::I, n: u32) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let n = _mm_cvtsi32_si128(n as i32);
            (_mm256_sll_epi32(a.0, n), _mm256_sll_epi32(a.1, n))
        }
    }
    #[inline(always)]
    unsafe fn down(a: Self::I, n: u32) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let n = _mm_cvtsi32_si128(n as i32);
            (_mm256_srl_epi32(a.0, n), _mm256_srl_epi32(a.1, n))
        }
    }
    #[inline(always)]
    unsafe fn dot_halves(a: Self::I, b: Self::I, sum: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let one = |a, b, sum| _mm256_add_epi32(_mm256_madd_epi16(a, b), sum);
            (one(a.0, b.0, sum.0), one(a.1, b.1, sum.1))
        }
    }
    #[inline(always)]
    unsafe fn dot(wide: bool, u: [Self::I; 2], x: [Self::I; 2], sum: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe {
            (
                dot_256(wide, [u[0].0, u[1].0], [x[0].0, x[1].0], sum.0),
                dot_256(wide, [u[0].1, u[1].1], [x[0].1, x[1].1], sum.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> (__m256, __m256) {
        // SAFETY: see above.
        unsafe { (_mm256_cvtepi32_ps(a.0), _mm256_cvtepi32_ps(a.1)) }
    }
    #[inline(always)]
    unsafe fn low_f16(a: Self::I) -> (__m256, __m256) {
        // SAFETY: see above.
        unsafe {
            let one = |a| {
                // No value of the low halves is cut off at 65535.
                let low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
                let (first, second) =
                    (_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
                _mm256_cvtph_ps(_mm_packus_epi32(first, second))
            };
            (one(a.0), one(a.1))
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut i8, v: (__m256, __m256)) {
        // SAFETY: see above.
        unsafe {
            let halves = |v| {
                let v = _mm256_cvtps_epi32(v);
                _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v))
            };
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(halves(v.0), halves(v.1)));
        }
    }
    #[inline(always)]
    unsafe fn gather(p: *const u8, stride: usize) -> [Self::I; 4] {
        // SAFETY: see above.
        unsafe {
            let (first, second) = (half_256(p, stride), half_256(p.add(8 * stride), stride));
            [(first.0, second.0), (first.1, second.1), (first.2, second.2), (first.3, second.3)]
        }
    }
}

/// 16 bytes each of rows `r` and `r + 4`.
#[inline(always)]
unsafe fn rows_256(p: *const u8, r: usize, stride: usize) -> __m256i {
    // SAFETY: the caller's features and rows.
    unsafe {
        let first = _mm_loadu_si128(p.add(r * stride).cast());
        let second = _mm_loadu_si128(p.add((r + 4) * stride).cast());
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(first), second)
    }
}

/// 16 bytes each of rows `r`, `r + 4`, `r + 8` and `r + 12`.
#[inline(always)]
unsafe fn rows_512(p: *const u8, r: usize, stride: usize) -> __m512i {
    // SAFETY: the caller's features and rows.
    unsafe {
        let first = _mm512_castsi256_si512(rows_256(p, r, stride));
        _mm512_inserti64x4::<1>(first, rows_256(p, r + 8, stride))
    }
}

/// As [`Integers::gather`], of eight rows.
#[inline(always)]
unsafe fn half_256(p: *const u8, stride: usize) -> (__m256i, __m256i, __m256i, __m256i) {
    // SAFETY: the caller's features and rows.
    unsafe {
        let (a, b) = (rows_256(p, 0, stride), rows_256(p, 1, stride));
        let (c, d) = (rows_256(p, 2, stride), rows_256(p, 3, stride));
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        (
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        )
    }
}

#[inline(always)]
unsafe fn dot_256(wide: bool, u: [__m256i; 2], x: [__m256i; 2], sum: __m256i) -> __m256i {
    // SAFETY: the caller's features.
    unsafe {
        if !wide {
            return sum_of_256(u[0], u[1], x, 1, sum);
        }
        let low = _mm256_set1_epi8(LOW);
        let (a, b) = (_mm256_srli_epi16::<4>(u[0]), _mm256_srli_epi16::<4>(u[1]));
        let (a, b) = (_mm256_and_si256(a, low), _mm256_and_si256(b, low));
        let sum = sum_of_256(a, b, x, 16, sum);
        sum_of_256(_mm256_and_si256(u[0], low), _mm256_and_si256(u[1], low), x, 1, sum)
    }
}

/// `sum + factor * (a · x[0] + b · x[1])`: four products of bytes up to 63 and 127 fit
/// into 16 bits.
#[inline(always)]
unsafe fn sum_of_256(
    a: __m256i,
    b: __m256i,
    x: [__m256i; 2],
    factor: i16,
    sum: __m256i,
) -> __m256i {
    // SAFETY: the caller's features.
    unsafe {
        let both = _mm256_add_epi16(_mm256_maddubs_epi16(a, x[0]), _mm256_maddubs_epi16(b, x[1]));
        _mm256_add_epi32(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(factor)))
    }
}

#[inline(always)]
unsafe fn sum_of_512(
    a: __m512i,
    b: __m512i,
    x: [__m512i; 2],
    factor: i16,
    sum: __m512i,
) -> __m512i {
    // SAFETY: the caller's features.
    unsafe {
        let both = _mm512_add_epi16(_mm512_maddubs_epi16(a, x[0]), _mm512_maddubs_epi16(b, x[1]));
        _mm512_add_epi32(sum, _mm512_madd_epi16(both, _mm512_set1_epi16(factor)))
    }
}

/// AVX-512 F, BW, DQ and VL, and `VNNI` where that is on.
#[derive(Clone, Copy)]
pub(super) struct Integers512<const VNNI: bool>;

// SAFETY of the intrinsics below: the trait's contract (features, valid pointers).
impl<const VNNI: bool> Integers for Integers512<VNNI> {
    type S = Avx512;
    type I = __m512i;

    #[inline(always)]
    unsafe fn splat(x: i32) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const i32) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut i32, v: Self::I) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_mullo_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn up(a: Self::I, n: u32) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn down(a: Self::I, n: u32) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn dot_halves(a: Self::I, b: Self::I, sum: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                _mm512_dpwssd_epi32(sum, a, b)
            } else {
                _mm512_add_epi32(_mm512_madd_epi16(a, b), sum)
            }
        }
    }
    #[inline(always)]
    unsafe fn dot(wide: bool, u: [Self::I; 2], x: [Self::I; 2], sum: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, u[0], x[0]), u[1], x[1]);
            }
            if !wide {
                return sum_of_512(u[0], u[1], x, 1, sum);
            }
            let low = _mm512_set1_epi8(LOW);
            let (a, b) = (_mm512_srli_epi16::<4>(u[0]), _mm512_srli_epi16::<4>(u[1]));
            let (a, b) = (_mm512_and_si512(a, low), _mm512_and_si512(b, low));
            let sum = sum_of_512(a, b, x, 16, sum);
            sum_of_512(_mm512_and_si512(u[0], low), _mm512_and_si512(u[1], low), x, 1, sum)
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn low_f16(a: Self::I) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)) }
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut i8, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
    #[inline(always)]
    unsafe fn gather(p: *const u8, stride: usize) -> [Self::I; 4] {
        // SAFETY: see above.
        unsafe {
            let (a, b) = (rows_512(p, 0, stride), rows_512(p, 1, stride));
            let (c, d) = (rows_512(p, 2, stride), rows_512(p, 3, stride));
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ab_high, cd_high),
                _mm512_unpackhi_epi64(ab_high, cd_high),
            ]
        }
    }
}
