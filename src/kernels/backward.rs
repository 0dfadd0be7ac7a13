//! Gradients of the row-wise and elementwise kernels with respect to their inputs; the
//! weights are frozen.
//!
//! Statistics and activations are computed again from the inputs: that costs less than to
//! keep them. Each row, or element, is its own: no bit depends on threads.
//!
//! Left out: gradients of norm weights and biases.

use super::ops::Activation;
use super::parallel::{self, SharedMut};
use super::simd::{self, LANES, Simd};
use super::{Tier, dispatch, tier};

/// Values of a task.
const CHUNK: usize = 8192;

/// The gradient of [`ops::rms_norm`](super::ops::rms_norm) with respect to `x`, from that with
/// respect to its result: with `r = 1 / sqrt(mean(x²) + eps)` and `g = weight * dy`,
/// `dx = r * (g - x * r² * mean(g * x))` in each row of `weight.len()` values.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    rms_norm_in_tier(tier(), x, weight, eps, dy, dx);
}

fn rms_norm_in_tier(tier: Tier, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    for_each_row([x, dy], weight.len(), dx, |[x, dy], dx| {
        dispatch!(
            tier,
            rms_norm_row,
            x: &[f32],
            weight: &[f32],
            eps: f32,
            dy: &[f32],
            dx: &mut [f32],
        );
    });
}

#[inline(always)]
unsafe fn rms_norm_row<S: Simd>(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    // SAFETY: the slices are equally long, and `load` and `store` keep inside them.
    unsafe {
        let (mut squares, mut products) = (S::splat(0.0), S::splat(0.0));
        for i in (0..x.len()).step_by(LANES) {
            let v = load::<S>(x, i, 0.0);
            let g = S::mul(load::<S>(weight, i, 0.0), load::<S>(dy, i, 0.0));
            squares = S::fma(v, v, squares);
            products = S::fma(g, v, products);
        }
        let n = x.len() as f32;
        let r = 1.0 / (S::sum(squares) / n + eps).sqrt();
        let along = -(r * r * (S::sum(products) / n));
        for i in (0..x.len()).step_by(LANES) {
            let g = S::mul(load::<S>(weight, i, 0.0), load::<S>(dy, i, 0.0));
            let d = S::fma(load::<S>(x, i, 0.0), S::splat(along), g);
            store::<S>(dx, i, S::mul(S::splat(r), d));
        }
    }
}

/// The gradient of [`ops::layer_norm`](super::ops::layer_norm) with respect to `x`, from that
/// with respect to its result: with `r = 1 / sqrt(var + eps)`, `n = (x - mean) * r` and
/// `g = weight * dy`, `dx = r * (g - mean(g) - n * mean(g * n))` in each row of
/// `weight.len()` values.
///
/// # Panics
/// If the lengths do not fit together (a bug, not bad input).
pub fn layer_norm(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    layer_norm_in_tier(tier(), x, weight, eps, dy, dx);
}

fn layer_norm_in_tier(tier: Tier, x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    for_each_row([x, dy], weight.len(), dx, |[x, dy], dx| {
        dispatch!(
            tier,
            layer_norm_row,
            x: &[f32],
            weight: &[f32],
            eps: f32,
            dy: &[f32],
            dx: &mut [f32],
        );
    });
}

#[inline(always)]
unsafe fn layer_norm_row<S: Simd>(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    // SAFETY: the slices are equally long, and `load` and `store` keep inside them.
    unsafe {
        let n = x.len() as f32;
        let mut sum = S::splat(0.0);
        for i in (0..x.len()).step_by(LANES) {
            sum = S::add(sum, load::<S>(x, i, 0.0));
        }
        let mean = S::sum(sum) / n;
        let [mut squares, mut gradients, mut products] = [S::splat(0.0); 3];
        for i in (0..x.len()).step_by(LANES) {
            let v = S::sub(load::<S>(x, i, mean), S::splat(mean));
            let g = S::mul(load::<S>(weight, i, 0.0), load::<S>(dy, i, 0.0));
            squares = S::fma(v, v, squares);
            gradients = S::add(gradients, g);
            products = S::fma(g, v, products);
        }
        let r = 1.0 / (S::sum(squares) / n + eps).sqrt();
        let (level, along) = (S::sum(gradients) / n, -(r * r * (S::sum(products) / n)));
        for i in (0..x.len()).step_by(LANES) {
            let v = S::sub(load::<S>(x, i, mean), S::splat(mean));
            let g = S::mul(load::<S>(weight, i, 0.0), load::<S>(dy, i, 0.0));
            let d = S::fma(v, S::splat(along), S::sub(g, S::splat(level)));
            store::<S>(dx, i, S::mul(S::splat(r), d));
        }
    }
}

/// The gradients of [`ops::gated`](super::ops::gated), `act(gate) * up`, from `dy`, that with
/// respect to its result: `dgate = dy * up * act'(gate)` and `dup = dy * act(gate)`.
///
/// # Panics
/// If the lengths differ (a bug, not bad input).
pub fn gated(
    act: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    gated_in_tier(tier(), act, gate, up, dy, dgate, dup);
}

fn gated_in_tier(
    tier: Tier,
    act: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    for_each_chunk([gate, up, dy], [dgate, dup], |[gate, up, dy], [dgate, dup]| {
        dispatch!(
            tier,
            gated_chunk,
            act: Activation,
            gate: &[f32],
            up: &[f32],
            dy: &[f32],
            dgate: &mut [f32],
            dup: &mut [f32],
        );
    });
}

#[inline(always)]
unsafe fn gated_chunk<S: Simd>(
    act: Activation,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    // SAFETY: the slices are equally long, and `load` and `store` keep inside them.
    unsafe {
        for i in (0..gate.len()).step_by(LANES) {
            let dy = load::<S>(dy, i, 0.0);
            let (value, slope) = value_and_slope::<S>(act, load::<S>(gate, i, 0.0));
            store::<S>(dgate, i, S::mul(S::mul(dy, load::<S>(up, i, 0.0)), slope));
            store::<S>(dup, i, S::mul(dy, value));
        }
    }
}

/// The gradient of [`ops::activate`](super::ops::activate) at `x`, its input: `d *= act'(x)`.
///
/// # Panics
/// If the lengths differ (a bug, not bad input).
pub fn activate(act: Activation, x: &[f32], d: &mut [f32]) {
    activate_in_tier(tier(), act, x, d);
}

fn activate_in_tier(tier: Tier, act: Activation, x: &[f32], d: &mut [f32]) {
    for_each_chunk([x], [d], |[x], [d]| {
        dispatch!(tier, activate_chunk, act: Activation, x: &[f32], d: &mut [f32]);
    });
}

#[inline(always)]
unsafe fn activate_chunk<S: Simd>(act: Activation, x: &[f32], d: &mut [f32]) {
    // SAFETY: the slices are equally long, and `load` and `store` keep inside them.
    unsafe {
        for i in (0..x.len()).step_by(LANES) {
            let (_, slope) = value_and_slope::<S>(act, load::<S>(x, i, 0.0));
            store::<S>(d, i, S::mul(load::<S>(d, i, 0.0), slope));
        }
    }
}

/// An activation and its derivative; NaN stays NaN.
#[inline(always)]
unsafe fn value_and_slope<S: Simd>(act: Activation, x: S::V) -> (S::V, S::V) {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let one = S::splat(1.0);
        match act {
            Activation::Silu => {
                let s = logistic::<S>(x);
                // `exp` is clamped, and so what multiplies a small s must be.
                let rise = S::mul(S::mul(clamp::<S>(x, 88.0), s), S::sub(one, s));
                (S::mul(x, s), S::add(s, rise))
            }
            Activation::GeluTanh => {
                // x·s(2u) with u = √(2/π)·(x + 0.044715 x³) and the logistic function s.
                const TWO_SQRT_2_OVER_PI: f32 = 1.595_769_2;
                // Beyond 10 nothing changes, but cubes would not be finite.
                let z = clamp::<S>(x, 10.0);
                let square = S::mul(z, z);
                let u = S::mul(z, S::fma(S::splat(0.044_715), square, one));
                let s = logistic::<S>(S::mul(S::splat(TWO_SQRT_2_OVER_PI), u));
                let du = S::fma(S::splat(3.0 * 0.044_715), square, one);
                let du = S::mul(S::splat(TWO_SQRT_2_OVER_PI), du);
                let rise = S::mul(S::mul(z, s), S::sub(one, s));
                (S::mul(x, s), S::fma(rise, du, s))
            }
            Activation::Gelu => {
                let (cdf, density) = normal::<S>(clamp::<S>(x, 15.0));
                (S::mul(x, cdf), S::fma(clamp::<S>(x, 15.0), density, cdf))
            }
        }
    }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
unsafe fn logistic<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let e = simd::exp::<S>(S::sub(S::splat(0.0), x));
        S::div(S::splat(1.0), S::add(S::splat(1.0), e))
    }
}

/// `x` within `±limit`.
#[inline(always)]
unsafe fn clamp<S: Simd>(x: S::V, limit: f32) -> S::V {
    // SAFETY: the caller's contract is Simd's. This order of operands hands a NaN on.
    unsafe { S::max(S::splat(-limit), S::min(S::splat(limit), x)) }
}

/// The standard normal distribution's Φ and φ, Φ by [`Activation::Gelu`]'s erfc.
#[inline(always)]
unsafe fn normal<S: Simd>(x: S::V) -> (S::V, S::V) {
    const ONE_OVER_SQRT_2_PI: f32 = 0.398_942_3;
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let half = S::splat(0.5);
        let size = S::max(S::sub(S::splat(0.0), x), x);
        let z = S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::div(S::splat(1.0), S::fma(S::splat(0.327_591_1), z, S::splat(1.0)));
        let mut p = S::splat(1.061_405_4);
        for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
            p = S::fma(p, t, S::splat(c));
        }
        let e = simd::exp::<S>(S::sub(S::splat(0.0), S::mul(z, z)));
        let half_erfc = S::mul(S::mul(S::mul(p, t), e), half);
        // -1, 1, or 0 at 0.
        let sign = clamp::<S>(S::mul(x, S::splat(f32::MAX)), 1.0);
        (S::fma(sign, S::sub(half, half_erfc), half), S::mul(S::splat(ONE_OVER_SQRT_2_PI), e))
    }
}

/// The gradient of [`ops::rotate`](super::ops::rotate): the rotation back, or, where `cos` and
/// `sin` carry a factor, its transpose. `x` is in place, one row or many; `cos` and `sin` hold
/// `rotary_dim/2` values for each row.
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
    if half == 0 || x.is_empty() {
        return;
    }
    let rows = cos.len() / half;
    assert!(cos.len() == sin.len() && cos.len() == rows * half && rows > 0);
    assert!(2 * half <= head_dim && x.len().is_multiple_of(rows * head_dim));
    let (width, len) = (x.len() / rows, x.len());
    let x = SharedMut::new(x);
    parallel::for_each(rows, 4 * len, |row| {
        // SAFETY: each task has its own row.
        let x = unsafe { std::slice::from_raw_parts_mut(x.get().add(row * width), width) };
        let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        for head in x.chunks_exact_mut(head_dim) {
            rotate_head(&mut head[..2 * half], interleaved, cos, sin);
        }
    });
}

fn rotate_head(x: &mut [f32], interleaved: bool, cos: &[f32], sin: &[f32]) {
    let turned_back = |a: f32, b: f32, i: usize| (a * cos[i] + b * sin[i], b * cos[i] - a * sin[i]);
    if interleaved {
        for (i, [a, b]) in x.as_chunks_mut().0.iter_mut().enumerate() {
            (*a, *b) = turned_back(*a, *b, i);
        }
    } else {
        let (a, b) = x.split_at_mut(cos.len());
        for i in 0..cos.len() {
            (a[i], b[i]) = turned_back(a[i], b[i], i);
        }
    }
}

/// Calls `task` on each row of `width` values, on the rank's threads.
fn for_each_row(
    given: [&[f32]; 2],
    width: usize,
    result: &mut [f32],
    task: impl Fn([&[f32]; 2], &mut [f32]) + Sync,
) {
    let len = result.len();
    assert!(width > 0 && len.is_multiple_of(width) && given.iter().all(|x| x.len() == len));
    let rows_a_task = CHUNK.div_ceil(width);
    let rows = len / width;
    let result = SharedMut::new(result);
    parallel::for_each(rows.div_ceil(rows_a_task), 10 * len, |i| {
        for row in i * rows_a_task..((i + 1) * rows_a_task).min(rows) {
            let given = given.map(|x| &x[row * width..][..width]);
            // SAFETY: each task has its own rows.
            let result =
                unsafe { std::slice::from_raw_parts_mut(result.get().add(row * width), width) };
            task(given, result);
        }
    });
}

/// Calls `task` on parts of all the slices, which are equally long, on the rank's threads.
fn for_each_chunk<const N: usize, const M: usize>(
    given: [&[f32]; N],
    results: [&mut [f32]; M],
    task: impl Fn([&[f32]; N], [&mut [f32]; M]) + Sync,
) {
    let len = given[0].len();
    assert!(given.iter().all(|x| x.len() == len) && results.iter().all(|x| x.len() == len));
    let results = results.map(SharedMut::new);
    parallel::for_each(len.div_ceil(CHUNK), 20 * len, |i| {
        let (start, end) = (i * CHUNK, ((i + 1) * CHUNK).min(len));
        // SAFETY: each task has its own range.
        let part = |x: SharedMut<f32>| unsafe {
            std::slice::from_raw_parts_mut(x.get().add(start), end - start)
        };
        task(given.map(|x| &x[start..end]), results.map(part));
    });
}

/// The 16 values from `i` on, what is beyond the end being `rest`.
#[inline(always)]
unsafe fn load<S: Simd>(x: &[f32], i: usize, rest: f32) -> S::V {
    // SAFETY: a whole vector, or a padded copy of one.
    unsafe {
        if i + LANES <= x.len() {
            return S::load(x.as_ptr().add(i));
        }
        let mut padded = [rest; LANES];
        padded[..x.len() - i].copy_from_slice(&x[i..]);
        S::load(padded.as_ptr())
    }
}

/// Writes the 16 values from `i` on, as far as there are any.
#[inline(always)]
unsafe fn store<S: Simd>(x: &mut [f32], i: usize, v: S::V) {
    // SAFETY: a whole vector, or a copy of its first values.
    unsafe {
        if i + LANES <= x.len() {
            return S::store(x.as_mut_ptr().add(i), v);
        }
        let mut padded = [0.0; LANES];
        S::store(padded.as_mut_ptr(), v);
        let rest = x.len() - i;
        x[i..].copy_from_slice(&padded[..rest]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::tests::formula;
    use super::*;
    use crate::kernels::ops;
    use crate::kernels::tests::{random, tiers};

    const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh];

    /// Runs a kernel in every tier, whose bits must agree.
    fn in_every_tier(kernel: impl Fn(Tier) -> Vec<f32>) -> Vec<f32> {
        let first = kernel(Tier::Scalar);
        for tier in tiers() {
            assert_eq!(kernel(tier), first, "{tier:?}");
        }
        first
    }

    /// Compares with central differences of `Σ dy · f(x)` for one row.
    fn check_row(x: &[f32], dy: &[f32], dx: &[f32], f: impl Fn(&[f64]) -> Vec<f64>) {
        let mut x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let loss = |x: &[f64]| dy.iter().zip(f(x)).map(|(g, y)| f64::from(*g) * y).sum::<f64>();
        let step = 1e-5;
        for i in 0..x.len() {
            let before = x[i];
            x[i] = before + step;
            let above = loss(&x);
            x[i] = before - step;
            let want = (above - loss(&x)) / (2.0 * step);
            x[i] = before;
            assert!((f64::from(dx[i]) - want).abs() < 1e-5 * want.abs().max(1.0), "{i} {want}");
        }
    }

    #[test]
    fn norms_are_their_differences_on_every_tier() {
        for width in [1, 5, 16, 70] {
            let rows = 3;
            let x: Vec<f32> = random(rows * width, 1).iter().map(|v| 2.0 * v + 0.5).collect();
            let (weight, dy) = (random(width, 2), random(rows * width, 3));
            let eps = 0.1;
            let (w, n) = (|i: usize| f64::from(weight[i]), width as f64);
            let rms = in_every_tier(|tier| {
                let mut dx = vec![f32::NAN; x.len()];
                rms_norm_in_tier(tier, &x, &weight, eps, &dy, &mut dx);
                dx
            });
            let layer = in_every_tier(|tier| {
                let mut dx = vec![f32::NAN; x.len()];
                layer_norm_in_tier(tier, &x, &weight, eps, &dy, &mut dx);
                dx
            });
            let scale = |x: &[f64]| {
                1.0 / (x.iter().map(|v| v * v).sum::<f64>() / n + f64::from(eps)).sqrt()
            };
            for row in 0..rows {
                let row = row * width..(row + 1) * width;
                check_row(&x[row.clone()], &dy[row.clone()], &rms[row.clone()], |x| {
                    x.iter().enumerate().map(|(i, v)| w(i) * v * scale(x)).collect()
                });
                check_row(&x[row.clone()], &dy[row.clone()], &layer[row], |x| {
                    let mean = x.iter().sum::<f64>() / n;
                    let x: Vec<f64> = x.iter().map(|v| v - mean).collect();
                    x.iter().enumerate().map(|(i, v)| w(i) * v * scale(&x)).collect()
                });
            }
        }
    }

    #[test]
    fn activations_are_their_differences_on_every_tier() {
        let x: Vec<f32> = (-421..=421).map(|i| i as f32 / 100.0).collect();
        let (up, dy) = (random(x.len(), 1), random(x.len(), 2));
        for act in ACTIVATIONS {
            let d = in_every_tier(|tier| {
                let mut d = dy.clone();
                activate_in_tier(tier, act, &x, &mut d);
                d
            });
            let both = in_every_tier(|tier| {
                let (mut dgate, mut dup) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
                gated_in_tier(tier, act, &x, &up, &dy, &mut dgate, &mut dup);
                [dgate, dup].concat()
            });
            let (dgate, dup) = both.split_at(x.len());
            let mut values = x.clone();
            ops::activate(act, &mut values);
            for i in 0..x.len() {
                let (at, step) = (f64::from(x[i]), 1e-5);
                let slope = (formula(act, at + step) - formula(act, at - step)) / (2.0 * step);
                let want = f64::from(dy[i]) * slope;
                let close = |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-6;
                assert!(close(d[i], want), "{act:?}'({at}): {} {want}", d[i]);
                assert!(close(dgate[i], want * f64::from(up[i])), "{act:?}'({at})");
                assert!(close(dup[i], f64::from(dy[i] * values[i])), "{act:?}({at})");
            }
        }
    }

    #[test]
    fn far_from_zero_activations_are_flat_or_straight_and_nan_stays_nan() {
        let x = [-1e38, -1e20, -100.0, -20.0, 20.0, 100.0, 1e20, 1e38, f32::NAN];
        for act in ACTIVATIONS {
            let d = in_every_tier(|tier| {
                let mut d = x.map(|_| 1.0);
                activate_in_tier(tier, act, &x, &mut d);
                d.iter().map(|d| if d.is_nan() { 7.0 } else { *d }).collect()
            });
            let want = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 7.0];
            assert!(d.iter().zip(want).all(|(d, want)| (d - want).abs() < 1e-6), "{act:?} {d:?}");
        }
    }

    /// `dy · R(x) = R'(dy) · x` for any x and dy: the transpose, which for a plain rotation is
    /// the rotation back.
    #[test]
    fn a_rotation_back_is_the_transpose_of_the_rotation() {
        let (rows, heads, head_dim, rotary_dim) = (3, 2, 10, 6);
        let half = rotary_dim / 2;
        let (x, dy) = (random(rows * heads * head_dim, 1), random(rows * heads * head_dim, 2));
        let angles = random(rows * half, 3);
        for factor in [1.0, 1.3] {
            let (cos, sin): (Vec<f32>, Vec<f32>) =
                angles.iter().map(|a| (factor * a.cos(), factor * a.sin())).unzip();
            for interleaved in [false, true] {
                let (mut y, mut dx) = (x.clone(), dy.clone());
                for (row, y) in y.chunks_mut(heads * head_dim).enumerate() {
                    let at = row * half..(row + 1) * half;
                    let (cos, sin) = (&cos[at.clone()], &sin[at]);
                    ops::rotate(y, head_dim, rotary_dim, interleaved, cos, sin);
                }
                rotate(&mut dx, head_dim, rotary_dim, interleaved, &cos, &sin);
                for head in 0..rows * heads {
                    let head = head * head_dim..(head + 1) * head_dim;
                    let dot = |a: &[f32], b: &[f32]| {
                        a[head.clone()]
                            .iter()
                            .zip(&b[head.clone()])
                            .map(|(a, b)| a * b)
                            .sum::<f32>()
                    };
                    assert!((dot(&dy, &y) - dot(&dx, &x)).abs() < 1e-5);
                }
                if factor == 1.0 {
                    rotate(&mut y, head_dim, rotary_dim, interleaved, &cos, &sin);
                    assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-6));
                }
            }
        }
    }

    #[test]
    fn many_rows_and_chunks_give_what_one_gives() {
        let (width, rows) = (300, 100);
        let (x, dy, weight) = (random(rows * width, 1), random(rows * width, 2), random(width, 3));
        let mut dx = vec![f32::NAN; x.len()];
        rms_norm(&x, &weight, 1e-5, &dy, &mut dx);
        let mut one = vec![f32::NAN; width];
        for row in 0..rows {
            let at = row * width..(row + 1) * width;
            rms_norm(&x[at.clone()], &weight, 1e-5, &dy[at.clone()], &mut one);
            assert_eq!(dx[at], one);
        }
        let (mut all, mut part) = (dy.clone(), dy.clone());
        activate(Activation::Silu, &x, &mut all);
        for (x, d) in x.chunks(1000).zip(part.chunks_mut(1000)) {
            activate(Activation::Silu, x, d);
        }
        assert_eq!(all, part);
    }
}
