//! A shared file system in memory, in virtual time, for tests and the simulator: what one
//! client writes others see late, ages are by its own clock, and clients die in the middle
//! of an operation. With it an [`Evidence`] that knows what the test says has died.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{ClaimStore, Evidence, JobRef, ProcessId};
use crate::{Error, Result};

/// At which point of a write its client dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The temporary file is written, nobody sees it.
    BeforeLink,
    /// No hard links: the name is there, with half of its content. A replacement is not.
    Torn,
    /// It is done, and the client does not live to know.
    AfterLink,
}

/// The file system. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct SimDisk(Arc<Mutex<Disk>>);

#[derive(Debug)]
struct Disk {
    seed: u64,
    now_seconds: f64,
    stale_seconds: f64,
    files: BTreeMap<String, Vec<Version>>,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Version {
    written_seconds: f64,
    writer: usize,
    /// `None` = removed.
    content: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Client {
    is_dead: bool,
    /// Writes that still go well, and how the next one ends.
    crash: Option<(u32, Crash)>,
    operations: u64,
}

impl SimDisk {
    /// An empty one at second 0. A client sees what another wrote, in files and listings,
    /// up to `stale_seconds` late, each file and client at another delay given by `seed`.
    pub(crate) fn new(seed: u64, stale_seconds: f64) -> Self {
        let files = BTreeMap::new();
        let disk = Disk { seed, now_seconds: 0.0, stale_seconds, files, clients: Vec::new() };
        Self(Arc::new(Mutex::new(disk)))
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// Another machine's mount of it.
    pub(crate) fn client(&self) -> SimStore {
        let mut disk = self.disk();
        disk.clients.push(Client::default());
        SimStore { disk: self.clone(), client: disk.clients.len() - 1 }
    }

    /// Sets its clock, which never goes back.
    pub(crate) fn advance_to(&self, now_seconds: f64) {
        let mut disk = self.disk();
        disk.now_seconds = disk.now_seconds.max(now_seconds);
    }

    /// Its clock.
    pub(crate) fn now_seconds(&self) -> f64 {
        self.disk().now_seconds
    }

    /// Lets a client die in its write after the next `writes`; all it does then fails.
    pub(crate) fn crash(&self, client: usize, writes: u32, crash: Crash) {
        self.disk().clients[client].crash = Some((writes, crash));
    }

    /// Lets a client die now.
    pub(crate) fn kill(&self, client: usize) {
        self.disk().clients[client].is_dead = true;
    }

    /// Whether a client has died.
    pub(crate) fn is_dead(&self, client: usize) -> bool {
        self.disk().clients[client].is_dead
    }

    /// Reads, writes and listings of a client so far.
    pub(crate) fn operations(&self, client: usize) -> u64 {
        self.disk().clients[client].operations
    }

    /// What everybody will see in the end: all names and contents.
    pub(crate) fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let disk = self.disk();
        let newest = |(name, versions): (&String, &Vec<Version>)| {
            Some((name.clone(), versions.last()?.content.clone()?))
        };
        disk.files.iter().filter_map(newest).collect()
    }
}

impl Disk {
    /// Begins an operation of `client`, unless it has died.
    fn begin(&mut self, client: usize) -> Result<()> {
        let client = &mut self.clients[client];
        client.operations += 1;
        if client.is_dead { Err(Error::fault("simulated: this client has died")) } else { Ok(()) }
    }

    /// Begins a write: how it ends, if its client dies of it.
    fn begin_write(&mut self, client: usize) -> Result<Option<Crash>> {
        self.begin(client)?;
        let client = &mut self.clients[client];
        match &mut client.crash {
            Some((0, crash)) => {
                client.is_dead = true;
                Ok(Some(*crash))
            }
            Some((writes, _)) => {
                *writes -= 1;
                Ok(None)
            }
            None => Ok(None),
        }
    }

    fn exists(&self, name: &str) -> bool {
        let newest = self.files.get(name).and_then(|versions| versions.last());
        newest.is_some_and(|version| version.content.is_some())
    }

    fn write(&mut self, writer: usize, name: &str, content: Option<&[u8]>) {
        let version = Version {
            written_seconds: self.now_seconds,
            writer,
            content: content.map(<[u8]>::to_vec),
        };
        self.files.entry(name.to_owned()).or_default().push(version);
    }

    /// The newest version of `name` that `client` sees by now; removed ones are none.
    fn seen(&self, client: usize, name: &str) -> Option<&Version> {
        let versions = self.files.get(name)?;
        let mut hasher = DefaultHasher::new();
        (self.seed, client, name).hash(&mut hasher);
        let delay = self.stale_seconds * ((hasher.finish() % 1001) as f64 / 1000.0);
        let is_seen = |version: &&Version| {
            version.writer == client || version.written_seconds + delay <= self.now_seconds
        };
        versions.iter().rev().find(is_seen).filter(|version| version.content.is_some())
    }
}

/// A client's view of a [`SimDisk`].
#[derive(Debug)]
pub(crate) struct SimStore {
    disk: SimDisk,
    /// The client, as [`SimDisk::crash`] and [`SimDisk::kill`] call it.
    pub(crate) client: usize,
}

fn died() -> Error {
    Error::fault("simulated: the client died of this write")
}

impl ClaimStore for SimStore {
    fn create(&mut self, name: &str, content: &[u8]) -> Result<bool> {
        let mut disk = self.disk.disk();
        let crash = disk.begin_write(self.client)?;
        if crash == Some(Crash::BeforeLink) {
            return Err(died());
        }
        let is_new = !disk.exists(name);
        if is_new {
            let torn = &content[..content.len() / 2];
            let content = if crash == Some(Crash::Torn) { torn } else { content };
            disk.write(self.client, name, Some(content));
        }
        if crash.is_some() { Err(died()) } else { Ok(is_new) }
    }

    fn replace(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let mut disk = self.disk.disk();
        let crash = disk.begin_write(self.client)?;
        if matches!(crash, None | Some(Crash::AfterLink)) {
            disk.write(self.client, name, Some(content));
        }
        if crash.is_some() { Err(died()) } else { Ok(()) }
    }

    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let mut disk = self.disk.disk();
        disk.begin(self.client)?;
        Ok(disk.seen(self.client, name).and_then(|version| version.content.clone()))
    }

    fn list(&mut self) -> Result<Vec<String>> {
        let mut disk = self.disk.disk();
        disk.begin(self.client)?;
        let seen = disk.files.keys().filter(|name| disk.seen(self.client, name).is_some());
        Ok(seen.cloned().collect())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        let mut disk = self.disk.disk();
        let crash = disk.begin_write(self.client)?;
        if crash.is_none() && disk.exists(name) {
            disk.write(self.client, name, None);
        }
        if crash.is_some() { Err(died()) } else { Ok(()) }
    }

    fn age_seconds(&mut self, name: &str, _now_seconds: f64) -> Result<Option<f64>> {
        let mut disk = self.disk.disk();
        disk.begin(self.client)?;
        let seen = disk.seen(self.client, name);
        Ok(seen.map(|version| disk.now_seconds - version.written_seconds))
    }
}

/// What has died, as hosts and Slurm will tell. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct SimDeaths(Arc<Mutex<Deaths>>);

#[derive(Debug, Default)]
struct Deaths {
    processes: BTreeSet<(String, u32)>,
    steps: BTreeSet<(u64, u64, Option<u64>)>,
}

impl SimDeaths {
    /// That process has ended; its host knows.
    pub(crate) fn end_process(&self, process: &ProcessId) {
        self.0.lock().unwrap().processes.insert((process.host.clone(), process.pid));
    }

    /// Slurm has ended that step, and says so to everybody.
    pub(crate) fn end_step(&self, job: &JobRef) {
        self.0.lock().unwrap().steps.insert(step_key(job));
    }

    /// What can be known on `host`, with or without a Slurm to ask.
    pub(crate) fn evidence(&self, host: &str, has_slurm: bool) -> SimEvidence {
        SimEvidence { deaths: self.clone(), host: host.to_owned(), has_slurm }
    }
}

fn step_key(job: &JobRef) -> (u64, u64, Option<u64>) {
    (job.job_id, job.restart_count, job.step_id)
}

/// [`Evidence`] from [`SimDeaths`].
#[derive(Debug)]
pub(crate) struct SimEvidence {
    deaths: SimDeaths,
    host: String,
    has_slurm: bool,
}

impl Evidence for SimEvidence {
    fn process_is_gone(&mut self, process: &ProcessId) -> Option<bool> {
        let deaths = self.deaths.0.lock().unwrap();
        let died = || deaths.processes.contains(&(process.host.clone(), process.pid));
        (process.host == self.host).then(died)
    }

    fn step_has_ended(&mut self, job: &JobRef, _now_seconds: f64) -> Option<bool> {
        let deaths = self.deaths.0.lock().unwrap();
        self.has_slurm.then(|| deaths.steps.contains(&step_key(job)))
    }
}
