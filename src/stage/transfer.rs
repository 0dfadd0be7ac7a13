//! Carries out a phase of the plan: one node reads, a chain of nodes receives.
//!
//! Each node passes a chunk on before it writes it, and sends a receipt back once it
//! has taken it; a sender is at most `AHEAD` receipts ahead, which bounds the memory
//! on its way. Reading and hashing run on a thread of their own, writing and verifying
//! on others. A node that fails says so in its receipts and goes on passing chunks
//! along, so that nobody waits for it; the reader then stops the chain with an empty
//! message. What failed is for the caller to agree on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::copy::{ChunkFiles, Hash, hash};
use super::plan::{Action, Chunk, Phase};
use crate::comm::{Communicator, tags};
use crate::{Error, Result};

/// Chunks sent without a receipt.
const AHEAD: usize = 4;
/// Chunks read but not yet sent.
const READ_AHEAD: usize = 2;
/// Threads that write: filling new pages of memory takes a core less than a fast link
/// delivers.
const WRITERS: usize = 2;
/// How often the reader reports.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What a node needs for its part.
pub struct Node<'a> {
    /// The nodes' leaders; ranks are node indices.
    pub leaders: &'a dyn Communicator,
    /// All chunks of the model.
    pub chunks: &'a [Chunk],
    /// What this node does.
    pub action: &'a Action,
    /// Where it reads, if it is the reader.
    pub source: Option<&'a ChunkFiles>,
    /// Where it writes, unless it needs nothing.
    pub destination: Option<&'a ChunkFiles>,
    /// What a chunk's hash must be, where that is known.
    pub expected: Option<&'a [Hash]>,
}

/// What a node did in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes written and verified.
    pub bytes_written: u64,
}

/// A chunk to write: its index, its bytes with the hash behind them.
type Work = (usize, Vec<u8>);

/// Runs this node's part of `phase`; `hashes` (one a chunk) gets those that pass by.
/// Nodes outside the phase return at once. A node that was stopped for another's
/// failure returns Ok: only who failed knows why.
pub fn run_phase(node: &Node, phase: &Phase, hashes: &mut [Hash]) -> Result<Moved> {
    let here = node.leaders.rank();
    let order: Vec<usize> = [phase.reader].into_iter().chain(phase.chain.clone()).collect();
    let Some(place) = order.iter().position(|&other| other == here) else {
        return Ok(Moved::default());
    };
    let outcome = Outcome::default();
    let (queue, waiting) = sync_channel(WRITERS);
    let waiting = Mutex::new(waiting);
    thread::scope(|scope| {
        for _ in 0..WRITERS {
            scope.spawn(|| write_queued(node, &waiting, &outcome));
        }
        let next = Link::new(node.leaders, order.get(place + 1).copied());
        // Dropped with `pass`, the queue ends the writers.
        let mut pass = Pass { node, outcome: &outcome, hashes, next, queue };
        match place.checked_sub(1) {
            None => {
                let (read, chunks) = sync_channel(READ_AHEAD);
                scope.spawn(|| read_ahead(node, phase, read, &outcome));
                pass.on_from_source(phase, chunks);
            }
            Some(previous) => pass.on_from_previous(phase, order[previous]),
        }
        pass.next.wait_for_receipts(0);
    });
    let failure = outcome.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    failure.map_or_else(
        || {
            Ok(Moved {
                bytes_read: outcome.bytes_read.into_inner(),
                bytes_written: outcome.bytes_written.into_inner(),
            })
        },
        Err,
    )
}

/// What the threads of a node have done so far, and the first failure.
#[derive(Default)]
struct Outcome {
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    failure: Mutex<Option<Error>>,
}

impl Outcome {
    fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn has_failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// The reader's thread: reads and hashes ahead of the sends, until done or stopped.
fn read_ahead(node: &Node, phase: &Phase, read: SyncSender<Work>, outcome: &Outcome) {
    for &index in &phase.chunks {
        match read_hashed(node, index) {
            Ok(message) => {
                let bytes = node.chunks[index].bytes as u64;
                outcome.bytes_read.fetch_add(bytes, Ordering::Relaxed);
                if read.send((index, message)).is_err() {
                    return;
                }
            }
            Err(error) => return outcome.fail(error),
        }
    }
}

fn read_hashed(node: &Node, index: usize) -> Result<Vec<u8>> {
    let source = node.source.ok_or_else(|| Error::fault("the reader has no source open"))?;
    let mut message = source.read(&node.chunks[index])?;
    let hash = hash(&message);
    if node.expected.is_some_and(|expected| expected[index] != hash) {
        return Err(not_as_before());
    }
    message.extend_from_slice(&hash);
    Ok(message)
}

/// What is read now would not fit what is staged.
pub(super) fn not_as_before() -> Error {
    Error::fault(
        "the model is not what it was when its staged copy was made, though sizes and times \
         are: remove the copy (in farm-<uid> of --stage-dir) and start again",
    )
}

/// A writer's thread. After a failure it takes what comes and drops it, so that nobody
/// waits for room in the queue.
fn write_queued(node: &Node, waiting: &Mutex<Receiver<Work>>, outcome: &Outcome) {
    loop {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((index, message)) = next else { return };
        if outcome.has_failed() {
            continue;
        }
        let chunk = &node.chunks[index];
        let written = split_hash(&message)
            .filter(|(data, _)| data.len() == chunk.bytes)
            .ok_or_else(|| Error::fault("a chunk of the model arrived with another length"))
            .and_then(|(data, hash)| match node.destination {
                Some(files) => files.write_verified(chunk, data, hash),
                None => Err(Error::fault("a chunk of the model arrived with nowhere to go")),
            });
        match written {
            Ok(()) => {
                outcome.bytes_written.fetch_add(chunk.bytes as u64, Ordering::Relaxed);
            }
            Err(error) => outcome.fail(error),
        }
    }
}

fn split_hash(message: &[u8]) -> Option<(&[u8], &Hash)> {
    message.split_last_chunk()
}

/// Takes chunks and passes them on: to the next node and to this node's writers.
struct Pass<'a> {
    node: &'a Node<'a>,
    outcome: &'a Outcome,
    hashes: &'a mut [Hash],
    next: Link<'a>,
    queue: SyncSender<Work>,
}

impl Pass<'_> {
    fn on_from_source(&mut self, phase: &Phase, chunks: Receiver<Work>) {
        let mut reported = Instant::now();
        let mut passed = 0;
        for (index, message) in chunks {
            if !self.is_fine() {
                break;
            }
            self.on(index, message);
            passed += 1;
            if reported.elapsed() >= PROGRESS_EVERY {
                reported = Instant::now();
                tracing::info!(chunks = passed, of = phase.chunks.len(), "staging");
            }
        }
        if passed < phase.chunks.len() {
            self.next.stop();
        }
    }

    fn on_from_previous(&mut self, phase: &Phase, previous: usize) {
        let leaders = self.node.leaders;
        for &index in &phase.chunks {
            let (_, message) = leaders.recv(Some(previous), tags::STAGE_CHUNK);
            if message.is_empty() {
                return self.next.stop();
            }
            self.on(index, message);
            leaders.send(previous, tags::STAGE_RECEIPT, vec![u8::from(self.is_fine())]);
        }
    }

    fn on(&mut self, index: usize, message: Vec<u8>) {
        if let Some((_, hash)) = split_hash(&message) {
            self.hashes[index] = *hash;
        }
        self.next.send(&message);
        // The writers live as long as the queue: sending to them cannot fail.
        if self.node.action.needs(index) && self.queue.send((index, message)).is_err() {
            self.outcome.fail(Error::fault("the writers of staged chunks are gone"));
        }
    }

    /// Whether this node and all after it, as far as known, are fine.
    fn is_fine(&self) -> bool {
        !self.outcome.has_failed() && self.next.is_fine
    }
}

/// The way to the next node of the chain, if there is one.
struct Link<'a> {
    leaders: &'a dyn Communicator,
    to: Option<usize>,
    /// Sent and not receipted.
    in_flight: usize,
    is_fine: bool,
}

impl<'a> Link<'a> {
    fn new(leaders: &'a dyn Communicator, to: Option<usize>) -> Self {
        Self { leaders, to, in_flight: 0, is_fine: true }
    }

    fn send(&mut self, message: &[u8]) {
        let Some(to) = self.to else { return };
        self.wait_for_receipts(AHEAD - 1);
        let mut copy = Vec::with_capacity(message.len() + 1);
        copy.extend_from_slice(message);
        self.leaders.send(to, tags::STAGE_CHUNK, copy);
        self.in_flight += 1;
    }

    /// Tells the rest of the chain that no more will come.
    fn stop(&mut self) {
        if let Some(to) = self.to {
            self.leaders.send(to, tags::STAGE_CHUNK, Vec::new());
        }
    }

    /// Returns once at most `in_flight_max` sends have no receipt.
    fn wait_for_receipts(&mut self, in_flight_max: usize) {
        let Some(to) = self.to else { return };
        while self.in_flight > in_flight_max {
            let (_, receipt) = self.leaders.recv(Some(to), tags::STAGE_RECEIPT);
            self.is_fine &= receipt == [1];
            self.in_flight -= 1;
        }
    }
}
