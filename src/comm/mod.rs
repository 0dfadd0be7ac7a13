//! How ranks talk: point-to-point messages and collectives over bytes.
//!
//! [`Communicator`] has two implementations: [`LocalComm`] (n ranks as n threads
//! of one process) and `MpiComm` (rsmpi; the only file that names MPI). Both only
//! move messages; the collectives are written once over those, so they order and
//! wait the same way everywhere. Reductions of tensors go through [`TensorComm`],
//! which keeps one summation order. [`world`] decides how this process was
//! started, [`Topology`] groups the ranks, [`agree`] settles failures.
//! Left out: device collectives (NCCL), which are another `TensorComm`.

use std::sync::Arc;

mod agree;
mod collectives;
#[doc(hidden)]
pub mod conformance;
mod launch;
mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod tensor;
mod topology;

pub use agree::agree;
pub(crate) use agree::agree_as;
pub use launch::{Launch, LaunchKind, World, world};
pub use local::LocalComm;
#[cfg(feature = "mpi")]
pub use mpi::{MpiComm, MpiWorld};
pub use tensor::{HostTensorComm, NoTensorComm, TensorComm};
pub use topology::{GroupLayout, Topology};

/// A message tag; see [`tags`].
pub type Tag = u16;

/// Which tags belong to whom. Tags stay below [`tags::LIMIT`].
pub mod tags {
    use super::Tag;

    /// The collectives of [`super::Communicator`].
    pub const COLLECTIVE: Tag = 1;
    /// The sums and gathers of [`super::TensorComm`].
    pub const TENSOR: Tag = 2;
    /// Chunks of the model on their way to the nodes.
    pub const STAGE_CHUNK: Tag = 3;
    /// Receipts for those chunks.
    pub const STAGE_RECEIPT: Tag = 4;
    /// The first tag that other modules may use.
    pub const FIRST_FREE: Tag = 16;
    /// One past the largest tag: MPI promises tags up to 32,767, and each tag takes two.
    pub const LIMIT: Tag = 16_383;
}

/// A group of ranks that exchange bytes. Any thread may call any method, but all
/// ranks must call the collectives in the same order.
pub trait Communicator: Send + Sync {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Host name of this rank's node.
    fn host(&self) -> &str;
    /// Sends without waiting for the receiver (the bytes are owned until sent).
    fn send(&self, to: usize, tag: Tag, data: Vec<u8>);
    /// A waiting message with this tag from any rank, if there is one. Messages of one
    /// sender with one tag arrive in order.
    fn try_recv(&self, tag: Tag) -> Option<(usize, Vec<u8>)>;
    /// Waits for a message with this tag from `from` (any rank if `None`).
    fn recv(&self, from: Option<usize>, tag: Tag) -> (usize, Vec<u8>);
    /// Groups the ranks with equal `color`, ordered by (`key`, rank). Collective.
    fn split(&self, color: usize, key: usize) -> Arc<dyn Communicator>;
    /// Groups the ranks that share memory (a node). Collective.
    fn split_shared_memory(&self) -> Arc<dyn Communicator>;
    /// Ends the whole job at once with this exit code (after a fault on one rank).
    fn abort(&self, exit_code: i32) -> !;

    /// Returns when every rank has called it.
    fn barrier(&self) {
        collectives::barrier(self);
    }
    /// `data` of rank `root` arrives in `data` of every rank; lengths must agree.
    /// Sent in chunks, so any length will do.
    fn broadcast(&self, root: usize, data: &mut [u8]) {
        collectives::broadcast(self, root, data);
    }
    /// Every rank's `data` (lengths may differ), in rank order, at `root`; `None` elsewhere.
    fn gather(&self, root: usize, data: &[u8]) -> Option<Vec<Vec<u8>>> {
        collectives::gather(self, root, data)
    }
    /// Every rank's `data` (lengths may differ), in rank order, everywhere.
    fn all_gather(&self, data: &[u8]) -> Vec<Vec<u8>> {
        collectives::all_gather(self, data)
    }
}

/// `data` of rank `root` on every rank; unlike [`Communicator::broadcast`] the other
/// ranks need not know its length (what they pass is ignored). Collective.
pub fn broadcast_vec(comm: &dyn Communicator, root: usize, data: Vec<u8>) -> Vec<u8> {
    let mut length = (data.len() as u64).to_le_bytes();
    comm.broadcast(root, &mut length);
    let mut data =
        if comm.rank() == root { data } else { vec![0; u64::from_le_bytes(length) as usize] };
    comm.broadcast(root, &mut data);
    data
}

/// The host name of this node.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
