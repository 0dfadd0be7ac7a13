//! A frozen linear layer with a trained low-rank product beside it, on a device: see
//! [`crate::train::linear`], whose formulas and splits these are.

use std::ops::Range;
use std::sync::Arc;

use super::{Pass, Place, Trained};
use crate::Result;
use crate::device::linear::{Matrix, dequantize, linear, scratch_bytes};
use crate::device::train::{self as kernel, Draws, Rows};
use crate::device::{Array, Dtype, Gemm};
use crate::model::weights::Weight;
use crate::train::linear::{self as host, Split, adapted_row_squares};
use crate::train::parameters::{ParameterId, Parameters};

/// Bytes of dequantized weights that a gradient is multiplied by at a time.
const SCRATCH_BYTES: usize = 64 << 20;

/// The layer, or this rank's part of it, without its bias.
pub struct Linear {
    base: Base,
    split: Split,
    lora: Option<Lora>,
}

/// A matrix: frozen, or trained as a whole.
pub enum Base {
    /// On the device.
    Frozen(Matrix),
    /// Among the trained tensors.
    Trained {
        /// Where.
        span: Range<usize>,
        /// Output and input features.
        shape: [usize; 2],
    },
}

impl Base {
    pub(super) fn trained(parameters: &Parameters, id: ParameterId, shape: [usize; 2]) -> Self {
        Self::Trained { span: parameters.of(id).span.clone(), shape }
    }

    pub(super) fn is_trained(&self) -> bool {
        matches!(self, Self::Trained { .. })
    }

    pub(super) fn matrix(&self, trained: &Trained) -> Matrix {
        match self {
            Self::Frozen(matrix) => matrix.clone(),
            Self::Trained { span, shape: [rows, cols] } => {
                Matrix::dense(*rows, *cols, trained.values(span))
            }
        }
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Frozen(matrix) => [matrix.rows(), matrix.cols()],
            Self::Trained { shape, .. } => *shape,
        }
    }
}

/// The trained product.
struct Lora {
    a: Range<usize>,
    b: Range<usize>,
    rank: usize,
    scale: f32,
    draws: Option<Draws>,
    dora: Option<Dora>,
}

struct Dora {
    magnitude: Range<usize>,
    weight_squares: Vec<f32>,
    /// 1 / ‖W + s · B A‖, f32.
    inverse_norms: Array,
    /// m / ‖W + s · B A‖, f32.
    gains: Array,
}

/// What a forward pass keeps for the backward one, besides the input.
#[derive(Default)]
pub struct Kept {
    /// A drop(x), `[m, r]`.
    h: Option<Array>,
    /// With DoRA: the output without gains and bias, `[m, out]`.
    product: Option<Array>,
}

impl Linear {
    /// The host's layer.
    ///
    /// # Errors
    /// No memory on the device.
    pub fn new(place: &Place, from: &host::Linear, parameters: &Parameters) -> Result<Self> {
        let base = match &from.matrix {
            host::Base::Frozen(weight) => Base::Frozen(place.matrix(weight)?),
            host::Base::Trained { id, outputs, inputs } => {
                Base::trained(parameters, *id, [*outputs, *inputs])
            }
        };
        let lora = from.lora.as_ref().map(|lora| Lora::new(place, lora, parameters));
        Ok(Self { base, split: from.split, lora: lora.transpose()? })
    }

    /// The matrix on the device, if the host's layer has it of `weight`.
    pub fn base_over(&self, from: &host::Linear, weight: &Arc<Weight>) -> Option<Matrix> {
        match (&self.base, &from.matrix) {
            (Base::Frozen(matrix), host::Base::Frozen(of)) if Arc::ptr_eq(of, weight) => {
                Some(matrix.clone())
            }
            _ => None,
        }
    }

    /// Brings what depends on the trained values alone up to date. Collective for a row split
    /// with DoRA.
    ///
    /// # Errors
    /// A fault of the device.
    pub(super) fn refresh(
        &mut self,
        place: &Place,
        trained: &Trained,
        parameters: &Parameters,
    ) -> Result<()> {
        let [outputs, _] = self.base.shape();
        let Some(lora) = &self.lora else { return Ok(()) };
        let Some(dora) = &lora.dora else { return Ok(()) };
        let by_row = place.floats(lora.rank * outputs)?;
        let matrix = self.base.matrix(trained);
        multiply(place, &trained.values(&lora.a), &matrix, &Rows::new(&by_row, outputs))?;
        let by_row = place.device.read::<f32>(&by_row)?;
        let host = |span: &Range<usize>| &parameters.values[span.clone()];
        let (a, b) = (host(&lora.a), host(&lora.b));
        let mut squares = adapted_row_squares(&dora.weight_squares, [a, b], lora.scale, &by_row);
        if self.split == Split::Row && place.comm.size() > 1 {
            let all = place.device.upload(&squares)?;
            place.sum(&all)?;
            squares = place.device.read(&all)?;
        }
        let inverse: Vec<f32> = squares.iter().map(|s| 1.0 / s.max(0.0).sqrt()).collect();
        let magnitudes = host(&dora.magnitude);
        let gains: Vec<f32> = magnitudes.iter().zip(&inverse).map(|(m, i)| m * i).collect();
        place.device.write(&dora.inverse_norms, &inverse)?;
        place.device.write(&dora.gains, &gains)
    }

    /// Output features on this rank.
    pub fn outputs(&self) -> usize {
        self.base.shape()[0]
    }

    /// Writes the outputs of `x` `[m, in]` to the columns of `y`, without bias and before
    /// the sum over the ranks. `numbers` are what dropout's draws are keyed by.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn forward(
        &self,
        pass: &Pass,
        x: &Array,
        numbers: Option<&Array>,
        y: &Rows,
    ) -> Result<Kept> {
        let [outputs, inputs] = self.base.shape();
        let (place, m) = (pass.place, x.len() / inputs);
        let matrix = self.base.matrix(pass.trained);
        let Some(lora) = &self.lora else {
            multiply(place, x, &matrix, y)?;
            return Ok(Kept::default());
        };
        let h = lora.inner(pass, x, inputs, numbers)?;
        let Some(dora) = &lora.dora else {
            multiply(place, x, &matrix, y)?;
            lora.add_product(pass, &h, m, outputs, y)?;
            return Ok(Kept { h: Some(h), product: None });
        };
        let product = place.device.uninitialised(y.values.dtype(), m * outputs)?;
        let rows = Rows::new(&product, outputs);
        multiply(place, x, &matrix, &rows)?;
        lora.add_product(pass, &h, m, outputs, &rows)?;
        kernel::scale_columns(&place.device, &rows, &dora.gains, m, y)?;
        let product = match product.dtype() == place.dtype {
            true => product,
            false => place.narrowed(&product)?,
        };
        Ok(Kept { h: Some(h), product: Some(product) })
    }

    /// What the backward pass needs, without the output where that costs more.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn keep(&self, pass: &Pass, x: &Array, numbers: Option<&Array>) -> Result<Kept> {
        let [outputs, inputs] = self.base.shape();
        match &self.lora {
            None => Ok(Kept::default()),
            Some(Lora { dora: Some(_), .. }) => {
                let y = pass.place.values(x.len() / inputs * outputs)?;
                self.forward(pass, x, numbers, &Rows::new(&y, outputs))
            }
            Some(lora) => {
                Ok(Kept { h: Some(lora.inner(pass, x, inputs, numbers)?), product: None })
            }
        }
    }

    /// Adds to the gradients of the trained tensors what comes from that of the output, the
    /// columns `dy`; writes this layer's part of the gradient of its input, or adds it.
    ///
    /// # Errors
    /// No memory, or a fault of the device.
    pub(super) fn backward(
        &self,
        pass: &Pass,
        x: &Array,
        kept: &Kept,
        dy: &Rows,
        numbers: Option<&Array>,
        dx: Option<InputGradient>,
    ) -> Result<()> {
        let [outputs, inputs] = self.base.shape();
        let (place, m) = (pass.place, x.len() / inputs);
        if let Base::Trained { span, .. } = &self.base {
            let x = Rows::new(x, inputs);
            let gradient = pass.trained.gradient(span);
            add_gradient(place, dy, &x, [outputs, m, inputs], pass.weight, &gradient)?;
        }
        let matrix = self.base.matrix(pass.trained);
        let (Some(lora), Some(h)) = (&self.lora, &kept.h) else {
            return dx.map_or(Ok(()), |dx| multiply_back(place, dy, &matrix, m, &dx));
        };
        let gained = lora.through_gains(pass, kept, dy, m)?;
        let dy = gained.as_ref().unwrap_or(dy);
        let dh = lora.backward(pass, x, h, dy, [m, outputs, inputs], numbers)?;
        let Some(dx) = dx else { return Ok(()) };
        multiply_back(place, dy, &matrix, m, &dx)?;
        lora.input_gradient(pass, &dh, m, inputs, numbers, dx.values)
    }
}

/// Where the gradient of a layer's input goes, `[m, in]`.
#[derive(Clone, Copy)]
pub struct InputGradient<'a> {
    /// f32, or of the device's type.
    pub values: &'a Array,
    /// It is added there.
    pub is_added: bool,
}

impl Lora {
    fn new(place: &Place, from: &host::Lora, parameters: &Parameters) -> Result<Self> {
        let span = |id| parameters.of(id).span.clone();
        let dora = from.dora.as_ref().map(|dora| {
            let outputs = dora.weight_squares.len();
            Ok::<_, crate::Error>(Dora {
                magnitude: span(dora.magnitude),
                weight_squares: dora.weight_squares.clone(),
                inverse_norms: place.floats(outputs)?,
                gains: place.floats(outputs)?,
            })
        });
        Ok(Self {
            a: span(from.a),
            b: span(from.b),
            rank: from.rank,
            scale: from.scale,
            draws: from.dropout.draws(),
            dora: dora.transpose()?,
        })
    }

    /// drop(x), or x.
    fn dropped(&self, pass: &Pass, x: &Array, numbers: Option<&Array>) -> Result<Array> {
        let (Some(draws), Some(numbers)) = (&self.draws, numbers) else { return Ok(x.clone()) };
        let out = pass.place.values(x.len())?;
        kernel::dropout(pass.device(), draws, x, numbers, &out, false)?;
        Ok(out)
    }

    /// A drop(x), `[m, r]`.
    fn inner(
        &self,
        pass: &Pass,
        x: &Array,
        inputs: usize,
        numbers: Option<&Array>,
    ) -> Result<Array> {
        let (m, r) = (x.len() / inputs, self.rank);
        let x = self.dropped(pass, x, numbers)?;
        let h = pass.place.values(m * r)?;
        let a = pass.trained.values(&self.a);
        pass.device().gemm(&Gemm::linear(&x, &a, &h, [m, r, inputs]))?;
        Ok(h)
    }

    /// `y += s · h Bᵀ`
    fn add_product(
        &self,
        pass: &Pass,
        h: &Array,
        m: usize,
        outputs: usize,
        y: &Rows,
    ) -> Result<()> {
        let b = pass.trained.values(&self.b);
        let product = Gemm::linear(h, &b, &y.values, [m, outputs, self.rank]);
        pass.device().gemm(&Gemm { c_stride: y.stride, alpha: self.scale, beta: 1.0, ..product })
    }

    /// With DoRA: adds the gradient of the magnitudes; that of the product.
    fn through_gains(&self, pass: &Pass, kept: &Kept, dy: &Rows, m: usize) -> Result<Option<Rows>> {
        let (Some(dora), Some(product)) = (&self.dora, &kept.product) else { return Ok(None) };
        let outputs = dora.gains.len();
        let (device, gradient) = (pass.device(), pass.trained.gradient(&dora.magnitude));
        let (product, norms) = (Rows::new(product, outputs), &dora.inverse_norms);
        kernel::column_products(device, &product, dy, norms, m, pass.weight, &gradient)?;
        let gained = Rows::new(&pass.place.values(m * outputs)?, outputs);
        kernel::scale_columns(device, dy, &dora.gains, m, &gained)?;
        Ok(Some(gained))
    }

    /// Adds the gradients of A and B; returns that of h.
    fn backward(
        &self,
        pass: &Pass,
        x: &Array,
        h: &Array,
        dy: &Rows,
        [m, outputs, inputs]: [usize; 3],
        numbers: Option<&Array>,
    ) -> Result<Array> {
        let (place, r) = (pass.place, self.rank);
        let dh = place.values(m * r)?;
        pass.device().gemm(&Gemm {
            a: &dy.values,
            a_stride: dy.stride,
            transpose_a: false,
            b: &pass.trained.values(&self.b),
            b_stride: r,
            transpose_b: false,
            c: &dh,
            c_stride: r,
            m,
            n: r,
            k: outputs,
            alpha: self.scale,
            beta: 0.0,
        })?;
        let (of_a, of_b) = (pass.trained.gradient(&self.a), pass.trained.gradient(&self.b));
        let factor = self.scale * pass.weight;
        add_gradient(place, dy, &Rows::new(h, r), [outputs, m, r], factor, &of_b)?;
        let x = self.dropped(pass, x, numbers)?;
        let (dh_rows, x) = (Rows::new(&dh, r), Rows::new(&x, inputs));
        add_gradient(place, &dh_rows, &x, [r, m, inputs], pass.weight, &of_a)?;
        Ok(dh)
    }

    /// `dx += drop(Aᵀ dh)`
    fn input_gradient(
        &self,
        pass: &Pass,
        dh: &Array,
        m: usize,
        inputs: usize,
        numbers: Option<&Array>,
        dx: &Array,
    ) -> Result<()> {
        let a = pass.trained.values(&self.a);
        let product = Gemm::linear(dh, &a, dx, [m, inputs, self.rank]);
        let product = Gemm { b_stride: inputs, transpose_b: false, ..product };
        let (Some(draws), Some(numbers)) = (&self.draws, numbers) else {
            return pass.device().gemm(&Gemm { beta: 1.0, ..product });
        };
        let own = pass.device().uninitialised(dx.dtype(), dx.len())?;
        pass.device().gemm(&Gemm { c: &own, ..product })?;
        kernel::dropout(pass.device(), draws, &own, numbers, dx, true)
    }
}

/// `y = x · matrixᵀ`
fn multiply(place: &Place, x: &Array, matrix: &Matrix, y: &Rows) -> Result<()> {
    let m = x.len() / matrix.cols();
    let scratch = place.device.uninitialised(Dtype::U8, scratch_bytes(matrix, place.dtype, m))?;
    linear(&place.device, x, matrix, &y.values, y.stride, 0.0, &scratch)
}

/// `dx (+)= dy · matrix`
fn multiply_back(
    place: &Place,
    dy: &Rows,
    matrix: &Matrix,
    m: usize,
    dx: &InputGradient,
) -> Result<()> {
    let cols = matrix.cols();
    let product = |rows: Range<usize>, values: &Array, stride: usize| {
        place.device.gemm(&Gemm {
            a: &dy.from_column(rows.start).values,
            a_stride: dy.stride,
            transpose_a: false,
            b: values,
            b_stride: stride,
            transpose_b: false,
            c: dx.values,
            c_stride: cols,
            m,
            n: cols,
            k: rows.len(),
            alpha: 1.0,
            beta: if dx.is_added || rows.start > 0 { 1.0 } else { 0.0 },
        })
    };
    if let Some(values) = matrix.dense_values() {
        return product(0..matrix.rows(), values, cols);
    }
    // Rows begin at addresses that the device's products like.
    let stride = cols.next_multiple_of(8);
    let step = (SCRATCH_BYTES / (stride * place.dtype.bytes())).clamp(1, matrix.rows().max(1));
    let scratch = place.values(step * stride)?;
    for first in (0..matrix.rows()).step_by(step) {
        let rows = first..(first + step).min(matrix.rows());
        dequantize(&place.device, matrix, rows.clone(), &scratch, stride)?;
        product(rows, &scratch, stride)?;
    }
    Ok(())
}

/// `gradient += weight · dyᵀ · x` of matrices `[k, m]` and `[k, n]`.
fn add_gradient(
    place: &Place,
    dy: &Rows,
    x: &Rows,
    [m, k, n]: [usize; 3],
    weight: f32,
    gradient: &Array,
) -> Result<()> {
    place.device.gemm(&Gemm {
        a: &dy.values,
        a_stride: dy.stride,
        transpose_a: true,
        b: &x.values,
        b_stride: x.stride,
        transpose_b: false,
        c: gradient,
        c_stride: n,
        m,
        n,
        k,
        alpha: weight,
        beta: 1.0,
    })
}
