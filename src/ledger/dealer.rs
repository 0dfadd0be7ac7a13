//! What rank 0 decides: which records this launch works on, which worker gets them, what
//! goes back to launches that have nothing to do, and when a worker is told that no more
//! will come. Left out, and so the same in the simulator: messages, clocks, the output, the
//! launch's heartbeat ([`Coordinator`](super::Coordinator)).

use std::ops::Range;

use crate::Result;
use crate::ledger::feed::{Feed, Next};
use crate::ledger::{CostEstimate, Handout, LinkState, Load, Reply, Task};

/// Records read from the input in one go: bounds the pause between engine steps.
const READ_RECORDS: usize = 16_384;

/// Rank 0's decisions; see the module.
pub(super) struct Dealer {
    pub(super) handout: Handout,
    pub(super) feed: Feed,
    estimate: CostEstimate,
    /// End, rather than wait, where only records that others hold are left …
    no_wait: bool,
    /// … and that has happened.
    left_to_others: bool,
    workers: Vec<WorkerState>,
}

#[derive(Clone)]
struct WorkerState {
    told: LinkState,
    goodbye: bool,
}

impl Dealer {
    /// For this many workers, rank 0 among them.
    pub(super) fn new(
        handout: Handout,
        feed: Feed,
        estimate: CostEstimate,
        no_wait: bool,
        workers: usize,
    ) -> Self {
        let workers = vec![WorkerState { told: LinkState::Open, goodbye: false }; workers];
        Self { handout, feed, estimate, no_wait, left_to_others: false, workers }
    }

    /// Takes in what a worker says of itself.
    pub(super) fn report(
        &mut self,
        worker: usize,
        load: Load,
        received_records: u64,
        goodbye: bool,
        now_seconds: f64,
    ) {
        self.workers[worker].goodbye |= goodbye;
        self.handout.report(worker, load, received_records, now_seconds);
    }

    /// A worker of this launch has done a record.
    pub(super) fn completed(&mut self, index: u64, cost: f64) {
        self.handout.completed(index, cost);
        self.feed.completed(index);
    }

    /// Reads on in the input while the hand-out wants more; whether there is more to read at
    /// once.
    ///
    /// # Errors
    /// Those of the feed.
    pub(super) fn read_input(&mut self, now_seconds: f64) -> Result<bool> {
        for _ in 0..READ_RECORDS {
            if !self.handout.wants_more() {
                return Ok(false);
            }
            match self.feed.next(now_seconds, self.handout.counts().in_window)? {
                Next::Record(record) => {
                    let cost = (self.estimate)(&record);
                    self.handout.feed(record, cost);
                }
                Next::Passed => {}
                Next::Wait => {
                    self.wait_for_others();
                    return Ok(false);
                }
                Next::End => {
                    self.handout.end_of_input();
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn wait_for_others(&mut self) {
        let counts = self.handout.counts();
        if self.no_wait && counts.in_window == 0 && counts.outstanding == 0 {
            self.left_to_others = true;
            tracing::info!("only records that other jobs work on are left (--no-wait)");
            self.handout.end_of_input();
        }
    }

    /// Gives blocks back to launches that have nothing to do and, after a heartbeat that came
    /// late, gives up what others took.
    ///
    /// # Errors
    /// The run directory cannot be read or written.
    pub(super) fn share_blocks(&mut self, was_late: bool, now_seconds: f64) -> Result<()> {
        if was_late {
            // Once all is handed out, what is left of a lost block is in work here; workers know
            // that no more will come, and may have gone.
            let has_more = !self.handout.exhausted();
            for records in self.feed.lost()? {
                self.handout.withdraw(records);
                if has_more {
                    self.handout.reopen_input();
                }
            }
        }
        let counts = self.handout.counts();
        if counts.in_window == 0 {
            return Ok(());
        }
        let wishes = self.feed.wishes(now_seconds)?.len();
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

    fn all_in_window(&self, records: &Range<u64>) -> bool {
        self.handout.in_window(records.clone()) == records.end - records.start
    }

    /// The next block for a worker, by what it reported last.
    ///
    /// # Errors
    /// A saved generation cannot be read.
    pub(super) fn next_block(
        &mut self,
        worker: usize,
        now_seconds: f64,
    ) -> Result<Option<Vec<Task>>> {
        match self.handout.next_block(worker, now_seconds) {
            Reply::Block(block) => block
                .into_iter()
                .map(|record| self.feed.task(record))
                .collect::<Result<_>>()
                .map(Some),
            Reply::Wait | Reply::Done => Ok(None),
        }
    }

    /// The workers that are to be told, now, that no more will come, once, and that the run
    /// drains, if it does.
    pub(super) fn take_untold(&mut self) -> Vec<usize> {
        let state = self.state();
        let workers = self.workers.iter_mut().enumerate().skip(1);
        let untold = workers.filter(|(_, known)| known.told != state && !known.goodbye);
        untold
            .map(|(worker, known)| {
                known.told = state;
                worker
            })
            .collect()
    }

    /// What workers may still expect.
    pub(super) fn state(&self) -> LinkState {
        if self.handout.stopped() {
            LinkState::Stopped
        } else if self.handout.exhausted() {
            LinkState::Finished
        } else {
            LinkState::Open
        }
    }

    /// Whether there are workers that have not said good-bye.
    pub(super) fn others_working(&self) -> bool {
        !self.workers.iter().skip(1).all(|worker| worker.goodbye)
    }

    /// Whether every record of the input is done, by whomever.
    pub(super) fn complete(&self) -> bool {
        self.handout.complete() && !self.left_to_others
    }
}
