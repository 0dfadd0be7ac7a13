//! Failures of one rank, over ranks that are threads: every rank comes back with the
//! same error. (Where one did not, these tests would not end.)

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
    let journal = dir.path().join("run/journal");
    std::fs::remove_file(journal.join("00001-00000.farm")).unwrap();
    std::fs::create_dir(journal.join("00002-00000.farm")).unwrap();
    for outcome in run(dir.path(), 2, &["--tensor-parallel", "2"]) {
        let error = outcome.unwrap_err();
        assert!(error.message.contains("00002-00000.farm"), "{error}");
    }
    std::fs::remove_dir(journal.join("00002-00000.farm")).unwrap();
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
