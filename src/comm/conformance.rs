//! What every communicator must do, as bodies that run on each rank: the unit tests
//! run them on threads, `tests/mpi.rs` the same ones under mpirun.

use std::sync::Arc;

use super::{
    Communicator, HostTensorComm, NoTensorComm, TensorComm, Topology, agree, broadcast_vec, tags,
};
use crate::Error;

/// A body that each rank runs.
pub type Body = fn(Arc<dyn Communicator>);

/// All bodies by name.
pub const BODIES: [(&str, Body); 10] = [
    ("barrier", barrier),
    ("broadcast", broadcast),
    ("gather", gather),
    ("order", messages_keep_their_order),
    ("any source", any_source),
    ("long messages", long_messages),
    ("split", split),
    ("topology", topology),
    ("agree", agreement),
    ("tensors", tensors),
];

/// Bytes that tell sender and place.
fn pattern(rank: usize, length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 31 + rank * 7 + index / 256) as u8).collect()
}

/// No rank may leave a barrier before the last has entered it.
fn barrier(comm: Arc<dyn Communicator>) {
    let tag = tags::FIRST_FREE;
    for round in 0..20u8 {
        for to in 0..comm.size() {
            comm.send(to, tag, vec![round]);
        }
        comm.barrier();
        comm.barrier();
    }
    // Each round's messages were sent before its barrier and none was lost.
    for round in 0..20u8 {
        for from in 0..comm.size() {
            assert_eq!(comm.recv(Some(from), tag), (from, vec![round]));
        }
    }
    assert_eq!(comm.try_recv(tag), None);
}

fn broadcast(comm: Arc<dyn Communicator>) {
    // Empty, small, one chunk and a bit.
    for length in [0, 1, 1000, (4 << 20) + 3] {
        for root in 0..comm.size() {
            let expected = pattern(root, length);
            let mut data = if comm.rank() == root { expected.clone() } else { vec![0; length] };
            comm.broadcast(root, &mut data);
            assert!(data == expected, "{length} bytes from rank {root}");
            let data = if comm.rank() == root { expected.clone() } else { Vec::new() };
            assert!(broadcast_vec(&*comm, root, data) == expected);
        }
    }
}

/// Parts of different lengths, empty ones too, arrive in rank order.
fn gather(comm: Arc<dyn Communicator>) {
    let part = |rank: usize| pattern(rank, rank * 1000);
    let expected: Vec<Vec<u8>> = (0..comm.size()).map(part).collect();
    for root in 0..comm.size() {
        let all = comm.gather(root, &part(comm.rank()));
        assert_eq!(all, (comm.rank() == root).then(|| expected.clone()));
    }
    assert_eq!(comm.all_gather(&part(comm.rank())), expected);
    assert_eq!(comm.all_gather(&[]), vec![Vec::<u8>::new(); comm.size()]);
}

/// Messages of one sender with one tag arrive in order; tags do not mix; a receiver may
/// take another tag or sender first.
fn messages_keep_their_order(comm: Arc<dyn Communicator>) {
    let (first, second) = (tags::FIRST_FREE, tags::LIMIT - 1);
    for to in 0..comm.size() {
        for number in 0..50 {
            // Long and short ones: the short must not overtake.
            let length = if number % 7 == 0 { 100_000 } else { number };
            comm.send(to, first, pattern(number, length));
            comm.send(to, second, vec![number as u8]);
        }
    }
    for from in (0..comm.size()).rev() {
        for number in 0..50u8 {
            assert_eq!(comm.recv(Some(from), second), (from, vec![number]));
        }
        for number in 0..50 {
            let length = if number % 7 == 0 { 100_000 } else { number };
            assert!(comm.recv(Some(from), first).1 == pattern(number, length));
        }
    }
    comm.barrier();
}

/// As rank 0 serves requests: from any rank, by polling and by waiting.
fn any_source(comm: Arc<dyn Communicator>) {
    let (request, answer) = (tags::FIRST_FREE, tags::FIRST_FREE + 1);
    const REQUESTS: usize = 25;
    if comm.rank() == 0 {
        let mut served = vec![0; comm.size()];
        for number in 0..REQUESTS * (comm.size() - 1) {
            let (from, data) = match comm.try_recv(request) {
                Some(message) => message,
                None => comm.recv(None, request),
            };
            assert_eq!(data, vec![served[from]], "request {number} from rank {from}");
            served[from] += 1;
            comm.send(from, answer, vec![from as u8, served[from]]);
        }
        assert_eq!(comm.try_recv(request), None);
    } else {
        for number in 0..REQUESTS as u8 {
            comm.send(0, request, vec![number]);
            assert_eq!(comm.recv(Some(0), answer).1, vec![comm.rank() as u8, number + 1]);
        }
    }
    comm.barrier();
}

/// Several megabytes in all directions at once, before anyone receives.
fn long_messages(comm: Arc<dyn Communicator>) {
    let tag = tags::FIRST_FREE;
    let length = |rank: usize| (3 << 20) + rank * 12_345;
    for to in 0..comm.size() {
        comm.send(to, tag, pattern(comm.rank(), length(comm.rank())));
        comm.send(to, tag, vec![9]);
    }
    for from in 0..comm.size() {
        assert!(comm.recv(Some(from), tag).1 == pattern(from, length(from)), "from rank {from}");
        assert_eq!(comm.recv(Some(from), tag).1, vec![9]);
    }
    comm.barrier();
}

/// Groups by color, ordered by key, whose messages do not mix with the parent's.
fn split(comm: Arc<dyn Communicator>) {
    let (rank, size) = (comm.rank(), comm.size());
    let tag = tags::FIRST_FREE;
    comm.send(rank, tag, vec![1]);
    // Odd and even ranks, each in reverse.
    let group = comm.split(rank % 2, size - rank);
    let members: Vec<usize> = (0..size).rev().filter(|other| other % 2 == rank % 2).collect();
    assert_eq!(group.size(), members.len());
    assert_eq!(members[group.rank()], rank);
    group.send(group.rank(), tag, vec![2]);
    assert_eq!(group.recv(None, tag).1, vec![2]);
    assert_eq!(comm.recv(None, tag), (rank, vec![1]));
    let all = group.all_gather(&[rank as u8]);
    assert_eq!(all.concat(), members.iter().map(|&rank| rank as u8).collect::<Vec<_>>());
    // A second split, and one of a group.
    assert_eq!(comm.split(0, rank).rank(), rank);
    assert_eq!(group.split(group.rank(), 0).size(), 1);
}

fn topology(comm: Arc<dyn Communicator>) {
    let (rank, size) = (comm.rank(), comm.size());
    for tensor_parallel in (1..=size).filter(|&tp| size.is_multiple_of(tp)) {
        let topology = Topology::new(comm.clone(), tensor_parallel).expect("sizes divide");
        assert_eq!(topology.tensor_parallel.size(), tensor_parallel);
        assert_eq!(topology.tensor_parallel.rank(), rank % tensor_parallel);
        let leads = rank % tensor_parallel == 0;
        assert_eq!(topology.group_leaders().is_some(), leads);
        let ranks_of_nodes: usize = match &topology.leaders {
            Some(leaders) => leaders
                .all_gather(&[topology.node.size() as u8])
                .iter()
                .map(|part| usize::from(part[0]))
                .sum(),
            None => size,
        };
        assert_eq!(ranks_of_nodes, size);
        assert!(rank != 0 || topology.is_node_leader() && topology.node_index == 0);
    }
    assert!(Topology::new(comm, size + 1).is_err());
}

/// Every rank gets the same verdict, and the ranks are still in step after it.
fn agreement(comm: Arc<dyn Communicator>) {
    let rank = comm.rank();
    assert_eq!(agree(&*comm, Ok(rank)), Ok(rank));
    let last = comm.size() - 1;
    let mine = if rank == last { Err(Error::input("no such file")) } else { Ok(()) };
    let error = agree(&*comm, mine).expect_err("the last rank failed");
    assert!(error.message.contains("no such file"), "{error}");
    assert!(last == 0 || error.message.contains(&format!("rank {last} on ")), "{error}");
    assert_eq!(comm.all_gather(error.message.as_bytes()), {
        vec![error.message.clone().into_bytes(); comm.size()]
    });
}

/// Sums in rank order, at sizes that go either way; gathers of unequal parts.
fn tensors(comm: Arc<dyn Communicator>) {
    let (rank, size) = (comm.rank(), comm.size());
    let value = |rank: usize, index: usize| {
        [1.0f32, 1e8, -1e8, 3.3e-4][(rank + index) % 4] * (1.0 + index as f32 * 0.37)
    };
    let tensors = HostTensorComm::new(comm.clone());
    for length in [0, 1, 1000, 40_003] {
        let mut values: Vec<f32> = (0..length).map(|index| value(rank, index)).collect();
        tensors.all_reduce_sum(&mut values);
        for (index, sum) in values.iter().enumerate() {
            let expected = (1..size).fold(value(0, index), |sum, rank| sum + value(rank, index));
            assert_eq!(sum.to_bits(), expected.to_bits(), "element {index} of {length}");
        }
    }
    let part = |rank: usize| vec![rank as f32; rank + 1];
    let expected: Vec<f32> = (0..size).flat_map(part).collect();
    assert_eq!(tensors.all_gather(&part(rank)), expected);
    let mut token = if rank == 0 { *b"token" } else { [0; 5] };
    tensors.broadcast_bytes(0, &mut token);
    assert_eq!(&token, b"token");
    if size == 1 {
        let mut values = [1.5];
        NoTensorComm.all_reduce_sum(&mut values);
        assert_eq!(values, [1.5]);
        assert_eq!(NoTensorComm.all_gather(&values), [1.5]);
    }
}
