//! Weight matrices, wherever their bytes lie.
//!
//! [`Weight`] is the one type that layers hold: values mapped from the staged
//! file, or owned where a slice or a conversion needs a copy. Quantized, packed
//! and device weights are further variants behind the same methods.

use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use crate::kernels::gemm::{self, Element, Matrix};

/// What weights are stored as in memory. `None` in a loader keeps the file's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// 32-bit.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl WeightDtype {
    /// The name that `--dtype` takes.
    pub fn name(self) -> &'static str {
        match self {
            WeightDtype::F32 => "f32",
            WeightDtype::Bf16 => "bf16",
            WeightDtype::F16 => "f16",
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        if self == WeightDtype::F32 { 4 } else { 2 }
    }
}

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

impl<E: Element> Store<E> {
    fn as_slice(&self) -> &[E] {
        match self {
            Store::Owned(values) => values,
            Store::Mapped { map, offset, len } => {
                let bytes = &map[*offset..offset + len * size_of::<E>()];
                assert!(bytes.as_ptr().cast::<E>().is_aligned());
                // SAFETY: in bounds and aligned (checked above); every bit pattern is a
                // value of the float types that implement Element.
                unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), *len) }
            }
        }
    }
}

pub(super) enum Values {
    F32(Store<f32>),
    Bf16(Store<bf16>),
    F16(Store<f16>),
}

/// A weight matrix `[rows, cols]` (output features, input features), rows contiguous.
pub struct Weight {
    rows: usize,
    cols: usize,
    values: Values,
}

impl Weight {
    pub(super) fn new(rows: usize, cols: usize, values: Values) -> Self {
        let weight = Self { rows, cols, values };
        let len = match &weight.values {
            Values::F32(s) => s.as_slice().len(),
            Values::Bf16(s) => s.as_slice().len(),
            Values::F16(s) => s.as_slice().len(),
        };
        assert_eq!(len, rows * cols);
        weight
    }

    /// An owned f32 matrix.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        Self::new(rows, cols, Values::F32(Store::Owned(values)))
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
        match self.values {
            Values::F32(_) => WeightDtype::F32,
            Values::Bf16(_) => WeightDtype::Bf16,
            Values::F16(_) => WeightDtype::F16,
        }
    }

    /// Bytes that this rank holds (or maps) of the matrix.
    pub fn bytes(&self) -> u64 {
        (self.rows * self.cols * self.dtype().size()) as u64
    }

    /// `out[m, rows] = x[m, cols] · selfᵀ + bias`.
    pub fn multiply(&self, x: &[f32], m: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        match &self.values {
            Values::F32(s) => gemm::linear(x, m, self.matrix(s), bias, out),
            Values::Bf16(s) => gemm::linear(x, m, self.matrix(s), bias, out),
            Values::F16(s) => gemm::linear(x, m, self.matrix(s), bias, out),
        }
    }

    /// Row `row` in f32: an embedding look-up.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Values::F32(s) => gemm::widen(&s.as_slice()[range], out),
            Values::Bf16(s) => gemm::widen(&s.as_slice()[range], out),
            Values::F16(s) => gemm::widen(&s.as_slice()[range], out),
        }
    }

    fn matrix<'a, E: Element>(&self, store: &'a Store<E>) -> Matrix<'a, E> {
        Matrix { data: store.as_slice(), rows: self.rows, cols: self.cols, stride: self.cols }
    }
}
