//! One request on its way through the engine: its tokens, how far they are in
//! the KV cache, and what generation has gathered so far.
//!
//! There is no status field: a sequence waits or runs by being in the
//! scheduler's waiting or running list, and is finished once it has a
//! [`FinishReason`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::choose::TokenCounts;
use super::detokenizer::TokenDecoder;
use super::guide::{Grammar, Matcher};
use super::output::{
    EngineOutput, EngineRequest, FinishReason, Generated, Mode, Score, TokenLogprob, Unfinished,
};
use super::stop::{StopMatcher, final_text};
use super::{SamplingParams, rng};
use crate::model::{Draw, LogitsWanted};

/// A request and its state.
#[derive(Debug)]
pub struct Sequence {
    key: u64,
    /// No other of its engine has or had it.
    number: u64,
    record_index: u64,
    completion: u32,
    params: SamplingParams,
    mode: Mode,
    adapter: Option<u32>,
    /// Prompt, then output.
    token_ids: Vec<u32>,
    num_prompt_tokens: usize,
    /// Tokens that an earlier engine generated.
    num_earlier_tokens: usize,
    /// Length at which it ends: prompt and new tokens, within the context.
    max_len: usize,
    /// Tokens whose keys and values are in the KV cache.
    num_computed_tokens: usize,
    block_table: Vec<u32>,
    finish_reason: Option<FinishReason>,
    /// Kept where `params` hold penalties.
    counts: Option<TokenCounts>,
    /// Of the guide in `params`.
    grammar: Option<Arc<Grammar>>,
    /// Kept where there is a grammar. Behind a lock, since the sampler's threads share
    /// the list of sequences; each sequence has one row of a step, and so one thread.
    matcher: Option<Mutex<Matcher>>,
    /// Kept where `params` hold stop strings.
    stop_matcher: Option<StopMatcher>,
    logprobs: Vec<TokenLogprob>,
    /// Scores so far: of prompt tokens 1, 2, …
    token_logprobs: Vec<f64>,
}

/// A sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Number of rows.
    pub num_tokens: usize,
    /// Which of them want logits.
    pub logits: LogitsWanted,
}

impl Sequence {
    /// A sequence that ends at `max_seq_len` tokens at the latest. One that has
    /// nothing to compute, or cannot be computed, is finished from the start, and
    /// so is one that the tokens generated earlier end. `grammar` is the compiled guide
    /// of the request's parameters.
    pub fn new(
        request: EngineRequest,
        grammar: Option<Arc<Grammar>>,
        max_seq_len: usize,
        vocab_size: usize,
        eos_token_ids: &[u32],
        decoder: &dyn TokenDecoder,
    ) -> Self {
        let EngineRequest { key, record_index, completion, prompt_token_ids, .. } = request;
        let EngineRequest { params, mode, adapter, generated, .. } = request;
        let num_prompt_tokens = prompt_token_ids.len();
        let max_len = match mode {
            Mode::Generate => {
                num_prompt_tokens.saturating_add(params.max_new_tokens).min(max_seq_len)
            }
            Mode::Score => num_prompt_tokens,
        };
        let mut sequence = Self {
            key,
            number: 0,
            record_index,
            completion,
            mode,
            adapter,
            num_prompt_tokens,
            num_earlier_tokens: 0,
            max_len,
            num_computed_tokens: 0,
            block_table: Vec::new(),
            finish_reason: None,
            counts: None,
            grammar,
            matcher: None,
            stop_matcher: None,
            logprobs: Vec::new(),
            token_logprobs: Vec::new(),
            token_ids: prompt_token_ids,
            params,
        };
        sequence.finish_reason = sequence.reason_not_to_start(max_seq_len, vocab_size);
        if sequence.finish_reason.is_none() && mode == Mode::Generate {
            sequence.begin();
            if generated.fits(&sequence.params, vocab_size) {
                sequence.replay(generated, eos_token_ids, decoder);
            }
        }
        sequence
    }

    /// Makes it one that has generated nothing yet.
    fn begin(&mut self) {
        self.token_ids.truncate(self.num_prompt_tokens);
        self.num_earlier_tokens = 0;
        self.finish_reason = None;
        self.counts = TokenCounts::for_params(&self.params, &self.token_ids);
        self.matcher = self.grammar.as_ref().map(|grammar| Mutex::new(grammar.start()));
        self.stop_matcher = (!self.params.stop.is_empty()).then(StopMatcher::default);
        self.logprobs.clear();
    }

    /// Brings it to where an earlier engine left it. Tokens behind its end, or that its
    /// guide does not allow, can not come from these parameters and limits; then it
    /// begins anew.
    fn replay(&mut self, generated: Generated, eos_token_ids: &[u32], decoder: &dyn TokenDecoder) {
        let mut logprobs = generated.logprobs.into_iter();
        for token in generated.token_ids {
            let room = self.room();
            let follows = self.matcher_mut().is_none_or(|matcher| matcher.replay(token, room));
            if self.finish_reason.is_some() || !follows {
                return self.begin();
            }
            self.push_token(token, logprobs.next(), eos_token_ids, decoder);
            self.num_earlier_tokens += 1;
        }
    }

    fn reason_not_to_start(&self, max_seq_len: usize, vocab_size: usize) -> Option<FinishReason> {
        let num_tokens = self.num_prompt_tokens;
        if num_tokens == 0 {
            return Some(FinishReason::Error("the prompt has no tokens".into()));
        }
        if num_tokens > max_seq_len {
            return Some(FinishReason::Error(format!(
                "the prompt of {num_tokens} tokens is longer than the context of {max_seq_len} \
                 tokens (the least of --max-seq-len, the model's and the KV cache's)"
            )));
        }
        if let Some(id) = self.token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Some(FinishReason::Error(format!(
                "the prompt's token {id} is outside the model's vocabulary of {vocab_size}: \
                 tokenizer and model do not belong together"
            )));
        }
        match self.mode {
            Mode::Generate if self.max_len == num_tokens => Some(FinishReason::Length),
            Mode::Score if num_tokens == 1 => Some(FinishReason::Stop),
            _ => None,
        }
    }

    /// Generate or score.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What tells it from all others of its engine, before and after it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Gives it its number.
    pub fn set_number(&mut self, number: u64) {
        self.number = number;
    }

    /// How it is sampled.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Prompt and output tokens.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// The number of the adapter that answers it.
    pub fn adapter(&self) -> Option<u32> {
        self.adapter
    }

    /// Number of tokens of the prompt alone.
    pub fn prompt_len(&self) -> usize {
        self.num_prompt_tokens
    }

    /// Tokens generated so far.
    pub fn output_token_ids(&self) -> &[u32] {
        &self.token_ids[self.num_prompt_tokens..]
    }

    /// Number of tokens generated by this engine: those of an earlier one left out.
    pub fn num_new_tokens(&self) -> usize {
        self.output_token_ids().len() - self.num_earlier_tokens
    }

    /// Tokens whose keys and values are in the KV cache.
    pub fn num_computed_tokens(&self) -> usize {
        self.num_computed_tokens
    }

    /// Token counts, where penalties need them.
    pub fn counts(&self) -> Option<&TokenCounts> {
        self.counts.as_ref()
    }

    /// Whether a guide leads it.
    pub fn is_guided(&self) -> bool {
        self.matcher.is_some()
    }

    /// The matcher of a guided sequence.
    pub fn matcher(&self) -> Option<MutexGuard<'_, Matcher>> {
        let matcher = self.matcher.as_ref()?;
        Some(matcher.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn matcher_mut(&mut self) -> Option<&mut Matcher> {
        let matcher = self.matcher.as_mut()?;
        Some(matcher.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tokens that it may still generate.
    pub fn room(&self) -> usize {
        self.max_len.saturating_sub(self.token_ids.len())
    }

    /// Set once it is finished.
    pub fn finish_reason(&self) -> Option<&FinishReason> {
        self.finish_reason.as_ref()
    }

    /// Its KV blocks, for the scheduler to grow and release.
    pub fn block_table_mut(&mut self) -> &mut Vec<u32> {
        &mut self.block_table
    }

    /// Its KV blocks.
    pub fn block_table(&self) -> &[u32] {
        &self.block_table
    }

    /// Tokens that have to be in the KV cache before its next result. The last
    /// token of a scored prompt predicts nothing and is never computed.
    pub fn num_wanted_tokens(&self) -> usize {
        match self.mode {
            Mode::Generate => self.token_ids.len(),
            Mode::Score => self.num_prompt_tokens - 1,
        }
    }

    /// Whether its next step is the one row of its newest generated token.
    pub fn is_decoding(&self) -> bool {
        self.token_ids.len() > self.num_prompt_tokens
            && self.num_computed_tokens + 1 == self.token_ids.len()
    }

    /// The next chunk within `max_tokens` rows, of which `max_scored_rows` want
    /// logits for scoring. What was scored before a preemption is not again.
    pub fn next_chunk(&self, max_tokens: usize, max_scored_rows: usize) -> Chunk {
        let remaining = self.num_wanted_tokens() - self.num_computed_tokens;
        let scored = self.token_logprobs.len();
        match self.mode {
            Mode::Generate if remaining <= max_tokens => {
                Chunk { num_tokens: remaining, logits: LogitsWanted::Last }
            }
            Mode::Generate => Chunk { num_tokens: max_tokens, logits: LogitsWanted::None },
            Mode::Score if self.num_computed_tokens < scored => Chunk {
                num_tokens: max_tokens.min(scored - self.num_computed_tokens),
                logits: LogitsWanted::None,
            },
            Mode::Score => Chunk {
                num_tokens: remaining.min(max_tokens).min(max_scored_rows),
                logits: LogitsWanted::All,
            },
        }
    }

    /// Where the draw for its next token is.
    pub fn draw(&self) -> Draw {
        Draw {
            seed: self.params.seed,
            record_index: self.record_index,
            completion: self.completion,
            step: self.output_token_ids().len() as u32,
        }
    }

    /// The draw in [0, 1) for its next token.
    pub fn uniform(&self) -> f64 {
        let Draw { seed, record_index, completion, step } = self.draw();
        rng::uniform(seed, record_index, completion, step)
    }

    /// Notes that `num_tokens` more are in the KV cache.
    pub fn advance(&mut self, num_tokens: usize) {
        self.num_computed_tokens += num_tokens;
        debug_assert!(self.num_computed_tokens <= self.num_wanted_tokens());
    }

    /// Notes that the KV cache has lost it; its tokens and results stay.
    pub fn reset_computed(&mut self) {
        self.num_computed_tokens = 0;
    }

    /// Appends a sampled token, which its matcher has taken, and decides whether it was
    /// the last.
    pub fn push_token(
        &mut self,
        token: u32,
        logprob: Option<TokenLogprob>,
        eos_token_ids: &[u32],
        decoder: &dyn TokenDecoder,
    ) {
        self.token_ids.push(token);
        self.logprobs.extend(logprob);
        if let Some(counts) = &mut self.counts {
            counts.add(token);
        }
        let output = &self.token_ids[self.num_prompt_tokens..];
        let stopped = self
            .stop_matcher
            .as_mut()
            .is_some_and(|matcher| matcher.push(output, &self.params.stop, decoder));
        let is_full = self.token_ids.len() >= self.max_len;
        let ended = match self.matcher_mut() {
            // Where its guide is satisfied as the room ends, the text is whole.
            Some(matcher) => matcher.is_complete() || (is_full && matcher.is_accepting()),
            None => !self.params.ignore_eos && eos_token_ids.contains(&token),
        };
        if stopped || ended {
            self.finish_reason = Some(FinishReason::Stop);
        } else if is_full {
            self.finish_reason = Some(FinishReason::Length);
        }
    }

    /// Appends the score of the next prompt token and finishes after the last.
    pub fn push_score(&mut self, logprob: f64) {
        self.token_logprobs.push(logprob);
        if self.token_logprobs.len() + 1 == self.num_prompt_tokens {
            self.finish_reason = Some(FinishReason::Stop);
        }
    }

    /// Finishes it with an error of its own; the first one is kept.
    pub fn fail(&mut self, message: String) {
        if !matches!(self.finish_reason, Some(FinishReason::Error(_))) {
            self.finish_reason = Some(FinishReason::Error(message));
        }
    }

    /// What it has generated so far.
    pub fn into_unfinished(mut self) -> Unfinished {
        let token_ids = self.token_ids.split_off(self.num_prompt_tokens);
        Unfinished { key: self.key, generated: Generated { token_ids, logprobs: self.logprobs } }
    }

    /// The output of a finished sequence.
    pub fn into_output(
        mut self,
        eos_token_ids: &[u32],
        decoder: &dyn TokenDecoder,
    ) -> EngineOutput {
        let output = self.token_ids.split_off(self.num_prompt_tokens);
        let ends_at_eos = !self.params.ignore_eos || self.matcher.is_some();
        let text = match output.split_last() {
            Some((last, before)) if ends_at_eos && eos_token_ids.contains(last) => {
                final_text(before, &self.params.stop, decoder)
            }
            _ => final_text(&output, &self.params.stop, decoder),
        };
        let generate = self.mode == Mode::Generate;
        let failed = matches!(self.finish_reason, Some(FinishReason::Error(_)));
        EngineOutput {
            key: self.key,
            token_ids: output,
            text,
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            logprobs: (generate && self.params.logprobs.is_some()).then_some(self.logprobs),
            score: (!generate && !failed).then_some(Score { token_logprobs: self.token_logprobs }),
            prompt_tokens: self.num_prompt_tokens,
        }
    }
}
