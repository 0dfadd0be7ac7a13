//! A launch's messages: each takes its time, those of one pair stay in order.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Random;
use crate::comm::{Communicator, Tag};

/// What is under way to one rank with one tag, by arrival.
type Queue = BTreeMap<(u64, u64), (usize, Vec<u8>)>;

struct Network {
    now_seconds: f64,
    random: Random,
    delay_seconds: f64,
    queues: HashMap<(usize, Tag), Queue>,
    /// When the latest message of a pair arrives.
    latest: HashMap<(usize, usize, Tag), f64>,
    sent: u64,
    arrivals: Vec<(f64, usize)>,
}

/// A rank's end of it. Clones are the same end.
#[derive(Clone)]
pub(super) struct SimComm {
    network: Arc<Mutex<Network>>,
    rank: usize,
    size: usize,
}

impl SimComm {
    /// The ends of all ranks; a message takes up to `delay_seconds`, few take ten times that.
    pub(super) fn launch(seed: u64, size: usize, delay_seconds: f64) -> Vec<Self> {
        let network = Arc::new(Mutex::new(Network {
            now_seconds: 0.0,
            random: Random(seed),
            delay_seconds,
            queues: HashMap::new(),
            latest: HashMap::new(),
            sent: 0,
            arrivals: Vec::new(),
        }));
        (0..size).map(|rank| Self { network: network.clone(), rank, size }).collect()
    }

    fn network(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap()
    }

    /// Sets the clock of all ends.
    pub(super) fn advance_to(&self, now_seconds: f64) {
        self.network().now_seconds = now_seconds;
    }

    /// When messages that were sent since the last time arrive, and at whom.
    pub(super) fn take_arrivals(&self) -> Vec<(f64, usize)> {
        std::mem::take(&mut self.network().arrivals)
    }
}

impl Communicator for SimComm {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn host(&self) -> &str {
        "simulated"
    }

    fn send(&self, to: usize, tag: Tag, data: Vec<u8>) {
        let network = &mut *self.network();
        let slow = if network.random.chance(0.05) { 10.0 } else { 1.0 };
        let delay = network.random.between(0.0, slow * network.delay_seconds);
        let latest = network.latest.entry((self.rank, to, tag)).or_default();
        *latest = latest.max(network.now_seconds + delay);
        network.sent += 1;
        let queue = network.queues.entry((to, tag)).or_default();
        queue.insert((latest.to_bits(), network.sent), (self.rank, data));
        network.arrivals.push((*latest, to));
    }

    fn try_recv(&self, tag: Tag) -> Option<(usize, Vec<u8>)> {
        let network = &mut *self.network();
        let queue = network.queues.get_mut(&(self.rank, tag))?;
        let first = queue.first_entry()?;
        (f64::from_bits(first.key().0) <= network.now_seconds).then(|| first.remove())
    }

    fn recv(&self, _from: Option<usize>, _tag: Tag) -> (usize, Vec<u8>) {
        unreachable!("nothing waits in the simulation")
    }

    fn split(&self, _color: usize, _key: usize) -> Arc<dyn Communicator> {
        unreachable!("nothing splits in the simulation")
    }

    fn split_shared_memory(&self) -> Arc<dyn Communicator> {
        unreachable!("nothing splits in the simulation")
    }

    fn abort(&self, _exit_code: i32) -> ! {
        unreachable!("nothing aborts in the simulation")
    }
}
