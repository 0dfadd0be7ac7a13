use proptest::prelude::*;

use super::super::detokenizer::tests::ByteDecoder;
use super::super::{EngineRequest, Generated, Mode, SamplingParams};
use super::*;

const BLOCK_SIZE: usize = 4;

fn sequence(key: u64, prompt: usize, max_new_tokens: usize, mode: Mode) -> Sequence {
    let request = EngineRequest {
        key,
        record_index: key,
        completion: 0,
        prompt_token_ids: vec![key as u32; prompt],
        adapter: None,
        generated: Generated::default(),
        params: SamplingParams { max_new_tokens, ..Default::default() },
        mode,
    };
    Sequence::new(request, None, usize::MAX, 256, &[], &ByteDecoder)
}

fn scheduler(num_blocks: usize, max_batch_size: usize, max_batched_tokens: usize) -> Scheduler {
    let config = SchedulerConfig { max_batch_size, max_batched_tokens, max_scored_rows: 3 };
    Scheduler::new(config, BlockManager::new(num_blocks, BLOCK_SIZE))
}

/// Plays model and sampler: every wanted row yields a token or a score.
fn play(scheduler: &mut Scheduler, plan: &StepPlan) -> Vec<u64> {
    for entry in &plan.entries {
        let sequence = scheduler.running_mut(entry.running);
        sequence.advance(entry.chunk.num_tokens);
        match entry.chunk.logits {
            LogitsWanted::None => {}
            LogitsWanted::Last => sequence.push_token(0, None, &[], &ByteDecoder),
            LogitsWanted::All => {
                (0..entry.chunk.num_tokens).for_each(|_| sequence.push_score(-1.0))
            }
        }
    }
    scheduler.take_finished().map(|s| s.into_output(&[], &ByteDecoder).key).collect()
}

/// `(start_position, num_tokens)` of each sequence of a step.
fn rows(plan: &StepPlan) -> Vec<(usize, usize)> {
    plan.batch.sequences.iter().map(|s| (s.start_position, s.num_tokens)).collect()
}

#[test]
fn decode_rows_come_first_and_prefill_chunks_fill_the_step() {
    let mut scheduler = scheduler(100, 4, 8);
    let mut plan = StepPlan::default();
    scheduler.add(sequence(0, 5, 9, Mode::Generate));
    scheduler.add(sequence(1, 12, 9, Mode::Generate));
    let mut steps = Vec::new();
    for _ in 0..3 {
        scheduler.schedule(&mut plan);
        steps.push(rows(&plan));
        play(&mut scheduler, &plan);
    }
    assert_eq!(steps, [vec![(0, 5), (0, 3)], vec![(5, 1), (3, 7)], vec![(6, 1), (10, 2)]]);
}

#[test]
fn the_youngest_is_preempted_and_comes_back_first_with_its_tokens() {
    // Two sequences of one block each and one block over: the first to need
    // another takes it, then the second finds none.
    let mut scheduler = scheduler(4, 4, 64);
    let mut plan = StepPlan::default();
    for key in 0..2 {
        scheduler.add(sequence(key, 3, 8, Mode::Generate));
    }
    scheduler.schedule(&mut plan);
    assert_eq!(rows(&plan), [(0, 3), (0, 3)]);
    scheduler.add(sequence(2, 3, 8, Mode::Generate));
    let mut order = Vec::new();
    while scheduler.has_work() {
        order.extend(play(&mut scheduler, &plan));
        let before = scheduler.preemptions();
        scheduler.schedule(&mut plan);
        if before == 0 && scheduler.preemptions() == 1 {
            let head = &scheduler.waiting()[0];
            assert_eq!(head.token_ids()[0], 1, "before sequence 2, which came later");
            assert!(!head.output_token_ids().is_empty());
            assert_eq!((head.num_computed_tokens(), head.block_table().len()), (0, 0));
        }
    }
    assert_eq!(order, [0, 1, 2]);
    assert!(scheduler.preemptions() > 0);
}

#[test]
fn scored_rows_are_bounded_and_the_last_token_is_not_computed() {
    let mut scheduler = scheduler(100, 4, 64);
    let mut plan = StepPlan::default();
    scheduler.add(sequence(0, 6, 0, Mode::Score));
    scheduler.schedule(&mut plan);
    assert_eq!((rows(&plan), plan.batch.num_logits_rows()), (vec![(0, 3)], 3));
    play(&mut scheduler, &plan);
    scheduler.schedule(&mut plan);
    assert_eq!(rows(&plan), [(3, 2)]);
    assert_eq!(play(&mut scheduler, &plan), [0]);
    assert_eq!(scheduler.blocks().num_free(), 100);
}

#[test]
fn taking_all_frees_every_block_and_keeps_the_order_of_arrival() {
    let mut scheduler = scheduler(6, 3, 8);
    let mut plan = StepPlan::default();
    (0..5).for_each(|key| scheduler.add(sequence(key, 3, 8, Mode::Generate)));
    for _ in 0..5 {
        scheduler.schedule(&mut plan);
        play(&mut scheduler, &plan);
    }
    assert!(scheduler.running().len() > 1 && !scheduler.waiting().is_empty());
    let all: Vec<_> = scheduler.take_all().map(Sequence::into_unfinished).collect();
    assert_eq!(all.iter().map(|s| s.key).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(all[0].generated.token_ids.len(), 5);
    assert_eq!((scheduler.has_work(), scheduler.blocks().num_free()), (false, 6));
}

proptest! {
    #![proptest_config(crate::engine::tests::config(128))]

    /// Whatever the load and however few the blocks: every step moves the oldest
    /// sequence, stays within the limits and shares no block; all complete, and
    /// all blocks come back.
    #[test]
    fn everything_completes(
        num_blocks in 1usize..10,
        max_batch_size in 0usize..6,
        max_batched_tokens in 0usize..20,
        work in prop::collection::vec((1usize..40, 1usize..40, any::<bool>()), 1..12),
    ) {
        let mut scheduler = scheduler(num_blocks, max_batch_size, max_batched_tokens);
        let mut most_steps = 0;
        let capacity = num_blocks * BLOCK_SIZE;
        for (key, &(prompt, max_new_tokens, score)) in work.iter().enumerate() {
            let (mode, least) = if score { (Mode::Score, 2) } else { (Mode::Generate, 1) };
            let prompt = prompt.max(least).min(capacity - 1).max(least);
            let new = max_new_tokens.min(capacity - prompt.min(capacity - 1));
            scheduler.add(sequence(key as u64, prompt, new, mode));
            most_steps += prompt + new;
        }
        let mut plan = StepPlan::default();
        let (mut steps, mut completed) = (0, 0);
        while scheduler.has_work() {
            scheduler.schedule(&mut plan);
            steps += 1;
            prop_assert!(steps <= most_steps, "no end in sight");
            prop_assert!(plan.entries.iter().any(|entry| entry.running == 0));
            prop_assert!(plan.entries.len() <= max_batch_size.max(1));
            let tokens = plan.batch.token_ids.len();
            prop_assert!(tokens <= max_batched_tokens.max(max_batch_size).max(1));
            let mut blocks = Vec::<u32>::new();
            for s in &plan.batch.sequences {
                prop_assert!(s.num_tokens > 0);
                prop_assert!(s.block_table.len() * BLOCK_SIZE >= s.start_position + s.num_tokens);
                blocks.extend(&s.block_table);
            }
            let held = blocks.len();
            blocks.sort_unstable();
            blocks.dedup();
            prop_assert_eq!(blocks.len(), held);
            completed += play(&mut scheduler, &plan).len();
        }
        prop_assert_eq!(completed, work.len());
        prop_assert_eq!(scheduler.blocks().num_free(), num_blocks);
    }
}
