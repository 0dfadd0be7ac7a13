//! Which files of a model are needed, and the key that names this state of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Files beside the weights that a loader or tokenizer may ask for.
const SMALL_FILES: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];
const INDEX: &str = "model.safetensors.index.json";

/// One file of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path below the model directory.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Time of the last change, nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// The files of a model that a run needs, as they are at its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The directory that the files are in, symlinks resolved.
    pub root: PathBuf,
    /// The model's name: that of its directory, or of the single file.
    pub name: String,
    /// The needed files in order of path.
    pub files: Vec<FileEntry>,
    /// The one file that `--model` names, if it names a file.
    pub single_file: Option<String>,
    /// Short hash of root, paths, sizes and times: another state has another key.
    pub key: String,
}

impl Manifest {
    /// Looks at `model`, a directory of safetensors or GGUF files or one GGUF file.
    /// Symlinks (as in the Hugging Face cache) are followed. Fails (input) if it is
    /// missing, holds no weights, or its index names a file that is not there.
    pub fn read(model: &Path) -> Result<Self> {
        let found = fs::canonicalize(model).map_err(|error| {
            Error::input(format!("--model {}: {error}; give its full path", model.display()))
        })?;
        // In the cache of Hugging Face the last component is a hash: the name is as given.
        let name = fs::canonicalize(model.parent().unwrap_or(model))
            .ok()
            .and(model.file_name())
            .or(found.file_name())
            .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
        if !found.is_dir() {
            let root = model.parent().filter(|parent| !parent.as_os_str().is_empty());
            let root = fs::canonicalize(root.unwrap_or(Path::new(".")))
                .map_err(|error| Error::io(model, error))?;
            if !name.ends_with(".gguf") {
                return Err(Error::input(format!(
                    "--model {}: neither a model directory nor a .gguf file",
                    model.display()
                )));
            }
            return Self::of_files(root, name.clone(), BTreeSet::from([name.clone()]), Some(name));
        }
        let mut files = weight_files(&found)?;
        for name in SMALL_FILES.into_iter().filter(|name| found.join(name).is_file()) {
            files.insert(name.to_owned());
        }
        Self::of_files(found, name, files, None)
    }

    fn of_files(
        root: PathBuf,
        name: String,
        paths: BTreeSet<String>,
        single_file: Option<String>,
    ) -> Result<Self> {
        let files = paths
            .into_iter()
            .map(|path| {
                let full = root.join(&path);
                // Opened too: a file that cannot be read is a bad model, said before any work.
                let meta =
                    fs::File::open(&full).and_then(|file| file.metadata()).map_err(|error| {
                        Error::input(format!("model file {}: {error}", full.display()))
                    })?;
                let mtime_ns =
                    meta.mtime().wrapping_mul(1_000_000_000).wrapping_add(meta.mtime_nsec());
                Ok(FileEntry { path, bytes: meta.len(), mtime_ns })
            })
            .collect::<Result<Vec<_>>>()?;
        let key = key_of(&root, &files);
        Ok(Self { root, name, files, single_file, key })
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// What to hand to the loader when the files are in `directory`.
    pub fn model_path(&self, directory: &Path) -> PathBuf {
        self.single_file.as_ref().map_or_else(|| directory.to_owned(), |file| directory.join(file))
    }

    /// The name of the staged copy: readable, and different for each state of each model.
    pub fn copy_name(&self) -> String {
        let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let name: String = self.name.chars().map(|c| if safe(c) { c } else { '_' }).collect();
        let name = name.trim_start_matches('.');
        format!("{}-{}", &name[..name.len().min(80)], self.key)
    }
}

fn key_of(root: &Path, files: &[FileEntry]) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(root.as_os_str().as_encoded_bytes());
    for file in files {
        add(file.path.as_bytes());
        add(&file.bytes.to_le_bytes());
        add(&file.mtime_ns.to_le_bytes());
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// The files that hold the weights, and the index if there is one.
fn weight_files(root: &Path) -> Result<BTreeSet<String>> {
    if root.join(INDEX).is_file() {
        let mut files = indexed_files(&root.join(INDEX))?;
        files.insert(INDEX.to_owned());
        return Ok(files);
    }
    let mut names: Vec<String> = fs::read_dir(root)
        .and_then(|entries| {
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        })
        .map_err(|error| Error::input(format!("--model {}: {error}", root.display())))?;
    names.sort();
    let ending = |ending: &str| -> BTreeSet<String> {
        names.iter().filter(|name| name.ends_with(ending)).cloned().collect()
    };
    let mut weights = ending(".safetensors");
    // Some models carry the same weights twice (consolidated.safetensors).
    if weights.contains("model.safetensors") {
        weights = BTreeSet::from(["model.safetensors".to_owned()]);
    }
    if weights.is_empty() {
        weights = ending(".gguf");
    }
    if weights.is_empty() {
        let hint = if ending(".bin").is_empty() {
            "is it the right directory?"
        } else {
            "it has .bin files: convert them with safetensors' convert.py"
        };
        return Err(Error::input(format!(
            "--model {}: no weights (*.safetensors, {INDEX} or *.gguf); {hint}",
            root.display()
        )));
    }
    Ok(weights)
}

/// The files that a safetensors index names; all must be there.
fn indexed_files(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let bad = |error: String| Error::input(format!("{}: {error}", index.display()));
    let text = fs::read(index).map_err(|error| bad(error.to_string()))?;
    let Index { weight_map } =
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let files: BTreeSet<String> = weight_map.into_values().collect();
    if files.is_empty() {
        return Err(bad("weight_map names no file".to_owned()));
    }
    for file in &files {
        let plain = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        if !plain {
            return Err(bad(format!("weight_map names {file:?}, outside the model directory")));
        }
        if !index.with_file_name(file).is_file() {
            return Err(bad(format!(
                "names the shard {file}, which is missing; is the download complete?"
            )));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn model(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn paths(dir: &Path) -> Vec<String> {
        Manifest::read(dir).unwrap().files.into_iter().map(|file| file.path).collect()
    }

    const INDEX_OF_TWO: &str =
        r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-1.safetensors"}}"#;

    #[test]
    fn only_the_needed_files_are_taken() {
        let dir = model(&[
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            ("README.md", "x"),
            ("pytorch_model.bin", "x"),
            ("original/params.json", "x"),
            ("consolidated.safetensors", "x"),
            ("model.Q4.gguf", "x"),
            ("m-1.safetensors", "x"),
            ("m-2.safetensors", "x"),
            (INDEX, INDEX_OF_TWO),
        ]);
        let sharded =
            ["config.json", "m-1.safetensors", "m-2.safetensors", INDEX, "tokenizer.json"];
        assert_eq!(paths(dir.path()), sharded);
        let dir = model(&[("consolidated.safetensors", "x"), ("model.safetensors", "x")]);
        assert_eq!(paths(dir.path()), ["model.safetensors"]);
        let dir = model(&[("a.gguf", "x"), ("config.json", "{}")]);
        assert_eq!(paths(dir.path()), ["a.gguf", "config.json"]);
    }

    #[test]
    fn a_single_gguf_file_is_a_model() {
        let dir = model(&[("a.gguf", "xyz"), ("b.gguf", "x"), ("c.txt", "x")]);
        let manifest = Manifest::read(&dir.path().join("a.gguf")).unwrap();
        assert_eq!(manifest.bytes(), 3);
        assert_eq!(manifest.model_path(Path::new("/copy")), Path::new("/copy/a.gguf"));
        assert!(Manifest::read(&dir.path().join("c.txt")).is_err());
    }

    #[test]
    fn what_is_missing_is_named() {
        let table = [
            (model(&[("config.json", "{}")]), "no weights"),
            (model(&[("pytorch_model.bin", "x")]), "convert"),
            (model(&[("m-1.safetensors", "x"), (INDEX, INDEX_OF_TWO)]), "m-2.safetensors"),
            (model(&[(INDEX, "{")]), INDEX),
            (model(&[(INDEX, r#"{"weight_map":{"a":"../../etc/passwd"}}"#)]), "outside"),
        ];
        for (dir, text) in table {
            let error = Manifest::read(dir.path()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Input);
            assert!(error.message.contains(text), "{error}");
        }
        let error = Manifest::read(Path::new("/no/such/model")).unwrap_err();
        assert!(error.message.contains("/no/such/model"), "{error}");
    }

    #[test]
    fn another_state_has_another_key_and_the_same_state_the_same() {
        let dir = model(&[("model.safetensors", "x")]);
        let key = |dir: &Path| Manifest::read(dir).unwrap().key;
        let before = key(dir.path());
        assert_eq!(before, key(dir.path()));
        fs::write(dir.path().join("model.safetensors"), "xy").unwrap();
        assert_ne!(before, key(dir.path()));
    }

    #[test]
    fn links_as_in_the_hugging_face_cache_are_followed() {
        let dir = model(&[("blobs/abc", "weights"), ("snapshots/rev/config.json", "{}")]);
        let snapshot = dir.path().join("snapshots/rev");
        std::os::unix::fs::symlink("../../blobs/abc", snapshot.join("model.safetensors")).unwrap();
        let manifest = Manifest::read(&snapshot).unwrap();
        assert_eq!(manifest.files[1].bytes, 7);
    }
}
