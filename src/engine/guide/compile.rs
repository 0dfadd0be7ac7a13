//! From a guide to a grammar over the model's tokens.

use std::convert::Infallible;
use std::fmt::Display;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, TokenParser, panic_utils};
use serde_json::{Value, json};

use super::closing::{Step, closing};
use super::position::Position;
use super::{Guide, Matcher};

/// Grammars that are kept for the next record with the same guide.
const KEPT_GRAMMARS: usize = 32;
/// The longest token that the trie holds; longer ones are never chosen.
const MAX_TOKEN_BYTES: usize = 512;
/// Stack for the compiler, which descends into nested schemas and patterns.
const STACK_BYTES: usize = 256 << 20;

/// What llguidance follows of JSON Schema, for messages.
const KEYWORDS: [&str; 27] = [
    "type",
    "enum",
    "const",
    "anyOf",
    "allOf",
    "oneOf",
    "$ref",
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "minProperties",
    "maxProperties",
    "items",
    "prefixItems",
    "additionalItems",
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
];

/// Makes grammars for one model's vocabulary. Shared by the threads of a rank.
pub struct Guides {
    words: Box<dyn Fn() -> Vec<Vec<u8>> + Send + Sync>,
    eos_token_ids: Vec<u32>,
    /// The vocabulary as a trie; made at the first use, since few runs need it.
    factory: OnceLock<Result<ParserFactory, String>>,
    /// The newest last.
    kept: Mutex<Vec<(Guide, Arc<Grammar>)>>,
}

/// A compiled guide: where every text that follows it begins.
pub struct Grammar {
    /// Cloned for each text, with all its caches.
    start: Mutex<TokenParser>,
    facts: Facts,
}

/// What all matchers of a grammar know.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) is_json: bool,
    pub(super) eos_token_ids: Arc<[u32]>,
    /// Tokens with a digit in them, for JSON; else none.
    pub(super) numeric: Arc<[u32]>,
    /// How ways out are searched for.
    pub(super) step: Step,
    /// A short text that the grammar accepts; empty where none was found, too.
    pub(super) shortest: Arc<[u32]>,
    /// One of the fewest tokens, if `shortest` did not fit into the room of a text.
    pub(super) fewest: Arc<OnceLock<Option<Vec<u32>>>>,
}

impl Guides {
    /// Over a vocabulary: `words` gives the bytes of each token of the model, by id;
    /// empty for those without text (special tokens).
    pub fn new(
        words: impl Fn() -> Vec<Vec<u8>> + Send + Sync + 'static,
        eos_token_ids: &[u32],
    ) -> Self {
        Self {
            words: Box::new(words),
            eos_token_ids: eos_token_ids.to_vec(),
            factory: OnceLock::new(),
            kept: Mutex::new(Vec::new()),
        }
    }

    /// The grammar of `guide`: the same one for an equal guide, as long as it is kept.
    ///
    /// # Errors
    /// The guide cannot be followed: what is wrong with it, for its author.
    pub fn compile(&self, guide: &Guide) -> Result<Arc<Grammar>, String> {
        if let Some(grammar) = self.recall(guide) {
            return Ok(grammar);
        }
        guide.check_size()?;
        let factory = self.factory.get_or_init(|| factory((self.words)(), &self.eos_token_ids));
        let factory = factory.as_ref().map_err(String::clone)?;
        let grammar = Arc::new(on_large_stack(|| Grammar::new(factory, guide))?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_GRAMMARS {
            kept.remove(0);
        }
        kept.push((guide.clone(), grammar.clone()));
        Ok(grammar)
    }

    fn recall(&self, guide: &Guide) -> Option<Arc<Grammar>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let place = kept.iter().position(|(known, _)| known == guide)?;
        kept[place..].rotate_left(1);
        kept.last().map(|(_, grammar)| grammar.clone())
    }
}

/// Whether a guide can be followed, as far as that does not depend on a model.
///
/// # Errors
/// What is wrong with it, for its author.
pub fn check(guide: &Guide) -> Result<(), String> {
    let bytes = || (0..=u8::MAX).map(|byte| vec![byte]).collect();
    Guides::new(bytes, &[]).compile(guide).map(drop)
}

impl Grammar {
    fn new(factory: &ParserFactory, guide: &Guide) -> Result<Self, String> {
        let is_json = matches!(guide, Guide::JsonSchema(_) | Guide::JsonObject);
        let grammar = top_level(guide)?;
        let mut start = guarded(|| factory.create_parser(grammar))?;
        start.start_without_prompt();
        // The mask is made for its error, and for the caches that every clone inherits.
        guarded(|| start.compute_mask()).map_err(|reason| {
            format!("the model's tokens can write no text that the guide allows ({reason})")
        })?;
        let trie = factory.tok_env().tok_trie();
        let position = is_json.then(Position::default);
        let by = |step| {
            let mut searched = start.deep_clone();
            let found = closing(&mut searched.parser, trie, position.as_ref(), step);
            (step, found, searched)
        };
        let (step, shortest, searched) = guarded(|| {
            let nearest = by(Step::Byte);
            Ok::<_, Infallible>(if nearest.1.is_some() { nearest } else { by(Step::ShallowByte) })
        })?;
        // Every clone then inherits what the lexer has learnt, if it was not too much for it.
        if searched.parser.get_error().is_none() {
            start = searched;
        }
        let has_digit = |id: &u32| trie.token(*id).iter().any(u8::is_ascii_digit);
        let numeric = (0..trie.vocab_size() as u32).filter(|id| is_json && has_digit(id));
        let eos = trie.eos_tokens().iter().copied().filter(|&id| id != INVALID_TOKEN);
        let facts = Facts {
            is_json,
            eos_token_ids: eos.collect(),
            numeric: numeric.collect(),
            step,
            shortest: shortest.unwrap_or_default().into(),
            fewest: Arc::default(),
        };
        Ok(Self { start: Mutex::new(start), facts })
    }

    /// A matcher at the start of a text.
    pub fn start(&self) -> Matcher {
        // A deep clone: a lexer shared with other texts would fill up with their states.
        let start = self.start.lock().unwrap_or_else(PoisonError::into_inner);
        Matcher::new(start.deep_clone(), self.facts.clone())
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// In llguidance's terms.
fn top_level(guide: &Guide) -> Result<TopLevelGrammar, String> {
    let schema = match guide {
        Guide::Regex(pattern) => return Ok(TopLevelGrammar::from_regex(whole(pattern)?)),
        Guide::Choices(choices) => {
            let choices: Vec<String> = choices.iter().map(|choice| literal(choice)).collect();
            return Ok(TopLevelGrammar::from_regex(&choices.join("|")));
        }
        Guide::JsonObject => json!({"type": "object"}),
        Guide::JsonSchema(text) => {
            serde_json::from_str(text).map_err(|error| format!("not valid JSON: {error}"))?
        }
    };
    check_patterns(&schema)?;
    let mut fields = match schema {
        Value::Object(fields) => fields,
        Value::Bool(true) => serde_json::Map::new(),
        Value::Bool(false) => return Err("the schema false allows nothing".into()),
        _ => return Err("a JSON schema is an object".into()),
    };
    // As Python's json.dumps writes it, which models have seen most, and in which no
    // text can go on with spaces for ever.
    let form = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
    fields.insert("x-guidance".into(), form);
    Ok(TopLevelGrammar::from_json_schema(Value::Object(fields)))
}

/// That no pattern within a schema is over the limit.
fn check_patterns(schema: &Value) -> Result<(), String> {
    match schema {
        Value::Array(items) => items.iter().try_for_each(check_patterns),
        Value::Object(fields) => fields.iter().try_for_each(|(key, value)| {
            Guide::check_pattern(key)?;
            match value.as_str().filter(|_| key == "pattern") {
                Some(pattern) => Guide::check_pattern(pattern),
                None => check_patterns(value),
            }
        }),
        _ => Ok(()),
    }
}

/// The pattern without the anchors that it needs no longer: all of a text is matched.
fn whole(pattern: &str) -> Result<&str, String> {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let backslashes = |text: &str| text.len() - text.trim_end_matches('\\').len();
    let pattern = match pattern.strip_suffix('$') {
        Some(rest) if backslashes(rest) % 2 == 0 => rest,
        _ => pattern,
    };
    match pattern {
        "" => Err("the regular expression allows only the empty text".into()),
        pattern if backslashes(pattern) % 2 == 1 => {
            Err("the regular expression ends within an escape (\\)".into())
        }
        pattern => Ok(pattern),
    }
}

/// A pattern of exactly this text.
fn literal(text: &str) -> String {
    let mut pattern = String::new();
    for character in text.chars() {
        match character {
            'a'..='z' | 'A'..='Z' | '0'..='9' => pattern.push(character),
            other => pattern.push_str(&format!("\\x{{{:X}}}", u32::from(other))),
        }
    }
    pattern
}

/// The vocabulary's trie, and the limits: of steps and sizes, never of time, and so
/// generous that only a guide made to exhaust them does.
fn factory(mut words: Vec<Vec<u8>>, eos_token_ids: &[u32]) -> Result<ParserFactory, String> {
    let eos: Vec<u32> =
        eos_token_ids.iter().copied().filter(|&id| (id as usize) < words.len()).collect();
    for (id, word) in words.iter_mut().enumerate() {
        // No text holds the byte 0xFF, which llguidance marks special tokens with.
        if word.len() > MAX_TOKEN_BYTES || word.contains(&0xFF) || eos.contains(&(id as u32)) {
            word.clear();
        }
    }
    let trie = guarded(|| {
        let info = TokRxInfo::new(words.len() as u32, INVALID_TOKEN);
        let trie = TokTrie::from(&info, &words);
        Ok::<_, Infallible>(if eos.is_empty() { trie } else { trie.with_eos_tokens(&eos) })
    })?;
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = guarded(|| ParserFactory::new(&env, Default::default(), &slices))?;
    factory.quiet();
    *factory.limits_mut() = ParserLimits {
        max_items_in_row: 10_000,
        initial_lexer_fuel: 2_000_000,
        step_lexer_fuel: 1_000_000,
        step_max_items: 500_000,
        max_lexer_states: 50_000,
        verbose_errors: false,
        ..ParserLimits::default()
    };
    Ok(factory)
}

/// Runs a piece of llguidance's code: a panic in it is an error of this guide.
pub(super) fn guarded<T, E: Display>(run: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match panic_utils::catch_unwind(AssertUnwindSafe(|| Ok(run()))) {
        Ok(outcome) => outcome.map_err(|error| on_one_line(&error.to_string())),
        Err(panic) => Err(on_one_line(&panic.to_string())),
    }
}

/// What an error says, without traces, drawings, and places in a generated grammar.
fn on_one_line(error: &str) -> String {
    let first = error.lines().next().unwrap_or_default();
    let first = match first.strip_prefix("at ").and_then(|rest| rest.split_once("): ")) {
        Some((place, rest)) if !place.contains(' ') => rest,
        _ => first,
    };
    if let Some(keywords) = first.strip_prefix("Unimplemented keys: ") {
        return format!(
            "the keywords {keywords} cannot be followed; what farm follows: {}",
            KEYWORDS.join(", ")
        );
    }
    let first: String = first.chars().take(300).collect();
    match error.lines().skip(1).find_map(|line| line.strip_prefix("error: ")) {
        Some(reason) => format!("{first} {reason}"),
        None => first,
    }
}

fn on_large_stack<T: Send>(run: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
        let thread = thread.map_err(|error| format!("no thread to compile the guide: {error}"))?;
        thread.join().unwrap_or_else(|_| Err("the guide cannot be compiled".into()))
    })
}
