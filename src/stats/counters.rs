//! The figures of one rank: a row of `ranks.csv`.

use serde::{Deserialize, Serialize};

use crate::device::usage::DeviceUsage;

/// One rank's figures. Seconds since the job's start end in `_at_seconds`.
///
/// In a tensor-parallel group every rank computes the same steps; records and tokens
/// count once, at the group's first rank (see [`RankStats::leads_group`]).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStats {
    /// Rank in the world.
    pub rank: usize,
    /// Host name of its node.
    pub host: String,
    /// Number of its tensor-parallel group.
    pub tensor_parallel_group: usize,
    /// Rank within that group.
    pub tensor_parallel_rank: usize,
    /// `cpu`, or the device's name.
    pub device: String,
    /// `cpu` or `cuda`.
    #[serde(default)]
    pub device_kind: String,
    /// The CPU kernels in use (`scalar`, `avx2`, …).
    pub kernel_tier: Option<String>,
    /// Threads of its process.
    pub threads: usize,

    /// From the job's start until staging began.
    pub start_seconds: f64,
    /// Staging.
    pub stage_seconds: f64,
    /// Loading weights and tokenizer.
    pub load_seconds: f64,
    /// Steps, the share of their prefill tokens (see [`super::Meter::step`]).
    pub prefill_seconds: f64,
    /// Steps, the share of their decode tokens.
    pub decode_seconds: f64,
    /// Waiting for records while others worked.
    pub idle_seconds: f64,
    /// From the job's start to this rank's end.
    pub total_seconds: f64,
    /// When it was loaded and ready for its first record.
    pub ready_at_seconds: f64,
    /// When its last step ended; `None` if it never had work.
    pub last_work_at_seconds: Option<f64>,

    /// Records finished, failed ones included.
    pub records: u64,
    /// Records that became error records.
    pub records_failed: u64,
    /// Tokens of the prompts of finished records.
    pub prompt_tokens: u64,
    /// Tokens generated for finished records.
    pub generated_tokens: u64,
    /// Rows of prefill computed (recomputation after preemption included).
    pub prefill_tokens: u64,
    /// Rows of decode computed.
    pub decode_tokens: u64,
    /// First steps that the rates leave out.
    pub warm_up_steps: u64,
    /// Tokens of those steps.
    pub warm_up_tokens: u64,
    /// Seconds of those steps.
    pub warm_up_seconds: f64,
    /// Prefill rate after warm-up.
    pub prefill_tokens_per_second: Option<f64>,
    /// Decode rate after warm-up.
    pub decode_tokens_per_second: Option<f64>,

    /// Steps of the model.
    pub steps: u64,
    /// Sequences a step, mean.
    pub batch_mean: Option<f64>,
    /// Sequences a step, most.
    pub batch_peak: u64,
    /// Sequences put back for want of KV cache blocks.
    pub preemptions: u64,

    /// Bytes of weights that this rank holds (its tensor-parallel share).
    pub weight_bytes: Option<u64>,
    /// Those of them that are its own, not mapped from the node's copy of the model.
    pub owned_weight_bytes: Option<u64>,
    /// Bytes of the checkpoint that it read or mapped while loading.
    pub checkpoint_bytes: Option<u64>,
    /// Bytes that its process read from storage (`/proc/self/io`).
    pub disk_read_bytes: Option<u64>,
    /// Bytes that it wrote into its node's stage directory.
    pub staged_bytes: Option<u64>,
    /// Bytes copied to an accelerator; `None` on CPU.
    pub device_copied_bytes: Option<u64>,
    /// Floating-point operations, by the formula of [`super::ModelCost`].
    pub floating_point_operations: f64,
    /// Bytes of weights read by all steps (each step reads them once).
    pub weight_read_bytes: f64,
    /// Bytes of KV cache read by all steps.
    pub kv_read_bytes: f64,
    /// (Weights + KV) over the seconds of the steps after warm-up.
    pub gigabytes_per_second_mean: Option<f64>,
    /// The same of the best single step.
    pub gigabytes_per_second_peak: Option<f64>,

    /// Whether the device's figures stand at another rank, which shares it.
    #[serde(default)]
    pub device_is_counted_elsewhere: bool,
    /// Share of its working time in which the device ran a kernel: mean of NVML's samples.
    pub device_busy_share_mean: Option<f64>,
    /// The busiest sample's.
    pub device_busy_share_max: Option<f64>,
    /// The device's memory.
    pub device_memory_bytes: Option<u64>,
    /// Most of it in use, by all processes.
    pub device_memory_bytes_peak: Option<u64>,
    /// The device's power draw, mean.
    pub device_watts_mean: Option<f64>,
    /// The highest sample's.
    pub device_watts_max: Option<f64>,
    /// Energy that the device drew while this rank worked.
    pub device_joules: Option<f64>,
    /// The device's highest temperature.
    pub device_celsius_max: Option<f64>,
    /// The clock of its multiprocessors, mean.
    pub device_clock_mhz_mean: Option<f64>,

    /// Share of the generating time (ready until the slowest rank's last step) spent in steps.
    pub busy_share: Option<f64>,
    /// From this rank's last step to the slowest rank's.
    pub idle_tail_seconds: Option<f64>,
    /// That as a share of the generating time.
    pub idle_tail_share: Option<f64>,
    /// Most resident memory of its process.
    pub peak_resident_bytes: Option<u64>,
}

impl RankStats {
    /// Whether its group's records and tokens are counted here.
    pub fn leads_group(&self) -> bool {
        self.tensor_parallel_rank == 0
    }

    /// Takes over what the device's counters said.
    pub fn set_device_usage(&mut self, usage: &DeviceUsage) {
        self.device_busy_share_mean = usage.busy_share_mean;
        self.device_busy_share_max = usage.busy_share_max;
        self.device_memory_bytes_peak = usage.memory_bytes_max;
        self.device_watts_mean = usage.watts_mean;
        self.device_watts_max = usage.watts_max;
        self.device_joules = usage.joules;
        self.device_celsius_max = usage.celsius_max;
        self.device_clock_mhz_mean = usage.clock_mhz_mean;
    }

    /// Seconds spent in steps of the model.
    pub fn step_seconds(&self) -> f64 {
        self.prefill_seconds + self.decode_seconds
    }
}
