//! Causal attention inside segments of rows, forward and backward: what training needs.
//!
//! A segment is an example, or one of several packed into a sequence; its positions begin
//! at 0 and it sees nothing of its neighbours. Nothing is as large as rows × rows: tiles of
//! queries pass over tiles of keys and keep a running maximum and sum (Dao et al. 2022,
//! FlashAttention), and the backward pass computes the probabilities again from the
//! log-sum-exp that the forward pass left. In a tile the queries are the lanes, so that no
//! sum crosses lanes, and each product of matrices is one of three kinds.
//!
//! Tiles begin where their segment does and sums run in the order of the keys, or of the
//! heads of a group and their queries: no bit depends on threads or on company.
//!
//! Left out: attention sinks, dropout of probabilities, masks other than causal and sliding.

mod backward;
mod forward;
mod product;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;

use super::attention::{Heads, Rule};
use super::ops::capped;
use super::parallel::SharedMut;
use super::simd::{LANES, Simd};
use super::{Tier, tier};
use backward::Given;

/// Queries of a tile: four vectors.
const QUERIES: usize = 4 * LANES;
/// Keys of a tile: whole strips, and whole tiles of the products' registers.
const KEYS: usize = 3 * STRIP;
/// Keys that share a range of lanes where some queries of a tile do not see some keys.
const STRIP: usize = LANES;
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
    forward::attend(&Job { tier: tier(), h, rule, q, k, v }, segments, out, lse);
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
    let whole = backward::whole_units_suffice(h, segments, rayon::current_num_threads());
    backward::differentiate(&job, &Given { out, lse, dout }, segments, whole, [dq, dk, dv]);
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

/// A piece of work: some queries of the heads that share a KV head, and some keys. All of one
/// segment, by their positions in it.
#[derive(Clone)]
struct Part {
    /// First row of the segment.
    segment: usize,
    kv_head: usize,
    heads: Range<usize>,
    /// From the start of a tile.
    queries: Range<usize>,
    /// From the start of a tile.
    keys: Range<usize>,
}

impl Part {
    fn whole(job: &Job<'_>, segment: &Range<usize>, kv_head: usize) -> Self {
        let (heads, all) = (job.heads(kv_head), 0..segment.len());
        Self { segment: segment.start, kv_head, heads, queries: all.clone(), keys: all }
    }

    fn tiles(&self, head: usize) -> impl Iterator<Item = Tile> {
        let end = self.queries.end;
        let firsts = self.queries.clone().step_by(QUERIES);
        firsts.map(move |first| Tile { head, first, len: QUERIES.min(end - first) })
    }

    /// The tiles of the part's keys that some query of the tile sees.
    fn key_tiles(&self, job: &Job<'_>, tile: Tile) -> impl Iterator<Item = Range<usize>> {
        let seen = job.seen(tile.positions());
        let keys = seen.start.max(self.keys.start)..seen.end.min(self.keys.end);
        let end = keys.end;
        keys.step_by(KEYS).map(move |start| start..(start + KEYS).min(end))
    }

    /// Where the rows of these positions lie in a matrix of the part's keys.
    fn key_rows(&self, positions: Range<usize>, width: usize) -> Range<usize> {
        let first = self.keys.start;
        (positions.start - first) * width..(positions.end - first) * width
    }
}

/// Queries of one head at consecutive positions of a segment.
#[derive(Clone, Copy)]
struct Tile {
    head: usize,
    /// Position of the first.
    first: usize,
    len: usize,
}

impl Tile {
    fn positions(self) -> Range<usize> {
        self.first..self.first + self.len
    }
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

    /// Query heads of a KV head.
    fn group(&self) -> usize {
        self.h.heads / self.h.kv_heads
    }

    fn heads(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.group()..(kv_head + 1) * self.group()
    }

    /// A part's rows of a head in a matrix that is laid out as `q`.
    fn queries<'a>(&self, x: &'a [f32], part: &Part, head: usize) -> HeadRows<'a> {
        HeadRows::new(x, [self.h.heads, head, self.h.head_dim], part.segment)
    }

    fn keys(&self, part: &Part) -> HeadRows<'_> {
        HeadRows::new(self.k, [self.h.kv_heads, part.kv_head, self.h.head_dim], part.segment)
    }

    fn values(&self, part: &Part) -> HeadRows<'_> {
        HeadRows::new(self.v, [self.h.kv_heads, part.kv_head, self.h.head_dim], part.segment)
    }

    /// Positions that some of the queries see, down to where a tile of keys begins.
    fn seen(&self, queries: Range<usize>) -> Range<usize> {
        let lost = |window| (queries.start + 1).saturating_sub(window);
        self.rule.window.map_or(0, lost) / KEYS * KEYS..queries.end
    }

    /// Queries of the tile that see any of the keys.
    fn lanes(&self, tile: Tile, keys: Range<usize>) -> Range<usize> {
        let start = keys.start.saturating_sub(tile.first).min(tile.len);
        let end = self.rule.window.map_or(tile.len, |window| {
            (keys.end - 1).saturating_add(window).saturating_sub(tile.first).min(tile.len)
        });
        start..end.max(start)
    }

    /// A tile of keys as positions that share a range of lanes, where they lie in numbers of
    /// pairs, and those lanes: all of them if all queries see all keys, else strips, which
    /// leave out most of the pairs that do not see each other.
    fn strips(
        &self,
        tile: Tile,
        keys: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize, Range<usize>)> {
        let all = |key| self.lanes(tile, key..key + 1) == (0..tile.len);
        let step = if all(keys.start) && all(keys.end - 1) { KEYS } else { STRIP };
        let (first, end) = (keys.start, keys.end);
        keys.step_by(step).map(move |start| {
            let strip = start..(start + step).min(end);
            (strip.clone(), (start - first) * QUERIES, self.lanes(tile, strip))
        })
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
    fn new(data: &'a [f32], [heads, head, head_dim]: [usize; 3], segment: usize) -> Self {
        let stride = heads * head_dim;
        Self { data, offset: segment * stride + head * head_dim, stride, head_dim }
    }

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
    /// The rows of a matrix as long as that one.
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

    /// Writes sums `[positions][width]`, the width padded to whole vectors.
    ///
    /// # Safety
    /// As [`RowsMut::row`].
    unsafe fn write(&self, positions: Range<usize>, sums: &[f32]) {
        let width = self.head_dim.next_multiple_of(LANES);
        for (position, sums) in positions.zip(sums.chunks_exact(width)) {
            // SAFETY: the caller's.
            unsafe { self.row(position) }.copy_from_slice(&sums[..self.head_dim]);
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
