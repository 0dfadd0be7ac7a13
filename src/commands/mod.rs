//! One file a subcommand, each a story that reads on one screen.

pub mod logging;
pub mod report;
