//! What layers take their tensors from.

use std::ops::Range;

use super::Checkpoint;
use crate::Result;
use crate::model::config::ModelConfig;
use crate::model::names::Place;
use crate::model::weights::{Weight, WeightDtype};

/// Named tensors of a model of known shape: a checkpoint's, or a look at its headers
/// ([`Preflight`](crate::model::Preflight)).
pub trait Source {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// Whether there is such a tensor.
    fn contains(&self, name: &str) -> bool;

    /// See [`TensorTable::matrix`](super::TensorTable::matrix).
    ///
    /// # Errors
    /// The tensor is missing, has another shape or an unsupported type.
    fn matrix(
        &self,
        place: &Place,
        width: usize,
        cols: Range<usize>,
        dtype: Option<WeightDtype>,
    ) -> Result<Weight>;

    /// See [`TensorTable::vector`](super::TensorTable::vector).
    ///
    /// # Errors
    /// As [`Source::matrix`].
    fn vector(&self, name: &str, len: usize, parts: &[Range<usize>]) -> Result<Vec<f32>>;
}

impl Source for Checkpoint {
    fn config(&self) -> &ModelConfig {
        Checkpoint::config(self)
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors().contains(name)
    }

    fn matrix(
        &self,
        place: &Place,
        width: usize,
        cols: Range<usize>,
        dtype: Option<WeightDtype>,
    ) -> Result<Weight> {
        self.tensors().matrix(place, width, cols, dtype)
    }

    fn vector(&self, name: &str, len: usize, parts: &[Range<usize>]) -> Result<Vec<f32>> {
        self.tensors().vector(name, len, parts)
    }
}
