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

pub(super) use layer::Layer;
use linear::Base;
use loss::LossHead;
pub(super) use loss::rows_at_once;

use super::batch::MicroBatch;
use super::model::{Frame, Recompute};
use super::parameters::Parameters;
use crate::Result;
use crate::device::linear::{Matrix, embed};
use crate::device::ops::{self, Norm};
use crate::device::train::{self as kernel, NormOf, RotationTable, Rows, Segments, TokenRows};
use crate::device::{Array, Device, DeviceComm, Dtype, Gemm};
use crate::model::device::upload::Uploader;
use crate::model::layers::Norm as HostNorm;
use crate::model::step::{Rotations, Step};
use crate::model::weights::Weight;

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
        Uploader::new(&self.device, self.dtype).norm(norm)
    }

    /// A matrix on the device: floats in its type, quantized ones as they are.
    fn matrix(&self, weight: &Weight) -> Result<Matrix> {
        Uploader::new(&self.device, self.dtype).matrix(weight)
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

/// The model on a device, or a tensor-parallel rank's share of it.
pub(super) struct Model {
    place: Place,
    embed_tokens: Base,
    /// The ids that this rank has the embedding of.
    ids: Range<usize>,
    embedding_scale: f32,
    layers: Vec<Layer>,
    norm: Norm,
    head: LossHead,
    rotations: Rotations,
    /// The first layer with something to train; nothing goes back beyond it.
    first_trained: usize,
    recompute: Recompute,
    trained: Trained,
}

impl Model {
    /// Puts the layers, which are on the device, together with the rest of the model.
    ///
    /// # Errors
    /// No memory on the device; heads that its kernels do not take.
    pub(super) fn new(
        place: &Place,
        layers: Vec<Layer>,
        frame: Frame,
        parameters: &Parameters,
    ) -> Result<Self> {
        if let Some(layer) = layers.first() {
            kernel::check_attention(&place.device, place.dtype, layer.head_dim())?;
        }
        let head = LossHead::new(place, &frame.head, parameters)?;
        let (weight, ids) = frame.embed_tokens.shared();
        let embed_tokens = match frame.trained_embedding {
            Some(id) => Base::trained(parameters, id, [ids.len(), weight.cols()]),
            None => match head.linear.base_over(&frame.head.linear, &weight) {
                Some(matrix) => Base::Frozen(matrix),
                None => Base::Frozen(place.matrix(&weight)?),
            },
        };
        Ok(Self {
            place: place.clone(),
            embed_tokens,
            ids,
            embedding_scale: frame.embedding_scale.unwrap_or(1.0),
            layers,
            norm: place.norm(&frame.norm)?,
            head,
            rotations: frame.rotations,
            first_trained: frame.first_trained,
            recompute: frame.recompute,
            trained: Trained::new(place, parameters.values.len())?,
        })
    }

    /// To call after every change of the trained tensors. Collective.
    ///
    /// # Errors
    /// A fault of the device.
    pub(super) fn refresh(&mut self, parameters: &Parameters) -> Result<()> {
        let Self { place, layers, head, trained, .. } = self;
        trained.refresh(&place.device, parameters)?;
        let mut linears = layers.iter_mut().flat_map(Layer::linears_mut).chain([&mut head.linear]);
        linears.try_for_each(|linear| linear.refresh(place, trained, parameters))
    }

    /// Adds the gradients since the last time to the host's.
    ///
    /// # Errors
    /// A fault of the device.
    pub(super) fn collect_gradients(&self, parameters: &mut Parameters) -> Result<()> {
        let gradients = self.place.device.read::<f32>(&self.trained.gradients)?;
        parameters.gradients.iter_mut().zip(gradients).for_each(|(sum, g)| *sum += g);
        self.place.device.fill_zero(&self.trained.gradients)
    }

    /// The loss of a micro-batch; with `weight` its gradients are added to the device's sums.
    /// Collective.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn run(&self, batch: &MicroBatch, weight: Option<f32>) -> Result<f64> {
        let (rows, targets) = batch.targets();
        let pass = self.pass(batch, weight)?;
        let token_ids: Vec<i32> = batch.token_ids.iter().map(|id| *id as i32).collect();
        let mut x = self.embedded(&token_ids)?;
        let mut kept = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let recomputed = weight.is_none() || self.recompute.includes(i);
            let (out, layer_kept) = layer.forward(&pass, x, recomputed)?;
            if weight.is_some() && i >= self.first_trained {
                kept.push(layer_kept);
            }
            x = out;
        }
        let width = self.norm.width();
        let selected = Selected::new(&pass, &x, &rows, width)?;
        drop(x);
        let normed = pass.normed(&selected.values, &self.norm)?;
        let numbers = weight.map(|_| rows.iter().map(|row| batch.numbers[*row]).collect());
        let loss = self.head.run(&pass, &normed, &targets, numbers)?;
        let Some(dx) = loss.dx.filter(|_| !kept.is_empty()) else { return Ok(loss.sum) };
        pass.norm_backward(&selected.values, &self.norm, &dx, &dx, false)?;
        drop(normed);
        let mut dx = selected.spread(&pass, &dx, batch.len() * width)?;
        for (i, layer) in self.layers.iter().enumerate().skip(self.first_trained).rev() {
            let Some(kept) = kept.pop() else { break };
            let is_wanted = i > self.first_trained || self.embed_tokens.is_trained();
            dx = layer.backward(&pass, kept, dx, is_wanted)?;
        }
        if let Base::Trained { span, .. } = &self.embed_tokens {
            let tokens = TokenRows::new(pass.device(), &batch.token_ids, self.ids.clone())?;
            let (factor, gradient) =
                (pass.weight * self.embedding_scale, self.trained.gradient(span));
            kernel::embedding_gradient(pass.device(), &tokens, &dx, factor, width, &gradient)?;
        }
        Ok(loss.sum)
    }

    fn pass(&self, batch: &MicroBatch, weight: Option<f32>) -> Result<Pass<'_>> {
        let device = &self.place.device;
        let as_step = batch.as_step();
        let step = Step::new(&as_step, &self.rotations);
        let table = |has_window| {
            let Some((rope, cos, sin)) = step.table(has_window) else { return Ok(None) };
            let [cos, sin] = [device.upload(cos)?, device.upload(sin)?];
            let (rotary_dim, interleaved) = (rope.rotary_dim(), rope.interleaved());
            Ok::<_, crate::Error>(Some(RotationTable { cos, sin, rotary_dim, interleaved }))
        };
        let head_dim = self.layers.first().map_or(1, Layer::head_dim);
        Ok(Pass {
            place: &self.place,
            trained: &self.trained,
            rows: batch.len(),
            segments: Segments::new(device, &batch.segments, self.place.dtype, head_dim)?,
            rotations: [table(false)?, table(true)?],
            numbers: weight.map(|_| device.upload(&batch.numbers)).transpose()?,
            weight: weight.unwrap_or(0.0),
        })
    }

    fn embedded(&self, token_ids: &[i32]) -> Result<Array> {
        let device = &self.place.device;
        let token_ids = device.upload(token_ids)?;
        let x = self.place.floats(token_ids.len() * self.norm.width())?;
        let matrix = self.embed_tokens.matrix(&self.trained);
        embed(device, &matrix, self.ids.start, &token_ids, self.embedding_scale, &x)?;
        self.place.sum(&x)?;
        Ok(x)
    }

    /// Floating-point operations a second that the device reaches in a large product, to
    /// compare training with; `None` of an emulator.
    ///
    /// # Errors
    /// A fault of the device.
    pub(super) fn peak_flops(&self) -> Result<Option<f64>> {
        const SIZE: usize = 4096;
        const ROUNDS: usize = 10;
        let device = &self.place.device;
        if device.properties().emulated {
            return Ok(None);
        }
        let operand = device.array(self.place.dtype, SIZE * SIZE)?;
        let out = self.place.values(SIZE * SIZE)?;
        let product = || device.gemm(&Gemm::linear(&operand, &operand, &out, [SIZE; 3]));
        product()?;
        device.synchronize()?;
        let start = Instant::now();
        (0..ROUNDS).try_for_each(|_| product())?;
        device.synchronize()?;
        let flops = (2 * ROUNDS * SIZE * SIZE * SIZE) as f64;
        Ok(Some(flops / start.elapsed().as_secs_f64()))
    }
}

/// The rows that something is predicted from.
struct Selected {
    rows: Array,
    /// f32.
    values: Array,
}

impl Selected {
    fn new(pass: &Pass, x: &Array, rows: &[usize], width: usize) -> Result<Self> {
        let rows: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let values = pass.place.floats(rows.len() * width)?;
        let rows = pass.device().upload(&rows)?;
        ops::gather_rows(pass.device(), x, &rows, &values)?;
        Ok(Self { rows, values })
    }

    /// Their gradients among those of all rows, which are zeros; `len` values.
    fn spread(&self, pass: &Pass, d: &Array, len: usize) -> Result<Array> {
        let all = pass.device().array(Dtype::F32, len)?;
        ops::scatter_add_rows(pass.device(), d, &self.rows, None, &all)?;
        Ok(all)
    }
}
