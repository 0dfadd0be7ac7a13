//! Where weights come from: safetensors files, single or sharded by an index.
//!
//! A [`WeightSource`] gives slices of named tensors, so that each tensor-parallel
//! rank reads only its own. Whole rows stay mapped from the file (one copy a node,
//! shared by its ranks); a slice of columns is copied.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use memmap2::{Advice, Mmap};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::weights::{Store, Values, Weight, WeightDtype};
use crate::kernels::gemm::Element;
use crate::{Error, Result};

/// Named tensors of a checkpoint.
pub trait WeightSource: Send + Sync {
    /// Whether the checkpoint has this tensor.
    fn contains(&self, name: &str) -> bool;
    /// Rows `rows` and columns `cols` of the matrix `name` of shape `shape`.
    ///
    /// # Errors
    /// The tensor is missing, has another shape or an unsupported dtype.
    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Weight>;
    /// Elements `range` of the vector `name` of length `len`, in f32.
    ///
    /// # Errors
    /// As [`WeightSource::matrix`].
    fn vector(&self, name: &str, len: usize, range: Range<usize>) -> Result<Vec<f32>>;
    /// Bytes of tensors handed out so far: what this rank has read or mapped.
    fn bytes_read(&self) -> u64;
}

struct TensorInfo {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte offset in the file.
    offset: usize,
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
pub struct Safetensors {
    paths: Vec<PathBuf>,
    files: Vec<File>,
    maps: Vec<Arc<Mmap>>,
    tensors: HashMap<String, TensorInfo>,
    dtype: Option<WeightDtype>,
    bytes_read: AtomicU64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Safetensors {
    /// Opens the checkpoint in `dir`; `dtype` converts matrices while loading.
    ///
    /// # Errors
    /// Input errors that name the file: none there, a shard missing, a header that
    /// is not valid, a file shorter than its header says.
    pub fn open(dir: &Path, dtype: Option<WeightDtype>) -> Result<Self> {
        let mut source = Self {
            paths: shard_paths(dir)?,
            files: Vec::new(),
            maps: Vec::new(),
            tensors: HashMap::new(),
            dtype,
            bytes_read: AtomicU64::new(0),
        };
        for path in source.paths.clone() {
            source.open_file(&path).map_err(|e| e.context(path.display()))?;
        }
        Ok(source)
    }

    fn open_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(Error::input)?;
        // SAFETY: the file is farm's own staged copy, or a model file that nobody
        // rewrites in place while a job reads it; a truncation would be a fault.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::input)?;
        let damaged =
            |e| Error::input(format!("not a valid safetensors file ({e}): damaged or cut short?"));
        let (header_len, _) = SafeTensors::read_metadata(&map).map_err(damaged)?;
        let parsed = SafeTensors::deserialize(&map).map_err(damaged)?;
        let data_start = map.as_ptr() as usize;
        for (name, view) in parsed.iter() {
            let offset = view.data().as_ptr() as usize - data_start;
            debug_assert!(offset >= header_len);
            let info = TensorInfo {
                file: self.files.len(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                offset,
            };
            self.tensors.insert(name.to_string(), info);
        }
        drop(parsed);
        self.maps.push(Arc::new(map));
        self.files.push(file);
        Ok(())
    }

    fn info(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let info = self.tensors.get(name).ok_or_else(|| {
            let first = self.paths.first().map(|p| p.display().to_string()).unwrap_or_default();
            Error::input(format!("{first}: the model has no tensor {name}"))
        })?;
        if info.shape != shape {
            return Err(Error::input(format!(
                "{}: tensor {name} has shape {:?}, but config.json asks for {shape:?}",
                self.paths[info.file].display(),
                info.shape
            )));
        }
        Ok(info)
    }

    fn slice<E: Element>(
        &self,
        info: &TensorInfo,
        width: usize,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Store<E>> {
        let size = size_of::<E>();
        let len = rows.len() * cols.len();
        self.bytes_read.fetch_add((len * size) as u64, Ordering::Relaxed);
        let map = &self.maps[info.file];
        let offset = info.offset + rows.start * width * size;
        let aligned = (map.as_ptr() as usize + offset).is_multiple_of(size);
        if cols == (0..width) && aligned {
            // Read ahead: an in-place model on a parallel file system comes in large
            // requests instead of page by page. Failing is no harm.
            let _ = map.advise_range(Advice::WillNeed, offset, len * size);
            return Ok(Store::Mapped { map: map.clone(), offset, len });
        }
        let mut values = vec![E::ZERO; len];
        for (row, out) in rows.zip(values.chunks_exact_mut(cols.len().max(1))) {
            let at = info.offset + (row * width + cols.start) * size;
            // SAFETY: floats may be written as bytes.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), size_of_val(out))
            };
            // By pread, so that the other ranks' columns are not mapped here.
            self.files[info.file]
                .read_exact_at(bytes, at as u64)
                .map_err(|e| Error::io(&self.paths[info.file], e))?;
        }
        Ok(Store::Owned(values))
    }

    fn values(
        &self,
        name: &str,
        info: &TensorInfo,
        width: usize,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Values> {
        Ok(match info.dtype {
            Dtype::F32 => Values::F32(self.slice(info, width, rows, cols)?),
            Dtype::BF16 => Values::Bf16(self.slice(info, width, rows, cols)?),
            Dtype::F16 => Values::F16(self.slice(info, width, rows, cols)?),
            other => {
                return Err(Error::input(format!(
                    "{}: tensor {name} has dtype {other:?}; supported: F32, BF16, F16",
                    self.paths[info.file].display()
                )));
            }
        })
    }
}

impl WeightSource for Safetensors {
    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<Weight> {
        let info = self.info(name, &shape)?;
        let (n, k) = (rows.len(), cols.len());
        let weight = Weight::new(n, k, self.values(name, info, shape[1], rows, cols)?);
        Ok(match self.dtype {
            Some(dtype) if dtype != weight.dtype() => weight.converted(dtype),
            _ => weight,
        })
    }

    fn vector(&self, name: &str, len: usize, range: Range<usize>) -> Result<Vec<f32>> {
        let info = self.info(name, &[len])?;
        let n = range.len();
        let row = Weight::new(1, n, self.values(name, info, len, 0..1, range)?);
        let mut out = vec![0.0; n];
        row.read_row(0, &mut out);
        Ok(out)
    }

    fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }
}

fn shard_paths(dir: &Path) -> Result<Vec<PathBuf>> {
    let index = dir.join("model.safetensors.index.json");
    if index.is_file() {
        let text = std::fs::read_to_string(&index)
            .map_err(|e| Error::input(format!("{}: {e}", index.display())))?;
        let parsed: Index = serde_json::from_str(&text)
            .map_err(|e| Error::input(format!("{}: {e}", index.display())))?;
        let mut names: Vec<String> = parsed.weight_map.into_values().collect();
        names.sort();
        names.dedup();
        if let Some(bad) = names.iter().find(|n| n.contains('/') || n.contains("..")) {
            return Err(Error::input(format!(
                "{}: shard name {bad:?} leaves the directory",
                index.display()
            )));
        }
        return Ok(names.into_iter().map(|n| dir.join(n)).collect());
    }
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    Err(Error::input(format!(
        "{}: no model.safetensors and no model.safetensors.index.json in this directory",
        dir.display()
    )))
}

impl Weight {
    /// The same values stored as another type (rounded to nearest where it is narrower).
    fn converted(&self, dtype: WeightDtype) -> Weight {
        let mut wide = vec![0.0; self.rows() * self.cols()];
        for (row, out) in wide.chunks_exact_mut(self.cols().max(1)).enumerate() {
            self.read_row(row, out);
        }
        let values = match dtype {
            WeightDtype::F32 => Values::F32(Store::Owned(wide)),
            WeightDtype::Bf16 => {
                Values::Bf16(Store::Owned(wide.into_iter().map(bf16::from_f32).collect()))
            }
            WeightDtype::F16 => {
                Values::F16(Store::Owned(wide.into_iter().map(f16::from_f32).collect()))
            }
        };
        Weight::new(self.rows(), self.cols(), values)
    }
}
