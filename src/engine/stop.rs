//! Stop strings: noticing one as soon as its last token arrives, and cutting
//! the final text before it.

use super::detokenizer::{Detokenizer, TokenDecoder};

/// Watches a growing text for stop strings, which may span tokens. Keeps only
/// as much of the text's end as a stop string could reach back into.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    detokenizer: Detokenizer,
    tail: String,
}

impl StopMatcher {
    /// Whether the last of `output_token_ids` (all so far) completed one of
    /// `stops`. To be called once a token.
    pub fn push(
        &mut self,
        output_token_ids: &[u32],
        stops: &[String],
        decoder: &dyn TokenDecoder,
    ) -> bool {
        let Some(new) = self.detokenizer.next_text(output_token_ids, decoder) else {
            return false;
        };
        self.tail.push_str(&new);
        if earliest_stop(&self.tail, stops).is_some() {
            return true;
        }
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut start = self.tail.len().saturating_sub(longest);
        while !self.tail.is_char_boundary(start) {
            start -= 1;
        }
        self.tail.drain(..start);
        false
    }
}

/// Byte offset of the first stop string in `text`; empty ones never match.
pub fn earliest_stop(text: &str, stops: &[String]) -> Option<usize> {
    stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min()
}

/// The text of all generated tokens (EOS left out by the caller), cut before
/// the earliest stop string.
pub fn final_text(token_ids: &[u32], stops: &[String], decoder: &dyn TokenDecoder) -> String {
    let mut text = decoder.decode(token_ids);
    if let Some(end) = earliest_stop(&text, stops) {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::detokenizer::tests::ByteDecoder;
    use super::*;

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(ToString::to_string).collect()
    }

    /// Feeds a byte a token: the number of tokens until a stop, and the text.
    fn run(text: &str, stops: &[String]) -> (Option<usize>, String) {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let mut matcher = StopMatcher::default();
        let end = (1..=ids.len()).find(|&n| matcher.push(&ids[..n], stops, &ByteDecoder));
        (end, final_text(&ids[..end.unwrap_or(ids.len())], stops, &ByteDecoder))
    }

    #[test]
    fn a_stop_string_is_found_across_tokens_at_its_last_one() {
        let cases: &[(&str, &[&str], Option<usize>, &str)] = &[
            ("one END two", &["END"], Some(7), "one "),
            ("aab", &["ab"], Some(3), "a"),
            ("abcd", &["abcd", "bc"], Some(3), "a"),
            ("été €uro", &["€"], Some(9), "été "),
            ("nothing", &["", "x"], None, "nothing"),
            ("nothing", &[], None, "nothing"),
        ];
        for &(text, stops, end, kept) in cases {
            assert_eq!(run(text, &strings(stops)), (end, kept.to_string()), "{text} {stops:?}");
        }
    }

    proptest! {
        #![proptest_config(crate::engine::tests::config(128))]

        /// The matcher, which sees only a tail, stops where a search of the
        /// whole text after every character would.
        #[test]
        fn the_tail_is_enough(
            text in "[abé]{0,30}",
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let naive = text
                .char_indices()
                .map(|(i, c)| i + c.len_utf8())
                .find(|&end| earliest_stop(&text[..end], &stops).is_some());
            prop_assert_eq!(run(&text, &stops).0, naive);
        }
    }
}
