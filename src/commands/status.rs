//! `farm status RUN_DIR`: how far a run is, who works on it, and when it may end. It only
//! reads, from any node that sees the directory.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::cli::StatusArgs;
use crate::commands::plan::{evidence, now_unix_seconds};
use crate::commands::print;
use crate::ledger::claims::OwnerFile;
use crate::ledger::membership::{self, who};
use crate::ledger::{Journals, Launch, RunDir, RunFile};
use crate::stats::format;
use crate::{Error, Result};

/// A run as others see it.
#[derive(Debug, Serialize)]
struct Status {
    run_dir: String,
    command: String,
    /// Records that need no more work.
    records_done: u64,
    /// Records of the input, where a launch has read it to its end.
    records_total: Option<u64>,
    /// Those done that are error records.
    records_failed: u64,
    /// Unfinished texts that the next launch goes on with.
    records_saved: u64,
    /// Records that were journalled again by somebody who could not know that they were done.
    duplicates: u64,
    /// Whether the output of all records was written.
    complete: bool,
    launches: u64,
    working: Vec<Working>,
    records_per_second: f64,
    tokens_per_second: f64,
    /// Seconds until the end at this rate.
    left_seconds: Option<f64>,
    /// What is wrong with the journals.
    warnings: Vec<String>,
}

/// A launch at work.
#[derive(Debug, Serialize)]
struct Working {
    launch: u32,
    who: String,
    ranks: usize,
    phase: String,
    records_done: u64,
    records_per_second: f64,
    tokens_per_second: f64,
    seconds_since_sign: u64,
}

/// Prints the status, with `--watch` until the run is complete.
///
/// # Errors
/// Input errors where there is no run; the directory cannot be read.
pub fn run(args: &StatusArgs) -> Result<()> {
    loop {
        let status = read(&args.run_dir)?;
        let text = if args.json {
            serde_json::to_string(&status).map_err(Error::fault)? + "\n"
        } else {
            show(&status)
        };
        print(&text)?;
        match args.watch {
            Some(seconds) if !status.complete => {
                std::thread::sleep(Duration::from_secs(seconds as u64));
            }
            _ => return Ok(()),
        }
    }
}

fn read(run_dir: &Path) -> Result<Status> {
    let run = RunFile::read(run_dir)?.ok_or_else(|| {
        Error::input(format!("{}: no run of farm (there is no run.json)", run_dir.display()))
    })?;
    let look = membership::look(run_dir, evidence())?;
    let mut journals = Journals::new(&RunDir::journal_of(run_dir), &run.identity.short_key());
    journals.refresh()?;
    let working: Vec<Working> = look.live.iter().map(working).collect();
    let sum = |figure: fn(&Working) -> f64| working.iter().map(figure).fold(0.0, |a, b| a + b);
    let (records_per_second, tokens_per_second) =
        (sum(|w| w.records_per_second), sum(|w| w.tokens_per_second));
    let records_done = journals.done().len();
    let totals = look.live.iter().filter_map(|file| file.progress.records_total);
    let records_total = look.merged.map(|merged| merged.records).or(totals.max());
    let left = records_total.map(|total| total.saturating_sub(records_done) as f64);
    let left_seconds = left.filter(|_| records_per_second > 0.0).map(|n| n / records_per_second);
    Ok(Status {
        run_dir: run_dir.display().to_string(),
        command: run.identity.command,
        records_done,
        records_total,
        records_failed: journals.failed().len(),
        records_saved: journals.saved_records(),
        duplicates: journals.duplicates(),
        complete: look.merged.is_some_and(|merged| {
            (merged.records, merged.errors) == (records_done, journals.failed().len())
        }),
        launches: look.launches,
        working,
        records_per_second,
        tokens_per_second,
        left_seconds,
        warnings: journals.take_warnings(),
    })
}

fn working(file: &OwnerFile) -> Working {
    let facts: Option<Launch> = serde_json::from_value(file.owner.facts.clone()).ok();
    let progress = &file.progress;
    Working {
        launch: file.launch,
        who: who(&file.owner),
        ranks: facts.map_or(0, |facts| facts.ranks),
        phase: progress.phase.clone(),
        records_done: progress.records_done,
        records_per_second: progress.records_per_second,
        tokens_per_second: progress.tokens_per_second,
        seconds_since_sign: now_unix_seconds().saturating_sub(progress.updated_unix_seconds),
    }
}

fn show(status: &Status) -> String {
    let count = |n: u64| format::count(n);
    let mut lines = vec![format!("run       {} ({})", status.run_dir, status.command)];
    let of = match status.records_total {
        Some(0) | None => String::new(),
        Some(total) => {
            let percent = 100.0 * status.records_done as f64 / total as f64;
            format!(" of {} ({percent:.1} %)", count(total))
        }
    };
    lines.push(format!(
        "records   {}{of} done, {} of them failed; {} unfinished texts saved",
        count(status.records_done),
        count(status.records_failed),
        count(status.records_saved)
    ));
    lines.push(format!("launches  {}, {} at work", status.launches, status.working.len()));
    for w in &status.working {
        lines.push(format!(
            "  {:>4}    {}, {} ranks, {}: {} records, {} records/s, {} tokens/s, seen {} s ago",
            w.launch,
            w.who,
            w.ranks,
            w.phase,
            count(w.records_done),
            format::rate(w.records_per_second),
            format::rate(w.tokens_per_second),
            w.seconds_since_sign
        ));
    }
    lines.push(match (status.complete, status.left_seconds) {
        (true, _) => "end       complete, the output is written".to_owned(),
        (_, Some(seconds)) => {
            format!("end       in about {} at this rate", format::clock(seconds))
        }
        (_, None) if status.working.is_empty() => {
            "end       nobody works on it; the same command goes on".to_owned()
        }
        _ => "end       not known yet".to_owned(),
    });
    lines.extend(status.warnings.iter().map(|warning| format!("warning   {warning}")));
    lines.join("\n") + "\n"
}
