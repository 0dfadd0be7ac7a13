//! A GPU: its memory, the launch of farm's own kernels, matrix products, and the replay of
//! recorded launches.
//!
//! [`Device`] is what the other layers see; behind it is a `Driver`: [`nvidia`] for CUDA
//! (feature `cuda`), or an emulator that runs the same kernels on the CPU for tests
//! (feature `emulator`). Kernels are the `.cu` files in `kernels/`; what calls them is beside
//! this file, by subject. Everything a device does is queued on one stream, in order.
//!
//! Left out: several streams, several devices a rank, and memory that host and device share.

pub mod array;
pub mod attention;
pub mod choice;
pub mod collectives;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod experts;
pub mod gemm;
#[cfg(feature = "cuda")]
mod libraries;
pub mod linear;
#[cfg(feature = "nccl")]
pub mod nccl;
#[cfg(feature = "cuda")]
pub mod nvidia;
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub mod nvml;
pub mod ops;
pub mod sampling;
#[cfg(all(test, feature = "emulator"))]
pub mod testing;
pub mod train;
pub mod usage;

use std::sync::Arc;

pub use array::{Array, Dtype, Element};
pub use collectives::DeviceComm;
pub use gemm::Gemm;

use crate::{Error, Result};
use array::Allocation;
use choice::{Built, NoDevice, Visible};

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// As the driver names it.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// All memory.
    pub memory_bytes: u64,
    /// Shared memory that a block can have by asking for it.
    pub shared_bytes_a_block: usize,
    /// It is the tests' emulator.
    pub emulated: bool,
}

impl Properties {
    /// Whether bf16 products run on the tensor cores (compute capability 8.0).
    pub fn has_bf16(&self) -> bool {
        self.compute_capability >= (8, 0)
    }
}

/// A kernel's argument.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// The address of an array.
    Array(&'a Array),
    /// No array: a null pointer.
    Null,
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `float`.
    F32(f32),
    /// `unsigned long long`.
    U64(u64),
}

impl Arg<'_> {
    /// The argument's bytes, in the low end of eight.
    fn bits(self) -> u64 {
        match self {
            Arg::Array(array) => array.address(),
            Arg::Null => 0,
            Arg::I32(value) => u64::from(value as u32),
            Arg::U32(value) => u64::from(value),
            Arg::F32(value) => u64::from(value.to_bits()),
            Arg::U64(value) => value,
        }
    }
}

impl<'a> From<&'a Array> for Arg<'a> {
    fn from(array: &'a Array) -> Self {
        Arg::Array(array)
    }
}

impl<'a> From<Option<&'a Array>> for Arg<'a> {
    fn from(array: Option<&'a Array>) -> Self {
        array.map_or(Arg::Null, Arg::Array)
    }
}

impl From<i32> for Arg<'_> {
    fn from(value: i32) -> Self {
        Arg::I32(value)
    }
}

impl From<u32> for Arg<'_> {
    fn from(value: u32) -> Self {
        Arg::U32(value)
    }
}

impl From<f32> for Arg<'_> {
    fn from(value: f32) -> Self {
        Arg::F32(value)
    }
}

impl From<u64> for Arg<'_> {
    fn from(value: u64) -> Self {
        Arg::U64(value)
    }
}

impl From<usize> for Arg<'_> {
    /// As `int`.
    ///
    /// # Panics
    /// Beyond 2³¹: kernels count with `int` (a bug, sizes are checked before).
    fn from(value: usize) -> Self {
        Arg::I32(i32::try_from(value).expect("a kernel's count fits an int"))
    }
}

/// A launch: kernel, shape, arguments.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Launch<'a> {
    kernel: &'a str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
    /// Each argument's bytes.
    arguments: Vec<u64>,
}

/// Recorded work that can run again.
pub(crate) trait Replay: Send + Sync {
    /// Queues all of it.
    fn replay(&self) -> Result<()>;
}

/// What makes a device.
pub(crate) trait Driver: Send + Sync {
    /// What it is.
    fn properties(&self) -> &Properties;
    /// Memory of that many bytes, at an address that is a multiple of 256.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// Gives memory back when what is queued has run.
    fn free(&self, address: u64, bytes: usize);
    /// Copies to the device; `from` may change when it returns.
    fn write(&self, to: u64, from: &[u8]) -> Result<()>;
    /// Waits for what is queued, then copies to the host.
    fn read(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Queues a copy.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    /// Queues zeros.
    fn zero(&self, to: u64, bytes: usize) -> Result<()>;
    /// Queues a kernel.
    fn launch(&self, launch: &Launch) -> Result<()>;
    /// Queues a product.
    fn gemm(&self, gemm: &gemm::Call) -> Result<()>;
    /// Waits for what is queued.
    fn synchronize(&self) -> Result<()>;
    /// Memory that is free.
    fn free_bytes(&self) -> Result<u64>;
    /// From here on work is recorded and does not run.
    fn begin_capture(&self) -> Result<()>;
    /// Ends that.
    fn end_capture(&self) -> Result<Box<dyn Replay>>;
    /// The queue as CUDA's libraries take it; 0 where there is none.
    #[cfg_attr(not(feature = "nccl"), expect(dead_code, reason = "only NCCL asks"))]
    fn stream(&self) -> u64;
}

/// A device. Clones are the same one.
#[derive(Clone)]
pub struct Device {
    driver: Arc<dyn Driver>,
}

/// Work that was recorded by [`Device::capture`].
pub struct Graph(Box<dyn Replay>);

impl Device {
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Self {
        Self { driver }
    }

    /// An emulated device of its own.
    #[cfg(feature = "emulator")]
    pub fn emulated() -> Self {
        emulator::open(emulator::ThreadOrder::Rising)
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        self.driver.properties()
    }

    /// An array of zeros.
    ///
    /// # Errors
    /// No memory: how much was asked for and is free.
    pub fn array(&self, dtype: Dtype, len: usize) -> Result<Array> {
        let array = self.uninitialised(dtype, len)?;
        self.fill_zero(&array)?;
        Ok(array)
    }

    /// An array that the caller fills.
    ///
    /// # Errors
    /// See [`Device::array`].
    pub fn uninitialised(&self, dtype: Dtype, len: usize) -> Result<Array> {
        let allocation = Allocation::new(self.driver.clone(), len * dtype.bytes())?;
        Ok(Array::new(Arc::new(allocation), dtype, len))
    }

    /// These values.
    ///
    /// # Errors
    /// See [`Device::array`].
    pub fn upload<E: Element>(&self, values: &[E]) -> Result<Array> {
        let array = self.uninitialised(E::DTYPE, values.len())?;
        self.write(&array, values)?;
        Ok(array)
    }

    /// Writes values into the array's start.
    ///
    /// # Errors
    /// A fault of the driver.
    ///
    /// # Panics
    /// If they are of another type or too many.
    pub fn write<E: Element>(&self, to: &Array, values: &[E]) -> Result<()> {
        assert_eq!(to.dtype(), E::DTYPE);
        self.write_bytes(to, array::bytes_of(values))
    }

    /// Writes bytes into the array's start.
    ///
    /// # Errors
    /// A fault of the driver.
    ///
    /// # Panics
    /// If they are too many.
    pub fn write_bytes(&self, to: &Array, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= to.bytes(), "{} bytes into {}", bytes.len(), to.bytes());
        if bytes.is_empty() { Ok(()) } else { self.driver.write(to.address(), bytes) }
    }

    /// The array's values, when all that was queued has run.
    ///
    /// # Errors
    /// A fault of the driver, or of a kernel before.
    ///
    /// # Panics
    /// If they are of another type.
    pub fn read<E: Element>(&self, from: &Array) -> Result<Vec<E>> {
        let mut values = vec![E::default(); from.len()];
        self.read_into(from, &mut values)?;
        Ok(values)
    }

    /// The array's first values, into `to`.
    ///
    /// # Errors
    /// See [`Device::read`].
    ///
    /// # Panics
    /// If they are of another type, or fewer.
    pub fn read_into<E: Element>(&self, from: &Array, to: &mut [E]) -> Result<()> {
        assert_eq!(from.dtype(), E::DTYPE);
        assert!(to.len() <= from.len());
        if to.is_empty() {
            return Ok(());
        }
        self.driver.read(from.address(), array::bytes_of_mut(to))
    }

    /// Copies an array to another of as many bytes.
    ///
    /// # Errors
    /// A fault of the driver.
    ///
    /// # Panics
    /// If their sizes differ.
    pub fn copy(&self, from: &Array, to: &Array) -> Result<()> {
        assert_eq!(from.bytes(), to.bytes());
        if from.bytes() == 0 {
            return Ok(());
        }
        self.driver.copy(from.address(), to.address(), from.bytes())
    }

    /// Makes all its bytes 0.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn fill_zero(&self, array: &Array) -> Result<()> {
        if array.bytes() == 0 {
            return Ok(());
        }
        self.driver.zero(array.address(), array.bytes())
    }

    /// Queues a kernel; a grid without blocks is nothing to do. Arguments must be what the
    /// kernel takes: nothing checks that.
    ///
    /// # Errors
    /// A kernel or a shape that the device does not have.
    pub fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        arguments: &[Arg],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let arguments = arguments.iter().map(|argument| argument.bits()).collect();
        self.driver.launch(&Launch { kernel, grid, block, shared_bytes, arguments })
    }

    /// Queues a matrix product.
    ///
    /// # Errors
    /// A fault of the driver.
    ///
    /// # Panics
    /// If the arrays are too short or of types that do not go together.
    pub fn gemm(&self, gemm: &Gemm) -> Result<()> {
        match gemm.call() {
            Some(call) => self.driver.gemm(&call),
            None => Ok(()),
        }
    }

    /// Waits for all that is queued.
    ///
    /// # Errors
    /// A fault of the driver, or of a kernel before.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }

    /// Memory that nothing holds, in bytes.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn free_bytes(&self) -> Result<u64> {
        self.driver.free_bytes()
    }

    /// Records what `work` queues, without running it. It must neither allocate, write nor read.
    ///
    /// # Errors
    /// What `work` returns; a device that cannot record it.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.driver.begin_capture()?;
        // Also where `work` panics: a queue that records runs nothing.
        let recording = Recording(Some(&*self.driver));
        let done = work();
        let recorded = recording.end();
        done?;
        Ok(Graph(recorded?))
    }

    /// The queue as CUDA's libraries take it.
    #[cfg(feature = "nccl")]
    pub(crate) fn stream(&self) -> u64 {
        self.driver.stream()
    }
}

/// Ends when it goes.
struct Recording<'a>(Option<&'a dyn Driver>);

impl Recording<'_> {
    fn end(mut self) -> Result<Box<dyn Replay>> {
        match self.0.take() {
            Some(driver) => driver.end_capture(),
            None => Err(Error::fault("nothing is recorded")),
        }
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Some(driver) = self.0.take() {
            let _ = driver.end_capture();
        }
    }
}

impl Graph {
    /// Queues the recorded work.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn replay(&self) -> Result<()> {
        self.0.replay()
    }
}

/// The GPUs that the driver shows to this process.
///
/// # Errors
/// Why there can be none. (A driver that shows none is an empty list.)
#[cfg(feature = "cuda")]
pub fn visible() -> Result<Vec<Visible>, NoDevice> {
    nvidia::cards()
}

/// The GPUs that the driver shows to this process.
///
/// # Errors
/// Always: there is no code for a driver in this farm.
#[cfg(not(feature = "cuda"))]
pub fn visible() -> Result<Vec<Visible>, NoDevice> {
    Err(NoDevice::NotBuilt)
}

/// Opens a GPU of [`visible`], by its ordinal.
///
/// # Errors
/// See [`nvidia::open`].
#[cfg(feature = "cuda")]
pub fn open(ordinal: usize) -> Result<Device> {
    nvidia::open(ordinal)
}

/// Opens a GPU of [`visible`], by its ordinal.
///
/// # Errors
/// Always: there is no code for a driver in this farm.
#[cfg(not(feature = "cuda"))]
pub fn open(ordinal: usize) -> Result<Device> {
    Err(Error::fault(format!("GPU {ordinal}: {}", NoDevice::NotBuilt)))
}

/// The cards that the kernels were compiled for.
pub fn built() -> Built {
    #[cfg(feature = "cuda")]
    let list = nvidia::BUILT_FOR;
    #[cfg(not(feature = "cuda"))]
    let list = "";
    Built::parse(list)
}

/// Blocks of `threads` for `len` items.
pub fn blocks(len: usize, threads: usize) -> u32 {
    u32::try_from(len.div_ceil(threads)).unwrap_or(u32::MAX)
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
fn no_memory(bytes: usize, free: u64) -> Error {
    let mib = |bytes: u64| bytes >> 20;
    Error::input(format!(
        "the device has {} MiB free and {} MiB more are needed: use --tensor-parallel over more \
         devices, --quantize, or a smaller --max-batched-tokens, --max-batch-size or \
         --kv-cache-memory",
        mib(free),
        mib(bytes as u64)
    ))
}
