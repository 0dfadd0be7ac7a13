//! A device whose memory is the host's and whose kernels run on the CPU: the same `.cu` files,
//! compiled by a C++ compiler (see `kernels/emulator.h`). For tests of kernels and of
//! everything above them.
//!
//! Every allocation ends at a page that cannot be touched, so an access beyond an array ends
//! the test where it happens. Recorded work is a list that is run again.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::gemm::Call;
use super::{Device, Driver, Dtype, Launch, Properties, Replay};
use crate::{Error, Result};

const PAGE: usize = 4096;
/// What tensor-core tiles ask of addresses; an access closer behind an array goes unseen.
const ALIGNMENT: usize = 32;
const MEMORY_BYTES: u64 = 2 << 30;

unsafe extern "C" {
    fn farm_emulator_launch(
        name: *const c_char,
        grid: *const c_uint,
        block: *const c_uint,
        shared_bytes: usize,
        arguments: *mut *mut c_void,
        order: c_uint,
    ) -> c_int;
}

/// The order in which the threads of a block run between two barriers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadOrder {
    /// By number.
    Rising,
    /// The last first.
    Falling,
    /// By this seed, from 2.
    Shuffled(u32),
}

impl ThreadOrder {
    fn number(self) -> c_uint {
        match self {
            ThreadOrder::Rising => 0,
            ThreadOrder::Falling => 1,
            ThreadOrder::Shuffled(seed) => seed.max(2),
        }
    }
}

/// An emulated device of its own.
pub fn open(order: ThreadOrder) -> Device {
    let properties = Properties {
        name: "emulator".into(),
        compute_capability: (9, 0),
        multiprocessors: 4,
        memory_bytes: MEMORY_BYTES,
        shared_bytes_a_block: 227 << 10,
        emulated: true,
    };
    open_as(properties, order)
}

/// An emulated device that says it is another.
pub fn open_as(properties: Properties, order: ThreadOrder) -> Device {
    let state =
        Arc::new(State { order, used_bytes: AtomicU64::new(0), recording: Mutex::new(None) });
    Device::new(Arc::new(Emulator { properties, state }))
}

struct Emulator {
    properties: Properties,
    state: Arc<State>,
}

struct State {
    order: ThreadOrder,
    used_bytes: AtomicU64,
    recording: Mutex<Option<Vec<Work>>>,
}

/// What can be recorded.
#[derive(Clone)]
enum Work {
    Launch {
        kernel: String,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        arguments: Vec<u64>,
    },
    Gemm(Call),
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    Zero {
        to: u64,
        bytes: usize,
    },
}

struct Recorded {
    state: Arc<State>,
    work: Vec<Work>,
}

impl Replay for Recorded {
    fn replay(&self) -> Result<()> {
        self.work.iter().try_for_each(|work| self.state.run(work))
    }
}

impl State {
    /// Runs it, or records it.
    fn queue(&self, work: Work) -> Result<()> {
        let mut recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *recording {
            Some(list) => list.push(work),
            None => return self.run(&work),
        }
        Ok(())
    }

    fn run(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch { kernel, grid, block, shared_bytes, arguments } => {
                self.launch(kernel, grid, block, *shared_bytes, arguments)
            }
            Work::Gemm(call) => {
                multiply(call);
                Ok(())
            }
            Work::Copy { from, to, bytes } => {
                // SAFETY: addresses of live allocations, by the callers of `Driver`.
                unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) };
                Ok(())
            }
            Work::Zero { to, bytes } => {
                // SAFETY: as above.
                unsafe { std::ptr::write_bytes(*to as *mut u8, 0, *bytes) };
                Ok(())
            }
        }
    }

    fn launch(
        &self,
        kernel: &str,
        grid: &[u32; 3],
        block: &[u32; 3],
        shared_bytes: usize,
        arguments: &[u64],
    ) -> Result<()> {
        let name = CString::new(kernel).map_err(Error::fault)?;
        let mut values = arguments.to_vec();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        // SAFETY: the kernel reads as many arguments as it has, which the caller gave; it
        // reaches the arrays among them.
        let outcome = unsafe {
            farm_emulator_launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared_bytes,
                pointers.as_mut_ptr(),
                self.order.number(),
            )
        };
        match outcome {
            0 => Ok(()),
            1 => Err(Error::fault(format!("there is no kernel {kernel}"))),
            _ => Err(Error::fault(format!(
                "kernel {kernel}: {grid:?} blocks of {block:?} threads with {shared_bytes} bytes of \
                 shared memory are more than a device has"
            ))),
        }
    }

    fn not_while_recording(&self) -> Result<()> {
        match *self.recording.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(_) => Err(Error::fault("this cannot be recorded")),
            None => Ok(()),
        }
    }
}

impl Driver for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.state.not_while_recording()?;
        let free = self.free_bytes()?;
        if bytes as u64 > free {
            return Err(super::no_memory(bytes, free));
        }
        let (pages, room) = mapping(bytes);
        // SAFETY: new pages; the last is made untouchable.
        let start = unsafe {
            let start = mmap_anonymous(
                null_mut(),
                pages,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
            .map_err(|error| Error::fault(format!("{bytes} bytes for the emulator: {error}")))?;
            mprotect(start.byte_add(pages - PAGE), PAGE, MprotectFlags::empty())
                .map_err(|error| Error::fault(format!("a guard page: {error}")))?;
            start
        };
        self.state.used_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(start as u64 + (pages - PAGE - room) as u64)
    }

    fn free(&self, address: u64, bytes: usize) {
        let (pages, room) = mapping(bytes);
        let start = address - (pages - PAGE - room) as u64;
        // SAFETY: what `allocate` mapped for as many bytes.
        let _ = unsafe { munmap(start as *mut c_void, pages) };
        self.state.used_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        self.state.not_while_recording()?;
        // SAFETY: as many bytes of a live allocation, by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.state.not_while_recording()?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.state.queue(Work::Copy { from, to, bytes })
    }

    fn zero(&self, to: u64, bytes: usize) -> Result<()> {
        self.state.queue(Work::Zero { to, bytes })
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.state.queue(Work::Launch {
            kernel: launch.kernel.to_owned(),
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            arguments: launch.arguments.clone(),
        })
    }

    fn gemm(&self, gemm: &Call) -> Result<()> {
        self.state.queue(Work::Gemm(gemm.clone()))
    }

    fn synchronize(&self) -> Result<()> {
        self.state.not_while_recording()
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(MEMORY_BYTES.saturating_sub(self.state.used_bytes.load(Ordering::Relaxed)))
    }

    fn begin_capture(&self) -> Result<()> {
        *self.state.recording.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Replay>> {
        let work = self.state.recording.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Box::new(Recorded { state: self.state.clone(), work: work.unwrap_or_default() }))
    }

    fn stream(&self) -> u64 {
        0
    }
}

/// Bytes that are mapped for an allocation, the guard page among them, and those before it
/// from the allocation's start.
fn mapping(bytes: usize) -> (usize, usize) {
    let room = bytes.next_multiple_of(ALIGNMENT);
    (room.next_multiple_of(PAGE) + PAGE, room)
}

fn multiply(call: &Call) {
    let a = operand(call, call.a, call.a_stride, call.transpose_a, [call.m, call.k]);
    // As rows of k for each column of the result.
    let b = operand(call, call.b, call.b_stride, !call.transpose_b, [call.n, call.k]);
    for row in 0..call.m {
        for col in 0..call.n {
            let (x, w) = (&a[row * call.k..][..call.k], &b[col * call.k..][..call.k]);
            let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            let at = row * call.c_stride + col;
            let before = if call.beta == 0.0 { 0.0 } else { load(call.c, call.result, at) };
            store(call.c, call.result, at, call.alpha * sum + call.beta * before);
        }
    }
}

/// The matrix `[rows, cols]` in f32; `across`: it is stored the other way round.
fn operand(
    call: &Call,
    at: u64,
    stride: usize,
    across: bool,
    [rows, cols]: [usize; 2],
) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            let place = if across { col * stride + row } else { row * stride + col };
            values.push(load(at, call.operands, place));
        }
    }
    values
}

fn load(array: u64, dtype: Dtype, at: usize) -> f32 {
    // SAFETY: inside an array that `Gemm` has checked.
    unsafe {
        match dtype {
            Dtype::F16 => (*(array as *const f16).add(at)).to_f32(),
            Dtype::Bf16 => (*(array as *const bf16).add(at)).to_f32(),
            _ => *(array as *const f32).add(at),
        }
    }
}

fn store(array: u64, dtype: Dtype, at: usize, value: f32) {
    // SAFETY: as above.
    unsafe {
        match dtype {
            Dtype::F16 => *(array as *mut f16).add(at) = f16::from_f32(value),
            Dtype::Bf16 => *(array as *mut bf16).add(at) = bf16::from_f32(value),
            _ => *(array as *mut f32).add(at) = value,
        }
    }
}
