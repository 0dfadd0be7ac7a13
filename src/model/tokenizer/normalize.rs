//! SentencePiece's normalizer (`Normalizer::Normalize` of its `normalizer.cc`): the
//! character map compiled into the model, white space, and the dummy space in front.

use super::vocabulary::Prefixes;
use crate::{Error, Result};

/// SentencePiece's visible space, U+2581.
pub(super) const SPACE: char = '▁';

/// What happens to a text before it is segmented.
#[derive(Debug)]
pub(super) struct Normalizer {
    pub charsmap: Option<Charsmap>,
    /// Pieces that the character map must leave alone.
    pub user_defined: Prefixes,
    /// A text begins with a space, whether it has one or not.
    pub add_dummy_prefix: bool,
    /// No space in front, behind, or after another.
    pub remove_extra_whitespaces: bool,
    /// Spaces become `▁`.
    pub escape_whitespaces: bool,
    /// The dummy space goes behind the text.
    pub treat_whitespace_as_suffix: bool,
}

impl Normalizer {
    /// Only `▁` for spaces, as where llama.cpp reads an SPM vocabulary.
    pub fn plain(add_dummy_prefix: bool) -> Self {
        Self {
            charsmap: None,
            user_defined: Prefixes::default(),
            add_dummy_prefix,
            remove_extra_whitespaces: false,
            escape_whitespaces: true,
            treat_whitespace_as_suffix: false,
        }
    }

    /// The text to segment; `dummy` asks for the dummy space, if the model has one.
    pub fn normalize(&self, mut text: &str, dummy: bool) -> String {
        let mut out = String::with_capacity(text.len() + text.len() / 4 + SPACE.len_utf8());
        if self.remove_extra_whitespaces {
            while let (" ", length @ 1..) = self.prefix(text) {
                text = &text[length..];
            }
        }
        if text.is_empty() {
            return out;
        }
        let space = if self.escape_whitespaces { SPACE } else { ' ' };
        let dummy = dummy && self.add_dummy_prefix;
        if dummy && !self.treat_whitespace_as_suffix {
            out.push(space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while !text.is_empty() {
            let (mut part, length) = self.prefix(text);
            if after_space {
                part = part.trim_start_matches(' ');
            }
            out.extend(part.chars().map(|c| if c == ' ' { space } else { c }));
            if !part.is_empty() {
                after_space = self.remove_extra_whitespaces && part.ends_with(' ');
            }
            text = &text[length..];
        }
        if self.remove_extra_whitespaces {
            out.truncate(out.trim_end_matches(space).len());
        }
        if dummy && self.treat_whitespace_as_suffix {
            out.push(space);
        }
        out
    }

    /// What the beginning of `text` becomes, and how many bytes of it that takes (at
    /// least one, unless it is empty).
    fn prefix<'t>(&'t self, text: &'t str) -> (&'t str, usize) {
        if let Some((length, _)) = self.user_defined.longest(text) {
            return (&text[..length], length);
        }
        if let Some(mapped) = self.charsmap.as_ref().and_then(|map| map.longest(text)) {
            return mapped;
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        (&text[..length], length)
    }
}

/// A `precompiled_charsmap`: a double array (darts-clone's) that maps the beginning of a
/// text to an offset into NUL-ended replacements.
#[derive(Debug)]
pub(super) struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    /// Reads the map: its trie's length in bytes (u32), the trie, the replacements.
    ///
    /// Errors (input): the lengths do not fit, or the replacements are not UTF-8.
    pub fn parse(blob: &[u8]) -> Result<Option<Self>> {
        if blob.is_empty() {
            return Ok(None);
        }
        let bad = |what: &str| Error::input(format!("precompiled_charsmap: {what}"));
        let (head, rest) = blob.split_first_chunk::<4>().ok_or_else(|| bad("is too short"))?;
        let length = u32::from_le_bytes(*head) as usize;
        if length > rest.len() || !length.is_multiple_of(4) {
            return Err(bad("the length of its trie does not fit"));
        }
        let (trie, replacements) = rest.split_at(length);
        let unit = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        Ok(Some(Self {
            units: trie.chunks_exact(4).map(unit).collect(),
            replacements: std::str::from_utf8(replacements)
                .map_err(|_| bad("its replacements are not UTF-8"))?
                .to_string(),
        }))
    }

    /// The replacement of the longest beginning that has one, and that one's length.
    /// Whatever a damaged trie points at outside of the map has none.
    fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let offset = |unit: u32| (unit >> 10) << ((unit & 1 << 9) >> 6);
        let unit = |at: u32| self.units.get(at as usize).copied();
        let mut found = None;
        let mut at = offset(unit(0)?);
        for (index, byte) in text.bytes().enumerate() {
            at ^= u32::from(byte);
            let Some(here) = unit(at) else { break };
            if here & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            at ^= offset(here);
            if here >> 8 & 1 == 1 {
                let Some(leaf) = unit(at) else { break };
                found = Some((leaf & !(1 << 31), index + 1));
            }
        }
        let (start, length) = found?;
        let replacement = self.replacements.get(start as usize..)?;
        // A match that ends inside a character cannot come from a sound map.
        let whole = text.is_char_boundary(length);
        whole.then(|| (replacement.split('\0').next().unwrap_or(""), length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_is_kept_or_collapsed() {
        let kept = Normalizer::plain(true);
        assert_eq!(kept.normalize(" a  b ", true), "▁▁a▁▁b▁");
        assert_eq!((kept.normalize("a", false), kept.normalize("", true)), ("a".into(), "".into()));
        let collapsed = Normalizer { remove_extra_whitespaces: true, ..Normalizer::plain(true) };
        assert_eq!(collapsed.normalize("  a   b \n ", true), "▁a▁b▁\n");
        assert_eq!(collapsed.normalize("   ", true), "");
        let suffix = Normalizer { treat_whitespace_as_suffix: true, ..Normalizer::plain(true) };
        assert_eq!(suffix.normalize("a b", true), "a▁b▁");
    }

    #[test]
    fn damaged_character_maps_are_refused_or_map_nothing() {
        for blob in [&b"\x01"[..], b"\xff\xff\xff\xff____", b"\x03\0\0\0abc", b"\0\0\0\0\xff"] {
            assert!(Charsmap::parse(blob).is_err(), "{blob:?}");
        }
        assert!(Charsmap::parse(b"").unwrap().is_none());
        // Every unit points anywhere: no panic, no endless walk.
        let mut seed = 1u32;
        for _ in 0..200 {
            let mut blob = 64u32.to_le_bytes().to_vec();
            for _ in 0..64 {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                blob.push((seed >> 24) as u8);
            }
            blob.extend(b"x\0y");
            let map = Charsmap::parse(&blob).unwrap().unwrap();
            let normalizer = Normalizer { charsmap: Some(map), ..Normalizer::plain(true) };
            normalizer.normalize("héllo ▁ \0 wörld 𝕏", true);
        }
    }
}
