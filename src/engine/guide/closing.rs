//! The way out: how a text that has been begun can come to an accepted end.
//!
//! llguidance tells which bytes may follow, not how far an end is. So a short end is
//! looked for byte by byte, without turning back, and with preferences that lead out
//! of nested JSON and out of loops in patterns. It need not be the shortest one, and
//! a pattern can be made in which none is found; then a text may be cut off.

use llguidance::TokenParser;
use llguidance::earley::Parser;
use llguidance::toktrie::{Recognizer, TokTrie};

use super::numbers::Place;

/// Ends longer than this are not looked for.
const MAX_BYTES: usize = 4096;

/// The tokens of an accepted end after the text that `parser` has seen and the bytes
/// `next`, which it allows: at most `max_tokens` of them. None at all where the text
/// may end there. `place` is where a JSON text stands before `next`.
pub(super) fn closing(
    parser: &Parser,
    trie: &TokTrie,
    mut place: Option<Place>,
    next: &[u8],
    max_tokens: usize,
) -> Option<Vec<u32>> {
    let mut parser = parser.clone();
    parser.apply_token(next, 0).ok()?;
    place = place.map(|place| place.after(next).unwrap_or_default());
    let max_bytes = max_tokens.saturating_mul(trie.max_token_len()).min(MAX_BYTES);
    let mut bytes = Vec::new();
    let mut uses = [0u16; 256];
    while !parser.is_accepting() {
        if bytes.len() >= max_bytes || parser.get_error().is_some() {
            return None;
        }
        let byte = preferred(&mut parser, place, &uses)?;
        parser.apply_token(&[byte], 0).ok()?;
        place = place.map(|place| place.after(&[byte]).unwrap_or_default());
        uses[byte as usize] += 1;
        bytes.push(byte);
    }
    let tokens = trie.greedy_tokenize(&bytes);
    // Otherwise the vocabulary lacks a byte.
    (tokens.len() <= max_tokens && trie.decode_raw(&tokens) == bytes).then_some(tokens)
}

/// Whether any byte may follow.
pub(super) fn can_go_on(parser: &mut TokenParser) -> bool {
    allowed_among(&mut parser.parser, 0..=u8::MAX).is_some()
}

/// The byte to go on with: what closes a string, object or list of JSON; else, of the
/// bytes used least, the first by rank.
fn preferred(parser: &mut Parser, place: Option<Place>, uses: &[u16; 256]) -> Option<u8> {
    let closes = |byte: u8| match place {
        None => false,
        Some(Place::Text | Place::Escape) => byte == b'"',
        Some(_) => matches!(byte, b'}' | b']'),
    };
    let mut bytes: Vec<u8> = (0..=u8::MAX).collect();
    bytes.sort_by_key(|&byte| (!closes(byte), uses[byte as usize], rank(byte)));
    allowed_among(parser, bytes)
}

/// Small for bytes that tend to end things, large for those that tend to begin some.
fn rank(byte: u8) -> (u8, u8) {
    let class = match byte {
        b'}' => 0,
        b']' => 1,
        b'"' => 2,
        b'{' | b'[' | b'\\' => 7,
        b'0'..=b'9' => 4,
        b'a'..=b'z' => 5,
        b',' => 6,
        0x21..=0x7E => 3,
        b' ' => 6,
        _ => 8,
    };
    (class, byte)
}

fn allowed_among(parser: &mut Parser, bytes: impl IntoIterator<Item = u8>) -> Option<u8> {
    parser.with_recognizer(|recognizer| {
        recognizer.trie_started("closing");
        let found = bytes.into_iter().find(|&byte| recognizer.byte_allowed(byte));
        recognizer.trie_finished();
        found
    })
}
