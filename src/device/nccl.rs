//! Sums and gathers from device to device by NCCL, on the device's own queue.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::nccl::{result as nccl, sys};

use super::collectives::DeviceComm;
use super::{Array, Device};
use crate::comm::TensorComm;
use crate::{Error, Result};

/// A group's communicator.
pub struct Nccl {
    comm: sys::ncclComm_t,
    rank: usize,
    size: usize,
    /// The communicator uses the device's context.
    _device: Device,
}

// SAFETY: a communicator may change threads; a rank queues from one thread at a time.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Whether the library is there.
    pub fn is_present() -> bool {
        // SAFETY: looks for the library and nothing more.
        unsafe { sys::is_culib_present() }
    }

    /// Collective over the group, whose messages carry rank 0's id to the others. Every rank
    /// needs a device of its own.
    ///
    /// # Errors
    /// A fault of NCCL; alike on all ranks where rank 0 gets no id, by a group that hangs nobody.
    pub fn new(device: &Device, group: &Arc<dyn TensorComm>) -> Result<Self> {
        let (rank, size) = (group.rank(), group.size());
        // The id, and whether there is one.
        let mut message = [0u8; 129];
        let mut failed = None;
        if rank == 0 {
            match nccl::get_uniqueid() {
                Ok(id) => {
                    message[0] = 1;
                    for (to, from) in message[1..].iter_mut().zip(id.internal) {
                        *to = from as u8;
                    }
                }
                Err(error) => failed = Some(fault("an id for the group", &error)),
            }
        }
        group.broadcast_bytes(0, &mut message);
        if message[0] == 0 {
            return Err(failed.unwrap_or_else(|| Error::fault("NCCL: rank 0 has no id")));
        }
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        for (to, from) in id.internal.iter_mut().zip(&message[1..]) {
            *to = *from as std::ffi::c_char;
        }
        device.synchronize()?;
        let mut comm = MaybeUninit::uninit();
        // SAFETY: the device's context is current on this thread after `synchronize`; all ranks
        // of the group come here with the same id.
        let comm = unsafe {
            nccl::comm_init_rank(comm.as_mut_ptr(), size as i32, id, rank as i32)
                .map_err(|error| fault("joining the group", &error))?;
            comm.assume_init()
        };
        Ok(Self { comm, rank, size, _device: device.clone() })
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // SAFETY: nothing is queued on it any more; a failure here has nobody to hear it.
        let _ = unsafe { nccl::comm_destroy(self.comm) };
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
        let at = values.address() as *mut c_void;
        // SAFETY: an array of as many f32 values, in place, on the device's queue.
        unsafe {
            nccl::all_reduce(
                at,
                at,
                values.len(),
                sys::ncclDataType_t::ncclFloat32,
                sys::ncclRedOp_t::ncclSum,
                self.comm,
                device.stream() as sys::cudaStream_t,
            )
        }
        .map_err(|error| fault("a sum over the group", &error))?;
        Ok(())
    }

    fn all_gather(&self, device: &Device, local: &Array, all: &Array) -> Result<()> {
        assert!(all.len() >= local.len() * self.size);
        // SAFETY: arrays of as many f32 values, on the device's queue.
        unsafe {
            nccl::all_gather(
                local.address() as *const c_void,
                all.address() as *mut c_void,
                local.len(),
                sys::ncclDataType_t::ncclFloat32,
                self.comm,
                device.stream() as sys::cudaStream_t,
            )
        }
        .map_err(|error| fault("a gather over the group", &error))?;
        Ok(())
    }

    fn can_be_captured(&self) -> bool {
        true
    }
}

fn fault(what: &str, error: &nccl::NcclError) -> Error {
    Error::fault(format!("NCCL: {what}: {:?}; NCCL_DEBUG=INFO says more", error.0))
}
