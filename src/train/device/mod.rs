//! Training on a device: the counterpart of [`super::model`], with the weights, a micro-batch's
//! activations and its gradients in the device's memory.
//!
//! Parameters, their moments and the optimiser stay on the host, since adapters are small: their
//! values go to the device after each change, and their gradients, summed there over the
//! micro-batches of a step, come back once a step. The residual stream and its gradient are
//! f32; operands of products, and what layers keep, are of the device's type.
//!
//! The gradients are those of the sum of the tokens' losses until they reach the trained
//! tensors, where the weight of a micro-batch comes in: in f16 a mean's would be too small.

mod layer;
mod linear;
mod loss;
#[cfg(all(test, feature = "emulator"))]
mod tests;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use layer::{Kept, Layer};
use linear::Linear;
use loss::LossHead;

use super::batch::MicroBatch;
use super::layer::Layer as HostLayer;
use super::loss::LossHead as HostHead;
use super::model::Recompute;
use super::parameters::{ParameterId, Parameters};
use crate::device::linear::Matrix;
use crate::device::ops::{self, Norm};
use crate::device::train::{self as kernel, NormOf, RotationTable, Rows, Segments, TokenRows};
use crate::device::{Array, Device, DeviceComm, Dtype, Gemm};
use crate::model::layers::{Norm as HostNorm, VocabParallel};
use crate::model::step::{Rotations, Step};
use crate::model::weights::{Stored, Weight};
use crate::{Error, Result};

/// The device that a rank trains on.
#[derive(Clone)]
pub struct Place {
    /// The device.
    pub device: Device,
    /// What products are taken of: f32, f16 or bf16.
    pub dtype: Dtype,
    /// The tensor-parallel group's sums.
    pub comm: Arc<dyn DeviceComm>,
}

impl Place {
    fn values(&self, len: usize) -> Result<Array> {
        self.device.uninitialised(self.dtype, len)
    }

    fn floats(&self, len: usize) -> Result<Array> {
        self.device.uninitialised(Dtype::F32, len)
    }

    /// f32 values as operands of products.
    fn narrowed(&self, x: &Array) -> Result<Array> {
        if self.dtype == Dtype::F32 {
            return Ok(x.clone());
        }
        let out = self.values(x.len())?;
        ops::convert(&self.device, x, &out)?;
        Ok(out)
    }

    /// Over the ranks of the group, in place.
    fn sum(&self, x: &Array) -> Result<()> {
        match self.comm.size() {
            1 => Ok(()),
            _ => self.comm.all_reduce_sum(&self.device, x),
        }
    }

    fn norm(&self, norm: &HostNorm) -> Result<Norm> {
        let (weight, bias, eps) = norm.parts();
        let bias = bias.map(|bias| self.device.upload(bias)).transpose()?;
        Ok(Norm { weight: self.device.upload(weight)?, bias, eps })
    }

    /// A matrix on the device: floats in its type, quantized ones as they are.
    fn matrix(&self, weight: &Weight) -> Result<Matrix> {
        let (rows, cols, device) = (weight.rows(), weight.cols(), &self.device);
        let values = match weight.stored() {
            Stored::F32(values) => device.upload(values),
            Stored::Bf16(values) => device.upload(values),
            Stored::F16(values) => device.upload(values),
            Stored::Quant { quant, skip, stride, blocks } => {
                let blocks = device.upload(blocks)?;
                return Ok(Matrix::quantized(quant, rows, cols, skip, stride, blocks));
            }
        }?;
        if values.dtype() == self.dtype {
            return Ok(Matrix::dense(rows, cols, values));
        }
        let converted = self.values(values.len())?;
        ops::convert(device, &values, &converted)?;
        Ok(Matrix::dense(rows, cols, converted))
    }
}

/// The trained tensors on the device, one after another as in [`Parameters`].
struct Trained {
    wide: Array,
    /// As operands of products.
    values: Array,
    /// f32, summed over micro-batches.
    gradients: Array,
}

impl Trained {
    fn new(place: &Place, len: usize) -> Result<Self> {
        let wide = place.floats(len)?;
        let values = match place.dtype {
            Dtype::F32 => wide.clone(),
            _ => place.values(len)?,
        };
        Ok(Self { wide, values, gradients: place.device.array(Dtype::F32, len)? })
    }

    fn refresh(&self, device: &Device, parameters: &Parameters) -> Result<()> {
        device.write(&self.wide, &parameters.values)?;
        match self.values.dtype() {
            Dtype::F32 => Ok(()),
            _ => ops::convert(device, &self.wide, &self.values),
        }
    }

    fn values(&self, span: &Range<usize>) -> Array {
        self.values.slice(span.clone())
    }

    fn gradient(&self, span: &Range<usize>) -> Array {
        self.gradients.slice(span.clone())
    }
}

/// A micro-batch as the layers see it.
struct Pass<'a> {
    place: &'a Place,
    trained: &'a Trained,
    rows: usize,
    segments: Segments,
    /// Of layers without a window, and with one.
    rotations: [Option<RotationTable>; 2],
    /// What dropout's draws for a row are keyed by; `None` where nothing is dropped.
    numbers: Option<Array>,
    /// What the gradients of the trained tensors are multiplied by.
    weight: f32,
}

impl Pass<'_> {
    fn device(&self) -> &Device {
        &self.place.device
    }

    /// Rows normed, as operands of products.
    fn normed(&self, x: &Array, norm: &Norm) -> Result<Array> {
        let out = self.place.values(x.len())?;
        ops::norm(self.device(), x, norm, &out)?;
        Ok(out)
    }

    /// Adds to `dx`, or writes there, the gradient of a norm's input `x`; all f32.
    fn norm_backward(
        &self,
        x: &Array,
        norm: &Norm,
        dy: &Array,
        dx: &Array,
        accumulate: bool,
    ) -> Result<()> {
        let width = norm.width();
        let (rows, dy) = (x.len() / width, Rows::new(dy, width));
        let x = Rows::new(x, width);
        kernel::norm_backward(self.device(), &x, of(norm), [rows, 1], &dy, dx, accumulate)
    }
}

fn of(norm: &Norm) -> NormOf<'_> {
    NormOf { weight: &norm.weight, bias: norm.bias.as_ref(), eps: norm.eps }
}

/// What a model on a device is made of besides its layers, from the host's.
pub(super) struct Ends<'a> {
    /// The embedding.
    pub embed_tokens: &'a VocabParallel,
    /// Its own values, where it is trained.
    pub trained_embedding: Option<ParameterId>,
    /// What its rows are multiplied by.
    pub embedding_scale: Option<f32>,
    /// The last norm.
    pub norm: &'a HostNorm,
    /// The way to the loss.
    pub head: &'a HostHead,
}

/// The layers of a model that is being loaded.
pub(super) struct Layers<'a> {
    place: &'a Place,
    layers: Vec<Layer>,
    flops_a_token: f64,
}

impl<'a> Layers<'a> {
    pub(super) fn new(place: &'a Place) -> Self {
        Self { place, layers: Vec::new(), flops_a_token: 0.0 }
    }

    /// Takes the next layer to the device.
    ///
    /// # Errors
    /// No memory on the device.
    pub(super) fn push(&mut self, layer: &HostLayer, parameters: &Parameters) -> Result<()> {
        self.layers.push(Layer::new(self.place, layer, parameters)?);
        Ok(())
    }
}

/// The model on a device, or a tensor-parallel rank's share of it.
pub(super) struct Model {
    place: Place,
    embed_tokens: Base,
    ids: Range<usize>,
    embedding_scale: f32,
    layers: Vec<Layer>,
    norm: Norm,
    head: LossHead,
    rotations: Rotations,
    first_trained: usize,
    recompute: Recompute,
    trained: Trained,
}

/// A matrix: frozen, or trained as a whole.
enum Base {
    Frozen(Matrix),
    Trained { span: Range<usize>, rows: usize, cols: usize },
}

impl Base {
    fn matrix(&self, trained: &Trained) -> Matrix {
        match self {
            Self::Frozen(matrix) => matrix.clone(),
            Self::Trained { span, rows, cols } => Matrix::dense(*rows, *cols, trained.values(span)),
        }
    }
}

impl Model {
    /// Puts the layers together with the rest of the model.
    ///
    /// # Errors
    /// No memory on the device; heads that its kernels do not take.
    pub(super) fn new(
        layers: Layers,
        ends: &Ends,
        rotations: Rotations,
        parameters: &Parameters,
        first_trained: usize,
        recompute: Recompute,
    ) -> Result<Self> {
        let Layers { place, layers, .. } = layers;
        if let Some(layer) = layers.first() {
            kernel::check_attention(&place.device, place.dtype, layer.head_dim())?;
        }
        let (weight, ids) = ends.embed_tokens.shared();
        let cols = weight.cols();
        let mut head = LossHead::new(place, ends.head, parameters)?;
        let embed_tokens = match ends.trained_embedding {
            Some(id) => {
                let span = parameters.of(id).span.clone();
                Base::Trained { span, rows: ids.len(), cols }
            }
            None if ends.head.linear.is_over(&weight) => Base::Frozen(head.linear.frozen_matrix()?),
            None => Base::Frozen(place.matrix(&weight)?),
        };
        head.linear.check()?;
        Ok(Self {
            place: place.clone(),
            embed_tokens,
            ids,
            embedding_scale: ends.embedding_scale.unwrap_or(1.0),
            layers,
            norm: place.norm(ends.norm)?,
            head,
            rotations,
            first_trained,
            recompute,
            trained: Trained::new(place, parameters.values.len())?,
        })
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(Layer::linears_mut).chain([&mut self.head.linear])
    }
}
