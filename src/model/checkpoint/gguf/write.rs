//! What a GGUF file begins with: metadata and the table of tensors. The tensors follow in
//! the order of the table, each filled up to the alignment.

use std::io::{self, Write};

use crate::model::checkpoint::StoredDtype;

const VERSION: u32 = 3;
const DEFAULT_ALIGNMENT: u64 = 32;
// The format's types of values that are written here.
const FLOAT32: u32 = 6;
const STRING: u32 = 8;

/// The header of a file, as it grows.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHeader {
    alignment: u64,
    n_pairs: u64,
    pairs: Vec<u8>,
    n_tensors: u64,
    table: Vec<u8>,
    /// Bytes of the tensors so far, filled up.
    data_bytes: u64,
}

impl Default for GgufHeader {
    fn default() -> Self {
        Self::new(DEFAULT_ALIGNMENT)
    }
}

impl GgufHeader {
    /// Without pairs and tensors. Where `alignment` is not the format's 32 a pair
    /// `general.alignment` has to say so.
    pub fn new(alignment: u64) -> Self {
        let (pairs, table) = (Vec::new(), Vec::new());
        Self { alignment, n_pairs: 0, pairs, n_tensors: 0, table, data_bytes: 0 }
    }

    /// Adds a pair as another file has it (see [`super::RawPair`]).
    pub fn raw(&mut self, pair: &[u8]) {
        self.pairs.extend(pair);
        self.n_pairs += 1;
    }

    /// Adds a text.
    pub fn str(&mut self, key: &str, text: &str) {
        let value = string_bytes(text);
        self.raw(&[&string_bytes(key)[..], &STRING.to_le_bytes(), &value].concat());
    }

    /// Adds a number.
    pub fn float(&mut self, key: &str, x: f32) {
        self.raw(&[&string_bytes(key)[..], &FLOAT32.to_le_bytes(), &x.to_le_bytes()].concat());
    }

    /// Adds a tensor of ggml's type `kind` that takes `bytes` bytes; `shape` has the outermost
    /// dimension first.
    pub fn tensor(&mut self, name: &str, kind: u32, shape: &[usize], bytes: u64) {
        self.table.extend(string_bytes(name));
        self.table.extend((shape.len() as u32).to_le_bytes());
        self.table.extend(shape.iter().rev().flat_map(|n| (*n as u64).to_le_bytes()));
        self.table.extend(kind.to_le_bytes());
        self.table.extend(self.data_bytes.to_le_bytes());
        self.data_bytes += bytes.next_multiple_of(self.alignment);
        self.n_tensors += 1;
    }

    /// Writes the header, up to the first tensor.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let [n_tensors, n_pairs] = [self.n_tensors, self.n_pairs].map(u64::to_le_bytes);
        let start = [&b"GGUF"[..], &VERSION.to_le_bytes(), &n_tensors, &n_pairs].concat();
        for part in [&start, &self.pairs, &self.table] {
            out.write_all(part)?;
        }
        self.fill_up((start.len() + self.pairs.len() + self.table.len()) as u64, out)
    }

    /// Writes what follows a tensor of `bytes` bytes.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn fill_up(&self, bytes: u64, out: &mut impl Write) -> io::Result<()> {
        let missing = bytes.next_multiple_of(self.alignment) - bytes;
        out.write_all(&vec![0; missing as usize])
    }
}

/// ggml's number of a type; none for what farm knows by name alone.
pub fn type_id(dtype: &StoredDtype) -> Option<u32> {
    match dtype {
        StoredDtype::F32 => Some(0),
        StoredDtype::F16 => Some(1),
        StoredDtype::Bf16 => Some(30),
        StoredDtype::Quant(quant) => Some(quant.ggml_id()),
        StoredDtype::Other(_) => None,
    }
}

fn string_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::super::testing::GgufBuilder;
    use super::super::{layout, read};
    use super::*;

    /// A header that copies another file's pairs and tensors makes the same file.
    #[test]
    fn a_copy_is_the_same_byte_for_byte() {
        let file = GgufBuilder::new("llama")
            .strings("tokenizer.ggml.tokens", &["a", "ä"])
            .float("x", 0.5)
            .raw("big", 10, u64::MAX.to_le_bytes().to_vec())
            .f32s("one", &[3], &[1.0, 2.0, 3.0])
            .tensor("codes", 24, &[2, 5], vec![7; 10]);
        for alignment in [32, 64] {
            let bytes = GgufBuilder { alignment, ..file.clone() }.build();
            let from = layout(&bytes).unwrap();
            let mut header = GgufHeader::new(from.alignment);
            from.pairs.iter().for_each(|pair| header.raw(pair.bytes));
            for t in &from.tensors {
                header.tensor(t.name, t.kind, &t.shape, t.bytes.len() as u64);
            }
            let mut copy = Vec::new();
            header.write(&mut copy).unwrap();
            for tensor in &from.tensors {
                copy.extend(tensor.bytes);
                header.fill_up(tensor.bytes.len() as u64, &mut copy).unwrap();
            }
            assert_eq!(copy, bytes);
        }
    }

    #[test]
    fn values_come_back() {
        let mut header = GgufHeader::default();
        header.str("general.type", "adapter");
        header.float("alpha", 2.5);
        header.tensor("a", 0, &[2, 3], 24);
        header.tensor("b", 1, &[4], 8);
        let mut bytes = Vec::new();
        header.write(&mut bytes).unwrap();
        bytes.resize(bytes.len() + 64, 0);
        let file = read(&bytes).unwrap();
        assert_eq!(file.metadata.str("general.type"), Some("adapter"));
        assert_eq!(file.metadata.float("alpha"), Some(2.5));
        let tensors: Vec<_> =
            file.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
        assert_eq!(tensors, [("a", &[2, 3][..]), ("b", &[4][..])]);
        assert_eq!(file.tensors[1].offset - file.tensors[0].offset, 32);
    }
}
