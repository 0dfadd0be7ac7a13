//! Part files: every rank appends its finished records to a file of its own in the
//! run directory, before it hands them to rank 0. What they hold is never generated
//! again; the output can always be rebuilt from them.
//!
//! A line is `crc32 index flag json\n`: the checksum in hex over all that follows it
//! up to the line's end, the record's index, `+` or (an error record) `!`. A line
//! without its `\n` is a torn tail; one with a wrong checksum is damaged, and its
//! record is generated again. Left out: fsync in groups and an index on disk.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::ledger::IndexSet;
use crate::ledger::crc32::crc32;
use crate::{Error, Result};

/// Where finished records are kept for good.
pub trait RecordSink: Send {
    /// Adds a record's output `line` (with its `\n`). It may still be in a buffer.
    fn append(&mut self, index: u64, line: &[u8], is_error: bool) -> Result<()>;
    /// Hands what was appended to the operating system: it outlives this process.
    fn flush(&mut self) -> Result<()>;
    /// Flushes, and waits until it is on the disk: it outlives this node.
    fn sync(&mut self) -> Result<()>;
}

/// A rank's part file.
pub struct PartWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl PartWriter {
    /// Opens (or creates) the part file of `rank` in `parts_dir` for appending. Its torn tail,
    /// if it has one, was cut by [`scan`].
    pub fn open(parts_dir: &Path, rank: usize) -> Result<Self> {
        let path = parts_dir.join(format!("rank-{rank:05}.jsonl"));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|error| {
            let shared = "the run directory must be on a file system that all nodes share";
            match error.kind() {
                std::io::ErrorKind::NotFound => {
                    Error::input(format!("{}: {error}; {shared} (--run-dir)", path.display()))
                }
                _ => Error::io(&path, error),
            }
        })?;
        Ok(Self { path, file: BufWriter::with_capacity(256 << 10, file) })
    }

    fn checked(&self, result: std::io::Result<()>) -> Result<()> {
        result.map_err(|error| {
            Error::io(&self.path, error).context("cannot keep finished records; a rerun goes on")
        })
    }
}

impl RecordSink for PartWriter {
    fn append(&mut self, index: u64, line: &[u8], is_error: bool) -> Result<()> {
        let json = line.strip_suffix(b"\n").unwrap_or(line);
        if json.contains(&b'\n') {
            return Err(Error::fault(format!("record {index}: its output line holds a newline")));
        }
        let head = format!("{index} {} ", if is_error { '!' } else { '+' });
        let crc = crc32(&[head.as_bytes(), json]);
        let mut write = || {
            write!(self.file, "{crc:08x} {head}")?;
            self.file.write_all(json)?;
            self.file.write_all(b"\n")
        };
        let result = write();
        self.checked(result)
    }

    fn flush(&mut self) -> Result<()> {
        let result = self.file.flush();
        self.checked(result)
    }

    fn sync(&mut self) -> Result<()> {
        self.flush()?;
        let result = self.file.get_ref().sync_data();
        self.checked(result)
    }
}

/// Where the output line of a finished record lies; 24 bytes a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoredLine {
    index: u64,
    offset: u64,
    len: u32,
    file: u16,
    is_error: bool,
}

/// The finished records of earlier launches.
#[derive(Default)]
pub struct Stored {
    /// Ascending by index, each index once.
    lines: Vec<StoredLine>,
    paths: Vec<PathBuf>,
    open: HashMap<u16, File>,
    /// What is wrong with the files, for the log.
    pub warnings: Vec<String>,
}

/// Reads all part files in `parts_dir` and cuts their torn tails. Only rank 0 calls it,
/// before any rank opens its part file.
pub fn scan(parts_dir: &Path) -> Result<Stored> {
    let io = |error| Error::io(parts_dir, error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(parts_dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.len() > usize::from(u16::MAX) {
        return Err(Error::fault(format!("{}: more than 65535 files", parts_dir.display())));
    }
    let mut stored = Stored { paths, ..Stored::default() };
    for file in 0..stored.paths.len() {
        stored.scan_file(file as u16).map_err(|error| Error::io(&stored.paths[file], error))?;
    }
    stored.lines.sort_unstable();
    stored.lines.dedup_by_key(|line| line.index);
    stored.lines.shrink_to_fit();
    Ok(stored)
}

impl Stored {
    /// Number of finished records.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether nothing is finished yet.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The indices of the finished records.
    pub fn indices(&self) -> IndexSet {
        self.lines.iter().map(|line| line.index).collect()
    }

    /// The `place`-th finished record in index order: its index, and whether it is an error.
    pub fn get(&self, place: usize) -> Option<(u64, bool)> {
        self.lines.get(place).map(|line| (line.index, line.is_error))
    }

    /// Reads the output line (with its `\n`) of the `place`-th finished record into `buffer`.
    pub fn read(&mut self, place: usize, buffer: &mut Vec<u8>) -> Result<()> {
        let StoredLine { offset, len, file, .. } = self.lines[place];
        let result = self.read_at(file, offset, len, buffer);
        result.map_err(|error| Error::io(&self.paths[usize::from(file)], error))
    }

    fn read_at(
        &mut self,
        file: u16,
        offset: u64,
        len: u32,
        buffer: &mut Vec<u8>,
    ) -> std::io::Result<()> {
        const MAX_OPEN_FILES: usize = 128;
        if self.open.len() >= MAX_OPEN_FILES && !self.open.contains_key(&file) {
            self.open.clear();
        }
        let handle = match self.open.entry(file) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(File::open(&self.paths[usize::from(file)])?)
            }
        };
        buffer.resize(len as usize, 0);
        handle.read_exact_at(buffer, offset)
    }

    fn scan_file(&mut self, file: u16) -> std::io::Result<()> {
        let path = self.paths[usize::from(file)].clone();
        let mut reader = BufReader::with_capacity(1 << 20, File::open(&path)?);
        let (mut offset, mut line_number) = (0, 0u64);
        let mut line = Vec::new();
        loop {
            line.clear();
            // A line's length has to fit its u32; a longer one can only be damage.
            let read = reader.by_ref().take(u64::from(u32::MAX)).read_until(b'\n', &mut line)?;
            if read == 0 {
                return Ok(());
            }
            line_number += 1;
            let Some(content) = line.strip_suffix(b"\n") else {
                if read < u32::MAX as usize {
                    let message = format!("{}: cut a torn tail ({read} bytes)", path.display());
                    self.warnings.push(message);
                    return OpenOptions::new().write(true).open(&path)?.set_len(offset);
                }
                offset += read as u64;
                continue;
            };
            match parse(content) {
                Some((index, is_error, start)) => self.lines.push(StoredLine {
                    index,
                    offset: offset + start as u64,
                    len: (read - start) as u32,
                    file,
                    is_error,
                }),
                None => self.warnings.push(format!(
                    "{}:{line_number}: damaged, its record is generated again",
                    path.display()
                )),
            }
            offset += read as u64;
        }
    }
}

/// Index, error flag and where the JSON starts, if the line is whole.
fn parse(line: &[u8]) -> Option<(u64, bool, usize)> {
    let (crc, rest) = line.split_at_checked(9)?;
    let crc = std::str::from_utf8(crc.strip_suffix(b" ")?).ok()?;
    if u32::from_str_radix(crc, 16).ok()? != crc32(&[rest]) {
        return None;
    }
    let digits = rest.iter().position(|&byte| byte == b' ')?;
    let index = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
    let is_error = match rest.get(digits + 1..digits + 3)? {
        b"+ " => false,
        b"! " => true,
        _ => return None,
    };
    Some((index, is_error, 9 + digits + 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, rank: usize, indices: &[u64]) {
        let mut part = PartWriter::open(dir, rank).unwrap();
        for &index in indices {
            let line = format!("{{\"index\":{index}}}\n");
            part.append(index, line.as_bytes(), index == 3).unwrap();
        }
        part.sync().unwrap();
    }

    fn lines(stored: &mut Stored) -> Vec<(u64, bool, String)> {
        let mut buffer = Vec::new();
        (0..stored.len())
            .map(|place| {
                stored.read(place, &mut buffer).unwrap();
                let (index, is_error) = stored.get(place).unwrap();
                (index, is_error, String::from_utf8(buffer.clone()).unwrap())
            })
            .collect()
    }

    fn expected(indices: &[u64]) -> Vec<(u64, bool, String)> {
        indices.iter().map(|&i| (i, i == 3, format!("{{\"index\":{i}}}\n"))).collect()
    }

    #[test]
    fn what_ranks_appended_is_found_in_index_order_once() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, &[4, 0]);
        write(dir.path(), 7, &[3, 1, 4]);
        write(dir.path(), 0, &[9]);
        let mut stored = scan(dir.path()).unwrap();
        assert_eq!(lines(&mut stored), expected(&[0, 1, 3, 4, 9]));
        assert!(stored.indices().contains(9) && !stored.indices().contains(2));
        assert_eq!(stored.warnings, Vec::<String>::new());
    }

    /// A kill in the middle of a write, at any byte: the whole lines stay, the rest is cut,
    /// and the next launch appends cleanly.
    #[test]
    fn a_torn_tail_is_cut_before_the_next_append() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, &[0, 1, 2]);
        let path = dir.path().join("rank-00000.jsonl");
        let whole = std::fs::read(&path).unwrap();
        let ends: Vec<_> = (0..whole.len()).filter(|&i| whole[i] == b'\n').collect();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let kept = ends.iter().filter(|&&end| end < cut).count();
            assert_eq!(lines(&mut scan(dir.path()).unwrap()), expected(&[0, 1, 2][..kept]));
            write(dir.path(), 0, &[5]);
            assert_eq!(
                lines(&mut scan(dir.path()).unwrap()),
                expected(&[&[0, 1, 2][..kept], &[5]].concat())
            );
        }
    }

    /// No flipped bit makes a wrong record: it is the same, or missing and named.
    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, &[0, 1, 2]);
        let path = dir.path().join("rank-00000.jsonl");
        let whole = std::fs::read(&path).unwrap();
        let all = expected(&[0, 1, 2]);
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            let mut stored = scan(dir.path()).unwrap();
            let found = lines(&mut stored);
            assert!(found.iter().all(|line| all.contains(line)), "bit {bit}: {found:?}");
            assert!(found.len() == 3 || !stored.warnings.is_empty(), "bit {bit}");
            assert!(!found.is_empty(), "bit {bit}: the other lines are kept");
        }
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let Ok(file) = OpenOptions::new().append(true).open("/dev/full") else { return };
        let path = PathBuf::from("/run/parts/rank-00000.jsonl");
        let mut part = PartWriter { path, file: BufWriter::new(file) };
        part.append(0, b"{}\n", false).unwrap();
        let error = part.flush().unwrap_err();
        assert!(error.message.contains("rank-00000.jsonl"), "{error}");
        assert_eq!(error.kind.exit_code(), 1);
    }
}
