//! A rank's share of the run: records in, steps of the engine, finished records out.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::Result;
use crate::commands::records::{Done, Records};
use crate::commands::signals::StopSignal;
use crate::engine::{Engine, StepOutcome};
use crate::ledger::{LinkState, Load, RecordSink, RunProgress, WorkerLink, token_cost};
use crate::model::{Logits, ModelRunner, Runner, StepBatch};
use crate::stats::events::EventLog;
use crate::stats::meter::{Meter, StepWork};
use crate::stats::progress::{Progress, ProgressState};

/// How long a worker without records sleeps before it looks again.
const IDLE_WAIT: Duration = Duration::from_millis(20);

/// A runner that remembers the size of its last step, for the meter.
pub struct Metered {
    runner: ModelRunner,
    last: Option<StepWork>,
}

impl Metered {
    /// Over `runner`.
    pub fn new(runner: ModelRunner) -> Self {
        Self { runner, last: None }
    }

    /// The runner itself.
    pub fn inner_mut(&mut self) -> &mut ModelRunner {
        &mut self.runner
    }
}

impl Runner for Metered {
    fn num_blocks(&self) -> usize {
        self.runner.num_blocks()
    }
    fn block_size(&self) -> usize {
        self.runner.block_size()
    }
    fn vocab_size(&self) -> usize {
        self.runner.vocab_size()
    }
    fn max_seq_len(&self) -> usize {
        self.runner.max_seq_len()
    }
    fn forward(&mut self, batch: &StepBatch) -> Result<Logits> {
        self.last = Some(StepWork::of(batch));
        self.runner.forward(batch)
    }
}

/// What a leader's loop needs besides its link.
pub struct Worker<'a> {
    /// The engine over this group's model.
    pub engine: Engine<Metered>,
    /// Records to sequences and back.
    pub records: Records,
    /// This rank's part file.
    pub part: &'a mut dyn RecordSink,
    /// Sequences that run at once.
    pub slots: usize,
    /// Counts the work.
    pub meter: &'a mut Meter,
    /// Notes the first token and the drain.
    pub events: &'a mut EventLog,
    /// Shows how far the run is, at rank 0.
    pub progress: Option<Progress>,
    /// A signal that asks to stop.
    pub stop: &'a StopSignal,
    /// The job's start.
    pub start: Instant,
}

impl Worker<'_> {
    /// Works until no record is left or the run is stopped; the followers of this
    /// group return then, too.
    ///
    /// # Errors
    /// The model or the part file failed; the other ranks are asked to stop.
    pub fn run(&mut self, link: &mut dyn WorkerLink) -> Result<()> {
        let mut outcome = Ok(());
        while outcome.is_ok() && self.goes_on(link) {
            outcome = self.turn(link);
        }
        if outcome.is_err() {
            link.request_stop();
        }
        self.engine.runner_mut().inner_mut().finish();
        if let (Some(progress), Some(state)) = (self.progress.take(), link.progress()) {
            progress.finish(self.start.elapsed(), progress_state(state));
        }
        outcome.and(self.part.sync())
    }

    /// Takes signals and new records; whether there is anything left to do.
    fn goes_on(&mut self, link: &mut dyn WorkerLink) -> bool {
        if self.stop.is_set() && link.state() != LinkState::Stopped {
            self.events.emit(self.start.elapsed(), "drain", json!({}));
            link.request_stop();
        }
        link.state() != LinkState::Stopped
            && (self.engine.has_work() || link.state() == LinkState::Open || link.others_working())
    }

    /// One turn: new records, one step (or a pause), finished records.
    fn turn(&mut self, link: &mut dyn WorkerLink) -> Result<()> {
        let counters = self.engine.counters();
        let load = Load {
            slots: self.slots,
            running: self.engine.num_running(),
            waiting: self.engine.num_waiting(),
            processed_cost: token_cost(counters.prefill_tokens, counters.decode_tokens),
        };
        let mut done = Vec::new();
        for raw in link.poll(&load, self.start.elapsed().as_secs_f64()) {
            match self.records.start(raw, None) {
                Ok(requests) => requests.into_iter().for_each(|r| self.engine.add(r)),
                Err(failed) => done.push(*failed),
            }
        }
        if self.engine.has_work() {
            let outcome = self.step()?;
            done.extend(outcome.finished.into_iter().filter_map(|o| self.records.end(o)));
        } else if done.is_empty() {
            let pause = Instant::now();
            link.wait(IDLE_WAIT);
            self.meter.idle(pause.elapsed());
        }
        self.hand_in(done, link)?;
        if let (Some(progress), Some(state)) = (&mut self.progress, link.progress()) {
            progress.update(self.start.elapsed(), progress_state(state));
        }
        Ok(())
    }

    fn step(&mut self) -> Result<StepOutcome> {
        let preemptions = self.engine.counters().preemptions;
        let began = Instant::now();
        let outcome = self.engine.step()?;
        if let Some(work) = self.engine.runner_mut().last.take() {
            self.meter.step(&work, began.elapsed(), self.start.elapsed());
        }
        self.meter.preempted(self.engine.counters().preemptions - preemptions);
        if outcome.first_tokens > 0
            && !self.events.events().iter().any(|e| e.event == "first_token")
        {
            self.events.emit(self.start.elapsed(), "first_token", json!({}));
        }
        Ok(outcome)
    }

    /// Part file first, then rank 0: a record that rank 0 has seen is in a file.
    fn hand_in(&mut self, done: Vec<Done>, link: &mut dyn WorkerLink) -> Result<()> {
        if done.is_empty() {
            return Ok(());
        }
        for record in &done {
            let finished = &record.finished;
            self.part.append(finished.index, &finished.line, finished.is_error)?;
            self.meter.record(finished.is_error, record.prompt_tokens, record.new_tokens);
        }
        self.part.flush()?;
        done.into_iter().for_each(|record| link.submit(record.finished));
        Ok(())
    }
}

/// As the progress display wants it.
pub fn progress_state(state: RunProgress) -> ProgressState {
    ProgressState {
        records: state.records,
        records_total: state.records_total,
        failed: state.failed,
        tokens: state.new_tokens,
    }
}
