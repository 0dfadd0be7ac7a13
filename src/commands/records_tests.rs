//! Over a tiny model: a record that is saved and continued gives the line that it
//! gives at once.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::comm::NoTensorComm;
use crate::commands::load::Decoder;
use crate::engine::{Engine, EngineConfig, SamplingParams};
use crate::model::{Activations, Checkpoint, LoadOptions, ModelConfig, ModelRunner};
use crate::prompts::RawBody;
use crate::prompts::request::Defaults;

type Lines = BTreeMap<u64, String>;
type Saved = BTreeMap<u64, Vec<u8>>;

fn model_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_gqa")
}

fn records(mode: Mode) -> Records {
    let run = RunInfo { key: "k".into(), created_unix_seconds: 7, model: "tiny".into() };
    let params = SamplingParams { max_new_tokens: 12, ..SamplingParams::default() };
    let preparer = Preparer {
        tokenizer: Arc::new(Tokenizer::from_dir(&model_dir()).unwrap()),
        template: None,
        defaults: Defaults { params, file: "p.jsonl".into(), ..Defaults::default() },
        max_seq_len: 64,
        reserved_tokens: 1,
        guides: engine::Guides::new(Vec::new, &[]).into(),
        vocab_size: ModelConfig::from_dir(&model_dir()).unwrap().vocab_size,
    };
    Records::new(mode, run, preparer)
}

/// A new engine, which runs two sequences at a time: of a record with more
/// completions some have ended while others wait.
fn engine() -> Engine<ModelRunner> {
    let dir = model_dir();
    let options = LoadOptions {
        dtype: None,
        activations: Activations::default(),
        max_seq_len: 64,
        num_blocks: 16,
        device: None,
    };
    let runner =
        ModelRunner::load(&Checkpoint::open(&dir).unwrap(), &options, Arc::new(NoTensorComm))
            .unwrap();
    let decoder = Arc::new(Decoder(Arc::new(Tokenizer::from_dir(&dir).unwrap())));
    let limits = EngineConfig {
        max_batch_size: 2,
        max_batched_tokens: 8,
        eos_token_ids: vec![2],
        ..EngineConfig::default()
    };
    Engine::new(runner, decoder, limits).unwrap()
}

fn raw(index: usize) -> RawRecord {
    let lines = [
        r#"{"prompt":"one two","logprobs":2,"n":3,"temperature":0.8}"#,
        r#"{"prompt":"one two three","return_token_ids":true,"repetition_penalty":1.3}"#,
        r#"{"promt":"one"}"#,
        r#"{"prompt":"a b c d","n":2,"stop":["e","t"],"temperature":1.2,"logprobs":0}"#,
    ];
    let body = RawBody::Json(lines[index].as_bytes().to_vec());
    RawRecord { index: index as u64, line: index as u64 + 1, body }
}

/// One launch of at most `steps` steps over the records without a line: what it saves.
fn launch(mode: Mode, steps: usize, saved: &Saved, lines: &mut Lines) -> Saved {
    let (mut records, mut engine) = (records(mode), engine());
    let mut done = Vec::new();
    for index in (0..4).filter(|index| !lines.contains_key(&(*index as u64))) {
        match records.start(raw(index), saved.get(&(index as u64)).map(Vec::as_slice)) {
            Ok(requests) => requests.into_iter().for_each(|request| engine.add(request)),
            Err(failed) => done.push(*failed),
        }
    }
    for _ in 0..steps {
        if !engine.has_work() {
            break;
        }
        let finished = engine.step().unwrap().finished;
        done.extend(finished.into_iter().filter_map(|output| records.end(output)));
    }
    for Done { finished, .. } in done {
        let line = String::from_utf8(finished.line).unwrap();
        assert!(lines.insert(finished.index, line).is_none(), "a record ended twice");
    }
    let saved = records.unfinished(engine.take_unfinished());
    assert!(saved.is_sorted_by_key(|record| record.index));
    saved.into_iter().map(|record| (record.index, record.bytes)).collect()
}

fn uninterrupted(mode: Mode) -> Lines {
    let mut lines = Lines::new();
    assert!(launch(mode, usize::MAX, &Saved::new(), &mut lines).is_empty());
    let failed: Vec<u64> = (lines.iter())
        .filter_map(|(index, line)| line.contains("\"error\":{").then_some(*index))
        .collect();
    assert_eq!((lines.len(), failed), (4, vec![2]));
    lines
}

#[test]
fn a_continued_record_has_the_same_line_wherever_it_was_cut() {
    let whole = uninterrupted(Mode::Generate);
    for steps in [0, 1, 4, 13, 15, 20, 27] {
        let (mut lines, mut saved) = (Lines::new(), Saved::new());
        for _ in 0..2 {
            saved.extend(launch(Mode::Generate, steps, &saved, &mut lines));
        }
        assert_eq!(saved.is_empty(), steps == 0);
        assert!(!saved.contains_key(&2), "a bad record has nothing to save");
        launch(Mode::Generate, usize::MAX, &saved, &mut lines);
        assert_eq!(lines, whole, "cut after {steps} steps");
    }
}

#[test]
fn what_was_generated_is_not_generated_again() {
    // The record alone: three completions of at most 12 tokens, two at a time.
    let open = |saved: Option<&[u8]>| {
        let (mut records, mut engine) = (records(Mode::Generate), engine());
        let requests = records.start(raw(0), saved).unwrap();
        let counts: Vec<_> = requests.iter().map(|r| r.generated.token_ids.len()).collect();
        requests.into_iter().for_each(|request| engine.add(request));
        (records, engine, counts)
    };
    let (mut records, mut engine, counts) = open(None);
    assert_eq!(counts, [0, 0, 0]);
    for _ in 0..16 {
        for output in engine.step().unwrap().finished {
            assert!(records.end(output).is_none());
        }
    }
    let saved = records.unfinished(engine.take_unfinished());
    let prompt = records.preparer.prepare(&raw(0)).unwrap().prompt_token_ids;
    let completions = saved::decode(&saved[0].bytes, &prompt).unwrap();
    let kept: Vec<_> = completions.iter().map(|c| c.token_ids.len()).collect();
    assert!(kept[0] == 12 && kept[2] > 0 && kept[2] < 12, "one ended, one had not: {kept:?}");
    assert!(completions.iter().all(|c| c.logprobs.len() == c.token_ids.len()));
    assert_eq!(open(Some(&saved[0].bytes)).2, kept);
    // Of another prompt, or damaged: of no use, and no error.
    assert!(saved::decode(&saved[0].bytes, &prompt[1..]).is_none());
    assert_eq!(open(Some(&saved[0].bytes[1..])).2, [0, 0, 0]);
}

#[test]
fn scores_are_not_saved() {
    let whole = uninterrupted(Mode::Score);
    let mut lines = Lines::new();
    assert!(launch(Mode::Score, 1, &Saved::new(), &mut lines).is_empty());
    launch(Mode::Score, usize::MAX, &Saved::new(), &mut lines);
    assert_eq!(lines, whole);
}
