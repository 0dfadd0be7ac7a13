//! Against ggml's own bytes and values (tests/golden/quant), and against [`gemm`].

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::back::multiply_in_tier;
use super::linear::linear_in_tier;
use super::quantize::quantize_in_tier;
use super::*;
use crate::kernels::gemm::{self, Matrix};
use crate::kernels::tests::{random, tiers};

const GOLDEN: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/quant/ggml.safetensors"));

fn golden(name: &str) -> Vec<u8> {
    SafeTensors::deserialize(GOLDEN).unwrap().tensor(name).unwrap().data().to_vec()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_type_dequantizes_to_the_bits_of_ggml() {
    for quant in QuantType::ALL {
        let blocks = golden(&format!("{}.blocks", quant.name()));
        let want = floats(&golden(&format!("{}.values", quant.name())));
        for tier in tiers() {
            let mut got = vec![0.0; want.len()];
            dequantize_in_tier(tier, quant, &blocks, &mut got);
            assert_eq!(bits(&got), bits(&want), "{quant:?} {tier:?}");
        }
    }
}

#[test]
fn quantizes_to_the_bytes_of_ggml() {
    let x = floats(&golden("input"));
    for quant in [QuantType::Q8_0, QuantType::Q4_K, QuantType::Q6_K] {
        let want = golden(&format!("{}.blocks", quant.name()));
        for tier in tiers() {
            let mut got = vec![7];
            quantize_in_tier(tier, quant, &x, 256, &mut got).unwrap();
            let (bytes, got) = (quant.block_bytes(), &got[1..]);
            assert_eq!(got.len(), quant.row_bytes(x.len()));
            for (i, (got, want)) in got.chunks(bytes).zip(want.chunks(bytes)).enumerate() {
                assert_eq!(got, want, "{quant:?} {tier:?} block {i}");
            }
        }
    }
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    let mut out = vec![1];
    let x = vec![0.5; 512];
    let mut refused = |quant, x: &[f32], cols| {
        let message = quantize_rows(quant, x, cols, &mut out).unwrap_err().to_string();
        assert_eq!(out, [1]);
        message
    };
    assert!(refused(QuantType::Q5_K, &x, 256).contains("cannot quantize to q5_k: q8_0, q6_k"));
    assert!(refused(QuantType::Q4_K, &x, 128).contains("rows of 128 values to q4_k"));
    assert!(refused(QuantType::Q8_0, &[], 0).contains("rows of 0 values"));
    for bad in [f32::NAN, f32::INFINITY, 3e38] {
        let mut x = x.clone();
        x[300] = bad;
        for quant in [QuantType::Q8_0, QuantType::Q4_K, QuantType::Q6_K] {
            assert!(refused(quant, &x, 256).contains("not finite or too large"), "{quant:?} {bad}");
        }
    }
}

/// The last `count` golden blocks (random bytes, finite scales) in turn, odd bytes between rows.
pub(super) fn matrix_bytes(quant: QuantType, rows: usize, blocks: usize) -> (Vec<u8>, usize) {
    let golden = golden(&format!("{}.blocks", quant.name()));
    let random = &golden[golden.len() - quant.row_bytes(1024)..];
    let mut chunks = random.chunks_exact(quant.block_bytes()).cycle();
    let mut data = vec![0xee];
    for _ in 0..rows {
        for _ in 0..blocks {
            data.extend_from_slice(chunks.next().unwrap());
        }
        data.extend_from_slice(&[0xee; 5]);
        // Neighbouring rows must differ.
        chunks.next();
    }
    (data, blocks * quant.block_bytes() + 5)
}

/// Invariant 4, and that quantized weights are f32 weights: all tiers and batches give
/// the bits of gemm in the scalar tier over the dequantized rows.
#[test]
fn linear_has_the_bits_of_gemm_over_dequantized_rows() {
    for quant in QuantType::ALL {
        let len = quant.block_len();
        // Whole blocks; cuts at vectors, with and without a tail; a cut anywhere.
        for (skip, cols) in [(0, 2 * len), (0, 2 * len - 3), (16, len + 21), (5, len + 7), (16, 9)]
        {
            let rows = 11;
            let blocks = (skip + cols).div_ceil(len);
            let (data, stride) = matrix_bytes(quant, rows, blocks);
            let w = QuantMatrix { data: &data[1..], quant, rows, cols, skip, stride };
            let mut wide = vec![0.0; rows * cols];
            for (row, wide) in wide.chunks_exact_mut(cols).enumerate() {
                read_row(w, row, wide);
            }
            let bias = random(rows, 1);
            let x = random(32 * cols, 2);
            let mut want = vec![0.0; 32 * rows];
            let shape = Matrix { data: &wide, rows, cols, stride: cols };
            gemm::linear_in_tier(Tier::Scalar, &x, 32, shape, Some(&bias), &mut want);
            for tier in tiers() {
                for m in [1, 2, 3, 4, 5, 7, 10, 32] {
                    let mut got = vec![0.0; m * rows];
                    linear_in_tier(tier, &x[..m * cols], m, w, Some(&bias), &mut got);
                    assert_eq!(
                        bits(&got),
                        bits(&want[..m * rows]),
                        "{quant:?} {tier:?} m {m} skip {skip} cols {cols}"
                    );
                }
            }
        }
    }
}

/// Enough rows for several tasks, and activations beyond the buffer's near case.
#[test]
fn many_rows_and_columns_are_split_without_a_trace() {
    for quant in [QuantType::Q8_0, QuantType::Q6_K] {
        let (rows, cols) = (150, 2048);
        let (data, stride) = matrix_bytes(quant, rows, cols / quant.block_len());
        let w = QuantMatrix { data: &data[1..], quant, rows, cols, skip: 0, stride };
        let mut wide = vec![0.0; rows * cols];
        for (row, wide) in wide.chunks_exact_mut(cols).enumerate() {
            read_row(w, row, wide);
        }
        for m in [1, 50, 250] {
            let x = random(m * cols, 3);
            let (mut got, mut want) = (vec![0.0; m * rows], vec![0.0; m * rows]);
            gemm::linear(&x, m, Matrix { data: &wide, rows, cols, stride: cols }, None, &mut want);
            linear(&x, m, w, None, &mut got);
            assert_eq!(bits(&got), bits(&want), "{quant:?} m {m}");
        }
    }
}

/// Backward products take the same values: the bits of gemm's over the dequantized rows.
#[test]
fn multiply_has_the_bits_of_gemm_over_dequantized_rows() {
    for quant in QuantType::ALL {
        let len = quant.block_len();
        // Wider than a task at the last.
        for (skip, cols) in [(0, 2 * len), (5, len + 7), (16, 9), (len - 1, 1030)] {
            let (rows, m) = (11, 13);
            let (data, stride) = matrix_bytes(quant, rows, (skip + cols).div_ceil(len));
            let w = QuantMatrix { data: &data[1..], quant, rows, cols, skip, stride };
            let mut wide = vec![0.0; rows * cols];
            for (row, wide) in wide.chunks_exact_mut(cols).enumerate() {
                read_row(w, row, wide);
            }
            let (y, old) = (random(m * rows, 4), random(m * cols, 5));
            let shape = Matrix { data: &wide, rows, cols, stride: cols };
            for accumulate in [false, true] {
                let mut want = old.clone();
                gemm::multiply(&y, m, shape, accumulate, &mut want);
                for tier in tiers() {
                    let mut got = old.clone();
                    multiply_in_tier(tier, &y, m, w, accumulate, &mut got);
                    assert_eq!(bits(&got), bits(&want), "{quant:?} {tier:?} {skip} {cols}");
                }
            }
        }
    }
}

#[test]
fn a_row_is_read_from_its_cut() {
    let quant = QuantType::Q4_K;
    let (data, stride) = matrix_bytes(quant, 3, 2);
    let w = QuantMatrix { data: &data[1..], quant, rows: 3, cols: 300, skip: 77, stride };
    let mut whole = vec![0.0; 512];
    dequantize_row(quant, &data[1 + stride..][..quant.row_bytes(512)], &mut whole);
    let mut row = vec![0.0; 300];
    read_row(w, 1, &mut row);
    assert_eq!(bits(&row), bits(&whole[77..377]));
}

#[test]
#[should_panic(expected = "assertion")]
fn a_matrix_longer_than_its_data_is_a_bug() {
    let w = QuantMatrix {
        data: &[0; 100],
        quant: QuantType::Q8_0,
        rows: 3,
        cols: 32,
        skip: 0,
        stride: 34,
    };
    linear(&[0.0; 32], 1, w, None, &mut [0.0; 3]);
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Any bytes give the same values (or NaN) in every tier.
    #[test]
    fn any_bytes_dequantize(seed in any::<u64>(), count in 0usize..4) {
        for quant in QuantType::ALL {
            let n = count * quant.block_bytes();
            let bytes: Vec<u8> = random(n + 1, seed).iter().map(|v| v.to_bits() as u8).collect();
            let mut want = vec![0.0; count * quant.block_len()];
            dequantize_in_tier(Tier::Scalar, quant, &bytes[1..], &mut want);
            for tier in tiers() {
                let mut got = vec![0.0; want.len()];
                dequantize_in_tier(tier, quant, &bytes[1..], &mut got);
                prop_assert!(same(&got, &want), "{:?} {:?}", quant, tier);
            }
        }
    }

    /// A value comes back within a step of its block: the largest magnitude over the
    /// levels on a side, doubled for scales that are themselves rounded.
    #[test]
    fn values_come_back_within_a_step(seed in any::<u64>(), power in -3i32..12) {
        let x: Vec<f32> = random(512, seed).iter().map(|v| v * 2f32.powi(power)).collect();
        for (quant, step) in [
            (QuantType::Q8_0, 1.0 / 127.0),
            (QuantType::Q6_K, 2.0 / 31.0),
            (QuantType::Q4_K, 2.0 / 7.0),
        ] {
            let (mut blocks, mut back) = (Vec::new(), vec![0.0; x.len()]);
            quantize_rows(quant, &x, 256, &mut blocks).unwrap();
            dequantize_row(quant, &blocks, &mut back);
            for (x, back) in x.chunks(quant.block_len()).zip(back.chunks(quant.block_len())) {
                let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
                for (x, back) in x.iter().zip(back) {
                    prop_assert!((x - back).abs() <= largest * step, "{:?} {} {}", quant, x, back);
                }
            }
        }
    }
}
