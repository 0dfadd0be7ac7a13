//! Guided generation: a text that must be what a JSON schema, a regular expression or
//! a list of choices allows. Grammars are those of the `llguidance` crate.
//!
//! [`Guide`] says what is wanted; [`Guides`] makes a [`Grammar`] of it, once for equal
//! guides; every sequence follows its grammar with a [`Matcher`] of its own, which
//! tells the sampler the tokens that may come next. The matchers of two sequences
//! share nothing that changes, and no limit is one of time: a text depends on its own
//! tokens alone. Where the room for new tokens runs out, the matcher leads the text to
//! an end that the grammar accepts (see `closing`).
//!
//! Left out: forcing the tokenizer's own segmentation of text that the grammar leaves
//! no choice about; the model chooses among the segmentations.

mod closing;
mod compile;
mod matcher;
mod numbers;
mod position;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use compile::{Grammar, Guides, check};
pub use matcher::Matcher;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a generated text must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guide {
    /// A JSON value that this schema allows. The schema is kept as JSON text, because
    /// the order of its properties is the order of the output's.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    /// A text that this regular expression matches from its first to its last character.
    Regex(String),
    /// One of these texts.
    Choices(Vec<String>),
}

impl Guide {
    /// Most bytes of a schema, or of all choices together.
    pub const MAX_BYTES: usize = 256 << 10;
    /// Most bytes of a pattern: memory can grow with the square of its length.
    pub const MAX_PATTERN_BYTES: usize = 8 << 10;

    /// A guide by a parsed schema.
    pub fn json_schema(schema: &Value) -> Self {
        Self::JsonSchema(schema.to_string())
    }

    /// What can be said against it without a look at its grammar.
    fn check_size(&self) -> Result<(), String> {
        let (name, bytes) = match self {
            Self::JsonObject => return Ok(()),
            Self::JsonSchema(text) => ("the JSON schema", text.len()),
            Self::Regex(pattern) => return Self::check_pattern(pattern),
            Self::Choices(choices) if choices.is_empty() => {
                return Err("there are no choices".into());
            }
            Self::Choices(choices) if choices.iter().any(String::is_empty) => {
                return Err("a choice is empty".into());
            }
            Self::Choices(choices) => {
                ("the list of choices", choices.iter().map(String::len).sum())
            }
        };
        Self::within(name, bytes, Self::MAX_BYTES)
    }

    fn check_pattern(pattern: &str) -> Result<(), String> {
        Self::within("the regular expression", pattern.len(), Self::MAX_PATTERN_BYTES)
    }

    fn within(name: &str, bytes: usize, most: usize) -> Result<(), String> {
        match bytes <= most {
            true => Ok(()),
            false => Err(format!("{name} has {bytes} bytes, more than the {most} that farm takes")),
        }
    }
}
