//! Orders, packing and shares, by table and by property.

use proptest::prelude::*;

use super::*;

fn config(packing: bool, seed: u64) -> BatchConfig {
    BatchConfig { batch_size: 4, packing, max_seq_len: 16, seed }
}

fn batches(lengths: &[usize], packing: bool, seed: u64) -> Batches {
    Batches::new(lengths, &config(packing, seed)).unwrap()
}

/// A run resumed by a later version must not change its order: known values, computed apart.
#[test]
fn the_order_of_a_seed_is_fixed() {
    assert_eq!(shuffled(8, 0, 0), [4, 0, 2, 1, 7, 5, 3, 6]);
    assert_eq!(shuffled(8, 1 << 32, 0), [6, 4, 2, 5, 1, 7, 0, 3]);
    assert_eq!(shuffled(8, 0, 1), [2, 0, 5, 1, 4, 7, 6, 3]);
    assert_eq!((shuffled(0, 0, 0), shuffled(1, 0, 0)), (vec![], vec![0]));
}

/// Every place is equally likely for every example.
#[test]
fn shuffles_are_even() {
    let mut counts = [[0u32; 5]; 5];
    for epoch in 0..10_000 {
        for (place, example) in shuffled(5, 7, epoch).into_iter().enumerate() {
            counts[place][example as usize] += 1;
        }
    }
    assert!(counts.iter().flatten().all(|n| (1850..2150).contains(n)), "{counts:?}");
}

#[test]
fn first_fit_goes_back_to_the_earliest_sequence_with_room() {
    let lengths = [5, 6, 5, 4, 1, 10, 99];
    let order = [0, 1, 2, 3, 4, 6, 5];
    // 5 | 5 6 | 5 5 6 | …: 4 goes behind 6, 1 behind it no more, 99 fills a bin alone.
    let bins = first_fit(&order, &lengths, 10);
    assert_eq!(bins, [vec![0, 2], vec![1, 3], vec![4], vec![6], vec![5]]);
}

#[test]
fn the_last_step_of_an_epoch_takes_what_is_left() {
    let mut batches = batches(&[3; 10], false, 1);
    assert_eq!((batches.steps_per_epoch(0), batches.steps_of_epochs(3)), (3, 9));
    let sizes: Vec<usize> = (0..6).map(|step| batches.step(step).len()).collect();
    assert_eq!(sizes, [4, 4, 2, 4, 4, 2]);
    assert_eq!(batches.place(5), Place { epoch: 1, step: 2, steps: 3 });
    assert_ne!(batches.step(0), batches.step(3), "each epoch has its own order");
}

#[test]
fn what_cannot_be_trained_on_is_refused() {
    let one = BatchConfig { batch_size: 1, packing: true, max_seq_len: 1, seed: 0 };
    assert!(Batches::new(&[], &one).is_err());
    assert!(Batches::new(&[1], &BatchConfig { batch_size: 0, ..one }).is_err());
    assert!(Batches::new(&[1], &BatchConfig { max_seq_len: 0, ..one }).is_err());
}

#[test]
fn shares_are_balanced_by_tokens() {
    let lengths = [8, 1, 1, 1, 1, 4];
    let sequences: Vec<Sequence> = vec![vec![0], vec![1], vec![2], vec![3, 4], vec![5]];
    // 8 against 4 + 2 + 1 + 1; then at most two together, the longest apart.
    let shares = share(&sequences, &lengths, 2, 2);
    assert_eq!(shares, [vec![vec![0]], vec![vec![2, 4], vec![1, 3]]]);
    assert_eq!(share(&sequences[..1], &lengths, 3, 2), [vec![vec![0]], vec![], vec![]]);
}

#[test]
fn packing_many_examples_wastes_little() {
    let lengths: Vec<usize> = (0..50_000).map(|i| 1 + i * 7 % 13).collect();
    let sequences = batches(&lengths, true, 0).epoch(0).len();
    let least = lengths.iter().sum::<usize>().div_ceil(16);
    assert!(sequences >= least && sequences < least * 102 / 100, "{sequences} of {least}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_example_is_there_once_an_epoch_and_sequences_keep_their_limit(
        lengths in prop::collection::vec(1usize..=16, 1..60), packing: bool, seed: u64,
    ) {
        let mut batches = batches(&lengths, packing, seed);
        let mut step = 0;
        for epoch in 0..3 {
            let mut seen = Vec::new();
            for _ in 0..batches.steps_per_epoch(epoch) {
                for sequence in batches.step(step) {
                    let tokens: usize = sequence.iter().map(|&e| lengths[e as usize]).sum();
                    prop_assert!(tokens <= 16 && !sequence.is_empty());
                    seen.extend(sequence);
                }
                step += 1;
            }
            seen.sort();
            prop_assert_eq!(seen, (0..lengths.len() as u32).collect::<Vec<_>>());
            prop_assert_eq!(batches.steps_of_epochs(epoch + 1), step);
        }
    }

    /// A resumed run begins in the middle: it must find the same steps.
    #[test]
    fn a_step_does_not_depend_on_what_was_asked_before(
        lengths in prop::collection::vec(1usize..=16, 1..40), packing: bool, step in 0u64..40,
    ) {
        let mut walked = batches(&lengths, packing, 3);
        for earlier in 0..step {
            walked.step(earlier);
        }
        prop_assert_eq!(walked.step(step), batches(&lengths, packing, 3).step(step));
    }

    #[test]
    fn groups_share_every_sequence_once_whatever_their_number(
        lengths in prop::collection::vec(1usize..=16, 1..40), groups in 1usize..6, size in 1usize..5,
    ) {
        let sequences = batches(&lengths, true, 5).step(0);
        let tokens = |i: &usize| sequences[*i].iter().map(|&e| lengths[e as usize]).sum::<usize>();
        let shares = share(&sequences, &lengths, groups, size);
        prop_assert_eq!(shares.len(), groups);
        let loads: Vec<usize> = shares.iter().map(|g| g.iter().flatten().map(tokens).sum()).collect();
        let longest = (0..sequences.len()).map(|i| tokens(&i)).max().unwrap();
        prop_assert!(loads.iter().max().unwrap() - loads.iter().min().unwrap() <= longest);
        for group in &shares {
            let count: usize = group.iter().map(Vec::len).sum();
            prop_assert_eq!(group.len(), count.div_ceil(size));
            prop_assert!(group.iter().all(|batch| !batch.is_empty() && batch.len() <= size));
        }
        let mut all: Vec<usize> = shares.into_iter().flatten().flatten().collect();
        all.sort();
        prop_assert_eq!(all, (0..sequences.len()).collect::<Vec<_>>());
    }
}
