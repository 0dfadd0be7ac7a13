//! What a step's rows of logits are wanted for, and what becomes of them, as plain data
//! between the engine and a runner that chooses tokens itself: a device, which then
//! hands over one number a row in place of a row of logits. How a token is chosen is
//! written down in [`crate::engine::choose`].

/// The most alternatives ([`TokenSampling::logprobs`]) that a runner reports.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// Why a row of logits is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogitsError {
    /// It holds NaN or +∞.
    #[error(
        "the model's logits hold NaN or infinity: the weights or the dtype overflow (try --dtype f32)"
    )]
    NotFinite,
    /// Every logit is −∞.
    #[error("no token may follow: every logit is minus infinity")]
    NoCandidate,
}

/// What is wanted of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RowSampling<'a> {
    /// A token.
    Token(TokenSampling<'a>),
    /// The log-probability of a token.
    Score {
        /// The token.
        target: u32,
    },
    /// The row itself: what follows is the engine's.
    Logits,
}

/// How a token is chosen. The fields mean what they mean in
/// [`crate::engine::SamplingParams`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenSampling<'a> {
    /// 0 = greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: usize,
    /// Minimum probability relative to the best; 0 = off.
    pub min_p: f32,
    /// What `history` is counted for; `None` = no penalties.
    pub penalties: Option<Penalties<'a>>,
    /// The draw: see [`crate::engine::rng::uniform`].
    pub draw: Draw,
    /// EOS tokens cannot be chosen.
    pub suppress_eos: bool,
    /// The only tokens that can be chosen, a bitmap by id in words of 32. It decides on EOS, too.
    pub allowed: Option<&'a [u32]>,
    /// Report the log-probabilities of the chosen token and of this many best
    /// alternatives, at most [`MAX_TOP_LOGPROBS`]; `None` = no report.
    pub logprobs: Option<usize>,
}

/// Penalties on tokens that a sequence has already.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties<'a> {
    /// Multiplicative; 1 = off.
    pub repetition: f32,
    /// Additive, once a token; 0 = off.
    pub presence: f32,
    /// Additive, per occurrence; 0 = off.
    pub frequency: f32,
    /// No other sequence of the engine has or had this number.
    pub sequence: u64,
    /// All tokens of the sequence. From step to step it grows by the token that was chosen;
    /// a runner that has counted the others counts that one alone.
    pub history: &'a [u32],
}

/// Coordinates of a uniform draw in [0, 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// The record's seed.
    pub seed: u64,
    /// The record.
    pub record_index: u64,
    /// Which of its completions.
    pub completion: u32,
    /// The number of the new token, from 0.
    pub step: u32,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum RowChoice {
    /// A token, and its log-probabilities where they were asked for.
    Token(u32, Option<Logprobs>),
    /// The target's log-probability.
    Score(f64),
    /// The row.
    Logits(Vec<f32>),
}

/// Of a step's rows, in their order.
pub type RowChoices = Vec<Result<RowChoice, LogitsError>>;

/// Log-probabilities by the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The best tokens and theirs, best first, lower id first on ties.
    pub top: Vec<(u32, f32)>,
}
