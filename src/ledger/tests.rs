//! The whole ledger on threads as ranks: claims, hand-out, messages, journals, output, resume.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::claims::{ClaimsConfig, HostEvidence, Standing};
use super::*;
use crate::comm::LocalComm;
use crate::prompts::{RawBody, RawRecord};
use crate::{Error, Result};

const RUN_KEY: &str = "0a1b";

fn records(count: u64) -> Source {
    Box::new((0..count).map(|index| {
        let body = RawBody::Text(format!("prompt {index}").into_bytes());
        Ok(RawRecord { index, line: index + 1, body })
    }))
}

fn line(index: u64) -> String {
    format!("{{\"index\":{index}}}\n")
}

/// A worker with four slots that finishes one record a step; the indices it worked on. It
/// asks for a drain after `stop_after` records.
fn work(
    link: &mut dyn WorkerLink,
    journal: &mut dyn RecordSink,
    stop_after: usize,
    step: Duration,
) -> Vec<u64> {
    const SLOTS: usize = 4;
    let start = Instant::now();
    let (mut waiting, mut running, mut done) = (Vec::<Task>::new(), Vec::new(), Vec::new());
    loop {
        let load = Load {
            slots: SLOTS,
            running: running.len(),
            waiting: waiting.len(),
            processed_cost: done.len() as f64,
        };
        waiting.extend(link.poll(&load, start.elapsed().as_secs_f64()));
        if link.state() == LinkState::Stopped {
            return done;
        }
        while running.len() < SLOTS
            && let Some(task) = waiting.pop()
        {
            journal.start(task.id(RUN_KEY)).unwrap();
            running.push(task);
        }
        let Some(task) = running.pop() else {
            if link.state() == LinkState::Finished {
                return done;
            }
            link.wait(Duration::from_millis(20));
            continue;
        };
        std::thread::sleep(step);
        let id = task.id(RUN_KEY);
        let (index, is_error) = (id.index, id.index % 10 == 3);
        let line = line(index).into_bytes();
        journal.append(id, &line, is_error).unwrap();
        journal.flush(start.elapsed().as_secs_f64()).unwrap();
        link.submit(Finished { index, line, is_error, cost: 1.0, new_tokens: 1 });
        done.push(index);
        if done.len() == stop_after {
            link.request_stop();
        }
    }
}

/// Rank 0's coordinator for a launch on the run in `folder`, and the launch's number.
fn join(
    folder: &Path,
    comm: std::sync::Arc<dyn crate::comm::Communicator>,
    source: &impl Fn() -> Source,
) -> (Coordinator, u32) {
    let run = folder.join("run");
    let identity = RunIdentity {
        command: "generate".into(),
        prompts: json!("p"),
        model: "m".into(),
        adapter: json!(null),
        sampling: json!({}),
    };
    let facts = Launch {
        farm_version: "0.1.0".into(),
        kernel_tier: "scalar".into(),
        device_kinds: "cpu".into(),
        devices: "cpu".into(),
        slurm_job_id: None,
        ranks: comm.size(),
        host: "node1".into(),
        started_unix_seconds: 1,
    };
    let file = RunFile::new(identity, "p".into(), 32, facts.clone(), Vec::new());
    let run_dir = RunDir::open(&run, file, ExistingRun::Resume).unwrap();
    let evidence = Box::new(HostEvidence::new(|_| None));
    let config = ClaimsConfig { heartbeat_seconds: 0.5, ..ClaimsConfig::default() };
    let (membership, mut claims) = Membership::join(&run, None, &facts, evidence, config).unwrap();
    let launch = membership.launch();
    let journal_dir = RunDir::journal_of(&run);
    let mut journals = Journals::new(&journal_dir, RUN_KEY);
    journals.refresh().unwrap();
    let target = OutputTarget::File(folder.join("out.jsonl"));
    let alone = claims.live_others(0.0).unwrap().is_empty()
        && claims.claim("partial", 0.0).unwrap() == Standing::Mine;
    let output = if alone {
        let output = OrderedOutput::create(target, run_dir.path(), 1000).unwrap();
        output.with_stored(journals.lines().unwrap())
    } else {
        OrderedOutput::create_for_merge(target, run_dir.path()).unwrap()
    };
    let take_records = 8 * comm.size() as u64;
    let run_key = RUN_KEY.to_owned();
    let config = FeedConfig { claim_records: 32, run_key, retry: false, take_records };
    let stored = Some(journals.lines().unwrap());
    // The source lives as long as the test.
    let mut sources = std::iter::repeat_with(source).take(100).collect::<Vec<_>>();
    let open = Box::new(move || Ok(sources.pop().expect("few passes")));
    let feed = Feed::new(config, open, claims, Box::new(journals), stored);
    let parts = CoordinatorParts {
        handout: Handout::new(HandoutConfig::for_workers(comm.size()), comm.size()),
        feed,
        membership,
        estimate: Box::new(|_: &RawRecord| 1.0),
        output,
        read_stored: Box::new(move || {
            let mut journals = Journals::new(&journal_dir, RUN_KEY);
            journals.refresh()?;
            journals.lines()
        }),
        no_wait: false,
    };
    (Coordinator::new(comm, parts), launch)
}

/// One launch on `ranks` ranks: rank 0's outcome, and what was worked on by all ranks.
/// `stop` is a rank and after how many records it asks for a drain.
fn launch(
    folder: &Path,
    ranks: usize,
    source: impl Fn() -> Source + Sync,
    stop: Option<(usize, usize)>,
) -> (Result<Option<OutputCounts>>, Vec<u64>) {
    launch_slowly(folder, ranks, source, stop, Duration::ZERO)
}

/// The same where a record takes `step`.
fn launch_slowly(
    folder: &Path,
    ranks: usize,
    source: impl Fn() -> Source + Sync,
    stop: Option<(usize, usize)>,
    step: Duration,
) -> (Result<Option<OutputCounts>>, Vec<u64>) {
    let run = folder.join("run");
    let by_rank = LocalComm::run(ranks, |comm| {
        let rank = comm.rank();
        let joined = (rank == 0).then(|| join(folder, comm.clone(), &source));
        let number = joined.as_ref().map_or(0, |(_, launch)| *launch);
        let number = crate::comm::broadcast_vec(&*comm, 0, number.to_le_bytes().to_vec());
        let header = JournalHeader {
            run_key: RUN_KEY.into(),
            launch: u32::from_le_bytes(number.try_into().unwrap()),
            rank,
            host: "node1".into(),
            slurm_job_id: None,
            started_unix_seconds: 1,
        };
        let mut journal =
            JournalWriter::create(&RunDir::journal_of(&run), &header, SyncPolicy::default())
                .unwrap();
        let stop_after = stop.filter(|stop| stop.0 == rank).map_or(usize::MAX, |stop| stop.1);
        let Some((mut link, _)) = joined else {
            let mut link = RemoteLink::new(comm);
            let done = work(&mut link, &mut journal, stop_after, step);
            link.close().unwrap();
            return (None, done);
        };
        let done = work(&mut link, &mut journal, stop_after, step);
        let _ = link.close();
        (Some(link.finish(&|| false)), done)
    });
    let (outcomes, done): (Vec<_>, Vec<_>) = by_rank.into_iter().unzip();
    (outcomes.into_iter().flatten().next().expect("rank 0's"), done.concat())
}

fn output(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("out.jsonl")).unwrap_or_default()
}

fn sorted(mut indices: Vec<u64>) -> Vec<u64> {
    indices.sort_unstable();
    indices
}

/// One rank needs no messages; many share the records; the output is the same.
#[test]
fn any_number_of_ranks_gives_the_same_ordered_output() {
    let expected: String = (0..300).map(line).collect();
    for ranks in 1..=4 {
        let folder = tempfile::tempdir().unwrap();
        let (outcome, done) = launch(folder.path(), ranks, || records(300), None);
        assert_eq!(outcome.unwrap(), Some(OutputCounts { records: 300, errors: 30 }));
        assert!(sorted(done).into_iter().eq(0..300), "each record once");
        assert_eq!(output(folder.path()), expected, "{ranks} ranks");
    }
}

#[test]
fn fewer_records_than_ranks_and_none_at_all_end_too() {
    for count in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let counts = launch(folder.path(), 4, || records(count), None).0.unwrap();
        assert_eq!(counts.map(|counts| counts.records), Some(count));
    }
}

/// A stop on any rank reaches all of them, and the output is not called complete. Later
/// launches, of any size, generate just what is missing; one too many generates nothing and
/// writes the output again.
#[test]
fn stopped_runs_are_finished_by_later_launches_and_nothing_is_done_twice() {
    const COUNT: u64 = 5000;
    let folder = tempfile::tempdir().unwrap();
    let expected: String = (0..COUNT).map(line).collect();
    let mut all = Vec::new();
    for (ranks, stopping) in [(3, 0), (3, 1), (1, 0), (4, 3)] {
        let stop = Some((stopping, 30));
        let (outcome, done) = launch(folder.path(), ranks, || records(COUNT), stop);
        assert_eq!(outcome.unwrap(), None);
        assert!(done.len() >= 30 && output(folder.path()).is_empty());
        all.extend(done);
    }
    let (outcome, done) = launch(folder.path(), 2, || records(COUNT), None);
    assert_eq!(outcome.unwrap(), Some(OutputCounts { records: COUNT, errors: COUNT / 10 }));
    all.extend(done);
    assert!(sorted(all).into_iter().eq(0..COUNT), "each record in one launch");
    assert_eq!(output(folder.path()), expected);

    std::fs::remove_file(folder.path().join("out.jsonl")).unwrap();
    let (outcome, done) = launch(folder.path(), 3, || records(COUNT), None);
    assert_eq!(outcome.unwrap(), Some(OutputCounts { records: COUNT, errors: COUNT / 10 }));
    assert_eq!((done.len(), output(folder.path())), (0, expected));
}

/// A reader that fails in the middle does not leave the other ranks waiting.
#[test]
fn a_failing_input_stops_every_rank_with_its_error() {
    let folder = tempfile::tempdir().unwrap();
    let source =
        || -> Source { Box::new(records(20).chain([Err(Error::fault("prompts.jsonl: gone"))])) };
    let error = launch(folder.path(), 3, source, None).0.unwrap_err();
    assert!(error.message.contains("gone"));
}

/// Jobs that start together, and one that comes late: every record is generated once, each
/// of them says how the whole run ended, and the output is that of one job. (How much each
/// does is a matter of the machine's load; the simulation holds it to account.)
#[test]
fn several_launches_share_a_run() {
    const COUNT: u64 = 1200;
    const STEP: Duration = Duration::from_millis(6);
    let folder = tempfile::tempdir().unwrap();
    let jobs: Vec<_> = std::thread::scope(|scope| {
        let start = |ranks| {
            let folder = folder.path();
            scope.spawn(move || launch_slowly(folder, ranks, || records(COUNT), None, STEP))
        };
        let mut jobs = vec![start(2), start(1), start(3)];
        std::thread::sleep(Duration::from_millis(300));
        jobs.push(start(2));
        jobs.into_iter().map(|job| job.join().unwrap()).collect()
    });
    for (outcome, _) in &jobs {
        let counts = OutputCounts { records: COUNT, errors: COUNT / 10 };
        assert_eq!(outcome.clone().unwrap(), Some(counts));
    }
    let all = jobs.into_iter().flat_map(|(_, done)| done).collect();
    assert!(sorted(all).into_iter().eq(0..COUNT), "each record once");
    let expected: String = (0..COUNT).map(line).collect();
    assert_eq!(output(folder.path()), expected);
    let errors = std::fs::read_to_string(folder.path().join("run/errors.jsonl")).unwrap();
    assert_eq!(errors.lines().count() as u64, COUNT / 10);
}
