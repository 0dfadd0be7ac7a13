//! Progress on stderr: a bar on a terminal, a line every 30 s elsewhere.
//!
//! Log lines that are written while a bar is shown go through [`with_bar_hidden`], so
//! that neither breaks the other.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format;
use crate::error::say;

/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// The bar that is on the terminal now.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// What is shown while the run goes on: `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// A bar on a terminal, lines elsewhere.
    Auto,
    /// A bar.
    Bar,
    /// A line every 30 s.
    Line,
    /// Nothing.
    None,
}

/// How far the run is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProgressState {
    /// Records finished, those of earlier attempts included.
    pub records: u64,
    /// Records of the input, where known.
    pub records_total: Option<u64>,
    /// Records that failed.
    pub failed: u64,
    /// Tokens generated in this attempt.
    pub tokens: u64,
}

/// Shows how far the run is. Rank 0 has one and calls [`Progress::update`] as often as it likes.
#[derive(Debug)]
pub struct Progress {
    form: Form,
    began: Duration,
    at_start: ProgressState,
    last_line: (Duration, ProgressState),
}

#[derive(Debug)]
enum Form {
    Bar(ProgressBar),
    Line,
    Hidden,
}

impl Progress {
    /// Begins at `now` (since the job's start) with `state` (what a resumed run has already).
    pub fn new(mode: ProgressMode, now: Duration, state: ProgressState) -> Self {
        let form = match (mode, std::io::stderr().is_terminal()) {
            (ProgressMode::Bar, _) | (ProgressMode::Auto, true) => Form::Bar(show_bar(&state)),
            (ProgressMode::Line, _) | (ProgressMode::Auto, false) => Form::Line,
            (ProgressMode::None, _) => Form::Hidden,
        };
        Self { form, began: now, at_start: state, last_line: (now, state) }
    }

    /// Shows `state`; a bar is redrawn at most 20 times a second, a line written every 30 s.
    pub fn update(&mut self, now: Duration, state: ProgressState) {
        match &self.form {
            Form::Bar(bar) => {
                if let Some(total) = state.records_total {
                    bar.set_length(total);
                }
                bar.set_position(state.records);
                bar.set_message(self.message(now, &state));
            }
            Form::Line => {
                if let Some(line) = self.line_if_due(now, state) {
                    say(line);
                }
            }
            Form::Hidden => {}
        }
    }

    /// Takes the bar away; a last line where lines are shown and the last one is old.
    pub fn finish(mut self, now: Duration, state: ProgressState) {
        match &self.form {
            Form::Bar(_) => hide_bar(),
            Form::Line if self.last_line.0 > self.began && self.last_line.1 != state => {
                say(self.line(now, &state));
                self.last_line = (now, state);
            }
            _ => {}
        }
    }

    fn line_if_due(&mut self, now: Duration, state: ProgressState) -> Option<String> {
        if now.saturating_sub(self.last_line.0) < LINE_EVERY {
            return None;
        }
        let line = self.line(now, &state);
        self.last_line = (now, state);
        Some(line)
    }

    /// `farm: 0:01:30  120/1,000 records (12.0%), 3 failed, 412.3 tokens/s, eta 0:02:12`; the
    /// rate is since the last line.
    fn line(&self, now: Duration, state: &ProgressState) -> String {
        let done = match state.records_total {
            Some(total) => {
                let share = state.records as f64 / total.max(1) as f64;
                let (records, total) = (format::count(state.records), format::count(total));
                format!("{records}/{total} records ({})", format::percent(share))
            }
            None => format::plural(state.records, "record"),
        };
        let elapsed = format::clock(now.as_secs_f64());
        format!("farm: {elapsed}  {done}, {}", self.message(now, state))
    }

    fn message(&self, now: Duration, state: &ProgressState) -> String {
        let mut parts = Vec::new();
        if state.failed > 0 {
            parts.push(format!("{} failed", format::count(state.failed)));
        }
        let (since, then) = match self.form {
            Form::Line => self.last_line,
            _ => (self.began, self.at_start),
        };
        let seconds = now.saturating_sub(since).as_secs_f64();
        let tokens = state.tokens.saturating_sub(then.tokens);
        if seconds > 0.0 {
            parts.push(format!("{} tokens/s", format::rate(tokens as f64 / seconds)));
        }
        if let Some(eta) = self.eta_seconds(now, state) {
            parts.push(format!("eta {}", format::clock(eta)));
        }
        parts.join(", ")
    }

    /// Seconds that the rest takes at this attempt's mean rate.
    fn eta_seconds(&self, now: Duration, state: &ProgressState) -> Option<f64> {
        let done = state.records.saturating_sub(self.at_start.records);
        let left = state.records_total?.saturating_sub(state.records);
        let seconds = now.saturating_sub(self.began).as_secs_f64();
        (done > 0).then(|| left as f64 * seconds / done as f64)
    }
}

impl Drop for Progress {
    /// A run that ends with an error leaves a clean terminal too.
    fn drop(&mut self) {
        if matches!(self.form, Form::Bar(_)) {
            hide_bar();
        }
    }
}

fn show_bar(state: &ProgressState) -> ProgressBar {
    // Templates are constants: one that does not parse falls back to the default bar.
    let template = match state.records_total {
        Some(_) => "{elapsed_precise} {bar:32} {human_pos}/{human_len} records, {msg}",
        None => "{elapsed_precise} {spinner} {human_pos} records, {msg}",
    };
    let bar = ProgressBar::with_draw_target(state.records_total, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_position(state.records);
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
    bar
}

fn hide_bar() {
    if let Some(bar) = BAR.lock().unwrap_or_else(PoisonError::into_inner).take() {
        bar.finish_and_clear();
    }
}

/// Runs `write`, which writes to stderr, with the bar taken away meanwhile.
pub fn with_bar_hidden<T>(write: impl FnOnce() -> T) -> T {
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(records: u64, total: Option<u64>, failed: u64, tokens: u64) -> ProgressState {
        ProgressState { records, records_total: total, failed, tokens }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_line_every_30_s_with_the_rate_since_the_last() {
        let mut progress = Progress::new(ProgressMode::Line, at(10), state(0, Some(1000), 0, 0));
        assert_eq!(progress.line_if_due(at(39), state(50, Some(1000), 0, 900)), None);
        assert_eq!(
            progress.line_if_due(at(40), state(100, Some(1000), 3, 3000)).as_deref(),
            Some("farm: 0:00:40  100/1,000 records (10.0%), 3 failed, 100.0 tokens/s, eta 0:04:30")
        );
        assert_eq!(
            progress.line_if_due(at(70), state(250, Some(1000), 3, 9000)).as_deref(),
            Some("farm: 0:01:10  250/1,000 records (25.0%), 3 failed, 200.0 tokens/s, eta 0:03:00")
        );
        assert_eq!(progress.line_if_due(at(71), state(260, Some(1000), 3, 9100)), None);
    }

    /// Records of earlier attempts are no measure of this one's speed.
    #[test]
    fn a_resumed_run_counts_its_own_rate() {
        let progress = Progress::new(ProgressMode::None, at(0), state(900, Some(1000), 0, 0));
        assert_eq!(progress.eta_seconds(at(10), &state(900, Some(1000), 0, 0)), None);
        assert_eq!(progress.eta_seconds(at(10), &state(950, Some(1000), 0, 0)), Some(10.0));
    }

    #[test]
    fn an_unknown_total_has_no_share_and_no_eta() {
        let progress = Progress::new(ProgressMode::Line, at(0), ProgressState::default());
        assert_eq!(
            progress.line(at(2), &state(1, None, 0, 5)),
            "farm: 0:00:02  1 record, 2.5 tokens/s"
        );
        assert_eq!(progress.line(at(0), &state(2, None, 0, 5)), "farm: 0:00:00  2 records, ");
    }

    #[test]
    fn an_empty_input_is_no_division_by_zero() {
        let progress = Progress::new(ProgressMode::Line, at(0), state(0, Some(0), 0, 0));
        assert!(progress.line(at(1), &state(0, Some(0), 0, 0)).contains("0/0 records (0.0%)"));
    }
}
