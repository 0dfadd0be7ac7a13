//! Tokens that are cut out of the raw text before anything else happens to it.

use super::vocabulary::Prefixes;

/// A token that is matched as it stands in the text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Special {
    pub text: Box<str>,
    pub id: u32,
    /// The token swallows the white space before it.
    pub lstrip: bool,
    /// The token swallows the white space behind it.
    pub rstrip: bool,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    Token(u32),
    Text(&'t str),
}

/// The special tokens of a vocabulary.
#[derive(Debug, Default)]
pub(super) struct Specials {
    /// The longest first.
    list: Vec<Special>,
    /// Indices into `list`.
    prefixes: Prefixes,
}

impl Specials {
    pub fn new(mut list: Vec<Special>) -> Self {
        list.retain(|special| !special.text.is_empty());
        list.sort_by_key(|special| (std::cmp::Reverse(special.text.len()), special.id));
        let prefixes = Prefixes::new(list.iter().map(|special| &*special.text).zip(0..));
        Self { list, prefixes }
    }

    /// Cuts the text at special tokens: all occurrences of the longest one first, then
    /// those of the next in what is left, as llama.cpp's `tokenizer_st_partition` does.
    /// (HF takes the leftmost; that differs only where two special tokens overlap.)
    pub fn split<'t>(&self, text: &'t str) -> Vec<Fragment<'t>> {
        let mut fragments = vec![Fragment::Text(text)];
        for index in self.present(text) {
            let special = &self.list[index];
            let mut cut = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                match fragment {
                    Fragment::Text(text) => special.cut(text, &mut cut),
                    token => cut.push(token),
                }
            }
            fragments = cut;
        }
        fragments.retain(|fragment| *fragment != Fragment::Text(""));
        fragments
    }

    /// Which tokens occur at all: one pass instead of one for each of hundreds.
    fn present(&self, text: &str) -> Vec<usize> {
        let mut seen = vec![false; self.list.len()];
        for (start, _) in text.char_indices() {
            self.prefixes.of(&text[start..]).for_each(|(_, index)| seen[index as usize] = true);
        }
        (0..seen.len()).filter(|&index| seen[index]).collect()
    }
}

impl Special {
    fn cut<'t>(&self, mut text: &'t str, out: &mut Vec<Fragment<'t>>) {
        // C's isspace.
        let space = |c: char| matches!(c, ' ' | '\t'..='\r');
        while let Some((before, behind)) = text.split_once(&*self.text) {
            out.push(Fragment::Text(if self.lstrip {
                before.trim_end_matches(space)
            } else {
                before
            }));
            out.push(Fragment::Token(self.id));
            text = if self.rstrip { behind.trim_start_matches(space) } else { behind };
        }
        out.push(Fragment::Text(text));
    }
}

#[cfg(test)]
mod tests {
    use super::Fragment::{Text, Token};
    use super::*;

    #[test]
    fn the_longest_token_wins_and_white_space_is_swallowed_on_request() {
        let special =
            |text: &str, id, strip| Special { text: text.into(), id, lstrip: strip, rstrip: strip };
        let specials = Specials::new(vec![
            special("<a", 1, false),
            special("<a>", 2, false),
            special("|", 3, true),
        ]);
        assert_eq!(specials.split("x<a><ay"), [Text("x"), Token(2), Token(1), Text("y")]);
        assert_eq!(specials.split("x \n| \u{b}|y"), [Text("x"), Token(3), Token(3), Text("y")]);
        assert_eq!(specials.split("<a>"), [Token(2)]);
        assert_eq!((specials.split(""), specials.split("x ")), (vec![], vec![Text("x ")]));
    }
}
