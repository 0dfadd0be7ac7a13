//! Counting steps as they run.

use std::time::Duration;

use super::RankStats;
use crate::model::StepBatch;

/// Steps at the start that rates leave out: page faults and cold caches.
const WARM_UP_STEPS: u64 = 4;

/// What a step costs on this rank, from the shapes of its share of the model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ModelCost {
    /// Weights of the matrices that every token passes (embedding lookup and LM head apart).
    pub layer_params: u64,
    /// Weights of the LM head, passed by the rows that need logits.
    pub lm_head_params: u64,
    /// Bytes of both together: what one step reads.
    pub step_weight_bytes: u64,
    /// Floating-point operations for one token attending to one token:
    /// 4 · layers · heads · head_dim (query·key and probability·value, a multiply and an add each).
    pub attention_flops: u64,
    /// Bytes of KV cache of one token: 2 · layers · kv_heads · head_dim · element size.
    pub kv_token_bytes: u64,
}

impl ModelCost {
    /// Fills the two attention figures from this rank's shapes.
    pub fn with_attention(
        mut self,
        num_layers: usize,
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        kv_element_bytes: usize,
    ) -> Self {
        self.attention_flops = (4 * num_layers * num_heads * head_dim) as u64;
        self.kv_token_bytes = (2 * num_layers * num_kv_heads * head_dim * kv_element_bytes) as u64;
        self
    }

    /// 2 · parameters · tokens + attention.
    fn flops(&self, work: &StepWork) -> f64 {
        2.0 * self.layer_params as f64 * (work.prefill_tokens + work.decode_tokens) as f64
            + 2.0 * self.lm_head_params as f64 * work.logits_rows as f64
            + self.attention_flops as f64 * work.attended_pairs as f64
    }
}

/// What one step computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepWork {
    /// Rows of prompts.
    pub prefill_tokens: u64,
    /// Rows of sequences that generate.
    pub decode_tokens: u64,
    /// Sequences in the batch.
    pub sequences: u64,
    /// Rows with logits.
    pub logits_rows: u64,
    /// Pairs (row, token that it attends to).
    pub attended_pairs: u64,
    /// Tokens whose keys and values are read, once a sequence.
    pub kv_tokens: u64,
}

impl StepWork {
    /// Reads it off the step. A sequence with one row after its first position counts as
    /// decode (the rare last prefill chunk of one token does too).
    pub fn of(batch: &StepBatch) -> Self {
        let mut work = Self { logits_rows: batch.num_logits_rows() as u64, ..Self::default() };
        for sequence in &batch.sequences {
            let (start, rows) = (sequence.start_position as u64, sequence.num_tokens as u64);
            if rows == 1 && start > 0 {
                work.decode_tokens += 1;
            } else {
                work.prefill_tokens += rows;
            }
            work.sequences += 1;
            // Row i attends to start + i + 1 tokens.
            work.attended_pairs += rows * start + rows * (rows + 1) / 2;
            work.kv_tokens += start + rows;
        }
        work
    }
}

/// Sums over steps.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    steps: u64,
    sequences: u64,
    prefill_tokens: u64,
    decode_tokens: u64,
    prefill_seconds: f64,
    decode_seconds: f64,
    weight_bytes: f64,
    kv_bytes: f64,
    flops: f64,
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.steps += other.steps;
        self.sequences += other.sequences;
        self.prefill_tokens += other.prefill_tokens;
        self.decode_tokens += other.decode_tokens;
        self.prefill_seconds += other.prefill_seconds;
        self.decode_seconds += other.decode_seconds;
        self.weight_bytes += other.weight_bytes;
        self.kv_bytes += other.kv_bytes;
        self.flops += other.flops;
    }

    fn seconds(&self) -> f64 {
        self.prefill_seconds + self.decode_seconds
    }
}

/// Counts a rank's work; one a rank. Cheap: a few additions a step.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    cost: ModelCost,
    warm_up: Sums,
    steady: Sums,
    batch_peak: u64,
    bytes_per_second_peak: [f64; 2],
    idle_seconds: f64,
    last_work: Option<Duration>,
    records: u64,
    records_failed: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
    preemptions: u64,
}

impl Meter {
    /// A meter for a model of this cost.
    pub fn new(cost: ModelCost) -> Self {
        Self { cost, ..Self::default() }
    }

    /// One step took `took` and ended at `now` (since the job's start). Take the time round
    /// the whole step: scheduling, forward, sampling. The seconds of a step with both
    /// prefill and decode rows are split in proportion to the rows; since a decode row costs
    /// more than a row of a long prefill, mixed steps flatter decode and wrong prefill a little.
    pub fn step(&mut self, work: &StepWork, took: Duration, now: Duration) {
        let rows = work.prefill_tokens + work.decode_tokens;
        if rows == 0 {
            return;
        }
        let seconds = took.as_secs_f64();
        let prefill_share = work.prefill_tokens as f64 / rows as f64;
        let step = Sums {
            steps: 1,
            sequences: work.sequences,
            prefill_tokens: work.prefill_tokens,
            decode_tokens: work.decode_tokens,
            prefill_seconds: seconds * prefill_share,
            decode_seconds: seconds * (1.0 - prefill_share),
            weight_bytes: self.cost.step_weight_bytes as f64,
            kv_bytes: self.cost.kv_token_bytes as f64 * work.kv_tokens as f64,
            flops: self.cost.flops(work),
        };
        let warm = self.warm_up.steps < WARM_UP_STEPS;
        if warm {
            self.warm_up.add(&step)
        } else {
            self.steady.add(&step)
        }
        if seconds > 0.0 {
            let peak = &mut self.bytes_per_second_peak[usize::from(!warm)];
            *peak = peak.max((step.weight_bytes + step.kv_bytes) / seconds);
        }
        self.batch_peak = self.batch_peak.max(work.sequences);
        self.last_work = Some(now);
    }

    /// Waited so long for records.
    pub fn idle(&mut self, took: Duration) {
        self.idle_seconds += took.as_secs_f64();
    }

    /// A record is finished (or became an error record, `failed`).
    pub fn record(&mut self, failed: bool, prompt_tokens: usize, generated_tokens: usize) {
        self.records += 1;
        self.records_failed += u64::from(failed);
        self.prompt_tokens += prompt_tokens as u64;
        self.generated_tokens += generated_tokens as u64;
    }

    /// So many sequences were put back for want of blocks.
    pub fn preempted(&mut self, sequences: u64) {
        self.preemptions += sequences;
    }

    /// Records finished so far, failed ones, and tokens generated: for the progress display.
    pub fn so_far(&self) -> (u64, u64, u64) {
        (self.records, self.records_failed, self.generated_tokens)
    }

    /// Writes all counted figures into `stats`. A run with fewer steps after warm-up than
    /// in it has no steady part: its rates then cover all steps and nothing is apart.
    pub fn fill(&self, stats: &mut RankStats) {
        let mut all = self.steady;
        all.add(&self.warm_up);
        let apart = self.steady.steps >= WARM_UP_STEPS;
        let (rated, warm_up) =
            if apart { (self.steady, self.warm_up) } else { (all, Sums::default()) };
        let ratio = |a: f64, b: f64| (a > 0.0 && b > 0.0).then(|| a / b);

        stats.prefill_seconds = all.prefill_seconds;
        stats.decode_seconds = all.decode_seconds;
        stats.idle_seconds = self.idle_seconds;
        stats.last_work_at_seconds = self.last_work.map(|at| at.as_secs_f64());
        stats.records = self.records;
        stats.records_failed = self.records_failed;
        stats.prompt_tokens = self.prompt_tokens;
        stats.generated_tokens = self.generated_tokens;
        stats.prefill_tokens = all.prefill_tokens;
        stats.decode_tokens = all.decode_tokens;
        stats.warm_up_steps = warm_up.steps;
        stats.warm_up_tokens = warm_up.prefill_tokens + warm_up.decode_tokens;
        stats.warm_up_seconds = warm_up.seconds();
        // A short run may prefill in the warm-up alone: its figure then is that.
        let prefill = |sums: &Sums| ratio(sums.prefill_tokens as f64, sums.prefill_seconds);
        stats.prefill_tokens_per_second = prefill(&rated).or_else(|| prefill(&all));
        stats.decode_tokens_per_second = ratio(rated.decode_tokens as f64, rated.decode_seconds);
        stats.steps = all.steps;
        stats.batch_mean = ratio(all.sequences as f64, all.steps as f64);
        stats.batch_peak = self.batch_peak;
        stats.preemptions = self.preemptions;
        stats.floating_point_operations = all.flops;
        stats.weight_read_bytes = all.weight_bytes;
        stats.kv_read_bytes = all.kv_bytes;
        let [warm_peak, steady_peak] = self.bytes_per_second_peak;
        let peak = if apart { steady_peak } else { warm_peak.max(steady_peak) };
        stats.gigabytes_per_second_mean =
            ratio(rated.weight_bytes + rated.kv_bytes, rated.seconds()).map(|rate| rate / 1e9);
        stats.gigabytes_per_second_peak = (peak > 0.0).then_some(peak / 1e9);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BatchSequence, LogitsWanted};

    fn sequence(start_position: usize, num_tokens: usize) -> BatchSequence {
        BatchSequence {
            start_position,
            num_tokens,
            block_table: Vec::new(),
            logits: LogitsWanted::Last,
            prompt_len: num_tokens,
            adapter: None,
        }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn filled(meter: &Meter) -> RankStats {
        let mut stats = RankStats::default();
        meter.fill(&mut stats);
        stats
    }

    #[test]
    fn a_step_is_read_off_its_batch() {
        let batch =
            StepBatch { token_ids: vec![0; 5], sequences: vec![sequence(0, 4), sequence(9, 1)] };
        let expected = StepWork {
            prefill_tokens: 4,
            decode_tokens: 1,
            sequences: 2,
            logits_rows: 2,
            attended_pairs: (1 + 2 + 3 + 4) + 10,
            kv_tokens: 4 + 10,
        };
        assert_eq!(StepWork::of(&batch), expected);
        // A prompt of one token is prefill; a later chunk attends to what came before.
        let batch =
            StepBatch { token_ids: vec![0; 3], sequences: vec![sequence(0, 1), sequence(8, 2)] };
        let work = StepWork::of(&batch);
        assert_eq!(
            (work.prefill_tokens, work.decode_tokens, work.attended_pairs),
            (3, 0, 1 + 9 + 10)
        );
    }

    #[test]
    fn costs_follow_the_formulas() {
        let cost = ModelCost {
            layer_params: 100,
            lm_head_params: 10,
            step_weight_bytes: 440,
            ..Default::default()
        }
        .with_attention(2, 4, 1, 8, 4);
        assert_eq!((cost.attention_flops, cost.kv_token_bytes), (4 * 2 * 4 * 8, 2 * 2 * 8 * 4));
        let work = StepWork {
            prefill_tokens: 3,
            logits_rows: 1,
            attended_pairs: 6,
            kv_tokens: 3,
            sequences: 1,
            ..Default::default()
        };
        let mut meter = Meter::new(cost);
        meter.step(&work, ms(1), ms(1));
        let stats = filled(&meter);
        assert_eq!(stats.floating_point_operations, 600.0 + 20.0 + 256.0 * 6.0);
        assert_eq!((stats.weight_read_bytes, stats.kv_read_bytes), (440.0, 3.0 * 128.0));
        let rate = stats.gigabytes_per_second_mean.unwrap();
        assert!((rate - (440.0 + 384.0) / 1e-3 / 1e9).abs() < 1e-12, "{rate}");
        assert_eq!(stats.gigabytes_per_second_peak, Some(rate));
    }

    #[test]
    fn mixed_steps_share_their_time_by_rows() {
        let mut meter = Meter::default();
        meter.step(
            &StepWork {
                prefill_tokens: 30,
                decode_tokens: 10,
                sequences: 11,
                ..Default::default()
            },
            ms(40),
            ms(50),
        );
        let stats = filled(&meter);
        assert!(
            (stats.prefill_seconds - 0.03).abs() < 1e-12
                && (stats.decode_seconds - 0.01).abs() < 1e-12
        );
        assert_eq!(stats.last_work_at_seconds, Some(0.05));
    }

    /// Cold first steps would make every short run look slow; a run that is all warm-up has rates too.
    #[test]
    fn warm_up_is_apart_once_there_is_something_else() {
        let decode = |n| StepWork { decode_tokens: n, sequences: n, ..Default::default() };
        let mut meter = Meter::default();
        for _ in 0..WARM_UP_STEPS {
            meter.step(&decode(1), ms(100), ms(0));
        }
        let short = filled(&meter);
        assert_eq!((short.warm_up_steps, short.decode_tokens), (0, 4));
        assert!((short.decode_tokens_per_second.unwrap() - 10.0).abs() < 1e-9);
        for _ in 0..WARM_UP_STEPS {
            meter.step(&decode(3), ms(10), ms(0));
        }
        let long = filled(&meter);
        assert_eq!((long.warm_up_steps, long.warm_up_tokens, long.decode_tokens), (4, 4, 16));
        assert!((long.decode_tokens_per_second.unwrap() - 300.0).abs() < 1e-9);
        assert_eq!((long.batch_mean, long.batch_peak), (Some(2.0), 3));
    }

    #[test]
    fn an_idle_rank_has_no_rates() {
        let mut meter = Meter::default();
        meter.step(&StepWork::default(), ms(5), ms(5));
        meter.idle(ms(250));
        meter.record(true, 0, 0);
        meter.preempted(2);
        let stats = filled(&meter);
        assert_eq!((stats.prefill_tokens_per_second, stats.decode_tokens_per_second), (None, None));
        assert_eq!((stats.batch_mean, stats.last_work_at_seconds), (None, None));
        assert_eq!((stats.idle_seconds, stats.records, stats.records_failed), (0.25, 1, 1));
        assert_eq!((stats.preemptions, meter.so_far()), (2, (1, 1, 0)));
    }
}
