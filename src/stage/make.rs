//! Makes chunks that lie nowhere yet: weights that are quantized on their way.
//!
//! A node's share of them ([`super::plan::StagePlan::makes`]) is made by all its ranks, each
//! with its own threads, straight into the copy; the leaders then relay them like any others.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::copy::{ChunkFiles, Hash, hash};
use super::manifest::Manifest;
use super::plan::Chunk;
use super::{StageOptions, changed, decode, encode};
use crate::comm::{Communicator, broadcast_vec};
use crate::model::checkpoint::QuantizedFile;
use crate::{Error, Result};

/// Threads that each make a chunk: while one reads or writes, another computes.
const WORKERS: usize = 2;
/// How often the first rank reports.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What a node is to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The directory of the copy that is being written.
    pub copy: PathBuf,
    /// Indices of the chunks.
    pub chunks: Vec<usize>,
    /// What they must be, where that is known.
    pub expected: Option<Vec<Hash>>,
    /// Whether this node says how far it is.
    pub reports: bool,
}

/// What a node, or a rank of it, has made.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Bytes read from the model.
    pub bytes_read: u64,
    /// Bytes written and verified.
    pub bytes_written: u64,
    /// The chunks and their hashes.
    pub hashes: Vec<(usize, Hash)>,
}

/// Carries out the `order` that the node's leader gives (the others have none) by all ranks of
/// `node`. Collective over it; the leader gets what all have made, or the first error.
pub fn on_node(
    node: &dyn Communicator,
    order: Option<&Order>,
    manifest: &Manifest,
    chunks: &[Chunk],
    options: &StageOptions,
) -> Result<Made> {
    let order: Option<Order> = decode(&broadcast_vec(node, 0, encode(&order)))?;
    let Some(order) = order else { return Ok(Made::default()) };
    let mine: Vec<usize> =
        order.chunks.iter().copied().skip(node.rank()).step_by(node.size()).collect();
    let reports = order.reports && node.rank() == 0;
    let made = make(&order, &mine, manifest, chunks, options, reports);
    let mut all = Made::default();
    for of_rank in node.all_gather(&encode(&made)) {
        let of_rank: Result<Made> = decode(&of_rank)?;
        let of_rank = of_rank?;
        all.bytes_read += of_rank.bytes_read;
        all.bytes_written += of_rank.bytes_written;
        all.hashes.extend(of_rank.hashes);
    }
    Ok(all)
}

/// Makes the chunks `mine` of the order.
fn make(
    order: &Order,
    mine: &[usize],
    manifest: &Manifest,
    chunks: &[Chunk],
    options: &StageOptions,
    reports: bool,
) -> Result<Made> {
    if mine.is_empty() {
        return Ok(Made::default());
    }
    let quant = options.quantize.ok_or_else(|| Error::fault("nothing is to be quantized"))?;
    let source = QuantizedFile::open(&manifest.in_place.model, quant)?;
    let source = source.ok_or_else(|| changed(options))?;
    let bytes: u64 = manifest.files.iter().filter(|file| file.made).map(|file| file.bytes).sum();
    if source.bytes() != bytes {
        return Err(changed(options));
    }
    let destination = ChunkFiles::open(&order.copy, &manifest.files)?;
    let next = AtomicUsize::new(0);
    let hashes = Mutex::new(Ok(Vec::with_capacity(mine.len())));
    let begun = Instant::now();
    let work = |says: bool| {
        let mut said = begun;
        while let Some(&index) = mine.get(next.fetch_add(1, Ordering::Relaxed)) {
            let made = make_one(&source, &destination, order, index, &chunks[index]);
            let mut hashes = hashes.lock().unwrap_or_else(PoisonError::into_inner);
            match (&mut *hashes, made) {
                (Ok(hashes), Ok(hash)) => hashes.push((index, hash)),
                (Ok(_), Err(error)) => *hashes = Err(error),
                (Err(_), _) => {}
            }
            let Ok(hashes) = &*hashes else { return };
            if says && said.elapsed() >= PROGRESS_EVERY {
                said = Instant::now();
                tracing::info!(chunks = hashes.len(), of = mine.len(), "quantizing");
            }
        }
    };
    thread::scope(|scope| {
        (1..WORKERS).for_each(|_| drop(scope.spawn(|| work(false))));
        work(reports);
    });
    let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let bytes_written = mine.iter().map(|&index| chunks[index].bytes as u64).sum();
    Ok(Made { bytes_read: source.bytes_read(), bytes_written, hashes })
}

fn make_one(
    source: &QuantizedFile,
    destination: &ChunkFiles,
    order: &Order,
    index: usize,
    chunk: &Chunk,
) -> Result<Hash> {
    let mut data = vec![0; chunk.bytes];
    source.read_at(chunk.offset, &mut data)?;
    let hash = hash(&data);
    if order.expected.as_ref().is_some_and(|expected| expected[index] != hash) {
        return Err(super::transfer::not_as_before());
    }
    destination.write_verified(chunk, &data, &hash)?;
    Ok(hash)
}
