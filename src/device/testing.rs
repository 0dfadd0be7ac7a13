//! What tests of device code share: devices of every thread order, and values.

use half::{bf16, f16};

use super::emulator::{self, ThreadOrder};
use super::{Array, Device, Dtype};

/// A device for each order of threads: a missing barrier gives other results on one of them.
pub fn devices() -> Vec<Device> {
    let orders = [ThreadOrder::Rising, ThreadOrder::Falling, ThreadOrder::Shuffled(7)];
    orders.map(emulator::open).to_vec()
}

/// The values, rounded to `dtype`.
pub fn upload_as(device: &Device, dtype: Dtype, values: &[f32]) -> Array {
    match dtype {
        Dtype::F16 => device.upload(&values.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>()),
        Dtype::Bf16 => {
            device.upload(&values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>())
        }
        _ => device.upload(values),
    }
    .unwrap()
}

/// The values of a float array, widened.
pub fn read_f32(device: &Device, array: &Array) -> Vec<f32> {
    match array.dtype() {
        Dtype::F16 => device.read::<f16>(array).unwrap().into_iter().map(f16::to_f32).collect(),
        Dtype::Bf16 => device.read::<bf16>(array).unwrap().into_iter().map(bf16::to_f32).collect(),
        _ => device.read(array).unwrap(),
    }
}

/// The values as rounding to `dtype` leaves them.
pub fn rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let round = |x: &f32| match dtype {
        Dtype::F16 => f16::from_f32(*x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(*x).to_f32(),
        _ => *x,
    };
    values.iter().map(round).collect()
}

/// Fails where values differ by more than `tolerance`, relative to 1 or the larger one.
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let scale = want.abs().max(1.0);
        assert!((got - want).abs() <= tolerance * scale, "value {i}: {got} for {want}");
    }
}

mod tests {
    use super::super::{Arg, Gemm};
    use super::*;
    use crate::kernels::tests::random;

    #[test]
    fn products_equal_the_formula_in_every_layout() {
        let device = Device::emulated();
        let (m, n, k) = (3, 5, 7);
        let (a, b, c) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
        let transposed = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
            (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
        };
        let want: Vec<f32> = (0..m * n)
            .map(|i| {
                let sum: f32 = (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum();
                0.5 * sum + c[i]
            })
            .collect();
        for (transpose_a, transpose_b) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let a = if transpose_a { transposed(&a, m, k) } else { a.clone() };
            let b = if transpose_b { transposed(&b, k, n) } else { b.clone() };
            let (a, b) = (device.upload(&a).unwrap(), device.upload(&b).unwrap());
            let out = device.upload(&c).unwrap();
            let gemm = Gemm {
                a: &a,
                a_stride: if transpose_a { m } else { k },
                transpose_a,
                b: &b,
                b_stride: if transpose_b { k } else { n },
                transpose_b,
                c: &out,
                c_stride: n,
                m,
                n,
                k,
                alpha: 0.5,
                beta: 1.0,
            };
            device.gemm(&gemm).unwrap();
            assert_close(&read_f32(&device, &out), &want, 1e-6);
        }
    }

    #[test]
    fn recorded_work_runs_when_it_is_replayed_and_takes_what_the_arrays_hold_then() {
        let device = Device::emulated();
        let (from, to) =
            (device.upload(&[1.0f32, 2.0]).unwrap(), device.array(Dtype::F32, 2).unwrap());
        let graph = device.capture(|| device.copy(&from, &to)).unwrap();
        assert_eq!(device.read::<f32>(&to).unwrap(), [0.0, 0.0]);
        device.write(&from, &[3.0f32]).unwrap();
        graph.replay().unwrap();
        assert_eq!(device.read::<f32>(&to).unwrap(), [3.0, 2.0]);
    }

    #[test]
    fn an_unknown_kernel_and_too_much_memory_are_errors() {
        let device = Device::emulated();
        let launch = device.launch("no_such_kernel", [1; 3], [32, 1, 1], 0, &[Arg::I32(0)]);
        assert!(launch.unwrap_err().message.contains("no_such_kernel"));
        let error = device.array(Dtype::U8, 3 << 30).unwrap_err();
        assert!(error.message.contains("MiB free"), "{error}");
    }
}
