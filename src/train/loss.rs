//! Cross-entropy over the vocabulary, some rows at a time: logits of all rows would take
//! more memory than the model (2 × 2,048 rows over 128,256 tokens: 2.1 GB, several times).
//!
//! Loss and gradient come from one pass, since what a row counts is known before: one over
//! all counted tokens of the optimiser step. The vocabulary is split over the group, whose
//! ranks exchange three numbers a row.

use std::ops::Range;

use rayon::prelude::*;

use super::linear::{Linear, Tokens};
use super::parameters::Parameters;
use crate::comm::TensorComm;
use crate::kernels::ops as kernel;

/// Logits that are held at once.
const LOGITS_AT_ONCE: usize = 4 << 20;
/// Rows at once at least, or the matrix would be streamed for too few.
const ROWS_MIN: usize = 32;

/// Rows whose logits over `ids` tokens are held at once.
pub fn rows_at_once(ids: usize) -> usize {
    (LOGITS_AT_ONCE / ids.max(1)).max(ROWS_MIN)
}

/// The way from the last hidden states to the loss.
pub struct LossHead {
    /// `[ids, hidden]`, this rank's.
    pub linear: Linear,
    /// The tokens that this rank has the logits of.
    pub ids: Range<usize>,
    /// Logits become `cap · tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

/// What is summed over the rows.
pub struct Loss {
    /// Σ −ln p(target), not weighted.
    pub sum: f64,
    /// The gradient of `weight` times the sum, `[rows, hidden]`; empty if it was not asked for.
    pub dx: Vec<f32>,
}

/// How a row's logits on this rank lie to the others'.
#[derive(Clone, Copy)]
pub(super) struct RowSums {
    max: f32,
    /// Σ exp(logit − max).
    sum: f32,
    /// The target's logit, if it is this rank's, else 0.
    target: f32,
}

impl RowSums {
    /// From three numbers a row.
    pub(super) fn of(flat: &[f32]) -> Vec<Self> {
        let sums = flat.as_chunks::<3>().0.iter();
        sums.map(|[max, sum, target]| Self { max: *max, sum: *sum, target: *target }).collect()
    }
}

impl LossHead {
    /// The loss of predicting `targets` from the rows `x`, which are normed; with `weight`
    /// the gradient too, and those of the head's trained tensors are added to theirs.
    /// Collective.
    pub fn run(
        &self,
        p: &mut Parameters,
        group: &dyn TensorComm,
        x: &[f32],
        targets: &[u32],
        tokens: &Tokens,
        weight: Option<f32>,
    ) -> Loss {
        let width = self.linear.inputs();
        let rows = rows_at_once(self.ids.len());
        let mut loss = Loss { sum: 0.0, dx: Vec::new() };
        if weight.is_some() {
            loss.dx.resize(x.len(), 0.0);
        }
        for first in (0..targets.len()).step_by(rows) {
            let rows = first..(first + rows).min(targets.len());
            let values = rows.start * width..rows.end * width;
            let tokens = Tokens {
                training: tokens.training,
                numbers: tokens.numbers[rows.clone()].to_vec(),
            };
            let (x, targets) = (&x[values.clone()], &targets[rows]);
            let (mut logits, kept) = self.linear.forward(p, x, &tokens);
            loss.sum += self.losses(group, &mut logits, targets, weight);
            if weight.is_some() {
                let dx = &mut loss.dx[values];
                self.linear.backward(p, x, &kept, &logits, &tokens, Some(dx));
            }
        }
        if group.size() > 1 {
            group.all_reduce_sum(&mut loss.dx);
        }
        loss
    }

    /// The sum of the rows' losses; with `weight` the logits become their gradients.
    fn losses(
        &self,
        group: &dyn TensorComm,
        logits: &mut [f32],
        targets: &[u32],
        weight: Option<f32>,
    ) -> f64 {
        let cols = self.ids.len();
        if let Some(cap) = self.softcap {
            kernel::softcap(logits, cap);
        }
        let capped = self.softcap.map(|_| logits.to_vec());
        let own = |target: &u32| {
            let id = *target as usize;
            self.ids.contains(&id).then(|| id - self.ids.start)
        };
        let sums: Vec<RowSums> = logits
            .par_chunks_exact_mut(cols)
            .zip(targets)
            .map(|(row, target)| exponentials(row, own(target)))
            .collect();
        let all = Everyones::new(group, &sums);
        if let Some(weight) = weight {
            logits.par_chunks_exact_mut(cols).zip(targets).enumerate().for_each(
                |(i, (row, target))| {
                    let factor = weight * all.share_of(i, sums[i].max);
                    row.iter_mut().for_each(|e| *e *= factor);
                    if let Some(target) = own(target) {
                        row[target] -= weight;
                    }
                },
            );
            if let (Some(capped), Some(cap)) = (capped, self.softcap) {
                let slope = |y: f32| 1.0 - (y / cap) * (y / cap);
                logits.iter_mut().zip(capped).for_each(|(d, y)| *d *= slope(y));
            }
        }
        (0..targets.len()).map(|row| all.loss(row)).sum()
    }
}

/// Replaces a row by the exponentials of its distances to its largest value.
fn exponentials(row: &mut [f32], target: Option<usize>) -> RowSums {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let target = target.map_or(0.0, |target| row[target]);
    let sum = kernel::exp_of_distances(row, max);
    RowSums { max, sum, target }
}

/// The sums of the whole vocabulary, a row each.
pub(super) struct Everyones(pub(super) Vec<RowSums>);

impl Everyones {
    fn new(group: &dyn TensorComm, own: &[RowSums]) -> Self {
        let own = Self(own.to_vec());
        match group.size() {
            1 => own,
            _ => Self::joined(&group.all_gather(&own.flat()), own.0.len()),
        }
    }

    /// From the ranks' sums of as many rows, one rank after another.
    pub(super) fn joined(all: &[f32], rows: usize) -> Self {
        let ranks: Vec<Vec<RowSums>> = all.chunks(3 * rows.max(1)).map(RowSums::of).collect();
        let of_row = |row: usize| {
            let parts = || ranks.iter().map(|rank| rank[row]);
            let max = parts().map(|s| s.max).fold(f32::NEG_INFINITY, f32::max);
            let sum = parts().map(|s| s.sum * (s.max - max).exp()).sum();
            RowSums { max, sum, target: parts().map(|s| s.target).sum() }
        };
        Self((0..rows).map(of_row).collect())
    }

    /// Three numbers a row.
    pub(super) fn flat(&self) -> Vec<f32> {
        self.0.iter().flat_map(|s| [s.max, s.sum, s.target]).collect()
    }

    /// What exponentials of distances to `max` are multiplied by to be probabilities.
    fn share_of(&self, row: usize, max: f32) -> f32 {
        (max - self.0[row].max).exp() / self.0[row].sum
    }

    pub(super) fn loss(&self, row: usize) -> f64 {
        let RowSums { max, sum, target } = self.0[row];
        f64::from(sum).ln() + f64::from(max) - f64::from(target)
    }
}

#[cfg(test)]
mod tests;
