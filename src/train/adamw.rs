//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019), and clipping by the global
//! norm.
//!
//! Both work on flat slices of one tensor, in the order of operations of torch's
//! `_single_tensor_adam` and `clip_grad_norm_`. No result depends on the threads: a step is
//! elementwise, and sums go over fixed chunks.

use rayon::prelude::*;

/// Elements that a thread takes at a time; also the chunks of a sum, so it decides its bits.
const CHUNK: usize = 1 << 14;
/// Partial sums kept side by side in a chunk: what the compiler makes vectors of.
const LANES: usize = 16;

/// The optimiser's settings; its state are the moments `m` and `v` beside each tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of their squares.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Share of each value that is taken away a step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl AdamW {
    /// Step `t` (1 is the first) for one tensor: `values` move against `gradients`, `m` and
    /// `v` are its moments, zeros before the first step.
    pub fn step(
        &self,
        t: u64,
        learning_rate: f64,
        values: &mut [f32],
        gradients: &[f32],
        m: &mut [f32],
        v: &mut [f32],
    ) {
        assert!(t >= 1 && [gradients.len(), m.len(), v.len()] == [values.len(); 3]);
        // Scalars in f64 and rounded once, as Python hands them to torch.
        let correction = |beta: f64| 1.0 - beta.powi(t.min(i32::MAX as u64) as i32);
        let kept = (1.0 - learning_rate * self.weight_decay) as f32;
        let new1 = (1.0 - self.beta1) as f32;
        let (old2, new2) = (self.beta2 as f32, (1.0 - self.beta2) as f32);
        let step_size = (-learning_rate / correction(self.beta1)) as f32;
        let root = correction(self.beta2).sqrt() as f32;
        let eps = self.eps as f32;
        let chunks = values.par_chunks_mut(CHUNK).zip(gradients.par_chunks(CHUNK));
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        chunks.zip(moments).for_each(|((values, gradients), (m, v))| {
            let moments = m.iter_mut().zip(v);
            for ((value, &g), (m, v)) in values.iter_mut().zip(gradients).zip(moments) {
                *m += new1 * (g - *m);
                *v = *v * old2 + new2 * g * g;
                *value = *value * kept + step_size * (*m / (v.sqrt() / root + eps));
            }
        });
    }
}

/// The sum of the squares of `values`, in f64.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let of_chunk = |chunk: &[f32]| {
        let mut lanes = [0.0f64; LANES];
        let (whole, rest) = chunk.as_chunks::<LANES>();
        for values in whole {
            for (sum, &x) in lanes.iter_mut().zip(values) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        let rest: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        lanes.iter().sum::<f64>() + rest
    };
    // Collected first: added up in the chunks' order, whoever was ready when.
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(of_chunk).collect();
    sums.iter().sum()
}

/// What gradients of global norm `norm` are multiplied with so that it is at most `max_norm`;
/// 1 where that is 0 (no clipping), as in transformers. A norm that is not finite says
/// nothing about the gradients: such a step is left out, not clipped.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values after 10 steps of torch.optim.AdamW (2.15, CPU) with lr 0.01/t, weight decay 0.1
    /// and the values and gradients that the test makes again.
    const TORCH: [f32; 19] = [
        -0.48485678,
        -0.20650972,
        0.11693822,
        0.45499828,
        -0.3078484,
        -0.017894838,
        0.32976878,
        -0.42476937,
        -0.1409232,
        0.17494647,
        0.5102576,
        -0.2612045,
        0.052124936,
        0.390317,
        -0.38123435,
        -0.0676092,
        0.26547915,
        -0.4911926,
        -0.20290397,
    ];

    #[test]
    fn ten_steps_are_those_of_torch() {
        let count = TORCH.len();
        let mut values: Vec<f32> = (0..count).map(|i| ((i * 5 % 17) as f32 - 8.0) / 16.0).collect();
        let (mut m, mut v) = (vec![0.0; count], vec![0.0; count]);
        let optimizer = AdamW { weight_decay: 0.1, ..AdamW::default() };
        for t in 1..=10u64 {
            let gradient = |i: usize| {
                (((i * 7 + t as usize * 5) % 23) as f32 - 11.0) / 8.0 * (1 + i % 3) as f32
            };
            let gradients: Vec<f32> = (0..count).map(gradient).collect();
            optimizer.step(t, 1e-2 / t as f64, &mut values, &gradients, &mut m, &mut v);
        }
        for (value, torch) in values.iter().zip(TORCH) {
            assert!((value - torch).abs() <= 1e-6 * torch.abs(), "{value} {torch}");
        }
    }

    /// Replicas hold the same adapters only if no bit depends on how a rank splits its work.
    #[test]
    fn threads_do_not_change_bits() {
        let gradients: Vec<f32> =
            (0..5 * CHUNK + 7).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut values = gradients.clone();
                let (mut m, mut v) = (vec![0.0; values.len()], vec![0.0; values.len()]);
                for t in 1..=3 {
                    AdamW::default().step(t, 1e-3, &mut values, &gradients, &mut m, &mut v);
                }
                (sum_of_squares(&gradients).to_bits(), values, m, v)
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn the_sum_of_squares_is_exact_where_f64_is() {
        let values: Vec<f32> = (0..2 * CHUNK + 5).map(|i| (i % 100) as f32).collect();
        let sum: u64 = (0..2 * CHUNK as u64 + 5).map(|i| (i % 100) * (i % 100)).sum();
        assert_eq!(sum_of_squares(&values), sum as f64);
        assert_eq!(sum_of_squares(&[]), 0.0);
        assert!(!sum_of_squares(&[1.0, f32::NAN]).is_finite());
    }

    #[test]
    fn clipping_never_enlarges() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), (1.0 / 4.000001) as f32);
        assert_eq!(clip_factor(4.0, 0.0), 1.0);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
    }
}
