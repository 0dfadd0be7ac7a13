//! Ranks as MPI processes. The only file that names MPI.
//!
//! Every call into the library happens under one process-wide lock, so a
//! [`MpiComm`] may be shared among threads with no more than
//! `MPI_THREAD_SERIALIZED`. Waiting is polling: briefly at full speed, then
//! giving the core away, then with sleeps, never inside the library, whose own
//! waits spin. A message goes out with one byte more than its data: 0, or 1 if it
//! is only a header (total and chunk length) and the data follows in chunks,
//! because counts in MPI are 32-bit. Sends keep their bytes here until they are
//! through.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ::mpi::environment::{self, Threading, Universe};
use ::mpi::ffi;

use super::{Communicator, Tag, host_name, tags};
use crate::{Error, Result};

/// Largest count handed to MPI.
const CHUNK_BYTES_MAX: usize = 1 << 30;
/// The last byte of a message: the data is before it.
const WHOLE: u8 = 0;
/// The last byte of a message: before it, the total and the chunk length; data follows.
const HEADER: u8 = 1;

/// What is under way in the library, in all groups, and the right to call it.
struct Library {
    outgoing: Vec<Outgoing>,
    incoming: Vec<Incoming>,
}

/// A message that is being sent; `data` must stay where it is until `requests` are done.
struct Outgoing {
    requests: Vec<ffi::MPI_Request>,
    _data: Vec<u8>,
}

/// A message that is being received into `data`.
struct Incoming {
    group: ffi::MPI_Comm,
    source: usize,
    tag: Tag,
    data: Vec<u8>,
    requests: Vec<ffi::MPI_Request>,
    /// Whether `data` is what the sender gave, without the last byte.
    is_data: bool,
}

// SAFETY: the raw handles inside are process-wide names, not tied to a thread; the
// library is initialized for calls from any thread, one at a time, and the lock
// around this value makes it so.
unsafe impl Send for Library {}

static LIBRARY: Mutex<Library> = Mutex::new(Library { outgoing: Vec::new(), incoming: Vec::new() });

fn library() -> MutexGuard<'static, Library> {
    LIBRARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The library's name and version, known before it is initialized.
pub(super) fn library_version() -> String {
    let version = environment::library_version().unwrap_or_default();
    version.split(',').next().unwrap_or_default().trim_end_matches('\0').to_owned()
}

/// MPI, initialized; finalized when dropped. `main` holds it to the end.
pub struct MpiWorld {
    _universe: Universe,
}

impl MpiWorld {
    /// Initializes MPI. Once a process; ranks that are not started together each get a
    /// world of one.
    pub fn start() -> Result<Self> {
        let (universe, threading) =
            environment::initialize_with_threading(Threading::Serialized)
                .ok_or_else(|| Error::fault("MPI is already initialized in this process"))?;
        // Funneled is all that some builds offer. Calls are serialized here anyway, and
        // such builds differ only in what they promise.
        if threading < Threading::Funneled {
            return Err(Error::fault(format!(
                "{} supports no threads (MPI_THREAD_SINGLE); use an MPI built with thread support",
                library_version()
            )));
        }
        Ok(Self { _universe: universe })
    }

    /// All ranks of the job.
    pub fn comm(&self) -> MpiComm {
        self.comm_with_chunk_bytes(CHUNK_BYTES_MAX)
    }

    /// As [`MpiWorld::comm`], with messages above `chunk_bytes` sent in chunks (for tests).
    #[doc(hidden)]
    pub fn comm_with_chunk_bytes(&self, chunk_bytes: usize) -> MpiComm {
        let _library = library();
        // SAFETY: a constant of the library, which is initialized.
        let world = unsafe { ffi::RSMPI_COMM_WORLD };
        MpiComm::of_group(world, chunk_bytes.clamp(1, CHUNK_BYTES_MAX))
    }
}

impl Drop for MpiWorld {
    /// Lets the last sends finish; finalizing (by the universe) then waits for the others.
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let mut backoff = Backoff::default();
        while !library().finish_sends() {
            backoff.wait();
        }
    }
}

/// A group of MPI processes. Groups live as long as the process: freeing one is a
/// collective call, which a drop cannot promise to be.
pub struct MpiComm {
    group: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    host: String,
    chunk_bytes: usize,
}

// SAFETY: `group` is a process-wide handle that is only used under the lock of LIBRARY.
unsafe impl Send for MpiComm {}
// SAFETY: as above; all else is immutable.
unsafe impl Sync for MpiComm {}

impl MpiComm {
    /// The caller holds the lock.
    fn of_group(group: ffi::MPI_Comm, chunk_bytes: usize) -> Self {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a live group, and places for the two answers.
        unsafe {
            ffi::MPI_Comm_rank(group, &mut rank);
            ffi::MPI_Comm_size(group, &mut size);
        }
        Self { group, rank: rank as usize, size: size as usize, host: host_name(), chunk_bytes }
    }
}

impl Communicator for MpiComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn host(&self) -> &str {
        &self.host
    }

    fn send(&self, to: usize, tag: Tag, mut data: Vec<u8>) {
        let mut library = library();
        library.finish_sends();
        if data.len() < self.chunk_bytes {
            data.push(WHOLE);
            library.send(self.group, to, message_tag(tag), data, self.chunk_bytes);
            return;
        }
        let mut header = Vec::with_capacity(17);
        header.extend((data.len() as u64).to_le_bytes());
        header.extend((self.chunk_bytes as u64).to_le_bytes());
        header.push(HEADER);
        library.send(self.group, to, message_tag(tag), header, CHUNK_BYTES_MAX);
        library.send(self.group, to, chunk_tag(tag), data, self.chunk_bytes);
    }

    fn try_recv(&self, tag: Tag) -> Option<(usize, Vec<u8>)> {
        library().poll(self.group, None, tag)
    }

    fn recv(&self, from: Option<usize>, tag: Tag) -> (usize, Vec<u8>) {
        let mut backoff = Backoff::default();
        loop {
            if let Some(message) = library().poll(self.group, from, tag) {
                return message;
            }
            backoff.wait();
        }
    }

    fn split(&self, color: usize, key: usize) -> Arc<dyn Communicator> {
        // The library's split spins until the last rank comes: wait for it here.
        self.barrier();
        let _library = library();
        // SAFETY: overwritten by the call, which all ranks of the group make.
        let mut group = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: a live group and a place for the new one; colors and keys are ranks or
        // smaller and fit.
        unsafe { ffi::MPI_Comm_split(self.group, color as c_int, key as c_int, &mut group) };
        Arc::new(Self::of_group(group, self.chunk_bytes))
    }

    fn split_shared_memory(&self) -> Arc<dyn Communicator> {
        self.barrier();
        let _library = library();
        // SAFETY: overwritten by the call, which all ranks of the group make.
        let mut group = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: a live group, constants of the library, and a place for the new group.
        unsafe {
            ffi::MPI_Comm_split_type(
                self.group,
                ffi::RSMPI_COMM_TYPE_SHARED,
                self.rank as c_int,
                ffi::RSMPI_INFO_NULL,
                &mut group,
            )
        };
        Arc::new(Self::of_group(group, self.chunk_bytes))
    }

    fn abort(&self, exit_code: i32) -> ! {
        // A thread that panicked inside the library may hold the lock for ever; at this
        // point the end matters more than the lock.
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut held = LIBRARY.try_lock();
        while held.is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            held = LIBRARY.try_lock();
        }
        // SAFETY: the library is initialized; the call does not return to its callers.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, exit_code) };
        std::process::exit(exit_code)
    }
}

impl Library {
    /// Starts sending `data` in one message, or several if it is longer than `chunk_bytes`.
    fn send(
        &mut self,
        group: ffi::MPI_Comm,
        to: usize,
        tag: c_int,
        data: Vec<u8>,
        chunk_bytes: usize,
    ) {
        let start = |chunk: &[u8]| {
            // SAFETY: overwritten by the call.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            // SAFETY: the chunk is part of `data`, whose bytes stay in place (moving the
            // Vec does not move them) until the request is done; its length fits a c_int.
            unsafe {
                ffi::MPI_Isend(
                    chunk.as_ptr().cast::<c_void>(),
                    chunk.len() as c_int,
                    ffi::RSMPI_UINT8_T,
                    to as c_int,
                    tag,
                    group,
                    &mut request,
                )
            };
            request
        };
        let requests = data.chunks(chunk_bytes).map(start).collect();
        self.outgoing.push(Outgoing { requests, _data: data });
        self.finish_sends();
    }

    /// Forgets the sends that are through; whether that was all of them.
    fn finish_sends(&mut self) -> bool {
        self.outgoing.retain_mut(|message| !all_done(&mut message.requests));
        self.outgoing.is_empty()
    }

    /// A message for `tag`, if one has arrived as a whole.
    fn poll(
        &mut self,
        group: ffi::MPI_Comm,
        from: Option<usize>,
        tag: Tag,
    ) -> Option<(usize, Vec<u8>)> {
        self.finish_sends();
        let wanted = |message: &Incoming| {
            message.group == group
                && message.tag == tag
                && from.is_none_or(|from| from == message.source)
        };
        // One message of a sender and tag at a time: they must not overtake each other.
        if !self.incoming.iter().any(wanted) {
            let message = match_message(group, from, tag)?;
            self.incoming.push(message);
        }
        let place =
            self.incoming.iter_mut().position(|message| wanted(message) && message.advance())?;
        let message = self.incoming.swap_remove(place);
        Some((message.source, message.data))
    }
}

impl Incoming {
    /// Takes the message as far as it goes; whether it is complete.
    fn advance(&mut self) -> bool {
        loop {
            if !all_done(&mut self.requests) {
                return false;
            }
            if self.is_data {
                return true;
            }
            self.is_data = true;
            match self.data.pop() {
                Some(HEADER) if self.data.len() == 16 => self.receive_chunks(),
                _ => return true,
            }
        }
    }

    /// `data` is a header: makes room for what it announces and asks for the chunks.
    fn receive_chunks(&mut self) {
        let word = |bytes: &[u8]| {
            bytes.iter().rev().fold(0, |word: usize, &byte| word << 8 | usize::from(byte))
        };
        let (total_bytes, chunk_bytes) = (word(&self.data[..8]), word(&self.data[8..]));
        self.data = vec![0; total_bytes];
        let (group, source, tag) = (self.group, self.source, chunk_tag(self.tag));
        let start = |chunk: &mut [u8]| {
            // SAFETY: overwritten by the call.
            let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
            // SAFETY: the chunk is part of `self.data`, which is neither resized nor
            // dropped until the request is done; its length fits a c_int.
            unsafe {
                ffi::MPI_Irecv(
                    chunk.as_mut_ptr().cast::<c_void>(),
                    chunk.len() as c_int,
                    ffi::RSMPI_UINT8_T,
                    source as c_int,
                    tag,
                    group,
                    &mut request,
                )
            };
            request
        };
        self.requests = self.data.chunks_mut(chunk_bytes).map(start).collect();
    }
}

/// Starts receiving a message that is there, if one is. Matched, so that no other
/// receive can take it in between.
fn match_message(group: ffi::MPI_Comm, from: Option<usize>, tag: Tag) -> Option<Incoming> {
    // SAFETY: constants of the library; `status` is plain data that the calls fill.
    let (source, mut message, mut request, mut status) = unsafe {
        (
            from.map_or(ffi::RSMPI_ANY_SOURCE, |from| from as c_int),
            ffi::RSMPI_MESSAGE_NULL,
            ffi::RSMPI_REQUEST_NULL,
            std::mem::zeroed::<ffi::MPI_Status>(),
        )
    };
    let (mut found, mut count) = (0, 0);
    // SAFETY: a live group and places for the answers.
    unsafe {
        ffi::MPI_Improbe(source, message_tag(tag), group, &mut found, &mut message, &mut status)
    };
    if found == 0 {
        return None;
    }
    // SAFETY: `status` is that of the message found.
    unsafe { ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut count) };
    let mut data = vec![0u8; count as usize];
    // SAFETY: the message is as long as `data`, whose bytes stay in place until the
    // request is done.
    unsafe {
        ffi::MPI_Imrecv(
            data.as_mut_ptr().cast::<c_void>(),
            count,
            ffi::RSMPI_UINT8_T,
            &mut message,
            &mut request,
        )
    };
    let source = status.MPI_SOURCE as usize;
    Some(Incoming { group, source, tag, data, requests: vec![request], is_data: false })
}

/// Tests `requests` and forgets those that are done; whether none is left.
fn all_done(requests: &mut Vec<ffi::MPI_Request>) -> bool {
    requests.retain_mut(|request| {
        let mut done = 0;
        // SAFETY: a live request; it is forgotten once done.
        unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
        done == 0
    });
    requests.is_empty()
}

/// MPI's tag for messages of `tag`.
fn message_tag(tag: Tag) -> c_int {
    assert!(tag < tags::LIMIT, "tag {tag} is above the limit of {}", tags::LIMIT);
    c_int::from(tag) * 2
}

/// MPI's tag for the chunks of long messages of `tag`: apart, so that a header is never
/// taken for a chunk.
fn chunk_tag(tag: Tag) -> c_int {
    message_tag(tag) + 1
}

/// Waits a little longer each time: tensor-parallel peers answer within microseconds,
/// a straggler may take an hour.
#[derive(Default)]
struct Backoff {
    started: Option<Instant>,
    polls: u32,
}

impl Backoff {
    /// Polls at full speed; on a core shared with the peer they only cost it time.
    const SPINS: u32 = 20;
    const YIELD_FOR: Duration = Duration::from_millis(2);
    const SLEEP: Duration = Duration::from_micros(50);
    const SLEEP_MAX: Duration = Duration::from_micros(200);
    const LONG_WAIT: Duration = Duration::from_millis(50);

    fn wait(&mut self) {
        self.polls += 1;
        if self.polls <= Self::SPINS {
            std::hint::spin_loop();
            return;
        }
        let waited = self.started.get_or_insert_with(Instant::now).elapsed();
        if waited < Self::YIELD_FOR {
            thread::yield_now();
        } else if waited < Self::LONG_WAIT {
            thread::sleep(Self::SLEEP);
        } else {
            thread::sleep(Self::SLEEP_MAX);
        }
    }
}
