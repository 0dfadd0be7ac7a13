//! Causal attention inside segments of rows, forward and backward: what training needs.
//!
//! A segment is an example, or one of several packed into a sequence; its positions begin
//! at 0 and it sees nothing of its neighbours. Nothing is as large as rows × rows: tiles of
//! queries pass over tiles of keys and keep a running maximum and sum (Dao et al. 2022,
//! FlashAttention), and the backward pass computes the probabilities again from the
//! log-sum-exp that the forward pass left. In a tile the queries are the lanes, so that no
//! sum crosses lanes, and each of the seven matrix products is a [`Product`].
//!
//! Tiles begin where their segment does and sums run in the order of the keys, or of the
//! heads of a group and their queries: no bit depends on threads or on company.
//!
//! Left out: attention sinks, dropout of probabilities, masks other than causal and sliding.

mod product;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use super::attention::{Heads, Rule};
use super::ops::capped;
use super::parallel::{self, SharedMut};
use super::simd::{self, LANES, Simd};
use super::{Tier, dispatch, tier};
use product::Product;

/// Queries of a tile: four vectors.
const QUERIES: usize = 4 * LANES;
/// Keys of a tile: whole rows of the product's tiles.
const KEYS: usize = 48;
/// Keys of a task where tasks that take all of a segment's keys would be too few.
const KEYS_A_TASK: usize = 8 * KEYS;
/// Of keys that a query does not see; finite, so that its difference to itself is 0.
const NO_SCORE: f32 = -1e30;

/// Attention of the queries `q` to the keys and values of their own segment, each at its own
/// position or before: `q` and `out` are `[rows, heads * head_dim]`, `k` and `v` are
/// `[rows, kv_heads * head_dim]`. `lse` `[rows, heads]` receives each query's log of the sum of
/// its exponentials, of the scores as the rule makes them. `segments` are the ranges of rows,
/// one after another, all rows.
///
/// # Panics
/// If lengths do not fit together or a window is 0 (a bug, not bad input).
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    h: Heads,
    rule: Rule<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    segments: &[Range<usize>],
    out: &mut [f32],
    lse: &mut [f32],
) {
    attend(&Job { tier: tier(), h, rule, q, k, v }, segments, out, lse);
}

/// The gradients of [`attention`] with respect to `q`, `k` and `v`, from that with respect to
/// its result: `out` and `lse` are what it wrote, `dout` and `dq` are as `q`, `dk` and `dv` as `k`.
///
/// # Panics
/// As [`attention`].
#[allow(clippy::too_many_arguments, reason = "the operands of attention and their gradients")]
pub fn attention_backward(
    h: Heads,
    rule: Rule<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    segments: &[Range<usize>],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let job = Job { tier: tier(), h, rule, q, k, v };
    let whole = whole_units_suffice(h, segments, rayon::current_num_threads());
    differentiate(&job, &Given { out, lse, dout }, segments, whole, [dq, dk, dv]);
}

/// What both passes read.
struct Job<'a> {
    tier: Tier,
    h: Heads,
    rule: Rule<'a>,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// Queries of one head at consecutive positions of a segment.
#[derive(Clone, Copy)]
struct Tile {
    head: usize,
    /// Position of the first.
    first: usize,
    len: usize,
}

impl Job<'_> {
    fn check(&self, segments: &[Range<usize>], lse: usize) {
        let Heads { heads, kv_heads, head_dim, .. } = self.h;
        assert!(head_dim > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads));
        assert!(self.rule.window != Some(0));
        assert!(self.rule.slopes.is_none_or(|s| s.len() == heads));
        let mut rows = 0;
        for segment in segments {
            assert!(segment.start == rows && segment.end >= rows, "segments follow one another");
            rows = segment.end;
        }
        assert_eq!(self.q.len(), rows * heads * head_dim);
        assert!([self.k, self.v].iter().all(|x| x.len() == rows * kv_heads * head_dim));
        assert_eq!(lse, rows * heads);
    }

    /// Width of a head in tiles: whole vectors.
    fn width(&self) -> usize {
        self.h.head_dim.next_multiple_of(LANES)
    }

    fn tile(&self, head: usize, first: usize, positions: usize) -> Tile {
        Tile { head, first, len: QUERIES.min(positions - first) }
    }

    /// The rows of a head in one of the matrices with `heads` heads.
    fn rows<'a>(&self, data: &'a [f32], heads: usize, head: usize, start: usize) -> HeadRows<'a> {
        let head_dim = self.h.head_dim;
        let offset = start * heads * head_dim + head * head_dim;
        HeadRows { data, offset, stride: heads * head_dim, head_dim }
    }

    /// Positions that some query of the tile sees, down to where a tile of keys begins.
    fn seen(&self, tile: Tile) -> Range<usize> {
        let first = self.rule.window.map_or(0, |window| (tile.first + 1).saturating_sub(window));
        first / KEYS * KEYS..tile.first + tile.len
    }

    /// Queries of the tile that see any of the keys.
    fn lanes(&self, tile: Tile, keys: Range<usize>) -> Range<usize> {
        let start = keys.start.saturating_sub(tile.first).min(tile.len);
        let end = self.rule.window.map_or(tile.len, |window| {
            (keys.end - 1).saturating_add(window).saturating_sub(tile.first).min(tile.len)
        });
        start..end.max(start)
    }

    /// What ALiBi adds to `q · k` of a key, before the scale; see [`Rule::slopes`].
    fn bias(&self, head: usize, key: usize) -> Option<f32> {
        let round = |x: f32| bf16::from_f32(x).to_f32();
        self.rule.slopes.map(|slopes| round(round(slopes[head]) * round(key as f32)))
    }
}

/// Rows of one head in a matrix of several heads.
#[derive(Clone, Copy)]
struct HeadRows<'a> {
    data: &'a [f32],
    /// Where the first row of the segment begins.
    offset: usize,
    stride: usize,
    head_dim: usize,
}

impl<'a> HeadRows<'a> {
    fn row(&self, position: usize) -> &'a [f32] {
        &self.data[self.offset + position * self.stride..][..self.head_dim]
    }

    /// Copies rows to `[positions][width]`; the rest of the width is zeros.
    fn copy(&self, positions: Range<usize>, width: usize, to: &mut [f32]) {
        for (position, to) in positions.zip(to.chunks_exact_mut(width)) {
            let (head, rest) = to.split_at_mut(self.head_dim);
            head.copy_from_slice(self.row(position));
            rest.fill(0.0);
        }
    }

    /// Copies rows to `[head_dim][QUERIES]`, one a lane; lanes without a row are zeros.
    fn transpose(&self, positions: Range<usize>, to: &mut [f32]) {
        if positions.len() < QUERIES {
            to.fill(0.0);
        }
        for (lane, position) in positions.enumerate() {
            for (d, x) in self.row(position).iter().enumerate() {
                to[d * QUERIES + lane] = *x;
            }
        }
    }
}

/// Rows of a result; each is written by one task.
#[derive(Clone, Copy)]
struct RowsMut {
    data: SharedMut<f32>,
    offset: usize,
    stride: usize,
    head_dim: usize,
}

impl RowsMut {
    /// As [`Job::rows`], of a matrix as long as that one.
    fn new(data: SharedMut<f32>, like: HeadRows<'_>) -> Self {
        let HeadRows { offset, stride, head_dim, .. } = like;
        Self { data, offset, stride, head_dim }
    }

    /// # Safety
    /// The position is inside the segment, and no other task writes its row of this head.
    #[allow(clippy::mut_from_ref, reason = "tasks write disjoint rows")]
    unsafe fn row(&self, position: usize) -> &mut [f32] {
        // SAFETY: inside the matrix, which `Job::check` has measured.
        unsafe {
            let row = self.data.get().add(self.offset + position * self.stride);
            std::slice::from_raw_parts_mut(row, self.head_dim)
        }
    }
}

thread_local! {
    /// A thread's tiles.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `task` with buffers of these lengths; they hold anything.
fn with_scratch<const N: usize>(lengths: [usize; N], task: impl FnOnce([&mut [f32]; N])) {
    SCRATCH.with_borrow_mut(|scratch| {
        let total = lengths.iter().sum();
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let mut rest = &mut scratch[..];
        task(lengths.map(|len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            part
        }));
    });
}

/// Pairs of a query and a key in a segment, about.
fn pairs(rule: Rule<'_>, len: usize) -> usize {
    len * rule.window.unwrap_or(len).min(len / 2 + 1)
}

fn attend(job: &Job<'_>, segments: &[Range<usize>], out: &mut [f32], lse: &mut [f32]) {
    job.check(segments, lse.len());
    assert_eq!(out.len(), job.q.len());
    let mut tasks = Vec::new();
    let mut flops = 0;
    for segment in segments {
        flops += 4 * job.h.heads * job.h.head_dim * pairs(job.rule, segment.len());
        for head in 0..job.h.heads {
            let tiles = (0..segment.len()).step_by(QUERIES);
            tasks.extend(tiles.map(|first| (segment, job.tile(head, first, segment.len()))));
        }
    }
    // The longest first, so that threads end together.
    tasks.sort_by_key(|(_, tile)| std::cmp::Reverse(tile.first));
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    parallel::for_each(tasks.len(), flops, |t| attend_tile(job, tasks[t].0, tasks[t].1, out, lse));
}

/// The result of one tile of queries.
fn attend_tile(
    job: &Job<'_>,
    segment: &Range<usize>,
    tile: Tile,
    out: SharedMut<f32>,
    lse: SharedMut<f32>,
) {
    let Heads { heads, kv_heads, head_dim, .. } = job.h;
    let (width, kv_head) = (job.width(), tile.head / (heads / kv_heads));
    let q = job.rows(job.q, heads, tile.head, segment.start);
    let [k, v] = [job.k, job.v].map(|x| job.rows(x, kv_heads, kv_head, segment.start));
    let lengths = [head_dim * QUERIES, KEYS * QUERIES, KEYS * width, KEYS * width, QUERIES * width];
    with_scratch(lengths, |[q_lanes, scores, keys, values, sums]| {
        let mut softmax = Softmax::new();
        q.transpose(tile.first..tile.first + tile.len, q_lanes);
        sums.fill(0.0);
        let seen = job.seen(tile);
        for start in seen.clone().step_by(KEYS) {
            let positions = start..(start + KEYS).min(seen.end);
            let lanes = job.lanes(tile, positions.clone());
            k.copy(positions.clone(), width, keys);
            v.copy(positions.clone(), width, values);
            score(job, positions.len(), &lanes, (keys, width), q_lanes, scores);
            softmax.take(job, tile, positions.clone(), lanes.clone(), scores, sums);
            // sums[query] += Σ p[key, query] · v[key]
            let product = Product {
                a: scores[lanes.start..].as_ptr(),
                a_row: 1,
                a_col: QUERIES,
                b: values.as_ptr(),
                b_row: width,
                c: sums[lanes.start * width..].as_mut_ptr(),
                c_row: width,
                m: lanes.len(),
                n: width,
                k: positions.len(),
                accumulate: true,
            };
            // SAFETY: the tiles hold that many lanes, keys and widths.
            unsafe { product.run(job.tier) };
        }
        let out = RowsMut::new(out, q);
        for lane in 0..tile.len {
            let position = tile.first + lane;
            let (lse_of_lane, factor) = softmax.end(lane);
            // SAFETY: tasks write their own rows of their own heads.
            unsafe {
                *lse.get().add((segment.start + position) * heads + tile.head) = lse_of_lane;
                let sums = &sums[lane * width..][..head_dim];
                out.row(position).iter_mut().zip(sums).for_each(|(o, sum)| *o = sum * factor);
            }
        }
    });
}

/// `to[key, lane] = x[key] · y[lane]` for the vectors that hold `lanes`: unscaled scores of
/// keys and queries, or what values and a gradient give.
fn score(
    job: &Job<'_>,
    keys: usize,
    lanes: &Range<usize>,
    (x, width): (&[f32], usize),
    y: &[f32],
    to: &mut [f32],
) {
    let vectors = vectors(lanes);
    let product = Product {
        a: x.as_ptr(),
        a_row: width,
        a_col: 1,
        b: y[vectors.start..].as_ptr(),
        b_row: QUERIES,
        c: to[vectors.start..].as_mut_ptr(),
        c_row: QUERIES,
        m: keys,
        n: vectors.len(),
        k: job.h.head_dim,
        accumulate: false,
    };
    // SAFETY: the tiles hold that many keys, lanes and dimensions.
    unsafe { product.run(job.tier) };
}

/// The lanes of the vectors that hold these.
fn vectors(lanes: &Range<usize>) -> Range<usize> {
    lanes.start / LANES * LANES..lanes.end.next_multiple_of(LANES)
}

/// What is known of the softmax of a tile's queries after some keys.
struct Softmax {
    /// The largest score.
    top: [f32; QUERIES],
    /// Sum of `e^(score - top)`.
    sum: [f32; QUERIES],
    /// 0, or NaN once a score was not finite: a diverged step shows.
    poison: [f32; QUERIES],
}

impl Softmax {
    fn new() -> Self {
        Self { top: [NO_SCORE; QUERIES], sum: [0.0; QUERIES], poison: [0.0; QUERIES] }
    }

    /// Turns raw scores into `e^(score - top)`, and brings `sums` to the new maxima.
    fn take(
        &mut self,
        job: &Job<'_>,
        tile: Tile,
        keys: Range<usize>,
        lanes: Range<usize>,
        scores: &mut [f32],
        sums: &mut [f32],
    ) {
        let (tier, softmax) = (job.tier, self);
        dispatch!(
            tier,
            take_scores,
            softmax: &mut Softmax,
            job: &Job<'_>,
            tile: Tile,
            keys: Range<usize>,
            lanes: Range<usize>,
            scores: &mut [f32],
            sums: &mut [f32],
        );
    }

    /// A query's log-sum-exp, and the factor of its sums.
    fn end(&self, lane: usize) -> (f32, f32) {
        let sum = self.sum[lane] + self.poison[lane];
        (self.top[lane] + sum.ln(), 1.0 / sum)
    }
}

#[inline(always)]
unsafe fn take_scores<S: Simd>(
    softmax: &mut Softmax,
    job: &Job<'_>,
    tile: Tile,
    keys: Range<usize>,
    lanes: Range<usize>,
    scores: &mut [f32],
    sums: &mut [f32],
) {
    let vectors = vectors(&lanes);
    let before = softmax.top;
    // SAFETY: vectors lie inside the QUERIES lanes of each row.
    unsafe {
        for (i, key) in keys.clone().enumerate() {
            let row = &mut scores[i * QUERIES..][..QUERIES];
            let bias = job.bias(tile.head, key);
            for at in vectors.clone().step_by(LANES) {
                let (score, _) = ruled::<S>(job, bias, S::load(row.as_ptr().add(at)));
                S::store(row.as_mut_ptr().add(at), score);
            }
            hide(row, &vectors, job.lanes(tile, key..key + 1), NO_SCORE);
            for at in vectors.clone().step_by(LANES) {
                let score = S::load(row.as_ptr().add(at));
                let top = softmax.top.as_mut_ptr().add(at);
                S::store(top, S::max(S::load(top), score));
                let poison = softmax.poison.as_mut_ptr().add(at);
                S::store(poison, S::fma(score, S::splat(0.0), S::load(poison)));
            }
        }
        let mut factors = [1.0; QUERIES];
        for at in vectors.clone().step_by(LANES) {
            let change =
                S::sub(S::load(before.as_ptr().add(at)), S::load(softmax.top.as_ptr().add(at)));
            let factor = simd::exp::<S>(change);
            S::store(factors.as_mut_ptr().add(at), factor);
            let sum = softmax.sum.as_mut_ptr().add(at);
            S::store(sum, S::mul(S::load(sum), factor));
        }
        for (i, key) in keys.clone().enumerate() {
            let row = &mut scores[i * QUERIES..][..QUERIES];
            for at in vectors.clone().step_by(LANES) {
                let score = row.as_mut_ptr().add(at);
                let top = S::load(softmax.top.as_ptr().add(at));
                S::store(score, simd::exp::<S>(S::sub(S::load(score), top)));
            }
            // `exp` clamps, so hidden lanes are tiny but not zero.
            hide(row, &vectors, job.lanes(tile, key..key + 1), 0.0);
            for at in vectors.clone().step_by(LANES) {
                let sum = softmax.sum.as_mut_ptr().add(at);
                S::store(sum, S::add(S::load(sum), S::load(row.as_ptr().add(at))));
            }
        }
        let width = job.width();
        for lane in lanes {
            for at in (0..width).step_by(LANES) {
                let sum = sums[lane * width..][..width].as_mut_ptr().add(at);
                S::store(sum, S::mul(S::load(sum), S::splat(factors[lane])));
            }
        }
    }
}

/// A score as the rule makes it of `q · k`, and the derivative of the cap.
#[inline(always)]
unsafe fn ruled<S: Simd>(job: &Job<'_>, bias: Option<f32>, product: S::V) -> (S::V, S::V) {
    // SAFETY: the caller's contract is Simd's.
    unsafe {
        let scale = S::splat(job.h.scale);
        let mut score = S::mul(product, scale);
        let mut slope = S::splat(1.0);
        if let Some(cap) = job.rule.softcap {
            score = capped::<S>(score, cap);
            let tanh = S::mul(score, S::splat(1.0 / cap));
            slope = S::sub(slope, S::mul(tanh, tanh));
        }
        if let Some(bias) = bias {
            score = S::fma(S::splat(bias), scale, score);
        }
        (score, slope)
    }
}

/// Writes `value` to the lanes of the vectors that do not see a key.
#[inline(always)]
fn hide(row: &mut [f32], vectors: &Range<usize>, seeing: Range<usize>, value: f32) {
    if vectors.start < seeing.start {
        row[vectors.start..seeing.start.min(vectors.end)].fill(value);
    }
    if seeing.end < vectors.end {
        row[seeing.end.max(vectors.start)..vectors.end].fill(value);
    }
}

/// What the backward pass is given besides the forward pass's operands.
struct Given<'a> {
    out: &'a [f32],
    lse: &'a [f32],
    dout: &'a [f32],
}

/// Part of a segment's gradients: those of some queries, or of some keys, or both.
struct Part<'a> {
    segment: &'a Range<usize>,
    kv_head: usize,
    heads: Range<usize>,
    /// Positions; whole tiles of queries.
    queries: Range<usize>,
    /// Positions; whole tiles of keys.
    keys: Range<usize>,
    /// Whose gradients; all that they need is in the part.
    of: Of,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Queries,
    Keys,
    Both,
}

/// Whether the pairs of a segment and a KV head keep the threads busy. If not, queries and
/// keys get tasks of their own, with the same sums, but 7 products of tiles in place of 5.
fn whole_units_suffice(h: Heads, segments: &[Range<usize>], threads: usize) -> bool {
    let squares = || segments.iter().map(|s| s.len() * s.len());
    let (longest, all) = (squares().max().unwrap_or(0), h.kv_heads * squares().sum::<usize>());
    5 * longest * threads <= 7 * all
}

fn differentiate(
    job: &Job<'_>,
    given: &Given<'_>,
    segments: &[Range<usize>],
    whole_units: bool,
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    job.check(segments, given.lse.len());
    assert!([given.out, given.dout, dq].iter().all(|x| x.len() == job.q.len()));
    assert!([&dk, &dv].iter().all(|x| x.len() == job.k.len()));
    let mut parts = Vec::new();
    let mut flops = 0;
    for segment in segments {
        flops += 10 * job.h.heads * job.h.head_dim * pairs(job.rule, segment.len());
        for kv_head in 0..job.h.kv_heads {
            divide(job, segment, kv_head, whole_units, &mut parts);
        }
    }
    // The longest first, so that threads end together.
    parts.sort_by_key(|part| std::cmp::Reverse(part.segment.len()));
    let gradients = [dq, dk, dv].map(SharedMut::new);
    parallel::for_each(parts.len(), flops, |i| {
        differentiate_part(job, given, &parts[i], gradients)
    });
}

/// The parts of a segment and a KV head.
fn divide<'a>(
    job: &Job<'_>,
    segment: &'a Range<usize>,
    kv_head: usize,
    whole: bool,
    parts: &mut Vec<Part<'a>>,
) {
    let (len, group) = (segment.len(), job.h.heads / job.h.kv_heads);
    let heads = kv_head * group..(kv_head + 1) * group;
    let part = |heads: Range<usize>, queries, keys, of| Part {
        segment,
        kv_head,
        heads,
        queries,
        keys,
        of,
    };
    if whole {
        parts.push(part(heads, 0..len, 0..len, Of::Both));
        return;
    }
    for start in (0..len).step_by(KEYS_A_TASK) {
        let keys = start..(start + KEYS_A_TASK).min(len);
        parts.push(part(heads.clone(), start / QUERIES * QUERIES..len, keys, Of::Keys));
    }
    for head in heads {
        for first in (0..len).step_by(QUERIES) {
            let queries = first..(first + QUERIES).min(len);
            parts.push(part(head..head + 1, queries, 0..len, Of::Queries));
        }
    }
}

/// Tile by tile, with `g` the gradient of the result and `p` the probabilities,
/// `dv = pᵀ·g`, `ds = p ∘ (g·vᵀ - rowsum(g ∘ out))`, `dq = ds·k` and `dk = dsᵀ·q`.
fn differentiate_part(
    job: &Job<'_>,
    given: &Given<'_>,
    part: &Part<'_>,
    [dq, dk, dv]: [SharedMut<f32>; 3],
) {
    let Heads { heads, kv_heads, .. } = job.h;
    let start = part.segment.start;
    let rows = |head| job.rows(job.q, heads, head, start);
    let kv_rows = job.rows(job.k, kv_heads, part.kv_head, start);
    with_tiles(job, part, |tiles| {
        for head in part.heads.clone() {
            for first in part.queries.clone().step_by(QUERIES) {
                let tile = job.tile(head, first, part.segment.len());
                let seen = job.seen(tile);
                let keys = seen.start.max(part.keys.start)..seen.end.min(part.keys.end);
                if keys.is_empty() {
                    continue;
                }
                tiles.load_queries(job, given, tile, start);
                for key in keys.clone().step_by(KEYS) {
                    let positions = key..(key + KEYS).min(keys.end);
                    differentiate_tile(job, part, tile, positions, tiles);
                }
                if part.of != Of::Keys {
                    let positions = first..first + tile.len;
                    // SAFETY: no other part has the gradients of these queries.
                    unsafe { write(RowsMut::new(dq, rows(head)), positions, tiles.q_sums) };
                }
            }
        }
        if part.of != Of::Queries {
            // SAFETY: no other part has the gradients of these keys.
            unsafe {
                write(RowsMut::new(dk, kv_rows), part.keys.clone(), tiles.k_sums);
                write(RowsMut::new(dv, kv_rows), part.keys.clone(), tiles.v_sums);
            }
        }
    });
}

/// A part's operands and sums, padded to whole vectors.
struct Tiles<'a> {
    /// Values of a row.
    width: usize,
    /// `[head_dim][QUERIES]`, as is `g_lanes`.
    q_lanes: &'a mut [f32],
    g_lanes: &'a mut [f32],
    /// `[QUERIES][width]`, as are `g_rows` and `q_sums`.
    q_rows: &'a mut [f32],
    g_rows: &'a mut [f32],
    q_sums: &'a mut [f32],
    /// Scores, then probabilities: `[KEYS][QUERIES]`, as is `ds`.
    p: &'a mut [f32],
    ds: &'a mut [f32],
    /// `[KEYS][width]`, as are `values`.
    keys: &'a mut [f32],
    values: &'a mut [f32],
    /// `[keys of the part][width]`, as are `v_sums`.
    k_sums: &'a mut [f32],
    v_sums: &'a mut [f32],
    lse: [f32; QUERIES],
    /// `rowsum(g ∘ out)`.
    delta: [f32; QUERIES],
}

fn with_tiles(job: &Job<'_>, part: &Part<'_>, task: impl FnOnce(&mut Tiles<'_>)) {
    let width = job.width();
    let (lanes, rows, keys) = (job.h.head_dim * QUERIES, QUERIES * width, KEYS * width);
    let scores = KEYS * QUERIES;
    let sums = if part.of == Of::Queries { 0 } else { part.keys.len() * width };
    let lengths = [lanes, lanes, rows, rows, rows, scores, scores, keys, keys, sums, sums];
    with_scratch(lengths, |buffers| {
        let [q_lanes, g_lanes, q_rows, g_rows, q_sums, p, ds, keys, values, k_sums, v_sums] =
            buffers;
        k_sums.fill(0.0);
        v_sums.fill(0.0);
        let (lse, delta) = ([0.0; QUERIES], [0.0; QUERIES]);
        task(&mut Tiles {
            width,
            q_lanes,
            g_lanes,
            q_rows,
            g_rows,
            q_sums,
            p,
            ds,
            keys,
            values,
            k_sums,
            v_sums,
            lse,
            delta,
        });
    });
}

impl Tiles<'_> {
    /// Brings in what belongs to the queries of a tile, and begins their sums.
    fn load_queries(&mut self, job: &Job<'_>, given: &Given<'_>, tile: Tile, start: usize) {
        let heads = job.h.heads;
        let [q, g, out] =
            [job.q, given.dout, given.out].map(|x| job.rows(x, heads, tile.head, start));
        let positions = tile.first..tile.first + tile.len;
        q.transpose(positions.clone(), self.q_lanes);
        g.transpose(positions.clone(), self.g_lanes);
        q.copy(positions.clone(), self.width, self.q_rows);
        g.copy(positions.clone(), self.width, self.g_rows);
        self.q_sums.fill(0.0);
        for (lane, position) in positions.enumerate() {
            self.lse[lane] = given.lse[(start + position) * heads + tile.head];
            self.delta[lane] = dot(g.row(position), out.row(position));
        }
    }
}

/// `Σ a·b` over 16 running sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// # Safety
/// As [`RowsMut::row`].
unsafe fn write(to: RowsMut, positions: Range<usize>, sums: &[f32]) {
    let width = to.head_dim.next_multiple_of(LANES);
    for (position, sums) in positions.zip(sums.chunks_exact(width)) {
        // SAFETY: the caller's.
        unsafe { to.row(position) }.copy_from_slice(&sums[..to.head_dim]);
    }
}

/// What a tile of queries and a tile of keys add to the gradients.
fn differentiate_tile(
    job: &Job<'_>,
    part: &Part<'_>,
    tile: Tile,
    positions: Range<usize>,
    t: &mut Tiles<'_>,
) {
    let Tiles { width, .. } = *t;
    let [k, v] =
        [job.k, job.v].map(|x| job.rows(x, job.h.kv_heads, part.kv_head, part.segment.start));
    k.copy(positions.clone(), width, t.keys);
    v.copy(positions.clone(), width, t.values);
    let lanes = job.lanes(tile, positions.clone());
    score(job, positions.len(), &lanes, (t.keys, width), t.q_lanes, t.p);
    score(job, positions.len(), &lanes, (t.values, width), t.g_lanes, t.ds);
    derive(job, tile, positions.clone(), lanes.clone(), t);
    if part.of != Of::Keys {
        // dq[query] += Σ ds[key, query] · k[key]
        let product = Product {
            a: t.ds[lanes.start..].as_ptr(),
            a_row: 1,
            a_col: QUERIES,
            b: t.keys.as_ptr(),
            b_row: width,
            c: t.q_sums[lanes.start * width..].as_mut_ptr(),
            c_row: width,
            m: lanes.len(),
            n: width,
            k: positions.len(),
            accumulate: true,
        };
        // SAFETY: the tiles hold that many lanes, keys and widths.
        unsafe { product.run(job.tier) };
    }
    if part.of != Of::Queries {
        // dv[key] += Σ p[key, query] · g[query], dk[key] += Σ ds[key, query] · q[query]
        let first = (positions.start - part.keys.start) * width;
        let operands = [(&*t.p, &*t.g_rows, &mut *t.v_sums), (&*t.ds, &*t.q_rows, &mut *t.k_sums)];
        for (weights, rows, sums) in operands {
            let product = Product {
                a: weights[lanes.start..].as_ptr(),
                a_row: QUERIES,
                a_col: 1,
                b: rows[lanes.start * width..].as_ptr(),
                b_row: width,
                c: sums[first..].as_mut_ptr(),
                c_row: width,
                m: positions.len(),
                n: width,
                k: lanes.len(),
                accumulate: true,
            };
            // SAFETY: the tiles hold that many lanes, keys and widths.
            unsafe { product.run(job.tier) };
        }
    }
}

/// Turns raw scores into probabilities, and `g·vᵀ` into the gradient of the raw scores.
fn derive(
    job: &Job<'_>,
    tile: Tile,
    keys: Range<usize>,
    lanes: Range<usize>,
    tiles: &mut Tiles<'_>,
) {
    let tier = job.tier;
    dispatch!(
        tier,
        derive_scores,
        job: &Job<'_>,
        tile: Tile,
        keys: Range<usize>,
        lanes: Range<usize>,
        tiles: &mut Tiles<'_>,
    );
}

#[inline(always)]
unsafe fn derive_scores<S: Simd>(
    job: &Job<'_>,
    tile: Tile,
    keys: Range<usize>,
    lanes: Range<usize>,
    tiles: &mut Tiles<'_>,
) {
    let vectors = vectors(&lanes);
    for (i, key) in keys.enumerate() {
        let bias = job.bias(tile.head, key);
        let p = &mut tiles.p[i * QUERIES..][..QUERIES];
        let ds = &mut tiles.ds[i * QUERIES..][..QUERIES];
        for at in vectors.clone().step_by(LANES) {
            // SAFETY: vectors lie inside the QUERIES lanes of each row.
            unsafe {
                let (to_p, to_ds) = (p.as_mut_ptr().add(at), ds.as_mut_ptr().add(at));
                let (score, slope) = ruled::<S>(job, bias, S::load(to_p));
                let p = simd::exp::<S>(S::sub(score, S::load(tiles.lse.as_ptr().add(at))));
                let change = S::sub(S::load(to_ds), S::load(tiles.delta.as_ptr().add(at)));
                let ds = S::mul(S::mul(p, change), S::mul(slope, S::splat(job.h.scale)));
                S::store(to_p, p);
                S::store(to_ds, ds);
            }
        }
        let seeing = job.lanes(tile, key..key + 1);
        hide(p, &vectors, seeing.clone(), 0.0);
        hide(ds, &vectors, seeing, 0.0);
    }
}
