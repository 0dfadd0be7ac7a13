//! The forward pass: tiles of queries pass over the keys with a running softmax.

use std::cmp::Reverse;
use std::ops::Range;

use super::product::{add_keys, score, vectors};
use super::{Job, KEYS, NO_SCORE, Part, QUERIES, RowsMut, Tile, hide, pairs, ruled, with_scratch};
use crate::kernels::dispatch;
use crate::kernels::parallel::{self, SharedMut};
use crate::kernels::simd::{self, LANES, Simd};

/// Tiles of queries for which a task brings in the keys and values, if that leaves each
/// thread several tasks.
const TILES_A_TASK: usize = 8;

pub(super) fn attend(job: &Job<'_>, segments: &[Range<usize>], out: &mut [f32], lse: &mut [f32]) {
    job.check(segments, lse.len());
    assert_eq!(out.len(), job.q.len());
    let tiles = segments.iter().map(|s| job.h.heads * s.len().div_ceil(QUERIES)).sum::<usize>();
    let tiles = (tiles / (4 * rayon::current_num_threads())).min(TILES_A_TASK);
    let positions = QUERIES * (tiles / job.group()).max(1);
    let mut parts = Vec::new();
    let mut flops = 0;
    for segment in segments {
        flops += 4 * job.h.heads * job.h.head_dim * pairs(job.rule, segment.len());
        for start in (0..segment.len()).step_by(positions) {
            let queries = start..(start + positions).min(segment.len());
            let of = |kv_head| Part {
                segment: segment.start,
                kv_head,
                heads: job.heads(kv_head),
                keys: job.seen(queries.clone()),
                queries: queries.clone(),
            };
            parts.extend((0..job.h.kv_heads).map(of));
        }
    }
    // The longest first, so that threads end together.
    parts.sort_by_key(|part| Reverse(part.keys.len()));
    let results = [SharedMut::new(out), SharedMut::new(lse)];
    parallel::for_each(parts.len(), flops, |i| attend_part(job, &parts[i], results));
}

fn attend_part(job: &Job<'_>, part: &Part, results: [SharedMut<f32>; 2]) {
    let width = job.width();
    let (keys, queries) = (part.keys.len() * width, job.h.head_dim * QUERIES);
    let lengths = [keys, keys, queries, KEYS * QUERIES, QUERIES * width];
    with_scratch(lengths, |[keys, values, q_lanes, scores, sums]| {
        job.keys(part).copy(part.keys.clone(), width, keys);
        job.values(part).copy(part.keys.clone(), width, values);
        let mut buffers = Buffers { width, keys, values, q_lanes, scores, sums };
        for head in part.heads.clone() {
            for tile in part.tiles(head) {
                attend_tile(job, part, tile, &mut buffers, results);
            }
        }
    });
}

struct Buffers<'a> {
    /// Values of a row, padded to whole vectors.
    width: usize,
    /// `[keys of the part][width]`, as are `values`.
    keys: &'a [f32],
    values: &'a [f32],
    /// `[head_dim][QUERIES]`
    q_lanes: &'a mut [f32],
    /// `[KEYS][QUERIES]`
    scores: &'a mut [f32],
    /// `[QUERIES][width]`
    sums: &'a mut [f32],
}

/// The result of one tile of queries.
fn attend_tile(
    job: &Job<'_>,
    part: &Part,
    tile: Tile,
    buffers: &mut Buffers<'_>,
    [out, lse]: [SharedMut<f32>; 2],
) {
    let Buffers { width, keys, values, .. } = *buffers;
    let Buffers { q_lanes, scores, sums, .. } = buffers;
    let q = job.queries(job.q, part, tile.head);
    q.transpose(tile.positions(), q_lanes);
    sums.fill(0.0);
    let mut softmax = Softmax::new();
    for positions in part.key_tiles(job, tile) {
        let strips = || job.strips(tile, positions.clone());
        for (rows, at, lanes) in strips() {
            let keys = &keys[part.key_rows(rows, width)];
            score(job.tier, &lanes, (keys, width), q_lanes, &mut scores[at..]);
        }
        softmax.take(job, tile, positions.clone(), scores, sums);
        for (rows, at, lanes) in strips() {
            let values = &values[part.key_rows(rows, width)];
            add_keys(job.tier, &lanes, &scores[at..], (values, width), sums);
        }
    }
    let out = RowsMut::new(out, q);
    for (lane, position) in tile.positions().enumerate() {
        let (log_sum, factor) = softmax.end(lane);
        let sums = &sums[lane * width..];
        // SAFETY: tasks write their own rows of their own heads.
        unsafe {
            *lse.get().add((part.segment + position) * job.h.heads + tile.head) = log_sum;
            out.row(position).iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * factor);
        }
    }
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
    scores: &mut [f32],
    sums: &mut [f32],
) {
    let lanes = job.lanes(tile, keys.clone());
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
