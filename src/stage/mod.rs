//! Brings the model to every node's memory, so that the parallel file system is read
//! once and not by every rank.
//!
//! [`stage`] is the story: [`sources`] and [`manifest`] say which files, [`cache`] locks the node's
//! copy, [`copy`] checks a copy that is there, [`space`] how much a node can take;
//! [`plan`] decides, [`make`] quantizes where that is asked for, [`transfer`] moves. [`Staged`]
//! holds the copy until it is dropped.
//! Left out: moving only the slices that a node's ranks need; every node gets all files.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::comm::{Communicator, Topology, agree_as, broadcast_vec};
use crate::kernels::quant::QuantType;
use crate::{Error, Result};

pub mod cache;
pub mod copy;
pub mod make;
pub mod manifest;
pub mod plan;
pub mod sources;
pub mod space;
pub mod transfer;

use cache::Lease;
use copy::{ChunkFiles, CopyRecord, Hash};
use make::{Made, Order};
use manifest::Manifest;
use plan::{Action, Chunk, CopyState, NodeState, Source, StagePlan};
use sources::ModelPaths;
use transfer::{Moved, Node, run_phase};

pub use plan::StageFallback;

/// Bytes of a chunk: long enough for a link to reach its speed, short enough that a
/// chain of nodes fills soon.
pub const CHUNK_BYTES: usize = 16 << 20;
/// Between two looks at a lock that another job holds.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// What to stage and where.
#[derive(Debug, Clone)]
pub struct StageOptions {
    /// `--model` and `--tokenizer`, as they were given.
    pub sources: ModelPaths,
    /// `--stage-dir`; may differ between nodes.
    pub stage_dir: PathBuf,
    /// `--keep-staged`: leave the copies when the job ends.
    pub keep: bool,
    /// `--stage-fallback`: what to do where a node has no room.
    pub fallback: StageFallback,
    /// `--no-stage`: read the model where it is.
    pub no_stage: bool,
    /// `--quantize`: quantize the weights on their way.
    pub quantize: Option<QuantType>,
    /// Bytes of a chunk; [`CHUNK_BYTES`] but in tests.
    pub chunk_bytes: usize,
}

impl StageOptions {
    /// To stage `sources` to `stage_dir`, remove it in the end, and stop where it does not fit.
    pub fn new(sources: ModelPaths, stage_dir: impl Into<PathBuf>) -> Self {
        Self {
            sources,
            stage_dir: stage_dir.into(),
            keep: false,
            fallback: StageFallback::Error,
            no_stage: false,
            quantize: None,
            chunk_bytes: CHUNK_BYTES,
        }
    }
}

/// What staging did, summed over the nodes; the same on every rank.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StageReport {
    /// Bytes of the model's files, as they are staged.
    pub model_bytes: u64,
    /// What the weights were quantized to on their way, if they were.
    pub quantized: Option<String>,
    /// Bytes read from where the model is.
    pub bytes_read_source: u64,
    /// Bytes written to copies and verified.
    pub bytes_staged: u64,
    /// Bytes of copies that were there and good.
    pub bytes_reused: u64,
    /// From the first look at the model to the last copy in place.
    pub stage_seconds: f64,
    /// `bytes_staged` a second, 10^9 bytes; 0 if nothing was staged.
    pub gigabytes_per_second: f64,
    /// Whether nothing had to be written because every node had a good copy.
    pub reused: bool,
    /// Why nodes read the model where it is, if any does; the first reason.
    pub in_place: Option<String>,
}

/// A model that this node can read, until this is dropped.
#[derive(Debug)]
pub struct Staged {
    /// What this node's ranks load: the copy, or the model itself.
    pub model_path: PathBuf,
    /// The tokenizer, where it is not the model's own.
    pub tokenizer_path: Option<PathBuf>,
    /// What staging did.
    pub report: StageReport,
    /// Held by the node's leader.
    lease: Option<Lease>,
}

impl Staged {
    fn new(paths: ModelPaths, report: StageReport, lease: Option<Lease>) -> Self {
        let ModelPaths { model, tokenizer } = paths;
        Self { model_path: model, tokenizer_path: tokenizer, report, lease }
    }

    /// Releases the copy once all ranks of the node are done with it; the last job on
    /// the node removes it unless it is to be kept. Collective over the node. Dropping
    /// does the same without waiting: mapped pages stay readable until unmapped.
    pub fn finish(self, topology: &Topology) {
        topology.node.barrier();
        drop(self.lease);
    }
}

/// Makes the model readable on every node as `options` ask. Collective over the world;
/// fails alike on all ranks: input errors for a missing or incomplete model, else faults
/// that name the host.
pub fn stage(topology: &Topology, options: &StageOptions) -> Result<Staged> {
    let started = Instant::now();
    let world = &*topology.world;
    let manifest = read_manifest(world, options)?;
    if options.no_stage {
        let report = StageReport {
            model_bytes: manifest.bytes(),
            stage_seconds: started.elapsed().as_secs_f64(),
            in_place: Some("--no-stage".to_owned()),
            ..StageReport::default()
        };
        return Ok(Staged::new(manifest.in_place, report, None));
    }
    let chunks = plan::chunks(&manifest.files, options.chunk_bytes);
    let (manifest, chunks) = (&manifest, &chunks[..]);
    let leader = topology.leaders.as_ref();
    let leader =
        leader.map(|leaders| Leader { leaders: &**leaders, world, manifest, chunks, options });
    let prepared = leader.as_ref().map(Leader::prepare).transpose();
    let mut made = Ok(Made::default());
    if manifest.quantized.is_some() {
        let order = prepared.as_ref().ok().and_then(|p| p.as_ref()).and_then(Prepared::order);
        made = make::on_node(&*topology.node, order.as_ref(), manifest, chunks, options);
    }
    let mut staged = prepared.and_then(|prepared| match (&leader, prepared) {
        (Some(leader), Some(prepared)) => leader.carry_out(prepared, made).map(Some),
        _ => Ok(None),
    });
    if let Ok(Some(StagedHere { report, .. })) = &mut staged {
        let seconds = started.elapsed().as_secs_f64();
        report.stage_seconds = seconds;
        report.gigabytes_per_second = report.bytes_staged as f64 / seconds / 1e9;
    }
    tell_node(topology, staged)
}

/// Read by rank 0 only: thousands of ranks asking at once is what staging is to avoid.
fn read_manifest(world: &dyn Communicator, options: &StageOptions) -> Result<Manifest> {
    let first = world.rank() == 0;
    // A model that is missing is no matter of rank 0: the message stays without it.
    let read = first.then(|| manifest(options)).transpose();
    let text = broadcast_vec(world, 0, encode(&read));
    let read: Result<Option<Manifest>> = decode(&text)?;
    read?.ok_or_else(|| Error::fault("rank 0 sent no manifest"))
}

/// What is to be staged.
fn manifest(options: &StageOptions) -> Result<Manifest> {
    let manifest = Manifest::read(&options.sources)?;
    match options.quantize {
        Some(quant) if !options.no_stage => manifest.quantized(quant),
        _ => Ok(manifest),
    }
}

/// A model that was written to while it was read would be a mixture.
fn changed(options: &StageOptions) -> Error {
    Error::input(format!(
        "--model {}: changed while it was being staged; start again once it is complete",
        options.sources.model.display()
    ))
}

/// What a leader has on its node.
#[derive(Debug)]
struct StagedHere {
    paths: ModelPaths,
    report: StageReport,
    lease: Option<Lease>,
}

/// The leader's outcome becomes that of its node's ranks, rank 0's times those of all.
fn tell_node(topology: &Topology, staged: Result<Option<StagedHere>>) -> Result<Staged> {
    let paths = staged.as_ref().map(|staged| staged.as_ref().map(|staged| &staged.paths));
    let shared: Result<Option<ModelPaths>> =
        decode(&broadcast_vec(&*topology.node, 0, encode(&paths)))?;
    let paths = shared?.ok_or_else(|| Error::fault("this node's leader sent no staged model"))?;
    let report =
        staged.as_ref().ok().and_then(|staged| staged.as_ref()).map(|staged| &staged.report);
    let report: Option<StageReport> = decode(&broadcast_vec(&*topology.world, 0, encode(&report)))?;
    let lease = staged?.and_then(|staged| staged.lease);
    Ok(Staged::new(paths, report.unwrap_or_default(), lease))
}

/// A node's leader while it stages.
struct Leader<'a> {
    leaders: &'a dyn Communicator,
    world: &'a dyn Communicator,
    manifest: &'a Manifest,
    chunks: &'a [Chunk],
    options: &'a StageOptions,
}

/// What a leader found on its node.
struct Found {
    state: NodeState,
    record: Option<CopyRecord>,
}

/// A node before anything is moved: all nodes have the same plan, and places to write to.
struct Prepared {
    lease: Option<Lease>,
    plan: StagePlan,
    /// This node.
    here: usize,
    /// What the chunks must be, if a node has a copy.
    expected: Option<Vec<Hash>>,
    destination: Option<(PathBuf, ChunkFiles)>,
}

impl Prepared {
    fn action(&self) -> &Action {
        &self.plan.actions[self.here]
    }

    /// What the ranks of this node are to make.
    fn order(&self) -> Option<Order> {
        let chunks = self.plan.makes[self.here].clone();
        let (copy, _) = self.destination.as_ref().filter(|_| !chunks.is_empty())?;
        let (copy, expected) = (copy.clone(), self.expected.clone());
        Some(Order { copy, chunks, expected, reports: self.here == 0 })
    }
}

impl Leader<'_> {
    /// All that comes before bytes are moved.
    fn prepare(&self) -> Result<Prepared> {
        // A node without a usable stage directory may yet read in place: no error here.
        let cache = cache::open_cache(&self.options.stage_dir);
        let lease = self.lock(cache.as_deref())?;
        let found = self.agree(self.look(&cache, lease.as_ref()))?;
        let states = self.exchange(&found.state)?;
        let plan = StagePlan::new(self.chunks, &states, self.options.fallback)?;
        let here = self.leaders.rank();
        let expected = self.trusted_hashes(&plan, &found)?;
        let opened = self.open_destination(&plan.actions[here], lease.as_ref());
        let destination = self.agree(opened)?;
        Ok(Prepared { lease, plan, here, expected, destination })
    }

    /// Moves what is to be moved, with what this node's ranks have `made` for it.
    fn carry_out(&self, mut prepared: Prepared, made: Result<Made>) -> Result<StagedHere> {
        let made = self.agree(made)?;
        let moved = self.transfer(&prepared, &made)?;
        if let Some(lease) = &mut prepared.lease {
            lease.end_build();
        }
        let in_place = matches!(prepared.action(), Action::InPlace(_));
        let report = self.report(&prepared.plan, &made, moved)?;
        // A lease on nothing would only leave its lock files.
        let lease = prepared.lease.filter(|_| !in_place);
        let paths = match &lease {
            Some(lease) => self.manifest.in_copy(&lease.complete()),
            None => self.manifest.in_place.clone(),
        };
        Ok(StagedHere { paths, report, lease })
    }

    fn agree<T>(&self, result: Result<T>) -> Result<T> {
        agree_as(self.leaders, self.world.rank(), result)
    }

    /// Every leader's `value`, by node.
    fn exchange<T: Serialize + for<'de> Deserialize<'de>>(&self, value: &T) -> Result<Vec<T>> {
        self.leaders.all_gather(&encode(value)).iter().map(|text| decode(text)).collect()
    }

    /// The sole right to write this model's copy, on all nodes or on none: a job that
    /// held one node while it waits for another could wait for a job that does the same.
    fn lock(&self, cache: std::result::Result<&Path, &Error>) -> Result<Option<Lease>> {
        let name = self.manifest.copy_name();
        let mut polls = 0u32;
        loop {
            let lease = match cache {
                Ok(cache) => Lease::try_new(cache, &name),
                Err(_) => Ok(None),
            };
            let lease = self.agree(lease)?;
            let is_busy = cache.is_ok() && lease.is_none();
            if !self.exchange(&is_busy)?.contains(&true) {
                return Ok(lease);
            }
            drop(lease);
            if polls.is_multiple_of(100) && self.leaders.rank() == 0 {
                tracing::info!(model = %name, "another job is staging this model: waiting for it");
            }
            polls += 1;
            // Jobs that met once must not meet for ever.
            let jitter = Duration::from_millis(u64::from(std::process::id() + 37 * polls) % 50);
            thread::sleep(LOCK_POLL + jitter);
        }
    }

    /// Looks at this node: a copy, what is good of it, room for another.
    fn look(&self, cache: &Result<PathBuf>, lease: Option<&Lease>) -> Result<Found> {
        let host = self.leaders.host().to_owned();
        let (Ok(cache), Some(lease)) = (cache, lease) else {
            let reason = cache.as_ref().err().map_or_else(String::new, |error| error.to_string());
            return Ok(Found {
                state: NodeState { host, copy: None, space: Err(reason) },
                record: None,
            });
        };
        if self.options.keep {
            lease.keep()?;
        }
        for name in cache::collect(cache, &self.manifest.copy_name())? {
            tracing::info!(copy = %name, %host, "removed what an earlier job had left staged");
        }
        let complete = lease.complete();
        let record = CopyRecord::load(&complete, self.manifest, self.options.chunk_bytes);
        let bad = record.as_ref().and_then(|record| record.bad_chunks(&complete, self.chunks));
        let copy = record.as_ref().zip(bad);
        let copy = copy.map(|(record, bad)| CopyState { digest: record.digest(), bad });
        if copy.is_none() {
            lease.discard()?;
        }
        let space = space::free_space(cache).map_err(|error| error.to_string());
        Ok(Found { state: NodeState { host, copy, space }, record })
    }

    /// Carries out the plan on this node. Nothing follows a failure anywhere.
    fn transfer(&self, prepared: &Prepared, made: &Made) -> Result<Vec<(Source, Moved)>> {
        let Prepared { lease, plan, here, expected, destination } = prepared;
        let unknown = || vec![Hash::default(); self.chunks.len()];
        let mut hashes: Vec<Hash> = expected.clone().unwrap_or_else(unknown);
        for &(chunk, hash) in &made.hashes {
            hashes[chunk] = hash;
        }
        let mut moved = Vec::new();
        for phase in &plan.phases {
            let reads = phase.reader == *here;
            let source = match phase.source {
                Source::Model if reads => ChunkFiles::open_source(&self.manifest.files).map(Some),
                Source::Copy | Source::Made if reads => self.open_copy(prepared, phase.source),
                _ => Ok(None),
            };
            let source = self.agree(source)?;
            let is_maker = reads && phase.source == Source::Made;
            // What was made must be what is passed on.
            let made = is_maker.then(|| hashes.clone());
            let node = Node {
                leaders: self.leaders,
                chunks: self.chunks,
                // What a node made is there.
                action: if is_maker { &Action::Reuse } else { prepared.action() },
                source: source.as_ref(),
                destination: destination.as_ref().map(|(_, files)| files),
                expected: made.as_deref().or(expected.as_deref()),
            };
            moved.push((phase.source, self.agree(run_phase(&node, phase, &mut hashes))?));
        }
        self.agree(self.check_unchanged(plan))?;
        self.agree(self.publish(prepared.action(), lease.as_ref(), hashes))?;
        Ok(moved)
    }

    /// This node's copy, or what it has made of one, to pass on.
    fn open_copy(&self, prepared: &Prepared, source: Source) -> Result<Option<ChunkFiles>> {
        let directory = match (source, &prepared.destination, &prepared.lease) {
            (Source::Made, Some((copy, _)), _) => copy.clone(),
            (_, _, Some(lease)) => lease.complete(),
            _ => return Ok(None),
        };
        ChunkFiles::open(&directory, &self.manifest.files).map(Some)
    }

    /// The hashes of the copy that all must meet, if a node has one.
    fn trusted_hashes(&self, plan: &StagePlan, found: &Found) -> Result<Option<Vec<Hash>>> {
        let Some(node) = plan.trusted else { return Ok(None) };
        let mine = found.record.as_ref().filter(|_| node == self.leaders.rank());
        let bytes = mine.map_or_else(Vec::new, |record| record.hashes().concat());
        let bytes = broadcast_vec(self.leaders, node, bytes);
        Ok(Some(bytes.as_chunks().0.to_vec()))
    }

    fn open_destination(
        &self,
        action: &Action,
        lease: Option<&Lease>,
    ) -> Result<Option<(PathBuf, ChunkFiles)>> {
        let files = &self.manifest.files;
        match (action, lease) {
            (Action::Receive, Some(lease)) => {
                let copy = lease.create_partial()?;
                let files = ChunkFiles::create(&copy, files)?;
                Ok(Some((copy, files)))
            }
            (Action::Mend(bad), Some(lease)) => {
                let host = self.leaders.host();
                tracing::warn!(chunks = bad.len(), %host, "staged copy is damaged: mending it");
                let copy = lease.complete();
                let files = ChunkFiles::open(&copy, files)?;
                Ok(Some((copy, files)))
            }
            _ => Ok(None),
        }
    }

    fn check_unchanged(&self, plan: &StagePlan) -> Result<()> {
        let made = plan.makes.iter().any(|chunks| !chunks.is_empty());
        let read = made || plan.phases.iter().any(|phase| phase.source == Source::Model);
        if read && self.leaders.rank() == 0 && manifest(self.options)? != *self.manifest {
            return Err(changed(self.options));
        }
        Ok(())
    }

    fn publish(&self, action: &Action, lease: Option<&Lease>, hashes: Vec<Hash>) -> Result<()> {
        let (Action::Receive, Some(lease)) = (action, lease) else { return Ok(()) };
        CopyRecord::new(self.manifest, self.options.chunk_bytes, hashes).save(&lease.partial())?;
        lease.publish()
    }

    /// Sums over the nodes; the times are filled in later.
    fn report(
        &self,
        plan: &StagePlan,
        made: &Made,
        moved: Vec<(Source, Moved)>,
    ) -> Result<StageReport> {
        let from_model = |&&(source, _): &&(Source, Moved)| source == Source::Model;
        let read: u64 = moved.iter().filter(from_model).map(|(_, moved)| moved.bytes_read).sum();
        let written: u64 = moved.iter().map(|(_, moved)| moved.bytes_written).sum();
        let totals = self.exchange(&(read + made.bytes_read, written + made.bytes_written))?;
        let copy_bytes = |action: &Action| -> u64 {
            let kept = self.chunks.iter().enumerate().filter(|&(index, _)| !action.needs(index));
            match action {
                Action::InPlace(_) => 0,
                _ => kept.map(|(_, chunk)| chunk.bytes as u64).sum(),
            }
        };
        let in_place = plan.actions.iter().find_map(|action| match action {
            Action::InPlace(reason) => Some(reason.clone()),
            _ => None,
        });
        Ok(StageReport {
            model_bytes: self.manifest.bytes(),
            quantized: self.manifest.quantized.clone(),
            bytes_read_source: totals.iter().map(|&(read, _)| read).sum(),
            bytes_staged: totals.iter().map(|&(_, written)| written).sum(),
            bytes_reused: plan.actions.iter().map(copy_bytes).sum(),
            reused: plan.actions.iter().all(|action| *action == Action::Reuse),
            in_place,
            ..StageReport::default()
        })
    }
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Plain structs with string keys: nothing in them can fail to serialize. If it did,
    // the empty text fails to decode, on all ranks alike.
    serde_json::to_vec(value).unwrap_or_default()
}

fn decode<T: for<'de> Deserialize<'de>>(text: &[u8]) -> Result<T> {
    serde_json::from_slice(text)
        .map_err(|error| Error::fault(format!("staging: unreadable message of a rank: {error}")))
}

#[cfg(test)]
mod tests;
