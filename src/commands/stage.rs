//! `farm stage`: copies a model to every node's memory and leaves it there.

use crate::cli::StageCommandArgs;
use crate::comm::Topology;
use crate::commands::launch::Rank;
use crate::stage::{StageOptions, stage};
use crate::{Result, stats};

/// Stages on all nodes; rank 0 says what was done.
///
/// # Errors
/// Alike on all ranks: the model is unusable, or a node has no room.
pub fn run(args: &StageCommandArgs, rank: &Rank) -> Result<i32> {
    let topology = Topology::new(rank.world.clone(), 1)?;
    let options = StageOptions { keep: true, ..StageOptions::new(&args.model, &args.stage_dir) };
    let staged = stage(&topology, &options)?;
    if rank.world.rank() == 0 {
        let report = &staged.report;
        println!(
            "{}: {} on {} nodes, {} read, {} written, {} reused, {:.1} s{}",
            staged.model_path.display(),
            stats::format::bytes(report.model_bytes),
            topology.num_nodes,
            stats::format::bytes(report.bytes_read_source),
            stats::format::bytes(report.bytes_staged),
            stats::format::bytes(report.bytes_reused),
            report.stage_seconds,
            if report.bytes_staged > 0 {
                format!(", {:.2} GB/s", report.gigabytes_per_second)
            } else {
                String::new()
            }
        );
    }
    staged.finish(&topology);
    Ok(0)
}
