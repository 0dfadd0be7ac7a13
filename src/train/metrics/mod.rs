//! What a training run tells while it goes: `metrics.jsonl`, `metrics.csv`, TensorBoard's
//! event files, and the loss curve as a picture.
//!
//! Only rank 0 writes. An entry is one write of whole lines, so that a kill leaves at most a
//! torn last one. A resumed run drops what was written after its checkpoint: it comes again.

mod plot;
mod table;
mod tensorboard;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::replace_file;
use crate::{Error, Result};
pub use plot::{curve, loss_svg};
use table::{CSV_FILE, csv_header, csv_row, json_line};
pub use table::{JSONL_FILE, read_metrics};
use tensorboard::EventFile;

/// The loss curve.
pub const PLOT_FILE: &str = "loss.svg";

/// An optimiser step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainMetrics {
    /// Optimiser steps done, this one included: 1 is the first.
    pub step: u64,
    /// Passes over the data, with the part of the present one.
    pub epoch: f64,
    /// Mean loss of the step's target tokens, nats; not finite where the step was skipped.
    #[serde(deserialize_with = "table::or_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global norm of the gradients before clipping.
    #[serde(deserialize_with = "table::or_nan")]
    pub grad_norm: f64,
    /// Tokens that went through the model, over all ranks.
    pub tokens: u64,
    /// The same a second.
    #[serde(deserialize_with = "table::or_nan")]
    pub tokens_per_second: f64,
    /// Share of the machine's floating-point limit, where that is known.
    pub flop_share: Option<f64>,
    /// Most resident memory of a rank so far, where the system tells.
    pub memory_peak_bytes: Option<u64>,
    /// Time of the step.
    pub step_seconds: f64,
    /// The gradients were not finite and nothing was learned.
    pub skipped: bool,
}

/// An evaluation on the validation data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Optimiser steps done before it.
    pub step: u64,
    /// Mean loss of the target tokens, nats.
    #[serde(deserialize_with = "table::or_nan")]
    pub loss: f64,
    /// e to the loss.
    #[serde(deserialize_with = "table::or_nan")]
    pub perplexity: f64,
    /// Target tokens.
    pub tokens: u64,
}

impl EvalMetrics {
    /// The mean loss of `tokens` target tokens after `step` steps.
    pub fn new(step: u64, loss: f64, tokens: u64) -> Self {
        Self { step, loss, perplexity: loss.exp(), tokens }
    }
}

/// All entries of a run, in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// The steps.
    pub train: Vec<TrainMetrics>,
    /// The evaluations.
    pub eval: Vec<EvalMetrics>,
}

impl Metrics {
    /// The loss over the steps, skipped ones left out.
    pub fn train_losses(&self) -> Vec<(f64, f64)> {
        let steps = self.train.iter().filter(|step| !step.skipped);
        steps.map(|step| (step.step as f64, step.loss)).collect()
    }

    /// The validation loss over the steps.
    pub fn eval_losses(&self) -> Vec<(f64, f64)> {
        self.eval.iter().map(|eval| (eval.step as f64, eval.loss)).collect()
    }

    fn push(&mut self, entry: Entry) {
        match entry {
            Entry::Train(step) => self.train.push(step),
            Entry::Eval(eval) => self.eval.push(eval),
        }
    }
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Entry {
    Train(TrainMetrics),
    Eval(EvalMetrics),
}

impl Entry {
    fn step(&self) -> u64 {
        match self {
            Entry::Train(step) => step.step,
            Entry::Eval(eval) => eval.step,
        }
    }

    /// What TensorBoard shows of it.
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        match self {
            Entry::Train(step) => {
                let memory = step.memory_peak_bytes.map(|bytes| bytes as f64);
                let known = [
                    ("train/loss", Some(step.loss)),
                    ("train/learning_rate", Some(step.learning_rate)),
                    ("train/grad_norm", Some(step.grad_norm)),
                    ("train/epoch", Some(step.epoch)),
                    ("train/tokens_per_second", Some(step.tokens_per_second)),
                    ("train/flop_share", step.flop_share),
                    ("train/memory_peak_bytes", memory),
                    ("train/step_seconds", Some(step.step_seconds)),
                ];
                known.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect()
            }
            Entry::Eval(eval) => {
                vec![("eval/loss", eval.loss), ("eval/perplexity", eval.perplexity)]
            }
        }
    }
}

/// The files of a running job.
pub struct MetricsLog {
    dir: PathBuf,
    jsonl: Appended,
    csv: Appended,
    events: EventFile,
    metrics: Metrics,
}

impl MetricsLog {
    /// Opens the files in `dir`, which is created where missing. A run that resumes after
    /// `resume_step` steps keeps the entries up to there; a new one (`None`) keeps none.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn open(dir: &Path, resume_step: Option<u64>) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
        let entries = match resume_step {
            Some(step) => table::entries_until(&dir.join(JSONL_FILE), step)?,
            None => Vec::new(),
        };
        let mut metrics = Metrics::default();
        let (mut lines, mut rows) = (Vec::new(), csv_header()?);
        for entry in entries {
            lines.extend(json_line(&entry)?);
            rows.extend(csv_row(&entry)?);
            metrics.push(entry);
        }
        Ok(Self {
            dir: dir.to_owned(),
            jsonl: Appended::replace(dir.join(JSONL_FILE), &lines)?,
            csv: Appended::replace(dir.join(CSV_FILE), &rows)?,
            events: EventFile::create(dir, resume_step.map_or(0, |step| step + 1))?,
            metrics,
        })
    }

    /// Notes a step.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn train(&mut self, step: &TrainMetrics) -> Result<()> {
        self.note(Entry::Train(step.clone()))
    }

    /// Notes an evaluation, and draws the curve anew.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn eval(&mut self, eval: &EvalMetrics) -> Result<()> {
        self.note(Entry::Eval(eval.clone()))?;
        self.plot()
    }

    /// Writes `loss.svg`: the curve so far.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn plot(&self) -> Result<()> {
        let svg = loss_svg(&self.metrics.train_losses(), &self.metrics.eval_losses());
        replace_file(&self.dir.join(PLOT_FILE), svg.as_bytes())
    }

    /// The entries so far, those before the resume among them.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn note(&mut self, entry: Entry) -> Result<()> {
        self.jsonl.append(&json_line(&entry)?)?;
        self.csv.append(&csv_row(&entry)?)?;
        self.events.scalars(entry.step(), &entry.scalars())?;
        self.metrics.push(entry);
        Ok(())
    }
}

/// A file that grows by whole lines.
struct Appended {
    path: PathBuf,
    file: File,
}

impl Appended {
    /// Begins with `bytes` in place of what was there.
    fn replace(path: PathBuf, bytes: &[u8]) -> Result<Self> {
        replace_file(&path, bytes)?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, file })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, error))
    }
}

#[cfg(test)]
mod tests;
