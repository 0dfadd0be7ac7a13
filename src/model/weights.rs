//! Weight matrices, wherever their bytes lie.
//!
//! [`Weight`] is the one type that layers hold: values mapped from the staged
//! file, or owned where a slice or a conversion needs a copy; floats, or ggml's blocks
//! which are used as they are. Packed and device weights would be further variants behind
//! the same methods.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use crate::Result;
use crate::kernels::gemm::{self, Element, Matrix};
use crate::kernels::quant::{self, QuantMatrix, QuantType};

/// What weights are stored as in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// 32-bit.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// ggml's blocks.
    Quant(QuantType),
}

impl WeightDtype {
    /// The name that `--dtype` or `--quantize` takes.
    pub fn name(self) -> &'static str {
        match self {
            WeightDtype::F32 => "f32",
            WeightDtype::Bf16 => "bf16",
            WeightDtype::F16 => "f16",
            WeightDtype::Quant(quant) => quant.name(),
        }
    }

    /// Bytes of a value; ggml's blocks share out what belongs to all of a block.
    pub fn bytes_a_value(self) -> f64 {
        match self {
            WeightDtype::F32 => 4.0,
            WeightDtype::Bf16 | WeightDtype::F16 => 2.0,
            WeightDtype::Quant(quant) => quant.block_bytes() as f64 / quant.block_len() as f64,
        }
    }
}

/// A type of which every bit pattern is a value.
///
/// # Safety
/// It has no padding and no invalid values.
pub(super) unsafe trait Plain: Copy + Default + Send + Sync + 'static {
    /// The bytes of values.
    fn bytes_mut(values: &mut [Self]) -> &mut [u8] {
        // SAFETY: as long as the values; any bytes are values.
        unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
    }
}

// SAFETY: floats and bytes have neither padding nor invalid values.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for bf16 {}
// SAFETY: as above.
unsafe impl Plain for f16 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}

/// Values in a mapped file or on the heap.
pub(super) enum Store<E> {
    Owned(Vec<E>),
    /// `len` aligned values from byte `offset` of the map.
    Mapped {
        map: Arc<Mmap>,
        offset: usize,
        len: usize,
    },
}

impl<E: Plain> Store<E> {
    fn as_slice(&self) -> &[E] {
        match self {
            Store::Owned(values) => values,
            Store::Mapped { map, offset, len } => {
                let bytes = &map[*offset..offset + len * size_of::<E>()];
                assert!(bytes.as_ptr().cast::<E>().is_aligned());
                // SAFETY: in bounds and aligned (checked above); every bit pattern is a value.
                unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), *len) }
            }
        }
    }
}

pub(super) enum Values {
    F32(Store<f32>),
    Bf16(Store<bf16>),
    F16(Store<f16>),
    Quant {
        quant: QuantType,
        activations: Activations,
        /// Values of a row's first block that are not its own.
        skip: usize,
        /// Bytes of a row.
        stride: usize,
        blocks: Store<u8>,
    },
}

/// What quantized weights are multiplied with on the CPU. Others take activations as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// Activations rounded to 8 bits, in products of integers: see [`quant::int8`].
    #[default]
    Int8,
    /// Activations as they are, with weights widened to f32.
    F32,
}

/// A matrix's values as they are stored, row-major.
pub enum Stored<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE halves.
    F16(&'a [f16]),
    /// ggml's blocks.
    Quant(QuantMatrix<'a>),
}

/// Rows that are quantized together.
const ROWS_AT_ONCE: usize = 256;

/// A weight matrix `[rows, cols]` (output features, input features), rows contiguous.
pub struct Weight {
    rows: usize,
    cols: usize,
    values: Values,
}

impl Weight {
    pub(super) fn new(rows: usize, cols: usize, values: Values) -> Self {
        let weight = Self { rows, cols, values };
        let holds = match &weight.values {
            Values::F32(s) => s.as_slice().len() == rows * cols,
            Values::Bf16(s) => s.as_slice().len() == rows * cols,
            Values::F16(s) => s.as_slice().len() == rows * cols,
            Values::Quant { quant, skip, stride, blocks, .. } => {
                blocks.as_slice().len() == rows * stride
                    && stride / quant.block_bytes() * quant.block_len() >= skip + cols
            }
        };
        assert!(holds, "a weight of {rows} by {cols} without its values");
        weight
    }

    /// An owned f32 matrix.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        Self::new(rows, cols, Values::F32(Store::Owned(values)))
    }

    /// The same, multiplied with activations of this kind; they are taken as they are else.
    pub fn with_activations(mut self, kind: Activations) -> Self {
        if let Values::Quant { activations, .. } = &mut self.values {
            *activations = kind;
        }
        self
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What the values are stored as.
    pub fn dtype(&self) -> WeightDtype {
        match &self.values {
            Values::F32(_) => WeightDtype::F32,
            Values::Bf16(_) => WeightDtype::Bf16,
            Values::F16(_) => WeightDtype::F16,
            Values::Quant { quant, .. } => WeightDtype::Quant(*quant),
        }
    }

    /// Bytes that this rank holds (or maps) of the matrix.
    pub fn bytes(&self) -> u64 {
        let len = self.rows * self.cols;
        (match &self.values {
            Values::F32(_) => 4 * len,
            Values::Bf16(_) | Values::F16(_) => 2 * len,
            Values::Quant { stride, .. } => self.rows * stride,
        }) as u64
    }

    /// Bytes of it that are this rank's own: not mapped from a file.
    pub fn owned_bytes(&self) -> u64 {
        let mapped = match &self.values {
            Values::F32(s) => matches!(s, Store::Mapped { .. }),
            Values::Bf16(s) => matches!(s, Store::Mapped { .. }),
            Values::F16(s) => matches!(s, Store::Mapped { .. }),
            Values::Quant { blocks, .. } => matches!(blocks, Store::Mapped { .. }),
        };
        if mapped { 0 } else { self.bytes() }
    }

    /// The values, for a copy elsewhere.
    pub fn stored(&self) -> Stored<'_> {
        match &self.values {
            Values::F32(s) => Stored::F32(s.as_slice()),
            Values::Bf16(s) => Stored::Bf16(s.as_slice()),
            Values::F16(s) => Stored::F16(s.as_slice()),
            Values::Quant { quant, skip, stride, blocks, .. } => {
                Stored::Quant(self.blocks(*quant, *skip, *stride, blocks))
            }
        }
    }

    /// `out[m, rows] = x[m, cols] · selfᵀ + bias`.
    pub fn multiply(&self, x: &[f32], m: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        match &self.values {
            Values::F32(s) => gemm::linear(x, m, self.matrix(s), bias, out),
            Values::Bf16(s) => gemm::linear(x, m, self.matrix(s), bias, out),
            Values::F16(s) => gemm::linear(x, m, self.matrix(s), bias, out),
            Values::Quant { quant, activations, skip, stride, blocks } => {
                let w = self.blocks(*quant, *skip, *stride, blocks);
                match activations {
                    Activations::Int8 => quant::int8::linear(x, m, w, bias, out),
                    Activations::F32 => quant::linear(x, m, w, bias, out),
                }
            }
        }
    }

    /// `out[m, cols] (+)= y[m, rows] · self`: a gradient taken back through
    /// [`multiply`](Self::multiply) of f32 activations. With `accumulate` it is added to `out`.
    pub fn multiply_back(&self, y: &[f32], m: usize, accumulate: bool, out: &mut [f32]) {
        match &self.values {
            Values::F32(s) => gemm::multiply(y, m, self.matrix(s), accumulate, out),
            Values::Bf16(s) => gemm::multiply(y, m, self.matrix(s), accumulate, out),
            Values::F16(s) => gemm::multiply(y, m, self.matrix(s), accumulate, out),
            Values::Quant { quant, skip, stride, blocks, .. } => {
                let w = self.blocks(*quant, *skip, *stride, blocks);
                quant::multiply(y, m, w, accumulate, out);
            }
        }
    }

    /// Row `row` in f32: an embedding look-up.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Values::F32(s) => gemm::widen(&s.as_slice()[range], out),
            Values::Bf16(s) => gemm::widen(&s.as_slice()[range], out),
            Values::F16(s) => gemm::widen(&s.as_slice()[range], out),
            Values::Quant { quant, skip, stride, blocks, .. } => {
                quant::read_row(self.blocks(*quant, *skip, *stride, blocks), row, out);
            }
        }
    }

    /// All values in f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.rows * self.cols];
        for (row, out) in wide.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.read_row(row, out);
        }
        wide
    }

    /// The same values stored as another type (rounded to nearest where it is narrower).
    ///
    /// # Errors
    /// See [`Weight::quantized`].
    pub fn converted(&self, dtype: WeightDtype) -> Result<Weight> {
        let wide = self.to_f32();
        let values = match dtype {
            WeightDtype::F32 => Values::F32(Store::Owned(wide)),
            WeightDtype::Bf16 => {
                Values::Bf16(Store::Owned(wide.into_iter().map(bf16::from_f32).collect()))
            }
            WeightDtype::F16 => {
                Values::F16(Store::Owned(wide.into_iter().map(f16::from_f32).collect()))
            }
            WeightDtype::Quant(quant) => return self.quantized(quant, 0..self.cols),
        };
        Ok(Weight::new(self.rows, self.cols, values))
    }

    /// The columns `keep` of this matrix, quantized by whole blocks from its first column on.
    ///
    /// # Errors
    /// A type that farm does not quantize to.
    pub fn quantized(&self, quant: QuantType, keep: Range<usize>) -> Result<Weight> {
        let stride = quant.row_bytes(self.cols);
        let mut blocks = Vec::with_capacity(self.rows * stride);
        // Some rows at a time: enough for all threads, without a whole copy in f32.
        let mut wide = vec![0.0; ROWS_AT_ONCE.min(self.rows) * self.cols];
        for first in (0..self.rows).step_by(ROWS_AT_ONCE) {
            let rows = ROWS_AT_ONCE.min(self.rows - first);
            let wide = &mut wide[..rows * self.cols];
            for (row, out) in (first..).zip(wide.chunks_exact_mut(self.cols.max(1))) {
                self.read_row(row, out);
            }
            quant::quantize_rows(quant, wide, self.cols, &mut blocks)?;
        }
        let blocks = Store::Owned(blocks);
        let activations = Activations::F32;
        let values = Values::Quant { quant, activations, skip: keep.start, stride, blocks };
        Ok(Weight::new(self.rows, keep.len(), values))
    }

    fn matrix<'a, E: Element + Plain>(&self, store: &'a Store<E>) -> Matrix<'a, E> {
        Matrix { data: store.as_slice(), rows: self.rows, cols: self.cols, stride: self.cols }
    }

    fn blocks<'a>(
        &self,
        quant: QuantType,
        skip: usize,
        stride: usize,
        blocks: &'a Store<u8>,
    ) -> QuantMatrix<'a> {
        let (rows, cols) = (self.rows, self.cols);
        QuantMatrix { data: blocks.as_slice(), quant, rows, cols, skip, stride }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::random;

    #[test]
    fn whatever_values_are_stored_as_products_take_the_same_ones() {
        let (rows, cols, m) = (6, 256, 3);
        let base = Weight::from_f32(rows, cols, random(rows * cols, 1));
        let converted = |dtype| base.converted(dtype).unwrap();
        let cut = base.quantized(QuantType::Q8_0, 24..200).unwrap();
        let all = [
            converted(WeightDtype::Bf16),
            converted(WeightDtype::F16),
            converted(WeightDtype::Quant(QuantType::Q4_K)),
            cut,
        ];
        for weight in all {
            let wide = Weight::from_f32(rows, weight.cols(), weight.to_f32());
            let (x, y) = (random(m * wide.cols(), 2), random(m * rows, 3));
            let products = |weight: &Weight| {
                let (mut forward, mut back) = (vec![0.0; y.len()], x.clone());
                weight.multiply(&x, m, None, &mut forward);
                weight.multiply_back(&y, m, true, &mut back);
                (forward, back)
            };
            assert_eq!(products(&weight), products(&wide), "{:?}", weight.dtype());
        }
    }
}
