//! Which records are done and how, from FINISHED and FAILED frames in any order.

use std::collections::BTreeSet;

use crate::ledger::IndexSet;

/// What is known of all records. A record that went well at the first attempt takes a bit.
#[derive(Debug, Clone, Default)]
pub struct Outcomes {
    done: IndexSet,
    failed: IndexSet,
    /// All attempts seen, of the indices with an attempt above 0.
    attempts: BTreeSet<(u64, u16)>,
    duplicates: u64,
}

impl Outcomes {
    /// Takes in a frame; whether its line is (for now) the one that counts.
    pub fn add(&mut self, index: u64, attempt: u16, is_error: bool) -> bool {
        if self.done.insert(index) {
            if attempt > 0 {
                self.attempts.insert((index, attempt));
            }
            self.set_failed(index, is_error);
            return true;
        }
        let highest = self.attempt(index);
        if self.seen(index, attempt) {
            self.duplicates += 1;
            // They should be equal. Where they are not, the better one counts in any order.
            let better = attempt == highest && !is_error && self.failed.contains(index);
            if better {
                self.failed.remove(index);
            }
            return better;
        }
        if self.attempts_of(index).next().is_none() {
            self.attempts.insert((index, 0)); // it had no need to be noted so far
        }
        self.attempts.insert((index, attempt));
        if attempt > highest {
            self.set_failed(index, is_error);
        }
        attempt > highest
    }

    /// Records that are finished or failed.
    pub fn done(&self) -> &IndexSet {
        &self.done
    }

    /// Of those, the ones whose attempt that counts is an error.
    pub fn failed(&self) -> &IndexSet {
        &self.failed
    }

    /// The highest attempt seen, 0 if there is none.
    pub fn attempt(&self, index: u64) -> u16 {
        self.attempts_of(index).next_back().unwrap_or(0)
    }

    /// Frames that said again what one before had said.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    fn seen(&self, index: u64, attempt: u16) -> bool {
        match self.attempts_of(index).next() {
            None => attempt == 0 && self.done.contains(index),
            Some(_) => self.attempts.contains(&(index, attempt)),
        }
    }

    fn attempts_of(&self, index: u64) -> impl DoubleEndedIterator<Item = u16> + '_ {
        self.attempts.range((index, 0)..=(index, u16::MAX)).map(|&(_, attempt)| attempt)
    }

    fn set_failed(&mut self, index: u64, is_error: bool) {
        if is_error {
            self.failed.insert(index);
        } else {
            self.failed.remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the order: the highest attempt counts, and of equal ones the better.
        #[test]
        fn the_order_of_frames_does_not_matter(
            frames in prop::collection::vec((0u64..8, 0u16..4, any::<bool>()), 0..60)
        ) {
            let mut outcomes = Outcomes::default();
            let mut plain = BTreeMap::<u64, BTreeMap<u16, bool>>::new();
            let mut duplicates = 0;
            for &(index, attempt, is_error) in &frames {
                let before = plain.get(&index).and_then(|attempts| attempts.last_key_value())
                    .map(|(&attempt, &is_error)| (attempt, !is_error));
                let attempts = plain.entry(index).or_default();
                duplicates += u64::from(attempts.contains_key(&attempt));
                let worse = attempts.entry(attempt).or_insert(is_error);
                *worse &= is_error;
                let counts = Some((attempt, !is_error)) > before;
                prop_assert_eq!(outcomes.add(index, attempt, is_error), counts);
            }
            prop_assert_eq!(outcomes.duplicates(), duplicates);
            for index in 0..8 {
                let last = plain.get(&index).and_then(|attempts| attempts.last_key_value());
                prop_assert_eq!(outcomes.done().contains(index), last.is_some());
                prop_assert_eq!(outcomes.failed().contains(index), last.is_some_and(|last| *last.1));
                prop_assert_eq!(outcomes.attempt(index), last.map_or(0, |last| *last.0));
            }
        }
    }

    #[test]
    fn records_that_went_well_at_once_take_no_more_than_bits() {
        let mut outcomes = Outcomes::default();
        (0..10_000).for_each(|index| assert!(outcomes.add(index, 0, false)));
        assert!(outcomes.attempts.is_empty());
    }
}
