//! Lines of bounded length, counted.

use std::io::{self, BufRead, Read};

/// What [`Lines::next_line`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line with its terminator, if it has one.
    Whole(Vec<u8>),
    /// A line longer than the limit; its content was skipped.
    TooLong,
}

/// Reads lines of at most `max_bytes`, so that a file without line breaks costs no
/// more memory than that. A UTF-8 byte order mark at the start is dropped.
pub(crate) struct Lines<R> {
    inner: R,
    max_bytes: usize,
    line: u64,
    bytes_read: u64,
}

impl<R: BufRead> Lines<R> {
    pub(crate) fn new(inner: R, max_bytes: usize) -> Self {
        Self { inner, max_bytes, line: 0, bytes_read: 0 }
    }

    /// Bytes consumed so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// The next line and its number from 1; `None` at the end.
    pub(crate) fn next_line(&mut self) -> io::Result<Option<(u64, Line)>> {
        let mut bytes = Vec::new();
        // Room for a byte order mark, the terminator, and a byte that tells of more.
        let limit = (self.max_bytes as u64).saturating_add(6);
        let count = (&mut self.inner).take(limit).read_until(b'\n', &mut bytes)? as u64;
        if count == 0 {
            return Ok(None);
        }
        self.bytes_read += count;
        if count == limit && bytes.last() != Some(&b'\n') {
            self.bytes_read += self.inner.skip_until(b'\n')? as u64;
        }
        self.line += 1;
        if self.line == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
            bytes.drain(..3);
        }
        let line = match without_terminator(&bytes).len() > self.max_bytes {
            true => Line::TooLong,
            false => Line::Whole(bytes),
        };
        Ok(Some((self.line, line)))
    }
}

/// `line` without its `\n` or `\r\n`.
pub(crate) fn without_terminator(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8], max_bytes: usize) -> Vec<(u64, Line)> {
        // A buffer smaller than the lines: refills must not split them.
        let mut lines = Lines::new(io::BufReader::with_capacity(3, text), max_bytes);
        let mut found = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            found.push(line);
        }
        assert_eq!(lines.bytes_read(), text.len() as u64);
        found
    }

    #[test]
    fn byte_order_mark_and_carriage_returns_are_no_content() {
        assert_eq!(
            lines(b"\xef\xbb\xbfab\r\n\r\ncd", 10),
            [
                (1, Line::Whole(b"ab\r\n".to_vec())),
                (2, Line::Whole(b"\r\n".to_vec())),
                (3, Line::Whole(b"cd".to_vec())),
            ]
        );
        assert_eq!(without_terminator(b"ab\r\n"), b"ab");
        assert_eq!(without_terminator(b"ab\r"), b"ab");
    }

    /// A file without line breaks must not fill the memory, and the lines after an
    /// absurd one must keep their numbers.
    #[test]
    fn lines_over_the_limit_are_skipped_and_counted() {
        for excess in 1..9 {
            let text =
                [&b"\xef\xbb\xbfabcd\r\n"[..], &vec![b'x'; 4 + excess], b"\nabcd\n"].concat();
            assert_eq!(
                lines(&text, 4),
                [
                    (1, Line::Whole(b"abcd\r\n".to_vec())),
                    (2, Line::TooLong),
                    (3, Line::Whole(b"abcd\n".to_vec())),
                ],
                "excess {excess}"
            );
        }
    }
}
