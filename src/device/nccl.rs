//! Sums and gathers from device to device by NCCL 2, on the device's own queue.

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use super::collectives::DeviceComm;
use super::libraries::{find, function};
use super::{Array, Device};
use crate::comm::TensorComm;
use crate::{Error, Result};

/// The plain name is there where a development package is.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

// nccl.h.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
/// Bytes of an id.
const ID_BYTES: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; ID_BYTES]);

type Comm = *mut c_void;
type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type CommInitRank = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int;
type CommDestroy = unsafe extern "C" fn(Comm) -> c_int;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Comm,
    *mut c_void,
) -> c_int;
type AllGather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int;

/// A group's communicator.
pub struct Nccl {
    comm: Comm,
    rank: usize,
    size: usize,
    destroy: CommDestroy,
    all_reduce: AllReduce,
    all_gather: AllGather,
    // The communicator uses its context.
    _device: Device,
}

// SAFETY: a communicator may change threads; a rank queues from one thread at a time.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// The version of the library; `None` where there is none. All ranks of a group need the
    /// same.
    pub fn version() -> Option<i32> {
        let library = find(&NAMES)?;
        let mut version = 0;
        // SAFETY: the signature of nccl.h.
        let status = unsafe {
            let get: GetVersion = function(library, "ncclGetVersion").ok()?;
            get(&raw mut version)
        };
        (status == 0).then_some(version)
    }

    /// Collective over the group, whose messages carry rank 0's id to the others. Every rank
    /// needs a device of its own.
    ///
    /// # Errors
    /// No library; what NCCL says. Where rank 0 gets no id, an error on every rank.
    pub fn new(device: &Device, group: &Arc<dyn TensorComm>) -> Result<Self> {
        let (rank, size) = (group.rank(), group.size());
        let library = find(&NAMES).ok_or_else(|| Error::input("NCCL is not found"))?;
        // SAFETY: the signatures of nccl.h.
        let (unique_id, init, destroy, all_reduce, all_gather) = unsafe {
            (
                function::<GetUniqueId>(library, "ncclGetUniqueId")?,
                function::<CommInitRank>(library, "ncclCommInitRank")?,
                function(library, "ncclCommDestroy")?,
                function(library, "ncclAllReduce")?,
                function(library, "ncclAllGather")?,
            )
        };
        let id = shared_id(unique_id, group)?;
        // Makes the device's context current on this thread.
        device.synchronize()?;
        let mut comm = std::ptr::null_mut();
        // SAFETY: all ranks of the group come here with the same id, each on its own device.
        let status = unsafe { init(&raw mut comm, size as c_int, id, rank as c_int) };
        check(status, "joining the group")?;
        let _device = device.clone();
        Ok(Self { comm, rank, size, destroy, all_reduce, all_gather, _device })
    }
}

/// Rank 0's id, on every rank.
fn shared_id(unique_id: GetUniqueId, group: &Arc<dyn TensorComm>) -> Result<UniqueId> {
    // The id, and first its status.
    let mut message = [0u8; 1 + ID_BYTES];
    if group.rank() == 0 {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: room for an id.
        message[0] = u8::from(unsafe { unique_id(&raw mut id) } != 0);
        for (to, from) in message[1..].iter_mut().zip(id.0) {
            *to = from as u8;
        }
    }
    group.broadcast_bytes(0, &mut message);
    if message[0] != 0 {
        return Err(Error::fault(
            "NCCL: rank 0 gets no id for the group; NCCL_DEBUG=WARN says more",
        ));
    }
    let mut id = UniqueId([0; ID_BYTES]);
    for (to, from) in id.0.iter_mut().zip(&message[1..]) {
        *to = *from as c_char;
    }
    Ok(id)
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: made by `new`; nothing is queued on it any more.
        unsafe { (self.destroy)(self.comm) };
    }
}

impl DeviceComm for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce_sum(&self, device: &Device, values: &Array) -> Result<()> {
        let (at, len) = (values.address() as *mut c_void, values.len());
        let stream = device.stream() as *mut c_void;
        // SAFETY: an array of as many f32 values, in place, on the device's queue.
        let status = unsafe { (self.all_reduce)(at, at, len, FLOAT32, SUM, self.comm, stream) };
        check(status, "a sum over the group")
    }

    fn all_gather(&self, device: &Device, local: &Array, all: &Array) -> Result<()> {
        assert!(all.len() >= local.len() * self.size);
        let (from, to) = (local.address() as *const c_void, all.address() as *mut c_void);
        let stream = device.stream() as *mut c_void;
        // SAFETY: arrays of as many f32 values, on the device's queue.
        let status =
            unsafe { (self.all_gather)(from, to, local.len(), FLOAT32, self.comm, stream) };
        check(status, "a gather over the group")
    }

    fn can_be_captured(&self) -> bool {
        true
    }
}

fn check(status: c_int, what: &str) -> Result<()> {
    match status {
        0 => Ok(()),
        status => {
            let hint = "NCCL_DEBUG=WARN says more";
            Err(Error::fault(format!("NCCL: {what}: status {status}; {hint}")))
        }
    }
}
