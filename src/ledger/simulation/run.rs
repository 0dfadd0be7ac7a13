//! Several launches on one run, with what goes wrong on a cluster: an MPI job is killed
//! anywhere, in a write to the claims or to the journal too, a node loses its power, a drain,
//! late joiners, launches that stand still or whose heartbeats do not get through, a file
//! system that shows things late, messages that take their time.
//!
//! Checked all along and at the end: everything ends in bounded time; a record is begun again
//! only if it was in work at a death, or at a drain, and then it goes on from its saved tokens;
//! each is journalled once; the output holds all of them, rightly; a merge is done once and
//! nobody is complete without one. Where a launch stood still for longer than the timeout,
//! records may be done twice.
//!
//! One event is one turn of a rank, in which no time passes: what other launches do between two
//! file operations of one turn is left out, and so is that the ranks of an MPI job do not die at
//! one instant.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::claims::sim_store::{Crash, SimDeaths, SimDisk, SimStore};
use super::super::claims::{
    ClaimStore, Claims, ClaimsConfig, JobRef, Owner, OwnerFile, OwnerProgress, ProcessId, Standing,
};
use super::super::dealer::Dealer;
use super::super::journal::frame::{self, Kind};
use super::super::protocol::{Order, TAG_TO_COORDINATOR, TAG_TO_WORKER, Update};
use super::super::{
    Feed, FeedConfig, Finished, Handout, HandoutConfig, JournalIndex, LinkState, Load, RecordId,
    RemoteLink, Source, Task, WorkerLink,
};
use super::Random;
use super::journals::{FileId, JournalDisk, RUN_KEY, SimJournals};
use super::network::SimComm;
use crate::Result;
use crate::comm::Communicator;
use crate::prompts::{RawBody, RawRecord};

/// As farm's, twelve times faster, so that a run of many deaths is over soon.
const CLAIMS: ClaimsConfig =
    ClaimsConfig { heartbeat_seconds: 0.5, heartbeat_timeout_seconds: 10.0 };
/// So late, others may have thought a launch gone (half of the timeout, as in `Membership`).
const LATE_SECONDS: f64 = CLAIMS.heartbeat_timeout_seconds / 2.0;
/// The coordinator looks after other launches this often.
const SHARE_SECONDS: f64 = 1.0;

/// How large a run is.
#[derive(Debug, Clone, Copy)]
struct Size {
    launches: (u64, u64),
    ranks: (u64, u64),
    records: (u64, u64),
}

const SMALL: Size = Size { launches: (2, 6), ranks: (1, 8), records: (20, 200) };

/// What becomes of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    /// It works until nothing is left.
    Lives,
    /// All its ranks die then; a node that loses its power loses what is not synced.
    Killed { at_seconds: f64, power_loss: bool },
    /// It dies of one of its writes to the claims.
    DiesOfWrite { writes: u32, how: Crash },
    /// A rank is asked to stop.
    Drains { at_seconds: f64, rank: usize },
    /// All its ranks stand still.
    Suspended { at_seconds: f64, seconds: f64 },
    /// Only its heartbeats do not get through.
    Silent { at_seconds: f64, seconds: f64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Start,
    Turn(usize),
    Beat,
    Fate,
    Close,
    Merge,
    Written,
}

/// A sequence of a rank's batch.
struct Running {
    id: RecordId,
    tokens: u32,
}

struct Rank {
    /// `None` at rank 0.
    link: Option<RemoteLink>,
    waiting: VecDeque<Task>,
    running: Vec<Running>,
    processed: f64,
    step_seconds: f64,
    slots: usize,
    /// Frames of this turn.
    buffer: Vec<u8>,
    next_turn_seconds: f64,
    asked_to_stop: bool,
    left: bool,
}

impl Rank {
    fn new(comm: &SimComm, slots: usize, random: &mut Random) -> Self {
        Self {
            link: (comm.rank() > 0).then(|| RemoteLink::new(Arc::new(comm.clone()))),
            waiting: VecDeque::new(),
            running: Vec::new(),
            processed: 0.0,
            step_seconds: random.between(0.05, 0.5),
            slots,
            buffer: Vec::new(),
            next_turn_seconds: 0.0,
            asked_to_stop: false,
            left: false,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Working,
    Closing,
    Merging,
    Complete,
    Drained,
    Dead,
}

struct Launch {
    fate: Fate,
    phase: Phase,
    no_wait: bool,
    claims_client: usize,
    beat_store: SimStore,
    owner: Owner,
    file: OwnerFile,
    dealer: Dealer,
    comms: Vec<SimComm>,
    ranks: Vec<Rank>,
    local_received: u64,
    shared_seconds: f64,
    last_beat_seconds: f64,
    longest_gap_seconds: f64,
    silent_until: f64,
    suspended_until: f64,
    merge: u32,
}

impl Launch {
    fn id(&self) -> u32 {
        self.file.launch
    }

    fn is_at_work(&self) -> bool {
        matches!(self.phase, Phase::Working | Phase::Closing | Phase::Merging)
    }

    /// As `Membership::was_late`.
    fn was_late(&mut self, now_seconds: f64) -> bool {
        let gap = self.longest_gap_seconds.max(now_seconds - self.last_beat_seconds);
        self.longest_gap_seconds = 0.0;
        gap > LATE_SECONDS
    }
}

/// What was found out at the end of a run.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    deaths: u64,
    drains: u64,
    suspended_long: u64,
    begun_again: u64,
    continued: u64,
    duplicates: u64,
    blocks: u64,
    block_claims: u64,
    turns: u64,
    seconds: f64,
}

struct World {
    trace: bool,
    random: Random,
    now_seconds: f64,
    claims: SimDisk,
    deaths: SimDeaths,
    journals: JournalDisk,
    has_slurm: bool,
    message_seconds: f64,
    claim_records: u64,
    /// Tokens of each record.
    lengths: Vec<u32>,
    launches: Vec<Option<Launch>>,
    starts: Vec<(Fate, usize)>,
    events: BinaryHeap<Reverse<(u64, u64, usize, Event)>>,
    /// Who began a record last: the place in `launches`.
    begun: BTreeMap<u64, usize>,
    /// Tokens that are saved for good.
    saved: BTreeMap<u64, u32>,
    /// A launch stood still for so long that others may have thought it gone.
    tainted: bool,
    merged: BTreeMap<String, u32>,
    output: Option<u64>,
    seen: Seen,
    broken: Option<String>,
}

fn line(index: u64) -> Vec<u8> {
    format!("{{\"index\":{index},\"text\":{}}}", index.wrapping_mul(2_654_435_761)).into_bytes()
}

fn source(records: u64) -> Source {
    Box::new((0..records).map(|index| {
        let body = RawBody::Text(index.to_le_bytes().to_vec());
        Ok(RawRecord { index, line: index + 1, body })
    }))
}

impl World {
    fn new(seed: u64, size: Size, trace: bool) -> Self {
        let mut random = Random(seed);
        let records = random.count(size.records.0, size.records.1);
        let stale_seconds = if random.chance(0.5) { 0.0 } else { random.between(0.0, 2.0) };
        let mut world = Self {
            trace,
            now_seconds: 0.0,
            claims: SimDisk::new(seed, stale_seconds),
            deaths: SimDeaths::default(),
            journals: JournalDisk::new(seed, stale_seconds),
            has_slurm: random.chance(0.5),
            message_seconds: random.between(0.001, 0.5),
            claim_records: random.count(1, 24),
            lengths: (0..records).map(|_| random.pareto_tokens(2.0, 60.0)).collect(),
            launches: Vec::new(),
            starts: Vec::new(),
            events: BinaryHeap::new(),
            begun: BTreeMap::new(),
            saved: BTreeMap::new(),
            tainted: false,
            merged: BTreeMap::new(),
            output: None,
            seen: Seen::default(),
            broken: None,
            random,
        };
        // Long suspensions allow what is else forbidden, so most runs are without.
        let may_suspend = world.random.chance(0.3);
        for _ in 0..world.random.count(size.launches.0, size.launches.1) {
            let at_seconds =
                if world.random.chance(0.5) { 0.0 } else { world.random.between(0.0, 15.0) };
            let ranks = world.random.count(size.ranks.0, size.ranks.1) as usize;
            let fate = world.fate(at_seconds, ranks, may_suspend);
            world.start(at_seconds, fate, ranks);
        }
        world
    }

    fn fate(&mut self, start_seconds: f64, ranks: usize, may_suspend: bool) -> Fate {
        let random = &mut self.random;
        let at_seconds = start_seconds + random.between(0.0, 15.0);
        match random.count(0, 9) {
            0..3 => Fate::Lives,
            3..5 => Fate::Killed { at_seconds, power_loss: random.chance(0.4) },
            5 => {
                let hows = [Crash::BeforeLink, Crash::Torn, Crash::AfterLink];
                let how = hows[random.count(0, 2) as usize];
                Fate::DiesOfWrite { writes: random.count(0, 12) as u32, how }
            }
            6..8 => Fate::Drains { at_seconds, rank: random.count(0, ranks as u64 - 1) as usize },
            which => {
                let long = may_suspend && random.chance(0.7);
                let seconds =
                    if long { random.between(10.0, 40.0) } else { random.between(0.5, 6.0) };
                match which {
                    8 => Fate::Suspended { at_seconds, seconds },
                    _ => Fate::Silent { at_seconds, seconds },
                }
            }
        }
    }

    fn start(&mut self, at_seconds: f64, fate: Fate, ranks: usize) {
        let launch = self.launches.len();
        self.launches.push(None);
        self.starts.push((fate, ranks));
        self.at(at_seconds, launch, Event::Start);
    }

    fn at(&mut self, seconds: f64, launch: usize, event: Event) {
        // Positive numbers are ordered as their bits are; events of one moment come in any order.
        let tie = self.random.bits();
        self.events.push(Reverse((seconds.to_bits(), tie, launch, event)));
    }

    fn tell(&self, launch: usize, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:9.3} s  launch at place {launch}: {}", self.now_seconds, what());
        }
    }

    fn breaks(&mut self, what: String) {
        self.tell(usize::MAX, || format!("BROKEN: {what}"));
        self.broken.get_or_insert(what);
    }

    /// To the end; what is wrong, if anything.
    fn run(mut self) -> std::result::Result<Seen, String> {
        let tokens: u32 = self.lengths.iter().sum();
        // All deaths, then one launch of one rank and one slot with the slowest steps.
        let end_seconds = 200.0 + 20.0 * self.starts.len() as f64 + f64::from(tokens) * 0.6;
        loop {
            while let Some(Reverse((at, _, launch, event))) = self.events.pop() {
                let at = f64::from_bits(at);
                if at > end_seconds {
                    return Err(format!("it goes on after {end_seconds} s"));
                }
                self.now_seconds = self.now_seconds.max(at);
                self.claims.advance_to(self.now_seconds);
                self.journals.advance_to(self.now_seconds);
                self.happens(launch, event, at);
                if let Some(broken) = self.broken.take() {
                    return Err(broken);
                }
            }
            if self.launches.iter().flatten().any(|launch| launch.phase == Phase::Complete) {
                break;
            }
            // The same command once more.
            let ranks = self.random.count(1, 4) as usize;
            self.tell(self.launches.len(), || "the same command once more".into());
            self.start(self.now_seconds + 1.0, Fate::Lives, ranks);
        }
        self.judge()
    }

    fn judge(mut self) -> std::result::Result<Seen, String> {
        for (place, launch) in self.launches.iter().enumerate() {
            let Some(launch) = launch else { continue };
            let may_stop = matches!(launch.fate, Fate::Drains { .. }) || launch.no_wait;
            let ended = match launch.phase {
                Phase::Complete | Phase::Dead => true,
                Phase::Drained => may_stop,
                _ => false,
            };
            if !ended {
                return Err(format!("launch at place {place} ended as {:?}", launch.phase));
            }
        }
        let finished = self.journals.finished();
        for index in 0..self.lengths.len() as u64 {
            match finished.get(&index) {
                Some(1) => {}
                Some(times) if self.tainted => self.seen.duplicates += times - 1,
                times => return Err(format!("record {index} is journalled {times:?} times")),
            }
        }
        if self.output != Some(self.lengths.len() as u64) {
            return Err("there is no output".into());
        }
        self.seen.seconds = self.now_seconds;
        self.seen.blocks = (self.lengths.len() as u64).div_ceil(self.claim_records);
        let claims = self.claims.contents();
        self.seen.block_claims =
            claims.keys().filter(|name| name.starts_with("block-")).count() as u64;
        Ok(self.seen)
    }

    fn happens(&mut self, place: usize, event: Event, at: f64) {
        if event == Event::Start {
            return self.join(place);
        }
        let Some(mut launch) = self.launches[place].take() else { return };
        if launch.is_at_work() {
            if launch.suspended_until > self.now_seconds {
                // It goes on in any order.
                let again = launch.suspended_until + self.random.between(0.0, 0.5);
                if let Event::Turn(rank) = event {
                    launch.ranks[rank].next_turn_seconds = again;
                }
                self.at(again, place, event);
            } else if let Err(error) = self.step(place, &mut launch, event, at) {
                if self.claims.is_dead(launch.claims_client) {
                    self.kill(place, &mut launch, false);
                } else {
                    self.breaks(format!("launch at place {place}: {error}"));
                }
            }
        }
        self.launches[place] = Some(launch);
    }

    fn step(&mut self, place: usize, launch: &mut Launch, event: Event, at: f64) -> Result<()> {
        match event {
            Event::Start => Ok(()),
            Event::Turn(rank) if launch.ranks[rank].next_turn_seconds != at => Ok(()),
            Event::Turn(_) if launch.phase != Phase::Working => Ok(()),
            Event::Turn(rank) => self.turn(place, launch, rank),
            Event::Beat => self.beat(place, launch),
            Event::Fate => {
                self.meets_its_fate(place, launch);
                Ok(())
            }
            Event::Close => self.close(place, launch),
            Event::Merge => self.merge(place, launch),
            Event::Written => self.written(place, launch),
        }
    }

    /// As `Membership::join` and what follows it in `farm generate`.
    fn join(&mut self, place: usize) {
        let (fate, ranks) = self.starts[place];
        let host = format!("host-{}", self.random.count(0, 2));
        let owner = self.owner(place, &host);
        let store = self.claims.client();
        let claims_client = store.client;
        if let Fate::DiesOfWrite { writes, how } = fate {
            self.claims.crash(claims_client, writes, how);
        }
        let evidence = Box::new(self.deaths.evidence(&host, self.has_slurm));
        let now_seconds = self.now_seconds;
        let joined = Claims::join(Box::new(store), evidence, owner.clone(), CLAIMS, now_seconds)
            .and_then(|mut claims| Ok((first_merge(&mut claims)?, claims)));
        let (merge, claims) = match joined {
            Ok(joined) => joined,
            Err(error) => {
                self.tell(place, || format!("does not even join: {error}"));
                if !self.claims.is_dead(claims_client) {
                    self.breaks(format!("launch at place {place}: {error}"));
                }
                return;
            }
        };
        let file = claims.owner_file(&OwnerProgress::default()).unwrap();
        self.tell(place, || {
            format!("is number {} with {ranks} ranks on {host}: {fate:?}", file.launch)
        });
        let slots = self.random.count(1, 4) as usize;
        let no_wait = self.random.chance(0.1);
        let dealer = self.dealer(claims, ranks, slots, no_wait);
        let comms = SimComm::launch(self.random.bits(), ranks, self.message_seconds);
        let mut launch = Launch {
            fate,
            phase: Phase::Working,
            no_wait,
            claims_client,
            beat_store: self.claims.client(),
            owner,
            file,
            dealer,
            ranks: comms.iter().map(|comm| Rank::new(comm, slots, &mut self.random)).collect(),
            comms,
            local_received: 0,
            shared_seconds: 0.0,
            last_beat_seconds: now_seconds,
            longest_gap_seconds: 0.0,
            silent_until: 0.0,
            suspended_until: 0.0,
            merge,
        };
        for rank in 0..ranks {
            let first = now_seconds + self.random.between(0.0, 1.0);
            self.next_turn(place, &mut launch, rank, first);
        }
        self.at(now_seconds + CLAIMS.heartbeat_seconds, place, Event::Beat);
        match fate {
            Fate::Killed { at_seconds, .. }
            | Fate::Drains { at_seconds, .. }
            | Fate::Suspended { at_seconds, .. }
            | Fate::Silent { at_seconds, .. } => self.at(at_seconds, place, Event::Fate),
            Fate::Lives | Fate::DiesOfWrite { .. } => {}
        }
        self.launches[place] = Some(launch);
    }

    fn owner(&self, place: usize, host: &str) -> Owner {
        let process = ProcessId {
            host: host.into(),
            boot_id: "boot".into(),
            pid_namespace: None,
            pid: place as u32,
            pid_start: None,
        };
        let job = self.has_slurm.then(|| JobRef {
            job_id: place as u64,
            step_id: Some(0),
            ..JobRef::default()
        });
        Owner { process, job, facts: Value::Null }
    }

    fn dealer(&mut self, claims: Claims, ranks: usize, slots: usize, no_wait: bool) -> Dealer {
        let mut journals = SimJournals::new(self.journals.clone(), claims.launch());
        journals.refresh().unwrap();
        let config = FeedConfig {
            claim_records: self.claim_records,
            run_key: RUN_KEY.into(),
            retry: false,
            take_records: (2 * slots * ranks) as u64,
        };
        let records = self.lengths.len() as u64;
        let open = Box::new(move || Ok(source(records)));
        let feed = Feed::new(config, open, claims, Box::new(journals), None);
        let config = HandoutConfig { max_block_records: 8, ..HandoutConfig::for_workers(ranks) };
        let mut handout = Handout::new(config, ranks);
        handout.without_horizon();
        let (lengths, known) = (self.lengths.clone(), self.random.chance(0.5));
        let estimate = move |record: &RawRecord| {
            if known { f64::from(lengths[record.index as usize]) } else { 40.0 }
        };
        Dealer::new(handout, feed, Box::new(estimate), no_wait, ranks)
    }

    fn next_turn(&mut self, place: usize, launch: &mut Launch, rank: usize, seconds: f64) {
        launch.ranks[rank].next_turn_seconds = seconds;
        self.at(seconds, place, Event::Turn(rank));
    }

    fn meets_its_fate(&mut self, place: usize, launch: &mut Launch) {
        self.tell(place, || format!("{:?}", launch.fate));
        match launch.fate {
            Fate::Lives | Fate::DiesOfWrite { .. } => {}
            Fate::Killed { power_loss, .. } => self.kill(place, launch, power_loss),
            Fate::Drains { rank, .. } => {
                launch.ranks[rank].asked_to_stop = true;
                self.seen.drains += 1;
            }
            Fate::Suspended { seconds, .. } => {
                launch.suspended_until = self.now_seconds + seconds;
                self.silence(seconds);
            }
            Fate::Silent { seconds, .. } => {
                launch.silent_until = self.now_seconds + seconds;
                self.silence(seconds);
            }
        }
    }

    fn silence(&mut self, seconds: f64) {
        if seconds >= 10.0 {
            self.tainted = true;
            self.seen.suspended_long += 1;
        }
    }

    /// The MPI job ends as a whole, at once.
    fn kill(&mut self, place: usize, launch: &mut Launch, power_loss: bool) {
        self.tell(place, || format!("number {} is dead", launch.id()));
        self.seen.deaths += 1;
        launch.phase = Phase::Dead;
        self.claims.kill(launch.claims_client);
        self.claims.kill(launch.beat_store.client);
        if !power_loss {
            self.deaths.end_process(&launch.owner.process);
        }
        if let Some(job) = &launch.owner.job
            && self.random.chance(0.7)
        {
            self.deaths.end_step(job);
        }
        for (number, rank) in launch.ranks.iter_mut().enumerate().filter(|(_, rank)| !rank.left) {
            let mut last = Vec::new();
            if let Some(running) = rank.running.first()
                && self.random.chance(0.5)
            {
                let (id, seed) = (running.id, frame::run_seed(RUN_KEY));
                frame::encode(seed, Kind::Finished, id, &line(id.index), &mut last).unwrap();
            }
            let file = (launch.file.launch, number);
            self.journals.crash(file, &last, power_loss, &mut self.random);
        }
    }

    fn beat(&mut self, place: usize, launch: &mut Launch) -> Result<()> {
        if launch.silent_until > self.now_seconds {
            let again = launch.silent_until;
            self.at(again, place, Event::Beat);
            return Ok(());
        }
        let gap = self.now_seconds - launch.last_beat_seconds;
        launch.longest_gap_seconds = launch.longest_gap_seconds.max(gap);
        launch.last_beat_seconds = self.now_seconds;
        launch.beat_store.replace(&OwnerFile::name(launch.file.launch), &launch.file.to_bytes())?;
        self.at(self.now_seconds + CLAIMS.heartbeat_seconds, place, Event::Beat);
        Ok(())
    }

    /// One turn of a rank's loop, as in `farm generate`'s `Worker`.
    fn turn(&mut self, place: usize, launch: &mut Launch, number: usize) -> Result<()> {
        self.seen.turns += 1;
        launch.comms[0].advance_to(self.now_seconds);
        let asked = std::mem::take(&mut launch.ranks[number].asked_to_stop);
        if asked && state(launch, number) != LinkState::Stopped {
            match &mut launch.ranks[number].link {
                Some(link) => link.request_stop(),
                None => {
                    launch.dealer.handout.stop();
                    tell_state(launch);
                }
            }
        }
        let rank = &launch.ranks[number];
        let has_work = !rank.waiting.is_empty() || !rank.running.is_empty();
        let others = number == 0 && launch.dealer.others_working();
        let goes_on = match state(launch, number) {
            LinkState::Stopped => false,
            LinkState::Open => true,
            LinkState::Finished => has_work || others,
        };
        if !goes_on {
            self.leave_rank(place, launch, number);
        } else {
            self.work(place, launch, number)?;
        }
        self.wake(place, launch);
        Ok(())
    }

    /// Ranks that do nothing take their turn when a message comes.
    fn wake(&mut self, place: usize, launch: &mut Launch) {
        for (arrival, to) in launch.comms[0].take_arrivals() {
            let rank = &launch.ranks[to];
            let idle = rank.running.is_empty() && rank.waiting.is_empty() && !rank.left;
            if idle && arrival < rank.next_turn_seconds {
                let at = arrival.max(self.now_seconds);
                self.next_turn(place, launch, to, at);
            }
        }
    }

    fn work(&mut self, place: usize, launch: &mut Launch, number: usize) -> Result<()> {
        let rank = &launch.ranks[number];
        let load = Load {
            slots: rank.slots,
            running: rank.running.len(),
            waiting: rank.waiting.len(),
            processed_cost: rank.processed,
        };
        let now_seconds = self.now_seconds;
        let tasks = match &mut launch.ranks[number].link {
            Some(link) => link.poll(&load, now_seconds),
            None => self.coordinate(launch, &load)?,
        };
        for task in tasks {
            self.begins(place, launch, number, &task);
            let rank = &mut launch.ranks[number];
            let seed = frame::run_seed(RUN_KEY);
            frame::encode(seed, Kind::Started, task.id(RUN_KEY), &[], &mut rank.buffer)?;
            rank.waiting.push_back(task);
        }
        let rank = &mut launch.ranks[number];
        while rank.running.len() < rank.slots
            && let Some(task) = rank.waiting.pop_front()
        {
            let tokens = task.saved.as_ref().map_or(0, |saved| saved.len() as u32);
            rank.running.push(Running { id: task.id(RUN_KEY), tokens });
        }
        rank.running.iter_mut().for_each(|running| running.tokens += 1);
        rank.processed += rank.running.len() as f64;
        let lengths = &self.lengths;
        let done: Vec<_> = rank
            .running
            .extract_if(.., |running| running.tokens >= lengths[running.id.index as usize])
            .collect();
        for Running { id, .. } in &done {
            let seed = frame::run_seed(RUN_KEY);
            frame::encode(seed, Kind::Finished, *id, &line(id.index), &mut rank.buffer)?;
        }
        self.flush(launch.file.launch, &mut launch.ranks[number], number);
        let rank = &mut launch.ranks[number];
        let busy = !rank.running.is_empty() || !rank.waiting.is_empty() || !done.is_empty();
        for Running { id, tokens } in done {
            let (index, cost) = (id.index, f64::from(tokens));
            match &mut rank.link {
                Some(link) => link.submit(Finished {
                    index,
                    line: line(index),
                    is_error: false,
                    cost,
                    new_tokens: 1,
                }),
                None => launch.dealer.completed(index, cost),
            }
        }
        let pause = if busy { rank.step_seconds } else { 0.5 };
        let next = now_seconds + pause * self.random.between(0.9, 1.1);
        self.next_turn(place, launch, number, next);
        Ok(())
    }

    fn flush(&mut self, launch: u32, rank: &mut Rank, number: usize) {
        let sync = self.random.chance(0.1);
        self.journals.write((launch, number), &std::mem::take(&mut rank.buffer), sync);
    }

    /// Checks that a record may be begun.
    fn begins(&mut self, place: usize, launch: &Launch, number: usize, task: &Task) {
        let index = task.record.index;
        let saved = task.saved.as_ref().map_or(0, |saved| saved.len() as u32);
        self.tell(place, || format!("rank {number} begins record {index}, {saved} tokens saved"));
        let before = self.begun.insert(index, place);
        if self.tainted {
            return;
        }
        let known = self.saved.get(&index).copied().unwrap_or_default();
        if saved < known {
            self.breaks(format!("record {index} begins at {saved} tokens of {known} saved"));
        }
        let Some(before) = before else { return };
        self.seen.begun_again += 1;
        self.seen.continued += u64::from(saved > 0);
        let phase = self.launches[before].as_ref().map(|launch| launch.phase.clone());
        if before == place || !matches!(phase, Some(Phase::Dead | Phase::Drained | Phase::Closing))
        {
            self.breaks(format!(
                "launch at place {place} (number {}) begins record {index}, which that at place \
                 {before} has in work",
                launch.id()
            ));
        }
        if self.journals.finished().contains_key(&index) {
            self.breaks(format!("record {index} is begun again though it is journalled"));
        }
    }

    /// As `Coordinator::poll`.
    fn coordinate(&mut self, launch: &mut Launch, load: &Load) -> Result<Vec<Task>> {
        let now_seconds = self.now_seconds;
        receive(launch, now_seconds)?;
        launch.dealer.report(0, *load, launch.local_received, false, now_seconds);
        if now_seconds - launch.shared_seconds >= SHARE_SECONDS {
            launch.shared_seconds = now_seconds;
            let late = launch.was_late(now_seconds);
            launch.dealer.share_blocks(late, now_seconds)?;
        }
        launch.dealer.read_input(now_seconds)?;
        let mut local = Vec::new();
        for worker in 0..launch.ranks.len() {
            while let Some(block) = launch.dealer.next_block(worker, now_seconds)? {
                match worker {
                    0 => local.extend(block),
                    _ => {
                        launch.comms[0].send(worker, TAG_TO_WORKER, Order::Block(block).encode());
                    }
                }
            }
        }
        launch.local_received += local.len() as u64;
        tell_state(launch);
        Ok(local)
    }

    /// The end of a rank's loop: saves what is unfinished and says good-bye.
    fn leave_rank(&mut self, place: usize, launch: &mut Launch, number: usize) {
        self.tell(place, || format!("rank {number} leaves"));
        let rank = &mut launch.ranks[number];
        for Running { id, tokens } in rank.running.drain(..) {
            let generation = vec![b'x'; tokens as usize];
            let seed = frame::run_seed(RUN_KEY);
            frame::encode(seed, Kind::Saved, id, &generation, &mut rank.buffer).unwrap();
            let saved = self.saved.entry(id.index).or_default();
            *saved = tokens.max(*saved);
        }
        let file: FileId = (launch.file.launch, number);
        self.journals.write(file, &std::mem::take(&mut rank.buffer), true);
        self.journals.close(file);
        rank.left = true;
        rank.waiting.clear();
        match &mut rank.link {
            Some(link) => link.close().unwrap(),
            None => {
                if !launch.dealer.handout.exhausted() {
                    launch.dealer.handout.stop();
                }
                launch.phase = Phase::Closing;
                self.at(self.now_seconds, place, Event::Close);
            }
        }
    }

    /// As `Coordinator::close` and `Coordinator::finish`.
    fn close(&mut self, place: usize, launch: &mut Launch) -> Result<()> {
        launch.comms[0].advance_to(self.now_seconds);
        receive(launch, self.now_seconds)?;
        tell_state(launch);
        for rank in 1..launch.ranks.len() {
            if !launch.ranks[rank].left {
                self.close_turn(place, launch, rank)?;
            }
        }
        if launch.dealer.others_working() {
            self.at(self.now_seconds + 0.1, place, Event::Close);
        } else if launch.dealer.complete() {
            launch.phase = Phase::Merging;
            self.at(self.now_seconds, place, Event::Merge);
        } else {
            launch.phase = Phase::Drained;
            self.leave(place, launch)?;
        }
        Ok(())
    }

    /// Other ranks go on while rank 0 closes.
    fn close_turn(&mut self, place: usize, launch: &mut Launch, rank: usize) -> Result<()> {
        if launch.ranks[rank].next_turn_seconds <= self.now_seconds {
            self.turn(place, launch, rank)?;
        }
        Ok(())
    }

    fn leave(&mut self, place: usize, launch: &mut Launch) -> Result<()> {
        self.tell(place, || format!("number {} leaves: {:?}", launch.id(), launch.phase));
        launch.dealer.feed.claims_mut().leave("", &OwnerProgress::default())
    }

    /// As `Coordinator::merge`.
    fn merge(&mut self, place: usize, launch: &mut Launch) -> Result<()> {
        let name = merge_name(launch.merge);
        match launch.dealer.feed.claims_mut().claim(&name, self.now_seconds)? {
            Standing::Mine => {
                self.tell(place, || format!("number {} merges", launch.id()));
                let written = self.now_seconds + self.random.between(0.0, 8.0);
                self.at(written, place, Event::Written);
            }
            Standing::Done(_) => {
                launch.phase = Phase::Complete;
                if self.output.is_none() {
                    self.breaks(format!("{name} is done and nobody did it"));
                }
                self.leave(place, launch)?;
            }
            _ => self.at(self.now_seconds + 0.2, place, Event::Merge),
        }
        Ok(())
    }

    /// The output is written and gets its name.
    fn written(&mut self, place: usize, launch: &mut Launch) -> Result<()> {
        let name = merge_name(launch.merge);
        let mut journals = SimJournals::new(self.journals.clone(), launch.id());
        journals.refresh()?;
        let records = self.lengths.len() as u64;
        for index in 0..records {
            if journals.lines.get(&index).is_none_or(|text| *text != line(index)) {
                self.breaks(format!("record {index} is not in the output of {name}"));
            }
        }
        self.output = Some(records);
        // A launch dies of this write with the output written: another merges again.
        let done = json!({ "records": records });
        if launch.dealer.feed.claims_mut().complete(&name, &done)? {
            let times = self.merged.entry(name.clone()).or_default();
            *times += 1;
            if *times > 1 {
                self.breaks(format!("{name} is done twice"));
            }
        } else if !self.tainted {
            self.breaks(format!("{name} was taken from one that was alive"));
        }
        launch.phase = Phase::Complete;
        self.leave(place, launch)
    }
}

fn merge_name(number: u32) -> String {
    format!("merge-{number:04}")
}

/// As `merges_done` of `membership`.
fn first_merge(claims: &mut Claims) -> Result<u32> {
    let mut merge = 0;
    while let Standing::Done(_) = claims.standing(&merge_name(merge), 0.0)? {
        merge += 1;
    }
    Ok(merge)
}

fn state(launch: &Launch, rank: usize) -> LinkState {
    launch.ranks[rank].link.as_ref().map_or_else(|| launch.dealer.state(), WorkerLink::state)
}

fn receive(launch: &mut Launch, now_seconds: f64) -> Result<()> {
    while let Some((from, message)) = launch.comms[0].try_recv(TAG_TO_COORDINATOR) {
        let Update { load, received_records, stop, goodbye, finished } = Update::decode(&message)?;
        for finished in finished {
            launch.dealer.completed(finished.index, finished.cost);
        }
        if stop {
            launch.dealer.handout.stop();
        }
        launch.dealer.report(from, load, received_records, goodbye, now_seconds);
    }
    Ok(())
}

fn tell_state(launch: &mut Launch) {
    let order = Order::NoMore { stopped: launch.dealer.state() == LinkState::Stopped };
    for worker in launch.dealer.take_untold() {
        launch.comms[0].send(worker, TAG_TO_WORKER, order.encode());
    }
}

/// Runs the seeds; says of the first that fails how to see it again.
fn run_seeds(seeds: std::ops::Range<u64>, size: Size, test: &str) -> Seen {
    use rayon::prelude::*;
    let replay = std::env::var("FARM_SIM_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let (seeds, trace) = replay.map_or((seeds, false), |seed| (seed..seed + 1, true));
    let add = |a: Seen, b: Seen| Seen {
        deaths: a.deaths + b.deaths,
        drains: a.drains + b.drains,
        suspended_long: a.suspended_long + b.suspended_long,
        begun_again: a.begun_again + b.begun_again,
        continued: a.continued + b.continued,
        duplicates: a.duplicates + b.duplicates,
        blocks: a.blocks + b.blocks,
        block_claims: a.block_claims + b.block_claims,
        turns: a.turns + b.turns,
        seconds: a.seconds + b.seconds,
    };
    let run = |seed: u64| {
        World::new(seed, size, trace).run().map_err(|broken| {
            format!(
                "seed {seed}: {broken}\nto see it again: FARM_SIM_SEED={seed} cargo test --lib \
                 {test} -- --include-ignored --nocapture"
            )
        })
    };
    let outcomes: Vec<_> = seeds.into_par_iter().map(run).collect();
    let broken = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    broken.clone().take(20).for_each(|broken| println!("{broken}"));
    assert_eq!(broken.count(), 0, "seeds failed, see above");
    outcomes.into_iter().flatten().fold(Seen::default(), add)
}

/// Runs of which each launch may be killed, drained, suspended or cut off at any moment.
#[test]
fn launches_that_die_anywhere_leave_each_record_done_once() {
    println!("{:?}", run_seeds(0..2000, SMALL, "launches_that_die_anywhere_leave"));
}

#[test]
#[ignore = "takes minutes"]
fn a_hundred_thousand_runs_of_launches_that_die_anywhere() {
    println!("{:?}", run_seeds(0..100_000, SMALL, "a_hundred_thousand_runs"));
}

#[test]
#[ignore = "takes minutes"]
fn launches_of_a_thousand_ranks_that_die_anywhere() {
    let size = Size { launches: (2, 4), ranks: (1000, 1000), records: (5000, 10_000) };
    println!("{:?}", run_seeds(0..16, size, "launches_of_a_thousand_ranks"));
}

/// A launch that was thought gone at its very end: what was taken from it is in work here, and
/// its workers have been told that no more will come.
#[test]
fn after_the_last_record_was_handed_out_a_late_heartbeat_reopens_nothing() {
    let mut world = World::new(0, SMALL, false);
    (world.lengths, world.claim_records) = (vec![10; 2], 2);
    world.claims = SimDisk::new(0, 0.0);
    let mut join = |place: usize| {
        let (owner, store) = (world.owner(place, "host"), Box::new(world.claims.client()));
        let evidence = Box::new(world.deaths.evidence("host", false));
        let claims = Claims::join(store, evidence, owner, CLAIMS, 0.0).unwrap();
        world.dealer(claims, 1, 2, false)
    };
    let (mut first, mut second) = (join(0), join(1));
    let begin = |dealer: &mut Dealer, now_seconds: f64| {
        dealer.report(0, Load { slots: 2, ..Load::default() }, 0, false, now_seconds);
        dealer.read_input(now_seconds).unwrap();
        dealer.next_block(0, now_seconds).unwrap().map_or(0, |block| block.len())
    };
    assert_eq!(begin(&mut first, 0.0), 2);
    assert_eq!(first.state(), LinkState::Finished);
    let mut taken = 0;
    for half_second in 0..60 {
        world.claims.advance_to(f64::from(half_second) / 2.0);
        taken += begin(&mut second, f64::from(half_second) / 2.0);
    }
    assert_eq!(taken, 2, "the first was silent for long");
    first.share_blocks(true, 30.0).unwrap();
    assert_eq!(first.state(), LinkState::Finished);
    (0..2).for_each(|index| first.completed(index, 1.0));
    assert!(first.complete());
}
