//! Row-wise kernels: RMS norm, gated SiLU, rotary embedding, residual sums.

use super::parallel::{self, SharedMut};
use super::simd::{self, LANES, Simd};
use super::{Tier, dispatch, tier};

/// `out[r] = weight * x[r] / sqrt(mean(x[r]²) + eps)` for each row of
/// `weight.len()` values (Zhang & Sennrich 2019, as Llama uses it).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_in_tier(tier(), x, weight, eps, out);
}

fn rms_norm_in_tier(tier: Tier, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(x.len() == out.len() && width > 0 && x.len().is_multiple_of(width));
    let out = SharedMut::new(out);
    parallel::for_each(x.len() / width, 4 * x.len(), |row| {
        let x = &x[row * width..(row + 1) * width];
        // SAFETY: each task has its own row.
        let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * width), width) };
        dispatch!(tier, rms_norm_row, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
    });
}

#[inline(always)]
unsafe fn rms_norm_row<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: `whole + LANES` never passes the end of the slices, which are equally long.
    unsafe {
        let whole = x.len() / LANES * LANES;
        let mut squares = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let v = S::load(x.as_ptr().add(i));
            squares = S::fma(v, v, squares);
        }
        let tail: f32 = x[whole..].iter().map(|v| v * v).sum();
        let scale = 1.0 / ((S::sum(squares) + tail) / x.len() as f32 + eps).sqrt();
        for i in (0..whole).step_by(LANES) {
            let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(scale));
            S::store(out.as_mut_ptr().add(i), S::mul(v, S::load(weight.as_ptr().add(i))));
        }
        for i in whole..x.len() {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

/// `out = silu(gate) * up`, elementwise, with `silu(g) = g / (1 + e^-g)`.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    silu_mul_in_tier(tier(), gate, up, out);
}

fn silu_mul_in_tier(tier: Tier, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    const CHUNK: usize = 4096;
    let shared = SharedMut::new(out);
    parallel::for_each(gate.len().div_ceil(CHUNK), 20 * gate.len(), |task| {
        let range = task * CHUNK..((task + 1) * CHUNK).min(gate.len());
        let (gate, up) = (&gate[range.clone()], &up[range.clone()]);
        // SAFETY: each task has its own range.
        let out =
            unsafe { std::slice::from_raw_parts_mut(shared.get().add(range.start), range.len()) };
        dispatch!(tier, silu_mul_chunk, gate: &[f32], up: &[f32], out: &mut [f32]);
    });
}

#[inline(always)]
unsafe fn silu_mul_chunk<S: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: equally long slices; a tail goes through padded arrays.
    unsafe {
        let one = |g: S::V, u: S::V| {
            let e = simd::exp::<S>(S::sub(S::splat(0.0), g));
            S::mul(S::div(g, S::add(S::splat(1.0), e)), u)
        };
        let whole = gate.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let v = one(S::load(gate.as_ptr().add(i)), S::load(up.as_ptr().add(i)));
            S::store(out.as_mut_ptr().add(i), v);
        }
        let tail = gate.len() - whole;
        if tail > 0 {
            let (mut g, mut u, mut o) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            g[..tail].copy_from_slice(&gate[whole..]);
            u[..tail].copy_from_slice(&up[whole..]);
            S::store(o.as_mut_ptr(), one(S::load(g.as_ptr()), S::load(u.as_ptr())));
            out[whole..].copy_from_slice(&o[..tail]);
        }
    }
}

/// Rotates `heads` heads of one token in place, in HF's halved layout: the pair of
/// element `i` is element `i + head_dim/2` (`rotate_half` in transformers'
/// modeling_llama). `cos` and `sin` hold `head_dim/2` values.
pub fn rotate_half(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    for head in x.chunks_exact_mut(head_dim) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (u, v) = (a[i], b[i]);
            a[i] = u * cos[i] - v * sin[i];
            b[i] = v * cos[i] + u * sin[i];
        }
    }
}

/// `x += y`.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{random, tiers};

    #[test]
    fn rms_norm_is_the_formula_on_every_tier() {
        let (rows, width) = (3, 70);
        let (x, w) = (random(rows * width, 1), random(width, 2));
        let mut first: Option<Vec<f32>> = None;
        for tier in tiers() {
            let mut out = vec![0.0; x.len()];
            rms_norm_in_tier(tier, &x, &w, 1e-5, &mut out);
            for r in 0..rows {
                let row = &x[r * width..(r + 1) * width];
                let mean = row.iter().map(|v| f64::from(v * v)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let want = f64::from(row[i] * w[i]) / (mean + 1e-5).sqrt();
                    assert!((f64::from(out[r * width + i]) - want).abs() < 1e-5);
                }
            }
            assert_eq!(&out, first.get_or_insert(out.clone()), "{tier:?}");
        }
    }

    #[test]
    fn silu_mul_is_the_formula_on_every_tier() {
        let gate: Vec<f32> = random(100, 3).iter().map(|v| v * 120.0).collect();
        let up = random(100, 4);
        let mut first: Option<Vec<f32>> = None;
        for tier in tiers() {
            let mut out = vec![0.0; 100];
            silu_mul_in_tier(tier, &gate, &up, &mut out);
            for i in 0..100 {
                let g = f64::from(gate[i]);
                let want = g / (1.0 + (-g).exp()) * f64::from(up[i]);
                assert!((f64::from(out[i]) - want).abs() < 1e-5 * want.abs().max(1.0));
            }
            assert_eq!(&out, first.get_or_insert(out.clone()), "{tier:?}");
        }
    }

    #[test]
    fn a_rotation_keeps_the_length_of_each_pair() {
        let mut x = random(8, 5);
        let before = x.clone();
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            [0.3f32, 1.7].iter().map(|a| (a.cos(), a.sin())).unzip();
        rotate_half(&mut x, 4, &cos, &sin);
        for head in 0..2 {
            for i in 0..2 {
                let norm = |x: &[f32]| x[head * 4 + i].hypot(x[head * 4 + i + 2]);
                assert!((norm(&x) - norm(&before)).abs() < 1e-6);
            }
        }
        assert_ne!(x, before);
    }
}
