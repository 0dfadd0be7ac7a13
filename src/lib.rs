//! farm: batch inference of language models under Slurm and MPI.
//!
//! A record's way through the modules: [`prompts`] reads a line and makes a
//! [`prompts::Request`]; [`ledger`] hands blocks of records to ranks; [`engine`]
//! schedules them over the paged KV cache and samples; [`model`] turns a
//! [`model::StepBatch`] into logits with the CPU [`kernels`]; [`ledger`] writes
//! the finished records and puts them in input order at rank 0. [`stage`] brings
//! the model to every node first, [`comm`] is how ranks talk, [`slurm`] knows the
//! job, [`stats`] counts. [`device`] is a GPU, or the emulator of one that tests run on. [`train`] fine-tunes: LoRA adapters beside the frozen model.
//! [`cli`] holds the flags, [`commands`] one story a subcommand.
//!
//! Imports run one way: commands → {engine, train, stage, ledger, prompts, stats, slurm}
//! → model → {kernels, device, comm} → error.

pub mod cli;
pub mod comm;
pub mod commands;
pub mod device;
pub mod engine;
pub mod error;
pub mod files;
pub mod kernels;
pub mod ledger;
pub mod model;
pub mod philox;
pub mod prompts;
pub mod slurm;
pub mod stage;
pub mod stats;
pub mod train;

pub use error::{Error, ErrorKind, Result};
