//! The tensors of mapped files, and cutting a rank's part out of one.
//!
//! Whole rows stay mapped from the file (one copy a node, shared by its ranks); a slice of
//! columns, or rows from several places, is copied by this rank alone.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, Mmap};
use rayon::prelude::*;

use super::{Piece, StoredDtype, Tensor, matrix_shape};
use crate::model::names::Place;
use crate::model::weights::{Plain, Store, Values, Weight, WeightDtype};
use crate::{Error, Result};

/// Bytes that one thread reads at a time.
const READ_BYTES: usize = 4 << 20;

/// A file of weights.
pub(super) struct MappedFile {
    path: PathBuf,
    file: File,
    map: Arc<Mmap>,
}

impl MappedFile {
    pub fn open_all(paths: &[PathBuf]) -> Result<Vec<Self>> {
        paths.iter().map(|path| Self::open(path)).collect()
    }

    fn open(path: &Path) -> Result<Self> {
        let unusable = |e: std::io::Error| Error::input(format!("{}: {e}", path.display()));
        let file = File::open(path).map_err(unusable)?;
        // SAFETY: the file is farm's own staged copy, or a model file that nobody
        // rewrites in place while a job reads it; a truncation would be a fault.
        let map = unsafe { Mmap::map(&file) }.map_err(unusable)?;
        Ok(Self { path: path.to_owned(), file, map: Arc::new(map) })
    }

    /// What a reader makes of the file.
    pub fn read<T>(&self, read: impl Fn(&[u8]) -> Result<T>) -> Result<T> {
        read(&self.map).map_err(|e| e.context(self.path.display()))
    }
}

/// Named tensors in mapped files.
pub struct TensorTable {
    mapped: Vec<MappedFile>,
    tensors: HashMap<String, Tensor>,
    bytes_read: AtomicU64,
}

/// What is wanted of a tensor, in units (values, or blocks of a quantized type).
struct Cut<'a> {
    tensor: &'a Tensor,
    rows: &'a [Range<usize>],
    units: Range<usize>,
    unit_len: usize,
    unit_bytes: usize,
    /// Read into memory of this rank's own, even where it could be mapped.
    read: bool,
}

impl TensorTable {
    pub(super) fn new(mapped: Vec<MappedFile>, tensors: HashMap<String, Tensor>) -> Self {
        Self { mapped, tensors, bytes_read: AtomicU64::new(0) }
    }

    /// All tensors by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The same to change, in tests.
    #[cfg(test)]
    pub(in crate::model) fn by_name(&mut self) -> &mut HashMap<String, Tensor> {
        &mut self.tensors
    }

    /// The files that they lie in, in order: path and bytes.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &[u8])> {
        self.mapped.iter().map(|file| (file.path.as_path(), &file.map[..]))
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The lengths of a tensor, outermost dimension first.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|tensor| tensor.shape.clone())
    }

    /// What a tensor's values are.
    pub fn dtype(&self, name: &str) -> Option<&StoredDtype> {
        self.tensors.get(name).map(|tensor| &tensor.dtype)
    }

    /// Bytes of tensors handed out so far: what this rank has read or mapped.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// The rows of `place` and the columns `cols` of the matrix `PLACE.weight`, which is
    /// `width` columns wide, stored as `dtype` (`None`: as it is). Blocks are not quantized
    /// again.
    ///
    /// # Errors
    /// The tensor is missing, has another shape or an unsupported type.
    pub fn matrix(
        &self,
        place: &Place,
        width: usize,
        cols: Range<usize>,
        dtype: Option<WeightDtype>,
    ) -> Result<Weight> {
        let name = format!("{}.weight", place.name);
        let tensor = self.tensor(&name, [place.stored_rows, width])?;
        let slice = |cols| self.slice(tensor, &place.rows, cols);
        match (&tensor.dtype, dtype) {
            (StoredDtype::Quant(_), Some(WeightDtype::Quant(_))) => slice(cols),
            (_, Some(WeightDtype::Quant(quant))) => {
                // Whole blocks of the tensor, so that any split of it rounds alike.
                let len = quant.block_len();
                let wide = cols.start / len * len..cols.end.next_multiple_of(len).min(width);
                let keep = cols.start - wide.start..cols.end - wide.start;
                slice(wide)?.quantized(quant, keep)
            }
            (_, dtype) => {
                let weight = slice(cols)?;
                match dtype {
                    Some(dtype) if dtype != weight.dtype() => weight.converted(dtype),
                    _ => Ok(weight),
                }
            }
        }
    }

    /// The rows `rows` (in order) and the columns `cols` of the matrix `name`, of `shape`, as it
    /// is stored.
    ///
    /// # Errors
    /// As [`TensorTable::matrix`].
    pub fn part(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: &[Range<usize>],
        cols: Range<usize>,
    ) -> Result<Weight> {
        self.slice(self.tensor(name, shape)?, rows, cols)
    }

    /// The rows `rows` of the matrix `name` as it is stored, read from the file rather than
    /// mapped: a file that is cut short meanwhile is then an error.
    ///
    /// # Errors
    /// As [`TensorTable::matrix`].
    pub(super) fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Weight> {
        let shape = self.tensors.get(name).map_or([0, 0], |tensor| matrix_shape(&tensor.shape));
        let tensor = self.tensor(name, shape)?;
        self.cut(tensor, std::slice::from_ref(&rows), 0..shape[1], true)
    }

    /// The parts `parts` of the vector `name` of length `len`, one after another, in f32.
    ///
    /// # Errors
    /// As [`TensorTable::matrix`].
    pub fn vector(&self, name: &str, len: usize, parts: &[Range<usize>]) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, [1, len])?;
        let mut out = Vec::new();
        for part in parts {
            let row = self.slice(tensor, std::slice::from_ref(&(0..1)), part.clone())?;
            let first = out.len();
            out.resize(first + part.len(), 0.0);
            row.read_row(0, &mut out[first..]);
        }
        Ok(out)
    }

    /// Why the matrix `name` of `shape` (a vector is one row) cannot be read, as far as headers
    /// say; `None` if it can.
    pub fn problem(&self, name: &str, shape: [usize; 2]) -> Option<String> {
        let Some(tensor) = self.tensors.get(name) else {
            return Some(format!("tensor {name} is missing"));
        };
        if matrix_shape(&tensor.shape) != shape {
            let wanted = match (tensor.shape.len(), shape) {
                (..=1, [1, len]) => format!("[{len}]"),
                (..=2, _) => format!("{shape:?}"),
                (_, [rows, cols]) => format!("{rows} rows of {cols} in all"),
            };
            return Some(format!(
                "tensor {name} has shape {:?}, but the configuration asks for {wanted}",
                tensor.shape
            ));
        }
        let is_unknown = tensor.dtype.unit().is_none();
        is_unknown.then(|| {
            format!("tensor {name} has type {}, which is not supported", tensor.dtype.name())
        })
    }

    fn tensor(&self, name: &str, shape: [usize; 2]) -> Result<&Tensor> {
        let tensor = self.tensors.get(name);
        match (tensor, self.problem(name, shape)) {
            (Some(tensor), None) => Ok(tensor),
            (_, problem) => {
                let file = tensor.and_then(|tensor| tensor.pieces.first()).map_or(0, |p| p.file);
                let file = self.mapped.get(file).map_or("".into(), |f| f.path.to_string_lossy());
                Err(Error::input(format!("{file}: {}", problem.unwrap_or_default())))
            }
        }
    }

    /// The rows `rows` (in order) and columns `cols` of `tensor`.
    fn slice(&self, tensor: &Tensor, rows: &[Range<usize>], cols: Range<usize>) -> Result<Weight> {
        self.cut(tensor, rows, cols, false)
    }

    fn cut(
        &self,
        tensor: &Tensor,
        rows: &[Range<usize>],
        cols: Range<usize>,
        read: bool,
    ) -> Result<Weight> {
        let Some((unit_len, unit_bytes)) = tensor.dtype.unit() else {
            return Err(Error::fault(format!("a tensor of type {}", tensor.dtype.name())));
        };
        let units = cols.start / unit_len..cols.end.div_ceil(unit_len);
        let cut = Cut { tensor, rows, units, unit_len, unit_bytes, read };
        self.bytes_read.fetch_add(cut.bytes() as u64, Ordering::Relaxed);
        let values = match &tensor.dtype {
            StoredDtype::F32 => Values::F32(self.store(&cut)?),
            StoredDtype::F16 => Values::F16(self.store(&cut)?),
            StoredDtype::Bf16 => Values::Bf16(self.store(&cut)?),
            StoredDtype::Quant(quant) => Values::Quant {
                quant: *quant,
                skip: cols.start % unit_len,
                stride: cut.units.len() * unit_bytes,
                blocks: self.store(&cut)?,
            },
            StoredDtype::Other(_) => unreachable!("it has no unit"),
        };
        Ok(Weight::new(cut.num_rows(), cols.len(), values))
    }

    fn store<E: Plain>(&self, cut: &Cut) -> Result<Store<E>> {
        if let (false, Some((piece, offset))) = (cut.read, cut.contiguous()) {
            let map = &self.mapped[piece.file].map;
            if (map.as_ptr() as usize + offset).is_multiple_of(align_of::<E>()) {
                // Read ahead: an in-place model on a parallel file system comes in large
                // requests instead of page by page. Failing is no harm.
                let _ = map.advise_range(Advice::WillNeed, offset, cut.bytes());
                let len = cut.bytes() / size_of::<E>();
                return Ok(Store::Mapped { map: map.clone(), offset, len });
            }
        }
        let mut values = vec![E::default(); cut.bytes() / size_of::<E>()];
        self.copy(cut, E::bytes_mut(&mut values))?;
        Ok(Store::Owned(values))
    }

    /// By pread, so that the other ranks' columns are not mapped here.
    fn copy(&self, cut: &Cut, out: &mut [u8]) -> Result<()> {
        if let Some((piece, offset)) = cut.contiguous() {
            let file = &self.mapped[piece.file];
            return out.par_chunks_mut(READ_BYTES).enumerate().try_for_each(|(i, out)| {
                let at = (offset + i * READ_BYTES) as u64;
                file.file.read_exact_at(out, at).map_err(|e| unreadable(&file.path, e))
            });
        }
        let row_bytes = cut.units.len() * cut.unit_bytes;
        if row_bytes == 0 {
            return Ok(());
        }
        let rows: Vec<usize> = cut.rows.iter().cloned().flatten().collect();
        let rows_a_task = (READ_BYTES / row_bytes).max(1);
        out.par_chunks_mut(rows_a_task * row_bytes).zip(rows.par_chunks(rows_a_task)).try_for_each(
            |(out, rows)| {
                for (out, row) in out.chunks_exact_mut(row_bytes).zip(rows) {
                    self.copy_row(cut, *row, out)?;
                }
                Ok(())
            },
        )
    }

    fn copy_row(&self, cut: &Cut, row: usize, out: &mut [u8]) -> Result<()> {
        for piece in cut.tensor.pieces.iter().filter(|piece| piece.rows.contains(&row)) {
            let of_piece = cut.units_of(piece);
            let wanted = cut.units.start.max(of_piece.start)..cut.units.end.min(of_piece.end);
            if wanted.is_empty() {
                continue;
            }
            let at = (row - piece.rows.start) * of_piece.len() + (wanted.start - of_piece.start);
            let first = (wanted.start - cut.units.start) * cut.unit_bytes;
            let out = &mut out[first..first + wanted.len() * cut.unit_bytes];
            let file = &self.mapped[piece.file];
            file.file
                .read_exact_at(out, (piece.offset + at * cut.unit_bytes) as u64)
                .map_err(|e| unreadable(&file.path, e))?;
        }
        Ok(())
    }
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        let path = path.display();
        return Error::input(format!("{path}: cut short or replaced while it was read?"));
    }
    Error::io(path, error)
}

impl Cut<'_> {
    fn num_rows(&self) -> usize {
        self.rows.iter().map(ExactSizeIterator::len).sum()
    }

    fn bytes(&self) -> usize {
        self.num_rows() * self.units.len() * self.unit_bytes
    }

    fn units_of(&self, piece: &Piece) -> Range<usize> {
        piece.cols.start / self.unit_len..piece.cols.end / self.unit_len
    }

    /// The one place in a file where all of it lies, if there is one.
    fn contiguous(&self) -> Option<(&Piece, usize)> {
        let [rows] = self.rows else { return None };
        let within = |piece: &&Piece| {
            self.units_of(piece) == self.units
                && piece.rows.start <= rows.start
                && rows.end <= piece.rows.end
        };
        let piece = self.tensor.pieces.iter().find(within)?;
        let first = (rows.start - piece.rows.start) * self.units.len();
        Some((piece, piece.offset + first * self.unit_bytes))
    }
}
