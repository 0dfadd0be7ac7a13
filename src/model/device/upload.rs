//! Moving weights from where they are mapped to the device.

use std::cell::Cell;

use half::{bf16, f16};

use crate::Result;
use crate::device::linear::Matrix;
use crate::device::{Array, Device, Dtype, Element, ops};
use crate::model::layers::Norm;
use crate::model::weights::{Stored, Weight};

/// Moves weights, and counts them.
pub struct Uploader<'a> {
    /// The device.
    pub device: &'a Device,
    /// What float matrices become.
    pub dtype: Dtype,
    bytes: Cell<u64>,
}

impl<'a> Uploader<'a> {
    /// To `device`, floats as `dtype`.
    pub fn new(device: &'a Device, dtype: Dtype) -> Self {
        Self { device, dtype, bytes: Cell::new(0) }
    }

    /// Bytes of weights that have gone to the device so far, as they are stored on the host.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// The rows of these matrices, one below the other, in as few matrices as their types
    /// allow.
    ///
    /// # Errors
    /// No memory; a fault of the driver.
    pub fn stacked(&self, weights: &[&Weight]) -> Result<Vec<Matrix>> {
        let alike = |a: &&Weight, b: &&Weight| is_alike(a, b);
        weights.chunk_by(alike).map(|alike| self.stack(alike)).collect()
    }

    /// One matrix.
    ///
    /// # Errors
    /// See [`Uploader::stacked`].
    pub fn matrix(&self, weight: &Weight) -> Result<Matrix> {
        self.stack(&[weight])
    }

    /// One matrix that keeps the type it has.
    ///
    /// # Errors
    /// See [`Uploader::stacked`].
    pub fn matrix_as_stored(&self, weight: &Weight) -> Result<Matrix> {
        let dtype = match weight.stored() {
            Stored::F32(_) => Dtype::F32,
            Stored::Bf16(_) => Dtype::Bf16,
            Stored::F16(_) => Dtype::F16,
            Stored::Quant(_) => self.dtype,
        };
        let uploader = Uploader { device: self.device, dtype, bytes: self.bytes.clone() };
        let matrix = uploader.matrix(weight);
        self.bytes.set(uploader.bytes());
        matrix
    }

    /// A vector in f32.
    ///
    /// # Errors
    /// See [`Uploader::stacked`].
    pub fn vector(&self, values: &[f32]) -> Result<Array> {
        self.device.upload(values)
    }

    /// A norm.
    ///
    /// # Errors
    /// See [`Uploader::stacked`].
    pub fn norm(&self, norm: &Norm) -> Result<ops::Norm> {
        Ok(ops::Norm {
            weight: self.vector(&norm.weight)?,
            bias: norm.bias.as_deref().map(|bias| self.vector(bias)).transpose()?,
            eps: norm.eps,
        })
    }

    fn stack(&self, weights: &[&Weight]) -> Result<Matrix> {
        let rows = weights.iter().map(|weight| weight.rows()).sum();
        let cols = weights[0].cols();
        let counted: u64 = weights.iter().map(|weight| weight.bytes()).sum();
        self.bytes.set(self.bytes.get() + counted);
        if let Stored::Quant(first) = weights[0].stored() {
            let blocks = self.device.uninitialised(Dtype::U8, rows * first.stride)?;
            let mut at = 0;
            for weight in weights {
                if let Stored::Quant(part) = weight.stored() {
                    self.device.write(&blocks.slice(at..at + part.data.len()), part.data)?;
                    at += weight.rows() * part.stride;
                }
            }
            return Ok(Matrix::quantized(
                first.quant,
                rows,
                cols,
                first.skip,
                first.stride,
                blocks,
            ));
        }
        let values = self.device.uninitialised(self.dtype, rows * cols)?;
        let mut at = 0;
        for weight in weights {
            let len = weight.rows() * cols;
            self.floats(weight, &values.slice(at..at + len))?;
            at += len;
        }
        Ok(Matrix::dense(rows, cols, values))
    }

    fn floats(&self, weight: &Weight, to: &Array) -> Result<()> {
        match weight.stored() {
            Stored::F32(values) => self.converted::<f32>(values, to),
            Stored::Bf16(values) => self.converted::<bf16>(values, to),
            Stored::F16(values) => self.converted::<f16>(values, to),
            Stored::Quant(_) => unreachable!("floats and blocks are not alike"),
        }
    }

    /// Straight into place, or rounded on the device.
    fn converted<E: Element>(&self, values: &[E], to: &Array) -> Result<()> {
        if E::DTYPE == to.dtype() {
            return self.device.write(to, values);
        }
        let stored = self.device.upload(values)?;
        ops::convert(self.device, &stored, to)
    }
}

fn is_alike(a: &Weight, b: &Weight) -> bool {
    let columns = a.cols() == b.cols();
    columns
        && match (a.stored(), b.stored()) {
            (Stored::Quant(a), Stored::Quant(b)) => {
                (a.quant, a.skip, a.stride) == (b.quant, b.skip, b.stride)
            }
            (Stored::Quant(_), _) | (_, Stored::Quant(_)) => false,
            _ => true,
        }
}
