//! GGUF files made in memory, for tests.

use crate::kernels::quant::QuantType;

/// Builds the bytes of a GGUF file. Nothing is checked, so bad files can be made too.
#[derive(Debug, Clone)]
pub(crate) struct GgufBuilder {
    /// The format's version.
    pub version: u32,
    /// Where tensors begin; written into the metadata if it is not 32.
    pub alignment: usize,
    /// Key, type and bytes of each value.
    pub pairs: Vec<(String, u32, Vec<u8>)>,
    /// The tensors.
    pub tensors: Vec<BuiltTensor>,
}

/// A tensor of a [`GgufBuilder`].
#[derive(Debug, Clone)]
pub(crate) struct BuiltTensor {
    /// Name.
    pub name: String,
    /// ggml's number of the type.
    pub kind: u32,
    /// Innermost dimension first, as in the file.
    pub dims: Vec<u64>,
    /// The values.
    pub data: Vec<u8>,
    /// Offset in the data section if not the next free one.
    pub offset: Option<u64>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        Self { version: 3, alignment: 32, pairs: Vec::new(), tensors: Vec::new() }
    }
}

fn string_bytes(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

fn array_bytes<T>(kind: u32, items: &[T], bytes: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((items.len() as u64).to_le_bytes());
    out.extend(items.iter().flat_map(bytes));
    out
}

impl GgufBuilder {
    /// A file with `general.architecture`.
    pub fn new(architecture: &str) -> Self {
        Self::default().str("general.architecture", architecture)
    }

    /// Any value: the format's type and the bytes.
    pub fn raw(mut self, key: &str, kind: u32, bytes: Vec<u8>) -> Self {
        self.pairs.push((key.to_owned(), kind, bytes));
        self
    }

    /// A UINT32.
    pub fn uint(self, key: &str, n: u32) -> Self {
        self.raw(key, 4, n.to_le_bytes().to_vec())
    }

    /// A FLOAT32.
    pub fn float(self, key: &str, x: f32) -> Self {
        self.raw(key, 6, x.to_le_bytes().to_vec())
    }

    /// A BOOL.
    pub fn bool(self, key: &str, b: bool) -> Self {
        self.raw(key, 7, vec![b as u8])
    }

    /// A STRING.
    pub fn str(self, key: &str, text: &str) -> Self {
        self.raw(key, 8, string_bytes(text.as_bytes()))
    }

    /// An array of INT32.
    pub fn ints(self, key: &str, ints: &[i32]) -> Self {
        self.raw(key, 9, array_bytes(5, ints, |n| n.to_le_bytes().to_vec()))
    }

    /// An array of FLOAT32.
    pub fn floats(self, key: &str, floats: &[f32]) -> Self {
        self.raw(key, 9, array_bytes(6, floats, |x| x.to_le_bytes().to_vec()))
    }

    /// An array of STRING.
    pub fn strings(self, key: &str, texts: &[&str]) -> Self {
        self.raw(key, 9, array_bytes(8, texts, |text| string_bytes(text.as_bytes())))
    }

    /// A tensor of any type: `shape` has the outermost dimension first.
    pub fn tensor(mut self, name: &str, kind: u32, shape: &[usize], data: Vec<u8>) -> Self {
        let dims = shape.iter().rev().map(|&n| n as u64).collect();
        let name = name.to_owned();
        self.tensors.push(BuiltTensor { name, kind, dims, data, offset: None });
        self
    }

    /// A tensor of floats: `shape` has the outermost dimension first.
    pub fn f32s(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.tensor(name, 0, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// A quantized tensor, from blocks as they are in memory.
    pub fn quantized(self, name: &str, kind: QuantType, shape: &[usize], blocks: Vec<u8>) -> Self {
        let id = (0..64).find(|&id| QuantType::from_ggml_id(id) == Some(kind));
        self.tensor(name, id.expect("every type has a number"), shape, blocks)
    }

    /// The file.
    pub fn build(&self) -> Vec<u8> {
        let mut pairs = self.pairs.clone();
        if self.alignment != 32 {
            let n = (self.alignment as u32).to_le_bytes().to_vec();
            pairs.push(("general.alignment".to_owned(), 4, n));
        }
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((pairs.len() as u64).to_le_bytes());
        for (key, kind, bytes) in &pairs {
            out.extend(string_bytes(key.as_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(string_bytes(tensor.name.as_bytes()));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(self.alignment.max(1)), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment.max(1)), 0);
        out.extend(data);
        out
    }
}
