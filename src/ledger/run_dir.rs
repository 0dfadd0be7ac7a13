//! The run directory: what ties finished records to one prompts file, model and sampling.
//!
//! ```text
//! run.json       the identity, written once by the launch that begins the run
//! journal/       finished and saved records, a file a rank a launch (see `journal`)
//! claims/        which launch works on which records (see `claims`)
//! errors.jsonl   the error records; output.jsonl where `--output` says so
//! stats.json, ranks.csv, events.jsonl   of the last launch
//! ```
//!
//! The same command finds its directory again and goes on, at any time and from any
//! number of jobs; a command that would give other records is refused.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files::create_file;
use crate::{Error, Result};

/// Version of `run.json`'s form and of the directory's layout.
const FORMAT: u32 = 2;

/// What decides the records: a run goes on only where all of it is the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// `generate`, `score`.
    pub command: String,
    /// The prompts file's content (a hash) and how it is read (format, column, chat).
    pub prompts: Value,
    /// Key of the model's manifest.
    pub model: String,
    /// Hashes of the adapters' files by their names, if there are any.
    pub adapter: Value,
    /// Resolved sampling parameters and what else shapes a record (dtype, length limit).
    pub sampling: Value,
}

impl RunIdentity {
    /// Eight hex digits that name the run's default directory.
    pub fn short_key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, value) in leaves(self) {
            for part in [name, value] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part.as_bytes());
            }
        }
        hasher.finalize().to_hex()[..8].to_owned()
    }

    /// A line for each field in which `recorded` differs.
    fn differences(&self, recorded: &Self) -> Vec<String> {
        let (ours, theirs) = (leaves(self), leaves(recorded));
        let value = |fields: &[(String, String)], name: &str| {
            let field = fields.iter().find(|field| field.0 == name);
            field.map_or("nothing".to_owned(), |field| field.1.clone())
        };
        let mut names: Vec<_> = ours.iter().chain(&theirs).map(|field| &field.0).collect();
        names.sort();
        names.dedup();
        names
            .into_iter()
            .map(|name| (name, value(&theirs, name), value(&ours, name)))
            .filter(|(_, theirs, ours)| theirs != ours)
            .map(|(name, theirs, ours)| format!("  {name}: {theirs} in the run, {ours} now"))
            .collect()
    }
}

/// The scalars of an identity with their dotted names, sorted.
fn leaves(identity: &RunIdentity) -> Vec<(String, String)> {
    fn walk(name: String, value: &Value, out: &mut Vec<(String, String)>) {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                let dot = if name.is_empty() { "" } else { "." };
                fields
                    .iter()
                    .for_each(|(key, value)| walk(format!("{name}{dot}{key}"), value, out));
            }
            other => out.push((name, other.to_string())),
        }
    }
    let mut out = Vec::new();
    let value = serde_json::to_value(identity).unwrap_or(Value::Null);
    walk(String::new(), &value, &mut out);
    out.sort();
    out
}

/// One start of farm on the run. Recorded, not compared: other launches may differ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// farm's version.
    pub farm_version: String,
    /// The CPU kernels' tier (all give the same bits).
    pub kernel_tier: String,
    /// Kinds of what the ranks compute on: `cpu`, `cuda`. Between kinds floating point differs.
    #[serde(default = "cpu")]
    pub device_kinds: String,
    /// The devices: `4 × NVIDIA H200`.
    #[serde(default = "cpu")]
    pub devices: String,
    /// Slurm's job id.
    pub slurm_job_id: Option<String>,
    /// Number of ranks.
    pub ranks: usize,
    /// Host of rank 0.
    pub host: String,
    /// Seconds since 1970.
    pub started_unix_seconds: u64,
}

/// What launches before there were devices computed on.
fn cpu() -> String {
    "cpu".to_owned()
}

/// `run.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunFile {
    /// Version of the form.
    pub format: u32,
    /// What decides the records.
    pub identity: RunIdentity,
    /// The prompts file as the first launch named it: error records show it.
    pub prompts_name: String,
    /// Records in a claim block.
    pub claim_records: u64,
    /// The launch that began the run.
    pub created: Launch,
    /// Its flags, resolved, with absolute paths: what `farm retry` starts again.
    pub arguments: Vec<String>,
    /// What a newer farm of the same format wrote.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl RunFile {
    /// A run that begins now.
    pub fn new(
        identity: RunIdentity,
        prompts_name: String,
        claim_records: u64,
        created: Launch,
        arguments: Vec<String>,
    ) -> Self {
        let (format, rest) = (FORMAT, Map::new());
        Self { format, identity, prompts_name, claim_records, created, arguments, rest }
    }

    /// Reads `run.json` of the run directory at `path`; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not one of this farm's.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        const HELP: &str = "give another --run-dir, or --force-new to set it aside";
        let name = path.join("run.json");
        let bytes = match fs::read(&name) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&name, error)),
        };
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let broken = |error| {
            Error::input(format!("{}: not a run of farm ({error}); {HELP}", name.display()))
        };
        let Version { format } = serde_json::from_slice(&bytes).map_err(broken)?;
        if format != FORMAT {
            return Err(Error::input(format!(
                "{}: format {format}, but this farm reads {FORMAT}; {HELP}",
                name.display()
            )));
        }
        let run: Self = serde_json::from_slice(&bytes).map_err(broken)?;
        if run.claim_records == 0 {
            return Err(Error::input(format!("{}: claim_records is 0; {HELP}", name.display())));
        }
        Ok(Some(run))
    }

    /// Whether this is the run that `identity` means.
    ///
    /// # Errors
    /// An input error that shows what differs.
    pub fn check_same(&self, path: &Path, identity: &RunIdentity) -> Result<()> {
        let differences = identity.differences(&self.identity);
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::input(format!(
            "the run in {} is another one:\n{}\nGive another --run-dir, or --force-new to set \
             that run aside and begin anew",
            path.display(),
            differences.join("\n")
        )))
    }
}

/// What to do where the directory holds a run already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExistingRun {
    /// Go on if it is the same run (the default, and `--resume`).
    Resume,
    /// Set it aside and begin anew (`--force-new`). Not while a launch works on it: see
    /// [`look`](crate::ledger::membership::look).
    SetAside,
}

/// An open run directory. Rank 0 has it; the other ranks need only
/// [`RunDir::journal_of`] its path.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    run: RunFile,
    resumed: bool,
}

/// `farm-runs/<stem>-<short key>` beside the output, or here if there is no output file.
pub fn default_path(output: Option<&Path>, prompts_stem: &str, short_key: &str) -> PathBuf {
    let folder = output.and_then(Path::parent).unwrap_or(Path::new(""));
    folder.join("farm-runs").join(format!("{prompts_stem}-{short_key}"))
}

impl RunDir {
    /// Begins the run `new`, or goes on with the same one where the directory holds it. Call
    /// on rank 0 only, then agree.
    ///
    /// # Errors
    /// An input error if it is another run or is damaged.
    pub fn open(path: &Path, new: RunFile, existing: ExistingRun) -> Result<Self> {
        let refused = |error| Error::input(format!("--run-dir {}: {error}", path.display()));
        fs::create_dir_all(path).map_err(refused)?;
        if existing == ExistingRun::SetAside {
            set_aside(path)?;
        }
        if let Some(run) = RunFile::read(path)? {
            return Self::go_on(path, run, &new.identity);
        }
        let journal = Self::journal_of(path);
        if journal.exists() {
            // Another job may have begun the run just now; an NFS client asks the server again
            // once the directory has been opened.
            let _ = fs::read_dir(path);
            if let Some(run) = RunFile::read(path)? {
                return Self::go_on(path, run, &new.identity);
            }
            return Err(Error::input(format!(
                "{} holds finished records but its run.json is gone: give another --run-dir, or \
                 --force-new to set them aside",
                path.display()
            )));
        }
        let text = serde_json::to_vec_pretty(&new).map_err(Error::fault)?;
        // run.json first: a journal without it is taken for another run's. Of jobs that start
        // at the same time one writes it.
        let is_first = create_file(&path.join("run.json"), &text)?;
        if !is_first {
            let run = RunFile::read(path)?.ok_or_else(|| {
                Error::fault(format!("{}: run.json is there and is not", path.display()))
            })?;
            return Self::go_on(path, run, &new.identity);
        }
        fs::create_dir_all(&journal).map_err(refused)?;
        Ok(Self { path: path.to_owned(), run: new, resumed: false })
    }

    fn go_on(path: &Path, run: RunFile, identity: &RunIdentity) -> Result<Self> {
        run.check_same(path, identity)?;
        let journal = Self::journal_of(path);
        fs::create_dir_all(&journal).map_err(|error| Error::io(&journal, error))?;
        Ok(Self { path: path.to_owned(), run, resumed: true })
    }

    /// The folder of journals of the run at `path`, for every rank.
    pub fn journal_of(path: &Path) -> PathBuf {
        path.join("journal")
    }

    /// The folder of claims of the run at `path`.
    pub fn claims_of(path: &Path) -> PathBuf {
        path.join("claims")
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `run.json`.
    pub fn file(&self) -> &RunFile {
        &self.run
    }

    /// Whether an earlier launch began this run.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// When the run's first launch began, in seconds since 1970: the same for all launches.
    pub fn started_unix_seconds(&self) -> u64 {
        self.run.created.started_unix_seconds
    }
}

/// Moves what the last run left into `set-aside-N/`; a kill in between loses nothing.
fn set_aside(path: &Path) -> Result<()> {
    // run.json goes last: while it is there the directory is still the old run.
    let names = [
        "journal",
        "parts",
        "claims",
        "errors.jsonl",
        "stats.json",
        "ranks.csv",
        "events.jsonl",
        "stdin",
        "run.json",
    ];
    if !names.iter().any(|name| path.join(name).exists()) {
        return Ok(());
    }
    let folder = (1..).map(|n: u64| path.join(format!("set-aside-{n}"))).find(|f| !f.exists());
    let folder = folder.unwrap_or_else(|| path.join("set-aside"));
    fs::create_dir(&folder).map_err(|error| Error::io(&folder, error))?;
    for name in names {
        match fs::rename(path.join(name), folder.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&path.join(name), error));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn identity() -> RunIdentity {
        RunIdentity {
            command: "generate".into(),
            prompts: json!({"hash": "abc", "format": "jsonl"}),
            model: "m1".into(),
            adapter: Value::Null,
            sampling: json!({"temperature": 0.7, "stop": ["a"]}),
        }
    }

    fn launch(started_unix_seconds: u64) -> Launch {
        Launch {
            farm_version: "0.1.0".into(),
            kernel_tier: "avx2".into(),
            device_kinds: cpu(),
            devices: cpu(),
            slurm_job_id: None,
            ranks: 2,
            host: "node1".into(),
            started_unix_seconds,
        }
    }

    fn open(path: &Path, identity: &RunIdentity, existing: ExistingRun) -> Result<RunDir> {
        RunDir::open(
            path,
            RunFile::new(identity.clone(), "p".into(), 8, launch(100), Vec::new()),
            existing,
        )
    }

    #[test]
    fn the_same_command_goes_on_with_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/run");
        assert!(!open(&path, &identity(), ExistingRun::Resume).unwrap().resumed());
        let later = RunFile::new(identity(), "q".into(), 64, launch(200), vec!["--chat".into()]);
        let second = RunDir::open(&path, later, ExistingRun::Resume).unwrap();
        assert!(second.resumed());
        assert_eq!(second.started_unix_seconds(), 100);
        assert_eq!((second.file().claim_records, second.file().arguments.len()), (8, 0));
    }

    /// Jobs that a submission starts together: one begins the run, all work on it.
    #[test]
    fn of_many_that_begin_a_run_one_does() {
        let dir = tempfile::tempdir().unwrap();
        let starts: Vec<u64> = std::thread::scope(|scope| {
            let begin = |number| {
                let run = RunFile::new(identity(), "p".into(), 8, launch(number), Vec::new());
                RunDir::open(dir.path(), run, ExistingRun::Resume).unwrap().started_unix_seconds()
            };
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || begin(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(starts.iter().all(|start| start == &starts[0]), "{starts:?}");
    }

    #[test]
    fn another_run_is_refused_with_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &identity(), ExistingRun::Resume).unwrap());
        let sampling = json!({"temperature": 0.8, "stop": ["a"]});
        let other = RunIdentity { sampling, adapter: json!({"lora": "ab"}), ..identity() };
        let error = open(dir.path(), &other, ExistingRun::Resume).unwrap_err();
        assert_eq!(error.kind.exit_code(), 3);
        for part in [
            "sampling.temperature: 0.7 in the run, 0.8 now",
            "adapter.lora: nothing in the run, \"ab\" now",
            "--run-dir",
            "--force-new",
        ] {
            assert!(error.message.contains(part), "{part}: {error}");
        }
        assert!(!error.message.contains("stop"), "{error}");
    }

    #[test]
    fn force_new_sets_the_old_run_aside() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &identity(), ExistingRun::SetAside).unwrap());
        fs::write(RunDir::journal_of(dir.path()).join("00001-00000.farm"), "x").unwrap();
        let other = RunIdentity { model: "m2".into(), ..identity() };
        let run = open(dir.path(), &other, ExistingRun::SetAside).unwrap();
        assert!(!run.resumed());
        assert!(fs::read_dir(RunDir::journal_of(dir.path())).unwrap().next().is_none());
        assert!(dir.path().join("set-aside-1/journal/00001-00000.farm").exists());
    }

    #[test]
    fn a_damaged_run_file_is_an_input_error() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &identity(), ExistingRun::Resume).unwrap());
        for content in ["", "{", "[]", "{\"format\":1}", "{\"format\":2}"] {
            fs::write(dir.path().join("run.json"), content).unwrap();
            let error = open(dir.path(), &identity(), ExistingRun::Resume).unwrap_err();
            assert!(error.message.contains("run.json"), "{error}");
        }
        fs::remove_file(dir.path().join("run.json")).unwrap();
        assert!(
            open(dir.path(), &identity(), ExistingRun::Resume).is_err(),
            "records stay guarded"
        );
    }

    #[test]
    fn the_default_directory_lies_beside_the_output() {
        let path = |output: Option<&str>| default_path(output.map(Path::new), "prompts", "0a1b");
        assert_eq!(path(Some("/data/out.jsonl")), Path::new("/data/farm-runs/prompts-0a1b"));
        assert_eq!(path(Some("out.jsonl")), Path::new("farm-runs/prompts-0a1b"));
        assert_eq!(path(None), Path::new("farm-runs/prompts-0a1b"));
        assert_eq!(identity().short_key().len(), 8);
        let other = RunIdentity { model: "m2".into(), ..identity() };
        assert_ne!(identity().short_key(), other.short_key());
    }
}
