//! The bytes of an unfinished record: what its completions have generated so far, for
//! a later launch to go on from.
//!
//! ```text
//! version u8 │ hash of the prompt's tokens [8] │ words, u32 little-endian:
//!     tokens of the prompt, completions,
//!     each: tokens, their ids, entries of logprobs, each: token, bits, n, n × (token, bits)
//! ```
//!
//! Log-probabilities are kept as their bits, so that the record's line is the same in
//! the end. The prompt's tokens are only hashed: the record itself is read again, and
//! where it has other tokens now (another tokenizer or template), nothing saved is
//! used. Left out: a checksum, which the file that holds the bytes has.

use crate::engine::{Generated, TokenLogprob};

const VERSION: u8 = 1;
const HASH_BYTES: usize = 8;

/// An unfinished record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedRecord {
    /// Position of the record in the input, from 0.
    pub index: u64,
    /// Its completions, as [`encode`] wrote them.
    pub bytes: Vec<u8>,
}

/// The bytes for a prompt's `completions`, in the order of their numbers.
pub fn encode(prompt_token_ids: &[u32], completions: &[Generated]) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    bytes.extend(hash(prompt_token_ids));
    let mut push = |word: u32| bytes.extend(word.to_le_bytes());
    push(prompt_token_ids.len() as u32);
    push(completions.len() as u32);
    for Generated { token_ids, logprobs } in completions {
        push(token_ids.len() as u32);
        token_ids.iter().for_each(|id| push(*id));
        push(logprobs.len() as u32);
        for TokenLogprob { token, logprob, top } in logprobs {
            push(*token);
            push(logprob.to_bits());
            push(top.len() as u32);
            for (token, logprob) in top {
                push(*token);
                push(logprob.to_bits());
            }
        }
    }
    bytes
}

/// The completions that [`encode`] wrote for this prompt. `None` where the bytes are of
/// another prompt or version, or damaged: then everything is to be generated anew.
pub fn decode(bytes: &[u8], prompt_token_ids: &[u32]) -> Option<Vec<Generated>> {
    let (version, rest) = bytes.split_first()?;
    let (saved_hash, rest) = rest.split_first_chunk::<HASH_BYTES>()?;
    if *version != VERSION || *saved_hash != hash(prompt_token_ids) {
        return None;
    }
    let (words, odd) = rest.as_chunks::<4>();
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    let num_prompt_tokens = words.next()? as usize;
    let completions = list(&mut words, |words| {
        let token_ids = list(words, Iterator::next)?;
        let logprobs = list(words, |words| {
            let (token, logprob) = token_and_logprob(words)?;
            Some(TokenLogprob { token, logprob, top: list(words, token_and_logprob)? })
        })?;
        Some(Generated { token_ids, logprobs })
    })?;
    let is_whole = odd.is_empty() && words.next().is_none();
    (is_whole && num_prompt_tokens == prompt_token_ids.len()).then_some(completions)
}

/// A count and as many items. Memory grows with the items found, never with a count
/// that damage made large.
fn list<W: Iterator<Item = u32>, T>(
    words: &mut W,
    item: impl Fn(&mut W) -> Option<T>,
) -> Option<Vec<T>> {
    let count = words.next()?;
    (0..count).map(|_| item(words)).collect()
}

fn token_and_logprob(words: &mut impl Iterator<Item = u32>) -> Option<(u32, f32)> {
    Some((words.next()?, f32::from_bits(words.next()?)))
}

fn hash(token_ids: &[u32]) -> [u8; HASH_BYTES] {
    let mut hasher = blake3::Hasher::new();
    token_ids.iter().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    let mut hash = [0; HASH_BYTES];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..HASH_BYTES]);
    hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    fn any_generated() -> impl Strategy<Value = Generated> {
        let pair = || (any::<u32>(), any::<f32>());
        let entry = (pair(), prop::collection::vec(pair(), 0..4));
        let entry = entry.prop_map(|((token, logprob), top)| TokenLogprob { token, logprob, top });
        let logprobs = prop::collection::vec(entry, 0..5);
        (prop::collection::vec(any::<u32>(), 0..9), logprobs)
            .prop_map(|(token_ids, logprobs)| Generated { token_ids, logprobs })
    }

    fn any_prompt() -> impl Strategy<Value = Vec<u32>> {
        prop::collection::vec(any::<u32>(), 0..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 64,
            rng_seed: RngSeed::Fixed(2026),
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Every bit comes back, for the prompt that it was written for alone.
        #[test]
        fn what_was_encoded_is_decoded(
            prompt in any_prompt(),
            completions in prop::collection::vec(any_generated(), 0..4),
        ) {
            let bytes = encode(&prompt, &completions);
            let decoded = decode(&bytes, &prompt).unwrap();
            prop_assert_eq!(encode(&prompt, &decoded), bytes.clone());
            prop_assert_eq!(decoded.len(), completions.len());
            let other = [&prompt[..], &[7]].concat();
            prop_assert_eq!(decode(&bytes, &other), None);
        }

        /// Cut short, lengthened or with any byte changed: nothing, or what the
        /// changed bytes say, but never a panic.
        #[test]
        fn damaged_bytes_never_panic(
            prompt in any_prompt(),
            completions in prop::collection::vec(any_generated(), 0..3),
            end in any::<prop::sample::Index>(),
            (place, value) in (any::<prop::sample::Index>(), any::<u8>()),
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let bytes = encode(&prompt, &completions);
            prop_assert_eq!(decode(&bytes[..end.index(bytes.len())], &prompt), None);
            let mut damaged = bytes.clone();
            damaged[place.index(bytes.len())] = value;
            if let Some(decoded) = decode(&damaged, &prompt) {
                prop_assert_eq!(encode(&prompt, &decoded), damaged);
            }
            let longer = [&bytes[..], &[0], &tail].concat();
            prop_assert_eq!(decode(&longer, &prompt), None);
            // Behind a good head any bytes get as far as the counts.
            let behind_head = [&bytes[..1 + HASH_BYTES], &tail].concat();
            decode(&behind_head, &prompt);
            decode(&tail, &prompt);
        }
    }

    #[test]
    fn counts_beyond_the_bytes_are_refused_at_once() {
        let mut bytes = encode(&[1], &[Generated::default()]);
        for count in (1 + HASH_BYTES + 4..bytes.len()).step_by(4) {
            let mut large = bytes.clone();
            large[count..count + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            assert_eq!(decode(&large, &[1]), None);
        }
        bytes[0] = VERSION + 1;
        assert_eq!(decode(&bytes, &[1]), None, "another version");
    }
}
