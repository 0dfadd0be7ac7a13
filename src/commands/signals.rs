//! Signals that ask the run to stop: the first drains it, a second request ends it.
//!
//! One request can come as several signals: on `scancel`, a preemption or the time limit
//! Slurm sends TERM to every process, and the batch script, which gets it too, hands USR1
//! on. So what follows within three seconds is the same request, unless it is a second
//! Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::low_level;

use crate::{Error, Result};

/// How long signals still count as part of the first.
const SAME_REQUEST: Duration = Duration::from_secs(3);

/// Whether a signal has asked the run to stop.
#[derive(Clone, Default)]
pub struct StopSignal(Arc<Requests>);

impl StopSignal {
    /// Listens for SIGTERM, SIGINT and SIGUSR1. A second request leaves at once, with
    /// `exit_code`, that of an interrupted run: the journal is whole at any moment.
    ///
    /// # Errors
    /// A fault where the handlers cannot be installed.
    pub fn listen(exit_code: i32) -> Result<Self> {
        let stop = Self::default();
        let start = Instant::now();
        for signal in [SIGTERM, SIGINT, SIGUSR1] {
            let requests = stop.0.clone();
            let handle = move || {
                if requests.is_second(signal, start.elapsed()) {
                    low_level::exit(exit_code);
                }
            };
            // SAFETY: the handler only reads the clock, changes an atomic number, and ends
            // the process by _exit: all allowed in signal handlers.
            unsafe { low_level::register(signal, handle) }
                .map_err(|error| Error::fault(format!("installing signal handlers: {error}")))?;
        }
        Ok(stop)
    }

    /// Whether a signal has come.
    pub fn is_set(&self) -> bool {
        self.0.first.load(Ordering::Relaxed) != 0
    }
}

/// What has come so far.
#[derive(Default)]
struct Requests {
    /// The first signal, with its time above it: `milliseconds << 8 | signal`; 0 before.
    first: AtomicU64,
}

impl Requests {
    /// Notes `signal`, `now` after the start; whether it is a request of its own after the
    /// first. Signal handlers call this.
    fn is_second(&self, signal: i32, now: Duration) -> bool {
        let now_ms = now.as_millis() as u64;
        let this = now_ms << 8 | signal as u64;
        match self.first.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => false,
            Err(first) => {
                let since = Duration::from_millis(now_ms.saturating_sub(first >> 8));
                let ctrl_c_again = signal == SIGINT && first & 0xff == SIGINT as u64;
                ctrl_c_again || since >= SAME_REQUEST
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run that leaves at once saves no unfinished generation.
    #[test]
    fn one_scancel_is_one_request() {
        for (name, first, second, after_ms, expected) in [
            ("TERM by Slurm, USR1 by the script", SIGTERM, SIGUSR1, 10, false),
            ("TERM by Slurm and by mpirun", SIGTERM, SIGTERM, 500, false),
            ("a warning, then the time limit", SIGUSR1, SIGTERM, 120_000, true),
            ("scancel twice", SIGTERM, SIGTERM, 5000, true),
            ("Ctrl-C twice", SIGINT, SIGINT, 200, true),
            ("Ctrl-C, and TERM by the launcher", SIGINT, SIGTERM, 10, false),
            ("TERM, then Ctrl-C", SIGTERM, SIGINT, 200, false),
        ] {
            let requests = Requests::default();
            let at = Duration::from_millis(1000);
            assert!(!requests.is_second(first, at), "{name}");
            let later = at + Duration::from_millis(after_ms);
            assert_eq!(requests.is_second(second, later), expected, "{name}");
        }
    }

    #[test]
    fn a_signal_sets_the_flag_and_nothing_else() {
        let stop = StopSignal::default();
        assert!(!stop.is_set());
        stop.0.is_second(SIGUSR1, Duration::ZERO);
        assert!(stop.is_set());
    }
}
