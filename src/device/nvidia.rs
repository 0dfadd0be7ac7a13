//! A GPU through the CUDA driver, cuBLAS for matrix products.
//!
//! The libraries are looked for when the device is opened, so a binary with this feature
//! also starts where there are none. Kernels come as fat binaries (see `build.rs`).
//!
//! Large writes go through two pinned buffers: while one is on its way to the device the
//! next is filled, by several threads, from the mapped file.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result::{self as cuda, DriverError};
use cudarc::driver::sys;
use rayon::prelude::*;

use super::choice::{NoDevice, Visible};
use super::cublas::Blas;
use super::gemm::Call;
use super::{Device, Driver, Launch, Properties, Replay};
use crate::{Error, Result};

/// The kernels, and the compute capabilities that they were compiled for.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

pub use compiled::BUILT_FOR;

/// Bytes of a pinned buffer.
const STAGING_BYTES: usize = 32 << 20;
/// Pinned buffers for small writes, and their bytes: more than a step makes.
const SLOTS: usize = 16;
const SLOT_BYTES: usize = 256 << 10;
/// What each thread fills of a pinned buffer at a time.
const FILL_BYTES: usize = 1 << 20;
/// cuBLAS's scratch, given to it so that its products can be recorded; what it asks for on
/// Hopper (cuBLAS's documentation, "cublasSetWorkspace").
const WORKSPACE_BYTES: usize = 32 << 20;

/// The GPUs that the driver shows this process, by ordinal.
///
/// # Errors
/// No driver, or one that does not start.
pub fn cards() -> Result<Vec<Visible>, NoDevice> {
    // SAFETY: looks for the library and nothing more.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoDevice::NoDriver("libcuda.so.1 is not found".into()));
    }
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error| NoDevice::Failed(fault(&what, error).message)
    };
    match cuda::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(Vec::new()),
        started => started.map_err(failed("the CUDA driver does not start"))?,
    }
    let count = cuda::device::get_count().map_err(failed("counting devices"))?;
    (0..count).map(|n| card(n).map_err(failed(&format!("device {n}")))).collect()
}

fn card(ordinal: c_int) -> Result<Visible, DriverError> {
    let device = cuda::device::get(ordinal)?;
    let properties = properties(device)?;
    let mut visible = Visible {
        ordinal: ordinal as usize,
        uuid: None,
        pci_bus_id: pci_bus_id(device),
        name: properties.name,
        compute_capability: properties.compute_capability,
        memory_bytes: properties.memory_bytes,
        emulated: false,
    };
    visible.uuid = uuid(device).and_then(|bytes| Visible::uuid_text(bytes, visible.is_slice()));
    Ok(visible)
}

fn properties(device: sys::CUdevice) -> Result<Properties, DriverError> {
    use sys::CUdevice_attribute_enum as attribute;
    // SAFETY: a device that the driver has named.
    let of = |which| unsafe { cuda::device::get_attribute(device, which) };
    Ok(Properties {
        name: cuda::device::get_name(device)?,
        compute_capability: (
            of(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            of(attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        ),
        multiprocessors: of(attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        // SAFETY: as above.
        memory_bytes: unsafe { cuda::device::total_mem(device)? } as u64,
        shared_bytes_a_block: of(attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize,
        emulated: false,
    })
}

/// A slice's own; the first version of this call gives that of its card.
fn uuid(device: sys::CUdevice) -> Option<[u8; 16]> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: a device that the driver has named.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }.result().ok()?;
    Some(uuid.bytes.map(|byte| byte as u8))
}

/// Where the card is plugged in, as `0000:17:00.0`.
fn pci_bus_id(device: sys::CUdevice) -> Option<String> {
    let mut text = [0 as c_char; 32];
    // SAFETY: a device that the driver has named, and a buffer of that length.
    let found = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as c_int, device) };
    found.result().ok()?;
    // SAFETY: the driver has written a string that ends within the buffer.
    Some(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
}

/// Opens a GPU of [`cards`], by its ordinal.
///
/// # Errors
/// No driver; a card for which the kernels were not compiled; no cuBLAS; a fault of the driver.
pub fn open(ordinal: usize) -> Result<Device> {
    // SAFETY: looks for the library and nothing more.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::input("there is no CUDA driver (libcuda.so.1) on this node"));
    }
    cuda::init().map_err(|error| fault("the CUDA driver does not start", error))?;
    let device = cuda::device::get(ordinal as c_int).map_err(|e| fault("opening it", e))?;
    let properties = properties(device).map_err(|e| fault("its properties", e))?;
    let nvidia = Nvidia::open(ordinal as c_int, properties)?;
    Ok(Device::new(Arc::new(nvidia)))
}

/// A driver's context, current on the threads that use it.
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// The device frees and allocates in the order of the stream.
    has_pools: bool,
}

// SAFETY: CUDA contexts and streams may be used from any thread that has made them current,
// which `Context::current` does.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks by itself.
unsafe impl Sync for Context {}

impl Context {
    fn current(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { cuda::ctx::set_current(self.context) }.map_err(|e| fault("its context", e))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nothing uses them any more; a failure here has nobody to hear it.
        unsafe {
            let _ = cuda::ctx::set_current(self.context);
            let _ = cuda::stream::destroy(self.stream);
            let _ = cuda::primary_ctx::release(self.device);
        }
    }
}

struct Nvidia {
    // Dropped in this order: the context last.
    staging: Mutex<Option<Staging>>,
    /// For small writes, several of which a step makes.
    slots: Mutex<Staging>,
    workspace: sys::CUdeviceptr,
    blas: Blas,
    modules: Modules,
    properties: Properties,
    context: Arc<Context>,
}

/// The loaded kernels.
struct Modules {
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, Function>>,
}

#[derive(Clone, Copy)]
struct Function {
    function: sys::CUfunction,
    /// Dynamic shared memory that it has been allowed.
    shared_bytes: usize,
}

// SAFETY: handles of the driver, valid in the context on any thread.
unsafe impl Send for Modules {}
// SAFETY: as above; the map is locked.
unsafe impl Sync for Modules {}

impl Nvidia {
    fn open(ordinal: c_int, properties: Properties) -> Result<Self> {
        let failed = |what: &'static str| move |error: DriverError| fault(what, error);
        let device = cuda::device::get(ordinal).map_err(failed("the device"))?;
        // SAFETY: a device of the driver; released by `Context`.
        let context = unsafe { cuda::primary_ctx::retain(device) }.map_err(failed("a context"))?;
        // SAFETY: just made.
        unsafe { cuda::ctx::set_current(context) }.map_err(failed("its context"))?;
        let stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking)
            .map_err(failed("a stream"))?;
        let has_pools = keep_pool(device);
        let context = Arc::new(Context { device, context, stream, has_pools });
        let modules = Modules::load(&properties)?;
        // SAFETY: the context is current; given up with `Nvidia`.
        let workspace = unsafe { cuda::malloc_sync(WORKSPACE_BYTES) };
        let workspace = workspace.map_err(failed("cuBLAS's memory"))?;
        let mut driver = 0;
        // SAFETY: room for a number.
        unsafe { sys::cuDriverGetVersion(&raw mut driver) }
            .result()
            .map_err(failed("the driver's version"))?;
        let memory = (workspace, WORKSPACE_BYTES);
        let card = properties.compute_capability;
        let blas = Blas::new(stream as u64, memory, (driver / 1000) as u32, card)?;
        let staging = Mutex::new(None);
        let slots = Mutex::new(Staging::new(SLOTS, SLOT_BYTES)?);
        Ok(Self { staging, slots, workspace, blas, modules, properties, context })
    }

    /// The pinned buffers, made when they are first needed.
    fn staging(&self) -> Result<MutexGuard<'_, Option<Staging>>> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if staging.is_none() {
            *staging = Some(Staging::new(2, STAGING_BYTES)?);
        }
        Ok(staging)
    }
}

/// Lets the device's pool keep what is given back to it, for the next allocation; whether
/// there is a pool (some virtual GPUs have none).
fn keep_pool(device: sys::CUdevice) -> bool {
    use sys::CUdevice_attribute_enum as attribute;
    let supported = attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    // SAFETY: a device of the driver.
    if !matches!(unsafe { cuda::device::get_attribute(device, supported) }, Ok(1)) {
        return false;
    }
    let mut threshold = u64::MAX;
    // SAFETY: the attribute takes a u64, which the driver copies.
    unsafe {
        cuda::device::get_default_mem_pool(device).is_ok_and(|pool| {
            let which = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let set = sys::cuMemPoolSetAttribute(pool, which, (&raw mut threshold).cast());
            open_to_peers(device, pool);
            set.result().is_ok()
        })
    }
}

/// Lets the node's other devices reach a pool: NCCL reads the memory of ranks that are threads of
/// this process, and memory of a pool is closed to peers until then.
fn open_to_peers(device: sys::CUdevice, pool: sys::CUmemoryPool) {
    for ordinal in 0..cuda::device::get_count().unwrap_or(0) {
        let Ok(peer) = cuda::device::get(ordinal) else { continue };
        let mut can = 0;
        // SAFETY: two devices of the driver, and room for a number.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, peer, device) };
        if peer == device || asked.result().is_err() || can == 0 {
            continue;
        }
        let location = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: ordinal,
        };
        let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = sys::CUmemAccessDesc { location, flags };
        // SAFETY: a pool of the driver's; refused is no harm to a rank alone.
        let _ = unsafe { sys::cuMemPoolSetAccess(pool, &raw const access, 1) };
    }
}

impl Modules {
    fn load(properties: &Properties) -> Result<Self> {
        let mut modules = Vec::new();
        for image in compiled::MODULES {
            // SAFETY: a fat binary of nvcc's, whole.
            let module = unsafe { cuda::module::load_data(image.0.as_ptr().cast()) };
            modules.push(module.map_err(|error| unsupported(properties, error))?);
        }
        if modules.is_empty() {
            return Err(Error::fault(
                "this farm was built without the device's kernels (FARM_CUDA_CHECK): build it \
                 with `make cuda`",
            ));
        }
        Ok(Self { modules, functions: Mutex::default() })
    }

    /// The kernel `name`, allowed that much dynamic shared memory.
    fn function(&self, name: &str, shared_bytes: usize) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut function = match functions.get(name) {
            Some(function) if function.shared_bytes >= shared_bytes => {
                return Ok(function.function);
            }
            Some(function) => *function,
            None => Function { function: self.find(name)?, shared_bytes: 48 << 10 },
        };
        if shared_bytes > function.shared_bytes {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe {
                cuda::function::set_function_attribute(
                    function.function,
                    which,
                    shared_bytes as c_int,
                )
            }
            .map_err(|error| {
                fault(&format!("kernel {name}: {shared_bytes} bytes of shared memory"), error)
            })?;
            function.shared_bytes = shared_bytes;
        }
        functions.insert(name.to_owned(), function);
        Ok(function.function)
    }

    fn find(&self, name: &str) -> Result<sys::CUfunction> {
        let symbol = CString::new(name).map_err(Error::fault)?;
        let found = self.modules.iter().find_map(|module| {
            // SAFETY: a loaded module.
            unsafe { cuda::module::get_function(*module, symbol.clone()) }.ok()
        });
        found.ok_or_else(|| Error::fault(format!("there is no kernel {name}")))
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        let _ = self.context.current();
        // SAFETY: nothing uses them any more; a failure here has nobody to hear it.
        unsafe {
            let _ = cuda::stream::synchronize(self.context.stream);
            let _ = cuda::free_sync(self.workspace);
            for module in &self.modules.modules {
                let _ = cuda::module::unload(*module);
            }
        }
    }
}

/// Pinned buffers that take turns, and when each has been copied from.
struct Staging {
    buffers: Vec<(*mut c_void, sys::CUevent)>,
    bytes: usize,
    next: usize,
}

// SAFETY: memory and events of the context, used behind a lock.
unsafe impl Send for Staging {}

impl Staging {
    fn new(count: usize, bytes: usize) -> Result<Self> {
        let buffer = || {
            // SAFETY: freed with `Staging`.
            unsafe { cuda::malloc_host(bytes, 0) }
                .map_err(|error| fault("pinned memory on the host", error))
        };
        let event = || {
            cuda::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(|error| fault("an event", error))
        };
        let mut staging = Self { buffers: Vec::new(), bytes, next: 0 };
        for _ in 0..count {
            staging.buffers.push((buffer()?, event()?));
        }
        Ok(staging)
    }

    /// Copies through the buffers in turn.
    fn write(&mut self, to: u64, from: &[u8], stream: sys::CUstream) -> Result<()> {
        let failed = |error| fault("a copy to the device", error);
        for (i, part) in from.chunks(self.bytes).enumerate() {
            let (memory, copied) = self.buffers[self.next];
            self.next = (self.next + 1) % self.buffers.len();
            // SAFETY: the event is of this context; the buffer is as large as any part, and
            // the copy that read it last is done.
            let buffer = unsafe {
                cuda::event::synchronize(copied).map_err(failed)?;
                std::slice::from_raw_parts_mut(memory.cast::<u8>(), part.len())
            };
            let pieces = buffer.par_chunks_mut(FILL_BYTES).zip(part.par_chunks(FILL_BYTES));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
            let at = to + (i * self.bytes) as u64;
            // SAFETY: inside an allocation, by the caller; the buffer stays until the event.
            unsafe {
                cuda::memcpy_htod_async(at, buffer, stream).map_err(failed)?;
                cuda::event::record(copied, stream).map_err(failed)?;
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: made by `new`; the copies from them are waited for.
        unsafe {
            for (memory, copied) in &self.buffers {
                let _ = cuda::event::synchronize(*copied);
                let _ = cuda::event::destroy(*copied);
                let _ = cuda::free_host(*memory);
            }
        }
    }
}

impl Driver for Nvidia {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.context.current()?;
        // SAFETY: freed by `free`, in the order of the stream.
        let memory = unsafe {
            match self.context.has_pools {
                true => cuda::malloc_async(self.context.stream, bytes),
                false => cuda::malloc_sync(bytes),
            }
        };
        memory.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                super::no_memory(bytes, self.free_bytes().unwrap_or(0))
            }
            _ => fault(&format!("{bytes} bytes of memory"), error),
        })
    }

    fn free(&self, address: u64, _: usize) {
        let _ = self.context.current();
        // SAFETY: of `allocate`; what is queued before runs first. A failure is one of an
        // earlier kernel, which others hear of.
        let _ = unsafe {
            match self.context.has_pools {
                true => cuda::free_async(address, self.context.stream),
                false => cuda::free_sync(address),
            }
        };
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        self.context.current()?;
        if from.len() <= SLOT_BYTES {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            return slots.write(to, from, self.context.stream);
        }
        match &mut *self.staging()? {
            Some(staging) => staging.write(to, from, self.context.stream),
            None => Err(Error::fault("no pinned memory")),
        }
    }

    fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.context.current()?;
        let failed = |error| fault("a copy from the device", error);
        // SAFETY: as many bytes of an allocation; the wait ends the copy.
        unsafe {
            cuda::memcpy_dtoh_async(to, from, self.context.stream).map_err(failed)?;
            cuda::stream::synchronize(self.context.stream).map_err(failed)
        }
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.context.current()?;
        // SAFETY: as many bytes of two allocations.
        unsafe { cuda::memcpy_dtod_async(to, from, bytes, self.context.stream) }
            .map_err(|error| fault("a copy on the device", error))
    }

    fn zero(&self, to: u64, bytes: usize) -> Result<()> {
        self.context.current()?;
        // SAFETY: as many bytes of an allocation.
        unsafe { cuda::memset_d8_async(to, 0, bytes, self.context.stream) }
            .map_err(|error| fault("zeros", error))
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.context.current()?;
        let function = self.modules.function(launch.kernel, launch.shared_bytes)?;
        let mut values = launch.arguments.clone();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let [x, y, z] = launch.grid;
        let [width, height, depth] = launch.block;
        // SAFETY: the kernel's own arguments, by the caller; the driver copies them.
        unsafe {
            cuda::launch_kernel(
                function,
                (x, y, z),
                (width, height, depth),
                launch.shared_bytes as u32,
                self.context.stream,
                &mut pointers,
            )
        }
        .map_err(|error| fault(&format!("kernel {}", launch.kernel), error))
    }

    fn gemm(&self, gemm: &Call) -> Result<()> {
        self.context.current()?;
        self.blas.gemm(gemm)
    }

    fn synchronize(&self) -> Result<()> {
        self.context.current()?;
        // SAFETY: the context's stream.
        unsafe { cuda::stream::synchronize(self.context.stream) }
            .map_err(|error| fault("the queued work", error))
    }

    fn free_bytes(&self) -> Result<u64> {
        self.synchronize()?;
        if self.context.has_pools {
            // What the pool keeps for later counts as taken.
            // SAFETY: the device's own pool; a failure leaves it as it is.
            let _ = unsafe {
                cuda::device::get_default_mem_pool(self.context.device)
                    .and_then(|pool| cuda::mem_pool::trim_to(pool, 0))
            };
        }
        let (free, _) = cuda::mem_get_info().map_err(|error| fault("its free memory", error))?;
        Ok(free as u64)
    }

    fn begin_capture(&self) -> Result<()> {
        self.context.current()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the context's stream.
        unsafe { cuda::stream::begin_capture(self.context.stream, mode) }
            .map_err(|error| fault("recording work", error))
    }

    fn end_capture(&self) -> Result<Box<dyn Replay>> {
        let failed = |error| fault("recording work", error);
        // SAFETY: what `begin_capture` began; the graph is destroyed once instantiated.
        let exec = unsafe {
            let graph = cuda::stream::end_capture(self.context.stream).map_err(failed)?;
            let exec = cuda::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = cuda::graph::destroy(graph);
            exec.map_err(failed)?
        };
        Ok(Box::new(Recorded { exec, context: self.context.clone() }))
    }

    fn stream(&self) -> u64 {
        self.context.stream as u64
    }
}

struct Recorded {
    exec: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a handle of the driver, valid in the context on any thread.
unsafe impl Send for Recorded {}
// SAFETY: as above; one rank's thread launches at a time.
unsafe impl Sync for Recorded {}

impl Replay for Recorded {
    fn replay(&self) -> Result<()> {
        self.context.current()?;
        // SAFETY: an instantiated graph of this context.
        unsafe { cuda::graph::launch(self.exec, self.context.stream) }
            .map_err(|error| fault("recorded work", error))
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let _ = self.context.current();
        // SAFETY: nothing launches it any more.
        let _ = unsafe { cuda::graph::exec_destroy(self.exec) };
    }
}

fn fault(what: &str, error: DriverError) -> Error {
    Error::fault(format!("GPU: {what}: {}", text(error)))
}

fn text(error: DriverError) -> String {
    let said = error.error_string().ok().map(|said| said.to_string_lossy().into_owned());
    let name = error.error_name().ok().map(|name| name.to_string_lossy().into_owned());
    format!("{} ({})", said.unwrap_or_default(), name.unwrap_or_default())
}

fn unsupported(properties: &Properties, error: DriverError) -> Error {
    let (major, minor) = properties.compute_capability;
    Error::input(format!(
        "{}: this farm was built for the compute capabilities {BUILT_FOR} and this GPU has \
         {major}{minor}, or its driver is too old ({}): build it with `make cuda \
         CUDA_COMPUTE_CAP={major}{minor}`",
        properties.name,
        text(error)
    ))
}
