//! Which rows of which sequences the next step computes. Pure: no tensors, no
//! clock.
//!
//! Sequences are admitted first come, first served, each with the KV blocks of
//! all the tokens it has. A step holds first one row for every decoding
//! sequence, then prefill chunks, oldest first, until the token budget is full;
//! then new sequences are admitted. A decoding sequence that finds no free block
//! takes those of the youngest one, which goes back to the head of the queue,
//! keeps its tokens and computes them again later (preemption by recompute).
//!
//! Why it always ends: `running` is in order of arrival and everything in
//! `waiting` came later, so the oldest sequence is never preempted; it fits the
//! cache alone (see [`Scheduler::add`]), so each step brings it on.

use std::collections::VecDeque;

use super::block_manager::BlockManager;
use super::sequence::{Chunk, Sequence};
use crate::model::{BatchSequence, LogitsWanted, StepBatch};

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Sequences that run at a time; at least 1 is used.
    pub max_batch_size: usize,
    /// Rows a step; at least `max_batch_size` is used.
    pub max_batched_tokens: usize,
    /// Rows of scored prompts a step, each of which wants its logits kept; at
    /// least 1 is used.
    pub max_scored_rows: usize,
}

/// A step: the batch for the model, and whose rows they are. Kept from step to
/// step for its buffers.
#[derive(Debug, Default)]
pub struct StepPlan {
    /// What the model computes.
    pub batch: StepBatch,
    /// One entry for each of `batch.sequences`.
    pub entries: Vec<PlanEntry>,
    spare_tables: Vec<Vec<u32>>,
}

/// Whose rows a batch sequence holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanEntry {
    /// Place in [`Scheduler::running`].
    pub running: usize,
    /// Its rows.
    pub chunk: Chunk,
    /// Whether it is the one row of a decoding sequence.
    pub is_decode: bool,
}

impl StepPlan {
    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.batch.token_ids.clear();
        self.spare_tables.extend(self.batch.sequences.drain(..).map(|s| s.block_table));
    }

    fn push(&mut self, running: usize, sequence: &Sequence, chunk: Chunk, is_decode: bool) {
        let start = sequence.num_computed_tokens();
        let mut block_table = self.spare_tables.pop().unwrap_or_default();
        block_table.clear();
        block_table.extend_from_slice(sequence.block_table());
        self.batch
            .token_ids
            .extend_from_slice(&sequence.token_ids()[start..start + chunk.num_tokens]);
        self.batch.sequences.push(BatchSequence {
            start_position: start,
            num_tokens: chunk.num_tokens,
            block_table,
            logits: chunk.logits,
            prompt_len: sequence.prompt_len(),
            adapter: sequence.adapter(),
        });
        self.entries.push(PlanEntry { running, chunk, is_decode });
    }
}

/// Rows left in the step being planned.
struct Budget {
    tokens: usize,
    scored_rows: usize,
}

/// The waiting and running sequences and the blocks they share.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockManager,
    /// In order of arrival, preempted ones (older than the others) first.
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    running: Vec<Sequence>,
    preemptions: u64,
    /// Sequences taken so far.
    taken: u64,
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(config: SchedulerConfig, blocks: BlockManager) -> Self {
        let max_batch_size = config.max_batch_size.max(1);
        let config = SchedulerConfig {
            max_batch_size,
            max_batched_tokens: config.max_batched_tokens.max(max_batch_size),
            max_scored_rows: config.max_scored_rows.max(1),
        };
        Self {
            config,
            blocks,
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
            taken: 0,
        }
    }

    /// Queues an unfinished sequence. It must fit the KV cache when alone: the
    /// engine bounds every sequence by [`BlockManager::num_tokens`].
    pub fn add(&mut self, mut sequence: Sequence) {
        debug_assert!(sequence.finish_reason().is_none());
        sequence.set_number(self.taken);
        self.taken += 1;
        self.waiting.push_back(sequence);
    }

    /// The sequences that hold blocks, oldest first.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// Running sequence `index`, to give it its results.
    pub fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    /// The sequences that hold no blocks, next one first.
    pub fn waiting(&self) -> &VecDeque<Sequence> {
        &self.waiting
    }

    /// The blocks' bookkeeping.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// How often a sequence lost its blocks and had to be computed again.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Whether a sequence waits or runs.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Plans the next step. The plan is empty only if there is no work. Places in
    /// `running` hold until the next call or [`Scheduler::take_finished`].
    pub fn schedule(&mut self, plan: &mut StepPlan) {
        plan.clear();
        let mut budget = Budget {
            tokens: self.config.max_batched_tokens,
            scored_rows: self.config.max_scored_rows,
        };
        self.schedule_decodes(plan, &mut budget);
        self.schedule_prefills(plan, &mut budget);
        self.admit(plan, &mut budget);
    }

    /// One row for each decoding sequence; preempts where blocks run out.
    fn schedule_decodes(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            if sequence.is_decoding() {
                let num_tokens = sequence.num_wanted_tokens();
                if !self.blocks.grow(sequence.block_table_mut(), num_tokens) {
                    // Possibly this one itself; then the loop ends.
                    self.preempt_youngest();
                    continue;
                }
                let chunk = Chunk { num_tokens: 1, logits: LogitsWanted::Last };
                plan.push(index, sequence, chunk, true);
                budget.tokens -= 1;
            }
            index += 1;
        }
    }

    /// Chunks of the sequences that still prefill; their blocks are theirs already.
    fn schedule_prefills(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        for (index, sequence) in self.running.iter().enumerate() {
            if !sequence.is_decoding() {
                push_prefill(plan, index, sequence, budget);
            }
        }
    }

    /// Admits waiting sequences while sequences, rows and blocks last. One block
    /// for each running sequence stays free, so that a new one is not preempted
    /// by the next few decode steps. What this step preempted cannot come back
    /// in it: at least one of the blocks that it needs has just been taken.
    fn admit(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        while self.running.len() < self.config.max_batch_size {
            let Some(sequence) = self.waiting.front() else { return };
            if sequence.next_chunk(budget.tokens, budget.scored_rows).num_tokens == 0 {
                return;
            }
            let num_tokens = sequence.num_wanted_tokens();
            let needed = self.blocks.blocks_for(num_tokens) + self.running.len();
            if needed > self.blocks.num_free() {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            let grown = self.blocks.grow(sequence.block_table_mut(), num_tokens);
            assert!(grown, "blocks were free a moment ago");
            push_prefill(plan, self.running.len(), &sequence, budget);
            self.running.push(sequence);
        }
    }

    fn preempt_youngest(&mut self) {
        assert!(self.running.len() > 1, "a sequence outgrew the whole KV cache");
        if let Some(mut sequence) = self.running.pop() {
            self.blocks.release(sequence.block_table_mut());
            sequence.reset_computed();
            self.waiting.push_front(sequence);
            self.preemptions += 1;
        }
    }

    /// Frees all blocks and hands all sequences over, in order of arrival.
    pub fn take_all(&mut self) -> impl Iterator<Item = Sequence> + '_ {
        let Self { blocks, running, waiting, .. } = self;
        running.iter_mut().for_each(|sequence| blocks.release(sequence.block_table_mut()));
        running.drain(..).chain(waiting.drain(..))
    }

    /// Frees the blocks of the finished sequences and hands these over.
    pub fn take_finished(&mut self) -> impl Iterator<Item = Sequence> + '_ {
        let blocks = &mut self.blocks;
        self.running.extract_if(.., |sequence| sequence.finish_reason().is_some()).map(
            |mut sequence| {
                blocks.release(sequence.block_table_mut());
                sequence
            },
        )
    }
}

fn push_prefill(plan: &mut StepPlan, running: usize, sequence: &Sequence, budget: &mut Budget) {
    let chunk = sequence.next_chunk(budget.tokens, budget.scored_rows);
    if chunk.num_tokens > 0 {
        budget.tokens -= chunk.num_tokens;
        if chunk.logits == LogitsWanted::All {
            budget.scored_rows -= chunk.num_tokens;
        }
        plan.push(running, sequence, chunk, false);
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
