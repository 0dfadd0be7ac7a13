//! A run of 1,000,000 records of which 990,000 are done is started again, alone and on two
//! ranks: the time until it generates, and the peak memory of each rank.
//!
//! The run is begun by farm itself, which is stopped after a moment. Then a launch of the
//! bench's own (a process that claims, journals, and dies by SIGKILL) does the 990,000: eight
//! ranks' files, records begun and not finished at their ends. What is left is the input's
//! end, so that everything has to be passed over before the first record: the worst case.
//! Files are dropped from the page cache before each start.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farm::commands::plan::evidence;
use farm::ledger::claims::{ClaimsConfig, LaunchId, Standing};
use farm::ledger::{
    JournalHeader, JournalWriter, Journals, Launch, Membership, RecordId, RecordSink, RunDir,
    RunFile, SyncPolicy, record_key,
};
use farm::prompts::{InputIdentity, PromptReader, ReadOptions};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const RECORDS: u64 = 1_000_000;
const DONE: u64 = 990_000;
/// Ranks of the launch that did them, and records that each had in work at a time.
const RANKS: usize = 8;
const IN_WORK: usize = 32;
/// What the ledger is to keep to.
const SECONDS_MAX: f64 = 10.0;
const RESIDENT_BYTES_MAX: f64 = 500e6;
/// How long a resumed run goes on, so that all ranks come to work.
const WORKING: Duration = Duration::from_secs(5);

/// The argument that makes a process of this bench the launch that is lost.
pub const LOST_LAUNCH: &str = "lost-launch";

/// Where everything lies.
struct Place(PathBuf);

impl Place {
    fn prompts(&self) -> PathBuf {
        self.0.join("prompts.jsonl")
    }
    fn run_dir(&self) -> PathBuf {
        self.0.join("run")
    }
    fn output(&self) -> PathBuf {
        self.0.join("out.jsonl")
    }
}

/// Measures and prints.
pub fn run() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place(folder.path().to_owned());
    write_prompts(&place.prompts());
    begin_run(&place);
    lose_a_launch(&place);
    println!("resume of {RECORDS} records, {DONE} done, in {}", place.0.display());
    phases(&place);
    for ranks in [1, 2] {
        resume(&place, ranks);
    }
    complete(&place);
}

fn write_prompts(path: &Path) {
    let mut file = BufWriter::new(File::create(path).unwrap());
    for index in 0..RECORDS {
        let line =
            format!("{{\"id\": \"q-{index}\", \"prompt\": \"Question {index}: what is it?\"}}\n");
        file.write_all(line.as_bytes()).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
}

/// farm on `ranks` ranks, as a user starts it.
fn farm(place: &Place, ranks: usize) -> Command {
    let farm = std::env::var("FARM_BIN").unwrap_or(env!("CARGO_BIN_EXE_farm").to_owned());
    let mut command = Command::new(if ranks > 1 { "mpirun" } else { &farm });
    if ranks > 1 {
        command.args(["--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string(), &farm]);
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    }
    command.args(["generate", "--max-new-tokens", "32", "--ignore-eos"]);
    command.arg("--model").arg(crate::tiny_model()).arg("--prompts-file").arg(place.prompts());
    command.arg("--run-dir").arg(place.run_dir()).arg("--output").arg(place.output());
    command.arg("--stage-dir").arg(place.0.join("stage"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Starts farm and waits for rank 0's first token: the process, and the seconds.
fn until_first_token(place: &Place, ranks: usize) -> (Child, f64) {
    let path = place.run_dir().join("events.jsonl");
    let mut known = fs::metadata(&path).map_or(0, |file| file.len());
    let begun = Instant::now();
    let mut farm = farm(place, ranks).spawn().expect("farm (FARM_BIN) and mpirun");
    loop {
        std::thread::sleep(Duration::from_millis(2));
        assert!(farm.try_wait().unwrap().is_none(), "farm ended before its first token");
        let Ok(mut file) = File::open(&path) else { continue };
        let mut new = String::new();
        file.seek(SeekFrom::Start(known)).unwrap();
        file.read_to_string(&mut new).unwrap();
        let Some(whole) = new.rfind('\n') else { continue };
        known += whole as u64 + 1;
        if new[..whole].contains("\"event\":\"first_token\"") {
            return (farm, begun.elapsed().as_secs_f64());
        }
    }
}

/// As Slurm does before the time is up. (mpirun hands USR1 on, and after TERM it kills.)
fn interrupt(mut farm: Child) {
    kill_process(Pid::from_child(&farm), Signal::USR1).unwrap();
    let status = farm.wait().unwrap();
    assert_eq!(status.code(), Some(75), "farm is interrupted and says so");
}

fn begin_run(place: &Place) {
    interrupt(until_first_token(place, 1).0);
}

fn lose_a_launch(place: &Place) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status = command.arg(LOST_LAUNCH).arg(&place.0).status().unwrap();
    assert!(status.code().is_none(), "it dies by a signal: {status}");
}

/// Does the first [`DONE`] records of the run, as far as they are not done, and dies.
pub fn lost_launch(folder: &Path) {
    let place = Place(folder.to_owned());
    let (run_dir, journal_dir) = (place.run_dir(), RunDir::journal_of(&place.run_dir()));
    let run = RunFile::read(&run_dir).unwrap().expect("run.json");
    let run_key = run.identity.short_key();
    let mut journals = Journals::new(&journal_dir, &run_key);
    journals.refresh().unwrap();

    let facts = Launch { ranks: RANKS, ..run.created };
    let config = ClaimsConfig::default();
    let joined = Membership::join(&run_dir, None, &facts, evidence(), config);
    let (member, mut claims) = joined.unwrap();
    let begun = DONE + (RANKS * IN_WORK) as u64;
    for block in 0..begun.div_ceil(run.claim_records) {
        // The name as the feed gives it.
        let standing = claims.claim(&format!("block-{block:08}"), 0.0).unwrap();
        assert_eq!(standing, Standing::Mine);
    }

    let launch = member.launch();
    let mut ranks: Vec<_> =
        (0..RANKS).map(|rank| Rank::new(&journal_dir, &run_key, launch, rank)).collect();
    let records = PromptReader::open(&place.prompts(), &ReadOptions::default()).unwrap();
    let records = records.map(Result::unwrap).filter(|r| !journals.done().contains(r.index));
    for (nth, record) in records.take_while(|record| record.index < begun).enumerate() {
        let id = RecordId { index: record.index, key: record_key(&run_key, &record), attempt: 0 };
        let rank = &mut ranks[nth / IN_WORK % RANKS];
        rank.journal.start(id).unwrap();
        if id.index < DONE {
            rank.work(id);
        }
    }
    for rank in &mut ranks {
        rank.finish();
        rank.journal.sync().unwrap();
    }
    kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
}

/// A rank of the lost launch.
struct Rank {
    journal: JournalWriter,
    in_work: Vec<RecordId>,
}

impl Rank {
    fn new(journal_dir: &Path, run_key: &str, launch: LaunchId, rank: usize) -> Self {
        let header =
            JournalHeader { run_key: run_key.to_owned(), launch, rank, ..JournalHeader::default() };
        // Synced once, at the end: this is not what is measured.
        let policy = SyncPolicy { records: u64::MAX, seconds: f64::INFINITY };
        let journal = JournalWriter::create(journal_dir, &header, policy).unwrap();
        Self { journal, in_work: Vec::new() }
    }

    fn work(&mut self, id: RecordId) {
        self.in_work.push(id);
        if self.in_work.len() == IN_WORK {
            self.finish();
        }
    }

    /// Not in the order in which they began.
    fn finish(&mut self) {
        for id in self.in_work.drain(..).rev() {
            self.journal.append(id, line(id.index).as_bytes(), false).unwrap();
        }
    }
}

/// An output line as farm writes it.
fn line(index: u64) -> String {
    format!(
        "{{\"id\":\"q-{index}\",\"index\":{index},\"prompt\":\"Question {index}: what is it?\",\
         \"text\":\" It is the {index}th of a great many, and it says as much as thirty-two tokens \
         of a model say.\",\"finish_reason\":\"length\",\
         \"usage\":{{\"prompt_tokens\":12,\"completion_tokens\":32}}}}\n"
    )
}

/// So that files are read from their disk.
fn forget_pages(place: &Place) {
    let journals = fs::read_dir(RunDir::journal_of(&place.run_dir())).unwrap();
    let journals = journals.map(|entry| entry.unwrap().path());
    for path in journals.chain([place.prompts()]) {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

/// The parts of a resume one by one, in this process.
fn phases(place: &Place) {
    let run_key = RunFile::read(&place.run_dir()).unwrap().expect("run.json").identity.short_key();
    let journal_dir = RunDir::journal_of(&place.run_dir());
    let bytes: u64 = fs::read_dir(&journal_dir)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    forget_pages(place);
    let mut journals = Journals::new(&journal_dir, &run_key);
    let scanned = seconds(|| journals.refresh().unwrap());
    assert!(journals.done().len() >= DONE && journals.duplicates() == 0);
    let lines = seconds(|| drop(journals.lines().unwrap()));
    let hashed = seconds(|| drop(InputIdentity::of_file(&place.prompts()).unwrap()));
    let read = seconds(|| {
        let records = PromptReader::open(&place.prompts(), &ReadOptions::default()).unwrap();
        let keys = records.map(|record| record_key(&run_key, &record.unwrap()));
        std::hint::black_box(keys.fold(0, u64::wrapping_add));
    });
    println!(
        "journals {:.0} MB, prompts {:.0} MB; alone: scan of the journals {scanned:.2} s, cursor over \
         their lines {lines:.2} s, identity of the input {hashed:.2} s, reading it with all keys \
         {read:.2} s",
        bytes as f64 / 1e6,
        fs::metadata(place.prompts()).unwrap().len() as f64 / 1e6
    );
}

fn seconds(work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_secs_f64()
}

fn resume(place: &Place, ranks: usize) {
    forget_pages(place);
    let (farm, first_token_seconds) = until_first_token(place, ranks);
    std::thread::sleep(WORKING);
    interrupt(farm);
    let kept = if first_token_seconds <= SECONDS_MAX { "within" } else { "OVER" };
    println!(
        "{ranks} rank(s): first token after {first_token_seconds:.2} s, {kept} {SECONDS_MAX} s"
    );
    let events = fs::read_to_string(place.run_dir().join("events.jsonl")).unwrap();
    let events: Vec<Value> = events.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let start = events.iter().rposition(|event| event["event"] == "start").unwrap();
    for event in &events[start..] {
        let name = event["event"].as_str().unwrap_or_default();
        if ["stage", "load", "first_token"].contains(&name) {
            println!("  rank {} {name} at {} s", event["rank"], event["at_seconds"]);
        }
    }
    print_ranks(place);
}

fn print_ranks(place: &Place) {
    let mut table = csv::Reader::from_path(place.run_dir().join("ranks.csv")).unwrap();
    let header = table.headers().unwrap().clone();
    for row in table.records().map(Result::unwrap) {
        let figure = |name: &str| -> f64 {
            let column = header.iter().position(|column| column == name).expect(name);
            row[column].parse().unwrap_or(f64::NAN)
        };
        let peak = figure("peak_resident_bytes");
        println!(
            "  rank {}: planned after {:.2} s, {} records, peak resident {:.0} MB, {} {:.0} MB",
            figure("rank"),
            figure("start_seconds"),
            figure("records"),
            peak / 1e6,
            if peak <= RESIDENT_BYTES_MAX { "within" } else { "OVER" },
            RESIDENT_BYTES_MAX / 1e6
        );
    }
}

/// Resumes once more and lets it end: the output's memory and time, and that it is whole.
fn complete(place: &Place) {
    forget_pages(place);
    let took = seconds(|| assert!(farm(place, 1).status().unwrap().success()));
    println!("to the end, alone: {took:.1} s");
    print_ranks(place);
    let mut lines = 0;
    for line in BufReader::new(File::open(place.output()).unwrap()).lines() {
        assert!(line.unwrap().contains(&format!(",\"index\":{lines},")), "record {lines}");
        lines += 1;
    }
    assert_eq!(lines, RECORDS);
}
