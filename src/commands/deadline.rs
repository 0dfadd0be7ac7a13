//! When the job ends, and how long before it a launch stops taking records.
//!
//! The end is the earlier of `--time-limit` and of Slurm's time limit. The signal that the
//! batch templates ask for (`--signal=B:USR1@120`) usually comes first; this is for jobs
//! without it, and for workstations. Left out: limits that are changed while the job runs
//! (a shortened one ends in a signal), and the limits of single steps.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::slurm::{JobEnv, query};

/// What a drain needs apart from the work under way, seconds: statistics, the staging
/// lease, the last barrier.
const BASE_SECONDS: f64 = 10.0;

/// What this launch's work has taken so far, for the size of the margin.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measured {
    /// The longest step of the engine.
    pub longest_step_seconds: f64,
    /// The longest wait for the journal to be on disk.
    pub longest_sync_seconds: f64,
}

impl Measured {
    /// Notes a step of the engine.
    pub fn step(&mut self, took: Duration) {
        self.longest_step_seconds = self.longest_step_seconds.max(took.as_secs_f64());
    }

    /// Notes a sync of the journal.
    pub fn sync(&mut self, took: Duration) {
        self.longest_sync_seconds = self.longest_sync_seconds.max(took.as_secs_f64());
    }
}

/// The end of the job on this launch's own clock, seconds since the process's start.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Deadline {
    /// `None` without a limit.
    end_seconds: Option<f64>,
}

impl Deadline {
    /// The earlier of `time_limit`, counted from the process's start, and of the job's end
    /// in `job_seconds_left` ([`job_seconds_left`], asked `now_seconds` after the start).
    pub fn new(
        time_limit: Option<Duration>,
        job_seconds_left: Option<f64>,
        now_seconds: f64,
    ) -> Self {
        let own = time_limit.map(|limit| limit.as_secs_f64());
        let jobs = job_seconds_left.map(|left| now_seconds + left);
        let earlier = own.into_iter().chain(jobs).reduce(f64::min);
        Self { end_seconds: earlier }
    }

    /// Seconds from the process's start to the end; `None` without a limit.
    pub fn end_seconds(&self) -> Option<f64> {
        self.end_seconds
    }

    /// How long before the end to stop taking records:
    ///
    /// `10 s + 2 × longest step + 4 × longest sync`, at most half of the whole time
    ///
    /// Two steps: one is under way when the time comes, and another rank may have begun one
    /// before it hears of it. Four syncs: the saved generations, the closing of the journal,
    /// the claims and the statistics each wait for the same file system. A job of 20 s still
    /// works for 10.
    pub fn margin_seconds(&self, measured: &Measured) -> f64 {
        let steps = 2.0 * measured.longest_step_seconds;
        let syncs = 4.0 * measured.longest_sync_seconds;
        (BASE_SECONDS + steps + syncs).min(self.end_seconds.unwrap_or(f64::INFINITY) / 2.0)
    }

    /// Whether it is time to stop, `now_seconds` after the process's start.
    pub fn should_drain(&self, now_seconds: f64, measured: &Measured) -> bool {
        self.end_seconds.is_some_and(|end| now_seconds + self.margin_seconds(measured) >= end)
    }
}

/// Seconds until Slurm's time limit ends the job: from `SLURM_JOB_END_TIME`, where that is
/// missing (Slurm before 23.02) or past (left over from another job) from `squeue`. `None`
/// outside of Slurm, without a limit, and where Slurm does not tell. May block for
/// [`query::ANSWER_TIME_MAX`]; ask on one rank, a thousand would stall Slurm's controller.
pub fn job_seconds_left(job: &JobEnv) -> Option<f64> {
    let now_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    seconds_left(job, now_unix.as_secs_f64(), query::seconds_left)
}

fn seconds_left(
    job: &JobEnv,
    now_unix_seconds: f64,
    ask: impl Fn(u64) -> Option<u64>,
) -> Option<f64> {
    let told = job.end_time_unix_seconds.map(|end| end as f64 - now_unix_seconds);
    let asked = || ask(job.job_id?).map(|seconds| seconds as f64);
    told.filter(|&left| left > 0.0).or_else(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOTHING: Measured = Measured { longest_step_seconds: 0.0, longest_sync_seconds: 0.0 };

    fn limit(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds))
    }

    #[test]
    fn the_earlier_end_counts() {
        for (name, own, left, now, expected) in [
            ("no limit", None, None, 5.0, None),
            ("a flag", limit(60), None, 5.0, Some(60.0)),
            ("the job's", None, Some(100.0), 5.0, Some(105.0)),
            ("a flag before the job's", limit(60), Some(100.0), 5.0, Some(60.0)),
            ("the job's before a flag", limit(600), Some(100.0), 5.0, Some(105.0)),
        ] {
            assert_eq!(Deadline::new(own, left, now).end_seconds(), expected, "{name}");
        }
    }

    #[test]
    fn the_margin_grows_with_what_was_measured_up_to_half_of_the_time() {
        for (name, end, step, sync, margin) in [
            ("nothing measured yet", 3600, 0.0, 0.0, 10.0),
            ("slow steps", 3600, 30.0, 0.0, 70.0),
            ("a slow file system", 3600, 0.5, 5.0, 31.0),
            ("a short job", 20, 0.0, 0.0, 10.0),
            ("a very short job", 8, 3.0, 1.0, 4.0),
            ("one stall must not end a long job at once", 3600, 4000.0, 0.0, 1800.0),
        ] {
            let measured = Measured { longest_step_seconds: step, longest_sync_seconds: sync };
            let deadline = Deadline::new(limit(end), None, 0.0);
            assert_eq!(deadline.margin_seconds(&measured), margin, "{name}");
            let from = end as f64 - margin;
            assert!(!deadline.should_drain(from - 0.1, &measured), "{name}");
            assert!(deadline.should_drain(from, &measured), "{name}");
        }
        assert!(!Deadline::new(None, None, 0.0).should_drain(1e12, &NOTHING));
    }

    #[test]
    fn the_longest_of_all_is_kept() {
        let mut measured = Measured::default();
        for milliseconds in [20, 500, 100] {
            measured.step(Duration::from_millis(milliseconds));
            measured.sync(Duration::from_millis(2 * milliseconds));
        }
        assert_eq!((measured.longest_step_seconds, measured.longest_sync_seconds), (0.5, 1.0));
    }

    #[test]
    fn slurm_is_asked_where_the_environment_does_not_tell() {
        let job = |id, end| JobEnv { job_id: id, end_time_unix_seconds: end, ..JobEnv::default() };
        let ask = |id: u64| (id == 7).then_some(300);
        for (name, job, expected) in [
            ("no Slurm", job(None, None), None),
            ("told", job(Some(7), Some(1600)), Some(600.0)),
            ("an old Slurm", job(Some(7), None), Some(300.0)),
            ("another job's, long past", job(Some(7), Some(900)), Some(300.0)),
            ("past, and nobody knows", job(None, Some(900)), None),
            ("Slurm does not tell", job(Some(8), None), None),
        ] {
            assert_eq!(seconds_left(&job, 1000.0, ask), expected, "{name}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A launch works for half of its time at least, and never past the end.
        #[test]
        fn a_launch_works_and_stops_in_time(
            end in 1u64..100_000, step in 0.0f64..1e5, sync in 0.0f64..1e5,
        ) {
            let measured = Measured { longest_step_seconds: step, longest_sync_seconds: sync };
            let deadline = Deadline::new(limit(end), None, 0.0);
            prop_assert!(!deadline.should_drain(end as f64 * 0.499, &measured));
            prop_assert!(deadline.should_drain(end as f64 - 10.0, &measured) || end < 20);
            prop_assert!(deadline.should_drain(end as f64, &measured));
        }
    }
}
