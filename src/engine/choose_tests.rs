use proptest::prelude::*;

use super::super::rng;
use super::super::softmax::sum;
use super::*;

fn sampling(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, min_p, ..Default::default() }
}

fn choose_at(row: &[f32], params: &SamplingParams, uniform: f64) -> Result<u32, LogitsError> {
    choose(row, params, None, None, &[], uniform, &mut Scratch::default())
}

/// The filters written down plainly: sort everything, then cut.
fn reference(row: &[f32], params: &SamplingParams, uniform: f64) -> u32 {
    let max = row_max(row).unwrap();
    let mut weights = Vec::new();
    let mut total = softmax_weights(row, max, params.temperature, &mut weights);
    let mut ids: Vec<usize> = (0..row.len()).filter(|&i| weights[i] > 0.0).collect();
    if params.top_k == 0 && params.top_p >= 1.0 {
        ids.retain(|&i| weights[i] >= params.min_p);
        let kept = (0..row.len()).map(|i| if ids.contains(&i) { weights[i] } else { 0.0 });
        total = sum(&kept.collect::<Vec<_>>());
    } else {
        ids.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        if params.top_k > 0 {
            ids.truncate(params.top_k);
            total = ids.iter().map(|&i| f64::from(weights[i])).sum();
        }
        if params.top_p < 1.0 {
            let (limit, mut before) = (f64::from(params.top_p) * total, 0.0);
            let kept = ids.iter().take_while(|&&i| {
                let keep = before < limit;
                before += f64::from(weights[i]);
                keep
            });
            let kept = kept.count().max(1);
            ids.truncate(kept);
        }
        let best = ids[0];
        ids.retain(|&i| i == best || weights[i] >= params.min_p);
        total = ids.iter().map(|&i| f64::from(weights[i])).sum();
    }
    let mut cumulative = 0.0;
    for &i in &ids {
        cumulative += f64::from(weights[i]);
        if cumulative > uniform * total {
            return i as u32;
        }
    }
    *ids.last().unwrap() as u32
}

proptest! {
    #![proptest_config(crate::engine::tests::config(256))]

    /// Partial sorting and early cuts change nothing. Coarse logits make ties.
    #[test]
    fn filters_match_a_full_sort(
        coarse in prop::collection::vec(-40i32..40, 1..700),
        spread in 0.02f32..0.5,
        temperature in 0.1f32..2.0,
        top_k in prop_oneof![Just(0usize), 1usize..300],
        top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.001f32..0.5],
        uniform in 0.0f64..1.0,
    ) {
        let row: Vec<f32> = coarse.iter().map(|&c| c as f32 * spread).collect();
        let top_k = if top_k >= row.len() { 0 } else { top_k };
        let params = sampling(temperature, top_k, top_p, min_p);
        prop_assert_eq!(choose_at(&row, &params, uniform), Ok(reference(&row, &params, uniform)));
    }
}

#[test]
fn greedy_takes_the_best_and_the_lowest_id_on_ties() {
    assert_eq!(choose_at(&[1.0, 3.0, 3.0, -1.0], &sampling(0.0, 0, 1.0, 0.0), 0.9), Ok(1));
    assert_eq!(choose_at(&[-0.0, 0.0], &sampling(0.0, 0, 1.0, 0.0), 0.9), Ok(0));
    // A top-k of one is greedy at any temperature, ties included.
    for top_p in [0.5, 1.0] {
        assert_eq!(choose_at(&[-0.0, 0.0, -3.0], &sampling(2.0, 1, top_p, 0.0), 0.99), Ok(0));
    }
}

#[test]
fn draws_follow_the_softmax() {
    let probabilities = [0.5f32, 0.3, 0.15, 0.05];
    let row = probabilities.map(f32::ln);
    let mut counts = [0u32; 4];
    for step in 0..20_000 {
        let uniform = rng::uniform(1, 2, 0, step);
        counts[choose_at(&row, &sampling(1.0, 0, 1.0, 0.0), uniform).unwrap() as usize] += 1;
    }
    for (count, p) in counts.iter().zip(probabilities) {
        assert!((*count as f32 / 20_000.0 - p).abs() < 0.015, "{counts:?}");
    }
}

#[test]
fn filters_cut_where_transformers_cuts() {
    // Probabilities 0.4, 0.3, 0.2, 0.1: the highest draw finds the last one kept.
    let row = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
    let last_kept = |top_k, top_p, min_p| {
        choose_at(&row, &sampling(1.0, top_k, top_p, min_p), 1.0 - 1e-12).unwrap()
    };
    assert_eq!(last_kept(2, 1.0, 0.0), 3);
    assert_eq!(last_kept(0, 0.71, 0.0), 2, "the token that crosses top_p is kept");
    assert_eq!(last_kept(0, 0.69, 0.0), 3);
    assert_eq!(last_kept(0, 1e-9, 0.0), 1, "one token always stays");
    assert_eq!(last_kept(0, 0.999, 0.6), 3, "min_p is relative to the best");
    assert_eq!(last_kept(3, 0.75, 0.0), 3, "top_p counts within the top k: 0.4 + 0.3 of 0.9");
}

#[test]
fn unusable_logits_are_errors_at_any_temperature() {
    for temperature in [0.0, 1.0] {
        let params = sampling(temperature, 0, 0.9, 0.0);
        assert_eq!(choose_at(&[0.0, f32::NAN], &params, 0.5), Err(LogitsError::NotFinite));
        assert_eq!(choose_at(&[f32::INFINITY; 2], &params, 0.5), Err(LogitsError::NotFinite));
        let nothing = [f32::NEG_INFINITY; 2];
        assert_eq!(choose_at(&nothing, &params, 0.5), Err(LogitsError::NoCandidate));
        assert_eq!(choose_at(&[f32::NEG_INFINITY, -5.0], &params, 0.5), Ok(1));
    }
    let mut scratch = Scratch::default();
    assert_eq!(token_logprob(&[f32::NAN], 0, 1, &mut scratch), Err(LogitsError::NotFinite));
    assert_eq!(score(&[0.0, f32::NAN], 0, &mut scratch), Err(LogitsError::NotFinite));
}

#[test]
fn extreme_temperatures_do_not_break_the_draw() {
    let row = [1.0, 2.0, f32::NEG_INFINITY];
    assert_eq!(choose_at(&row, &sampling(1e-40, 0, 1.0, 0.0), 0.999), Ok(1));
    assert_eq!(choose_at(&row, &sampling(1e30, 0, 1.0, 0.0), 0.25), Ok(0));
    assert_eq!(choose_at(&row, &sampling(1e30, 0, 1.0, 0.0), 0.75), Ok(1));
}

#[test]
fn penalties_change_the_logits_of_seen_tokens_only() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..Default::default()
    };
    let counts = TokenCounts::for_params(&params, &[0, 1, 1, 1]).unwrap();
    let mut row = [4.0, -4.0, 3.0];
    counts.penalise(&mut row, &params);
    assert_eq!(row, [4.0 / 2.0 - 0.75, -4.0 * 2.0 - 1.25, 3.0]);
    let mut scratch = Scratch::default();
    let row = [4.0, -4.0, 3.0];
    assert_eq!(choose(&row, &params, Some(&counts), None, &[], 0.0, &mut scratch), Ok(2));
    assert!(TokenCounts::for_params(&SamplingParams::default(), &[1]).is_none());
}

#[test]
fn ignore_eos_never_samples_eos() {
    let params = SamplingParams { ignore_eos: true, ..Default::default() };
    let row = [1.0, 9.0, 8.0, 2.0];
    // An EOS id beyond the logits is no fault of the record.
    let mut scratch = Scratch::default();
    assert_eq!(choose(&row, &params, None, None, &[1, 2, 99], 0.0, &mut scratch), Ok(3));
}

#[test]
fn a_guide_comes_before_everything_else() {
    let mut row: Vec<f32> = (0..70).map(|i| i as f32).collect();
    let mut scratch = Scratch::default();
    let params = [
        SamplingParams::default(),
        SamplingParams { repetition_penalty: 2.0, ..Default::default() },
        SamplingParams { ignore_eos: true, ..Default::default() },
        sampling(1.0, 3, 0.5, 0.1),
        sampling(1.0, 0, 1.0, 0.0),
    ];
    let mut chosen = |row: &[f32], params: &SamplingParams, allowed: &[u32], uniform: f64| {
        let counts = TokenCounts::for_params(params, &[69]);
        choose(row, params, counts.as_ref(), Some(allowed), &[33], uniform, &mut scratch)
    };
    for params in &params {
        // Ids 2 and 33 (an EOS) of the second bitmap; what it does not reach is not allowed.
        assert_eq!(chosen(&row, params, &[1 << 2], 0.5), Ok(2));
        assert_eq!(chosen(&row, params, &[1 << 2, 1 << 1], 0.5), Ok(33));
        assert_eq!(chosen(&row, params, &[], 0.5), Err(LogitsError::NoCandidate));
    }
    row[5] = f32::NAN;
    assert_eq!(chosen(&row, &params[0], &[1 << 2], 0.5), Err(LogitsError::NotFinite));
}

#[test]
fn logprobs_are_of_the_raw_logits_best_first() {
    let row = [0.2f32, 0.4, 0.2, 0.1, 0.1].map(f32::ln);
    let report = token_logprob(&row, 3, 3, &mut Scratch::default()).unwrap();
    assert_eq!(report.token, 3);
    assert!((report.logprob - 0.1f32.ln()).abs() < 1e-6);
    let ids: Vec<u32> = report.top.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [1, 0, 2], "lower id first on ties");
    assert!((report.top[0].1 - 0.4f32.ln()).abs() < 1e-6);
    let all = token_logprob(&row, 0, 99, &mut Scratch::default()).unwrap();
    assert_eq!(all.top.len(), 5);
    assert!(
        (score(&row, 1, &mut Scratch::default()).unwrap() - f64::from(0.4f32).ln()).abs() < 1e-6
    );
}
