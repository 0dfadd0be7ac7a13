//! Choosing one token from one row of logits.
//!
//! Order of processing, as in Hugging Face transformers' `generate`, after the guide
//! has taken out the tokens that it does not allow: penalties, EOS suppression, temperature, top-k, top-p, min-p, draw. The draw inverts the
//! cumulative distribution in a fixed order: by id without top-k and top-p,
//! else from the best token down with the lower id first on ties. Where several
//! tokens tie for the last of the `top_k` places, the lower ids get them
//! (transformers keeps all of them).

use std::collections::HashMap;

use super::softmax::{log_sum_exp, row_max, softmax_weights, sum};
use super::{SamplingParams, TokenLogprob};
use crate::model::LogitsError;

/// How often each token occurs among prompt and generated tokens.
#[derive(Debug, Clone, Default)]
pub struct TokenCounts(HashMap<u32, u32>);

impl TokenCounts {
    /// Counts of `token_ids`, if `params` hold a penalty that needs them.
    pub fn for_params(params: &SamplingParams, token_ids: &[u32]) -> Option<Self> {
        let needed = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        needed.then(|| {
            let mut counts = Self::default();
            token_ids.iter().for_each(|&id| counts.add(id));
            counts
        })
    }

    /// Counts one more `token_id`.
    pub fn add(&mut self, token_id: u32) {
        *self.0.entry(token_id).or_default() += 1;
    }

    /// HF's repetition penalty (a score below 0 is multiplied, another divided),
    /// then OpenAI's presence and frequency penalties (subtracted).
    fn penalise(&self, row: &mut [f32], params: &SamplingParams) {
        for (&id, &count) in &self.0 {
            let logit = &mut row[id as usize];
            *logit = if *logit < 0.0 {
                *logit * params.repetition_penalty
            } else {
                *logit / params.repetition_penalty
            };
            *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}

/// Buffers of vocabulary size, kept from row to row.
#[derive(Debug, Default)]
pub struct Scratch {
    edited: Vec<f32>,
    weights: Vec<f32>,
    ranking: Ranking,
}

/// Chooses a token. `counts` are those of [`TokenCounts::for_params`], `uniform`
/// is the draw in [0, 1), unused where `temperature` is 0. `allowed` are the tokens
/// that a guide leaves, a bitmap by id in words of 32; it decides on EOS, too.
pub fn choose(
    row: &[f32],
    params: &SamplingParams,
    counts: Option<&TokenCounts>,
    allowed: Option<&[u32]>,
    eos_token_ids: &[u32],
    uniform: f64,
    scratch: &mut Scratch,
) -> Result<u32, LogitsError> {
    let Scratch { edited, weights, ranking } = scratch;
    if allowed.is_some() {
        // A NaN is a fault of the model, even where it is not allowed.
        row_max(row)?;
    }
    let row = edit(row, params, counts, allowed, eos_token_ids, edited);
    let max = row_max(row)?;
    if params.temperature <= 0.0 || params.temperature.is_nan() {
        // The lowest id on ties.
        return row.iter().position(|&x| x == max).map_or(Err(LogitsError::NoCandidate), as_id);
    }
    let total = softmax_weights(row, max, params.temperature, weights);
    if (params.top_k == 0 || params.top_k >= row.len()) && params.top_p >= 1.0 {
        let mut kept = total;
        if params.min_p > 0.0 {
            // The best weight is 1, so min-p compares weights themselves.
            weights.iter_mut().for_each(|w| *w = if *w < params.min_p { 0.0 } else { *w });
            kept = sum(weights);
        }
        return draw(weights.iter().copied(), uniform * kept)
            .map_or(Err(LogitsError::NoCandidate), as_id);
    }
    let (best, mass) = filter(row, weights, total, params, ranking);
    draw(best.iter().map(|&key| weights[id_of(key) as usize]), uniform * mass)
        .map_or(Err(LogitsError::NoCandidate), |place| Ok(id_of(best[place])))
}

/// The raw log-probabilities of `token` and of the `num_top` best tokens.
pub fn token_logprob(
    row: &[f32],
    token: u32,
    num_top: usize,
    scratch: &mut Scratch,
) -> Result<TokenLogprob, LogitsError> {
    let normaliser = log_sum_exp(row, &mut scratch.weights)?;
    let logprob = |id: u32| (f64::from(row[id as usize]) - normaliser) as f32;
    let mut top = Vec::new();
    if num_top > 0 {
        let ranking = &mut scratch.ranking;
        ranking.fill(row, |_| true);
        ranking.truncate(num_top);
        top.extend(ranking.keys.iter().map(|&key| (id_of(key), logprob(id_of(key)))));
    }
    Ok(TokenLogprob { token, logprob: logprob(token), top })
}

/// Log-probability of `target` by this row.
pub fn score(row: &[f32], target: u32, scratch: &mut Scratch) -> Result<f64, LogitsError> {
    Ok(f64::from(row[target as usize]) - log_sum_exp(row, &mut scratch.weights)?)
}

/// The row after guide, penalties and EOS suppression; copied only where they apply.
fn edit<'a>(
    row: &'a [f32],
    params: &SamplingParams,
    counts: Option<&TokenCounts>,
    allowed: Option<&[u32]>,
    eos_token_ids: &[u32],
    edited: &'a mut Vec<f32>,
) -> &'a [f32] {
    let suppress_eos = params.ignore_eos && allowed.is_none();
    if counts.is_none() && allowed.is_none() && !suppress_eos {
        return row;
    }
    edited.clear();
    edited.extend_from_slice(row);
    if let Some(allowed) = allowed {
        keep_allowed(edited, allowed);
    }
    if let Some(counts) = counts {
        counts.penalise(edited, params);
    }
    if suppress_eos {
        for &id in eos_token_ids {
            if let Some(logit) = edited.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    edited
}

/// Only the tokens of a bitmap; those beyond its end are not allowed.
fn keep_allowed(row: &mut [f32], allowed: &[u32]) {
    let words = allowed.iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in row.chunks_mut(32).zip(words) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// The tokens that top-k, top-p and min-p leave, best first, and their mass.
/// Each filter keeps a prefix of that order, so the shortest prefix counts.
fn filter<'a>(
    row: &[f32],
    weights: &[f32],
    total: f64,
    params: &SamplingParams,
    ranking: &'a mut Ranking,
) -> (&'a [u64], f64) {
    let top_p = f64::from(params.top_p);
    let mut total = total;
    if params.top_k > 0 && params.top_k < row.len() {
        ranking.fill(row, |id| weights[id] > 0.0);
        ranking.truncate(params.top_k);
        total = ranking.keys.iter().map(|&key| f64::from(weights[id_of(key) as usize])).sum();
    } else {
        // All tokens below this weight together have less than half of the mass
        // that top-p leaves out: none of them can be wanted.
        let floor = ((1.0 - top_p) * total / (2.0 * row.len() as f64)) as f32;
        let floor = floor.max(params.min_p);
        ranking.fill(row, |id| weights[id] > 0.0 && weights[id] >= floor);
    }
    let limit = if top_p < 1.0 { top_p * total } else { f64::INFINITY };
    let (mut kept, mut mass) = (0, 0.0);
    while let Some(id) = ranking.get(kept) {
        let weight = weights[id as usize];
        if kept > 0 && (mass >= limit || weight < params.min_p) {
            break;
        }
        mass += f64::from(weight);
        kept += 1;
    }
    (&ranking.keys[..kept], mass)
}

/// The first place where the running sum exceeds `target`; where rounding puts
/// the target at the very end, the last place with weight.
fn draw(weights: impl Iterator<Item = f32>, target: f64) -> Option<usize> {
    let mut sum = 0.0;
    let mut last = None;
    for (place, weight) in weights.enumerate() {
        if weight > 0.0 {
            sum += f64::from(weight);
            last = Some(place);
            if sum > target {
                break;
            }
        }
    }
    last
}

fn as_id(position: usize) -> Result<u32, LogitsError> {
    Ok(position as u32)
}

/// Tokens by falling logit, then rising id, sorted no further than is asked.
/// A token is one integer key whose rising order is that order.
#[derive(Debug, Default)]
struct Ranking {
    keys: Vec<u64>,
    /// Length of the sorted prefix, which holds the best tokens.
    sorted: usize,
}

impl Ranking {
    /// Takes the tokens of `row` that `wanted` accepts by id.
    fn fill(&mut self, row: &[f32], wanted: impl Fn(usize) -> bool) {
        self.keys.clear();
        self.sorted = 0;
        let wanted = row.iter().enumerate().filter(|&(id, _)| wanted(id));
        self.keys.extend(wanted.map(|(id, &logit)| key_of(logit, id as u32)));
    }

    /// Keeps the `count` best, sorted.
    fn truncate(&mut self, count: usize) {
        self.sort_to(count);
        self.keys.truncate(count);
    }

    /// The id at `place`.
    fn get(&mut self, place: usize) -> Option<u32> {
        const FIRST: usize = 64;
        const GROWTH: usize = 8;
        if place >= self.sorted {
            self.sort_to((place * GROWTH).max(FIRST));
        }
        self.keys.get(place).map(|&key| id_of(key))
    }

    fn sort_to(&mut self, end: usize) {
        let end = end.min(self.keys.len());
        if end <= self.sorted {
            return;
        }
        let rest = &mut self.keys[self.sorted..];
        let count = end - self.sorted;
        if count < rest.len() {
            rest.select_nth_unstable(count - 1);
        }
        rest[..count].sort_unstable();
        self.sorted = end;
    }
}

/// The IEEE bits made to order like the numbers (−0 as 0), inverted, then the id.
fn key_of(logit: f32, id: u32) -> u64 {
    let bits = (logit + 0.0).to_bits();
    let rising = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!rising) << 32 | u64::from(id)
}

fn id_of(key: u64) -> u32 {
    key as u32
}

#[cfg(test)]
#[path = "choose_tests.rs"]
mod tests;
