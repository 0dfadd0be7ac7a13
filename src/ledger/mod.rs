//! ledger

pub mod record;
