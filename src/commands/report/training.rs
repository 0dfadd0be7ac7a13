//! How a training went, or goes: `farm report` on an adapter's directory. All figures come
//! from `finetune.json` and `metrics.jsonl`, so that a running job can be looked at.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::commands::finetune::RunFile;
use crate::stats::format::{clock, count, cut, known, memory, percent, plural, rate};
use crate::stats::html::{document, escape, section, tiles_of};
use crate::train::metrics::{EvalMetrics, Metrics, TrainMetrics, curve, loss_svg, read_metrics};
use crate::{Error, Result};

/// Size of the curve in the terminal, characters.
const CURVE: [usize; 2] = [90, 14];
/// Validations that are shown; of more the last ones.
const VALIDATIONS_SHOWN: usize = 20;
/// Adapters of a sweep, with their losses.
const SWEEP_FILE: &str = "sweep.csv";

/// What is printed, and the page.
pub struct Report {
    /// The tables and the curve.
    pub text: String,
    /// HTML.
    pub page: String,
}

/// The report of a training or a sweep in `dir`; `None` if there is none.
///
/// # Errors
/// Input errors that name the file: it is damaged, or there are no metrics yet.
pub fn report(dir: &Path) -> Result<Option<Report>> {
    if let Some(run) = RunFile::read(dir)? {
        let metrics = read_metrics(dir)?;
        let (Some(first), Some(last)) = (metrics.train.first(), metrics.train.last()) else {
            return Err(Error::input(format!("{}: no step is done yet", dir.display())));
        };
        return Ok(Some(of_training(dir, &run, &metrics, [first, last])));
    }
    let path = dir.join(SWEEP_FILE);
    path.is_file().then(|| of_sweep(dir, &path)).transpose()
}

fn of_training(
    dir: &Path,
    run: &RunFile,
    metrics: &Metrics,
    [first, last]: [&TrainMetrics; 2],
) -> Report {
    let state = if run.is_complete { "complete" } else { "not complete" };
    let mut table = format!("farm finetune: {}, {state}\n", dir.display());
    for (name, value) in rows(run, metrics, [first, last]) {
        // Writing to a String cannot fail.
        let _ = writeln!(table, "  {name:<14}{}", cut(&value, 84));
    }
    let validations = validations(&metrics.eval);
    let losses = metrics.train_losses();
    let drawn = curve(&losses, CURVE[0], CURVE[1]);
    let curve = if drawn.is_empty() { drawn } else { format!("\nloss\n{drawn}") };

    let title = escape(&format!("farm finetune — {}", dir.display()));
    let mut body = format!("<h1>{title}</h1>\n{}", tiles(state, metrics, last));
    section(&mut body, "Loss", &loss_svg(&losses, &metrics.eval_losses()));
    let figures = format!("<pre>{}</pre>\n", escape(&format!("{table}{validations}")));
    section(&mut body, "All figures", &figures);
    Report { text: table + &validations + &curve, page: document(&title, &body) }
}

fn rows(
    run: &RunFile,
    metrics: &Metrics,
    [first, last]: [&TrainMetrics; 2],
) -> Vec<(&'static str, String)> {
    let steps = &metrics.train;
    let skipped = steps.iter().filter(|step| step.skipped).count() as u64;
    let skipped = if skipped > 0 { format!(", {} skipped", count(skipped)) } else { String::new() };
    let learned = || steps.iter().filter(|step| !step.skipped);
    let lowest = learned().min_by(|a, b| a.loss.total_cmp(&b.loss)).unwrap_or(last);
    let highest = steps.iter().map(|step| step.learning_rate).fold(0.0, f64::max);
    let seconds: f64 = steps.iter().map(|step| step.step_seconds).sum();
    let mut rows = vec![
        ("adapter", adapter(&run.identity)),
        ("steps", format!("{}{skipped}; {:.2} epochs", count(last.step), last.epoch)),
        (
            "loss",
            format!(
                "{:.4} first, {:.4} last, {:.4} lowest (step {})",
                first.loss, last.loss, lowest.loss, lowest.step
            ),
        ),
    ];
    if let (Some(best), Some(last)) = (best(&metrics.eval), metrics.eval.last()) {
        let EvalMetrics { step, loss, perplexity, .. } = best;
        let best = format!("{loss:.4} best (step {step}, perplexity {perplexity:.3})");
        rows.push(("validation", format!("{:.4} last, {best}", last.loss)));
    }
    rows.extend([
        ("learning rate", format!("{highest:.2e} highest, {:.2e} last", last.learning_rate)),
        ("gradient norm", format!("{:.3} first, {:.3} last", first.grad_norm, last.grad_norm)),
        ("tokens", format!("{}; {} tokens/s", count(tokens(steps)), rate(speed(steps)))),
        (
            "arithmetic",
            known(flop_share(steps), |share| format!("{} of the limit", percent(share))),
        ),
        ("memory", known(memory_peak(steps), |most| format!("{} a rank (most)", memory(most)))),
        ("time", format!("{} in steps", clock(seconds))),
    ]);
    rows
}

/// The settings of the adapter, as far as the file has them.
fn adapter(identity: &Value) -> String {
    let lora = &identity["lora"];
    let chosen = lora["target_modules"].as_object().and_then(|chosen| chosen.values().next());
    let modules = match chosen {
        None => "all linear layers".to_owned(),
        Some(Value::Array(names)) => {
            names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
        }
        Some(pattern) => pattern.as_str().unwrap_or_default().to_owned(),
    };
    let with = [("use_rslora", ", rsLoRA"), ("use_dora", ", DoRA")];
    let with = with.iter().filter(|(name, _)| lora[name] == true).map(|(_, text)| *text);
    format!("r {}, alpha {}, {modules}{}", lora["r"], lora["lora_alpha"], with.collect::<String>())
}

fn tokens(steps: &[TrainMetrics]) -> u64 {
    steps.iter().map(|step| step.tokens).sum()
}

/// Tokens a second over all steps.
fn speed(steps: &[TrainMetrics]) -> f64 {
    tokens(steps) as f64 / steps.iter().map(|step| step.step_seconds).sum::<f64>()
}

/// The middle one of the steps': the first ones read the weights.
fn flop_share(steps: &[TrainMetrics]) -> Option<f64> {
    let mut shares: Vec<f64> = steps.iter().filter_map(|step| step.flop_share).collect();
    shares.sort_by(f64::total_cmp);
    shares.get(shares.len() / 2).copied()
}

fn memory_peak(steps: &[TrainMetrics]) -> Option<u64> {
    steps.iter().filter_map(|step| step.memory_peak_bytes).max()
}

fn best(eval: &[EvalMetrics]) -> Option<&EvalMetrics> {
    eval.iter().min_by(|a, b| a.loss.total_cmp(&b.loss))
}

fn validations(eval: &[EvalMetrics]) -> String {
    let shown = &eval[eval.len().saturating_sub(VALIDATIONS_SHOWN)..];
    if shown.is_empty() {
        return String::new();
    }
    let mut table = String::from("\n      step  validation loss  perplexity\n");
    for EvalMetrics { step, loss, perplexity, .. } in shown {
        let _ = writeln!(table, "{step:>10}{loss:>17.4}{perplexity:>12.3}");
    }
    table
}

fn tiles(state: &str, metrics: &Metrics, last: &TrainMetrics) -> String {
    let steps = &metrics.train;
    tiles_of(&[
        (format!("{} ({state})", plural(last.step, "step")), "optimiser"),
        (format!("{:.4}", last.loss), "training loss"),
        (known(best(&metrics.eval), |best| format!("{:.4}", best.loss)), "best validation loss"),
        (rate(speed(steps)), "tokens/s"),
        (count(tokens(steps)), "tokens"),
        (known(memory_peak(steps), memory), "memory of a rank"),
        (known(flop_share(steps), percent), "of the FLOP limit"),
    ])
}

fn of_sweep(dir: &Path, path: &Path) -> Result<Report> {
    let refused = |error: csv::Error| Error::input(format!("{}: {error}", path.display()));
    let mut reader =
        csv::ReaderBuilder::new().has_headers(false).from_path(path).map_err(refused)?;
    let records: Vec<csv::StringRecord> =
        reader.records().collect::<std::result::Result<_, _>>().map_err(refused)?;
    let columns = records.first().map_or(0, csv::StringRecord::len);
    let width = |column: usize| {
        let cells = records.iter().filter_map(|record| record.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut table = format!("farm finetune: sweep in {}\n", dir.display());
    for record in &records {
        for (cell, width) in record.iter().zip(&widths) {
            let _ = write!(table, "  {cell:<width$}");
        }
        table.truncate(table.trim_end().len());
        table.push('\n');
    }
    let title = escape(&format!("farm finetune — sweep in {}", dir.display()));
    let body = format!("<h1>{title}</h1>\n<pre>{}</pre>\n", escape(&table));
    Ok(Report { text: table, page: document(&title, &body) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::MetricsLog;

    fn step(step: u64, loss: f64) -> TrainMetrics {
        TrainMetrics {
            step,
            epoch: step as f64 / 2.0,
            loss,
            learning_rate: 2e-4 / step as f64,
            grad_norm: 1.5,
            tokens: 100,
            tokens_per_second: 50.0,
            flop_share: Some(0.25),
            memory_peak_bytes: Some(3 << 29),
            step_seconds: 2.0,
            skipped: loss.is_nan(),
        }
    }

    fn run(dir: &Path) {
        let lora = serde_json::json!({
            "r": 8, "lora_alpha": 16.0, "target_modules": {"Names": ["q_proj", "v_proj"]}, "use_dora": true,
        });
        let run = serde_json::json!({
            "farm_version": "0", "started_unix_seconds": 1, "is_complete": false,
            "identity": { "lora": lora },
        });
        std::fs::write(dir.join("finetune.json"), run.to_string()).unwrap();
    }

    #[test]
    fn a_training_is_reported_while_it_runs() {
        let dir = tempfile::Builder::new().prefix("<adapter>").tempdir().unwrap();
        let dir = dir.path();
        assert!(report(dir).unwrap().is_none());
        run(dir);
        let mut log = MetricsLog::open(dir, None).unwrap();
        assert!(report(dir).err().unwrap().message.contains("no step is done yet"));
        for (i, loss) in [(1, 4.0), (2, f64::NAN), (3, 1.5), (4, 2.0)] {
            log.train(&step(i, loss)).unwrap();
        }
        log.eval(&EvalMetrics::new(2, 1.0, 10)).unwrap();
        log.eval(&EvalMetrics::new(4, 3.0, 10)).unwrap();
        let Report { text, page } = report(dir).unwrap().unwrap();
        for expected in [
            "not complete",
            "r 8, alpha 16.0, q_proj, v_proj, DoRA",
            "4, 1 skipped; 2.00 epochs",
            "4.0000 first, 2.0000 last, 1.5000 lowest (step 3)",
            "3.0000 last, 1.0000 best (step 2, perplexity 2.718)",
            "2.00e-4 highest, 5.00e-5 last",
            "400; 50.0 tokens/s",
            "25.0% of the limit",
            "1.5 GiB a rank",
            "0:00:08 in steps",
            "⠀",
        ] {
            assert!(text.contains(expected), "{expected} in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert!(page.contains("<svg") && page.contains("&lt;adapter&gt;"));
        for forbidden in ["<adapter>", "NaN", "src=", "<script"] {
            assert!(!page.contains(forbidden), "{forbidden} in {page}");
        }
    }

    #[test]
    fn a_sweep_is_its_table() {
        let dir = tempfile::tempdir().unwrap();
        let table = "name,steps,loss\n\"r=8,lr=0.1\",12,0.5\n\"r=16,lr=0.1\",12,0.25\n";
        std::fs::write(dir.path().join(SWEEP_FILE), table).unwrap();
        let text = report(dir.path()).unwrap().unwrap().text;
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines[0], "  name         steps  loss");
        assert_eq!(lines[2], "  r=16,lr=0.1  12     0.25");
    }
}
