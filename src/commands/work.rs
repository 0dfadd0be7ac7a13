//! A rank's share of the run: records in, steps of the engine, finished records out.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::comm::host_name;
use crate::commands::deadline::{Deadline, Measured};
use crate::commands::records::{Done, Records};
use crate::commands::signals::StopSignal;
use crate::engine::{Engine, StepOutcome};
use crate::ledger::{
    Finished, LinkState, Load, RecordId, RecordSink, RunProgress, Task, WorkerLink, token_cost,
};
use crate::model::{Logits, ModelRunner, RowChoices, RowSampling, Runner, StepBatch};
use crate::slurm::OomWatch;
use crate::stats::events::EventLog;
use crate::stats::meter::{Meter, StepWork};
use crate::stats::progress::{Progress, ProgressState};
use crate::{Error, Result};

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
    fn chooses(&self) -> bool {
        self.runner.chooses()
    }
    fn forward_and_choose(
        &mut self,
        batch: &StepBatch,
        rows: &[RowSampling<'_>],
        eos_token_ids: &[u32],
    ) -> Result<RowChoices> {
        self.last = Some(StepWork::of(batch));
        self.runner.forward_and_choose(batch, rows, eos_token_ids)
    }
}

/// What a leader's loop needs besides its link.
pub struct Worker<'a> {
    /// The engine over this group's model.
    pub engine: Engine<Metered>,
    /// Records to sequences and back.
    pub records: Records,
    /// This rank's journal.
    pub journal: &'a mut dyn RecordSink,
    /// The run's key, part of every record's.
    pub run_key: &'a str,
    /// Records for which the engine has no place yet: nothing is lost with them.
    pub waiting: VecDeque<Task>,
    /// The records in work, as the journal names them.
    pub in_work: HashMap<u64, RecordId>,
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
    /// When the job ends.
    pub deadline: &'a Deadline,
    /// Whether the kernel has ended a process of this job for want of memory.
    pub oom: &'a OomWatch,
    /// What steps and syncs took so far.
    pub measured: Measured,
    /// The job's start.
    pub start: Instant,
}

impl Worker<'_> {
    /// Works until no record is left or the run is stopped; what is unfinished then is
    /// saved for the next launch. The followers of this group return then, too.
    ///
    /// # Errors
    /// The model or the journal failed; the other ranks are asked to stop.
    pub fn run(&mut self, link: &mut dyn WorkerLink) -> Result<()> {
        let mut outcome = Ok(());
        while outcome.is_ok() && self.goes_on(link) {
            outcome = self.turn(link);
        }
        if outcome.is_err() {
            link.request_stop();
        }
        let saved = self.save_unfinished();
        self.engine.runner_mut().inner_mut().finish();
        if let (Some(progress), Some(state)) = (self.progress.take(), link.progress()) {
            progress.finish(self.start.elapsed(), progress_state(state));
        }
        outcome.and(saved)
    }

    /// Takes signals, the job's end and new records; whether there is anything left to do.
    fn goes_on(&mut self, link: &mut dyn WorkerLink) -> bool {
        if link.state() != LinkState::Stopped
            && let Some(why) = self.asked_to_stop()
        {
            self.events.emit(self.start.elapsed(), "drain", json!({ "why": why }));
            tracing::info!("{why}: unfinished texts are saved, the same command goes on with them");
            // A rank that was killed for its memory makes the launcher end all the others.
            if let Some(message) = self.oom.message(&host_name()) {
                tracing::error!("{message}");
            }
            link.request_stop();
        }
        link.state() != LinkState::Stopped
            && (self.engine.has_work()
                || !self.waiting.is_empty()
                || link.state() == LinkState::Open
                || link.others_working())
    }

    fn asked_to_stop(&mut self) -> Option<&'static str> {
        self.measured.longest_sync_seconds = self.journal.longest_sync_seconds();
        let now_seconds = self.start.elapsed().as_secs_f64();
        if self.stop.is_set() {
            Some("a signal asks to stop")
        } else if self.deadline.should_drain(now_seconds, &self.measured) {
            Some("the job's time is nearly up")
        } else {
            None
        }
    }

    /// One turn: new records, one step (or a pause), finished records.
    fn turn(&mut self, link: &mut dyn WorkerLink) -> Result<()> {
        let counters = self.engine.counters();
        let load = Load {
            slots: self.slots,
            running: self.engine.num_running(),
            waiting: self.engine.num_waiting() + self.waiting.len(),
            processed_cost: token_cost(counters.prefill_tokens, counters.decode_tokens),
        };
        let mut done = Vec::new();
        self.waiting.extend(link.poll(&load, self.start.elapsed().as_secs_f64()));
        while self.has_place()
            && let Some(task) = self.waiting.pop_front()
        {
            self.begin(task, &mut done)?;
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

    fn has_place(&self) -> bool {
        self.engine.num_running() + self.engine.num_waiting() < self.slots
    }

    /// Gives a record to the engine, or what became of it at once to `done`.
    fn begin(&mut self, task: Task, done: &mut Vec<Done>) -> Result<()> {
        let id = task.id(self.run_key);
        self.journal.start(id)?;
        self.in_work.insert(id.index, id);
        match self.records.start(task.record, task.saved.as_deref()) {
            Ok(requests) => requests.into_iter().for_each(|r| self.engine.add(r)),
            Err(failed) => done.push(*failed),
        }
        Ok(())
    }

    fn step(&mut self) -> Result<StepOutcome> {
        let preemptions = self.engine.counters().preemptions;
        let began = Instant::now();
        let outcome = self.engine.step()?;
        self.measured.step(began.elapsed());
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

    /// Journal first, then rank 0: a record that rank 0 has seen is in a file.
    fn hand_in(&mut self, done: Vec<Done>, link: &mut dyn WorkerLink) -> Result<()> {
        for record in &done {
            let Finished { index, line, is_error, .. } = &record.finished;
            let id = self.in_work.remove(index);
            let id = id.ok_or_else(|| Error::fault(format!("record {index} was not begun")))?;
            self.journal.append(id, line, *is_error)?;
            self.meter.record(*is_error, record.prompt_tokens, record.new_tokens);
        }
        self.journal.flush(self.start.elapsed().as_secs_f64())?;
        done.into_iter().for_each(|record| link.submit(record.finished));
        Ok(())
    }

    /// Keeps what is generated of unfinished records, and brings the journal to the disk.
    fn save_unfinished(&mut self) -> Result<()> {
        let unfinished = self.engine.take_unfinished();
        for saved in self.records.unfinished(unfinished) {
            if let Some(id) = self.in_work.get(&saved.index) {
                self.journal.save(*id, &saved.bytes)?;
            }
        }
        self.journal.sync()
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
