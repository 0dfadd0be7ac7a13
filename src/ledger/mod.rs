//! Who generates which record, and how finished records become the output.
//!
//! Any number of launches of farm work on one run directory ([`RunDir`]), one after the
//! other or at the same time. A launch registers ([`Membership`]) and claims blocks of
//! records ([`claims`]); its rank 0 reads the input and passes over what is done or
//! another's ([`Feed`]). The [`Handout`], a pure state machine, gives its records to
//! workers on demand. Messages carry them ([`protocol`]): rank 0 is the [`Coordinator`],
//! every other worker has a [`RemoteLink`]; both are a [`WorkerLink`], so a rank's
//! generate loop has one shape. A finished record goes into its rank's [`journal`] first
//! and then to rank 0, where [`OrderedOutput`] puts the lines in input order; where
//! several launches had a part, the one that finds nothing left to do writes the output
//! from the journals.
//!
//! A worker is the leader of a tensor-parallel group; the communicator given here
//! holds the leaders only.

pub mod claims;
mod coordinator;
mod cost;
mod dealer;
mod feed;
mod handout;
mod index_set;
pub mod journal;
mod link;
pub mod membership;
mod merge;
mod outlook;
mod output;
pub mod protocol;
pub mod record;
mod run_dir;
pub mod saved;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

pub use coordinator::{Coordinator, CoordinatorParts, CostEstimate, ReadStored, Source};
pub use cost::{PREFILL_TOKEN_COST, estimate_cost, token_cost};
pub use feed::{Feed, FeedConfig, JournalIndex, Next, Task};
pub use handout::{Handout, HandoutConfig, HandoutCounts, Load, Reply};
pub use index_set::IndexSet;
pub use journal::{JournalHeader, JournalWriter, Journals, RecordId, RecordSink, SyncPolicy};
pub use link::{LinkState, RemoteLink, RunProgress, WorkerLink};
pub use membership::Membership;
pub use merge::merge;
pub use output::{OrderedOutput, OutputCounts, OutputTarget};
pub use protocol::record_key;
pub use run_dir::{ExistingRun, Launch, RunDir, RunFile, RunIdentity, default_path};
pub use saved::SavedRecord;

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
