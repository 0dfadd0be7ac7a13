//! A set of record indices that takes about a bit a record.

use std::collections::BTreeMap;

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

    /// Whether `index` is in the set.
    pub fn contains(&self, index: u64) -> bool {
        let (chunk, word, mask) = place(index);
        self.chunks.get(&chunk).is_some_and(|words| words[word] & mask != 0)
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
        ) {
            let set: IndexSet = indices.iter().copied().collect();
            let plain: BTreeSet<u64> = indices.iter().copied().collect();
            prop_assert_eq!(set.len(), plain.len() as u64);
            prop_assert_eq!(set.is_empty(), plain.is_empty());
            for index in indices.iter().chain(&probes) {
                prop_assert_eq!(set.contains(*index), plain.contains(index));
            }
        }
    }
}
