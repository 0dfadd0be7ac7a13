//! How ranks talk: point-to-point messages and collectives over bytes.
//!
//! [`Communicator`] has two implementations: [`LocalComm`] (n ranks as n threads
//! of one process) and `MpiComm` (rsmpi; the only file that names MPI). Reductions
//! of tensors go through [`TensorComm`], which keeps one summation order.
//! Left out: device collectives (NCCL), which are another `TensorComm`.

use std::sync::Arc;

/// A message tag; see [`tags`].
pub type Tag = u16;

/// A group of ranks that exchange bytes. All methods of one group may be called
/// from one thread of the rank at a time.
pub trait Communicator: Send + Sync {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Host name of this rank's node.
    fn host(&self) -> &str;
    /// Returns when every rank has called it.
    fn barrier(&self);
    /// `data` of rank `root` arrives in `data` of every rank; lengths must agree.
    /// Chunked below 2^31 bytes.
    fn broadcast(&self, root: usize, data: &mut [u8]);
    /// Every rank's `data` (lengths may differ), in rank order, at `root`; `None` elsewhere.
    fn gather(&self, root: usize, data: &[u8]) -> Option<Vec<Vec<u8>>>;
    /// Every rank's `data` (lengths may differ), in rank order, everywhere.
    fn all_gather(&self, data: &[u8]) -> Vec<Vec<u8>>;
    /// Sends without waiting for the receiver (the bytes are copied or owned until sent).
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
}
