//! farm as its users start it: a command line, a folder for what it leaves, its results.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use farm::ledger::{Journals, RunDir, RunFile};
use serde_json::Value;
use tempfile::TempDir;

use super::{Ended, Running, has_mpirun, mpirun, without_launcher};

/// How farm is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launch {
    /// Without a launcher.
    Alone,
    /// `--local-ranks N`.
    Threads(usize),
    /// `mpirun -n N`.
    Mpirun(usize),
}

impl Launch {
    /// One rank, and these numbers of ranks by each way to start that this machine has.
    pub fn all(threads: &[usize], processes: &[usize]) -> Vec<Self> {
        let threads = threads.iter().map(|&n| Self::Threads(n));
        let processes: &[usize] = if has_mpirun() { processes } else { &[] };
        let processes = processes.iter().map(|&n| Self::Mpirun(n));
        [Self::Alone].into_iter().chain(threads).chain(processes).collect()
    }
}

/// A folder that goes with the test.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("a scratch file");
        path
    }

    /// A farm whose output, run directory and staged copies lie in a folder `name`.
    pub fn farm(&self, name: &str, launch: Launch, subcommand: &str) -> Farm {
        Farm::new(self.path(name), launch, subcommand)
    }

    /// A copy of the golden model `case` that a test may damage.
    pub fn model(&self, case: &str) -> PathBuf {
        let copy = self.path("model");
        fs::create_dir(&copy).expect("a folder for the model");
        for entry in fs::read_dir(golden(case)).expect("a golden model") {
            let entry = entry.expect("a golden model");
            fs::copy(entry.path(), copy.join(entry.file_name())).expect("a copy");
        }
        copy
    }
}

/// A tiny random model of tests/golden.
pub fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// A command line of farm, and where its results are.
#[derive(Clone)]
pub struct Farm {
    folder: PathBuf,
    launch: Launch,
    args: Vec<OsString>,
}

impl Farm {
    fn new(folder: PathBuf, launch: Launch, subcommand: &str) -> Self {
        let mut farm = Self { folder, launch, args: vec![subcommand.into()] };
        if let Launch::Threads(ranks) = launch {
            farm = farm.args(["--local-ranks", &ranks.to_string()]);
        }
        let (out, run, stage) = (farm.out(), farm.run_dir(), farm.stage_dir());
        farm.flag("--output", &out).flag("--run-dir", &run).flag("--stage-dir", &stage)
    }

    /// farm itself, without a launcher.
    pub fn plain(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = without_launcher(Command::new(env!("CARGO_BIN_EXE_farm")));
        command.args(args);
        command
    }

    /// `farm retry` of this run, started alike.
    pub fn retry(&self) -> Self {
        let mut retry = Self { args: vec!["retry".into()], ..self.clone() };
        retry.args.push(self.run_dir().into());
        retry.launched(self.launch).flag("--stage-dir", self.stage_dir())
    }

    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Gives `flag` this value, in place of one that it has.
    pub fn flag(mut self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self = self.without(flag);
        self.args([flag.as_ref(), value.as_ref()])
    }

    /// Takes `flag` and its value back.
    pub fn without(mut self, flag: &str) -> Self {
        if let Some(place) = self.args.iter().position(|arg| arg == flag) {
            self.args.drain(place..place + 2);
        }
        self
    }

    pub fn model(self, model: impl AsRef<Path>) -> Self {
        self.flag("--model", model.as_ref())
    }

    pub fn prompts(self, file: impl AsRef<Path>) -> Self {
        self.flag("--prompts-file", file.as_ref())
    }

    /// The same, started otherwise.
    pub fn launched(mut self, launch: Launch) -> Self {
        self = self.without("--local-ranks");
        self.launch = launch;
        match launch {
            Launch::Threads(ranks) => self.args(["--local-ranks", &ranks.to_string()]),
            _ => self,
        }
    }

    pub fn out(&self) -> PathBuf {
        self.folder.join("out.jsonl")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    pub fn stage_dir(&self) -> PathBuf {
        self.folder.join("stage")
    }

    pub fn command(&self) -> Command {
        let farm = env!("CARGO_BIN_EXE_farm");
        let mut command = match self.launch {
            Launch::Mpirun(ranks) => {
                let mut command = mpirun(ranks);
                command.arg(farm);
                command
            }
            _ => without_launcher(Command::new(farm)),
        };
        command.args(&self.args);
        command
    }

    /// Starts it; see [`Running`].
    pub fn start(&self) -> Running {
        Running::start(&mut self.command(), b"")
    }

    /// Runs it to its end, which must be with exit code `code`.
    #[track_caller]
    pub fn ends_with(&self, code: i32) -> Ended {
        let ended = self.start().wait();
        assert_eq!(ended.code, Some(code), "{:?} {:?}\n{}", self.launch, self.args, ended.stderr);
        ended
    }

    /// The bytes of `--output`.
    #[track_caller]
    pub fn output(&self) -> Vec<u8> {
        let path = self.out();
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The records of `--output`.
    #[track_caller]
    pub fn records(&self) -> Vec<Value> {
        records(&self.output())
    }

    /// `stats.json`.
    #[track_caller]
    pub fn stats(&self) -> Value {
        let text = fs::read(self.run_dir().join("stats.json")).expect("stats.json");
        serde_json::from_slice(&text).expect("stats.json is JSON")
    }

    /// What the journals hold now.
    pub fn journals(&self) -> Journals {
        let run_dir = self.run_dir();
        let key = RunFile::read(&run_dir).ok().flatten().map(|run| run.identity.short_key());
        let mut journals = Journals::new(&RunDir::journal_of(&run_dir), &key.unwrap_or_default());
        // There is no folder before the run has begun.
        let _ = journals.refresh();
        journals
    }

    /// Records that are done.
    pub fn done(&self) -> u64 {
        self.journals().done().len()
    }

    /// All files below the stage directory, as paths relative to it.
    pub fn staged_files(&self) -> Vec<PathBuf> {
        files_below(&self.stage_dir())
    }
}

/// A record a line.
#[track_caller]
pub fn records(lines: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(lines).expect("the output is UTF-8");
    assert!(text.is_empty() || text.ends_with('\n'), "a torn last line: {text}");
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

/// All files below `folder`.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let mut files: Vec<PathBuf> = entries
        .flat_map(|entry| match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => files_below(&entry.path()),
            false => vec![entry.path()],
        })
        .collect();
    files.sort();
    files
}
