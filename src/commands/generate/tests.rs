//! Failures of one rank, over ranks that are threads: every rank comes back with the
//! same error. (Where one did not, these tests would not end.)

use std::os::unix::fs::symlink;
use std::path::Path;

use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};
use crate::comm::LocalComm;
use crate::slurm::JobEnv;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama_gqa");

#[rustfmt::skip] // A flag and its value stay together.
fn run(dir: &Path, ranks: usize, flags: &[&str]) -> Vec<Result<i32>> {
    let prompts = dir.join("prompts.jsonl");
    let records = (0..64).map(|i| format!("{{\"prompt_token_ids\":[{}]}}\n", i + 1));
    std::fs::write(&prompts, records.collect::<String>()).unwrap();
    let path = |name: &str| dir.join(name).display().to_string();
    let (prompts, output, run_dir) = (path("prompts.jsonl"), path("out.jsonl"), path("run"));
    let base = [
        "farm", "generate", "--quiet", "--no-stage", "--model", MODEL, "--prompts-file", &prompts,
        "--run-dir", &run_dir, "--max-new-tokens", "4", "--max-seq-len", "64",
        "--max-batch-size", "2",
    ];
    let to_file = ["--output", &output];
    let flags = flags.iter().chain(if flags.contains(&"--output") { &[][..] } else { &to_file });
    let cli = Cli::try_parse_from(base.iter().chain(flags)).unwrap();
    let Command::Generate(args) = cli.command else { panic!("generate") };
    let job = Job::generate(&args, &[]);
    LocalComm::run(ranks, |world| job.run(&Rank { world, job: JobEnv::default(), threads: 1 }))
}

#[test]
fn a_leader_that_cannot_begin_lets_its_followers_go() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("run")).unwrap();
    assert_eq!(run(dir.path(), 2, &["--tensor-parallel", "2"]), [Ok(0), Ok(0)]);
    let part = dir.path().join("run/parts/rank-00000.jsonl");
    std::fs::remove_file(&part).unwrap();
    std::fs::create_dir(&part).unwrap();
    for outcome in run(dir.path(), 2, &["--tensor-parallel", "2"]) {
        let error = outcome.unwrap_err();
        assert!(error.message.contains("rank-00000.jsonl"), "{error}");
    }
}

#[test]
fn a_worker_whose_disk_is_full_is_not_taken_for_an_interruption() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(dir.path(), 2, &[]), [Ok(0), Ok(0)]);
    for rank in 0..2 {
        let part = dir.path().join(format!("run/parts/rank-0000{rank}.jsonl"));
        let _ = std::fs::remove_file(&part);
        if rank == 1 && symlink("/dev/full", &part).is_err() {
            return;
        }
    }
    for outcome in run(dir.path(), 2, &[]) {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Fault, "{error}");
        assert!(error.message.contains("rank-00001.jsonl"), "{error}");
    }
    std::fs::remove_file(dir.path().join("run/parts/rank-00001.jsonl")).unwrap();
    assert_eq!(run(dir.path(), 1, &[]), [Ok(0)], "the same command goes on");
    let lines = std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 64);
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = dir.path().join("prompts.jsonl").display().to_string();
    let folder = dir.path().display().to_string();
    for (output, reason) in [(&prompts, "the prompts file"), (&folder, "is a directory")] {
        let outcomes = run(dir.path(), 2, &["--output", output]);
        for outcome in outcomes {
            let error = outcome.unwrap_err();
            assert!(error.message.contains(reason), "{error}");
        }
    }
}
