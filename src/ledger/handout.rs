//! Which records a worker gets next: a pure state machine at rank 0.
//!
//! It holds a bounded window of the input and gives records out on demand, longest
//! first, so that what remains for the end is short. Workers ask ahead: each runs up
//! to `slots` sequences at once and keeps some more waiting. Two rules keep the end
//! of the run short (guided self-scheduling, Polychronopoulos and Kuck 1987, with
//! the workers weighted by their measured speed):
//!
//! - what a worker holds ahead shrinks with the window: at most half of its share;
//! - a worker gets only what it can finish by the time when all would finish if the
//!   rest were shared by speed, or what nobody else could finish much sooner.
//!
//! Costs are estimates in any one unit; they are corrected by the ratio of real to
//! estimated cost seen so far. No IO and no clock: `now_seconds` is passed in.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::ledger::outlook::{Outlook, Speed, WorkerOutlook};
use crate::prompts::{RawBody, RawRecord};

/// Bounds of the hand-out.
#[derive(Debug, Clone)]
pub struct HandoutConfig {
    /// Records read ahead of being handed out.
    pub window_records: usize,
    /// Bytes read ahead of being handed out.
    pub window_bytes: usize,
    /// No record is read whose index is more than this beyond the oldest unfinished one.
    pub horizon: u64,
    /// A record is handed out before longer ones once this many later records were read, so
    /// that the output's beginning does not wait for short records.
    pub patience: u64,
    /// Records in one block.
    pub max_block_records: usize,
    /// Bytes in one block (a longer record goes alone).
    pub max_block_bytes: usize,
}

impl HandoutConfig {
    /// Bounds for this many workers: the window is long enough that a long record is seen
    /// well before the end, also where many workers empty it fast.
    pub fn for_workers(workers: usize) -> Self {
        let window_records = (512 * workers).max(8192);
        Self {
            window_records,
            window_bytes: 64 << 20,
            horizon: 8 * window_records as u64,
            patience: 2 * window_records as u64,
            max_block_records: 256,
            max_block_bytes: 4 << 20,
        }
    }
}

impl Default for HandoutConfig {
    fn default() -> Self {
        Self::for_workers(1)
    }
}

/// What a worker is doing, as it reports it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Sequences that it can run at once (`--max-batch-size`).
    pub slots: usize,
    /// Sequences running now.
    pub running: usize,
    /// Records received and not started.
    pub waiting: usize,
    /// Cost worked off since the start, finished or not, without recomputation. Its speed
    /// is measured by this.
    pub processed_cost: f64,
}

impl Load {
    /// Whether the batch is full, so that the worker's speed is what it can do.
    fn saturated(&self) -> bool {
        self.running > 0 && (self.waiting > 0 || self.running >= self.slots)
    }
}

/// The answer to a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Records to work on.
    Block(Vec<RawRecord>),
    /// Nothing now; ask again.
    Wait,
    /// Nothing any more.
    Done,
}

/// Where the run stands, in records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HandoutCounts {
    /// Fed, less those withdrawn.
    pub read: u64,
    /// In the window, not handed out.
    pub in_window: u64,
    /// Handed out, not completed.
    pub outstanding: u64,
    /// Completed in this launch.
    pub completed: u64,
}

/// The state machine.
#[derive(Debug)]
pub struct Handout {
    config: HandoutConfig,
    /// By (cost, age): the last is the longest, and the oldest among equals.
    window: BTreeMap<Key, RawRecord>,
    /// The window's keys by record index.
    window_by_index: BTreeMap<u64, Key>,
    window_bytes: usize,
    window_cost: f64,
    /// Handed out and unfinished: index → (worker, estimated cost).
    outstanding: BTreeMap<u64, (usize, f64)>,
    workers: Vec<Worker>,
    finished_estimate: f64,
    finished_cost: f64,
    counts: HandoutCounts,
    next_index: u64,
    input_ended: bool,
    stopped: bool,
}

/// Cost as ordered bits (costs are positive), then the complement of the index.
type Key = (u64, u64);

fn key(cost: f64, index: u64) -> Key {
    (cost.to_bits(), !index)
}

fn key_cost(key: Key) -> f64 {
    f64::from_bits(key.0)
}

#[derive(Debug, Default)]
struct Worker {
    load: Load,
    reported_seconds: f64,
    assigned_records: u64,
    received_records: u64,
    unfinished_estimate: f64,
    finished_cost: f64,
    speed: Speed,
    /// Since when the speed is to be measured: seconds, and cost processed by then.
    saturated_since: Option<(f64, f64)>,
}

impl Handout {
    /// A hand-out to `workers` workers.
    pub fn new(config: HandoutConfig, workers: usize) -> Self {
        Self {
            config,
            window: BTreeMap::new(),
            window_by_index: BTreeMap::new(),
            window_bytes: 0,
            window_cost: 0.0,
            outstanding: BTreeMap::new(),
            workers: (0..workers).map(|_| Worker::default()).collect(),
            finished_estimate: 0.0,
            finished_cost: 0.0,
            counts: HandoutCounts::default(),
            next_index: 0,
            input_ended: false,
            stopped: false,
        }
    }

    /// Whether the next record of the input may be fed.
    pub fn wants_more(&self) -> bool {
        let oldest = self.oldest_unfinished().unwrap_or(self.next_index);
        !self.input_ended
            && !self.stopped
            && self.window.len() < self.config.window_records
            && self.window_bytes < self.config.window_bytes
            && self.next_index.saturating_sub(oldest) <= self.config.horizon
    }

    /// Takes a record of the input; each one once.
    pub fn feed(&mut self, record: RawRecord, cost: f64) {
        let cost = if cost.is_finite() && cost > 0.0 { cost } else { 1.0 };
        let key = key(cost, record.index);
        self.counts.read += 1;
        self.next_index = self.next_index.max(record.index.saturating_add(1));
        self.window_bytes += body_bytes(&record);
        self.window_cost += cost;
        self.window_by_index.insert(record.index, key);
        self.window.insert(key, record);
    }

    /// Lets records be read however far they are from the oldest unfinished one: where the
    /// output is not written in order while the run goes on.
    pub fn without_horizon(&mut self) {
        self.config.horizon = u64::MAX;
    }

    /// How many of these records were fed and not handed out.
    pub fn in_window(&self, records: Range<u64>) -> u64 {
        self.window_by_index.range(records).count() as u64
    }

    /// Takes back those of these records that were not handed out, as if never fed.
    pub fn withdraw(&mut self, records: Range<u64>) {
        let keys: Vec<Key> = self.window_by_index.range(records).map(|(_, &key)| key).collect();
        for key in keys {
            self.take(key);
            self.counts.read -= 1;
        }
    }

    /// Takes a record out of the window.
    fn take(&mut self, key: Key) -> Option<RawRecord> {
        let record = self.window.remove(&key)?;
        self.window_by_index.remove(&record.index);
        self.window_cost = (self.window_cost - key_cost(key)).max(0.0);
        self.window_bytes -= body_bytes(&record);
        Some(record)
    }

    /// The input has no more records.
    pub fn end_of_input(&mut self) {
        self.input_ended = true;
    }

    /// More records may come after all: withdrawn ones that nobody else did, say.
    pub fn reopen_input(&mut self) {
        self.input_ended = false;
    }

    /// Whether [`Handout::end_of_input`] was called.
    pub fn input_ended(&self) -> bool {
        self.input_ended
    }

    /// Hands out nothing any more (a drain).
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Whether [`Handout::stop`] was called.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Whether no record will be handed out any more.
    pub fn exhausted(&self) -> bool {
        self.stopped || (self.input_ended && self.window.is_empty())
    }

    /// Whether every record of the input was completed.
    pub fn complete(&self) -> bool {
        self.input_ended && self.window.is_empty() && self.outstanding.is_empty()
    }

    /// Where the run stands.
    pub fn counts(&self) -> HandoutCounts {
        HandoutCounts {
            in_window: self.window.len() as u64,
            outstanding: self.outstanding.len() as u64,
            ..self.counts
        }
    }

    /// Notes what `worker` is doing; `received_records` counts all that ever reached it, so
    /// that blocks still under way are not asked for twice.
    pub fn report(&mut self, worker: usize, load: Load, received_records: u64, now_seconds: f64) {
        let w = &mut self.workers[worker];
        w.load = load;
        w.reported_seconds = now_seconds;
        w.received_records = received_records;
        match w.saturated_since {
            _ if !load.saturated() => w.saturated_since = None,
            None => w.saturated_since = Some((now_seconds, load.processed_cost)),
            Some((since, cost)) if now_seconds > since => {
                w.speed.observe(load.processed_cost - cost, now_seconds - since);
                w.saturated_since = Some((now_seconds, load.processed_cost));
            }
            Some(_) => {}
        }
    }

    /// The next block for `worker`, by what it reported last.
    pub fn next_block(&mut self, worker: usize, now_seconds: f64) -> Reply {
        if self.exhausted() {
            return Reply::Done;
        }
        if self.window.is_empty() {
            return Reply::Wait;
        }
        let outlook = self.outlook(now_seconds);
        let wanted = self.wanted(worker, &outlook).min(self.config.max_block_records);
        let mut block = Vec::new();
        let (mut taken_cost, mut taken_bytes) = (0.0, 0);
        while block.len() < wanted && taken_bytes < self.config.max_block_bytes {
            let Some(key) = self.pick(worker, &outlook, taken_cost) else { break };
            let Some(record) = self.take(key) else { break };
            let cost = key_cost(key);
            self.outstanding.insert(record.index, (worker, cost));
            self.workers[worker].unfinished_estimate += cost;
            self.workers[worker].assigned_records += 1;
            taken_cost += cost * outlook.ratio;
            taken_bytes += body_bytes(&record);
            block.push(record);
        }
        if block.is_empty() { Reply::Wait } else { Reply::Block(block) }
    }

    /// [`Handout::report`] and [`Handout::next_block`] at once.
    #[cfg(test)]
    pub fn ask(&mut self, worker: usize, load: Load, received: u64, now_seconds: f64) -> Reply {
        self.report(worker, load, received, now_seconds);
        self.next_block(worker, now_seconds)
    }

    /// `worker` finished a record at this real cost; false if it was not outstanding (a
    /// record that arrives twice, say).
    pub fn completed(&mut self, index: u64, cost: f64) -> bool {
        let Some((worker, estimate)) = self.outstanding.remove(&index) else { return false };
        let cost = if cost.is_finite() && cost >= 0.0 { cost } else { estimate };
        let w = &mut self.workers[worker];
        w.unfinished_estimate = (w.unfinished_estimate - estimate).max(0.0);
        w.finished_cost += cost;
        self.finished_estimate += estimate;
        self.finished_cost += cost;
        self.counts.completed += 1;
        true
    }

    fn oldest_unfinished(&self) -> Option<u64> {
        let waiting = self.window_by_index.first_key_value().map(|(&index, _)| index);
        let working = self.outstanding.first_key_value().map(|(&index, _)| index);
        waiting.into_iter().chain(working).min()
    }

    /// Records that the worker would take: free slots, and some to wait.
    fn wanted(&self, worker: usize, outlook: &Outlook) -> usize {
        let w = &self.workers[worker];
        let in_flight = w.assigned_records.saturating_sub(w.received_records) as usize;
        let held = w.load.running + w.load.waiting + in_flight;
        let half_of_share = (outlook.share(worker) * self.window.len() as f64 / 2.0) as usize;
        let ahead = half_of_share.clamp(1, w.load.slots.max(2));
        // Ask only at the low-water mark, so that blocks are not single records all the time.
        if held < w.load.slots + ahead.div_ceil(2) { w.load.slots + ahead - held } else { 0 }
    }

    /// Real cost for one of estimate, among the finished records.
    fn ratio(&self) -> f64 {
        const FEW: u64 = 16;
        if self.counts.completed < FEW || self.finished_cost <= 0.0 {
            return 1.0;
        }
        self.finished_cost / self.finished_estimate
    }

    fn outlook(&self, now_seconds: f64) -> Outlook {
        let known: Vec<f64> = self.workers.iter().filter_map(|w| w.speed.known()).collect();
        // Before a worker's speed is known it counts as one of the others.
        let usual =
            if known.is_empty() { 1.0 } else { known.iter().sum::<f64>() / known.len() as f64 };
        let ratio = self.ratio();
        let outlooks = self.workers.iter().map(|w| {
            let rate = w.speed.known().unwrap_or(usual);
            let expected = w.unfinished_estimate * ratio;
            let begun = (w.load.processed_cost - w.finished_cost).max(0.0);
            let reported = (expected - begun).max(expected / 4.0);
            // A worker that has not reported for long may be slow: do not count it idle.
            let since = rate * (now_seconds - w.reported_seconds).max(0.0);
            let remaining =
                reported - if known.is_empty() { 0.0 } else { since.min(reported / 2.0) };
            WorkerOutlook { rate, remaining, slots: w.load.slots }
        });
        Outlook::new(outlooks.collect(), self.window_cost * ratio, ratio)
    }

    /// The record that `worker` takes next, after `taken_cost` in this block.
    fn pick(&self, worker: usize, outlook: &Outlook, taken_cost: f64) -> Option<Key> {
        let (&oldest, &oldest_key) = self.window_by_index.first_key_value()?;
        if self.next_index - oldest > self.config.patience {
            return Some(oldest_key);
        }
        let (&longest, _) = self.window.last_key_value()?;
        // Somebody must go on, whatever the predictions say.
        if self.outstanding.is_empty()
            || outlook.accepts(worker, taken_cost, key_cost(longest) * outlook.ratio)
        {
            return Some(longest);
        }
        let fits = outlook.fits(worker, taken_cost) / outlook.ratio;
        self.window.range(..=key(fits.max(0.0), 0)).next_back().map(|(&key, _)| key)
    }
}

fn body_bytes(record: &RawRecord) -> usize {
    const OVERHEAD: usize = 128;
    OVERHEAD
        + match &record.body {
            RawBody::Text(bytes) | RawBody::Json(bytes) => bytes.len(),
            RawBody::Bad { message, .. } => message.len(),
        }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::ledger::IndexSet;

    use super::*;

    fn record(index: u64) -> RawRecord {
        RawRecord { index, line: index + 1, body: RawBody::Text(b"x".to_vec()) }
    }

    fn idle(slots: usize) -> Load {
        Load { slots, ..Load::default() }
    }

    fn indices(reply: Reply) -> Vec<u64> {
        match reply {
            Reply::Block(records) => records.iter().map(|r| r.index).collect(),
            other => panic!("expected a block, got {other:?}"),
        }
    }

    #[test]
    fn longest_first_and_oldest_among_equals() {
        let mut handout = Handout::new(HandoutConfig::default(), 1);
        for (index, cost) in [1.0, 9.0, 5.0, 9.0].into_iter().enumerate() {
            handout.feed(record(index as u64), cost);
        }
        handout.end_of_input();
        assert_eq!(indices(handout.ask(0, idle(8), 0, 0.0)), [1, 3, 2, 0]);
        assert_eq!(handout.next_block(0, 0.0), Reply::Done);
        assert!(!handout.complete());
        assert!((0..4).all(|index| handout.completed(index, 1.0)));
        assert!(!handout.completed(3, 1.0), "a second completion is not counted");
        assert!(handout.complete());
    }

    #[test]
    fn the_first_to_ask_leaves_the_others_their_share() {
        let mut handout = Handout::new(HandoutConfig::default(), 4);
        (0..40).for_each(|index| handout.feed(record(index), 3.0));
        handout.end_of_input();
        let mut total = 0;
        for worker in 0..4 {
            let block = indices(handout.ask(worker, idle(64), 0, 0.0));
            assert!((8..=12).contains(&block.len()), "worker {worker}: {}", block.len());
            total += block.len();
        }
        assert_eq!(total, 40);
    }

    #[test]
    fn withdrawn_records_are_not_handed_out() {
        let mut handout = Handout::new(HandoutConfig::default(), 1);
        (0..8).for_each(|index| handout.feed(record(index), 1.0));
        assert_eq!(indices(handout.ask(0, idle(1), 0, 0.0)), [0, 1, 2]);
        assert_eq!((handout.in_window(0..4), handout.in_window(4..8)), (1, 4));
        handout.withdraw(2..6);
        handout.end_of_input();
        assert_eq!(indices(handout.ask(0, idle(8), 3, 0.0)), [6, 7]);
        assert_eq!(handout.counts().read, 5);
        for index in [0, 1, 2, 6, 7] {
            handout.completed(index, 1.0);
        }
        assert!(handout.complete());
    }

    #[test]
    fn the_horizon_holds_back_the_reader_until_the_oldest_is_finished() {
        let config = HandoutConfig { horizon: 3, ..HandoutConfig::default() };
        let mut handout = Handout::new(config, 1);
        let mut next = 0;
        while handout.wants_more() {
            handout.feed(record(next), 1.0);
            next += 1;
        }
        assert_eq!(next, 4, "indices 0..=3 are within 3 of the oldest");
        assert_eq!(indices(handout.ask(0, idle(8), 0, 0.0)), [0, 1, 2, 3]);
        handout.completed(2, 1.0);
        assert!(!handout.wants_more());
        handout.completed(0, 1.0);
        assert!(handout.wants_more());
    }

    #[test]
    fn short_records_are_not_passed_over_for_ever() {
        let config = HandoutConfig { patience: 10, ..HandoutConfig::default() };
        let mut handout = Handout::new(config, 1);
        handout.feed(record(0), 1.0);
        (1..20).for_each(|index| handout.feed(record(index), 9.0));
        assert_eq!(indices(handout.ask(0, idle(2), 0, 0.0))[0], 0);
    }

    #[test]
    fn a_block_under_way_is_not_asked_for_again() {
        let mut handout = Handout::new(HandoutConfig::default(), 1);
        (0..100).for_each(|index| handout.feed(record(index), 1.0));
        let first = indices(handout.ask(0, idle(4), 0, 0.0));
        assert_eq!(first.len(), 8);
        assert_eq!(handout.ask(0, idle(4), 0, 0.1), Reply::Wait);
        let load = Load { running: 4, waiting: 1, ..idle(4) };
        assert_eq!(indices(handout.ask(0, load, 8, 0.2)).len(), 3);
    }

    #[test]
    fn a_drain_ends_the_handout_at_once() {
        let mut handout = Handout::new(HandoutConfig::default(), 1);
        handout.feed(record(0), 1.0);
        handout.stop();
        assert_eq!(handout.ask(0, idle(1), 0, 0.0), Reply::Done);
        assert!(!handout.wants_more() && !handout.complete());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Whatever the order of asks, speeds and completions: each record goes out exactly
        /// once, never beyond the horizon or the window, and the run always comes to its end.
        #[test]
        fn every_record_is_handed_out_exactly_once(
            costs in prop::collection::vec(0.0f64..1000.0, 1..200),
            choices in prop::collection::vec((0usize..5, any::<bool>(), 0usize..9), 1..64),
            window_records in 1usize..64,
            horizon in 0u64..64,
        ) {
            let config = HandoutConfig {
                window_records, horizon, patience: horizon / 2, ..HandoutConfig::default()
            };
            let mut handout = Handout::new(config, 5);
            let mut held: Vec<Vec<u64>> = vec![Vec::new(); 5];
            let (mut received, mut processed) = ([0u64; 5], [0.0f64; 5]);
            let (mut fed, mut seen) = (0u64, IndexSet::new());
            let mut now = 0.0;
            for (worker, finish, slots) in choices.iter().cycle().take(40_000).copied() {
                while handout.wants_more() && (fed as usize) < costs.len() {
                    handout.feed(record(fed), costs[fed as usize]);
                    fed += 1;
                }
                if fed as usize == costs.len() {
                    handout.end_of_input();
                }
                prop_assert!(handout.counts().in_window as usize <= window_records);
                if finish && let Some(index) = held[worker].pop() {
                    processed[worker] += costs[index as usize];
                    prop_assert!(handout.completed(index, costs[index as usize] / 2.0));
                }
                let slots = slots + 1;
                let running = held[worker].len().min(slots);
                let waiting = held[worker].len() - running;
                let load = Load { slots, running, waiting, processed_cost: processed[worker] };
                now += 0.01;
                if let Reply::Block(block) = handout.ask(worker, load, received[worker], now) {
                    for record in block {
                        prop_assert!(seen.insert(record.index));
                        let oldest = handout.oldest_unfinished().unwrap_or(u64::MAX);
                        prop_assert!(record.index.saturating_sub(oldest) <= horizon);
                        held[worker].push(record.index);
                        received[worker] += 1;
                    }
                }
                if handout.complete() {
                    break;
                }
                // Workers that the choices never name still have to finish.
                now += 0.01;
                let other = (now * 100.0) as usize % 5;
                if let Some(index) = held[other].pop() {
                    handout.completed(index, costs[index as usize]);
                }
                let load = Load { slots: 2, ..Load::default() };
                if held[other].is_empty()
                    && let Reply::Block(block) = handout.ask(other, load, received[other], now)
                {
                    for record in block {
                        prop_assert!(seen.insert(record.index));
                        held[other].push(record.index);
                        received[other] += 1;
                    }
                }
            }
            prop_assert!(handout.complete());
            prop_assert_eq!(seen.len(), costs.len() as u64);
        }
    }
}
