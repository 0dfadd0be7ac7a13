//! From text to an [`Example`]: token ids, and which of them are learned.
//!
//! A text is tokenized as a whole where no token reaches over the edge of a part that is
//! learned. Where one does, the parts are tokenized one by one: in use the model sees the
//! prompt's own tokens, and must go on from those.

use std::ops::Range;

use super::record::{Lesson, Refusal};
use super::{Example, Formatting, turns};
use crate::Result;
use crate::prompts::ErrorCode;

/// Makes examples; one for all records of a file, shared by threads.
pub(super) struct Encoder<'a> {
    formatting: &'a Formatting<'a>,
    /// What the tokenizer itself puts before a text (BOS).
    start: Vec<u32>,
    /// What ends a text.
    eos: Option<u32>,
}

impl<'a> Encoder<'a> {
    pub fn new(formatting: &'a Formatting<'a>) -> Result<Self> {
        let tokenizer = formatting.tokenizer;
        let (bare, full) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
        let start = (0..full.len()).find(|&i| full[i..].starts_with(&bare)).unwrap_or(0);
        let named = tokenizer.special_tokens().get("eos_token");
        let eos = named.and_then(|text| tokenizer.token_to_id(text));
        Ok(Self {
            formatting,
            start: full[..start].to_vec(),
            eos: eos.or(tokenizer.eos_token_ids().first().copied()),
        })
    }

    /// The example of a lesson, and whether it was cut.
    pub fn example(&self, lesson: &Lesson) -> Result<(Example, bool), Refusal> {
        let mut example = match lesson {
            Lesson::Chat { messages, first } => {
                let Formatting { template, marked, .. } = *self.formatting;
                let template = template.ok_or_else(no_chat_template)?;
                let rendered = turns::render(template, marked, messages, *first)?;
                self.encode(&rendered.text, &rendered.turns)?
            }
            Lesson::Completion { prompt, completion } => {
                let text = [prompt.as_str(), completion].concat();
                self.whole_text(
                    self.encode(&text, std::slice::from_ref(&(prompt.len()..text.len())))?,
                )
            }
            Lesson::Text(text) => {
                self.whole_text(self.encode(text, std::slice::from_ref(&(0..text.len())))?)
            }
        };
        if self.formatting.train_on_prompt {
            example.is_target.fill(true);
        }
        if let Some(first) = example.is_target.first_mut() {
            *first = false;
        }
        self.check_vocabulary(&example.token_ids)?;
        let is_cut = example.token_ids.len() > self.formatting.max_seq_len;
        example.token_ids.truncate(self.formatting.max_seq_len);
        example.is_target.truncate(self.formatting.max_seq_len);
        match example.is_target.contains(&true) {
            true => Ok((example, is_cut)),
            false => Err(self.no_targets(is_cut)),
        }
    }

    /// A plain text begins with what the tokenizer puts there, and ends with EOS.
    fn whole_text(&self, mut example: Example) -> Example {
        example.token_ids.splice(..0, self.start.iter().copied());
        example.is_target.splice(..0, self.start.iter().map(|_| false));
        if let Some(eos) = self.eos.filter(|eos| example.token_ids.last() != Some(eos)) {
            example.token_ids.push(eos);
            example.is_target.push(true);
        }
        example
    }

    /// The tokens of `text`; those inside `learned` (bytes, in order, apart) are targets.
    fn encode(&self, text: &str, learned: &[Range<usize>]) -> Result<Example, Refusal> {
        let token_ids = self.token_ids(text)?;
        let edges: Vec<usize> = learned.iter().flat_map(|part| [part.start, part.end]).collect();
        let places = self.places(&token_ids, text.as_bytes());
        if let Some(places) = places.filter(|places| edges.iter().all(|&at| is_between(places, at)))
        {
            let is_target = places.iter().map(|place| {
                let part = learned.partition_point(|part| part.end <= place.start);
                learned.get(part).is_some_and(|part| part.start <= place.start)
            });
            return Ok(Example { is_target: is_target.collect(), token_ids });
        }
        let mut example = Example::default();
        let ends = edges.iter().copied().chain([text.len()]);
        let mut start = 0;
        for (number, end) in ends.enumerate() {
            let token_ids = self.continuation(&text[start..end], start == 0)?;
            // Every other part is learned: the edges are starts and ends by turns.
            example.is_target.extend(token_ids.iter().map(|_| number % 2 == 1));
            example.token_ids.extend(token_ids);
            start = end;
        }
        Ok(example)
    }

    /// The tokens of a part of a text. Behind another part they must not begin with the space
    /// that some tokenizers put before a text: a line break in front keeps it away.
    fn continuation(&self, part: &str, is_start: bool) -> Result<Vec<u32>, Refusal> {
        let token_ids = self.token_ids(part)?;
        if is_start || part.is_empty() || self.spells(&token_ids, part) {
            return Ok(token_ids);
        }
        let guard = self.token_ids("\n")?;
        let guarded = self.token_ids(&format!("\n{part}"))?;
        match guarded.strip_prefix(&*guard).filter(|ids| self.spells(ids, part)) {
            Some(token_ids) => Ok(token_ids.to_vec()),
            None => Ok(token_ids),
        }
    }

    fn token_ids(&self, text: &str) -> Result<Vec<u32>, Refusal> {
        let refused =
            |error: crate::Error| Refusal::new(ErrorCode::TokenizerFailed.as_str(), error.message);
        self.formatting.tokenizer.encode(text, false).map_err(refused)
    }

    fn spells(&self, token_ids: &[u32], text: &str) -> bool {
        let bytes = token_ids.iter().flat_map(|&id| self.formatting.tokenizer.token_bytes(id));
        bytes.eq(text.bytes())
    }

    /// The bytes of the text that each token stands for. Tokens may have a space that the text
    /// has not (put before it), and white space may belong to none (special tokens swallow it).
    /// `None` where a normalizer has changed more, or a token is unknown.
    fn places(&self, token_ids: &[u32], text: &[u8]) -> Option<Vec<Range<usize>>> {
        let mut places = Vec::with_capacity(token_ids.len());
        let mut at = 0;
        for &id in token_ids {
            let token = self.formatting.tokenizer.token_bytes(id);
            let (skipped, length) = find(&token, &text[at..])?;
            at += skipped;
            places.push(at..at + length);
            at += length;
        }
        text[at..].trim_ascii().is_empty().then_some(places)
    }

    fn check_vocabulary(&self, token_ids: &[u32]) -> Result<(), Refusal> {
        let vocab_size = self.formatting.vocab_size;
        match token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(Refusal::new(
                ErrorCode::TokenOutOfVocabulary.as_str(),
                format!("token id {id} is not in the model's vocabulary of {vocab_size}"),
            )),
        }
    }

    fn no_targets(&self, is_cut: bool) -> Refusal {
        let message = match is_cut {
            true => format!(
                "what is to be learned lies behind the first {} tokens; raise --max-seq-len",
                self.formatting.max_seq_len
            ),
            false => {
                "there is nothing to predict: no assistant's turn, or a single token".to_owned()
            }
        };
        Refusal::new("no_targets", message)
    }
}

/// White space that may belong to no token, in bytes.
const SKIPPED_MAX: usize = 1024;

/// Where `token` stands at the beginning of `text`: white space skipped, and bytes taken.
fn find(token: &[u8], text: &[u8]) -> Option<(usize, usize)> {
    // The usual case, and the one that keeps a text of white space alone linear.
    if text.starts_with(token) {
        return Some((0, token.len()));
    }
    let near = &text[..text.len().min(SKIPPED_MAX)];
    let spaces = near.len() - near.trim_ascii_start().len();
    let at = |token: &[u8]| {
        let skipped = (0..=spaces).find(|&skipped| text[skipped..].starts_with(token))?;
        Some((skipped, token.len()))
    };
    let bare = token.strip_prefix(b" ");
    match at(token) {
        Some(found) => Some(found),
        None => bare.and_then(at),
    }
}

/// Whether no token reaches over `edge`.
fn is_between(places: &[Range<usize>], edge: usize) -> bool {
    let behind = places.partition_point(|place| place.end <= edge);
    places.get(behind).is_none_or(|place| place.start >= edge)
}

fn no_chat_template() -> Refusal {
    Refusal::new(
        ErrorCode::NoChatTemplate.as_str(),
        "the model has no chat template, which messages need: give \"prompt\" and \"completion\", or put chat_template.jinja into the model directory",
    )
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
