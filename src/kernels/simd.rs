//! A vector of 16 f32 lanes in three widths of hardware.
//!
//! Every tier does the same IEEE operations on the same 16 lanes in the same
//! order (fused multiply-add, a fixed tree for sums), so a kernel written over
//! [`Simd`] gives the same bits under every tier; the tests hold it to that.

use half::{bf16, f16};

/// Lanes of a vector; also the tokens of a KV cache block.
pub const LANES: usize = 16;

/// Sixteen f32 lanes.
///
/// # Safety
/// Every method needs the CPU features of its tier; pointers must be valid for
/// 16 elements, aligned or not.
#[allow(clippy::missing_safety_doc)]
pub trait Simd: Copy {
    /// The vector.
    type V: Copy;
    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::V;
    /// 16 values from memory.
    unsafe fn load(p: *const f32) -> Self::V;
    /// 16 bf16 values, widened exactly.
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    /// 16 f16 values, widened exactly.
    unsafe fn load_f16(p: *const f16) -> Self::V;
    /// 16 signed bytes, widened exactly.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// Lane i of the table for each of 16 bytes, i its low four bits.
    unsafe fn lookup(table: Self::V, p: *const i8) -> Self::V;
    /// 32 bytes, 16 where the bit is set, else 0.
    unsafe fn fifth_bits(bits: u32) -> [u8; 32];
    /// The f16s in the low and the high half of `bits`, widened exactly.
    unsafe fn f16_pair(bits: u32) -> (f32, f32);
    /// 16 values to memory.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each lane; operands are finite or infinite, not NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each lane.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` for integer-valued lanes in -126..=127.
    unsafe fn pow2(n: Self::V) -> Self::V;
    /// Brings the cache line at `p` near, if the CPU can; any address will do.
    #[inline(always)]
    fn prefetch<T>(p: *const T) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch reads nothing and cannot fault; SSE is in every x86-64.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(p.cast());
        }
        let _ = p;
    }
    /// As [`prefetch`](Self::prefetch), into the second-level cache, which has buffers for more
    /// misses at a time than the first.
    #[inline(always)]
    fn prefetch_far<T>(p: *const T) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(p.cast());
        }
        let _ = p;
    }
    /// `c` with the products of 16 pairs of bf16s added, the odd one of each pair first, each
    /// sum rounded once; `a` and `b` hold the bits of 32 values each.
    unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// As [`dot_bf16`](Self::dot_bf16), by the CPU's instruction for it where the tier can
    /// have one (AVX-512 BF16); values below the normal range count as zero.
    #[inline(always)]
    unsafe fn dot_bf16_native(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: the caller's.
        unsafe { Self::dot_bf16(a, b, c) }
    }
    /// Sum of the lanes: i + (i+8), then + (i+4), + (i+2), + (i+1).
    unsafe fn sum(v: Self::V) -> f32;
}

/// Plain Rust; any CPU.
#[derive(Clone, Copy)]
pub struct Scalar;

impl Simd for Scalar {
    type V = [f32; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller gives 16 readable values; the array needs no alignment here.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> Self::V {
        // SAFETY: as above.
        unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self::V {
        // SAFETY: as above.
        unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        // SAFETY: as above.
        unsafe { p.cast::<[i8; LANES]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn lookup(table: Self::V, p: *const i8) -> Self::V {
        // SAFETY: as above.
        unsafe { p.cast::<[i8; LANES]>().read() }.map(|i| table[i as usize % LANES])
    }
    #[inline(always)]
    unsafe fn fifth_bits(bits: u32) -> [u8; 32] {
        std::array::from_fn(|i| (bits >> i & 1) as u8 * 16)
    }
    #[inline(always)]
    unsafe fn f16_pair(bits: u32) -> (f32, f32) {
        (f16::from_bits(bits as u16).to_f32(), f16::from_bits((bits >> 16) as u16).to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller gives room for 16 values.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn pow2(n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let odd = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let even = |x: f32| f32::from_bits(x.to_bits() << 16);
        std::array::from_fn(|i| even(a[i]).mul_add(even(b[i]), odd(a[i]).mul_add(odd(b[i]), c[i])))
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let a: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let b: [f32; 4] = std::array::from_fn(|i| a[i] + a[i + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Simd, bf16, f16};
    use std::arch::x86_64::*;

    /// Two 256-bit halves; needs AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    // SAFETY of the intrinsics below: the trait's contract (features, valid pointers).
    impl Simd for Avx2 {
        type V = (__m256, __m256);

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let widen = |p: *const bf16| {
                    let half = _mm_loadu_si128(p.cast());
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
                };
                (widen(p), widen(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let widen = |p: *const f16| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
                (widen(p), widen(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let widen = |p: *const i8| {
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
                };
                (widen(p), widen(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn lookup(table: Self::V, p: *const i8) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let half = |p: *const i8| {
                    let i = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
                    let low = _mm256_permutevar8x32_ps(table.0, i);
                    let high = _mm256_permutevar8x32_ps(table.1, i);
                    // The fourth bit, moved to the sign, chooses.
                    let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(i));
                    _mm256_blendv_ps(low, high, fourth)
                };
                (half(p), half(p.add(8)))
            }
        }
        #[inline(always)]
        unsafe fn fifth_bits(bits: u32) -> [u8; 32] {
            // SAFETY: see above; vectors and arrays of bytes are the same bytes.
            unsafe {
                // Byte i / 8 of the bits in byte i, then its bit i % 8 alone.
                let byte = _mm256_setr_epi64x(
                    0,
                    0x0101_0101_0101_0101,
                    0x0202_0202_0202_0202,
                    0x0303_0303_0303_0303,
                );
                let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                let spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), byte);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
                std::mem::transmute(_mm256_and_si256(set, _mm256_set1_epi8(16)))
            }
        }
        #[inline(always)]
        unsafe fn f16_pair(bits: u32) -> (f32, f32) {
            // SAFETY: see above.
            unsafe { f16_pair(bits) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_ps(p, v.0);
                _mm256_storeu_ps(p.add(8), v.1);
            }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)) }
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            // SAFETY: see above.
            unsafe { (_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)) }
        }
        #[inline(always)]
        unsafe fn pow2(n: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let one = |n| {
                    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
                };
                (one(n.0), one(n.1))
            }
        }
        #[inline(always)]
        unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            #[inline(always)]
            unsafe fn half(a: __m256, b: __m256, c: __m256) -> __m256 {
                // SAFETY: see above.
                unsafe {
                    let high = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32));
                    let odd = _mm256_fmadd_ps(_mm256_and_ps(a, high), _mm256_and_ps(b, high), c);
                    let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
                    let a = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a));
                    let b = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b));
                    _mm256_fmadd_ps(a, b, odd)
                }
            }
            // SAFETY: see above.
            unsafe { (half(a.0, b.0, c.0), half(a.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            // SAFETY: see above.
            unsafe { sum8(_mm256_add_ps(v.0, v.1)) }
        }
    }

    #[inline(always)]
    unsafe fn sum8(a: __m256) -> f32 {
        // SAFETY: AVX by the caller.
        unsafe {
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)))
        }
    }

    #[inline(always)]
    unsafe fn f16_pair(bits: u32) -> (f32, f32) {
        let pair: __m128i;
        // SAFETY: AVX and F16C by the caller; the instruction only moves a register.
        unsafe {
            // Spelled out: where one half goes unused the compiler would insert the other
            // into whatever a register held, and wait for that.
            std::arch::asm!(
                "vmovd {pair}, {bits:e}",
                pair = lateout(xmm_reg) pair,
                bits = in(reg) bits,
                options(pure, nomem, nostack, preserves_flags)
            );
            let pair = _mm_cvtph_ps(pair);
            (_mm_cvtss_f32(pair), _mm_cvtss_f32(_mm_movehdup_ps(pair)))
        }
    }

    /// One 512-bit vector; needs AVX-512 F, BW, DQ and VL.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    // SAFETY of the intrinsics below: the trait's contract (features, valid pointers).
    impl Simd for Avx512 {
        type V = __m512;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            const { assert!(LANES == 16) };
            // SAFETY: see above.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let half = _mm256_loadu_si256(p.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
        }
        #[inline(always)]
        unsafe fn lookup(table: Self::V, p: *const i8) -> Self::V {
            // SAFETY: see above; the permutation reads the low four bits of each index.
            unsafe {
                let i = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
                _mm512_permutexvar_ps(i, table)
            }
        }
        #[inline(always)]
        unsafe fn fifth_bits(bits: u32) -> [u8; 32] {
            // SAFETY: see above; vectors and arrays of bytes are the same bytes.
            unsafe { std::mem::transmute(_mm256_maskz_set1_epi8(bits, 16)) }
        }
        #[inline(always)]
        unsafe fn f16_pair(bits: u32) -> (f32, f32) {
            // SAFETY: see above.
            unsafe { f16_pair(bits) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            // SAFETY: see above.
            unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
        }
        #[inline(always)]
        unsafe fn pow2(n: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
            }
        }
        #[inline(always)]
        unsafe fn dot_bf16(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: see above.
            unsafe {
                let high = _mm512_castsi512_ps(_mm512_set1_epi32(0xffff_0000_u32 as i32));
                let odd = _mm512_fmadd_ps(_mm512_and_ps(a, high), _mm512_and_ps(b, high), c);
                let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
                let a = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a));
                let b = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b));
                _mm512_fmadd_ps(a, b, odd)
            }
        }
        #[inline(always)]
        unsafe fn dot_bf16_native(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: the caller has AVX-512 BF16; the vectors are the same bits.
            unsafe {
                let a = std::mem::transmute::<__m512, __m512bh>(a);
                let b = std::mem::transmute::<__m512, __m512bh>(b);
                _mm512_dpbf16_ps(c, a, b)
            }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            // SAFETY: see above; AVX-512 DQ gives the 256-bit extract.
            unsafe {
                let hi = _mm512_extractf32x8_ps::<1>(v);
                sum8(_mm256_add_ps(_mm512_castps512_ps256(v), hi))
            }
        }
    }
}

/// `e^x`, clamped to the finite range: range reduction by ln 2 in two parts and a
/// degree-6 polynomial (Cephes' expf coefficients), about 1 ulp.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let x = S::max(S::min(x, S::splat(88.0)), S::splat(-87.0));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let y = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
        S::mul(y, S::pow2(n))
    }
}
