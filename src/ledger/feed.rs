//! Which records of the input this launch works on, where any number of launches work
//! on one run at the same time.
//!
//! The input is cut into blocks of `claim_records` consecutive records. At the first
//! record of a block that is not done, the block is claimed ([`Claims`]); records of
//! blocks that others hold are passed over. At the end of the input the feed goes on
//! with what the others leave: blocks that they finish are done, blocks whose owner is
//! gone, or that a busy owner gives back, are claimed and read in another pass. When
//! every record is done the input is at its end for good.
//!
//! No clock and no threads: `now_seconds` is passed in, and files are behind
//! [`ClaimStore`](super::claims::ClaimStore) and [`JournalIndex`]. Left out: who of this launch's ranks gets a
//! record ([`Handout`](super::Handout)).

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::claims::{Claims, LaunchId, Standing};
use super::journal::{Journals, RecordId, StoredLines};
use super::{IndexSet, Source, record_key};
use crate::prompts::RawRecord;
use crate::{Error, Result};

/// What the journals of all launches say of the records.
pub trait JournalIndex: Send {
    /// Takes in what was journalled since the last call.
    fn refresh(&mut self) -> Result<()>;
    /// The records that need no more work; failed ones are among them.
    fn done(&self) -> &IndexSet;
    /// Those of them that failed.
    fn failed(&self) -> &IndexSet;
    /// The number of the last attempt at a failed record, from 0.
    fn attempt(&self, index: u64) -> u16;
    /// The newest saved state of a record that is not done.
    fn saved(&self, index: u64) -> Option<Result<Vec<u8>>>;
}

impl JournalIndex for Journals {
    fn refresh(&mut self) -> Result<()> {
        Journals::refresh(self)?;
        self.take_warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        Ok(())
    }

    fn done(&self) -> &IndexSet {
        Journals::done(self)
    }

    fn failed(&self) -> &IndexSet {
        Journals::failed(self)
    }

    fn attempt(&self, index: u64) -> u16 {
        Journals::attempt(self, index)
    }

    fn saved(&self, index: u64) -> Option<Result<Vec<u8>>> {
        Journals::saved(self, index)
    }
}

/// A record to work on, with what earlier launches know of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// The record.
    pub record: RawRecord,
    /// 0, and one more for each time that it failed before a retry.
    pub attempt: u16,
    /// An unfinished generation to go on from.
    pub saved: Option<Vec<u8>>,
}

impl Task {
    /// The record as the journal names it.
    pub fn id(&self, run_key: &str) -> RecordId {
        let key = record_key(run_key, &self.record);
        RecordId { index: self.record.index, key, attempt: self.attempt }
    }
}

/// The feed's answer to "what is next?".
#[derive(Debug, PartialEq)]
pub enum Next {
    /// A record to hand out.
    Record(RawRecord),
    /// A record that needs nothing from this launch, now: done, or another's.
    Passed,
    /// Only records that others hold are left: ask again later.
    Wait,
    /// Every record is done or was handed out here.
    End,
}

/// How to deal with the run.
#[derive(Debug, Clone)]
pub struct FeedConfig {
    /// Records in a claim block; the same for all launches of a run.
    pub claim_records: u64,
    /// The run's key, part of every record's.
    pub run_key: String,
    /// Work on the failed records again.
    pub retry: bool,
    /// How many records to take at once of what others leave.
    pub take_records: u64,
}

/// Seconds between two looks at what others hold, while there is nothing else to do …
const LOOK_SECONDS: f64 = 1.0;
/// … and how many blocks one look is about: a look must not hold up the ranks.
const LOOK_BLOCKS: usize = 256;

/// The records of the input that are for this launch; see the module.
pub struct Feed {
    config: FeedConfig,
    open: Box<dyn FnMut() -> Result<Source>>,
    /// The pass through the input that is under way.
    pass: Option<Source>,
    claims: Claims,
    journals: Box<dyn JournalIndex>,
    blocks: BTreeMap<u64, Block>,
    /// Failed records that nobody has tried again since, with the attempt that failed.
    again: BTreeMap<u64, u16>,
    /// Done by anyone, as far as known: the journals as they were last read, and what this
    /// launch completed.
    done: IndexSet,
    /// The records that earlier launches did, to compare their keys in the first pass.
    stored: Option<StoredLines>,
    resumed: u64,
    next_index: u64,
    total: Option<u64>,
    looked_seconds: f64,
    /// The block that the next look begins with.
    look_from: u64,
    /// Launches that were gone for good when the journals were last read.
    settled: HashSet<LaunchId>,
    shared: bool,
    wishing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    /// Claimed in this pass, or for it: its records are to be handed out.
    Mine,
    /// Claimed, and read to its end in an earlier pass.
    Read,
    /// Another launch has it, or will.
    Others,
}

fn block_name(block: u64) -> String {
    format!("block-{block:08}")
}

impl Feed {
    /// A feed over the input that `open` opens at its start. `journals` were read once;
    /// `stored` are the lines of what they hold, whose records are compared with the input.
    pub fn new(
        config: FeedConfig,
        open: Box<dyn FnMut() -> Result<Source>>,
        claims: Claims,
        journals: Box<dyn JournalIndex>,
        stored: Option<StoredLines>,
    ) -> Self {
        let failed = config.retry.then(|| journals.failed().iter()).into_iter().flatten();
        let again: BTreeMap<_, _> = failed.map(|index| (index, journals.attempt(index))).collect();
        let done = journals.done().clone();
        let resumed = done.len() - again.len() as u64;
        Self {
            config,
            open,
            pass: None,
            claims,
            journals,
            blocks: BTreeMap::new(),
            again,
            done,
            stored,
            resumed,
            next_index: 0,
            total: None,
            looked_seconds: f64::NEG_INFINITY,
            look_from: 0,
            settled: HashSet::new(),
            shared: false,
            wishing: false,
        }
    }

    /// The next record of the input, where `in_window` records wait for a worker here: what
    /// others leave is taken only when these run out.
    ///
    /// # Errors
    /// The input or the run directory cannot be read, or a record is not what it was when
    /// an earlier launch did it.
    pub fn next(&mut self, now_seconds: f64, in_window: u64) -> Result<Next> {
        if self.pass.is_none() {
            let hungry = in_window < self.config.take_records.div_ceil(2);
            if self.total.is_some() && !(hungry && self.look(now_seconds)?) {
                self.wish(hungry && self.others_hold_some())?;
                return Ok(if self.others_hold_some() { Next::Wait } else { Next::End });
            }
            self.next_index = 0;
            self.pass = Some((self.open)()?);
        }
        let Some(record) = self.pass.as_mut().and_then(Iterator::next).transpose()? else {
            self.end_of_pass();
            return Ok(if self.others_hold_some() { Next::Wait } else { Next::End });
        };
        self.next_index = record.index + 1;
        if self.is_done(record.index) {
            self.compare(&record)?;
            return Ok(Next::Passed);
        }
        let block = record.index / self.config.claim_records;
        let mine = match self.blocks.get(&block) {
            Some(known) => *known == Block::Mine,
            None => self.claim(block, now_seconds)?,
        };
        // What a former owner did is known only now.
        Ok(if mine && !self.is_done(record.index) { Next::Record(record) } else { Next::Passed })
    }

    /// Adds to a record what its hand-out needs.
    ///
    /// # Errors
    /// Its saved state cannot be read.
    pub fn task(&self, record: RawRecord) -> Result<Task> {
        let index = record.index;
        let failed = self.again.get(&index);
        let attempt = failed.map_or(0, |attempt| attempt.saturating_add(1));
        Ok(Task { record, attempt, saved: self.journals.saved(index).transpose()? })
    }

    /// Notes that this launch has done a record.
    pub fn completed(&mut self, index: u64) {
        self.done.insert(index);
        self.again.remove(&index);
    }

    /// Whether a record needs no more work.
    pub fn is_done(&self, index: u64) -> bool {
        self.done.contains(index) && !self.again.contains_key(&index)
    }

    /// Records done, by all launches, as far as this one knows.
    pub fn records_done(&self) -> u64 {
        self.done.len() - self.again.len() as u64
    }

    /// Records that earlier launches had done when this one began.
    pub fn records_resumed(&self) -> u64 {
        self.resumed
    }

    /// Records of the input, once it was read to its end.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// Whether other launches have had a part in the run since this one began.
    pub fn shared(&self) -> bool {
        self.shared
    }

    /// The claims, for the merge and the end.
    pub fn claims_mut(&mut self) -> &mut Claims {
        &mut self.claims
    }

    /// Launches that have nothing to do and would take blocks.
    ///
    /// # Errors
    /// The run directory cannot be read.
    pub fn wishes(&mut self, now_seconds: f64) -> Result<Vec<LaunchId>> {
        self.claims.wishes_of_others(now_seconds)
    }

    /// This launch's blocks of which nothing is done, and that were read to their end, with
    /// their records: what may be given back, if nothing of it was handed out.
    pub fn untouched(&self) -> impl Iterator<Item = (u64, Range<u64>)> + '_ {
        self.blocks
            .iter()
            .filter(|(_, holder)| **holder != Block::Others)
            .map(|(&block, holder)| (block, *holder, self.records_of(block)))
            .filter(|(_, holder, records)| *holder == Block::Read || records.end <= self.next_index)
            .map(|(block, _, records)| (block, records))
            .filter(|(_, records)| !records.clone().any(|index| self.is_done(index)))
    }

    /// Gives a block back, none of whose records is in work.
    ///
    /// # Errors
    /// The run directory cannot be written.
    pub fn give_back(&mut self, block: u64) -> Result<()> {
        // Where it was lost, others have it: all the same.
        self.claims.release(&block_name(block))?;
        self.blocks.insert(block, Block::Others);
        self.shared = true;
        Ok(())
    }

    /// The blocks that others took because this launch was thought to be gone; to be asked
    /// after a heartbeat that came late. Their records that are not in work are not this
    /// launch's any more.
    ///
    /// # Errors
    /// The run directory cannot be read.
    pub fn lost(&mut self) -> Result<Vec<Range<u64>>> {
        let mine = self.blocks.iter().filter(|(_, holder)| **holder != Block::Others);
        let mine: Vec<u64> = mine.map(|(&block, _)| block).collect();
        let mut lost = Vec::new();
        for block in mine {
            let records = self.records_of(block);
            if !records.clone().all(|index| self.is_done(index))
                && self.claims.lost(&block_name(block))?
            {
                self.blocks.insert(block, Block::Others);
                self.shared = true;
                lost.push(records);
            }
        }
        Ok(lost)
    }

    /// The records of a block, within the input as far as its end is known.
    fn records_of(&self, block: u64) -> Range<u64> {
        let first = block * self.config.claim_records;
        let end = first + self.config.claim_records;
        first..self.total.map_or(end, |total| end.min(total))
    }

    fn refresh(&mut self) -> Result<()> {
        let before = self.records_done();
        self.journals.refresh()?;
        self.done.union(self.journals.done());
        self.again.retain(|&index, &mut failed| self.journals.attempt(index) <= failed);
        // What this launch did it knew already.
        self.shared |= self.records_done() > before;
        Ok(())
    }

    fn others_hold_some(&self) -> bool {
        self.blocks.values().any(|&holder| holder == Block::Others)
    }

    /// Whether the block is this launch's now, and what its former owner did is known.
    fn claim(&mut self, block: u64, now_seconds: f64) -> Result<bool> {
        let mine = self.take(block, now_seconds)?;
        let name = block_name(block);
        if mine && self.claims.generation(&name) > 1 {
            // A launch that was gone for good at the last look has journalled nothing since.
            let former = self.claims.taken_over_from(&name);
            if former.is_none_or(|launch| !self.settled.contains(&launch)) {
                let for_good = former
                    .map(|launch| self.claims.is_gone_for_good(launch, now_seconds))
                    .transpose()?;
                self.refresh()?;
                self.settled.extend(former.filter(|_| for_good == Some(true)));
            }
        }
        Ok(mine)
    }

    fn take(&mut self, block: u64, now_seconds: f64) -> Result<bool> {
        let mine = self.claims.claim(&block_name(block), now_seconds)? == Standing::Mine;
        self.shared |= !mine;
        self.blocks.insert(block, if mine { Block::Mine } else { Block::Others });
        Ok(mine)
    }

    fn end_of_pass(&mut self) {
        self.pass = None;
        self.stored = None;
        let mine = self.blocks.values_mut().filter(|block| **block == Block::Mine);
        mine.for_each(|block| *block = Block::Read);
        self.total.get_or_insert(self.next_index);
    }

    /// Looks what became of the others' blocks; whether there is something to do now.
    fn look(&mut self, now_seconds: f64) -> Result<bool> {
        if !self.others_hold_some() || now_seconds - self.looked_seconds < LOOK_SECONDS {
            return Ok(false);
        }
        self.looked_seconds = now_seconds;
        self.refresh()?;
        let mut taken = 0;
        for block in self.others_from(self.look_from).into_iter().take(LOOK_BLOCKS) {
            self.look_from = block + 1;
            let mut records = self.records_of(block);
            if records.all(|index| self.is_done(index)) {
                self.blocks.remove(&block);
            } else if self.take(block, now_seconds)? {
                let records = self.records_of(block);
                taken += records.end - records.start;
            }
            if taken >= self.config.take_records {
                break;
            }
        }
        if taken > 0 {
            // What the former owners did to the end.
            self.refresh()?;
            self.looked_seconds = f64::NEG_INFINITY;
        }
        self.wish(taken == 0 && self.others_hold_some())?;
        Ok(taken > 0)
    }

    /// The others' blocks, from `first` on and round.
    fn others_from(&self, first: u64) -> Vec<u64> {
        let (before, after) = (self.blocks.range(..first), self.blocks.range(first..));
        let others = after.chain(before).filter(|(_, holder)| **holder == Block::Others);
        others.map(|(&block, _)| block).collect()
    }

    fn wish(&mut self, wishing: bool) -> Result<()> {
        if self.wishing != wishing {
            self.wishing = wishing;
            self.claims.wish(wishing)?;
        }
        Ok(())
    }

    /// Whether a done record is still what it was: a run has one input.
    fn compare(&mut self, record: &RawRecord) -> Result<()> {
        let Some(stored) = &mut self.stored else { return Ok(()) };
        while stored.peek().is_some_and(|(index, ..)| index < record.index) {
            stored.advance()?;
        }
        match stored.peek() {
            Some((index, key, _))
                if index == record.index && key != record_key(&self.config.run_key, record) =>
            {
                Err(Error::input(format!(
                    "the prompts file's line {} (record {index}) is not what it was when the run \
                     did it: give the file as it was, or --force-new to begin anew",
                    record.line
                )))
            }
            _ => Ok(()),
        }
    }
}
