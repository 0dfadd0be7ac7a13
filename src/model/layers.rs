//! Layers split over the ranks of a tensor-parallel group (Shoeybi et al. 2019,
//! Megatron-LM).
//!
//! ```text
//! column parallel: W = [W0; W1]   y_r = x·W_rᵀ            each rank has some outputs
//! row parallel:    W = [W0 , W1]  y = Σ_r x_r·W_rᵀ        a sum over the ranks
//! vocabulary:      E = [E0; E1]   rows of ids elsewhere are 0, a sum over the ranks
//! ```

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::adapter::{Adapter, Deltas, EmbeddingDeltas, Layer, RowAdapters};
use super::checkpoint::Source;
use super::config::{ModelConfig, NormKind};
use super::names::{Names, Place};
use super::ops;
use super::quantization::{Role, dtype_for};
use super::weights::{Activations, Weight, WeightDtype};
use crate::Result;
use crate::comm::TensorComm;
use crate::kernels::backward;
use crate::kernels::ops as kernel;

/// What layers need to load their share: the model's tensors, and the rank's place.
pub struct Loader<'a> {
    /// The checkpoint.
    pub source: &'a dyn Source,
    /// The tensor-parallel group.
    pub comm: Arc<dyn TensorComm>,
    /// What matrices become; `None` keeps the checkpoint's own.
    pub dtype: Option<WeightDtype>,
    /// What matrices are multiplied with.
    pub activations: Activations,
    /// The run's adapters, by number.
    pub adapters: &'a [Adapter],
}

impl Loader<'_> {
    /// Where `place` is in the checkpoint.
    pub fn base(&self, place: &dyn Fn(&Names) -> Place) -> Place {
        place(&self.source.config().names)
    }

    /// This rank's even share of `n` (the first ranks take one more where it does not divide).
    pub fn share(&self, n: usize) -> Range<usize> {
        share(n, self.comm.rank(), self.comm.size())
    }

    /// Columns `cols` of the `width` columns of the matrix at `place`.
    ///
    /// # Errors
    /// See [`TensorTable::matrix`](super::checkpoint::TensorTable::matrix).
    pub fn matrix(&self, place: &Place, width: usize, cols: Range<usize>) -> Result<Weight> {
        self.matrix_of(Role::Layer, place, width, cols)
    }

    /// The same of a matrix of any role.
    fn matrix_of(
        &self,
        role: Role,
        place: &Place,
        width: usize,
        cols: Range<usize>,
    ) -> Result<Weight> {
        let dtype = self.dtype.and_then(|dtype| dtype_for(dtype, role, width));
        let weight = self.source.matrix(place, width, cols, dtype)?;
        Ok(weight.with_activations(self.activations))
    }

    /// The bias at `place`.
    ///
    /// # Errors
    /// See [`TensorTable::vector`](super::checkpoint::TensorTable::vector).
    pub fn bias(&self, place: &Place) -> Result<Vec<f32>> {
        self.source.vector(&format!("{}.bias", place.name), place.stored_rows, &place.rows)
    }
}

/// The even share of `n` of a rank in a group of `size`.
pub fn share(n: usize, rank: usize, size: usize) -> Range<usize> {
    let at = |r: usize| r * (n / size) + r.min(n % size);
    at(rank)..at(rank + 1)
}

/// A norm over the values of a row, or of each head.
pub struct Norm {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) eps: f32,
}

impl Norm {
    /// Loads the norm `name` over `width` values; each rank has all of it.
    ///
    /// # Errors
    /// See [`TensorTable::vector`](super::checkpoint::TensorTable::vector).
    pub fn load(l: &Loader, config: &ModelConfig, name: &str, width: usize) -> Result<Self> {
        let vector = |part: &str| {
            l.source.vector(&format!("{name}.{part}"), width, std::slice::from_ref(&(0..width)))
        };
        let mut weight = vector("weight")?;
        if config.norm == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        let bias = (config.norm == NormKind::Layer).then(|| vector("bias")).transpose()?;
        Ok(Self { weight, bias, eps: config.norm_eps })
    }

    /// Values that are normed together.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    /// Each row normed.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            None => ops::rms_norm(x, &self.weight, self.eps),
            bias => ops::layer_norm(x, &self.weight, bias.as_deref(), self.eps),
        }
    }

    /// Each run of as many values as the norm is wide, normed: heads, or rows.
    pub fn rows(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        match &self.bias {
            None => kernel::rms_norm(x, &self.weight, self.eps, &mut out),
            bias => kernel::layer_norm(x, &self.weight, bias.as_deref(), self.eps, &mut out),
        }
        out
    }

    /// The gradient of `x` from that of [`Norm::rows`] of it.
    pub fn backward(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let mut dx = vec![0.0; x.len()];
        match &self.bias {
            None => backward::rms_norm(x, &self.weight, self.eps, dy, &mut dx),
            Some(_) => backward::layer_norm(x, &self.weight, self.eps, dy, &mut dx),
        }
        dx
    }
}

/// A linear layer of which this rank has some of the output features.
pub struct ColumnParallelLinear {
    weight: Weight,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) deltas: Deltas,
}

impl ColumnParallelLinear {
    /// Loads the output features at `place` (in a checkpoint or an adapter of such names) of a
    /// layer of `width` input features, and of its bias where it has one. `head_dim` is given
    /// for queries and keys.
    ///
    /// # Errors
    /// See [`TensorTable::matrix`](super::checkpoint::TensorTable::matrix).
    pub fn load(
        l: &Loader,
        place: &dyn Fn(&Names) -> Place,
        width: usize,
        bias: bool,
        head_dim: Option<usize>,
    ) -> Result<Self> {
        let base = l.base(place);
        let weight = l.matrix(&base, width, 0..width)?;
        let bias = bias.then(|| l.bias(&base)).transpose()?;
        let layer = Layer { place, width, cols: 0..width, head_dim };
        let deltas = Deltas::load(l, &layer, &base, &weight)?;
        Ok(Self { weight, bias, deltas })
    }

    /// A layer without bias of the weights `weight`, which are those at `place`.
    ///
    /// # Errors
    /// See [`Deltas::load`].
    pub fn of_weight(l: &Loader, place: &dyn Fn(&Names) -> Place, weight: Weight) -> Result<Self> {
        let width = weight.cols();
        let layer = Layer { place, width, cols: 0..width, head_dim: None };
        let deltas = Deltas::load(l, &layer, &l.base(place), &weight)?;
        Ok(Self { weight, bias: None, deltas })
    }

    /// `[m, in]` → this rank's features of each row, row-major.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        let mut out = ops::linear(x, &self.weight, self.bias.as_deref())?;
        self.deltas.apply(x, self.bias.as_deref(), adapters, &mut out)?;
        Ok(out)
    }

    /// The weight matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }
}

impl From<Weight> for ColumnParallelLinear {
    /// Without bias and adapters.
    fn from(weight: Weight) -> Self {
        Self { weight, bias: None, deltas: Deltas::default() }
    }
}

/// A linear layer of which this rank has some of the input features; the ranks'
/// products are summed.
pub struct RowParallelLinear {
    weight: Weight,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) deltas: Deltas,
    comm: Arc<dyn TensorComm>,
}

impl RowParallelLinear {
    /// Loads input features `cols` of the `width` of the layer at `place`, and its bias
    /// where it has one.
    ///
    /// # Errors
    /// See [`TensorTable::matrix`](super::checkpoint::TensorTable::matrix).
    pub fn load(
        l: &Loader,
        place: &dyn Fn(&Names) -> Place,
        width: usize,
        cols: Range<usize>,
        bias: bool,
    ) -> Result<Self> {
        let base = l.base(place);
        let weight = l.matrix(&base, width, cols.clone())?;
        // Only one rank adds the bias, before the sum.
        let bias = (bias && l.comm.rank() == 0).then(|| l.bias(&base)).transpose()?;
        let layer = Layer { place, width, cols, head_dim: None };
        let deltas = Deltas::load(l, &layer, &base, &weight)?;
        Ok(Self { weight, bias, deltas, comm: l.comm.clone() })
    }

    /// This rank's input features `[m, in_r]` → all output features, on every rank.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        let mut out = ops::linear(x, &self.weight, self.bias.as_deref())?;
        self.deltas.apply(x, self.bias.as_deref(), adapters, &mut out)?;
        self.comm.all_reduce_sum(&mut out);
        Ok(out)
    }

    /// The weight matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }
}

/// The embedding and, on the way out, the projection to logits, split by
/// vocabulary.
pub struct VocabParallel {
    weight: Arc<Weight>,
    ids: Range<usize>,
    vocab_size: usize,
    pub(super) of_embedding: EmbeddingDeltas,
    pub(super) of_logits: Deltas,
    comm: Arc<dyn TensorComm>,
}

impl VocabParallel {
    /// Loads this rank's rows of the matrix `name` of shape `[vocab, hidden]`.
    ///
    /// # Errors
    /// See [`TensorTable::matrix`](super::checkpoint::TensorTable::matrix).
    pub fn load(l: &Loader, name: &str, shape: [usize; 2]) -> Result<Self> {
        let ids = l.share(shape[0]);
        let place = Place::new(name.to_owned(), shape[0], ids.clone());
        let weight = l.matrix_of(Role::Vocabulary, &place, shape[1], 0..shape[1])?;
        Ok(Self {
            weight: Arc::new(weight),
            ids,
            vocab_size: shape[0],
            of_embedding: EmbeddingDeltas::default(),
            of_logits: Deltas::default(),
            comm: l.comm.clone(),
        })
    }

    /// With what adapters change at the embedding.
    ///
    /// # Errors
    /// See [`EmbeddingDeltas::load`].
    pub fn with_embedding_adapters(mut self, l: &Loader) -> Result<Self> {
        let shape = [self.vocab_size, self.weight.cols()];
        self.of_embedding = EmbeddingDeltas::load(l, shape, self.ids.clone())?;
        Ok(self)
    }

    /// With what adapters change at the output projection.
    ///
    /// # Errors
    /// See [`Deltas::load`].
    pub fn with_logits_adapters(mut self, l: &Loader) -> Result<Self> {
        let (rows, width) = (self.vocab_size, self.weight.cols());
        let place = |names: &Names| Place::new(names.lm_head.into(), rows, self.ids.clone());
        let layer = Layer { place: &place, width, cols: 0..width, head_dim: None };
        // All columns are here: nothing is read at the model's own place.
        self.of_logits = Deltas::load(l, &layer, &l.base(&place), &self.weight)?;
        Ok(self)
    }

    /// The same matrix again: an output projection tied to the embedding.
    pub fn tied(&self) -> Self {
        Self {
            weight: self.weight.clone(),
            ids: self.ids.clone(),
            vocab_size: self.vocab_size,
            of_embedding: EmbeddingDeltas::default(),
            of_logits: Deltas::default(),
            comm: self.comm.clone(),
        }
    }

    /// The matrix of this rank's rows, and which ids they are.
    pub fn shared(&self) -> (Arc<Weight>, Range<usize>) {
        (self.weight.clone(), self.ids.clone())
    }

    /// Whether both are views of one matrix.
    pub fn shares_weight_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.weight, &other.weight)
    }

    /// Token ids → `[ids, hidden]`, times `scale`.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn embed(
        &self,
        token_ids: &[u32],
        scale: Option<f32>,
        adapters: &RowAdapters,
    ) -> Result<Tensor> {
        let width = self.weight.cols();
        let mut out = vec![0.0; token_ids.len() * width];
        for (id, out) in token_ids.iter().zip(out.chunks_exact_mut(width)) {
            let id = *id as usize;
            if self.ids.contains(&id) {
                self.weight.read_row(id - self.ids.start, out);
            }
        }
        self.of_embedding.apply(token_ids, &self.ids, adapters, &mut out)?;
        self.comm.all_reduce_sum(&mut out);
        if let Some(scale) = scale {
            out.iter_mut().for_each(|x| *x *= scale);
        }
        ops::from_values(out, width)
    }

    /// `[m, hidden]` → logits `[m, vocab]`, row-major, on every rank.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn logits(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        let mut local = ops::linear(x, &self.weight, None)?;
        self.of_logits.apply(x, None, adapters, &mut local)?;
        let size = self.comm.size();
        if size == 1 {
            return Ok(local);
        }
        let m = x.dim(0)?;
        let gathered = self.comm.all_gather(&local);
        let mut out = vec![0.0; m * self.vocab_size];
        let mut from = 0;
        for rank in 0..size {
            let ids = share(self.vocab_size, rank, size);
            for row in 0..m {
                out[row * self.vocab_size..][ids.clone()]
                    .copy_from_slice(&gathered[from..from + ids.len()]);
                from += ids.len();
            }
        }
        Ok(out)
    }

    /// The weight matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once_and_differ_by_at_most_one() {
        for n in [0, 1, 7, 32, 513] {
            for size in 1..9 {
                let shares: Vec<_> = (0..size).map(|r| share(n, r, size)).collect();
                assert_eq!(shares[0].start, 0);
                assert_eq!(shares[size - 1].end, n);
                assert!(shares.windows(2).all(|w| w[0].end == w[1].start));
                assert!(shares.iter().all(|s| s.len().abs_diff(n / size) <= 1));
            }
        }
    }
}
