//! Against the same rounding written plainly, in exact arithmetic; among kinds; and
//! against the product of floats.

use proptest::prelude::*;

use super::super::tests::{bits, matrix_bytes};
use super::super::{QuantType, dequantize_row, read_row};
use super::*;
use crate::kernels::quant::quantize_rows;
use crate::kernels::tests::{random, tiers};

/// The kinds that this CPU can run.
fn kinds() -> Vec<Kind> {
    let mut kinds: Vec<Kind> = tiers().into_iter().map(Kind::of).collect();
    if kinds.contains(&Kind::Vnni) {
        kinds.push(Kind::Avx512);
    }
    kinds
}

fn dequantized(w: QuantMatrix<'_>) -> Vec<f32> {
    let mut wide = vec![0.0; w.rows * w.cols];
    for (row, wide) in wide.chunks_exact_mut(w.cols).enumerate() {
        read_row(w, row, wide);
    }
    wide
}

/// What activations stand for once they are rounded, by the blocks of `w`.
fn rounded(x: &[f32], w: QuantMatrix<'_>) -> Vec<f64> {
    let len = w.quant.block_len();
    let mut out = Vec::new();
    for row in x.chunks_exact(w.cols) {
        let mut padded = vec![0.0; w.skip];
        padded.extend_from_slice(row);
        for block in padded.chunks(len) {
            let scale = block.iter().fold(0f32, |a, x| a.max(x.abs())) / 127.0;
            let inverse = 1.0 / scale;
            out.extend(block.iter().map(|x| {
                if scale == 0.0 {
                    0.0
                } else {
                    f64::from((x * inverse).round_ties_even()) * f64::from(scale)
                }
            }));
        }
        let first = out.len() - padded.len();
        out.drain(first..first + w.skip);
    }
    out
}

/// Whole blocks; cuts at vectors, with and without a tail; a cut anywhere; blocks by fours.
fn cuts(len: usize) -> [(usize, usize); 7] {
    [
        (0, 2 * len),
        (0, 2 * len - 3),
        (16, len + 21),
        (5, len + 7),
        (16, 9),
        (0, 4 * len),
        (7, 8 * len - 12),
    ]
}

#[test]
fn products_are_those_of_rounded_activations() {
    for quant in QuantType::ALL {
        for (skip, cols) in cuts(quant.block_len()) {
            let (rows, m) = (19, 3);
            let (data, stride) =
                matrix_bytes(quant, rows, (skip + cols).div_ceil(quant.block_len()));
            let w = QuantMatrix { data: &data[1..], quant, rows, cols, skip, stride };
            let (bias, x) = (random(rows, 1), random(m * cols, 2));
            let (wide, rounded) = (dequantized(w), rounded(&x, w));
            let mut got = vec![0.0; m * rows];
            linear(&x, m, w, Some(&bias), &mut got);
            for (i, got) in got.iter().enumerate() {
                let (x, row) = (&rounded[i / rows * cols..][..cols], i % rows);
                let products = || x.iter().zip(&wide[row * cols..]).map(|(x, w)| x * f64::from(*w));
                let want = products().sum::<f64>() + f64::from(bias[row]);
                // Sums of magnitudes, as a minimum and what it is taken off may cancel.
                let size = products().map(f64::abs).sum::<f64>() + 1.0;
                let error = (f64::from(*got) - want).abs();
                assert!(error <= 1e-5 * size, "{quant:?} {skip} {cols}: {got} {want} of {size}");
            }
        }
    }
}

/// Invariant 4.
#[test]
fn kinds_and_batches_give_the_same_bits() {
    for quant in QuantType::ALL {
        for (skip, cols) in cuts(quant.block_len()) {
            let rows = 37;
            let (data, stride) =
                matrix_bytes(quant, rows, (skip + cols).div_ceil(quant.block_len()));
            let w = QuantMatrix { data: &data[1..], quant, rows, cols, skip, stride };
            let (bias, x) = (random(rows, 1), random(33 * cols, 2));
            let mut want = Vec::new();
            for x in x.chunks_exact(cols) {
                let mut row = vec![0.0; rows];
                linear_of_kind(Kind::Scalar, x, 1, w, Some(&bias), &mut row);
                want.extend(row);
            }
            for kind in kinds() {
                for m in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 33] {
                    let mut got = vec![0.0; m * rows];
                    linear_of_kind(kind, &x[..m * cols], m, w, Some(&bias), &mut got);
                    let same = bits(&got) == bits(&want[..m * rows]);
                    assert!(same, "{quant:?} {kind:?} m {m} skip {skip} cols {cols}");
                }
            }
        }
    }
}

/// Enough rows for several tasks and activations for several parts, long enough for
/// several chunks.
#[test]
fn tasks_and_chunks_leave_no_trace() {
    for quant in [QuantType::Q8_0, QuantType::Q4_K] {
        let (rows, cols) = (50, 9 * 1024);
        let (data, stride) = matrix_bytes(quant, rows, cols / quant.block_len());
        let w = QuantMatrix { data: &data[1..], quant, rows, cols, skip: 0, stride };
        let x = random(120 * cols, 3);
        let mut together = vec![0.0; 120 * rows];
        linear(&x, 120, w, None, &mut together);
        for (x, want) in x.chunks_exact(cols).zip(together.chunks_exact(rows)).step_by(17) {
            let mut got = vec![0.0; rows];
            linear(x, 1, w, None, &mut got);
            assert_eq!(bits(&got), bits(want), "{quant:?}");
            for first in [0, 7, 48] {
                let part = QuantMatrix { data: &data[1 + first * stride..], rows: 2, ..w };
                let mut got = [0.0; 2];
                linear(x, 1, part, None, &mut got);
                assert_eq!(bits(&got), bits(&want[first..first + 2]), "{quant:?} {first}");
            }
        }
    }
}

#[test]
fn activations_that_are_not_finite_are_not_lost() {
    for quant in QuantType::ALL {
        let cols = 2 * quant.block_len();
        let (data, stride) = matrix_bytes(quant, 2, 2);
        let w = QuantMatrix { data: &data[1..], quant, rows: 2, cols, skip: 0, stride };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = random(cols, 1);
            x[cols - 3] = bad;
            for kind in kinds() {
                let mut out = [0.0; 2];
                linear_of_kind(kind, &x, 1, w, None, &mut out);
                assert!(out.iter().all(|v| v.is_nan()), "{quant:?} {kind:?} {bad}");
            }
        }
        for tiny in [0.0, 1e-38, f32::MIN_POSITIVE / 4.0] {
            let mut out = [1.0; 2];
            linear(&vec![tiny; cols], 1, w, Some(&[3.0, 4.0]), &mut out);
            assert_eq!(out, [3.0, 4.0], "{quant:?}");
        }
    }
}

#[test]
fn no_rows_and_no_columns() {
    let quant = QuantType::Q4_K;
    let mut out = [0.0; 3];
    let none = QuantMatrix { data: &[], quant, rows: 3, cols: 0, skip: 0, stride: 0 };
    linear(&[], 1, none, Some(&[1.0, 2.0, 3.0]), &mut out);
    assert_eq!(out, [1.0, 2.0, 3.0]);
    linear(&[0.0; 256], 1, QuantMatrix { rows: 0, cols: 256, stride: 144, ..none }, None, &mut []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Rounding moves a product by no more than half a step of an activation times the
    /// weights' magnitudes.
    #[test]
    fn products_stay_near_those_of_floats(seed in any::<u64>(), power in -9i32..9) {
        let (rows, cols, m) = (5, 512, 2);
        let values = random(rows * cols, seed);
        let x: Vec<f32> = random(m * cols, seed ^ 1).iter().map(|v| v * 2f32.powi(power)).collect();
        for quant in [QuantType::Q8_0, QuantType::Q4_K, QuantType::Q6_K] {
            let mut data = Vec::new();
            quantize_rows(quant, &values, cols, &mut data).unwrap();
            let stride = quant.row_bytes(cols);
            let w = QuantMatrix { data: &data, quant, rows, cols, skip: 0, stride };
            let (mut got, mut want) = (vec![0.0; m * rows], vec![0.0; m * rows]);
            linear(&x, m, w, None, &mut got);
            super::super::linear(&x, m, w, None, &mut want);
            for i in 0..m * rows {
                let (x, row) = (&x[i / rows * cols..][..cols], i % rows);
                let mut wide = vec![0.0; cols];
                dequantize_row(quant, &data[row * stride..][..stride], &mut wide);
                let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
                let bound = wide.iter().map(|w| w.abs()).sum::<f32>() * largest / 127.0 * 0.5001;
                prop_assert!((got[i] - want[i]).abs() <= bound, "{:?} {} {}", quant, got[i], want[i]);
            }
        }
    }
}

/// A matrix of any bytes, whose scales may be NaN, infinite or huge, gives the same in every kind.
#[test]
fn any_bytes_give_the_same_in_every_kind() {
    for quant in QuantType::ALL {
        let (rows, cols) = (16, 2 * quant.block_len());
        let stride = quant.row_bytes(cols);
        for seed in 0..8 {
            let bytes = random(rows * stride, seed);
            let data: Vec<u8> = bytes.iter().map(|v| (v.to_bits() >> 8) as u8).collect();
            let w = QuantMatrix { data: &data, quant, rows, cols, skip: 0, stride };
            let x = random(3 * cols, seed);
            let mut want = vec![0.0; 3 * rows];
            linear_of_kind(Kind::Scalar, &x, 3, w, None, &mut want);
            for kind in kinds() {
                let mut got = vec![0.0; 3 * rows];
                linear_of_kind(kind, &x, 3, w, None, &mut got);
                let same =
                    |a: &f32, b: &f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                assert!(got.iter().zip(&want).all(|(a, b)| same(a, b)), "{quant:?} {kind:?}");
            }
        }
    }
}
