//! The engine as a whole, over the fake runner: what a record yields is what a
//! plain loop over the model yields, whatever shares the batch.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::choose::{Scratch, TokenCounts, choose, score, token_logprob};
use super::fake_runner::{EOS, FakeRunner, VOCAB_SIZE, push_logits};
use super::stop::earliest_stop;
use super::*;
use crate::model::Runner;

/// The property tests' configuration: the same cases in every run.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(2026),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Pieces of text, among them halves of characters; the last is EOS.
const PIECES: [&[u8]; VOCAB_SIZE] =
    [b"a", b"b", b"ab", b" ", b"c", b"\xC3", b"\xA9", b"\xE2\x82", b"\xAC", b"ca", b"x", b"y", b""];
/// The fake model's context; every test cache holds as many tokens.
const MAX_SEQ_LEN: usize = 48;

struct PieceDecoder;

impl TokenDecoder for PieceDecoder {
    fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| PIECES[id as usize]).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn engine(
    runner: FakeRunner,
    max_batch_size: usize,
    max_batched_tokens: usize,
) -> Engine<FakeRunner> {
    let config = EngineConfig {
        max_batch_size,
        max_batched_tokens,
        max_scored_logits_bytes: 5 * 4 * VOCAB_SIZE,
        eos_token_ids: vec![EOS],
    };
    Engine::new(runner, Arc::new(PieceDecoder), config).unwrap()
}

fn request(key: u64, prompt: &[u32], params: SamplingParams) -> EngineRequest {
    EngineRequest {
        key,
        record_index: key,
        completion: 0,
        prompt_token_ids: prompt.to_vec(),
        adapter: None,
        generated: Generated::default(),
        params,
        mode: Mode::Generate,
    }
}

fn run_to_end<R: Runner>(engine: &mut Engine<R>) -> BTreeMap<u64, EngineOutput> {
    let mut outputs = BTreeMap::new();
    while engine.has_work() {
        for output in engine.step().unwrap().finished {
            assert!(outputs.insert(output.key, output).is_none(), "a record came out twice");
        }
    }
    assert_eq!((engine.num_running(), engine.num_waiting()), (0, 0));
    outputs
}

fn run_one(request: EngineRequest) -> EngineOutput {
    let mut engine = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 4, 16);
    let key = request.key;
    engine.add(request);
    run_to_end(&mut engine).remove(&key).unwrap()
}

/// One record by a plain loop, decoding everything after every token.
fn reference(request: &EngineRequest) -> EngineOutput {
    let EngineRequest { params, prompt_token_ids: prompt, .. } = request;
    let mut history = prompt.clone();
    let mut output = EngineOutput {
        key: request.key,
        token_ids: Vec::new(),
        text: String::new(),
        finish_reason: FinishReason::Stop,
        logprobs: None,
        score: None,
        prompt_tokens: prompt.len(),
    };
    let logits_after = |history: &[u32]| {
        let mut row = Vec::new();
        push_logits(history, None, &mut row);
        row
    };
    if request.mode == Mode::Score {
        let scores = (1..prompt.len())
            .map(|i| score(&logits_after(&prompt[..i]), prompt[i], &mut Scratch::default()));
        let token_logprobs = scores.map(|score| score.unwrap()).collect();
        output.score = Some(Score { token_logprobs });
        return output;
    }
    let mut logprobs = Vec::new();
    let mut scratch = Scratch::default();
    loop {
        if output.token_ids.len() == params.max_new_tokens || history.len() == MAX_SEQ_LEN {
            output.finish_reason = FinishReason::Length;
            break;
        }
        let row = logits_after(&history);
        let counts = TokenCounts::for_params(params, &history);
        let step = output.token_ids.len() as u32;
        let uniform = rng::uniform(params.seed, request.record_index, request.completion, step);
        let token =
            choose(&row, params, counts.as_ref(), None, &[EOS], uniform, &mut scratch).unwrap();
        if let Some(n) = params.logprobs {
            logprobs.push(token_logprob(&row, token, n, &mut scratch).unwrap());
        }
        history.push(token);
        output.token_ids.push(token);
        if token == EOS {
            break;
        }
        output.text = PieceDecoder.decode(&output.token_ids);
        // A character that may still be completed is not yet text.
        let whole = output.text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if earliest_stop(whole, &params.stop).is_some() {
            break;
        }
    }
    if let Some(end) = earliest_stop(&output.text, &params.stop) {
        output.text.truncate(end);
    }
    output.logprobs = params.logprobs.map(|_| logprobs);
    output
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let stop = prop_oneof![Just(""), Just("é"), Just("bab"), Just(" "), Just("ca")];
    (
        (0usize..60, prop_oneof![Just(0.0f32), 0.3f32..1.5], 0usize..6, any::<u8>()),
        (prop_oneof![Just(1.0f32), 0.2f32..1.0], prop_oneof![Just(0.0f32), 0.01f32..0.3]),
        (prop_oneof![Just(1.0f32), 1.05f32..1.5], prop_oneof![Just(0.0f32), 0.1f32..0.5]),
        (prop::collection::vec(stop, 0..2), any::<bool>(), prop::option::of(0usize..4)),
    )
        .prop_map(|(basic, (top_p, min_p), (repetition_penalty, frequency_penalty), rest)| {
            let (max_new_tokens, temperature, top_k, seed) = basic;
            let (stop, ignore_eos, logprobs) = rest;
            SamplingParams {
                max_new_tokens,
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                frequency_penalty,
                seed: seed.into(),
                stop: stop.into_iter().map(str::to_string).collect(),
                ignore_eos,
                logprobs,
                ..Default::default()
            }
        })
}

fn any_request() -> impl Strategy<Value = EngineRequest> {
    let prompt = prop::collection::vec(0u32..VOCAB_SIZE as u32, 1..=MAX_SEQ_LEN);
    (prompt, any_params(), 0u32..3, prop::bool::weighted(0.2)).prop_map(
        |(prompt_token_ids, params, completion, score)| EngineRequest {
            key: 0,
            record_index: 0,
            completion,
            prompt_token_ids,
            adapter: None,
            generated: Generated::default(),
            params,
            mode: if score { Mode::Score } else { Mode::Generate },
        },
    )
}

proptest! {
    #![proptest_config(config(96))]

    /// Invariant 4: neither batch size, chunk size, block size and count
    /// (preemption), nor the order and time of arrival change an output.
    #[test]
    fn a_record_yields_the_same_whatever_shares_its_batch(
        requests in prop::collection::vec((any_request(), any::<u32>(), 0usize..3), 1..14),
        max_batch_size in 1usize..33,
        max_batched_tokens in 1usize..40,
        block_size in 1usize..17,
        spare_blocks in 0usize..12,
    ) {
        let mut arrivals: Vec<_> = requests.into_iter().enumerate().map(|(i, mut arrival)| {
            (arrival.0.key, arrival.0.record_index) = (i as u64, i as u64 * 3);
            arrival
        }).collect();
        arrivals.sort_by_key(|arrival| arrival.1);
        let num_blocks = MAX_SEQ_LEN.div_ceil(block_size) + spare_blocks;
        let runner = FakeRunner::new(num_blocks, block_size, MAX_SEQ_LEN);
        let mut engine = engine(runner, max_batch_size, max_batched_tokens);
        let mut outputs = BTreeMap::new();
        for (request, _, steps) in &arrivals {
            engine.add(request.clone());
            for _ in 0..*steps {
                outputs.extend(engine.step().unwrap().finished.into_iter().map(|o| (o.key, o)));
            }
        }
        outputs.extend(run_to_end(&mut engine));
        prop_assert_eq!(outputs.len(), arrivals.len());
        for (request, ..) in &arrivals {
            prop_assert_eq!(&outputs[&request.key], &reference(request));
        }
    }
}

#[test]
fn preemption_happens_and_is_counted() {
    let mut engine = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 8, 64);
    let params = SamplingParams { ignore_eos: true, max_new_tokens: 40, ..Default::default() };
    for key in 0..8 {
        engine.add(request(key, &[key as u32, 1, 2], params.clone()));
    }
    let outputs = run_to_end(&mut engine);
    assert_eq!(outputs.len(), 8);
    let counters = engine.counters();
    assert!(counters.preemptions > 0);
    assert!(counters.prefill_tokens > 8 * 3, "recomputed rows count as prefill");
    assert!(counters.batch_size_sum >= counters.steps);
}

#[test]
fn a_step_reports_what_it_did() {
    let mut engine = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 8, 64);
    let params = SamplingParams { ignore_eos: true, max_new_tokens: 2, ..Default::default() };
    engine.add(request(1, &[1, 2, 3], params.clone()));
    engine.add(request(2, &[1, 2], params));
    let first = engine.step().unwrap();
    assert_eq!((first.prefill_tokens, first.decode_tokens), (5, 0));
    assert_eq!((first.batch_size, first.first_tokens, first.finished.len()), (2, 2, 0));
    let second = engine.step().unwrap();
    assert_eq!((second.prefill_tokens, second.decode_tokens), (0, 2));
    assert_eq!((second.batch_size, second.first_tokens, second.finished.len()), (2, 0, 2));
    assert_eq!(engine.step().unwrap(), StepOutcome::default());
}

#[test]
fn lengths_at_the_edge_of_the_context() {
    let params = SamplingParams { ignore_eos: true, ..Default::default() };
    for (prompt, max_new_tokens, new) in [
        (3, 0, 0),
        (MAX_SEQ_LEN, 5, 0),
        (MAX_SEQ_LEN - 1, 5, 1),
        (MAX_SEQ_LEN - 3, 3, 3),
        (1, usize::MAX, 47),
    ] {
        let params = SamplingParams { max_new_tokens, ..params.clone() };
        let output = run_one(request(7, &vec![1; prompt], params));
        assert_eq!(output.finish_reason, FinishReason::Length);
        assert_eq!((output.token_ids.len(), output.prompt_tokens), (new, prompt));
        assert_eq!(output.text.is_empty(), new == 0);
    }
}

#[test]
fn a_small_cache_bounds_the_context() {
    let mut engine = engine(FakeRunner::new(2, 4, MAX_SEQ_LEN), 4, 16);
    assert_eq!(engine.max_seq_len(), 8);
    let params = SamplingParams { ignore_eos: true, ..Default::default() };
    engine.add(request(0, &[1; 5], params.clone()));
    engine.add(request(1, &[1; 9], params));
    let outputs = run_to_end(&mut engine);
    assert_eq!(outputs[&0].token_ids.len(), 3);
    assert_eq!(outputs[&0].finish_reason, FinishReason::Length);
    assert!(matches!(&outputs[&1].finish_reason, FinishReason::Error(m) if m.contains("9 tokens")));
}

#[test]
fn prompts_that_cannot_run_are_errors_of_their_own() {
    for (prompt, word) in [(vec![], "no tokens"), (vec![1, 99], "token 99"), (vec![1; 49], "49")] {
        for mode in [Mode::Generate, Mode::Score] {
            let params = SamplingParams { max_new_tokens: 0, ..Default::default() };
            let output = run_one(EngineRequest { mode, ..request(0, &prompt, params) });
            let FinishReason::Error(message) = &output.finish_reason else { panic!("{output:?}") };
            assert!(message.contains(word), "{message}");
            assert_eq!((output.prompt_tokens, output.score), (prompt.len(), None));
        }
    }
}

#[test]
fn scores_are_one_short_of_the_prompt() {
    for prompt in [&[4u32][..], &[4, 5], &[1; MAX_SEQ_LEN]] {
        let request =
            EngineRequest { mode: Mode::Score, ..request(0, prompt, SamplingParams::default()) };
        let output = run_one(request.clone());
        assert_eq!(output, reference(&request));
        assert_eq!(output.score.unwrap().token_logprobs.len(), prompt.len() - 1);
        assert!(output.text.is_empty() && output.logprobs.is_none());
    }
}

#[test]
fn nan_fails_its_record_and_no_other() {
    let healthy = request(2, &[4, 5], SamplingParams { max_new_tokens: 9, ..Default::default() });
    let mut runner = FakeRunner::new(12, 4, MAX_SEQ_LEN);
    runner.poison = Some([1, 11]);
    let mut engine = engine(runner, 4, 16);
    engine.add(request(0, &[3, 1, 11], SamplingParams::default()));
    let score = request(1, &[1, 11, 3, 4, 5, 6, 7], SamplingParams::default());
    engine.add(EngineRequest { mode: Mode::Score, ..score });
    engine.add(healthy.clone());
    let outputs = run_to_end(&mut engine);
    for key in [0, 1] {
        let FinishReason::Error(message) = &outputs[&key].finish_reason else { panic!() };
        assert!(message.contains("NaN"), "{message}");
        assert_eq!(outputs[&key].score, None);
    }
    assert_eq!(outputs[&2], reference(&healthy));
}

#[test]
fn an_error_of_the_model_fails_the_step_and_loses_nothing() {
    let healthy = request(2, &[4, 5], SamplingParams { max_new_tokens: 9, ..Default::default() });
    let mut runner = FakeRunner::new(12, 4, MAX_SEQ_LEN);
    runner.fail_in = Some(2);
    let mut engine = engine(runner, 4, 16);
    engine.add(request(0, &[], SamplingParams::default()));
    engine.add(healthy.clone());
    let mut outputs = Vec::new();
    let mut errors = 0;
    while engine.has_work() {
        match engine.step() {
            Ok(outcome) => outputs.extend(outcome.finished),
            Err(error) => {
                assert!(error.message.contains("device"));
                errors += 1;
            }
        }
    }
    assert_eq!((errors, outputs.len()), (1, 2));
    assert_eq!(outputs[1], reference(&healthy));
}

#[test]
fn a_model_without_a_cache_is_refused() {
    let config = EngineConfig::default();
    let runner = FakeRunner::new(0, 4, MAX_SEQ_LEN);
    let error = Engine::new(runner, Arc::new(PieceDecoder), config).err().unwrap();
    assert!(error.message.contains("0 KV blocks"));
}

#[path = "resume_tests.rs"]
mod resume;

#[path = "guided_tests.rs"]
mod guided;

#[path = "choosing_tests.rs"]
mod choosing;
