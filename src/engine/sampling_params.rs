//! How one record is to be generated, after all overrides are resolved.

use serde::{Deserialize, Serialize};

use super::Guide;

/// Resolved sampling parameters of one record. Defaults are farm's own
/// (greedy); `prompts` resolves record > flag > generation_config.json > default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Upper bound on generated tokens.
    pub max_new_tokens: usize,
    /// 0 = greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: usize,
    /// Minimum probability relative to the best; 0 = off.
    pub min_p: f32,
    /// HF's multiplicative penalty over prompt and generated tokens; 1 = off.
    pub repetition_penalty: f32,
    /// OpenAI's additive penalty, once per token seen among prompt and generated; 0 = off.
    pub presence_penalty: f32,
    /// OpenAI's additive penalty per occurrence among prompt and generated; 0 = off.
    pub frequency_penalty: f32,
    /// Seed of the record's random stream.
    pub seed: u64,
    /// Strings that end the text (not included in it).
    pub stop: Vec<String>,
    /// Never stop at (and never sample) an EOS token; a guided text still ends where
    /// nothing else can follow.
    pub ignore_eos: bool,
    /// Report the log-probabilities of the chosen token and of this many best
    /// alternatives; `None` = no report.
    pub logprobs: Option<usize>,
    /// Report the new tokens' ids.
    pub return_token_ids: bool,
    /// Number of independent completions (OpenAI `n`), 1..=16.
    pub n: usize,
    /// What the text must be. (Left out of a run's identity where there is none, so
    /// that runs begun before there were guides go on.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guide: Option<Guide>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            stop: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            return_token_ids: false,
            n: 1,
            guide: None,
        }
    }
}
