//! Which files of a model directory hold its weights, and in what form.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{gguf, meta, torch};
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
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            return of(Format::Safetensors, indexed_files(&index)?);
        }
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return of(Format::Safetensors, vec![single]);
        }
        if let Some(paths) = torch::index_paths(dir)? {
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
    Ok(first_parts.into_iter().collect())
}

/// The files that an index of shards names; all must be there.
pub(super) fn indexed_files(index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let bad = |error: String| Error::input(format!("{}: {error}", index.display()));
    let text = std::fs::read(index).map_err(|error| bad(error.to_string()))?;
    let Index { weight_map } =
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    if let Some(outside) = names.iter().find(|name| name.contains('/') || name.contains("..")) {
        return Err(bad(format!("shard name {outside:?} leaves the directory")));
    }
    if names.is_empty() {
        return Err(bad("names no files".into()));
    }
    let dir = index.parent().unwrap_or(Path::new("."));
    let paths: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
    match paths.iter().find(|path| !path.is_file()) {
        Some(missing) => Err(bad(format!("names {}, which is not there", missing.display()))),
        None => Ok(paths),
    }
}
