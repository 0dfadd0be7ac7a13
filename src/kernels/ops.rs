//! Row-wise and elementwise kernels: norms, activations, rotary embedding, caps, sums.

use std::ops::Range;

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

/// `out[r] = weight * (x[r] - mean) / sqrt(var + eps) + bias` for each row of
/// `weight.len()` values, with the mean and the mean square distance from it (Ba et al.
/// 2016, torch.nn.LayerNorm).
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    layer_norm_in_tier(tier(), x, weight, bias, eps, out);
}

fn layer_norm_in_tier(
    tier: Tier,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    assert!(x.len() == out.len() && width > 0 && x.len().is_multiple_of(width));
    assert!(bias.is_none_or(|b| b.len() == width));
    let out = SharedMut::new(out);
    parallel::for_each(x.len() / width, 8 * x.len(), |row| {
        let x = &x[row * width..(row + 1) * width];
        // SAFETY: each task has its own row.
        let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * width), width) };
        dispatch!(
            tier,
            layer_norm_row,
            x: &[f32],
            weight: &[f32],
            bias: Option<&[f32]>,
            eps: f32,
            out: &mut [f32],
        );
    });
}

#[inline(always)]
unsafe fn layer_norm_row<S: Simd>(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) {
    // SAFETY: `whole + LANES` never passes the end of the slices, which are equally long.
    unsafe {
        let (whole, n) = (x.len() / LANES * LANES, x.len() as f32);
        let mut sum = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            sum = S::add(sum, S::load(x.as_ptr().add(i)));
        }
        let mean = (S::sum(sum) + x[whole..].iter().sum::<f32>()) / n;
        let mut squares = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let v = S::sub(S::load(x.as_ptr().add(i)), S::splat(mean));
            squares = S::fma(v, v, squares);
        }
        let tail: f32 = x[whole..].iter().map(|v| (v - mean) * (v - mean)).sum();
        let scale = 1.0 / ((S::sum(squares) + tail) / n + eps).sqrt();
        for i in (0..whole).step_by(LANES) {
            let v = S::sub(S::load(x.as_ptr().add(i)), S::splat(mean));
            let v = S::mul(S::mul(v, S::splat(scale)), S::load(weight.as_ptr().add(i)));
            let b = match bias {
                Some(bias) => S::load(bias.as_ptr().add(i)),
                None => S::splat(0.0),
            };
            S::store(out.as_mut_ptr().add(i), S::add(v, b));
        }
        for i in whole..x.len() {
            out[i] = (x[i] - mean) * scale * weight[i] + bias.map_or(0.0, |b| b[i]);
        }
    }
}

/// The nonlinearity of an MLP, under the names of transformers' ACT2FN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`: "silu", "swish".
    Silu,
    /// `x * Φ(x)` by the error function: "gelu".
    Gelu,
    /// Its approximation by tanh: "gelu_new", "gelu_pytorch_tanh", "gelu_fast".
    GeluTanh,
}

impl Activation {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, x: S::V) -> S::V {
        // SAFETY: the caller's contract is Simd's.
        unsafe {
            match self {
                Activation::Silu => times_logistic::<S>(x, x),
                Activation::Gelu => gelu::<S>(x),
                Activation::GeluTanh => {
                    // (1 + tanh(u)) / 2 is the logistic function of 2u.
                    const TWO_SQRT_2_OVER_PI: f32 = 1.595_769_2;
                    let cube = S::mul(S::mul(x, x), x);
                    let u = S::fma(S::splat(0.044_715), cube, x);
                    times_logistic::<S>(x, S::mul(S::splat(TWO_SQRT_2_OVER_PI), u))
                }
            }
        }
    }
}

/// `x / (1 + e^-y)`.
#[inline(always)]
unsafe fn times_logistic<S: Simd>(x: S::V, y: S::V) -> S::V {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let e = simd::exp::<S>(S::sub(S::splat(0.0), y));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// `x * Φ(x) = max(x, 0) - |x|/2 * erfc(|x|/√2)`, where for z ≥ 0 erfc(z) = t·P(t)·e^(-z²)
/// with t = 1 / (1 + pz), |error| ≤ 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26).
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let size = S::max(S::sub(S::splat(0.0), x), x);
        let z = S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::div(S::splat(1.0), S::fma(S::splat(0.327_591_1), z, S::splat(1.0)));
        let mut p = S::splat(1.061_405_4);
        for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            p = S::fma(p, t, S::splat(c));
        }
        let e = simd::exp::<S>(S::sub(S::splat(0.0), S::mul(z, z)));
        let half_erfc = S::mul(S::mul(S::mul(p, t), e), S::splat(0.5));
        S::sub(S::max(S::splat(0.0), x), S::mul(size, half_erfc))
    }
}

/// `tanh(x)` to a relative 4e-7: near zero a polynomial (Cephes' tanhf), and what is beyond
/// 0.625 by the theorem of addition, with `tanh(y) = (e^2y - 1) / (e^2y + 1)`. NaN stays NaN.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        // This order of operands hands a NaN on.
        let near = S::max(S::splat(-0.625), S::min(S::splat(0.625), x));
        let square = S::mul(near, near);
        let mut p = S::splat(-5.704_988_7e-3);
        for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
            p = S::fma(p, square, S::splat(c));
        }
        let a = S::fma(S::mul(p, square), near, near);
        // b = m / p, and (a + b) / (1 + ab) with one division.
        let far = S::sub(x, near);
        let e = simd::exp::<S>(S::add(far, far));
        let (m, p) = (S::sub(e, S::splat(1.0)), S::add(e, S::splat(1.0)));
        S::div(S::fma(a, p, m), S::fma(a, m, p))
    }
}

/// Softmax of each row of `width` values, in place.
pub fn softmax(x: &mut [f32], width: usize) {
    softmax_in_tier(tier(), x, width);
}

fn softmax_in_tier(tier: Tier, x: &mut [f32], width: usize) {
    assert!(width > 0 && x.len().is_multiple_of(width));
    for row in x.chunks_exact_mut(width) {
        dispatch!(tier, softmax_row, row: &mut [f32]);
    }
}

#[inline(always)]
unsafe fn softmax_row<S: Simd>(row: &mut [f32]) {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    // SAFETY: the features of the tier, by the caller.
    unsafe { exponentials::<S>(row, top, &mut sum) };
    row.iter_mut().for_each(|x| *x /= sum);
}

/// Replaces each value by the exponential of its distance to `top`; returns their sum.
pub fn exp_of_distances(row: &mut [f32], top: f32) -> f32 {
    let mut sum = 0.0;
    let out = &mut sum;
    dispatch!(tier(), exponentials, row: &mut [f32], top: f32, out: &mut f32);
    sum
}

#[inline(always)]
unsafe fn exponentials<S: Simd>(row: &mut [f32], top: f32, sum_of_all: &mut f32) {
    // SAFETY: whole vectors; a tail goes through a padded array.
    unsafe {
        let (vectors, tail) = row.as_chunks_mut::<LANES>();
        let mut sum = S::splat(0.0);
        for v in vectors {
            let e = simd::exp::<S>(S::sub(S::load(v.as_ptr()), S::splat(top)));
            S::store(v.as_mut_ptr(), e);
            sum = S::add(sum, e);
        }
        if !tail.is_empty() {
            let mut v = padded(tail);
            S::store(v.as_mut_ptr(), simd::exp::<S>(S::sub(S::load(v.as_ptr()), S::splat(top))));
            v[tail.len()..].fill(0.0);
            tail.copy_from_slice(&v[..tail.len()]);
            sum = S::add(sum, S::load(v.as_ptr()));
        }
        *sum_of_all = S::sum(sum);
    }
}

/// `out = act(gate) * up`, elementwise: the gated units of Shazeer 2020 (SwiGLU, GeGLU).
pub fn gated(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated_in_tier(tier(), act, gate, up, out);
}

fn gated_in_tier(tier: Tier, act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    for_each_chunk(out, |range, out| {
        let (gate, up) = (&gate[range.clone()], &up[range]);
        dispatch!(
            tier,
            gated_chunk,
            act: Activation,
            gate: &[f32],
            up: &[f32],
            out: &mut [f32],
        );
    });
}

#[inline(always)]
unsafe fn gated_chunk<S: Simd>(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: equally long slices; a tail goes through padded arrays.
    unsafe {
        let whole = gate.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let g = act.of::<S>(S::load(gate.as_ptr().add(i)));
            S::store(out.as_mut_ptr().add(i), S::mul(g, S::load(up.as_ptr().add(i))));
        }
        if whole < gate.len() {
            let (g, u) = (padded(&gate[whole..]), padded(&up[whole..]));
            let mut o = [0.0; LANES];
            S::store(o.as_mut_ptr(), S::mul(act.of::<S>(S::load(g.as_ptr())), S::load(u.as_ptr())));
            out[whole..].copy_from_slice(&o[..gate.len() - whole]);
        }
    }
}

/// `x = act(x)`, elementwise.
pub fn activate(act: Activation, x: &mut [f32]) {
    activate_in_tier(tier(), act, x);
}

fn activate_in_tier(tier: Tier, act: Activation, x: &mut [f32]) {
    for_each_chunk(x, |_, x| {
        dispatch!(tier, activate_chunk, act: Activation, x: &mut [f32]);
    });
}

#[inline(always)]
unsafe fn activate_chunk<S: Simd>(act: Activation, x: &mut [f32]) {
    // SAFETY: whole vectors; a tail goes through a padded array.
    unsafe {
        let (vectors, tail) = x.as_chunks_mut::<LANES>();
        for v in vectors {
            S::store(v.as_mut_ptr(), act.of::<S>(S::load(v.as_ptr())));
        }
        if !tail.is_empty() {
            let mut v = padded(tail);
            S::store(v.as_mut_ptr(), act.of::<S>(S::load(v.as_ptr())));
            tail.copy_from_slice(&v[..tail.len()]);
        }
    }
}

/// `x = cap * tanh(x / cap)`, elementwise (Gemma 2's final_logit_softcapping).
pub fn softcap(x: &mut [f32], cap: f32) {
    softcap_in_tier(tier(), x, cap);
}

fn softcap_in_tier(tier: Tier, x: &mut [f32], cap: f32) {
    for_each_chunk(x, |_, x| {
        dispatch!(tier, softcap_chunk, x: &mut [f32], cap: f32);
    });
}

#[inline(always)]
unsafe fn softcap_chunk<S: Simd>(x: &mut [f32], cap: f32) {
    // SAFETY: whole vectors; a tail goes through a padded array.
    unsafe {
        let (vectors, tail) = x.as_chunks_mut::<LANES>();
        for v in vectors {
            S::store(v.as_mut_ptr(), capped::<S>(S::load(v.as_ptr()), cap));
        }
        if !tail.is_empty() {
            let mut v = padded(tail);
            S::store(v.as_mut_ptr(), capped::<S>(S::load(v.as_ptr()), cap));
            tail.copy_from_slice(&v[..tail.len()]);
        }
    }
}

/// `cap * tanh(x / cap)`.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn capped<S: Simd>(x: S::V, cap: f32) -> S::V {
    // SAFETY: the caller's contract is Simd's.
    unsafe { S::mul(S::splat(cap), tanh::<S>(S::mul(x, S::splat(1.0 / cap)))) }
}

/// Calls `task` on parts of `x` and their ranges, on the rank's threads.
fn for_each_chunk(x: &mut [f32], task: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    const CHUNK: usize = 4096;
    let len = x.len();
    let shared = SharedMut::new(x);
    parallel::for_each(len.div_ceil(CHUNK), 20 * len, |i| {
        let range = i * CHUNK..((i + 1) * CHUNK).min(len);
        // SAFETY: each task has its own range.
        let part =
            unsafe { std::slice::from_raw_parts_mut(shared.get().add(range.start), range.len()) };
        task(range, part);
    });
}

/// Fewer than 16 values, then zeros.
#[inline(always)]
fn padded(x: &[f32]) -> [f32; LANES] {
    let mut v = [0.0; LANES];
    v[..x.len()].copy_from_slice(x);
    v
}

/// Rotates the first `rotary_dim` elements of each head of one token in place; the rest
/// stay (HF's partial_rotary_factor). The pair of element `i` is element
/// `i + rotary_dim/2` (`rotate_half` in transformers' modeling_llama) or, `interleaved`,
/// pairs are elements `2i` and `2i + 1` (GPT-J, Meta's Llama, Cohere). `cos` and `sin`
/// hold `rotary_dim/2` values.
///
/// # Panics
/// If the dimensions do not fit together (a bug, not bad input).
pub fn rotate(
    x: &mut [f32],
    head_dim: usize,
    rotary_dim: usize,
    interleaved: bool,
    cos: &[f32],
    sin: &[f32],
) {
    let half = rotary_dim / 2;
    assert!(2 * half <= head_dim && cos.len() == half && sin.len() == half);
    for head in x.chunks_exact_mut(head_dim) {
        if interleaved {
            for (i, [a, b]) in head[..2 * half].as_chunks_mut().0.iter_mut().enumerate() {
                (*a, *b) = turned(*a, *b, cos[i], sin[i]);
            }
        } else {
            let (a, b) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                (a[i], b[i]) = turned(a[i], b[i], cos[i], sin[i]);
            }
        }
    }
}

/// The point `(a, b)` turned by an angle.
#[inline(always)]
fn turned(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}

/// `x *= factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

/// `x += y`.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

#[cfg(test)]
pub(super) mod tests {
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
    fn layer_norm_is_the_formula_on_every_tier() {
        for width in [5, 16, 70] {
            let rows = 3;
            let x: Vec<f32> = random(rows * width, 1).iter().map(|v| v + 3.0).collect();
            let (w, b) = (random(width, 2), random(width, 3));
            for bias in [None, Some(&b[..])] {
                let mut first: Option<Vec<f32>> = None;
                for tier in tiers() {
                    let mut out = vec![0.0; x.len()];
                    layer_norm_in_tier(tier, &x, &w, bias, 1e-5, &mut out);
                    for (row, out) in x.chunks(width).zip(out.chunks(width)) {
                        let n = width as f64;
                        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
                        let var = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
                        for i in 0..width {
                            let want = (f64::from(row[i]) - mean) / (var / n + 1e-5).sqrt()
                                * f64::from(w[i])
                                + bias.map_or(0.0, |b| f64::from(b[i]));
                            assert!((f64::from(out[i]) - want).abs() < 1e-5);
                        }
                    }
                    assert_eq!(&out, first.get_or_insert(out.clone()), "{tier:?}");
                }
            }
        }
    }

    /// erf in f64 by its Taylor series, or by what is left of 1 (A&S 7.1.5, 7.1.23).
    fn erf(x: f64) -> f64 {
        if x.abs() > 5.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    /// The activation in f64.
    pub(in crate::kernels) fn formula(act: Activation, x: f64) -> f64 {
        match act {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Activation::GeluTanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            }
        }
    }

    #[test]
    fn activations_are_their_formulas_on_every_tier() {
        let mut x: Vec<f32> = random(100, 3).iter().map(|v| v * 120.0).collect();
        x.extend((-700..=700).map(|i| i as f32 / 100.0));
        let up = random(x.len(), 4);
        for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let mut first: Option<Vec<f32>> = None;
            for tier in tiers() {
                let (mut a, mut b) = (x.clone(), vec![0.0; x.len()]);
                activate_in_tier(tier, act, &mut a);
                gated_in_tier(tier, act, &x, &up, &mut b);
                for i in 0..x.len() {
                    let want = formula(act, f64::from(x[i]));
                    let close = 1e-6 * want.abs().max(1.0);
                    assert!((f64::from(a[i]) - want).abs() < close, "{act:?}({}) = {}", x[i], a[i]);
                    assert_eq!(b[i], a[i] * up[i]);
                }
                assert_eq!(&a, first.get_or_insert(a.clone()), "{tier:?}");
            }
        }
    }

    /// Gate over `1 + e^-gate`, then times up, each operation rounded: a change of bits
    /// would change what a run writes.
    #[test]
    fn the_gated_silu_keeps_its_bits() {
        let gate: Vec<f32> = random(20, 3).iter().map(|v| v * 12.0).collect();
        let (up, mut out) = (random(20, 4), vec![0.0; 20]);
        gated(Activation::Silu, &gate, &up, &mut out);
        for i in 0..20 {
            let (mut g, mut e) = ([0.0; LANES], [0.0; LANES]);
            g[0] = -gate[i];
            // SAFETY: the scalar tier needs no features.
            unsafe {
                use crate::kernels::simd::Scalar;
                Scalar::store(e.as_mut_ptr(), simd::exp::<Scalar>(g));
            }
            assert_eq!(out[i].to_bits(), (gate[i] / (1.0 + e[0]) * up[i]).to_bits());
        }
    }

    #[test]
    fn softmax_is_the_formula_on_every_tier() {
        for width in [1, 8, 16, 37, 128] {
            let x: Vec<f32> = random(3 * width, 9).iter().map(|v| v * 20.0).collect();
            let mut first: Option<Vec<f32>> = None;
            for tier in tiers() {
                let mut out = x.clone();
                softmax_in_tier(tier, &mut out, width);
                for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                    let total: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
                    for (x, out) in x.iter().zip(out) {
                        assert!((f64::from(*out) - f64::from(*x).exp() / total).abs() < 1e-6);
                    }
                }
                assert_eq!(&out, first.get_or_insert(out.clone()), "{tier:?}");
            }
        }
    }

    #[test]
    fn caps_are_tanh_on_every_tier_and_keep_nan() {
        let cap = 30.0;
        let mut x: Vec<f32> = (-4000..=4000).map(|i| i as f32 / 20.0).collect();
        x.extend(random(50, 1).iter().map(|v| v * 1e-4));
        x.extend([1e9, -1e9, f32::INFINITY, f32::NEG_INFINITY]);
        let mut first: Option<Vec<f32>> = None;
        for tier in tiers() {
            let mut out = x.clone();
            softcap_in_tier(tier, &mut out, cap);
            for (x, y) in x.iter().zip(&out) {
                let want = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                assert!((f64::from(*y) - want).abs() <= 4e-7 * want.abs(), "{x} {y} {want}");
            }
            assert_eq!(&out, first.get_or_insert(out.clone()), "{tier:?}");
            let mut nan = [f32::NAN; 17];
            softcap_in_tier(tier, &mut nan, cap);
            assert!(nan.iter().all(|x| x.is_nan()), "{tier:?}");
        }
    }

    #[test]
    fn a_rotation_turns_its_pairs_and_leaves_the_rest() {
        let (head_dim, rotary_dim) = (6, 4);
        let before = random(2 * head_dim, 5);
        let angles = [0.3f32, 1.7];
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        for interleaved in [false, true] {
            let mut x = before.clone();
            rotate(&mut x, head_dim, rotary_dim, interleaved, &cos, &sin);
            for (x, before) in x.chunks(head_dim).zip(before.chunks(head_dim)) {
                for (i, angle) in angles.iter().enumerate() {
                    let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + 2) };
                    let turn = x[b].atan2(x[a]) - before[b].atan2(before[a]) - angle;
                    assert!(turn.sin().abs() < 1e-5 && turn.cos() > 0.0);
                    assert!((x[a].hypot(x[b]) - before[a].hypot(before[b])).abs() < 1e-6);
                }
                assert_eq!(x[4..], before[4..]);
            }
        }
    }
}
