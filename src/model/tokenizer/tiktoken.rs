//! tiktoken's files as Llama 3 ships them (`tokenizer.model`): a line a token, base64
//! and rank. The special tokens are not in the file; they are those of Meta's
//! llama-models (`models/llama3/tokenizer.py`), 256 behind the others.
//!
//! Left out: other models' special tokens and patterns, and the cut that Meta's code
//! makes in texts of more than 400,000 characters.

use std::collections::HashMap;

use super::Built;
use super::byte_level::{ByteLevel, LLAMA3_TIKTOKEN};
use super::merge::Pairs;
use super::pieces::{PieceTokenizer, Segmenter, Spelling};
use super::specials::{Special, Specials};
use super::vocabulary::{Kind, Prefixes, Token, Vocabulary};
use crate::{Error, Result};

const NUM_SPECIAL_TOKENS: usize = 256;

/// The first special tokens; the rest are reserved. Llama 3.0 calls some of them
/// reserved that 3.1 has named since.
const NAMED: [&str; 12] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
];

/// Llama 4 has as many tokens, another pattern and other special tokens.
const LLAMA4_TOKENS: usize = 200_000;

/// Whether a `tokenizer.model` is tiktoken's: its first line is base64 and a number. (A
/// SentencePiece model begins with a line feed, the tag of its first field.)
pub(super) fn recognise(bytes: &[u8]) -> bool {
    let end = bytes.iter().position(|&byte| byte == b'\n').unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).is_ok_and(|line| parse_line(line).is_some())
}

fn parse_line(line: &str) -> Option<(Vec<u8>, usize)> {
    let (token, rank) = line.trim_end().split_once(' ')?;
    Some((base64(token)?, rank.parse().ok()?))
}

/// Standard base64 with padding; `None` if it is not that, or empty.
fn base64(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut width) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        width += 6;
        if width >= 8 {
            width -= 8;
            bytes.push((bits >> width) as u8);
            bits &= (1 << width) - 1;
        }
    }
    Some(bytes)
}

/// The tokenizer of a Llama 3 file.
///
/// Errors (input): a line is not a token and its rank, ranks have gaps or repeat, a byte
/// has no token, or the size is Llama 4's.
pub(super) fn build(bytes: &[u8]) -> Result<Built> {
    let byte_level = ByteLevel::new(&[LLAMA3_TIKTOKEN])?;
    let mut tokens = ranked(bytes, &byte_level)?;
    let num_ranks = tokens.len();
    if num_ranks >= LLAMA4_TOKENS {
        return Err(Error::input(format!(
            "has {num_ranks} tokens, as Llama 4's; of tiktoken's files farm reads Llama 3's. Give a tokenizer.json by --tokenizer"
        )));
    }
    let reserved = (2..).map(|n| format!("<|reserved_special_token_{n}|>"));
    let names = NAMED.iter().map(|name| name.to_string()).chain(reserved);
    tokens.extend(
        names.take(NUM_SPECIAL_TOKENS).map(|name| Token { text: name.into(), kind: Kind::Control }),
    );
    let vocabulary = Vocabulary::new(tokens)?;
    for byte in 0..=u8::MAX {
        if vocabulary.id(byte_level.spell(byte).encode_utf8(&mut [0; 4])).is_none() {
            return Err(Error::input(format!("has no token for the byte {byte:#04x}")));
        }
    }
    let special = vocabulary.iter().filter(|(_, token)| token.kind == Kind::Control);
    let special = special.map(|(id, token)| Special {
        text: token.text.clone(),
        id,
        lstrip: false,
        rstrip: false,
    });
    let specials = Specials::new(special.collect());
    let id = |name: &str| vocabulary.id(name);
    let bos = id("<|begin_of_text|>");
    // Meta's stop tokens: of a base model, of a message with a tool call, of a turn.
    let ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"].map(id);
    let named = [
        ("bos_token", bos),
        ("eos_token", ends[0]),
        ("pad_token", id("<|finetune_right_pad_id|>")),
    ];
    // Ranks are ids; special tokens come out of no merge.
    let priorities = (0..num_ranks).map(|rank| u32::try_from(rank).ok()).collect();
    let pieces = PieceTokenizer {
        vocabulary,
        specials,
        spelling: Spelling::ByteLevel(byte_level),
        segmenter: Segmenter::Merge {
            pairs: Pairs::ByToken(priorities),
            whole_words: true,
            user_defined: Prefixes::default(),
        },
        bos,
        eos: None,
    };
    let eos = ends.into_iter().flatten().collect();
    Ok(Built { bos, eos, named: pieces.names(&named), pieces })
}

/// The tokens by rank, spelled as in a `tokenizer.json`.
fn ranked(bytes: &[u8], byte_level: &ByteLevel) -> Result<Vec<Token>> {
    let text = std::str::from_utf8(bytes).map_err(|_| Error::input("is not text"))?;
    let mut by_rank = HashMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (token, rank) = parse_line(line).ok_or_else(|| {
            Error::input(format!("line {} is not a token in base64 and its rank", number + 1))
        })?;
        let spelled: String = token.into_iter().map(|byte| byte_level.spell(byte)).collect();
        if by_rank.insert(rank, spelled).is_some() {
            return Err(Error::input(format!("line {} repeats rank {rank}", number + 1)));
        }
    }
    let count = by_rank.len();
    let take = |rank| {
        let text = by_rank.remove(&rank);
        let text = text.ok_or_else(|| Error::input(format!("rank {rank} is missing")))?;
        Ok(Token { text: text.into(), kind: Kind::Normal })
    };
    (0..count).map(take).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The 256 bytes, and three tokens.
    fn file() -> String {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digit = |value: usize| char::from(DIGITS[value]);
        let byte =
            |byte: usize| format!("{}{}== {byte}\n", digit(byte >> 2), digit((byte & 3) << 4));
        let mut file: String = (0..256).map(byte).collect();
        file.push_str("YWI= 256\nYmI= 257\nYWJhYg== 258\n");
        file
    }

    #[test]
    fn ranks_merge_and_special_tokens_stand_behind_them() {
        let built = build(file().as_bytes()).unwrap();
        assert!(recognise(file().as_bytes()));
        let ids = built.pieces.encode("abab ab<|eot_id|>", true);
        assert_eq!(ids, [259, 258, 32, 256, 268]);
        assert_eq!((built.bos, built.eos), (Some(259), vec![260, 267, 268]));
        assert_eq!(built.pieces.vocabulary.len(), 259 + 256);
        assert_eq!(built.pieces.decode(&ids, true), "abab ab");
        assert_eq!(built.named["bos_token"], "<|begin_of_text|>");
    }

    #[test]
    fn damaged_files_are_errors() {
        for (from, to) in [
            ("YWI= 256", "YWI 256"),
            ("YWI= 256", "YWI= 255"),
            ("YWI= 256", "YWI= 99999999999"),
            ("YWI= 256", "YWI="),
            ("AA== 0\n", ""),
            ("YWI= 256", "YQ== 256"),
            ("YWI= 256", "YW=I 256"),
        ] {
            let error = build(file().replace(from, to).as_bytes()).err().expect(to);
            assert_eq!(error.kind, crate::ErrorKind::Input);
        }
        assert!(build(b"").is_err());
        assert!(!recognise(b"\n\x05<unk>") && !recognise(b"") && !recognise(b"\xff 1"));
    }
}
