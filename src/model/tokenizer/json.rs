//! `tokenizer.json`, by the `tokenizers` crate.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;

use llguidance::panic_utils;
use tokenizers::DecoderWrapper;

use super::byte_level::byte_level_bytes;
use super::pieces::byte_fallback;
use crate::{Error, Result};

/// A tokenizer that Hugging Face's library runs.
pub(super) struct JsonTokenizer {
    pub inner: tokenizers::Tokenizer,
    spelling: Spelling,
    /// Tokens that are matched as they stand in a text, not spelled by the model.
    added_tokens: HashSet<u32>,
    /// Those of them that are no text, and are left out of a decoded one.
    special_ids: HashSet<u32>,
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

impl JsonTokenizer {
    /// Truncation and padding that the file may carry from training are switched off:
    /// farm never cuts a prompt silently.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        // The crate unwraps parts of some decoders: a damaged file can make it panic.
        let parse = || Ok(tokenizers::Tokenizer::from_bytes(bytes));
        let parsed = panic_utils::catch_unwind(AssertUnwindSafe(parse)).map_err(|panic| {
            Error::input(panic.to_string().lines().next().unwrap_or_default().to_owned())
        })?;
        let mut inner = parsed.map_err(Error::input)?;
        inner.with_truncation(None).map_err(Error::input)?;
        inner.with_padding(None);
        let spelling = spelling(inner.get_decoder());
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, t)| t.special).map(|(&id, _)| id).collect();
        let added_tokens = added.into_keys().collect();
        Ok(Self { inner, spelling, added_tokens, special_ids })
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// The highest id of a token that is not an added one.
    pub fn max_text_id(&self) -> Option<u32> {
        let ids = self.inner.get_vocab(false).into_values();
        ids.filter(|id| !self.added_tokens.contains(id)).max()
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

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
