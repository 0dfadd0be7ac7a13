//! The same records through the same engine, with the ledger and without it.
//!
//! With it: a run directory, claims and heartbeat, the journal (group fsync as by default),
//! hand-out, ordered output, and its end on the disk. Without it: records straight from the
//! prompts file, lines straight into a file, in the order in which they end. Everything in
//! between is the same code ([`Worker`]), in one process on all cores.
//!
//! Two measures. The clock inside: seconds that the worker spends in calls of the journal and
//! of the coordinator, and before and after its work, less what the plain run takes for its
//! own reading and writing. And pairs of whole runs, in turns: they hold what the clock inside
//! cannot see (the threads of fsync and heartbeat), and the noise of the machine.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farm::Result;
use farm::comm::{LocalComm, NoTensorComm};
use farm::commands::deadline::{Deadline, Measured};
use farm::commands::load::Decoder;
use farm::commands::plan::evidence;
use farm::commands::records::Records;
use farm::commands::signals::StopSignal;
use farm::commands::work::{Metered, Worker};
use farm::engine::{Engine, EngineConfig, Mode, SamplingParams};
use farm::kernels::attention::BLOCK_SIZE;
use farm::ledger::claims::ClaimsConfig;
use farm::ledger::record::RunInfo;
use farm::ledger::{
    Coordinator, CoordinatorParts, ExistingRun, Feed, FeedConfig, Finished, Handout, HandoutConfig,
    JournalHeader, JournalWriter, Journals, Launch, LinkState, Load, Membership, OrderedOutput,
    OutputTarget, RecordId, RecordSink, RunDir, RunFile, RunIdentity, SyncPolicy, Task, WorkerLink,
    estimate_cost,
};
use farm::model::tokenizer::Tokenizer;
use farm::model::{Checkpoint, LoadOptions, ModelRunner, Runner};
use farm::prompts::{Defaults, Preparer, PromptReader, ReadOptions};
use farm::slurm::OomWatch;
use farm::stats::events::EventLog;
use farm::stats::meter::{Meter, ModelCost};
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

const RECORDS: u64 = 2000;
const NEW_TOKENS: usize = 64;
const BATCH: usize = 32;
const MAX_SEQ_LEN: usize = 128;
const PAIRS: usize = 5;
const SHARE_MAX: f64 = 0.02;

/// Measures and prints.
pub fn run() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.jsonl");
    let lines = (0..RECORDS).map(|n| format!("{{\"prompt\": \"Question {n}: what is it?\"}}\n"));
    std::fs::write(&prompts, lines.collect::<String>()).unwrap();
    println!(
        "overhead: {RECORDS} records of {NEW_TOKENS} tokens, batch {BATCH}, models/tiny, {PAIRS} pairs \
         in turns, in {}",
        folder.path().display()
    );
    let bench = Bench { prompts, folder: folder.path().to_owned() };
    bench.plain(); // warms up
    let pairs: Vec<(Took, Took)> = (0..PAIRS).map(|nth| bench.pair(nth)).collect();
    println!("pair  without, s  with, s  (cpu: s, s)  calls: without, s  with, s  share");
    for (nth, (plain, ledger)) in pairs.iter().enumerate() {
        println!(
            "{nth:>4}  {:>10.3}  {:>7.3}  ({:.2}, {:.2})  {:>17.4}  {:>7.4}  {:.2}%",
            plain.seconds,
            ledger.seconds,
            plain.cpu_seconds,
            ledger.cpu_seconds,
            plain.calls_seconds,
            ledger.calls_seconds,
            100.0 * share(plain, ledger)
        );
    }
    let of = |figure: fn(&Took, &Took) -> f64| {
        100.0 * crate::median(pairs.iter().map(|(plain, ledger)| figure(plain, ledger)))
    };
    let inside = of(share);
    println!(
        "medians: {inside:.2} % of the run's time in calls of the ledger ({} {:.0} %); whole runs \
         {:+.2} % by the clock, {:+.2} % of processor time",
        if inside < 100.0 * SHARE_MAX { "within" } else { "OVER" },
        100.0 * SHARE_MAX,
        of(|plain, ledger| ledger.seconds / plain.seconds - 1.0),
        of(|plain, ledger| ledger.cpu_seconds / plain.cpu_seconds - 1.0)
    );
}

/// What a run took.
#[derive(Clone, Copy)]
struct Took {
    seconds: f64,
    /// Of all threads.
    cpu_seconds: f64,
    /// In calls of the link and the sink, and before and after the worker's loop.
    calls_seconds: f64,
}

fn share(plain: &Took, ledger: &Took) -> f64 {
    (ledger.calls_seconds - plain.calls_seconds) / ledger.seconds
}

/// A clock that runs while it is asked to.
#[derive(Clone, Default)]
struct Clock(Arc<AtomicU64>);

impl Clock {
    fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.0.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    fn seconds(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1e9
    }
}

struct Bench {
    prompts: PathBuf,
    folder: PathBuf,
}

impl Bench {
    /// One of each; who is first takes turns.
    fn pair(&self, nth: usize) -> (Took, Took) {
        if nth.is_multiple_of(2) {
            let plain = self.plain();
            (plain, self.ledger(nth))
        } else {
            let ledger = self.ledger(nth);
            (self.plain(), ledger)
        }
    }

    fn plain(&self) -> Took {
        measure(self.worker_parts(), |clock| {
            let records = PromptReader::open(&self.prompts, &ReadOptions::default()).unwrap();
            let output = BufWriter::new(File::create(self.folder.join("plain.jsonl")).unwrap());
            let link = PlainLink { records, is_at_end: false, output };
            let finish = |mut link: PlainLink| link.output.flush().unwrap();
            (Timed { inner: NoSink, clock: clock.clone() }, link, finish)
        })
    }

    fn ledger(&self, nth: usize) -> Took {
        let folder = self.folder.join(format!("pair-{nth}"));
        let took = measure(self.worker_parts(), |clock| {
            let (journal, link) = self.open_ledger(&folder);
            let finish = |link: Coordinator| {
                let counts = link.finish(&|| false).unwrap().expect("all records are done");
                assert_eq!((counts.records, counts.errors), (RECORDS, 0));
            };
            (Timed { inner: journal, clock: clock.clone() }, link, finish)
        });
        std::fs::remove_dir_all(folder).unwrap();
        took
    }

    /// As `farm generate` opens it for a run that begins.
    fn open_ledger(&self, folder: &Path) -> (JournalWriter, Coordinator) {
        let run_dir = folder.join("run");
        let identity = RunIdentity {
            command: "generate".into(),
            prompts: Value::Null,
            model: "tiny".into(),
            adapter: serde_json::Value::Null,
            sampling: Value::Null,
        };
        let run_key = identity.short_key();
        let facts = Launch {
            farm_version: "bench".into(),
            kernel_tier: farm::kernels::tier().name().into(),
            device_kinds: "cpu".into(),
            devices: "cpu".into(),
            slurm_job_id: None,
            ranks: 1,
            host: "localhost".into(),
            started_unix_seconds: 0,
        };
        // What farm chooses for so many records.
        let claim_records = 4;
        let file = RunFile::new(identity, "p".into(), claim_records, facts.clone(), Vec::new());
        let run = RunDir::open(&run_dir, file, ExistingRun::Resume).unwrap();
        let joined =
            Membership::join(run.path(), None, &facts, evidence(), ClaimsConfig::default());
        let (membership, mut claims) = joined.unwrap();
        let journal_dir = RunDir::journal_of(run.path());
        let mut journals = Journals::new(&journal_dir, &run_key);
        journals.refresh().unwrap();
        claims.claim("partial", 0.0).unwrap();
        let target = OutputTarget::File(folder.join("out.jsonl"));
        let output = OrderedOutput::create(target, run.path(), OrderedOutput::EARLY_BYTES_MAX);
        let header = JournalHeader {
            run_key: run_key.clone(),
            launch: membership.launch(),
            ..JournalHeader::default()
        };
        let journal = JournalWriter::create(&journal_dir, &header, SyncPolicy::default()).unwrap();
        let prompts = self.prompts.clone();
        let open = Box::new(move || {
            Ok(Box::new(PromptReader::open(&prompts, &ReadOptions::default())?) as _)
        });
        let take_records = 2 * BATCH as u64;
        let config =
            FeedConfig { claim_records, run_key: run_key.clone(), retry: false, take_records };
        let stored = Some(journals.lines().unwrap());
        let parts = CoordinatorParts {
            handout: Handout::new(HandoutConfig::for_workers(1), 1),
            feed: Feed::new(config, open, claims, Box::new(journals), stored),
            membership,
            estimate: Box::new(|r| estimate_cost(r, NEW_TOKENS as u64, MAX_SEQ_LEN as u64)),
            output: output.unwrap(),
            read_stored: Box::new(move || {
                let mut journals = Journals::new(&journal_dir, &run_key);
                journals.refresh()?;
                journals.lines()
            }),
            no_wait: false,
        };
        let comm = LocalComm::world(1).remove(0);
        (journal, Coordinator::new(Arc::new(comm), parts))
    }

    /// A fresh engine over the model, and what makes records of lines.
    fn worker_parts(&self) -> (Engine<Metered>, Records) {
        let dir = crate::tiny_model();
        let num_blocks = BATCH * MAX_SEQ_LEN.div_ceil(BLOCK_SIZE);
        let options =
            LoadOptions { dtype: None, max_seq_len: MAX_SEQ_LEN, num_blocks, device: None };
        let runner =
            ModelRunner::load(&Checkpoint::open(&dir).unwrap(), &options, Arc::new(NoTensorComm))
                .unwrap();
        let tokenizer = Arc::new(Tokenizer::from_dir(&dir).unwrap());
        let params = SamplingParams {
            max_new_tokens: NEW_TOKENS,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let preparer = Preparer {
            tokenizer: tokenizer.clone(),
            template: None,
            defaults: Defaults { params, file: "prompts.jsonl".into(), ..Defaults::default() },
            max_seq_len: MAX_SEQ_LEN,
            reserved_tokens: 1,
            guides: farm::engine::Guides::new(Vec::new, &[]).into(),
            vocab_size: runner.vocab_size(),
        };
        let limits = EngineConfig { max_batch_size: BATCH, ..EngineConfig::default() };
        let engine = Engine::new(Metered::new(runner), Arc::new(Decoder(tokenizer)), limits);
        let run = RunInfo { key: "k".into(), created_unix_seconds: 0, model: "tiny".into() };
        (engine.unwrap(), Records::new(Mode::Generate, run, preparer))
    }
}

/// Runs the worker between what `open` makes and what its last part ends.
fn measure<S: RecordSink, L: WorkerLink, F: FnOnce(L)>(
    (engine, records): (Engine<Metered>, Records),
    open: impl FnOnce(&Clock) -> (Timed<S>, L, F),
) -> Took {
    let clock = Clock::default();
    let (start, cpu_before) = (Instant::now(), cpu_seconds());
    let (mut sink, link, finish) = clock.time(|| open(&clock));
    let mut link = Timed { inner: link, clock: clock.clone() };
    let (mut meter, mut events) = (Meter::new(ModelCost::default()), EventLog::new(0, "localhost"));
    let mut worker = Worker {
        engine,
        records,
        journal: &mut sink,
        run_key: "k",
        in_work: HashMap::new(),
        waiting: VecDeque::new(),
        slots: BATCH,
        meter: &mut meter,
        events: &mut events,
        progress: None,
        stop: &StopSignal::default(),
        deadline: &Deadline::new(None, None, 0.0),
        oom: &OomWatch::start(),
        measured: Measured::default(),
        start,
    };
    worker.run(&mut link).unwrap();
    link.close().unwrap();
    clock.time(|| finish(link.inner));
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu_before);
    assert_eq!(meter.so_far().0, RECORDS);
    Took { seconds, cpu_seconds: cpu, calls_seconds: clock.seconds() }
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A link or a sink whose calls are on the clock.
struct Timed<T> {
    inner: T,
    clock: Clock,
}

impl<S: RecordSink> RecordSink for Timed<S> {
    fn start(&mut self, id: RecordId) -> Result<()> {
        self.clock.time(|| self.inner.start(id))
    }
    fn append(&mut self, id: RecordId, line: &[u8], is_error: bool) -> Result<()> {
        self.clock.time(|| self.inner.append(id, line, is_error))
    }
    fn save(&mut self, id: RecordId, generation: &[u8]) -> Result<()> {
        self.clock.time(|| self.inner.save(id, generation))
    }
    fn flush(&mut self, now_seconds: f64) -> Result<()> {
        self.clock.time(|| self.inner.flush(now_seconds))
    }
    fn sync(&mut self) -> Result<()> {
        self.clock.time(|| self.inner.sync())
    }
    fn longest_sync_seconds(&self) -> f64 {
        self.clock.time(|| self.inner.longest_sync_seconds())
    }
}

impl<L: WorkerLink> WorkerLink for Timed<L> {
    fn poll(&mut self, load: &Load, now_seconds: f64) -> Vec<Task> {
        self.clock.time(|| self.inner.poll(load, now_seconds))
    }
    fn submit(&mut self, finished: Finished) {
        self.clock.time(|| self.inner.submit(finished));
    }
    fn state(&self) -> LinkState {
        self.clock.time(|| self.inner.state())
    }
    fn request_stop(&mut self) {
        self.inner.request_stop();
    }
    fn wait(&mut self, timeout: Duration) {
        self.clock.time(|| self.inner.wait(timeout));
    }
    fn close(&mut self) -> Result<()> {
        self.clock.time(|| self.inner.close())
    }
}

/// Keeps nothing.
struct NoSink;

impl RecordSink for NoSink {
    fn start(&mut self, _id: RecordId) -> Result<()> {
        Ok(())
    }
    fn append(&mut self, _id: RecordId, _line: &[u8], _is_error: bool) -> Result<()> {
        Ok(())
    }
    fn save(&mut self, _id: RecordId, _generation: &[u8]) -> Result<()> {
        Ok(())
    }
    fn flush(&mut self, _now_seconds: f64) -> Result<()> {
        Ok(())
    }
    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
    fn longest_sync_seconds(&self) -> f64 {
        0.0
    }
}

/// From the file to the worker, from the worker to the file.
struct PlainLink {
    records: PromptReader,
    is_at_end: bool,
    output: BufWriter<File>,
}

impl WorkerLink for PlainLink {
    fn poll(&mut self, load: &Load, _now_seconds: f64) -> Vec<Task> {
        // A batch is waiting while one runs, so that no slot is ever empty.
        let wanted = (2 * load.slots).saturating_sub(load.running + load.waiting);
        let records: Vec<_> = self.records.by_ref().take(wanted).map(Result::unwrap).collect();
        self.is_at_end |= records.len() < wanted;
        records.into_iter().map(|record| Task { record, attempt: 0, saved: None }).collect()
    }
    fn submit(&mut self, finished: Finished) {
        self.output.write_all(&finished.line).unwrap();
    }
    fn state(&self) -> LinkState {
        if self.is_at_end { LinkState::Finished } else { LinkState::Open }
    }
    fn request_stop(&mut self) {
        self.is_at_end = true;
    }
    fn wait(&mut self, _timeout: Duration) {}
    fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
