//! The examples in memory: flat, so that a large set costs little more than its tokens.

use super::order::shuffled;
use super::{BadRecord, Example, ExampleRef};
use crate::{Error, Result};

/// First bytes of [`Dataset::to_bytes`]; the last one is the version.
const MAGIC: &[u8; 8] = b"farmdat\x01";

/// Tokenized examples in the order of their file, and what became of the other records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    token_ids: Vec<u32>,
    is_target: Vec<bool>,
    /// Where each example ends in the two above.
    ends: Vec<usize>,
    pub(super) bad: Vec<BadRecord>,
    pub(super) truncated: usize,
}

impl Dataset {
    /// Number of examples.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Example number `i`, below [`Dataset::len`].
    pub fn example(&self, i: usize) -> ExampleRef<'_> {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        let tokens = start..self.ends[i];
        ExampleRef {
            token_ids: &self.token_ids[tokens.clone()],
            is_target: &self.is_target[tokens],
        }
    }

    /// All examples in order.
    pub fn examples(&self) -> impl ExactSizeIterator<Item = ExampleRef<'_>> {
        (0..self.len()).map(|i| self.example(i))
    }

    /// Tokens of each example.
    pub fn lengths(&self) -> Vec<usize> {
        self.examples().map(|example| example.token_ids.len()).collect()
    }

    /// Tokens of all examples.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Tokens that are predicted, of all examples.
    pub fn num_targets(&self) -> usize {
        self.is_target.iter().filter(|&&is_target| is_target).count()
    }

    /// The records that could not be used, in order.
    pub fn bad(&self) -> &[BadRecord] {
        &self.bad
    }

    /// Examples that were cut at `max_seq_len`.
    pub fn truncated(&self) -> usize {
        self.truncated
    }

    /// Adds an example at the end.
    pub fn push(&mut self, example: ExampleRef<'_>) {
        self.token_ids.extend_from_slice(example.token_ids);
        self.is_target.extend_from_slice(example.is_target);
        self.ends.push(self.token_ids.len());
    }

    /// Takes a share of the examples out for validation: (training, validation), each in the
    /// file's order, each at least one example. Which ones follows from the seed and the
    /// number of examples alone. What became of bad and cut records stays with the first.
    ///
    /// # Errors
    /// Usage: `fraction` is not between 0 and 1. Input: there are fewer than two examples.
    pub fn split_off(self, fraction: f64, seed: u64) -> Result<(Self, Self)> {
        if !(fraction > 0.0 && fraction < 1.0) {
            return Err(Error::usage(format!(
                "--val-fraction {fraction}: must be above 0 and below 1"
            )));
        }
        if self.len() < 2 {
            return Err(Error::input(
                "--val-fraction needs at least two usable records, there is one: give more, or a file of their own with --val",
            ));
        }
        let count = ((self.len() as f64 * fraction).round() as usize).clamp(1, self.len() - 1);
        let mut is_validation = vec![false; self.len()];
        for i in shuffled(self.len(), seed, VALIDATION_EPOCH).into_iter().take(count) {
            is_validation[i as usize] = true;
        }
        let (mut train, mut validation) = (Self::default(), Self::default());
        for (example, is_validation) in self.examples().zip(is_validation) {
            (if is_validation { &mut validation } else { &mut train }).push(example);
        }
        Ok((Self { bad: self.bad, truncated: self.truncated, ..train }, validation))
    }

    /// BLAKE3, as hex, of the examples: two sets with the same one train alike.
    pub fn identity(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        self.write_examples(|bytes| {
            hasher.update(bytes);
        });
        hasher.finalize().to_hex().to_string()
    }

    /// Everything, as bytes for another rank.
    pub fn to_bytes(&self) -> Vec<u8> {
        let bad = serde_json::to_vec(&self.bad).unwrap_or_default();
        let mut bytes = Vec::with_capacity(5 * self.num_tokens() + 8 * self.len() + bad.len() + 64);
        bytes.extend(MAGIC);
        self.write_examples(|part| bytes.extend_from_slice(part));
        bytes.extend((self.truncated as u64).to_le_bytes());
        bytes.extend(bad);
        bytes
    }

    /// The set that [`Dataset::to_bytes`] wrote.
    ///
    /// # Errors
    /// A fault where the bytes are cut or no data set.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes).ok_or_else(|| Error::fault("a data set arrived damaged from rank 0"))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let num_examples = take_u64(&mut rest)?;
        let num_tokens = take_u64(&mut rest)?;
        let ends = take(&mut rest, num_examples.checked_mul(8)?)?;
        let token_ids = take(&mut rest, num_tokens.checked_mul(4)?)?;
        let is_target = take(&mut rest, num_tokens)?;
        let truncated = take_u64(&mut rest)?;
        let read = Self {
            ends: ends.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b) as usize).collect(),
            token_ids: token_ids.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
            is_target: is_target.iter().map(|&byte| byte != 0).collect(),
            bad: serde_json::from_slice(rest).ok()?,
            truncated,
        };
        let whole = read.ends.is_sorted() && read.ends.last().copied().unwrap_or(0) == num_tokens;
        whole.then_some(read)
    }

    /// Numbers of examples and tokens, ends, token ids, targets; little-endian.
    fn write_examples(&self, mut write: impl FnMut(&[u8])) {
        write(&(self.len() as u64).to_le_bytes());
        write(&(self.num_tokens() as u64).to_le_bytes());
        let mut part = Vec::new();
        for ends in self.ends.chunks(PART) {
            part.clear();
            part.extend(ends.iter().flat_map(|&end| (end as u64).to_le_bytes()));
            write(&part);
        }
        for token_ids in self.token_ids.chunks(PART) {
            part.clear();
            part.extend(token_ids.iter().flat_map(|id| id.to_le_bytes()));
            write(&part);
        }
        for is_target in self.is_target.chunks(PART) {
            part.clear();
            part.extend(is_target.iter().map(|&is_target| u8::from(is_target)));
            write(&part);
        }
    }
}

/// Elements that are turned into bytes at a time.
const PART: usize = 1 << 14;

/// Stands for an epoch that never comes, so that the split has draws of its own.
const VALIDATION_EPOCH: u64 = u64::MAX;

impl Extend<Example> for Dataset {
    fn extend<I: IntoIterator<Item = Example>>(&mut self, examples: I) {
        for Example { token_ids, is_target } in examples {
            self.push(ExampleRef { token_ids: &token_ids, is_target: &is_target });
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(count)?;
    *rest = behind;
    Some(taken)
}

fn take_u64(rest: &mut &[u8]) -> Option<usize> {
    let bytes = take(rest, 8)?.try_into().ok()?;
    usize::try_from(u64::from_le_bytes(bytes)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(lengths: &[usize]) -> Dataset {
        let mut dataset = Dataset::default();
        dataset.extend(lengths.iter().enumerate().map(|(i, &length)| Example {
            token_ids: (0..length).map(|t| (i * 1000 + t) as u32).collect(),
            is_target: (0..length).map(|t| t > 0 && (i + t) % 2 == 0).collect(),
        }));
        dataset
    }

    #[test]
    fn examples_come_back_as_they_went_in() {
        let dataset = dataset(&[3, 2, 5]);
        assert_eq!((dataset.len(), dataset.num_tokens(), dataset.num_targets()), (3, 10, 4));
        assert_eq!(dataset.lengths(), [3, 2, 5]);
        assert_eq!(dataset.example(1).token_ids, [1000, 1001]);
        assert_eq!(dataset.example(1).is_target, [false, true]);
    }

    /// What rank 0 read must be what the others train on; a cut message must not pass.
    #[test]
    fn bytes_carry_everything_and_damage_is_noticed() {
        let mut dataset = dataset(&[3, 2, PART + 1]);
        dataset.truncated += 1;
        dataset.bad.push(BadRecord { line: 7, code: "empty".into(), message: "ü".into() });
        let bytes = dataset.to_bytes();
        assert_eq!(Dataset::from_bytes(&bytes).unwrap(), dataset);
        assert_eq!(Dataset::from_bytes(&Dataset::default().to_bytes()).unwrap().len(), 0);
        for length in (0..64).chain(bytes.len() - 64..bytes.len()) {
            assert!(Dataset::from_bytes(&bytes[..length]).is_err(), "{length}");
        }
        let mut huge = bytes;
        huge[8..16].fill(0xff);
        assert!(Dataset::from_bytes(&huge).is_err());
    }

    #[test]
    fn the_identity_is_that_of_the_examples() {
        let before = dataset(&[3, 2]);
        let mut same = before.clone();
        same.truncated += 1;
        assert_eq!(before.identity(), same.identity());
        assert_ne!(before.identity(), dataset(&[2, 3]).identity());
        let mut other = before.clone();
        other.is_target[1] = !other.is_target[1];
        assert_ne!(before.identity(), other.identity());
    }

    #[test]
    fn a_split_takes_each_example_to_one_side_in_order() {
        let whole = dataset(&[2; 50]);
        let firsts =
            |set: &Dataset| -> Vec<u32> { set.examples().map(|e| e.token_ids[0]).collect() };
        let (train, validation) = whole.clone().split_off(0.2, 1).unwrap();
        assert_eq!((train.len(), validation.len()), (40, 10));
        assert!(firsts(&train).is_sorted() && firsts(&validation).is_sorted());
        let mut all = [firsts(&train), firsts(&validation)].concat();
        all.sort();
        assert_eq!(all, firsts(&whole));
        assert_eq!(whole.clone().split_off(0.2, 1).unwrap().1, validation);
        assert_ne!(whole.clone().split_off(0.2, 2).unwrap().1, validation);
        assert_eq!(dataset(&[2; 3]).split_off(0.01, 1).unwrap().1.len(), 1);
        assert_eq!(dataset(&[2; 3]).split_off(0.99, 1).unwrap().0.len(), 1);
        for fraction in [0.0, 1.0, -1.0, f64::NAN] {
            assert!(whole.clone().split_off(fraction, 1).is_err());
        }
        assert!(dataset(&[2]).split_off(0.5, 1).is_err());
    }
}
