//! CUDA's libraries, looked for when a run starts: a binary with CUDA also starts on nodes
//! without it, and takes any version whose functions are the same.

use libloading::Library;

use crate::{Error, Result};

/// The first of these libraries that the loader finds. It stays until the process ends: threads
/// and callbacks of the driver may run its code after its last use here.
pub(super) fn find(names: &[&str]) -> Option<&'static Library> {
    // SAFETY: their initialisers are NVIDIA's, and run in any program that links them.
    let library = names.iter().find_map(|name| unsafe { Library::new(*name) }.ok())?;
    Some(Box::leak(Box::new(library)))
}

/// A function of a library.
///
/// # Safety
/// `F` is its type.
///
/// # Errors
/// A library without it.
pub(super) unsafe fn function<F: Copy>(library: &'static Library, name: &str) -> Result<F> {
    // SAFETY: the caller's.
    let symbol = unsafe { library.get::<F>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|error| Error::fault(format!("{name}: {error}")))
}
