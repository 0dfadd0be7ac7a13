//! A checkpoint quantized into one safetensors file, made piece by piece where it is asked for:
//! what a staged copy holds in place of the weights with `--quantize`.
//!
//! The file is laid out from the headers alone, so every rank that opens the same checkpoint
//! means the same bytes, and any of them can make any part. Tensors of ggml's blocks are `U8`
//! there, their last dimension in bytes; `__metadata__` names their types (see
//! [`super::safetensors`]). All others are as they were stored; what farm does not read
//! (integers, positions, masks) is left out.
//!
//! Not for GGUF, whose metadata this form has no place for: its floats are quantized by each
//! rank while it loads.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::safetensors::BLOCK_TYPES;
use super::{Checkpoint, Format, StoredDtype, Tensor, matrix_shape};
use crate::kernels::quant::QuantType;
use crate::model::quantization::{dtype_for, role};
use crate::model::weights::WeightDtype;
use crate::{Error, Result};

/// Of the layout and the bytes: a copy that another version made is another copy.
pub const VERSION: u32 = 1;
/// Where the values begin is a multiple of this.
const ALIGN: usize = 64;
/// Bytes of a checkpoint that are read at a time.
const READ_BYTES: usize = 8 << 20;

/// The file that a checkpoint becomes.
pub struct QuantizedFile {
    checkpoint: Checkpoint,
    header: Vec<u8>,
    parts: Vec<Part>,
}

/// A tensor in the file.
struct Part {
    name: String,
    /// What it is quantized to here.
    quant: Option<QuantType>,
    cols: usize,
    row_bytes: usize,
    /// In the file, bytes.
    place: Range<u64>,
}

impl QuantizedFile {
    /// Lays out the file that the model at `model` becomes where `quant` is asked for; `None`
    /// where it would not change, or is in a form that is quantized while it is loaded.
    ///
    /// # Errors
    /// Input errors that name the file: a checkpoint that cannot be loaded.
    pub fn open(model: &Path, quant: QuantType) -> Result<Option<Self>> {
        let checkpoint = Checkpoint::open(model)?;
        if checkpoint.files().format == Format::Gguf {
            return Ok(None);
        }
        let mut planned: Vec<Planned> = checkpoint
            .tensors()
            .iter()
            .map(|(name, tensor)| Planned::new(&checkpoint, quant, name, tensor))
            .filter_map(Result::transpose)
            .collect::<Result<_>>()?;
        if planned.iter().all(|planned| planned.quant.is_none()) {
            return Ok(None);
        }
        // Wide values first, so that all are aligned; then in the order of the checkpoint, so
        // that neighbours here are neighbours there.
        planned.sort_by_cached_key(|planned| (planned.class(), planned.first, planned.name));
        let header = header(&planned)?;
        let mut end = header.len() as u64;
        let parts = planned.iter().map(|planned| {
            let start = end;
            end += planned.bytes();
            Part {
                name: planned.name.to_owned(),
                quant: planned.quant,
                cols: planned.cols,
                row_bytes: planned.row_bytes,
                place: start..end,
            }
        });
        let parts = parts.collect();
        Ok(Some(Self { checkpoint, header, parts }))
    }

    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        self.parts.last().map_or(self.header.len() as u64, |part| part.place.end)
    }

    /// Bytes of the checkpoint that were read for what was made so far.
    pub fn bytes_read(&self) -> u64 {
        self.checkpoint.tensors().bytes_read()
    }

    /// Makes the bytes of the file from `offset` on that fill `out`, on the rank's threads.
    ///
    /// # Errors
    /// The checkpoint cannot be read, or holds values that cannot be quantized; `out` reaches
    /// beyond the end.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        if end > self.bytes() {
            return Err(Error::fault(format!("no byte {end} in a quantized file")));
        }
        copy_overlap(&self.header, 0, offset, out);
        let first = self.parts.partition_point(|part| part.place.end <= offset);
        for part in self.parts[first..].iter().take_while(|part| part.place.start < end) {
            let from = offset.max(part.place.start) - part.place.start;
            let to = end.min(part.place.end) - part.place.start;
            let rows = from as usize / part.row_bytes..(to as usize).div_ceil(part.row_bytes);
            let step = (READ_BYTES / (part.cols * size_of::<f32>())).max(1);
            for first in rows.clone().step_by(step) {
                let rows = first..rows.end.min(first + step);
                let place = part.place.start + (first * part.row_bytes) as u64;
                let made = self
                    .make(part, rows)
                    .map_err(|error| error.context(format!("tensor {}", part.name)))?;
                copy_overlap(&made, place, offset, out);
            }
        }
        Ok(())
    }

    fn make(&self, part: &Part, rows: Range<usize>) -> Result<Vec<u8>> {
        let stored = self.checkpoint.tensors().read_rows(&part.name, rows)?;
        Ok(match part.quant {
            Some(quant) => stored.quantized(quant, 0..part.cols)?.stored_bytes().to_vec(),
            None => stored.stored_bytes().to_vec(),
        })
    }
}

/// Copies to `out`, which begins at byte `out_at` of a file, what it has of `bytes`, which lie
/// at byte `at`.
fn copy_overlap(bytes: &[u8], at: u64, out_at: u64, out: &mut [u8]) {
    let start = at.max(out_at);
    let end = (at + bytes.len() as u64).min(out_at + out.len() as u64);
    if start < end {
        let from = &bytes[(start - at) as usize..(end - at) as usize];
        out[(start - out_at) as usize..(end - out_at) as usize].copy_from_slice(from);
    }
}

/// A tensor before its place is known.
struct Planned<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    /// Its first byte in the checkpoint: file and offset.
    first: (usize, usize),
    quant: Option<QuantType>,
    rows: usize,
    cols: usize,
    row_bytes: usize,
}

impl<'a> Planned<'a> {
    /// `None` for what is left out.
    fn new(
        checkpoint: &Checkpoint,
        asked: QuantType,
        name: &'a str,
        tensor: &'a Tensor,
    ) -> Result<Option<Self>> {
        let [rows, cols] = matrix_shape(&tensor.shape);
        let role = role(checkpoint.config(), name);
        let quant = match (&tensor.dtype, role) {
            (StoredDtype::Other(dtype), Some(_)) => {
                return Err(Error::input(format!(
                    "{}: tensor {name} has type {dtype}, which is not supported",
                    checkpoint.files().dir.display()
                )));
            }
            (StoredDtype::Other(_), None) => return Ok(None),
            (StoredDtype::Quant(_), _) | (_, None) => None,
            (_, Some(role)) => match dtype_for(WeightDtype::Quant(asked), role, cols) {
                Some(WeightDtype::Quant(quant)) => Some(quant),
                _ => None,
            },
        };
        let dtype = quant.map_or_else(|| tensor.dtype.clone(), StoredDtype::Quant);
        let row_bytes = dtype.bytes_of(&[cols]).unwrap_or(0) as usize;
        if tensor.is_empty() || row_bytes == 0 {
            return Ok(None);
        }
        let first = tensor.pieces.first().map_or((0, 0), |piece| (piece.file, piece.offset));
        Ok(Some(Self { name, tensor, first, quant, rows, cols, row_bytes }))
    }

    fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes as u64
    }

    fn dtype(&self) -> StoredDtype {
        self.quant.map_or_else(|| self.tensor.dtype.clone(), StoredDtype::Quant)
    }

    fn class(&self) -> u8 {
        match self.dtype() {
            StoredDtype::F32 => 0,
            StoredDtype::F16 | StoredDtype::Bf16 => 1,
            StoredDtype::Quant(_) | StoredDtype::Other(_) => 2,
        }
    }

    /// As the header has it: type and lengths.
    fn described(&self) -> (&'static str, Vec<usize>) {
        let shape = &self.tensor.shape;
        match self.dtype() {
            StoredDtype::F32 => ("F32", shape.clone()),
            StoredDtype::F16 => ("F16", shape.clone()),
            StoredDtype::Bf16 => ("BF16", shape.clone()),
            StoredDtype::Quant(_) | StoredDtype::Other(_) => {
                let leading = shape.split_last().map_or(&[][..], |(_, leading)| leading);
                ("U8", [leading, &[self.row_bytes]].concat())
            }
        }
    }
}

/// The length of the header's text, and the text, up to where the values begin.
fn header(planned: &[Planned]) -> Result<Vec<u8>> {
    let mut types = Map::new();
    let mut tensors = Map::new();
    let mut end = 0;
    for planned in planned {
        let start = end;
        end += planned.bytes();
        let (dtype, shape) = planned.described();
        let tensor = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        tensors.insert(planned.name.to_owned(), tensor);
        if let StoredDtype::Quant(quant) = planned.dtype() {
            types.insert(planned.name.to_owned(), quant.name().into());
        }
    }
    let types = Value::Object(types).to_string();
    let mut all = Map::new();
    all.insert("__metadata__".into(), json!({"format": "pt", BLOCK_TYPES: types}));
    all.extend(tensors);
    let mut text = serde_json::to_vec(&Value::Object(all)).map_err(Error::fault)?;
    text.resize((8 + text.len()).next_multiple_of(ALIGN) - 8, b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

#[cfg(test)]
#[path = "quantized_tests.rs"]
mod tests;
