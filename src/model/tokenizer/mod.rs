//! The model's tokenizer, from whatever form the model brings: `tokenizer.json` (by the
//! `tokenizers` crate), SentencePiece's or tiktoken's `tokenizer.model`, or the vocabulary
//! in a GGUF file; and the special tokens that the files beside it name.
//!
//! The forms without a `tokenizer.json` run on farm's own tables (`pieces`), so that
//! their ids are those of the library each form belongs to: sentencepiece, tiktoken,
//! llama.cpp. `tests/golden/tokenizers` holds what those give.
//!
//! Left out: chat templates ([`crate::prompts::chat_template`]) and the streaming
//! detokenizer (the engine's, over [`Tokenizer::decode`]).

mod byte_level;
mod files;
mod gguf;
#[cfg(test)]
mod golden_tests;
mod json;
mod merge;
mod normalize;
mod pieces;
mod sentencepiece;
mod specials;
mod tiktoken;
mod unigram;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::files::{SidecarFlags, added_tokens, configured_ids};
pub use self::files::{is_missing, read_json, special_tokens};
use self::json::JsonTokenizer;
use self::pieces::PieceTokenizer;
use crate::model::checkpoint::gguf::Metadata;
use crate::model::small_file;
use crate::{Error, Result};

/// Ids that may be free between a SentencePiece model's pieces and a token added to it.
const MAX_VOCABULARY_GAP: usize = 65_536;

/// A loaded tokenizer. Immutable and safe to share between threads (by `Arc`).
pub struct Tokenizer {
    inner: Inner,
    vocab_size: usize,
    special_tokens: BTreeMap<String, String>,
    eos_token_ids: Vec<u32>,
    bos_token_id: Option<u32>,
}

enum Inner {
    Json(Box<JsonTokenizer>),
    Pieces(Box<PieceTokenizer>),
}

/// A tokenizer without `tokenizer.json`, and what its own file says about special tokens.
struct Built {
    pieces: PieceTokenizer,
    /// `bos_token`, `eos_token`, … and their texts.
    named: BTreeMap<String, String>,
    bos: Option<u32>,
    /// Ids that end a text.
    eos: Vec<u32>,
}

impl Tokenizer {
    /// The tokenizer of a model directory; see [`Tokenizer::open`].
    pub fn from_dir(dir: &Path) -> Result<Self> {
        Self::open(dir, None, None)
    }

    /// The tokenizer of a model.
    ///
    /// `tokenizer` (`--tokenizer`) is a `tokenizer.json`, a `tokenizer.model` or a
    /// directory with one of them. Without it: a GGUF model's own vocabulary (`gguf`, its
    /// metadata); `tokenizer.json` or `tokenizer.model` in the model's directory (a
    /// file's is that it lies in); the `tokenizer.model` one directory up, where Meta's
    /// downloads have it.
    ///
    /// Ids that begin and end a text: see [`Tokenizer::eos_token_ids`].
    ///
    /// Errors (input): nothing is there (the message lists where it was looked for), or
    /// what is there is damaged.
    pub fn open(model: &Path, tokenizer: Option<&Path>, gguf: Option<&Metadata>) -> Result<Self> {
        let dir = directory(model);
        if let (None, Some(metadata)) = (tokenizer, gguf)
            && gguf::has_vocabulary(metadata)
        {
            let built = gguf::build(metadata)
                .map_err(|error| error.context(format!("tokenizer of {}", model.display())))?;
            return Ok(Self::from_built(built));
        }
        let path = match tokenizer {
            Some(path) => given(path)?,
            None => found(&dir)?,
        };
        let ends = gguf.map(gguf::special_ids);
        Self::from_file(&path, &dir, ends)
            .map_err(|error| error.context(format!("tokenizer {}", path.display())))
    }

    fn from_built(built: Built) -> Self {
        Self {
            vocab_size: built.pieces.vocabulary.len(),
            special_tokens: built.named,
            eos_token_ids: built.eos,
            bos_token_id: built.bos,
            inner: Inner::Pieces(Box::new(built.pieces)),
        }
    }

    /// `model_dir` and, behind it, the file's own directory may name special tokens;
    /// `gguf` are the ids (BOS, EOS) of a GGUF model that is used with this file.
    fn from_file(
        path: &Path,
        model_dir: &Path,
        gguf: Option<(Option<u32>, Vec<u32>)>,
    ) -> Result<Self> {
        let dir = directory(path);
        let bytes = small_file::read(path).map_err(Error::input)?;
        let mut tokenizer = if path.extension().is_some_and(|extension| extension == "json") {
            Self::from_json(&bytes)?
        } else if tiktoken::recognise(&bytes) {
            Self::from_built(tiktoken::build(&bytes)?)
        } else {
            let (added, flags) = (added_tokens(&dir)?, SidecarFlags::read(&dir)?);
            Self::from_built(sentencepiece::build(&bytes, added, flags)?)
        };
        tokenizer.special_tokens.extend(special_tokens(&dir)?);
        let named = |name: &str| {
            let text = tokenizer.special_tokens.get(name)?;
            tokenizer.token_to_id(text)
        };
        let (named_bos, named_eos) = (named("bos_token"), named("eos_token"));
        let (gguf_bos, gguf_eos) = gguf.unwrap_or_default();
        // What lies beside one GGUF file of many need not be its own.
        let dirs = if gguf_eos.is_empty() { vec![model_dir, &dir] } else { Vec::new() };
        let eos = configured_ids(&dirs, "eos_token_id")?;
        // A bare file knows more ends than the one that is called EOS (Llama 3's turns).
        let own = std::mem::take(&mut tokenizer.eos_token_ids);
        let own = match named_eos {
            Some(id) if !own.contains(&id) => vec![id],
            _ => own,
        };
        tokenizer.eos_token_ids =
            [eos, gguf_eos, own].into_iter().find(|ids| !ids.is_empty()).unwrap_or_default();
        let bos = configured_ids(&dirs, "bos_token_id")?.first().copied();
        tokenizer.bos_token_id = bos.or(gguf_bos).or(named_bos).or(tokenizer.bos_token_id);
        Ok(tokenizer)
    }

    fn from_json(bytes: &[u8]) -> Result<Self> {
        let json = JsonTokenizer::parse(bytes)?;
        Ok(Self {
            vocab_size: json.vocab_size(),
            special_tokens: BTreeMap::new(),
            eos_token_ids: Vec::new(),
            bos_token_id: None,
            inner: Inner::Json(Box::new(json)),
        })
    }

    /// Token ids of `text`; with `add_special_tokens` also those that the tokenizer
    /// itself adds (a BOS, say). Special tokens spelled out in the text are
    /// recognised, as HF does.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        match &self.inner {
            Inner::Json(json) => json
                .inner
                .encode_fast(text, add_special_tokens)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| Error::input(format!("the tokenizer refuses the text: {error}"))),
            Inner::Pieces(pieces) => Ok(pieces.encode(text, add_special_tokens)),
        }
    }

    /// Text of `ids`; unknown ids are dropped, incomplete UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        match &self.inner {
            Inner::Json(json) => json
                .inner
                .decode(ids, skip_special_tokens)
                .map_err(|error| Error::fault(format!("the tokenizer cannot decode: {error}"))),
            Inner::Pieces(pieces) => Ok(pieces.decode(ids, skip_special_tokens)),
        }
    }

    /// Highest token id plus one. The model's own `vocab_size` may be larger (padding).
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Refuses the tokenizer of another model: one that writes text in ids which an embedding of
    /// `vocab_size` rows does not have. Tokens that only a text which spells them out has may
    /// lie beyond (Gemma 3's `<image_soft_token>`, a `[PAD]` of someone's training): such a text
    /// is refused by itself.
    ///
    /// # Errors
    /// An input error that names both numbers.
    pub fn check_fits(&self, vocab_size: usize) -> Result<()> {
        if self.vocab_size <= vocab_size {
            return Ok(());
        }
        let of_text = match &self.inner {
            Inner::Json(json) => json.max_text_id(),
            Inner::Pieces(pieces) => pieces.max_text_id(),
        };
        let framing = self.encode("", true)?.into_iter().max();
        match of_text.max(framing) {
            Some(max) if max as usize >= vocab_size => Err(Error::input(format!(
                "the tokenizer has {} tokens (ids up to {max} in any text), but the model's \
                 embedding {vocab_size} rows: is it another model's tokenizer? --tokenizer names \
                 the right one",
                self.vocab_size
            ))),
            _ => Ok(()),
        }
    }

    /// The vocabulary's spelling of a token (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.inner {
            Inner::Json(json) => json.inner.id_to_token(id),
            Inner::Pieces(pieces) => pieces.vocabulary.get(id).map(|token| token.text.to_string()),
        }
    }

    /// The id of a token in the vocabulary's spelling.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.inner {
            Inner::Json(json) => json.inner.token_to_id(token),
            Inner::Pieces(pieces) => pieces.vocabulary.id(token),
        }
    }

    /// The bytes that a token stands for inside a text; they may be a part of a
    /// UTF-8 character. Empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.inner {
            Inner::Json(json) => json.token_bytes(id),
            Inner::Pieces(pieces) => pieces.token_bytes(id),
        }
    }

    /// Whether a token is left out of a text that is decoded without special tokens.
    pub fn is_special(&self, id: u32) -> bool {
        match &self.inner {
            Inner::Json(json) => json.is_special(id),
            Inner::Pieces(pieces) => pieces.is_special(id),
        }
    }

    /// Ids that end a text: `eos_token_id` of `generation_config.json`, else of
    /// `config.json` (an id or a list), both in the model's directory, else in the
    /// tokenizer's; else those of the GGUF model; else the tokenizer's `eos_token` (HF's
    /// order) or what its file has for one. A GGUF file that brings its own vocabulary is
    /// asked alone. Empty if none is named.
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

/// The special tokens that a GGUF file names, for its chat template; none if it has no
/// vocabulary.
pub fn gguf_special_tokens(metadata: &Metadata) -> BTreeMap<String, String> {
    gguf::special_texts(metadata)
}

/// The path itself if it is a directory, else the one it lies in.
fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !path.is_dir() => match parent.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => parent.to_path_buf(),
        },
        _ => path.to_path_buf(),
    }
}

const FILES: [&str; 2] = ["tokenizer.json", "tokenizer.model"];

/// What `--tokenizer` means.
fn given(path: &Path) -> Result<PathBuf> {
    if path.is_dir() {
        return first_of(FILES.map(|file| path.join(file)).to_vec(), "--tokenizer");
    }
    if path.extension().is_some_and(|extension| extension == "gguf") {
        return Err(Error::usage(format!(
            "--tokenizer {}: a GGUF file's vocabulary serves that file only; give a tokenizer.json or tokenizer.model",
            path.display()
        )));
    }
    first_of(vec![path.to_path_buf()], "--tokenizer")
}

/// The tokenizer of a model directory.
fn found(dir: &Path) -> Result<PathBuf> {
    let mut candidates = FILES.map(|file| dir.join(file)).to_vec();
    // Without its symbolic links and dots a path has its parent.
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    candidates.extend(absolute.parent().map(|parent| parent.join("tokenizer.model")));
    first_of(candidates, "tokenizer")
}

fn first_of(candidates: Vec<PathBuf>, what: &str) -> Result<PathBuf> {
    if let Some(path) = candidates.iter().find(|path| path.is_file()) {
        return Ok(path.clone());
    }
    let list: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
    Err(Error::input(format!(
        "{what}: none of these is there: {}. Give one by --tokenizer, or save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)",
        list.join(", ")
    )))
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
    fn ids_of_text_must_be_in_the_vocabulary_and_added_tokens_may_lie_beyond() {
        let dir = tempfile::tempdir().unwrap();
        write_words(dir.path());
        let path = dir.path().join("tokenizer.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut pad = json["added_tokens"][0].clone();
        (pad["id"], pad["content"]) = (6.into(), "[PAD]".into());
        json["added_tokens"].as_array_mut().unwrap().push(pad);
        write(dir.path(), "tokenizer.json", &json.to_string());
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 7);
        for padded in [6, 7, 64] {
            tokenizer.check_fits(padded).unwrap();
        }
        let error = tokenizer.check_fits(5).unwrap_err();
        assert!(error.message.contains("7 tokens (ids up to 5 in any text)"), "{error}");
        assert!(error.message.contains("embedding 5 rows"), "{error}");
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

    /// A directory of the goldens.
    fn golden(kind: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers").join(kind)
    }

    #[test]
    fn a_tokenizer_is_looked_for_beside_the_model_then_above_it_as_meta_keeps_it() {
        let parent = tempfile::tempdir().unwrap();
        let model = parent.path().join("llama-2-7b");
        std::fs::create_dir(&model).unwrap();
        let weights = model.join("consolidated.00.pth");
        let ends =
            |path: &Path| Tokenizer::open(path, None, None).map(|t| t.eos_token_ids().to_vec());
        let message = ends(&weights).unwrap_err().message;
        for place in ["7b/tokenizer.json", "7b/tokenizer.model", "--tokenizer"] {
            assert!(message.contains(place), "{message}");
        }
        let put = |kind: &str, to: PathBuf| {
            std::fs::copy(golden(kind).join("tokenizer.model"), to).unwrap();
        };
        put("tiktoken", parent.path().join("tokenizer.model"));
        assert_eq!(ends(&model).unwrap().len(), 3);
        put("spm_bpe", model.join("tokenizer.model"));
        write(&model, "consolidated.00.pth", "");
        assert_eq!((ends(&model).unwrap(), ends(&weights).unwrap()), (vec![2], vec![2]));
        write(&model, "tokenizer_config.json", r#"{"eos_token": "<unk>"}"#);
        assert_eq!(ends(&model).unwrap(), [0]);
        write(&model, "generation_config.json", r#"{"eos_token_id": [7, 2]}"#);
        assert_eq!(ends(&model).unwrap(), [7, 2]);
    }

    #[test]
    fn a_given_tokenizer_goes_before_the_models_own() {
        use crate::model::checkpoint::gguf::Value as Meta;
        let dir = tempfile::tempdir().unwrap();
        write_words(dir.path());
        let file = dir.path().join("model.gguf");
        write(dir.path(), "model.gguf", "");
        let mut metadata = Metadata::default();
        metadata.0.insert("tokenizer.ggml.eos_token_id".into(), Meta::Int(4));
        let size = |tokenizer: Option<&Path>, metadata: &Metadata| {
            let tokenizer = Tokenizer::open(&file, tokenizer, Some(metadata))?;
            Ok::<_, Error>((tokenizer.vocab_size(), tokenizer.eos_token_ids().to_vec()))
        };
        // No vocabulary in the file: the directory's, with the ids that the file names.
        assert_eq!(size(None, &metadata).unwrap(), (6, vec![4]));
        let tokens = ["<unk>", "<s>", "</s>", "▁", "a"].map(String::from).to_vec();
        metadata.0.insert("tokenizer.ggml.model".into(), Meta::String("llama".into()));
        metadata.0.insert("tokenizer.ggml.tokens".into(), Meta::Strings(tokens));
        assert_eq!(size(None, &metadata).unwrap(), (5, vec![4, 2]));
        assert_eq!(size(Some(dir.path()), &metadata).unwrap().0, 6);
        assert_eq!(
            size(Some(&golden("spm_bpe").join("tokenizer.model")), &metadata).unwrap().0,
            800
        );
        for wrong in ["other.gguf", "nowhere", "model.gguf"] {
            let error = size(Some(&dir.path().join(wrong)), &metadata).unwrap_err();
            assert!(error.message.contains(wrong), "{error}");
        }
        metadata.0.insert("tokenizer.ggml.eos_token_id".into(), Meta::Int(5));
        let message = size(None, &metadata).unwrap_err().message;
        assert!(message.contains("model.gguf") && message.contains("eos_token_id"), "{message}");
    }

    #[test]
    fn a_file_has_no_files_in_it() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "model.gguf", "");
        let inside = dir.path().join("model.gguf").join("generation_config.json");
        assert_eq!(read_json(&inside).unwrap(), None);
    }
}
