//! Causal attention over the paged KV cache, prefill and decode alike.
//!
//! A block holds 16 tokens: keys as `[head_dim][16]` (so that one vector is one
//! dimension of 16 keys and no sum crosses lanes), values as `[16][head_dim]`.
//! For each query and head the scores, their maximum, their sum and the weighted
//! values run over the keys that it sees, in position order, so the bits do not depend
//! on the prefill's chunks or on the batch. Keys that it does not see (later ones, or
//! those before its window) never enter a sum, not even times zero.
//!
//! Left out: attention sinks, and masks other than causal and sliding.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed in two dimensions at once")]

use std::cell::RefCell;
use std::ops::Range;

use super::ops::capped;
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

/// What a layer does to its scores besides scaling them; the default is nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rule<'a> {
    /// Sliding window: the query at position `p` sees the keys at `p - window + 1 ..= p`
    /// (`sliding_window_overlay` in transformers' masking_utils). At least 1.
    pub window: Option<usize>,
    /// `cap * tanh(score / cap)` of each scaled score (Gemma 2's attn_logit_softcapping).
    pub softcap: Option<f32>,
    /// ALiBi (Press et al. 2022) with one slope a query head of this rank, as
    /// `build_alibi_tensor` in transformers' modeling_falcon has it: the product of
    /// slope and key position, all three rounded to bf16, is added to `q · k` before the
    /// scale. The rounding makes it depend on the key's position and not on the
    /// distance alone; it comes after the cap where a rule has both.
    pub slopes: Option<&'a [f32]>,
}

impl Rule<'_> {
    /// First position that a query sees which sees none from `context` on.
    fn first(&self, context: usize) -> usize {
        self.window.map_or(0, |window| context.saturating_sub(window))
    }
}

/// ALiBi's slopes of a model with `heads` query heads: powers of `2^(-8/n)` for the
/// largest power of two `n <= heads`, then odd powers of its root (`build_alibi_tensor`
/// in transformers' modeling_falcon).
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let Some(log2) = heads.checked_ilog2() else { return Vec::new() };
    let n = 1usize << log2;
    let power = |n: usize, i: usize| {
        let base = (-8.0 / n as f64).exp2() as f32;
        f64::from(base).powi(i as i32) as f32
    };
    let whole = (1..=n).map(|i| power(n, i));
    let rest = (0..heads - n).map(|i| power(2 * n, 2 * i + 1));
    whole.chain(rest).collect()
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
///
/// # Panics
/// If lengths do not fit together or a window is 0 (a bug, not bad input).
pub fn paged_attention(
    h: Heads,
    rule: Rule<'_>,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    sequences: &[Rows<'_>],
    out: &mut [f32],
) {
    paged_attention_in_tier(tier(), h, rule, q, keys, values, sequences, out);
}

#[allow(clippy::too_many_arguments, reason = "the arguments of `paged_attention` and the tier")]
fn paged_attention_in_tier(
    tier: Tier,
    h: Heads,
    rule: Rule<'_>,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    sequences: &[Rows<'_>],
    out: &mut [f32],
) {
    assert_eq!(q.len(), out.len());
    assert!(rule.window != Some(0) && rule.slopes.is_none_or(|s| s.len() == h.heads));
    let group = h.heads / h.kv_heads;
    let rows_a_task = 16;
    let mut tasks = Vec::new();
    let mut flops = 0;
    for (s, rows) in sequences.iter().enumerate() {
        let context = rows.start_position + rows.len;
        assert!(rows.block_table.len() * BLOCK_SIZE >= context);
        let seen = context.min(rule.window.unwrap_or(context));
        flops += 4 * rows.len * h.heads * h.head_dim * seen;
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
                (i < count).then(|| {
                    let head = kv_head * group + i % group;
                    let row = first + i / group;
                    let context = rows.start_position + row + 1;
                    Query {
                        offset: ((rows.first + row) * h.heads + head) * h.head_dim,
                        head,
                        first: rule.first(context),
                        context,
                    }
                })
            });
            let job = Job {
                h,
                rule,
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
    /// Scores of a tile's queries over the blocks that one of them sees.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Clone, Copy)]
struct Query {
    /// Start of the head's values in `q` and `out`.
    offset: usize,
    /// Query head on this rank.
    head: usize,
    /// The query sees the keys at `first..context`.
    first: usize,
    context: usize,
}

impl Query {
    /// Its blocks; those at the ends may be seen in part.
    fn blocks(&self) -> Range<usize> {
        self.first / BLOCK_SIZE..self.context.div_ceil(BLOCK_SIZE)
    }
}

struct Job<'a> {
    h: Heads,
    rule: Rule<'a>,
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

/// The queries of a tile, `Q` of them, and the scores of their blocks.
struct Tile<const Q: usize> {
    queries: [Query; Q],
    /// Blocks that at least one of the queries sees.
    blocks: Range<usize>,
}

impl<const Q: usize> Tile<Q> {
    fn new(queries: [Query; Q]) -> Self {
        let all = queries.iter().map(Query::blocks);
        let blocks = all.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
        Self { queries, blocks: blocks.unwrap_or(0..0) }
    }

    /// Index of the score of query `i` and the first key of block `b`.
    #[inline(always)]
    fn score(&self, i: usize, b: usize) -> usize {
        (i * self.blocks.len() + b - self.blocks.start) * BLOCK_SIZE
    }
}

#[inline(always)]
unsafe fn attend<S: Simd>(job: &Job<'_>, scores: &mut Vec<f32>) {
    // SAFETY: features by the dispatcher; the blocks hold every query's context
    // (asserted by the caller).
    unsafe {
        match job.queries {
            [Some(a), Some(b), Some(c), Some(d)] => {
                attend_queries::<S, 4>(job, [*a, *b, *c, *d], scores)
            }
            [Some(a), Some(b), Some(c), None] => attend_queries::<S, 3>(job, [*a, *b, *c], scores),
            [Some(a), Some(b), ..] => attend_queries::<S, 2>(job, [*a, *b], scores),
            [Some(a), ..] => attend_queries::<S, 1>(job, [*a], scores),
            [None, ..] => {}
        }
    }
}

#[inline(always)]
unsafe fn attend_queries<S: Simd, const Q: usize>(
    job: &Job<'_>,
    queries: [Query; Q],
    scores: &mut Vec<f32>,
) {
    let tile = Tile::new(queries);
    let len = Q * tile.blocks.len() * BLOCK_SIZE;
    if scores.len() < len {
        scores.resize(len, 0.0);
    }
    // SAFETY: see `attend`; `scores` holds the tile's blocks.
    unsafe {
        let mut b = tile.blocks.start;
        while b < tile.blocks.end {
            if b + 2 <= tile.blocks.end {
                score_blocks::<S, Q, 2>(job, &tile, b, scores);
                b += 2;
            } else {
                score_blocks::<S, Q, 1>(job, &tile, b, scores);
                b += 1;
            }
        }
        // No closure: one this large is not inlined, and outside of the function that has
        // the tier's features every operation in it would be a call.
        let mut sums = [0.0; Q];
        for i in 0..Q {
            let query = tile.queries[i];
            let blocks = query.blocks();
            let own = &mut scores[tile.score(i, blocks.start)..tile.score(i, blocks.end)];
            apply_rule::<S>(job, &query, own);
            let before = blocks.start * BLOCK_SIZE;
            let seen = query.first - before..query.context - before;
            sums[i] = softmax_numerators::<S>(own, seen);
        }
        weigh_values::<S, Q>(job, &tile, &sums, scores);
    }
}

/// Scores of `B` blocks of keys for `Q` queries; each score is one chain of fused
/// multiply-adds over the head's dimensions.
#[inline(always)]
unsafe fn score_blocks<S: Simd, const Q: usize, const B: usize>(
    job: &Job<'_>,
    tile: &Tile<Q>,
    first: usize,
    scores: &mut [f32],
) {
    // SAFETY: see `attend`.
    unsafe {
        let keys: [*const f32; B] =
            std::array::from_fn(|b| job.keys.as_ptr().add(job.block(first + b)));
        let q: [*const f32; Q] =
            std::array::from_fn(|i| job.q.as_ptr().add(tile.queries[i].offset));
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
                let at = tile.score(i, first + b);
                let scaled = S::mul(acc[i][b], S::splat(job.h.scale));
                S::store(scores.as_mut_ptr().add(at), scaled);
            }
        }
    }
}

/// The cap and the bias of a query's scores, from its first block on.
#[inline(always)]
unsafe fn apply_rule<S: Simd>(job: &Job<'_>, query: &Query, scores: &mut [f32]) {
    // SAFETY: `scores` is a whole number of vectors.
    unsafe {
        if let Some(cap) = job.rule.softcap {
            for i in (0..scores.len()).step_by(LANES) {
                let p = scores.as_mut_ptr().add(i);
                S::store(p, capped::<S>(S::load(p), cap));
            }
        }
        if let Some(slopes) = job.rule.slopes {
            let slope = to_bf16(slopes[query.head]);
            let first = query.first / BLOCK_SIZE * BLOCK_SIZE;
            for i in (0..scores.len()).step_by(LANES) {
                let bias: [f32; LANES] =
                    std::array::from_fn(|t| to_bf16(slope * to_bf16((first + i + t) as f32)));
                let p = scores.as_mut_ptr().add(i);
                let bias = S::load(bias.as_ptr());
                S::store(p, S::fma(bias, S::splat(job.h.scale), S::load(p)));
            }
        }
    }
}

/// A finite value rounded to bf16 (ties to even), without `half`'s branch for NaN so
/// that loops over it become vector code.
#[inline(always)]
fn to_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// Turns scores into `e^(score - max)`, zero for keys that are not `seen`, and returns
/// their sum. Blocks that the query sees nothing of would add zeros, so it does not
/// matter where the other queries of the tile begin and end.
#[inline(always)]
unsafe fn softmax_numerators<S: Simd>(scores: &mut [f32], seen: Range<usize>) -> f32 {
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
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
            // `exp` clamps, so masked lanes are tiny but not zero.
            if i < seen.start {
                scores[i..seen.start.min(i + LANES)].fill(0.0);
            }
            if i + LANES > seen.end {
                scores[seen.end.max(i)..i + LANES].fill(0.0);
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
    tile: &Tile<Q>,
    sums: &[f32; Q],
    scores: &[f32],
) {
    let head_dim = job.h.head_dim;
    // SAFETY: see `attend`; `out` is as long as `q`, and tiles write their own heads.
    unsafe {
        let mut d = 0;
        while d + 4 * LANES <= head_dim {
            weigh_lanes::<S, Q, 4>(job, tile, sums, scores, d);
            d += 4 * LANES;
        }
        while d + LANES <= head_dim {
            weigh_lanes::<S, Q, 1>(job, tile, sums, scores, d);
            d += LANES;
        }
        for d in d..head_dim {
            for (i, query) in tile.queries.iter().enumerate() {
                let mut acc = 0.0f32;
                for t in query.first..query.context {
                    let (b, slot) = (t / BLOCK_SIZE, t % BLOCK_SIZE);
                    let v = job.values[job.block(b) + slot * head_dim + d];
                    acc = scores[tile.score(i, b) + slot].mul_add(v, acc);
                }
                *job.out.get().add(query.offset + d) = acc * (1.0 / sums[i]);
            }
        }
    }
}

/// `D` vectors of every query's output. Where the queries do not all see a key, only
/// those that do read its value: it may be of another sequence, or anything (0 × NaN).
#[inline(always)]
unsafe fn weigh_lanes<S: Simd, const Q: usize, const D: usize>(
    job: &Job<'_>,
    tile: &Tile<Q>,
    sums: &[f32; Q],
    scores: &[f32],
    d: usize,
) {
    let queries = &tile.queries;
    let bounds = |f: fn(&Query) -> usize| {
        let all = queries.iter().map(f);
        (all.clone().min().unwrap_or(0), all.max().unwrap_or(0))
    };
    let (first_of_any, first_of_all) = bounds(|q| q.first);
    let (end_of_all, end_of_any) = bounds(|q| q.context);
    // SAFETY: see `weigh_values`.
    unsafe {
        let mut acc = [[S::splat(0.0); D]; Q];
        for b in tile.blocks.clone() {
            let values = job.values.as_ptr().add(job.block(b) + d);
            let start = b * BLOCK_SIZE;
            let slot = |t: usize| t.clamp(start, start + BLOCK_SIZE) - start;
            let some = slot(first_of_any)..slot(end_of_any);
            let all = slot(first_of_all)..slot(end_of_all).max(slot(first_of_all));
            for t in some.start..all.start {
                weigh_token::<S, Q, D, true>(job, tile, scores, (values, b, t), &mut acc);
            }
            for t in all.clone() {
                weigh_token::<S, Q, D, false>(job, tile, scores, (values, b, t), &mut acc);
            }
            for t in all.end..some.end {
                weigh_token::<S, Q, D, true>(job, tile, scores, (values, b, t), &mut acc);
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

/// Adds the value of token `t` of block `b` to the sums of the queries (with `CHECK`,
/// of those that see it); `values` points to the block's first.
#[inline(always)]
unsafe fn weigh_token<S: Simd, const Q: usize, const D: usize, const CHECK: bool>(
    job: &Job<'_>,
    tile: &Tile<Q>,
    scores: &[f32],
    (values, b, t): (*const f32, usize, usize),
    acc: &mut [[S::V; D]; Q],
) {
    // SAFETY: see `weigh_values`.
    unsafe {
        let row = values.add(t * job.h.head_dim);
        let v: [S::V; D] = std::array::from_fn(|j| S::load(row.add(j * LANES)));
        for i in 0..Q {
            let query = &tile.queries[i];
            if CHECK && !(query.first..query.context).contains(&(b * BLOCK_SIZE + t)) {
                continue;
            }
            let p = S::splat(*scores.get_unchecked(tile.score(i, b) + t));
            for j in 0..D {
                acc[i][j] = S::fma(p, v[j], acc[i][j]);
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
        rule: Rule<'static>,
        tokens: usize,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
    }

    fn case(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) -> Case {
        let h = Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        Case {
            h,
            rule: Rule::default(),
            tokens,
            q: random(tokens * heads * head_dim, 1),
            k: random(tokens * kv_heads * head_dim, 2),
            v: random(tokens * kv_heads * head_dim, 3),
        }
    }

    /// Runs the case in the given chunks over shuffled blocks filled with NaN before, and
    /// wherever no later query's window reaches.
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
            for gone in 0..case.rule.first(start + 1) {
                let rows = Rows { first: 0, len: 1, start_position: gone, block_table: &table };
                let nan = vec![f32::NAN; kw];
                write_kv(h, rows, &nan, &nan, &mut keys, &mut values);
            }
            paged_attention_in_tier(tier, h, case.rule, &q, &keys, &values, &[rows], &mut part);
            out.extend(part);
            start += len;
        }
        assert_eq!(start, case.tokens);
        out
    }

    const RULE: Rule<'static> = Rule { window: None, softcap: None, slopes: None };
    const SLOPES: [f32; 8] = [0.707, 0.5, 0.3536, 0.25, 0.1768, 0.125, 0.0884, 0.0625];

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    fn check(case: &Case) {
        let tokens = case.tokens;
        let whole = run(case, Tier::Scalar, &[tokens]);
        check_against_formula(case, &whole);
        for tier in tiers() {
            let same = |chunks: &[usize]| {
                let out = run(case, tier, chunks);
                assert_eq!(bits(&out), bits(&whole), "{tier:?} {:?} {chunks:?}", case.rule);
            };
            same(&[tokens]);
            same(&vec![1; tokens]);
            if tokens > 17 {
                same(&[17, tokens - 17]);
                same(&[2, 5, tokens - 7]);
            }
        }
    }

    #[test]
    fn equals_softmax_attention_and_no_chunking_or_tier_changes_bits() {
        for (heads, kv_heads, head_dim, tokens) in
            [(4, 2, 16, 37), (2, 2, 64, 20), (6, 1, 24, 33), (1, 1, 2, 1), (8, 8, 80, 18)]
        {
            check(&case(heads, kv_heads, head_dim, tokens));
        }
    }

    #[test]
    fn the_same_under_windows_caps_and_alibi() {
        let shapes = [(4, 2, 16, 57), (3, 1, 24, 90), (2, 2, 64, 41), (6, 2, 6, 35)];
        for (heads, kv_heads, head_dim, tokens) in shapes {
            let slopes = Some(&SLOPES[..heads]);
            let mut case = case(heads, kv_heads, head_dim, tokens);
            let mut check = |rule| {
                case.rule = rule;
                check(&case);
            };
            for window in [1, 2, 3, 15, 16, 17, 33, 1000] {
                check(Rule { window: Some(window), ..RULE });
            }
            check(Rule { softcap: Some(0.5), ..RULE });
            check(Rule { slopes, ..RULE });
            check(Rule { window: Some(20), softcap: Some(0.5), slopes });
        }
    }

    #[test]
    fn scratch_is_as_large_as_the_window() {
        let mut case = case(1, 1, 2, 400);
        case.rule.window = Some(20);
        std::thread::spawn(move || {
            run(&case, Tier::Scalar, &[400]);
            SCRATCH.with_borrow(|scores| assert!(scores.len() <= TILE * 3 * BLOCK_SIZE));
        })
        .join()
        .unwrap();
    }

    /// From `build_alibi_tensor` of transformers 5 with f32 slopes.
    #[test]
    fn alibi_slopes_are_those_of_transformers() {
        assert!(alibi_slopes(0).is_empty());
        assert_eq!(alibi_slopes(1), [0.00390625]);
        assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
        // Its values are rounded to bf16, as the kernel does.
        let rounded: Vec<f32> = alibi_slopes(12).into_iter().map(to_bf16).collect();
        let whole = (1..=8).map(|i| 0.5f32.powi(i));
        let rest = (0..4).map(|i| 181.0 / 256.0 * 0.5f32.powi(i));
        assert_eq!(rounded, whole.chain(rest).collect::<Vec<_>>());
    }

    fn check_against_formula(case: &Case, out: &[f32]) {
        let Heads { heads, kv_heads, head_dim, scale } = case.h;
        let round = |x: f64| f64::from(half::bf16::from_f64(x));
        for t in 0..case.tokens {
            let first = case.rule.first(t + 1);
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let q = &case.q[(t * heads + head) * head_dim..][..head_dim];
                let row = |x: &'_ [f32], s: usize| -> Vec<f64> {
                    let at = (s * kv_heads + kv) * head_dim;
                    x[at..at + head_dim].iter().map(|v| f64::from(*v)).collect()
                };
                let weights: Vec<f64> = (first..=t)
                    .map(|s| {
                        let k = row(&case.k, s);
                        let dot: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(*q) * k).sum();
                        let mut score = dot * f64::from(scale);
                        if let Some(cap) = case.rule.softcap.map(f64::from) {
                            score = cap * (score / cap).tanh();
                        }
                        if let Some(slopes) = case.rule.slopes {
                            let slope = round(f64::from(slopes[head]));
                            score += round(slope * s as f64) * f64::from(scale);
                        }
                        score.exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let want: f64 =
                        weights.iter().zip(first..).map(|(w, s)| w * row(&case.v, s)[d]).sum();
                    let got = f64::from(out[(t * heads + head) * head_dim + d]);
                    assert!((got - want / total).abs() < 1e-5, "{got} {}", want / total);
                }
            }
        }
    }
}
