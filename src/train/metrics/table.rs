//! `metrics.jsonl` and `metrics.csv`: a line an entry, the same figures in both.

use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::{Entry, Metrics};
use crate::{Error, Result};

/// The entries, one JSON object a line.
pub const JSONL_FILE: &str = "metrics.jsonl";
/// The same as a table.
pub const CSV_FILE: &str = "metrics.csv";

/// Reads the entries that a run, finished or not, left in `dir`.
///
/// # Errors
/// Input errors that name the file and line. A torn last line is none: the run goes on, or
/// was killed.
pub fn read_metrics(dir: &Path) -> Result<Metrics> {
    let path = dir.join(JSONL_FILE);
    let text = std::fs::read(&path)
        .map_err(|error| Error::input(format!("{}: {error}", path.display())))?;
    let mut metrics = Metrics::default();
    for (entry, line) in parse(&text).zip(1..) {
        let place = || format!("{}:{line}", path.display());
        metrics.push(entry.map_err(|error| Error::input(error).context(place()))?);
    }
    Ok(metrics)
}

/// The entries of `path` up to `step`; none where it is missing. What does not parse is left
/// out: it is no reason not to train.
pub(super) fn entries_until(path: &Path, step: u64) -> Result<Vec<Entry>> {
    let text = match std::fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|error| Error::io(path, error))?,
    };
    let mut entries = Vec::new();
    for (entry, line) in parse(&text).zip(1..) {
        match entry {
            Ok(entry) if entry.step() <= step => entries.push(entry),
            Ok(_) => {}
            Err(error) => tracing::warn!("{}:{line} is dropped: {error}", path.display()),
        }
    }
    Ok(entries)
}

/// Every whole line.
fn parse(text: &[u8]) -> impl Iterator<Item = serde_json::Result<Entry>> {
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    lines.filter(|line| line.ends_with(b"\n")).map(serde_json::from_slice)
}

pub(super) fn json_line(entry: &Entry) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(entry).map_err(Error::fault)?;
    line.push(b'\n');
    Ok(line)
}

/// JSON has no NaN: serde_json writes null for it.
pub(super) fn or_nan<'de, D: Deserializer<'de>>(value: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or(f64::NAN))
}

/// A row of the table: steps and evaluations share the columns, the others are empty.
#[derive(Default, Serialize)]
struct Row {
    kind: &'static str,
    step: u64,
    epoch: Option<f64>,
    loss: f64,
    perplexity: Option<f64>,
    learning_rate: Option<f64>,
    grad_norm: Option<f64>,
    tokens: u64,
    tokens_per_second: Option<f64>,
    flop_share: Option<f64>,
    memory_peak_bytes: Option<u64>,
    step_seconds: Option<f64>,
    skipped: Option<bool>,
}

impl Row {
    fn of(entry: &Entry) -> Self {
        match entry {
            Entry::Train(step) => Self {
                kind: "train",
                step: step.step,
                epoch: Some(step.epoch),
                loss: step.loss,
                perplexity: None,
                learning_rate: Some(step.learning_rate),
                grad_norm: Some(step.grad_norm),
                tokens: step.tokens,
                tokens_per_second: Some(step.tokens_per_second),
                flop_share: step.flop_share,
                memory_peak_bytes: step.memory_peak_bytes,
                step_seconds: Some(step.step_seconds),
                skipped: Some(step.skipped),
            },
            Entry::Eval(eval) => Self {
                kind: "eval",
                step: eval.step,
                loss: eval.loss,
                perplexity: Some(eval.perplexity),
                tokens: eval.tokens,
                ..Self::default()
            },
        }
    }
}

pub(super) fn csv_header() -> Result<Vec<u8>> {
    let mut both = csv_lines(&Row::default(), true)?;
    let end = both.iter().position(|byte| *byte == b'\n').map_or(both.len(), |at| at + 1);
    both.truncate(end);
    Ok(both)
}

pub(super) fn csv_row(entry: &Entry) -> Result<Vec<u8>> {
    csv_lines(&Row::of(entry), false)
}

fn csv_lines(row: &Row, with_header: bool) -> Result<Vec<u8>> {
    let fault = |error: String| Error::fault(format!("{CSV_FILE}: {error}"));
    let mut writer = csv::WriterBuilder::new().has_headers(with_header).from_writer(Vec::new());
    writer.serialize(row).map_err(|error| fault(error.to_string()))?;
    writer.into_inner().map_err(|error| fault(error.to_string()))
}
