//! Which characters of a rendered conversation the assistant writes.
//!
//! A template's own `{% generation %}` marks say it. Without them a turn is what is added
//! between the prompt that asks for it and the conversation that ends with it. Some templates
//! write a turn in another way once messages follow it (they drop its thoughts, say): there
//! the turn's text is replaced by a stand-in, and what is rendered around that tells its place.
//!
//! A turn runs to the end of the mark that the template puts behind it: writing that is how
//! the model stops. The line break behind such a mark is nobody's.

use std::ops::Range;

use serde_json::{Map, Value};

use super::marks::cut_out;
use crate::prompts::{ChatTemplate, ErrorCode, Problem};

/// Takes the place of a turn's text; like the marks, no text has it.
const STAND_IN: &str = "\u{FDD2}";

/// A rendered conversation and the bytes of it that are learned, in order.
#[derive(Debug, PartialEq)]
pub(super) struct Rendered {
    pub text: String,
    pub turns: Vec<Range<usize>>,
}

/// Renders `messages`; the assistant's turns from message `first` on are learned, save those
/// whose `weight` is 0 (as OpenAI's files have it) and those that are empty.
///
/// Errors: `chat_template_failed` where the template refuses the messages, or a turn's place
/// in the text cannot be told.
pub(super) fn render(
    template: &ChatTemplate,
    marked: Option<&ChatTemplate>,
    messages: &[Value],
    first: usize,
) -> Result<Rendered, Problem> {
    let text = rendered(template, messages, false)?;
    let turns: Vec<usize> = (0..messages.len()).filter(|&i| is_turn(&messages[i])).collect();
    let is_learned = |i: usize| i >= first && teaches(&messages[i]);
    let blocks = marked.and_then(|marked| blocks(marked, messages, &text));
    // A template with marks may still leave a turn without: then they do not tell which is which.
    if let Some(blocks) = blocks.filter(|blocks| blocks.len() == turns.len()) {
        let learned = turns.into_iter().zip(blocks).filter(|(i, _)| is_learned(*i));
        return Ok(Rendered { text, turns: learned.map(|(_, block)| block).collect() });
    }
    let conversation = Conversation { template, messages, text: &text };
    let learned = turns.into_iter().filter(|&i| is_learned(i));
    let turns = learned.map(|i| conversation.turn(i)).collect::<Result<_, _>>()?;
    Ok(Rendered { text, turns })
}

/// What the template marks, if what it renders is otherwise the same.
fn blocks(marked: &ChatTemplate, messages: &[Value], text: &str) -> Option<Vec<Range<usize>>> {
    let (same, blocks) = cut_out(&rendered(marked, messages, false).ok()?)?;
    (same == text).then_some(blocks)
}

struct Conversation<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Value],
    /// All of it.
    text: &'a str,
}

impl Conversation<'_> {
    fn turn(&self, i: usize) -> Result<Range<usize>, Problem> {
        let prompt = rendered(self.template, &self.messages[..i], true).ok();
        let start = prompt.filter(|prompt| self.text.starts_with(prompt)).map(|p| p.len());
        let place = self.by_prefixes(i, start).or_else(|| self.by_stand_in(i, start));
        place.ok_or_else(|| {
            let message = format!(
                "the model's chat template does not show where messages[{i}] begins and ends in its text; mark it there with {{% generation %}} and {{% endgeneration %}}"
            );
            Problem::new(ErrorCode::ChatTemplateFailed, message)
        })
    }

    /// From the end of the prompt for this turn to the end of a conversation that stops here.
    fn by_prefixes(&self, i: usize, start: Option<usize>) -> Option<Range<usize>> {
        let start = start?;
        let whole = self.up_to(&self.messages[..=i])?;
        let turn = whole.get(start..).filter(|_| self.text.starts_with(&whole))?;
        let content = content(&self.messages[i]);
        let trimmed = turn.trim_end();
        // Where there is but white space behind the text, that is what ends it.
        let is_unmarked = !content.is_empty() && trimmed.ends_with(content);
        let end = if is_unmarked { turn } else { trimmed };
        Some(start..start + end.len())
    }

    /// From the prompt's end, else from where the turn's text begins, to where it ends, and
    /// what a conversation that stops here has behind it.
    fn by_stand_in(&self, i: usize, start: Option<usize>) -> Option<Range<usize>> {
        let around = |text: String| {
            let (head, tail) = text.split_once(STAND_IN)?;
            Some((head.to_owned(), tail.to_owned()))
        };
        let mut messages = self.messages.to_vec();
        messages[i].as_object_mut()?.insert("content".to_owned(), Value::from(STAND_IN));
        let (head, tail) = around(rendered(self.template, &messages, false).ok()?)?;
        let (_, own_tail) = around(self.up_to(&messages[..=i])?)?;
        let start = start.or_else(|| self.text.starts_with(&head).then_some(head.len()))?;
        let end = self.text.strip_suffix(&*tail)?.len();
        let mark = own_tail.trim_end();
        let mark = if mark.is_empty() { &own_tail } else { mark };
        (start <= end && tail.starts_with(mark)).then_some(start..end + mark.len())
    }

    /// A conversation that stops after its last turn: what it has whether or not another one
    /// is asked for. Some templates end a conversation that asks for nothing by an EOS, which
    /// is not the turn's.
    fn up_to(&self, messages: &[Value]) -> Option<String> {
        let mut closed = rendered(self.template, messages, false).ok()?;
        let Ok(asking) = rendered(self.template, messages, true) else { return Some(closed) };
        let same = closed.bytes().zip(asking.bytes()).take_while(|(a, b)| a == b).count();
        if same < closed.len() {
            // `<|end|><|` of `<|end|><|eos|>` and `<|end|><|assistant|>`: whole marks only.
            let ends_mark = |byte: &u8| matches!(byte, b'>' | b']' | b'\n');
            let marks_end = closed.as_bytes()[..same].iter().rposition(ends_mark)? + 1;
            let content = messages.last().map_or("", content);
            let content_end = closed.rfind(content).map_or(0, |at| at + content.len());
            // A text with no mark but that EOS keeps it.
            if marks_end > content_end {
                closed.truncate(marks_end);
            }
        }
        Some(closed)
    }
}

/// A message's text without the white space at its end, which templates may trim.
fn content(message: &Value) -> &str {
    message.get("content").and_then(Value::as_str).unwrap_or_default().trim_end()
}

fn is_turn(message: &Value) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

fn teaches(message: &Value) -> bool {
    let weight = message.get("weight").and_then(Value::as_f64);
    weight != Some(0.0) && (!content(message).is_empty() || message.get("tool_calls").is_some())
}

fn rendered(
    template: &ChatTemplate,
    messages: &[Value],
    add_generation_prompt: bool,
) -> Result<String, Problem> {
    let mut variables = Map::new();
    variables.insert("messages".to_owned(), Value::Array(messages.to_vec()));
    variables.insert("add_generation_prompt".to_owned(), Value::Bool(add_generation_prompt));
    template.render_with(variables)
}

#[cfg(test)]
#[path = "turns_tests.rs"]
mod tests;
