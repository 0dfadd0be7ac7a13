//! `events.jsonl`: what happened when, a line an event.
//!
//! Only rank 0 writes the file; the other ranks keep their few events in memory and
//! send them with their figures at the end, since appends of many nodes to one file
//! on a parallel file system are slow on Lustre and not atomic on NFS. The file grows
//! over the attempts of a resumed run; each begins with rank 0's `start`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Name of the file in the run directory.
pub const EVENTS_FILE: &str = "events.jsonl";

/// The first event of an attempt.
pub const START: &str = "start";

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since the attempt's start.
    pub at_seconds: f64,
    /// Rank in the world.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// `start`, `stage`, `load`, `first_token`, `drain`, `done`, ….
    pub event: String,
    /// Whatever else belongs to it.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}

/// Collects a rank's events; at rank 0 also writes them as they come.
#[derive(Debug)]
pub struct EventLog {
    rank: usize,
    host: String,
    events: Vec<Event>,
    file: Option<File>,
}

impl EventLog {
    /// A log in memory.
    pub fn new(rank: usize, host: &str) -> Self {
        Self { rank, host: host.to_owned(), events: Vec::new(), file: None }
    }

    /// Opens `run_dir/events.jsonl` for appending and writes what was collected so far
    /// (the run directory is known only after the first events). For rank 0.
    ///
    /// # Errors
    /// A fault where the file cannot be opened or written.
    pub fn attach(&mut self, run_dir: &Path) -> Result<()> {
        let path = run_dir.join(EVENTS_FILE);
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| Error::io(&path, error))?;
        file.write_all(&lines(&self.events)).map_err(|error| Error::io(&path, error))?;
        self.file = Some(file);
        Ok(())
    }

    /// Notes an event at `at` since the job's start. `fields` is a JSON object (`json!({…})`);
    /// anything else stands under `value`. Where the file cannot be written any more, a
    /// warning says so once and the run goes on.
    pub fn emit(&mut self, at: Duration, event: &str, fields: Value) {
        let fields = match fields {
            Value::Object(fields) => fields,
            Value::Null => Map::new(),
            value => Map::from_iter([("value".to_owned(), value)]),
        };
        let event = Event {
            at_seconds: (at.as_secs_f64() * 1e6).round() / 1e6,
            rank: self.rank,
            host: self.host.clone(),
            event: event.to_owned(),
            fields,
        };
        self.write(std::slice::from_ref(&event));
        self.events.push(event);
    }

    /// Appends other ranks' events, in the order of their times. For rank 0.
    pub fn append_gathered(&mut self, mut events: Vec<Event>) {
        events.sort_by(|a, b| a.at_seconds.total_cmp(&b.at_seconds));
        self.write(&events);
    }

    /// The events noted here so far.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    fn write(&mut self, events: &[Event]) {
        let Some(file) = &mut self.file else { return };
        // One write a batch of whole lines: a kill cannot interleave them.
        if let Err(error) = file.write_all(&lines(events)) {
            tracing::warn!("{EVENTS_FILE}: {error}; no further events are written");
            self.file = None;
        }
    }
}

fn lines(events: &[Event]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for event in events {
        if let Ok(line) = serde_json::to_vec(event) {
            bytes.extend(line);
            bytes.push(b'\n');
        }
    }
    bytes
}

/// The events of the last attempt in the text of an events file, in the order of their
/// times. Lines that are torn are left out.
pub fn last_attempt(text: &str) -> Vec<Event> {
    let all: Vec<Event> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let begin = all.iter().rposition(|e| e.rank == 0 && e.event == START).unwrap_or(0);
    let mut last = all[begin..].to_vec();
    last.sort_by(|a, b| a.at_seconds.total_cmp(&b.at_seconds));
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Two attempts in one file, other ranks' events after rank 0's, a torn last line.
    #[test]
    fn a_file_of_two_attempts_gives_the_last() {
        let dir = tempfile::tempdir().unwrap();
        for attempt in 1..=2 {
            let mut log = EventLog::new(0, "node1");
            log.emit(at(0), START, json!({"attempt": attempt}));
            log.attach(dir.path()).unwrap();
            log.emit(at(30), "drain", Value::Null);
            let mut other = EventLog::new(1, "node2");
            other.emit(at(20), "load", json!({"seconds": 0.5}));
            other.emit(at(10), "stage", json!(7));
            log.append_gathered(other.events().to_vec());
        }
        let mut text = std::fs::read_to_string(dir.path().join(EVENTS_FILE)).unwrap();
        assert_eq!(text.lines().count(), 8);
        assert_eq!(
            text.lines().next(),
            Some(r#"{"at_seconds":0.0,"rank":0,"host":"node1","event":"start","attempt":1}"#)
        );
        text.push_str("{\"at_sec");
        let last = last_attempt(&text);
        let names: Vec<_> = last.iter().map(|e| (e.rank, e.event.as_str())).collect();
        assert_eq!(names, [(0, "start"), (1, "stage"), (1, "load"), (0, "drain")]);
        assert_eq!(last[0].fields["attempt"], 2);
        assert_eq!(last[1].fields["value"], 7);
        assert!(last_attempt("no json\n").is_empty());
    }
}
