//! What loading needs to know where a rank computes on a device: the device itself, its
//! precision, how the group sums, and how much of its memory the KV cache may take.

use std::sync::Arc;

use crate::cli::WeightsArgs;
use crate::comm::{TensorComm, Topology, agree};
use crate::commands::device::Devices;
use crate::commands::generate::Job;
use crate::device::choice::{Float, Stored};
use crate::device::collectives::{DeviceComm, HostStaged};
use crate::device::sampling::RowChooser;
use crate::device::{Device, Dtype};
use crate::engine::{EngineConfig, Mode};
use crate::model::checkpoint::StoredDtype;
use crate::model::device::DeviceOptions;
use crate::model::{Checkpoint, ModelRunner, Runner};
use crate::stats::format;
use crate::{Error, Result};

/// Share of the device's free memory that the KV cache may take, where the flags do not say: the
/// rest is for the libraries, recorded work, and logits of scored prompts.
const KV_CACHE_SHARE: f64 = 0.9;

/// What the driver and the libraries may take later.
const RESERVED_BYTES: u64 = 256 << 20;

/// The device and how to compute on it; `None` on a CPU. Collective; fails alike on all ranks.
///
/// # Errors
/// See [`open`].
pub fn options(
    job: &Job,
    devices: &Devices,
    topology: &Topology,
    checkpoint: &Checkpoint,
    group: &Arc<dyn TensorComm>,
) -> Result<Option<DeviceOptions>> {
    let opened = open(&job.model.weights, devices, topology, checkpoint, group)?;
    let Some(Opened { device, comm, dtype }) = opened else { return Ok(None) };
    let limits = devices.batch_limits(&job.model);
    let max_rows = limits.tokens.max(limits.sequences);
    // As the engine asks for them: each sequence's, or some of a scored prompt.
    let row_bytes = size_of::<f32>() * checkpoint.config().vocab_size;
    let scored = match job.mode {
        Mode::Generate => 0,
        Mode::Score => EngineConfig::default().max_scored_logits_bytes / row_bytes,
    };
    let max_logits_rows = limits.sequences + scored;
    let uses_graphs = true;
    Ok(Some(DeviceOptions { device, comm, dtype, max_rows, max_logits_rows, uses_graphs }))
}

/// A device that is open.
pub struct Opened {
    /// The device.
    pub device: Device,
    /// The tensor-parallel group's sums.
    pub comm: Arc<dyn DeviceComm>,
    /// What products are taken of.
    pub dtype: Dtype,
}

/// The device, the group's sums, and what products are taken of; `None` on a CPU. Collective;
/// fails alike on all ranks.
///
/// # Errors
/// A device that does not open; a group that does not come together.
pub fn open(
    flags: &WeightsArgs,
    devices: &Devices,
    topology: &Topology,
    checkpoint: &Checkpoint,
    group: &Arc<dyn TensorComm>,
) -> Result<Option<Opened>> {
    let world = &*topology.world;
    let device = agree(world, devices.open())?;
    let precision = devices.precision(flags, stored(checkpoint));
    if let (0, Some(note)) = (world.rank(), precision.as_ref().and_then(|p| p.note.as_ref())) {
        tracing::warn!("{note}");
    }
    let comm = agree(world, group_comm(devices, device.as_ref(), topology, group))?;
    let (Some(device), Some(precision)) = (device, precision) else { return Ok(None) };
    Ok(Some(Opened { device, comm, dtype: dtype(precision.float) }))
}

/// What arrays of a precision hold.
pub fn dtype(float: Float) -> Dtype {
    match float {
        Float::F32 => Dtype::F32,
        Float::F16 => Dtype::F16,
        Float::Bf16 => Dtype::Bf16,
    }
}

/// What most of the matrices' values are stored as.
pub fn stored(checkpoint: &Checkpoint) -> Stored {
    let mut values = [0u64; 4];
    for (_, tensor) in checkpoint.tensors().iter().filter(|(_, t)| t.shape.len() > 1) {
        let kind = match tensor.dtype {
            StoredDtype::F32 => 0,
            StoredDtype::F16 => 1,
            StoredDtype::Bf16 => 2,
            _ => 3,
        };
        values[kind] += tensor.len() as u64;
    }
    let kinds = [
        Stored::Float(Float::F32),
        Stored::Float(Float::F16),
        Stored::Float(Float::Bf16),
        Stored::Quantized,
    ];
    let most = (0..kinds.len()).max_by_key(|kind| values[*kind]).unwrap_or(0);
    kinds[most]
}

/// By NCCL where every rank of the group has it and a device of its own, else through the
/// host. Collective over the group.
fn group_comm(
    devices: &Devices,
    device: Option<&Device>,
    topology: &Topology,
    group: &Arc<dyn TensorComm>,
) -> Result<Arc<dyn DeviceComm>> {
    // NCCL takes slices of one card for one device.
    let is_own = device.is_some_and(|device| !device.properties().emulated)
        && devices.ranks_on_device() == 1
        && !devices.is_slice();
    let version = if is_own { nccl_version() } else { None }.unwrap_or(0);
    let all = topology.tensor_parallel.all_gather(&version.to_le_bytes());
    let is_common = version > 0 && all.iter().all(|other| **other == version.to_le_bytes());
    match device {
        #[cfg(feature = "nccl")]
        Some(device) if group.size() > 1 && is_common => {
            Ok(Arc::new(crate::device::nccl::Nccl::new(device, group)?))
        }
        _ => {
            if group.size() > 1 && device.is_some() && group.rank() == 0 && !is_common {
                tracing::info!(
                    "sums of the tensor-parallel group go through the host: its ranks have no NCCL \
                     in common, or no GPU each"
                );
            }
            Ok(Arc::new(HostStaged::new(group.clone())))
        }
    }
}

fn nccl_version() -> Option<i32> {
    #[cfg(feature = "nccl")]
    return crate::device::nccl::Nccl::version();
    #[cfg(not(feature = "nccl"))]
    None
}

/// The blocks of the KV cache, now that it is known what the weights leave of this rank's device;
/// `None` on a CPU, whose cache is there.
///
/// # Errors
/// Not even one sequence fits at its longest.
pub fn num_blocks(
    job: &Job,
    devices: &Devices,
    runner: &ModelRunner,
    max_seq_len: usize,
) -> Result<Option<usize>> {
    let Some(decoder) = runner.on_device() else { return Ok(None) };
    let sequences = devices.batch_limits(&job.model).sequences;
    let vocab_size = runner.vocab_size();
    // Not there yet: what choosing takes, and recorded work.
    let choosing = RowChooser::bytes_for(vocab_size, sequences, sequences) as u64;
    let free = decoder.device().free_bytes()? / devices.ranks_on_device() as u64;
    let set_aside = choosing + RESERVED_BYTES;
    if free <= set_aside {
        return Err(Error::input(format!(
            "{}: {} are free after loading, and tokens of {sequences} sequences are chosen in {}: \
             a smaller --max-batch-size, --quantize, or --tensor-parallel over more devices",
            decoder.device().properties().name,
            format::memory(free),
            format::memory(set_aside),
        )));
    }
    let free = free - set_aside;
    let allowed = match job.model.kv_cache_memory {
        Some(flag) => flag.min(free),
        None => (free as f64 * KV_CACHE_SHARE) as u64,
    };
    super::blocks_within(Some(allowed), decoder.block_bytes().max(1), max_seq_len, sequences)
        .map(Some)
        .map_err(|error: Error| error.context(&decoder.device().properties().name))
}
