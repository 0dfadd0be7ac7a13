//! The collectives, written once over point-to-point messages.
//!
//! Messages between two ranks keep their order and every rank calls the same
//! collectives in the same order, so one tag serves them all. They wait in
//! [`Communicator::recv`], which gives the core away while it waits: a rank that
//! is done early does not take cycles from the ones still working, as the
//! spinning collectives of MPI libraries would.

use super::{Communicator, tags};

/// Broadcasts go out in pieces of this many bytes, so that a tree's levels overlap.
const BROADCAST_CHUNK_BYTES: usize = 4 << 20;
/// After so many pieces the ranks wait for each other: sends own a copy of their
/// bytes until the receiver takes them, and this bounds the copies.
const BROADCAST_CHUNKS_AHEAD: usize = 8;

/// Dissemination barrier: in round k, tell rank + 2^k and hear from rank − 2^k.
pub(super) fn barrier<C: Communicator + ?Sized>(comm: &C) {
    let (rank, size) = (comm.rank(), comm.size());
    let mut distance = 1;
    while distance < size {
        comm.send((rank + distance) % size, tags::COLLECTIVE, Vec::new());
        comm.recv(Some((rank + size - distance) % size), tags::COLLECTIVE);
        distance *= 2;
    }
}

/// Binomial tree, a piece at a time.
pub(super) fn broadcast<C: Communicator + ?Sized>(comm: &C, root: usize, data: &mut [u8]) {
    if comm.size() == 1 {
        return;
    }
    for (index, piece) in data.chunks_mut(BROADCAST_CHUNK_BYTES).enumerate() {
        if index % BROADCAST_CHUNKS_AHEAD == BROADCAST_CHUNKS_AHEAD - 1 {
            barrier(comm);
        }
        broadcast_piece(comm, root, piece);
    }
}

fn broadcast_piece<C: Communicator + ?Sized>(comm: &C, root: usize, piece: &mut [u8]) {
    let size = comm.size();
    // Ranks are counted from the root; the parent clears the lowest set bit.
    let position = (comm.rank() + size - root) % size;
    let absolute = |position: usize| (position + root) % size;
    if position != 0 {
        let parent = absolute(position & (position - 1));
        let (_, received) = comm.recv(Some(parent), tags::COLLECTIVE);
        assert_eq!(
            received.len(),
            piece.len(),
            "broadcast: rank {} expects another length than rank {root}",
            comm.rank()
        );
        piece.copy_from_slice(&received);
    }
    let lowest_bit =
        if position == 0 { size.next_power_of_two() } else { 1 << position.trailing_zeros() };
    let mut step = lowest_bit >> 1;
    while step > 0 {
        if position + step < size {
            comm.send(absolute(position + step), tags::COLLECTIVE, piece.to_vec());
        }
        step >>= 1;
    }
}

pub(super) fn gather<C: Communicator + ?Sized>(
    comm: &C,
    root: usize,
    data: &[u8],
) -> Option<Vec<Vec<u8>>> {
    if comm.rank() != root {
        comm.send(root, tags::COLLECTIVE, data.to_vec());
        return None;
    }
    let from = |rank| {
        if rank == root { data.to_vec() } else { comm.recv(Some(rank), tags::COLLECTIVE).1 }
    };
    Some((0..comm.size()).map(from).collect())
}

/// Gathers at rank 0 and broadcasts the lengths, then the bytes.
pub(super) fn all_gather<C: Communicator + ?Sized>(comm: &C, data: &[u8]) -> Vec<Vec<u8>> {
    if comm.size() == 1 {
        return vec![data.to_vec()];
    }
    let parts = gather(comm, 0, data);
    let mut lengths = vec![0u8; 8 * comm.size()];
    if let Some(parts) = &parts {
        for (slot, part) in lengths.chunks_exact_mut(8).zip(parts) {
            slot.copy_from_slice(&(part.len() as u64).to_le_bytes());
        }
    }
    broadcast(comm, 0, &mut lengths);
    let lengths: Vec<usize> = lengths
        .chunks_exact(8)
        .map(|bytes| bytes.iter().rev().fold(0, |length, &byte| length << 8 | usize::from(byte)))
        .collect();
    let mut all = parts.map_or_else(|| vec![0; lengths.iter().sum()], |parts| parts.concat());
    broadcast(comm, 0, &mut all);
    let mut rest = all.as_slice();
    lengths
        .iter()
        .map(|&length| {
            let (part, tail) = rest.split_at(length);
            rest = tail;
            part.to_vec()
        })
        .collect()
}
