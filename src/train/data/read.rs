//! From a file to a [`Dataset`].

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rayon::prelude::*;

use super::record::{Refusal, parse};
use super::tokens::Encoder;
use super::{BadRecord, Dataset, Example, Formatting};
use crate::prompts::{PromptFormat, PromptReader, RawRecord, ReadOptions};
use crate::{Error, Result};

/// Records that are tokenized together, by all threads.
const CHUNK: usize = 4096;
/// A CSV header is not longer than this.
const HEADER_BYTES: u64 = 1 << 20;

impl Dataset {
    /// Reads and tokenizes a `.jsonl` (`.ndjson`, `.json`), `.csv` or `.txt` file; see
    /// [`super`] for what a record may hold. A record that cannot be used costs no other:
    /// [`Dataset::bad`] tells why. The examples keep the order of the file.
    ///
    /// # Errors
    /// Input: the file is missing, unreadable or empty, or no record in it can be used.
    /// Usage: `max_seq_len` is below 2. A fault where the file cannot be read on.
    pub fn read(path: &Path, formatting: &Formatting<'_>) -> Result<Self> {
        if formatting.max_seq_len < 2 {
            return Err(Error::usage("--max-seq-len must be at least 2 to train on"));
        }
        let column = prompt_column(path);
        let options = ReadOptions { prompt_column: column.clone(), ..ReadOptions::default() };
        let mut reader = PromptReader::open(path, &options).map_err(of_data)?;
        let encoder = Encoder::new(formatting)?;
        let example = |record: &RawRecord| {
            let lesson = parse(&record.body, &column, formatting.template.is_some())?;
            encoder.example(&lesson)
        };
        let mut dataset = Self::default();
        loop {
            let chunk = reader.by_ref().take(CHUNK).collect::<Result<Vec<_>>>().map_err(of_data)?;
            if chunk.is_empty() {
                break;
            }
            let examples: Vec<_> = chunk.par_iter().map(example).collect();
            for (record, example) in chunk.iter().zip(examples) {
                dataset.add(record.line, example);
            }
        }
        match dataset.is_empty() {
            true => Err(nothing_in(path, &dataset)),
            false => Ok(dataset),
        }
    }

    fn add(&mut self, line: u64, example: Result<(Example, bool), Refusal>) {
        match example {
            Ok((example, is_cut)) => {
                self.extend([example]);
                self.truncated += usize::from(is_cut);
            }
            Err(Refusal { code, message }) => {
                self.bad.push(BadRecord { line, code: code.to_owned(), message });
            }
        }
    }
}

/// The column that the reader is to call `prompt`: it must have one. Any other than these two
/// would do as well, and gets its name back.
fn prompt_column(path: &Path) -> String {
    let default = || "prompt".to_owned();
    let extension = path.extension().and_then(|extension| extension.to_str());
    if extension.and_then(PromptFormat::from_extension) != Some(PromptFormat::Csv) {
        return default();
    }
    let Ok(file) = File::open(path) else { return default() };
    let mut header = csv::ReaderBuilder::new().from_reader(file.take(HEADER_BYTES));
    let Ok(header) = header.headers() else { return default() };
    let named = |name: &str| header.iter().find(|column| column.trim() == name);
    let column = named("prompt").or(named("messages")).or(header.get(0));
    column.map_or_else(default, |column| column.trim().to_owned())
}

/// The reader's message, for another kind of file than it was written for.
fn of_data(mut error: Error) -> Error {
    let reason = error.message.strip_prefix("prompts file ").unwrap_or(&error.message);
    error.message = format!("training data {reason}");
    error
}

fn nothing_in(path: &Path, dataset: &Dataset) -> Error {
    let path = path.display();
    Error::input(match dataset.bad.first() {
        None => format!("training data {path}: there are no records in it"),
        Some(first) => format!(
            "training data {path}: none of its {} records can be used; the first, on line {}: {}",
            dataset.bad.len(),
            first.line,
            first.message
        ),
    })
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
