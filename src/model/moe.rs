//! Routed experts: a router picks a few of many MLPs for each token, and the output is
//! the weighted sum of theirs (Shazeer et al. 2017; MixtralSparseMoeBlock and
//! Qwen3MoeSparseMoeBlock in transformers).
//!
//! ```text
//! p = softmax(x · routerᵀ)          over all experts
//! y = Σ_e w_e · down_e(act(gate_e(x)) · up_e(x))     over the top experts of p
//! w = p, or p / Σ p over the top experts
//! ```
//!
//! Each rank of a tensor-parallel group has whole experts; all have the router, whose
//! choice has the same bits everywhere. Experts that nobody chose cost nothing.
//!
//! Left out: shared experts, grouped routing, and limits on an expert's tokens.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::adapter::RowAdapters;
use super::config::ExpertsConfig;
use super::layers::ColumnParallelLinear;
use super::ops;
use super::weights::Weight;
use crate::Result;
use crate::comm::TensorComm;
use crate::kernels::ops::{self as kernel, Activation};

/// One expert.
pub struct ExpertWeights {
    /// `[moe_intermediate_size, hidden]`.
    pub gate: ColumnParallelLinear,
    /// `[moe_intermediate_size, hidden]`.
    pub up: ColumnParallelLinear,
    /// `[hidden, moe_intermediate_size]`.
    pub down: ColumnParallelLinear,
}

/// A layer's router, and the experts of this rank.
pub struct Experts {
    pub(super) router: ColumnParallelLinear,
    /// Experts of this rank, by number; `weights` holds them in that order.
    pub(super) mine: Range<usize>,
    pub(super) weights: Vec<ExpertWeights>,
    pub(super) per_token: usize,
    pub(super) norm_topk_prob: bool,
    pub(super) activation: Activation,
    comm: Arc<dyn TensorComm>,
}

impl Experts {
    /// `router` is `[num_experts, hidden]`, `weights` are those of the experts `mine`.
    ///
    /// # Panics
    /// If they do not fit the configuration (a bug, not bad input).
    pub fn new(
        router: ColumnParallelLinear,
        mine: Range<usize>,
        weights: Vec<ExpertWeights>,
        config: &ExpertsConfig,
        activation: Activation,
        comm: Arc<dyn TensorComm>,
    ) -> Self {
        assert_eq!(router.weight().rows(), config.num_experts);
        assert!(mine.end <= config.num_experts && mine.len() == weights.len());
        assert!((1..=config.num_experts).contains(&config.num_experts_per_tok));
        Self {
            router,
            mine,
            weights,
            per_token: config.num_experts_per_tok,
            norm_topk_prob: config.norm_topk_prob,
            activation,
            comm,
        }
    }

    /// `[m, hidden]` → the same, on every rank.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        let (m, hidden) = x.dims2()?;
        let mut out = vec![0.0; m * hidden];
        // In the experts' order, so that a row's sum does not depend on the other rows.
        for (expert, chosen) in self.weights.iter().zip(self.route(x, adapters)?) {
            if chosen.is_empty() {
                continue;
            }
            let rows: Vec<usize> = chosen.iter().map(|(row, _)| *row).collect();
            let y = self.pass(expert, &ops::select_rows(x, &rows)?, &adapters.among(&rows))?;
            for ((row, weight), y) in chosen.into_iter().zip(y.chunks_exact(hidden)) {
                let out = &mut out[row * hidden..][..hidden];
                out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
            }
        }
        self.comm.all_reduce_sum(&mut out);
        Ok(out)
    }

    /// The matrices of this rank, the router among them.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        let experts = self.weights.iter().flat_map(|w| [&w.gate, &w.up, &w.down]);
        std::iter::once(&self.router).chain(experts).map(ColumnParallelLinear::weight)
    }

    /// For each expert of this rank the rows of `x` that chose it, and its weight there.
    fn route(&self, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<Vec<(usize, f32)>>> {
        let mut scores = self.router.forward(x, adapters)?;
        let num_experts = self.router.weight().rows();
        kernel::softmax(&mut scores, num_experts);
        let mut chosen = vec![Vec::new(); self.mine.len()];
        for (row, scores) in scores.chunks_exact(num_experts).enumerate() {
            let top = top_k(scores, self.per_token);
            let sum: f32 = top.iter().map(|(_, score)| score).sum();
            for (expert, score) in top {
                if self.mine.contains(&expert) {
                    let weight = if self.norm_topk_prob { score / sum } else { score };
                    chosen[expert - self.mine.start].push((row, weight));
                }
            }
        }
        Ok(chosen)
    }

    fn pass(&self, expert: &ExpertWeights, x: &Tensor, adapters: &RowAdapters) -> Result<Vec<f32>> {
        let gate = expert.gate.forward(x, adapters)?;
        let up = expert.up.forward(x, adapters)?;
        let inner = ops::gated(self.activation, &gate, &up, expert.up.weight().rows())?;
        expert.down.forward(&inner, adapters)
    }
}

/// The `k` largest scores and where they are, largest first; of equals the first.
fn top_k(scores: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<(usize, f32)> = scores.iter().copied().enumerate().collect();
    // A stable sort; a router has few experts.
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    order.truncate(k);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{HostTensorComm, LocalComm, NoTensorComm};
    use crate::kernels::tests::random;

    const HIDDEN: usize = 20;
    const INNER: usize = 12;
    const EXPERTS: usize = 7;

    /// Parts 0 to 2 are gate, up and down of `expert`; 3 is the router.
    fn values(part: usize, expert: usize) -> Vec<f32> {
        let len = if part == 3 { EXPERTS * HIDDEN } else { INNER * HIDDEN };
        random(len, (1 + part * 100 + expert) as u64)
    }

    fn experts(
        mine: Range<usize>,
        per_token: usize,
        norm_topk_prob: bool,
        comm: Arc<dyn TensorComm>,
    ) -> Experts {
        let config = ExpertsConfig {
            num_experts: EXPERTS,
            num_experts_per_tok: per_token,
            moe_intermediate_size: INNER,
            norm_topk_prob,
            dense_layers: Default::default(),
        };
        let weights = mine.clone().map(|e| ExpertWeights {
            gate: Weight::from_f32(INNER, HIDDEN, values(0, e)).into(),
            up: Weight::from_f32(INNER, HIDDEN, values(1, e)).into(),
            down: Weight::from_f32(HIDDEN, INNER, values(2, e)).into(),
        });
        let router = Weight::from_f32(EXPERTS, HIDDEN, values(3, 0));
        Experts::new(
            router.into(),
            mine.clone(),
            weights.collect(),
            &config,
            Activation::Silu,
            comm,
        )
    }

    fn whole(per_token: usize, norm_topk_prob: bool) -> Experts {
        experts(0..EXPERTS, per_token, norm_topk_prob, Arc::new(NoTensorComm))
    }

    fn forward(experts: &Experts, x: &[f32]) -> Vec<f32> {
        let x = ops::from_values(x.to_vec(), HIDDEN).unwrap();
        experts.forward(&x, &RowAdapters::default()).unwrap()
    }

    fn times(w: &[f32], x: &[f64]) -> Vec<f64> {
        w.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
    }

    /// One row by the formula, every expert computed.
    fn reference(x: &[f32], per_token: usize, norm_topk_prob: bool) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let scores: Vec<f64> = times(&values(3, 0), &x).into_iter().map(f64::exp).collect();
        let total: f64 = scores.iter().sum();
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[per_token - 1];
        let divisor = if norm_topk_prob { sorted[..per_token].iter().sum() } else { total };
        let mut out = vec![0.0; HIDDEN];
        for e in (0..EXPERTS).filter(|e| scores[*e] >= least) {
            let gate = times(&values(0, e), &x);
            let up = times(&values(1, e), &x);
            let inner: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            for (out, y) in out.iter_mut().zip(times(&values(2, e), &inner)) {
                *out += scores[e] / divisor * y;
            }
        }
        out
    }

    #[test]
    fn equal_the_formula_alone_and_bit_for_bit_in_a_batch() {
        let x = random(9 * HIDDEN, 77);
        for (per_token, norm_topk_prob) in [(1, true), (2, true), (2, false), (EXPERTS, false)] {
            let experts = whole(per_token, norm_topk_prob);
            let all = forward(&experts, &x);
            for (x, out) in x.chunks(HIDDEN).zip(all.chunks(HIDDEN)) {
                assert_eq!(forward(&experts, x), out);
                for (got, want) in out.iter().zip(reference(x, per_token, norm_topk_prob)) {
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
                }
            }
        }
        assert!(forward(&whole(2, true), &[]).is_empty());
    }

    #[test]
    fn split_over_ranks_they_sum_to_the_same() {
        let x = random(5 * HIDDEN, 78);
        let alone = forward(&whole(2, true), &x);
        for size in [2, 3, 4, 7] {
            let outputs = LocalComm::run(size, |comm| {
                let at = |rank: usize| rank * EXPERTS / size;
                let mine = at(comm.rank())..at(comm.rank() + 1);
                forward(&experts(mine, 2, true, Arc::new(HostTensorComm::new(comm))), &x)
            });
            for out in &outputs {
                assert_eq!(out, &outputs[0]);
                assert!(out.iter().zip(&alone).all(|(a, b)| (a - b).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn of_equal_scores_the_first_are_chosen() {
        assert_eq!(top_k(&[0.1, 0.3, 0.2, 0.3, 0.3], 2), [(1, 0.3), (3, 0.3)]);
        assert_eq!(top_k(&[0.5, f32::NAN], 2).len(), 2);
    }
}
