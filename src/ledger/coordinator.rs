//! Rank 0's end of the hand-out: reads the input, serves every worker (itself too),
//! and puts finished records into the output. Polled between engine steps.

use std::sync::Arc;
use std::time::Duration;

use crate::comm::Communicator;
use crate::ledger::link::Inbox;
use crate::ledger::protocol::{Order, TAG_TO_COORDINATOR, TAG_TO_WORKER, Update};
use crate::ledger::{
    Finished, Handout, HandoutCounts, LinkState, Load, OrderedOutput, OutputCounts, Reply,
    RunProgress, WorkerLink,
};
use crate::prompts::RawRecord;
use crate::{Error, Result};

/// The input, record by record, with ascending indices.
pub type Source = Box<dyn Iterator<Item = Result<RawRecord>>>;
/// The estimated cost of a record; see [`crate::ledger::estimate_cost`].
pub type CostEstimate = Box<dyn Fn(&RawRecord) -> f64>;

/// Records read from the input in one poll: bounds the pause between engine steps.
const READ_RECORDS: usize = 16_384;
/// Lines of an earlier launch that are put into the output in one poll.
const STORED_LINES: usize = 4096;
/// The output is handed to the operating system at least this often.
const FLUSH_SECONDS: f64 = 1.0;

/// Rank 0's [`WorkerLink`]: it is worker 0 and serves the others. A failure (input,
/// output, a damaged message) makes the whole run drain and comes out of
/// [`WorkerLink::close`]; finished records are safe in the part files by then.
pub struct Coordinator {
    comm: Arc<dyn Communicator>,
    inbox: Inbox,
    handout: Handout,
    source: Source,
    estimate: CostEstimate,
    output: OrderedOutput,
    workers: Vec<WorkerState>,
    local_received: u64,
    /// The last poll left input to read or stored lines to write.
    unfinished_poll: bool,
    now_seconds: f64,
    flushed_seconds: f64,
    error: Option<Error>,
    failed: u64,
    new_tokens: u64,
}

#[derive(Clone)]
struct WorkerState {
    told: LinkState,
    goodbye: bool,
}

impl Coordinator {
    /// Rank 0 of `comm` (the workers' communicator): hands out `source` by `handout`, whose
    /// worker count is `comm.size()`, and gathers into `output`.
    pub fn new(
        comm: Arc<dyn Communicator>,
        handout: Handout,
        source: Source,
        estimate: CostEstimate,
        output: OrderedOutput,
    ) -> Self {
        let workers = vec![WorkerState { told: LinkState::Open, goodbye: false }; comm.size()];
        Self {
            comm,
            inbox: Inbox::default(),
            handout,
            source,
            estimate,
            output,
            workers,
            local_received: 0,
            unfinished_poll: false,
            now_seconds: 0.0,
            flushed_seconds: 0.0,
            error: None,
            failed: 0,
            new_tokens: 0,
        }
    }

    /// Records read, skipped, handed out and completed so far.
    pub fn counts(&self) -> HandoutCounts {
        self.handout.counts()
    }

    /// After [`WorkerLink::close`]: completes the output if every record is done. `None` if
    /// the run stopped early; `FILE.partial` then holds what is finished in order.
    pub fn finish(mut self) -> Result<Option<OutputCounts>> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if !self.handout.complete() {
            self.output.flush()?;
            return Ok(None);
        }
        let total = self.handout.counts().read;
        self.output.finish(total).map(Some)
    }

    fn fail(&mut self, error: Error) {
        self.handout.stop();
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
            self.handout.stop();
        }
        self.workers[from].goodbye |= update.goodbye;
        self.handout.report(from, update.load, update.received_records, self.now_seconds);
    }

    fn take_finished(&mut self, finished: Finished) {
        self.failed += u64::from(finished.is_error);
        self.new_tokens += finished.new_tokens;
        self.handout.completed(finished.index, finished.cost);
        // After a failure of the output the part files alone keep the records.
        if self.error.is_none()
            && let Err(error) = self.output.push(finished.index, finished.line, finished.is_error)
        {
            self.fail(error);
        }
    }

    fn read_input(&mut self) {
        for _ in 0..READ_RECORDS {
            if !self.handout.wants_more() {
                return;
            }
            match self.source.next() {
                None => self.handout.end_of_input(),
                Some(Err(error)) => self.fail(error),
                Some(Ok(record)) if self.handout.is_done(record.index) => {
                    self.handout.skip(record.index);
                }
                Some(Ok(record)) => {
                    let cost = (self.estimate)(&record);
                    self.handout.feed(record, cost);
                }
            }
        }
        self.unfinished_poll = true;
    }

    /// Answers the standing requests of all workers; returns worker 0's own records.
    fn serve(&mut self) -> Vec<RawRecord> {
        let mut local = Vec::new();
        for worker in 0..self.workers.len() {
            while let Reply::Block(block) = self.handout.next_block(worker, self.now_seconds) {
                if worker == 0 {
                    local.extend(block);
                } else {
                    self.comm.send(worker, TAG_TO_WORKER, Order::Block(block).encode());
                }
            }
        }
        self.local_received += local.len() as u64;
        self.tell_state();
        local
    }

    /// Tells workers that no more will come, once, and that the run drains, if it does.
    fn tell_state(&mut self) {
        let state = self.state();
        for (worker, known) in self.workers.iter_mut().enumerate().skip(1) {
            if known.told != state && !known.goodbye {
                known.told = state;
                let order = Order::NoMore { stopped: state == LinkState::Stopped };
                self.comm.send(worker, TAG_TO_WORKER, order.encode());
            }
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
    fn poll(&mut self, load: &Load, now_seconds: f64) -> Vec<RawRecord> {
        self.now_seconds = now_seconds;
        self.unfinished_poll = false;
        self.receive();
        self.handout.report(0, *load, self.local_received, now_seconds);
        self.read_input();
        let records = self.serve();
        self.write_output();
        records
    }

    fn submit(&mut self, finished: Finished) {
        self.take_finished(finished);
    }

    fn state(&self) -> LinkState {
        if self.handout.stopped() {
            LinkState::Stopped
        } else if self.handout.exhausted() {
            LinkState::Finished
        } else {
            LinkState::Open
        }
    }

    fn request_stop(&mut self) {
        self.handout.stop();
        self.tell_state();
    }

    fn wait(&mut self, timeout: Duration) {
        if self.unfinished_poll {
            return;
        }
        self.inbox.wait(&*self.comm, TAG_TO_COORDINATOR, timeout);
    }

    fn progress(&self) -> Option<RunProgress> {
        let counts = self.handout.counts();
        Some(RunProgress {
            records: counts.skipped + counts.completed,
            records_total: self.handout.input_ended().then_some(counts.read),
            failed: self.failed,
            new_tokens: self.new_tokens,
        })
    }

    fn others_working(&self) -> bool {
        !self.workers.iter().skip(1).all(|worker| worker.goodbye)
    }

    fn close(&mut self) -> Result<()> {
        if !self.handout.exhausted() {
            self.handout.stop();
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
