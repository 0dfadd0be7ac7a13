//! Chat templates, with the semantics of transformers' `apply_chat_template`.
//!
//! The environment is that of transformers' `chat_template_utils`: `trim_blocks`,
//! `lstrip_blocks`, no auto-escaping, loop controls, `raise_exception`,
//! `strftime_now`, its `tojson`, and the special tokens as variables. Python's string
//! and dict methods come from minijinja-contrib.
//! Left out: tools and documents (they are `none`, as where transformers gets none),
//! and the assistant mask that `{% generation %}` marks (the tags are tolerated).

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::jinja_values::{to_template, tojson};
use super::strftime::strftime;
use super::{ErrorCode, Problem};
use crate::model::checkpoint::gguf::Metadata;
use crate::model::small_file;
use crate::model::tokenizer::{gguf_special_tokens, is_missing, read_json, special_tokens};
use crate::{Error, Result};

/// Name under which the template is known to the engine; messages show it.
const NAME: &str = "chat_template";

/// A model's chat template.
pub struct ChatTemplate {
    /// As the model has it.
    source: String,
    /// The compiled template, or why it does not compile: plain prompts of the same
    /// run do not need it.
    environment: Result<Environment<'static>, String>,
    /// Special tokens by name.
    variables: Map<String, Json>,
    now_unix_seconds: u64,
}

impl ChatTemplate {
    /// The template of a model directory, from `chat_template.jinja`, else
    /// `chat_template.json`, else `tokenizer_config.json`; of several named ones the
    /// one called `default`. `None` if the model has none.
    ///
    /// `now_unix_seconds` is what `strftime_now` shows (in UTC). Give every rank, and
    /// every rerun, the run's start, so that they agree.
    ///
    /// Errors (input): a file is there but cannot be read.
    pub fn from_dir(dir: &Path, now_unix_seconds: u64) -> Result<Option<Self>> {
        let Some(source) = template_source(dir)? else { return Ok(None) };
        let variables = special_tokens(dir)?
            .into_iter()
            .map(|(name, token)| (name, Json::String(token)))
            .collect();
        Ok(Some(Self::new(&source, variables, now_unix_seconds)))
    }

    /// The template of a model: that of its directory, else the one in its GGUF metadata
    /// (`tokenizer.chat_template`), with the special tokens that the ids there name.
    /// `None` if the model has none; the forms that Meta publishes never have one.
    ///
    /// Time and errors as for [`ChatTemplate::from_dir`].
    pub fn open(
        model: &Path,
        gguf: Option<&Metadata>,
        now_unix_seconds: u64,
    ) -> Result<Option<Self>> {
        if let found @ Some(_) = Self::from_dir(model, now_unix_seconds)? {
            return Ok(found);
        }
        let template = gguf.and_then(|metadata| {
            let source = metadata.str("tokenizer.chat_template")?;
            let tokens = gguf_special_tokens(metadata).into_iter();
            let variables = tokens.map(|(name, token)| (name, Json::String(token))).collect();
            Some(Self::new(source, variables, now_unix_seconds))
        });
        Ok(template)
    }

    /// A template from its source, with the variables (special tokens) it may use.
    pub fn new(source: &str, variables: Map<String, Json>, now_unix_seconds: u64) -> Self {
        let environment = environment(source, now_unix_seconds).map_err(|error| describe(&error));
        Self { source: source.to_owned(), environment, variables, now_unix_seconds }
    }

    /// The template that `change` makes of this one's source; `None` where it makes none.
    pub fn changed(&self, change: impl Fn(&str) -> Option<String>) -> Option<Self> {
        Some(Self::new(&change(&self.source)?, self.variables.clone(), self.now_unix_seconds))
    }

    /// The prompt's text for `messages`, ending where the assistant is to go on. It
    /// holds its special tokens already: tokenize it without adding any.
    ///
    /// Errors: `chat_template_failed` with the template's own message.
    pub fn render(&self, messages: &[Json]) -> Result<String, Problem> {
        let mut variables = Map::new();
        variables.insert("messages".to_string(), Json::Array(messages.to_vec()));
        variables.insert("add_generation_prompt".to_string(), Json::Bool(true));
        self.render_with(variables)
    }

    /// Renders with these variables; `tools` and `documents` are `none` if not given.
    pub fn render_with(&self, variables: Map<String, Json>) -> Result<String, Problem> {
        let failed = |message: String| Problem::new(ErrorCode::ChatTemplateFailed, message);
        let environment = self.environment.as_ref().map_err(|error| {
            failed(format!("the model's chat template does not compile: {error}"))
        })?;
        let mut context = self.variables.clone();
        context.insert("tools".to_string(), Json::Null);
        context.insert("documents".to_string(), Json::Null);
        context.extend(variables);
        environment
            .get_template(NAME)
            .and_then(|template| template.render(to_template(&Json::Object(context))))
            .map_err(|error| {
                failed(format!(
                    "the model's chat template refuses the messages: {}",
                    describe(&error)
                ))
            })
    }
}

/// The longest template; those of models have some tens of KiB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Instructions of the template engine that a rendering may take: some seconds' worth, where
/// a long conversation takes milliseconds.
const FUEL: u64 = 20_000_000;

/// The reason that the template gives (`raise_exception`), else the engine's.
fn describe(error: &JinjaError) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        _ => error.to_string(),
    }
}

fn environment(source: &str, now_unix_seconds: u64) -> Result<Environment<'static>, JinjaError> {
    if source.len() > MAX_SOURCE_BYTES {
        let message = format!("it has {} bytes, more than {MAX_SOURCE_BYTES}", source.len());
        return Err(JinjaError::new(ErrorKind::InvalidOperation, message));
    }
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
        Err(JinjaError::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: String| strftime(now_unix_seconds, &format));
    // Python's len() and iter() accept strings, dicts and Jinja's Undefined too.
    env.add_test("sequence", |value: &Value| is_sequence(value));
    env.add_test("iterable", |value: &Value| {
        is_sequence(value) || value.kind() == ValueKind::Iterable
    });
    env.add_template_owned(NAME, without_generation_tags(source))?;
    Ok(env)
}

fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    // A slice of a list is a list in Python and an iterable here.
    matches!(value.kind(), String | Map | Seq | Iterable | Undefined)
}

/// Reads line breaks as Jinja does (`\r\n` and `\r` are `\n`) and turns
/// `{% generation %}` … `{% endgeneration %}`, a block that transformers adds, into
/// an `if` that is always taken: white space around the tags behaves the same.
fn without_generation_tags(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let inner = &rest[start + 2..start + length];
        let name = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..start + 2]);
        match name {
            "generation" => out.push_str(&inner.replace(name, " if true ")),
            "endgeneration" => out.push_str(&inner.replace(name, " endif ")),
            _ => out.push_str(inner),
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

fn template_source(dir: &Path) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    let bad = |error: &dyn std::fmt::Display| Error::input(format!("{}: {error}", path.display()));
    match small_file::read(&path) {
        Ok(source) => return String::from_utf8(source).map(Some).map_err(|e| bad(&e)),
        Err(error) if is_missing(&error) => {}
        Err(error) => return Err(bad(&error)),
    }
    for file in ["chat_template.json", "tokenizer_config.json"] {
        let path = dir.join(file);
        let config = read_json(&path)?;
        if let Some(template) = config.as_ref().and_then(|config| config.get("chat_template")) {
            let source = named_default(template).map_err(|reason| {
                Error::input(format!("{}: chat_template {reason}", path.display()))
            })?;
            if source.is_some() {
                return Ok(source);
            }
        }
    }
    Ok(None)
}

/// A template that is a string, or one of a list of `{"name", "template"}`.
fn named_default(template: &Json) -> Result<Option<String>, String> {
    let Json::Array(list) = template else {
        return match template {
            Json::Null => Ok(None),
            Json::String(source) => Ok(Some(source.clone())),
            _ => Err("is neither a string nor a list of named templates".to_string()),
        };
    };
    let name = |entry: &Json| entry.get("name").and_then(Json::as_str).map(str::to_string);
    let chosen = match list.as_slice() {
        [only] => Some(only),
        _ => list.iter().find(|entry| name(entry).as_deref() == Some("default")),
    };
    match chosen.and_then(|entry| entry.get("template")).and_then(Json::as_str) {
        Some(source) => Ok(Some(source.to_string())),
        None if list.is_empty() => Ok(None),
        None => {
            let names: Vec<_> = list.iter().filter_map(name).collect();
            Err(format!("has no template called \"default\" (it has: {})", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Json) -> Result<String, String> {
        let variables = Map::from_iter([("bos_token".to_string(), json!("<s>"))]);
        let template = ChatTemplate::new(source, variables, 951_782_400);
        let Json::Array(messages) = messages else { panic!("a list") };
        template.render(&messages).map_err(|problem| {
            assert_eq!(problem.code, ErrorCode::ChatTemplateFailed);
            problem.message
        })
    }

    /// What transformers renders, over the idioms of the templates in use.
    #[test]
    fn goldens_of_transformers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/cases.json");
        let golden = read_json(&path).unwrap().expect("the goldens are in the repository");
        // The goldens' clock stands at noon of 2026-11-21.
        let now = 1_795_262_400;
        assert_eq!(strftime(now, "%d %b %Y"), "21 Nov 2026");
        for case in golden["cases"].as_array().unwrap() {
            let mut variables = Map::new();
            for token in ["bos_token", "eos_token"] {
                if !case[token].is_null() {
                    variables.insert(token.to_string(), case[token].clone());
                }
            }
            let template = ChatTemplate::new(case["template"].as_str().unwrap(), variables, now);
            let mut variables = case["kwargs"].as_object().cloned().unwrap_or_default();
            for name in ["messages", "tools", "add_generation_prompt"] {
                variables.insert(name.to_string(), case[name].clone());
            }
            let rendered = template.render_with(variables);
            let name = &case["name"];
            match case.get("error").and_then(Json::as_str) {
                Some(error) => {
                    let message = rendered.expect_err("the template raises").message;
                    assert!(message.contains(error), "{name}: {message} / {error}");
                }
                None => assert_eq!(
                    rendered.as_ref().ok(),
                    case["rendered"].as_str().map(str::to_string).as_ref(),
                    "{name}: {rendered:?}"
                ),
            }
        }
    }

    #[test]
    fn white_space_is_jinjas_with_trimmed_blocks() {
        let source = "  {% for m in messages %}\r\n  {{ m.content }}\n\n  {% endfor %}\nend\n\n";
        assert_eq!(render(source, json!([{"content": "a"}])).unwrap(), "  a\n\nend\n");
        let source = "{{ bos_token }}{%- generation -%}\n x {% endgeneration %}\n.{% generation %}y{% endgeneration %}";
        assert_eq!(render(source, json!([])).unwrap(), "<s>x .y");
    }

    #[test]
    fn the_globals_and_tests_of_transformers_are_there() {
        let source = "{{ strftime_now('%d %b %Y') }}|{{ tools is none }}|{{ documents is defined }}|\
            {{ eos_token is defined }}|{{ 'x' is sequence and messages[0] is sequence }}|{{ messages[1:] is sequence }}\
            |{{ nothing }}|{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m|tojson }}{% endfor %}";
        let rendered =
            render(source, json!([{"role": "u"}, {"role": "é<", "content": 1}])).unwrap();
        assert_eq!(
            rendered,
            "29 Feb 2000|True|True|False|True|True||{\"role\": \"é<\", \"content\": 1}"
        );
    }

    #[test]
    fn a_template_that_raises_or_does_not_compile_fails_the_record_with_its_reason() {
        let message =
            render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert!(message.ends_with("refuses the messages: roles must alternate"), "{message}");
        assert!(render("{% if %}", json!([])).unwrap_err().contains("does not compile"));
        assert!(render("{{ a.b.c }}", json!([])).unwrap_err().contains("undefined"));
    }

    /// A template is bounded in length, time and depth.
    #[test]
    fn a_hostile_template_fails_its_records() {
        let range = "range(90000)";
        for (source, word) in [
            (
                format!(
                    "{{% for i in {range} %}}{{% for j in {range} %}}{{% endfor %}}{{% endfor %}}"
                ),
                "fuel",
            ),
            ("{{ 'x' * 10000000000 }}".into(), "too large"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(), "recursion"),
            (format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)), "compile"),
            ("x".repeat(MAX_SOURCE_BYTES + 1), "1048577 bytes"),
        ] {
            let message = render(&source, json!([])).unwrap_err();
            assert!(message.contains(word), "{word}: {message}");
        }
    }

    #[test]
    fn the_template_is_found_where_models_keep_it() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: Json| {
            let text = content.as_str().map_or_else(|| content.to_string(), str::to_string);
            std::fs::write(dir.path().join(name), text).unwrap();
        };
        let rendered = || {
            let template = ChatTemplate::from_dir(dir.path(), 0)?;
            Ok::<_, Error>(template.map(|template| template.render(&[]).unwrap()))
        };
        assert_eq!(rendered().unwrap(), None);
        write("tokenizer_config.json", json!({"chat_template": null}));
        assert_eq!(rendered().unwrap(), None);
        let named =
            |name: &str| json!({"name": name, "template": format!("{name} {{{{ eos_token }}}}")});
        write("tokenizer_config.json", json!({"chat_template": [named("rag"), named("tool_use")]}));
        assert!(rendered().unwrap_err().message.contains("rag, tool_use"));
        write(
            "tokenizer_config.json",
            json!({"eos_token": {"content": "</s>"}, "chat_template": [named("rag"), named("default")]}),
        );
        assert_eq!(rendered().unwrap().as_deref(), Some("default </s>"));
        write("chat_template.json", json!({"chat_template": "json"}));
        assert_eq!(rendered().unwrap().as_deref(), Some("json"));
        write("chat_template.jinja", json!("jinja\n"));
        assert_eq!(rendered().unwrap().as_deref(), Some("jinja"));
    }

    #[test]
    fn a_gguf_brings_its_template_and_the_texts_of_its_special_tokens() {
        use crate::model::checkpoint::gguf::Value as Meta;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.gguf");
        std::fs::write(&file, "GGUF").unwrap();
        let mut metadata = Metadata::default();
        let mut set = |key: &str, value| metadata.0.insert(format!("tokenizer.{key}"), value);
        set("ggml.tokens", Meta::Strings(vec!["<s>".into(), "</s>".into()]));
        set("ggml.bos_token_id", Meta::Int(0));
        set("ggml.eos_token_id", Meta::Int(99));
        let open = |metadata: &Metadata| ChatTemplate::open(&file, Some(metadata), 0).unwrap();
        assert!(open(&metadata).is_none());
        let source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token is defined }}";
        metadata.0.insert("tokenizer.chat_template".into(), Meta::String(source.into()));
        let text = open(&metadata).unwrap().render(&[json!({"content": "hi"})]).unwrap();
        assert_eq!(text, "<s>hiFalse");
        std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
        let own = ChatTemplate::open(dir.path(), Some(&metadata), 0).unwrap().unwrap();
        assert_eq!(own.render(&[]).unwrap(), "own");
    }
}
