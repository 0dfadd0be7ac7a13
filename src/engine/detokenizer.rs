//! Turning a growing list of token ids into text a token at a time.
//!
//! A token may be part of a character, and some tokenizers decode a token by
//! its left neighbour (SentencePiece drops the first space). So the newest
//! tokens are decoded together with a few before them, and text is given out
//! only once it ends in a whole character: the prefix_offset/read_offset
//! technique of Hugging Face TGI (`decode_token`) and vLLM
//! (`detokenize_incrementally`).

/// Text of token ids, special tokens left out.
pub trait TokenDecoder: Send + Sync {
    /// Decodes `ids` as one text; incomplete UTF-8 becomes U+FFFD.
    fn decode(&self, ids: &[u32]) -> String;
}

/// After this many tokens without whole text, text is given out as it is. A
/// character takes at most four tokens, so this ends only runs of invalid
/// bytes and of special tokens, whose cost would otherwise grow quadratically.
const MAX_PENDING_TOKENS: usize = 16;

/// Where in a list of token ids the text given out so far ends.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    /// First token of the window that is decoded for context.
    prefix_offset: usize,
    /// First token whose text has not been given out.
    read_offset: usize,
}

impl Detokenizer {
    /// The text that `token_ids`, all tokens so far, adds to what earlier calls
    /// gave; `None` while it ends within a character.
    pub fn next_text(&mut self, token_ids: &[u32], decoder: &dyn TokenDecoder) -> Option<String> {
        let known = decoder.decode(&token_ids[self.prefix_offset..self.read_offset]);
        let text = decoder.decode(&token_ids[self.prefix_offset..]);
        let new = &text[common_prefix(&known, &text)..];
        let incomplete = new.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER);
        if incomplete && token_ids.len() - self.read_offset < MAX_PENDING_TOKENS {
            return None;
        }
        self.prefix_offset = self.read_offset;
        self.read_offset = token_ids.len();
        Some(new.to_string())
    }
}

/// Bytes of the leading characters that both texts share.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b);
    same.map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Token `i` is byte `i`; from 256 on, special tokens without text.
    pub struct ByteDecoder;

    impl TokenDecoder for ByteDecoder {
        fn decode(&self, ids: &[u32]) -> String {
            let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
    }

    /// Token `i` is " w{i}", but the first word of a text loses its space.
    struct WordDecoder;

    impl TokenDecoder for WordDecoder {
        fn decode(&self, ids: &[u32]) -> String {
            ids.iter().map(|id| format!(" w{id}")).collect::<String>().trim_start().to_string()
        }
    }

    fn pieces(ids: &[u32], decoder: &dyn TokenDecoder) -> Vec<String> {
        let mut detokenizer = Detokenizer::default();
        (1..=ids.len()).filter_map(|n| detokenizer.next_text(&ids[..n], decoder)).collect()
    }

    #[test]
    fn characters_are_never_split() {
        let ids: Vec<u32> = "aé€😀".bytes().map(u32::from).collect();
        assert_eq!(pieces(&ids, &ByteDecoder), ["a", "é", "€", "😀"]);
    }

    #[test]
    fn spaces_between_words_are_kept_and_the_first_is_not_added() {
        assert_eq!(pieces(&[1, 2, 3], &WordDecoder), ["w1", " w2", " w3"]);
    }

    #[test]
    fn endless_special_tokens_and_invalid_bytes_keep_the_window_small() {
        for id in [256, 0xFF] {
            let ids = [id; 200];
            let mut detokenizer = Detokenizer::default();
            for n in 1..=ids.len() {
                detokenizer.next_text(&ids[..n], &ByteDecoder);
                assert!(n - detokenizer.prefix_offset <= 2 * MAX_PENDING_TOKENS);
            }
        }
    }

    proptest! {
        #![proptest_config(crate::engine::tests::config(64))]

        #[test]
        fn the_pieces_of_valid_text_join_to_the_whole(text in "[aé€😀 ]{0,40}") {
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(pieces(&ids, &ByteDecoder).concat(), text);
        }
    }
}
