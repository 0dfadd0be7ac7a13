//! Sums and gathers of tensors over a tensor-parallel group, on the host.
//!
//! Sums are taken in rank order for every element, whatever the size of the message
//! and however it was cut, so a record's bytes do not depend on what else was in the
//! batch. A library's own all-reduce changes its algorithm, and with it the order,
//! with the size.

use std::sync::Arc;

use super::{Communicator, tags};

/// Up to this many bytes all ranks exchange everything in one step; above, each sums a
/// share of the elements, in two steps with less traffic.
const DIRECT_BYTES_MAX: usize = 64 << 10;

/// What a tensor-parallel layer needs from its group.
pub trait TensorComm: Send + Sync {
    /// This rank in the group.
    fn rank(&self) -> usize;
    /// Ranks of the group.
    fn size(&self) -> usize;
    /// `values` becomes the sum over ranks, ((rank 0 + rank 1) + rank 2) + …, on every
    /// rank; lengths must agree.
    fn all_reduce_sum(&self, values: &mut [f32]);
    /// The ranks' `local` one after another in rank order; lengths may differ.
    fn all_gather(&self, local: &[f32]) -> Vec<f32>;
    /// `data` of rank `root` on every rank; lengths must agree.
    fn broadcast_bytes(&self, root: usize, data: &mut [u8]);
}

/// The group of one rank: nothing to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTensorComm;

impl TensorComm for NoTensorComm {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _values: &mut [f32]) {}

    fn all_gather(&self, local: &[f32]) -> Vec<f32> {
        local.to_vec()
    }

    fn broadcast_bytes(&self, _root: usize, _data: &mut [u8]) {}
}

/// A group that exchanges tensors in host memory over a [`Communicator`].
pub struct HostTensorComm {
    comm: Arc<dyn Communicator>,
    direct_bytes_max: usize,
}

impl HostTensorComm {
    /// Over the ranks of `comm`.
    pub fn new(comm: Arc<dyn Communicator>) -> Self {
        Self { comm, direct_bytes_max: DIRECT_BYTES_MAX }
    }

    /// The ranks of this group but this one.
    fn peers(&self) -> impl Iterator<Item = usize> {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        // Each starts with its own neighbour, so that not all send to rank 0 at once.
        (1..size).map(move |distance| (rank + distance) % size)
    }

    /// Sends `values` to every other rank.
    fn send_to_peers(&self, values: &[f32]) {
        for peer in self.peers() {
            self.comm.send(peer, tags::TENSOR, bytes_of(values));
        }
    }

    /// Replaces `own` by the sum in rank order of what every rank holds for it; the
    /// others' parts are already on their way here.
    fn sum_in_rank_order(&self, own: &mut [f32]) {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        if rank == 0 {
            for peer in 1..size {
                self.receive_each(peer, own, |sum, value| *sum += value);
            }
            return;
        }
        let mut sum = vec![0f32; own.len()];
        self.receive_each(0, &mut sum, |sum, value| *sum = value);
        for peer in 1..size {
            if peer == rank {
                sum.iter_mut().zip(&*own).for_each(|(sum, value)| *sum += value);
            } else {
                self.receive_each(peer, &mut sum, |sum, value| *sum += value);
            }
        }
        own.copy_from_slice(&sum);
    }

    /// Calls `combine` on each of `values` and the matching value received from `peer`.
    fn receive_each(&self, peer: usize, values: &mut [f32], combine: impl Fn(&mut f32, f32)) {
        let (_, received) = self.comm.recv(Some(peer), tags::TENSOR);
        assert_eq!(
            received.len(),
            size_of_val(values),
            "tensor-parallel ranks {} and {peer} are not at the same sum",
            self.comm.rank()
        );
        values
            .iter_mut()
            .zip(floats_of(&received))
            .for_each(|(value, received)| combine(value, received));
    }
}

impl TensorComm for HostTensorComm {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        if size == 1 {
            return;
        }
        // With two ranks the shares would save nothing that a second step does not cost.
        if size_of_val(values) <= self.direct_bytes_max || size == 2 {
            self.send_to_peers(values);
            self.sum_in_rank_order(values);
            return;
        }
        let share = |rank: usize| values.len() * rank / size..values.len() * (rank + 1) / size;
        let own = share(rank);
        let shares: Vec<_> = (0..size).map(share).collect();
        for peer in self.peers() {
            self.comm.send(peer, tags::TENSOR, bytes_of(&values[shares[peer].clone()]));
        }
        self.sum_in_rank_order(&mut values[own.clone()]);
        self.send_to_peers(&values[own]);
        for peer in self.peers() {
            let its_share = &mut values[shares[peer].clone()];
            self.receive_each(peer, its_share, |value, sum| *value = sum);
        }
    }

    fn all_gather(&self, local: &[f32]) -> Vec<f32> {
        self.send_to_peers(local);
        let mut all = Vec::with_capacity(local.len() * self.comm.size());
        for rank in 0..self.comm.size() {
            if rank == self.comm.rank() {
                all.extend_from_slice(local);
            } else {
                all.extend(floats_of(&self.comm.recv(Some(rank), tags::TENSOR).1));
            }
        }
        all
    }

    fn broadcast_bytes(&self, root: usize, data: &mut [u8]) {
        self.comm.broadcast(root, data);
    }
}

/// A copy of `values` as bytes in this machine's order; all ranks of a group are alike.
fn bytes_of(values: &[f32]) -> Vec<u8> {
    // SAFETY: any f32 is four plain bytes, and bytes need no alignment.
    let bytes =
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    // A communicator may add a byte of its own without moving the rest.
    let mut copy = Vec::with_capacity(bytes.len() + 1);
    copy.extend_from_slice(bytes);
    copy
}

fn floats_of(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::LocalComm;

    /// Values whose sum depends on the order it is taken in.
    fn value(rank: usize, index: usize) -> f32 {
        let spread = [1.0, 1e8, -1e8, 3.3e-4, 7e5];
        spread[(rank + index) % spread.len()] * (1.0 + index as f32 * 0.37)
    }

    #[test]
    fn sums_are_in_rank_order_however_they_are_cut() {
        for size in 1..=5 {
            for (length, direct_bytes_max) in [(1, 0), (7, 0), (7, 1 << 20), (1000, 0)] {
                let sums = LocalComm::run(size, |comm| {
                    let mut values: Vec<f32> =
                        (0..length).map(|index| value(comm.rank(), index)).collect();
                    HostTensorComm { comm, direct_bytes_max }.all_reduce_sum(&mut values);
                    values
                });
                let expected: Vec<u32> = (0..length)
                    .map(|index| {
                        (1..size)
                            .fold(value(0, index), |sum, rank| sum + value(rank, index))
                            .to_bits()
                    })
                    .collect();
                for sum in sums {
                    let bits: Vec<u32> = sum.iter().map(|sum| sum.to_bits()).collect();
                    assert_eq!(bits, expected, "{size} ranks, {length} values");
                }
            }
        }
    }
}
