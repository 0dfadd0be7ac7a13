//! Ranks as threads of one process: for `--local-ranks`, for a start without a
//! launcher (one rank) and for tests, where ranks can be put on simulated nodes.

use std::collections::{HashMap, VecDeque};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::{Communicator, Tag, host_name};

/// How often a waiting rank looks whether another one has failed.
const FAILURE_POLL: Duration = Duration::from_millis(50);
/// Looks at the mailbox before a receiver sleeps: a peer in step answers within a few
/// microseconds, and waking a thread costs more than that.
const POLLS_BEFORE_SLEEP: usize = 64;

/// Messages and their senders, in order of arrival for each tag.
type Waiting = HashMap<Tag, VecDeque<(usize, Vec<u8>)>>;
/// Groups being made by a split: (number of the split, color) → the group and how many
/// of its members have yet to fetch it.
type Splits = HashMap<(u64, usize), (Arc<Group>, usize)>;

/// Messages that wait for one rank.
#[derive(Default)]
struct Mailbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Mailbox {
    fn take(waiting: &mut Waiting, from: Option<usize>, tag: Tag) -> Option<(usize, Vec<u8>)> {
        let queue = waiting.get_mut(&tag)?;
        let place = queue.iter().position(|&(sender, _)| from.is_none_or(|from| from == sender))?;
        queue.remove(place)
    }
}

/// What all groups of one world share: why it cannot go on, if so.
type Failure = Arc<Mutex<Option<String>>>;

/// One group of ranks.
struct Group {
    hosts: Vec<String>,
    mailboxes: Vec<Mailbox>,
    failure: Failure,
    splits: Mutex<Splits>,
}

impl Group {
    fn new(hosts: Vec<String>, failure: Failure) -> Arc<Self> {
        let mailboxes = hosts.iter().map(|_| Mailbox::default()).collect();
        Arc::new(Self { hosts, mailboxes, failure, splits: Mutex::default() })
    }
}

/// A rank of a world of threads; see [`LocalComm::run`].
pub struct LocalComm {
    group: Arc<Group>,
    rank: usize,
    splits_done: AtomicU64,
}

impl LocalComm {
    /// `size` ranks on this host; give each to one thread. Where a rank may panic use
    /// [`LocalComm::run`], which tells the others.
    pub fn world(size: usize) -> Vec<LocalComm> {
        Self::ranks(&Group::new(vec![host_name(); size], Failure::default()))
    }

    /// `size` ranks on simulated nodes `node0`, `node1`, … of `ranks_per_node` ranks.
    pub fn world_with_nodes(size: usize, ranks_per_node: usize) -> Vec<LocalComm> {
        let hosts = (0..size).map(|rank| format!("node{}", rank / ranks_per_node.max(1)));
        Self::ranks(&Group::new(hosts.collect(), Failure::default()))
    }

    fn ranks(group: &Arc<Group>) -> Vec<LocalComm> {
        (0..group.hosts.len()).map(|rank| Self::member(group, rank)).collect()
    }

    fn member(group: &Arc<Group>, rank: usize) -> LocalComm {
        LocalComm { group: group.clone(), rank, splits_done: AtomicU64::new(0) }
    }

    /// Runs `body` as `size` ranks, a thread each; returns their results in rank order.
    ///
    /// # Panics
    /// If a rank panics: the others, waiting for it, are stopped too, and the message
    /// names rank and host.
    pub fn run<T: Send>(size: usize, body: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
        Self::run_ranks(Self::world(size), body)
    }

    /// [`LocalComm::run`] with ranks on simulated nodes of `ranks_per_node` ranks.
    ///
    /// # Panics
    /// As [`LocalComm::run`].
    pub fn run_with_nodes<T: Send>(
        size: usize,
        ranks_per_node: usize,
        body: impl Fn(Arc<dyn Communicator>) -> T + Sync,
    ) -> Vec<T> {
        Self::run_ranks(Self::world_with_nodes(size, ranks_per_node), body)
    }

    fn run_ranks<T: Send>(
        ranks: Vec<LocalComm>,
        body: impl Fn(Arc<dyn Communicator>) -> T + Sync,
    ) -> Vec<T> {
        let failure = ranks.first().map(|rank| rank.group.failure.clone()).unwrap_or_default();
        let results: Vec<Option<T>> = thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .into_iter()
                .map(|rank| {
                    let body = &body;
                    scope.spawn(move || rank.run_body(body))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
        });
        let results: Option<Vec<T>> = results.into_iter().collect();
        match results {
            Some(results) => results,
            None => match lock(&failure).take() {
                Some(message) => panic!("{message}"),
                None => panic!("a rank ended without a result"),
            },
        }
    }

    /// `None` if the body panicked; the first rank to panic leaves word for the others.
    fn run_body<T>(self, body: &(impl Fn(Arc<dyn Communicator>) -> T + Sync)) -> Option<T> {
        let (group, rank) = (self.group.clone(), self.rank);
        panic::catch_unwind(AssertUnwindSafe(|| body(Arc::new(self))))
            .inspect_err(|payload| {
                let text = payload
                    .downcast_ref::<&str>()
                    .map(|text| (*text).to_owned())
                    .or_else(|| payload.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "panic".to_owned());
                lock(&group.failure).get_or_insert_with(|| {
                    format!("rank {rank} on {} failed: {text}", group.hosts[rank])
                });
            })
            .ok()
    }

    /// # Panics
    /// If a rank of this world has failed: a receiver would wait for ever.
    fn check_alive(&self) {
        let failure = lock(&self.group.failure).clone();
        if let Some(message) = failure {
            panic!("{message}");
        }
    }

    /// The group of `members` (ranks of this group), of which `color` is the name.
    fn fetch_group(&self, color: usize, members: &[usize]) -> Arc<Group> {
        let number = self.splits_done.fetch_add(1, Ordering::Relaxed);
        let mut splits = lock(&self.group.splits);
        let (group, left) = splits.entry((number, color)).or_insert_with(|| {
            let hosts = members.iter().map(|&rank| self.group.hosts[rank].clone()).collect();
            (Group::new(hosts, self.group.failure.clone()), members.len())
        });
        *left -= 1;
        let (group, done) = (group.clone(), *left == 0);
        if done {
            splits.remove(&(number, color));
        }
        group
    }
}

impl Communicator for LocalComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.hosts.len()
    }

    fn host(&self) -> &str {
        &self.group.hosts[self.rank]
    }

    fn send(&self, to: usize, tag: Tag, data: Vec<u8>) {
        let mailbox = &self.group.mailboxes[to];
        lock(&mailbox.waiting).entry(tag).or_default().push_back((self.rank, data));
        mailbox.arrived.notify_all();
    }

    fn try_recv(&self, tag: Tag) -> Option<(usize, Vec<u8>)> {
        let message = Mailbox::take(&mut lock(&self.group.mailboxes[self.rank].waiting), None, tag);
        if message.is_none() {
            self.check_alive();
        }
        message
    }

    fn recv(&self, from: Option<usize>, tag: Tag) -> (usize, Vec<u8>) {
        let mailbox = &self.group.mailboxes[self.rank];
        for _ in 0..POLLS_BEFORE_SLEEP {
            if let Some(message) = Mailbox::take(&mut lock(&mailbox.waiting), from, tag) {
                return message;
            }
            thread::yield_now();
        }
        let mut waiting = lock(&mailbox.waiting);
        loop {
            if let Some(message) = Mailbox::take(&mut waiting, from, tag) {
                return message;
            }
            self.check_alive();
            waiting = mailbox
                .arrived
                .wait_timeout(waiting, FAILURE_POLL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn split(&self, color: usize, key: usize) -> Arc<dyn Communicator> {
        let mine = [color.to_le_bytes(), key.to_le_bytes()].concat();
        let all = self.all_gather(&mine);
        let word = |bytes: &[u8]| {
            bytes.iter().rev().fold(0, |word: usize, &byte| word << 8 | usize::from(byte))
        };
        let mut members: Vec<(usize, usize)> = all
            .iter()
            .enumerate()
            .map(|(rank, bytes)| (rank, bytes.split_at(bytes.len() / 2)))
            .filter(|(_, (its_color, _))| word(its_color) == color)
            .map(|(rank, (_, its_key))| (word(its_key), rank))
            .collect();
        members.sort_unstable();
        let members: Vec<usize> = members.into_iter().map(|(_, rank)| rank).collect();
        // This rank is among them, its color being equal to itself.
        let rank = members.iter().position(|&rank| rank == self.rank).unwrap_or_default();
        Arc::new(Self::member(&self.fetch_group(color, &members), rank))
    }

    fn split_shared_memory(&self) -> Arc<dyn Communicator> {
        let host = self.host();
        let node = self.group.hosts.iter().position(|other| other == host).unwrap_or_default();
        self.split(node, self.rank)
    }

    fn abort(&self, exit_code: i32) -> ! {
        std::process::exit(exit_code)
    }
}

/// A panic elsewhere must not hide its own message behind a poisoned lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::conformance;

    #[test]
    fn conforms() {
        for size in 1..=5 {
            for (name, body) in conformance::BODIES {
                println!("{name}, {size} ranks");
                LocalComm::run(size, body);
            }
        }
    }

    #[test]
    fn a_panicking_rank_stops_the_waiting_ones_and_is_named() {
        let outcome = panic::catch_unwind(|| {
            LocalComm::run_with_nodes(3, 1, |comm| {
                if comm.rank() == 1 {
                    panic!("out of luck");
                }
                comm.barrier();
            })
        });
        let message = *outcome.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, "rank 1 on node1 failed: out of luck");
    }

    #[test]
    fn simulated_nodes_split_as_real_ones_would() {
        let nodes = LocalComm::run_with_nodes(5, 2, |comm| {
            let node = comm.split_shared_memory();
            (node.host().to_owned(), node.rank(), node.size())
        });
        let host = |index: usize| format!("node{index}");
        assert_eq!(
            nodes,
            [(host(0), 0, 2), (host(0), 1, 2), (host(1), 0, 2), (host(1), 1, 2), (host(2), 0, 1)]
        );
    }
}
