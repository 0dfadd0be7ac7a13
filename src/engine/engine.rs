//! The engine: requests in, steps, outputs out. It ties scheduler, runner and
//! sampler together and counts; what a step costs on the host besides the
//! model is kept to reused buffers.

use std::sync::Arc;

use super::block_manager::BlockManager;
use super::detokenizer::TokenDecoder;
use super::guide::{Grammar, Guides};
use super::output::{EngineOutput, EngineRequest, Mode, Unfinished};
use super::sampler::{RowResult, RowTask, Sampler, StepResults, masks, row_sampling};
use super::scheduler::{Scheduler, SchedulerConfig, StepPlan};
use super::sequence::Sequence;
use crate::model::{LogitsWanted, RowChoice, RowSampling, Runner};
use crate::{Error, Result};

/// Limits of the engine, and what ends a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences that run at a time.
    pub max_batch_size: usize,
    /// Rows a step: decode rows and prefill chunks together.
    pub max_batched_tokens: usize,
    /// Bytes of f32 logits that scoring may ask of a step; at least one row is
    /// always asked.
    pub max_scored_logits_bytes: usize,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_size: 32,
            max_batched_tokens: 512,
            max_scored_logits_bytes: 64 << 20,
            eos_token_ids: Vec::new(),
        }
    }
}

/// Sums over all steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineCounters {
    /// Steps that ran the model.
    pub steps: u64,
    /// Rows of prefill chunks, those computed again after a preemption included.
    pub prefill_tokens: u64,
    /// Rows of decoding sequences.
    pub decode_tokens: u64,
    /// Sequences a step, summed: over `steps × max_batch_size` the occupancy.
    pub batch_size_sum: u64,
    /// Sequences that lost their KV blocks and were computed again.
    pub preemptions: u64,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutcome {
    /// Sequences that ended, in order of arrival.
    pub finished: Vec<EngineOutput>,
    /// Rows of prefill chunks.
    pub prefill_tokens: usize,
    /// Rows of decoding sequences.
    pub decode_tokens: usize,
    /// Sequences in the step; 0 where the model did not run.
    pub batch_size: usize,
    /// Sequences that got their first new token from this engine.
    pub first_tokens: usize,
}

/// Continuous batching over a model.
pub struct Engine<R: Runner> {
    runner: R,
    decoder: Arc<dyn TokenDecoder>,
    scheduler: Scheduler,
    sampler: Sampler,
    guides: Option<Arc<Guides>>,
    eos_token_ids: Vec<u32>,
    counters: EngineCounters,
    max_seq_len: usize,
    /// Sequences that were finished when they came.
    ready: Vec<EngineOutput>,
    // Reused from step to step.
    plan: StepPlan,
    tasks: Vec<RowTask>,
}

impl<R: Runner> Engine<R> {
    /// An engine without requests. Fails where the runner has no KV cache.
    pub fn new(runner: R, decoder: Arc<dyn TokenDecoder>, config: EngineConfig) -> Result<Self> {
        let (num_blocks, block_size) = (runner.num_blocks(), runner.block_size());
        let vocab_size = runner.vocab_size();
        if num_blocks == 0 || block_size == 0 || vocab_size == 0 {
            return Err(Error::fault(format!(
                "the model offers {num_blocks} KV blocks of {block_size} tokens and a vocabulary \
                 of {vocab_size}: nothing can be generated with that"
            )));
        }
        let blocks = BlockManager::new(num_blocks, block_size);
        let max_seq_len = runner.max_seq_len().min(blocks.num_tokens());
        let scheduler_config = SchedulerConfig {
            max_batch_size: config.max_batch_size,
            max_batched_tokens: config.max_batched_tokens,
            max_scored_rows: config.max_scored_logits_bytes / (size_of::<f32>() * vocab_size),
        };
        Ok(Self {
            runner,
            decoder,
            scheduler: Scheduler::new(scheduler_config, blocks),
            sampler: Sampler::default(),
            guides: None,
            eos_token_ids: config.eos_token_ids,
            counters: EngineCounters::default(),
            max_seq_len,
            ready: Vec::new(),
            plan: StepPlan::default(),
            tasks: Vec::new(),
        })
    }

    /// The same with what guided requests need: grammars over the model's vocabulary,
    /// with the engine's EOS tokens.
    #[must_use]
    pub fn with_guides(self, guides: Arc<Guides>) -> Self {
        Self { guides: Some(guides), ..self }
    }

    /// Takes a request. One that cannot run (its prompt is empty, too long, or
    /// of another vocabulary; its guide cannot be followed) comes back with an error
    /// from the next step; one whose earlier tokens end it already, with its output.
    pub fn add(&mut self, request: EngineRequest) {
        let grammar = self.grammar(&request);
        let problem = grammar.as_ref().err().cloned();
        let (eos, decoder) = (&self.eos_token_ids, &*self.decoder);
        let (grammar, vocab_size) = (grammar.unwrap_or(None), self.runner.vocab_size());
        let mut sequence =
            Sequence::new(request, grammar, self.max_seq_len, vocab_size, eos, decoder);
        if let Some(problem) = problem {
            sequence.fail(problem);
        }
        if sequence.finish_reason().is_some() {
            self.ready.push(sequence.into_output(eos, decoder));
        } else {
            self.scheduler.add(sequence);
        }
    }

    fn grammar(
        &self,
        request: &EngineRequest,
    ) -> std::result::Result<Option<Arc<Grammar>>, String> {
        match (&request.params.guide, &self.guides) {
            (Some(guide), Some(guides)) if request.mode == Mode::Generate => {
                guides.compile(guide).map(Some)
            }
            (Some(_), None) if request.mode == Mode::Generate => {
                Err("this engine has no vocabulary to guide texts with".into())
            }
            _ => Ok(None),
        }
    }

    /// Runs one step. A sequence whose logits are unusable ends with an error of
    /// its own; an error of the model fails the step and leaves every sequence
    /// as it was.
    pub fn step(&mut self) -> Result<StepOutcome> {
        self.scheduler.schedule(&mut self.plan);
        self.counters.preemptions = self.scheduler.preemptions();
        let mut outcome = StepOutcome::default();
        if !self.plan.is_empty() {
            self.list_tasks();
            let given = self.run_model()?;
            self.count(&mut outcome);
            self.advance();
            outcome.first_tokens = self.apply_results(&given);
        }
        outcome.finished.append(&mut self.ready);
        let (eos, decoder) = (&self.eos_token_ids, &*self.decoder);
        let finished = self.scheduler.take_finished();
        outcome.finished.extend(finished.map(|sequence| sequence.into_output(eos, decoder)));
        Ok(outcome)
    }

    /// The step's logits, or what a runner that chooses itself made of them.
    fn run_model(&mut self) -> Result<StepResults> {
        let Self { runner, plan, tasks, scheduler, eos_token_ids, .. } = self;
        let vocab_size = runner.vocab_size();
        let num_rows = plan.batch.num_logits_rows();
        if !runner.chooses() {
            let logits = runner.forward(&plan.batch)?;
            if logits.vocab_size == vocab_size && logits.data.len() == num_rows * vocab_size {
                return Ok(StepResults::Logits(logits));
            }
            return Err(Error::fault(format!(
                "the model gave {} logits in rows of {} where {num_rows} rows of {vocab_size} \
                 were asked",
                logits.data.len(),
                logits.vocab_size
            )));
        }
        let running = scheduler.running();
        let masks = masks(tasks, running);
        let rows: Vec<RowSampling> = tasks
            .iter()
            .zip(&masks)
            .map(|(task, mask)| row_sampling(task, &running[task.running], mask.as_ref()))
            .collect();
        let choices = runner.forward_and_choose(&plan.batch, &rows, eos_token_ids)?;
        let fits = |(row, choice): (&RowSampling, &_)| match (row, choice) {
            (_, Err(_)) | (RowSampling::Score { .. }, Ok(RowChoice::Score(_))) => true,
            (RowSampling::Logits, Ok(RowChoice::Logits(row))) => row.len() == vocab_size,
            (RowSampling::Token(asked), Ok(RowChoice::Token(token, logprobs))) => {
                (*token as usize) < vocab_size && asked.logprobs.is_some() == logprobs.is_some()
            }
            _ => false,
        };
        if choices.len() == num_rows && rows.iter().zip(&choices).all(fits) {
            return Ok(StepResults::Choices(choices));
        }
        Err(Error::fault(format!(
            "the model's {} choices are not what was asked of {num_rows} rows",
            choices.len()
        )))
    }

    fn count(&mut self, outcome: &mut StepOutcome) {
        outcome.batch_size = self.plan.entries.len();
        outcome.decode_tokens = self.plan.entries.iter().filter(|entry| entry.is_decode).count();
        outcome.prefill_tokens = self.plan.batch.token_ids.len() - outcome.decode_tokens;
        self.counters.steps += 1;
        self.counters.prefill_tokens += outcome.prefill_tokens as u64;
        self.counters.decode_tokens += outcome.decode_tokens as u64;
        self.counters.batch_size_sum += outcome.batch_size as u64;
    }

    /// Lists what is wanted of each row of logits, in row order.
    fn list_tasks(&mut self) {
        self.tasks.clear();
        for entry in &self.plan.entries {
            let (running, row) = (entry.running, self.tasks.len());
            let sequence = &self.scheduler.running()[running];
            match entry.chunk.logits {
                LogitsWanted::None => {}
                LogitsWanted::Last => self.tasks.push(RowTask { row, running, target: None }),
                LogitsWanted::All => {
                    // The row of a token predicts the token after it.
                    let first = sequence.num_computed_tokens() + 1;
                    let targets = &sequence.token_ids()[first..first + entry.chunk.num_tokens];
                    self.tasks.extend(targets.iter().enumerate().map(|(i, &target)| RowTask {
                        row: row + i,
                        running,
                        target: Some(target),
                    }));
                }
            }
        }
    }

    fn advance(&mut self) {
        for entry in &self.plan.entries {
            self.scheduler.running_mut(entry.running).advance(entry.chunk.num_tokens);
        }
    }

    /// Samples and scores; the number of sequences with their first token.
    fn apply_results(&mut self, given: &StepResults) -> usize {
        let Self { sampler, scheduler, tasks, decoder, eos_token_ids, .. } = self;
        let results = sampler.run(given, tasks, scheduler.running(), eos_token_ids);
        let mut first_tokens = 0;
        for (task, result) in tasks.iter().zip(results) {
            let sequence = scheduler.running_mut(task.running);
            match result {
                Ok(RowResult::Token(token, logprob)) => {
                    sequence.push_token(token, logprob, eos_token_ids, &**decoder);
                    first_tokens += usize::from(sequence.num_new_tokens() == 1);
                }
                Ok(RowResult::Score(logprob)) => sequence.push_score(logprob),
                Err(error) => sequence.fail(error.to_string()),
            }
        }
        first_tokens
    }

    /// Takes everything out, as it is after the last step, to be continued by
    /// another engine: first what had ended and was not handed over yet, then the
    /// others in order of arrival. All KV blocks are free then.
    pub fn take_unfinished(&mut self) -> Vec<Unfinished> {
        let ready = self.ready.drain(..);
        let ready = ready.map(|output| Unfinished { key: output.key, generated: output.into() });
        ready.chain(self.scheduler.take_all().map(Sequence::into_unfinished)).collect()
    }

    /// Whether a step has anything to do or to hand over.
    pub fn has_work(&self) -> bool {
        !self.ready.is_empty() || self.scheduler.has_work()
    }

    /// Sequences that wait for a place or for blocks.
    pub fn num_waiting(&self) -> usize {
        self.scheduler.waiting().len()
    }

    /// Sequences in the batch.
    pub fn num_running(&self) -> usize {
        self.scheduler.running().len()
    }

    /// The longest sequence, prompt and new tokens together, that model and KV
    /// cache allow.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// Sums over all steps so far.
    pub fn counters(&self) -> EngineCounters {
        self.counters
    }

    /// The model, to drive it outside of steps.
    pub fn runner_mut(&mut self) -> &mut R {
        &mut self.runner
    }
}
