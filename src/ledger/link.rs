//! A worker's end of the hand-out: records in, finished records out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::comm::{Communicator, Tag};
use crate::ledger::protocol::{Order, TAG_TO_COORDINATOR, TAG_TO_WORKER, Update};
use crate::ledger::{Finished, Load, Task};
use crate::{Error, Result};

/// What a worker may still expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// More records may come.
    Open,
    /// No more records will come; finish what is there.
    Finished,
    /// The run drains: start nothing, bring to an end or leave what runs.
    Stopped,
}

/// How far the whole run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RunProgress {
    /// Records finished, those of earlier launches included.
    pub records: u64,
    /// Records of the input, once it is read to its end.
    pub records_total: Option<u64>,
    /// Error records of this launch.
    pub failed: u64,
    /// Tokens generated in this launch.
    pub new_tokens: u64,
}

/// A worker's end of the hand-out. Rank 0's is the [`crate::ledger::Coordinator`], the
/// others' a [`RemoteLink`]. Call [`WorkerLink::poll`] between engine steps.
pub trait WorkerLink {
    /// Reports the load and returns new records, without waiting.
    fn poll(&mut self, load: &Load, now_seconds: f64) -> Vec<Task>;

    /// Hands in a finished record, after it went into the rank's journal.
    fn submit(&mut self, finished: Finished);

    /// What may still come, as of the last poll.
    fn state(&self) -> LinkState;

    /// Asks every rank to drain: after a signal, or a fault on this rank.
    fn request_stop(&mut self);

    /// Sleeps until a message arrives or `timeout` is over. For a worker that has
    /// nothing to do; sends nothing.
    fn wait(&mut self, timeout: Duration);

    /// How far the whole run is, where this rank knows: rank 0.
    fn progress(&self) -> Option<RunProgress> {
        None
    }

    /// Whether rank 0 still has to serve workers that are not done.
    fn others_working(&self) -> bool {
        false
    }

    /// The end: hands in what is left and says goodbye (rank 0: waits until all have).
    /// What was handed out and not submitted counts as not done. An error that this end
    /// of the link met during the run comes out here.
    fn close(&mut self) -> Result<()>;
}

/// Messages that have arrived and were not looked at yet.
#[derive(Default)]
pub(super) struct Inbox(VecDeque<(usize, Vec<u8>)>);

impl Inbox {
    /// The next message with `tag`.
    pub(super) fn next(&mut self, comm: &dyn Communicator, tag: Tag) -> Option<(usize, Vec<u8>)> {
        self.0.pop_front().or_else(|| comm.try_recv(tag))
    }

    /// Sleeps in growing steps until a message is there or `timeout` is over. (MPI's own
    /// blocking receive spins on a core that other ranks of the node may need.)
    pub(super) fn wait(&mut self, comm: &dyn Communicator, tag: Tag, timeout: Duration) {
        const LONGEST: Duration = Duration::from_millis(5);
        let end = Instant::now() + timeout;
        let mut pause = Duration::from_micros(50);
        while self.0.is_empty() {
            if let Some(message) = comm.try_recv(tag) {
                self.0.push_back(message);
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(LONGEST);
        }
    }
}

/// The link of a worker that is not rank 0.
pub struct RemoteLink {
    comm: Arc<dyn Communicator>,
    inbox: Inbox,
    state: LinkState,
    received_records: u64,
    outbox: Vec<Finished>,
    outbox_bytes: usize,
    stop: bool,
    sent: Load,
    sent_seconds: f64,
    sent_received: u64,
    error: Option<Error>,
}

/// Finished records go out when they are this many bytes …
const FULL_OUTBOX_BYTES: usize = 256 << 10;
/// … or at least this often,
const REPORT_SECONDS: f64 = 0.25;
/// and requests for records at most this often, unless the worker runs dry.
const REQUEST_SECONDS: f64 = 0.01;

impl RemoteLink {
    /// The link to rank 0 of `comm` (the workers' communicator).
    pub fn new(comm: Arc<dyn Communicator>) -> Self {
        Self {
            comm,
            inbox: Inbox::default(),
            state: LinkState::Open,
            received_records: 0,
            outbox: Vec::new(),
            outbox_bytes: 0,
            stop: false,
            sent: Load::default(),
            sent_seconds: f64::NEG_INFINITY,
            sent_received: 0,
            error: None,
        }
    }

    /// Whether rank 0 should hear from this worker now.
    fn due(&self, load: &Load, now_seconds: f64) -> bool {
        let silent = now_seconds - self.sent_seconds;
        let news = *load != self.sent || self.received_records != self.sent_received;
        let held = load.running + load.waiting;
        let hungry = self.state == LinkState::Open && load.waiting < load.slots.max(2);
        let dry = held < load.slots || load.waiting * 4 < load.slots;
        self.outbox_bytes >= FULL_OUTBOX_BYTES
            || (silent >= REPORT_SECONDS && (news || !self.outbox.is_empty()))
            || (hungry && news && (dry || silent >= REQUEST_SECONDS))
    }

    fn send(&mut self, load: Load, goodbye: bool) {
        let update = Update {
            load,
            received_records: self.received_records,
            stop: self.stop,
            goodbye,
            finished: std::mem::take(&mut self.outbox),
        };
        self.outbox_bytes = 0;
        self.sent = load;
        self.sent_received = self.received_records;
        self.comm.send(0, TAG_TO_COORDINATOR, update.encode());
    }

    fn receive(&mut self) -> Result<Vec<Task>> {
        let mut records = Vec::new();
        while let Some((_, message)) = self.inbox.next(&*self.comm, TAG_TO_WORKER) {
            match Order::decode(&message)? {
                Order::Block(block) => {
                    self.received_records += block.len() as u64;
                    records.extend(block);
                }
                Order::NoMore { stopped: true } => self.state = LinkState::Stopped,
                Order::NoMore { stopped: false } if self.state == LinkState::Open => {
                    self.state = LinkState::Finished;
                }
                Order::NoMore { stopped: false } => {}
            }
        }
        Ok(records)
    }
}

impl WorkerLink for RemoteLink {
    fn poll(&mut self, load: &Load, now_seconds: f64) -> Vec<Task> {
        let records = match self.receive() {
            Ok(records) => records,
            Err(error) => {
                self.error.get_or_insert(error);
                self.request_stop();
                Vec::new()
            }
        };
        // What just came counts as waiting, else it would be asked for again.
        let load = Load { waiting: load.waiting + records.len(), ..*load };
        if self.due(&load, now_seconds) {
            self.sent_seconds = now_seconds;
            self.send(load, false);
        }
        if self.state == LinkState::Stopped { Vec::new() } else { records }
    }

    fn submit(&mut self, finished: Finished) {
        self.outbox_bytes += finished.line.len();
        self.outbox.push(finished);
    }

    fn state(&self) -> LinkState {
        self.state
    }

    fn request_stop(&mut self) {
        if !self.stop {
            self.stop = true;
            self.state = LinkState::Stopped;
            self.send(self.sent, false);
        }
    }

    fn wait(&mut self, timeout: Duration) {
        self.inbox.wait(&*self.comm, TAG_TO_WORKER, timeout);
    }

    fn close(&mut self) -> Result<()> {
        self.send(Load { running: 0, waiting: 0, ..self.sent }, true);
        self.error.take().map_or(Ok(()), Err)
    }
}
