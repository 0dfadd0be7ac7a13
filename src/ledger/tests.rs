//! The whole ledger on threads as ranks: hand-out, messages, part files, output, resume.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::coordinator::Source;
use super::*;
use crate::comm::LocalComm;
use crate::prompts::{RawBody, RawRecord};
use crate::{Error, Result};

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
fn work(link: &mut dyn WorkerLink, part: &mut dyn RecordSink, stop_after: usize) -> Vec<u64> {
    const SLOTS: usize = 4;
    let start = Instant::now();
    let (mut waiting, mut running, mut done) = (Vec::new(), Vec::new(), Vec::new());
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
            && let Some(record) = waiting.pop()
        {
            running.push(record);
        }
        let Some(record) = running.pop() else {
            if link.state() == LinkState::Finished {
                return done;
            }
            link.wait(Duration::from_millis(20));
            continue;
        };
        let (index, is_error) = (record.index, record.index % 10 == 3);
        let line = line(index).into_bytes();
        part.append(index, &line, is_error).unwrap();
        part.flush().unwrap();
        link.submit(Finished { index, line, is_error, cost: 1.0, new_tokens: 1 });
        done.push(index);
        if done.len() == stop_after {
            link.request_stop();
        }
    }
}

/// One launch on `ranks` ranks: rank 0's outcome, and what was worked on by all ranks.
/// `stop` is a rank and after how many records it asks for a drain.
fn launch(
    folder: &Path,
    ranks: usize,
    source: impl Fn() -> Source + Sync,
    stop: Option<(usize, usize)>,
) -> (Result<Option<OutputCounts>>, Vec<u64>) {
    let run = folder.join("run");
    let identity = RunIdentity {
        command: "generate".into(),
        prompts: json!("p"),
        model: "m".into(),
        adapter: None,
        sampling: json!({}),
    };
    let this_launch = Launch {
        farm_version: "0.1.0".into(),
        kernel_tier: "scalar".into(),
        slurm_job_id: None,
        ranks,
        host: "node1".into(),
        started_unix_seconds: 1,
    };
    let by_rank = LocalComm::run(ranks, |comm| {
        let rank = comm.rank();
        let run_dir = (rank == 0)
            .then(|| RunDir::open(&run, &identity, this_launch.clone(), ExistingRun::Resume));
        let run_dir = run_dir.transpose().unwrap();
        let stored = run_dir.as_ref().map(|run_dir| run_dir.stored().unwrap());
        comm.barrier();
        let mut part = PartWriter::open(&RunDir::parts_of(&run), rank).unwrap();
        let stop_after = stop.filter(|stop| stop.0 == rank).map_or(usize::MAX, |stop| stop.1);
        let (Some(run_dir), Some(stored)) = (run_dir, stored) else {
            let mut link = RemoteLink::new(comm);
            let done = work(&mut link, &mut part, stop_after);
            link.close().unwrap();
            return (None, done);
        };
        let handout = Handout::new(HandoutConfig::for_workers(ranks), ranks, stored.indices());
        let target = OutputTarget::File(folder.join("out.jsonl"));
        let output = OrderedOutput::create(target, &run_dir.spill(), 1000).unwrap();
        let output = output.with_stored(stored);
        let cost = Box::new(|_: &RawRecord| 1.0);
        let mut link = Coordinator::new(comm, handout, source(), cost, output);
        let done = work(&mut link, &mut part, stop_after);
        let _ = link.close();
        (Some(link.finish()), done)
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
