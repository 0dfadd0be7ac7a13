//! Reads all journals of a run, again and again while they grow.
//!
//! Files are read in parallel, a stretch of each at a time, and what they say is taken in by one
//! thread. It is the same in any order: which line of a record counts depends on its attempt,
//! which saved generation on its attempt and length.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom, Take};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::frame::{self, Damage, Event, FrameReader, Head, Kind, Tail};
use super::outcomes::Outcomes;
use super::sorted::{ENTRIES_IN_MEMORY, Entry, Sorter};
use super::stored::{Place, StoredLines, read_payload};
use super::{FORMAT, JournalHeader, LaunchId, parse_file_name};
use crate::ledger::IndexSet;
use crate::{Error, Result};

/// Facts taken from a file before they are taken in: bounds the memory of a scan.
const FACTS_AT_ONCE: usize = 8192;

/// All journals of a run, as far as they are read. Memory does not grow with the number of
/// records but by bits.
pub struct Journals {
    dir: PathBuf,
    run_key: Arc<str>,
    seed: u32,
    /// In the order in which they were found; an [`Entry`] names one by its place here.
    files: Vec<Journal>,
    by_name: BTreeMap<(LaunchId, usize), usize>,
    outcomes: Outcomes,
    saved: BTreeMap<u64, Saved>,
    lines: Sorter,
    /// Launches whose files need no more reading after the next time.
    ended: BTreeSet<LaunchId>,
    warnings: Vec<Warning>,
}

/// By file (launch and rank) and offset, so that they come in one order.
type Warning = ((LaunchId, usize), u64, String);

/// One file.
struct Journal {
    name: (LaunchId, usize),
    path: PathBuf,
    reach: Reach,
    header: Option<JournalHeader>,
    /// What is read and need not be read again.
    offset: u64,
    tail: Option<Tail>,
    /// Damage before `offset`. It is looked at again (unless an error comes between), since a
    /// network file system may show zeros where bytes of another node are still to come.
    damage: Vec<Range<u64>>,
    header_reported: bool,
    /// Index and attempt of what was started, and not finished or saved since.
    started: BTreeSet<(u64, u16)>,
    finished: u64,
    failed: u64,
    saved: u64,
}

/// Whether a file is read on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Growing,
    Ended,
    /// Another run's, or of another format.
    Foreign,
}

/// The saved generation of a record. Ordered by what counts first: a generation only grows, so
/// of one attempt the longest is the newest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Saved {
    attempt: u16,
    frame_bytes: u32,
    name: (LaunchId, usize),
    offset: u64,
}

/// What a launch journalled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchCounts {
    /// Its files: ranks that keep records.
    pub ranks: u64,
    /// FINISHED frames.
    pub finished: u64,
    /// FAILED frames.
    pub failed: u64,
    /// SAVED frames.
    pub saved: u64,
    /// Bytes of its files that were read.
    pub bytes: u64,
    /// The header of its lowest rank that has a whole one.
    pub header: Option<JournalHeader>,
}

/// The end of a file that is not a whole frame: it is being written, or (where the launch has
/// ended) was never finished or is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornTail {
    /// The file.
    pub path: PathBuf,
    /// Who wrote it.
    pub launch: LaunchId,
    /// Where the tail begins.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// The record that it begins with, where that can be told.
    pub index: Option<u64>,
}

impl fmt::Display for TornTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, bytes, offset) = (self.path.display(), self.bytes, self.offset);
        write!(f, "{path}: its end, {bytes} bytes from byte {offset} on, is not a whole frame")?;
        match self.index {
            Some(index) => write!(f, " (of record {index}); it is passed over"),
            None => write!(f, "; it is passed over"),
        }
    }
}

impl Journals {
    /// Of the run with this key, in its journal directory. Nothing is read yet. Where lines are
    /// many, their places go to a temporary file in the directory's parent.
    pub fn new(journal_dir: &Path, run_key: &str) -> Self {
        Self::with_entries_in_memory(journal_dir, run_key, ENTRIES_IN_MEMORY)
    }

    pub(super) fn with_entries_in_memory(
        journal_dir: &Path,
        run_key: &str,
        in_memory_max: usize,
    ) -> Self {
        Self {
            dir: journal_dir.to_owned(),
            run_key: run_key.into(),
            seed: frame::run_seed(run_key),
            files: Vec::new(),
            by_name: BTreeMap::new(),
            outcomes: Outcomes::default(),
            saved: BTreeMap::new(),
            lines: Sorter::new(journal_dir.parent().unwrap_or(journal_dir), in_memory_max),
            ended: BTreeSet::new(),
            warnings: Vec::new(),
        }
    }

    /// Reads what was added since the last time: new files, and more in known ones, which are
    /// opened anew (only then does NFS look at the server). Names that are no journal's are
    /// left alone. Errors name the file; what was read before one counts, and the next call
    /// goes on from there.
    pub fn refresh(&mut self) -> Result<()> {
        self.find_files()?;
        let mut waiting = self.readings().into_iter();
        let mut active = Vec::new();
        let at_once = (2 * rayon::current_num_threads()).clamp(2, 32);
        loop {
            active.extend(waiting.by_ref().take(at_once - active.len()));
            if active.is_empty() {
                break;
            }
            active.par_iter_mut().for_each(Reading::read_some);
            for reading in &mut active {
                self.take_in(reading)?;
            }
            active.retain(|reading| !reading.ended);
        }
        for journal in &mut self.files {
            if journal.reach == Reach::Growing && self.ended.contains(&journal.name.0) {
                journal.reach = Reach::Ended;
            }
        }
        Ok(())
    }

    /// The launch is known to be gone: the next [`refresh`](Self::refresh) reads its files for
    /// the last time.
    pub fn finish_launch(&mut self, launch: LaunchId) {
        self.ended.insert(launch);
    }

    /// Records that are finished or failed.
    pub fn done(&self) -> &IndexSet {
        self.outcomes.done()
    }

    /// Of those, the ones whose attempt that counts is an error. A later attempt can change
    /// this, either way.
    pub fn failed(&self) -> &IndexSet {
        self.outcomes.failed()
    }

    /// The highest attempt at which a record was finished or failed; 0 if it never was.
    pub fn attempt(&self, index: u64) -> u16 {
        self.outcomes.attempt(index)
    }

    /// The newest saved generation of a record that no attempt as high has finished or failed.
    /// Errors: the file cannot be read, or changed.
    pub fn saved(&self, index: u64) -> Option<Result<Vec<u8>>> {
        let saved = self.saved.get(&index)?;
        let path = &self.files[self.by_name[&saved.name]].path;
        let Saved { attempt, frame_bytes, offset, .. } = *saved;
        let place = Place { index, attempt, offset, frame_bytes };
        let mut generation = Vec::new();
        let file = File::open(path).map_err(|error| Error::io(path, error));
        let read = file.and_then(|file| {
            read_payload(&file, path, place, self.seed, &mut generation).map(|()| generation)
        });
        Some(read)
    }

    /// How many records have a saved generation.
    pub fn saved_records(&self) -> u64 {
        self.saved.len() as u64
    }

    /// FINISHED or FAILED frames of an attempt that had one before: work done twice.
    pub fn duplicates(&self) -> u64 {
        self.outcomes.duplicates()
    }

    /// By launch, where there are some: records that it started and neither finished nor saved.
    /// Of a launch that is gone, they are what its end cost.
    pub fn in_work(&self) -> BTreeMap<LaunchId, u64> {
        let mut in_work = BTreeMap::new();
        for journal in self.files.iter().filter(|journal| !journal.started.is_empty()) {
            *in_work.entry(journal.name.0).or_default() += journal.started.len() as u64;
        }
        in_work
    }

    /// Records that one of these launches started, that are neither done nor saved: what their
    /// end cost.
    pub fn lost_by(&self, is_gone: impl Fn(LaunchId) -> bool) -> u64 {
        let gone = self.files.iter().filter(|journal| is_gone(journal.name.0));
        let started = gone.flat_map(|journal| journal.started.iter().map(|&(index, _)| index));
        let lost = started
            .filter(|index| !self.done().contains(*index) && !self.saved.contains_key(index));
        lost.collect::<BTreeSet<u64>>().len() as u64
    }

    /// By launch, what it journalled.
    pub fn launches(&self) -> BTreeMap<LaunchId, LaunchCounts> {
        let mut launches = BTreeMap::<LaunchId, LaunchCounts>::new();
        let journals = self.by_name.values().map(|&number| &self.files[number]);
        for journal in journals.filter(|journal| journal.reach != Reach::Foreign) {
            let counts = launches.entry(journal.name.0).or_default();
            counts.ranks += 1;
            counts.finished += journal.finished;
            counts.failed += journal.failed;
            counts.saved += journal.saved;
            counts.bytes += journal.offset;
            if counts.header.is_none() {
                counts.header.clone_from(&journal.header);
            }
        }
        launches
    }

    /// The ends of files that are not whole frames (yet), by launch and rank.
    pub fn torn_tails(&self) -> Vec<TornTail> {
        let journals = self.by_name.values().map(|&number| &self.files[number]);
        let tails = journals.filter_map(|journal| {
            let tail = journal.tail.as_ref()?;
            Some(TornTail {
                path: journal.path.clone(),
                launch: journal.name.0,
                offset: tail.bytes.start,
                bytes: tail.bytes.end - tail.bytes.start,
                index: tail.head.filter(|head| head.kind != Kind::Header).map(|head| head.id.index),
            })
        });
        tails.collect()
    }

    /// What is wrong with the files, for the log; each thing once.
    pub fn take_warnings(&mut self) -> Vec<String> {
        self.warnings.sort();
        self.warnings.drain(..).map(|(_, _, message)| message).collect()
    }

    /// The output lines of all records done so far, in index order; of a record with several,
    /// the one that counts. What is read later, this does not see.
    pub fn lines(&self) -> Result<StoredLines> {
        let paths = self.files.iter().map(|journal| journal.path.clone()).collect();
        StoredLines::new(self.lines.cursor()?, paths, self.seed)
    }

    fn find_files(&mut self) -> Result<()> {
        let io = |error| Error::io(&self.dir, error);
        for entry in std::fs::read_dir(&self.dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(parse_file_name) else { continue };
            // A pipe would be waited for, a directory cannot be read.
            if !entry.file_type().map_err(io)?.is_file() {
                continue;
            }
            let files = &mut self.files;
            self.by_name.entry(name).or_insert_with(|| {
                files.push(Journal::new(name, entry.path()));
                files.len() - 1
            });
        }
        Ok(())
    }

    /// What there is to read now, by launch and rank.
    fn readings(&mut self) -> Vec<Reading> {
        let mut readings = Vec::new();
        for &number in self.by_name.values() {
            let journal = &mut self.files[number];
            if journal.reach != Reach::Growing {
                continue;
            }
            let mut stretches = VecDeque::from(std::mem::take(&mut journal.damage));
            stretches.push_back(journal.offset..u64::MAX);
            readings.push(Reading {
                number,
                path: journal.path.clone(),
                run_key: self.run_key.clone(),
                seed: self.seed,
                stretches,
                reader: None,
                facts: Vec::new(),
                ended: false,
                error: None,
            });
        }
        readings
    }

    fn take_in(&mut self, reading: &mut Reading) -> Result<()> {
        for fact in reading.facts.drain(..) {
            match fact {
                Fact::Header(header) => self.files[reading.number].header = Some(*header),
                Fact::Foreign(message) => {
                    let journal = &mut self.files[reading.number];
                    journal.reach = Reach::Foreign;
                    self.warnings.push((journal.name, 0, message));
                }
                Fact::Frame { head, offset } => self.take_frame(reading.number, head, offset)?,
                Fact::Damage(damage) => self.take_damage(reading.number, damage),
                Fact::End { stretch, tail } => self.take_end(reading.number, stretch, tail),
            }
        }
        reading.error.take().map_or(Ok(()), Err)
    }

    fn take_frame(&mut self, number: usize, head: Head, offset: u64) -> Result<()> {
        let journal = &mut self.files[number];
        let is_late = offset < journal.offset; // was taken for damage before
        if !is_late {
            journal.offset = offset + head.frame_bytes() as u64;
        }
        let work = (head.id.index, head.id.attempt);
        match head.kind {
            Kind::Header => Ok(()),
            Kind::Started => {
                // What became of it meanwhile is not known any more.
                if !is_late {
                    journal.started.insert(work);
                }
                Ok(())
            }
            Kind::Saved => {
                journal.started.remove(&work);
                journal.saved += 1;
                let frame_bytes = head.frame_bytes() as u32;
                let name = journal.name;
                self.take_saved(work.0, Saved { attempt: work.1, frame_bytes, name, offset });
                Ok(())
            }
            Kind::Finished | Kind::Failed => {
                journal.started.remove(&work);
                let is_error = head.kind == Kind::Failed;
                *(if is_error { &mut journal.failed } else { &mut journal.finished }) += 1;
                self.take_done(number, head, offset, is_error)
            }
        }
    }

    fn take_saved(&mut self, index: u64, saved: Saved) {
        if self.done().contains(index) && saved.attempt <= self.attempt(index) {
            return;
        }
        let newest = self.saved.entry(index).or_insert(saved);
        *newest = saved.max(*newest);
    }

    fn take_done(&mut self, file: usize, head: Head, offset: u64, is_error: bool) -> Result<()> {
        let super::RecordId { index, key, attempt } = head.id;
        if self.saved.get(&index).is_some_and(|saved| saved.attempt <= attempt) {
            self.saved.remove(&index);
        }
        if !self.outcomes.add(index, attempt, is_error) {
            return Ok(());
        }
        let (file, frame_bytes) = (file as u32, head.frame_bytes() as u32);
        self.lines.push(Entry { index, key, offset, file, frame_bytes, attempt, is_error })
    }

    fn take_damage(&mut self, number: usize, damage: Damage) {
        let journal = &mut self.files[number];
        let Range { start, end } = damage.bytes;
        if start < journal.offset {
            journal.damage.push(start..end); // reported before
            return;
        }
        (journal.offset, journal.tail) = (end, None);
        journal.damage.push(start..end);
        if start == 0 {
            self.report_header(number);
            return;
        }
        let lost = match damage.head.map(|head| (head.kind, head.id.index)) {
            Some((Kind::Finished | Kind::Failed, index)) => {
                format!("the line of record {index}, which is generated again if no other is there")
            }
            Some((Kind::Saved, index)) => format!("the saved generation of record {index}"),
            Some((Kind::Started, index)) => format!("the note that record {index} was begun"),
            Some((Kind::Header, _)) | None => {
                "unknown; a record that stood there is generated again".to_owned()
            }
        };
        let (path, bytes) = (journal.path.display(), end - start);
        let message = format!("{path}: damaged, {bytes} bytes from byte {start} on: {lost}");
        self.warnings.push((journal.name, start, message));
    }

    fn take_end(&mut self, number: usize, stretch: Range<u64>, tail: Option<Tail>) {
        let journal = &mut self.files[number];
        if stretch.end != u64::MAX {
            journal.damage.extend(tail.map(|tail| tail.bytes.start..stretch.end));
            return;
        }
        let no_header = tail.as_ref().is_some_and(|tail| tail.damaged && tail.bytes.start == 0);
        journal.tail = tail;
        if no_header {
            self.report_header(number);
        }
    }

    fn report_header(&mut self, number: usize) {
        let journal = &mut self.files[number];
        if !std::mem::replace(&mut journal.header_reported, true) {
            let message = format!(
                "{}: its beginning is damaged or not a journal's; what whole frames of this run \
                 follow are used",
                journal.path.display()
            );
            self.warnings.push((journal.name, 0, message));
        }
    }
}

impl Journal {
    fn new(name: (LaunchId, usize), path: PathBuf) -> Self {
        Self {
            name,
            path,
            reach: Reach::Growing,
            header: None,
            offset: 0,
            tail: None,
            damage: Vec::new(),
            header_reported: false,
            started: BTreeSet::new(),
            finished: 0,
            failed: 0,
            saved: 0,
        }
    }
}

/// What a file says; [`Journals`] takes it in.
enum Fact {
    Header(Box<JournalHeader>),
    Foreign(String),
    Frame { head: Head, offset: u64 },
    Damage(Damage),
    End { stretch: Range<u64>, tail: Option<Tail> },
}

/// A file while it is read. Touches nothing but the file, so that many can be read at once.
struct Reading {
    number: usize,
    path: PathBuf,
    run_key: Arc<str>,
    seed: u32,
    /// What is still to be read: damage of before, and all that is new.
    stretches: VecDeque<Range<u64>>,
    reader: Option<(Range<u64>, FrameReader<Take<File>>)>,
    facts: Vec<Fact>,
    ended: bool,
    error: Option<Error>,
}

impl Reading {
    fn read_some(&mut self) {
        while !self.ended && self.facts.len() < FACTS_AT_ONCE {
            if let Err(error) = self.step() {
                self.ended = true;
                self.error = Some(Error::io(&self.path, error));
            }
        }
    }

    fn step(&mut self) -> io::Result<()> {
        let Some((stretch, reader)) = &mut self.reader else {
            match self.stretches.pop_front() {
                Some(stretch) => self.reader = Some(open(&self.path, stretch, self.seed)?),
                None => self.ended = true,
            }
            return Ok(());
        };
        let fact = match reader.next()? {
            Some(Event::Frame { offset: 0, head, payload }) if head.kind == Kind::Header => {
                let fact = header_fact(&self.path, head, payload, &self.run_key);
                self.ended = matches!(fact, Fact::Foreign(_));
                self.facts.push(fact);
                Fact::Frame { head, offset: 0 }
            }
            Some(Event::Frame { offset, head, .. }) => Fact::Frame { head, offset },
            Some(Event::Damage(damage)) => Fact::Damage(damage),
            None => {
                let fact = Fact::End { stretch: stretch.clone(), tail: reader.tail() };
                self.reader = None;
                fact
            }
        };
        self.facts.push(fact);
        Ok(())
    }
}

fn open(
    path: &Path,
    stretch: Range<u64>,
    seed: u32,
) -> io::Result<(Range<u64>, FrameReader<Take<File>>)> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() < stretch.start {
        let message = "it is shorter than it was; give the same command again";
        return Err(io::Error::new(ErrorKind::InvalidData, message));
    }
    file.seek(SeekFrom::Start(stretch.start))?;
    let source = io::Read::take(file, stretch.end - stretch.start);
    let reader = FrameReader::new(source, stretch.start, seed);
    Ok((stretch, reader))
}

fn header_fact(path: &Path, head: Head, payload: &[u8], run_key: &str) -> Fact {
    let path = path.display();
    let version = head.id.attempt;
    if version != FORMAT {
        return Fact::Foreign(format!(
            "{path}: passed over: written by another version of farm (format {version}, here \
             {FORMAT})"
        ));
    }
    match serde_json::from_slice::<JournalHeader>(payload) {
        Ok(header) if header.run_key == run_key => Fact::Header(Box::new(header)),
        Ok(JournalHeader { run_key, .. }) => {
            Fact::Foreign(format!("{path}: passed over: it is of another run ({run_key})"))
        }
        Err(error) => Fact::Foreign(format!("{path}: passed over: its header: {error}")),
    }
}
