//! Which device a rank computes on: CPU, or which of the GPUs that its node shows it.
//!
//! Pure: what each rank sees is passed in as [`Seen`], and every rank of a node computes the
//! same answer from the same list. Slurm hands out GPUs in two ways: all of the node's to all
//! its tasks (`--gpus-per-node`, `--gpu-bind=none`), or one to each (`--gpus-per-task`), which
//! each task then sees as device 0. So devices are told apart by what they are and not by
//! their numbers, and ranks are matched with them. Left out: binding to the nearest CPU cores
//! and network cards, which is the launcher's.

use std::fmt;

use serde::{Deserialize, Serialize};

mod listing;
mod matching;
mod precision;

#[cfg(test)]
mod tests;

pub use listing::Listing;
pub use precision::{Float, Precision, Stored, precision};

use crate::{Error, Result};

/// What was asked for: `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// A GPU where there is one.
    Auto,
    /// No GPU.
    Cpu,
    /// A GPU or an error.
    Cuda,
}

/// A device that the driver shows to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visible {
    /// Its number among those that the process sees.
    pub ordinal: usize,
    /// `GPU-…` or `MIG-…`; `None` where the driver gives none.
    pub uuid: Option<String>,
    /// `0000:17:00.0`; slices of one card have the same.
    pub pci_bus_id: Option<String>,
    /// `NVIDIA H200`.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// All of its memory.
    pub memory_bytes: u64,
    /// Whether it is none, but the emulator that tests run on.
    #[serde(default)]
    pub emulated: bool,
}

impl Visible {
    /// Whether it is a slice of a card (MIG).
    pub fn is_slice(&self) -> bool {
        self.name.contains(" MIG ")
    }

    /// The form in which tools and `CUDA_VISIBLE_DEVICES` write the driver's 16 bytes; `None` for
    /// the zeros that stand for no identity.
    pub fn uuid_text(bytes: [u8; 16], is_slice: bool) -> Option<String> {
        if bytes == [0; 16] {
            return None;
        }
        let kind = if is_slice { "MIG" } else { "GPU" };
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let (a, b, c, d, e) = (&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
        Some(format!("{kind}-{a}-{b}-{c}-{d}-{e}"))
    }
}

/// Why a process sees no device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoDevice {
    /// This farm was compiled without CUDA.
    NotBuilt,
    /// The driver's library cannot be opened: what the loader said.
    NoDriver(String),
    /// The driver works and shows nothing.
    NoneVisible,
    /// The driver failed: what it said.
    Failed(String),
}

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoDevice::NotBuilt => write!(f, "this farm was compiled without CUDA"),
            NoDevice::NoDriver(reason) => write!(f, "no NVIDIA driver ({reason})"),
            NoDevice::NoneVisible => write!(f, "the driver shows no GPU"),
            NoDevice::Failed(reason) => write!(f, "the NVIDIA driver failed: {reason}"),
        }
    }
}

/// What one rank sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Rank in the world.
    rank: usize,
    /// The devices, in the order of their ordinals.
    devices: Vec<Visible>,
    /// What tells each of them from the node's others.
    identities: Vec<String>,
    /// Why there are none, and what the user can do.
    missing: Option<(NoDevice, String)>,
}

impl Seen {
    /// From the driver's answer and the variable `CUDA_VISIBLE_DEVICES`.
    pub fn new(
        rank: usize,
        visible: std::result::Result<Vec<Visible>, NoDevice>,
        variable: Option<&str>,
    ) -> Self {
        let listing = Listing::parse(variable);
        let (devices, missing) = match visible {
            Ok(devices) if devices.is_empty() => (devices, Some(NoDevice::NoneVisible)),
            Ok(devices) => (devices, None),
            Err(missing) => (Vec::new(), Some(missing)),
        };
        let identities = devices.iter().map(|device| identity(device, &listing)).collect();
        let missing = missing.map(|missing| {
            let advice = advice(&missing, &listing);
            (missing, advice)
        });
        Self { rank, devices, identities, missing }
    }
}

/// A slice's listed name first: old drivers give all slices of a card the card's uuid.
fn identity(device: &Visible, listing: &Listing) -> String {
    let listed = listing.slice(device.ordinal).map(str::to_owned);
    let own = || device.uuid.clone().or_else(|| device.pci_bus_id.clone());
    listed.or_else(own).unwrap_or_else(|| format!("{} number {}", device.name, device.ordinal))
}

fn advice(missing: &NoDevice, listing: &Listing) -> String {
    match missing {
        NoDevice::NotBuilt => {
            "build one by `make cuda` (cargo build --release --features cuda,nccl)".to_owned()
        }
        NoDevice::NoDriver(_) => {
            "start on a node with GPUs (Slurm: a partition that has them, --gpus-per-node=N)"
                .to_owned()
        }
        NoDevice::NoneVisible => format!(
            "{listing}; in Slurm ask for GPUs, --gpus-per-node=N for the job and, for srun within \
             it, --gpus=N"
        ),
        NoDevice::Failed(_) => {
            "nvidia-smi on that node may say more; a driver older than farm's CUDA needs an update"
                .to_owned()
        }
    }
}

/// The cards that this farm's kernels were compiled for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Compute capabilities as `CUDA_COMPUTE_CAP` lists them: 80 is 8.0.
    capabilities: Vec<u32>,
}

impl Built {
    /// Reads `70,80,90`; words that are no numbers are left out.
    pub fn parse(list: &str) -> Self {
        Self { capabilities: list.split(',').filter_map(|word| word.trim().parse().ok()).collect() }
    }

    /// Machine code runs on cards of its own major version from its own minor version on; the
    /// last one's comes with code that the driver translates for any newer card.
    pub fn runs_on(&self, capability: (u32, u32)) -> bool {
        let (major, minor) = capability;
        let runs = |built: &u32| built / 10 == major && built % 10 <= minor;
        let translated = |last: &u32| (last / 10, last % 10) <= capability;
        self.capabilities.iter().any(runs) || self.capabilities.last().is_some_and(translated)
    }
}

impl fmt::Display for Built {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> = self.capabilities.iter().map(u32::to_string).collect();
        f.write_str(if words.is_empty() { "none" } else { "" })?;
        f.write_str(&words.join(","))
    }
}

/// What a rank computes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Choice {
    /// The CPU, and why where a GPU was looked for.
    Cpu {
        /// `None` where the CPU was asked for.
        reason: Option<String>,
    },
    /// A GPU.
    Gpu {
        /// The device.
        device: Visible,
        /// Ranks of the node that compute on it.
        ranks: usize,
        /// Whether this one is the first of them: what is counted a device is counted there.
        leads: bool,
    },
}

impl Choice {
    /// `cpu`, `cuda` or `emulator`.
    pub fn kind(&self) -> &'static str {
        match self {
            Choice::Cpu { .. } => "cpu",
            Choice::Gpu { device, .. } if device.emulated => "emulator",
            Choice::Gpu { .. } => "cuda",
        }
    }

    /// The device's name, or `cpu`.
    pub fn name(&self) -> &str {
        match self {
            Choice::Cpu { .. } => "cpu",
            Choice::Gpu { device, .. } => &device.name,
        }
    }
}

/// The choice of each rank of a node, in the order of `node`; all ranks of the node compute
/// the same. `share` lets several ranks compute on one device.
///
/// # Errors
/// Usage errors that say the fix: a GPU was asked for and a rank sees none that this farm can
/// use; more ranks than GPUs.
pub fn choose(
    wish: Wish,
    host: &str,
    node: &[Seen],
    built: &Built,
    share: bool,
) -> Result<Vec<Choice>> {
    if wish == Wish::Cpu {
        return Ok(node.iter().map(|_| Choice::Cpu { reason: None }).collect());
    }
    let unusable: Vec<Option<Reason>> = node.iter().map(|seen| unusable(seen, built)).collect();
    if wish == Wish::Cuda
        && let Some((seen, reason)) = node.iter().zip(&unusable).find_map(with_reason)
    {
        return Err(refused(seen, host, reason));
    }
    let usable = |seen: &Seen| -> Vec<String> {
        let devices = seen.devices.iter().zip(&seen.identities);
        devices
            .filter(|(d, _)| built.runs_on(d.compute_capability))
            .map(|(_, id)| id.clone())
            .collect()
    };
    let lists: Vec<Vec<String>> = node.iter().map(usable).collect();
    let taken = match matching::one_each(&lists) {
        Ok(taken) => taken,
        Err(_) if share => matching::evenly(&lists),
        Err(crowded) => return Err(two_on_one(host, node, &lists, &crowded)),
    };
    let choices = node.iter().zip(unusable).zip(&taken).enumerate();
    Ok(choices
        .map(|(place, ((seen, reason), identity))| match (identity, reason) {
            (Some(identity), _) => on_device(place, seen, identity, &taken),
            (None, reason) => Choice::Cpu { reason: reason.map(|reason| reason.why) },
        })
        .collect())
}

fn on_device(place: usize, seen: &Seen, identity: &String, taken: &[Option<String>]) -> Choice {
    let same = |other: &&Option<String>| other.as_ref() == Some(identity);
    let at = seen.identities.iter().position(|own| own == identity);
    let device = at.map(|at| seen.devices[at].clone()).expect("a rank takes a device that it sees");
    let ranks = taken.iter().filter(same).count();
    let leads = !taken[..place].iter().any(|other| same(&other));
    Choice::Gpu { device, ranks, leads }
}

/// Why a rank has no device to compute on, and what helps.
struct Reason {
    why: String,
    fix: String,
}

fn with_reason<'a>(pair: (&'a Seen, &'a Option<Reason>)) -> Option<(&'a Seen, &'a Reason)> {
    pair.1.as_ref().map(|reason| (pair.0, reason))
}

fn unusable(seen: &Seen, built: &Built) -> Option<Reason> {
    if let Some((missing, fix)) = &seen.missing {
        return Some(Reason { why: missing.to_string(), fix: fix.clone() });
    }
    if seen.devices.iter().any(|device| built.runs_on(device.compute_capability)) {
        return None;
    }
    let device = &seen.devices[0];
    let (major, minor) = device.compute_capability;
    // CUDA 13 starts at Turing.
    let toolkit = if (major, minor) < (7, 5) { " with CUDA 12" } else { "" };
    let list =
        Built { capabilities: [vec![major * 10 + minor], built.capabilities.clone()].concat() };
    Some(Reason {
        why: format!(
            "this farm is built for compute capability {built}, and {} has {major}{minor}",
            device.name,
        ),
        fix: format!("rebuild it{toolkit}: CUDA_COMPUTE_CAP={list} make cuda"),
    })
}

fn refused(seen: &Seen, host: &str, reason: &Reason) -> Error {
    let Reason { why, fix } = reason;
    match seen.missing {
        // Alike on all ranks: no matter of one.
        Some((NoDevice::NotBuilt, _)) => {
            Error::usage(format!("--device cuda: {why}; {fix}, or use --device cpu"))
        }
        _ => Error::usage(format!(
            "--device cuda: rank {} on {host}: {why}: {fix}, or use --device cpu",
            seen.rank
        )),
    }
}

/// `crowded`: ranks (places in `node`) that have fewer devices to share out among them.
fn two_on_one(host: &str, node: &[Seen], lists: &[Vec<String>], crowded: &[usize]) -> Error {
    let mut devices: Vec<&str> =
        crowded.iter().flat_map(|&place| &lists[place]).map(String::as_str).collect();
    devices.sort_unstable();
    devices.dedup();
    let names: Vec<String> = crowded.iter().map(|&place| node[place].rank.to_string()).collect();
    let gpus = |n: usize| format!("{n} GPU{}", if n == 1 { "" } else { "s" });
    let sees_one = crowded.iter().all(|&place| node[place].devices.len() == 1);
    let bind = if sees_one && devices.len() == 1 && node.len() > 1 {
        ", let every rank see all of the node's (--gpu-bind=none)"
    } else {
        ""
    };
    Error::usage(format!(
        "{host}: ranks {} would share {} ({}), and a rank takes one of its own: start {} on this \
         node (--ntasks-per-node), ask for {} (--gpus-per-node){bind}, or let ranks share by \
         --share-device",
        names.join(", "),
        gpus(devices.len()),
        devices.join(", "),
        match devices.len() {
            1 => "1 rank".to_owned(),
            n => format!("{n} ranks"),
        },
        gpus(crowded.len()),
    ))
}

/// A rank with its choice, as all ranks of the job hear of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// Rank in the world.
    pub rank: usize,
    /// Its node.
    pub host: String,
    /// What it computes on.
    pub choice: Choice,
}

/// Whether the ranks of each tensor-parallel group of `size` compute on the same kind of device;
/// `ranks` are all of the world, in order.
///
/// # Errors
/// A usage error that names two ranks that do not.
pub fn same_kind_in_groups(ranks: &[Chosen], size: usize) -> Result<()> {
    for group in ranks.chunks(size.max(1)) {
        let first = &group[0];
        let Some(other) = group.iter().find(|r| r.choice.kind() != first.choice.kind()) else {
            continue;
        };
        let say = |r: &Chosen| format!("rank {} on {} on {}", r.rank, r.host, r.choice.kind());
        let why = group.iter().find_map(|rank| match &rank.choice {
            Choice::Cpu { reason: Some(reason) } => Some(format!(" ({reason})")),
            _ => None,
        });
        return Err(Error::usage(format!(
            "--tensor-parallel {size}: one model is split over {} and {}{}: start on nodes that \
             all have GPUs, or use --device cpu",
            say(first),
            say(other),
            why.unwrap_or_default()
        )));
    }
    Ok(())
}

/// What the user should know of the job's devices: groups over unlike cards, and ranks that
/// are left on the CPU beside others that are not.
pub fn warnings(ranks: &[Chosen], size: usize) -> Vec<String> {
    let mut found = Vec::new();
    let card = |rank: &Chosen| match &rank.choice {
        Choice::Gpu { device, .. } => Some((device.name.clone(), device.compute_capability)),
        Choice::Cpu { .. } => None,
    };
    let unlike = ranks.chunks(size.max(1)).find_map(|group| {
        let other = group.iter().find(|rank| card(rank) != card(&group[0]))?;
        Some((&group[0], other))
    });
    if let Some((first, other)) = unlike {
        let say = |r: &Chosen| format!("{} (rank {} on {})", r.choice.name(), r.rank, r.host);
        found.push(format!(
            "a model is split over unlike cards, {} and {}: each step takes as long as on the \
             slowest, and the cache is that of the smallest",
            say(first),
            say(other)
        ));
    }
    let on_cpu = |rank: &&Chosen| rank.choice.kind() == "cpu";
    let left: Vec<&Chosen> = ranks.iter().filter(on_cpu).collect();
    if let Some(first) = left.first()
        && left.len() < ranks.len()
    {
        let reason = match &first.choice {
            Choice::Cpu { reason: Some(reason) } => format!(": {reason}"),
            _ => String::new(),
        };
        found.push(format!(
            "{} of {} ranks compute on the CPU, the first of them rank {} on {}{reason}",
            left.len(),
            ranks.len(),
            first.rank,
            first.host
        ));
    }
    found
}

/// The least compute capability of the job's cards; `None` where all ranks are on CPUs.
pub fn least_capability(ranks: &[Chosen]) -> Option<(u32, u32)> {
    let capability = |rank: &Chosen| match &rank.choice {
        Choice::Gpu { device, .. } => Some(device.compute_capability),
        Choice::Cpu { .. } => None,
    };
    ranks.iter().filter_map(capability).min()
}
