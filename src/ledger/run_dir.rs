//! The run directory: what ties finished records to one prompts file, model and sampling.
//!
//! `run.json` (the identity and every launch), `parts/` (finished records), `stats.json`,
//! `ranks.csv`, `events.jsonl`. The same command finds its directory again and goes on; a
//! command that would give other records is refused.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files::replace_file;
use crate::ledger::parts::{self, Stored};
use crate::ledger::run_lock::RunLock;
use crate::{Error, Result};

/// Version of `run.json`'s form and of the directory's layout.
const FORMAT: u32 = 1;

/// What decides the records: a run goes on only where all of it is the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// `generate`, `score`.
    pub command: String,
    /// The prompts file's content (a hash) and how it is read (format, column, chat).
    pub prompts: Value,
    /// Key of the model's manifest.
    pub model: String,
    /// The adapter's key.
    pub adapter: Option<String>,
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
    /// Slurm's job id.
    pub slurm_job_id: Option<String>,
    /// Number of ranks.
    pub ranks: usize,
    /// Host of rank 0.
    pub host: String,
    /// Seconds since 1970.
    pub started_unix_seconds: u64,
}

/// `run.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RunFile {
    format: u32,
    identity: RunIdentity,
    launches: Vec<Launch>,
    /// What a newer farm of the same format wrote is kept.
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// What to do where the directory holds a run already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExistingRun {
    /// Go on if it is the same run (the default, and `--resume`).
    Resume,
    /// Set it aside and begin anew (`--force-new`).
    SetAside,
}

/// An open run directory, locked for this job. Rank 0 has it; the other ranks need only
/// [`RunDir::parts_of`] its path.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    run: RunFile,
    warnings: Vec<String>,
    _lock: RunLock,
}

/// `farm-runs/<stem>-<short key>` beside the output, or here if there is no output file.
pub fn default_path(output: Option<&Path>, prompts_stem: &str, short_key: &str) -> PathBuf {
    let folder = output.and_then(Path::parent).unwrap_or(Path::new(""));
    folder.join("farm-runs").join(format!("{prompts_stem}-{short_key}"))
}

impl RunDir {
    /// Creates the directory or goes on with the run in it, and locks it. Call on rank 0
    /// only, then agree. An input error if it is another run, is damaged or is in use.
    pub fn open(
        path: &Path,
        identity: &RunIdentity,
        launch: Launch,
        existing: ExistingRun,
    ) -> Result<Self> {
        let parts = Self::parts_of(path);
        fs::create_dir_all(path)
            .map_err(|error| Error::input(format!("--run-dir {}: {error}", path.display())))?;
        let lock = RunLock::take(&path.join("lock"), launch.slurm_job_id.as_deref())?;
        let run_json = path.join("run.json");
        if existing == ExistingRun::SetAside {
            set_aside(path)?;
        }
        let mut run = match fs::read(&run_json) {
            Ok(bytes) => read_run(path, &bytes, identity)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                new_run(path, &parts, identity)?
            }
            Err(error) => return Err(Error::io(&run_json, error)),
        };
        let warnings = launch_warnings(&run, &launch);
        run.launches.push(launch);
        // run.json first: part files without it are taken for another run's.
        let text = serde_json::to_vec_pretty(&run).map_err(Error::fault)?;
        replace_file(&run_json, &text)?;
        fs::create_dir_all(&parts).map_err(|error| Error::io(&parts, error))?;
        Ok(Self { path: path.to_owned(), run, warnings, _lock: lock })
    }

    /// The folder of part files of the run at `path`, for every rank.
    pub fn parts_of(path: &Path) -> PathBuf {
        path.join("parts")
    }

    /// Reads what earlier launches finished and cuts torn tails; before any rank opens its
    /// part file.
    pub fn stored(&self) -> Result<Stored> {
        parts::scan(&Self::parts_of(&self.path))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether an earlier launch began this run.
    pub fn resumed(&self) -> bool {
        self.run.launches.len() > 1
    }

    /// When the run's first launch began, in seconds since 1970: the same for all launches.
    pub fn started_unix_seconds(&self) -> u64 {
        self.run.launches[0].started_unix_seconds
    }

    /// What the user should know: this launch differs from earlier ones in what may change
    /// the last bits of floating point.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Early output lines that do not fit into memory.
    pub fn spill(&self) -> PathBuf {
        self.path.join("spill")
    }
}

fn new_run(path: &Path, parts: &Path, identity: &RunIdentity) -> Result<RunFile> {
    if parts.exists() {
        return Err(Error::input(format!(
            "{} holds finished records but its run.json is gone: give another --run-dir, or \
             --force-new to set them aside",
            path.display()
        )));
    }
    let identity = identity.clone();
    Ok(RunFile { format: FORMAT, identity, launches: Vec::new(), rest: Map::new() })
}

fn read_run(path: &Path, bytes: &[u8], identity: &RunIdentity) -> Result<RunFile> {
    const HELP: &str = "give another --run-dir, or --force-new to set it aside";
    let name = path.join("run.json");
    let run: RunFile = serde_json::from_slice(bytes).map_err(|error| {
        Error::input(format!("{}: not a run of farm ({error}); {HELP}", name.display()))
    })?;
    if run.format != FORMAT || run.launches.is_empty() {
        return Err(Error::input(format!(
            "{}: format {}, but this farm reads {FORMAT}; {HELP}",
            name.display(),
            run.format
        )));
    }
    let differences = identity.differences(&run.identity);
    if !differences.is_empty() {
        return Err(Error::input(format!(
            "the run in {} is another one:\n{}\nGive another --run-dir, or --force-new to set \
             that run aside and begin anew",
            path.display(),
            differences.join("\n")
        )));
    }
    Ok(run)
}

fn launch_warnings(run: &RunFile, launch: &Launch) -> Vec<String> {
    let Some(last) = run.launches.last() else { return Vec::new() };
    [("farm's version", &last.farm_version, &launch.farm_version)]
        .into_iter()
        .filter(|(_, before, now)| before != now)
        .map(|(what, before, now)| {
            format!("{what}: {before} in the run so far, {now} now; floating point may differ")
        })
        .collect()
}

/// Moves what the last run left into `set-aside-N/`; a kill in between loses nothing.
fn set_aside(path: &Path) -> Result<()> {
    // run.json goes last: while it is there the directory is still the old run.
    let names = ["parts", "stats.json", "ranks.csv", "events.jsonl", "run.json"];
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
    use crate::ledger::{PartWriter, RecordSink};

    fn identity() -> RunIdentity {
        RunIdentity {
            command: "generate".into(),
            prompts: json!({"hash": "abc", "format": "jsonl"}),
            model: "m1".into(),
            adapter: None,
            sampling: json!({"temperature": 0.7, "stop": ["a"]}),
        }
    }

    fn launch(started_unix_seconds: u64) -> Launch {
        Launch {
            farm_version: "0.1.0".into(),
            kernel_tier: "avx2".into(),
            slurm_job_id: None,
            ranks: 2,
            host: "node1".into(),
            started_unix_seconds,
        }
    }

    fn open(path: &Path, identity: &RunIdentity, existing: ExistingRun) -> Result<RunDir> {
        RunDir::open(path, identity, launch(100), existing)
    }

    fn finish_one(path: &Path) {
        let mut part = PartWriter::open(&RunDir::parts_of(path), 0).unwrap();
        part.append(0, b"{}\n", false).unwrap();
        part.sync().unwrap();
    }

    #[test]
    fn the_same_command_goes_on_with_what_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/run");
        let first = open(&path, &identity(), ExistingRun::Resume).unwrap();
        assert!(!first.resumed() && first.stored().unwrap().is_empty());
        finish_one(&path);
        assert!(open(&path, &identity(), ExistingRun::Resume).is_err(), "in use");
        drop(first);
        let later = Launch { farm_version: "9.9.9".into(), ..launch(200) };
        let second = RunDir::open(&path, &identity(), later, ExistingRun::Resume).unwrap();
        assert!(second.resumed());
        assert_eq!(second.started_unix_seconds(), 100);
        assert_eq!(second.stored().unwrap().len(), 1);
        assert_eq!(second.warnings().len(), 1, "{:?}", second.warnings());
    }

    #[test]
    fn another_run_is_refused_with_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &identity(), ExistingRun::Resume).unwrap());
        let sampling = json!({"temperature": 0.8, "stop": ["a"]});
        let other = RunIdentity { sampling, adapter: Some("lora".into()), ..identity() };
        let error = open(dir.path(), &other, ExistingRun::Resume).unwrap_err();
        assert_eq!(error.kind.exit_code(), 3);
        for part in [
            "sampling.temperature: 0.7 in the run, 0.8 now",
            "adapter: null in the run, \"lora\" now",
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
        finish_one(dir.path());
        let other = RunIdentity { model: "m2".into(), ..identity() };
        let run = open(dir.path(), &other, ExistingRun::SetAside).unwrap();
        assert!(!run.resumed() && run.stored().unwrap().is_empty());
        assert!(dir.path().join("set-aside-1/parts/rank-00000.jsonl").exists());
    }

    #[test]
    fn a_damaged_run_file_is_an_input_error() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), &identity(), ExistingRun::Resume).unwrap());
        for content in ["", "{", "[]", "{\"format\":1}"] {
            fs::write(dir.path().join("run.json"), content).unwrap();
            let error = open(dir.path(), &identity(), ExistingRun::Resume).unwrap_err();
            assert!(error.message.contains("run.json"), "{error}");
        }
        fs::remove_file(dir.path().join("run.json")).unwrap();
        assert!(open(dir.path(), &identity(), ExistingRun::Resume).is_err(), "parts stay guarded");
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
