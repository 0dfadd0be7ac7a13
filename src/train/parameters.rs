//! The trained values of this rank, in one flat vector beside their gradients and moments.
//!
//! A tensor's whole matrix is the same for every tensor-parallel size; a rank has some of
//! its rows (B, magnitudes) or columns (A). What a rank has is said by [`Cut`], in the order
//! of Hugging Face's form, so that a checkpoint fits any number of ranks.

use std::ops::Range;

use super::adamw::sum_of_squares;
use crate::comm::TensorComm;
use crate::philox::philox4x32;
use crate::{Error, Result};

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// `[r, in]`.
    A,
    /// `[out, r]`.
    B,
    /// DoRA's magnitudes, `[out, 1]`.
    Magnitude,
    /// The module's own matrix, `[out, in]`.
    Whole,
}

/// How the ranks of a tensor-parallel group share a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each has a part of its own.
    Sharded,
    /// All have all of it, and their gradients are parts of a sum.
    Summed,
    /// All have all of it, and the same gradient.
    Replicated,
}

/// A rank's part of a whole matrix: its rows, in this rank's order, and its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Rows of the whole.
    pub rows: Vec<usize>,
    /// Columns of the whole.
    pub cols: Range<usize>,
}

/// One tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// The module, in Hugging Face's names.
    pub module: String,
    /// Which of its tensors.
    pub part: Part,
    /// Rows and columns of the whole.
    pub shape: [usize; 2],
    /// This rank's part.
    pub cut: Cut,
    /// Where that is in the flat vectors.
    pub span: Range<usize>,
    /// How the group shares it.
    pub sharing: Sharing,
}

impl Parameter {
    /// A name that no other tensor has: PEFT's without its prefix.
    pub fn name(&self) -> String {
        let suffix = match self.part {
            Part::A => "lora_A.weight",
            Part::B => "lora_B.weight",
            Part::Magnitude => "lora_magnitude_vector",
            Part::Whole => "weight",
        };
        format!("{}.{suffix}", self.module)
    }

    /// Values of the whole.
    pub fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// (index in this rank's part, index in the whole) of the starts of runs, which are as
    /// long as this rank's columns.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> {
        let width = self.cut.cols.len();
        let [_, cols] = self.shape;
        let first = self.cut.cols.start;
        self.cut.rows.iter().enumerate().map(move |(i, row)| (i * width, row * cols + first))
    }

    fn gather_into(&self, local: &[f32], whole: &mut [f32]) {
        let width = self.cut.cols.len();
        for (from, to) in self.runs() {
            whole[to..to + width].copy_from_slice(&local[from..from + width]);
        }
    }

    fn scatter_from(&self, whole: &[f32], local: &mut [f32]) {
        let width = self.cut.cols.len();
        for (to, from) in self.runs() {
            local[to..to + width].copy_from_slice(&whole[from..from + width]);
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Parameters {
    tensors: Vec<Parameter>,
    /// The values.
    pub values: Vec<f32>,
    /// Their gradients, summed over micro-batches.
    pub gradients: Vec<f32>,
    /// AdamW's first moments.
    pub m: Vec<f32>,
    /// AdamW's second moments.
    pub v: Vec<f32>,
}

/// The place of a tensor among the [`Parameters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterId(usize);

impl Parameters {
    /// Adds a tensor of zeros.
    pub fn add(
        &mut self,
        module: &str,
        part: Part,
        shape: [usize; 2],
        cut: Cut,
        sharing: Sharing,
    ) -> ParameterId {
        let first = self.values.len();
        let len = cut.rows.len() * cut.cols.len();
        let span = first..first + len;
        self.tensors.push(Parameter { module: module.to_owned(), part, shape, cut, span, sharing });
        for vector in [&mut self.values, &mut self.gradients, &mut self.m, &mut self.v] {
            vector.resize(first + len, 0.0);
        }
        ParameterId(self.tensors.len() - 1)
    }

    /// The tensors, in order.
    pub fn tensors(&self) -> &[Parameter] {
        &self.tensors
    }

    /// A tensor's description.
    pub fn of(&self, id: ParameterId) -> &Parameter {
        &self.tensors[id.0]
    }

    /// A tensor's values on this rank.
    pub fn values_of(&self, id: ParameterId) -> &[f32] {
        &self.values[self.tensors[id.0].span.clone()]
    }

    /// A tensor's gradient on this rank.
    pub fn gradient_of(&mut self, id: ParameterId) -> &mut [f32] {
        &mut self.gradients[self.tensors[id.0].span.clone()]
    }

    /// Values of all whole tensors.
    pub fn whole_len(&self) -> usize {
        self.tensors.iter().map(Parameter::len).sum()
    }

    /// The whole tensors of `local` (a vector of this rank's parts, as `values` is), one
    /// after another, on every rank of the group. Collective.
    pub fn gathered(&self, local: &[f32], group: &dyn TensorComm) -> Vec<f32> {
        // Each value is on one rank that adds it to zeros, or taken from the first rank.
        let mut whole = vec![0.0; self.whole_len()];
        let mut first = 0;
        for tensor in &self.tensors {
            let all = &mut whole[first..first + tensor.len()];
            if tensor.sharing == Sharing::Sharded || group.rank() == 0 {
                tensor.gather_into(&local[tensor.span.clone()], all);
            }
            first += tensor.len();
        }
        if group.size() > 1 {
            group.all_reduce_sum(&mut whole);
        }
        whole
    }

    /// This rank's parts of the whole tensors `whole`, as [`Parameters::gathered`] has them.
    ///
    /// # Panics
    /// If the length is another.
    pub fn scattered(&self, whole: &[f32]) -> Vec<f32> {
        assert_eq!(whole.len(), self.whole_len());
        let mut local = vec![0.0; self.values.len()];
        let mut first = 0;
        for tensor in &self.tensors {
            let all = &whole[first..first + tensor.len()];
            tensor.scatter_from(all, &mut local[tensor.span.clone()]);
            first += tensor.len();
        }
        local
    }

    /// Draws every A: uniform in ±1/√in (`kaiming_uniform_(a=√5)`, as PEFT begins), each
    /// value from the seed, the tensor's name and its place in the whole. B stays zero.
    pub fn draw(&mut self, seed: u64) {
        for tensor in self.tensors.iter().filter(|tensor| tensor.part == Part::A) {
            let bound = 1.0 / (tensor.shape[1] as f32).sqrt();
            let key = key_of(seed, &tensor.name());
            let width = tensor.cut.cols.len();
            let local = &mut self.values[tensor.span.clone()];
            for (to, from) in tensor.runs() {
                for (i, value) in local[to..to + width].iter_mut().enumerate() {
                    *value = bound * (2.0 * uniform(key, (from + i) as u64) - 1.0);
                }
            }
        }
    }

    /// Puts the whole tensors of an adapter in place of the values. `whole_of` gives a
    /// tensor's values.
    ///
    /// # Errors
    /// What `whole_of` says; another number of values.
    pub fn set(&mut self, whole_of: impl Fn(&Parameter) -> Result<Vec<f32>>) -> Result<()> {
        for tensor in &self.tensors {
            let whole = whole_of(tensor)?;
            if whole.len() != tensor.len() {
                return Err(Error::input(format!("{} has another shape", tensor.name())));
            }
            tensor.scatter_from(&whole, &mut self.values[tensor.span.clone()]);
        }
        Ok(())
    }

    /// Sums the gradients that are parts of a sum over the group. Collective.
    pub fn sum_partial_gradients(&mut self, group: &dyn TensorComm) {
        if group.size() == 1 {
            return;
        }
        let summed = |tensor: &&Parameter| tensor.sharing == Sharing::Summed;
        let spans = || self.tensors.iter().filter(summed).map(|tensor| tensor.span.clone());
        let mut parts: Vec<f32> =
            spans().flat_map(|span| self.gradients[span].iter().copied()).collect();
        group.all_reduce_sum(&mut parts);
        let mut first = 0;
        for span in spans() {
            let len = span.len();
            self.gradients[span].copy_from_slice(&parts[first..first + len]);
            first += len;
        }
    }

    /// The norm of all gradients, those of the group's other ranks included. Collective.
    pub fn gradient_norm(&self, group: &dyn TensorComm) -> f64 {
        let squares = |sharded: bool| -> f64 {
            let tensors = self.tensors.iter();
            let tensors = tensors.filter(|t| (t.sharing == Sharing::Sharded) == sharded);
            tensors.map(|tensor| sum_of_squares(&self.gradients[tensor.span.clone()])).sum()
        };
        // As two floats: their sum is exact enough for a norm.
        let own = squares(true);
        let high = own as f32;
        let low = (own - f64::from(high)) as f32;
        let all = match group.size() {
            1 => vec![high, low],
            _ => group.all_gather(&[high, low]),
        };
        let sharded: f64 = all.iter().map(|part| f64::from(*part)).sum();
        // An overflow to infinity in f32 makes `low` a NaN, which is not finite either.
        (sharded + squares(false)).sqrt()
    }
}

/// What draws for a tensor or a module are keyed by.
pub fn key_of(seed: u64, name: &str) -> [u32; 2] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    let hash = hasher.finalize();
    let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|j| hash.as_bytes()[i + j]));
    [word(0), word(4)]
}

/// The uniform draw in [0, 1) of a place, a multiple of 2⁻²⁴.
fn uniform(key: [u32; 2], index: u64) -> f32 {
    let block = index / 4;
    let words = philox4x32([block as u32, (block >> 32) as u32, 0, 0], key);
    (words[(index % 4) as usize] >> 8) as f32 / (1u32 << 24) as f32
}
