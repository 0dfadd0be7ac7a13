//! A rank's share of the adapters at one layer, and what it adds to the layer's output.
//!
//! The layer computes all rows of a step at once; then each adapter's rows are gathered, go
//! through its factors, and are added where they came from. The kernels give a row the same
//! bits in any company, so a row's sum depends on its own adapter alone.

use std::ops::Range;
use std::slice::from_ref;

use candle_core::Tensor;
use rayon::prelude::*;

use super::{Adapter, AdapterRows, LowRankTensors, RowAdapters};
use crate::Result;
use crate::model::layers::Loader;
use crate::model::names::{Names, Place};
use crate::model::ops;
use crate::model::weights::Weight;

/// Rows of the model's matrix that are widened at a time, for DoRA's norms.
const NORM_ROWS: usize = 256;

/// Where a linear layer's matrix lies, and this rank's part of it.
pub struct Layer<'a> {
    /// In a checkpoint or an adapter with such names.
    pub place: &'a dyn Fn(&Names) -> Place,
    /// Columns of the whole matrix.
    pub width: usize,
    /// This rank's columns.
    pub cols: Range<usize>,
    /// Width of the heads, where the rows are queries or keys.
    pub head_dim: Option<usize>,
}

/// What adapters change at a linear layer, by their numbers; empty where none does.
#[derive(Default)]
pub struct Deltas(pub(in crate::model) Vec<Option<Delta>>);

/// One adapter at a linear layer.
pub(in crate::model) struct Delta {
    /// Stands for the layer's matrix.
    pub(in crate::model) replaced: Option<Weight>,
    pub(in crate::model) low_rank: Option<LowRank>,
}

/// `s · B A`, or DoRA's.
pub(in crate::model) struct LowRank {
    pub(in crate::model) a: Weight,
    pub(in crate::model) b: Weight,
    pub(in crate::model) scale: f32,
    /// DoRA: m / ‖W + s · B A‖ of this rank's rows.
    pub(in crate::model) gains: Option<Vec<f32>>,
}

impl Deltas {
    /// This rank's part of the adapters at a layer; `base` is where the model has its matrix
    /// and `weight` this rank's part of that.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn load(l: &Loader, layer: &Layer, base: &Place, weight: &Weight) -> Result<Self> {
        let load = |adapter: &Adapter| Delta::load(l, adapter, layer, base, weight);
        let deltas = l.adapters.iter().map(load).collect::<Result<Vec<_>>>()?;
        Ok(Self(if deltas.iter().all(Option::is_none) { Vec::new() } else { deltas }))
    }

    /// Changes the rows of `out`, which is `x` through the layer with its `bias`.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn apply(
        &self,
        x: &Tensor,
        bias: Option<&[f32]>,
        rows: &RowAdapters,
        out: &mut [f32],
    ) -> Result<()> {
        for AdapterRows { adapter, rows } in rows.groups() {
            if let Some(Some(delta)) = self.0.get(*adapter) {
                let all = rows.len() == x.dim(0)?;
                let x = if all { x.clone() } else { ops::select_rows(x, rows)? };
                delta.apply(&x, bias, rows, out)?;
            }
        }
        Ok(())
    }
}

impl Delta {
    fn load(
        l: &Loader,
        adapter: &Adapter,
        layer: &Layer,
        base: &Place,
        weight: &Weight,
    ) -> Result<Option<Self>> {
        let place = (layer.place)(&adapter.names);
        let Some(module) = adapter.module(&place.name) else { return Ok(None) };
        let place = adapter.in_base_order(place, layer.head_dim);
        let shape = [place.stored_rows, layer.width];
        let part = |cols| match &module.replaced {
            Some(name) => adapter.table.part(name, shape, &place.rows, cols).map(Some),
            None => Ok(None),
        };
        let replaced = part(layer.cols.clone())?;
        let Some(tensors) = &module.low_rank else {
            return Ok(Some(Self { replaced, low_rank: None }));
        };
        let stack = module.shape.stack;
        let mut low_rank = LowRank::load(adapter, tensors, layer, &place, stack)?;
        if let Some(name) = &tensors.magnitude {
            let magnitudes = adapter.table.vector(name, place.stored_rows, &place.rows)?;
            let a = a_of(adapter, tensors, layer.width, &place, stack, 0..layer.width)?;
            let whole = layer.cols == (0..layer.width);
            let norms = match (part(0..layer.width)?, whole) {
                (Some(replaced), _) => low_rank.norms(&a, &replaced, 0),
                (None, true) => low_rank.norms(&a, weight, 0),
                // The norm is over all columns, of which other ranks have some: each reads
                // the rows again, which needs no sum over ranks while they load.
                (None, false) => low_rank.norms_of_stored(l, &a, base, layer.width)?,
            };
            low_rank.gains = Some(magnitudes.iter().zip(norms).map(|(m, norm)| m / norm).collect());
        }
        Ok(Some(Self { replaced, low_rank: Some(low_rank) }))
    }

    /// `x` holds the rows `rows` of the layer's input.
    fn apply(
        &self,
        x: &Tensor,
        bias: Option<&[f32]>,
        rows: &[usize],
        out: &mut [f32],
    ) -> Result<()> {
        let low_rank = self.low_rank.as_ref();
        let product = low_rank.map(|low_rank| low_rank.forward(x)).transpose()?;
        let replaced =
            self.replaced.as_ref().map(|weight| ops::linear(x, weight, bias)).transpose()?;
        let Some(width) = [&product, &replaced].into_iter().flatten().next().map(Vec::len) else {
            return Ok(());
        };
        let width = width / rows.len().max(1);
        for (i, row) in rows.iter().enumerate() {
            let out = &mut out[row * width..][..width];
            if let Some(replaced) = &replaced {
                out.copy_from_slice(&replaced[i * width..][..width]);
            }
            let Some(product) = &product else { continue };
            let product = &product[i * width..][..width];
            match low_rank.and_then(|low_rank| low_rank.gains.as_deref()) {
                None => out.iter_mut().zip(product).for_each(|(out, p)| *out += p),
                Some(gains) => {
                    for (j, (out, p)) in out.iter_mut().zip(product).enumerate() {
                        let bias = bias.map_or(0.0, |bias| bias[j]);
                        *out = gains[j] * (*out - bias + p) + bias;
                    }
                }
            }
        }
        Ok(())
    }
}

/// A's columns `cols`; of a stack of experts the one that `place` is of.
pub(super) fn a_of(
    adapter: &Adapter,
    tensors: &LowRankTensors,
    width: usize,
    place: &Place,
    stack: usize,
    cols: Range<usize>,
) -> Result<Weight> {
    let rank = tensors.rank;
    let first = place.rows.first().map_or(0, |rows| rows.start);
    let member = first * stack / place.stored_rows.max(1);
    let rows = member * rank..(member + 1) * rank;
    adapter.table.part(&tensors.a, [stack * rank, width], from_ref(&rows), cols)
}

impl LowRank {
    fn load(
        adapter: &Adapter,
        tensors: &LowRankTensors,
        layer: &Layer,
        place: &Place,
        stack: usize,
    ) -> Result<Self> {
        let LowRankTensors { b, rank, scale, .. } = tensors;
        let a = a_of(adapter, tensors, layer.width, place, stack, layer.cols.clone())?;
        let b = adapter.table.part(b, [place.stored_rows, *rank], &place.rows, 0..*rank)?;
        Ok(Self { a, b, scale: *scale, gains: None })
    }

    /// `s · B (A x)` of each row.
    fn forward(&self, x: &Tensor) -> Result<Vec<f32>> {
        let mut inner = ops::linear(x, &self.a, None)?;
        inner.iter_mut().for_each(|h| *h *= self.scale);
        ops::linear(&ops::from_values(inner, self.a.rows())?, &self.b, None)
    }

    /// ‖W + s · B A‖ of each row of `weight`, whose first is row `first` of B; `a` and `weight`
    /// have all columns.
    fn norms(&self, a: &Weight, weight: &Weight, first: usize) -> Vec<f32> {
        let (rank, width) = (a.rows(), a.cols());
        let a = a.to_f32();
        let norm = |row: usize| {
            let (mut w, mut b) = (vec![0.0; width], vec![0.0; rank]);
            weight.read_row(row, &mut w);
            self.b.read_row(first + row, &mut b);
            for (b, a) in b.iter().zip(a.chunks_exact(width)) {
                let factor = self.scale * b;
                w.iter_mut().zip(a).for_each(|(w, a)| *w += factor * a);
            }
            w.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>().sqrt() as f32
        };
        (0..weight.rows()).into_par_iter().map(norm).collect()
    }

    /// The same of the model's rows at `base`, of which this rank keeps only some columns.
    fn norms_of_stored(
        &self,
        l: &Loader,
        a: &Weight,
        base: &Place,
        width: usize,
    ) -> Result<Vec<f32>> {
        let rows: Vec<usize> = base.rows.iter().cloned().flatten().collect();
        let mut norms = Vec::with_capacity(rows.len());
        for rows in rows.chunks(NORM_ROWS) {
            let rows = rows.iter().map(|row| *row..row + 1).collect();
            let weight = l.matrix(&Place { rows, ..base.clone() }, width, 0..width)?;
            norms.extend(self.norms(a, &weight, norms.len()));
        }
        Ok(norms)
    }
}

/// What adapters change at the embedding, by their numbers; empty where none does.
#[derive(Default)]
pub struct EmbeddingDeltas(Vec<Option<EmbeddingDelta>>);

/// One adapter at the embedding, for this rank's tokens.
struct EmbeddingDelta {
    replaced: Option<Weight>,
    low_rank: Option<EmbeddingLowRank>,
}

struct EmbeddingLowRank {
    /// A's column of each of this rank's tokens, times the scale, `[tokens, r]`.
    a_by_token: Vec<f32>,
    /// `[hidden, r]`.
    b: Weight,
}

impl EmbeddingDeltas {
    /// Whether no adapter changes the embedding.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// This rank's part of the adapters at the embedding: that of the tokens `ids` of
    /// `[vocab, hidden]`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn load(l: &Loader, shape: [usize; 2], ids: Range<usize>) -> Result<Self> {
        let load = |adapter: &Adapter| EmbeddingDelta::load(adapter, shape, ids.clone());
        let deltas = l.adapters.iter().map(load).collect::<Result<Vec<_>>>()?;
        Ok(Self(if deltas.iter().all(Option::is_none) { Vec::new() } else { deltas }))
    }

    /// Changes the rows of `out`, the embeddings of `token_ids`; a token that is not one of
    /// this rank's `ids` keeps its row.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn apply(
        &self,
        token_ids: &[u32],
        ids: &Range<usize>,
        rows: &RowAdapters,
        out: &mut [f32],
    ) -> Result<()> {
        for AdapterRows { adapter, rows } in rows.groups() {
            let Some(Some(delta)) = self.0.get(*adapter) else { continue };
            let mine = rows.iter().filter_map(|row| {
                let id = token_ids[*row] as usize;
                ids.contains(&id).then(|| (*row, id - ids.start))
            });
            delta.apply(&mine.collect::<Vec<_>>(), out)?;
        }
        Ok(())
    }
}

impl EmbeddingDelta {
    fn load(adapter: &Adapter, shape: [usize; 2], ids: Range<usize>) -> Result<Option<Self>> {
        let Some(module) = adapter.module(adapter.names.embed_tokens) else { return Ok(None) };
        let [vocab, hidden] = shape;
        let table = &adapter.table;
        let rows = from_ref(&ids);
        let replaced = module.replaced.as_ref();
        let replaced = replaced.map(|name| table.part(name, shape, rows, 0..hidden)).transpose()?;
        let low_rank = match &module.low_rank {
            None => None,
            Some(LowRankTensors { a, b, rank, scale, a_by_token, .. }) => {
                let mut by_token = match a_by_token {
                    true => table.part(a, [vocab, *rank], rows, 0..*rank)?.to_f32(),
                    false => {
                        let all = 0..*rank;
                        transposed(&table.part(a, [*rank, vocab], from_ref(&all), ids.clone())?)
                    }
                };
                by_token.iter_mut().for_each(|a| *a *= scale);
                let b = table.part(b, [hidden, *rank], from_ref(&(0..hidden)), 0..*rank)?;
                Some(EmbeddingLowRank { a_by_token: by_token, b })
            }
        };
        Ok(Some(Self { replaced, low_rank }))
    }

    /// `rows` are rows of `out` and their tokens' places among this rank's.
    fn apply(&self, rows: &[(usize, usize)], out: &mut [f32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        if let Some(weight) = &self.replaced {
            let width = weight.cols();
            for (row, id) in rows {
                weight.read_row(*id, &mut out[row * width..][..width]);
            }
        }
        let Some(EmbeddingLowRank { a_by_token, b }) = &self.low_rank else { return Ok(()) };
        let (rank, width) = (b.cols(), b.rows());
        let inner = rows.iter().flat_map(|(_, id)| &a_by_token[id * rank..][..rank]).copied();
        let product = ops::linear(&ops::from_values(inner.collect(), rank)?, b, None)?;
        for ((row, _), product) in rows.iter().zip(product.chunks_exact(width)) {
            let out = &mut out[row * width..][..width];
            out.iter_mut().zip(product).for_each(|(out, p)| *out += p);
        }
        Ok(())
    }
}

/// The matrix with rows for columns.
pub(super) fn transposed(matrix: &Weight) -> Vec<f32> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let values = matrix.to_f32();
    (0..cols)
        .flat_map(|col| (0..rows).map(move |row| (row, col)))
        .map(|(r, c)| values[r * cols + c])
        .collect()
}
