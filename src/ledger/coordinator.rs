//! Rank 0's end of the hand-out: reads the input, serves every worker (itself too),
//! puts finished records into the output, and shares the run with other launches: gives
//! blocks back to those that have nothing to do, and merges at the end. Polled between
//! engine steps.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::comm::Communicator;
use crate::ledger::dealer::Dealer;
use crate::ledger::feed::Feed;
use crate::ledger::journal::StoredLines;
use crate::ledger::link::Inbox;
use crate::ledger::membership::Membership;
use crate::ledger::merge::merge;
use crate::ledger::protocol::{Order, TAG_TO_COORDINATOR, TAG_TO_WORKER, Update};
use crate::ledger::{
    Finished, Handout, LinkState, Load, OrderedOutput, OutputCounts, RunProgress, Task, WorkerLink,
};
use crate::prompts::RawRecord;
use crate::{Error, Result};

/// The input, record by record, with ascending indices.
pub type Source = Box<dyn Iterator<Item = Result<RawRecord>>>;
/// The estimated cost of a record; see [`crate::ledger::estimate_cost`].
pub type CostEstimate = Box<dyn Fn(&RawRecord) -> f64>;
/// Reads all journals anew: the lines of all done records.
pub type ReadStored = Box<dyn Fn() -> Result<StoredLines>>;

/// Lines of an earlier launch that are put into the output in one poll.
const STORED_LINES: usize = 4096;
/// The output is handed to the operating system at least this often.
const FLUSH_SECONDS: f64 = 1.0;
/// Other launches are looked after this often.
const SHARE_SECONDS: f64 = 1.0;

/// What the coordinator works with.
pub struct CoordinatorParts {
    /// Who gets what; its worker count is the communicator's size.
    pub handout: Handout,
    /// The records for this launch.
    pub feed: Feed,
    /// This launch's place among those on the run.
    pub membership: Membership,
    /// Costs of records.
    pub estimate: CostEstimate,
    /// Where lines go.
    pub output: OrderedOutput,
    /// Reads the journals for a merge.
    pub read_stored: ReadStored,
    /// End, rather than wait, where only records that others hold are left.
    pub no_wait: bool,
}

/// Rank 0's [`WorkerLink`]: it is worker 0 and serves the others. A failure (input,
/// output, a damaged message) makes the whole run drain and comes out of
/// [`WorkerLink::close`]; finished records are safe in the journals by then.
pub struct Coordinator {
    comm: Arc<dyn Communicator>,
    inbox: Inbox,
    dealer: Dealer,
    membership: Membership,
    output: OrderedOutput,
    read_stored: ReadStored,
    local_received: u64,
    /// The last poll left input to read or stored lines to write.
    unfinished_poll: bool,
    now_seconds: f64,
    /// The first poll.
    began_seconds: Option<f64>,
    flushed_seconds: f64,
    shared_seconds: f64,
    error: Option<Error>,
    failed: u64,
    new_tokens: u64,
    records: u64,
}

impl Coordinator {
    /// Rank 0 of `comm` (the workers' communicator).
    pub fn new(comm: Arc<dyn Communicator>, parts: CoordinatorParts) -> Self {
        let CoordinatorParts { handout, feed, membership, estimate, output, read_stored, no_wait } =
            parts;
        let workers = comm.size();
        let mut this = Self {
            comm,
            inbox: Inbox::default(),
            dealer: Dealer::new(handout, feed, estimate, no_wait, workers),
            membership,
            output,
            read_stored,
            local_received: 0,
            unfinished_poll: false,
            now_seconds: 0.0,
            began_seconds: None,
            flushed_seconds: 0.0,
            shared_seconds: 0.0,
            error: None,
            failed: 0,
            new_tokens: 0,
            records: 0,
        };
        if !this.output.is_ordered() {
            this.dealer.handout.without_horizon();
        }
        this
    }

    /// Records that were done before this launch.
    pub fn records_resumed(&self) -> u64 {
        self.dealer.feed.records_resumed()
    }

    /// After [`WorkerLink::close`]: completes the output if every record is done. `None` if
    /// the run stopped early, or `stop` says so while another launch merges; the same
    /// command goes on then.
    ///
    /// # Errors
    /// What went wrong on the way, or the output cannot be written.
    pub fn finish(mut self, stop: &dyn Fn() -> bool) -> Result<Option<OutputCounts>> {
        let outcome = match self.error.take() {
            Some(error) => Err(error),
            None if !self.dealer.complete() => self.output.flush().map(|()| None),
            None => self.merge(stop),
        };
        let how = match &outcome {
            Ok(Some(_)) => "complete".to_owned(),
            Ok(None) => "stopped".to_owned(),
            Err(error) => format!("failed: {error}"),
        };
        self.note_progress(&how);
        self.membership.leave(&how);
        outcome
    }

    /// Every record is done: one of the launches that find this writes the output.
    fn merge(&mut self, stop: &dyn Fn() -> bool) -> Result<Option<OutputCounts>> {
        let total = self.dealer.feed.total().unwrap_or_default();
        if self.dealer.feed.shared() {
            self.output.abandon();
        }
        let (output, read_stored) = (&mut self.output, &self.read_stored);
        let file = output.file().map(Path::to_owned);
        let claims = self.dealer.feed.claims_mut();
        let member = &mut self.membership;
        let written = merge(claims, member, file.as_deref(), self.now_seconds, stop, || {
            if output.is_ordered() {
                output.finish(total)
            } else {
                output.merge(read_stored()?, total)
            }
        });
        // Another launch may have written it: what was begun here goes.
        if matches!(written, Ok(Some(_))) {
            self.output.abandon();
        }
        written
    }

    fn fail(&mut self, error: Error) {
        self.dealer.handout.stop();
        self.error.get_or_insert(error);
    }

    /// Takes every message that has arrived.
    fn receive(&mut self) {
        while let Some((from, message)) = self.inbox.next(&*self.comm, TAG_TO_COORDINATOR) {
            match Update::decode(&message) {
                Ok(update) => self.apply(from, update),
                Err(error) => self.fail(error.context(format!("from worker {from}"))),
            }
        }
    }

    fn apply(&mut self, from: usize, update: Update) {
        for finished in update.finished {
            self.take_finished(finished);
        }
        if update.stop {
            self.dealer.handout.stop();
        }
        let Update { load, received_records, goodbye, .. } = update;
        self.dealer.report(from, load, received_records, goodbye, self.now_seconds);
    }

    fn take_finished(&mut self, finished: Finished) {
        self.failed += u64::from(finished.is_error);
        self.new_tokens += finished.new_tokens;
        self.records += 1;
        self.dealer.completed(finished.index, finished.cost);
        // After a failure of the output the journals alone keep the records.
        if self.error.is_none()
            && let Err(error) = self.output.push(finished.index, finished.line, finished.is_error)
        {
            self.fail(error);
        }
    }

    fn read_input(&mut self) {
        match self.dealer.read_input(self.now_seconds) {
            Ok(more) => self.unfinished_poll |= more,
            Err(error) => self.fail(error),
        }
    }

    /// Does its part among the launches on the run, now and then.
    fn share(&mut self) {
        if self.now_seconds - self.shared_seconds < SHARE_SECONDS {
            return;
        }
        self.shared_seconds = self.now_seconds;
        self.note_progress("working");
        if let Err(error) = self.share_blocks() {
            self.fail(error);
        }
        if self.dealer.feed.shared() && self.output.is_ordered() {
            self.output.abandon();
            self.dealer.handout.without_horizon();
        }
    }

    fn share_blocks(&mut self) -> Result<()> {
        if let Some(error) = self.membership.error() {
            return Err(error);
        }
        let was_late = self.membership.was_late();
        self.dealer.share_blocks(was_late, self.now_seconds)
    }

    fn note_progress(&self, phase: &str) {
        let seconds = (self.now_seconds - self.began_seconds.unwrap_or_default()).max(1e-3);
        self.membership.progress(|progress| {
            progress.records_done = self.records;
            progress.records_total = self.dealer.feed.total();
            progress.records_failed = self.failed;
            progress.new_tokens = self.new_tokens;
            progress.records_per_second = self.records as f64 / seconds;
            progress.tokens_per_second = self.new_tokens as f64 / seconds;
            phase.clone_into(&mut progress.phase);
        });
    }

    /// Answers the standing requests of all workers; returns worker 0's own records.
    fn serve(&mut self) -> Vec<Task> {
        let mut local = Vec::new();
        for worker in 0..self.comm.size() {
            loop {
                match self.dealer.next_block(worker, self.now_seconds) {
                    Ok(Some(block)) if worker == 0 => Vec::extend(&mut local, block),
                    Ok(Some(block)) => {
                        self.comm.send(worker, TAG_TO_WORKER, Order::Block(block).encode());
                    }
                    Ok(None) => break,
                    Err(error) => {
                        self.fail(error);
                        break;
                    }
                }
            }
        }
        self.local_received += local.len() as u64;
        self.tell_state();
        local
    }

    fn tell_state(&mut self) {
        let order = Order::NoMore { stopped: self.state() == LinkState::Stopped };
        for worker in self.dealer.take_untold() {
            self.comm.send(worker, TAG_TO_WORKER, order.encode());
        }
    }

    fn write_output(&mut self) {
        if self.error.is_some() {
            return;
        }
        let mut result = self.output.advance(STORED_LINES).map(|more| self.unfinished_poll |= more);
        if result.is_ok() && self.now_seconds - self.flushed_seconds >= FLUSH_SECONDS {
            self.flushed_seconds = self.now_seconds;
            result = self.output.flush();
        }
        if let Err(error) = result {
            self.fail(error);
        }
    }
}

impl WorkerLink for Coordinator {
    fn poll(&mut self, load: &Load, now_seconds: f64) -> Vec<Task> {
        self.now_seconds = now_seconds;
        self.began_seconds.get_or_insert(now_seconds);
        self.unfinished_poll = false;
        self.receive();
        self.dealer.report(0, *load, self.local_received, false, now_seconds);
        self.share();
        self.read_input();
        let records = self.serve();
        self.write_output();
        records
    }

    fn submit(&mut self, finished: Finished) {
        self.take_finished(finished);
    }

    fn state(&self) -> LinkState {
        self.dealer.state()
    }

    fn request_stop(&mut self) {
        self.dealer.handout.stop();
        self.tell_state();
    }

    fn wait(&mut self, timeout: Duration) {
        if self.unfinished_poll {
            return;
        }
        self.inbox.wait(&*self.comm, TAG_TO_COORDINATOR, timeout);
    }

    fn progress(&self) -> Option<RunProgress> {
        Some(RunProgress {
            records: self.dealer.feed.records_done(),
            records_total: self.dealer.feed.total(),
            failed: self.failed,
            new_tokens: self.new_tokens,
        })
    }

    fn others_working(&self) -> bool {
        self.dealer.others_working()
    }

    fn close(&mut self) -> Result<()> {
        if !self.dealer.handout.exhausted() {
            self.dealer.handout.stop();
        }
        while self.others_working() {
            self.unfinished_poll = false;
            self.receive();
            self.tell_state();
            self.write_output();
            self.wait(Duration::from_millis(100));
        }
        self.error.clone().map_or(Ok(()), Err)
    }
}
