//! Which evaluation was the best, and when to stop waiting for a better one.

use serde::{Deserialize, Serialize};

/// An evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Optimiser steps before it.
    pub step: u64,
    /// Validation loss.
    pub loss: f64,
}

/// Follows the validation loss; part of a checkpoint's state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// Evaluations in a row without progress after which to stop; never where `None`.
    pub patience: Option<u32>,
    /// Progress is a loss below the last progress by more than this.
    pub min_delta: f64,
    best: Option<Evaluation>,
    /// The loss that the next progress is measured from. Apart from `best`: a loss that
    /// creeps down by less than `min_delta` each time shall still count in the end.
    mark: Option<f64>,
    without_progress: u32,
}

impl EarlyStopping {
    /// Nothing evaluated yet.
    pub fn new(patience: Option<u32>, min_delta: f64) -> Self {
        Self { patience, min_delta, ..Self::default() }
    }

    /// Takes an evaluation; true if it is the best so far. A loss that is not finite is none.
    pub fn update(&mut self, step: u64, loss: f64) -> bool {
        let loss = if loss.is_finite() { loss } else { f64::INFINITY };
        if self.mark.map_or(loss.is_finite(), |mark| loss < mark - self.min_delta) {
            self.mark = Some(loss);
            self.without_progress = 0;
        } else {
            self.without_progress = self.without_progress.saturating_add(1);
        }
        let is_best = self.best.map_or(loss.is_finite(), |best| loss < best.loss);
        if is_best {
            self.best = Some(Evaluation { step, loss });
        }
        is_best
    }

    /// The evaluation with the lowest loss; the first one of equals.
    pub fn best(&self) -> Option<Evaluation> {
        self.best
    }

    /// True once `patience` evaluations in a row made no progress.
    pub fn should_stop(&self) -> bool {
        self.patience.is_some_and(|patience| self.without_progress >= patience.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(patience: Option<u32>, min_delta: f64, losses: &[f64]) -> (Vec<bool>, EarlyStopping) {
        let mut stopping = EarlyStopping::new(patience, min_delta);
        let best = losses.iter().zip(1..).map(|(&loss, step)| stopping.update(step, loss));
        (best.collect(), stopping)
    }

    #[test]
    fn stops_after_so_many_evaluations_without_progress() {
        let (best, stopping) = after(Some(2), 0.0, &[3.0, 2.0, 2.5, 1.5, 1.5]);
        assert_eq!(best, [true, true, false, true, false]);
        assert!(!stopping.should_stop());
        let (_, stopping) = after(Some(2), 0.0, &[3.0, 2.0, 2.5, 2.0]);
        assert!(stopping.should_stop());
        assert_eq!(stopping.best(), Some(Evaluation { step: 2, loss: 2.0 }));
        assert!(!after(None, 0.0, &[1.0; 50]).1.should_stop());
    }

    /// Small steps down are the best each time, and progress once they add up.
    #[test]
    fn min_delta_is_measured_from_the_last_progress() {
        let (best, stopping) = after(Some(3), 0.25, &[2.0, 1.9, 1.8, 1.7, 1.6]);
        assert_eq!(best, [true; 5]);
        assert!(!stopping.should_stop());
        assert!(after(Some(3), 0.25, &[2.0, 1.9, 1.9, 1.8]).1.should_stop());
    }

    #[test]
    fn a_loss_that_is_not_finite_is_never_the_best() {
        let (best, stopping) = after(Some(3), 0.0, &[f64::NAN, 4.0, f64::INFINITY, f64::NAN]);
        assert_eq!(best, [false, true, false, false]);
        assert_eq!(stopping.best().unwrap().step, 2);
        assert!(!stopping.should_stop());
        assert!(after(Some(2), 0.0, &[f64::NAN; 2]).1.should_stop());
    }

    /// A resumed run waits no longer than an uninterrupted one.
    #[test]
    fn it_goes_through_a_checkpoint() {
        let (_, mut stopping) = after(Some(2), 0.1, &[1.0 / 3.0, 0.4]);
        let text = serde_json::to_string(&stopping).unwrap();
        let mut again: EarlyStopping = serde_json::from_str(&text).unwrap();
        assert_eq!(again, stopping);
        assert_eq!((again.update(9, 0.4), stopping.update(9, 0.4)), (false, false));
        assert!(again.should_stop() && stopping.should_stop());
    }
}
