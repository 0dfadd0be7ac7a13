//! What goes into the engine and what comes out of it.

use super::SamplingParams;

/// What a sequence has generated so far, kept by one engine for another to go on from.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Generated {
    /// The tokens after the prompt.
    pub token_ids: Vec<u32>,
    /// One entry per token where `SamplingParams::logprobs` asked, else none.
    pub logprobs: Vec<TokenLogprob>,
}

impl Generated {
    /// Whether a model of `vocab_size` tokens, sampled as `params` say, can have
    /// given this.
    pub fn fits(&self, params: &SamplingParams, vocab_size: usize) -> bool {
        let in_vocabulary = |id: &u32| (*id as usize) < vocab_size;
        let logprobs_fit = match params.logprobs {
            None => self.logprobs.is_empty(),
            Some(num_top) => {
                let num_top = num_top.min(vocab_size);
                let entry_fits = |(id, entry): (&u32, &TokenLogprob)| {
                    entry.token == *id
                        && entry.top.len() == num_top
                        && entry.top.iter().all(|(id, _)| in_vocabulary(id))
                };
                self.logprobs.len() == self.token_ids.len()
                    && self.token_ids.iter().zip(&self.logprobs).all(entry_fits)
            }
        };
        logprobs_fit && self.token_ids.iter().all(in_vocabulary)
    }
}

/// A sequence that was taken out of an engine before its output was handed over.
#[derive(Debug, Clone, PartialEq)]
pub struct Unfinished {
    /// The request's handle.
    pub key: u64,
    /// What it has generated, for [`EngineRequest::generated`]; nothing for scoring.
    pub generated: Generated,
}

/// What to do with a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Sample new tokens after it.
    #[default]
    Generate,
    /// Give the log-probability of each of its tokens after the first.
    Score,
}

/// One sequence to run. A record with `n` completions makes `n` requests.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineRequest {
    /// The caller's handle, returned with the output.
    pub key: u64,
    /// The record's index in the input: selects its random stream.
    pub record_index: u64,
    /// Which of the record's completions, from 0: selects its random stream.
    pub completion: u32,
    /// The prompt.
    pub prompt_token_ids: Vec<u32>,
    /// The number of the adapter that answers; `None` is the model alone.
    pub adapter: Option<u32>,
    /// What an earlier engine generated after it ([`super::Engine::take_unfinished`]).
    /// What cannot come from this prompt, model and `params` is dropped, and
    /// generated anew.
    pub generated: Generated,
    /// How to sample; unused for scoring.
    pub params: SamplingParams,
    /// Generate or score.
    pub mode: Mode,
}

/// Why a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// An EOS token, a stop string, the end of a scored prompt, or the end of a guided
    /// text: what its guide asks for is there.
    Stop,
    /// `max_new_tokens` or the context's end; a guided text is incomplete then.
    Length,
    /// This sequence failed; the message is for the user.
    Error(String),
}

/// A chosen token's log-probability and the best alternatives, by log-softmax
/// of the model's raw logits: before guide, penalties, temperature and filters (the
/// "raw_logprobs" of vLLM, and what OpenAI's API reports).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The chosen token.
    pub token: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// The `logprobs` best tokens, best first, lower id first on ties; the
    /// chosen one is among them only if it ranks so high.
    pub top: Vec<(u32, f32)>,
}

/// A scored prompt. The first token has nothing before it and is unscored.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Score {
    /// Natural log-probability of each prompt token after the first.
    pub token_logprobs: Vec<f64>,
}

/// A finished sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOutput {
    /// The request's handle.
    pub key: u64,
    /// All generated tokens, with the EOS token that ended them, and with the
    /// token that completed a stop string.
    pub token_ids: Vec<u32>,
    /// The generated tokens decoded as one, special tokens left out, cut before
    /// the earliest stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry per generated token, where `SamplingParams::logprobs` asked.
    pub logprobs: Option<Vec<TokenLogprob>>,
    /// The score, in [`Mode::Score`].
    pub score: Option<Score>,
    /// Number of prompt tokens.
    pub prompt_tokens: usize,
}

impl From<EngineOutput> for Generated {
    fn from(output: EngineOutput) -> Self {
        let EngineOutput { token_ids, logprobs, .. } = output;
        Self { token_ids, logprobs: logprobs.unwrap_or_default() }
    }
}
