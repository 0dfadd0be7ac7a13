//! What can be wrong with one record. The run goes on; the record's line in the
//! output says so, with a stable code.

use serde::{Deserialize, Serialize};

use super::RawRecord;

/// The stable codes of error records; [`ErrorCode::as_str`] is what the output shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The line is longer than the reader's limit.
    LineTooLong,
    /// A CSV row that is malformed or has another number of fields than the header.
    BadCsv,
    /// The bytes are not UTF-8.
    NotUtf8,
    /// The line is not valid JSON.
    BadJson,
    /// The line is valid JSON but not an object.
    NotAnObject,
    /// None of `prompt`, `messages` and `prompt_token_ids`.
    NoPrompt,
    /// More than one of `prompt`, `messages` and `prompt_token_ids`.
    AmbiguousPrompt,
    /// A field has the wrong type.
    WrongType,
    /// A field's value is out of its range.
    OutOfRange,
    /// A schema, pattern or list of choices that cannot be followed, or two of them.
    BadGuide,
    /// An OpenAI batch line for another url than the two that farm answers.
    UnsupportedUrl,
    /// An OpenAI request asks for what farm does not do (tools, images, …).
    UnsupportedField,
    /// `messages`, and the model has no chat template.
    NoChatTemplate,
    /// The chat template refused the messages.
    ChatTemplateFailed,
    /// The tokenizer refused the text.
    TokenizerFailed,
    /// The prompt has no token.
    EmptyPrompt,
    /// The prompt leaves no room in the model's context.
    PromptTooLong,
    /// A token id that the model does not have.
    TokenOutOfVocabulary,
    /// An adapter that the run has not loaded.
    UnknownAdapter,
    /// The engine could not generate this record.
    GenerationFailed,
}

impl ErrorCode {
    /// All codes, in the order of the documentation.
    pub const ALL: [ErrorCode; 20] = [
        Self::LineTooLong,
        Self::BadCsv,
        Self::NotUtf8,
        Self::BadJson,
        Self::NotAnObject,
        Self::NoPrompt,
        Self::AmbiguousPrompt,
        Self::WrongType,
        Self::OutOfRange,
        Self::BadGuide,
        Self::UnsupportedUrl,
        Self::UnsupportedField,
        Self::NoChatTemplate,
        Self::ChatTemplateFailed,
        Self::TokenizerFailed,
        Self::EmptyPrompt,
        Self::PromptTooLong,
        Self::TokenOutOfVocabulary,
        Self::UnknownAdapter,
        Self::GenerationFailed,
    ];

    /// The code as the output spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LineTooLong => "line_too_long",
            Self::BadCsv => "bad_csv",
            Self::NotUtf8 => "not_utf8",
            Self::BadJson => "bad_json",
            Self::NotAnObject => "not_an_object",
            Self::NoPrompt => "no_prompt",
            Self::AmbiguousPrompt => "ambiguous_prompt",
            Self::WrongType => "wrong_type",
            Self::OutOfRange => "out_of_range",
            Self::BadGuide => "bad_guide",
            Self::UnsupportedUrl => "unsupported_url",
            Self::UnsupportedField => "unsupported_field",
            Self::NoChatTemplate => "no_chat_template",
            Self::ChatTemplateFailed => "chat_template_failed",
            Self::TokenizerFailed => "tokenizer_failed",
            Self::EmptyPrompt => "empty_prompt",
            Self::PromptTooLong => "prompt_too_long",
            Self::TokenOutOfVocabulary => "token_out_of_vocabulary",
            Self::UnknownAdapter => "unknown_adapter",
            Self::GenerationFailed => "generation_failed",
        }
    }
}

/// What is wrong, before it is known where: the code and a message for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Stable code.
    pub code: ErrorCode,
    /// What is wrong and, where it helps, what would be right.
    pub message: String,
}

impl Problem {
    /// A problem with this code and message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// A record that cannot be generated, and where it stands in the input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{file}:{line}: {message} ({})", .code.as_str())]
pub struct RecordError {
    /// Stable code.
    pub code: ErrorCode,
    /// What is wrong.
    pub message: String,
    /// The input file, as the user named it.
    pub file: String,
    /// Line where the record starts, from 1.
    pub line: u64,
    /// See [`RawRecord::index`].
    pub index: u64,
    /// The record's own id, where it could be read.
    pub id: Option<String>,
    /// Whether the answer takes OpenAI's batch form.
    pub openai: bool,
}

impl RecordError {
    /// `problem` at `raw`'s place in `file`, with no id.
    pub fn at(raw: &RawRecord, file: &str, problem: Problem) -> Self {
        Self {
            code: problem.code,
            message: problem.message,
            file: file.to_string(),
            line: raw.line,
            index: raw.index,
            id: None,
            openai: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Users filter on the codes: the serialized form and `as_str` must agree.
    #[test]
    fn the_code_is_spelled_one_way() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
        }
    }
}
