//! Which files of a model directory hold its weights, and in what form.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::table::MappedFile;
use super::{gguf, meta};
use crate::model::small_file;
use crate::{Error, Result};

/// A form of checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `model.safetensors`, or shards with an index.
    Safetensors,
    /// `pytorch_model.bin`, or shards with an index.
    Torch,
    /// Meta's `consolidated.NN.pth` with `params.json`.
    Meta,
    /// One GGUF file, or the parts of a split one.
    Gguf,
}

impl Format {
    /// The name that people know.
    pub fn name(self) -> &'static str {
        match self {
            Format::Safetensors => "safetensors",
            Format::Torch => "pytorch",
            Format::Meta => "meta",
            Format::Gguf => "gguf",
        }
    }
}

/// The weight files of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// Their form.
    pub format: Format,
    /// The directory that they are in, and the configuration and tokenizer with them.
    pub dir: PathBuf,
    /// Full paths, in order.
    pub weights: Vec<PathBuf>,
}

impl ModelFiles {
    /// Looks at `model`, a directory or a GGUF file.
    ///
    /// # Errors
    /// It is missing, holds no weights or several models, or an index names a file that is
    /// not there.
    pub fn find(model: &Path) -> Result<Self> {
        let meta = std::fs::metadata(model).map_err(|error| {
            Error::input(format!("--model {}: {error}; give its full path", model.display()))
        })?;
        if meta.is_dir() {
            return Self::in_dir(model);
        }
        if model.extension().is_none_or(|e| !e.eq_ignore_ascii_case("gguf")) {
            return Err(Error::input(format!(
                "--model {}: neither a model directory nor a .gguf file",
                model.display()
            )));
        }
        let dir = model.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let weights = gguf::split_paths(model)?;
        Ok(Self { format: Format::Gguf, dir: dir.to_owned(), weights })
    }

    fn in_dir(dir: &Path) -> Result<Self> {
        let of = |format, weights| Ok(Self { format, dir: dir.to_owned(), weights });
        if let Some(paths) = indexed(dir, "model.safetensors")? {
            return of(Format::Safetensors, paths);
        }
        if let Some(paths) = indexed(dir, "pytorch_model.bin")? {
            return of(Format::Torch, paths);
        }
        if let Some(paths) = meta::paths(dir)? {
            return of(Format::Meta, paths);
        }
        match gguf_models(dir)?.as_slice() {
            [] => Err(Error::input(format!(
                "--model {}: no weights (model.safetensors, pytorch_model.bin, \
                 consolidated.00.pth or a .gguf file, or an index of shards); is it the right \
                 directory?",
                dir.display()
            ))),
            [one] => of(Format::Gguf, gguf::split_paths(one)?),
            several => {
                let names: Vec<_> =
                    several.iter().filter_map(|p| p.file_name()?.to_str()).collect();
                Err(Error::input(format!(
                    "--model {}: several GGUF models; name one of them: {}",
                    dir.display(),
                    names.join(", ")
                )))
            }
        }
    }
}

/// The GGUF files of a directory; of a split one, the first part.
fn gguf_models(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e| Error::input(format!("--model {}: {e}", dir.display()));
    let mut first_parts = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && path.is_file() {
            first_parts.extend(gguf::split_paths(&path)?.into_iter().next());
        }
    }
    // An adapter beside its model is no second model.
    if first_parts.len() > 1 {
        first_parts.retain(|path| !is_adapter(path));
    }
    Ok(first_parts.into_iter().collect())
}

fn is_adapter(path: &Path) -> bool {
    let mapped = MappedFile::open_all(&[path.to_owned()]);
    let read = mapped.and_then(|files| files.iter().map(|file| file.read(gguf::read)).collect());
    read.is_ok_and(|files: Vec<_>| files.iter().all(|file| gguf::is_adapter(&file.metadata)))
}

/// The file `name` in `dir`, or the shards that `NAME.index.json` names; none where there is
/// neither.
///
/// # Errors
/// Input errors that name the index: not readable, a shard outside the directory or missing.
pub(super) fn indexed(dir: &Path, name: &str) -> Result<Option<Vec<PathBuf>>> {
    let index = dir.join(format!("{name}.index.json"));
    if !index.is_file() {
        let single = dir.join(name);
        return Ok(single.is_file().then(|| vec![single]));
    }
    let text =
        small_file::read(&index).map_err(|e| Error::input(format!("{}: {e}", index.display())))?;
    shards(dir, &text).map(Some).map_err(|error| error.context(index.display()))
}

fn shards(dir: &Path, index: &[u8]) -> Result<Vec<PathBuf>> {
    let index: Value = serde_json::from_slice(index).map_err(Error::input)?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::input("it has no \"weight_map\""))?;
    let names = map.values().map(|name| {
        name.as_str().ok_or_else(|| Error::input(format!("shard name {name} is no text")))
    });
    let names: BTreeSet<&str> = names.collect::<Result<_>>()?;
    if names.is_empty() {
        return Err(Error::input("its \"weight_map\" is empty"));
    }
    names.into_iter().map(|name| shard(dir, name)).collect()
}

fn shard(dir: &Path, name: &str) -> Result<PathBuf> {
    let mut parts = Path::new(name).components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
        return Err(Error::input(format!("shard name {name:?} leaves the directory")));
    }
    let path = dir.join(name);
    if !path.is_file() {
        return Err(Error::input(format!("shard {name:?} is missing: is the download complete?")));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_beside_a_gguf_model_is_no_second_model() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf");
        let dir = tempfile::tempdir().unwrap();
        for name in ["llama_f32.gguf", "llama_lora.gguf"] {
            std::fs::copy(golden.join(name), dir.path().join(name)).unwrap();
        }
        let found = ModelFiles::find(dir.path()).unwrap();
        assert_eq!(found.weights, [dir.path().join("llama_f32.gguf")]);
        let several = ModelFiles::find(&golden).unwrap_err();
        assert!(several.message.contains("name one of them"), "{several}");
        assert!(!several.message.contains("llama_lora"), "{several}");
    }

    #[test]
    fn an_index_cannot_leave_its_directory_or_name_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(indexed(dir.path(), "pytorch_model.bin").unwrap(), None);
        let single = dir.path().join("pytorch_model.bin");
        std::fs::write(&single, "").unwrap();
        assert_eq!(indexed(dir.path(), "pytorch_model.bin").unwrap(), Some(vec![single]));
        for (index, word) in [
            (r#"{"weight_map": {"a": "../a.bin"}}"#, "leaves the directory"),
            (r#"{"weight_map": {"a": "/etc/passwd"}}"#, "leaves the directory"),
            (r#"{"weight_map": {"a": ".."}}"#, "leaves the directory"),
            (r#"{"weight_map": {"a": ""}}"#, "leaves the directory"),
            (r#"{"weight_map": {"a": "a.bin"}}"#, "\"a.bin\" is missing"),
            (r#"{"weight_map": {"a": 1}}"#, "no text"),
            (r#"{"weight_map": {}}"#, "empty"),
            ("[]", "weight_map"),
            ("{", "EOF"),
        ] {
            std::fs::write(dir.path().join("pytorch_model.bin.index.json"), index).unwrap();
            let error = indexed(dir.path(), "pytorch_model.bin").unwrap_err();
            assert!(error.message.contains(word), "{index}: {error}");
            assert!(error.message.contains("index.json"), "{error}");
        }
    }
}
