//! `CUDA_VISIBLE_DEVICES`: which devices the driver shows to a process.
//!
//! The driver has applied the variable before farm sees a device. It is read here for two
//! things only: to say why there is none, and to tell the slices of one card apart where the
//! driver gives them no identity of their own.

use std::fmt;

/// A word of the variable.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Word {
    /// The number of a card among all of the node's (or of the job's, where Slurm confines it).
    Index(u32),
    /// `GPU-…`, or enough digits of it.
    Gpu(String),
    /// A slice: `MIG-…`, or `MIG-GPU-…/instance/instance` as older drivers write it.
    Slice(String),
}

/// The variable's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// What the variable says; `None` where it is not set: all devices are visible.
    text: Option<String>,
    /// The words up to the first one that names nothing.
    words: Vec<Word>,
}

impl Listing {
    /// Reads the variable. As in CUDA a word that cannot name a device, such as -1, ends the
    /// list, and one that stands there twice empties it.
    pub fn parse(text: Option<&str>) -> Self {
        let words = text.map_or_else(Vec::new, words);
        Self { text: text.map(str::to_owned), words }
    }

    /// The name of the slice at place `ordinal`, where a slice is listed there.
    pub fn slice(&self, ordinal: usize) -> Option<&str> {
        match self.words.get(ordinal)? {
            Word::Slice(name) => Some(name),
            _ => None,
        }
    }

    /// Whether nothing is visible, whatever devices there are.
    pub fn is_empty(&self) -> bool {
        self.text.is_some() && self.words.is_empty()
    }
}

/// "CUDA_VISIBLE_DEVICES is …", for messages.
impl fmt::Display for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CUDA_VISIBLE_DEVICES is ")?;
        match self.text.as_deref() {
            None => write!(f, "not set"),
            Some("") => write!(f, "set and empty, which hides all"),
            Some(text) if self.words.is_empty() => write!(f, "'{text}', which hides all"),
            Some(text) => write!(f, "'{text}'"),
        }
    }
}

fn words(text: &str) -> Vec<Word> {
    let mut words = Vec::new();
    for text in text.split(',') {
        match word(text.trim()) {
            Some(word) if words.contains(&word) => return Vec::new(),
            Some(word) => words.push(word),
            None => break,
        }
    }
    words
}

fn word(text: &str) -> Option<Word> {
    if text.starts_with("MIG-") {
        return Some(Word::Slice(text.to_lowercase()));
    }
    if text.starts_with("GPU-") {
        return Some(Word::Gpu(text.to_lowercase()));
    }
    // As strtol reads it: "1st" is 1.
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok().map(Word::Index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLICE: &str = "MIG-41b35ee3-7ee1-5d0a-9d9a-6a3f0f3fa2b7";
    const OLD_SLICE: &str = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2";

    #[test]
    fn the_list_ends_where_cuda_ends_it() {
        for (text, count, empty) in [
            (None, 0, false),
            (Some(""), 0, true),
            (Some("-1"), 0, true),
            (Some("NoDevFiles"), 0, true),
            (Some("0"), 1, false),
            (Some("2,1"), 2, false),
            (Some("0, 1"), 2, false),
            (Some("0,2,-1,1"), 2, false),
            (Some("0,,1"), 1, false),
            (Some("0,1,0"), 0, true),
            (Some("1st,2nd"), 2, false),
            (Some("GPU-8932f937,0"), 2, false),
            (Some(SLICE), 1, false),
            (Some(OLD_SLICE), 1, false),
        ] {
            let listing = Listing::parse(text);
            assert_eq!((listing.words.len(), listing.is_empty()), (count, empty), "{text:?}");
        }
    }

    #[test]
    fn slices_have_names() {
        let listing = Listing::parse(Some(&format!("0,{SLICE},{OLD_SLICE}")));
        assert_eq!(listing.slice(0), None);
        assert_eq!(listing.slice(1), Some(SLICE.to_lowercase().as_str()));
        assert_eq!(listing.slice(2), Some(OLD_SLICE.to_lowercase().as_str()));
        assert_eq!(listing.slice(3), None);
    }

    #[test]
    fn it_says_what_is_hidden() {
        let say = |text| Listing::parse(text).to_string();
        assert_eq!(say(None), "CUDA_VISIBLE_DEVICES is not set");
        assert!(say(Some("")).ends_with("set and empty, which hides all"));
        assert!(say(Some("-1")).ends_with("'-1', which hides all"));
        assert!(say(Some("0,1")).ends_with("'0,1'"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// What stands before the first word that names nothing counts, nothing after it does.
        #[test]
        fn any_text_is_read(text in "[-0-9,GPUMIabx/ ]{0,40}") {
            let listing = Listing::parse(Some(&text));
            prop_assert!(listing.words.len() <= text.split(',').count());
            prop_assert_eq!(listing.is_empty(), listing.words.is_empty());
            prop_assert_eq!(Listing::parse(Some(&format!("{text},-1,0"))).words, listing.words);
        }
    }
}
