//! Runs that are killed, stopped, repeated and mixed up: no record is lost, none is
//! generated twice, and the output is that of a run that nothing disturbed.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::json;

use crate::common::Ended;
use crate::common::farm::{Farm, Launch, Scratch, golden};

const RECORDS: usize = 120;

fn prompts(scratch: &Scratch) -> PathBuf {
    let lines: String = (0..RECORDS)
        .map(|i| format!("{{\"id\":\"r{i}\",\"prompt\":\"{i} cats and\"}}\n"))
        .collect();
    scratch.file("prompts.jsonl", lines)
}

/// A run long enough to be caught in its middle.
fn long_run(scratch: &Scratch, name: &str, launch: Launch) -> Farm {
    let farm = scratch.farm(name, launch, "generate").model(golden("llama_gqa"));
    farm.args(["--ignore-eos", "--max-new-tokens", "200", "--temperature", "0.7", "--seed", "3"])
        .args(["--max-batch-size", "4", "--quiet"])
}

/// Starts `farm` and does `then` to it once some records are finished; how it ended.
#[track_caller]
fn disturbed(farm: &Farm, signal: Option<Signal>) -> Option<Ended> {
    let mut running = farm.start();
    let finished = farm.parts().len();
    assert!(running.reaches(|| farm.parts().len() >= finished + 8), "it ended too early");
    match signal {
        Some(signal) => {
            running.signal(signal);
            Some(running.wait())
        }
        None => {
            running.kill_all();
            None
        }
    }
}

/// The record that a line of a part file (`crc index flag json`) is about.
fn index_of(line: &str) -> Option<usize> {
    line.split(' ').nth(1)?.parse().ok()
}

/// Every record stands in the part files, once.
#[track_caller]
fn each_record_once(farm: &Farm) {
    let parts = farm.parts();
    let indices: BTreeSet<usize> = parts.iter().filter_map(|line| index_of(line)).collect();
    assert_eq!((parts.len(), indices.len()), (RECORDS, RECORDS));
}

fn is_complete(farm: &Farm) -> bool {
    farm.out().exists()
}

#[test]
fn a_killed_run_goes_on_with_other_ranks_and_loses_nothing() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch);
    let expected = long_run(&scratch, "undisturbed", Launch::Alone).prompts(&prompts);
    expected.ends_with(0);
    let launches = Launch::all(&[2], &[2, 3]);
    let farm = long_run(&scratch, "killed", launches[0]).prompts(&prompts);
    // Killed once in each way to start, the most ranks first; then left to its end.
    for &launch in launches.iter().rev() {
        disturbed(&farm.clone().launched(launch), None);
        assert!(!is_complete(&farm));
    }
    let finished = farm.parts().len();
    farm.ends_with(0);
    assert!(farm.output() == expected.output());
    let stats = farm.stats();
    assert!(stats["records_resumed"].as_u64() >= Some(finished as u64 - launches.len() as u64));
    each_record_once(&farm);
    assert!(!farm.out().with_file_name("out.jsonl.partial").exists());
}

#[test]
fn a_signal_stops_the_run_and_the_same_command_completes_it() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch);
    let expected = long_run(&scratch, "undisturbed", Launch::Threads(2)).prompts(&prompts);
    expected.ends_with(0);
    // mpirun does not hand SIGTERM on in time: job templates send USR1.
    let mut ways = vec![
        (Launch::Alone, Signal::TERM),
        (Launch::Alone, Signal::USR1),
        (Launch::Threads(3), Signal::INT),
    ];
    ways.extend(Launch::all(&[], &[2, 3]).into_iter().skip(1).map(|l| (l, Signal::USR1)));
    for (number, (launch, signal)) in ways.into_iter().enumerate() {
        let farm = long_run(&scratch, &format!("run {number}"), launch).prompts(&prompts);
        let requeue = farm.clone().args(["--interrupted-exit-code", "99"]);
        for (farm, code) in [(&farm, 75), (&requeue, 99)] {
            let ended = disturbed(farm, Some(signal)).expect("an end");
            assert_eq!(ended.code, Some(code), "{launch:?} {signal:?}: {}", ended.stderr);
            assert!(ended.stderr.contains("the same command goes on"), "{}", ended.stderr);
            assert!(!is_complete(farm));
            assert_eq!(farm.stats()["complete"], false);
        }
        assert_eq!(farm.staged_files(), Vec::<PathBuf>::new(), "{launch:?} {signal:?}");
        farm.ends_with(0);
        assert!(farm.output() == expected.output(), "{launch:?} {signal:?}");
        each_record_once(&farm);
    }
}

/// A part file may end in the middle of a line: what the kernel had not yet written.
#[test]
fn a_torn_line_is_generated_again() {
    let scratch = Scratch::new();
    let farm = long_run(&scratch, "run", Launch::Threads(2)).prompts(prompts(&scratch));
    farm.ends_with(0);
    let expected = farm.output();
    let part = farm.run_dir().join("parts/rank-00000.jsonl");
    let mut bytes = fs::read(&part).expect("a part file");
    bytes.truncate(bytes.len() - 10);
    fs::write(&part, bytes).expect("a shorter part file");
    fs::remove_file(farm.out()).expect("the output");
    farm.ends_with(0);
    assert!(farm.output() == expected);
    assert_eq!(farm.stats()["records"], 1);
    each_record_once(&farm);
}

#[test]
fn a_complete_run_is_not_generated_again_but_written_again() {
    let scratch = Scratch::new();
    let file = scratch.file("prompts.jsonl", "{\"prompt\":\"The cat\"}\nnot json\n");
    for launch in Launch::all(&[2], &[2]) {
        let farm = scratch.farm(&format!("{launch:?}"), launch, "generate");
        let farm = farm.model(golden("llama_gqa")).prompts(&file).args(["--max-new-tokens", "9"]);
        farm.ends_with(4);
        let (expected, parts) = (farm.output(), farm.parts());
        fs::write(farm.out(), "something else").expect("the output");
        // The failed record is still one.
        farm.clone().args(["--resume"]).ends_with(4);
        assert_eq!(farm.output(), expected, "{launch:?}");
        assert_eq!(farm.parts(), parts, "{launch:?}");
        let stats = farm.stats();
        let figures = (&stats["records"], &stats["generated_tokens"], &stats["records_resumed"]);
        assert_eq!(figures, (&json!(0), &json!(0), &json!(2)), "{launch:?}");
    }
}

/// Records of two prompts files, models or samplings never meet in one output.
#[test]
fn another_run_in_the_same_directory_is_refused() {
    let scratch = Scratch::new();
    let file = scratch.file("prompts.txt", "The cat\n");
    let other = scratch.file("other.txt", "The dog\n");
    let farm = scratch.farm("run", Launch::Alone, "generate").model(golden("llama_gqa"));
    let farm = farm.prompts(&file).args(["--max-new-tokens", "5"]);
    farm.ends_with(0);
    let expected = farm.output();
    let score = scratch.farm("run", Launch::Alone, "score").model(golden("llama_gqa"));
    let others = [
        (farm.clone().prompts(&other), "prompts.digest"),
        (farm.clone().flag("--max-new-tokens", "6"), "max_new_tokens: 5 in the run, 6 now"),
        (farm.clone().flag("--temperature", "0.5"), "temperature"),
        (farm.clone().args(["--chat"]), "prompts.chat"),
        (farm.clone().model(golden("llama_tied")), "model"),
        (score.prompts(&file), "command: \"generate\" in the run, \"score\" now"),
    ];
    for (other, what) in &others {
        for launch in Launch::all(&[], &[2]) {
            let ended = other.clone().launched(launch).ends_with(3);
            assert!(ended.stderr.contains(what), "names {what}:\n{}", ended.stderr);
            assert_eq!(ended.stderr.matches("error:").count(), 1, "{}", ended.stderr);
        }
        assert_eq!(farm.output(), expected);
    }
    // --force-new sets the old run aside.
    let (sampled, _) = &others[2];
    sampled.clone().args(["--force-new"]).ends_with(0);
    assert!(farm.run_dir().join("set-aside-1/parts").is_dir());
    assert_eq!(farm.stats()["records"], 1);
    sampled.ends_with(0);
    farm.ends_with(3);
}

/// Two jobs on one run directory: the second is told who has it.
#[test]
fn a_run_that_is_in_use_is_refused() {
    let scratch = Scratch::new();
    let farm = long_run(&scratch, "run", Launch::Alone).prompts(prompts(&scratch));
    let mut first = farm.start();
    assert!(first.reaches(|| !farm.parts().is_empty()), "it ended too early");
    let second = farm.ends_with(3);
    assert!(second.stderr.contains("in use by process"), "{}", second.stderr);
    first.wait().with_code(0);
    each_record_once(&farm);
}
