//! An adapter written into its model's matrices: `W + s · B A` (DoRA's gains too), or a
//! matrix in the place of another.
//!
//! A row of the result depends on that row of W alone, so a matrix is made some rows at a
//! time, whatever its size. Model and adapter may name and order their rows differently;
//! `slots` holds them against each other.

use std::collections::BTreeMap;
use std::ops::Range;
use std::slice::from_ref;

use rayon::prelude::*;

use super::delta::{a_of, transposed};
use super::slots::{Slot, slots};
use super::{Adapter, LowRankTensors};
use crate::Result;
use crate::model::checkpoint::{Checkpoint, TensorTable};
use crate::model::names::Place;
use crate::model::weights::Weight;

/// A model and the adapter that goes into it.
pub struct Merge<'a> {
    adapter: &'a Adapter,
    base: &'a Checkpoint,
    /// By the module of the model whose matrix changes.
    modules: BTreeMap<String, Vec<Change>>,
    unties: bool,
}

/// Rows of a module that change.
struct Change {
    /// Where the model has them.
    base: Place,
    /// Where the adapter has them, in the model's order.
    ours: Place,
    is_embedding: bool,
}

impl<'a> Merge<'a> {
    /// What `adapter`, which was opened for `base`, changes.
    ///
    /// # Errors
    /// Input errors: a matrix that changes is missing from the model, has another shape, or
    /// a type that farm does not read.
    pub fn new(adapter: &'a Adapter, base: &'a Checkpoint) -> Result<Self> {
        let mut merge = Self { adapter, base, modules: BTreeMap::new(), unties: false };
        let config = base.config();
        let ours = slots(config, &adapter.names);
        for (slot, ours) in slots(config, &config.names).into_iter().zip(ours) {
            if adapter.module(&ours.place.name).is_some() {
                let Slot { place: base, head_dim, .. } = slot;
                let ours = adapter.in_base_order(ours.place, head_dim);
                merge.add(Change { base, ours, is_embedding: false });
            }
        }
        merge.add_vocabulary();
        for module in merge.modules.keys() {
            let (source, shape) = merge.source(module);
            base.tensors().part(&source, shape, from_ref(&(0..0)), 0..shape[1])?;
        }
        Ok(merge)
    }

    /// Embedding and output projection, which may be one matrix of the model: it is cut in
    /// two where the adapter does not change both alike.
    fn add_vocabulary(&mut self) {
        let (config, adapter) = (self.base.config(), self.adapter);
        let [embedding, head] =
            [adapter.names.embed_tokens, adapter.names.lm_head].map(|name| adapter.module(name));
        let alike = match (embedding, head) {
            (None, None) => true,
            (Some(e), Some(h)) => {
                e.replaced == h.replaced && e.low_rank.is_none() && h.low_rank.is_none()
            }
            _ => false,
        };
        self.unties = config.tie_word_embeddings && !alike;
        let vocab = config.vocab_size;
        let place = |name: &str| Place::new(name.to_owned(), vocab, 0..vocab);
        let change = |base: &str, ours: &str, is_embedding| Change {
            base: place(base),
            ours: place(ours),
            is_embedding,
        };
        let (base, ours) = (&config.names, &adapter.names);
        if embedding.is_some() {
            self.add(change(base.embed_tokens, ours.embed_tokens, true));
        }
        if head.is_some() && (self.unties || self.has_head()) {
            self.add(change(base.lm_head, ours.lm_head, false));
        } else if self.unties && !self.has_head() {
            // As it was, but no longer what the embedding is.
            self.modules.insert(base.lm_head.to_owned(), Vec::new());
        }
    }

    fn add(&mut self, change: Change) {
        self.modules.entry(change.base.name.clone()).or_default().push(change);
    }

    fn has_head(&self) -> bool {
        self.base.tensors().contains(&format!("{}.weight", self.base.config().names.lm_head))
    }

    /// The model's modules whose matrices change.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// Whether the matrix of `module` changes.
    pub fn changes(&self, module: &str) -> bool {
        self.modules.contains_key(module)
    }

    /// Embedding and output projection are one in the model, but not in the result.
    pub fn unties(&self) -> bool {
        self.unties
    }

    /// The output projection, where it is among the modules but not in the model's files.
    pub fn added(&self) -> Option<&str> {
        let head = self.base.config().names.lm_head;
        (self.changes(head) && !self.has_head()).then_some(head)
    }

    /// The tensor that a module's matrix is made from, and its shape as a matrix.
    fn source(&self, module: &str) -> (String, [usize; 2]) {
        let config = self.base.config();
        let name = match self.added() == Some(module) {
            true => config.names.embed_tokens,
            false => module,
        };
        let name = format!("{name}.weight");
        let shape = self.base.tensors().shape(&name).unwrap_or_default();
        let cols = shape.last().copied().unwrap_or_default();
        let changes = self.modules.get(module).and_then(|changes| changes.first());
        let rows = changes.map_or(config.vocab_size, |change| change.base.stored_rows);
        (name, [rows, cols])
    }

    /// The matrix of `module`, one of [`Merge::modules`].
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn matrix(&self, module: &str) -> Result<Merged<'_>> {
        let (source, shape) = self.source(module);
        let mut merged = Merged {
            table: self.base.tensors(),
            source,
            shape,
            parts: Vec::new(),
            of_row: vec![None; shape[0]],
        };
        for change in self.modules.get(module).into_iter().flatten() {
            let part = Part::load(self.adapter, change, shape[1])?;
            for (i, row) in change.base.rows.iter().cloned().flatten().enumerate() {
                merged.of_row[row] = Some((merged.parts.len(), i));
            }
            merged.parts.push(part);
        }
        Ok(merged)
    }
}

/// A matrix of the result.
pub struct Merged<'a> {
    table: &'a TensorTable,
    source: String,
    shape: [usize; 2],
    parts: Vec<Part>,
    /// Which part changes a row, and as which of its rows.
    of_row: Vec<Option<(usize, usize)>>,
}

impl Merged<'_> {
    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The name of the tensor that it is made from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Writes the rows `rows` to `out`, `[rows, cols]`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let cols = self.shape[1];
        let stored = self.table.part(&self.source, self.shape, from_ref(&rows), 0..cols)?;
        out.par_chunks_mut(cols.max(1)).zip(rows).enumerate().for_each(|(i, (out, row))| {
            stored.read_row(i, out);
            if let Some((part, row)) = self.of_row[row] {
                self.parts[part].change(row, out);
            }
        });
        Ok(())
    }
}

/// What the adapter does to some rows.
struct Part {
    replaced: Option<Weight>,
    product: Option<Product>,
}

/// `s · left right`.
struct Product {
    rank: usize,
    scale: f32,
    /// `[rows, rank]`.
    left: Vec<f32>,
    /// `[rank, cols]`.
    right: Vec<f32>,
    /// DoRA's, by row.
    magnitudes: Option<Vec<f32>>,
}

impl Part {
    fn load(adapter: &Adapter, change: &Change, width: usize) -> Result<Self> {
        let Some(module) = adapter.module(&change.ours.name) else {
            return Ok(Self { replaced: None, product: None });
        };
        let place = &change.ours;
        let replaced = module.replaced.as_ref().map(|name| {
            adapter.table.part(name, [place.stored_rows, width], &place.rows, 0..width)
        });
        let product = module.low_rank.as_ref().map(|tensors| match change.is_embedding {
            true => Product::of_embedding(adapter, tensors, place, width),
            false => Product::of_linear(adapter, tensors, place, module.shape.stack, width),
        });
        Ok(Self { replaced: replaced.transpose()?, product: product.transpose()? })
    }

    /// Row `row` of the part, of which `out` holds the model's.
    fn change(&self, row: usize, out: &mut [f32]) {
        if let Some(replaced) = &self.replaced {
            replaced.read_row(row, out);
        }
        if let Some(product) = &self.product {
            product.add(row, out);
        }
    }
}

impl Product {
    fn of_linear(
        adapter: &Adapter,
        tensors: &LowRankTensors,
        place: &Place,
        stack: usize,
        width: usize,
    ) -> Result<Self> {
        let LowRankTensors { b, rank, scale, magnitude, .. } = tensors;
        let right = a_of(adapter, tensors, width, place, stack, 0..width)?.to_f32();
        let rows = place.stored_rows;
        let left = adapter.table.part(b, [rows, *rank], &place.rows, 0..*rank)?.to_f32();
        let magnitudes = magnitude.as_ref().map(|m| adapter.table.vector(m, rows, &place.rows));
        let magnitudes = magnitudes.transpose()?;
        Ok(Self { rank: *rank, scale: *scale, left, right, magnitudes })
    }

    /// A row is a token: A's column of it times B.
    fn of_embedding(
        adapter: &Adapter,
        tensors: &LowRankTensors,
        place: &Place,
        hidden: usize,
    ) -> Result<Self> {
        let LowRankTensors { a, b, rank, scale, a_by_token, .. } = tensors;
        let (table, vocab, ranks) = (&adapter.table, place.stored_rows, 0..*rank);
        let left = match a_by_token {
            true => table.part(a, [vocab, *rank], &place.rows, ranks.clone())?.to_f32(),
            false => transposed(&table.part(a, [*rank, vocab], from_ref(&ranks), 0..vocab)?),
        };
        let b = table.part(b, [hidden, *rank], from_ref(&(0..hidden)), ranks)?;
        Ok(Self { rank: *rank, scale: *scale, left, right: transposed(&b), magnitudes: None })
    }

    fn add(&self, row: usize, out: &mut [f32]) {
        let left = &self.left[row * self.rank..][..self.rank];
        for (left, right) in left.iter().zip(self.right.chunks_exact(out.len())) {
            let factor = self.scale * left;
            out.iter_mut().zip(right).for_each(|(out, right)| *out += factor * right);
        }
        if let Some(magnitudes) = &self.magnitudes {
            let squares = out.iter().map(|w| f64::from(*w) * f64::from(*w));
            let gain = magnitudes[row] / squares.sum::<f64>().sqrt() as f32;
            out.iter_mut().for_each(|w| *w *= gain);
        }
    }
}
