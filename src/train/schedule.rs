//! The learning rate over the run: transformers' `get_{constant,linear,cosine}_schedule_with_warmup`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// It stays.
    Constant,
    /// Down to 0 in a straight line.
    Linear,
    /// Down to 0 along half a cosine.
    #[default]
    Cosine,
}

/// The learning rate as a function of the optimiser step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// The learning rate at the end of the warm-up.
    pub peak: f64,
    /// Steps from 0 up to the peak, in a straight line.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// A schedule whose warm-up is a share of the run, rounded up as transformers does it.
    pub fn new(kind: ScheduleKind, peak: f64, warmup_ratio: f64, total_steps: u64) -> Self {
        let warmup_steps = (total_steps as f64 * warmup_ratio.clamp(0.0, 1.0)).ceil() as u64;
        Self { kind, peak, warmup_steps, total_steps }
    }

    /// The learning rate that step `step` uses; the first step is 0, and with a warm-up its
    /// rate is 0. Steps after the last one have the rate of the end.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.peak * self.factor(step.min(self.total_steps))
    }

    fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            ScheduleKind::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / decay_steps;
                0.5 * (1.0 + (PI * progress).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures are those of transformers 5.23 for 10 steps, 3 of them warm-up.
    #[test]
    fn rates_are_those_of_transformers() {
        let cases = [
            (ScheduleKind::Constant, [1.0; 7]),
            (
                ScheduleKind::Linear,
                [
                    1.0,
                    0.8571428571428571,
                    0.7142857142857143,
                    0.5714285714285714,
                    0.42857142857142855,
                    0.2857142857142857,
                    0.14285714285714285,
                ],
            ),
            (
                ScheduleKind::Cosine,
                [
                    1.0,
                    0.9504844339512095,
                    0.8117449009293668,
                    0.6112604669781572,
                    0.3887395330218429,
                    0.1882550990706332,
                    0.04951556604879043,
                ],
            ),
        ];
        for (kind, after) in cases {
            let schedule = Schedule { kind, peak: 2.0, warmup_steps: 3, total_steps: 10 };
            for (step, factor) in [0.0, 1.0 / 3.0, 2.0 / 3.0].into_iter().chain(after).enumerate() {
                let rate = schedule.learning_rate(step as u64);
                assert!((rate - 2.0 * factor).abs() < 1e-15, "{kind:?} {step}: {rate}");
            }
        }
    }

    /// Settings at the edge (no step, warm-up all the way) give a rate all the same.
    #[test]
    fn odd_lengths_give_finite_rates() {
        for kind in [ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine] {
            for (ratio, total) in [(0.0, 0), (0.0, 1), (1.0, 7), (2.0, 7), (0.03, 50), (0.5, 1)] {
                let schedule = Schedule::new(kind, 1e-3, ratio, total);
                assert!(schedule.warmup_steps <= total);
                for step in [0, 1, total, total + 5] {
                    assert!((0.0..=1e-3).contains(&schedule.learning_rate(step)));
                }
            }
        }
        assert_eq!(Schedule::new(ScheduleKind::Cosine, 1.0, 0.03, 50).warmup_steps, 2);
    }
}
