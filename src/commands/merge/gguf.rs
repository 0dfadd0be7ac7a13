//! A GGUF model as another one: metadata and tensors as they are, but for the matrices that
//! change. The parts of a split model become one file.

use std::collections::BTreeMap;
use std::path::Path;

use super::Output;
use crate::kernels::quant::QuantType;
use crate::model::Checkpoint;
use crate::model::adapter::merge::Merge;
use crate::model::checkpoint::StoredDtype;
use crate::model::checkpoint::gguf::{GgufHeader, Layout, RawTensor, layout, type_id};
use crate::{Error, Result};

/// A tensor of the result.
struct Planned<'a> {
    name: String,
    shape: Vec<usize>,
    content: Content<'a>,
}

enum Content<'a> {
    /// As it lies: ggml's number of its type, and the bytes.
    Kept(u32, &'a [u8]),
    /// The module's matrix.
    Merged(String, StoredDtype),
}

/// Writes the result into the file `path` and returns what the user should know of it.
pub fn write(
    path: &Path,
    base: &Checkpoint,
    merge: &Merge,
    dtype: Option<StoredDtype>,
) -> Result<Vec<String>> {
    let parts = base
        .tensors()
        .files()
        .map(|(path, bytes)| layout(bytes).map_err(|error| error.context(path.display())));
    let parts: Vec<Layout> = parts.collect::<Result<_>>()?;
    let Some(first) = parts.first() else { return Err(Error::fault("a model without files")) };
    let mut header = GgufHeader::new(first.alignment);
    for pair in first.pairs.iter().filter(|pair| !pair.key.starts_with("split.")) {
        header.raw(pair.bytes);
    }
    let mut replaced: BTreeMap<&str, usize> = BTreeMap::new();
    let mut planned = Vec::new();
    for tensor in parts.iter().flat_map(|part| &part.tensors) {
        planned.push(plan(tensor, base, merge, dtype.as_ref(), &mut replaced));
        let embedding = base.config().names.embed_tokens;
        if let (Some(head), true) = (merge.added(), tensor.name == format!("{embedding}.weight")) {
            planned.push(Planned {
                name: format!("{head}.weight"),
                shape: tensor.shape.clone(),
                content: Content::Merged(
                    head.to_owned(),
                    written_type(tensor.name, base, dtype.as_ref(), &mut replaced),
                ),
            });
        }
    }
    let bytes: Vec<u64> = planned.iter().map(|tensor| add(&mut header, tensor)).collect();
    let mut out = Output::create(path.to_owned())?;
    out.with(|file| header.write(file))?;
    for (tensor, bytes) in planned.iter().zip(bytes) {
        match &tensor.content {
            Content::Kept(_, values) => out.bytes(values)?,
            Content::Merged(module, dtype) => {
                let matrix = merge.matrix(module)?;
                out.rows(matrix.shape(), dtype, |rows, out| matrix.read(rows, out))
                    .map_err(|error| error.context(&tensor.name))?;
            }
        }
        out.with(|file| header.fill_up(bytes, file))?;
    }
    out.finish()?;
    let remark = |(name, n)| format!("{n} matrices became f16: farm does not write {name}");
    Ok(replaced.into_iter().map(remark).collect())
}

fn plan<'a>(
    tensor: &RawTensor<'a>,
    base: &'a Checkpoint,
    merge: &Merge,
    dtype: Option<&StoredDtype>,
    replaced: &mut BTreeMap<&'a str, usize>,
) -> Planned<'a> {
    let module = tensor.name.strip_suffix(".weight").filter(|module| merge.changes(module));
    let content = match module {
        None => Content::Kept(tensor.kind, tensor.bytes),
        Some(module) => {
            let dtype = written_type(tensor.name, base, dtype, replaced);
            Content::Merged(module.to_owned(), dtype)
        }
    };
    Planned { name: tensor.name.to_owned(), shape: tensor.shape.clone(), content }
}

/// What a matrix that is made from the tensor `name` is written as: what was asked for, its
/// own type, or f16 where farm cannot write that, which is counted in `replaced`.
fn written_type<'a>(
    name: &str,
    base: &'a Checkpoint,
    dtype: Option<&StoredDtype>,
    replaced: &mut BTreeMap<&'a str, usize>,
) -> StoredDtype {
    use QuantType::{Q4_K, Q6_K, Q8_0};
    match (dtype, base.tensors().dtype(name)) {
        (Some(dtype), _) => dtype.clone(),
        (None, Some(StoredDtype::Quant(quant))) if !matches!(quant, Q8_0 | Q4_K | Q6_K) => {
            *replaced.entry(quant.name()).or_default() += 1;
            StoredDtype::F16
        }
        (None, own) => own.cloned().unwrap_or(StoredDtype::F16),
    }
}

/// Adds the tensor to the table and returns its bytes.
fn add(header: &mut GgufHeader, tensor: &Planned) -> u64 {
    let (kind, bytes) = match &tensor.content {
        Content::Kept(kind, bytes) => (*kind, bytes.len() as u64),
        Content::Merged(_, dtype) => {
            // Types that cannot be written are refused where the values are.
            (type_id(dtype).unwrap_or_default(), dtype.bytes_of(&tensor.shape).unwrap_or_default())
        }
    };
    header.tensor(&tensor.name, kind, &tensor.shape, bytes);
    bytes
}
