//! Quantization of f32 rows, byte for byte as ggml's reference quantizers do it
//! (ggml-quants.c: `quantize_row_q8_0_ref`, `quantize_row_q4_K_ref`,
//! `quantize_row_q6_K_ref`), without importance weights.

#![allow(clippy::needless_range_loop, reason = "loops over several arrays at once")]

use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;

use super::super::parallel::{self, SharedMut};
use super::super::simd::Simd;
use super::super::{Tier, dispatch, tier};
use super::QuantType;
use crate::{Error, Result};

/// Largest magnitude of a group of q6_k that counts as zero.
const GROUP_MAX_EPS: f32 = 1e-15;
/// Operations that a value costs, about.
const FLOPS: usize = 500;

/// Appends the blocks of the rows of `cols` values in `x` to `out`, on the rank's threads.
///
/// # Errors
/// A type that farm does not quantize to, a row that is not a whole number of
/// blocks, or values that are not finite or beyond the range of the type's scales.
pub fn quantize_rows(quant: QuantType, x: &[f32], cols: usize, out: &mut Vec<u8>) -> Result<()> {
    quantize_in_tier(tier(), quant, x, cols, out)
}

pub(super) fn quantize_in_tier(
    tier: Tier,
    quant: QuantType,
    x: &[f32],
    cols: usize,
    out: &mut Vec<u8>,
) -> Result<()> {
    let name = quant.name();
    let quantize: fn(Tier, &[f32], &mut [u8]) -> bool = match quant {
        QuantType::Q8_0 => |tier, x, y| blocks(tier, x, y, q8_0),
        QuantType::Q4_K => |tier, x, y| blocks(tier, x, y, q4_k),
        QuantType::Q6_K => |tier, x, y| blocks(tier, x, y, q6_k),
        _ => {
            return Err(Error::input(format!(
                "cannot quantize to {name}: q8_0, q6_k and q4_k are the types to choose from"
            )));
        }
    };
    if cols == 0 || !cols.is_multiple_of(quant.block_len()) {
        return Err(Error::input(format!(
            "cannot quantize rows of {cols} values to {name}, whose blocks hold {}",
            quant.block_len()
        )));
    }
    assert_eq!(x.len() % cols, 0);
    let (rows, row_bytes) = (x.len() / cols, quant.row_bytes(cols));
    let start = out.len();
    out.resize(start + rows * row_bytes, 0);
    let to = SharedMut::new(&mut out[start..]);
    let good = AtomicBool::new(true);
    parallel::for_each(rows, FLOPS * x.len(), |row| {
        // SAFETY: row `row` of `out`, which no other task touches.
        let to =
            unsafe { std::slice::from_raw_parts_mut(to.get().add(row * row_bytes), row_bytes) };
        if !quantize(tier, &x[row * cols..][..cols], to) {
            good.store(false, Ordering::Relaxed);
        }
    });
    if good.into_inner() {
        return Ok(());
    }
    out.truncate(start);
    Err(Error::input(format!("cannot quantize to {name}: values are not finite or too large")))
}

/// Quantizes block by block; whether all values were finite and all scales fit f16.
fn blocks<const LEN: usize, const BYTES: usize>(
    tier: Tier,
    x: &[f32],
    y: &mut [u8],
    block: impl Fn(Tier, &[f32; LEN], &mut [u8; BYTES]) -> bool,
) -> bool {
    x.as_chunks()
        .0
        .iter()
        .zip(y.as_chunks_mut().0)
        .fold(true, |good, (x, y)| good & x.iter().all(|x| x.is_finite()) && block(tier, x, y))
}

/// Stores an f16; whether it is finite.
fn put_half(value: f32, to: &mut [u8]) -> (f32, bool) {
    let half = f16::from_f32(value);
    to.copy_from_slice(&half.to_le_bytes());
    (half.to_f32(), half.is_finite())
}

/// The nearest integer, ties to even, of |x| < 2^22; anything else gives some integer.
#[inline(always)]
fn nearest_int(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

fn q8_0(_: Tier, x: &[f32; 32], y: &mut [u8; 34]) -> bool {
    let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let d = largest / 127.0;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    let (_, good) = put_half(d, &mut y[..2]);
    for (y, x) in y[2..].iter_mut().zip(x) {
        *y = (x * inverse).round() as i8 as u8;
    }
    good
}

/// Value l of every group of a block: groups go side by side in vectors, and each adds
/// up its values one after the other as ggml does.
fn transposed<const LEN: usize, const G: usize, const L: usize>(x: &[f32; LEN]) -> [[f32; G]; L] {
    let mut groups = [[0.0; G]; L];
    for g in 0..G {
        for l in 0..L {
            groups[l][g] = x[g * L + l];
        }
    }
    groups
}

/// The weighted error of values `scale * level + min` in each group.
#[inline(always)]
fn errors(
    x: &[[f32; 8]; 32],
    weights: &[[f32; 8]; 32],
    levels: &[[f32; 8]; 32],
    scale: &[f32; 8],
    min: &[f32; 8],
) -> [f32; 8] {
    let mut sum = [0.0; 8];
    for l in 0..32 {
        for g in 0..8 {
            let diff = scale[g] * levels[l][g] + min[g] - x[l][g];
            sum[g] += weights[l][g] * (diff * diff);
        }
    }
    sum
}

/// The scales and the (negated) minimums of 8 groups of 32 values in 4 bits, and the
/// values in `levels`: of 21 steps around the range, the one with the least weighted
/// error (`make_qkx2_quants(32, 15, …, -1, 0.1, 20, false)`).
///
/// # Safety
/// The CPU features of `S`.
#[allow(clippy::extra_unused_type_parameters, reason = "a tier's instructions come with it")]
#[inline(always)]
unsafe fn scales_and_mins<S: Simd>(
    x: &[[f32; 8]; 32],
    levels: &mut [[f32; 8]; 32],
    scale: &mut [f32; 8],
    negated: &mut [f32; 8],
) {
    const MOST: f32 = 15.0;
    let mut squares = [0.0; 8];
    for l in 0..32 {
        for g in 0..8 {
            squares[g] += x[l][g] * x[l][g];
        }
    }
    let mut weights = [[0.0; 8]; 32];
    for l in 0..32 {
        for g in 0..8 {
            weights[l][g] = (squares[g] / 32.0).sqrt() + x[l][g].abs();
        }
    }
    let (mut min, mut max, mut sum_w, mut sum_x) = (x[0], x[0], weights[0], [0.0; 8]);
    for g in 0..8 {
        sum_x[g] = sum_w[g] * x[0][g];
    }
    for l in 1..32 {
        for g in 0..8 {
            let (x, w) = (x[l][g], weights[l][g]);
            min[g] = if x < min[g] { x } else { min[g] };
            max[g] = if x > max[g] { x } else { max[g] };
            sum_w[g] += w;
            sum_x[g] += w * x;
        }
    }
    let mut flat = [false; 8];
    let mut inverse = [0.0; 8];
    for g in 0..8 {
        min[g] = if min[g] > 0.0 { 0.0 } else { min[g] };
        negated[g] = -min[g];
        flat[g] = max[g] == min[g];
        inverse[g] = MOST / (max[g] - min[g]);
        scale[g] = 1.0 / inverse[g];
    }
    for l in 0..32 {
        for g in 0..8 {
            levels[l][g] = nearest_int(inverse[g] * (x[l][g] - min[g])).clamp(0, 15) as f32;
        }
    }
    let mut best = errors(x, &weights, levels, scale, &min);
    let mut trial = [[0.0; 8]; 32];
    for step in 0..=20 {
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; 8], [0.0; 8], [0.0; 8]);
        for g in 0..8 {
            // The minimum is that of the best step so far.
            inverse[g] = (-1.0 + 0.1 * step as f32 + MOST) / (max[g] - min[g]);
        }
        for l in 0..32 {
            for g in 0..8 {
                let (x, w) = (x[l][g], weights[l][g]);
                let level = nearest_int(inverse[g] * (x - min[g])).clamp(0, 15) as f32;
                trial[l][g] = level;
                sum_l[g] += w * level;
                sum_l2[g] += w * level * level;
                sum_xl[g] += w * level * x;
            }
        }
        let (mut this_scale, mut this_min, mut better) = ([0.0; 8], [0.0; 8], [false; 8]);
        for g in 0..8 {
            let determinant = sum_w[g] * sum_l2[g] - sum_l[g] * sum_l[g];
            let fit = (sum_w[g] * sum_xl[g] - sum_x[g] * sum_l[g]) / determinant;
            let low = (sum_l2[g] * sum_x[g] - sum_l[g] * sum_xl[g]) / determinant;
            this_scale[g] = if low > 0.0 { sum_xl[g] / sum_l2[g] } else { fit };
            this_min[g] = if low > 0.0 { 0.0 } else { low };
            better[g] = determinant > 0.0 && !flat[g];
        }
        let error = errors(x, &weights, &trial, &this_scale, &this_min);
        for g in 0..8 {
            better[g] &= error[g] < best[g];
            best[g] = if better[g] { error[g] } else { best[g] };
            scale[g] = if better[g] { this_scale[g] } else { scale[g] };
            min[g] = if better[g] { this_min[g] } else { min[g] };
        }
        if better.contains(&true) {
            for l in 0..32 {
                for g in 0..8 {
                    levels[l][g] = if better[g] { trial[l][g] } else { levels[l][g] };
                }
            }
        }
    }
    for g in 0..8 {
        if flat[g] {
            scale[g] = 0.0;
            (0..32).for_each(|l| levels[l][g] = 0.0);
        } else {
            negated[g] = -min[g];
        }
    }
}

fn q4_k(tier: Tier, x: &[f32; 256], y: &mut [u8; 144]) -> bool {
    let groups = transposed(x);
    let (groups, fit) = (&groups, &mut [[0.0; 8]; 32]);
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    let (s, m) = (&mut scales, &mut mins);
    dispatch!(
        tier,
        scales_and_mins,
        groups: &[[f32; 8]; 32],
        fit: &mut [[f32; 8]; 32],
        s: &mut [f32; 8],
        m: &mut [f32; 8],
    );
    let mut levels = [0u8; 256];
    for g in 0..8 {
        if !(scales[g] + mins[g]).is_finite() {
            return false;
        }
        for l in 0..32 {
            levels[g * 32 + l] = fit[l][g] as u8;
        }
    }
    let largest = |values: &[f32; 8]| values.iter().fold(0.0, |a, &v| if v > a { v } else { a });
    let (max_scale, max_min) = (largest(&scales), largest(&mins));
    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let six_bits = |v: f32| (nearest_int(v) as u8).min(63);
    let scales = scales.map(|s| six_bits(inverse(max_scale) * s));
    let mins = mins.map(|m| six_bits(inverse(max_min) * m));
    for g in 0..4 {
        y[4 + g] = scales[g] | scales[g + 4] >> 4 << 6;
        y[8 + g] = mins[g] | mins[g + 4] >> 4 << 6;
        y[12 + g] = scales[g + 4] & 15 | (mins[g + 4] & 15) << 4;
    }
    let (d, good) = put_half(max_scale / 63.0, &mut y[..2]);
    let (dmin, good_min) = put_half(max_min / 63.0, &mut y[2..4]);
    for (g, x) in x.as_chunks::<32>().0.iter().enumerate() {
        let (d, dmin) = (d * f32::from(scales[g]), dmin * f32::from(mins[g]));
        if d == 0.0 {
            continue;
        }
        for (l, x) in levels[g * 32..].iter_mut().zip(x) {
            *l = nearest_int((x + dmin) / d).clamp(0, 15) as u8;
        }
    }
    for (y, levels) in y[16..].chunks_exact_mut(32).zip(levels.chunks_exact(64)) {
        for (l, y) in y.iter_mut().enumerate() {
            *y = levels[l] | levels[l + 32] << 4;
        }
    }
    good & good_min
}

/// The sums of weight * value * level and of weight * level², weighted by the squares.
#[inline(always)]
fn sums(x: &[[f32; 16]; 16], inverse: &[f32; 16]) -> ([f32; 16], [f32; 16]) {
    let (mut sum_lx, mut sum_l2) = ([0.0; 16], [0.0; 16]);
    for l in 0..16 {
        for g in 0..16 {
            let x = x[l][g];
            let (level, w) = (nearest_int(inverse[g] * x).clamp(-32, 31) as f32, x * x);
            sum_lx[g] += w * x * level;
            sum_l2[g] += w * level * level;
        }
    }
    (sum_lx, sum_l2)
}

/// The scales of 16 groups of 16 values in 6 signed bits, and in `inverse` what values
/// are multiplied by to give the levels (0: all zero): of 19 steps around the range, the
/// one with the least error weighted by the squares (`make_qx_quants(16, 32, …, 1, NULL)`).
///
/// # Safety
/// The CPU features of `S`.
#[allow(clippy::extra_unused_type_parameters, reason = "a tier's instructions come with it")]
#[inline(always)]
unsafe fn symmetric_scales<S: Simd>(
    x: &[[f32; 16]; 16],
    scale: &mut [f32; 16],
    inverse: &mut [f32; 16],
) {
    const MOST: f32 = 32.0;
    let (mut largest, mut max) = ([0.0; 16], [0.0; 16]);
    for l in 0..16 {
        for g in 0..16 {
            let larger = x[l][g].abs() > largest[g];
            largest[g] = if larger { x[l][g].abs() } else { largest[g] };
            max[g] = if larger { x[l][g] } else { max[g] };
        }
    }
    for g in 0..16 {
        inverse[g] = -MOST / max[g];
    }
    let (sum_lx, sum_l2) = sums(x, inverse);
    let mut best = [0.0; 16];
    for g in 0..16 {
        scale[g] = if sum_l2[g] != 0.0 { sum_lx[g] / sum_l2[g] } else { 0.0 };
        best[g] = scale[g] * sum_lx[g];
    }
    for step in -9..=9 {
        if step == 0 {
            continue;
        }
        let mut trial = [0.0; 16];
        for g in 0..16 {
            trial[g] = -(MOST + 0.1 * step as f32) / max[g];
        }
        let (sum_lx, sum_l2) = sums(x, &trial);
        for g in 0..16 {
            let better = sum_l2[g] > 0.0 && sum_lx[g] * sum_lx[g] > best[g] * sum_l2[g];
            inverse[g] = if better { trial[g] } else { inverse[g] };
            scale[g] = if better { sum_lx[g] / sum_l2[g] } else { scale[g] };
            best[g] = if better { scale[g] * sum_lx[g] } else { best[g] };
        }
    }
    for g in 0..16 {
        if largest[g] < GROUP_MAX_EPS {
            (scale[g], inverse[g]) = (0.0, 0.0);
        }
    }
}

fn q6_k(tier: Tier, x: &[f32; 256], y: &mut [u8; 210]) -> bool {
    let groups = transposed(x);
    let (groups, mut scales, mut inverses) = (&groups, [0.0; 16], [0.0; 16]);
    let (s, i) = (&mut scales, &mut inverses);
    dispatch!(
        tier,
        symmetric_scales,
        groups: &[[f32; 16]; 16],
        s: &mut [f32; 16],
        i: &mut [f32; 16],
    );
    let mut levels = [0i8; 256];
    let (mut largest, mut max_scale) = (0.0, 0.0);
    for (g, x) in x.as_chunks::<16>().0.iter().enumerate() {
        if !scales[g].is_finite() {
            return false;
        }
        if scales[g].abs() > largest {
            (largest, max_scale) = (scales[g].abs(), scales[g]);
        }
        if inverses[g] != 0.0 {
            for (l, x) in levels[g * 16..].iter_mut().zip(x) {
                *l = (nearest_int(inverses[g] * x).clamp(-32, 31) + 32) as i8;
            }
        }
    }
    if largest < GROUP_MAX_EPS {
        y.fill(0);
        return true;
    }
    let inverse = -128.0 / max_scale;
    let (d, good) = put_half(1.0 / inverse, &mut y[208..]);
    for (g, x) in x.as_chunks::<16>().0.iter().enumerate() {
        let scale = nearest_int(inverse * scales[g]).min(127) as i8;
        y[192 + g] = scale as u8;
        let d = d * f32::from(scale);
        if d == 0.0 {
            continue;
        }
        for (l, x) in levels[g * 16..].iter_mut().zip(x) {
            *l = (nearest_int(x / d).clamp(-32, 31) + 32) as i8;
        }
    }
    for half in 0..2 {
        let levels = &levels[half * 128..][..128];
        for l in 0..32 {
            let [a, b, c, d] = std::array::from_fn(|j| levels[l + 32 * j] as u8);
            y[half * 64 + l] = a & 15 | (c & 15) << 4;
            y[half * 64 + l + 32] = b & 15 | (d & 15) << 4;
            y[128 + half * 32 + l] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
    good
}
