//! Where in a JSON text its end stands: what is open, and how far that is.

use super::numbers::Place;

/// A place in the structure of a JSON text.
#[derive(Debug, Clone, Default)]
pub(super) struct Position {
    place: Place,
    /// Objects and lists that are open, the innermost last.
    levels: Vec<Level>,
    /// Of the newest string, its bytes.
    text: u64,
}

/// An open object or list. Two that are equal are taken to need the same to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Level {
    opened_by: u8,
    commas: u32,
    /// The newest key of an object.
    key: u64,
}

/// What tells positions apart that may have different ways out. The content of a string
/// counts only once it is whole: before that it is the lexer's business.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Structure {
    levels: Vec<Level>,
    text: u64,
}

impl Position {
    /// The position after `bytes`, which the grammar allows; `None` where a number among
    /// them grows too long.
    pub(super) fn after(&self, bytes: &[u8]) -> Option<Self> {
        let mut position = self.clone();
        bytes.iter().try_for_each(|&byte| position.push(byte)).map(|()| position)
    }

    /// Whether `bytes` may follow as far as the lengths of numbers are concerned.
    pub(super) fn allows(&self, bytes: &[u8]) -> bool {
        self.place.after(bytes).is_some()
    }

    /// How many objects and lists are open.
    pub(super) fn depth(&self) -> usize {
        self.levels.len()
    }

    pub(super) fn structure(&self) -> Structure {
        let text = if self.in_text() { 0 } else { self.text };
        Structure { levels: self.levels.clone(), text }
    }

    /// Whether `byte` changes nothing here: it goes on with a string.
    pub(super) fn is_plain(&self, byte: u8) -> bool {
        self.place == Place::Text && !matches!(byte, b'"' | b'\\')
    }

    fn in_text(&self) -> bool {
        matches!(self.place, Place::Text | Place::Escape)
    }

    fn push(&mut self, byte: u8) -> Option<()> {
        let was_text = self.in_text();
        self.place = self.place.after(&[byte])?;
        if was_text {
            self.text = mixed(self.text, byte.into());
            return Some(());
        }
        match byte {
            b'"' => self.text = 0,
            b'{' | b'[' => self.levels.push(Level { opened_by: byte, commas: 0, key: 0 }),
            b'}' | b']' => drop(self.levels.pop()),
            _ => {
                let text = self.text;
                match (byte, self.levels.last_mut()) {
                    (b',', Some(level)) => level.commas += 1,
                    (b':', Some(level)) => level.key = text,
                    _ => {}
                }
            }
        }
        Some(())
    }
}

/// A hash of a sequence and what comes next in it.
fn mixed(hash: u64, next: u64) -> u64 {
    (hash ^ next.wrapping_add(0x9e37_79b9_7f4a_7c15))
        .wrapping_mul(0xff51_afd7_ed55_8ccd)
        .rotate_left(31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Position {
        Position::default().after(text.as_bytes()).expect("short numbers")
    }

    #[test]
    fn equal_structures_need_the_same_to_be_closed() {
        let same = |a: &str, b: &str| at(a).structure() == at(b).structure();
        assert!(same("[1, {}, ", "[[], 2, "));
        assert!(same(r#"{"a": "x"#, r#"{"a": "yy\""#));
        assert!(same("[true", "[12"));
        assert!(!same("[1, 2", "[1"));
        assert!(!same("[[", "[{"));
        assert!(!same(r#"{"a": 1"#, r#"{"b": 1"#));
        // Which of several kinds an object is.
        assert!(!same(r#"{"kind": "a""#, r#"{"kind": "b""#));
    }

    #[test]
    fn depth_counts_what_is_open() {
        for (text, depth) in [("", 0), ("[{", 2), (r#"{"}": [1]"#, 1), (r#"{"\"{": {}}"#, 0)] {
            assert_eq!(at(text).depth(), depth, "{text}");
        }
    }
}
