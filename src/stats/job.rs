//! The figures of the whole job: `stats.json`.

use serde::{Deserialize, Serialize};

use super::RankStats;
use crate::slurm::JobEnv;

/// What is known of the job without counting.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobFacts {
    /// The subcommand, `generate`.
    pub command: String,
    /// farm's version.
    pub farm_version: String,
    /// The model as it was named.
    pub model: String,
    /// Unix seconds of this attempt's start.
    pub started_unix_seconds: u64,
    /// What Slurm says.
    pub slurm: JobEnv,
    /// What the ranks compute on: `cpu`, `4 × NVIDIA H200`.
    #[serde(default)]
    pub devices: String,
    /// Nodes.
    pub nodes: usize,
    /// Ranks a tensor-parallel group.
    pub tensor_parallel: usize,
    /// Records of the input, where they were counted.
    pub records_total: Option<u64>,
    /// Records that earlier attempts had finished.
    pub records_resumed: u64,
    /// Whether every record is written.
    pub complete: bool,
}

/// What staging did, over all nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageStats {
    /// Bytes read from the source.
    pub bytes_read_source: u64,
    /// Bytes written into stage directories.
    pub bytes_staged: u64,
    /// Bytes of copies that were there already and passed verification.
    pub bytes_reused: u64,
    /// Seconds of the slowest node.
    pub stage_seconds: f64,
    /// Bytes staged a second, over all nodes, in 10^9; `None` where nothing was staged.
    pub gigabytes_per_second: Option<f64>,
    /// Whether every node had the model already.
    pub reused: bool,
    /// What the staged weights are quantized to, if they are on their way.
    #[serde(default)]
    pub quantized: Option<String>,
}

impl StageStats {
    /// Derives the rate and `reused` from the counts.
    pub fn new(
        bytes_read_source: u64,
        bytes_staged: u64,
        bytes_reused: u64,
        stage_seconds: f64,
    ) -> Self {
        let timed = bytes_staged > 0 && stage_seconds > 0.0;
        Self {
            bytes_read_source,
            bytes_staged,
            bytes_reused,
            stage_seconds,
            gigabytes_per_second: timed.then(|| bytes_staged as f64 / stage_seconds / 1e9),
            reused: bytes_staged == 0 && bytes_reused > 0,
            quantized: None,
        }
    }
}

/// The job's figures, of this attempt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobStats {
    /// What is known without counting.
    #[serde(flatten)]
    pub facts: JobFacts,
    /// Number of ranks.
    pub ranks: usize,

    /// Records finished in this attempt, failed ones included.
    pub records: u64,
    /// Records that became error records.
    pub records_failed: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Tokens generated for them.
    pub generated_tokens: u64,
    /// Records a second of generating.
    pub records_per_second: Option<f64>,
    /// Generated tokens a second of generating (first rank ready until last step ended).
    pub tokens_per_second: Option<f64>,
    /// The same a minute.
    pub tokens_per_minute: Option<f64>,
    /// Sum of the groups' prefill rates while they prefill, warm-up apart.
    pub prefill_tokens_per_second: Option<f64>,
    /// Sum of the groups' decode rates while they decode, warm-up apart.
    pub decode_tokens_per_second: Option<f64>,
    /// Tokens of the first steps, which the two rates leave out.
    pub warm_up_tokens: u64,
    /// Seconds of those steps, of the slowest rank.
    pub warm_up_seconds: f64,

    /// Until staging began, slowest rank.
    pub start_seconds: f64,
    /// Staging; `None` with `--no-stage`.
    pub stage: Option<StageStats>,
    /// Loading, slowest rank.
    pub load_seconds: f64,
    /// From the first rank ready until the last step ended; `None` without a step.
    pub generate_seconds: Option<f64>,
    /// From the job's start to the slowest rank's end.
    pub total_seconds: f64,

    /// Sequences a step, mean over all steps.
    pub batch_mean: Option<f64>,
    /// Sequences a step, most.
    pub batch_peak: u64,
    /// Sequences put back for want of KV cache blocks.
    pub preemptions: u64,
    /// Most bytes of weights that one rank holds.
    pub weight_bytes_max: Option<u64>,
    /// Most bytes of weights that are one rank's own, not mapped from its node's copy.
    pub owned_weight_bytes_max: Option<u64>,
    /// Bytes of the checkpoint that all ranks read or mapped while loading.
    pub checkpoint_bytes: Option<u64>,
    /// Bytes that all processes read from storage.
    pub disk_read_bytes: Option<u64>,
    /// Bytes copied to accelerators; `None` on CPU.
    pub device_copied_bytes: Option<u64>,
    /// Mean of the devices' busy shares, by NVML.
    pub device_busy_share_mean: Option<f64>,
    /// Most memory in use on a device, by all processes.
    pub device_memory_bytes_peak_max: Option<u64>,
    /// Memory of the smallest device.
    pub device_memory_bytes_min: Option<u64>,
    /// Power of all devices, mean over the time in which they worked.
    pub device_watts_mean: Option<f64>,
    /// Energy of all devices while their ranks worked.
    pub device_joules: Option<f64>,
    /// Generated tokens (of a score, the prompts' tokens) a joule of the devices.
    pub tokens_per_joule: Option<f64>,
    /// Floating-point operations of all ranks.
    pub floating_point_operations: f64,
    /// Bytes of weights read by all ranks' steps.
    pub weight_read_bytes: f64,
    /// Bytes of KV cache read by all ranks' steps.
    pub kv_read_bytes: f64,
    /// (Weights + KV) a second of steps, mean over the ranks, 10^9.
    pub gigabytes_per_second_mean: Option<f64>,
    /// The best single step of any rank.
    pub gigabytes_per_second_peak: Option<f64>,
    /// Mean of the ranks' busy shares.
    pub busy_share_mean: Option<f64>,
    /// The longest idle tail.
    pub idle_tail_seconds_max: Option<f64>,
    /// That as a share of the generating time.
    pub idle_tail_share_max: Option<f64>,
    /// Most resident memory of a process.
    pub peak_resident_bytes_max: Option<u64>,
}

impl JobStats {
    /// Sums the ranks' figures, and completes theirs with what only the whole job tells:
    /// busy share and idle tail.
    pub fn new(facts: JobFacts, stage: Option<StageStats>, ranks: &mut [RankStats]) -> Self {
        let ready = least(ranks.iter().map(|r| Some(r.ready_at_seconds)));
        let end = most(ranks.iter().map(|r| r.last_work_at_seconds));
        let generate_seconds = ready.zip(end).map(|(ready, end)| (end - ready).max(0.0));
        if let Some(end) = end {
            for rank in &mut *ranks {
                complete_rank(rank, end);
            }
        }

        let leaders = || ranks.iter().filter(|rank| rank.leads_group());
        let sum = |of: fn(&RankStats) -> u64| leaders().map(of).sum::<u64>();
        let per_second = |n: u64| ratio(n as f64, generate_seconds?);
        let devices = || ranks.iter().filter(|rank| !rank.device_is_counted_elsewhere);
        let device_joules: Option<f64> = devices().map(|rank| rank.device_joules).sum();
        let tokens = if facts.command == "score" {
            sum(|r| r.prompt_tokens)
        } else {
            sum(|r| r.generated_tokens)
        };
        let records = sum(|r| r.records);
        let generated_tokens = sum(|r| r.generated_tokens);
        let tokens_per_second = per_second(generated_tokens);
        let steps = sum(|r| r.steps) as f64;
        let sequences: f64 = leaders().filter_map(|r| Some(r.batch_mean? * r.steps as f64)).sum();

        Self {
            ranks: ranks.len(),
            records,
            records_failed: sum(|r| r.records_failed),
            prompt_tokens: sum(|r| r.prompt_tokens),
            generated_tokens,
            records_per_second: per_second(records),
            tokens_per_second,
            tokens_per_minute: tokens_per_second.map(|rate| rate * 60.0),
            prefill_tokens_per_second: total(leaders().map(|r| r.prefill_tokens_per_second)),
            decode_tokens_per_second: total(leaders().map(|r| r.decode_tokens_per_second)),
            warm_up_tokens: sum(|r| r.warm_up_tokens),
            warm_up_seconds: slowest(ranks, |r| r.warm_up_seconds),
            start_seconds: slowest(ranks, |r| r.start_seconds),
            stage,
            load_seconds: slowest(ranks, |r| r.load_seconds),
            generate_seconds,
            total_seconds: slowest(ranks, |r| r.total_seconds),
            batch_mean: ratio(sequences, steps),
            batch_peak: leaders().map(|r| r.batch_peak).max().unwrap_or(0),
            preemptions: sum(|r| r.preemptions),
            weight_bytes_max: ranks.iter().filter_map(|r| r.weight_bytes).max(),
            owned_weight_bytes_max: ranks.iter().filter_map(|r| r.owned_weight_bytes).max(),
            checkpoint_bytes: all_known(ranks, |r| r.checkpoint_bytes),
            disk_read_bytes: all_known(ranks, |r| r.disk_read_bytes),
            device_copied_bytes: all_known(ranks, |r| r.device_copied_bytes),
            device_busy_share_mean: mean(ranks.iter().map(|r| r.device_busy_share_mean)),
            device_memory_bytes_peak_max: ranks
                .iter()
                .filter_map(|r| r.device_memory_bytes_peak)
                .max(),
            device_memory_bytes_min: ranks.iter().filter_map(|r| r.device_memory_bytes).min(),
            device_watts_mean: devices().map(|r| r.device_watts_mean).sum(),
            device_joules,
            tokens_per_joule: device_joules.and_then(|joules| ratio(tokens as f64, joules)),
            floating_point_operations: ranks.iter().map(|r| r.floating_point_operations).sum(),
            weight_read_bytes: ranks.iter().map(|r| r.weight_read_bytes).sum(),
            kv_read_bytes: ranks.iter().map(|r| r.kv_read_bytes).sum(),
            gigabytes_per_second_mean: mean(ranks.iter().map(|r| r.gigabytes_per_second_mean)),
            gigabytes_per_second_peak: most(ranks.iter().map(|r| r.gigabytes_per_second_peak)),
            busy_share_mean: mean(ranks.iter().map(|r| r.busy_share)),
            idle_tail_seconds_max: most(ranks.iter().map(|r| r.idle_tail_seconds)),
            idle_tail_share_max: most(ranks.iter().map(|r| r.idle_tail_share)),
            peak_resident_bytes_max: ranks.iter().filter_map(|r| r.peak_resident_bytes).max(),
            facts,
        }
    }
}

/// Busy share and idle tail of a rank in a job whose last step ended at `end`. A rank that
/// never had work was idle from the moment it was ready.
fn complete_rank(rank: &mut RankStats, end: f64) {
    let window = (end - rank.ready_at_seconds).max(0.0);
    let last = rank.last_work_at_seconds.unwrap_or(rank.ready_at_seconds);
    let tail = (end - last).clamp(0.0, window);
    rank.idle_tail_seconds = Some(tail);
    if window > 0.0 {
        rank.busy_share = Some((rank.step_seconds() / window).min(1.0));
        rank.idle_tail_share = Some(tail / window);
    }
}

fn ratio(a: f64, b: f64) -> Option<f64> {
    (b > 0.0).then(|| a / b)
}

fn most(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.flatten().max_by(f64::total_cmp)
}

fn least(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.flatten().min_by(f64::total_cmp)
}

fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let known: Vec<f64> = values.flatten().collect();
    ratio(known.iter().sum(), known.len() as f64)
}

/// The sum of what is known; `None` if nothing is.
fn total(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.flatten().reduce(|a, b| a + b)
}

/// The sum, where every rank knows its part.
fn all_known(ranks: &[RankStats], of: fn(&RankStats) -> Option<u64>) -> Option<u64> {
    ranks.iter().map(of).sum()
}

fn slowest(ranks: &[RankStats], of: fn(&RankStats) -> f64) -> f64 {
    ranks.iter().map(of).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rank(rank: usize, ready: f64, last: Option<f64>, steps_seconds: f64) -> RankStats {
        RankStats {
            rank,
            ready_at_seconds: ready,
            last_work_at_seconds: last,
            decode_seconds: steps_seconds,
            records: 10,
            generated_tokens: 100,
            steps: 10,
            batch_mean: Some(2.0 + rank as f64),
            total_seconds: 12.0,
            ..RankStats::default()
        }
    }

    /// The idle tail is the figure that says whether sharding worked.
    #[test]
    fn tails_are_measured_against_the_slowest_rank() {
        let mut ranks =
            [rank(0, 1.0, Some(11.0), 9.0), rank(1, 2.0, Some(9.0), 6.5), rank(2, 1.0, None, 0.0)];
        let job = JobStats::new(JobFacts::default(), None, &mut ranks);
        assert_eq!(job.generate_seconds, Some(10.0));
        assert_eq!(job.tokens_per_second, Some(30.0));
        assert_eq!(job.tokens_per_minute, Some(1800.0));
        let tails: Vec<_> = ranks.iter().map(|r| r.idle_tail_seconds.unwrap()).collect();
        assert_eq!(tails, [0.0, 2.0, 10.0]);
        assert!((ranks[0].busy_share.unwrap() - 0.9).abs() < 1e-12);
        assert!((ranks[1].idle_tail_share.unwrap() - 2.0 / 9.0).abs() < 1e-12);
        assert_eq!(job.idle_tail_share_max, Some(1.0));
        assert_eq!(job.batch_mean, Some(3.0));
        assert_eq!(job.disk_read_bytes, None, "one rank that does not know makes the sum unknown");
    }

    #[test]
    fn a_tensor_parallel_group_counts_once() {
        let mut follower = rank(1, 0.0, Some(10.0), 9.0);
        follower.tensor_parallel_rank = 1;
        let mut ranks = [rank(0, 0.0, Some(10.0), 9.0), follower];
        let job = JobStats::new(JobFacts::default(), None, &mut ranks);
        assert_eq!((job.records, job.generated_tokens, job.ranks), (10, 100, 2));
    }

    #[test]
    fn a_job_without_a_step_has_no_rates() {
        let mut ranks = [rank(0, 1.0, None, 0.0)];
        ranks[0].batch_mean = None;
        let job = JobStats::new(JobFacts::default(), None, &mut ranks);
        assert_eq!((job.generate_seconds, job.tokens_per_second), (None, None));
        assert_eq!((job.idle_tail_seconds_max, ranks[0].busy_share), (None, None));
        assert_eq!(JobStats::new(JobFacts::default(), None, &mut []).records, 0);
    }

    /// A device that two ranks share draws its energy once.
    #[test]
    fn energy_is_counted_a_device_and_unknown_if_one_is() {
        let on_gpu = |number, joules, elsewhere| RankStats {
            device_joules: joules,
            device_watts_mean: joules,
            device_busy_share_mean: joules.map(|_| 0.5),
            device_is_counted_elsewhere: elsewhere,
            ..rank(number, 0.0, Some(10.0), 9.0)
        };
        let job = |ranks: &mut [RankStats]| JobStats::new(JobFacts::default(), None, ranks);
        let counted = job(&mut [on_gpu(0, Some(40.0), false), on_gpu(1, None, true)]);
        assert_eq!((counted.device_joules, counted.tokens_per_joule), (Some(40.0), Some(5.0)));
        assert_eq!(counted.device_busy_share_mean, Some(0.5));
        let unknown = job(&mut [on_gpu(0, Some(40.0), false), on_gpu(1, None, false)]);
        assert_eq!((unknown.device_joules, unknown.tokens_per_joule), (None, None));
        assert_eq!(unknown.device_watts_mean, None);
    }

    #[test]
    fn stage_rates() {
        let staged = StageStats::new(4_000_000_000, 16_000_000_000, 0, 2.0);
        assert_eq!((staged.gigabytes_per_second, staged.reused), (Some(8.0), false));
        let reused = StageStats::new(0, 0, 4_000_000_000, 0.1);
        assert_eq!((reused.gigabytes_per_second, reused.reused), (None, true));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Shares stay shares, whatever the clocks of the ranks say.
        #[test]
        fn shares_are_between_0_and_1(times in prop::collection::vec((0.0..20.0f64, prop::option::of(0.0..20.0f64), 0.0..30.0f64), 1..6)) {
            let mut ranks: Vec<_> = times.iter().enumerate()
                .map(|(i, &(ready, last, steps))| rank(i, ready, last, steps)).collect();
            let _ = JobStats::new(JobFacts::default(), None, &mut ranks);
            for share in ranks.iter().flat_map(|r| [r.busy_share, r.idle_tail_share]).flatten() {
                prop_assert!((0.0..=1.0).contains(&share));
            }
        }
    }
}
