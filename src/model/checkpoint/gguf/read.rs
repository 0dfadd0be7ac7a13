//! Reads the header of a GGUF file: metadata and the table of tensors.
//!
//! A header is not believed: every count is compared with the bytes that are left before
//! anything is allocated for it, so memory stays within a small multiple of the file's
//! size, and offsets are checked before anyone follows them.

use std::collections::HashSet;

use super::{GgufFile, Metadata, Value, shown};
use crate::kernels::quant::QuantType;
use crate::model::checkpoint::{StoredDtype, StoredTensor};
use crate::{Error, Result};

const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's GGML_MAX_DIMS.
const DIMS_MAX: u32 = 4;
/// Longest key or tensor name in bytes (the format's limit of keys).
const NAME_MAX: usize = 65_535;
/// Deepest nesting of arrays. The format sets no limit; nothing in use has more than two.
const DEPTH_MAX: u32 = 8;

/// Fewest bytes of a key-value pair: key of one letter, type, value.
const PAIR_MIN: usize = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor's entry: name of one letter, number of dimensions, type, offset.
const ENTRY_MIN: usize = 8 + 1 + 4 + 4 + 8;

/// Reads the tables of the GGUF file whose bytes (all of them) are `bytes`.
///
/// Left out of the metadata are nested arrays and integers beyond an i64: no key that
/// matters here holds one.
///
/// # Errors
/// Input errors that name the key or tensor: not GGUF, version 1, big-endian, cut short,
/// counts or lengths that the file cannot hold, duplicates, tensors that overlap, reach past
/// the end or have rows that are no whole number of blocks.
pub fn read(bytes: &[u8]) -> Result<GgufFile> {
    let mut cursor = Cursor { bytes, at: 0 };
    check_version(&mut cursor)?;
    let n_tensors = cursor.count("tensors", ENTRY_MIN)?;
    let n_pairs = cursor.count("key-value pairs", PAIR_MIN)?;
    let metadata = read_pairs(&mut cursor, n_pairs)?;
    let entries = read_entries(&mut cursor, n_tensors)?;
    let tensors = place(entries, &metadata, cursor.at, bytes.len())?;
    Ok(GgufFile { metadata, tensors })
}

/// A file as it lies: what another one is made of that differs in some tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout<'a> {
    /// The key-value pairs, in order.
    pub pairs: Vec<RawPair<'a>>,
    /// The tensors, in order.
    pub tensors: Vec<RawTensor<'a>>,
    /// Where tensors begin: at multiples of this.
    pub alignment: u64,
}

/// A key-value pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawPair<'a> {
    /// Its key.
    pub key: &'a str,
    /// Key, type and value as the file has them.
    pub bytes: &'a [u8],
}

/// A tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// ggml's number of its type.
    pub kind: u32,
    /// Lengths, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its values.
    pub bytes: &'a [u8],
}

/// Reads the file whose bytes are `bytes` without interpreting what it holds.
///
/// # Errors
/// See [`read`]; a tensor whose type, and so its size, is not known.
pub fn layout(bytes: &[u8]) -> Result<Layout<'_>> {
    let checked = read(bytes)?;
    let mut cursor = Cursor { bytes, at: 0 };
    check_version(&mut cursor)?;
    let n_tensors = cursor.count("tensors", ENTRY_MIN)?;
    let n_pairs = cursor.count("key-value pairs", PAIR_MIN)?;
    let mut pairs = Vec::with_capacity(n_pairs);
    for _ in 0..n_pairs {
        let start = cursor.at;
        let key = cursor.name()?;
        let kind = cursor.u32()?;
        cursor.value(kind)?;
        pairs.push(RawPair { key, bytes: &bytes[start..cursor.at] });
    }
    let entries = read_entries(&mut cursor, n_tensors)?.into_iter().zip(&checked.tensors);
    let tensors = entries.map(|(entry, tensor)| {
        let len = entry.bytes.ok_or_else(|| {
            let (name, kind) = (shown(entry.name), entry.kind);
            Error::input(format!("tensor {name} has the unknown type {kind}"))
        })?;
        let bytes = &bytes[tensor.offset..tensor.offset + len];
        Ok(RawTensor { name: entry.name, kind: entry.kind, shape: entry.shape, bytes })
    });
    let tensors = tensors.collect::<Result<_>>()?;
    Ok(Layout { pairs, tensors, alignment: alignment(&checked.metadata)? })
}

fn check_version(cursor: &mut Cursor) -> Result<()> {
    if cursor.bytes.len() < 4 || &cursor.bytes[..4] != MAGIC {
        return Err(Error::input("not a GGUF file: it does not begin with \"GGUF\""));
    }
    cursor.at = 4;
    match cursor.u32()? {
        2 | 3 => Ok(()),
        1 => Err(Error::input(
            "GGUF version 1 is not supported (nor by llama.cpp since 2023): convert the model again",
        )),
        version if version & 0xffff == 0 => Err(Error::input(
            "a big-endian GGUF file is not supported: convert it with llama.cpp's \
             gguf_convert_endian.py",
        )),
        version => {
            Err(Error::input(format!("GGUF version {version} is not supported, only 2 and 3 are")))
        }
    }
}

fn read_pairs(cursor: &mut Cursor, n: usize) -> Result<Metadata> {
    let mut metadata = Metadata::default();
    let mut seen = HashSet::new();
    for i in 0..n {
        let key = cursor.name().map_err(|e| e.context(format!("key {i} of {n}")))?;
        if !seen.insert(key) {
            return Err(Error::input(format!("key {} stands twice in the file", shown(key))));
        }
        let value = cursor.u32().and_then(|kind| cursor.value(kind));
        if let Some(value) = value.map_err(|e| e.context(format!("key {}", shown(key))))? {
            metadata.0.insert(key.to_owned(), value);
        }
    }
    Ok(metadata)
}

/// A tensor as its entry describes it.
struct Entry<'a> {
    name: &'a str,
    kind: u32,
    dtype: StoredDtype,
    shape: Vec<usize>,
    /// From the start of the data section.
    offset: u64,
    /// `None` for a type that is not known.
    bytes: Option<usize>,
}

fn read_entries<'a>(cursor: &mut Cursor<'a>, n: usize) -> Result<Vec<Entry<'a>>> {
    if n > cursor.left() / ENTRY_MIN {
        return Err(cursor.too_many(n, "tensors"));
    }
    let mut entries = Vec::with_capacity(n);
    let mut seen = HashSet::new();
    for i in 0..n {
        let name = cursor.name().map_err(|e| e.context(format!("tensor {i} of {n}")))?;
        if !seen.insert(name) {
            return Err(Error::input(format!("tensor {} stands twice in the file", shown(name))));
        }
        let entry = read_entry(cursor, name);
        entries.push(entry.map_err(|e| e.context(format!("tensor {}", shown(name))))?);
    }
    Ok(entries)
}

fn read_entry<'a>(cursor: &mut Cursor<'a>, name: &'a str) -> Result<Entry<'a>> {
    let n_dims = cursor.u32()?;
    if n_dims > DIMS_MAX {
        return Err(Error::input(format!("{n_dims} dimensions, at most {DIMS_MAX} are allowed")));
    }
    // The file has the innermost dimension first.
    let mut shape = Vec::with_capacity(n_dims as usize);
    for _ in 0..n_dims {
        let length = cursor.u64()?;
        let length = usize::try_from(length).ok().filter(|&n| n > 0);
        shape.push(length.ok_or_else(|| Error::input("a dimension is zero or out of range"))?);
    }
    shape.reverse();
    let kind = cursor.u32()?;
    Ok(Entry {
        name,
        kind,
        dtype: stored_dtype(kind),
        bytes: size(kind, &shape)?,
        offset: cursor.u64()?,
        shape,
    })
}

/// Bytes of a tensor of `kind` and `shape`; `None` if the type is not known.
fn size(kind: u32, shape: &[usize]) -> Result<Option<usize>> {
    let Some((name, block_len, block_bytes)) = ggml_type(kind) else { return Ok(None) };
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(block_len) {
        return Err(Error::input(format!(
            "rows of {row} values are no whole number of {name} blocks of {block_len}"
        )));
    }
    shape
        .iter()
        .try_fold(1usize, |all, &n| all.checked_mul(n))
        .and_then(|values| (values / block_len).checked_mul(block_bytes))
        .map(Some)
        .ok_or_else(|| Error::input(format!("the shape {shape:?} is too large")))
}

fn stored_dtype(kind: u32) -> StoredDtype {
    match (kind, QuantType::from_ggml_id(kind), ggml_type(kind)) {
        (0, ..) => StoredDtype::F32,
        (1, ..) => StoredDtype::F16,
        (30, ..) => StoredDtype::Bf16,
        (_, Some(quant), _) => StoredDtype::Quant(quant),
        (_, None, Some((name, ..))) => StoredDtype::Other(name.to_owned()),
        (_, None, None) => StoredDtype::Other(format!("ggml type {kind}")),
    }
}

/// Name, values of a block and bytes of a block (`enum ggml_type` of ggml.h; sizes of
/// gguf-py's GGML_QUANT_SIZES). Numbers that are missing have been removed from the format.
fn ggml_type(kind: u32) -> Option<(&'static str, usize, usize)> {
    Some(match kind {
        0 => ("F32", 1, 4),
        1 => ("F16", 1, 2),
        2 => ("Q4_0", 32, 18),
        3 => ("Q4_1", 32, 20),
        6 => ("Q5_0", 32, 22),
        7 => ("Q5_1", 32, 24),
        8 => ("Q8_0", 32, 34),
        9 => ("Q8_1", 32, 36),
        10 => ("Q2_K", 256, 84),
        11 => ("Q3_K", 256, 110),
        12 => ("Q4_K", 256, 144),
        13 => ("Q5_K", 256, 176),
        14 => ("Q6_K", 256, 210),
        15 => ("Q8_K", 256, 292),
        16 => ("IQ2_XXS", 256, 66),
        17 => ("IQ2_XS", 256, 74),
        18 => ("IQ3_XXS", 256, 98),
        19 => ("IQ1_S", 256, 50),
        20 => ("IQ4_NL", 32, 18),
        21 => ("IQ3_S", 256, 110),
        22 => ("IQ2_S", 256, 82),
        23 => ("IQ4_XS", 256, 136),
        24 => ("I8", 1, 1),
        25 => ("I16", 1, 2),
        26 => ("I32", 1, 4),
        27 => ("I64", 1, 8),
        28 => ("F64", 1, 8),
        29 => ("IQ1_M", 256, 56),
        30 => ("BF16", 1, 2),
        34 => ("TQ1_0", 256, 54),
        35 => ("TQ2_0", 256, 66),
        39 => ("MXFP4", 32, 17),
        40 => ("NVFP4", 64, 36),
        41 => ("Q1_0", 128, 18),
        42 => ("Q2_0", 64, 18),
        _ => return None,
    })
}

/// Turns offsets in the data section into offsets in the file, and checks that every tensor
/// lies inside and no two share bytes. `table_end` is where the data section may begin.
fn place(
    entries: Vec<Entry>,
    metadata: &Metadata,
    table_end: usize,
    file_len: usize,
) -> Result<Vec<StoredTensor>> {
    let alignment = alignment(metadata)?;
    let out_of_file = |name: &str| {
        Error::input(format!(
            "tensor {} reaches past the end of the file ({file_len} bytes): the file is cut \
             short, copy it again",
            shown(name)
        ))
    };
    let data = (table_end as u64).checked_next_multiple_of(alignment);
    let mut spans = Vec::with_capacity(entries.len());
    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        if entry.offset % alignment != 0 {
            let name = shown(entry.name);
            return Err(Error::input(format!(
                "tensor {name}: offset {} is no multiple of the alignment {alignment}",
                entry.offset
            )));
        }
        let offset = data
            .and_then(|data| data.checked_add(entry.offset))
            .and_then(|start| usize::try_from(start).ok())
            .filter(|start| {
                start.checked_add(entry.bytes.unwrap_or(0)).is_some_and(|end| end <= file_len)
            })
            .ok_or_else(|| out_of_file(entry.name))?;
        spans.push((offset, offset + entry.bytes.unwrap_or(0), tensors.len()));
        tensors.push(StoredTensor {
            name: entry.name.to_owned(),
            dtype: entry.dtype,
            shape: entry.shape,
            offset,
        });
    }
    check_overlap(spans, &tensors)?;
    Ok(tensors)
}

fn check_overlap(mut spans: Vec<(usize, usize, usize)>, tensors: &[StoredTensor]) -> Result<()> {
    spans.sort_unstable();
    let clash = spans.windows(2).find(|pair| pair[0].1 > pair[1].0);
    clash.map_or(Ok(()), |pair| {
        let [first, second] = [pair[0].2, pair[1].2].map(|i| shown(&tensors[i].name));
        Err(Error::input(format!("tensors {first} and {second} share bytes of the file")))
    })
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    if !metadata.0.contains_key("general.alignment") {
        return Ok(DEFAULT_ALIGNMENT);
    }
    metadata
        .uint("general.alignment")
        .filter(|n| n.is_power_of_two())
        .ok_or_else(|| Error::input("general.alignment is no power of two"))
}

/// Reads little-endian values and never past the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        if n > self.left() {
            return Err(Error::input(format!(
                "{n} bytes should follow byte {}, but only {} do: the file is cut short or damaged",
                self.at,
                self.left()
            )));
        }
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("take returns what was asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn too_many(&self, n: impl std::fmt::Display, what: &str) -> Error {
        let left = self.left();
        Error::input(format!(
            "{n} {what} are declared, but only {left} bytes follow: the file is cut short or damaged"
        ))
    }

    /// A count of things of which each takes at least `bytes_min` bytes of what follows.
    fn count(&mut self, what: &str, bytes_min: usize) -> Result<usize> {
        let n = self.u64()?;
        usize::try_from(n)
            .ok()
            .filter(|&n| n <= self.left() / bytes_min)
            .ok_or_else(|| self.too_many(n, what))
    }

    fn string(&mut self) -> Result<&'a [u8]> {
        let n = self.count("bytes of text", 1)?;
        self.take(n)
    }

    /// A key or the name of a tensor.
    fn name(&mut self) -> Result<&'a str> {
        let name = self.string()?;
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Error::input(format!("a name of {} bytes", name.len())));
        }
        std::str::from_utf8(name).map_err(|_| Error::input("a name that is not UTF-8"))
    }

    /// A value of the format's type `kind`; `None` if it is not kept.
    fn value(&mut self, kind: u32) -> Result<Option<Value>> {
        Ok(match kind {
            STRING => Some(Value::String(lossy(self.string()?))),
            ARRAY => self.array_value()?,
            _ => {
                let bytes = self.take(width(kind)?)?;
                match kind {
                    FLOAT32 | FLOAT64 => Some(Value::Float(float(kind, bytes))),
                    BOOL => Some(Value::Bool(boolean(bytes)? == 1)),
                    _ => int(kind, bytes).map(Value::Int),
                }
            }
        })
    }

    fn array_value(&mut self) -> Result<Option<Value>> {
        let kind = self.u32()?;
        if kind == ARRAY {
            self.skip_arrays(1)?;
            return Ok(None);
        }
        if kind == STRING {
            let n = self.count("texts", 8)?;
            let mut texts = Vec::with_capacity(n);
            for _ in 0..n {
                texts.push(lossy(self.string()?));
            }
            return Ok(Some(Value::Strings(texts)));
        }
        let width = width(kind)?;
        let n = self.count("values", width)?;
        let values = self.take(n * width)?.chunks_exact(width);
        if matches!(kind, FLOAT32 | FLOAT64) {
            return Ok(Some(Value::Floats(values.map(|x| float(kind, x) as f32).collect())));
        }
        let mut ints = Vec::with_capacity(n);
        for bytes in values {
            let value = if kind == BOOL { Some(boolean(bytes)?) } else { int(kind, bytes) };
            let Some(value) = value else { return Ok(None) };
            ints.push(value);
        }
        Ok(Some(Value::Ints(ints)))
    }

    /// Passes over the elements of an array of arrays, which lies in `depth` others.
    fn skip_arrays(&mut self, depth: u32) -> Result<()> {
        if depth >= DEPTH_MAX {
            return Err(Error::input(format!("arrays nested more than {DEPTH_MAX} deep")));
        }
        for _ in 0..self.count("arrays", 12)? {
            match self.u32()? {
                ARRAY => self.skip_arrays(depth + 1)?,
                STRING => {
                    for _ in 0..self.count("texts", 8)? {
                        self.string()?;
                    }
                }
                kind => {
                    let width = width(kind)?;
                    let n = self.count("values", width)?;
                    self.take(n * width)?;
                }
            }
        }
        Ok(())
    }
}

// The format's types of values that need a name here; the others are integers.
const FLOAT32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const FLOAT64: u32 = 12;

/// Bytes of a value of a type of fixed width.
fn width(kind: u32) -> Result<usize> {
    Ok(match kind {
        0 | 1 | BOOL => 1,
        2 | 3 => 2,
        4 | 5 | FLOAT32 => 4,
        10 | 11 | FLOAT64 => 8,
        _ => return Err(Error::input(format!("a value of the unknown type {kind}"))),
    })
}

/// The integer of type `kind`, unless it is beyond an i64.
fn int(kind: u32, bytes: &[u8]) -> Option<i64> {
    // Sign or zero extension to eight bytes.
    let signed = matches!(kind, 1 | 3 | 5 | 11);
    let negative = signed && bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let value = i64::from_le_bytes(wide);
    (signed || value >= 0).then_some(value)
}

fn float(kind: u32, bytes: &[u8]) -> f64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    match kind {
        FLOAT32 => f32::from_bits(u64::from_le_bytes(wide) as u32) as f64,
        _ => f64::from_le_bytes(wide),
    }
}

fn boolean(bytes: &[u8]) -> Result<i64> {
    match bytes[0] {
        byte @ (0 | 1) => Ok(byte as i64),
        byte => Err(Error::input(format!("a boolean of value {byte}"))),
    }
}

/// Vocabularies hold tokens that are not whole characters; those bytes are replaced.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
