//! A GPU's counters by NVML, which the driver brings along: one thread a device takes a
//! [`Sample`] of them a few times a second.
//!
//! The library is opened at run time, and the device is found by what it is: NVML counts all
//! cards of the node, CUDA those that it shows this process. What cannot be read is unknown;
//! nothing here ends a run.

use std::ffi::OsStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use super::choice::Visible;
use super::usage::{DeviceUsage, Sample, UsageMeter};

/// Between samples. Drivers renew utilisation and power up to ten times a second.
const INTERVAL: Duration = Duration::from_millis(200);

/// Watches a device until it is told to stop.
pub struct Sampler {
    stop: Sender<()>,
    thread: JoinHandle<UsageMeter>,
}

impl Sampler {
    /// Starts to watch `device`, by the driver's library or the one at `library`.
    ///
    /// # Errors
    /// Why there are no counters.
    pub fn start(device: &Visible, library: Option<&OsStr>) -> Result<Self, String> {
        let mut builder = Nvml::builder();
        if let Some(library) = library {
            builder.lib_path(library);
        }
        let nvml = builder.init().map_err(|error| error.to_string())?;
        find(&nvml, device).map_err(|error| format!("NVML does not find the device: {error}"))?;
        let (stop, stopped) = channel();
        let device = device.clone();
        let watch = move || watch(&nvml, &device, &stopped);
        let thread = std::thread::Builder::new().name("farm-nvml".into()).spawn(watch);
        Ok(Self { stop, thread: thread.map_err(|error| error.to_string())? })
    }

    /// Stops, after a last sample.
    pub fn finish(self) -> DeviceUsage {
        drop(self.stop);
        self.thread.join().map_or_else(|_| DeviceUsage::default(), |meter| meter.usage())
    }
}

fn watch(nvml: &Nvml, visible: &Visible, stopped: &Receiver<()>) -> UsageMeter {
    let mut meter = UsageMeter::default();
    let Ok(device) = find(nvml, visible) else { return meter };
    let start = Instant::now();
    loop {
        meter.add(sample(&device, visible.is_slice(), start.elapsed()));
        if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
            meter.add(sample(&device, visible.is_slice(), start.elapsed()));
            return meter;
        }
    }
}

fn find<'a>(nvml: &'a Nvml, device: &Visible) -> Result<Device<'a>, NvmlError> {
    if let Some(uuid) = &device.uuid
        && let found @ Ok(_) = nvml.device_by_uuid(uuid.as_str())
    {
        return found;
    }
    match &device.pci_bus_id {
        // The whole card's counters are not its slice's.
        Some(place) if !device.is_slice() => nvml.device_by_pci_bus_id(place.as_str()),
        _ => Err(NvmlError::NotFound),
    }
}

/// What the device tells; a slice has memory of its own, but no power.
fn sample(device: &Device, is_slice: bool, at: Duration) -> Sample {
    let whole = (!is_slice).then_some(device);
    Sample {
        at,
        busy_share: whole
            .and_then(|device| device.utilization_rates().ok())
            .map(|rates| f64::from(rates.gpu) / 100.0),
        memory_bytes: device.memory_info().ok().map(|memory| memory.used),
        watts: whole
            .and_then(|device| device.power_usage().ok())
            .map(|milliwatts| f64::from(milliwatts) / 1e3),
        joules: whole
            .and_then(|device| device.total_energy_consumption().ok())
            .map(|millijoules| millijoules as f64 / 1e3),
        celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
        clock_mhz: device.clock_info(Clock::SM).ok().map(f64::from),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// A library of that name with a card or two, compiled here; `None` without a C compiler.
    fn library(folder: &std::path::Path, defines: &[&str]) -> Option<PathBuf> {
        let path = folder.join(format!("libnvidia-ml{}.so.1", defines.join("")));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/device/nvml/fake.c");
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&path).arg(source);
        command.args(defines.iter().map(|name| format!("-D{name}")));
        command.status().is_ok_and(|status| status.success()).then_some(path)
    }

    fn card(uuid: &str, place: &str) -> Visible {
        Visible {
            ordinal: 0,
            uuid: Some(uuid.into()),
            pci_bus_id: Some(place.into()),
            name: "NVIDIA H200".into(),
            compute_capability: (9, 0),
            memory_bytes: 141 << 30,
            emulated: false,
        }
    }

    fn watched(library: &std::path::Path, device: &Visible) -> Result<DeviceUsage, String> {
        let sampler = Sampler::start(device, Some(library.as_os_str()))?;
        std::thread::sleep(INTERVAL * 3);
        Ok(sampler.finish())
    }

    #[test]
    fn counters_are_read_from_the_card_that_is_meant() {
        let folder = tempfile::tempdir().unwrap();
        let Some(library) = library(folder.path(), &[]) else { return };
        let usage = watched(&library, &card("GPU-two", "0000:65:00.0")).unwrap();
        // The fake's second card: 60% busy, 400 W, 66 °C.
        assert_eq!((usage.busy_share_mean, usage.busy_share_max), (Some(0.6), Some(0.6)));
        assert_eq!((usage.watts_max, usage.celsius_max), (Some(400.0), Some(66.0)));
        assert_eq!((usage.memory_bytes_max, usage.clock_mhz_mean), (Some(20 << 30), Some(1755.0)));
        // Its counter adds 80 J a reading; there were four or so.
        let joules = usage.joules.unwrap();
        assert!(joules >= 160.0 && joules % 80.0 == 0.0, "{joules}");
        // By its place, where the driver's uuid is not NVML's.
        let usage = watched(&library, &card("GPU-other", "0000:17:00.0")).unwrap();
        assert_eq!(usage.watts_max, Some(300.0));
    }

    #[test]
    fn a_counter_that_is_not_there_is_unknown() {
        let folder = tempfile::tempdir().unwrap();
        let Some(old) = library(folder.path(), &["WITHOUT_ENERGY"]) else { return };
        let usage = watched(&old, &card("GPU-one", "0000:17:00.0")).unwrap();
        // Power over time: 300 W for some 0.6 s.
        assert!((100.0..2000.0).contains(&usage.joules.unwrap()), "{usage:?}");
        let virtual_card = library(folder.path(), &["WITHOUT_ENERGY", "WITHOUT_POWER"]).unwrap();
        let usage = watched(&virtual_card, &card("GPU-one", "0000:17:00.0")).unwrap();
        assert_eq!((usage.joules, usage.watts_mean, usage.watts_max), (None, None, None));
        assert!(usage.busy_share_mean.is_some());
        // A slice knows its memory; the power is the whole card's.
        let slice = Visible { name: "NVIDIA H200 MIG 1g.18gb".into(), ..card("GPU-one", "") };
        let library = library(folder.path(), &[]).unwrap();
        let usage = watched(&library, &slice).unwrap();
        assert_eq!((usage.joules, usage.watts_max, usage.busy_share_mean), (None, None, None));
        assert!(usage.memory_bytes_max.is_some());
    }

    #[test]
    fn without_the_library_or_the_card_there_is_a_reason() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("libnvidia-ml.so.1");
        assert!(watched(&absent, &card("GPU-one", "")).is_err());
        let Some(library) = library(folder.path(), &[]) else { return };
        let slice = Visible { name: "H200 MIG 1g.18gb".into(), ..card("MIG-x", "0000:17:00.0") };
        assert!(watched(&library, &slice).unwrap_err().contains("does not find"));
    }
}
