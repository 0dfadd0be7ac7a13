//! A frozen linear layer with a trained low-rank product beside it, forward and backward.
//!
//! ```text
//! y  = W x + s · B A drop(x) + bias              dx = Wᵀ dy + drop(Aᵀ dh)    dh = s · Bᵀ dy
//! dA = dh drop(x)ᵀ        dB = s · dy hᵀ         h = A drop(x)
//! ```
//!
//! W has no gradient, so a token costs 2 FLOPs a weight forward and 2 backward. With DoRA
//! (Liu et al. 2024, section 4.3: the norm counts as a constant) the sum without bias is
//! multiplied by `g = m / ‖W + s · B A‖`, row by row, and `dm = Σ dy · (W x + s · B h) / ‖W + s · B A‖`.
//!
//! Split over a tensor-parallel group (Shoeybi et al. 2019): with some of the output features
//! (column), `dx` is a part of a sum over the ranks, which the caller takes once for all
//! layers that share the input, and `dA` too; with some of the input features (row), `y` is
//! summed here, and `dB` and `dm` are parts of a sum.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::dropout::Dropout;
use super::lora::LoraConfig;
use super::parameters::{Cut, ParameterId, Parameters, Part, Sharing, key_of};
use crate::comm::TensorComm;
use crate::kernels::gemm::{self, Matrix};
use crate::model::weights::Weight;

/// How a layer is split over the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// This rank has some output features.
    Column,
    /// This rank has some input features; outputs are summed.
    Row,
    /// Every rank has all of it.
    Whole,
}

/// The layer, or this rank's part of it.
pub struct Linear {
    pub(super) matrix: Base,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) split: Split,
    group: Arc<dyn TensorComm>,
    pub(super) lora: Option<Lora>,
}

/// The layer's own matrix.
pub(super) enum Base {
    Frozen(Arc<Weight>),
    /// Trained as a whole, `[out, in]`.
    Trained {
        id: ParameterId,
        outputs: usize,
        inputs: usize,
    },
}

/// The trained product.
pub(super) struct Lora {
    pub(super) a: ParameterId,
    pub(super) b: ParameterId,
    pub(super) rank: usize,
    pub(super) scale: f32,
    pub(super) dropout: Dropout,
    pub(super) dora: Option<Dora>,
}

pub(super) struct Dora {
    pub(super) magnitude: ParameterId,
    /// Σ W² of each output feature, over this rank's columns.
    pub(super) weight_squares: Vec<f32>,
    /// 1 / ‖W + s · B A‖.
    inverse_norms: Vec<f32>,
    /// m / ‖W + s · B A‖.
    gains: Vec<f32>,
}

/// Where a module's trained matrix lies in the whole.
pub struct Whole<'a> {
    /// The module's name in Hugging Face's form.
    pub module: &'a str,
    /// Output and input features of the whole.
    pub shape: [usize; 2],
    /// This rank's output features, in its order.
    pub rows: Vec<usize>,
    /// This rank's input features.
    pub cols: Range<usize>,
}

/// What a forward pass keeps for the backward one, besides the input.
#[derive(Default)]
pub struct Kept {
    /// A drop(x), `[m, r]`.
    h: Vec<f32>,
    /// With DoRA: the output without gains and bias, `[m, out]`; with a row split this
    /// rank's part of it.
    product: Vec<f32>,
}

/// A micro-batch as dropout sees it.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Whether values are dropped: in training, not in validation.
    pub training: bool,
    /// What each row's draws are keyed by besides the module: a number of the row in the
    /// whole run.
    pub numbers: Vec<u64>,
}

impl Linear {
    /// A layer without a product.
    pub fn frozen(
        weight: Arc<Weight>,
        bias: Option<Vec<f32>>,
        split: Split,
        group: Arc<dyn TensorComm>,
    ) -> Self {
        Self { matrix: Base::Frozen(weight), bias, split, group, lora: None }
    }

    /// A layer without bias whose matrix, this rank's output features of it, is trained.
    pub fn trained(
        id: ParameterId,
        [outputs, inputs]: [usize; 2],
        group: Arc<dyn TensorComm>,
    ) -> Self {
        let matrix = Base::Trained { id, outputs, inputs };
        Self { matrix, bias: None, split: Split::Column, group, lora: None }
    }

    /// The same with a product; its tensors are added to `parameters`. Collective for a row
    /// split with DoRA.
    pub fn with_lora(
        mut self,
        whole: &Whole,
        config: &LoraConfig,
        seed: u64,
        parameters: &mut Parameters,
    ) -> Self {
        let [outputs, inputs] = whole.shape;
        let r = config.r;
        let (of_a, of_b) = match self.split {
            Split::Column => (Sharing::Summed, Sharing::Sharded),
            Split::Row => (Sharing::Sharded, Sharing::Summed),
            Split::Whole => (Sharing::Replicated, Sharing::Replicated),
        };
        let cut = |rows: Vec<usize>, cols: Range<usize>| Cut { rows, cols };
        let cut_a = cut((0..r).collect(), whole.cols.clone());
        let a = parameters.add(whole.module, Part::A, [r, inputs], cut_a, of_a);
        let cut_b = cut(whole.rows.clone(), 0..r);
        let b = parameters.add(whole.module, Part::B, [outputs, r], cut_b, of_b);
        let dora = config.use_dora.then(|| {
            let cut = cut(whole.rows.clone(), 0..1);
            let magnitude = parameters.add(whole.module, Part::Magnitude, [outputs, 1], cut, of_b);
            let weight_squares = self.matrix.row_squares();
            // B is zero yet: the magnitudes begin as the norms of W.
            let mut squares = weight_squares.clone();
            self.sum_over_columns(&mut squares);
            let span = parameters.of(magnitude).span.clone();
            let norms = squares.iter().map(|square| square.sqrt());
            parameters.values[span].iter_mut().zip(norms).for_each(|(m, norm)| *m = norm);
            let inverse_norms = squares.iter().map(|square| 1.0 / square.sqrt()).collect();
            Dora { magnitude, weight_squares, inverse_norms, gains: vec![1.0; whole.rows.len()] }
        });
        let dropout =
            Dropout::new(config.lora_dropout, key_of(seed, whole.module), whole.cols.start);
        self.lora = Some(Lora { a, b, rank: r, scale: config.scale(), dropout, dora });
        self
    }

    /// Brings what depends on the parameters alone up to date, after each change of them.
    /// Collective for a row split with DoRA.
    pub fn refresh(&mut self, parameters: &Parameters) {
        let Some(lora) = &self.lora else { return };
        let Some(dora) = &lora.dora else { return };
        let mut squares = self.adapted_row_squares(lora, dora, parameters);
        self.sum_over_columns(&mut squares);
        let magnitudes = parameters.values_of(dora.magnitude);
        if let Some(dora) = self.lora.as_mut().and_then(|lora| lora.dora.as_mut()) {
            dora.inverse_norms = squares.iter().map(|s| 1.0 / s.max(0.0).sqrt()).collect();
            dora.gains = magnitudes.iter().zip(&dora.inverse_norms).map(|(m, i)| m * i).collect();
        }
    }

    fn adapted_row_squares(&self, lora: &Lora, dora: &Dora, parameters: &Parameters) -> Vec<f32> {
        let (a, b) = (parameters.values_of(lora.a), parameters.values_of(lora.b));
        let mut by_row = vec![0.0; lora.rank * self.outputs()];
        self.matrix.multiply(parameters, a, lora.rank, None, &mut by_row);
        adapted_row_squares(&dora.weight_squares, [a, b], lora.scale, &by_row)
    }

    fn sum_over_columns(&self, values: &mut [f32]) {
        if self.split == Split::Row {
            self.group.all_reduce_sum(values);
        }
    }

    /// Output features on this rank.
    pub fn outputs(&self) -> usize {
        match &self.matrix {
            Base::Frozen(weight) => weight.rows(),
            Base::Trained { outputs, .. } => *outputs,
        }
    }

    /// Input features on this rank.
    pub fn inputs(&self) -> usize {
        match &self.matrix {
            Base::Frozen(weight) => weight.cols(),
            Base::Trained { inputs, .. } => *inputs,
        }
    }

    /// `[m, in]` → `[m, out]`, and what the backward pass needs. Collective for a row split.
    pub fn forward(&self, p: &Parameters, x: &[f32], tokens: &Tokens) -> (Vec<f32>, Kept) {
        let (mut y, kept) = self.local(p, x, tokens);
        self.sum_over_columns(&mut y);
        (y, kept)
    }

    /// What the backward pass needs, without the output where that costs more. Not
    /// collective.
    pub fn keep(&self, p: &Parameters, x: &[f32], tokens: &Tokens) -> Kept {
        match &self.lora {
            None => Kept::default(),
            Some(Lora { dora: Some(_), .. }) => self.local(p, x, tokens).1,
            Some(lora) => Kept { h: lora.inner(p, x, tokens), product: Vec::new() },
        }
    }

    /// Before the sum over the ranks.
    fn local(&self, p: &Parameters, x: &[f32], tokens: &Tokens) -> (Vec<f32>, Kept) {
        let (m, n) = (x.len() / self.inputs(), self.outputs());
        let mut y = vec![0.0; m * n];
        let Some(lora) = &self.lora else {
            self.matrix.multiply(p, x, m, self.bias.as_deref(), &mut y);
            return (y, Kept::default());
        };
        let dora = lora.dora.as_ref();
        let bias = self.bias.as_deref();
        self.matrix.multiply(p, x, m, bias.filter(|_| dora.is_none()), &mut y);
        let h = lora.inner(p, x, tokens);
        let scaled: Vec<f32> = h.iter().map(|h| lora.scale * h).collect();
        let b_columns = transposed(p.values_of(lora.b), lora.rank);
        gemm::multiply(&scaled, m, matrix(&b_columns, n), true, &mut y);
        let Some(dora) = dora else { return (y, Kept { h, product: Vec::new() }) };
        let product = y.clone();
        for y in y.chunks_exact_mut(n) {
            y.iter_mut().zip(&dora.gains).for_each(|(y, gain)| *y *= gain);
            bias.into_iter().for_each(|bias| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
        (y, Kept { h, product })
    }

    /// Adds this layer's part of the gradient of its input `x` to `dx`, and those of its
    /// trained tensors to theirs, from that of its output, `dy` `[m, out]`.
    pub fn backward(
        &self,
        p: &mut Parameters,
        x: &[f32],
        kept: &Kept,
        dy: &[f32],
        tokens: &Tokens,
        dx: Option<&mut [f32]>,
    ) {
        let m = x.len() / self.inputs();
        if let Base::Trained { id, .. } = &self.matrix {
            gemm::gradient(dy, x, m, true, p.gradient_of(*id));
        }
        let Some(lora) = &self.lora else {
            if let Some(dx) = dx {
                self.matrix.multiply_back(p, dy, m, dx);
            }
            return;
        };
        let gained = lora.dora.as_ref().map(|dora| dora.backward(p, &kept.product, dy));
        let dy = gained.as_deref().unwrap_or(dy);
        let dh = lora.backward(p, x, &kept.h, dy, tokens);
        if let Some(dx) = dx {
            self.matrix.multiply_back(p, dy, m, dx);
            lora.input_gradient(p, &dh, m, tokens, dx);
        }
    }
}

impl Base {
    fn multiply(&self, p: &Parameters, x: &[f32], m: usize, bias: Option<&[f32]>, y: &mut [f32]) {
        match self {
            Base::Frozen(weight) => weight.multiply(x, m, bias, y),
            Base::Trained { id, inputs, .. } => {
                gemm::linear(x, m, matrix(p.values_of(*id), *inputs), bias, y);
            }
        }
    }

    /// `dx += dy · W`.
    fn multiply_back(&self, p: &Parameters, dy: &[f32], m: usize, dx: &mut [f32]) {
        match self {
            Base::Frozen(weight) => weight.multiply_back(dy, m, true, dx),
            Base::Trained { id, inputs, .. } => {
                gemm::multiply(dy, m, matrix(p.values_of(*id), *inputs), true, dx);
            }
        }
    }

    /// Σ W² of each row; only of what is frozen.
    fn row_squares(&self) -> Vec<f32> {
        let Base::Frozen(weight) = self else { return Vec::new() };
        let square = |row: usize| {
            let mut values = vec![0.0; weight.cols()];
            weight.read_row(row, &mut values);
            values.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>() as f32
        };
        (0..weight.rows()).into_par_iter().map(square).collect()
    }
}

impl Lora {
    /// A drop(x).
    fn inner(&self, p: &Parameters, x: &[f32], tokens: &Tokens) -> Vec<f32> {
        let a = matrix_of_rows(p.values_of(self.a), self.rank);
        let m = x.len() / a.cols;
        let mut h = vec![0.0; m * self.rank];
        match self.dropout.applied(x, a.cols, tokens) {
            Some(x) => gemm::linear(&x, m, a, None, &mut h),
            None => gemm::linear(x, m, a, None, &mut h),
        }
        h
    }

    /// Adds the gradients of A and B; returns that of h.
    fn backward(
        &self,
        p: &mut Parameters,
        x: &[f32],
        h: &[f32],
        dy: &[f32],
        tokens: &Tokens,
    ) -> Vec<f32> {
        let r = self.rank;
        let m = h.len() / r;
        let b = p.values_of(self.b);
        let mut dh = vec![0.0; m * r];
        gemm::multiply(dy, m, matrix(b, r), false, &mut dh);
        dh.iter_mut().for_each(|dh| *dh *= self.scale);
        // [r, out], since the few rows of h are those to be turned.
        let mut db = vec![0.0; b.len()];
        gemm::gradient(h, dy, m, false, &mut db);
        let outputs = db.len() / r;
        for (row, gradient) in p.gradient_of(self.b).chunks_exact_mut(r).enumerate() {
            for (i, gradient) in gradient.iter_mut().enumerate() {
                *gradient += self.scale * db[i * outputs + row];
            }
        }
        let cols = x.len() / m;
        let da = p.gradient_of(self.a);
        match self.dropout.applied(x, cols, tokens) {
            Some(x) => gemm::gradient(&dh, &x, m, true, da),
            None => gemm::gradient(&dh, x, m, true, da),
        }
        dh
    }

    /// `dx += drop(Aᵀ dh)`.
    fn input_gradient(
        &self,
        p: &Parameters,
        dh: &[f32],
        m: usize,
        tokens: &Tokens,
        dx: &mut [f32],
    ) {
        let a = p.values_of(self.a);
        let cols = dx.len() / m;
        if !self.dropout.is_on(tokens) {
            return gemm::multiply(dh, m, matrix(a, cols), true, dx);
        }
        let mut own = vec![0.0; dx.len()];
        gemm::multiply(dh, m, matrix(a, cols), false, &mut own);
        self.dropout.apply(&mut own, cols, tokens);
        dx.iter_mut().zip(own).for_each(|(dx, own)| *dx += own);
    }
}

impl Dora {
    /// Adds the gradient of the magnitudes; returns that of the product.
    fn backward(&self, p: &mut Parameters, product: &[f32], dy: &[f32]) -> Vec<f32> {
        let n = self.gains.len();
        let mut sums = vec![0.0f64; n];
        for (product, dy) in product.chunks_exact(n).zip(dy.chunks_exact(n)) {
            for ((sum, product), dy) in sums.iter_mut().zip(product).zip(dy) {
                *sum += f64::from(*product) * f64::from(*dy);
            }
        }
        let gradients = p.gradient_of(self.magnitude).iter_mut();
        for ((gradient, sum), inverse_norm) in gradients.zip(sums).zip(&self.inverse_norms) {
            *gradient += (sum * f64::from(*inverse_norm)) as f32;
        }
        let mut gained = dy.to_vec();
        for row in gained.chunks_exact_mut(n) {
            row.iter_mut().zip(&self.gains).for_each(|(dy, gain)| *dy *= gain);
        }
        gained
    }
}

/// `‖W + s B A‖² = ‖W‖² + 2 s B·(W Aᵀ) + s² B (A Aᵀ) Bᵀ`, row by row, over this rank's
/// columns; `by_row` is A Wᵀ, which costs as much as r tokens.
pub(super) fn adapted_row_squares(
    weight_squares: &[f32],
    [a, b]: [&[f32]; 2],
    scale: f32,
    by_row: &[f32],
) -> Vec<f32> {
    let outputs = weight_squares.len();
    let r = by_row.len() / outputs;
    let mut gram = vec![0.0; r * r];
    gemm::linear(a, r, matrix_of_rows(a, r), None, &mut gram);
    let s = f64::from(scale);
    let square = |(row, squares): (usize, &f32)| {
        let b = &b[row * r..(row + 1) * r];
        let mut sum = f64::from(*squares);
        for (i, bi) in b.iter().enumerate() {
            let bi = f64::from(*bi);
            sum += 2.0 * s * bi * f64::from(by_row[i * outputs + row]);
            let inner: f64 =
                b.iter().zip(&gram[i * r..]).map(|(b, g)| f64::from(*b) * f64::from(*g)).sum();
            sum += s * s * bi * inner;
        }
        sum as f32
    };
    weight_squares.iter().enumerate().map(square).collect()
}

/// `values` as rows of `cols`.
fn matrix(values: &[f32], cols: usize) -> Matrix<'_, f32> {
    Matrix { data: values, rows: values.len() / cols, cols, stride: cols }
}

/// `values` as `rows` rows.
fn matrix_of_rows(values: &[f32], rows: usize) -> Matrix<'_, f32> {
    matrix(values, values.len() / rows)
}

/// `[n, cols]` → `[cols, n]`.
fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| values[col..].iter().step_by(cols).copied()).collect()
}

#[cfg(test)]
mod tests;
