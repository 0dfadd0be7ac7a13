//! cuBLAS: the few functions that farm calls, from whichever version the node has.
//!
//! Their signatures have not changed from CUDA 11 to 13, so one binary takes any of them.

use std::ffi::{c_int, c_void};

use super::Dtype;
use super::gemm::Call;
use super::libraries::{find, function};
use crate::{Error, Result};

/// Newest first, by CUDA's version; the plain name is there where a development package is.
const NAMES: [(u32, &str); 4] = [
    (13, "libcublas.so.13"),
    (12, "libcublas.so.12"),
    (11, "libcublas.so.11"),
    (0, "libcublas.so"),
];
/// CUDA 13 knows no card before Turing.
const TURING: (u32, u32) = (7, 5);

// cublas_api.h and library_types.h.
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const R_32F: c_int = 0;
const R_16F: c_int = 2;
const R_16BF: c_int = 14;
/// Sums in f32; f32 factors are not shortened to TF32.
const COMPUTE_32F: c_int = 68;
const GEMM_DEFAULT: c_int = -1;
/// Parts of a split sum stay f32, too.
const MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: c_int = 16;

type Handle = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
type SetStream = unsafe extern "C" fn(Handle, *mut c_void) -> c_int;
type SetMathMode = unsafe extern "C" fn(Handle, c_int) -> c_int;
type SetWorkspace = unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// A handle, bound to a stream.
pub(super) struct Blas {
    handle: Handle,
    destroy: Destroy,
    gemm_ex: GemmEx,
}

// SAFETY: a handle may change threads; its settings are made once.
unsafe impl Send for Blas {}
// SAFETY: as above; calls on one handle are queued by one rank's thread at a time.
unsafe impl Sync for Blas {}

impl Blas {
    /// Of the current context, on a card of compute capability `card`: work goes to `stream` and
    /// takes `workspace_bytes` at `workspace`, so that it can be recorded. `driver` is the newest
    /// CUDA that the driver runs.
    ///
    /// # Errors
    /// No such library; one that does not start.
    pub(super) fn new(
        stream: u64,
        (workspace, workspace_bytes): (u64, usize),
        driver: u32,
        card: (u32, u32),
    ) -> Result<Self> {
        let runs = |version: u32| version <= driver && (version < 13 || card >= TURING);
        let names = NAMES.iter().filter(|(version, _)| runs(*version)).map(|(_, name)| *name);
        let names: Vec<&str> = names.collect();
        let library = find(&names).ok_or_else(|| {
            Error::input(format!(
                "cuBLAS is not found ({}): load the cluster's CUDA module, or add its folder to \
                 LD_LIBRARY_PATH",
                names.join(", ")
            ))
        })?;
        // SAFETY: the signatures of cublas_api.h; a context is current, by the caller.
        unsafe {
            let create: Create = function(library, "cublasCreate_v2")?;
            let destroy = function(library, "cublasDestroy_v2")?;
            let set_stream: SetStream = function(library, "cublasSetStream_v2")?;
            let set_workspace: SetWorkspace = function(library, "cublasSetWorkspace_v2")?;
            let set_math_mode: SetMathMode = function(library, "cublasSetMathMode")?;
            let gemm_ex = function(library, "cublasGemmEx")?;
            let mut handle = std::ptr::null_mut();
            check(create(&raw mut handle), "cublasCreate")?;
            let blas = Self { handle, destroy, gemm_ex };
            check(set_stream(handle, stream as *mut c_void), "cublasSetStream")?;
            let memory = workspace as *mut c_void;
            check(set_workspace(handle, memory, workspace_bytes), "cublasSetWorkspace")?;
            let mode = MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            check(set_math_mode(handle, mode), "cublasSetMathMode")?;
            Ok(blas)
        }
    }

    /// Queues a product. cuBLAS's matrices are column-major, which a row-major one is
    /// transposed: it is asked for cᵀ = op(b)ᵀ · op(a)ᵀ.
    ///
    /// # Errors
    /// What cuBLAS says.
    pub(super) fn gemm(&self, call: &Call) -> Result<()> {
        let transpose = |transposed| if transposed { OP_T } else { OP_N };
        let int = |n: usize| c_int::try_from(n).map_err(Error::fault);
        let (alpha, beta) = (call.alpha, call.beta);
        // SAFETY: `Gemm` has checked the arrays; the factors are read before the call returns.
        let status = unsafe {
            (self.gemm_ex)(
                self.handle,
                transpose(call.transpose_b),
                transpose(call.transpose_a),
                int(call.n)?,
                int(call.m)?,
                int(call.k)?,
                (&raw const alpha).cast(),
                call.b as *const c_void,
                data_type(call.operands),
                int(call.b_stride)?,
                call.a as *const c_void,
                data_type(call.operands),
                int(call.a_stride)?,
                (&raw const beta).cast(),
                call.c as *mut c_void,
                data_type(call.result),
                int(call.c_stride)?,
                COMPUTE_32F,
                GEMM_DEFAULT,
            )
        };
        check(status, "cublasGemmEx")
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made by `new`; nothing uses it any more.
        unsafe { (self.destroy)(self.handle) };
    }
}

fn data_type(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::F16 => R_16F,
        Dtype::Bf16 => R_16BF,
        _ => R_32F,
    }
}

fn check(status: c_int, what: &str) -> Result<()> {
    match status {
        0 => Ok(()),
        // cublasStatus_t.
        3 => Err(Error::fault(format!("GPU: {what}: no memory for cuBLAS"))),
        status => Err(Error::fault(format!("GPU: {what}: cuBLAS says status {status}"))),
    }
}
