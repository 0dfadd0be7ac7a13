//! Puts finished records, which arrive in any order, into the output in input order.
//!
//! While one launch has the run to itself its lines go out as they become ready:
//! `FILE.partial` grows in order and becomes FILE at the end. Lines that come too early
//! wait in memory up to a budget, then in a spill file; how many there can be is bounded
//! by the hand-out's horizon. Lines of earlier launches are read from the journals when
//! their turn comes. Where several launches share the run this order is given up
//! ([`OrderedOutput::abandon`]), and the one that finds nothing left to do writes it all
//! from the journals ([`OrderedOutput::merge`]). Error records go into a file of their own,
//! too.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::comm::host_name;
use crate::files::{sync_folder, with_suffix};
use crate::ledger::journal::StoredLines;
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
    /// The file to write; `None`: what `lines` has is written directly.
    file: Option<PathBuf>,
    /// Where error records go, too.
    errors_file: PathBuf,
    lines: Option<Lines>,
    /// Whether lines go out as they become ready.
    ordered: bool,
    next: u64,
    early: BTreeMap<u64, (Early, bool)>,
    early_bytes: usize,
    early_bytes_max: usize,
    spill: Spill,
    stored: Option<StoredLines>,
    buffer: Vec<u8>,
}

impl OrderedOutput {
    /// A usual budget for lines that wait in memory.
    pub const EARLY_BYTES_MAX: usize = 8 << 20;

    /// Opens the target (its folder is created). Lines beyond `early_bytes_max` that wait
    /// for their turn go into a file in `run_dir`, error records into its `errors.jsonl`.
    ///
    /// # Errors
    /// The target cannot be written, or another run is writing it.
    pub fn create(target: OutputTarget, run_dir: &Path, early_bytes_max: usize) -> Result<Self> {
        let errors_file = run_dir.join("errors.jsonl");
        let (file, lines) = match target {
            OutputTarget::Stream(stream) => (None, Lines::direct("standard output".into(), stream)),
            OutputTarget::File(path) if is_special(&path) => {
                let stream = OpenOptions::new().write(true).open(&path);
                let stream = stream.map_err(|error| refused(&path, error))?;
                (None, Lines::direct(path, Box::new(stream)))
            }
            OutputTarget::File(path) => {
                create_folder(&path)?;
                let lines = Lines::growing(&path, "partial")?;
                (Some(path), lines)
            }
        };
        Ok(Self {
            file,
            errors_file,
            lines: Some(lines),
            ordered: true,
            next: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
            early_bytes_max,
            spill: Spill { path: run_dir.join("spill"), file: None, end: 0, live: 0 },
            stored: None,
            buffer: Vec::new(),
        })
    }

    /// The same for a launch that only merges: nothing is written before.
    ///
    /// # Errors
    /// The target cannot be written.
    pub fn create_for_merge(target: OutputTarget, run_dir: &Path) -> Result<Self> {
        let mut output = match target {
            OutputTarget::File(path) if !is_special(&path) => {
                create_folder(&path)?;
                let sink = OutputTarget::Stream(Box::new(std::io::sink()));
                let output = Self::create(sink, run_dir, 0)?;
                Self { file: Some(path), lines: None, ..output }
            }
            target => Self::create(target, run_dir, 0)?,
        };
        output.ordered = false;
        Ok(output)
    }

    /// With the finished records of earlier launches.
    pub fn with_stored(mut self, stored: StoredLines) -> Self {
        self.stored = Some(stored);
        self
    }

    /// Whether lines go out as they become ready.
    pub fn is_ordered(&self) -> bool {
        self.ordered
    }

    /// The file that is written at the end, if it is one.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Gives up to write lines as they come: others have a part in the run. `FILE.partial`
    /// goes; what a stream has got stays.
    pub fn abandon(&mut self) {
        if !std::mem::replace(&mut self.ordered, false) {
            return;
        }
        self.early.clear();
        self.stored = None;
        self.spill.remove();
        if self.file.is_some() {
            self.lines.take().into_iter().for_each(Lines::discard);
        }
    }

    /// Writes all `total` records from the journals.
    ///
    /// # Errors
    /// As [`OrderedOutput::finish`].
    pub fn merge(&mut self, stored: StoredLines, total: u64) -> Result<OutputCounts> {
        self.abandon();
        if let Some(file) = &self.file {
            // Of its own, should another launch that was thought gone still be merging.
            let suffix = format!("{}-{}.merging", host_name(), std::process::id());
            self.lines = Some(Lines::growing(file, &suffix)?);
            self.next = 0;
        }
        self.ordered = true;
        self.stored = Some(stored);
        let counts = self.finish(total)?;
        self.file.iter().for_each(|file| remove_unlocked(&with_suffix(file, "partial")));
        Ok(counts)
    }

    /// Takes the line of record `index` (with its `\n`). A second line for the same record
    /// is ignored.
    pub fn push(&mut self, index: u64, line: Vec<u8>, is_error: bool) -> Result<()> {
        if !self.ordered {
            return Ok(());
        }
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
            let Some(stored) = &mut self.stored else { return Ok(false) };
            while stored.peek().is_some_and(|(index, ..)| index < self.next) {
                stored.advance()?;
            }
            let Some((index, _, is_error)) = stored.peek() else { return Ok(false) };
            if index != self.next {
                return Ok(false);
            }
            let mut line = std::mem::take(&mut self.buffer);
            stored.read(&mut line)?;
            self.write(&line, is_error)?;
            self.buffer = line;
        }
        Ok(true)
    }

    /// Hands what is written to the operating system.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn flush(&mut self) -> Result<()> {
        self.lines.as_mut().map_or(Ok(()), Lines::flush)
    }

    /// Completes the output of `total` records: everything is on disk before FILE gets its
    /// name. An error (and no FILE) if a record is missing.
    pub fn finish(&mut self, total: u64) -> Result<OutputCounts> {
        while self.advance(usize::MAX)? {}
        let Some(lines) = self.lines.take() else {
            return Err(Error::fault("the output was given up"));
        };
        if self.next != total {
            return Err(Error::fault(format!(
                "{}: record {} of {total} is missing; run the same command again to complete it",
                lines.name.display(),
                self.next
            )));
        }
        self.spill.remove();
        lines.finish(&self.errors_file)
    }

    fn write(&mut self, line: &[u8], is_error: bool) -> Result<()> {
        let Some(lines) = &mut self.lines else { return Ok(()) };
        lines.write(line, is_error, &self.errors_file)?;
        self.next += 1;
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

/// The growing output: its lines, and a copy of the error records.
struct Lines {
    /// For messages.
    name: PathBuf,
    /// What files that are not complete end in.
    suffix: String,
    writer: BufWriter<Box<dyn Write + Send>>,
    growing: Option<Growing>,
    errors: Option<(BufWriter<File>, Growing)>,
    counts: OutputCounts,
}

/// A file that gets its name when it is complete.
struct Growing {
    partial: PathBuf,
    file: File,
    to: PathBuf,
}

impl Growing {
    fn create(to: &Path, suffix: &str) -> Result<Self> {
        let partial = with_suffix(to, suffix);
        let file = create_alone(&partial)?;
        Ok(Self { partial, file, to: to.to_owned() })
    }

    fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|error| Error::io(&self.partial, error))?;
        std::fs::rename(&self.partial, &self.to).map_err(|error| Error::io(&self.to, error))?;
        sync_folder(&self.to);
        Ok(())
    }

    fn discard(self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

impl Lines {
    fn direct(name: PathBuf, stream: Box<dyn Write + Send>) -> Self {
        let writer = BufWriter::with_capacity(256 << 10, stream);
        let counts = OutputCounts::default();
        Self { name, suffix: "partial".to_owned(), writer, growing: None, errors: None, counts }
    }

    fn growing(to: &Path, suffix: &str) -> Result<Self> {
        let growing = Growing::create(to, suffix)?;
        let stream = growing.file.try_clone().map_err(|error| refused(to, error))?;
        let lines = Self::direct(growing.partial.clone(), Box::new(stream));
        Ok(Self { suffix: suffix.to_owned(), growing: Some(growing), ..lines })
    }

    fn write(&mut self, line: &[u8], is_error: bool, errors_file: &Path) -> Result<()> {
        self.writer.write_all(line).map_err(|error| Error::io(&self.name, error))?;
        self.counts.records += 1;
        if is_error {
            self.counts.errors += 1;
            let (writer, growing) = match &mut self.errors {
                Some(errors) => errors,
                None => {
                    let growing = Growing::create(errors_file, &self.suffix)?;
                    let file = growing.file.try_clone();
                    let file = file.map_err(|error| Error::io(&growing.partial, error))?;
                    self.errors.insert((BufWriter::new(file), growing))
                }
            };
            writer.write_all(line).map_err(|error| Error::io(&growing.partial, error))?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.writer.flush().map_err(|error| Error::io(&self.name, error))?;
        if let Some((writer, growing)) = &mut self.errors {
            writer.flush().map_err(|error| Error::io(&growing.partial, error))?;
        }
        Ok(())
    }

    fn finish(mut self, errors_file: &Path) -> Result<OutputCounts> {
        self.flush()?;
        match self.errors {
            Some((_, growing)) => growing.finish()?,
            // Of an earlier output, before a retry.
            None => drop(std::fs::remove_file(errors_file)),
        }
        self.growing.map_or(Ok(()), Growing::finish)?;
        Ok(self.counts)
    }

    fn discard(self) {
        self.errors.into_iter().for_each(|(_, growing)| growing.discard());
        self.growing.into_iter().for_each(Growing::discard);
    }
}

/// What a killed launch left, unless somebody writes it.
fn remove_unlocked(path: &Path) {
    if File::open(path).is_ok_and(|file| file.try_lock().is_ok()) {
        let _ = std::fs::remove_file(path);
    }
}

fn is_special(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| !metadata.is_file())
}

fn refused(path: &Path, error: std::io::Error) -> Error {
    Error::input(format!("--output {}: {error}", path.display()))
}

fn create_folder(path: &Path) -> Result<()> {
    let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    folder.map_err(|error| refused(path, error))
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
    use crate::ledger::{JournalHeader, JournalWriter, Journals, RecordId, RecordSink, SyncPolicy};

    fn line(index: u64) -> Vec<u8> {
        format!("{{\"index\":{index},\"text\":\"{}\"}}\n", "x".repeat(index as usize % 40))
            .into_bytes()
    }

    /// The lines of these records, journalled by an earlier launch in `dir`.
    fn stored(dir: &Path, indices: impl Iterator<Item = u64>) -> StoredLines {
        let header = JournalHeader { run_key: "k".into(), launch: 1, ..JournalHeader::default() };
        let journal = dir.join("journal");
        std::fs::create_dir_all(&journal).unwrap();
        let mut writer = JournalWriter::create(&journal, &header, SyncPolicy::default()).unwrap();
        for index in indices {
            let id = RecordId { index, key: 0, attempt: 0 };
            writer.append(id, &line(index), index % 5 == 0).unwrap();
        }
        writer.sync().unwrap();
        let mut journals = Journals::new(&journal, "k");
        journals.refresh().unwrap();
        journals.lines().unwrap()
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
            let path = dir.path().join("deep/out");
            let target = OutputTarget::File(path.clone());
            let done = order.iter().copied().filter(|&index| is_done(index));
            let mut output = OrderedOutput::create(target, dir.path(), budget).unwrap()
                .with_stored(stored(dir.path(), done));
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
            let errors: Vec<u8> = (0..total).filter(|index| index % 5 == 0).flat_map(line).collect();
            let errors_file = std::fs::read(dir.path().join("errors.jsonl"));
            prop_assert_eq!(errors_file.unwrap_or_default(), errors);
            for gone in ["spill", "deep/out.partial", "errors.jsonl.partial"] {
                prop_assert!(!dir.path().join(gone).exists(), "{}", gone);
            }
        }
    }

    /// Another launch has a part in the run: what is in the journals counts, nothing else.
    #[test]
    fn an_abandoned_output_is_merged_from_the_journals() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let target = OutputTarget::File(path.clone());
        let mut output = OrderedOutput::create(target, dir.path(), 0).unwrap();
        output.push(0, line(0), true).unwrap();
        output.push(2, line(2), false).unwrap();
        output.abandon();
        output.push(1, b"ignored\n".to_vec(), false).unwrap();
        assert!(
            std::fs::read_dir(dir.path()).unwrap().next().is_none(),
            "nothing half done is left"
        );
        let counts = output.merge(stored(dir.path(), 0..6), 6).unwrap();
        assert_eq!(counts, OutputCounts { records: 6, errors: 2 });
        assert_eq!(std::fs::read(&path).unwrap(), (0..6).flat_map(line).collect::<Vec<u8>>());
    }

    #[test]
    fn a_missing_record_leaves_only_the_partial_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let target = OutputTarget::File(path.clone());
        let mut output = OrderedOutput::create(target, dir.path(), 100).unwrap();
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
        let mut output = OrderedOutput::create(target, dir.path(), 0).unwrap();
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
        let mut output = OrderedOutput::create(target, dir.path(), 0).unwrap();
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
            OrderedOutput::create(target, dir.path(), 100)
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
