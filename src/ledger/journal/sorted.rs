//! Where the output lines lie, in index order, with bounded memory: entries gather in memory
//! and go to a temporary file in sorted runs when there are too many; a cursor merges the runs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::{Error, Result};

/// Entries held in memory, 40 bytes each.
pub const ENTRIES_IN_MEMORY: usize = 1 << 19;
/// An entry on disk.
const ENTRY_BYTES: usize = 35;
/// Entries that are written, or read for all runs together, at a time.
const BUFFERED_ENTRIES: usize = 1 << 15;

/// A finished or failed record: where its frame lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Position of the record in the input.
    pub index: u64,
    /// The record's key.
    pub key: u64,
    /// Where in the file the frame begins.
    pub offset: u64,
    /// Number of the file, given by who made the entry.
    pub file: u32,
    /// Length of the frame.
    pub frame_bytes: u32,
    /// Which attempt at the record it was.
    pub attempt: u16,
    /// Whether the line is an error.
    pub is_error: bool,
}

impl Entry {
    /// Ascending by index, and for one index what counts first: the highest attempt; of equal
    /// ones a line that is no error.
    fn order(&self) -> (u64, Reverse<u16>, bool, u32, u64) {
        (self.index, Reverse(self.attempt), self.is_error, self.file, self.offset)
    }

    fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.index.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.key.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.file.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.frame_bytes.to_le_bytes());
        bytes[32..34].copy_from_slice(&self.attempt.to_le_bytes());
        bytes[34] = u8::from(self.is_error);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            index: u64_at(0),
            key: u64_at(8),
            offset: u64_at(16),
            file: u32_at(24),
            frame_bytes: u32_at(28),
            attempt: u16::from_le_bytes([bytes[32], bytes[33]]),
            is_error: bytes[34] != 0,
        }
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}

/// Entries in any order in; see [`Sorter::cursor`] for out.
pub struct Sorter {
    /// Where the temporary file goes.
    dir: PathBuf,
    in_memory_max: usize,
    memory: Vec<Entry>,
    spill: Option<Spill>,
}

/// The temporary file; it has no name any more and goes with its last handle.
struct Spill {
    file: Arc<File>,
    /// For messages.
    dir: PathBuf,
    /// Entries in each run, in the order of the file.
    runs: Vec<u64>,
}

impl Sorter {
    /// Holds up to `in_memory_max` entries in memory; beyond, a temporary file in `dir` (or the
    /// system's directory for these, where nothing can be written in `dir`) takes them.
    pub fn new(dir: &Path, in_memory_max: usize) -> Self {
        let in_memory_max = in_memory_max.max(1);
        Self { dir: dir.to_owned(), in_memory_max, memory: Vec::new(), spill: None }
    }

    /// Adds an entry. Errors: the temporary file cannot be made or written; the entry is kept
    /// nevertheless.
    pub fn push(&mut self, entry: Entry) -> Result<()> {
        self.memory.push(entry);
        if self.memory.len() >= self.in_memory_max { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> Result<()> {
        let spill = match &mut self.spill {
            Some(spill) => spill,
            none => {
                let system = std::env::temp_dir();
                let (file, dir) = match unnamed_file(&self.dir) {
                    Ok(file) => (file, self.dir.clone()),
                    Err(_) => (unnamed_file(&system)?, system),
                };
                none.insert(Spill { file: Arc::new(file), dir, runs: Vec::new() })
            }
        };
        self.memory.sort_unstable();
        let mut offset = spill.runs.iter().sum::<u64>() * ENTRY_BYTES as u64;
        for entries in self.memory.chunks(BUFFERED_ENTRIES) {
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_bytes()).collect();
            spill.file.write_all_at(&bytes, offset).map_err(|error| {
                Error::io(&spill.dir, error).context("cannot keep the journal's index (make space)")
            })?;
            offset += bytes.len() as u64;
        }
        spill.runs.push(self.memory.len() as u64);
        self.memory.clear();
        Ok(())
    }

    /// All entries so far in index order, of each index the one that counts.
    pub fn cursor(&self) -> Result<Cursor> {
        let mut memory = self.memory.clone();
        memory.sort_unstable();
        let mut sources = vec![Source::Memory(memory.into_iter())];
        if let Some(Spill { file, dir, runs }) = &self.spill {
            let at_once = (BUFFERED_ENTRIES / runs.len().max(1)).max(64);
            let mut offset = 0;
            for &entries in runs {
                let (file, dir) = (file.clone(), dir.clone());
                let buffer = Vec::new().into_iter();
                sources.push(Source::Run { file, dir, offset, entries, at_once, buffer });
                offset += entries * ENTRY_BYTES as u64;
            }
        }
        let mut cursor = Cursor { sources, heads: BinaryHeap::new(), last_index: None };
        for source in 0..cursor.sources.len() {
            cursor.refill(source)?;
        }
        Ok(cursor)
    }
}

/// A file in `dir` for reading and writing that has no name.
fn unnamed_file(dir: &Path) -> Result<File> {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Other hosts may have this process id at work in this directory, but not this instant too;
    // where they do, O_EXCL makes it an error.
    let name = format!(".farm-index-{}-{}", std::process::id(), since_epoch.as_nanos());
    let path = dir.join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
    let file = file.map_err(|error| Error::io(&path, error))?;
    std::fs::remove_file(&path).map_err(|error| Error::io(&path, error))?;
    Ok(file)
}

/// Goes through a [`Sorter`]'s entries. What is added later, it does not see.
pub struct Cursor {
    sources: Vec<Source>,
    /// The next entry of each source that has one.
    heads: BinaryHeap<Reverse<(Entry, usize)>>,
    last_index: Option<u64>,
}

enum Source {
    Memory(std::vec::IntoIter<Entry>),
    Run {
        file: Arc<File>,
        dir: PathBuf,
        /// Where what is not read yet begins.
        offset: u64,
        /// How much that is.
        entries: u64,
        at_once: usize,
        buffer: std::vec::IntoIter<Entry>,
    },
}

impl Cursor {
    /// The next entry, of a higher index than the one before. Errors: the temporary file
    /// cannot be read.
    pub fn next(&mut self) -> Result<Option<Entry>> {
        while let Some(Reverse((entry, source))) = self.heads.pop() {
            self.refill(source)?;
            if self.last_index != Some(entry.index) {
                self.last_index = Some(entry.index);
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    fn refill(&mut self, source: usize) -> Result<()> {
        let entry = self.sources[source].next()?;
        self.heads.extend(entry.map(|entry| Reverse((entry, source))));
        Ok(())
    }
}

impl Source {
    fn next(&mut self) -> Result<Option<Entry>> {
        let (file, dir, offset, entries, at_once, buffer) = match self {
            Source::Memory(entries) => return Ok(entries.next()),
            Source::Run { file, dir, offset, entries, at_once, buffer } => {
                (file, dir, offset, entries, *at_once, buffer)
            }
        };
        if buffer.len() == 0 && *entries > 0 {
            let count = (*entries).min(at_once as u64);
            let mut bytes = vec![0; count as usize * ENTRY_BYTES];
            file.read_exact_at(&mut bytes, *offset).map_err(|error| {
                Error::io(dir, error).context("cannot read the journal's index")
            })?;
            *offset += bytes.len() as u64;
            *entries -= count;
            let entries: Vec<_> = bytes.chunks(ENTRY_BYTES).map(Entry::from_bytes).collect();
            *buffer = entries.into_iter();
        }
        Ok(buffer.next())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let index = prop_oneof![0u64..30, any::<u64>()];
        let entry = (index, any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>(), 0u16..3)
            .prop_flat_map(|(index, key, offset, file, frame_bytes, attempt)| {
                any::<bool>().prop_map(move |is_error| Entry {
                    index,
                    key,
                    offset,
                    file,
                    frame_bytes,
                    attempt,
                    is_error,
                })
            });
        prop::collection::vec(entry, 0..200)
    }

    fn all(sorter: &Sorter) -> Vec<Entry> {
        let mut cursor = sorter.cursor().unwrap();
        std::iter::from_fn(|| cursor.next().unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn runs_on_disk_give_what_memory_gives(entries in entries(), in_memory_max in 1usize..20) {
            let dir = tempfile::tempdir().unwrap();
            let mut memory = Sorter::new(dir.path(), 1000);
            let mut runs = Sorter::new(dir.path(), in_memory_max);
            let mut plain = BTreeMap::new();
            for (place, &entry) in entries.iter().enumerate() {
                if place == entries.len() / 2 {
                    prop_assert_eq!(all(&memory), all(&runs));
                }
                memory.push(entry).unwrap();
                runs.push(entry).unwrap();
                let best = plain.entry(entry.index).or_insert(entry);
                *best = entry.min(*best);
            }
            let plain: Vec<_> = plain.into_values().collect();
            prop_assert_eq!(all(&memory), plain.clone());
            prop_assert_eq!(all(&runs), plain.clone());
            prop_assert_eq!(all(&runs), plain); // a second cursor starts anew
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn the_highest_attempt_counts_and_then_one_that_is_no_error() {
        let dir = Path::new("/nowhere");
        let entry = |attempt, is_error, file| Entry {
            index: 4,
            key: 0,
            offset: 0,
            file,
            frame_bytes: 0,
            attempt,
            is_error,
        };
        for (entries, winner) in [
            ([entry(0, false, 0), entry(1, true, 1), entry(0, true, 2)], 1),
            ([entry(1, true, 0), entry(1, false, 2), entry(0, false, 1)], 2),
            ([entry(1, false, 5), entry(1, false, 3), entry(1, false, 4)], 3),
        ] {
            let mut sorter = Sorter::new(dir, 10);
            entries.iter().for_each(|&entry| sorter.push(entry).unwrap());
            assert_eq!(all(&sorter).iter().map(|e| e.file).collect::<Vec<_>>(), [winner]);
        }
    }

    /// Who may only read a run can still look at it.
    #[test]
    fn where_the_run_directory_takes_no_file_the_systems_does() {
        let mut sorter = Sorter::new(Path::new("/nowhere/at/all"), 1);
        let entry = Entry::from_bytes(&[1; ENTRY_BYTES]);
        sorter.push(entry).unwrap();
        sorter.push(Entry { index: 7, ..entry }).unwrap();
        assert_eq!(all(&sorter), [Entry { index: 7, ..entry }, entry]);
    }
}
