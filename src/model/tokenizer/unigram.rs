//! SentencePiece's unigram model: the segmentation with the highest sum of scores
//! (`Model::EncodeOptimized` of its `unigram_model.cc`, in f32 throughout, on
//! whose rounding ties between segmentations hang).

use super::vocabulary::{Kind, Prefixes, Vocabulary};

/// What an unknown character costs more than the worst piece.
const UNKNOWN_PENALTY: f32 = 10.0;

/// The scores of a vocabulary, ready to search.
#[derive(Debug)]
pub(super) struct Unigram {
    pieces: Prefixes,
    scores: Vec<f32>,
    user_defined: Vec<bool>,
    highest: f32,
    unknown: f32,
}

/// The best way to a position of the text.
#[derive(Clone, Copy)]
struct Best {
    score: f32,
    start: usize,
    id: Option<u32>,
}

impl Unigram {
    /// `scores` by id; as many as tokens.
    pub fn new(vocabulary: &Vocabulary, scores: Vec<f32>) -> Self {
        use Kind::{Normal, UserDefined};
        let usable = vocabulary.iter().filter(|(_, token)| {
            // Unused pieces are passed over in the search, so they need not be found.
            matches!(token.kind, Normal | UserDefined)
        });
        let pieces = Prefixes::new(usable.map(|(id, token)| (&*token.text, id)));
        let normal = || {
            let normal = vocabulary.iter().filter(|(_, token)| token.kind == Normal);
            normal.filter_map(|(id, _)| scores.get(id as usize).copied())
        };
        let lowest = normal().fold(f32::MAX, f32::min);
        let highest = normal().fold(f32::MIN_POSITIVE, f32::max);
        let user_defined = vocabulary.iter().map(|(_, token)| token.kind == UserDefined).collect();
        Self { pieces, scores, user_defined, highest, unknown: lowest - UNKNOWN_PENALTY }
    }

    /// Calls `out` with the pieces of `text`; without id those that are unknown.
    pub fn segment(&self, text: &str, mut out: impl FnMut(&str, Option<u32>)) {
        let mut best: Vec<Option<Best>> = vec![None; text.len() + 1];
        for (start, character) in text.char_indices() {
            let so_far = best[start].map_or(0.0, |best| best.score);
            let width = character.len_utf8();
            let mut whole_character = false;
            for (length, id) in self.pieces.of(&text[start..]) {
                whole_character |= length == width;
                let score = self.score(id, length) + so_far;
                reach(&mut best[start + length], score, start, Some(id));
            }
            if !whole_character {
                reach(&mut best[start + width], self.unknown + so_far, start, None);
            }
        }
        let mut pieces = Vec::new();
        let mut end = text.len();
        while let Some(Best { start, id, .. }) = best[end] {
            pieces.push((start..end, id));
            end = start;
        }
        pieces.into_iter().rev().for_each(|(range, id)| out(&text[range], id));
    }

    fn score(&self, id: u32, length: usize) -> f32 {
        if self.user_defined[id as usize] {
            // A bonus, so that user-defined pieces are always taken.
            length as f32 * self.highest - 0.1
        } else {
            self.scores[id as usize]
        }
    }
}

fn reach(best: &mut Option<Best>, score: f32, start: usize, id: Option<u32>) {
    if best.is_none_or(|best| score > best.score) {
        *best = Some(Best { score, start, id });
    }
}
