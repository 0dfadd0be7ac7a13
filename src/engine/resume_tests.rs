//! What an engine leaves unfinished another brings to the end that one engine would
//! have reached.

use super::*;

/// Cuts after every launch: its engine's batch size, rows a step, block size and
/// blocks to spare, and the steps that it runs.
fn any_launch() -> impl Strategy<Value = ((usize, usize, usize, usize), usize)> {
    ((1usize..9, 1usize..24, 1usize..9, 0usize..8), 0usize..40)
}

/// Adds `requests` and takes them out again: nothing that was saved may have been
/// dropped, or the outputs would agree only because all was generated anew.
fn assert_all_is_kept(engine: &mut Engine<FakeRunner>, requests: &BTreeMap<u64, EngineRequest>) {
    requests.values().for_each(|request| engine.add(request.clone()));
    let taken = engine.take_unfinished();
    assert!(!engine.has_work());
    assert_eq!(taken.len(), requests.len());
    for Unfinished { key, generated } in &taken {
        assert_eq!(*generated, requests[key].generated);
    }
}

proptest! {
    #![proptest_config(config(96))]

    /// Cut anywhere and any number of times (in a chunked prefill, before the first
    /// step, after a preemption), with engines of other sizes: the same tokens,
    /// text, end and log-probabilities.
    #[test]
    fn a_continued_record_yields_the_same_as_an_uninterrupted_one(
        requests in prop::collection::vec(any_request(), 1..9),
        launches in prop::collection::vec(any_launch(), 2..5),
    ) {
        let requests: BTreeMap<u64, EngineRequest> = (0u64..)
            .zip(requests)
            .map(|(key, request)| (key, EngineRequest { key, record_index: key * 3, ..request }))
            .collect();
        let (mut open, mut outputs) = (requests.clone(), BTreeMap::new());
        for (launch, ((batch, tokens, block_size, spare), steps)) in launches.iter().enumerate() {
            let num_blocks = MAX_SEQ_LEN.div_ceil(*block_size) + spare;
            let runner = FakeRunner::new(num_blocks, *block_size, MAX_SEQ_LEN);
            let mut engine = engine(runner, *batch, *tokens);
            assert_all_is_kept(&mut engine, &open);
            open.values().for_each(|request| engine.add(request.clone()));
            let is_last = launch + 1 == launches.len();
            let mut finished = Vec::new();
            for _ in 0..if is_last { usize::MAX } else { *steps } {
                if !engine.has_work() {
                    break;
                }
                finished.extend(engine.step().unwrap().finished);
            }
            for output in finished {
                prop_assert!(open.remove(&output.key).is_some(), "a record came out twice");
                outputs.insert(output.key, output);
            }
            let unfinished = engine.take_unfinished();
            prop_assert_eq!(unfinished.len(), open.len());
            for Unfinished { key, generated } in unfinished {
                open.get_mut(&key).unwrap().generated = generated;
            }
        }
        prop_assert!(open.is_empty());
        for (key, request) in &requests {
            prop_assert_eq!(&outputs[key], &reference(request));
        }
    }
}

fn long(max_new_tokens: usize) -> SamplingParams {
    SamplingParams {
        max_new_tokens,
        ignore_eos: true,
        temperature: 0.8,
        repetition_penalty: 1.2,
        logprobs: Some(2),
        ..Default::default()
    }
}

#[test]
fn a_cut_within_the_chunked_prefill_of_a_continued_one_loses_no_token() {
    let mut request = request(3, &[1; 20], long(12));
    let whole = reference(&request);
    let mut engine = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 1, 4);
    // Five steps of prefill, the last with a token, and seven more tokens.
    for (steps, prefill_tokens, num_generated) in [(12, 20, 8), (2, 8, 8), (7, 28, 9)] {
        engine.add(request.clone());
        let before = engine.counters().prefill_tokens;
        (0..steps).for_each(|_| assert!(engine.step().unwrap().finished.is_empty()));
        assert_eq!(engine.counters().prefill_tokens - before, prefill_tokens);
        let taken = engine.take_unfinished();
        request.generated = taken[0].generated.clone();
        assert_eq!(request.generated.token_ids, whole.token_ids[..num_generated]);
    }
    engine.add(request);
    assert_eq!(run_to_end(&mut engine)[&3], whole);
}

#[test]
fn continued_sequences_can_be_preempted() {
    let mut requests: Vec<_> = (0..8).map(|key| request(key, &[key as u32; 3], long(40))).collect();
    let mut first = engine(FakeRunner::new(40, 4, MAX_SEQ_LEN), 8, 64);
    requests.iter().for_each(|request| first.add(request.clone()));
    (0..9).for_each(|_| drop(first.step().unwrap()));
    for (request, taken) in requests.iter_mut().zip(first.take_unfinished()) {
        assert_eq!((request.key, taken.generated.token_ids.len()), (taken.key, 9));
        request.generated = taken.generated;
    }
    let mut second = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 8, 64);
    requests.iter().for_each(|request| second.add(request.clone()));
    let outputs = run_to_end(&mut second);
    assert!(second.counters().preemptions > 0);
    for request in requests {
        assert_eq!(outputs[&request.key], reference(&request));
    }
}

#[test]
fn what_had_ended_comes_back_without_a_step_of_the_model() {
    let stop = SamplingParams { stop: vec!["a".into()], ..long(40) };
    let eos = SamplingParams { ignore_eos: false, ..long(44) };
    for params in [stop, eos, long(5), long(usize::MAX)] {
        let fresh = request(0, &[1, 2], params);
        let output = reference(&fresh);
        let mut engine = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 4, 16);
        engine.add(EngineRequest { generated: output.clone().into(), ..fresh });
        let outcome = engine.step().unwrap();
        assert_eq!((outcome.batch_size, outcome.finished), (0, vec![output]));
    }
}

#[test]
fn the_first_token_of_a_continued_sequence_is_its_first_from_this_engine() {
    let fresh = request(0, &[1, 2], long(9));
    let mut output = Generated::from(reference(&fresh));
    output.token_ids.truncate(4);
    output.logprobs.truncate(4);
    let mut engine = engine(FakeRunner::new(12, 4, MAX_SEQ_LEN), 4, 16);
    engine.add(EngineRequest { generated: output, ..fresh });
    let first_tokens: Vec<_> = (0..5).map(|_| engine.step().unwrap().first_tokens).collect();
    assert_eq!(first_tokens, [1, 0, 0, 0, 0]);
}

/// Saved tokens that this prompt, model and parameters cannot have given.
#[test]
fn what_does_not_fit_is_dropped_and_generated_anew() {
    let entry = |token: u32| TokenLogprob { token, logprob: -1.0, top: vec![(1, -1.0), (2, -2.0)] };
    let saved = |ids: &[u32]| Generated {
        token_ids: ids.to_vec(),
        logprobs: ids.iter().map(|&id| entry(id)).collect(),
    };
    let plain = |ids: &[u32]| Generated { logprobs: Vec::new(), ..saved(ids) };
    let edited = |edit: fn(&mut TokenLogprob)| {
        let mut saved = saved(&[3, 4]);
        edit(&mut saved.logprobs[1]);
        saved
    };
    let no_logprobs = SamplingParams { logprobs: None, ..long(20) };
    let eos = SamplingParams { ignore_eos: false, ..no_logprobs.clone() };
    let stop = SamplingParams { stop: vec!["ab".into()], ..no_logprobs.clone() };
    for (params, generated) in [
        (no_logprobs.clone(), plain(&[3, VOCAB_SIZE as u32])),
        (no_logprobs.clone(), saved(&[3])),
        (no_logprobs.clone(), plain(&[3; 21])),
        (eos, plain(&[EOS, 3])),
        (stop, plain(&[0, 1, 3])),
        (SamplingParams { max_new_tokens: 0, ..no_logprobs }, plain(&[3])),
        (long(20), plain(&[3])),
        (long(20), Generated { token_ids: Vec::new(), ..saved(&[3]) }),
        (long(20), edited(|entry| entry.token = 5)),
        (long(20), edited(|entry| entry.top.truncate(1))),
        (long(20), edited(|entry| entry.top[1].0 = VOCAB_SIZE as u32)),
    ] {
        let fresh = request(5, &[1, 2], params);
        let output = run_one(EngineRequest { generated: generated.clone(), ..fresh.clone() });
        assert_eq!(output, reference(&fresh), "{generated:?}");
    }
    let fresh = EngineRequest { mode: Mode::Score, ..request(5, &[1, 2, 3], long(9)) };
    let output = run_one(EngineRequest { generated: saved(&[3]), ..fresh.clone() });
    assert_eq!(output, reference(&fresh));
}
