//! The end of a run: every rank's figures to rank 0, into the run directory's files
//! and the closing table.

use crate::Result;
use crate::comm::Topology;
use crate::commands::device::Devices;
use crate::commands::generate::{Ended, Job};
use crate::commands::launch::Rank;
use crate::commands::plan::{RunOwner, RunPlan};
use crate::device::usage::DeviceUsage;
use crate::error::say;
use crate::kernels;
use crate::stage::Staged;
use crate::stats::counters::RankStats;
use crate::stats::events::EventLog;
use crate::stats::files::{RankReport, gather, write_run};
use crate::stats::job::{JobFacts, JobStats, StageStats};
use crate::stats::meter::Meter;
use crate::stats::process;
use crate::stats::table::closing_table;

/// Seconds of a rank's phases, and what it loaded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Phases {
    /// Checks and planning.
    pub start_seconds: f64,
    /// Staging.
    pub stage_seconds: f64,
    /// Loading.
    pub load_seconds: f64,
    /// When the rank was ready to generate, since the start.
    pub ready_at_seconds: f64,
    /// Weights on this rank.
    pub weight_bytes: u64,
    /// Those that are its own, not mapped.
    pub owned_weight_bytes: u64,
    /// What it read or mapped of the checkpoint.
    pub checkpoint_bytes: u64,
}

/// What the figures are made of.
pub struct Facts<'a> {
    /// The flags.
    pub job: &'a Job,
    /// This rank.
    pub rank: &'a Rank,
    /// Its groups.
    pub topology: &'a Topology,
    /// What the ranks compute on.
    pub devices: &'a Devices,
    /// The run.
    pub plan: &'a RunPlan,
    /// At rank 0.
    pub owner: Option<&'a RunOwner>,
    /// The staged model.
    pub staged: &'a Staged,
    /// This rank's phases.
    pub phases: &'a Phases,
    /// What its device did while it worked.
    pub usage: DeviceUsage,
    /// How the run ended, as rank 0 knows; nothing written after a failure.
    pub ended: Ended,
    /// Seconds since the start.
    pub total_seconds: f64,
}

/// Gathers, writes `stats.json` and `ranks.csv`, prints the closing table.
/// Collective over the world.
///
/// # Errors
/// A fault at rank 0 that names the file.
pub fn close(facts: &Facts, meter: Meter, mut events: EventLog) -> Result<()> {
    let world = &*facts.rank.world;
    let mut report = RankReport { stats: rank_stats(facts), events: Vec::new() };
    report.stats.set_device_usage(&facts.usage);
    meter.fill(&mut report.stats);
    if world.rank() > 0 {
        report.events = events.events().to_vec();
    }
    let (Some(reports), Some(owner)) = (gather(world, &report)?, facts.owner) else {
        return Ok(());
    };
    let mut ranks = Vec::with_capacity(reports.len());
    let mut others = Vec::new();
    for report in reports {
        ranks.push(report.stats);
        others.extend(report.events);
    }
    events.append_gathered(others);
    let job = JobStats::new(job_facts(facts), stage_stats(facts), &mut ranks);
    write_run(owner.run.path(), &job, &ranks)?;
    if facts.job.output.closing_table(&facts.job.log) {
        say(closing_table(&job, &ranks).trim_end_matches('\n'));
    }
    Ok(())
}

fn rank_stats(facts: &Facts) -> RankStats {
    let (topology, phases) = (facts.topology, facts.phases);
    let rank = topology.world.rank();
    // Ranks that are threads share a process: its figures are counted once.
    let own_process = facts.job.parallelism.local_ranks.is_none_or(|n| n < 2) || rank == 0;
    let in_process = |figure: Option<u64>| if own_process { figure } else { Some(0) };
    let copied = facts.staged.report.bytes_staged / topology.num_nodes.max(1) as u64;
    RankStats {
        rank,
        host: topology.world.host().to_owned(),
        tensor_parallel_group: topology.layout.group(rank),
        tensor_parallel_rank: topology.tensor_parallel.rank(),
        device: facts.devices.own.name().to_owned(),
        device_kind: facts.devices.own.kind().to_owned(),
        kernel_tier: Some(kernels::tier().name().to_owned()),
        device_is_counted_elsewhere: facts.devices.is_counted_elsewhere(),
        device_memory_bytes: facts.devices.memory_bytes(),
        threads: facts.rank.threads,
        start_seconds: phases.start_seconds,
        stage_seconds: phases.stage_seconds,
        load_seconds: phases.load_seconds,
        ready_at_seconds: phases.ready_at_seconds,
        total_seconds: facts.total_seconds,
        weight_bytes: Some(phases.weight_bytes),
        owned_weight_bytes: Some(phases.owned_weight_bytes),
        checkpoint_bytes: Some(phases.checkpoint_bytes),
        device_copied_bytes: facts.devices.on_device().then_some(phases.weight_bytes),
        staged_bytes: Some(if topology.is_node_leader() { copied } else { 0 }),
        disk_read_bytes: in_process(process::disk_read_bytes()),
        peak_resident_bytes: process::peak_resident_bytes(),
        ..RankStats::default()
    }
}

fn job_facts(facts: &Facts) -> JobFacts {
    JobFacts {
        command: facts.job.command.to_owned(),
        farm_version: env!("CARGO_PKG_VERSION").to_owned(),
        model: facts.job.model.weights.model.display().to_string(),
        started_unix_seconds: facts.plan.started_unix_seconds,
        slurm: facts.rank.job.clone(),
        devices: facts.devices.summary(),
        nodes: facts.topology.num_nodes,
        tensor_parallel: facts.topology.tensor_parallel.size(),
        records_total: facts.ended.records_total,
        records_resumed: facts.ended.records_resumed,
        complete: facts.ended.written.is_some(),
    }
}

fn stage_stats(facts: &Facts) -> Option<StageStats> {
    let report = &facts.staged.report;
    (!facts.job.staging.no_stage).then(|| StageStats {
        quantized: report.quantized.clone(),
        ..StageStats::new(
            report.bytes_read_source,
            report.bytes_staged,
            report.bytes_reused,
            report.stage_seconds,
        )
    })
}
