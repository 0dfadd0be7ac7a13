//! Reads the prompts file, one record at a time.
//!
//! | name                         | a record is                                        |
//! |------------------------------|----------------------------------------------------|
//! | `.txt`                       | a line of text                                     |
//! | `.jsonl`, `.ndjson`, `.json` | a line with a JSON object                          |
//! | `.csv`                       | a row; the header names the columns                |
//! | no extension                 | JSON lines if the first character is `{`, else text |
//!
//! Blank lines are skipped and counted; CRLF and a UTF-8 byte order mark are fine.
//! Memory does not grow with the file, only (up to a limit) with its longest line.
//! Left out: compressed files and other encodings, which are refused by name.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use super::csv_rows::{CsvRows, is_blank, too_long};
use super::identity::InputIdentity;
use super::lines::{Line, Lines, without_terminator};
use super::{RawBody, RawRecord};
use crate::{Error, Result};

/// How a prompts file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptFormat {
    /// One prompt a line.
    Text,
    /// One JSON object a line.
    JsonLines,
    /// Rows under a header.
    Csv,
}

impl PromptFormat {
    /// The format that a name (`txt`, `jsonl`, `ndjson`, `json`, `csv`, any case) means.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "txt" | "text" => Some(Self::Text),
            "jsonl" | "ndjson" | "json" => Some(Self::JsonLines),
            "csv" => Some(Self::Csv),
            _ => None,
        }
    }

    /// The format of a file without an extension (a spooled stream) from its start.
    fn sniff(start: &[u8]) -> Self {
        let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
        match start.trim_ascii_start().first() {
            Some(b'{') => Self::JsonLines,
            _ => Self::Text,
        }
    }
}

/// How to read a prompts file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOptions {
    /// `None`: as the file's extension says.
    pub format: Option<PromptFormat>,
    /// The CSV column that holds the prompt.
    pub prompt_column: String,
    /// A longer line (CSV: row) becomes a bad record.
    pub max_record_bytes: usize,
    /// The name for messages and error records, where it is not the path (`-`).
    pub name: Option<String>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            format: None,
            prompt_column: "prompt".to_string(),
            max_record_bytes: 64 << 20,
            name: None,
        }
    }
}

/// Iterates over the records of a prompts file, in order. An item is an error
/// (fault) only where the file cannot be read on; a bad record is a [`RawBody::Bad`].
pub struct PromptReader {
    source: Source,
    format: PromptFormat,
    options: ReadOptions,
    name: String,
    size_bytes: u64,
    next_index: u64,
    blank_lines: u64,
    failed: bool,
}

enum Source {
    Lines(Lines<BufReader<File>>),
    Csv(Box<CsvRows<BufReader<File>>>),
}

impl PromptReader {
    /// Opens a prompts file.
    ///
    /// Errors (input): missing, unreadable, not a regular file, of unknown extension,
    /// compressed, in UTF-16, one JSON array instead of lines, or a CSV file without
    /// the prompt column.
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self> {
        let name = options.name.clone().unwrap_or_else(|| path.display().to_string());
        let unusable = |reason: String| Error::input(format!("prompts file {name}: {reason}"));
        // Asked before it is opened: opening a pipe waits for its writer.
        let metadata = std::fs::metadata(path).map_err(|error| unusable(error.to_string()))?;
        if metadata.is_dir() {
            return Err(unusable("is a directory; name a file in it".to_string()));
        }
        if !metadata.is_file() {
            return Err(unusable(
                "is not a regular file; pipe it into farm with --prompts-file -".to_string(),
            ));
        }
        let file = File::open(path).map_err(|error| unusable(error.to_string()))?;
        let mut file = BufReader::with_capacity(1 << 18, file);
        let start = file.fill_buf().map_err(|error| unusable(error.to_string()))?;
        let format = match (options.format, path.extension().and_then(|e| e.to_str())) {
            (Some(format), _) => format,
            (None, None) => PromptFormat::sniff(start),
            (None, Some(extension)) => PromptFormat::from_extension(extension).ok_or_else(|| {
                unusable(format!(
                    "unknown extension .{extension}; farm reads .txt, .jsonl (.ndjson, .json) and .csv"
                ))
            })?,
        };
        refuse_unreadable_start(start, format).map_err(unusable)?;
        let lines = Lines::new(file, options.max_record_bytes);
        let source = match format {
            PromptFormat::Csv => Source::Csv(Box::new(CsvRows::open(
                lines,
                options.max_record_bytes,
                &options.prompt_column,
                &name,
            )?)),
            PromptFormat::Text | PromptFormat::JsonLines => Source::Lines(lines),
        };
        let size_bytes = metadata.len();
        let options = options.clone();
        Ok(Self {
            source,
            format,
            options,
            name,
            size_bytes,
            next_index: 0,
            blank_lines: 0,
            failed: false,
        })
    }

    /// Opens the file and looks for a first record, so that an unusable input is told
    /// before any work; also errors (input) where there is no record at all.
    pub fn check(path: &Path, options: &ReadOptions) -> Result<()> {
        let mut reader = Self::open(path, options)?;
        match reader.next() {
            Some(record) => record.map(drop),
            None => Err(Error::input(format!(
                "prompts file {}: there are no records in it",
                reader.name
            ))),
        }
    }

    /// What tells this file from another; see [`InputIdentity`].
    pub fn identity(path: &Path) -> Result<InputIdentity> {
        InputIdentity::of_file(path)
    }

    /// The file's name, as messages and error records show it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The format that was chosen.
    pub fn format(&self) -> PromptFormat {
        self.format
    }

    /// Blank lines skipped so far.
    pub fn blank_lines(&self) -> u64 {
        match &self.source {
            Source::Lines(_) => self.blank_lines,
            Source::Csv(rows) => rows.blank_lines(),
        }
    }

    /// Bytes read so far, of [`Self::size_bytes`]: a progress bar's measure.
    pub fn bytes_read(&self) -> u64 {
        match &self.source {
            Source::Lines(lines) => lines.bytes_read(),
            Source::Csv(rows) => rows.bytes_read(),
        }
    }

    /// Size of the file when it was opened.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn next_body(&mut self) -> io::Result<Option<(u64, RawBody)>> {
        let bad =
            |problem: super::Problem| RawBody::Bad { code: problem.code, message: problem.message };
        let lines = match &mut self.source {
            Source::Csv(rows) => {
                let row = rows.next_object()?;
                return Ok(row.map(|(line, row)| (line, row.map_or_else(bad, RawBody::Json))));
            }
            Source::Lines(lines) => lines,
        };
        loop {
            let (number, bytes) = match lines.next_line()? {
                None => return Ok(None),
                Some((number, Line::TooLong)) => {
                    return Ok(Some((number, bad(too_long(self.options.max_record_bytes)))));
                }
                Some((number, Line::Whole(bytes))) => (number, bytes),
            };
            if is_blank(&bytes) {
                self.blank_lines += 1;
                continue;
            }
            let content = without_terminator(&bytes).to_vec();
            let body = match self.format {
                PromptFormat::Text => RawBody::Text(content),
                _ => RawBody::Json(content),
            };
            return Ok(Some((number, body)));
        }
    }
}

impl Iterator for PromptReader {
    type Item = Result<RawRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        match self.next_body() {
            Ok(None) => None,
            Ok(Some((line, body))) => {
                let index = self.next_index;
                self.next_index += 1;
                Some(Ok(RawRecord { index, line, body }))
            }
            Err(error) => {
                // What follows has lost its place: one error, then the end.
                self.failed = true;
                Some(Err(Error::fault(format!(
                    "prompts file {}: cannot be read on after {} bytes: {error}",
                    self.name,
                    self.bytes_read()
                ))))
            }
        }
    }
}

/// Files whose every line would become an error record, with what to do instead.
fn refuse_unreadable_start(start: &[u8], format: PromptFormat) -> Result<(), String> {
    let reason = match start {
        [0x1f, 0x8b, ..] => {
            "is compressed by gzip; unpack it, or pipe: zcat FILE | farm --prompts-file -"
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "is compressed by zstd; unpack it first",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
        [b'P', b'A', b'R', b'1', ..] => "is a Parquet file; convert it to .jsonl",
        _ if format == PromptFormat::JsonLines && starts_with_array_of_objects(start) => {
            "is one JSON array, not one JSON object a line; convert it: jq -c '.[]'"
        }
        _ => return Ok(()),
    };
    Err(reason.to_string())
}

/// `[` and then, maybe on the next line, `{`: a pretty-printed or plain JSON array.
/// A first line that is some other array is one bad record among good ones.
fn starts_with_array_of_objects(start: &[u8]) -> bool {
    let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
    let rest = start.trim_ascii_start().strip_prefix(b"[");
    rest.is_some_and(|rest| rest.trim_ascii_start().starts_with(b"{"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn write(name: &str, content: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        (dir, path)
    }

    fn read(name: &str, content: &[u8]) -> (Vec<RawRecord>, u64) {
        let (_dir, path) = write(name, content);
        let options = ReadOptions { max_record_bytes: 40, ..ReadOptions::default() };
        let mut reader = PromptReader::open(&path, &options).unwrap();
        let records = reader.by_ref().collect::<Result<Vec<_>>>().unwrap();
        assert_eq!(reader.bytes_read(), reader.size_bytes());
        (records, reader.blank_lines())
    }

    fn text(index: u64, line: u64, content: &[u8]) -> RawRecord {
        RawRecord { index, line, body: RawBody::Text(content.to_vec()) }
    }

    #[test]
    fn text_lines_keep_their_spaces_and_blank_ones_are_counted() {
        let (records, blank) = read("p.txt", b"\xef\xbb\xbf one \r\n\n \t\r\n\xff\ntwo");
        assert_eq!(records, [text(0, 1, b" one "), text(1, 4, b"\xff"), text(2, 5, b"two")]);
        assert_eq!(blank, 2);
    }

    #[test]
    fn a_too_long_line_is_one_bad_record() {
        let content = [&b"{}\n"[..], &[b'x'; 500], b"\n{}"].concat();
        let (records, _) = read("p.jsonl", &content);
        assert_eq!(records.len(), 3);
        assert!(
            matches!(&records[1].body, RawBody::Bad { code, .. } if code.as_str() == "line_too_long")
        );
        assert_eq!((records[2].index, records[2].line), (2, 3));
    }

    #[test]
    fn csv_rows_are_records_at_the_line_where_they_start() {
        let (records, blank) = read("p.CSV", b"prompt\n\"a\nb\"\n\nc\n");
        let lines: Vec<_> = records.iter().map(|r| (r.index, r.line)).collect();
        assert_eq!((lines, blank), (vec![(0, 2), (1, 5)], 1));
        assert_eq!(records[0].body, RawBody::Json(br#"{"prompt":"a\nb"}"#.to_vec()));
    }

    #[test]
    fn a_stream_without_extension_is_told_by_its_first_character() {
        assert!(matches!(read("stdin", b" {\"prompt\":1}\n").0[0].body, RawBody::Json(_)));
        assert!(matches!(read("stdin", b"hello {\n").0[0].body, RawBody::Text(_)));
    }

    /// An unusable file must be an input error (exit code 3) before any work.
    #[test]
    fn unusable_files_are_input_errors_that_name_the_file() {
        let cases: &[(&str, &[u8], &str)] = &[
            ("empty.jsonl", b"", "no records"),
            ("blank.txt", b"\n \n", "no records"),
            ("header.csv", b"prompt\n", "no records"),
            ("p.dat", b"x", "unknown extension .dat"),
            ("p.jsonl", b"\x1f\x8b\x08", "gzip"),
            ("p.txt", b"\xff\xfeh\0", "UTF-16"),
            ("p.json", b"[\n  {\"prompt\": \"x\"}\n]\n", "jq"),
            ("p.csv", b"text\nx\n", "--prompt-column"),
        ];
        for (name, content, expected) in cases {
            let (_dir, path) = write(name, content);
            let error = PromptReader::check(&path, &ReadOptions::default()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Input, "{name}");
            assert!(error.message.contains(expected) && error.message.contains(name), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_path_buf(), dir.path().join("missing.txt")] {
            let error = PromptReader::check(&path, &ReadOptions::default()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Input);
        }
        let (_dir, path) = write("p.jsonl", b"[1]\n{}\n");
        PromptReader::check(&path, &ReadOptions::default()).unwrap();
    }
}
