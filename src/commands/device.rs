//! From `--device` and what each rank sees to the device of every rank.
//!
//! The ranks of a node exchange what the driver shows them and share it out
//! ([`device::choice`]); then all ranks of the job hear of every choice, so that a
//! tensor-parallel group is of one kind and rank 0 can say what the job computes on.

use crate::cli::{self, BatchLimits, ModelArgs, WeightsArgs};
use crate::comm::{Communicator, Topology, agree};
use crate::commands::launch::Rank;
use crate::device::choice::{self, Choice, Chosen, Float, Precision, Seen, Stored, Wish};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use crate::device::nvml::Sampler;
use crate::device::usage::DeviceUsage;
use crate::device::{self, Device};
use crate::stats::format;
use crate::{Error, Result};

/// What the ranks compute on.
pub struct Devices {
    /// This rank's.
    pub own: Choice,
    /// Every rank's, in order.
    ranks: Vec<Chosen>,
}

impl Devices {
    /// Chooses. Collective; fails alike on all ranks.
    ///
    /// # Errors
    /// Usage errors that say the fix: see [`choice::choose`] and
    /// [`choice::same_kind_in_groups`].
    pub fn choose(flags: &WeightsArgs, rank: &Rank, topology: &Topology) -> Result<Self> {
        let world = &*topology.world;
        let own = agree(world, on_this_node(flags, topology))?;
        let chosen =
            Chosen { rank: world.rank(), host: world.host().to_owned(), choice: own.clone() };
        let ranks = agree(world, exchange(world, &chosen))?;
        choice::same_kind_in_groups(&ranks, topology.tensor_parallel.size())?;
        let devices = Self { own, ranks };
        if world.rank() == 0 {
            devices.say(rank.job.gpus_on_node, topology.tensor_parallel.size());
        }
        Ok(devices)
    }

    /// Opens this rank's device; `None` on a CPU.
    ///
    /// # Errors
    /// A fault that says what the driver said.
    pub fn open(&self) -> Result<Option<Device>> {
        match &self.own {
            Choice::Cpu { .. } => Ok(None),
            #[cfg(feature = "emulator")]
            Choice::Gpu { device, .. } if device.emulated => Ok(Some(Device::emulated())),
            Choice::Gpu { device, .. } => device::open(device.ordinal).map(Some),
        }
    }

    /// Whether this rank, and so its group, computes on a device.
    pub fn on_device(&self) -> bool {
        matches!(self.own, Choice::Gpu { .. })
    }

    /// Ranks of this node on this rank's device, this one included.
    pub fn ranks_on_device(&self) -> usize {
        match self.own {
            Choice::Cpu { .. } => 1,
            Choice::Gpu { ranks, .. } => ranks,
        }
    }

    /// Whether this rank's device is a slice of a card.
    pub fn is_slice(&self) -> bool {
        matches!(&self.own, Choice::Gpu { device, .. } if device.is_slice())
    }

    /// All memory of this rank's device; `None` on a CPU.
    pub fn memory_bytes(&self) -> Option<u64> {
        match &self.own {
            Choice::Cpu { .. } => None,
            Choice::Gpu { device, .. } => Some(device.memory_bytes),
        }
    }

    /// Whether another rank counts what this one's device does.
    pub fn is_counted_elsewhere(&self) -> bool {
        matches!(self.own, Choice::Gpu { leads: false, .. })
    }

    /// Starts to watch this rank's device; of ranks that share one the first watches.
    pub fn watch(&self) -> Watch {
        Watch::start(&self.own)
    }

    /// How much this rank takes at once: by the flags, else by what it computes on.
    pub fn batch_limits(&self, flags: &ModelArgs) -> BatchLimits {
        flags.batch_limits(self.on_device())
    }

    /// What devices compute in. One answer for the whole job, so that no text depends on the
    /// card that its record comes to; `None` where all ranks are on CPUs.
    pub fn precision(&self, flags: &WeightsArgs, stored: Stored) -> Option<Precision> {
        let asked = match flags.dtype {
            cli::Dtype::Auto => None,
            cli::Dtype::F32 => Some(Float::F32),
            cli::Dtype::Bf16 => Some(Float::Bf16),
            cli::Dtype::F16 => Some(Float::F16),
        };
        let stored = if flags.quantize.is_some() { Stored::Quantized } else { stored };
        let capability = choice::least_capability(&self.ranks)?;
        Some(choice::precision(asked, stored, capability))
    }

    /// The kinds in use, `cpu` or `cuda`, as a run records them.
    pub fn kinds(&self) -> String {
        let mut kinds: Vec<&str> = self.ranks.iter().map(|rank| rank.choice.kind()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds.join(", ")
    }

    /// The devices in use: `4 × NVIDIA H200`.
    pub fn summary(&self) -> String {
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for rank in &self.ranks {
            let name = rank.choice.name();
            let counted = match rank.choice {
                Choice::Cpu { .. } => 0,
                Choice::Gpu { leads, .. } => usize::from(leads),
            };
            match counts.iter_mut().find(|entry| entry.0 == name) {
                Some(entry) => entry.1 += counted,
                None => counts.push((name, counted)),
            }
        }
        let say = |&(name, count): &(&str, usize)| match count {
            0 | 1 => name.to_owned(),
            n => format!("{n} × {name}"),
        };
        counts.iter().map(say).collect::<Vec<_>>().join(", ")
    }

    /// Rank 0 logs what the job computes on, and why not on a GPU where it holds some.
    fn say(&self, gpus_on_node: Option<usize>, tensor_parallel: usize) {
        choice::warnings(&self.ranks, tensor_parallel).iter().for_each(|w| tracing::warn!("{w}"));
        match &self.own {
            Choice::Cpu { reason: Some(reason) } if gpus_on_node.is_some_and(|gpus| gpus > 0) => {
                tracing::warn!("this job holds GPUs, but farm computes on the CPU: {reason}");
            }
            // What computes is said when there is something to compute.
            Choice::Cpu { reason } => {
                let reason = reason.as_deref().unwrap_or("asked for");
                tracing::debug!("the CPU is taken: {reason}");
            }
            Choice::Gpu { device, ranks, .. } => {
                let (major, minor) = device.compute_capability;
                let memory = format::memory(device.memory_bytes);
                let shared = if *ranks > 1 { ", shared by ranks" } else { "" };
                tracing::info!(
                    "computing on {}{shared} ({memory}, compute capability {major}.{minor})",
                    self.summary()
                );
            }
        }
    }
}

/// The counters of a rank's device while it works; nothing where there are none.
pub struct Watch {
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    sampler: Option<Sampler>,
}

impl Watch {
    /// Of a device that has counters and that no other rank watches.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn start(choice: &Choice) -> Self {
        let Choice::Gpu { device, leads: true, .. } = choice else { return Self { sampler: None } };
        if device.emulated {
            return Self { sampler: None };
        }
        let started = Sampler::start(device, None).inspect_err(|reason| {
            tracing::info!("the counters of {} are unavailable: {reason}", device.name);
        });
        Self { sampler: started.ok() }
    }

    /// There is no device.
    #[cfg(not(any(feature = "cuda", feature = "emulator")))]
    fn start(_: &Choice) -> Self {
        Self {}
    }

    /// Ends the watch.
    pub fn finish(self) -> DeviceUsage {
        #[cfg(any(feature = "cuda", feature = "emulator"))]
        if let Some(sampler) = self.sampler {
            return sampler.finish();
        }
        DeviceUsage::default()
    }
}

fn on_this_node(flags: &WeightsArgs, topology: &Topology) -> Result<Choice> {
    let (world, node) = (&*topology.world, &*topology.node);
    let wish = match flags.device {
        cli::DeviceKind::Cpu => return Ok(Choice::Cpu { reason: None }),
        #[cfg(feature = "emulator")]
        cli::DeviceKind::Emulator => return Ok(emulated()),
        cli::DeviceKind::Auto => Wish::Auto,
        cli::DeviceKind::Cuda => Wish::Cuda,
    };
    let variable = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let seen = Seen::new(world.rank(), device::visible(), variable.as_deref());
    let all = exchange(node, &seen)?;
    let choices = choice::choose(wish, world.host(), &all, &device::built(), flags.share_device)?;
    Ok(choices[node.rank()].clone())
}

/// Each rank has its own.
#[cfg(feature = "emulator")]
fn emulated() -> Choice {
    let device = Device::emulated();
    let properties = device.properties();
    let device = choice::Visible {
        ordinal: 0,
        uuid: None,
        pci_bus_id: None,
        name: properties.name.clone(),
        compute_capability: properties.compute_capability,
        memory_bytes: properties.memory_bytes,
        emulated: true,
    };
    Choice::Gpu { device, ranks: 1, leads: true }
}

/// `value` of every rank of `comm`, in order. Collective.
fn exchange<T>(comm: &dyn Communicator, value: &T) -> Result<Vec<T>>
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    let bytes = serde_json::to_vec(value).map_err(Error::fault)?;
    let all = comm.all_gather(&bytes);
    all.iter().map(|bytes| serde_json::from_slice(bytes).map_err(Error::fault)).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command, ModelArgs};
    use crate::comm::LocalComm;
    use crate::device::choice::Visible;
    use crate::slurm::JobEnv;

    fn flags(words: &[&str]) -> ModelArgs {
        let base = ["farm", "generate", "--model", "m", "--prompts-file", "p"];
        let Command::Generate(args) =
            Cli::try_parse_from(base.iter().chain(words)).unwrap().command
        else {
            panic!("generate")
        };
        args.model
    }

    fn chosen(words: &[&str], ranks: usize) -> Vec<Result<Devices>> {
        let flags = flags(words);
        LocalComm::run(ranks, |world| {
            let topology = Topology::new(world.clone(), ranks)?;
            let rank = Rank { world, job: JobEnv::default(), threads: 1 };
            Devices::choose(&flags.weights, &rank, &topology)
        })
    }

    #[test]
    fn the_cpu_is_what_is_asked_for_or_what_there_is() {
        for devices in chosen(&["--device", "cpu"], 2) {
            let devices = devices.unwrap();
            assert_eq!(devices.own, Choice::Cpu { reason: None });
            assert_eq!((devices.kinds(), devices.summary()), ("cpu".into(), "cpu".into()));
            assert!(!devices.on_device() && devices.open().unwrap().is_none());
            let weights = flags(&[]).weights;
            assert_eq!(devices.precision(&weights, Stored::Quantized), None);
        }
        #[cfg(not(feature = "cuda"))]
        assert!(matches!(
            &chosen(&[], 1)[0].as_ref().unwrap().own,
            Choice::Cpu { reason: Some(reason) } if reason.contains("without CUDA")
        ));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_gpu_that_cannot_be_had_is_one_error_on_all_ranks() {
        for devices in chosen(&["--device", "cuda"], 3) {
            let error = devices.err().unwrap();
            assert_eq!(error.kind, crate::ErrorKind::Usage);
            assert!(error.message.starts_with("--device cuda: this farm was compiled"), "{error}");
            assert!(error.message.contains("make cuda"), "{error}");
        }
    }

    #[cfg(feature = "emulator")]
    #[test]
    fn each_rank_has_an_emulator_of_its_own() {
        for devices in chosen(&["--device", "emulator"], 2) {
            let devices = devices.unwrap();
            assert_eq!(devices.kinds(), "emulator");
            assert!(devices.summary().starts_with("2 × "), "{}", devices.summary());
            assert!(devices.on_device() && devices.open().unwrap().is_some());
            let limits = devices.batch_limits(&flags(&["--max-batch-size", "7"]));
            assert_eq!(limits, BatchLimits { sequences: 7, ..BatchLimits::ON_DEVICE });
            let weights = flags(&["--quantize", "q8_0"]).weights;
            let stored = Stored::Float(Float::F32);
            assert_eq!(devices.precision(&weights, stored).unwrap().float, Float::Bf16);
        }
    }

    fn on(name: &str, leads: bool) -> Chosen {
        let device = Visible {
            ordinal: 0,
            uuid: None,
            pci_bus_id: None,
            name: name.into(),
            compute_capability: (9, 0),
            memory_bytes: 0,
            emulated: false,
        };
        let choice = Choice::Gpu { device, ranks: 1, leads };
        Chosen { rank: 0, host: "n1".into(), choice }
    }

    /// A device that ranks share counts once.
    #[test]
    fn devices_are_counted() {
        let cpu = || Choice::Cpu { reason: None };
        let mut ranks =
            vec![on("H200", true), on("H200", false), on("A100", true), on("H200", true)];
        ranks.push(Chosen { choice: cpu(), ..on("", false) });
        let devices = Devices { own: cpu(), ranks };
        assert_eq!(devices.summary(), "2 × H200, A100, cpu");
        assert_eq!(devices.kinds(), "cpu, cuda");
    }
}
