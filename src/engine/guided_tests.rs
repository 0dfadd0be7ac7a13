//! Guided texts through the whole engine, with logits at random: they are what their
//! guides ask for, and the same whatever shares the batch and wherever they are cut.

use serde_json::Value;

use super::choosing::Choosing;
#[cfg(feature = "emulator")]
use super::choosing::assert_close;
use super::guide::testing::{EOS, VOCAB_SIZE, Words, schema, schemas, words};
use super::*;

/// The longest sequence.
const CONTEXT: usize = 300;

fn engine(
    num_blocks: usize,
    max_batch_size: usize,
    max_batched_tokens: usize,
) -> Engine<FakeRunner> {
    engine_over(runner(num_blocks), max_batch_size, max_batched_tokens)
}

fn runner(num_blocks: usize) -> FakeRunner {
    let mut runner = FakeRunner::new(num_blocks, 8, CONTEXT);
    runner.vocab_size = VOCAB_SIZE;
    runner
}

fn engine_over<R: Runner>(
    runner: R,
    max_batch_size: usize,
    max_batched_tokens: usize,
) -> Engine<R> {
    let config = EngineConfig {
        max_batch_size,
        max_batched_tokens,
        eos_token_ids: vec![EOS],
        ..EngineConfig::default()
    };
    let engine = Engine::new(runner, Arc::new(Words(words())), config).unwrap();
    engine.with_guides(Arc::new(Guides::new(words, &[EOS])))
}

fn guided(key: u64, guide: Guide, max_new_tokens: usize) -> EngineRequest {
    let params = SamplingParams {
        max_new_tokens,
        temperature: (key % 2) as f32,
        top_p: if key.is_multiple_of(3) { 0.9 } else { 1.0 },
        repetition_penalty: if key.is_multiple_of(5) { 1.3 } else { 1.0 },
        ignore_eos: key.is_multiple_of(7),
        logprobs: key.is_multiple_of(4).then_some(1),
        guide: Some(guide),
        ..Default::default()
    };
    request(key, &[key as u32 % 256, 1, 2], params)
}

/// Forty prompts a schema, greedy and at temperature 1: all parse and are valid.
#[test]
fn two_hundred_texts_follow_their_schemas() {
    let mut engine = engine(400, 16, 64);
    let schemas = schemas();
    let schema_of = |key: u64| &schemas[key as usize % schemas.len()];
    for key in 0..200 {
        engine.add(guided(key, Guide::json_schema(schema_of(key)), 60 + key as usize % 90));
    }
    let outputs = run_to_end(&mut engine);
    assert_eq!(outputs.len(), 200);
    for (key, output) in outputs {
        let (schema, text) = (schema_of(key), &output.text);
        assert_eq!(output.finish_reason, FinishReason::Stop, "{key}: {text}");
        let value: Value = serde_json::from_str(text).expect(text);
        assert_eq!(schema::validate(schema, schema, &value), Ok(()), "{text}");
        let reported = key.is_multiple_of(4).then_some(output.token_ids.len());
        assert_eq!(output.logprobs.map(|logprobs| logprobs.len()), reported);
    }
}

#[test]
fn two_hundred_texts_follow_patterns_and_choices() {
    let mut engine = engine(400, 16, 64);
    let choices = ["yes", "no", "maybe", "may"].map(String::from).to_vec();
    let pattern = "[A-Z][a-z]{2,8} [0-9]{1,3}";
    for key in 0..200 {
        let guide = match key < 100 {
            true => Guide::Choices(choices.clone()),
            false => Guide::Regex(pattern.into()),
        };
        engine.add(guided(key, guide, 20));
    }
    for (key, output) in run_to_end(&mut engine) {
        assert_eq!(output.finish_reason, FinishReason::Stop);
        let fits = match key < 100 {
            true => choices.contains(&output.text),
            false => schema::matches(pattern, &output.text),
        };
        assert!(fits, "{}", output.text);
    }
}

/// Alone, together, preempted, cut and continued: the same.
#[test]
fn a_guided_text_does_not_depend_on_what_shares_its_batch() {
    let schemas = schemas();
    let requests: Vec<EngineRequest> = (0..15)
        .map(|key| guided(key, Guide::json_schema(&schemas[key as usize % schemas.len()]), 90))
        .collect();
    let mut alone = BTreeMap::new();
    for request in &requests {
        let mut engine = engine(60, 1, 64);
        engine.add(request.clone());
        alone.extend(run_to_end(&mut engine));
    }
    let mut crowded = engine(CONTEXT / 8 + 4, 16, 40);
    requests.iter().for_each(|request| crowded.add(request.clone()));
    assert_eq!(run_to_end(&mut crowded), alone);
    assert!(crowded.counters().preemptions > 0);
    let (mut open, mut cut) = (requests, BTreeMap::new());
    for steps in [3, 10, 25, 40, usize::MAX] {
        let mut engine = engine(200, 6, 30);
        open.iter().for_each(|request| engine.add(request.clone()));
        for _ in 0..steps {
            if !engine.has_work() {
                break;
            }
            cut.extend(engine.step().unwrap().finished.into_iter().map(|o| (o.key, o)));
        }
        open.retain(|request| !cut.contains_key(&request.key));
        let mut taken = engine.take_unfinished();
        taken.sort_by_key(|taken| taken.key);
        for (request, taken) in open.iter_mut().zip(taken) {
            assert_eq!(request.key, taken.key);
            let kept = request.generated.token_ids.len();
            assert!(taken.generated.token_ids.len() >= kept, "it began anew");
            request.generated = taken.generated;
        }
    }
    assert_eq!(cut, alone);
}

/// Its rows go by the guides' bitmaps, or to the host; what is taken in a token's place is
/// what counts afterwards.
#[test]
fn a_runner_that_chooses_keeps_to_the_guides() {
    fn run<R: Runner>(mut engine: Engine<R>) -> BTreeMap<u64, EngineOutput> {
        let schemas = schemas();
        for key in 0..12 {
            let schema = &schemas[key as usize % schemas.len()];
            engine.add(guided(key, Guide::json_schema(schema), 40 + 3 * key as usize));
        }
        let unguided = SamplingParams { max_new_tokens: 30, ..Default::default() };
        engine.add(request(12, &[4, 5], unguided));
        run_to_end(&mut engine)
    }
    let want = run(engine(100, 8, 64));
    assert_eq!(run(engine_over(Choosing::new(runner(100)), 8, 64)), want);
    #[cfg(feature = "emulator")]
    {
        let on_device = Choosing::on_device(runner(100), &crate::device::Device::emulated());
        for (key, output) in run(engine_over(on_device, 8, 64)) {
            assert_close(&output, &want[&key]);
        }
    }
}

#[test]
fn saved_tokens_that_the_guide_does_not_allow_are_dropped() {
    let fresh = guided(1, Guide::Regex("[0-9]{9}".into()), 20);
    let run = |request: EngineRequest| {
        let mut engine = engine(60, 1, 64);
        engine.add(request);
        run_to_end(&mut engine).remove(&1).unwrap()
    };
    let whole = run(fresh.clone());
    assert_eq!(whole.finish_reason, FinishReason::Stop);
    for wrong in [vec![u32::from(b'1'), u32::from(b'x')], vec![EOS]] {
        let generated = Generated { token_ids: wrong, logprobs: Vec::new() };
        assert_eq!(run(EngineRequest { generated, ..fresh.clone() }), whole);
    }
}

/// A text that cannot be whole in its room says so; a stop string still ends one.
#[test]
fn cut_texts_say_so() {
    let mut engine = engine(60, 4, 64);
    let long = Guide::Regex("a{200}".into());
    engine.add(guided(1, long.clone(), 20));
    let mut stopped = guided(2, long, 250);
    stopped.params.stop = vec!["aaaa".into()];
    engine.add(stopped);
    engine.add(guided(3, Guide::Regex("(".into()), 5));
    let outputs = run_to_end(&mut engine);
    assert_eq!(outputs[&1].finish_reason, FinishReason::Length);
    assert_eq!(outputs[&2].finish_reason, FinishReason::Stop);
    assert_eq!(outputs[&2].text, "");
    let FinishReason::Error(message) = &outputs[&3].finish_reason else { panic!() };
    assert!(message.contains("unclosed"), "{message}");
}

/// Where room is short, what the text ends with is still the model's choice.
#[test]
fn the_model_chooses_among_the_ends_that_fit() {
    let mut engine = engine(60, 4, 64);
    for key in 0..60 {
        engine.add(guided(key, Guide::Regex("[0-9]*(x|y|z)".into()), 1 + key as usize % 3));
    }
    let outputs = run_to_end(&mut engine);
    let ends: std::collections::BTreeSet<_> = outputs
        .values()
        .map(|output| {
            assert_eq!(output.finish_reason, FinishReason::Stop);
            output.text.chars().last()
        })
        .collect();
    assert_eq!(ends.len(), 3, "{ends:?}");
}
