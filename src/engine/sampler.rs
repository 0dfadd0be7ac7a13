//! Turning a step's rows of logits into tokens and scores: on the host, over
//! several threads where there is enough to do, or by a runner that is told what to
//! do with each row ([`row_sampling`]). A row's result depends on that row and its
//! sequence alone, so neither the split over threads nor what the other rows ask can
//! show.

use llguidance::toktrie::SimpleVob;
use rayon::prelude::*;

use super::choose::{Scratch, choose, score, token_logprob};
use super::output::TokenLogprob;
use super::sequence::Sequence;
use crate::model::{
    Logits, LogitsError, Logprobs, MAX_TOP_LOGPROBS, Penalties, RowChoice, RowChoices, RowSampling,
    TokenSampling,
};

/// What is wanted of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowTask {
    /// The row.
    pub row: usize,
    /// Place of its sequence in the running list.
    pub running: usize,
    /// The token to score; `None` to sample one.
    pub target: Option<u32>,
}

/// What the runner gave for a step.
#[derive(Debug, Clone, PartialEq)]
pub enum StepResults {
    /// The rows of logits.
    Logits(Logits),
    /// What it did with them, as [`row_sampling`] asked.
    Choices(RowChoices),
}

impl StepResults {
    /// Logits that are left to the host.
    fn num_logits(&self) -> usize {
        let len_of = |choice: &Result<RowChoice, _>| match choice {
            Ok(RowChoice::Logits(row)) => row.len(),
            _ => 0,
        };
        match self {
            StepResults::Logits(logits) => logits.data.len(),
            StepResults::Choices(choices) => choices.iter().map(len_of).sum(),
        }
    }
}

/// The tokens that the guides of `tasks` leave, for a runner that chooses itself; `None`
/// where there is no guide, or where the row comes to the host.
pub fn masks(tasks: &[RowTask], running: &[Sequence]) -> Vec<Option<SimpleVob>> {
    let mask_of = |task: &RowTask| {
        let sequence = &running[task.running];
        // A guide may take another token than the chosen one; that one's log-probability
        // is known on the host alone, and so is what comes second.
        if task.target.is_some() || sequence.params().logprobs.is_some() {
            return None;
        }
        let mut matcher = sequence.matcher()?;
        if matcher.is_tight(sequence.room()) {
            return None;
        }
        // An error is told when the host looks at the row.
        matcher.allowed(sequence.params().ignore_eos).ok()
    };
    if has_guides(tasks, running) {
        tasks.par_iter().map(mask_of).collect()
    } else {
        vec![None; tasks.len()]
    }
}

fn has_guides(tasks: &[RowTask], running: &[Sequence]) -> bool {
    tasks.iter().any(|task| running[task.running].is_guided())
}

/// What to tell a runner that chooses itself; `allowed` is of [`masks`].
pub fn row_sampling<'a>(
    task: &RowTask,
    sequence: &'a Sequence,
    allowed: Option<&'a SimpleVob>,
) -> RowSampling<'a> {
    if let Some(target) = task.target {
        return RowSampling::Score { target };
    }
    let params = sequence.params();
    let has_many_logprobs = params.logprobs.is_some_and(|n| n > MAX_TOP_LOGPROBS);
    if has_many_logprobs || (sequence.is_guided() && allowed.is_none()) {
        return RowSampling::Logits;
    }
    let penalties = sequence.counts().map(|_| Penalties {
        repetition: params.repetition_penalty,
        presence: params.presence_penalty,
        frequency: params.frequency_penalty,
        sequence: sequence.number(),
        history: sequence.token_ids(),
    });
    RowSampling::Token(TokenSampling {
        temperature: params.temperature,
        top_p: params.top_p,
        top_k: params.top_k,
        min_p: params.min_p,
        penalties,
        draw: sequence.draw(),
        suppress_eos: params.ignore_eos,
        allowed: allowed.map(SimpleVob::as_slice),
        logprobs: params.logprobs,
    })
}

/// A row's result.
#[derive(Debug, Clone, PartialEq)]
pub enum RowResult {
    /// A sampled token, with its log-probabilities where they were asked for.
    Token(u32, Option<TokenLogprob>),
    /// The log-probability of the target.
    Score(f64),
}

/// Where room for a guided text is short: choices of the model that are looked at, before
/// it is led to its end.
const MAX_OTHER_CHOICES: usize = 16;

/// Holds the buffers of the threads that sample.
#[derive(Debug, Default)]
pub struct Sampler {
    scratch: Vec<Scratch>,
    results: Vec<Result<RowResult, RowError>>,
}

/// Why a row gives no result; of this sequence alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// The logits are of no use.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// The text cannot go on as its guide asks.
    #[error("{0}")]
    Guide(String),
}

impl Sampler {
    /// Below this many logits a step, handing rows to threads costs more than it
    /// saves; not so guides, which cost more.
    const MIN_PARALLEL_LOGITS: usize = 1 << 15;

    /// Runs all `tasks`; the results are in their order. `eos_token_ids` are
    /// never sampled for sequences with `ignore_eos`. The matcher of a guided sequence
    /// has taken its token afterwards.
    pub fn run(
        &mut self,
        given: &StepResults,
        tasks: &[RowTask],
        running: &[Sequence],
        eos_token_ids: &[u32],
    ) -> std::vec::Drain<'_, Result<RowResult, RowError>> {
        let Self { scratch, results } = self;
        results.clear();
        results.resize_with(tasks.len(), || Ok(RowResult::Score(0.0)));
        let is_small =
            given.num_logits() < Self::MIN_PARALLEL_LOGITS && !has_guides(tasks, running);
        let threads = if is_small { 1 } else { rayon::current_num_threads() };
        if scratch.len() < threads {
            scratch.resize_with(threads, Scratch::default);
        }
        let run_all = |tasks: &[RowTask], results: &mut [_], scratch: &mut Scratch| {
            for (task, result) in tasks.iter().zip(results) {
                let sequence = &running[task.running];
                *result = result_of(task, given, sequence, eos_token_ids, scratch);
            }
        };
        if threads == 1 || tasks.len() == 1 {
            run_all(tasks, results, &mut scratch[0]);
        } else {
            let share = tasks.len().div_ceil(threads);
            tasks
                .par_chunks(share)
                .zip(results.par_chunks_mut(share))
                .zip(scratch.par_iter_mut())
                .for_each(|((tasks, results), scratch)| run_all(tasks, results, scratch));
        }
        results.drain(..)
    }
}

fn result_of(
    task: &RowTask,
    given: &StepResults,
    sequence: &Sequence,
    eos_token_ids: &[u32],
    scratch: &mut Scratch,
) -> Result<RowResult, RowError> {
    match given {
        StepResults::Logits(logits) => {
            run_one(task, logits.row(task.row), sequence, eos_token_ids, scratch)
        }
        StepResults::Choices(choices) => match &choices[task.row] {
            Ok(RowChoice::Logits(row)) => run_one(task, row, sequence, eos_token_ids, scratch),
            Ok(RowChoice::Score(logprob)) => Ok(RowResult::Score(*logprob)),
            Ok(RowChoice::Token(token, None)) => match sequence.matcher() {
                None => Ok(RowResult::Token(*token, None)),
                Some(mut matcher) => {
                    let taken = matcher.take(*token, sequence.room()).map_err(RowError::Guide)?;
                    Ok(RowResult::Token(taken, None))
                }
            },
            Ok(RowChoice::Token(token, Some(logprobs))) => {
                let Logprobs { chosen, top } = logprobs.clone();
                let report = TokenLogprob { token: *token, logprob: chosen, top };
                Ok(RowResult::Token(*token, Some(report)))
            }
            Err(error) => Err(RowError::Logits(*error)),
        },
    }
}

fn run_one(
    task: &RowTask,
    row: &[f32],
    sequence: &Sequence,
    eos_token_ids: &[u32],
    scratch: &mut Scratch,
) -> Result<RowResult, RowError> {
    if let Some(target) = task.target {
        return Ok(RowResult::Score(score(row, target, scratch)?));
    }
    let params = sequence.params();
    let (counts, uniform) = (sequence.counts(), sequence.uniform());
    let mut choose_of = |allowed: Option<&[u32]>| {
        choose(row, params, counts, allowed, eos_token_ids, uniform, scratch)
    };
    let token = match sequence.matcher() {
        None => choose_of(None)?,
        Some(mut matcher) => {
            let room = sequence.room();
            let mut allowed = matcher.allowed(params.ignore_eos).map_err(RowError::Guide)?;
            let mut token = choose_of(Some(allowed.as_slice()))?;
            if matcher.is_tight(room) {
                for _ in 0..MAX_OTHER_CHOICES {
                    if matcher.fits(token, room) {
                        break;
                    }
                    allowed.disallow_token(token);
                    match choose_of(Some(allowed.as_slice())) {
                        Ok(other) => token = other,
                        Err(_) => break,
                    }
                }
            }
            matcher.take(token, room).map_err(RowError::Guide)?
        }
    };
    let logprob = params.logprobs.map(|n| token_logprob(row, token, n, scratch)).transpose()?;
    Ok(RowResult::Token(token, logprob))
}

#[cfg(test)]
mod tests {
    use super::super::detokenizer::tests::ByteDecoder;
    use super::super::{EngineRequest, Generated, Mode, SamplingParams};
    use super::*;

    /// A batch large enough for the threads gives what each row gives alone.
    #[test]
    fn rows_do_not_depend_on_the_split_over_threads() {
        let vocab_size = 5000;
        let running: Vec<Sequence> = (0..32)
            .map(|i| {
                let params = SamplingParams {
                    temperature: 0.9,
                    top_k: if i % 2 == 0 { 50 } else { 0 },
                    top_p: if i % 3 == 0 { 0.9 } else { 1.0 },
                    logprobs: (i % 4 == 0).then_some(3),
                    ..Default::default()
                };
                let request = EngineRequest {
                    key: i,
                    record_index: i,
                    completion: 0,
                    prompt_token_ids: vec![1],
                    adapter: None,
                    generated: Generated::default(),
                    params,
                    mode: Mode::Generate,
                };
                Sequence::new(request, None, 64, vocab_size, &[0], &ByteDecoder)
            })
            .collect();
        let data = (0..32 * vocab_size).map(|i| (i * 7919 % 1009) as f32 * 0.01).collect();
        let logits = StepResults::Logits(Logits { data, vocab_size });
        let tasks: Vec<RowTask> = (0..32)
            .map(|i| RowTask { row: i, running: i, target: (i % 5 == 4).then_some(i as u32) })
            .collect();
        let mut sampler = Sampler::default();
        let together: Vec<_> = sampler.run(&logits, &tasks, &running, &[0]).collect();
        for (task, result) in tasks.iter().zip(together) {
            let alone = sampler.run(&logits, &[*task], &running, &[0]).next();
            assert_eq!(alone, Some(result));
        }
    }
}
