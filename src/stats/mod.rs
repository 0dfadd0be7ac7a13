//! What a run did and how fast: counters per rank, events, progress on stderr,
//! `stats.json`, `ranks.csv`, the closing table and the HTML page.
//!
//! Clocks are outside: callers pass durations since the job's start (taken on every
//! rank right after the first barrier). A figure that is not known is `None`, in
//! files empty or null, in tables "unavailable", never 0.

pub mod counters;
pub mod events;
pub mod files;
pub mod format;
pub mod html;
pub mod job;
pub mod meter;
pub mod process;
pub mod progress;
pub mod table;

pub use counters::RankStats;
pub use events::{Event, EventLog};
pub use files::{RankReport, gather, write_run};
pub use job::{JobFacts, JobStats, StageStats};
pub use meter::{Meter, ModelCost, StepWork};
pub use progress::{Progress, ProgressState};
pub use table::closing_table;
