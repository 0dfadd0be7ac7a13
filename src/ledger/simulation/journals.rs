//! Journal files in memory: real frames, which others see late and in part, of which a
//! crash loses or tears the end; and the index of them that a launch has.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use super::super::journal::frame::{self, Event, FrameReader, Head, Kind};
use super::super::journal::outcomes::Outcomes;
use super::super::{IndexSet, JournalIndex, RecordId};
use super::Random;
use crate::Result;

/// A file: the launch and the rank that write it.
pub(super) type FileId = (u32, usize);

pub(super) const RUN_KEY: &str = "5eed";

/// All journal files of a run. Clones are the same ones.
#[derive(Clone)]
pub(super) struct JournalDisk(Arc<Mutex<Disk>>);

struct Disk {
    seed: u64,
    now_seconds: f64,
    stale_seconds: f64,
    files: BTreeMap<FileId, JournalFile>,
}

#[derive(Default)]
struct JournalFile {
    bytes: Vec<u8>,
    /// When it got how long.
    writes: Vec<(f64, usize)>,
    /// All see that much, and no crash takes it away: synced, or seen by somebody.
    safe_bytes: usize,
    /// Nobody writes it any more.
    ended: bool,
}

impl JournalFile {
    /// What a reader sees whose looks are that late: of the write that comes next, some.
    fn visible_bytes(&self, now_seconds: f64, delay_seconds: f64, cut: u64) -> usize {
        if self.ended {
            return self.bytes.len();
        }
        let seen = self.writes.partition_point(|(at, _)| at + delay_seconds <= now_seconds);
        let whole = if seen == 0 { 0 } else { self.writes[seen - 1].1 };
        let part = match self.writes.get(seen) {
            Some((at, end)) if at + delay_seconds / 2.0 <= now_seconds => {
                cut as usize % (end - whole)
            }
            _ => 0,
        };
        (whole + part).max(self.safe_bytes)
    }
}

impl JournalDisk {
    /// None yet; a launch sees what another wrote up to `stale_seconds` late.
    pub(super) fn new(seed: u64, stale_seconds: f64) -> Self {
        let files = BTreeMap::new();
        Self(Arc::new(Mutex::new(Disk { seed, now_seconds: 0.0, stale_seconds, files })))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    pub(super) fn advance_to(&self, now_seconds: f64) {
        self.disk().now_seconds = now_seconds;
    }

    /// Appends frames in one write.
    pub(super) fn write(&self, file: FileId, frames: &[u8], sync: bool) {
        let mut disk = self.disk();
        let now_seconds = disk.now_seconds;
        let file = disk.files.entry(file).or_default();
        if !frames.is_empty() {
            file.bytes.extend_from_slice(frames);
            file.writes.push((now_seconds, file.bytes.len()));
        }
        if sync {
            file.safe_bytes = file.bytes.len();
        }
    }

    /// Its writer has closed it, after a sync.
    pub(super) fn close(&self, file: FileId) {
        self.disk().files.entry(file).or_default().ended = true;
    }

    /// Its writer dies while it writes `last`, of which any part gets there. Where the node
    /// loses its power, any part goes of what was not safe; zeros may stand after it.
    pub(super) fn crash(&self, file: FileId, last: &[u8], power_loss: bool, random: &mut Random) {
        let mut disk = self.disk();
        let file = disk.files.entry(file).or_default();
        file.bytes.extend_from_slice(&last[..random.count(0, last.len() as u64) as usize]);
        if power_loss {
            let kept = random.count(file.safe_bytes as u64, file.bytes.len() as u64);
            file.bytes.truncate(kept as usize);
            if random.chance(0.3) {
                file.bytes.resize(kept as usize + random.count(0, 80) as usize, 0);
            }
        }
        file.ended = true;
    }

    /// Records in files that nothing is added to … or is, by launch: how often each is
    /// finished, as all will see it in the end.
    pub(super) fn finished(&self) -> BTreeMap<u64, u64> {
        let disk = self.disk();
        let mut finished = BTreeMap::new();
        for file in disk.files.values() {
            let mut reader = FrameReader::new(&file.bytes[..], 0, frame::run_seed(RUN_KEY));
            while let Some(event) = reader.next().unwrap() {
                if let Event::Frame { head: Head { kind: Kind::Finished, id, .. }, .. } = event {
                    *finished.entry(id.index).or_default() += 1;
                }
            }
        }
        finished
    }
}

/// What a launch knows of all journals: [`Journals`](super::super::Journals) over memory.
pub(super) struct SimJournals {
    disk: JournalDisk,
    reader: u32,
    read_bytes: BTreeMap<FileId, usize>,
    outcomes: Outcomes,
    saved: BTreeMap<u64, (u16, Vec<u8>)>,
    /// Lines of the records, for a merge.
    pub(super) lines: BTreeMap<u64, Vec<u8>>,
}

impl SimJournals {
    pub(super) fn new(disk: JournalDisk, reader: u32) -> Self {
        Self {
            disk,
            reader,
            read_bytes: BTreeMap::new(),
            outcomes: Outcomes::default(),
            saved: BTreeMap::new(),
            lines: BTreeMap::new(),
        }
    }

    fn take(&mut self, head: Head, payload: &[u8]) {
        let RecordId { index, attempt, .. } = head.id;
        match head.kind {
            Kind::Header | Kind::Started => {}
            Kind::Finished | Kind::Failed => {
                if self.saved.get(&index).is_some_and(|saved| saved.0 <= attempt) {
                    self.saved.remove(&index);
                }
                if self.outcomes.add(index, attempt, head.kind == Kind::Failed) {
                    self.lines.insert(index, payload.to_vec());
                }
            }
            Kind::Saved => {
                if self.done().contains(index) && attempt <= self.attempt(index) {
                    return;
                }
                let saved = (attempt, payload.to_vec());
                let newest = self.saved.entry(index).or_insert_with(|| saved.clone());
                if (saved.0, saved.1.len()) > (newest.0, newest.1.len()) {
                    *newest = saved;
                }
            }
        }
    }
}

impl JournalIndex for SimJournals {
    fn refresh(&mut self) -> Result<()> {
        let shared = self.disk.clone();
        let disk = &mut *shared.disk();
        for (id, file) in &mut disk.files {
            let mut hasher = DefaultHasher::new();
            (disk.seed, self.reader, id).hash(&mut hasher);
            let hash = hasher.finish();
            let delay = disk.stale_seconds * ((hash % 1001) as f64 / 1000.0);
            let end = file.visible_bytes(disk.now_seconds, delay, hash >> 16);
            file.safe_bytes = file.safe_bytes.max(end.min(file.bytes.len()));
            let start = self.read_bytes.get(id).copied().unwrap_or_default();
            if end <= start {
                continue;
            }
            let seed = frame::run_seed(RUN_KEY);
            let mut reader = FrameReader::new(&file.bytes[start..end], start as u64, seed);
            while let Some(event) = reader.next().unwrap() {
                if let Event::Frame { head, payload, .. } = event {
                    self.take(head, payload);
                }
            }
            let read = reader.tail().map_or(end, |tail| tail.bytes.start as usize);
            self.read_bytes.insert(*id, read);
        }
        Ok(())
    }

    fn done(&self) -> &IndexSet {
        self.outcomes.done()
    }

    fn failed(&self) -> &IndexSet {
        self.outcomes.failed()
    }

    fn attempt(&self, index: u64) -> u16 {
        self.outcomes.attempt(index)
    }

    fn saved(&self, index: u64) -> Option<Result<Vec<u8>>> {
        self.saved.get(&index).map(|(_, bytes)| Ok(bytes.clone()))
    }
}
