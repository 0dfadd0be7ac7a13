//! The arithmetic of a row of logits: maximum, exponentials and sums in one
//! fixed order, so that a row gives the same bits on every machine and thread.
//!
//! The exponential is our own because libm picks another one by CPU, and so
//! that the compiler can vectorise it.

use crate::model::LogitsError;

/// Elements handled side by side; fixes the order of sums.
const LANES: usize = 8;

/// The largest logit. −∞ marks a token that cannot follow; NaN and +∞ are errors.
pub fn row_max(row: &[f32]) -> Result<f32, LogitsError> {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut take = |lane: usize, x: f32| {
        max[lane] = if x > max[lane] { x } else { max[lane] };
        bad[lane] |= u32::from(x.is_nan());
    };
    for chunk in chunks {
        (0..LANES).for_each(|lane| take(lane, chunk[lane]));
    }
    rest.iter().enumerate().for_each(|(lane, &x)| take(lane, x));
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if bad != [0; LANES] || max == f32::INFINITY {
        Err(LogitsError::NotFinite)
    } else if max == f32::NEG_INFINITY {
        Err(LogitsError::NoCandidate)
    } else {
        Ok(max)
    }
}

/// `e^x` for `x ≤ 0`, within 2 units in the last place; 0 below `e^-87`; exactly
/// 1 at 0. Range reduction and polynomial of Moshier's Cephes (`expf`).
#[inline(always)]
pub fn exp_nonpositive(x: f32) -> f32 {
    const SMALLEST: f32 = -87.0;
    /// 1.5 × 2²³: adding it rounds to an integer, left in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let clamped = if x > SMALLEST { x } else { SMALLEST };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let mantissa = p * (r * r) + r + 1.0;
    let power = rounded.to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127) << 23;
    if x < SMALLEST { 0.0 } else { mantissa * f32::from_bits(power) }
}

/// Sum in f64 by lanes, then over the lanes: one order for one length.
pub fn sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        (0..LANES).for_each(|lane| lanes[lane] += f64::from(chunk[lane]));
    }
    rest.iter().zip(&mut lanes).for_each(|(&x, lane)| *lane += f64::from(x));
    lanes.into_iter().sum()
}

/// Replaces `weights` by `e^((logit − max) / temperature)` and gives their sum.
pub fn softmax_weights(row: &[f32], max: f32, temperature: f32, weights: &mut Vec<f32>) -> f64 {
    weights.clear();
    weights.extend(row.iter().map(|&x| exp_nonpositive((x - max) / temperature)));
    sum(weights)
}

/// `ln Σ e^logit`: a logit less this is its log-probability. `weights` is scratch.
pub fn log_sum_exp(row: &[f32], weights: &mut Vec<f32>) -> Result<f64, LogitsError> {
    let max = row_max(row)?;
    Ok(f64::from(max) + softmax_weights(row, max, 1.0, weights).ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulps_and_exact_at_zero() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-0.0), 1.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(-1000.0), 0.0);
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "e^{x}: relative error {error}");
        }
    }

    #[test]
    fn max_refuses_rows_without_a_finite_best() {
        assert_eq!(row_max(&[f32::NEG_INFINITY, -2.0, -1.0]), Ok(-1.0));
        assert_eq!(row_max(&[f32::NEG_INFINITY; 3]), Err(LogitsError::NoCandidate));
        assert_eq!(row_max(&[]), Err(LogitsError::NoCandidate));
        for bad in [f32::NAN, f32::INFINITY] {
            for position in 0..19 {
                let mut row = [0.5; 19];
                row[position] = bad;
                assert_eq!(row_max(&row), Err(LogitsError::NotFinite));
            }
        }
    }

    #[test]
    fn log_sum_exp_matches_f64_and_does_not_overflow() {
        let row: Vec<f32> = (0..1001).map(|i| ((i * 37) % 101) as f32 * 0.1 + 300.0).collect();
        let exact = row.iter().map(|&x| (f64::from(x) - 300.0).exp()).sum::<f64>().ln() + 300.0;
        assert!((log_sum_exp(&row, &mut Vec::new()).unwrap() - exact).abs() < 1e-6);
    }
}
