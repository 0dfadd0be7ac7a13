//! A micro-batch: the rows of all its sequences one after another, without padding.

use std::ops::Range;

use super::linear::Tokens;
use crate::model::{BatchSequence, LogitsWanted, StepBatch};

/// What one forward and backward pass runs over.
#[derive(Debug, Clone, Default)]
pub struct MicroBatch {
    /// Token ids of all rows.
    pub token_ids: Vec<u32>,
    /// Whether a row's token is predicted from the row before it.
    pub is_target: Vec<bool>,
    /// The rows of each example: attention does not cross them, positions begin at 0 in each.
    pub segments: Vec<Range<usize>>,
    /// What draws for a row are keyed by.
    pub numbers: Vec<u64>,
}

impl MicroBatch {
    /// Adds an example; `first_number` is the number of its first row.
    pub fn push(&mut self, token_ids: &[u32], is_target: &[bool], first_number: u64) {
        let first = self.token_ids.len();
        self.token_ids.extend_from_slice(token_ids);
        self.is_target.extend_from_slice(is_target);
        self.segments.push(first..self.token_ids.len());
        self.numbers.extend((first_number..).take(token_ids.len()));
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty()
    }

    /// The rows whose next token counts, and those tokens.
    pub fn targets(&self) -> (Vec<usize>, Vec<u32>) {
        let next = self.segments.iter().flat_map(|s| s.start..s.end.saturating_sub(1).max(s.start));
        let counted = next.filter(|row| self.is_target[row + 1]);
        counted.map(|row| (row, self.token_ids[row + 1])).unzip()
    }

    /// What dropout needs of it.
    pub fn tokens(&self, training: bool) -> Tokens {
        Tokens { training, numbers: self.numbers.clone() }
    }

    /// The same rows as a step of the model, for the rotations of positions.
    pub fn as_step(&self) -> StepBatch {
        let sequence = |segment: &Range<usize>| BatchSequence {
            start_position: 0,
            num_tokens: segment.len(),
            block_table: Vec::new(),
            logits: LogitsWanted::None,
            prompt_len: segment.len(),
            adapter: None,
        };
        StepBatch {
            token_ids: self.token_ids.clone(),
            sequences: self.segments.iter().map(sequence).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_stay_inside_their_example() {
        let mut batch = MicroBatch::default();
        batch.push(&[1, 2, 3], &[false, false, true], 10);
        batch.push(&[], &[], 20);
        batch.push(&[4], &[false], 30);
        batch.push(&[5, 6], &[true, true], 40);
        assert_eq!(batch.targets(), (vec![1, 4], vec![3, 6]));
        assert_eq!(batch.numbers, [10, 11, 12, 30, 40, 41]);
        assert_eq!(batch.segments, [0..3, 3..3, 3..4, 4..6]);
    }
}
