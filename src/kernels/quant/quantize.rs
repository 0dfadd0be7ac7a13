//! Quantization of f32 rows, byte for byte as ggml's reference quantizers do it
//! (ggml-quants.c: `quantize_row_q8_0_ref`, `quantize_row_q4_K_ref`,
//! `quantize_row_q6_K_ref`), without importance weights.

use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;

use super::super::parallel::{self, SharedMut};
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
    let name = quant.name();
    let quantize: fn(&[f32], &mut [u8]) -> bool = match quant {
        QuantType::Q8_0 => |x, y| blocks(x, y, q8_0),
        QuantType::Q4_K => |x, y| blocks(x, y, q4_k),
        QuantType::Q6_K => |x, y| blocks(x, y, q6_k),
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
        if !quantize(&x[row * cols..][..cols], to) {
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
    x: &[f32],
    y: &mut [u8],
    block: impl Fn(&[f32; LEN], &mut [u8; BYTES]) -> bool,
) -> bool {
    x.as_chunks()
        .0
        .iter()
        .zip(y.as_chunks_mut().0)
        .fold(true, |good, (x, y)| good & x.iter().all(|x| x.is_finite()) && block(x, y))
}

/// Stores an f16; whether it is finite.
fn put_half(value: f32, to: &mut [u8]) -> (f32, bool) {
    let half = f16::from_f32(value);
    to.copy_from_slice(&half.to_le_bytes());
    (half.to_f32(), half.is_finite())
}

/// The nearest integer, ties to even, of |x| < 2^22; anything else gives some integer.
fn nearest_int(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

fn q8_0(x: &[f32; 32], y: &mut [u8; 34]) -> bool {
    let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    let d = largest / 127.0;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    let (_, good) = put_half(d, &mut y[..2]);
    for (y, x) in y[2..].iter_mut().zip(x) {
        *y = (x * inverse).round() as i8 as u8;
    }
    good
}

/// The scale and the (negated) minimum of 32 values in 4 bits, and the values in
/// `levels`: of 21 steps around the range, the one with the least weighted error
/// (`make_qkx2_quants(32, 15, …, -1, 0.1, 20, false)`).
fn scale_and_min(x: &[f32; 32], weights: &[f32; 32], levels: &mut [u8]) -> (f32, f32) {
    const MOST: f32 = 15.0;
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (&x, &w) in x.iter().zip(weights).skip(1) {
        if x < min {
            min = x;
        }
        if x > max {
            max = x;
        }
        sum_w += w;
        sum_x += w * x;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max == min {
        levels.fill(0);
        return (0.0, -min);
    }
    let level = |x: f32| nearest_int(x).clamp(0, 15) as u8;
    let error = |levels: &[u8], scale: f32, min: f32| {
        let mut sum = 0.0;
        for ((&x, &w), &l) in x.iter().zip(weights).zip(levels) {
            let diff = scale * f32::from(l) + min - x;
            sum += w * (diff * diff);
        }
        sum
    };
    let inverse = MOST / (max - min);
    let mut scale = 1.0 / inverse;
    for (l, &x) in levels.iter_mut().zip(x) {
        *l = level(inverse * (x - min));
    }
    let mut best = error(levels, scale, min);
    let mut trial = [0; 32];
    for step in 0..=20 {
        // The minimum is that of the best step so far.
        let inverse = (-1.0 + 0.1 * step as f32 + MOST) / (max - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for ((l, &x), &w) in trial.iter_mut().zip(x).zip(weights) {
            *l = level(inverse * (x - min));
            let l = f32::from(*l);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_min > 0.0 {
                (this_min, this_scale) = (0.0, sum_xl / sum_l2);
            }
            let this_error = error(&trial, this_scale, this_min);
            if this_error < best {
                levels.copy_from_slice(&trial);
                (best, scale, min) = (this_error, this_scale, this_min);
            }
        }
    }
    (scale, -min)
}

fn q4_k(x: &[f32; 256], y: &mut [u8; 144]) -> bool {
    let mut levels = [0u8; 256];
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    for (g, x) in x.as_chunks::<32>().0.iter().enumerate() {
        let mut sum = 0.0;
        for x in x {
            sum += x * x;
        }
        let mean = (sum / 32.0f32).sqrt();
        let weights = x.map(|x| mean + x.abs());
        (scales[g], mins[g]) = scale_and_min(x, &weights, &mut levels[g * 32..][..32]);
        if !(scales[g] + mins[g]).is_finite() {
            return false;
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

/// The scale of 16 values in 6 signed bits, and the values, plus 32, in `levels`: of
/// 19 steps around the range, the one with the least error weighted by the squares
/// (`make_qx_quants(16, 32, …, 1, NULL)`).
fn symmetric_scale(x: &[f32; 16], levels: &mut [i8]) -> f32 {
    const MOST: f32 = 32.0;
    let (mut largest, mut max) = (0.0, 0.0);
    for &x in x {
        if x.abs() > largest {
            (largest, max) = (x.abs(), x);
        }
    }
    if largest < GROUP_MAX_EPS {
        levels.fill(0);
        return 0.0;
    }
    let level = |x: f32, inverse: f32| nearest_int(inverse * x).clamp(-32, 31);
    let sums = |inverse: f32| {
        let (mut sum_lx, mut sum_l2) = (0.0, 0.0);
        for &x in x {
            let (l, w) = (level(x, inverse) as f32, x * x);
            sum_lx += w * x * l;
            sum_l2 += w * l * l;
        }
        (sum_lx, sum_l2)
    };
    let set = |levels: &mut [i8], inverse: f32| {
        for (l, &x) in levels.iter_mut().zip(x) {
            *l = (level(x, inverse) + 32) as i8;
        }
    };
    let inverse = -MOST / max;
    set(levels, inverse);
    let (sum_lx, sum_l2) = sums(inverse);
    let mut scale = if sum_l2 != 0.0 { sum_lx / sum_l2 } else { 0.0 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|&step| step != 0) {
        let inverse = -(MOST + 0.1 * step as f32) / max;
        let (sum_lx, sum_l2) = sums(inverse);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            set(levels, inverse);
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}

fn q6_k(x: &[f32; 256], y: &mut [u8; 210]) -> bool {
    let mut levels = [0i8; 256];
    let mut scales = [0.0; 16];
    let (mut largest, mut max_scale) = (0.0, 0.0);
    for (g, x) in x.as_chunks::<16>().0.iter().enumerate() {
        scales[g] = symmetric_scale(x, &mut levels[g * 16..][..16]);
        if !scales[g].is_finite() {
            return false;
        }
        if scales[g].abs() > largest {
            (largest, max_scale) = (scales[g].abs(), scales[g]);
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
