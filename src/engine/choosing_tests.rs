//! Runners that choose tokens themselves: their outputs are those of the engine's own
//! sampling, whatever shares a step.

use super::*;
use crate::Result;
use crate::model::{Logits, LogitsError, Logprobs, RowChoice, RowChoices, RowSampling, StepBatch};

/// A choice by the engine's own functions, from nothing but what the runner is told.
fn choose_on_host(
    row: &[f32],
    wanted: &RowSampling,
    eos: &[u32],
) -> std::result::Result<RowChoice, LogitsError> {
    let mut scratch = Scratch::default();
    let wanted = match wanted {
        RowSampling::Logits => return Ok(RowChoice::Logits(row.to_vec())),
        RowSampling::Score { target } => {
            return Ok(RowChoice::Score(score(row, *target, &mut scratch)?));
        }
        RowSampling::Token(wanted) => wanted,
    };
    let penalties = wanted.penalties.as_ref();
    let params = SamplingParams {
        temperature: wanted.temperature,
        top_p: wanted.top_p,
        top_k: wanted.top_k,
        min_p: wanted.min_p,
        repetition_penalty: penalties.map_or(1.0, |p| p.repetition),
        presence_penalty: penalties.map_or(0.0, |p| p.presence),
        frequency_penalty: penalties.map_or(0.0, |p| p.frequency),
        ignore_eos: wanted.suppress_eos,
        ..Default::default()
    };
    let counts = TokenCounts::for_params(&params, penalties.map_or(&[], |p| p.history));
    let draw = wanted.draw;
    let uniform = rng::uniform(draw.seed, draw.record_index, draw.completion, draw.step);
    let token = choose(row, &params, counts.as_ref(), wanted.allowed, eos, uniform, &mut scratch)?;
    let report = |num_top| token_logprob(row, token, num_top, &mut scratch);
    let report = wanted.logprobs.map(report).transpose()?;
    let logprobs = report.map(|report| Logprobs { chosen: report.logprob, top: report.top });
    Ok(RowChoice::Token(token, logprobs))
}

/// Who chooses in place of the engine.
enum Chooser {
    Host,
    #[cfg(feature = "emulator")]
    Device(crate::device::Device, Box<crate::device::sampling::RowChooser>),
}

pub struct Choosing {
    fake: FakeRunner,
    chooser: Chooser,
    /// Numbers of the sequences with penalties, and the longest history of each.
    histories: BTreeMap<u64, Vec<u32>>,
}

impl Choosing {
    pub fn new(fake: FakeRunner) -> Self {
        Self { fake, chooser: Chooser::Host, histories: BTreeMap::new() }
    }

    #[cfg(feature = "emulator")]
    pub fn on_device(fake: FakeRunner, device: &crate::device::Device) -> Self {
        let chooser = crate::device::sampling::RowChooser::new(device, fake.vocab_size).unwrap();
        let chooser = Chooser::Device(device.clone(), Box::new(chooser));
        Self { fake, chooser, histories: BTreeMap::new() }
    }
}

impl Runner for Choosing {
    fn num_blocks(&self) -> usize {
        self.fake.num_blocks()
    }
    fn block_size(&self) -> usize {
        self.fake.block_size()
    }
    fn vocab_size(&self) -> usize {
        self.fake.vocab_size()
    }
    fn max_seq_len(&self) -> usize {
        self.fake.max_seq_len()
    }
    fn forward(&mut self, _: &StepBatch) -> Result<Logits> {
        panic!("this runner chooses itself")
    }
    fn chooses(&self) -> bool {
        true
    }
    fn forward_and_choose(
        &mut self,
        batch: &StepBatch,
        rows: &[RowSampling<'_>],
        eos: &[u32],
    ) -> Result<RowChoices> {
        let logits = self.fake.forward(batch)?;
        for row in rows {
            if let RowSampling::Token(wanted) = row
                && let Some(penalties) = &wanted.penalties
            {
                let known = self.histories.entry(penalties.sequence).or_default();
                assert!(penalties.history.starts_with(known), "a number of two sequences");
                *known = penalties.history.to_vec();
            }
        }
        match &mut self.chooser {
            Chooser::Host => {
                let rows = rows.iter().enumerate();
                Ok(rows.map(|(i, row)| choose_on_host(logits.row(i), row, eos)).collect())
            }
            #[cfg(feature = "emulator")]
            Chooser::Device(device, chooser) => {
                let data = device.upload(&logits.data)?;
                chooser.choose(&data, logits.vocab_size, rows, eos)
            }
        }
    }
}

fn choosing_engine(
    runner: Choosing,
    max_batch_size: usize,
    max_batched_tokens: usize,
) -> Engine<Choosing> {
    let config = EngineConfig {
        max_batch_size,
        max_batched_tokens,
        max_scored_logits_bytes: 5 * 4 * VOCAB_SIZE,
        eos_token_ids: vec![EOS],
    };
    Engine::new(runner, Arc::new(PieceDecoder), config).unwrap()
}

/// Runs all, cut after each of `cuts` steps and continued by another engine.
fn run_in_parts(
    mut open: Vec<EngineRequest>,
    cuts: &[usize],
    mut new: impl FnMut() -> Engine<Choosing>,
) -> (BTreeMap<u64, EngineOutput>, u64) {
    let (mut outputs, mut preemptions) = (BTreeMap::new(), 0);
    for steps in cuts.iter().copied().chain([usize::MAX]) {
        let mut engine = new();
        open.iter().for_each(|request| engine.add(request.clone()));
        for _ in 0..steps {
            if !engine.has_work() {
                break;
            }
            outputs.extend(engine.step().unwrap().finished.into_iter().map(|o| (o.key, o)));
        }
        open.retain(|request| !outputs.contains_key(&request.key));
        preemptions += engine.counters().preemptions;
        for taken in engine.take_unfinished() {
            if let Some(request) = open.iter_mut().find(|request| request.key == taken.key) {
                request.generated = taken.generated;
            }
        }
    }
    (outputs, preemptions)
}

proptest! {
    #![proptest_config(config(48))]

    /// What the runner is told is all that a choice needs.
    #[test]
    fn a_runner_that_chooses_gives_what_the_engine_gives(
        requests in prop::collection::vec(any_request(), 1..14),
        max_batch_size in 1usize..33,
        max_batched_tokens in 1usize..40,
        block_size in 1usize..17,
        spare_blocks in 0usize..12,
        cuts in prop::collection::vec(1usize..30, 0..3),
    ) {
        let requests: Vec<EngineRequest> = requests.into_iter().enumerate().map(|(i, request)| {
            EngineRequest { key: i as u64, record_index: i as u64, ..request }
        }).collect();
        let num_blocks = MAX_SEQ_LEN.div_ceil(block_size) + spare_blocks;
        let new = || {
            let runner = Choosing::new(FakeRunner::new(num_blocks, block_size, MAX_SEQ_LEN));
            choosing_engine(runner, max_batch_size, max_batched_tokens)
        };
        let (outputs, _) = run_in_parts(requests.clone(), &cuts, new);
        for request in &requests {
            prop_assert_eq!(&outputs[&request.key], &reference(request));
        }
    }
}

#[test]
fn a_row_with_more_logprobs_than_a_runner_reports_comes_to_the_host() {
    let params = SamplingParams { max_new_tokens: 4, logprobs: Some(99), ..Default::default() };
    let many = request(1, &[1, 2], params.clone());
    let few = request(2, &[1, 2], SamplingParams { logprobs: Some(3), ..params });
    let runner = Choosing::new(FakeRunner::new(12, 4, MAX_SEQ_LEN));
    let mut engine = choosing_engine(runner, 4, 16);
    engine.add(many.clone());
    engine.add(few.clone());
    let outputs = run_to_end(&mut engine);
    for request in [many, few] {
        assert_eq!(outputs[&request.key], reference(&request));
    }
}

#[test]
fn choices_that_are_not_what_was_asked_fail_the_step() {
    struct Wrong(FakeRunner, RowChoices);
    impl Runner for Wrong {
        fn num_blocks(&self) -> usize {
            self.0.num_blocks()
        }
        fn block_size(&self) -> usize {
            self.0.block_size()
        }
        fn vocab_size(&self) -> usize {
            self.0.vocab_size()
        }
        fn max_seq_len(&self) -> usize {
            self.0.max_seq_len()
        }
        fn forward(&mut self, batch: &StepBatch) -> Result<Logits> {
            self.0.forward(batch)
        }
        fn chooses(&self) -> bool {
            true
        }
        fn forward_and_choose(
            &mut self,
            _: &StepBatch,
            _: &[RowSampling<'_>],
            _: &[u32],
        ) -> Result<RowChoices> {
            Ok(self.1.clone())
        }
    }
    for choices in [
        vec![],
        vec![Ok(RowChoice::Score(0.0))],
        vec![Ok(RowChoice::Token(VOCAB_SIZE as u32, None))],
        vec![Ok(RowChoice::Logits(vec![0.0; VOCAB_SIZE]))],
    ] {
        let runner = Wrong(FakeRunner::new(12, 4, MAX_SEQ_LEN), choices);
        let mut engine =
            Engine::new(runner, Arc::new(PieceDecoder), EngineConfig::default()).unwrap();
        engine.add(request(0, &[1, 2], SamplingParams::default()));
        assert!(engine.step().unwrap_err().message.contains("choices"));
    }
}

/// Every way of sampling over whole lives: preempted, cut and continued, `n` completions of a
/// record, scores beside them. Tokens are the host's; log-probabilities are as close as sums in
/// another order.
#[cfg(feature = "emulator")]
#[test]
fn a_device_that_chooses_gives_what_the_engine_gives() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::{TestRng, TestRunner};

    let mut runner = TestRunner::new_with_rng(
        config(1),
        TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let mut preemptions = 0;
    for (round, device) in crate::device::testing::devices().into_iter().enumerate() {
        let requests: Vec<EngineRequest> = (0..24)
            .map(|key| {
                let request = any_request().new_tree(&mut runner).unwrap().current();
                // Three completions a record.
                EngineRequest { key, record_index: key / 3, completion: key as u32 % 3, ..request }
            })
            .collect();
        let new = || {
            let fake = FakeRunner::new(14 + round, 4, MAX_SEQ_LEN);
            choosing_engine(Choosing::on_device(fake, &device), 8, 24)
        };
        let (outputs, preempted) = run_in_parts(requests.clone(), &[9, 20], new);
        preemptions += preempted;
        for request in &requests {
            assert_close(&outputs[&request.key], &reference(request));
        }
    }
    assert!(preemptions > 0);
}

/// Equal but for the last digits of log-probabilities.
#[cfg(feature = "emulator")]
pub fn assert_close(got: &EngineOutput, want: &EngineOutput) {
    let plain =
        |output: &EngineOutput| EngineOutput { logprobs: None, score: None, ..output.clone() };
    assert_eq!(plain(got), plain(want));
    let scores = |output: &EngineOutput| {
        output.score.iter().flat_map(|score| score.token_logprobs.clone()).collect::<Vec<_>>()
    };
    let reports = |output: &EngineOutput| output.logprobs.clone().unwrap_or_default();
    assert_eq!(scores(got).len(), scores(want).len());
    for (got, want) in scores(got).into_iter().zip(scores(want)) {
        assert!((got - want).abs() < 1e-7, "{got} for {want}");
    }
    assert_eq!(reports(got).len(), reports(want).len());
    for (got, want) in reports(got).into_iter().zip(reports(want)) {
        let ids = |report: &TokenLogprob| report.top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!((got.token, ids(&got)), (want.token, ids(&want)));
        let values = |report: &TokenLogprob| {
            let top = report.top.iter().map(|(_, logprob)| *logprob);
            top.chain([report.logprob]).collect::<Vec<_>>()
        };
        for (got, want) in values(&got).into_iter().zip(values(&want)) {
            assert!((got - want).abs() < 1e-6, "{got} for {want}");
        }
    }
}
