//! Continuous batching: sequences, the paged KV cache's blocks, the scheduler,
//! the sampler and the engine that drives them over a [`crate::model::Runner`].
//!
//! [`Engine`] takes requests and steps. [`scheduler`] decides each step's rows
//! from its [`sequence`]s and the [`block_manager`]'s free blocks; the runner
//! makes logits of them; [`sampler`] turns every row into a token ([`choose`])
//! or a score ([`softmax`]) with draws from [`rng`], among the tokens that the
//! sequence's [`guide`] allows; or the runner, told what the row is for, does so itself.
//! [`stop`] and [`detokenizer`] find where a text ends.
//!
//! What a record yields depends on the record alone, never on what shares its
//! batch, how its prefill was chunked or whether it was preempted. So what an
//! engine leaves unfinished ([`Engine::take_unfinished`]) another goes on with, as
//! if it had been preempted: its tokens are all the state there is. Prefix sharing
//! between sequences is deliberately left out.

pub mod block_manager;
pub mod choose;
pub mod detokenizer;
#[allow(clippy::module_inception)]
pub mod engine;
pub mod guide;
pub mod output;
pub mod rng;
pub mod sampler;
pub mod sampling_params;
pub mod scheduler;
pub mod sequence;
pub mod softmax;
pub mod stop;

#[cfg(test)]
mod fake_runner;
#[cfg(test)]
pub(crate) mod tests;

pub use detokenizer::TokenDecoder;
pub use engine::{Engine, EngineConfig, EngineCounters, StepOutcome};
pub use guide::{Guide, Guides};
pub use output::{
    EngineOutput, EngineRequest, FinishReason, Generated, Mode, Score, TokenLogprob, Unfinished,
};
pub use sampling_params::SamplingParams;
