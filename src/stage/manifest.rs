//! Which files a run needs of a model and its tokenizer, and the key that names this state
//! of them.
//!
//! In the copy the model's files lie at the top, a tokenizer from elsewhere under
//! `tokenizer/` with the files that lay beside it, so that a copy means what its sources
//! mean. Left out: adapters, which are small, and for which a model that is there already
//! would have to be copied again.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::sources::{ModelPaths, model_name, resolved};
use crate::kernels::quant::QuantType;
use crate::model::checkpoint::{Format, ModelFiles, QUANTIZER_VERSION, QuantizedFile};
use crate::{Error, Result};

/// What describes a model, beside its weights.
const CONFIG_FILES: [&str; 3] = ["config.json", "generation_config.json", "params.json"];
/// What describes a tokenizer, beside its vocabulary.
const TEXT_FILES: [&str; 4] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// Vocabularies.
const TOKENIZER_FILES: [&str; 5] =
    ["tokenizer.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"];

/// The weights of a copy that is quantized while it is staged.
const QUANTIZED_FILE: &str = "model.safetensors";

/// One file of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path below the copy.
    pub path: String,
    /// Where it is read, absolute.
    pub source: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Time of the last change, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Whether it is made from the model at `source` while it is staged.
    #[serde(default)]
    pub made: bool,
}

/// The files that a run needs, as they are at their sources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The model's name; see [`model_name`].
    pub name: String,
    /// The needed files in order of path.
    pub files: Vec<FileEntry>,
    /// Short hash of sources, sizes and times: another state has another key.
    pub key: String,
    /// What the weights are quantized to in the copy, where they are.
    pub quantized: Option<String>,
    /// What to load where nothing is copied.
    pub in_place: ModelPaths,
    /// The same below a copy.
    below_copy: ModelPaths,
}

impl Manifest {
    /// Looks at the files that `asked` names and those that belong to them. Symlinks (as in
    /// the Hugging Face cache) are followed; a repository there stands for its snapshot.
    ///
    /// # Errors
    /// Input errors for what is missing, cannot be read, or is not what it should be; see
    /// [`ModelFiles::find`].
    pub fn read(asked: &ModelPaths) -> Result<Self> {
        let mut model = resolved(&asked.model)?;
        let found = ModelFiles::find(&model)?;
        if let (Some(first), false) = (found.weights.first(), model.is_dir()) {
            // Any part of a split model stands for all of them.
            model = first.clone();
        }
        let name = model_name(&model);
        let root = canonical(&found.dir, "--model")?;
        let mut listing = Listing::default();
        for path in &found.weights {
            listing.add("", &root, &[file_name(path)?]);
        }
        listing.add("", &root, index(found.format).as_slice());
        listing.add("", &root, &CONFIG_FILES);
        listing.add("", &root, &TEXT_FILES);

        let tokenizer = match &asked.tokenizer {
            Some(path) => Some(resolved(path)?),
            None => tokenizer_of_meta(&root, found.format),
        };
        if tokenizer.is_none() {
            listing.add("", &root, &TOKENIZER_FILES);
        }
        let mut below_copy = ModelPaths::default();
        if !model.is_dir() {
            below_copy.model = file_name(&model)?.into();
        }
        below_copy.tokenizer =
            tokenizer.as_deref().map(|path| listing.add_tokenizer(path)).transpose()?;
        let in_place = ModelPaths { model, tokenizer };
        let files = listing.entries()?;
        Ok(Self { name, key: key_of(&files), quantized: None, files, in_place, below_copy })
    }

    /// The same with the weights quantized on their way into one file; as it is where the
    /// model has nothing to quantize, or is in a form that is quantized while it is loaded.
    ///
    /// # Errors
    /// See [`QuantizedFile::open`].
    pub fn quantized(mut self, quant: QuantType) -> Result<Self> {
        let model = &self.in_place.model;
        let Some(file) = QuantizedFile::open(model, quant)? else { return Ok(self) };
        let found = ModelFiles::find(model)?;
        let is_weights = |file: &FileEntry| {
            index(found.format) == Some(&file.path)
                || found.weights.iter().any(|path| file_name(path).is_ok_and(|p| p == file.path))
        };
        let mtime_ns = 0; // Those of the files that it is made from are in the key.
        // Beside Meta's form a config.json is not looked at; beside the copy it would be.
        let is_meta = found.format == Format::Meta;
        let is_ignored = |file: &FileEntry| is_meta && file.path == "config.json";
        self.files.retain(|file| !is_weights(file) && !is_ignored(file));
        self.files.push(FileEntry {
            path: QUANTIZED_FILE.into(),
            source: canonical(model, "--model")?,
            bytes: file.bytes(),
            mtime_ns,
            made: true,
        });
        self.files.sort_by(|a, b| a.path.cmp(&b.path));
        let key = format!("{} {} {QUANTIZER_VERSION}", self.key, quant.name());
        self.key = short_hash([key]);
        self.quantized = Some(quant.name().to_owned());
        Ok(self)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// What to load when the files are in `copy`.
    pub fn in_copy(&self, copy: &Path) -> ModelPaths {
        // Joined to nothing, a path would end in a slash.
        let below = |path: &PathBuf| match path.as_os_str().is_empty() {
            true => copy.to_owned(),
            false => copy.join(path),
        };
        let ModelPaths { model, tokenizer } = &self.below_copy;
        ModelPaths { model: below(model), tokenizer: tokenizer.as_ref().map(below) }
    }

    /// The name of the staged copy: readable, and different for each state of each model.
    pub fn copy_name(&self) -> String {
        let name = safe_name(&self.name);
        let name = name.trim_start_matches('.');
        let name = &name[..name.len().min(80)];
        match &self.quantized {
            Some(quant) => format!("{name}-{quant}-{}", self.key),
            None => format!("{name}-{}", self.key),
        }
    }
}

/// Files by their place in the copy.
#[derive(Default)]
struct Listing(BTreeMap<String, PathBuf>);

impl Listing {
    /// Those of `names` that are in `dir`, for the folder `folder` of the copy.
    fn add(&mut self, folder: &str, dir: &Path, names: &[&str]) {
        for name in names.iter().filter(|name| dir.join(name).is_file()) {
            self.0.insert(format!("{folder}{name}"), dir.join(name));
        }
    }

    /// The tokenizer at `path` with what lies beside it; returns its path in the copy.
    fn add_tokenizer(&mut self, path: &Path) -> Result<PathBuf> {
        const FOLDER: &str = "tokenizer/";
        const FLAG: &str = "--tokenizer";
        let is_dir = path.is_dir();
        let dir = canonical(if is_dir { path } else { parent(path) }, FLAG)?;
        let mut file = "";
        if is_dir {
            self.add(FOLDER, &dir, &TOKENIZER_FILES);
            if !TOKENIZER_FILES[..2].iter().any(|name| dir.join(name).is_file()) {
                return Err(Error::input(format!(
                    "{FLAG} {}: neither tokenizer.json nor tokenizer.model is there",
                    path.display()
                )));
            }
        } else {
            file = file_name(path)?;
            self.add(FOLDER, &dir, &[file, "added_tokens.json"]);
            if !dir.join(file).is_file() {
                return Err(Error::input(format!("{FLAG} {}: no such file", path.display())));
            }
        }
        self.add(FOLDER, &dir, &TEXT_FILES);
        // They may name the tokens that end a text.
        self.add(FOLDER, &dir, &CONFIG_FILES[..2]);
        Ok(Path::new("tokenizer").join(file).components().collect())
    }

    /// Each is opened: a file that cannot be read is a bad model, said before any work.
    fn entries(self) -> Result<Vec<FileEntry>> {
        let entry = |(path, source): (String, PathBuf)| {
            let meta = fs::File::open(&source)
                .and_then(|file| file.metadata())
                .map_err(|e| Error::input(format!("model file {}: {e}", source.display())))?;
            let mtime_ns = meta.mtime().wrapping_mul(1_000_000_000).wrapping_add(meta.mtime_nsec());
            Ok(FileEntry { path, source, bytes: meta.len(), mtime_ns, made: false })
        };
        self.0.into_iter().map(entry).collect()
    }
}

/// `name` with `_` for what may mean something in a path.
fn safe_name(name: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.chars().map(|c| if safe(c) { c } else { '_' }).collect()
}

/// The index of shards that a form of checkpoint may have.
fn index(format: Format) -> Option<&'static str> {
    match format {
        Format::Safetensors => Some("model.safetensors.index.json"),
        Format::Torch => Some("pytorch_model.bin.index.json"),
        Format::Meta | Format::Gguf => None,
    }
}

/// Meta's downloads keep the tokenizer of several models in the directory above them.
fn tokenizer_of_meta(root: &Path, format: Format) -> Option<PathBuf> {
    let above = root.parent()?.join("tokenizer.model");
    let has_own = TOKENIZER_FILES[..2].iter().any(|name| root.join(name).is_file());
    (format != Format::Gguf && !has_own && above.is_file()).then_some(above)
}

fn canonical(dir: &Path, flag: &str) -> Result<PathBuf> {
    fs::canonicalize(dir).map_err(|e| Error::input(format!("{flag} {}: {e}", dir.display())))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn file_name(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::input(format!("{}: the file's name is no text", path.display())))
}

fn key_of(files: &[FileEntry]) -> String {
    let parts = files.iter().flat_map(|file| {
        [
            file.path.as_bytes().to_vec(),
            file.source.as_os_str().as_encoded_bytes().to_vec(),
            file.bytes.to_le_bytes().to_vec(),
            file.mtime_ns.to_le_bytes().to_vec(),
        ]
    });
    short_hash(parts)
}

/// Of parts that are told apart by their lengths.
fn short_hash(parts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        let part = part.as_ref();
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    /// Files in a directory.
    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn read(model: impl Into<PathBuf>) -> Result<Manifest> {
        Manifest::read(&ModelPaths::of(model))
    }

    fn paths(manifest: &Manifest) -> Vec<&str> {
        manifest.files.iter().map(|file| file.path.as_str()).collect()
    }

    const INDEX: &str = "model.safetensors.index.json";
    const INDEX_OF_TWO: &str =
        r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors","c":"m-1.safetensors"}}"#;
    const TORCH_INDEX: &str = r#"{"weight_map":{"a":"p-1.bin"}}"#;

    #[test]
    fn only_the_needed_files_are_taken() {
        // (what is there, what is taken)
        type Case = (&'static [(&'static str, &'static str)], &'static [&'static str]);
        let table: [Case; 6] = [
            (
                &[
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
                    ("pytorch_model.bin.index.json", TORCH_INDEX),
                ],
                &["config.json", "m-1.safetensors", "m-2.safetensors", INDEX, "tokenizer.json"],
            ),
            (
                &[("consolidated.safetensors", "x"), ("model.safetensors", "x")],
                &["model.safetensors"],
            ),
            (
                &[("p-1.bin", "x"), ("pytorch_model.bin.index.json", TORCH_INDEX), ("x.bin", "")],
                &["p-1.bin", "pytorch_model.bin.index.json"],
            ),
            (
                &[("pytorch_model.bin", "x"), ("merges.txt", "x")],
                &["merges.txt", "pytorch_model.bin"],
            ),
            (
                &[
                    ("consolidated.00.pth", "x"),
                    ("consolidated.01.pth", "x"),
                    ("params.json", "{}"),
                    ("tokenizer.model", "x"),
                    ("checklist.chk", "x"),
                ],
                &["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"],
            ),
            (&[("a.gguf", "x"), ("config.json", "{}")], &["a.gguf", "config.json"]),
        ];
        for (there, taken) in table {
            let dir = files(there);
            let manifest = read(dir.path()).unwrap();
            assert_eq!(paths(&manifest), taken);
            assert_eq!(manifest.in_copy(Path::new("/copy")), ModelPaths::of("/copy"));
        }
    }

    #[test]
    fn a_gguf_file_is_a_model_and_a_part_of_one_brings_the_others() {
        let dir = files(&[("a.gguf", "xyz"), ("b.gguf", "x"), ("c.txt", "x")]);
        let manifest = read(dir.path().join("a.gguf")).unwrap();
        assert_eq!((manifest.bytes(), manifest.name.as_str()), (3, "a.gguf"));
        assert_eq!(manifest.in_copy(Path::new("/copy")), ModelPaths::of("/copy/a.gguf"));
        assert!(read(dir.path().join("c.txt")).is_err());
        let dir = files(&[("m-00001-of-00002.gguf", "x"), ("m-00002-of-00002.gguf", "x")]);
        let manifest = read(dir.path().join("m-00002-of-00002.gguf")).unwrap();
        assert_eq!(paths(&manifest), ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
        let copy = manifest.in_copy(Path::new("/copy"));
        assert_eq!(copy, ModelPaths::of("/copy/m-00001-of-00002.gguf"));
        assert_eq!(read(dir.path().join("m-00001-of-00002.gguf")).unwrap(), manifest);
    }

    #[test]
    fn what_is_missing_is_named() {
        let table = [
            (files(&[("config.json", "{}")]), "no weights"),
            (files(&[("m-1.safetensors", "x"), (INDEX, INDEX_OF_TWO)]), "m-2.safetensors"),
            (files(&[(INDEX, "{")]), INDEX),
            (files(&[(INDEX, r#"{"weight_map":{"a":"../../etc/passwd"}}"#)]), "leaves the dir"),
            (files(&[("consolidated.01.pth", "x")]), "consolidated.00.pth"),
            (files(&[("m-00001-of-00002.gguf", "x")]), "m-00002-of-00002.gguf"),
        ];
        for (dir, text) in table {
            let error = read(dir.path()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Input);
            assert!(error.message.contains(text), "{error}");
        }
        let error = read("/no/such/model").unwrap_err();
        assert!(error.message.contains("/no/such/model"), "{error}");
    }

    #[test]
    fn another_state_of_any_source_has_another_key_and_the_same_state_the_same() {
        let dir = files(&[
            ("m/model.safetensors", "x"),
            ("m/tokenizer.json", "own"),
            ("t/tokenizer.json", "{}"),
            ("t/config.json", "{}"),
        ]);
        let asked =
            ModelPaths { model: dir.path().join("m"), tokenizer: Some(dir.path().join("t")) };
        let key = |asked: &ModelPaths| Manifest::read(asked).unwrap().key;
        let before = key(&asked);
        assert_eq!(before, key(&asked));
        assert_ne!(before, key(&ModelPaths { tokenizer: None, ..asked.clone() }));
        let unused = "m/tokenizer.json";
        for changed in [unused, "m/model.safetensors", "t/config.json"] {
            let last = key(&asked);
            fs::write(dir.path().join(changed), "something longer").unwrap();
            assert_eq!(key(&asked) == last, changed == unused, "{changed}");
        }
    }

    #[test]
    fn links_as_in_the_hugging_face_cache_are_followed() {
        let cache = "models--org--name";
        let dir = files(&[
            (&format!("{cache}/blobs/abc"), "weights"),
            (&format!("{cache}/snapshots/rev/config.json"), "{}"),
            (&format!("{cache}/refs/main"), "rev"),
        ]);
        let repository = dir.path().join(cache);
        let snapshot = repository.join("snapshots/rev");
        std::os::unix::fs::symlink("../../blobs/abc", snapshot.join("model.safetensors")).unwrap();
        let manifest = read(&snapshot).unwrap();
        assert_eq!((manifest.files[1].bytes, manifest.name.as_str()), (7, "org/name"));
        assert!(manifest.copy_name().starts_with("org_name-"));
        assert_eq!(read(&repository).unwrap(), manifest);
    }

    #[test]
    fn a_tokenizer_from_elsewhere_replaces_the_models_own() {
        let dir = files(&[
            ("m/model.safetensors", "x"),
            ("m/config.json", "{}"),
            ("m/tokenizer.json", "own"),
            ("m/tokenizer_config.json", "own"),
            ("t/tokenizer.json", "{}"),
            ("t/other.model", "x"),
            ("t/generation_config.json", "{}"),
            ("t/model.safetensors", "not needed"),
        ]);
        let read = |tokenizer: &str| {
            let tokenizer = Some(dir.path().join(tokenizer));
            Manifest::read(&ModelPaths { tokenizer, ..ModelPaths::of(dir.path().join("m")) })
        };
        let own = ["config.json", "model.safetensors"];
        let beside = "tokenizer/generation_config.json";
        for (given, file, in_copy) in [
            ("t", "tokenizer/tokenizer.json", "/copy/tokenizer"),
            ("t/tokenizer.json", "tokenizer/tokenizer.json", "/copy/tokenizer/tokenizer.json"),
            ("t/other.model", "tokenizer/other.model", "/copy/tokenizer/other.model"),
        ] {
            let manifest = read(given).unwrap();
            let mut expected = own.to_vec();
            expected.extend([beside, file]);
            expected.sort();
            // The model's template is used where the tokenizer brings none.
            expected.push("tokenizer_config.json");
            assert_eq!(paths(&manifest), expected);
            let copy = manifest.in_copy(Path::new("/copy"));
            assert_eq!(copy.tokenizer, Some(in_copy.into()));
            assert_eq!(manifest.in_place.tokenizer, Some(dir.path().join(given)));
        }
        for (missing, why) in [("m/none.json", "no such file"), ("x/y", "--tokenizer")] {
            let error = read(missing).unwrap_err();
            assert!(error.message.contains(why), "{error}");
        }
        fs::remove_file(dir.path().join("t/tokenizer.json")).unwrap();
        assert!(read("t").unwrap_err().message.contains("tokenizer.model"));
    }

    #[test]
    fn metas_tokenizer_lies_above_the_model() {
        let dir = files(&[
            ("7B/consolidated.00.pth", "x"),
            ("7B/params.json", "{}"),
            ("tokenizer.model", "x"),
            ("gguf/a.gguf", "x"),
        ]);
        let manifest = read(dir.path().join("7B")).unwrap();
        assert_eq!(
            paths(&manifest),
            ["consolidated.00.pth", "params.json", "tokenizer/tokenizer.model"]
        );
        let copy = manifest.in_copy(Path::new("/copy"));
        assert_eq!(copy.tokenizer, Some("/copy/tokenizer/tokenizer.model".into()));
        assert_eq!(paths(&read(dir.path().join("gguf")).unwrap()), ["a.gguf"]);
    }
}
