//! Puts finished records, which arrive in any order, into the output in input order.
//!
//! Lines that come too early wait in memory up to a budget, then in a spill file; how
//! many there can be is bounded by the hand-out's horizon. Lines of earlier launches
//! are read from their part files when their turn comes. `FILE.partial` grows while the
//! run goes on and becomes FILE at its end.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::ledger::parts::Stored;
use crate::{Error, Result};

/// Where the output goes.
pub enum OutputTarget {
    /// `FILE.partial`, renamed to FILE at the end. What is not a regular file (a pipe,
    /// `/dev/null`) is written directly.
    File(PathBuf),
    /// A stream (standard output), as lines become ready.
    Stream(Box<dyn Write + Send>),
}

/// Lines written so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutputCounts {
    /// All records.
    pub records: u64,
    /// Error records among them.
    pub errors: u64,
}

/// A line that waits for its turn.
enum Early {
    Memory(Vec<u8>),
    Spilled { offset: u64, len: usize },
}

/// The ordered output; see the module.
pub struct OrderedOutput {
    /// For messages.
    name: PathBuf,
    writer: BufWriter<Box<dyn Write + Send>>,
    rename: Option<Rename>,
    next: u64,
    early: BTreeMap<u64, (Early, bool)>,
    early_bytes: usize,
    early_bytes_max: usize,
    spill: Spill,
    stored: Stored,
    stored_place: usize,
    buffer: Vec<u8>,
    counts: OutputCounts,
}

struct Rename {
    partial: PathBuf,
    file: File,
    to: PathBuf,
}

impl OrderedOutput {
    /// A usual budget for lines that wait in memory.
    pub const EARLY_BYTES_MAX: usize = 8 << 20;

    /// Opens the target (its folder is created). Lines beyond `early_bytes_max` that wait
    /// for their turn go to `spill_path`.
    pub fn create(
        target: OutputTarget,
        spill_path: &Path,
        early_bytes_max: usize,
    ) -> Result<OrderedOutput> {
        let (name, stream, rename) = match target {
            OutputTarget::Stream(stream) => (PathBuf::from("standard output"), stream, None),
            OutputTarget::File(path) => open(path)?,
        };
        Ok(Self {
            name,
            writer: BufWriter::with_capacity(256 << 10, stream),
            rename,
            next: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
            early_bytes_max,
            spill: Spill { path: spill_path.to_owned(), file: None, end: 0, live: 0 },
            stored: Stored::default(),
            stored_place: 0,
            buffer: Vec::new(),
            counts: OutputCounts::default(),
        })
    }

    /// With the finished records of earlier launches.
    pub fn with_stored(mut self, stored: Stored) -> Self {
        self.stored = stored;
        self
    }

    /// Takes the line of record `index` (with its `\n`). A second line for the same record
    /// is ignored.
    pub fn push(&mut self, index: u64, line: Vec<u8>, is_error: bool) -> Result<()> {
        if index < self.next || self.early.contains_key(&index) {
            return Ok(());
        }
        if index == self.next {
            self.write(&line, is_error)?;
            return self.write_early();
        }
        let early = if self.early_bytes + line.len() > self.early_bytes_max {
            self.spill.write(&line)?
        } else {
            self.early_bytes += line.len();
            Early::Memory(line)
        };
        self.early.insert(index, (early, is_error));
        Ok(())
    }

    /// Writes up to `max_stored` lines of earlier launches whose turn has come, and what
    /// waits behind them. True if there is more to do.
    pub fn advance(&mut self, max_stored: usize) -> Result<bool> {
        for _ in 0..max_stored {
            self.write_early()?;
            while self.stored.get(self.stored_place).is_some_and(|(index, _)| index < self.next) {
                self.stored_place += 1;
            }
            let Some((index, is_error)) = self.stored.get(self.stored_place) else {
                return Ok(false);
            };
            if index != self.next {
                return Ok(false);
            }
            let mut line = std::mem::take(&mut self.buffer);
            self.stored.read(self.stored_place, &mut line)?;
            self.write(&line, is_error)?;
            self.buffer = line;
        }
        Ok(true)
    }

    /// Lines written so far.
    pub fn counts(&self) -> OutputCounts {
        self.counts
    }

    /// Hands what is written to the operating system.
    pub fn flush(&mut self) -> Result<()> {
        self.writer.flush().map_err(|error| Error::io(&self.name, error))
    }

    /// Completes the output of `total` records: everything is on disk before FILE gets its
    /// name. An error (and no FILE) if a record is missing.
    pub fn finish(mut self, total: u64) -> Result<OutputCounts> {
        while self.advance(usize::MAX)? {}
        if self.next != total {
            return Err(Error::fault(format!(
                "{}: record {} of {total} is missing; run the same command again to complete it",
                self.name.display(),
                self.next
            )));
        }
        self.flush()?;
        if let Some(Rename { partial, file, to }) = &self.rename {
            file.sync_all().map_err(|error| Error::io(partial, error))?;
            std::fs::rename(partial, to).map_err(|error| Error::io(to, error))?;
            sync_folder(to);
        }
        self.spill.remove();
        Ok(self.counts)
    }

    fn write(&mut self, line: &[u8], is_error: bool) -> Result<()> {
        self.writer.write_all(line).map_err(|error| Error::io(&self.name, error))?;
        self.next += 1;
        self.counts.records += 1;
        self.counts.errors += u64::from(is_error);
        Ok(())
    }

    /// Writes the lines that waited only for what was just written.
    fn write_early(&mut self) -> Result<()> {
        while let Some((early, is_error)) = self.early.remove(&self.next) {
            match early {
                Early::Memory(line) => {
                    self.early_bytes -= line.len();
                    self.write(&line, is_error)?;
                }
                Early::Spilled { offset, len } => {
                    let mut line = std::mem::take(&mut self.buffer);
                    self.spill.read(offset, len, &mut line)?;
                    self.write(&line, is_error)?;
                    self.buffer = line;
                }
            }
        }
        Ok(())
    }
}

type Opened = (PathBuf, Box<dyn Write + Send>, Option<Rename>);

fn open(path: PathBuf) -> Result<Opened> {
    let io = |error| Error::input(format!("--output {}: {error}", path.display()));
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        let file = OpenOptions::new().write(true).open(&path).map_err(io)?;
        return Ok((path.clone(), Box::new(file), None));
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    let mut partial = path.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let file = create_alone(&partial)?;
    let stream = Box::new(file.try_clone().map_err(io)?);
    Ok((partial.clone(), stream, Some(Rename { partial, file, to: path })))
}

/// Creates (or empties) `partial` and locks it while it is open: two runs with one output
/// would mix their lines. Where the file system has no locks nothing keeps them apart.
fn create_alone(partial: &Path) -> Result<File> {
    let io = |error| Error::input(format!("--output: {}: {error}", partial.display()));
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false);
    loop {
        let file = options.open(partial).map_err(io)?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::input(format!(
                "--output: another run is writing {}: wait for it, or give this one another file",
                partial.display()
            )));
        }
        // The run before may have renamed it between open and lock: then it is not ours.
        let (ours, named) = (file.metadata().map_err(io)?, std::fs::metadata(partial));
        if named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
            file.set_len(0).map_err(io)?;
            return Ok(file);
        }
    }
}

/// Makes a rename in the folder of `path` durable, where the file system lets it be asked for.
fn sync_folder(path: &Path) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
        let _ = folder.sync_all();
    }
}

/// Early lines on disk, appended; emptied whenever none of them is needed any more.
struct Spill {
    path: PathBuf,
    file: Option<File>,
    end: u64,
    live: usize,
}

impl Spill {
    fn write(&mut self, line: &[u8]) -> Result<Early> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).create(true).truncate(true);
                let file = file.open(&self.path).map_err(|error| Error::io(&self.path, error))?;
                self.file.insert(file)
            }
        };
        file.write_all_at(line, self.end).map_err(|error| Error::io(&self.path, error))?;
        let early = Early::Spilled { offset: self.end, len: line.len() };
        self.end += line.len() as u64;
        self.live += 1;
        Ok(early)
    }

    fn read(&mut self, offset: u64, len: usize, buffer: &mut Vec<u8>) -> Result<()> {
        let io = |error| Error::io(&self.path, error);
        buffer.resize(len, 0);
        if let Some(file) = &self.file {
            file.read_exact_at(buffer, offset).map_err(io)?;
            self.live -= 1;
            if self.live == 0 {
                self.end = 0;
                file.set_len(0).map_err(io)?;
            }
        }
        Ok(())
    }

    fn remove(&mut self) {
        if self.file.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::*;
    use crate::ledger::parts::{self, PartWriter, RecordSink};

    fn line(index: u64) -> Vec<u8> {
        format!("{{\"index\":{index},\"text\":\"{}\"}}\n", "x".repeat(index as usize % 40))
            .into_bytes()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Any order of arrival, any memory budget, any part of it done by earlier launches,
        /// and repeated lines: the file is the sorted lines.
        #[test]
        fn the_file_is_the_lines_in_order(
            order in (0u64..120).prop_flat_map(|n| Just((0..n).collect::<Vec<_>>()).prop_shuffle()),
            done_share in 0u64..4,
            budget in 0usize..2000,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let is_done = |index: u64| index % 4 < done_share;
            for &index in order.iter().filter(|&&index| is_done(index)) {
                let mut part = PartWriter::open(dir.path(), (index % 3) as usize).unwrap();
                part.append(index, &line(index), index % 5 == 0).unwrap();
                part.flush().unwrap();
            }
            let path = dir.path().join("deep/out");
            let spill = dir.path().join("spill");
            let target = OutputTarget::File(path.clone());
            let mut output = OrderedOutput::create(target, &spill, budget).unwrap()
                .with_stored(parts::scan(dir.path()).unwrap());
            for &index in order.iter().filter(|&&index| !is_done(index)) {
                output.push(index, line(index), index % 5 == 0).unwrap();
                prop_assert!(output.early_bytes <= budget);
                if index % 7 == 0 {
                    output.push(index, line(index), false).unwrap();
                    output.advance(3).unwrap();
                }
            }
            prop_assert!(!path.exists());
            let total = order.len() as u64;
            let counts = output.finish(total).unwrap();
            prop_assert_eq!(counts, OutputCounts { records: total, errors: total.div_ceil(5) });
            let expected: Vec<u8> = (0..total).flat_map(line).collect();
            prop_assert_eq!(std::fs::read(&path).unwrap(), expected);
            prop_assert!(!spill.exists() && !dir.path().join("deep/out.partial").exists());
        }
    }

    #[test]
    fn a_missing_record_leaves_only_the_partial_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let target = OutputTarget::File(path.clone());
        let mut output = OrderedOutput::create(target, &dir.path().join("spill"), 100).unwrap();
        output.push(0, line(0), false).unwrap();
        output.push(2, line(2), false).unwrap();
        let error = output.finish(3).unwrap_err();
        assert!(error.message.contains("record 1 of 3"), "{error}");
        assert!(!path.exists() && dir.path().join("out.jsonl.partial").exists());
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stream_gets_lines_as_their_turn_comes() {
        let (dir, stream) = (tempfile::tempdir().unwrap(), Shared::default());
        let target = OutputTarget::Stream(Box::new(stream.clone()));
        let mut output = OrderedOutput::create(target, &dir.path().join("spill"), 0).unwrap();
        output.push(1, line(1), false).unwrap();
        output.flush().unwrap();
        assert!(stream.0.lock().unwrap().is_empty());
        output.push(0, line(0), false).unwrap();
        output.flush().unwrap();
        assert_eq!(*stream.0.lock().unwrap(), [line(0), line(1)].concat());
    }

    #[test]
    fn a_device_is_written_directly_and_errors_name_it() {
        let dir = tempfile::tempdir().unwrap();
        let target = OutputTarget::File("/dev/full".into());
        let mut output = OrderedOutput::create(target, &dir.path().join("spill"), 0).unwrap();
        output.push(0, line(0), false).unwrap();
        assert!(output.finish(1).unwrap_err().message.contains("/dev/full"));
    }

    /// Two runs with one output would mix their lines.
    #[test]
    fn an_output_has_one_writer_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let create = || {
            let target = OutputTarget::File(path.clone());
            OrderedOutput::create(target, &dir.path().join("spill"), 100)
        };
        let mut first = create().unwrap();
        first.push(0, b"first\n".to_vec(), false).unwrap();
        let error = create().map(drop).unwrap_err();
        assert!(error.message.contains("another run is writing"), "{error}");
        first.finish(1).unwrap();
        drop(create().unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"first\n", "a later run leaves it whole");
    }
}
