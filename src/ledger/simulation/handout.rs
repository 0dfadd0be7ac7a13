//! The hand-out driven in virtual time by simulated workers with continuous batching:
//! what it is worth against a static split, for heavy-tailed records and a slow rank.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::super::{Handout, HandoutConfig, Load, Reply};
use super::Random;
use crate::prompts::{RawBody, RawRecord};

/// A rank: every step gives each running sequence a token and takes
/// `slowness × (1 + 0.05 × running)` milliseconds (decode reads the weights once a step).
#[derive(Default)]
struct Rank {
    slowness: f64,
    waiting: VecDeque<u64>,
    running: Vec<(u64, u32)>,
    inbox: Vec<u64>,
    report: Option<(Load, u64)>,
    finished: Vec<u64>,
    received: u64,
    processed: f64,
    step_end_seconds: f64,
    last_busy_seconds: f64,
}

struct Outcome {
    makespan_seconds: f64,
    /// The largest share of the run that a rank stood idle at the end.
    idle_tail: f64,
}

struct Simulation {
    lengths: Vec<u32>,
    /// What the hand-out is told of each length.
    estimates: Vec<f64>,
    slots: usize,
    slowness: Vec<f64>,
}

impl Simulation {
    fn new(seed: u64, records: usize, slots: usize, slowness: Vec<f64>) -> Self {
        let mut random = Random(seed);
        let lengths: Vec<u32> = (0..records).map(|_| random.pareto_tokens(8.0, 512.0)).collect();
        let estimates = lengths.iter().map(|&tokens| f64::from(tokens)).collect();
        Self { lengths, estimates, slots, slowness }
    }

    /// Seconds if every rank were full until one common end.
    fn ideal_seconds(&self) -> f64 {
        let tokens: f64 = self.lengths.iter().map(|&tokens| f64::from(tokens)).sum();
        let step = 0.001 * (1.0 + 0.05 * self.slots as f64);
        let rates = self.slowness.iter().map(|slowness| self.slots as f64 / (step * slowness));
        tokens / rates.sum::<f64>()
    }

    fn ranks(&self) -> Vec<Rank> {
        self.slowness.iter().map(|&slowness| Rank { slowness, ..Rank::default() }).collect()
    }

    /// Ends the rank's step: tokens, finished records, new sequences, the next step's end.
    fn step(&self, rank: &mut Rank) {
        if !rank.running.is_empty() {
            rank.last_busy_seconds = rank.step_end_seconds;
            rank.processed += rank.running.len() as f64;
        }
        rank.running.iter_mut().for_each(|(_, left)| *left -= 1);
        let ended = rank.running.extract_if(.., |(_, left)| *left == 0);
        rank.finished.extend(ended.map(|(index, _)| index));
        rank.received += rank.inbox.len() as u64;
        rank.waiting.extend(rank.inbox.drain(..));
        while rank.running.len() < self.slots {
            let Some(index) = rank.waiting.pop_front() else { break };
            rank.running.push((index, self.lengths[index as usize]));
        }
        let load = Load {
            slots: self.slots,
            running: rank.running.len(),
            waiting: rank.waiting.len(),
            processed_cost: rank.processed,
        };
        rank.report = Some((load, rank.received));
        rank.step_end_seconds += rank.slowness * 0.001 * (1.0 + 0.05 * load.running as f64);
    }

    fn outcome(&self, ranks: &[Rank]) -> Outcome {
        let ends = ranks.iter().map(|rank| rank.last_busy_seconds);
        let makespan_seconds = ends.clone().fold(0.0, f64::max);
        let first = ends.fold(makespan_seconds, f64::min);
        Outcome { makespan_seconds, idle_tail: (makespan_seconds - first) / makespan_seconds }
    }

    /// Each rank ends its steps in its own time; rank 0 serves messages between its own.
    fn run(&self) -> Outcome {
        let mut ranks = self.ranks();
        let config = HandoutConfig::for_workers(ranks.len());
        let mut handout = Handout::new(config, ranks.len());
        let mut next = 0;
        let mut turns: BinaryHeap<_> = (0..ranks.len()).map(|rank| Reverse((0, rank))).collect();
        while !handout.complete()
            && let Some(Reverse((at, turn))) = turns.pop()
        {
            let now = f64::from_bits(at);
            self.step(&mut ranks[turn]);
            if turn == 0 {
                while next < self.lengths.len() && handout.wants_more() {
                    handout.feed(raw(next as u64), self.estimates[next]);
                    next += 1;
                }
                if next == self.lengths.len() {
                    handout.end_of_input();
                }
                self.serve(&mut handout, &mut ranks, now);
            }
            // Positive numbers are ordered as their bits are.
            turns.push(Reverse((ranks[turn].step_end_seconds.to_bits(), turn)));
        }
        self.outcome(&ranks)
    }

    fn serve(&self, handout: &mut Handout, ranks: &mut [Rank], now: f64) {
        for (worker, rank) in ranks.iter_mut().enumerate() {
            for index in rank.finished.drain(..) {
                assert!(handout.completed(index, f64::from(self.lengths[index as usize])));
            }
            if let Some((load, received)) = rank.report.take() {
                handout.report(worker, load, received, now);
            }
        }
        for (worker, rank) in ranks.iter_mut().enumerate() {
            while let Reply::Block(block) = handout.next_block(worker, now) {
                rank.inbox.extend(block.iter().map(|record| record.index));
            }
        }
    }

    /// The split that asks nobody: rank r has every n-th record.
    fn run_static(&self) -> Outcome {
        let mut ranks = self.ranks();
        for index in 0..self.lengths.len() {
            let owner = index % ranks.len();
            ranks[owner].waiting.push_back(index as u64);
        }
        for rank in &mut ranks {
            while {
                self.step(rank);
                !rank.running.is_empty()
            } {}
        }
        self.outcome(&ranks)
    }
}

fn raw(index: u64) -> RawRecord {
    RawRecord { index, line: index + 1, body: RawBody::Text(Vec::new()) }
}

fn slowed(ranks: usize, factor: f64) -> Vec<f64> {
    (0..ranks).map(|rank| if rank + 1 == ranks { factor } else { 1.0 }).collect()
}

fn show(name: &str, simulation: &Simulation) -> (Outcome, Outcome) {
    let (handout, fixed) = (simulation.run(), simulation.run_static());
    println!(
        "{name}: ideal {:.2} s, hand-out {:.2} s (idle tail {:.1}%), static {:.2} s ({:.1}%)",
        simulation.ideal_seconds(),
        handout.makespan_seconds,
        100.0 * handout.idle_tail,
        fixed.makespan_seconds,
        100.0 * fixed.idle_tail,
    );
    (handout, fixed)
}

/// The promise to users: two ranks, one of them 3× slower, heavy tails, idle tail under 5%.
#[test]
fn two_ranks_end_together_though_one_is_slow() {
    for seed in 0..8 {
        for slots in [1, 8, 32] {
            for factor in [1.0, 3.0] {
                let simulation = Simulation::new(seed, 2000, slots, slowed(2, factor));
                let name = format!("2 ranks, seed {seed}, {slots} slots, slow ×{factor}");
                let (handout, fixed) = show(&name, &simulation);
                assert!(handout.idle_tail < 0.05, "{name}: {}", handout.idle_tail);
                let ideal = simulation.ideal_seconds();
                assert!(handout.makespan_seconds < 1.06 * ideal, "{name}: ideal {ideal}");
                assert!(handout.makespan_seconds <= 1.005 * fixed.makespan_seconds, "{name}");
            }
        }
    }
}

/// The same with more ranks, up to 64, and with a file of several windows.
#[test]
fn many_ranks_stay_near_the_ideal() {
    for (ranks, records) in [(3, 3000), (8, 20_000), (64, 64_000)] {
        let simulation = Simulation::new(ranks as u64, records, 16, slowed(ranks, 3.0));
        let name = format!("{ranks} ranks");
        let (handout, fixed) = show(&name, &simulation);
        let ideal = simulation.ideal_seconds();
        assert!(handout.makespan_seconds < 1.08 * ideal, "{name}");
        assert!(handout.makespan_seconds < fixed.makespan_seconds, "{name}");
    }
}

/// Lengths that nobody knows beforehand (an early end of sequence): all records look alike.
#[test]
fn unknown_lengths_still_beat_the_static_split() {
    let mut simulation = Simulation::new(5, 4000, 16, slowed(4, 3.0));
    simulation.estimates.fill(512.0);
    let (handout, fixed) = show("unknown lengths", &simulation);
    assert!(handout.makespan_seconds < 0.7 * fixed.makespan_seconds);
    assert!(handout.makespan_seconds < 1.15 * simulation.ideal_seconds());
}

/// The table of docs/PERFORMANCE.md: records per rank as given, 16 slots, no rank slow or the
/// last one 3 × slower, lengths known beforehand or not.
fn table(sizes: &[usize], records_per_rank: usize) {
    println!(
        "| ranks | records | slow rank | lengths | hand-out / ideal | idle tail | static / ideal | idle tail |"
    );
    println!("|---:|---:|---|---|---:|---:|---:|---:|");
    for &ranks in sizes {
        for factor in [1.0, 3.0] {
            for known in [true, false] {
                let records = ranks * records_per_rank;
                let slowness = slowed(ranks, factor);
                let mut simulation = Simulation::new(ranks as u64, records, 16, slowness);
                if !known {
                    simulation.estimates.fill(512.0);
                }
                let (handout, fixed) = (simulation.run(), simulation.run_static());
                let ideal = simulation.ideal_seconds();
                println!(
                    "| {ranks} | {records} | {} | {} | {:.2} | {:.1} % | {:.2} | {:.1} % |",
                    if factor > 1.0 { "3 ×" } else { "none" },
                    if known { "known" } else { "unknown" },
                    handout.makespan_seconds / ideal,
                    100.0 * handout.idle_tail,
                    fixed.makespan_seconds / ideal,
                    100.0 * fixed.idle_tail,
                );
                let name = format!("{ranks} ranks, slow × {factor}, known: {known}");
                assert!(handout.makespan_seconds < 1.5 * ideal, "{name}");
                assert!(handout.makespan_seconds < fixed.makespan_seconds, "{name}");
            }
        }
    }
}

/// The cheap end of the table, always on.
#[test]
fn a_few_ranks_beat_the_static_split() {
    table(&[8], 500);
}

/// The whole of it.
#[test]
#[ignore = "prints the table of docs/PERFORMANCE.md; takes minutes"]
fn the_table_of_the_documentation() {
    table(&[8, 64, 512, 1000], 1000);
}
