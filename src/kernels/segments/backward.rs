//! The backward pass: probabilities computed again, five products a pair of tiles.

use std::cmp::Reverse;
use std::ops::Range;

use super::product::{add_keys, add_queries, score, vectors};
use super::{Heads, Job, KEYS, Part, QUERIES, RowsMut, Tile, hide, pairs, ruled, with_scratch};
use crate::kernels::dispatch;
use crate::kernels::parallel::{self, SharedMut};
use crate::kernels::simd::{self, LANES, Simd};

/// Keys of a task where tasks that take all of a segment's keys would be too few.
pub(super) const KEYS_A_TASK: usize = 8 * KEYS;

/// What the backward pass is given besides the forward pass's operands.
pub(super) struct Given<'a> {
    pub(super) out: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) dout: &'a [f32],
}

/// Whose gradients a task makes; all that they need is in its part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Queries,
    Keys,
    Both,
}

/// Whether the pairs of a segment and a KV head keep the threads busy. If not, queries and
/// keys get tasks of their own, with the same sums, but 7 products of tiles in place of 5.
pub(super) fn whole_units_suffice(h: Heads, segments: &[Range<usize>], threads: usize) -> bool {
    let squares = || segments.iter().map(|s| s.len() * s.len());
    let (longest, all) = (squares().max().unwrap_or(0), h.kv_heads * squares().sum::<usize>());
    5 * longest * threads <= 7 * all
}

pub(super) fn differentiate(
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
            if whole_units {
                parts.push((Part::whole(job, segment, kv_head), Of::Both));
            } else {
                divide(Part::whole(job, segment, kv_head), &mut parts);
            }
        }
    }
    // The longest first, so that threads end together.
    parts.sort_by_key(|(part, _)| Reverse(part.heads.len() * part.queries.len() * part.keys.len()));
    let gradients = [dq, dk, dv].map(SharedMut::new);
    parallel::for_each(parts.len(), flops, |i| {
        let (part, of) = &parts[i];
        differentiate_part(job, given, part, *of, gradients);
    });
}

/// Tasks for some of the keys, and tasks for some of the queries.
fn divide(whole: Part, parts: &mut Vec<(Part, Of)>) {
    for start in whole.keys.clone().step_by(KEYS_A_TASK) {
        let keys = start..(start + KEYS_A_TASK).min(whole.keys.end);
        let queries = start / QUERIES * QUERIES..whole.queries.end;
        parts.push((Part { keys, queries, ..whole.clone() }, Of::Keys));
    }
    for start in whole.queries.clone().step_by(QUERIES) {
        let queries = start..(start + QUERIES).min(whole.queries.end);
        parts.push((Part { keys: 0..queries.end, queries, ..whole.clone() }, Of::Queries));
    }
}

/// Tile by tile, with `g` the gradient of the result and `p` the probabilities,
/// `dv = pᵀ·g`, `ds = p ∘ (g·vᵀ - rowsum(g ∘ out))`, `dq = ds·k` and `dk = dsᵀ·q`.
fn differentiate_part(
    job: &Job<'_>,
    given: &Given<'_>,
    part: &Part,
    of: Of,
    [dq, dk, dv]: [SharedMut<f32>; 3],
) {
    with_tiles(job, part, of, |tiles| {
        for head in part.heads.clone() {
            for tile in part.tiles(head) {
                tiles.load_queries(job, given, part, tile);
                for positions in part.key_tiles(job, tile) {
                    differentiate_tile(job, part, of, tile, positions, tiles);
                }
                if of != Of::Keys {
                    let dq = RowsMut::new(dq, job.queries(job.q, part, head));
                    // SAFETY: no other part has the gradients of these queries.
                    unsafe { dq.write(tile.positions(), tiles.q_sums) };
                }
            }
        }
        if of != Of::Queries {
            let to = |d| RowsMut::new(d, job.keys(part));
            // SAFETY: no other part has the gradients of these keys.
            unsafe {
                to(dk).write(part.keys.clone(), tiles.k_sums);
                to(dv).write(part.keys.clone(), tiles.v_sums);
            }
        }
    });
}

/// A part's operands and sums.
struct Tiles<'a> {
    /// Values of a row, padded to whole vectors.
    width: usize,
    /// `[keys of the part][width]`, as are `values`, `k_sums` and `v_sums`.
    keys: &'a mut [f32],
    values: &'a mut [f32],
    k_sums: &'a mut [f32],
    v_sums: &'a mut [f32],
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
    lse: [f32; QUERIES],
    /// `rowsum(g ∘ out)`.
    delta: [f32; QUERIES],
}

fn with_tiles(job: &Job<'_>, part: &Part, of: Of, task: impl FnOnce(&mut Tiles<'_>)) {
    let width = job.width();
    let keys = part.keys.len() * width;
    let sums = if of == Of::Queries { 0 } else { keys };
    let (lanes, rows, pairs) = (job.h.head_dim * QUERIES, QUERIES * width, KEYS * QUERIES);
    let lengths = [keys, keys, sums, sums, lanes, lanes, rows, rows, rows, pairs, pairs];
    with_scratch(lengths, |buffers| {
        let [keys, values, k_sums, v_sums, q_lanes, g_lanes, q_rows, g_rows, q_sums, p, ds] =
            buffers;
        job.keys(part).copy(part.keys.clone(), width, keys);
        job.values(part).copy(part.keys.clone(), width, values);
        k_sums.fill(0.0);
        v_sums.fill(0.0);
        let (lse, delta) = ([0.0; QUERIES], [0.0; QUERIES]);
        task(&mut Tiles {
            width,
            keys,
            values,
            k_sums,
            v_sums,
            q_lanes,
            g_lanes,
            q_rows,
            g_rows,
            q_sums,
            p,
            ds,
            lse,
            delta,
        });
    });
}

impl Tiles<'_> {
    /// Brings in what belongs to the queries of a tile, and begins their sums.
    fn load_queries(&mut self, job: &Job<'_>, given: &Given<'_>, part: &Part, tile: Tile) {
        let [q, g, out] = [job.q, given.dout, given.out].map(|x| job.queries(x, part, tile.head));
        q.transpose(tile.positions(), self.q_lanes);
        g.transpose(tile.positions(), self.g_lanes);
        q.copy(tile.positions(), self.width, self.q_rows);
        g.copy(tile.positions(), self.width, self.g_rows);
        self.q_sums.fill(0.0);
        for (lane, position) in tile.positions().enumerate() {
            self.lse[lane] = given.lse[(part.segment + position) * job.h.heads + tile.head];
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

/// What a tile of queries and a tile of keys add to the gradients.
fn differentiate_tile(
    job: &Job<'_>,
    part: &Part,
    of: Of,
    tile: Tile,
    positions: Range<usize>,
    t: &mut Tiles<'_>,
) {
    let (tier, width) = (job.tier, t.width);
    let strips = || job.strips(tile, positions.clone());
    for (rows, at, lanes) in strips() {
        let rows = part.key_rows(rows, width);
        score(tier, &lanes, (&t.keys[rows.clone()], width), t.q_lanes, &mut t.p[at..]);
        score(tier, &lanes, (&t.values[rows], width), t.g_lanes, &mut t.ds[at..]);
    }
    derive(job, tile, positions.clone(), t);
    for (rows, at, lanes) in strips() {
        let rows = part.key_rows(rows, width);
        let (p, ds) = (&t.p[at..], &t.ds[at..]);
        if of != Of::Keys {
            add_keys(tier, &lanes, ds, (&t.keys[rows.clone()], width), t.q_sums);
        }
        if of != Of::Queries {
            add_queries(tier, &lanes, p, (t.g_rows, width), &mut t.v_sums[rows.clone()]);
            add_queries(tier, &lanes, ds, (t.q_rows, width), &mut t.k_sums[rows]);
        }
    }
}

/// Turns raw scores into probabilities, and `g·vᵀ` into the gradient of the raw scores.
fn derive(job: &Job<'_>, tile: Tile, keys: Range<usize>, tiles: &mut Tiles<'_>) {
    let tier = job.tier;
    dispatch!(
        tier,
        derive_scores,
        job: &Job<'_>,
        tile: Tile,
        keys: Range<usize>,
        tiles: &mut Tiles<'_>,
    );
}

#[inline(always)]
unsafe fn derive_scores<S: Simd>(
    job: &Job<'_>,
    tile: Tile,
    keys: Range<usize>,
    tiles: &mut Tiles<'_>,
) {
    let vectors = vectors(&job.lanes(tile, keys.clone()));
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
