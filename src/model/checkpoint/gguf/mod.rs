//! GGUF: llama.cpp's file format (ggml's docs/gguf.md), versions 2 and 3, little-endian.
//!
//! [`read`] turns the bytes of a mapped file into tables; [`split_paths`] and [`merge`] do
//! with models that lie in several files; [`config`] turns the metadata into the form of
//! HF's `config.json`. Tensors stay where they are. The vocabulary is read by the
//! tokenizer. [`GgufHeader`] is what a file begins with when it is written.

pub mod config;
pub mod metadata;
mod read;
mod split;
#[cfg(test)]
pub(crate) mod testing;
mod write;

pub use config::{hf_config, interleaved_rope};
pub use metadata::{Metadata, Value};
pub use read::{Layout, RawPair, RawTensor, layout, read};
pub use split::{Merged, merge, split_paths};
pub use write::{GgufHeader, type_id};

use super::StoredTensor;

/// What the header of one file holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufFile {
    /// The key-value pairs.
    pub metadata: Metadata,
    /// The tensors, in the order of the file.
    pub tensors: Vec<StoredTensor>,
}

/// The file holds an adapter (LoRA) and not a model.
pub fn is_adapter(metadata: &Metadata) -> bool {
    metadata.str("general.type") == Some("adapter")
}

/// `text` from a file as error messages show it: quoted, escaped, and not too long.
fn shown(text: &str) -> String {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metadata_tell_adapters() {
        let mut metadata = Metadata::default();
        assert!(!is_adapter(&metadata));
        let adapter = Value::String("adapter".to_owned());
        metadata.0.insert("general.type".to_owned(), adapter);
        assert!(is_adapter(&metadata));
    }

    #[test]
    fn shown_text_is_short_and_has_no_control_characters() {
        assert_eq!(shown("a\nb"), r#""a\nb""#);
        assert!(shown(&"ä".repeat(10_000)).len() < 200);
    }
}
