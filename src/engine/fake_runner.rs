//! A model for tests: the logits of a row are a hash of all tokens up to it, as
//! they are found in a paged cache. A wrong block table, position, chunk or
//! leftover of another sequence changes them.

use std::collections::HashSet;

use crate::Result;
use crate::model::{Logits, LogitsWanted, Runner, StepBatch};

/// Where a test says no other: tokens 0..12 are bytes or parts of characters (see
/// `tests.rs`); 12 is EOS.
pub const VOCAB_SIZE: usize = 13;
pub const EOS: u32 = 12;

pub struct FakeRunner {
    pub block_size: usize,
    pub max_seq_len: usize,
    /// Number of tokens; the last one is EOS.
    pub vocab_size: usize,
    /// Histories that end in this pair of tokens give NaN.
    pub poison: Option<[u32; 2]>,
    /// Steps until one fails.
    pub fail_in: Option<usize>,
    /// The cached token of each slot.
    cache: Vec<Option<u32>>,
}

impl FakeRunner {
    pub fn new(num_blocks: usize, block_size: usize, max_seq_len: usize) -> Self {
        let cache = vec![None; num_blocks * block_size];
        let vocab_size = VOCAB_SIZE;
        Self { block_size, max_seq_len, vocab_size, poison: None, fail_in: None, cache }
    }
}

/// The logits after `history`, pushed onto `data`.
pub fn push_logits(history: &[u32], poison: Option<[u32; 2]>, data: &mut Vec<f32>) {
    if poison.is_some_and(|poison| history.ends_with(&poison)) {
        data.extend([f32::NAN; VOCAB_SIZE]);
        return;
    }
    push_hashed(history, VOCAB_SIZE, data);
}

fn push_hashed(history: &[u32], vocab_size: usize, data: &mut Vec<f32>) {
    let mix = |h: u64, x: u64| (h ^ x).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    let hash = history.iter().fold(history.len() as u64, |h, &id| mix(h, u64::from(id) + 1));
    data.extend((0..vocab_size as u64).map(|j| (mix(mix(hash, j), 7) >> 40) as f32 / 4e6));
    // EOS is seldom the best.
    if let Some(eos) = data.last_mut() {
        *eos -= 1.5;
    }
}

impl Runner for FakeRunner {
    fn num_blocks(&self) -> usize {
        self.cache.len() / self.block_size
    }

    fn block_size(&self) -> usize {
        self.block_size
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<Logits> {
        if let Some(steps) = &mut self.fail_in {
            if *steps == 0 {
                self.fail_in = None;
                return Err(crate::Error::fault("the device went away"));
            }
            *steps -= 1;
        }
        let mut seen = HashSet::new();
        let mut data = Vec::new();
        let mut token_ids = batch.token_ids.iter();
        for sequence in &batch.sequences {
            let table = &sequence.block_table;
            assert!(table.iter().all(|block| seen.insert(*block)), "a block in two tables");
            let slot = |position: usize| {
                table[position / self.block_size] as usize * self.block_size
                    + position % self.block_size
            };
            let end = sequence.start_position + sequence.num_tokens;
            for position in sequence.start_position..end {
                self.cache[slot(position)] = token_ids.next().copied();
                let wanted = match sequence.logits {
                    LogitsWanted::None => false,
                    LogitsWanted::Last => position + 1 == end,
                    LogitsWanted::All => true,
                };
                if wanted {
                    let history: Option<Vec<u32>> =
                        (0..=position).map(|p| self.cache[slot(p)]).collect();
                    let history = history.expect("a position before this one was never computed");
                    match self.vocab_size {
                        VOCAB_SIZE => push_logits(&history, self.poison, &mut data),
                        vocab_size => push_hashed(&history, vocab_size, &mut data),
                    }
                }
            }
        }
        assert!(token_ids.next().is_none(), "more tokens than rows");
        Ok(Logits { data, vocab_size: self.vocab_size })
    }
}
