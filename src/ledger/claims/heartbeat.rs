//! The heartbeat thread: a long engine step or model load must not look like death.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::owner::{OwnerFile, OwnerProgress, OwnerState};
use super::store::{ClaimStore, FsStore};
use crate::{Error, Result};

/// Replaces the owner file again and again until stopped or dropped. A failure (the run
/// directory vanished, is read-only or full) is kept for [`Heartbeat::error`], and the
/// thread goes on trying.
#[derive(Debug)]
pub struct Heartbeat {
    shared: Arc<Shared>,
    progress: Arc<Mutex<OwnerProgress>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct State {
    stop: bool,
    error: Option<Error>,
    last_beat: Instant,
    longest_gap: Duration,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heartbeat {
    /// Starts the thread, which beats at once and then every `seconds`.
    pub fn start(store: FsStore, file: OwnerFile, seconds: f64) -> Self {
        let state = State {
            stop: false,
            error: None,
            last_beat: Instant::now(),
            longest_gap: Duration::ZERO,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new() });
        let progress = Arc::new(Mutex::new(file.progress.clone()));
        let period = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(5));
        let (with, figures) = (shared.clone(), progress.clone());
        let thread = std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(move || beat(store, file, period, &with, &figures));
        let thread = thread.map_err(|error| {
            let error = Error::fault(format!("claims: no thread for the heartbeat: {error}"));
            shared.state().error = Some(error);
        });
        Self { shared, progress, thread: thread.ok() }
    }

    /// The figures that the next heartbeat carries; to be kept up to date by the worker.
    pub fn progress(&self) -> Arc<Mutex<OwnerProgress>> {
        self.progress.clone()
    }

    /// Why the latest heartbeat failed; `None` once one has succeeded again.
    pub fn error(&self) -> Option<Error> {
        self.shared.state().error.clone()
    }

    /// The longest time between two heartbeats since this was last asked, the one going on
    /// included. Where it has grown towards the timeout others may have taken over: ask
    /// [`super::Claims::lost`].
    pub fn take_longest_gap_seconds(&self) -> f64 {
        let mut state = self.shared.state();
        let longest_gap = std::mem::take(&mut state.longest_gap);
        longest_gap.max(state.last_beat.elapsed()).as_secs_f64()
    }

    /// Ends the thread; no heartbeat is written after. Waits for one being written.
    pub fn stop(self) {}

    /// Ends the thread and says good-bye: all that this launch holds is free at once.
    ///
    /// # Errors
    /// The owner file cannot be written.
    pub fn leave(self, mut store: FsStore, mut file: OwnerFile, how: &str) -> Result<()> {
        let progress = self.progress();
        self.stop();
        file.state = OwnerState::Left;
        file.left_with = Some(how.to_owned());
        file.progress = progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
        store.replace(&OwnerFile::name(file.launch), &file.to_bytes())
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn beat(
    mut store: FsStore,
    mut file: OwnerFile,
    period: Duration,
    shared: &Shared,
    progress: &Mutex<OwnerProgress>,
) {
    let name = OwnerFile::name(file.launch);
    loop {
        file.progress = progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        file.progress.updated_unix_seconds = now.map_or(0, |now| now.as_secs());
        let outcome = store.replace(&name, &file.to_bytes());
        let mut state = shared.state();
        if outcome.is_ok() {
            state.longest_gap = state.longest_gap.max(state.last_beat.elapsed());
            state.last_beat = Instant::now();
        }
        state.error = outcome.err();
        let waited = shared.wake.wait_timeout_while(state, period, |state| !state.stop);
        if waited.unwrap_or_else(PoisonError::into_inner).0.stop {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::{Claims, ClaimsConfig, HostEvidence, Owner, OwnerState};
    use super::*;

    fn wait_until(mut happened: impl FnMut() -> bool) {
        let start = Instant::now();
        while !happened() {
            assert!(start.elapsed() < Duration::from_secs(60), "it never happened");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_owner_file_is_kept_fresh_and_a_vanished_directory_is_told() {
        let run = tempfile::tempdir().unwrap();
        let store = || FsStore::new(run.path()).unwrap();
        let owner = Owner::this_process(None, Value::Null);
        let config = ClaimsConfig::default();
        let evidence = Box::new(HostEvidence::new(|_| None));
        let mut claims = Claims::join(Box::new(store()), evidence, owner, config, 0.0).unwrap();
        let file = claims.owner_file(&OwnerProgress::default()).unwrap();
        let path = run.path().join("claims/owner-00001.json");
        let read =
            || -> Option<OwnerFile> { serde_json::from_slice(&std::fs::read(&path).ok()?).ok() };

        let heartbeat = Heartbeat::start(store(), file, 0.001);
        heartbeat.progress().lock().unwrap().records_done = 7;
        wait_until(|| read().unwrap().progress.records_done == 7);
        assert_eq!(heartbeat.error(), None);

        let away = run.path().join("away");
        std::fs::rename(run.path().join("claims"), &away).unwrap();
        // A heartbeat that was being written just then fails by another message.
        let vanished = |error: Error| error.message.contains("the run directory has vanished");
        wait_until(|| heartbeat.error().is_some_and(vanished));
        std::fs::rename(&away, run.path().join("claims")).unwrap();
        wait_until(|| heartbeat.error().is_none());

        // Each gap is told once, so that a shorter one after it is seen, too.
        heartbeat.shared.state().longest_gap = Duration::from_secs(300);
        assert!(heartbeat.take_longest_gap_seconds() >= 300.0);
        assert!(heartbeat.take_longest_gap_seconds() < 300.0);

        heartbeat.stop();
        claims.leave("done", &OwnerProgress::default()).unwrap();
        assert_eq!(read().unwrap().state, OwnerState::Left, "no heartbeat after the end");
    }
}
