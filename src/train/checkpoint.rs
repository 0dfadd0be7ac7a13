//! Checkpoints: directories `checkpoint-<step>` that are there whole or do not count.
//!
//! A checkpoint holds the adapter (in PEFT's form, written by the caller), the optimiser's
//! tensors in [`TENSORS_FILE`], exact to the bit, and [`MANIFEST_FILE`] with the trainer's
//! state, size and hash of every other file, and a hash of itself. It grows under a hidden
//! name and gets its own by a rename once everything is on the disk; a kill at any moment
//! leaves the one before it. [`latest`] believes hashes only: what a dying disk or a full
//! file system left behind is passed over with a warning, and stays for whoever wants to look.
//!
//! One process writes to a folder at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{sync_folder, with_suffix};
use crate::{Error, Result};

/// The optimiser's tensors.
pub const TENSORS_FILE: &str = "optimizer.safetensors";
/// Step, state and hashes.
pub const MANIFEST_FILE: &str = "checkpoint.json";

const PREFIX: &str = "checkpoint-";
/// What a whole manifest says in `format`.
const FORMAT: &str = "farm checkpoint 1";
/// Hidden directories that a writer is filling, or emptying.
const PARTIAL: &str = "partial";
const REMOVED: &str = "removed";
/// A whole checkpoint that another one of the same step takes the place of.
const REPLACED: &str = "replaced";

/// A tensor to be saved.
#[derive(Debug, Clone, Copy)]
pub struct NamedTensor<'a> {
    /// Its name in the file, once each.
    pub name: &'a str,
    /// Its dimensions.
    pub shape: &'a [usize],
    /// Row-major values.
    pub values: &'a [f32],
}

/// What to save.
#[derive(Debug, Clone, Copy)]
pub struct Checkpoint<'a> {
    /// Optimiser steps done.
    pub step: u64,
    /// Moments, master copies: what a resumed run needs to the bit.
    pub tensors: &'a [NamedTensor<'a>],
    /// Schedule, data cursor, early stopping: the trainer's own.
    pub state: &'a Value,
}

/// Which checkpoints stay.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// So many of the newest; the one just written always stays.
    pub last: usize,
    /// The step of one more: the best.
    pub also: Option<u64>,
}

/// A checkpoint that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// Its directory; the adapter lies there too.
    pub dir: PathBuf,
    /// Optimiser steps done.
    pub step: u64,
    /// The tensors by name.
    pub tensors: BTreeMap<String, LoadedTensor>,
    /// The trainer's state.
    pub state: Value,
}

/// A tensor that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedTensor {
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f32>,
}

/// Writes a checkpoint below `folder` (created where missing) and removes older ones that
/// `keep` does not name; `extra` writes the caller's files into the directory it is given.
/// Only what farm wrote is ever removed. Returns the checkpoint's directory.
///
/// # Errors
/// A fault that names the file; the checkpoints that were there are still there then.
pub fn save(
    folder: &Path,
    checkpoint: &Checkpoint<'_>,
    extra: impl FnOnce(&Path) -> Result<()>,
    keep: Keep,
) -> Result<PathBuf> {
    save_in_steps(folder, checkpoint, extra, keep, &mut || Ok(()))
}

/// [`save`], which calls `between` after each thing it does on the disk: tests end it there.
fn save_in_steps(
    folder: &Path,
    checkpoint: &Checkpoint<'_>,
    extra: impl FnOnce(&Path) -> Result<()>,
    keep: Keep,
    between: &mut dyn FnMut() -> Result<()>,
) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    clean(folder)?;
    between()?;
    let target = folder.join(format!("{PREFIX}{}", checkpoint.step));
    let partial = hidden(folder, checkpoint.step, PARTIAL);
    fs::create_dir(&partial).map_err(|error| Error::io(&partial, error))?;
    between()?;
    extra(&partial)?;
    between()?;
    write_tensors(&partial.join(TENSORS_FILE), checkpoint.tensors)?;
    between()?;
    let mut files = BTreeMap::new();
    sync_and_hash(&partial, "", &mut files)?;
    between()?;
    Manifest::new(checkpoint, files).write(&partial.join(MANIFEST_FILE))?;
    between()?;
    let replaced = step_aside(folder, &target, checkpoint.step)?;
    between()?;
    rename(&partial, &target)?;
    between()?;
    if let Some(replaced) = replaced {
        remove(&replaced);
        between()?;
    }
    remove_old(folder, checkpoint.step, keep, between)?;
    Ok(target)
}

/// The newest checkpoint below `folder` whose files are all whole; `None` where there is none.
///
/// # Errors
/// A fault: the folder is there but cannot be read.
pub fn latest(folder: &Path) -> Result<Option<Loaded>> {
    let mut found: Vec<(u64, bool, PathBuf)> = entries(folder)?
        .into_iter()
        .filter_map(|(path, name)| {
            let rest = name.strip_prefix(PREFIX)?;
            let replaced = rest.strip_suffix(&format!(".{REPLACED}"));
            Some((replaced.unwrap_or(rest).parse().ok()?, replaced.is_none(), path))
        })
        .collect();
    found.sort_unstable();
    for (step, _, dir) in found.into_iter().rev() {
        match load(&dir) {
            Ok(loaded) if loaded.step == step => return Ok(Some(loaded)),
            Ok(loaded) => {
                tracing::warn!(dir = %dir.display(), step = loaded.step, "passed over: the name of the checkpoint says another step");
            }
            Err(error) => tracing::warn!("passed over a checkpoint: {error}"),
        }
    }
    Ok(None)
}

/// Reads the checkpoint in `dir`.
///
/// # Errors
/// An input error that names the file that is missing or damaged.
pub fn load(dir: &Path) -> Result<Loaded> {
    let manifest = check(dir)?;
    let path = dir.join(TENSORS_FILE);
    let bytes = fs::read(&path).map_err(|error| damaged(&path, error))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| damaged(&path, error))?;
    let tensors = tensors.iter().map(|(name, view)| {
        let (values, rest) = view.data().as_chunks();
        if view.dtype() != Dtype::F32 || !rest.is_empty() {
            return Err(damaged(&path, format!("{name} is not of type F32")));
        }
        let values = values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok((name.to_owned(), LoadedTensor { shape: view.shape().to_vec(), values }))
    });
    Ok(Loaded {
        dir: dir.to_owned(),
        step: manifest.step,
        tensors: tensors.collect::<Result<_>>()?,
        state: manifest.state,
    })
}

fn damaged(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::input(format!("{}: {what}; damaged, or not a whole checkpoint", path.display()))
}

/// What `checkpoint.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    step: u64,
    state: Value,
    /// By path below the directory.
    files: BTreeMap<String, FileSum>,
}

/// The manifest and its own hash: that of the manifest as serde_json writes it.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed {
    checkpoint: Manifest,
    blake3: String,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FileSum {
    bytes: u64,
    blake3: String,
}

impl Manifest {
    fn new(checkpoint: &Checkpoint<'_>, files: BTreeMap<String, FileSum>) -> Self {
        let Checkpoint { step, state, .. } = *checkpoint;
        Self { format: FORMAT.to_owned(), step, state: state.clone(), files }
    }

    fn seal(&self) -> Result<String> {
        let text = serde_json::to_vec(self).map_err(Error::fault)?;
        Ok(blake3::hash(&text).to_hex().to_string())
    }

    fn write(self, path: &Path) -> Result<()> {
        let sealed = Sealed { blake3: self.seal()?, checkpoint: self };
        let text = serde_json::to_vec(&sealed).map_err(Error::fault)?;
        let write = || {
            fs::write(path, &text)?;
            File::open(path)?.sync_all()
        };
        write().map_err(|error| Error::io(path, error))?;
        sync_folder(path);
        Ok(())
    }

    /// The manifest in `dir`, if its own hash holds.
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let text = fs::read(&path).map_err(|error| damaged(&path, error))?;
        let Sealed { checkpoint, blake3 } =
            serde_json::from_slice(&text).map_err(|error| damaged(&path, error))?;
        if checkpoint.format != FORMAT {
            let what = format!("format \"{}\" instead of \"{FORMAT}\"", checkpoint.format);
            return Err(damaged(&path, what));
        }
        if checkpoint.seal()? != blake3 {
            return Err(damaged(&path, "does not match its own hash"));
        }
        Ok(checkpoint)
    }
}

/// The manifest in `dir`, once every file has the hash that it says.
fn check(dir: &Path) -> Result<Manifest> {
    let manifest = Manifest::read(dir)?;
    if !manifest.files.contains_key(TENSORS_FILE) {
        return Err(damaged(&dir.join(MANIFEST_FILE), format!("does not name {TENSORS_FILE}")));
    }
    for (name, expected) in &manifest.files {
        let path = dir.join(name);
        if sum(&path).map_err(|error| damaged(&path, error))? != *expected {
            return Err(damaged(&path, format!("does not match its hash in {MANIFEST_FILE}")));
        }
    }
    Ok(manifest)
}

fn sum(path: &Path) -> std::io::Result<FileSum> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(FileSum { bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
}

/// Brings all files in `dir` to the disk and notes their hashes under `prefix` + name.
fn sync_and_hash(dir: &Path, prefix: &str, files: &mut BTreeMap<String, FileSum>) -> Result<()> {
    for (path, name) in entries(dir)? {
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            sync_and_hash(&path, &format!("{name}/"), files)?;
            continue;
        }
        let synced = File::open(&path).and_then(|file| file.sync_all());
        let hashed = synced.and_then(|()| sum(&path));
        files.insert(name, hashed.map_err(|error| Error::io(&path, error))?);
        sync_folder(&path);
    }
    Ok(())
}

/// Paths and names in `dir`; none where it is missing. Names that are not UTF-8 are not farm's.
fn entries(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let list = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        list => list.map_err(|error| Error::io(dir, error))?,
    };
    let mut found = Vec::new();
    for entry in list {
        let entry = entry.map_err(|error| Error::io(dir, error))?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((entry.path(), name));
        }
    }
    Ok(found)
}

impl View for NamedTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(self.values) {
            *bytes = value.to_le_bytes();
        }
        bytes.into()
    }
    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

fn write_tensors(path: &Path, tensors: &[NamedTensor<'_>]) -> Result<()> {
    let fault = |what: String| Err(Error::fault(format!("{}: {what}", path.display())));
    let mut by_name = BTreeMap::new();
    for tensor in tensors {
        let NamedTensor { name, shape, values } = *tensor;
        if shape.iter().product::<usize>() != values.len() {
            return fault(format!("{name} has {} values, not {shape:?}", values.len()));
        }
        if by_name.insert(name, *tensor).is_some() {
            return fault(format!("two tensors are called {name}"));
        }
    }
    safetensors::serialize_to_file(by_name, None, path).or_else(|error| fault(error.to_string()))
}

/// A name that neither [`latest`] nor people take for a checkpoint.
fn hidden(folder: &Path, step: u64, what: &str) -> PathBuf {
    folder.join(format!(".{PREFIX}{step}.{what}"))
}

/// Removes what a killed writer left, and finishes or takes back a replacement.
fn clean(folder: &Path) -> Result<()> {
    for (path, name) in entries(folder)? {
        let step_of = |prefix: &str, suffix: &str| -> Option<u64> {
            name.strip_prefix(prefix)?.strip_suffix(suffix)?.strip_suffix('.')?.parse().ok()
        };
        let of_hidden = |what| step_of(&format!(".{PREFIX}"), what);
        if of_hidden(PARTIAL).or(of_hidden(REMOVED)).is_some() {
            remove(&path);
        } else if let Some(step) = step_of(PREFIX, REPLACED) {
            let target = folder.join(format!("{PREFIX}{step}"));
            if target.exists() { remove(&path) } else { rename(&path, &target)? }
        }
    }
    Ok(())
}

/// Makes room for a checkpoint of a step that has one already. Whole, it may go once the new
/// one is there, and its path is returned; damaged, it stays under another name.
fn step_aside(folder: &Path, target: &Path, step: u64) -> Result<Option<PathBuf>> {
    if !target.exists() {
        return Ok(None);
    }
    if check(target).is_ok_and(|manifest| manifest.step == step) {
        let aside = with_suffix(target, REPLACED);
        rename(target, &aside)?;
        return Ok(Some(aside));
    }
    let names = (1..).map(|n| folder.join(format!("{PREFIX}{step}.damaged-{n}")));
    if let Some(aside) = names.into_iter().find(|name| !name.exists()) {
        rename(target, &aside)?;
        tracing::warn!("a damaged checkpoint of the same step is now {}", aside.display());
    }
    Ok(None)
}

/// Removes farm's own checkpoints of earlier steps that `keep` does not name. Failing to is
/// no reason to end a run.
fn remove_old(
    folder: &Path,
    step: u64,
    keep: Keep,
    between: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let mut old: Vec<(u64, PathBuf)> = entries(folder)?
        .into_iter()
        .filter_map(|(path, name)| Some((name.strip_prefix(PREFIX)?.parse().ok()?, path)))
        .filter(|(earlier, _)| *earlier < step)
        .filter(|(_, path)| Manifest::read(path).is_ok())
        .collect();
    old.sort_unstable();
    old.reverse();
    for (earlier, path) in old.into_iter().skip(keep.last.saturating_sub(1)) {
        if keep.also == Some(earlier) {
            continue;
        }
        // Renamed first: half of a checkpoint must not look like a damaged one.
        let removed = hidden(folder, earlier, REMOVED);
        match fs::rename(&path, &removed) {
            Ok(()) => {
                between()?;
                remove(&removed);
                between()?;
            }
            Err(error) => tracing::warn!("cannot remove {}: {error}", path.display()),
        }
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| Error::io(to, error))?;
    sync_folder(to);
    Ok(())
}

fn remove(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::warn!("cannot remove {}: {error}", dir.display());
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
