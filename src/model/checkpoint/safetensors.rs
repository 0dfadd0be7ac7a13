//! The safetensors format, by its own crate.

use safetensors::{Dtype, SafeTensors};

use super::{StoredDtype, StoredTensor};
use crate::{Error, Result};

/// The tensors of a mapped file.
///
/// # Errors
/// The header is not valid, or the file is shorter than it says.
pub fn read(bytes: &[u8]) -> Result<Vec<StoredTensor>> {
    let damaged =
        |e| Error::input(format!("not a valid safetensors file ({e}): damaged or cut short?"));
    let parsed = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let stored = parsed.iter().map(|(name, view)| StoredTensor {
        name: name.to_owned(),
        dtype: match view.dtype() {
            Dtype::F32 => StoredDtype::F32,
            Dtype::F16 => StoredDtype::F16,
            Dtype::BF16 => StoredDtype::Bf16,
            other => StoredDtype::Other(format!("{other:?}")),
        },
        shape: view.shape().to_vec(),
        offset: view.data().as_ptr() as usize - bytes.as_ptr() as usize,
    });
    Ok(stored.collect())
}
