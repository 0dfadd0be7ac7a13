//! Rank 0's end of the hand-out: reads the input, serves every worker (itself too),
//! puts finished records into the output, and shares the run with other launches: gives
//! blocks back to those that have nothing to do, and merges at the end. Polled between
//! engine steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::comm::Communicator;
use crate::ledger::claims::Standing;
use crate::ledger::feed::{Feed, Next};
use crate::ledger::journal::StoredLines;
use crate::ledger::link::Inbox;
use crate::ledger::membership::Membership;
use crate::ledger::protocol::{Order, TAG_TO_COORDINATOR, TAG_TO_WORKER, Update};
use crate::ledger::{
    Finished, Handout, HandoutCounts, LinkState, Load, OrderedOutput, OutputCounts, Reply,
    RunProgress, Task, WorkerLink,
};
use crate::prompts::RawRecord;
use crate::{Error, Result};

/// The input, record by record, with ascending indices.
pub type Source = Box<dyn Iterator<Item = Result<RawRecord>>>;
/// The estimated cost of a record; see [`crate::ledger::estimate_cost`].
pub type CostEstimate = Box<dyn Fn(&RawRecord) -> f64>;
/// Reads all journals anew: the lines of all done records.
pub type ReadStored = Box<dyn Fn() -> Result<StoredLines>>;

/// Records read from the input in one poll: bounds the pause between engine steps.
const READ_RECORDS: usize = 16_384;
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
    handout: Handout,
    feed: Feed,
    membership: Membership,
    estimate: CostEstimate,
    output: OrderedOutput,
    read_stored: ReadStored,
    no_wait: bool,
    /// Others have the rest, and this launch does not wait for them.
    left_to_others: bool,
    workers: Vec<WorkerState>,
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

#[derive(Clone)]
struct WorkerState {
    told: LinkState,
    goodbye: bool,
}

impl Coordinator {
    /// Rank 0 of `comm` (the workers' communicator).
    pub fn new(comm: Arc<dyn Communicator>, parts: CoordinatorParts) -> Self {
        let workers = vec![WorkerState { told: LinkState::Open, goodbye: false }; comm.size()];
        let CoordinatorParts { handout, feed, membership, estimate, output, read_stored, no_wait } =
            parts;
        let mut this = Self {
            comm,
            inbox: Inbox::default(),
            handout,
            feed,
            membership,
            estimate,
            output,
            read_stored,
            no_wait,
            left_to_others: false,
            workers,
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
            this.handout.without_horizon();
        }
        this
    }

    /// Records read, handed out and completed so far by this launch.
    pub fn counts(&self) -> HandoutCounts {
        self.handout.counts()
    }

    /// Records that were done before this launch.
    pub fn records_resumed(&self) -> u64 {
        self.feed.records_resumed()
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
            None if !self.handout.complete() || self.left_to_others => {
                self.output.flush().map(|()| None)
            }
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
        let (begun, began_seconds) = (Instant::now(), self.now_seconds);
        let file = self.output.file().map(std::path::absolute).transpose();
        let file = file.map_err(Error::fault)?.map(|file| file.display().to_string());
        loop {
            let name = self.membership.merge_name();
            let now = began_seconds + begun.elapsed().as_secs_f64();
            match self.feed.claims_mut().claim(&name, now)? {
                Standing::Mine => {
                    let counts = self.write_all()?;
                    let done = json!({
                        "output": file, "records": counts.records, "errors": counts.errors
                    });
                    self.feed.claims_mut().complete(&name, &done)?;
                    return Ok(Some(counts));
                }
                Standing::Done(done) if done["output"] == json!(file) => {
                    return Ok(Some(counts_of(&done)));
                }
                Standing::Done(_) => self.membership.next_merge(),
                _ if stop() => return Ok(None),
                _ => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    fn write_all(&mut self) -> Result<OutputCounts> {
        let total = self.feed.total().unwrap_or_default();
        if self.output.is_ordered() {
            self.output.finish(total)
        } else {
            self.output.merge((self.read_stored)()?, total)
        }
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
        self.records += 1;
        self.handout.completed(finished.index, finished.cost);
        self.feed.completed(finished.index);
        // After a failure of the output the journals alone keep the records.
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
            match self.feed.next(self.now_seconds, self.handout.counts().in_window) {
                Ok(Next::Record(record)) => {
                    let cost = (self.estimate)(&record);
                    self.handout.feed(record, cost);
                }
                Ok(Next::Passed) => {}
                Ok(Next::Wait) => return self.wait_for_others(),
                Ok(Next::End) => return self.handout.end_of_input(),
                Err(error) => return self.fail(error),
            }
        }
        self.unfinished_poll = true;
    }

    fn wait_for_others(&mut self) {
        let counts = self.handout.counts();
        if self.no_wait && counts.in_window == 0 && counts.outstanding == 0 {
            self.left_to_others = true;
            self.handout.end_of_input();
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
        if self.feed.shared() && self.output.is_ordered() {
            self.output.abandon();
            self.handout.without_horizon();
        }
    }

    fn share_blocks(&mut self) -> Result<()> {
        if let Some(error) = self.membership.error() {
            return Err(error);
        }
        if self.membership.was_late() {
            for records in self.feed.lost()? {
                self.handout.withdraw(records);
                self.handout.reopen_input();
            }
        }
        let counts = self.handout.counts();
        if counts.in_window == 0 {
            return Ok(());
        }
        let wishes = self.feed.wishes(self.now_seconds)?.len();
        if wishes == 0 {
            return Ok(());
        }
        let idle: Vec<_> = self.feed.untouched().filter(|(_, r)| self.all_in_window(r)).collect();
        // The rest is shared as evenly as blocks go; the last of them wait the longest here.
        let given = (idle.len() * wishes).div_ceil(wishes + 1);
        for (block, records) in idle.into_iter().rev().take(given) {
            self.handout.withdraw(records);
            self.handout.reopen_input();
            self.feed.give_back(block)?;
        }
        Ok(())
    }

    fn all_in_window(&self, records: &std::ops::Range<u64>) -> bool {
        self.handout.in_window(records.clone()) == records.end - records.start
    }

    fn note_progress(&self, phase: &str) {
        let seconds = (self.now_seconds - self.began_seconds.unwrap_or_default()).max(1e-3);
        self.membership.progress(|progress| {
            progress.records_done = self.records;
            progress.records_total = self.feed.total();
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
        for worker in 0..self.workers.len() {
            while let Reply::Block(block) = self.handout.next_block(worker, self.now_seconds) {
                let block = match block.into_iter().map(|record| self.feed.task(record)).collect() {
                    Ok(block) => block,
                    Err(error) => {
                        self.fail(error);
                        break;
                    }
                };
                if worker == 0 {
                    Vec::extend(&mut local, block);
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
    fn poll(&mut self, load: &Load, now_seconds: f64) -> Vec<Task> {
        self.now_seconds = now_seconds;
        self.began_seconds.get_or_insert(now_seconds);
        self.unfinished_poll = false;
        self.receive();
        self.handout.report(0, *load, self.local_received, now_seconds);
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
        Some(RunProgress {
            records: self.feed.records_done(),
            records_total: self.feed.total(),
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

fn counts_of(done: &Value) -> OutputCounts {
    let count = |name: &str| done[name].as_u64().unwrap_or_default();
    OutputCounts { records: count("records"), errors: count("errors") }
}
