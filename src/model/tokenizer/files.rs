//! The JSON files beside a model or a tokenizer: what they say about special tokens.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::model::small_file;
use crate::{Error, Result};

/// The named special tokens of a model directory: every `…_token` of
/// `tokenizer_config.json` that is a string or an object with `content`, and those
/// of the older `special_tokens_map.json` that it leaves out.
pub fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut tokens = BTreeMap::new();
    for file in ["special_tokens_map.json", "tokenizer_config.json"] {
        let Some(Value::Object(fields)) = read_json(&dir.join(file))? else { continue };
        for (name, value) in fields.into_iter().filter(|(name, _)| name.ends_with("_token")) {
            let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
            if let Some(text) = text {
                tokens.insert(name, text.to_string());
            }
        }
    }
    Ok(tokens)
}

/// A JSON file, `None` if it is not there. Errors (input) name the file.
pub fn read_json(path: &Path) -> Result<Option<Value>> {
    let bytes = match small_file::read(path) {
        Ok(bytes) => bytes,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(Error::input(format!("{}: {error}", path.display()))),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::input(format!("{}: not valid JSON: {error}", path.display())))
}

/// A file is not there either if what should be its directory is a file (a GGUF model).
pub fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// `field` (an id or a list of ids) of the first directory's `generation_config.json`,
/// else its `config.json`, else of the next directory's.
pub(super) fn configured_ids(dirs: &[&Path], field: &str) -> Result<Vec<u32>> {
    let files = ["generation_config.json", "config.json"];
    for path in dirs.iter().flat_map(|dir| files.map(|file| dir.join(file))) {
        let Some(config) = read_json(&path)? else { continue };
        let values = match config.get(field) {
            None | Some(Value::Null) => continue,
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let id = |value: &Value| {
            value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                Error::input(format!(
                    "{}: {field} must be a token id or a list of them, got {value}",
                    path.display()
                ))
            })
        };
        let ids = values.iter().map(id).collect::<Result<Vec<_>>>()?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}

/// A token that was added to a SentencePiece model after its training.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Left out where special tokens are skipped.
    pub special: bool,
    pub lstrip: bool,
    pub rstrip: bool,
}

/// The tokens that `added_tokens.json` ({text: id}) and `added_tokens_decoder` of
/// `tokenizer_config.json` ({id: {content, special, lstrip, rstrip}}) name, by id; the
/// latter wins.
pub(super) fn added_tokens(dir: &Path) -> Result<Vec<AddedToken>> {
    let mut tokens = BTreeMap::new();
    let path = dir.join("added_tokens.json");
    if let Some(Value::Object(fields)) = read_json(&path)? {
        for (content, id) in fields {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| bad_id(&path, &content))?;
            tokens.insert(id, AddedToken { id, content, special: true, ..Default::default() });
        }
    }
    let path = dir.join("tokenizer_config.json");
    let config = read_json(&path)?;
    let decoder = config.as_ref().and_then(|config| config.get("added_tokens_decoder"));
    for (key, value) in decoder.and_then(Value::as_object).into_iter().flatten() {
        let id = key.parse().map_err(|_| bad_id(&path, key))?;
        let content = value.get("content").and_then(Value::as_str);
        let content = content.ok_or_else(|| bad_id(&path, key))?.to_string();
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
        let (special, lstrip, rstrip) = (flag("special"), flag("lstrip"), flag("rstrip"));
        tokens.insert(id, AddedToken { id, content, special, lstrip, rstrip });
    }
    Ok(tokens.into_values().collect())
}

fn bad_id(path: &Path, token: &str) -> Error {
    Error::input(format!("{}: the added token {token:?} has no text or no id", path.display()))
}

/// What `tokenizer_config.json` says about a `tokenizer.model`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct SidecarFlags {
    pub add_bos_token: Option<bool>,
    pub add_eos_token: Option<bool>,
    pub add_prefix_space: Option<bool>,
    /// The dummy prefix comes after special tokens too.
    pub legacy: bool,
}

impl SidecarFlags {
    pub fn read(dir: &Path) -> Result<Self> {
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        Ok(Self {
            add_bos_token: flag("add_bos_token"),
            add_eos_token: flag("add_eos_token"),
            add_prefix_space: flag("add_prefix_space"),
            legacy: flag("legacy").unwrap_or(false),
        })
    }
}
