//! Causal attention over the paged KV cache, prefill and decode alike.
//!
//! A block holds 16 tokens: keys as `[head_dim][16]` (so that one vector is one
//! dimension of 16 keys and no sum crosses lanes), values as `[16][head_dim]`.
//! For each query and head the scores, their maximum, their sum and the weighted
//! values run over the keys in position order, so the bits do not depend on the
//! prefill's chunks or on the batch.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed in two dimensions at once")]

use std::cell::RefCell;

use super::parallel::{self, SharedMut};
use super::simd::{self, LANES, Simd};
use super::{Tier, dispatch, tier};

/// Tokens of a KV cache block.
pub const BLOCK_SIZE: usize = LANES;

/// Shape of the heads on this rank.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; any even number.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl Heads {
    /// f32 values of one block of keys (or of values) in one layer.
    pub fn block_len(&self) -> usize {
        self.kv_heads * self.head_dim * BLOCK_SIZE
    }
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// First row of the sequence in `q`.
    pub first: usize,
    /// Number of rows.
    pub len: usize,
    /// Position of the first row.
    pub start_position: usize,
    /// Blocks that hold positions `0..start_position + len`.
    pub block_table: &'a [u32],
}

/// Writes the new keys and values `[rows, kv_heads * head_dim]` of one sequence
/// into its blocks.
pub fn write_kv(
    h: Heads,
    rows: Rows<'_>,
    k: &[f32],
    v: &[f32],
    keys: &mut [f32],
    values: &mut [f32],
) {
    let width = h.kv_heads * h.head_dim;
    for r in 0..rows.len {
        let position = rows.start_position + r;
        let block = rows.block_table[position / BLOCK_SIZE] as usize * h.block_len();
        let slot = position % BLOCK_SIZE;
        let row = (rows.first + r) * width;
        for head in 0..h.kv_heads {
            let base = block + head * h.head_dim * BLOCK_SIZE;
            let from = row + head * h.head_dim;
            for (d, k) in k[from..from + h.head_dim].iter().enumerate() {
                keys[base + d * BLOCK_SIZE + slot] = *k;
            }
            values[base + slot * h.head_dim..][..h.head_dim]
                .copy_from_slice(&v[from..from + h.head_dim]);
        }
    }
}

/// Queries of one tile: heads of one KV group times consecutive rows.
const TILE: usize = 4;

/// Attention of all rows of a step: `q` and `out` are `[rows, heads * head_dim]`;
/// `keys` and `values` are one layer's cache, the new rows written already.
pub fn paged_attention(
    h: Heads,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    sequences: &[Rows<'_>],
    out: &mut [f32],
) {
    paged_attention_in_tier(tier(), h, q, keys, values, sequences, out);
}

fn paged_attention_in_tier(
    tier: Tier,
    h: Heads,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    sequences: &[Rows<'_>],
    out: &mut [f32],
) {
    assert_eq!(q.len(), out.len());
    let group = h.heads / h.kv_heads;
    let rows_a_task = 16;
    let mut tasks = Vec::new();
    let mut flops = 0;
    for (s, rows) in sequences.iter().enumerate() {
        let context = rows.start_position + rows.len;
        assert!(rows.block_table.len() * BLOCK_SIZE >= context);
        flops += 4 * rows.len * h.heads * h.head_dim * context;
        for first in (0..rows.len).step_by(rows_a_task) {
            tasks.extend((0..h.kv_heads).map(|kv_head| (s, first, kv_head)));
        }
    }
    let shared = SharedMut::new(out);
    parallel::for_each(tasks.len(), flops, |t| {
        let (s, first, kv_head) = tasks[t];
        let rows = sequences[s];
        let count = rows_a_task.min(rows.len - first) * group;
        for start in (0..count).step_by(TILE) {
            let queries: [Option<Query>; TILE] = std::array::from_fn(|i| {
                let i = start + i;
                (i < count).then(|| Query {
                    offset: ((rows.first + first + i / group) * h.heads
                        + kv_head * group
                        + i % group)
                        * h.head_dim,
                    context: rows.start_position + first + i / group + 1,
                })
            });
            let job = Job {
                h,
                q,
                keys,
                values,
                kv_head,
                block_table: rows.block_table,
                queries: &queries,
                out: shared,
            };
            SCRATCH.with_borrow_mut(|scores| {
                let job = &job;
                dispatch!(tier, attend, job: &Job<'_>, scores: &mut Vec<f32>);
            });
        }
    });
}

thread_local! {
    /// Scores of a tile's queries over the whole context.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Clone, Copy)]
struct Query {
    /// Start of the head's values in `q` and `out`.
    offset: usize,
    /// Keys that the query sees.
    context: usize,
}

struct Job<'a> {
    h: Heads,
    q: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    kv_head: usize,
    block_table: &'a [u32],
    queries: &'a [Option<Query>; TILE],
    out: SharedMut<f32>,
}

impl Job<'_> {
    /// Start of block `b` of the sequence, for this KV head, in keys and values.
    #[inline(always)]
    fn block(&self, b: usize) -> usize {
        self.block_table[b] as usize * self.h.block_len()
            + self.kv_head * self.h.head_dim * BLOCK_SIZE
    }
}

#[inline(always)]
unsafe fn attend<S: Simd>(job: &Job<'_>, scores: &mut Vec<f32>) {
    let live = job.queries.iter().flatten().count();
    let context = job.queries.iter().flatten().map(|q| q.context).max().unwrap_or(0);
    let padded = context.next_multiple_of(BLOCK_SIZE);
    if scores.len() < padded * TILE {
        scores.resize(padded * TILE, 0.0);
    }
    // SAFETY: features by the dispatcher; the blocks hold `context` tokens (asserted
    // by the caller), `scores` holds TILE rows of `padded`.
    unsafe {
        match live {
            4 => attend_queries::<S, 4>(job, scores, padded),
            3 => attend_queries::<S, 3>(job, scores, padded),
            2 => attend_queries::<S, 2>(job, scores, padded),
            _ => attend_queries::<S, 1>(job, scores, padded),
        }
    }
}

#[inline(always)]
unsafe fn attend_queries<S: Simd, const Q: usize>(
    job: &Job<'_>,
    scores: &mut [f32],
    padded: usize,
) {
    let queries: [Query; Q] =
        std::array::from_fn(|i| job.queries[i].unwrap_or(Query { offset: 0, context: 0 }));
    let blocks = padded / BLOCK_SIZE;
    // SAFETY: see `attend`.
    unsafe {
        let mut b = 0;
        while b < blocks {
            if b + 2 <= blocks {
                score_blocks::<S, Q, 2>(job, &queries, b, padded, scores);
                b += 2;
            } else {
                score_blocks::<S, Q, 1>(job, &queries, b, padded, scores);
                b += 1;
            }
        }
        let sums: [f32; Q] = std::array::from_fn(|i| {
            let row = &mut scores[i * padded..(i + 1) * padded];
            softmax_numerators::<S>(row, queries[i].context)
        });
        weigh_values::<S, Q>(job, &queries, &sums, padded, scores);
    }
}

/// Scores of `B` blocks of keys for `Q` queries; each score is one chain of fused
/// multiply-adds over the head's dimensions.
#[inline(always)]
unsafe fn score_blocks<S: Simd, const Q: usize, const B: usize>(
    job: &Job<'_>,
    queries: &[Query; Q],
    first: usize,
    padded: usize,
    scores: &mut [f32],
) {
    // SAFETY: see `attend`.
    unsafe {
        let keys: [*const f32; B] =
            std::array::from_fn(|b| job.keys.as_ptr().add(job.block(first + b)));
        let q: [*const f32; Q] = std::array::from_fn(|i| job.q.as_ptr().add(queries[i].offset));
        let mut acc = [[S::splat(0.0); B]; Q];
        for d in 0..job.h.head_dim {
            let k: [S::V; B] = std::array::from_fn(|b| S::load(keys[b].add(d * BLOCK_SIZE)));
            for i in 0..Q {
                let q = S::splat(*q[i].add(d));
                for b in 0..B {
                    acc[i][b] = S::fma(q, k[b], acc[i][b]);
                }
            }
        }
        for i in 0..Q {
            for b in 0..B {
                let at = i * padded + (first + b) * BLOCK_SIZE;
                let scaled = S::mul(acc[i][b], S::splat(job.h.scale));
                S::store(scores.as_mut_ptr().add(at), scaled);
            }
        }
    }
}

/// Turns scores into `e^(score - max)`, zero beyond `context`, and returns their sum.
#[inline(always)]
unsafe fn softmax_numerators<S: Simd>(scores: &mut [f32], context: usize) -> f32 {
    scores[context..].fill(f32::NEG_INFINITY);
    // SAFETY: `scores` is a whole number of vectors.
    unsafe {
        let mut top = S::splat(f32::NEG_INFINITY);
        for i in (0..scores.len()).step_by(LANES) {
            top = S::max(top, S::load(scores.as_ptr().add(i)));
        }
        let mut lanes = [0.0; LANES];
        S::store(lanes.as_mut_ptr(), top);
        let top = S::splat(lanes.into_iter().fold(f32::NEG_INFINITY, f32::max));
        let mut sum = S::splat(0.0);
        for i in (0..scores.len()).step_by(LANES) {
            let p = scores.as_mut_ptr().add(i);
            let e = simd::exp::<S>(S::sub(S::load(p), top));
            S::store(p, e);
            if i + LANES > context {
                // `exp` clamps, so masked lanes are tiny but not zero.
                scores[context.max(i)..i + LANES].fill(0.0);
            }
            sum = S::add(sum, S::load(scores.as_ptr().add(i)));
        }
        S::sum(sum)
    }
}

/// `out = Σ p·v / Σ p`, 16 (or the rest) of the head's dimensions at a time.
#[inline(always)]
unsafe fn weigh_values<S: Simd, const Q: usize>(
    job: &Job<'_>,
    queries: &[Query; Q],
    sums: &[f32; Q],
    padded: usize,
    scores: &[f32],
) {
    let head_dim = job.h.head_dim;
    // SAFETY: see `attend`; `out` is as long as `q`, and tiles write their own heads.
    unsafe {
        let mut d = 0;
        while d + 4 * LANES <= head_dim {
            weigh_lanes::<S, Q, 4>(job, queries, sums, padded, scores, d);
            d += 4 * LANES;
        }
        while d + LANES <= head_dim {
            weigh_lanes::<S, Q, 1>(job, queries, sums, padded, scores, d);
            d += LANES;
        }
        for d in d..head_dim {
            for i in 0..Q {
                let mut acc = 0.0f32;
                for t in 0..queries[i].context {
                    let v = job.block(t / BLOCK_SIZE) + (t % BLOCK_SIZE) * head_dim + d;
                    acc = scores[i * padded + t].mul_add(job.values[v], acc);
                }
                *job.out.get().add(queries[i].offset + d) = acc * (1.0 / sums[i]);
            }
        }
    }
}

#[inline(always)]
unsafe fn weigh_lanes<S: Simd, const Q: usize, const D: usize>(
    job: &Job<'_>,
    queries: &[Query; Q],
    sums: &[f32; Q],
    padded: usize,
    scores: &[f32],
    d: usize,
) {
    // A query's own context ends the sum: beyond it the numerators are zero, but a
    // block's unwritten values may be anything (0 × NaN), so they are not read.
    let context = queries.iter().map(|q| q.context).max().unwrap_or(0);
    // SAFETY: see `weigh_values`.
    unsafe {
        let mut acc = [[S::splat(0.0); D]; Q];
        for b in 0..context.div_ceil(BLOCK_SIZE) {
            let values = job.values.as_ptr().add(job.block(b) + d);
            let tokens = BLOCK_SIZE.min(context - b * BLOCK_SIZE);
            for t in 0..tokens {
                let row = values.add(t * job.h.head_dim);
                let v: [S::V; D] = std::array::from_fn(|j| S::load(row.add(j * LANES)));
                for i in 0..Q {
                    let p = S::splat(*scores.get_unchecked(i * padded + b * BLOCK_SIZE + t));
                    for j in 0..D {
                        acc[i][j] = S::fma(p, v[j], acc[i][j]);
                    }
                }
            }
        }
        for i in 0..Q {
            for j in 0..D {
                let out = job.out.get().add(queries[i].offset + d + j * LANES);
                S::store(out, S::mul(acc[i][j], S::splat(1.0 / sums[i])));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{random, tiers};

    struct Case {
        h: Heads,
        tokens: usize,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
    }

    fn case(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) -> Case {
        let h = Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        Case {
            h,
            tokens,
            q: random(tokens * heads * head_dim, 1),
            k: random(tokens * kv_heads * head_dim, 2),
            v: random(tokens * kv_heads * head_dim, 3),
        }
    }

    /// Runs the case in the given chunks over shuffled blocks filled with NaN before.
    fn run(case: &Case, tier: Tier, chunks: &[usize]) -> Vec<f32> {
        let h = case.h;
        let blocks = case.tokens.div_ceil(BLOCK_SIZE);
        let table: Vec<u32> = (0..blocks as u32).map(|b| (b * 7 + 3) % 29).collect();
        let mut keys = vec![f32::NAN; 29 * h.block_len()];
        let mut values = keys.clone();
        let mut out = Vec::new();
        let mut start = 0;
        for &len in chunks {
            let rows = Rows { first: 0, len, start_position: start, block_table: &table };
            let slice = |x: &[f32], width: usize| x[start * width..(start + len) * width].to_vec();
            let (kw, qw) = (h.kv_heads * h.head_dim, h.heads * h.head_dim);
            write_kv(h, rows, &slice(&case.k, kw), &slice(&case.v, kw), &mut keys, &mut values);
            let mut part = vec![0.0; len * qw];
            let q = slice(&case.q, qw);
            paged_attention_in_tier(tier, h, &q, &keys, &values, &[rows], &mut part);
            out.extend(part);
            start += len;
        }
        assert_eq!(start, case.tokens);
        out
    }

    #[test]
    fn equals_softmax_attention_and_no_chunking_or_tier_changes_bits() {
        for (heads, kv_heads, head_dim, tokens) in
            [(4, 2, 16, 37), (2, 2, 64, 20), (6, 1, 24, 33), (1, 1, 2, 1), (8, 8, 80, 18)]
        {
            let case = case(heads, kv_heads, head_dim, tokens);
            let whole = run(&case, Tier::Scalar, &[tokens]);
            check_against_formula(&case, &whole);
            for tier in tiers() {
                assert_eq!(run(&case, tier, &[tokens]), whole, "{tier:?}");
                assert_eq!(run(&case, tier, &vec![1; tokens]), whole, "{tier:?} one by one");
                if tokens > 17 {
                    assert_eq!(run(&case, tier, &[17, tokens - 17]), whole, "{tier:?} chunks");
                }
            }
        }
    }

    fn check_against_formula(case: &Case, out: &[f32]) {
        let Heads { heads, kv_heads, head_dim, scale } = case.h;
        for t in 0..case.tokens {
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let q = &case.q[(t * heads + head) * head_dim..][..head_dim];
                let row = |x: &'_ [f32], s: usize| -> Vec<f64> {
                    let at = (s * kv_heads + kv) * head_dim;
                    x[at..at + head_dim].iter().map(|v| f64::from(*v)).collect()
                };
                let weights: Vec<f64> = (0..=t)
                    .map(|s| {
                        let k = row(&case.k, s);
                        let dot: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(*q) * k).sum();
                        (dot * f64::from(scale)).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let want: f64 =
                        weights.iter().enumerate().map(|(s, w)| w * row(&case.v, s)[d]).sum();
                    let got = f64::from(out[(t * heads + head) * head_dim + d]);
                    assert!((got - want / total).abs() < 1e-5, "{got} {}", want / total);
                }
            }
        }
    }
}
