//! Turning a step's rows of logits into tokens and scores, on the host, over
//! several threads where there is enough to do. A row's result depends on that
//! row and its sequence alone, so the split over threads cannot show.

use rayon::prelude::*;

use super::choose::{Scratch, choose, score, token_logprob};
use super::output::TokenLogprob;
use super::sequence::Sequence;
use super::softmax::LogitsError;
use crate::model::Logits;

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

/// A row's result.
#[derive(Debug, Clone, PartialEq)]
pub enum RowResult {
    /// A sampled token, with its log-probabilities where they were asked for.
    Token(u32, Option<TokenLogprob>),
    /// The log-probability of the target.
    Score(f64),
}

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
    /// saves.
    const MIN_PARALLEL_LOGITS: usize = 1 << 15;

    /// Runs all `tasks`; the results are in their order. `eos_token_ids` are
    /// never sampled for sequences with `ignore_eos`. The matcher of a guided sequence
    /// has taken its token afterwards.
    pub fn run(
        &mut self,
        logits: &Logits,
        tasks: &[RowTask],
        running: &[Sequence],
        eos_token_ids: &[u32],
    ) -> std::vec::Drain<'_, Result<RowResult, RowError>> {
        let Self { scratch, results } = self;
        results.clear();
        results.resize_with(tasks.len(), || Ok(RowResult::Score(0.0)));
        let is_small = tasks.len() * logits.vocab_size < Self::MIN_PARALLEL_LOGITS;
        let threads = if is_small { 1 } else { rayon::current_num_threads() };
        if scratch.len() < threads {
            scratch.resize_with(threads, Scratch::default);
        }
        let run_all = |tasks: &[RowTask], results: &mut [_], scratch: &mut Scratch| {
            for (task, result) in tasks.iter().zip(results) {
                let row = logits.row(task.row);
                *result = run_one(task, row, &running[task.running], eos_token_ids, scratch);
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
    let token = match sequence.matcher() {
        None => choose(row, params, counts, None, eos_token_ids, uniform, scratch)?,
        Some(mut matcher) => {
            let allowed = matcher.allowed(params.ignore_eos).map_err(RowError::Guide)?;
            let allowed = Some(allowed.as_slice());
            let token = choose(row, params, counts, allowed, eos_token_ids, uniform, scratch)?;
            matcher.take(token, sequence.room()).map_err(RowError::Guide)?
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
        let logits = Logits { data, vocab_size };
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
