//! Which examples an optimiser step trains on: pure functions of lengths and a seed.
//!
//! Nothing here knows ranks until [`share`]: the sequences of a step, and so what is learned,
//! do not depend on how many there are. Nor is anything padded in farm (a micro-batch is
//! ragged), so that batches of like lengths would save nothing; [`share`] balances tokens
//! between the groups instead, which costs the order no randomness.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::philox::philox4x32;
use crate::{Error, Result};

/// Numbers of the examples that stand one behind the other in one sequence. Attention never
/// crosses from one to the next, and each counts its positions from 0.
pub type Sequence = Vec<u32>;

/// How examples become steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchConfig {
    /// Sequences an optimiser step, over all ranks.
    pub batch_size: usize,
    /// Whether a sequence holds as many examples as fit; otherwise it is one example.
    pub packing: bool,
    /// Most tokens in a packed sequence.
    pub max_seq_len: usize,
    /// Seeds the order.
    pub seed: u64,
}

/// Where a step stands in the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the epoch, from 0.
    pub epoch: u64,
    /// Number of the step in its epoch, from 0.
    pub step: u64,
    /// Steps of that epoch.
    pub steps: u64,
}

/// The steps of a run, epoch after epoch, each in an order of its own.
///
/// An epoch has every example exactly once. Its order is a Fisher-Yates shuffle with draws
/// from Philox, keyed by the seed and the epoch. With packing, the shuffled examples go
/// first-fit into sequences of at most `max_seq_len` tokens: each into the earliest sequence
/// that has room, else into a new one. Sequences stay in the order in which they were opened.
/// A step takes the next `batch_size` of them; the last step of an epoch may have fewer.
///
/// Only one epoch is held at a time.
#[derive(Debug, Clone)]
pub struct Batches {
    lengths: Vec<u32>,
    config: BatchConfig,
    /// First global step of each epoch seen so far, and of the one behind the last of them.
    epoch_starts: Vec<u64>,
    /// The epoch that was asked for last.
    current: Option<(u64, Vec<Sequence>)>,
}

impl Batches {
    /// The steps over examples of these lengths. A single example that is longer than
    /// `max_seq_len` makes a sequence by itself.
    ///
    /// # Errors
    /// Usage: there is no example, or `batch_size` or `max_seq_len` is 0.
    pub fn new(lengths: &[usize], config: &BatchConfig) -> Result<Self> {
        if lengths.is_empty() || config.batch_size == 0 || config.max_seq_len == 0 {
            return Err(Error::usage(
                "training needs an example, a --batch-size and a --max-seq-len of at least 1",
            ));
        }
        let lengths = lengths.iter().map(|&n| u32::try_from(n).unwrap_or(u32::MAX)).collect();
        Ok(Self { lengths, config: *config, epoch_starts: vec![0], current: None })
    }

    /// Optimiser steps of an epoch. Without packing it is the same for all.
    pub fn steps_per_epoch(&mut self, epoch: u64) -> u64 {
        if !self.config.packing {
            return self.lengths.len().div_ceil(self.config.batch_size) as u64;
        }
        let sequences = self.epoch(epoch).len();
        sequences.div_ceil(self.config.batch_size) as u64
    }

    /// Optimiser steps of the first `epochs` epochs.
    pub fn steps_of_epochs(&mut self, epochs: u64) -> u64 {
        if !self.config.packing {
            return epochs.saturating_mul(self.steps_per_epoch(0));
        }
        while (self.epoch_starts.len() as u64) <= epochs {
            self.count_next_epoch();
        }
        self.epoch_starts[epochs as usize]
    }

    /// Where a step of the run (from 0) stands.
    pub fn place(&mut self, global_step: u64) -> Place {
        if !self.config.packing {
            let steps = self.steps_per_epoch(0);
            return Place { epoch: global_step / steps, step: global_step % steps, steps };
        }
        while self.epoch_starts.last().is_some_and(|start| *start <= global_step) {
            self.count_next_epoch();
        }
        let epoch = self.epoch_starts.partition_point(|start| *start <= global_step) - 1;
        let (start, end) = (self.epoch_starts[epoch], self.epoch_starts[epoch + 1]);
        Place { epoch: epoch as u64, step: global_step - start, steps: end - start }
    }

    fn count_next_epoch(&mut self) {
        let epoch = self.epoch_starts.len() - 1;
        let steps = self.steps_per_epoch(epoch as u64);
        self.epoch_starts.push(self.epoch_starts[epoch] + steps);
    }

    /// The sequences of a step of the run (from 0).
    pub fn step(&mut self, global_step: u64) -> Vec<Sequence> {
        let Place { epoch, step, .. } = self.place(global_step);
        let batch_size = self.config.batch_size;
        let mut batches = self.epoch(epoch).chunks(batch_size);
        batches.nth(step as usize).unwrap_or_default().to_vec()
    }

    /// The sequences of an epoch.
    pub fn epoch(&mut self, epoch: u64) -> &[Sequence] {
        if self.current.as_ref().is_none_or(|(number, _)| *number != epoch) {
            let order = shuffled(self.lengths.len(), self.config.seed, epoch);
            let sequences = match self.config.packing {
                true => first_fit(&order, &self.lengths, self.config.max_seq_len),
                false => order.into_iter().map(|example| vec![example]).collect(),
            };
            self.current = Some((epoch, sequences));
        }
        self.current.as_ref().map_or(&[], |(_, sequences)| sequences)
    }
}

/// A word of the counter that keeps these draws apart from all others that
/// the same seed makes.
const STREAM: u32 = u32::from_be_bytes(*b"ordr");

/// The numbers from 0 to `count` - 1 in an order that follows from seed and epoch.
pub(super) fn shuffled(count: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        let counter = [last as u32, STREAM, epoch as u32, (epoch >> 32) as u32];
        let [low, high, ..] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
        let draw = u64::from(high) << 32 | u64::from(low);
        // Lemire's reduction to 0..=last; 64 bits make its bias less than 2⁻³².
        let other = (u128::from(draw) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
    order
}

/// Puts each example, in this order, into the first bin with room for it.
fn first_fit(order: &[u32], lengths: &[u32], capacity: usize) -> Vec<Sequence> {
    let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
    let mut room = Room::new(order.len(), capacity);
    let mut bins: Vec<Sequence> = Vec::new();
    for &example in order {
        // Longer than a bin: it fills one, and stays alone there.
        let length = lengths[example as usize].min(capacity);
        let bin = room.take(length);
        if bin == bins.len() {
            bins.push(Sequence::new());
        }
        bins[bin].push(example);
    }
    bins
}

/// The room left in each of a row of bins: a tree of maxima, so that the first bin with
/// enough is found in O(log n). `tree[1]` is the root, the bins are the second half.
struct Room {
    tree: Vec<u32>,
    first_leaf: usize,
}

impl Room {
    fn new(bins: usize, capacity: u32) -> Self {
        let first_leaf = bins.next_power_of_two();
        Self { tree: vec![capacity; 2 * first_leaf], first_leaf }
    }

    /// Takes `length` in the first bin that has it, and tells which. There must be one: with
    /// as many bins as examples there always is.
    fn take(&mut self, length: u32) -> usize {
        let mut node = 1;
        while node < self.first_leaf {
            node *= 2;
            node += usize::from(self.tree[node] < length);
        }
        let bin = node - self.first_leaf;
        self.tree[node] -= length;
        while node > 1 {
            node /= 2;
            self.tree[node] = self.tree[2 * node].max(self.tree[2 * node + 1]);
        }
        bin
    }
}

/// Shares the sequences of a step among data-parallel groups: for each group its
/// micro-batches, each a list of indices into `sequences` (rising), of `micro_batch_size` of
/// them at most. `lengths` are the examples' lengths, as for [`Batches::new`].
///
/// Tokens are balanced, first between the groups (time), then between the micro-batches of a
/// group (memory): the longest goes to the least loaded, the first of equals wins. A group
/// may have fewer micro-batches than another, or none, where a step has few sequences.
pub fn share(
    sequences: &[Sequence],
    lengths: &[usize],
    groups: usize,
    micro_batch_size: usize,
) -> Vec<Vec<Vec<usize>>> {
    let tokens = |sequence: &Sequence| sequence.iter().map(|&e| lengths[e as usize]).sum();
    let tokens: Vec<usize> = sequences.iter().map(tokens).collect();
    let mut longest_first: Vec<usize> = (0..sequences.len()).collect();
    longest_first.sort_by_key(|&i| (Reverse(tokens[i]), i));
    let groups = balance(&longest_first, &tokens, groups.max(1), usize::MAX);
    groups
        .into_iter()
        .map(|group| {
            let size = micro_batch_size.max(1);
            let mut micro_batches = balance(&group, &tokens, group.len().div_ceil(size), size);
            micro_batches.iter_mut().for_each(|micro_batch| micro_batch.sort_unstable());
            micro_batches
        })
        .collect()
}

/// Deals `items` out, in their order, each to the part with the fewest tokens so far among
/// those with less than `most` items; of equals to the first.
fn balance(items: &[usize], tokens: &[usize], parts: usize, most: usize) -> Vec<Vec<usize>> {
    let mut dealt = vec![Vec::new(); parts];
    let mut open: BinaryHeap<_> = (0..parts).map(|part| Reverse((0, part))).collect();
    for &item in items {
        let Some(Reverse((load, part))) = open.pop() else { break };
        dealt[part].push(item);
        if dealt[part].len() < most {
            open.push(Reverse((load + tokens[item], part)));
        }
    }
    dealt
}

#[cfg(test)]
#[path = "order_tests.rs"]
mod tests;
