//! Device memory: allocations, and runs of values in them.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::Driver;
use crate::Result;

/// What an array's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed integer.
    I32,
    /// Unsigned integer.
    U32,
    /// Bytes: blocks of quantized weights, structures.
    U8,
    /// Addresses.
    U64,
}

impl Dtype {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::U8 => 1,
            Dtype::U64 => 8,
        }
    }

    /// What names of kernels end with.
    pub fn suffix(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::I32 => "i32",
            Dtype::U32 => "u32",
            Dtype::U8 => "u8",
            Dtype::U64 => "u64",
        }
    }
}

/// A type of values that host and device share.
pub trait Element: Copy + Default + Send + Sync + sealed::Plain + 'static {
    /// What it is on the device.
    const DTYPE: Dtype;
}

mod sealed {
    /// Types without padding and of which every bit pattern is a value.
    pub trait Plain {}
}

macro_rules! elements {
    ($($host:ty => $dtype:ident),*) => {$(
        impl sealed::Plain for $host {}
        impl Element for $host {
            const DTYPE: Dtype = Dtype::$dtype;
        }
    )*};
}
elements!(f32 => F32, f16 => F16, bf16 => Bf16, i32 => I32, u32 => U32, u8 => U8, u64 => U64);

/// The bytes of values.
pub fn bytes_of<E: Element>(values: &[E]) -> &[u8] {
    // SAFETY: elements have no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of values, to be overwritten.
pub fn bytes_of_mut<E: Element>(values: &mut [E]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are values.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Memory that is given back when nothing refers to it any more.
pub(super) struct Allocation {
    driver: Arc<dyn Driver>,
    address: u64,
    bytes: usize,
}

impl Allocation {
    pub(super) fn new(driver: Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        let address = if bytes == 0 { 0 } else { driver.allocate(bytes)? };
        Ok(Self { driver, address, bytes })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.driver.free(self.address, self.bytes);
        }
    }
}

/// A run of values in device memory. Clones and slices share it: kernels write through any of
/// them.
#[derive(Clone)]
pub struct Array {
    allocation: Arc<Allocation>,
    offset_bytes: usize,
    dtype: Dtype,
    len: usize,
}

impl Array {
    pub(super) fn new(allocation: Arc<Allocation>, dtype: Dtype, len: usize) -> Self {
        Self { allocation, offset_bytes: 0, dtype, len }
    }

    /// Values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What they are.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Their bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.bytes()
    }

    /// Where they are on the device.
    pub fn address(&self) -> u64 {
        self.allocation.address + self.offset_bytes as u64
    }

    /// Some of them.
    ///
    /// # Panics
    /// If they are not all there.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        Self {
            offset_bytes: self.offset_bytes + range.start * self.dtype.bytes(),
            len: range.len(),
            ..self.clone()
        }
    }

    /// The first `len`.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn first(&self, len: usize) -> Self {
        self.slice(0..len)
    }

    /// The same bytes as another type.
    ///
    /// # Panics
    /// If they are no whole number of values.
    #[must_use]
    pub fn cast(&self, dtype: Dtype) -> Self {
        assert!(self.bytes().is_multiple_of(dtype.bytes()));
        Self { dtype, len: self.bytes() / dtype.bytes(), ..self.clone() }
    }
}

impl std::fmt::Debug for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} × {}", self.len, self.dtype.suffix())
    }
}
