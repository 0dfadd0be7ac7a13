//! A set of record indices that takes about a bit a record.

use std::collections::BTreeMap;
use std::ops::Range;

const CHUNK_BITS: u64 = 4096;

/// A set of record indices: a bitmap in chunks, so that neither millions of
/// records nor one stray huge index cost much memory.
#[derive(Debug, Clone, Default)]
pub struct IndexSet {
    chunks: BTreeMap<u64, Box<[u64; (CHUNK_BITS / 64) as usize]>>,
    len: u64,
}

impl IndexSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `index`; false if it was there.
    pub fn insert(&mut self, index: u64) -> bool {
        let (chunk, word, mask) = place(index);
        let words = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; 64]));
        let fresh = words[word] & mask == 0;
        words[word] |= mask;
        self.len += u64::from(fresh);
        fresh
    }

    /// Takes `index` out; false if it was not there.
    pub fn remove(&mut self, index: u64) -> bool {
        let (chunk, word, mask) = place(index);
        let Some(words) = self.chunks.get_mut(&chunk) else { return false };
        let present = words[word] & mask != 0;
        words[word] &= !mask;
        self.len -= u64::from(present);
        present
    }

    /// Whether every index of `range` is in the set; so it is for an empty range.
    pub fn contains_range(&self, range: Range<u64>) -> bool {
        let mut index = range.start;
        while index < range.end {
            let (chunk, word, mask) = place(index);
            let Some(words) = self.chunks.get(&chunk) else { return false };
            let rest = range.end - index;
            if mask == 1 && rest >= 64 && words[word] == u64::MAX {
                index += 64; // cannot overflow: it stays at or below the range's end
            } else if words[word] & mask != 0 {
                index += 1;
            } else {
                return false;
            }
        }
        true
    }

    /// The indices, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.chunks.iter().flat_map(|(chunk, words)| {
            let first = chunk * CHUNK_BITS;
            words.iter().enumerate().flat_map(move |(word, &bits)| {
                let bits = BitsOf(bits);
                bits.map(move |bit| first + word as u64 * 64 + u64::from(bit))
            })
        })
    }

    /// Whether `index` is in the set.
    pub fn contains(&self, index: u64) -> bool {
        let (chunk, word, mask) = place(index);
        self.chunks.get(&chunk).is_some_and(|words| words[word] & mask != 0)
    }

    /// Adds all of `other`.
    pub fn union(&mut self, other: &Self) {
        for (&chunk, others) in &other.chunks {
            let words = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; 64]));
            for (word, other) in words.iter_mut().zip(others.iter()) {
                self.len += u64::from((other & !*word).count_ones());
                *word |= other;
            }
        }
    }

    /// Number of indices in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl FromIterator<u64> for IndexSet {
    fn from_iter<I: IntoIterator<Item = u64>>(indices: I) -> Self {
        let mut set = Self::new();
        for index in indices {
            set.insert(index);
        }
        set
    }
}

/// The places of the bits set in a word, ascending.
struct BitsOf(u64);

impl Iterator for BitsOf {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let bit = (self.0 != 0).then(|| self.0.trailing_zeros())?;
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

/// Chunk, word in the chunk, bit in the word.
fn place(index: u64) -> (u64, usize, u64) {
    let bit = index % CHUNK_BITS;
    (index / CHUNK_BITS, (bit / 64) as usize, 1 << (bit % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::IndexSet;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn agrees_with_a_plain_set(
            indices in prop::collection::vec(prop_oneof![0u64..10_000, any::<u64>()], 0..200),
            probes in prop::collection::vec(0u64..10_000, 0..50),
            removed in prop::collection::vec(0usize..200, 0..20),
        ) {
            let mut set: IndexSet = indices.iter().copied().collect();
            let mut plain: BTreeSet<u64> = indices.iter().copied().collect();
            let removed = removed.iter().filter_map(|&place| indices.get(place));
            for index in removed.chain(&probes) {
                prop_assert_eq!(set.remove(*index), plain.remove(index));
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), plain.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), plain.len() as u64);
            prop_assert_eq!(set.is_empty(), plain.is_empty());
            for index in indices.iter().chain(&probes) {
                prop_assert_eq!(set.contains(*index), plain.contains(index));
            }
        }

        #[test]
        fn a_range_is_contained_when_each_of_its_indices_is(
            holes in prop::collection::vec(0u64..10_000, 0..4),
            start in 0u64..9_000,
            len in 0u64..2_000,
        ) {
            let mut set: IndexSet = (0..10_000).collect();
            holes.iter().for_each(|&hole| { set.remove(hole); });
            let range = start..start + len;
            let plain = range.clone().all(|index| set.contains(index));
            prop_assert_eq!(set.contains_range(range), plain);
        }
    }

    #[test]
    fn the_last_index_there_can_be_is_one_like_others() {
        let set: IndexSet = [u64::MAX - 1, u64::MAX].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [u64::MAX - 1, u64::MAX]);
        assert!(set.contains_range(u64::MAX - 1..u64::MAX));
        assert!(!set.contains_range(u64::MAX - 2..u64::MAX));
    }
}
