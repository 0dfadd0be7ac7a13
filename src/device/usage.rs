//! What a device did while it worked: samples of its counters, and the figures they add up to.
//!
//! Pure; who takes the samples is in `nvml`. A counter that the device does not have is `None`
//! all the way, never 0.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A device's counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// When, since the first one.
    pub at: Duration,
    /// Share of the last moments in which a kernel ran.
    pub busy_share: Option<f64>,
    /// Memory in use, by all processes.
    pub memory_bytes: Option<u64>,
    /// Power draw.
    pub watts: Option<f64>,
    /// Energy drawn since some moment in the past.
    pub joules: Option<f64>,
    /// Temperature of the chip.
    pub celsius: Option<f64>,
    /// Clock of the multiprocessors.
    pub clock_mhz: Option<f64>,
}

/// Figures of a device over a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceUsage {
    /// Mean share of time in which a kernel ran.
    pub busy_share_mean: Option<f64>,
    /// The busiest sample's.
    pub busy_share_max: Option<f64>,
    /// Most memory in use, by all processes.
    pub memory_bytes_max: Option<u64>,
    /// Mean power draw.
    pub watts_mean: Option<f64>,
    /// The highest sample's.
    pub watts_max: Option<f64>,
    /// Energy drawn.
    pub joules: Option<f64>,
    /// The highest temperature.
    pub celsius_max: Option<f64>,
    /// Mean clock of the multiprocessors.
    pub clock_mhz_mean: Option<f64>,
}

/// Adds up samples.
#[derive(Debug, Clone, Default)]
pub struct UsageMeter {
    first: Option<Sample>,
    last: Sample,
    busy_share: Running,
    memory_bytes_max: Option<u64>,
    watts: Running,
    celsius: Running,
    clock_mhz: Running,
    /// Power over the time between samples.
    integrated_joules: f64,
}

impl UsageMeter {
    /// Adds a sample, taken after the ones before.
    pub fn add(&mut self, sample: Sample) {
        if self.first.is_some() {
            let seconds = sample.at.saturating_sub(self.last.at).as_secs_f64();
            let watts = [self.last.watts, sample.watts].into_iter().flatten();
            let (sum, known) = watts.fold((0.0, 0), |(sum, n), watts| (sum + watts, n + 1));
            self.integrated_joules += sum / f64::from(known.max(1)) * seconds;
        }
        self.busy_share.add(sample.busy_share);
        self.watts.add(sample.watts);
        self.celsius.add(sample.celsius);
        self.clock_mhz.add(sample.clock_mhz);
        self.memory_bytes_max = self.memory_bytes_max.max(sample.memory_bytes);
        self.first = self.first.or(Some(sample));
        self.last = sample;
    }

    /// The figures. Energy is the counter's where the device has one, else power over time.
    pub fn usage(&self) -> DeviceUsage {
        let first = self.first.unwrap_or_default();
        let counted = first.joules.zip(self.last.joules).map(|(from, to)| to - from);
        // A driver that was loaded anew counts from 0 again.
        let counted = counted.filter(|&joules| joules >= 0.0);
        let seconds = self.last.at.saturating_sub(first.at).as_secs_f64();
        let integrated = (self.watts.count > 1).then_some(self.integrated_joules);
        let joules = counted.or(integrated).filter(|_| seconds > 0.0);
        DeviceUsage {
            busy_share_mean: self.busy_share.mean(),
            busy_share_max: self.busy_share.most,
            memory_bytes_max: self.memory_bytes_max,
            watts_mean: joules.map(|joules| joules / seconds).or(self.watts.mean()),
            watts_max: self.watts.most,
            joules,
            celsius_max: self.celsius.most,
            clock_mhz_mean: self.clock_mhz.mean(),
        }
    }
}

/// Mean and maximum of what is known.
#[derive(Debug, Clone, Copy, Default)]
struct Running {
    sum: f64,
    count: u32,
    most: Option<f64>,
}

impl Running {
    fn add(&mut self, value: Option<f64>) {
        let Some(value) = value else { return };
        self.sum += value;
        self.count += 1;
        self.most = Some(self.most.map_or(value, |most| most.max(value)));
    }

    fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: f64, watts: Option<f64>, joules: Option<f64>) -> Sample {
        Sample { at: Duration::from_secs_f64(seconds), watts, joules, ..Sample::default() }
    }

    fn usage(samples: &[Sample]) -> DeviceUsage {
        let mut meter = UsageMeter::default();
        samples.iter().for_each(|&sample| meter.add(sample));
        meter.usage()
    }

    #[test]
    fn energy_is_the_counters_where_there_is_one() {
        let counted =
            usage(&[at(0.0, Some(100.0), Some(5e6)), at(2.0, Some(100.0), Some(5e6 + 600.0))]);
        assert_eq!((counted.joules, counted.watts_mean), (Some(600.0), Some(300.0)));
        assert_eq!(counted.watts_max, Some(100.0));
        let power = usage(&[
            at(0.0, Some(100.0), None),
            at(1.0, Some(300.0), None),
            at(3.0, Some(300.0), None),
        ]);
        assert_eq!((power.joules, power.watts_mean), (Some(800.0), Some(800.0 / 3.0)));
        let reloaded = usage(&[at(0.0, Some(50.0), Some(9e6)), at(2.0, Some(50.0), Some(1.0))]);
        assert_eq!(reloaded.joules, Some(100.0));
    }

    #[test]
    fn what_is_not_known_is_not_zero() {
        assert_eq!(usage(&[]), DeviceUsage::default());
        assert_eq!(usage(&[at(0.0, None, None), at(1.0, None, None)]), DeviceUsage::default());
        let one = usage(&[at(0.0, Some(80.0), Some(3.0))]);
        assert_eq!((one.joules, one.watts_mean), (None, Some(80.0)), "no time has passed");
    }

    #[test]
    fn means_and_maxima() {
        let sample = |seconds: u64, busy, memory| Sample {
            at: Duration::from_secs(seconds),
            busy_share: Some(busy),
            memory_bytes: Some(memory),
            celsius: Some(40.0 + busy),
            clock_mhz: Some(1000.0 * busy),
            ..Sample::default()
        };
        let figures = usage(&[sample(0, 0.5, 10), sample(1, 1.0, 30), sample(2, 0.0, 20)]);
        assert_eq!((figures.busy_share_mean, figures.busy_share_max), (Some(0.5), Some(1.0)));
        assert_eq!((figures.memory_bytes_max, figures.celsius_max), (Some(30), Some(41.0)));
        assert_eq!(figures.clock_mhz_mean, Some(500.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// Power within bounds gives energy within bounds, whatever the intervals and gaps.
        #[test]
        fn energy_is_bounded_by_power(samples in prop::collection::vec((0.01..5.0f64, prop::option::of(50.0..700.0f64)), 2..20)) {
            let mut seconds = 0.0;
            let samples: Vec<Sample> = samples.iter()
                .map(|&(step, watts)| { seconds += step; at(seconds, watts, None) })
                .collect();
            let figures = usage(&samples);
            if let Some(joules) = figures.joules {
                prop_assert!(joules >= 0.0 && joules <= 700.0 * seconds);
            }
            for mean in [figures.watts_mean, figures.watts_max].into_iter().flatten() {
                prop_assert!((0.0..=700.0).contains(&mean));
            }
        }
    }
}
