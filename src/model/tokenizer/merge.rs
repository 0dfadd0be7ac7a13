//! Byte-pair merging: neighbours are joined, the best pair first and of equals the
//! leftmost, until no pair is left. SentencePiece's BPE, llama.cpp's SPM and BPE, and
//! tiktoken are this with different tables of pairs.
//!
//! The `tokenizers` crate would do it by a list of merges, into which transformers'
//! converters unroll scores and ranks. That list has several entries for one merged
//! token, ordered by its parts, so that of two overlapping ways to make the same token
//! it does not always take the leftmost; hence the loop is here.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::vocabulary::{Kind, Vocabulary};

/// Which neighbours merge, into what, and how early (the lowest number first).
#[derive(Debug)]
pub(super) enum Pairs {
    /// Those that are a token together. Priorities by that token's id; `None` never merges.
    ByToken(Vec<Option<u32>>),
    /// Those listed: (left, right) to (priority, merged).
    Listed(HashMap<(u32, u32), (u32, u32)>),
}

/// A part of the text that is one symbol so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Symbol {
    /// First byte.
    pub start: usize,
    /// Byte behind the last one; `start` once the symbol is merged into its left neighbour.
    pub end: usize,
    /// The token it is.
    pub id: Option<u32>,
    /// It does not merge.
    pub frozen: bool,
}

/// Marks the end of the chain of symbols.
const NONE: usize = usize::MAX;

/// Two neighbours to be merged: priority, left one, its end, the right one's end, merged
/// id. The order is that of the merging.
type Pair = (u32, usize, usize, usize, u32);

struct Merging<'a> {
    text: &'a str,
    vocabulary: &'a Vocabulary,
    pairs: &'a Pairs,
    symbols: &'a mut [Symbol],
    prev: Vec<usize>,
    next: Vec<usize>,
    queue: BinaryHeap<Reverse<Pair>>,
    /// Where unused tokens were joined, by their text.
    joints: HashMap<&'a str, usize>,
}

/// Merges `symbols`, which cover `text` in order, and calls `out` with what is left.
pub(super) fn merge(
    text: &str,
    symbols: &mut [Symbol],
    pairs: &Pairs,
    vocabulary: &Vocabulary,
    mut out: impl FnMut(&str, Option<u32>),
) {
    let count = symbols.len();
    let mut merging = Merging {
        text,
        vocabulary,
        pairs,
        symbols,
        prev: (0..count).map(|i| i.checked_sub(1).unwrap_or(NONE)).collect(),
        next: (1..=count).map(|i| if i < count { i } else { NONE }).collect(),
        queue: BinaryHeap::new(),
        joints: HashMap::new(),
    };
    (1..count).for_each(|right| merging.consider(right - 1, right));
    while let Some(Reverse(pair)) = merging.queue.pop() {
        merging.join(pair);
    }
    let mut at = if count == 0 { NONE } else { 0 };
    while at != NONE {
        let Symbol { start, end, id, .. } = merging.symbols[at];
        merging.emit(start, end, id, &mut out);
        at = merging.next[at];
    }
}

impl<'a> Merging<'a> {
    fn consider(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let (l, r) = (self.symbols[left], self.symbols[right]);
        if l.frozen || r.frozen {
            return;
        }
        let found = match self.pairs {
            Pairs::ByToken(priorities) => {
                let id = self.vocabulary.id(&self.text[l.start..r.end]);
                id.and_then(|id| Some(((*priorities.get(id as usize)?)?, id)))
            }
            Pairs::Listed(pairs) => {
                let ids = l.id.zip(r.id);
                ids.and_then(|ids| pairs.get(&ids).copied())
            }
        };
        let Some((priority, id)) = found else { return };
        self.queue.push(Reverse((priority, left, l.end, r.end, id)));
        if self.vocabulary.get(id).is_some_and(|token| token.kind == Kind::Unused) {
            self.joints.insert(&self.text[l.start..r.end], l.end - l.start);
        }
    }

    fn join(&mut self, (_, left, middle, end, id): Pair) {
        let right = self.next[left];
        // The pair is out of date if either symbol has changed since.
        let l = self.symbols[left];
        if l.start == l.end || l.end != middle || right == NONE || self.symbols[right].end != end {
            return;
        }
        self.symbols[left].end = end;
        self.symbols[left].id = Some(id);
        self.symbols[right].start = end;
        self.next[left] = self.next[right];
        if self.next[left] != NONE {
            self.prev[self.next[left]] = left;
        }
        self.consider(self.prev[left], left);
        self.consider(left, self.next[left]);
    }

    /// Gives out a symbol; an unused token as the parts that it was made of.
    fn emit(
        &self,
        start: usize,
        end: usize,
        id: Option<u32>,
        out: &mut impl FnMut(&str, Option<u32>),
    ) {
        let mut parts = vec![(start, end, id)];
        while let Some((start, end, id)) = parts.pop() {
            let text = &self.text[start..end];
            match self.joints.get(text) {
                Some(joint) => {
                    let middle = start + joint;
                    let part = |a: usize, b: usize| (a, b, self.vocabulary.id(&self.text[a..b]));
                    parts.push(part(middle, end));
                    parts.push(part(start, middle));
                }
                None => out(text, id),
            }
        }
    }
}

/// The scores of a vocabulary as priorities: the highest score is the lowest number,
/// equal scores are equal.
pub(super) fn score_priority(score: f32) -> u32 {
    // -0.0 + 0.0 is 0.0. The sign-magnitude bits of a float, made to ascend.
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    !ascending
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::Token;
    use super::*;

    fn merged(tokens: &[(&str, Kind)], scores: &[f32], text: &str) -> String {
        let token = |&(text, kind): &(&str, Kind)| Token { text: text.into(), kind };
        let vocabulary = Vocabulary::new(tokens.iter().map(token).collect()).unwrap();
        let pairs = Pairs::ByToken(scores.iter().map(|&s| Some(score_priority(s))).collect());
        let symbol = |(start, c): (usize, char)| Symbol {
            start,
            end: start + c.len_utf8(),
            id: vocabulary.id(c.encode_utf8(&mut [0; 4])),
            frozen: c == '!',
        };
        let mut symbols: Vec<_> = text.char_indices().map(symbol).collect();
        let mut parts = Vec::new();
        merge(text, &mut symbols, &pairs, &vocabulary, |text, id| {
            assert_eq!(id, vocabulary.id(text));
            parts.push(text.to_string());
        });
        parts.join("|")
    }

    #[test]
    fn the_best_pair_goes_first_and_of_equals_the_leftmost() {
        use Kind::{Normal, Unused};
        let tokens =
            [("a", Normal), ("b", Normal), ("ab", Normal), ("ba", Normal), ("aba", Normal)];
        assert_eq!(merged(&tokens, &[0., 0., -1., -2., -3.], "abab"), "ab|ab");
        assert_eq!(merged(&tokens, &[0., 0., -2., -1., -3.], "abab"), "aba|b");
        assert_eq!(merged(&tokens, &[0., 0., -2., -2., -3.], "baba"), "ba|ba");
        assert_eq!(merged(&tokens, &[0., 0., -1., -2., -3.], "ab!ab?ab"), "ab|!|ab|?|ab");
        assert_eq!(merged(&tokens, &[0.; 5], ""), "");
        let unused =
            [("a", Normal), ("b", Normal), ("ab", Unused), ("aba", Unused), ("ba", Normal)];
        assert_eq!(merged(&unused, &[0., 0., -1., -2., -3.], "aba"), "a|b|a");
    }

    #[test]
    fn priorities_fall_as_scores_rise() {
        let scores = [f32::INFINITY, 2.0, 0.5, 0.0, -0.5, -1e9, f32::NEG_INFINITY];
        let priorities = scores.map(score_priority);
        assert!(priorities.is_sorted_by(|a, b| a < b), "{priorities:?}");
        assert_eq!(score_priority(-0.0), score_priority(0.0));
    }
}
