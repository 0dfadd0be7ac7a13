//! Where a model and what goes with it are, before and after staging.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The paths that a rank loads from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelPaths {
    /// A directory or a GGUF file.
    pub model: PathBuf,
    /// A tokenizer that is not in the model's directory: a file, or a directory with one.
    pub tokenizer: Option<PathBuf>,
}

impl ModelPaths {
    /// A model alone.
    pub fn of(model: impl Into<PathBuf>) -> Self {
        Self { model: model.into(), ..Self::default() }
    }
}

/// `path`, or if it is a repository in the cache of Hugging Face (`models--ORG--NAME`) the
/// snapshot that its `refs/main` names, or its only one.
///
/// # Errors
/// Input errors: `main` names a snapshot that is not there; several snapshots, none of them
/// `main`.
pub fn resolved(path: &Path) -> Result<PathBuf> {
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() || !path.join("refs").is_dir() {
        return Ok(path.to_owned());
    }
    let bad = |why: String| Error::input(format!("{}: {why}", path.display()));
    let main = path.join("refs/main");
    if main.is_file() {
        let text = fs::read_to_string(&main).map_err(|e| bad(format!("refs/main: {e}")))?;
        let revision = text.trim();
        let plain = !revision.is_empty() && revision.bytes().all(|b| b.is_ascii_alphanumeric());
        let snapshot = snapshots.join(revision);
        if plain && snapshot.is_dir() {
            return Ok(snapshot);
        }
        return Err(bad(format!(
            "refs/main names snapshot {revision:?}, which is not there; is the download complete?"
        )));
    }
    let entries = fs::read_dir(&snapshots).map_err(|e| bad(format!("snapshots: {e}")))?;
    let entries = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    match (found.pop(), found.is_empty()) {
        (Some(only), true) => Ok(only),
        (None, _) => Err(bad("no snapshot; is the download complete?".into())),
        (Some(_), false) => {
            Err(bad("several snapshots and no refs/main; name one: snapshots/REVISION".into()))
        }
    }
}

/// A model's name as answers show it: that of its directory or file, `ORG/NAME` in the cache
/// of Hugging Face, where the directory's own name is a hash.
pub fn model_name(model: &Path) -> String {
    // By its last component as given, which a link may have changed; "." has none.
    let canonical = fs::canonicalize(model).ok();
    let last = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
    let repository = |path: &Path| {
        let snapshots = path.parent()?;
        let repository = last(snapshots.parent()?)?;
        let name = repository.strip_prefix("models--")?;
        (snapshots.file_name()? == "snapshots").then(|| name.replacen("--", "/", 1))
    };
    repository(model)
        .or_else(|| repository(canonical.as_deref()?))
        .or_else(|| last(model))
        .or_else(|| last(canonical.as_deref()?))
        .unwrap_or_else(|| "model".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache with these snapshots and this `refs/main`.
    fn cache(snapshots: &[&str], main: Option<&str>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("models--org--a--b");
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::create_dir_all(repository.join("snapshots")).unwrap();
        for snapshot in snapshots {
            fs::create_dir_all(repository.join("snapshots").join(snapshot)).unwrap();
        }
        if let Some(main) = main {
            fs::write(repository.join("refs/main"), main).unwrap();
        }
        (dir, repository)
    }

    #[test]
    fn a_repository_of_the_cache_stands_for_its_main_snapshot() {
        let (_dir, repository) = cache(&["abc", "def"], Some("def\n"));
        let snapshot = resolved(&repository).unwrap();
        assert_eq!(snapshot, repository.join("snapshots/def"));
        assert_eq!(resolved(&snapshot).unwrap(), snapshot);
        assert_eq!(model_name(&snapshot), "org/a--b");
        let (_dir, repository) = cache(&["abc"], None);
        assert_eq!(resolved(&repository).unwrap(), repository.join("snapshots/abc"));
    }

    #[test]
    fn a_cache_that_names_no_snapshot_is_refused() {
        for (snapshots, main, why) in [
            (&["abc"][..], Some("def"), "\"def\""),
            (&["abc"], Some("../abc"), "not there"),
            (&["abc"], Some(""), "not there"),
            (&["abc", "def"], None, "several snapshots"),
            (&[], None, "no snapshot"),
        ] {
            let (_dir, repository) = cache(snapshots, main);
            let error = resolved(&repository).unwrap_err();
            assert_eq!(error.kind, crate::ErrorKind::Input);
            assert!(error.message.contains(why), "{error}");
        }
    }

    #[test]
    fn any_other_path_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("snapshots")).unwrap();
        assert_eq!(resolved(dir.path()).unwrap(), dir.path());
        assert_eq!(resolved(Path::new("/no/such/model")).unwrap(), Path::new("/no/such/model"));
        assert_eq!(model_name(Path::new("/no/such/model.gguf")), "model.gguf");
        assert_eq!(model_name(Path::new("/tmp/..")), "model");
    }
}
