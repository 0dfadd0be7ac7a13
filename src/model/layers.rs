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

use super::ops;
use super::source::WeightSource;
use super::weights::Weight;
use crate::Result;
use crate::comm::TensorComm;

/// What layers need to load their share: the checkpoint, and the rank's place.
pub struct Loader<'a> {
    /// The checkpoint.
    pub source: &'a dyn WeightSource,
    /// The tensor-parallel group.
    pub comm: Arc<dyn TensorComm>,
}

impl Loader<'_> {
    /// This rank's even share of `n` (the first ranks take one more where it does not divide).
    pub fn share(&self, n: usize) -> Range<usize> {
        share(n, self.comm.rank(), self.comm.size())
    }
}

fn share(n: usize, rank: usize, size: usize) -> Range<usize> {
    let at = |r: usize| r * (n / size) + r.min(n % size);
    at(rank)..at(rank + 1)
}

/// A linear layer as the checkpoint has it.
pub struct LinearSpec {
    /// Name without `.weight` or `.bias`.
    pub name: String,
    /// Output features, input features.
    pub shape: [usize; 2],
    /// Whether it has a bias.
    pub bias: bool,
}

impl LinearSpec {
    fn weight(&self) -> String {
        format!("{}.weight", self.name)
    }

    fn bias(&self, l: &Loader, range: Range<usize>) -> Result<Option<Vec<f32>>> {
        let load = || l.source.vector(&format!("{}.bias", self.name), self.shape[0], range);
        self.bias.then(load).transpose()
    }
}

/// A linear layer of which this rank has some of the output features.
pub struct ColumnParallelLinear {
    weight: Weight,
    bias: Option<Vec<f32>>,
}

impl ColumnParallelLinear {
    /// Loads output features `rows` of the layer, and of its bias where it has one.
    ///
    /// # Errors
    /// See [`WeightSource::matrix`].
    pub fn load(l: &Loader, layer: &LinearSpec, rows: Range<usize>) -> Result<Self> {
        let bias = layer.bias(l, rows.clone())?;
        let weight = l.source.matrix(&layer.weight(), layer.shape, rows, 0..layer.shape[1])?;
        Ok(Self { weight, bias })
    }

    /// `[m, in]` → this rank's features of each row, row-major.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor) -> Result<Vec<f32>> {
        ops::linear(x, &self.weight, self.bias.as_deref())
    }

    /// Bytes of weights on this rank.
    pub fn bytes(&self) -> u64 {
        self.weight.bytes()
    }
}

/// A linear layer of which this rank has some of the input features; the ranks'
/// products are summed.
pub struct RowParallelLinear {
    weight: Weight,
    bias: Option<Vec<f32>>,
    comm: Arc<dyn TensorComm>,
}

impl RowParallelLinear {
    /// Loads input features `cols` of the layer, and its bias where it has one.
    ///
    /// # Errors
    /// See [`WeightSource::matrix`].
    pub fn load(l: &Loader, layer: &LinearSpec, cols: Range<usize>) -> Result<Self> {
        let out = layer.shape[0];
        let weight = l.source.matrix(&layer.weight(), layer.shape, 0..out, cols)?;
        // Only one rank adds the bias, before the sum.
        let bias = layer.bias(l, 0..out)?.filter(|_| l.comm.rank() == 0);
        Ok(Self { weight, bias, comm: l.comm.clone() })
    }

    /// This rank's input features `[m, in_r]` → all output features, on every rank.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor) -> Result<Vec<f32>> {
        let mut out = ops::linear(x, &self.weight, self.bias.as_deref())?;
        self.comm.all_reduce_sum(&mut out);
        Ok(out)
    }

    /// Bytes of weights on this rank.
    pub fn bytes(&self) -> u64 {
        self.weight.bytes()
    }
}

/// The embedding and, on the way out, the projection to logits, split by
/// vocabulary.
pub struct VocabParallel {
    weight: Arc<Weight>,
    ids: Range<usize>,
    vocab_size: usize,
    comm: Arc<dyn TensorComm>,
}

impl VocabParallel {
    /// Loads this rank's rows of the matrix `name` of shape `[vocab, hidden]`.
    ///
    /// # Errors
    /// See [`WeightSource::matrix`].
    pub fn load(l: &Loader, name: &str, shape: [usize; 2]) -> Result<Self> {
        let ids = l.share(shape[0]);
        let weight = l.source.matrix(name, shape, ids.clone(), 0..shape[1])?;
        Ok(Self { weight: Arc::new(weight), ids, vocab_size: shape[0], comm: l.comm.clone() })
    }

    /// The same matrix again: an output projection tied to the embedding.
    pub fn tied(&self) -> Self {
        Self {
            weight: self.weight.clone(),
            ids: self.ids.clone(),
            vocab_size: self.vocab_size,
            comm: self.comm.clone(),
        }
    }

    /// Whether both are views of one matrix.
    pub fn shares_weight_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.weight, &other.weight)
    }

    /// Token ids → `[ids, hidden]`.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn embed(&self, token_ids: &[u32]) -> Result<Tensor> {
        let width = self.weight.cols();
        let mut out = vec![0.0; token_ids.len() * width];
        for (id, out) in token_ids.iter().zip(out.chunks_exact_mut(width)) {
            let id = *id as usize;
            if self.ids.contains(&id) {
                self.weight.read_row(id - self.ids.start, out);
            }
        }
        self.comm.all_reduce_sum(&mut out);
        ops::from_values(out, width)
    }

    /// `[m, hidden]` → logits `[m, vocab]`, row-major, on every rank.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn logits(&self, x: &Tensor) -> Result<Vec<f32>> {
        let local = ops::linear(x, &self.weight, None)?;
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

    /// Bytes of weights on this rank.
    pub fn bytes(&self) -> u64 {
        self.weight.bytes()
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
