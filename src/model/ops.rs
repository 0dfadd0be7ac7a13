//! The operations that model code is written in, on candle tensors.
//!
//! Tensors are f32 and contiguous, `[rows, features]`, with the rows of all
//! sequences of a step one after another. On the CPU they go to farm's own
//! kernels; a device adds its branch here and no model file changes.

use candle_core::{CpuStorage, Device, Storage, Tensor};

use super::weights::Weight;
use crate::kernels::ops::{self as kernel, Activation};
use crate::{Error, Result};

/// Runs `f` over the values of a contiguous f32 tensor on the CPU.
pub fn with_values<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => Err(Error::fault("an activation is not a contiguous f32 tensor on the CPU")),
    }
}

/// A `[rows, cols]` tensor of these values.
pub fn from_values(values: Vec<f32>, cols: usize) -> Result<Tensor> {
    let rows = values.len() / cols.max(1);
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
}

/// `x · wᵀ + bias`: `[m, in] → m·out` values, row-major.
pub fn linear(x: &Tensor, w: &Weight, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    let m = x.dim(0)?;
    let mut out = vec![0.0; m * w.rows()];
    with_values(x, |x| w.multiply(x, m, bias, &mut out))?;
    Ok(out)
}

/// RMS norm of each row.
pub fn rms_norm(x: &Tensor, weight: &[f32], eps: f32) -> Result<Tensor> {
    let mut out = vec![0.0; x.elem_count()];
    with_values(x, |x| kernel::rms_norm(x, weight, eps, &mut out))?;
    from_values(out, weight.len())
}

/// Layer norm of each row.
pub fn layer_norm(x: &Tensor, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Result<Tensor> {
    let mut out = vec![0.0; x.elem_count()];
    with_values(x, |x| kernel::layer_norm(x, weight, bias, eps, &mut out))?;
    from_values(out, weight.len())
}

/// `x + y`, into `y`'s values.
pub fn residual(x: &Tensor, mut y: Vec<f32>) -> Result<Tensor> {
    let cols = x.dim(1)?;
    with_values(x, |x| kernel::add_assign(&mut y, x))?;
    from_values(y, cols)
}

/// `act(gate) * up`, `cols` features a row.
pub fn gated(act: Activation, gate: &[f32], up: &[f32], cols: usize) -> Result<Tensor> {
    let mut out = vec![0.0; gate.len()];
    kernel::gated(act, gate, up, &mut out);
    from_values(out, cols)
}

/// The rows `rows` of `x`, in that order.
pub fn select_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let cols = x.dim(1)?;
    let mut out = Vec::with_capacity(rows.len() * cols);
    with_values(x, |x| {
        rows.iter().for_each(|r| out.extend_from_slice(&x[r * cols..(r + 1) * cols]));
    })?;
    from_values(out, cols)
}
