//! The tokenizer over a bare vocabulary, for the forms that come without a
//! `tokenizer.json`: SentencePiece, GGUF, tiktoken.
//!
//! A text is cut at special tokens; each part is put into the vocabulary's spelling and
//! segmented. Decoding is the tokens' bytes in a row.

use std::collections::BTreeMap;

use super::byte_level::{ByteLevel, byte_level_bytes};
use super::merge::{Pairs, Symbol, merge};
use super::normalize::{Normalizer, SPACE};
use super::specials::{Fragment, Specials};
use super::unigram::Unigram;
use super::vocabulary::{Kind, Prefixes, Vocabulary};

/// A tokenizer made of tables.
#[derive(Debug)]
pub(super) struct PieceTokenizer {
    pub vocabulary: Vocabulary,
    pub specials: Specials,
    pub spelling: Spelling,
    pub segmenter: Segmenter,
    /// Goes in front where special tokens are asked for.
    pub bos: Option<u32>,
    /// Goes behind where special tokens are asked for.
    pub eos: Option<u32>,
}

/// How the vocabulary spells text.
#[derive(Debug)]
pub(super) enum Spelling {
    /// `▁` for spaces, `<0xNN>` for bytes.
    SentencePiece {
        normalizer: Normalizer,
        dummy_prefix: DummyPrefix,
        /// `▁` is a space in user-defined tokens too. llama.cpp's converter has
        /// replaced it there already.
        escaped_user_defined: bool,
        /// Characters without a token become bytes.
        byte_fallback: bool,
        /// What becomes of those that do not; neighbours share one.
        unknown: Option<u32>,
    },
    /// GPT-2's: every byte is one printable character.
    ByteLevel(ByteLevel),
}

/// Which parts of a text that is cut at special tokens get the dummy space in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DummyPrefix {
    /// Only what begins the text: HF's `legacy=False`.
    Start,
    /// What begins the text or follows a special token: HF's `legacy=True` and llama.cpp.
    AfterSpecial,
}

/// How spelled text is cut into tokens.
#[derive(Debug)]
pub(super) enum Segmenter {
    Merge {
        pairs: Pairs,
        /// A word that is a token stays whole.
        whole_words: bool,
        /// Pieces that are not taken apart.
        user_defined: Prefixes,
    },
    Unigram(Unigram),
}

impl PieceTokenizer {
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if add_special_tokens {
            ids.extend(self.bos);
        }
        let mut starts = true;
        let mut after_special = true;
        for fragment in self.specials.split(text) {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(part) => self.encode_part(part, starts, after_special, &mut ids),
            }
            starts = false;
            after_special = matches!(fragment, Fragment::Token(_));
        }
        if add_special_tokens {
            ids.extend(self.eos);
        }
        ids
    }

    /// The texts of the ids that are there, by name.
    pub fn names(&self, named: &[(&str, Option<u32>)]) -> BTreeMap<String, String> {
        let text = |id: &Option<u32>| Some(self.vocabulary.get((*id)?)?.text.to_string());
        named.iter().filter_map(|(name, id)| Some((name.to_string(), text(id)?))).collect()
    }

    fn encode_part(&self, part: &str, starts: bool, after_special: bool, ids: &mut Vec<u32>) {
        match &self.spelling {
            Spelling::ByteLevel(bytes) => {
                let mut word = String::new();
                for range in bytes.split(part) {
                    word.clear();
                    word.extend(part[range].bytes().map(|byte| bytes.spell(byte)));
                    self.segment(&word, |_, id| ids.extend(id));
                }
            }
            Spelling::SentencePiece {
                normalizer, dummy_prefix, byte_fallback, unknown, ..
            } => {
                let dummy = match dummy_prefix {
                    DummyPrefix::Start => starts,
                    DummyPrefix::AfterSpecial => after_special,
                };
                let text = normalizer.normalize(part, dummy);
                let mut was_unknown = false;
                self.segment(&text, |piece, id| {
                    let is_unknown = match id {
                        Some(id) => {
                            ids.push(id);
                            false
                        }
                        None => !(*byte_fallback && self.push_bytes(piece, ids)),
                    };
                    if is_unknown && !was_unknown {
                        ids.extend(unknown);
                    }
                    was_unknown = is_unknown;
                });
            }
        }
    }

    /// The piece as byte tokens; false (and nothing pushed) if one of them is missing.
    fn push_bytes(&self, piece: &str, ids: &mut Vec<u32>) -> bool {
        let length = ids.len();
        for byte in piece.bytes() {
            match self.vocabulary.byte_id(byte) {
                Some(id) => ids.push(id),
                None => {
                    ids.truncate(length);
                    return false;
                }
            }
        }
        true
    }

    fn segment(&self, text: &str, mut out: impl FnMut(&str, Option<u32>)) {
        match &self.segmenter {
            Segmenter::Unigram(unigram) => unigram.segment(text, out),
            Segmenter::Merge { pairs, whole_words, user_defined } => {
                if *whole_words && let id @ Some(_) = self.vocabulary.id(text) {
                    return out(text, id);
                }
                let mut symbols = self.symbols(text, user_defined);
                merge(text, &mut symbols, pairs, &self.vocabulary, out);
            }
        }
    }

    /// Characters and user-defined pieces.
    fn symbols(&self, text: &str, user_defined: &Prefixes) -> Vec<Symbol> {
        let mut symbols = Vec::with_capacity(text.len());
        let mut start = 0;
        while let Some(character) = text[start..].chars().next() {
            let (end, id, frozen) = match user_defined.longest(&text[start..]) {
                Some((length, id)) => (start + length, Some(id), true),
                None => {
                    let end = start + character.len_utf8();
                    (end, self.vocabulary.id(&text[start..end]), false)
                }
            };
            symbols.push(Symbol { start, end, id, frozen });
            start = end;
        }
        symbols
    }

    /// The highest id of a token that text is spelled with.
    pub fn max_text_id(&self) -> Option<u32> {
        let spells = |kind| matches!(kind, Kind::Normal | Kind::Byte);
        self.vocabulary.iter().filter(|(_, token)| spells(token.kind)).map(|(id, _)| id).max()
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.get(id).is_some_and(|token| token.kind.is_special())
    }

    /// Text of `ids`; unknown ids are dropped, incomplete UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            let Some(token) = self.vocabulary.get(id) else { continue };
            if !(token.kind.is_special() && skip_special_tokens) {
                bytes.extend(self.token_bytes(id));
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        // The dummy space was not in the text.
        match text.strip_prefix(' ') {
            Some(rest) if self.drops_first_space() => rest.to_string(),
            _ => text.into_owned(),
        }
    }

    fn drops_first_space(&self) -> bool {
        match &self.spelling {
            Spelling::SentencePiece { normalizer: n, .. } => {
                (n.add_dummy_prefix || n.remove_extra_whitespaces) && !n.treat_whitespace_as_suffix
            }
            Spelling::ByteLevel(_) => false,
        }
    }

    /// The bytes that a token stands for inside a text. Empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.vocabulary.get(id) else { return Vec::new() };
        let text = &*token.text;
        let escaped = match (&self.spelling, token.kind) {
            (_, Kind::Byte) => match byte_fallback(text) {
                Some(byte) => return vec![byte],
                None => false,
            },
            (_, Kind::Control | Kind::Unknown) => false,
            (Spelling::SentencePiece { escaped_user_defined, .. }, Kind::UserDefined) => {
                *escaped_user_defined
            }
            (Spelling::SentencePiece { .. }, Kind::Normal | Kind::Unused) => true,
            (Spelling::ByteLevel(_), Kind::UserDefined) => false,
            (Spelling::ByteLevel(_), Kind::Normal | Kind::Unused) => return byte_level_bytes(text),
        };
        if escaped { text.replace(SPACE, " ").into_bytes() } else { text.as_bytes().to_vec() }
    }
}

/// The byte of SentencePiece's `<0xNN>`.
pub(super) fn byte_fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok())?
}
