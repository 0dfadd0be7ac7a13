//! Runs that are killed, stopped, repeated and mixed up: no record is lost, none is
//! generated twice, and the output is that of a run that nothing disturbed.

use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;

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
    let finished = farm.done();
    assert!(running.reaches(|| farm.done() >= finished + 8), "it ended too early");
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

/// Every record stands in the journals, once.
#[track_caller]
fn each_record_once(farm: &Farm) {
    let journals = farm.journals();
    assert_eq!((journals.done().len(), journals.duplicates()), (RECORDS as u64, 0));
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
    let finished = farm.done();
    farm.ends_with(0);
    assert!(farm.output() == expected.output());
    let stats = farm.stats();
    assert!(stats["records_resumed"].as_u64() >= Some(finished));
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

/// A journal may end in the middle of a record: what the kernel had not yet written.
#[test]
fn a_torn_record_is_generated_again() {
    let scratch = Scratch::new();
    let farm = long_run(&scratch, "run", Launch::Threads(2)).prompts(prompts(&scratch));
    farm.ends_with(0);
    let expected = farm.output();
    let journal = farm.run_dir().join("journal/00001-00000.farm");
    let mut bytes = fs::read(&journal).expect("a journal");
    bytes.truncate(bytes.len() - 10);
    fs::write(&journal, bytes).expect("a shorter journal");
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
        let (expected, stats) = (farm.output(), farm.stats());
        fs::write(farm.out(), "something else").expect("the output");
        // The failed record is still one.
        let ended = farm.clone().args(["--resume"]).ends_with(4);
        for word in ["all 2 records were done before", "1 of 2 records failed", "errors.jsonl"] {
            assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
        }
        let retry = format!("farm retry {}", farm.run_dir().display());
        assert!(ended.stderr.contains(&retry), "{}", ended.stderr);
        assert_eq!(farm.output(), expected, "{launch:?}");
        assert_eq!(farm.journals().duplicates(), 0, "{launch:?}");
        assert_eq!(farm.stats(), stats, "the figures of the work stay");
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
    assert!(farm.run_dir().join("set-aside-1/journal").is_dir());
    assert_eq!(farm.stats()["records"], 1);
    sampled.ends_with(0);
    farm.ends_with(3);
}

/// A saved text goes on where it was: the drain costs no token, and the end is the same.
#[test]
fn what_is_unfinished_at_a_signal_goes_on_from_its_tokens() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch);
    let sampled = ["--repetition-penalty", "1.2", "--logprobs", "2", "--return-token-ids"];
    let run = |name: &str| long_run(&scratch, name, Launch::Alone).prompts(&prompts).args(sampled);
    let (expected, farm) = (run("undisturbed"), run("disturbed"));
    expected.ends_with(0);
    let mut tokens = 0;
    for _ in 0..3 {
        disturbed(&farm, Some(Signal::USR1)).expect("an end").with_code(75);
        assert!(farm.journals().saved_records() > 0);
        tokens += decoded(&farm);
    }
    farm.ends_with(0);
    assert!(farm.output() == expected.output());
    tokens += decoded(&farm);
    let whole = decoded(&expected);
    assert!(tokens <= whole, "{tokens} tokens decoded, {whole} without the drains");
    each_record_once(&farm);
}

/// Rows that the only rank of the last launch decoded.
fn decoded(farm: &Farm) -> u64 {
    let csv = fs::read_to_string(farm.run_dir().join("ranks.csv")).expect("ranks.csv");
    let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let (names, values) = (lines.next().expect("names"), lines.next().expect("a rank"));
    let column = names.iter().position(|name| *name == "decode_tokens").expect("the column");
    values[column].parse().expect("a count")
}

/// Equal prompts are records of their own, with draws of their own that a resume keeps.
#[test]
fn ten_equal_prompts_are_ten_records() {
    let scratch = Scratch::new();
    let file = scratch.file("prompts.txt", "The cat\n".repeat(10));
    let run = |name: &str| {
        let farm = scratch.farm(name, Launch::Alone, "generate").model(golden("llama_gqa"));
        farm.prompts(&file).args(["--temperature", "0.8", "--max-new-tokens", "300"])
    };
    let (expected, farm) = (run("undisturbed"), run("disturbed").args(["--max-batch-size", "2"]));
    expected.ends_with(0);
    let records = expected.records();
    let texts: std::collections::HashSet<_> = records.iter().map(|r| &r["text"]).collect();
    assert_eq!(records.len(), 10);
    assert!(texts.len() > 1, "ten times the same text");
    let mut running = farm.start();
    assert!(running.reaches(|| farm.done() >= 2), "it ended too early");
    running.kill_all();
    farm.ends_with(0);
    assert!(farm.output() == expected.output());
    assert_eq!((farm.journals().done().len(), farm.journals().duplicates()), (10, 0));
}

/// Two jobs on one run directory share its records; both say how it ended.
#[test]
fn jobs_on_one_run_share_its_records() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch);
    let slow = |name: &str| long_run(&scratch, name, Launch::Alone).flag("--max-batch-size", "1");
    let (expected, farm) = (slow("undisturbed").prompts(&prompts), slow("run").prompts(&prompts));
    expected.ends_with(0);
    let mut first = farm.start();
    assert!(first.reaches(|| farm.done() > 0), "it ended too early");
    let status = Farm::plain(["status", "--json"]).arg(farm.run_dir()).output().expect("farm");
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["working"].as_array().map(Vec::len), Some(1), "{status}");
    let mut killed = farm.start();
    let joined = || farm.run_dir().join("journal/00002-00000.farm").exists();
    assert!(killed.reaches(joined), "the second job has no part in the run");
    let third = farm.start();
    killed.kill_all();
    third.wait().with_code(0);
    first.wait().with_code(0);
    assert!(farm.output() == expected.output());
    each_record_once(&farm);
    let by_launch = farm.journals().launches();
    assert!([1, 3].iter().all(|launch| by_launch[launch].finished > 0), "{by_launch:?}");
    let status = Farm::plain(["status"]).arg(farm.run_dir()).output().expect("farm");
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("120 of 120") && status.contains("complete"), "{status}");
}

/// A job that would only wait for others leaves where it is told to.
#[test]
fn no_wait_leaves_the_rest_to_the_others() {
    let scratch = Scratch::new();
    let file = scratch.file("prompts.txt", "The cat\nThe dog\n");
    let farm = scratch.farm("run", Launch::Alone, "generate").model(golden("llama_gqa"));
    let farm = farm.prompts(&file).args(["--ignore-eos", "--max-new-tokens", "500"]);
    let mut first = farm.start();
    let begun = || farm.run_dir().join("claims/block-00000000.0001").exists();
    assert!(first.reaches(begun), "it ended too early");
    let second = farm.clone().args(["--no-wait"]).ends_with(75);
    assert!(second.stderr.contains("the same command goes on"), "{}", second.stderr);
    first.wait().with_code(0);
    assert_eq!(farm.records().len(), 2);
}

/// The end of the job's time is a signal that nobody has to send.
#[test]
fn a_time_limit_drains_the_run() {
    let scratch = Scratch::new();
    let farm = long_run(&scratch, "run", Launch::Threads(2)).prompts(prompts(&scratch));
    let limited = farm.clone().args(["--time-limit", "2s"]);
    let ended = limited.ends_with(75);
    assert!(ended.stderr.contains("the same command goes on"), "{}", ended.stderr);
    assert!(!is_complete(&farm) && farm.done() > 0);
    farm.ends_with(0);
    each_record_once(&farm);
}

/// The failed records again, and only those, with the run's own flags.
#[test]
fn retry_works_on_the_failed_records() {
    let scratch = Scratch::new();
    let model = scratch.model("llama_gqa");
    let lines = "{\"prompt\":\"The cat\"}\nnot json\n{\"prompt\":\"The dog\"}\n";
    let file = scratch.file("prompts.jsonl", lines);
    for launch in Launch::all(&[2], &[2]) {
        let name = format!("{launch:?}");
        let farm = scratch.farm(&name, launch, "generate").model(&model).prompts(&file);
        let farm = farm.args(["--max-new-tokens", "9", "--seed", "3"]);
        farm.ends_with(4);
        let expected = farm.output();
        let errors = || fs::read_to_string(farm.run_dir().join("errors.jsonl")).expect("errors");
        assert_eq!(errors().lines().count(), 1);
        fs::remove_file(farm.out()).expect("the output");
        farm.retry().ends_with(4);
        assert_eq!(farm.stats()["records"], 1, "the bad line alone");
        assert!(farm.output() == expected && errors().lines().count() == 1);
        let journals = farm.journals();
        assert_eq!((journals.done().len(), journals.duplicates(), journals.attempt(1)), (3, 0, 1));
    }
    let nothing = Farm::plain(["retry"]).arg(scratch.path("nothing")).output().expect("farm");
    assert_eq!(nothing.status.code(), Some(3));
}

/// Two retries at once share the failed records and do not wait for each other for ever.
#[test]
fn two_retries_at_once_come_to_an_end() {
    let scratch = Scratch::new();
    let lines: String = (0..400)
        .map(|i| if i % 2 == 0 { "not json\n".into() } else { format!("{{\"prompt\":\"{i}\"}}\n") })
        .collect();
    let file = scratch.file("prompts.jsonl", lines);
    let farm = scratch.farm("run", Launch::Alone, "generate").model(golden("llama_gqa"));
    let farm = farm.prompts(&file).args(["--max-new-tokens", "2"]);
    farm.ends_with(4);
    let expected = farm.output();
    let retries: Vec<_> = (0..3).map(|_| farm.retry().start()).collect();
    retries.into_iter().for_each(|retry| drop(retry.wait().with_code(4)));
    assert!(farm.output() == expected);
}

/// Who has no output file gets all records on standard output, whoever generated them.
#[test]
fn every_job_without_an_output_file_prints_all_records() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch);
    let expected = long_run(&scratch, "undisturbed", Launch::Alone).prompts(&prompts);
    expected.ends_with(0);
    let farm = long_run(&scratch, "run", Launch::Alone).prompts(&prompts).without("--output");
    let jobs: Vec<_> = (0..3).map(|_| farm.start()).collect();
    for job in jobs {
        assert!(job.wait().with_code(0).stdout == expected.output());
    }
    each_record_once(&farm);
}

/// Jobs that end at the same moment, and some that find all done, all leave with success.
#[test]
fn jobs_that_end_together_do_not_disturb_each_other() {
    let scratch = Scratch::new();
    let file = scratch.file("prompts.txt", "The cat\nOnce\n".repeat(20));
    let farm = scratch.farm("run", Launch::Alone, "generate").model(golden("llama_gqa"));
    let farm = farm.prompts(&file).args(["--max-new-tokens", "3", "--quiet"]);
    for _ in 0..3 {
        let jobs: Vec<_> = (0..6).map(|_| farm.start()).collect();
        jobs.into_iter().for_each(|job| drop(job.wait().with_code(0)));
    }
    assert_eq!((farm.records().len(), farm.journals().duplicates()), (40, 0));
    let left: Vec<_> = std::fs::read_dir(farm.out().parent().expect("a folder"))
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| name.contains("out.jsonl."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A file system of its own for a folder, for as long as the test takes.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this user may not mount.
    fn mount(folder: PathBuf, kilobytes: usize) -> Option<Self> {
        fs::create_dir_all(&folder).expect("a folder");
        Self::call(&["mount", "-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"], &folder)
            .then_some(Self(folder))
    }

    fn resize(&self, kilobytes: usize) {
        let option = format!("remount,size={kilobytes}k");
        assert!(Self::call(&["mount", "-o", &option], &self.0));
    }

    fn read_only(&self) {
        assert!(Self::call(&["mount", "-o", "remount,ro"], &self.0));
    }

    fn call(words: &[&str], folder: &std::path::Path) -> bool {
        let mut command = std::process::Command::new(words[0]);
        command.args(&words[1..]).arg(folder).output().is_ok_and(|out| out.status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Self::call(&["umount", "-l"], &self.0);
    }
}

/// A disk that fills up in the middle: a message, exit code 1, and nothing is lost.
#[test]
fn a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room() {
    let scratch = Scratch::new();
    let prompts = prompts(&scratch);
    let expected = long_run(&scratch, "undisturbed", Launch::Alone).prompts(&prompts);
    expected.ends_with(0);
    for launch in Launch::all(&[2], &[2]) {
        let farm = long_run(&scratch, &format!("{launch:?}"), launch).prompts(&prompts);
        let Some(disk) = SmallDisk::mount(farm.run_dir(), 160) else {
            println!("skipped: this user may not mount a file system");
            return;
        };
        let ended = farm.ends_with(1);
        let message = "No space left on device";
        assert!(ended.stderr.contains(message), "{launch:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(&farm.run_dir().display().to_string()), "{}", ended.stderr);
        assert!(!is_complete(&farm) && farm.done() > 0);
        let kept = farm.done();
        farm.ends_with(1);
        disk.resize(100_000);
        farm.ends_with(0);
        assert!(farm.output() == expected.output(), "{launch:?}");
        each_record_once(&farm);
        assert!(farm.stats()["records"].as_u64() <= Some(RECORDS as u64 - kept));
    }
}

#[test]
fn a_read_only_run_directory_is_refused_with_its_name() {
    let scratch = Scratch::new();
    let farm = long_run(&scratch, "run", Launch::Alone).prompts(prompts(&scratch));
    let Some(disk) = SmallDisk::mount(farm.run_dir(), 10_000) else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    disk.read_only();
    let ended = farm.start().wait();
    assert!(matches!(ended.code, Some(1 | 3)), "{}", ended.stderr);
    assert!(ended.stderr.contains("Read-only file system"), "{}", ended.stderr);
}

/// Somebody moves the run directory away under a running job.
#[test]
fn a_vanished_run_directory_ends_the_run() {
    let scratch = Scratch::new();
    let farm = long_run(&scratch, "run", Launch::Threads(2)).prompts(prompts(&scratch));
    let farm = farm.args(["--heartbeat-timeout", "4"]);
    let mut running = farm.start();
    assert!(running.reaches(|| farm.done() >= 4), "it ended too early");
    let moved = scratch.path("moved");
    fs::rename(farm.run_dir(), &moved).expect("a rename");
    let ended = running.wait().with_code(1);
    assert!(ended.stderr.contains("vanished"), "{}", ended.stderr);
    fs::rename(&moved, farm.run_dir()).expect("a rename");
    farm.ends_with(0);
    each_record_once(&farm);
}
