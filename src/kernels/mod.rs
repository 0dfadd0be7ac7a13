//! CPU kernels with run-time dispatch over instruction sets.
//!
//! Invariant: the value of an output element depends only on its own inputs,
//! never on how many rows, threads or other sequences are computed with it. Each
//! sum runs over 16 lanes in index order and ends in one fixed tree, and every
//! [`Tier`] does the same IEEE operations, so tiers agree bit for bit too.
//!
//! Integer products ([`quant::int8`]) are exact inside a block of weights, and follow
//! the blocks' order. Products of bf16 ([`gemm::linear_bf16`]) take pairs in the order of
//! the instruction that some CPUs have for them.
//!
//! Left out here: weights packed for the cache, and AMX, whose sums round differently.

pub mod attention;
pub mod backward;
pub mod gemm;
pub mod ops;
pub mod parallel;
pub mod quant;
pub mod segments;
pub mod simd;

use std::sync::OnceLock;

use crate::{Error, Result};

/// An instruction-set tier of the CPU kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Plain Rust.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Tier {
    /// The best tier of this CPU.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                return Tier::Avx512;
            }
            if avx2 {
                return Tier::Avx2;
            }
        }
        Tier::Scalar
    }

    /// The name that `--kernel-tier` takes.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Scalar => "scalar",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
        }
    }
}

static TIER: OnceLock<Tier> = OnceLock::new();

/// Pins the tier of this process; call before the first kernel runs.
///
/// # Errors
/// The CPU lacks the tier's instructions, or another tier is in use already.
pub fn pin_tier(tier: Tier) -> Result<()> {
    let best = Tier::detect();
    if tier > best {
        return Err(Error::usage(format!(
            "--kernel-tier {}: this CPU has {} at most; use auto",
            tier.name(),
            best.name()
        )));
    }
    let in_use = *TIER.get_or_init(|| tier);
    if in_use != tier {
        return Err(Error::fault(format!("kernel tier {} is already in use", in_use.name())));
    }
    Ok(())
}

/// The tier in use: the pinned one, else the best of this CPU.
pub fn tier() -> Tier {
    *TIER.get_or_init(Tier::detect)
}

/// Calls `$kernel::<S>($args)` with the vector type of `$tier`, compiled with
/// that tier's instructions switched on.
macro_rules! dispatch {
    ($tier:expr, $kernel:ident, $($name:ident : $type:ty),* $(,)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        unsafe fn avx512($($name: $type),*) {
            // SAFETY: the contract of the kernel, handed on.
            unsafe { $kernel::<$crate::kernels::simd::Avx512>($($name),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($name: $type),*) {
            // SAFETY: the contract of the kernel, handed on.
            unsafe { $kernel::<$crate::kernels::simd::Avx2>($($name),*) }
        }
        match $tier {
            // SAFETY: `Tier::detect` has seen these instructions.
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::Tier::Avx512 => unsafe { avx512($($name),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::Tier::Avx2 => unsafe { avx2($($name),*) },
            // SAFETY: the scalar tier needs no features.
            _ => unsafe { $kernel::<$crate::kernels::simd::Scalar>($($name),*) },
        }
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
pub(crate) mod tests {
    use super::Tier;

    /// The tiers that this CPU can run.
    pub(crate) fn tiers() -> Vec<Tier> {
        let best = Tier::detect();
        [Tier::Scalar, Tier::Avx2, Tier::Avx512].into_iter().filter(|t| *t <= best).collect()
    }

    /// Deterministic values in [-1, 1).
    pub(crate) fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }
}
