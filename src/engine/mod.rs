//! Continuous batching: sequences, the paged KV cache's blocks, the scheduler,
//! the sampler and the engine that drives them over a [`crate::model::Runner`].

pub mod sampling_params;

pub use sampling_params::SamplingParams;
