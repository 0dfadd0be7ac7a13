use proptest::prelude::*;

use super::super::testing::devices;
use super::*;
use crate::engine::choose::{Scratch, TokenCounts as HostCounts, choose, score, token_logprob};
use crate::engine::{SamplingParams, TokenLogprob, rng};
use crate::model::Draw;

/// A row and all that is wanted of it.
#[derive(Debug, Clone)]
struct Case {
    row: Vec<f32>,
    params: SamplingParams,
    history: Vec<u32>,
    allowed: Option<Vec<u32>>,
    draw: Draw,
}

impl Case {
    fn new(row: Vec<f32>, params: SamplingParams) -> Self {
        let draw = Draw { seed: params.seed, record_index: 0, completion: 0, step: 0 };
        Self { row, params, history: vec![0], allowed: None, draw }
    }

    fn wanted(&self, sequence: u64) -> RowSampling<'_> {
        let params = &self.params;
        let counts = HostCounts::for_params(params, &[]);
        RowSampling::Token(TokenSampling {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            penalties: counts.map(|_| Penalties {
                repetition: params.repetition_penalty,
                presence: params.presence_penalty,
                frequency: params.frequency_penalty,
                sequence,
                history: &self.history,
            }),
            draw: self.draw,
            suppress_eos: params.ignore_eos,
            allowed: self.allowed.as_deref(),
            logprobs: params.logprobs,
        })
    }

    /// What the host gives for this draw, moved by `shift`.
    fn on_host(&self, eos: &[u32], shift: f64) -> std::result::Result<u32, LogitsError> {
        let Draw { seed, record_index, completion, step } = self.draw;
        let uniform = rng::uniform(seed, record_index, completion, step);
        let uniform = (uniform + shift).clamp(0.0, 1.0 - 1e-16);
        let counts = HostCounts::for_params(&self.params, &self.history);
        let (counts, allowed) = (counts.as_ref(), self.allowed.as_deref());
        choose(&self.row, &self.params, counts, allowed, eos, uniform, &mut Scratch::default())
    }
}

/// What the device gives for rows of one vocabulary in one step; rows are `padding` apart.
fn on_device(device: &Device, cases: &[Case], eos: &[u32], padding: usize) -> RowChoices {
    let vocab_size = cases[0].row.len();
    let stride = vocab_size + padding;
    let mut data = Vec::new();
    for case in cases {
        data.extend_from_slice(&case.row);
        data.resize(data.len() + padding, f32::NAN);
    }
    let logits = device.upload(&data).unwrap();
    let rows: Vec<RowSampling> =
        cases.iter().enumerate().map(|(i, case)| case.wanted(i as u64)).collect();
    let mut chooser = RowChooser::new(device, vocab_size).unwrap();
    let choices = chooser.choose(&logits, stride, &rows, eos).unwrap();
    let next = device.read::<i32>(chooser.next_token_ids()).unwrap();
    for (choice, next) in choices.iter().zip(next) {
        assert_eq!(next, token_of(choice).map_or(0, |token| token as i32));
    }
    choices
}

fn token_of(
    choice: &std::result::Result<RowChoice, LogitsError>,
) -> std::result::Result<u32, LogitsError> {
    match choice {
        Ok(RowChoice::Token(token, _)) => Ok(*token),
        Ok(other) => panic!("{other:?} is no token"),
        Err(error) => Err(*error),
    }
}

/// Rows where the device gave another token than the host, though not another than the host
/// gives for a draw next to this one: those are failures.
fn near_misses(device: &Device, cases: &[Case], eos: &[u32], padding: usize) -> usize {
    let mut misses = 0;
    for (case, choice) in cases.iter().zip(on_device(device, cases, eos, padding)) {
        let got = token_of(&choice);
        if got != case.on_host(eos, 0.0) {
            let near = [-1e-6, 1e-6].map(|shift| case.on_host(eos, shift));
            let Case { params, row, draw, .. } = case;
            assert!(
                near.contains(&got),
                "{got:?}, not {near:?}: {params:?} {draw:?} {}",
                row.len()
            );
            misses += 1;
        }
        let logprobs = match choice {
            Ok(RowChoice::Token(token, logprobs)) => logprobs.map(|report| TokenLogprob {
                token,
                logprob: report.chosen,
                top: report.top,
            }),
            _ => None,
        };
        if let (Some(got), Ok(token)) = (logprobs, got) {
            let num_top = case.params.logprobs.unwrap_or(0).min(MAX_TOP_LOGPROBS);
            let want = token_logprob(&case.row, token, num_top, &mut Scratch::default()).unwrap();
            assert_same_report(&got, &want);
        }
    }
    misses
}

#[track_caller]
fn assert_same_report(got: &TokenLogprob, want: &TokenLogprob) {
    let close = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0);
    assert!(close(got.logprob, want.logprob), "{} for {}", got.logprob, want.logprob);
    assert_eq!(got.top.len(), want.top.len());
    for (got, want) in got.top.iter().zip(&want.top) {
        assert!(got.0 == want.0 && close(got.1, want.1), "{got:?} for {want:?}");
    }
}

fn uniform(seed: u64, i: usize) -> f32 {
    rng::uniform(seed, i as u64, 7, 7) as f32
}

/// Logits much as models give them: near normal, some ids far better.
fn bell(vocab_size: usize, spread: f32, seed: u64) -> Vec<f32> {
    let sum = |i: usize| (0..4).map(|k| uniform(seed, 4 * i + k)).sum::<f32>() - 2.0;
    let best = |i: usize| if uniform(seed + 1, i) < 0.002 { 4.0 * spread } else { 0.0 };
    (0..vocab_size).map(|i| sum(i) * spread + best(i)).collect()
}

fn any_row(vocab_size: usize) -> impl Strategy<Value = Vec<f32>> {
    (0..6usize, any::<u32>(), 0.3f32..12.0).prop_map(move |(kind, seed, spread)| {
        let mut row = bell(vocab_size, spread, seed.into());
        match kind {
            // Ties, zeros of both signs among them.
            0 => row.iter_mut().for_each(|x| *x = x.round() * 0.5),
            1 => row.iter_mut().for_each(|x| *x = (*x * 0.2).round()),
            2 => row.fill(spread),
            // Few candidates.
            3 => row.iter_mut().enumerate().for_each(|(i, x)| {
                if uniform(spread as u64, i) < 0.9 {
                    *x = f32::NEG_INFINITY;
                }
            }),
            _ => {}
        }
        row
    })
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let temperature = prop_oneof![
        1 => Just(0.0f32),
        8 => 0.1f32..2.0,
        1 => prop_oneof![Just(1e-40f32), Just(1e30f32)],
    ];
    let top_k =
        prop_oneof![3 => Just(0usize), 1 => Just(1usize), 4 => 1usize..60, 2 => 1usize..3000];
    let top_p =
        prop_oneof![3 => Just(1.0f32), 4 => 0.01f32..1.0, 1 => Just(0.5f32), 1 => Just(1e-9f32)];
    let min_p = prop_oneof![3 => Just(0.0f32), 1 => 0.001f32..0.5];
    (
        (temperature, top_k, top_p, min_p),
        (prop_oneof![Just(1.0f32), 0.7f32..1.5], prop_oneof![Just(0.0f32), -0.5f32..0.9]),
        (any::<u64>(), any::<bool>(), prop::option::of(0usize..7)),
    )
        .prop_map(
            |((temperature, top_k, top_p, min_p), (repetition_penalty, penalty), rest)| {
                let (seed, ignore_eos, logprobs) = rest;
                SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    presence_penalty: penalty,
                    frequency_penalty: penalty * 0.5,
                    seed,
                    ignore_eos,
                    logprobs,
                    ..Default::default()
                }
            },
        )
}

fn any_cases(
    vocab_sizes: impl Strategy<Value = usize>,
    max: usize,
) -> impl Strategy<Value = Vec<Case>> {
    vocab_sizes.prop_flat_map(move |vocab_size| {
        let history = prop::collection::vec(0..vocab_size as u32, 1..40);
        let words = prop::collection::vec(any::<u32>(), 0..=vocab_size.div_ceil(32) + 1);
        let draw = (any::<u64>(), 0u32..16, any::<u32>());
        let case =
            (any_row(vocab_size), any_params(), history, prop::option::weighted(0.2, words), draw)
                .prop_map(|(row, params, history, allowed, (record_index, completion, step))| {
                    let draw = Draw { seed: params.seed, record_index, completion, step };
                    Case { row, params, history, allowed, draw }
                });
        prop::collection::vec(case, 1..max)
    })
}

proptest! {
    #![proptest_config(crate::engine::tests::config(24))]

    /// The same tokens as on the host, for some thousand rows, in each order of threads.
    #[test]
    fn tokens_are_those_of_the_host(
        cases in any_cases(prop_oneof![Just(13usize), 1usize..300, 300usize..6000], 60),
        padding in 0usize..5,
        order in 0usize..3,
    ) {
        let misses = near_misses(&devices()[order], &cases, &[3, 12, 99_999], padding);
        prop_assert_eq!(misses, 0, "draws at the edge between two tokens");
    }
}

/// What is asked of large vocabularies, on rows as models give them.
#[test]
fn large_vocabularies_give_the_tokens_of_the_host() {
    let sampling = |temperature, top_k, top_p, min_p| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        logprobs: Some(2),
        ..Default::default()
    };
    let device = Device::emulated();
    for vocab_size in [32_000, 128_256, 262_208] {
        let cases: Vec<Case> = [
            sampling(0.0, 0, 1.0, 0.0),
            sampling(1.0, 0, 1.0, 0.0),
            sampling(0.8, 50, 0.95, 0.0),
            sampling(1.0, 0, 0.9, 0.02),
            sampling(1.5, 1000, 1.0, 0.0),
            // More tokens in a bin, and in all that are wanted, than the list holds.
            sampling(8.0, 0, 0.9, 0.0),
            sampling(50.0, 20_000, 0.7, 0.0),
        ]
        .into_iter()
        .enumerate()
        .map(|(i, params)| {
            let draw = Draw { seed: 5, record_index: i as u64, completion: 0, step: 3 };
            Case { draw, ..Case::new(bell(vocab_size, 2.5, i as u64), params) }
        })
        .collect();
        assert_eq!(near_misses(&device, &cases, &[], 0), 0);
    }
}

#[test]
fn equal_logits_are_drawn_in_order_of_their_ids() {
    let device = Device::emulated();
    let params = SamplingParams { temperature: 1.0, top_p: 0.6, ..Default::default() };
    let cases: Vec<Case> = (0..20)
        .map(|i| {
            let draw = Draw { seed: 1, record_index: i, completion: 0, step: 0 };
            Case { draw, ..Case::new(vec![-0.25; 9000], params.clone()) }
        })
        .collect();
    let tokens: Vec<u32> =
        on_device(&device, &cases, &[], 0).iter().map(|c| token_of(c).unwrap()).collect();
    for (case, token) in cases.iter().zip(tokens) {
        let draw = rng::uniform(1, case.draw.record_index, 0, 0);
        // 0.6 as an f32 is a little more, so one token more is kept than 0.6 of them.
        assert_eq!(token, (draw * 5401.0) as u32);
    }
}

#[test]
fn a_row_gives_the_same_whatever_is_beside_it() {
    let device = Device::emulated();
    let sampling = |i: usize| SamplingParams {
        temperature: 0.4 * (i % 4) as f32,
        top_k: 7 * (i % 3),
        top_p: if i.is_multiple_of(2) { 0.9 } else { 1.0 },
        repetition_penalty: if i.is_multiple_of(5) { 1.3 } else { 1.0 },
        logprobs: (i.is_multiple_of(4)).then_some(i % 6),
        ..Default::default()
    };
    let cases: Vec<Case> = (0..24)
        .map(|i| Case {
            history: vec![3, i as u32],
            ..Case::new(bell(5000, 3.0, i as u64), sampling(i))
        })
        .collect();
    let together = on_device(&device, &cases, &[], 3);
    for (case, choice) in cases.iter().zip(together) {
        assert_eq!(on_device(&device, std::slice::from_ref(case), &[], 0), [choice]);
    }
}

#[test]
fn unusable_logits_are_errors_of_their_rows() {
    let inf = f32::INFINITY;
    let sampled = SamplingParams { temperature: 1.0, top_p: 0.9, ..Default::default() };
    let by_id = SamplingParams { temperature: 1.0, ..Default::default() };
    let no_eos = SamplingParams { ignore_eos: true, ..Default::default() };
    let all = [SamplingParams::default(), sampled, by_id, no_eos];
    for device in devices() {
        for params in &all {
            for logprobs in [None, Some(1)] {
                let params = SamplingParams { logprobs, ..params.clone() };
                let rows = [
                    [0.0, f32::NAN, 1.0],
                    [inf; 3],
                    [-inf; 3],
                    [-inf, -5.0, -inf],
                    [0.0, 1.0, f32::NAN],
                    [0.0, 1.0, inf],
                    [-inf, -inf, 1.0],
                ];
                let mut cases: Vec<Case> =
                    rows.map(|row| Case::new(row.to_vec(), params.clone())).to_vec();
                for i in 0..rows.len() {
                    cases.push(Case { allowed: Some(vec![1]), ..cases[i].clone() });
                    cases.push(Case { allowed: Some(vec![]), ..cases[i].clone() });
                }
                for (case, choice) in cases.iter().zip(on_device(&device, &cases, &[2], 0)) {
                    let mut scratch = Scratch::default();
                    let want = case.on_host(&[2], 0.0).and_then(|token| {
                        let num_top = params.logprobs.unwrap_or(0);
                        match params.logprobs {
                            None => Ok(token),
                            Some(_) => token_logprob(&case.row, token, num_top, &mut scratch)
                                .map(|report| report.token),
                        }
                    });
                    assert_eq!(token_of(&choice), want, "{:?} {params:?}", case.row);
                }
            }
        }
    }
}

#[test]
fn scores_and_rows_lie_between_tokens() {
    for device in devices() {
        let data: Vec<Vec<f32>> = (0..4).map(|i| bell(4500, 3.0, i)).collect();
        let logits = device.upload(&data.concat()).unwrap();
        let token = Case::new(data[1].clone(), SamplingParams::default());
        let rows = [
            RowSampling::Score { target: 4444 },
            token.wanted(0),
            RowSampling::Logits,
            RowSampling::Score { target: 0 },
        ];
        let mut chooser = RowChooser::new(&device, 4500).unwrap();
        let choices = chooser.choose(&logits, 4500, &rows, &[]).unwrap();
        for (row, target) in [(0, 4444), (3, 0)] {
            let want = score(&data[row], target, &mut Scratch::default()).unwrap();
            let Ok(RowChoice::Score(got)) = choices[row] else { panic!("{:?}", choices[row]) };
            assert!((got - want).abs() < 1e-7, "{got} for {want}");
        }
        assert_eq!(token_of(&choices[1]), token.on_host(&[], 0.0));
        assert_eq!(choices[2], Ok(RowChoice::Logits(data[2].clone())));
        assert_eq!(chooser.choose(&logits, 4500, &[], &[]).unwrap(), []);
    }
}

/// Sequences that come, grow, rest, come back, begin anew and follow others in their slots have
/// the counts of their tokens.
#[test]
fn token_counts_are_those_of_the_history() {
    let params = SamplingParams {
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.4,
        ..Default::default()
    };
    for device in devices() {
        let vocab_size = 40;
        let mut chooser = RowChooser::new(&device, vocab_size).unwrap();
        let mut histories: Vec<Vec<u32>> = (0..9).map(|i| vec![i, 5, 5]).collect();
        for step in 0..60usize {
            let in_step: Vec<usize> =
                (0..9).filter(|i| (step * 7 + i * 5) % 9 < 1 + step % 7).collect();
            if step % 10 == 9 {
                histories[step % 9] = vec![step as u32 % 40; 3];
            }
            let cases: Vec<Case> = in_step
                .iter()
                .map(|&i| {
                    let row = bell(vocab_size, 1.0, (step * 10 + i) as u64);
                    Case { history: histories[i].clone(), ..Case::new(row, params.clone()) }
                })
                .collect();
            let rows: Vec<RowSampling> =
                cases.iter().zip(&in_step).map(|(case, &i)| case.wanted(i as u64)).collect();
            let data: Vec<f32> = cases.iter().flat_map(|case| case.row.clone()).collect();
            let logits = device.upload(&data).unwrap();
            // A step whose results were lost runs again.
            if step % 6 == 5 {
                chooser.prepare(&rows, &[]).unwrap();
                chooser.launch(&logits, vocab_size, rows.len()).unwrap();
            }
            let choices = chooser.choose(&logits, vocab_size, &rows, &[]).unwrap();
            for ((case, choice), &i) in cases.iter().zip(&choices).zip(&in_step) {
                let token = token_of(choice).unwrap();
                assert_eq!(Ok(token), case.on_host(&[], 0.0), "step {step}, sequence {i}");
                histories[i].push(token);
            }
        }
    }
}

#[test]
fn recorded_launches_take_what_is_prepared_next() {
    let device = Device::emulated();
    let row = bell(300, 3.0, 9);
    let logits = device.upload(&row).unwrap();
    let case = |step| {
        let params = SamplingParams { temperature: 1.5, top_k: 40, ..Default::default() };
        let draw = Draw { seed: 3, record_index: 1, completion: 0, step };
        Case { draw, ..Case::new(row.clone(), params) }
    };
    let mut chooser = RowChooser::new(&device, 300).unwrap();
    chooser.prepare(&[case(0).wanted(0)], &[]).unwrap();
    let generation = chooser.generation();
    let graph = device.capture(|| chooser.launch(&logits, 300, 1)).unwrap();
    for step in 0..10 {
        let case = case(step);
        let rows = [case.wanted(0)];
        chooser.prepare(&rows, &[]).unwrap();
        graph.replay().unwrap();
        let choices = chooser.results(&logits, 300, &rows).unwrap();
        assert_eq!(token_of(&choices[0]), case.on_host(&[], 0.0));
    }
    assert_eq!(chooser.generation(), generation);
}
