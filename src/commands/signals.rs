//! Signals that ask the run to stop: the first drains it, the second ends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

use crate::{Error, Result};

/// Whether a signal has asked the run to stop.
#[derive(Clone, Default)]
pub struct StopSignal(Arc<AtomicBool>);

impl StopSignal {
    /// Listens for SIGTERM, SIGINT and SIGUSR1. A second signal leaves at once, with
    /// `exit_code`, that of an interrupted run: part files are whole lines at any moment.
    ///
    /// # Errors
    /// A fault where the handlers cannot be installed.
    pub fn listen(exit_code: i32) -> Result<Self> {
        let stop = Self::default();
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            flag::register_conditional_shutdown(signal, exit_code, stop.0.clone())
                .and_then(|_| flag::register(signal, stop.0.clone()))
                .map_err(|error| Error::fault(format!("installing signal handlers: {error}")))?;
        }
        Ok(stop)
    }

    /// Whether a signal has come.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
