//! The closing table, plain text of at most 100 columns.

use std::fmt::Write;

use super::format::{
    bytes, cell, count, cut, flop, joules, known, memory, percent, plural, rate, seconds,
};
use super::{JobStats, RankStats, StageStats};

/// Ranks that the table shows; of a bigger job those with the longest idle tails.
const RANKS_SHOWN: usize = 16;

/// The whole table, each line ended by a line feed.
pub fn closing_table(job: &JobStats, ranks: &[RankStats]) -> String {
    let facts = &job.facts;
    let mut text = format!(
        "farm {}: {} on {} in {}{}\n",
        facts.command,
        plural(job.ranks as u64, "rank"),
        plural(facts.nodes as u64, "node"),
        seconds(job.total_seconds),
        if facts.complete { "" } else { ", stopped early; the same command finishes the rest" },
    );
    let rows = [throughput_rows(job), resource_rows(job), device_rows(job)].concat();
    for (name, value) in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name:<14}{}", cut(&value, 84));
    }
    text + &rank_table(ranks)
}

fn throughput_rows(job: &JobStats) -> Vec<(&'static str, String)> {
    let facts = &job.facts;
    let total = facts.records_total.map(|total| format!(" of {}", count(total)));
    let records = format!("{}{}", count(job.records), total.unwrap_or_default());
    let per_second = known(job.records_per_second, |x| format!("{} records/s", rate(x)));
    let mut rows =
        vec![("records", format!("{records}, {} failed; {per_second}", count(job.records_failed)))];
    if facts.records_resumed > 0 {
        rows.push((
            "resumed",
            format!("{} records of earlier attempts", count(facts.records_resumed)),
        ));
    }
    let (prompt, generated) = (count(job.prompt_tokens), count(job.generated_tokens));
    let a_minute = known(job.tokens_per_minute, |x| format!("{} tokens/min", rate(x)));
    rows.extend([
        ("tokens", format!("{prompt} prompt, {generated} generated")),
        ("prefill", known(job.prefill_tokens_per_second, tokens_per_second)),
        ("decode", known(job.decode_tokens_per_second, tokens_per_second)),
        ("generated", format!("{}, {a_minute}", known(job.tokens_per_second, tokens_per_second))),
        (
            "batch",
            format!(
                "mean {}, peak {}; {}",
                known(job.batch_mean, rate),
                count(job.batch_peak),
                plural(job.preemptions, "preemption")
            ),
        ),
    ]);
    rows
}

fn resource_rows(job: &JobStats) -> Vec<(&'static str, String)> {
    let stage_time = job.stage.as_ref().map(|stage| stage.stage_seconds);
    let weights = known(job.weight_bytes_max, memory);
    let owned = known(job.owned_weight_bytes_max, memory);
    let resident = known(job.peak_resident_bytes_max, memory);
    let mean = known(job.gigabytes_per_second_mean, gigabytes_per_second);
    let best = known(job.gigabytes_per_second_peak, gigabytes_per_second);
    vec![
        (
            "memory",
            format!("{weights} of weights a rank, {owned} copied; {resident} resident (most)"),
        ),
        ("bandwidth", format!("{mean} a rank (mean), {best} (best step)")),
        ("weight reads", bytes(job.weight_read_bytes as u64)),
        ("KV reads", bytes(job.kv_read_bytes as u64)),
        ("disk reads", known(job.disk_read_bytes, bytes)),
        ("arithmetic", flop(job.floating_point_operations)),
        ("stage", job.stage.as_ref().map_or_else(|| "none, read in place".to_owned(), stage)),
        (
            "time",
            format!(
                "start {}, stage {}, load {}, generate {}",
                seconds(job.start_seconds),
                cell(stage_time, seconds),
                seconds(job.load_seconds),
                known(job.generate_seconds, seconds)
            ),
        ),
        (
            "ranks",
            format!(
                "busy {} (mean), longest idle tail {} ({})",
                known(job.busy_share_mean, percent),
                known(job.idle_tail_seconds_max, seconds),
                known(job.idle_tail_share_max, percent)
            ),
        ),
    ]
}

/// What the devices' counters said; nothing of a job on CPUs.
fn device_rows(job: &JobStats) -> Vec<(&'static str, String)> {
    let Some(memory_bytes) = job.device_memory_bytes_min else { return Vec::new() };
    let used = known(job.device_memory_bytes_peak_max, memory);
    vec![
        (
            "devices",
            format!(
                "{}: busy {} (mean), {used} of {} in use (most)",
                cut(&job.facts.devices, 30),
                known(job.device_busy_share_mean, percent),
                memory(memory_bytes)
            ),
        ),
        (
            "energy",
            format!(
                "{}, {} (mean); {}",
                known(job.device_joules, joules),
                known(job.device_watts_mean, |x| format!("{} W", rate(x))),
                known(job.tokens_per_joule, |x| format!("{} tokens/J", rate(x)))
            ),
        ),
    ]
}

fn tokens_per_second(x: f64) -> String {
    format!("{} tokens/s", rate(x))
}

fn gigabytes_per_second(x: f64) -> String {
    format!("{} GB/s", rate(x))
}

fn stage(stage: &StageStats) -> String {
    let quantized = stage.quantized.as_ref().map(|quant| format!(" in {quant}"));
    let quantized = quantized.unwrap_or_default();
    if stage.reused {
        let (there, time) = (bytes(stage.bytes_reused), seconds(stage.stage_seconds));
        return format!("reused {there}{quantized} that were there, checked in {time}");
    }
    format!(
        "{} read, {} staged{quantized}, {} reused in {} ({})",
        bytes(stage.bytes_read_source),
        bytes(stage.bytes_staged),
        bytes(stage.bytes_reused),
        seconds(stage.stage_seconds),
        known(stage.gigabytes_per_second, gigabytes_per_second)
    )
}

/// A row a rank; records and tokens of a tensor-parallel group stand at its first rank.
fn rank_table(ranks: &[RankStats]) -> String {
    let mut shown: Vec<&RankStats> = ranks.iter().collect();
    if shown.len() > RANKS_SHOWN {
        shown.sort_by(|a, b| worst_first(a, b));
        shown.truncate(RANKS_SHOWN);
        shown.sort_by_key(|rank| rank.rank);
    }
    let mut text = format!(
        "\n  {:>5} {:<18}{:>10}{:>12}{:>9}{:>8}{:>10}{:>7}{:>7}{:>10}\n",
        "rank", "host", "records", "tokens", "tok/s", "busy", "idle tail", "", "batch", "resident"
    );
    for rank in &shown {
        let led = rank.leads_group();
        let _ = writeln!(
            text,
            "  {:>5} {:<18}{:>10}{:>12}{:>9}{:>8}{:>10}{:>7}{:>7}{:>10}",
            rank.rank,
            cut(&rank.host, 17),
            cell(led.then_some(rank.records), count),
            cell(led.then_some(rank.generated_tokens), count),
            cell(rank.decode_tokens_per_second.filter(|_| led), rate),
            cell(rank.busy_share, percent),
            cell(rank.idle_tail_seconds, seconds),
            cell(rank.idle_tail_share, percent),
            cell(rank.batch_mean, |mean| format!("{mean:.1}")),
            cell(rank.peak_resident_bytes, memory),
        );
    }
    if ranks.len() > shown.len() {
        let left_out = count((ranks.len() - shown.len()) as u64);
        let _ =
            writeln!(text, "  … and {left_out} ranks with shorter idle tails (all in ranks.csv)");
    }
    text
}

/// Longest idle tail first, then least busy.
fn worst_first(a: &RankStats, b: &RankStats) -> std::cmp::Ordering {
    let key =
        |rank: &RankStats| (-rank.idle_tail_seconds.unwrap_or(0.0), rank.busy_share.unwrap_or(1.0));
    let (a, b) = (key(a), key(b));
    a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::JobFacts;

    fn rank(rank: usize) -> RankStats {
        RankStats {
            rank,
            host: format!("node{rank:03}.cluster.example.org"),
            records: 1_234_567,
            generated_tokens: 1_234_567_890,
            decode_tokens_per_second: Some(123_456.7),
            decode_seconds: 1.0,
            batch_mean: Some(31.97),
            batch_peak: 32,
            steps: 9,
            ready_at_seconds: 1.0,
            last_work_at_seconds: Some(5000.0 + rank as f64),
            peak_resident_bytes: Some(123 << 30),
            total_seconds: 100_000.0,
            floating_point_operations: 1e21,
            weight_bytes: Some(140 << 30),
            ..RankStats::default()
        }
    }

    fn facts() -> JobFacts {
        JobFacts { command: "generate".into(), nodes: 2, complete: true, ..JobFacts::default() }
    }

    /// A job's log is read in 100 columns.
    #[test]
    fn fits_100_columns_with_large_figures_and_many_ranks() {
        let mut ranks: Vec<_> = (0..40).map(rank).collect();
        let stage = StageStats::new(140_000_000_000, 5_600_000_000_000, 0, 123.4);
        let facts =
            JobFacts { records_total: Some(99_999_999), records_resumed: 12_345, ..facts() };
        let job = JobStats::new(facts, Some(stage), &mut ranks);
        let text = closing_table(&job, &ranks);
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{} columns: {line}", line.chars().count());
            assert!(!line.ends_with('…'), "cut: {line}");
        }
        assert!(text.contains("… and 24 ranks with shorter idle tails"), "{text}");
        // Rank 0 stopped first, rank 39 last.
        assert!(
            text.contains("\n      0 node000") && !text.contains("\n     39 node039"),
            "{text}"
        );
    }

    #[test]
    fn devices_have_their_rows() {
        let on_gpu = |number| RankStats {
            device_memory_bytes: Some(150_000_000_000),
            device_memory_bytes_peak: Some(149_000_000_000),
            device_busy_share_mean: Some(0.987),
            device_watts_mean: Some(698.4),
            device_joules: Some(1e9),
            ..rank(number)
        };
        let devices = "1024 × NVIDIA A100-SXM4-80GB MIG 1g.5gb".to_owned();
        let facts = JobFacts { devices, ..facts() };
        let mut ranks = [on_gpu(0), on_gpu(1)];
        let text = closing_table(&JobStats::new(facts.clone(), None, &mut ranks), &ranks);
        assert!(text.contains("busy 98.7% (mean), 139 GiB of 140 GiB in use (most)"), "{text}");
        assert!(text.contains("2.0 GJ, 1,397 W (mean); 1.2 tokens/J"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        ranks[1] = RankStats { device_joules: None, device_watts_mean: None, ..on_gpu(1) };
        let text = closing_table(&JobStats::new(facts, None, &mut ranks), &ranks);
        assert!(text.contains("unavailable, unavailable (mean); unavailable\n"), "{text}");
    }

    #[test]
    fn what_is_not_known_is_not_zero() {
        let mut ranks = [RankStats { host: "laptop".into(), ..RankStats::default() }];
        let job = JobStats::new(facts(), None, &mut ranks);
        let text = closing_table(&job, &ranks);
        assert!(text.contains("  decode        unavailable\n"), "{text}");
        assert!(text.contains("none, read in place"), "{text}");
        assert!(text.contains("longest idle tail unavailable"), "{text}");
        assert!(!text.contains('…'), "cut: {text}");
    }

    #[test]
    fn a_follower_does_not_repeat_its_groups_records() {
        let mut ranks = [rank(0), RankStats { tensor_parallel_rank: 1, ..rank(1) }];
        let job = JobStats::new(facts(), None, &mut ranks);
        let text = closing_table(&job, &ranks);
        assert!(text.starts_with("farm generate: 2 ranks on 2 nodes in "), "{text}");
        assert_eq!(text.matches("1,234,567,890 ").count(), 2, "{text}");
        assert!(text.lines().last().unwrap().contains(" - "), "{text}");
    }
}
