//! The vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`), tokenized as
//! llama.cpp's `llama_tokenize` does with `parse_special` (`llama-vocab.cpp`). On the
//! golden texts that is also what sentencepiece (with the dummy prefix after special
//! tokens) and Hugging Face's tokenizers of Llama 3, Qwen 2 and Falcon give.
//!
//! Left out: the vocabularies `bert`, `t5`, `rwkv`, `plamo2`, `gemma4`, and
//! pre-tokenizers that are more than regular expressions.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Built;
use super::byte_level::{ByteLevel, PreTokenizer};
use super::merge::{Pairs, score_priority};
use super::normalize::Normalizer;
use super::pieces::{DummyPrefix, PieceTokenizer, Segmenter, Spelling};
use super::sentencepiece::kind_of;
use super::specials::{Special, Specials};
use super::vocabulary::{Kind, Prefixes, Token, Vocabulary};
use crate::model::checkpoint::gguf::{Metadata, Value};
use crate::{Error, Result};

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Names of special tokens, in HF and in the keys.
const NAMES: [(&str, &str); 6] = [
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
    // The format's own spelling.
    ("sep_token", "seperator"),
    ("mask_token", "mask"),
];

/// Texts that end a generation whatever the file says about them (`special_eog_ids`).
/// Its tokens to fill in a middle are left out: a text goes on behind them.
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Texts that llama.cpp takes for control tokens although they end nothing (those to
/// fill in a middle).
const CONTROLS: [&str; 35] = [
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// Whether the file holds a vocabulary at all.
pub(super) fn has_vocabulary(metadata: &Metadata) -> bool {
    !matches!(metadata.str("tokenizer.ggml.model"), None | Some("none" | "no_vocab"))
}

/// The tokenizer of a GGUF file.
///
/// Errors (input): the vocabulary is of a kind that farm does not read, a list is
/// missing or of another length, a text occurs twice, or a merge makes no token.
pub(super) fn build(metadata: &Metadata) -> Result<Built> {
    let vocabulary = vocabulary(metadata)?;
    match metadata.str("tokenizer.ggml.model") {
        Some("llama") => sentencepiece(metadata, vocabulary),
        Some("gpt2") => byte_pairs(metadata, vocabulary),
        other => Err(Error::input(format!(
            "tokenizer.ggml.model is {}; farm reads llama and gpt2. Give the model's tokenizer.json by --tokenizer",
            other.unwrap_or("missing")
        ))),
    }
}

/// The ids under the keys of a GGUF file, unchecked: BOS, and those that end a text. For
/// models whose tokens come from another file.
pub(super) fn special_ids(metadata: &Metadata) -> (Option<u32>, Vec<u32>) {
    let id = |name: &str| {
        let id = metadata.uint(&format!("tokenizer.ggml.{name}_token_id"))?;
        u32::try_from(id).ok()
    };
    (id("bos"), ["eos", "eot", "eom"].into_iter().filter_map(id).collect())
}

/// The texts of the special tokens that the keys name.
pub(super) fn special_texts(metadata: &Metadata) -> BTreeMap<String, String> {
    let tokens = metadata.strings(TOKENS).unwrap_or(&[]);
    let text = |(name, key): (&str, &str)| {
        let id = metadata.uint(&format!("tokenizer.ggml.{key}_token_id"))?;
        let text = tokens.get(usize::try_from(id).ok()?)?;
        Some((name.to_string(), text.clone()))
    };
    NAMES.into_iter().filter_map(text).collect()
}

/// SentencePiece's BPE by scores.
fn sentencepiece(metadata: &Metadata, vocabulary: Vocabulary) -> Result<Built> {
    let scores = scores(metadata, vocabulary.len())?;
    let pairs = Pairs::ByToken(scores.into_iter().map(|s| Some(score_priority(s))).collect());
    let add_space = metadata.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let unknown = id(metadata, "unknown", &vocabulary)?.or(Some(0));
    let spelling = Spelling::SentencePiece {
        normalizer: Normalizer::plain(add_space),
        dummy_prefix: DummyPrefix::AfterSpecial,
        escaped_user_defined: false,
        byte_fallback: true,
        unknown,
    };
    // llama.cpp's defaults of this kind of vocabulary, those of Llama 2.
    let defaults = Defaults { bos: Some(1), eos: Some(2), add_bos: true };
    finish(metadata, vocabulary, spelling, pairs, false, defaults)
}

/// GPT-2's BPE by a list of merges.
fn byte_pairs(metadata: &Metadata, vocabulary: Vocabulary) -> Result<Built> {
    let name = metadata.str("tokenizer.ggml.pre").unwrap_or("");
    let pre = PreTokenizer::named(name).unwrap_or_else(|| {
        tracing::warn!(
            "tokenizer.ggml.pre is {name:?}, which farm does not know: texts are cut into words as by llama.cpp's \"default\", which may cost quality. Give the model's tokenizer.json by --tokenizer"
        );
        PreTokenizer::DEFAULT
    });
    let pairs = Pairs::Listed(merges(metadata, &vocabulary)?);
    let spelling = Spelling::ByteLevel(ByteLevel::new(pre.patterns)?);
    let defaults = Defaults { bos: None, eos: None, add_bos: pre.add_bos };
    finish(metadata, vocabulary, spelling, pairs, pre.whole_words, defaults)
}

/// What holds where the file says nothing.
struct Defaults {
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

fn finish(
    metadata: &Metadata,
    vocabulary: Vocabulary,
    spelling: Spelling,
    pairs: Pairs,
    whole_words: bool,
    defaults: Defaults,
) -> Result<Built> {
    let within = |id: &u32| (*id as usize) < vocabulary.len();
    let named = |name: &str| id(metadata, name, &vocabulary);
    let bos = named("bos")?.or(defaults.bos.filter(within));
    let eos = named("eos")?.or(defaults.eos.filter(within));
    let mut ends: Vec<u32> = eos.into_iter().collect();
    ends.extend([named("eot")?, named("eom")?].into_iter().flatten());
    ends.extend(end_ids(&vocabulary));
    let mut seen = HashSet::new();
    ends.retain(|id| seen.insert(*id));
    // What is out of range is an error here already.
    NAMES.iter().try_for_each(|(_, key)| named(key).map(drop))?;
    let mut names = special_texts(metadata);
    let text = |id| vocabulary.get(id).map(|token| token.text.to_string());
    for (name, id) in [("bos_token", bos), ("eos_token", eos)] {
        names.extend(id.and_then(text).map(|text| (name.to_string(), text)));
    }
    let flag = |key: &str, default| metadata.bool(key).unwrap_or(default);
    let add_bos = flag("tokenizer.ggml.add_bos_token", defaults.add_bos);
    let add_eos = flag("tokenizer.ggml.add_eos_token", false);
    let segmenter = Segmenter::Merge { pairs, whole_words, user_defined: Prefixes::default() };
    let specials = specials(metadata, &vocabulary);
    let pieces = PieceTokenizer {
        vocabulary,
        specials,
        spelling,
        segmenter,
        bos: bos.filter(|_| add_bos),
        eos: eos.filter(|_| add_eos),
    };
    Ok(Built { bos, eos: ends, named: names, pieces })
}

fn vocabulary(metadata: &Metadata) -> Result<Vocabulary> {
    let texts = metadata
        .strings(TOKENS)
        .ok_or_else(|| Error::input(format!("{TOKENS} is missing or not a list of texts")))?;
    let types = match metadata.0.get(TYPES) {
        None => None,
        Some(Value::Ints(types)) if types.len() >= texts.len() => Some(types),
        Some(_) => {
            return Err(Error::input(format!(
                "{TYPES} is not a list of integers, one for each of the {} tokens",
                texts.len()
            )));
        }
    };
    let token = |(id, text): (usize, &String)| Token {
        // llama.cpp's name for an empty token.
        text: if text.is_empty() { format!("[EMPTY_{id}]") } else { text.clone() }.into(),
        // llama.cpp gives unused tokens out like others, where SentencePiece splits them.
        kind: match types.map(|types| kind_of(types[id])) {
            None | Some(None | Some(Kind::Unused)) => Kind::Normal,
            Some(Some(kind)) => kind,
        },
    };
    let mut tokens: Vec<Token> = texts.iter().enumerate().map(token).collect();
    override_kinds(&mut tokens);
    Vocabulary::new(tokens).map_err(|error| error.context(TOKENS))
}

/// llama.cpp distrusts the types of well-known texts.
fn override_kinds(tokens: &mut [Token]) {
    let is_there = |text: &str| tokens.iter().any(|token| *token.text == *text);
    // gpt-oss ends at <|return|> and <|call|>, Solar at <|calls|> and <|flush|>; to both
    // <|end|> is an ordinary token. To Gemma 4 </s> is.
    let end_is_text = is_there("<|end|>")
        && (is_there("<|call|>") && is_there("<|return|>")
            || (is_there("<|call|>") || is_there("<|calls|>")) && is_there("<|flush|>"));
    let s_is_text = is_there("<|tool_response>") || is_there("<|plamo:eos|>");
    for token in tokens {
        token.kind = match &*token.text {
            "<|channel|>" | "<|message|>" | "<|start|>" | "<|constrain|>" => Kind::UserDefined,
            "<|end|>" if end_is_text => Kind::UserDefined,
            "</s>" if s_is_text => Kind::Normal,
            text if ENDS.contains(&text) || CONTROLS.contains(&text) => Kind::Control,
            _ => continue,
        };
    }
}

/// Tokens whose text ends a generation.
fn end_ids(vocabulary: &Vocabulary) -> impl Iterator<Item = u32> {
    let ids = ENDS.iter().filter_map(|text| vocabulary.id(text));
    ids.filter(|&id| vocabulary.get(id).is_some_and(|token| token.kind == Kind::Control))
}

/// The id under `tokenizer.ggml.NAME_token_id`.
fn id(metadata: &Metadata, name: &str, vocabulary: &Vocabulary) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(value) = metadata.0.get(&key) else { return Ok(None) };
    let id = metadata.uint(&key).filter(|&id| id < vocabulary.len() as u64);
    match id.and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::input(format!(
            "{key} is {value:?}, which is none of the {} tokens",
            vocabulary.len()
        ))),
    }
}

/// The scores by id; 0 where the file has none.
fn scores(metadata: &Metadata, count: usize) -> Result<Vec<f32>> {
    let scores = match metadata.0.get(SCORES) {
        None => vec![0.0; count],
        Some(Value::Floats(scores)) if scores.len() >= count => scores[..count].to_vec(),
        Some(Value::Ints(scores)) if scores.len() >= count => {
            scores[..count].iter().map(|&score| score as f32).collect()
        }
        Some(_) => {
            return Err(Error::input(format!(
                "{SCORES} is not a list of numbers, one for each of the {count} tokens"
            )));
        }
    };
    match scores.iter().position(|score| score.is_nan()) {
        Some(id) => Err(Error::input(format!("{SCORES}: that of token {id} is not a number"))),
        None => Ok(scores),
    }
}

/// The merges by their parts' ids: rank and result.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<HashMap<(u32, u32), (u32, u32)>> {
    let list = metadata
        .strings(MERGES)
        .ok_or_else(|| Error::input(format!("{MERGES} is missing or not a list of texts")))?;
    let mut pairs = HashMap::with_capacity(list.len());
    for (rank, merge) in (0u32..).zip(list) {
        // A part may begin with a space, as llama.cpp reads it.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let entry = merge[first..].find(' ').and_then(|space| {
            let (left, right) = (&merge[..first + space], &merge[first + space + 1..]);
            let merged = vocabulary.id(&format!("{left}{right}"))?;
            Some(((vocabulary.id(left)?, vocabulary.id(right)?), (rank, merged)))
        });
        let (parts, made) = entry.ok_or_else(|| {
            Error::input(format!(
                "{MERGES}: number {rank}, {merge:?}, is not two tokens that make a third"
            ))
        })?;
        // Of a merge that is listed twice the first counts.
        pairs.entry(parts).or_insert(made);
    }
    Ok(pairs)
}

/// Control, user-defined and unknown tokens are cut out of the text. To Phi-3 they
/// swallow the white space behind them, which no key of the file says.
fn specials(metadata: &Metadata, vocabulary: &Vocabulary) -> Specials {
    let name = metadata.str("general.name").unwrap_or("").to_lowercase();
    let phi3 = name.contains("phi-3") || name.contains("phi3");
    let cut = vocabulary.iter().filter(|(_, token)| {
        matches!(token.kind, Kind::Control | Kind::UserDefined | Kind::Unknown)
    });
    let special = |(id, token): (u32, &Token)| Special {
        rstrip: phi3 && !matches!(&*token.text, "<unk>" | "<s>" | "<|endoftext|>"),
        text: token.text.clone(),
        id,
        lstrip: false,
    };
    Specials::new(cut.map(special).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&str, Value)]) -> Metadata {
        Metadata(pairs.iter().map(|(key, value)| (key.to_string(), value.clone())).collect())
    }

    fn texts(texts: &[&str]) -> Value {
        Value::Strings(texts.iter().map(|text| text.to_string()).collect())
    }

    fn spm() -> Metadata {
        metadata(&[
            ("tokenizer.ggml.model", Value::String("llama".into())),
            (TOKENS, texts(&["<unk>", "<s>", "</s>", "▁", "a", "▁a", "<|eot_id|>", "<0x62>"])),
            (SCORES, Value::Floats(vec![0., 0., 0., -3., -2., -1., 0., 0.])),
            (TYPES, Value::Ints(vec![2, 3, 3, 1, 1, 1, 4, 6])),
        ])
    }

    fn bpe() -> Metadata {
        metadata(&[
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", Value::String("llama-bpe".into())),
            (TOKENS, texts(&["a", "b", "Ġ", "ab", "Ġab", "<|end_of_text|>"])),
            (MERGES, texts(&["a b", "Ġ ab", "a b"])),
            ("tokenizer.ggml.bos_token_id", Value::Int(5)),
        ])
    }

    #[test]
    fn sentencepiece_by_scores_has_the_defaults_of_llama_2() {
        let built = build(&spm()).unwrap();
        assert_eq!(built.pieces.encode("a a", true), [1, 5, 5]);
        assert_eq!(built.pieces.encode("<s>ba<|eot_id|>", false), [1, 3, 7, 4, 6]);
        assert_eq!((built.bos, built.eos), (Some(1), vec![2, 6]));
        assert_eq!(built.named["eos_token"], "</s>");
        assert_eq!(built.pieces.token_bytes(7), b"b");
        assert_eq!(built.pieces.decode(&[1, 5, 5, 6], true), "a a");
        let mut unprefixed = spm();
        unprefixed.0.insert("tokenizer.ggml.add_space_prefix".into(), Value::Bool(false));
        unprefixed.0.insert("tokenizer.ggml.add_eos_token".into(), Value::Bool(true));
        assert_eq!(build(&unprefixed).unwrap().pieces.encode("a", true), [1, 4, 2]);
    }

    #[test]
    fn byte_pairs_by_merges_and_pre_tokenizer() {
        let built = build(&bpe()).unwrap();
        assert_eq!(built.pieces.encode("ab ab<|end_of_text|>", true), [5, 3, 4, 5]);
        assert_eq!((built.bos, built.eos), (Some(5), vec![5]));
        let mut unknown = bpe();
        unknown.0.insert("tokenizer.ggml.pre".into(), Value::String("of 2030".into()));
        assert_eq!(build(&unknown).unwrap().pieces.encode("ab ab", true), [3, 4]);
    }

    #[test]
    fn senseless_vocabularies_are_errors_that_name_the_key() {
        let big = vec![Value::Int(8), Value::Int(-1), Value::Int(i64::MAX), Value::Bool(true)];
        let mut cases: Vec<(Metadata, &str, Value)> =
            big.into_iter().map(|value| (spm(), "tokenizer.ggml.eos_token_id", value)).collect();
        cases.extend([
            (spm(), "tokenizer.ggml.model", Value::String("bert".into())),
            (spm(), TOKENS, Value::Ints(vec![1])),
            (spm(), TOKENS, texts(&["a", "b", "a"])),
            (spm(), SCORES, Value::Floats(vec![0.0])),
            (spm(), SCORES, Value::Floats(vec![f32::NAN; 8])),
            (spm(), TYPES, Value::Ints(vec![1])),
            (bpe(), MERGES, texts(&["a c"])),
            (bpe(), MERGES, texts(&["b a"])),
            (bpe(), MERGES, texts(&["ab", "", " ", "é"])),
            (bpe(), MERGES, Value::Bool(false)),
        ]);
        for (mut metadata, key, value) in cases {
            metadata.0.insert(key.into(), value.clone());
            let error = build(&metadata).err().unwrap_or_else(|| panic!("{key} {value:?}"));
            assert!(error.message.contains(key), "{error}");
        }
        // Types that do not exist, and no tokens at all, are no reason to panic.
        let mut odd = spm();
        odd.0.insert(TYPES.into(), Value::Ints(vec![i64::MIN; 8]));
        odd.0.insert(TOKENS.into(), texts(&[]));
        let _ = build(&odd).map(|built| built.pieces.encode("a <s>", true));
    }
}
