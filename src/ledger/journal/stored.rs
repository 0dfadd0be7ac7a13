//! Reads single frames back from where a scan found them.

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::frame;
use super::sorted::{Cursor, Entry};
use crate::{Error, Result};

/// Files kept open at a time.
const OPEN_FILES_MAX: usize = 128;

/// The output lines of all done records, in index order, each index once: a cursor that sees
/// what the journals held when it was made.
pub struct StoredLines {
    cursor: Cursor,
    current: Option<Entry>,
    /// By an entry's file number.
    paths: Vec<PathBuf>,
    open: HashMap<u32, File>,
    seed: u32,
}

impl StoredLines {
    /// Goes through `cursor`, whose files are `paths`, of the run with this seed.
    pub(super) fn new(mut cursor: Cursor, paths: Vec<PathBuf>, seed: u32) -> Result<Self> {
        let current = cursor.next()?;
        Ok(Self { cursor, current, paths, open: HashMap::new(), seed })
    }

    /// The record whose line [`read`](Self::read) gives: its index, its key, and whether it is
    /// an error; none at the end.
    pub fn peek(&self) -> Option<(u64, u64, bool)> {
        self.current.map(|entry| (entry.index, entry.key, entry.is_error))
    }

    /// Puts the line of the record at hand, with its `\n`, in the place of what `line` held.
    /// Errors: the file cannot be read, or the frame is not what it was when it was scanned.
    pub fn read(&mut self, line: &mut Vec<u8>) -> Result<()> {
        let Some(entry) = self.current else {
            return Err(Error::fault("a line was asked for after the journal's last"));
        };
        let path = &self.paths[entry.file as usize];
        if self.open.len() >= OPEN_FILES_MAX && !self.open.contains_key(&entry.file) {
            self.open.clear();
        }
        let file = match self.open.entry(entry.file) {
            std::collections::hash_map::Entry::Occupied(file) => file.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(File::open(path).map_err(|error| Error::io(path, error))?)
            }
        };
        let Entry { index, attempt, offset, frame_bytes, .. } = entry;
        let place = Place { index, attempt, offset, frame_bytes };
        read_payload(file, path, place, self.seed, line)?;
        line.push(b'\n');
        Ok(())
    }

    /// Goes on to the next record. Errors: the temporary file of the index cannot be read.
    pub fn advance(&mut self) -> Result<()> {
        self.current = self.cursor.next()?;
        Ok(())
    }
}

/// Which frame lies where in its file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// The record.
    pub index: u64,
    /// The attempt at it.
    pub attempt: u16,
    /// The frame's first byte.
    pub offset: u64,
    /// Its length.
    pub frame_bytes: u32,
}

/// Reads a frame's payload into `buffer`, and checks it again.
pub(super) fn read_payload(
    file: &File,
    path: &Path,
    place: Place,
    seed: u32,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    buffer.resize(place.frame_bytes as usize, 0);
    let head = match file.read_exact_at(buffer, place.offset) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => None,
        Err(error) => return Err(Error::io(path, error)),
        Ok(()) => frame::strip(seed, buffer),
    };
    if head.is_some_and(|head| (head.id.index, head.id.attempt) == (place.index, place.attempt)) {
        return Ok(());
    }
    Err(Error::fault(format!(
        "{}: the frame of record {} at byte {} changed since it was found whole; give the same \
         command again",
        path.display(),
        place.index,
        place.offset
    )))
}
