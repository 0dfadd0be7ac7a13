//! `farm stage`: copies a model to every node's memory and leaves it there.

use crate::Result;
use crate::cli::StageCommandArgs;
use crate::comm::{Topology, agree};
use crate::commands::launch::Rank;
use crate::commands::{load, print};
use crate::stage::manifest::Manifest;
use crate::stage::sources::ModelPaths;
use crate::stage::{StageOptions, Staged, stage};
use crate::stats::format;

/// Stages on all nodes; rank 0 says what was done.
///
/// # Errors
/// Alike on all ranks: the model is unusable, or a node has no room.
pub fn run(args: &StageCommandArgs, rank: &Rank) -> Result<i32> {
    let topology = Topology::new(rank.world.clone(), 1)?;
    let sources =
        ModelPaths { tokenizer: args.tokenizer.clone(), ..ModelPaths::of(args.model.path()) };
    let quantize = args.quantize.map(Into::into);
    let options =
        StageOptions { keep: true, quantize, ..StageOptions::new(sources, &args.stage_dir) };
    // A model that cannot run is not worth its copies.
    let first = rank.world.rank() == 0;
    let usable = first.then(|| load::usable(&Manifest::read(&options.sources)?.in_place));
    agree(&*rank.world, usable.transpose().map(drop))?;
    let staged = stage(&topology, &options)?;
    if let (Some(asked), None, true) = (quantize, &staged.report.quantized, first) {
        tracing::warn!(
            "not quantized to {}: a GGUF model, or one without floats to quantize, is staged as \
             it is; jobs with --quantize use this copy",
            asked.name()
        );
    }
    let line = summary(&staged, topology.num_nodes);
    staged.finish(&topology);
    let printed = if rank.world.rank() == 0 { print(&line) } else { Ok(()) };
    agree(&*rank.world, printed).map(|()| 0)
}

fn summary(staged: &Staged, num_nodes: usize) -> String {
    let report = &staged.report;
    let rate = match report.bytes_staged {
        0 => String::new(),
        _ => format!(", {:.2} GB/s", report.gigabytes_per_second),
    };
    let quantized = report.quantized.as_ref().map(|quant| format!(" in {quant}"));
    format!(
        "{}: {}{} on {}, {} read, {} written, {} reused, {:.1} s{rate}\n",
        staged.model_path.display(),
        format::bytes(report.model_bytes),
        quantized.unwrap_or_default(),
        format::plural(num_nodes as u64, "node"),
        format::bytes(report.bytes_read_source),
        format::bytes(report.bytes_staged),
        format::bytes(report.bytes_reused),
        report.stage_seconds,
    )
}
