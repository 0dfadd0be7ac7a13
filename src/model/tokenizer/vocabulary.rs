//! A bare vocabulary: the tokens by id and by text, and which of them a text begins with.

use std::collections::HashMap;

use crate::{Error, Result};

/// What a token is for: the types of `sentencepiece_model.proto`, which
/// `tokenizer.ggml.token_type` shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A piece of text.
    Normal,
    /// Stands for what the vocabulary cannot spell.
    Unknown,
    /// Begins or ends a text, a turn, …; no text of its own.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// `<0xNN>`: one byte.
    Byte,
    /// Takes part in merges but is not given out.
    Unused,
}

impl Kind {
    /// Whether it is no text, and is left out of a decoded one.
    pub fn is_special(self) -> bool {
        matches!(self, Kind::Control | Kind::Unknown)
    }
}

/// A token in the vocabulary's spelling (`Ġthe`, `▁the`, `<0x0A>`).
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    pub text: Box<str>,
    pub kind: Kind,
}

/// The tokens of a model; every text stands for one id.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    tokens: Vec<Token>,
    ids: HashMap<Box<str>, u32>,
}

impl Vocabulary {
    /// Errors (input): two tokens have the same text, or ids do not fit 32 bits.
    pub fn new(tokens: Vec<Token>) -> Result<Self> {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            let id = u32::try_from(id).map_err(|_| Error::input("the vocabulary is too large"))?;
            if let Some(first) = ids.insert(token.text.clone(), id) {
                return Err(Error::input(format!(
                    "tokens {first} and {id} are both {:?}",
                    token.text
                )));
            }
        }
        Ok(Self { tokens, ids })
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn get(&self, id: u32) -> Option<&Token> {
        self.tokens.get(id as usize)
    }

    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Ids and tokens, in the order of the ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Token)> {
        // Ids fit: `new` has counted them.
        self.tokens.iter().enumerate().map(|(id, token)| (id as u32, token))
    }

    /// The id of `<0xNN>`.
    pub fn byte_id(&self, byte: u8) -> Option<u32> {
        self.id(&format!("<0x{byte:02X}>"))
    }

    /// The first token of a kind.
    pub fn first(&self, kind: Kind) -> Option<u32> {
        self.iter().find(|(_, token)| token.kind == kind).map(|(id, _)| id)
    }
}

/// Texts with a number each, searched by what a text begins with. A sorted list, which
/// a search narrows byte by byte; empty texts are left out.
#[derive(Debug, Default)]
pub(super) struct Prefixes(Vec<(Box<str>, u32)>);

impl Prefixes {
    pub fn new<'t>(entries: impl Iterator<Item = (&'t str, u32)>) -> Self {
        let entries = entries.filter(|(text, _)| !text.is_empty());
        let mut entries: Vec<_> = entries.map(|(text, n)| (Box::from(text), n)).collect();
        entries.sort();
        entries.dedup_by(|later, first| later.0 == first.0);
        Self(entries)
    }

    /// Lengths in bytes and numbers of the entries that `text` begins with, the
    /// shortest first.
    pub fn of(&self, text: &str) -> impl Iterator<Item = (usize, u32)> {
        let (mut low, mut high) = (0, self.0.len());
        let mut bytes = text.bytes().enumerate();
        std::iter::from_fn(move || {
            while low < high {
                let (depth, byte) = bytes.next()?;
                let range = &self.0[low..high];
                let at = |entry: &(Box<str>, u32)| entry.0.as_bytes().get(depth).copied();
                let begin = range.partition_point(|entry| at(entry) < Some(byte));
                let end = begin + range[begin..].partition_point(|entry| at(entry) == Some(byte));
                (low, high) = (low + begin, low + end);
                // Of entries that share a beginning, the one that is no more sorts first.
                if let Some((entry, number)) = self.0[low..high].first()
                    && entry.len() == depth + 1
                {
                    return Some((depth + 1, *number));
                }
            }
            None
        })
    }

    /// The longest entry that `text` begins with.
    pub fn longest(&self, text: &str) -> Option<(usize, u32)> {
        self.of(text).last()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_come_shortest_first_and_whole() {
        let entries = ["ab", "a", "abcd", "b", "é", "", "abd"];
        let prefixes = Prefixes::new(entries.into_iter().zip(0..));
        let of = |text| prefixes.of(text).collect::<Vec<_>>();
        assert_eq!(of("abcde"), [(1, 1), (2, 0), (4, 2)]);
        assert_eq!(of("abc"), [(1, 1), (2, 0)]);
        assert_eq!((of("éa"), of("ê"), of("")), (vec![(2, 4)], vec![], vec![]));
        assert_eq!(prefixes.longest("abdx"), Some((3, 6)));
        assert_eq!(Prefixes::default().longest("a"), None);
    }

    #[test]
    fn a_text_names_one_token() {
        let token = |text: &str| Token { text: text.into(), kind: Kind::Normal };
        let error = Vocabulary::new(vec![token("a"), token("b"), token("a")]).unwrap_err();
        assert!(error.message.contains("0 and 2"), "{error}");
    }
}
