//! CSV rows as JSON objects.
//!
//! The `csv` crate reads the fields; this finds where a row ends first, for two
//! reasons: a quote that is never closed must not pull the rest of the file into
//! memory, and it must spoil one row, not all rows after it.

use std::collections::VecDeque;
use std::io::{self, BufRead};

use serde_json::{Map, Value};

use super::lines::{Line, Lines, without_terminator};
use super::{ErrorCode, Problem};
use super::{adapter, guide, overrides};
use crate::{Error, Result};

/// A row, or what is wrong with it, and the line where it starts.
type Row = (u64, Result<Vec<u8>, Problem>);

/// Reads rows; the first one names the columns.
pub(crate) struct CsvRows<R> {
    lines: Lines<R>,
    max_bytes: usize,
    /// Lines that were read in search of a closing quote, to be read again.
    replay: VecDeque<(u64, Line)>,
    columns: Vec<String>,
    prompt_column: usize,
    blank_lines: u64,
}

impl<R: BufRead> CsvRows<R> {
    /// Reads the header. `name` is the file's, for messages.
    ///
    /// Errors (input): there is no header, no `prompt_column`, a column twice, or one
    /// whose name would collide with the prompt's field.
    pub(crate) fn open(
        lines: Lines<R>,
        max_bytes: usize,
        prompt_column: &str,
        name: &str,
    ) -> Result<Self> {
        let mut rows = Self {
            lines,
            max_bytes,
            replay: VecDeque::new(),
            columns: Vec::new(),
            prompt_column: 0,
            blank_lines: 0,
        };
        let header = rows.next_row().map_err(|e| Error::input(format!("{name}: {e}")))?;
        let Some((line, header)) = header else {
            return Err(Error::input(format!("{name}: the file is empty, not even a header")));
        };
        let header = header.and_then(|bytes| fields(&bytes));
        let header = header.map_err(|problem| {
            Error::input(format!("{name}:{line}: CSV header: {}", problem.message))
        })?;
        rows.columns = header.iter().map(|column| column.trim().to_string()).collect();
        rows.prompt_column = check_columns(&rows.columns, prompt_column, name)?;
        Ok(rows)
    }

    pub(crate) fn bytes_read(&self) -> u64 {
        self.lines.bytes_read()
    }

    pub(crate) fn blank_lines(&self) -> u64 {
        self.blank_lines
    }

    /// The next row as the text of a JSON object, and its line; `None` at the end.
    pub(crate) fn next_object(&mut self) -> io::Result<Option<Row>> {
        let row = self.next_row()?;
        Ok(row.map(|(line, row)| (line, row.and_then(|bytes| self.object(&bytes)))))
    }

    fn next_physical(&mut self) -> io::Result<Option<(u64, Line)>> {
        match self.replay.pop_front() {
            Some(line) => Ok(Some(line)),
            None => self.lines.next_line(),
        }
    }

    /// The bytes of the next row: one line, or several where a quoted field spans them.
    fn next_row(&mut self) -> io::Result<Option<Row>> {
        let (start, mut row) = loop {
            match self.next_physical()? {
                None => return Ok(None),
                Some((line, Line::TooLong)) => {
                    return Ok(Some((line, Err(too_long(self.max_bytes)))));
                }
                Some((_, Line::Whole(bytes))) if bytes.trim_ascii().is_empty() => {
                    self.blank_lines += 1;
                }
                Some((line, Line::Whole(bytes))) => break (line, bytes),
            }
        };
        let mut scan = QuoteScan::default();
        scan.feed(&row);
        let mut ahead = Vec::new();
        let mut row_bytes = row.len();
        while scan.in_quotes() {
            let next = self.next_physical()?;
            if let Some((_, Line::Whole(bytes))) = &next {
                scan.feed(bytes);
                row_bytes += bytes.len();
            }
            let ended = !matches!(next, Some((_, Line::Whole(_)))) || row_bytes > self.max_bytes;
            ahead.extend(next);
            if ended {
                ahead.into_iter().rev().for_each(|line| self.replay.push_front(line));
                let message = "a quoted field is opened here and not closed before the end of the file or the limit on a record";
                return Ok(Some((start, Err(Problem::new(ErrorCode::BadCsv, message)))));
            }
        }
        for (_, line) in ahead {
            if let Line::Whole(bytes) = line {
                row.extend_from_slice(&bytes);
            }
        }
        Ok(Some((start, Ok(row))))
    }

    /// The row's cells by their columns' names, the prompt's as `prompt`. Cells of
    /// columns named like sampling overrides become numbers or booleans where they
    /// read as such, and are left out where empty.
    fn object(&self, row: &[u8]) -> Result<Vec<u8>, Problem> {
        let cells = fields(row)?;
        if cells.len() != self.columns.len() {
            let message = format!(
                "the row has {} fields, the header has {}",
                cells.len(),
                self.columns.len()
            );
            return Err(Problem::new(ErrorCode::BadCsv, message));
        }
        let mut object = Map::new();
        for (i, (column, cell)) in self.columns.iter().zip(cells).enumerate() {
            if i == self.prompt_column {
                object.insert("prompt".to_string(), Value::String(cell));
            } else if ["id", adapter::FIELD].contains(&column.as_str())
                || overrides::is_override(column)
            {
                if !cell.trim().is_empty() {
                    object.insert(column.clone(), typed(column, cell));
                }
            } else {
                object.insert(column.clone(), Value::String(cell));
            }
        }
        Ok(Value::Object(object).to_string().into_bytes())
    }
}

/// A cell of an override column as JSON; text if it is neither number nor boolean,
/// which the record's check then refuses where a number is due.
fn typed(column: &str, cell: String) -> Value {
    if matches!(column, "id" | "stop" | "regex" | adapter::FIELD) {
        return Value::String(cell);
    }
    if guide::FIELDS.contains(&column) {
        // Schemas and lists stand in a cell as JSON.
        return serde_json::from_str(&cell).unwrap_or(Value::String(cell));
    }
    match serde_json::from_str(&cell.trim().to_ascii_lowercase()) {
        Ok(value @ (Value::Number(_) | Value::Bool(_))) => value,
        _ => Value::String(cell),
    }
}

/// Index of the prompt column, once the names make sense.
fn check_columns(columns: &[String], prompt_column: &str, name: &str) -> Result<usize> {
    if let Some((i, twice)) =
        columns.iter().enumerate().find(|(i, column)| columns[..*i].contains(column))
    {
        return Err(Error::input(format!(
            "{name}: the CSV header has column {twice:?} twice (again as number {}); rename one",
            i + 1
        )));
    }
    let Some(index) = columns.iter().position(|column| column == prompt_column) else {
        return Err(Error::input(format!(
            "{name}: the CSV header has no column {prompt_column:?}; choose one with --prompt-column: {}",
            columns.join(", ")
        )));
    };
    let reserved = |column: &&String| {
        matches!(column.as_str(), "prompt" | "messages" | "prompt_token_ids")
            && *column != prompt_column
    };
    match columns.iter().find(reserved) {
        Some(column) => Err(Error::input(format!(
            "{name}: the prompt is in column {prompt_column:?}, so a column {column:?} would be taken for another prompt; rename it"
        ))),
        None => Ok(index),
    }
}

/// The fields of one row (RFC 4180; the `csv` crate's reading of it).
fn fields(row: &[u8]) -> Result<Vec<String>, Problem> {
    let bad = |message: String| Problem::new(ErrorCode::BadCsv, message);
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .buffer_capacity(row.len().clamp(64, 1 << 16))
        .from_reader(row);
    let mut records = reader.byte_records();
    let record = match records.next() {
        Some(Ok(record)) => record,
        Some(Err(error)) => return Err(bad(error.to_string())),
        None => return Err(bad("the row is empty".to_string())),
    };
    if records.next().is_some() {
        return Err(bad("a line break (a lone carriage return) outside of quotes".to_string()));
    }
    record
        .iter()
        .enumerate()
        .map(|(i, field)| {
            String::from_utf8(field.to_vec()).map_err(|_| {
                Problem::new(ErrorCode::NotUtf8, format!("field {} is not valid UTF-8", i + 1))
            })
        })
        .collect()
}

pub(crate) fn too_long(max_bytes: usize) -> Problem {
    Problem::new(ErrorCode::LineTooLong, format!("the line is longer than {max_bytes} bytes"))
}

/// Whether a row goes on after a line: the quoting state of RFC 4180.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum QuoteScan {
    #[default]
    FieldStart,
    Unquoted,
    Quoted,
    /// After a quote inside quotes: the end of the field, or half of an escaped one.
    QuoteInQuoted,
}

impl QuoteScan {
    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            *self = match (*self, byte) {
                (Self::FieldStart, b'"') | (Self::QuoteInQuoted, b'"') => Self::Quoted,
                (Self::Quoted, b'"') => Self::QuoteInQuoted,
                (Self::Quoted, _) => Self::Quoted,
                (_, b',' | b'\n') => Self::FieldStart,
                _ => Self::Unquoted,
            };
        }
    }

    fn in_quotes(self) -> bool {
        self == Self::Quoted
    }
}

/// Whether a line holds nothing but white space.
pub(crate) fn is_blank(line: &[u8]) -> bool {
    without_terminator(line).trim_ascii().is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, max_bytes: usize, column: &str) -> Result<Vec<(u64, String)>> {
        let lines = Lines::new(text.as_bytes(), max_bytes);
        let mut rows = CsvRows::open(lines, max_bytes, column, "p.csv")?;
        let mut found = Vec::new();
        while let Some((line, row)) = rows.next_object().unwrap() {
            found.push((
                line,
                match row {
                    Ok(bytes) => String::from_utf8(bytes).unwrap(),
                    Err(problem) => problem.code.as_str().to_string(),
                },
            ));
        }
        Ok(found)
    }

    #[test]
    fn quoted_fields_span_lines_and_other_columns_become_fields() {
        let text = "id,question,topic,temperature,ignore_eos\r\n\
                    7,\"two\nlines, \"\"quoted\"\"\",a b,0.5,True\r\n\r\n\
                    8,plain 5\" pipe,,,\r\n";
        let found = rows(text, 1000, "question").unwrap();
        let expected = [
            (
                2,
                r#"{"id":"7","prompt":"two\nlines, \"quoted\"","topic":"a b","temperature":0.5,"ignore_eos":true}"#.to_string(),
            ),
            (5, r#"{"id":"8","prompt":"plain 5\" pipe","topic":""}"#.to_string()),
        ];
        assert_eq!(found, expected);
    }

    /// One unclosed quote must cost one row, whether the file or the limit ends it.
    #[test]
    fn an_unclosed_quote_spoils_only_its_own_row() {
        let text = "prompt\n\"open\ngood\nfine\n";
        for max_bytes in [12, 1000] {
            let found = rows(text, max_bytes, "prompt").unwrap();
            let expected = [
                (2, "bad_csv".to_string()),
                (3, r#"{"prompt":"good"}"#.to_string()),
                (4, r#"{"prompt":"fine"}"#.to_string()),
            ];
            assert_eq!(found, expected, "limit {max_bytes}");
        }
    }

    #[test]
    fn a_row_with_a_wrong_number_of_fields_is_bad() {
        let found = rows("prompt,x\na\nb,1,2\nc,3\n", 1000, "prompt").unwrap();
        let codes: Vec<_> = found.iter().map(|(_, row)| row.as_str()).collect();
        assert_eq!(codes, ["bad_csv", "bad_csv", r#"{"prompt":"c","x":"3"}"#]);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(128))]

        /// Reading ends, names each line once and in order, and keeps its limit.
        #[test]
        fn any_text_gives_rows_in_order(text in "[a\",\n\r ]{0,60}", max_bytes in 6usize..40) {
            let found = rows(&format!("p,x\n{text}"), max_bytes, "p").unwrap();
            proptest::prop_assert!(found.windows(2).all(|pair| pair[0].0 < pair[1].0));
            proptest::prop_assert!(found.iter().all(|(line, _)| *line > 1));
        }
    }

    #[test]
    fn a_header_without_the_prompt_column_names_the_columns_there_are() {
        let error = rows("question,answer\n1,2\n", 1000, "prompt").unwrap_err();
        assert_eq!(error.kind, crate::ErrorKind::Input);
        assert!(error.message.contains("--prompt-column: question, answer"), "{error}");
        for text in ["", "prompt,x,x\n", "q,prompt\n", "q,\"open\n"] {
            assert!(rows(text, 1000, "q").is_err(), "{text:?}");
        }
    }
}
