//! The safetensors format, by its own crate, with one addition: tensors of ggml's blocks.
//!
//! The format has no type for them. They are `U8` with the last dimension in bytes, and the
//! entry [`BLOCK_TYPES`] of `__metadata__` names the type of each (JSON: tensor to type).

use std::collections::HashMap;

use safetensors::{Dtype, SafeTensors};

use super::{StoredDtype, StoredTensor};
use crate::kernels::quant::QuantType;
use crate::{Error, Result};

/// The entry of `__metadata__` that names the types of blocks.
pub const BLOCK_TYPES: &str = "ggml_types";

/// The tensors of a mapped file.
///
/// # Errors
/// The header is not valid, or the file is shorter than it says; a tensor is no whole number of
/// the blocks that it is said to be.
pub fn read(bytes: &[u8]) -> Result<Vec<StoredTensor>> {
    let damaged =
        |e| Error::input(format!("not a valid safetensors file ({e}): damaged or cut short?"));
    let parsed = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let types = block_types(bytes)?;
    let stored = parsed.iter().map(|(name, view)| {
        let (dtype, shape) = match (view.dtype(), types.get(name)) {
            (dtype, Some(quant)) => blocks(name, dtype, view.shape(), *quant)?,
            (dtype, None) => (plain(dtype), view.shape().to_vec()),
        };
        let offset = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        Ok(StoredTensor { name: name.to_owned(), dtype, shape, offset })
    });
    stored.collect()
}

fn plain(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::F32 => StoredDtype::F32,
        Dtype::F16 => StoredDtype::F16,
        Dtype::BF16 => StoredDtype::Bf16,
        other => StoredDtype::Other(format!("{other:?}")),
    }
}

fn block_types(bytes: &[u8]) -> Result<HashMap<String, QuantType>> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(Error::input)?;
    let Some(text) = header.metadata().as_ref().and_then(|all| all.get(BLOCK_TYPES)) else {
        return Ok(HashMap::new());
    };
    let bad = |why: String| Error::input(format!("__metadata__.{BLOCK_TYPES}: {why}"));
    let names: HashMap<String, String> =
        serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
    let typed = names.into_iter().map(|(tensor, name)| {
        let quant = QuantType::ALL.into_iter().find(|quant| quant.name() == name);
        let quant = quant.ok_or_else(|| bad(format!("{tensor} has the unknown type {name:?}")))?;
        Ok((tensor, quant))
    });
    typed.collect()
}

/// The shape in values of `shape` in bytes.
fn blocks(
    name: &str,
    dtype: Dtype,
    shape: &[usize],
    quant: QuantType,
) -> Result<(StoredDtype, Vec<usize>)> {
    let bad = || {
        Error::input(format!(
            "tensor {name} of {dtype:?} {shape:?} is no {} (blocks of {} bytes): damaged?",
            quant.name(),
            quant.block_bytes()
        ))
    };
    let (bytes, leading) = shape.split_last().ok_or_else(bad)?;
    if dtype != Dtype::U8 || *bytes == 0 || !bytes.is_multiple_of(quant.block_bytes()) {
        return Err(bad());
    }
    let cols = (bytes / quant.block_bytes()).checked_mul(quant.block_len()).ok_or_else(bad)?;
    Ok((StoredDtype::Quant(quant), [leading, &[cols]].concat()))
}
