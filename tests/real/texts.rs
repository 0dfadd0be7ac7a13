//! What farm makes of texts and conversations with a model's own vocabulary and chat
//! template, a JSON line for each line of standard input; `tests/real/check.py` compares
//! it with the libraries that the files belong to.
//!
//! `texts encode MODEL`: a line is a string. The answer holds its ids with and without the
//! tokens that the tokenizer adds, the text of the latter, and the same text as it would
//! come out token by token.
//! `texts ends MODEL`: no lines; the ids that end a text.
//! `texts render MODEL`: a line is an object, the variables of the chat template.
//!
//! MODEL is a directory or a GGUF file; neither needs any weights.

use std::io::{self, BufRead, BufWriter, Write};
use std::path::Path;

use farm::engine::TokenDecoder;
use farm::engine::detokenizer::Detokenizer;
use farm::model::checkpoint::gguf::{self, Metadata};
use farm::model::tokenizer::Tokenizer;
use farm::prompts::ChatTemplate;
use farm::{Error, Result};
use serde_json::{Map, Value, json};

const USAGE: &str = "texts encode|ends|render MODEL";

/// Noon of 2026-11-21, for templates that show the date.
const NOW_UNIX_SECONDS: u64 = 1_795_262_400;

struct Decoder<'a>(&'a Tokenizer);

impl TokenDecoder for Decoder<'_> {
    fn decode(&self, ids: &[u32]) -> String {
        self.0.decode(ids, true).unwrap_or_default()
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, model] = arguments.as_slice() else {
        return Err(Error::usage(USAGE));
    };
    let model = Path::new(model);
    let metadata = metadata(model)?;
    match what.as_str() {
        "encode" => {
            let tokenizer = Tokenizer::open(model, None, metadata.as_ref())?;
            answer(|line: String| encode(&tokenizer, &line))
        }
        "ends" => {
            let tokenizer = Tokenizer::open(model, None, metadata.as_ref())?;
            println!("{}", json!(tokenizer.eos_token_ids()));
            Ok(())
        }
        "render" => {
            let template = ChatTemplate::open(model, metadata.as_ref(), NOW_UNIX_SECONDS)?;
            let template = template.ok_or_else(|| Error::input("no chat template"))?;
            answer(|line: Map<String, Value>| {
                Ok(match template.render_with(line) {
                    Ok(text) => json!({"text": text}),
                    Err(problem) => json!({"error": problem.message}),
                })
            })
        }
        _ => Err(Error::usage(USAGE)),
    }
}

/// A GGUF file's key-value pairs; its tensors need not be there.
fn metadata(model: &Path) -> Result<Option<Metadata>> {
    if model.is_dir() {
        return Ok(None);
    }
    let bytes = std::fs::read(model).map_err(Error::input)?;
    Ok(Some(gguf::read(&bytes)?.metadata))
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Value> {
    let plain = tokenizer.encode(text, false)?;
    let mut streamed = String::new();
    let mut detokenizer = Detokenizer::default();
    for end in 1..=plain.len() {
        let new = detokenizer.next_text(&plain[..end], &Decoder(tokenizer));
        streamed.push_str(&new.unwrap_or_default());
    }
    Ok(json!({
        "ids": tokenizer.encode(text, true)?,
        "plain": plain,
        "text": tokenizer.decode(&plain, true)?,
        "spelled": tokenizer.decode(&plain, false)?,
        "streamed": streamed,
    }))
}

fn answer<T: serde::de::DeserializeOwned>(of: impl Fn(T) -> Result<Value>) -> Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for line in io::stdin().lock().lines() {
        let line = line.map_err(Error::input)?;
        let line = serde_json::from_str(&line).map_err(Error::input)?;
        writeln!(out, "{}", of(line)?).map_err(Error::input)?;
    }
    out.flush().map_err(Error::input)
}
