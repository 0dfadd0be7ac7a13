//! Who generates which record, and how finished records become the output.
//!
//! Rank 0 reads the input and owns the [`Handout`], a pure state machine that
//! gives blocks of records to workers on demand. Messages carry them
//! ([`protocol`]): rank 0 is the [`Coordinator`], every other worker has a
//! [`RemoteLink`]; both are a [`WorkerLink`], so a rank's generate loop has one
//! shape. A finished record goes into its rank's part file first
//! ([`parts`], behind [`RecordSink`]) and then to rank 0, where [`OrderedOutput`]
//! puts the lines in input order. The [`RunDir`] ties all this to one prompts
//! file, model and sampling, so that the same command goes on where a killed
//! one stopped.
//!
//! A worker is the leader of a tensor-parallel group; the communicator given here
//! holds the leaders only. Left out: a journal with group fsync, claims of several
//! jobs on one run, saved partial generations.

pub mod claims;
mod coordinator;
mod cost;
mod crc32;
mod handout;
mod index_set;
mod link;
mod outlook;
mod output;
pub mod parts;
pub mod protocol;
pub mod record;
mod run_dir;
mod run_lock;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use coordinator::{Coordinator, CostEstimate, Source};
pub use cost::{PREFILL_TOKEN_COST, estimate_cost, token_cost};
pub use handout::{Handout, HandoutConfig, HandoutCounts, Load, Reply};
pub use index_set::IndexSet;
pub use link::{LinkState, RemoteLink, RunProgress, WorkerLink};
pub use output::{OrderedOutput, OutputCounts, OutputTarget};
pub use parts::{PartWriter, RecordSink};
pub use run_dir::{ExistingRun, Launch, RunDir, RunIdentity, default_path};

/// A record that needs no more work: its output line, and what it cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Position of the record in the input, from 0.
    pub index: u64,
    /// The output line, with its `\n`.
    pub line: Vec<u8>,
    /// Whether it is an error record.
    pub is_error: bool,
    /// What it really cost, in the unit of [`token_cost`].
    pub cost: f64,
    /// Tokens generated for it.
    pub new_tokens: u64,
}
