//! torch.save's files (`.bin`, `.pth`): a zip file whose `data.pkl` names the tensors and
//! whose other records are their values, as they lie in memory.
//!
//! Nothing in a file is executed: see `pickle.rs` for what is understood. Left out: the form
//! that torch wrote before version 1.6, TorchScript programs, tensors that are not contiguous.

mod pickle;
mod zip;

#[cfg(test)]
mod tests;

use super::{StoredDtype, StoredTensor};
use crate::{Error, Result};

/// The tensors of the file `bytes`, whose values stay where they are. The object saved is a
/// dictionary of tensors, or has one under "state_dict", "model" or "module"; what else is
/// in it is passed over.
///
/// # Errors
/// Input errors: another format, a damaged file, a class that is no tensor's, a tensor that
/// is not contiguous or not inside the file, values that are not little-endian.
pub fn read(bytes: &[u8]) -> Result<Vec<StoredTensor>> {
    refuse_other_formats(bytes)?;
    let archive = zip::Archive::open(bytes)?;
    let order = archive.record("byteorder").unwrap_or(b"little");
    if order != b"little" {
        return Err(Error::input("the values are not little-endian: save them on another machine"));
    }
    let pickle = archive.record("data.pkl").ok_or_else(|| {
        Error::input("no data.pkl in this zip file: not a file that torch.save wrote")
    })?;
    pickle::tensors(pickle)?
        .into_iter()
        .map(|(name, tensor)| {
            place(&archive, &name, tensor)
                .map_err(|error| error.context(format_args!("tensor {name:?}")))
        })
        .collect()
}

fn refuse_other_formats(bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(b"PK") {
        return Ok(());
    }
    Err(Error::input(if bytes.starts_with(b"version https://git-lfs") {
        "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    } else if bytes.starts_with(b"\x80") {
        "written in the form of torch before version 1.6, which is not read: load it and save \
         it again with a newer torch, or convert it to safetensors"
    } else {
        "not a file that torch.save wrote: damaged or cut short?"
    }))
}

/// Checks `tensor` against the file.
fn place(archive: &zip::Archive, name: &str, tensor: pickle::Tensor) -> Result<StoredTensor> {
    let outside = || Error::input("it reaches beyond its storage: damaged or cut short?");
    let record = format!("data/{}", tensor.key);
    let storage = archive.range(&record).ok_or_else(|| {
        Error::input(format!("the file has no record {record:?}: damaged, or saved without data"))
    })?;
    if tensor.storage_len.checked_mul(tensor.value_size).is_none_or(|n| n > storage.len()) {
        return Err(Error::input(format!(
            "record {record:?} has {} bytes, too few for {} values of {}: damaged or cut short?",
            storage.len(),
            tensor.storage_len,
            tensor.dtype
        )));
    }
    let product = tensor.shape.iter().try_fold(1_usize, |n, len| n.checked_mul(*len));
    let len = product.ok_or_else(outside)?;
    if tensor.offset.checked_add(len).is_none_or(|end| end > tensor.storage_len) {
        return Err(outside());
    }
    if !is_contiguous(&tensor.shape, &tensor.strides) {
        return Err(Error::input(format!(
            "it is not contiguous (shape {:?}, strides {:?}): save it again after .contiguous()",
            tensor.shape, tensor.strides
        )));
    }
    Ok(StoredTensor {
        name: name.to_string(),
        dtype: match tensor.dtype {
            "F32" => StoredDtype::F32,
            "F16" => StoredDtype::F16,
            "BF16" => StoredDtype::Bf16,
            other => StoredDtype::Other(other.to_string()),
        },
        shape: tensor.shape,
        // Inside the storage, by the checks above.
        offset: storage.start + tensor.offset * tensor.value_size,
    })
}

/// Row-major without gaps; the stride of a dimension of one index says nothing.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    if shape.len() != strides.len() {
        return false;
    }
    let mut expected = 1_usize;
    let mut dims = shape.iter().zip(strides).rev();
    shape.contains(&0)
        || dims.all(|(len, stride)| {
            let fits = *len == 1 || *stride == expected;
            expected = expected.saturating_mul(*len);
            fits
        })
}
