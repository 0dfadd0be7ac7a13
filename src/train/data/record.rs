//! From a record's bytes to what is to be learned from it: pure, and total over all bytes.

use serde_json::{Map, Value, json};

use crate::prompts::overrides::{shortened, wrong_type};
use crate::prompts::request::messages;
use crate::prompts::{ErrorCode, Problem, RawBody};

/// What a record teaches.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Lesson {
    /// A conversation; the assistant's turns from message number `first` on are learned.
    Chat { messages: Vec<Value>, first: usize },
    /// What to write after the prompt.
    Completion { prompt: String, completion: String },
    /// All of a text.
    Text(String),
}

/// Why a record cannot be trained on; see [`super::BadRecord`].
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub code: &'static str,
    pub message: String,
}

impl Refusal {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self::new(problem.code.as_str(), problem.message)
    }
}

/// Reads one record. `renamed` is the column of a CSV file that the reader calls `prompt`;
/// `has_template` makes a conversation of Alpaca's fields.
pub(super) fn parse(body: &RawBody, renamed: &str, has_template: bool) -> Result<Lesson, Refusal> {
    match body {
        RawBody::Bad { code, message } => Err(Problem::new(*code, message.as_str()).into()),
        RawBody::Text(bytes) => not_blank("the line", utf8(bytes)?.to_owned()).map(Lesson::Text),
        RawBody::Json(bytes) => {
            let mut fields = object(utf8(bytes)?)?;
            if renamed != "prompt"
                && let Some(cell) = fields.remove("prompt")
            {
                fields.insert(renamed.to_owned(), cell);
            }
            fields.retain(|_, value| !value.is_null());
            lesson(&Fields(fields), has_template)
        }
    }
}

fn lesson(fields: &Fields, has_template: bool) -> Result<Lesson, Refusal> {
    if let Some(value) = fields.0.get("messages") {
        return Ok(Lesson::Chat { messages: messages(value)?, first: 0 });
    }
    if let Some(value) = fields.0.get("conversations") {
        return Ok(Lesson::Chat { messages: messages(&sharegpt(value)?)?, first: 0 });
    }
    if fields.has("prompt") && fields.has("completion") {
        return prompt_and_completion(fields);
    }
    if fields.has("instruction") && fields.has("output") {
        return alpaca(fields, has_template);
    }
    if fields.has("text") {
        return not_blank("\"text\"", fields.text("text")?).map(Lesson::Text);
    }
    Err(Refusal::new("no_example", fields.what_is_missing()))
}

/// TRL's two forms: both texts, or both lists of messages.
fn prompt_and_completion(fields: &Fields) -> Result<Lesson, Refusal> {
    let (prompt, completion) = (&fields.0["prompt"], &fields.0["completion"]);
    if !prompt.is_array() && !completion.is_array() {
        let completion = not_blank("\"completion\"", fields.text("completion")?)?;
        return Ok(Lesson::Completion { prompt: fields.text("prompt")?, completion });
    }
    let list = |name: &str, value: &Value| match value.is_array() {
        true => messages(value),
        false => Err(wrong_type(name, "a list of messages, as its counterpart", value)),
    };
    let mut conversation = list("prompt", prompt)?;
    let first = conversation.len();
    conversation.extend(list("completion", completion)?);
    Ok(Lesson::Chat { messages: conversation, first })
}

/// Alpaca's fields: a conversation for a model that has a form for one, else the text that
/// Stanford trained on (`train.py` of tatsu-lab/stanford_alpaca).
fn alpaca(fields: &Fields, has_template: bool) -> Result<Lesson, Refusal> {
    let instruction = not_blank("\"instruction\"", fields.text("instruction")?)?;
    let completion = not_blank("\"output\"", fields.text("output")?)?;
    let input = match fields.has("input") {
        true => fields.text("input")?,
        false => String::new(),
    };
    let has_input = !input.trim().is_empty();
    if has_template {
        let question = match has_input {
            true => format!("{instruction}\n\n{input}"),
            false => instruction,
        };
        let messages = vec![
            json!({"role": "user", "content": question}),
            json!({"role": "assistant", "content": completion}),
        ];
        return Ok(Lesson::Chat { messages, first: 0 });
    }
    let prompt = match has_input {
        true => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        ),
        false => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
        ),
    };
    Ok(Lesson::Completion { prompt, completion })
}

/// ShareGPT's turns as messages. Files under that name that hold messages already pass too.
fn sharegpt(value: &Value) -> Result<Value, Refusal> {
    let turns = value.as_array().ok_or_else(|| {
        wrong_type("conversations", "a list of objects with \"from\" and \"value\"", value)
    })?;
    let turn = |(i, turn): (usize, &Value)| {
        if turn.get("role").is_some() {
            return Ok(turn.clone());
        }
        let text = |name: &str| {
            turn.get(name).and_then(Value::as_str).ok_or_else(|| {
                let name = format!("conversations[{i}].{name}");
                wrong_type(&name, "a string", turn)
            })
        };
        let role = match text("from")? {
            "human" => "user",
            "gpt" | "model" | "chatgpt" | "bot" => "assistant",
            "function_response" | "observation" => "tool",
            role => role,
        };
        Ok(json!({"role": role, "content": text("value")?}))
    };
    turns.iter().enumerate().map(turn).collect()
}

/// A record's fields, `null` ones left out.
struct Fields(Map<String, Value>);

impl Fields {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn text(&self, name: &str) -> Result<String, Refusal> {
        match &self.0[name] {
            Value::String(text) => Ok(text.clone()),
            other => Err(wrong_type(name, "a string", other).into()),
        }
    }

    /// Names the partner of a field that stands alone, else all that could be there.
    fn what_is_missing(&self) -> String {
        let pairs = [("prompt", "completion"), ("instruction", "output")];
        for (one, other) in pairs.into_iter().flat_map(|(a, b)| [(a, b), (b, a)]) {
            if self.has(one) {
                return format!("the record has {one:?} but no {other:?}");
            }
        }
        let names = self.0.keys().map(|key| Value::from(key.as_str()));
        let names = shortened(&names.collect());
        format!(
            "the record has none of \"messages\", \"conversations\", \"prompt\" with \"completion\", \"instruction\" with \"output\", and \"text\"; its fields: {names}"
        )
    }
}

fn not_blank(what: &str, text: String) -> Result<String, Refusal> {
    match text.trim().is_empty() {
        true => Err(Refusal::new("empty", format!("{what} is empty"))),
        false => Ok(text),
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, Refusal> {
    std::str::from_utf8(bytes).map_err(|error| {
        let message = format!("not valid UTF-8, from byte {} of the line", error.valid_up_to() + 1);
        Problem::new(ErrorCode::NotUtf8, message).into()
    })
}

fn object(text: &str) -> Result<Map<String, Value>, Refusal> {
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => {
            let message = format!("the line is not a JSON object but {}", shortened(&other));
            Err(Problem::new(ErrorCode::NotAnObject, message).into())
        }
        Err(error) => {
            let message = format!("not valid JSON: {error}");
            Err(Problem::new(ErrorCode::BadJson, message).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(record: &str, has_template: bool) -> Result<Lesson, &'static str> {
        let body = RawBody::Json(record.as_bytes().to_vec());
        parse(&body, "prompt", has_template).map_err(|refusal| refusal.code)
    }

    fn chat(messages: &[(&str, &str)], first: usize) -> Lesson {
        let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
        Lesson::Chat { messages: messages.iter().map(message).collect(), first }
    }

    #[test]
    fn each_format_is_known_by_its_fields() {
        let two = chat(&[("user", "q"), ("assistant", "a")], 0);
        let same = [
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}],"text":"t"}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"q"}]},{"role":"assistant","content":"a"}]}"#,
            r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}],"id":1}"#,
            r#"{"conversations":[{"role":"user","content":"q"},{"from":"assistant","value":"a"}]}"#,
            r#"{"instruction":"q","output":"a","text":"as the data set spells it"}"#,
            r#"{"instruction":"q","input":" ","output":"a"}"#,
        ];
        for record in same {
            assert_eq!(parsed(record, true).as_ref(), Ok(&two), "{record}");
        }
        let lists = r#"{"prompt":[{"role":"user","content":"q"}],"completion":[{"role":"assistant","content":"a"}]}"#;
        assert_eq!(parsed(lists, true), Ok(chat(&[("user", "q"), ("assistant", "a")], 1)));
        let pair = Lesson::Completion { prompt: "".into(), completion: " c".into() };
        assert_eq!(parsed(r#"{"prompt":"","completion":" c","messages":null}"#, true), Ok(pair));
        assert_eq!(parsed(r#"{"text":" t "}"#, true), Ok(Lesson::Text(" t ".into())));
    }

    #[test]
    fn alpaca_without_a_template_is_stanfords_text() {
        let prompt = |record: &str| match parsed(record, false) {
            Ok(Lesson::Completion { prompt, completion }) if completion == "o" => prompt,
            other => panic!("{other:?}"),
        };
        let text = prompt(r#"{"instruction":"i","output":"o"}"#);
        assert!(text.starts_with("Below is an instruction that describes a task. Write"));
        assert!(text.ends_with("\n\n### Instruction:\ni\n\n### Response:"));
        let text = prompt(r#"{"instruction":"i","input":"x","output":"o"}"#);
        assert!(text.ends_with("### Instruction:\ni\n\n### Input:\nx\n\n### Response:"));
        let both = chat(&[("user", "i\n\nx"), ("assistant", "o")], 0);
        assert_eq!(parsed(r#"{"instruction":"i","input":"x","output":"o"}"#, true), Ok(both));
    }

    #[test]
    fn hostile_records_are_refused_with_a_code() {
        let cases = [
            ("{", "bad_json"),
            ("", "bad_json"),
            ("[1]", "not_an_object"),
            ("{}", "no_example"),
            (r#"{"prompt":"p"}"#, "no_example"),
            (r#"{"output":"o","input":"i"}"#, "no_example"),
            (r#"{"text":null}"#, "no_example"),
            (r#"{"text":1}"#, "wrong_type"),
            (r#"{"text":" \n"}"#, "empty"),
            (r#"{"prompt":"p","completion":""}"#, "empty"),
            (r#"{"prompt":1,"completion":"c"}"#, "wrong_type"),
            (r#"{"prompt":[],"completion":[]}"#, "no_prompt"),
            (r#"{"prompt":"p","completion":[{"role":"assistant","content":"a"}]}"#, "wrong_type"),
            (r#"{"instruction":"","output":"o"}"#, "empty"),
            (r#"{"instruction":"i","output":["o"]}"#, "wrong_type"),
            (r#"{"messages":"m"}"#, "wrong_type"),
            (r#"{"messages":[]}"#, "no_prompt"),
            (r#"{"messages":[{"role":"user"}]}"#, "wrong_type"),
            (r#"{"conversations":{}}"#, "wrong_type"),
            (r#"{"conversations":[1]}"#, "wrong_type"),
            (r#"{"conversations":[{"from":"human","value":null}]}"#, "wrong_type"),
        ];
        for (record, code) in cases {
            assert_eq!(parsed(record, true), Err(code), "{record}");
        }
        let deep = format!("{{\"text\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(parsed(&deep, true), Err("bad_json"));
        let refusal = parse(&RawBody::Text(b"a\xff".to_vec()), "prompt", true).unwrap_err();
        assert_eq!(refusal.code, "not_utf8");
        let alone = parse(&RawBody::Json(br#"{"completion":"c"}"#.to_vec()), "prompt", true);
        assert_eq!(alone.unwrap_err().message, r#"the record has "completion" but no "prompt""#);
    }
}
