//! From a raw record to token ids: everything that a record needs before the engine.

use std::sync::Arc;

use super::{
    ChatTemplate, Defaults, ErrorCode, Problem, Prompt, RawRecord, RecordError, Request, parse,
};
use crate::engine::Guides;
use crate::model::tokenizer::Tokenizer;

/// A record that the engine can take.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// The parsed record.
    pub request: Request,
    /// The prompt as text: as given, or rendered from messages, or decoded from
    /// token ids.
    pub prompt_text: String,
    /// The prompt's tokens; at least one, all in the vocabulary.
    pub prompt_token_ids: Vec<u32>,
}

/// Prepares records; one a rank, shared by its threads.
pub struct Preparer {
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// What the records are read against.
    pub defaults: Defaults,
    /// The longest sequence, prompt and new tokens together.
    pub max_seq_len: usize,
    /// Tokens that must fit behind the prompt: 1 to generate, 0 to score.
    pub reserved_tokens: usize,
    /// Makes the grammars of the records' guides; the engine's too.
    pub guides: Arc<Guides>,
    /// Token ids that the model knows: rows of its embedding.
    pub vocab_size: usize,
}

impl Preparer {
    /// Parses, renders and tokenizes one record.
    ///
    /// A plain prompt gets the special tokens that the tokenizer adds; rendered
    /// messages hold theirs already and get none; token ids are taken as they are.
    pub fn prepare(&self, raw: &RawRecord) -> Result<Prepared, RecordError> {
        let request = parse(raw, &self.defaults)?;
        let tokenized = self.check_guide(&request).and_then(|()| self.tokenize(&request.prompt));
        match tokenized {
            Ok((prompt_text, prompt_token_ids)) => {
                Ok(Prepared { request, prompt_text, prompt_token_ids })
            }
            Err(problem) => Err(self.refuse(raw, &request, problem)),
        }
    }

    /// The error record of a request that parsed: it keeps its id and output form.
    fn refuse(&self, raw: &RawRecord, request: &Request, problem: Problem) -> RecordError {
        RecordError {
            id: Some(request.id.clone()),
            openai: request.openai.is_some(),
            ..RecordError::at(raw, &self.defaults.file, problem)
        }
    }

    /// Makes the grammar now: the engine then finds it made. A score writes no text.
    fn check_guide(&self, request: &Request) -> Result<(), Problem> {
        let Some(guide) = request.params.guide.as_ref().filter(|_| self.reserved_tokens > 0) else {
            return Ok(());
        };
        let bad = |reason| {
            let message = format!("what the text must be cannot be followed: {reason}");
            Problem::new(ErrorCode::BadGuide, message)
        };
        self.guides.compile(guide).map(drop).map_err(bad)
    }

    fn tokenize(&self, prompt: &Prompt) -> Result<(String, Vec<u32>), Problem> {
        let refused = |error: crate::Error| Problem::new(ErrorCode::TokenizerFailed, error.message);
        let (text, ids) = match prompt {
            Prompt::Text(text) => {
                (text.clone(), self.tokenizer.encode(text, true).map_err(refused)?)
            }
            Prompt::Messages(messages) => {
                let template = self.template.as_ref().ok_or_else(no_chat_template)?;
                let text = template.render(messages)?;
                let ids = self.tokenizer.encode(&text, false).map_err(refused)?;
                (text, ids)
            }
            Prompt::TokenIds(ids) => {
                self.check_vocabulary(ids)?;
                (self.tokenizer.decode(ids, false).map_err(refused)?, ids.clone())
            }
        };
        self.check_vocabulary(&ids)?;
        self.check_length(ids.len())?;
        Ok((text, ids))
    }

    fn check_vocabulary(&self, ids: &[u32]) -> Result<(), Problem> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(id) => Err(Problem::new(
                ErrorCode::TokenOutOfVocabulary,
                format!("token id {id} is not in the model's vocabulary of {}", self.vocab_size),
            )),
            None => Ok(()),
        }
    }

    fn check_length(&self, num_tokens: usize) -> Result<(), Problem> {
        if num_tokens == 0 {
            let message = "the prompt has no tokens (it is empty, and the tokenizer adds none)";
            return Err(Problem::new(ErrorCode::EmptyPrompt, message));
        }
        if num_tokens + self.reserved_tokens > self.max_seq_len {
            let message = format!(
                "the prompt has {num_tokens} tokens, the context of {} has room for {}",
                self.max_seq_len,
                self.max_seq_len.saturating_sub(self.reserved_tokens)
            );
            return Err(Problem::new(ErrorCode::PromptTooLong, message));
        }
        Ok(())
    }
}

fn no_chat_template() -> Problem {
    Problem::new(
        ErrorCode::NoChatTemplate,
        "the model has no chat template, which \"messages\" (and --chat) need: give the record a plain \"prompt\", or put chat_template.jinja into the model directory",
    )
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::super::RawBody;
    use super::*;
    use crate::model::tokenizer::testing::write_words;

    fn preparer() -> Preparer {
        let dir = tempfile::tempdir().unwrap();
        write_words(dir.path());
        let source = "{{ '<s>' }} {% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}";
        Preparer {
            tokenizer: Arc::new(Tokenizer::from_dir(dir.path()).unwrap()),
            template: Some(ChatTemplate::new(source, Map::new(), 0)),
            defaults: Defaults { file: "p.jsonl".into(), ..Defaults::default() },
            max_seq_len: 4,
            reserved_tokens: 1,
            guides: Arc::new(Guides::new(|| vec![b"a".to_vec(); 6], &[1])),
            vocab_size: 6,
        }
    }

    fn raw(line: &str) -> RawRecord {
        RawRecord { index: 1, line: 3, body: RawBody::Json(line.as_bytes().to_vec()) }
    }

    #[test]
    fn messages_get_no_second_bos() {
        let prepared = |line| {
            let prepared = preparer().prepare(&raw(line)).unwrap();
            (prepared.prompt_text, prepared.prompt_token_ids)
        };
        assert_eq!(prepared(r#"{"prompt":"hello"}"#), ("hello".to_string(), vec![0, 3]));
        let chat = r#"{"messages":[{"role":"user","content":"hello"}]}"#;
        assert_eq!(prepared(chat), ("<s> user hello".to_string(), vec![0, 5, 3]));
        let ids = r#"{"prompt_token_ids":[3,4]}"#;
        assert_eq!(prepared(ids), ("hello world".to_string(), vec![3, 4]));
    }

    #[test]
    fn a_guide_that_cannot_be_followed_spoils_its_record() {
        let code = |line: &str| preparer().prepare(&raw(line)).map_err(|e| (e.code.as_str(), e.id));
        assert!(code(r#"{"id":"a","prompt":"hello","regex":"a+"}"#).is_ok());
        let bad = Err(("bad_guide", Some("a".to_owned())));
        assert_eq!(code(r#"{"id":"a","prompt":"hello","regex":"("}"#).map(drop), bad);
        assert_eq!(code(r#"{"id":"a","prompt":"hello","choices":["b"]}"#).map(drop), bad);
        assert_eq!(code(r#"{"id":"a","prompt":"hello","json_schema":{"type":1}}"#).map(drop), bad);
        let score = Preparer { reserved_tokens: 0, ..preparer() };
        assert!(score.prepare(&raw(r#"{"prompt":"hello","regex":"("}"#)).is_ok());
    }

    #[test]
    fn what_the_model_cannot_take_is_an_error_record() {
        let code = |preparer: &Preparer, line: &str| {
            let error = preparer.prepare(&raw(line)).unwrap_err();
            assert_eq!((error.line, error.file.as_str()), (3, "p.jsonl"));
            assert_eq!(error.id.as_deref(), Some("a"));
            error.code.as_str()
        };
        let generate = preparer();
        assert_eq!(
            code(&generate, r#"{"id":"a","prompt":"hello hello hello"}"#),
            "prompt_too_long"
        );
        assert_eq!(
            code(&generate, r#"{"id":"a","prompt_token_ids":[6]}"#),
            "token_out_of_vocabulary"
        );
        assert_eq!(code(&generate, r#"{"id":"a","prompt_token_ids":[]}"#), "empty_prompt");
        let plain = Preparer { template: None, ..preparer() };
        let chat = r#"{"id":"a","messages":[{"role":"user","content":"hello"}]}"#;
        assert_eq!(code(&plain, chat), "no_chat_template");
        let score = Preparer { reserved_tokens: 0, ..preparer() };
        assert!(score.prepare(&raw(r#"{"prompt":"hello hello hello"}"#)).is_ok());
    }
}
