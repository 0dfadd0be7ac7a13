//! The model's tokenizer: `tokenizer.json` by the `tokenizers` crate, and the
//! special tokens that the files beside it name.
//!
//! Left out: chat templates ([`crate::prompts::chat_template`]) and the streaming
//! detokenizer (the engine's, over [`Tokenizer::decode`]).

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::DecoderWrapper;

use crate::{Error, Result};

/// A loaded tokenizer. Immutable and safe to share between threads (by `Arc`).
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
    vocab_size: usize,
    /// Tokens that are matched as they stand in a text, not spelled by the model.
    added_tokens: HashSet<u32>,
    /// Those of them that are no text, and are left out of a decoded one.
    special_ids: HashSet<u32>,
    special_tokens: BTreeMap<String, String>,
    eos_token_ids: Vec<u32>,
    bos_token_id: Option<u32>,
}

/// How the vocabulary spells bytes, as its decoder tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: every byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a single byte.
    SentencePiece,
    /// Tokens are their text.
    Plain,
}

impl Tokenizer {
    /// Loads the tokenizer of a model directory. Truncation and padding that
    /// `tokenizer.json` may carry from training are switched off: farm never cuts
    /// a prompt silently.
    ///
    /// Errors (input): `tokenizer.json` is missing or not a tokenizer; one of the
    /// JSON files beside it is unreadable.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| {
            let hint = match error.kind() {
                std::io::ErrorKind::NotFound => {
                    "; a model directory needs it (save one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(DIR))"
                }
                _ => "",
            };
            Error::input(format!("tokenizer {}: {error}{hint}", path.display()))
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| Error::input(format!("tokenizer {}: {error}", path.display())))?;
        inner
            .with_truncation(None)
            .map_err(|error| Error::input(format!("tokenizer {}: {error}", path.display())))?;
        inner.with_padding(None);

        let special_tokens = special_tokens(dir)?;
        let named =
            |name: &str| special_tokens.get(name).and_then(|token| inner.token_to_id(token));
        let eos_token_ids = match configured_ids(dir, "eos_token_id")? {
            ids if ids.is_empty() => named("eos_token").into_iter().collect(),
            ids => ids,
        };
        let bos_token_id = match configured_ids(dir, "bos_token_id")?.first() {
            Some(&id) => Some(id),
            None => named("bos_token"),
        };
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let spelling = spelling(inner.get_decoder());
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, t)| t.special).map(|(&id, _)| id).collect();
        let added_tokens = added.into_keys().collect();
        Ok(Self {
            inner,
            spelling,
            vocab_size,
            added_tokens,
            special_ids,
            special_tokens,
            eos_token_ids,
            bos_token_id,
        })
    }

    /// Token ids of `text`; with `add_special_tokens` also those that the tokenizer
    /// itself adds (a BOS, say). Special tokens spelled out in the text are
    /// recognised, as HF does.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.inner
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| Error::input(format!("the tokenizer refuses the text: {error}")))
    }

    /// Text of `ids`; unknown ids are dropped, incomplete UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| Error::fault(format!("the tokenizer cannot decode: {error}")))
    }

    /// Highest token id plus one. The model's own `vocab_size` may be larger (padding).
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The vocabulary's spelling of a token (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token in the vocabulary's spelling.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes that a token stands for inside a text; they may be a part of a
    /// UTF-8 character. Empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        if self.added_tokens.contains(&id) {
            return token.into_bytes();
        }
        match self.spelling {
            Spelling::Plain => token.into_bytes(),
            Spelling::ByteLevel => byte_level_bytes(&token),
            Spelling::SentencePiece => match byte_fallback(&token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
        }
    }

    /// Whether a token is left out of a text that is decoded without special tokens.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Ids that end a text: `eos_token_id` of `generation_config.json`, else of
    /// `config.json` (an id or a list), else the tokenizer's `eos_token` — HF's
    /// order. Empty if none is named.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// The id that begins a text, looked up in the same order.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_token_id
    }

    /// The named special tokens (`bos_token`, `eos_token`, …); see [`special_tokens`].
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }
}

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
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::input(format!("{}: {error}", path.display()))),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::input(format!("{}: not valid JSON: {error}", path.display())))
}

/// `field` (an id or a list of ids) of `generation_config.json`, else of `config.json`.
fn configured_ids(dir: &Path, field: &str) -> Result<Vec<u32>> {
    for file in ["generation_config.json", "config.json"] {
        let path = dir.join(file);
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

fn spelling(decoder: Option<&DecoderWrapper>) -> Spelling {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => Spelling::ByteLevel,
        Some(DecoderWrapper::ByteFallback(_) | DecoderWrapper::Metaspace(_)) => {
            Spelling::SentencePiece
        }
        Some(DecoderWrapper::Sequence(sequence)) => sequence
            .get_decoders()
            .iter()
            .map(|part| spelling(Some(part)))
            .find(|&spelling| spelling != Spelling::Plain)
            .unwrap_or(Spelling::Plain),
        _ => Spelling::Plain,
    }
}

/// The byte of SentencePiece's `<0xNN>`.
fn byte_fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// Undoes GPT-2's `bytes_to_unicode`: the printable Latin-1 characters stand for
/// themselves, the other 68 bytes, in order, are U+0100 and up. A character that
/// is outside of the alphabet stands for its UTF-8.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut bytes = Vec::with_capacity(token.len());
    for character in token.chars() {
        let code = character as u32;
        let byte = match u8::try_from(code) {
            Ok(byte) => printable(byte).then_some(byte),
            Err(_) => (0..=u8::MAX).filter(|&byte| !printable(byte)).nth(code as usize - 0x100),
        };
        match byte {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(character.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

/// Tokenizers written by hand, for tests here and in [`crate::prompts`].
#[cfg(test)]
pub(crate) mod testing {
    use std::path::Path;

    /// A word tokenizer with `<s>` (id 0, added in front), `</s>` (1), `<unk>` (2),
    /// the words `hello` (3), `world` (4), `user` (5), and, to be ignored, a
    /// truncation to two tokens.
    pub(crate) fn write_words(dir: &Path) {
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        };
        let tokenizer = serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<unk>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "decoder": null,
            "model": {"type": "WordLevel", "unk_token": "<unk>",
                "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "hello": 3, "world": 4, "user": 5}},
        });
        write(dir, "tokenizer.json", &tokenizer.to_string());
        write(
            dir,
            "tokenizer_config.json",
            r#"{"bos_token":"<s>","eos_token":{"content":"</s>"}}"#,
        );
    }

    pub(crate) fn write(dir: &Path, name: &str, text: &str) {
        std::fs::write(dir.join(name), text).expect("write a test file");
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{write, write_words};
    use super::*;

    #[test]
    fn truncation_of_the_file_is_switched_off_and_special_tokens_are_added_on_request() {
        let dir = tempfile::tempdir().unwrap();
        write_words(dir.path());
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("hello world hello", true).unwrap(), [0, 3, 4, 3]);
        assert_eq!(tokenizer.encode("<s> hello", false).unwrap(), [0, 3]);
        assert_eq!(tokenizer.decode(&[0, 3, 4, 99], true).unwrap(), "hello world");
        assert_eq!((tokenizer.vocab_size(), tokenizer.bos_token_id()), (6, Some(0)));
        assert_eq!(tokenizer.token_bytes(4), b"world");
        assert_eq!(tokenizer.special_tokens()["eos_token"], "</s>");
    }

    #[test]
    fn eos_ids_come_from_generation_config_then_config_then_the_tokenizer() {
        let dir = tempfile::tempdir().unwrap();
        write_words(dir.path());
        let eos = || Tokenizer::from_dir(dir.path()).map(|t| t.eos_token_ids().to_vec());
        assert_eq!(eos().unwrap(), [1]);
        write(dir.path(), "config.json", r#"{"eos_token_id": 4}"#);
        assert_eq!(eos().unwrap(), [4]);
        write(dir.path(), "generation_config.json", r#"{"eos_token_id": [5, 1]}"#);
        assert_eq!(eos().unwrap(), [5, 1]);
        write(dir.path(), "generation_config.json", r#"{"eos_token_id": "five"}"#);
        let error = eos().unwrap_err();
        assert!(error.message.contains("generation_config.json"), "{error}");
    }

    #[test]
    fn missing_and_broken_files_are_input_errors_that_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        for content in [None, Some("{\"not\": \"a tokenizer\"}"), Some("\0")] {
            if let Some(content) = content {
                write(dir.path(), "tokenizer.json", content);
            }
            let error = Tokenizer::from_dir(dir.path()).err().expect("no tokenizer");
            assert_eq!(error.kind, crate::ErrorKind::Input);
            assert!(error.message.contains("tokenizer.json"), "{error}");
        }
    }

    /// Token ids of HF's fast tokenizer for the golden models, and the bytes back.
    #[test]
    fn goldens_of_transformers() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_gqa");
        let tokenizer = Tokenizer::from_dir(&golden).unwrap();
        let cases = read_json(&golden.join("golden.json")).unwrap().expect("golden.json");
        for case in cases["prompts"].as_array().expect("prompts") {
            let ids = |field: &str| -> Vec<u32> {
                serde_json::from_value(case[field].clone()).expect("token ids")
            };
            let (text, prompt) = (case["text"].as_str().expect("text"), ids("prompt_token_ids"));
            assert_eq!(tokenizer.encode(text, true).unwrap(), prompt);
            let special = tokenizer.bos_token_id();
            let content = prompt.iter().filter(|&&id| Some(id) != special);
            let bytes: Vec<u8> = content.flat_map(|&id| tokenizer.token_bytes(id)).collect();
            assert_eq!(bytes, text.as_bytes());
            let greedy = tokenizer.decode(&ids("greedy"), false).unwrap();
            assert_eq!(greedy, case["greedy_text"].as_str().expect("greedy_text"));
        }
    }

    /// Logprobs report tokens by their bytes; both spellings must be undone.
    #[test]
    fn token_bytes_undo_the_spelling() {
        assert_eq!(byte_level_bytes("Ġthe"), b" the");
        assert_eq!(byte_level_bytes("Ċ"), b"\n");
        assert_eq!(byte_level_bytes("Ã©"), "é".as_bytes());
        assert_eq!(byte_level_bytes("\u{143}"), [0xad]);
        assert_eq!(byte_fallback("<0x0A>"), Some(b'\n'));
        assert_eq!((byte_fallback("<0x>"), byte_fallback("<s>")), (None, None));
    }
}
