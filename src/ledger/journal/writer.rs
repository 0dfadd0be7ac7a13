//! Writes a rank's journal file.
//!
//! Frames gather in a buffer that goes to the operating system in one write, and to the disk
//! in groups: a thread of its own waits for the fsync, so that a slow parallel file system does
//! not stop the engine. After an error nothing more is written: what is in the file stays
//! readable, and every call gives the same error.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::frame::{self, Kind};
use super::{FORMAT, JournalHeader, RecordId, file_name};
use crate::{Error, Result};

/// Bytes that may gather before they are written without a flush.
const BUFFER_BYTES: usize = 1 << 20;

/// Where a rank's work is kept for good. After an error all further calls give it again.
pub trait RecordSink: Send {
    /// Notes that work on a record begins: should this process die, it is known what was lost.
    fn start(&mut self, id: RecordId) -> Result<()>;
    /// Adds a record's output `line` (with its `\n`). It may still be in a buffer.
    fn append(&mut self, id: RecordId, line: &[u8], is_error: bool) -> Result<()>;
    /// Adds an unfinished generation, from which another launch can go on. Buffered, too.
    fn save(&mut self, id: RecordId, generation: &[u8]) -> Result<()>;
    /// Hands what was added to the operating system: it outlives this process. Where it is time
    /// to, starts to bring it to the disk, without waiting.
    fn flush(&mut self, now_seconds: f64) -> Result<()>;
    /// Flushes, and waits until all is on the disk: it outlives this node.
    fn sync(&mut self) -> Result<()>;
    /// How long the slowest write or fsync took so far, in seconds; one under way counts as
    /// long as it lasts by now.
    fn longest_sync_seconds(&self) -> f64;
}

/// When records are brought to the disk: what a node that loses power may lose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SyncPolicy {
    /// After so many records ...
    pub records: u64,
    /// ... or so many seconds, whichever comes first.
    pub seconds: f64,
}

impl Default for SyncPolicy {
    fn default() -> Self {
        Self { records: 256, seconds: 5.0 }
    }
}

/// A rank's journal file.
pub struct JournalWriter {
    path: PathBuf,
    seed: u32,
    policy: SyncPolicy,
    file: Arc<dyn Storage>,
    /// Whole frames that are not written yet.
    buffer: Vec<u8>,
    /// Where they go: the end of what is written.
    end: u64,
    /// Records, and when the first of them was flushed, that no fsync was begun for.
    unsynced_records: u64,
    unsynced_since_seconds: Option<f64>,
    syncer: Syncer,
    longest_seconds: f64,
    failed: Option<Error>,
}

impl JournalWriter {
    /// Makes the file of `header`'s launch and rank in `journal_dir` and writes its header.
    /// Errors: it exists; the directory is not there (on this node); the disk is full.
    pub fn create(journal_dir: &Path, header: &JournalHeader, policy: SyncPolicy) -> Result<Self> {
        let path = journal_dir.join(file_name(header.launch, header.rank));
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::input(format!(
                "{}: {error}; the run directory must be on a file system that all nodes share \
                 (--run-dir)",
                path.display()
            )),
            ErrorKind::AlreadyExists => Error::fault(format!(
                "{}: {error}; each launch of farm on a run has a number of its own, and this one \
                 was used before",
                path.display()
            )),
            _ => Error::io(&path, error),
        })?;
        let dir = Mutex::new(Some(journal_dir.to_owned()));
        Self::begin(path, Arc::new(Disk { file, dir }), header, policy)
    }

    fn begin(
        path: PathBuf,
        file: Arc<dyn Storage>,
        header: &JournalHeader,
        policy: SyncPolicy,
    ) -> Result<Self> {
        let syncer = Syncer::start(file.clone()).map_err(|error| Error::io(&path, error))?;
        let mut writer = Self {
            path,
            seed: frame::run_seed(&header.run_key),
            policy,
            file,
            buffer: Vec::new(),
            end: 0,
            unsynced_records: 0,
            unsynced_since_seconds: None,
            syncer,
            longest_seconds: 0.0,
            failed: None,
        };
        let json = serde_json::to_vec(header).map_err(Error::fault)?;
        let (index, key) = (u64::from(header.launch), header.rank as u64);
        writer.add(Kind::Header, RecordId { index, key, attempt: FORMAT }, &json)?;
        writer.write_out()?;
        Ok(writer)
    }

    fn add(&mut self, kind: Kind, id: RecordId, payload: &[u8]) -> Result<()> {
        self.check()?;
        frame::encode(self.seed, kind, id, payload, &mut self.buffer)?;
        if matches!(kind, Kind::Finished | Kind::Failed | Kind::Saved) {
            self.unsynced_records += 1;
        }
        if self.buffer.len() >= BUFFER_BYTES { self.write_out() } else { Ok(()) }
    }

    /// The error of before, if there is one, or that of an fsync that ended meanwhile.
    fn check(&mut self) -> Result<()> {
        if let Some(error) = self.syncer.take_error() {
            self.fail(&error);
        }
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn write_out(&mut self) -> Result<()> {
        self.check()?;
        let (begun, mut written) = (Instant::now(), 0);
        let result = loop {
            if written == self.buffer.len() {
                break Ok(());
            }
            match self.file.write_at(&self.buffer[written..], self.end + written as u64) {
                Ok(0) => break Err(ErrorKind::WriteZero.into()),
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = result {
            // Readers pass over a torn tail; it is cut only to leave the file tidy.
            let whole = frame::whole_frames_bytes(&self.buffer[..written]);
            let _ = self.file.set_len(self.end + whole as u64);
            return Err(self.fail(&error));
        }
        self.end += written as u64;
        self.buffer.clear();
        self.took(begun);
        Ok(())
    }

    fn took(&mut self, begun: Instant) {
        self.longest_seconds = self.longest_seconds.max(begun.elapsed().as_secs_f64());
    }

    /// Remembers the first error; from here on nothing is written.
    fn fail(&mut self, error: &io::Error) -> Error {
        let remedy = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make space",
            _ => "see to the file system",
        };
        let path = self.path.display();
        let message = format!(
            "cannot keep finished records: {path}: {error}; what is journalled is safe; {remedy} \
             and give the same command again"
        );
        self.failed.get_or_insert(Error::fault(message)).clone()
    }
}

impl RecordSink for JournalWriter {
    fn start(&mut self, id: RecordId) -> Result<()> {
        self.add(Kind::Started, id, &[])
    }

    fn append(&mut self, id: RecordId, line: &[u8], is_error: bool) -> Result<()> {
        let json = line.strip_suffix(b"\n").unwrap_or(line);
        if json.contains(&b'\n') {
            let index = id.index;
            return Err(Error::fault(format!("record {index}: its output line holds a newline")));
        }
        self.add(if is_error { Kind::Failed } else { Kind::Finished }, id, json)
    }

    fn save(&mut self, id: RecordId, generation: &[u8]) -> Result<()> {
        self.add(Kind::Saved, id, generation)
    }

    fn flush(&mut self, now_seconds: f64) -> Result<()> {
        self.write_out()?;
        if self.unsynced_records == 0 {
            return Ok(());
        }
        let since_seconds = *self.unsynced_since_seconds.get_or_insert(now_seconds);
        let is_due = self.unsynced_records >= self.policy.records
            || now_seconds - since_seconds >= self.policy.seconds;
        // While the one before lasts, records wait for the next: an fsync that is slow is not
        // made faster by more of them.
        if is_due && self.syncer.request() {
            (self.unsynced_records, self.unsynced_since_seconds) = (0, None);
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.write_out()?;
        self.syncer.wait();
        self.check()?;
        let begun = Instant::now();
        self.file.sync().map_err(|error| self.fail(&error))?;
        self.took(begun);
        (self.unsynced_records, self.unsynced_since_seconds) = (0, None);
        Ok(())
    }

    fn longest_sync_seconds(&self) -> f64 {
        self.longest_seconds.max(self.syncer.longest_seconds())
    }
}

impl Drop for JournalWriter {
    /// Hands what is buffered to the operating system, as well as it goes: errors have nobody
    /// left to tell.
    fn drop(&mut self) {
        let _ = self.write_out();
    }
}

/// What a journal is written to; the seam where tests put faults.
trait Storage: Send + Sync {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

struct Disk {
    file: File,
    /// The directory, until the file's name in it was synced.
    dir: Mutex<Option<PathBuf>>,
}

impl Storage for Disk {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(bytes, offset)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()?;
        if let Some(dir) = locked(&self.dir).take() {
            // Not all file systems can sync a directory, and those keep names in other ways.
            let _ = File::open(dir).and_then(|dir| dir.sync_all());
        }
        Ok(())
    }
}

/// The thread that waits for fsyncs. When its owner goes it ends by itself, after the fsync
/// that it waits for: a file system that hangs does not hold up the end of the process.
struct Syncer {
    shared: Arc<(Mutex<SyncState>, Condvar)>,
}

#[derive(Default)]
struct SyncState {
    /// When the fsync that is asked for or under way was asked for.
    busy_since: Option<Instant>,
    closed: bool,
    longest_seconds: f64,
    error: Option<io::Error>,
}

impl Syncer {
    fn start(file: Arc<dyn Storage>) -> io::Result<Self> {
        let shared = Arc::<(Mutex<SyncState>, Condvar)>::default();
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("journal-fsync".to_owned());
        thread.spawn(move || run_syncs(&of_thread, &*file))?;
        Ok(Self { shared })
    }

    /// Asks for an fsync; false where one is still under way.
    fn request(&self) -> bool {
        let mut state = locked(&self.shared.0);
        let idle = state.busy_since.is_none();
        if idle {
            state.busy_since = Some(Instant::now());
            self.shared.1.notify_all();
        }
        idle
    }

    /// Waits for the end of the fsync under way.
    fn wait(&self) {
        let mut state = locked(&self.shared.0);
        while state.busy_since.is_some() {
            state = self.shared.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take_error(&self) -> Option<io::Error> {
        locked(&self.shared.0).error.take()
    }

    fn longest_seconds(&self) -> f64 {
        let state = locked(&self.shared.0);
        let now = state.busy_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        state.longest_seconds.max(now)
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        locked(&self.shared.0).closed = true;
        self.shared.1.notify_all();
    }
}

fn run_syncs((state, changed): &(Mutex<SyncState>, Condvar), file: &dyn Storage) {
    let mut state_now = locked(state);
    loop {
        let Some(since) = state_now.busy_since else {
            if state_now.closed {
                return;
            }
            state_now = changed.wait(state_now).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state_now);
        let result = file.sync();
        state_now = locked(state);
        state_now.longest_seconds = state_now.longest_seconds.max(since.elapsed().as_secs_f64());
        state_now.error = result.err();
        state_now.busy_since = None;
        changed.notify_all();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::error::ErrorKind as Kind;

    fn header() -> JournalHeader {
        JournalHeader {
            run_key: "run".to_owned(),
            launch: 3,
            rank: 7,
            host: "node1".to_owned(),
            slurm_job_id: Some("12".to_owned()),
            started_unix_seconds: 1,
        }
    }

    fn id(index: u64) -> RecordId {
        RecordId { index, key: 0, attempt: 0 }
    }

    /// A file in memory with room for so many bytes; it gives the errors it is told to, and
    /// may wait for a word before an fsync ends.
    struct Faulty {
        bytes: Mutex<Vec<u8>>,
        room_bytes: usize,
        sync_errors: Mutex<Vec<i32>>,
        syncs: Mutex<u64>,
        gate: Option<Mutex<mpsc::Receiver<()>>>,
    }

    impl Faulty {
        fn new(room_bytes: usize, sync_errors: &[i32]) -> Self {
            Self {
                bytes: Mutex::default(),
                room_bytes,
                sync_errors: Mutex::new(sync_errors.to_vec()),
                syncs: Mutex::new(0),
                gate: None,
            }
        }
    }

    impl Storage for Faulty {
        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
            let mut held = locked(&self.bytes);
            let room = (self.room_bytes - held.len()).min(bytes.len());
            if room == 0 {
                return Err(io::Error::from_raw_os_error(28)); // ENOSPC
            }
            assert_eq!(offset, held.len() as u64);
            held.extend(&bytes[..room]);
            Ok(room)
        }

        fn set_len(&self, bytes: u64) -> io::Result<()> {
            locked(&self.bytes).truncate(bytes as usize);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            if let Some(gate) = &self.gate {
                locked(gate).recv().unwrap();
            }
            *locked(&self.syncs) += 1;
            let error = locked(&self.sync_errors).pop();
            error.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
        }
    }

    fn writer(file: &Arc<Faulty>, records: u64) -> Result<JournalWriter> {
        let policy = SyncPolicy { records, seconds: 5.0 };
        JournalWriter::begin("/run/journal/x.farm".into(), file.clone(), &header(), policy)
    }

    /// Every call gives the error, and none adds a byte to the file.
    fn assert_stays_failed(writer: &mut JournalWriter, file: &Faulty, error: &Error) {
        let before = locked(&file.bytes).clone();
        for _ in 0..2 {
            assert_eq!(writer.start(id(9)).as_ref(), Err(error));
            assert_eq!(writer.append(id(9), b"{}\n", false).as_ref(), Err(error));
            assert_eq!(writer.save(id(9), b"x").as_ref(), Err(error));
            assert_eq!(writer.flush(1e9).as_ref(), Err(error));
            assert_eq!(writer.sync().as_ref(), Err(error));
        }
        assert_eq!(*locked(&file.bytes), before);
    }

    /// At every byte at which the disk may be full: the whole frames stay, and only those.
    #[test]
    fn a_full_disk_leaves_whole_frames_and_an_error_that_lasts() {
        let whole = Arc::new(Faulty::new(1 << 20, &[]));
        let mut plain = writer(&whole, 100).unwrap();
        let mut ends = vec![locked(&whole.bytes).len()];
        for index in 0..3 {
            plain.append(id(index), b"{\"a\":1}\n", false).unwrap();
            plain.flush(0.0).unwrap();
            ends.push(locked(&whole.bytes).len());
        }
        let bytes = locked(&whole.bytes).clone();
        for room in ends[0]..bytes.len() {
            let file = Arc::new(Faulty::new(room, &[]));
            let mut writer = writer(&file, 100).unwrap();
            (0..3).for_each(|i| writer.append(id(i), b"{\"a\":1}\n", false).unwrap());
            let error = writer.flush(0.0).unwrap_err();
            let kept = *ends.iter().rfind(|&&end| end <= room).unwrap();
            assert_eq!(*locked(&file.bytes), bytes[..kept], "room {room}");
            assert_stays_failed(&mut writer, &file, &error);
            drop(writer);
            assert_eq!(*locked(&file.bytes), bytes[..kept], "room {room}");
            assert_eq!(error.kind.exit_code(), 1);
            for part in ["cannot keep finished records: /run/journal/x.farm", "make space"] {
                assert!(error.message.contains(part), "{error}");
            }
        }
        let full = Arc::new(Faulty::new(10, &[]));
        assert!(writer(&full, 100).is_err(), "no room for the header");
    }

    #[test]
    fn a_full_device_is_an_error_with_exit_code_1() {
        let Ok(file) = OpenOptions::new().write(true).open("/dev/full") else { return };
        let disk = Arc::new(Disk { file, dir: Mutex::new(None) });
        let path = PathBuf::from("/run/journal/00003-00007.farm");
        let policy = SyncPolicy::default();
        let error = JournalWriter::begin(path, disk, &header(), policy).err().unwrap();
        assert!(error.message.contains("00003-00007.farm") && error.message.contains("make space"));
        assert_eq!(error.kind, Kind::Fault);
        assert_eq!(error.kind.exit_code(), 1);
    }

    #[test]
    fn an_fsync_error_in_the_background_comes_out_of_the_next_call_and_lasts() {
        let file = Arc::new(Faulty::new(1 << 20, &[5])); // EIO
        let mut writer = writer(&file, 1).unwrap();
        writer.append(id(0), b"{}\n", false).unwrap();
        writer.flush(0.0).unwrap();
        writer.syncer.wait();
        let error = writer.append(id(1), b"{}\n", false).unwrap_err();
        assert!(error.message.contains("what is journalled is safe; see to"), "{error}");
        assert_stays_failed(&mut writer, &file, &error);
        assert_eq!(*locked(&file.syncs), 1, "the kernel tells of lost pages once only");
    }

    #[test]
    fn an_fsync_error_comes_out_of_sync_and_lasts() {
        for errors in [[5].as_slice(), &[122]] {
            let file = Arc::new(Faulty::new(1 << 20, errors));
            let mut writer = writer(&file, 100).unwrap();
            writer.append(id(0), b"{}\n", false).unwrap();
            let error = writer.sync().unwrap_err();
            assert_eq!(error.message.contains("make space"), errors == [122]); // EDQUOT
            assert_stays_failed(&mut writer, &file, &error);
        }
    }

    /// When flushes bring records to the disk: (records added, now, fsyncs begun so far).
    #[test]
    fn fsyncs_come_by_count_and_by_time() {
        let file = Arc::new(Faulty::new(1 << 20, &[]));
        let mut writer = writer(&file, 3).unwrap();
        let steps = [
            (0, 100.0, 0), // no record: nothing to bring
            (2, 101.0, 0),
            (1, 102.0, 1), // the third record
            (1, 103.0, 1),
            (0, 107.9, 1),
            (0, 108.0, 2), // five seconds after the first flush of it
            (0, 200.0, 2),
            (7, 201.0, 3),
        ];
        for (records, now_seconds, syncs) in steps {
            (0..records).for_each(|_| writer.append(id(0), b"{}\n", true).unwrap());
            writer.start(id(1)).unwrap();
            writer.flush(now_seconds).unwrap();
            writer.syncer.wait();
            assert_eq!(*locked(&file.syncs), syncs, "at {now_seconds}");
        }
    }

    #[test]
    fn the_engine_does_not_wait_for_a_slow_fsync_but_sync_does() {
        let (go, gate) = mpsc::channel();
        let gate = Some(Mutex::new(gate));
        let file = Arc::new(Faulty { gate, ..Faulty::new(1 << 20, &[]) });
        let mut writer = writer(&file, 1).unwrap();
        for index in 0..5 {
            writer.append(id(index), b"{}\n", false).unwrap();
            writer.flush(0.0).unwrap(); // returns while the first fsync still waits
        }
        assert_eq!(*locked(&file.syncs), 0);
        assert!(writer.longest_sync_seconds() > 0.0);
        go.send(()).unwrap();
        writer.syncer.wait();
        writer.flush(0.0).unwrap(); // what came meanwhile
        (0..2).for_each(|_| go.send(()).unwrap());
        writer.sync().unwrap();
        assert_eq!(*locked(&file.syncs), 3);
        // With an fsync that never ends the writer can still go.
        writer.append(id(9), b"{}\n", false).unwrap();
        writer.flush(0.0).unwrap();
        drop(writer);
        go.send(()).unwrap();
    }

    #[test]
    fn no_file_is_written_by_two_and_a_missing_directory_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        let create = |dir: &Path| JournalWriter::create(dir, &header(), SyncPolicy::default());
        create(dir.path()).unwrap().append(id(0), b"{}\n", false).unwrap(); // dropped: written
        let path = dir.path().join("00003-00007.farm");
        let before = std::fs::read(&path).unwrap();
        assert!(before.windows(2).any(|two| two == b"{}"));
        let error = create(dir.path()).err().unwrap();
        assert!(error.message.contains("00003-00007.farm"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        let error = create(&dir.path().join("gone")).err().unwrap();
        assert!(error.message.contains("all nodes share (--run-dir)"), "{error}");
        assert_eq!(error.kind, Kind::Input);
    }

    #[test]
    fn a_line_with_a_newline_inside_is_refused_and_the_journal_goes_on() {
        let file = Arc::new(Faulty::new(1 << 20, &[]));
        let mut writer = writer(&file, 1).unwrap();
        assert!(writer.append(id(0), b"{\n}\n", false).is_err());
        writer.append(id(0), b"{}", false).unwrap();
        writer.sync().unwrap();
    }

    /// Much at once does not gather without end.
    #[test]
    fn a_full_buffer_is_written_without_a_flush() {
        let file = Arc::new(Faulty::new(8 << 20, &[]));
        let mut writer = writer(&file, 1).unwrap();
        (0..5).for_each(|i| writer.save(id(i), &vec![b'x'; 1 << 19]).unwrap());
        assert!(locked(&file.bytes).len() >= 4 << 19 && writer.buffer.len() < BUFFER_BYTES);
    }
}
