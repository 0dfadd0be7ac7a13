//! Whole files or none: what readers and later launches see is never half written.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Writes `bytes` to `path` + `.partial`, waits until they are on the disk, and renames.
///
/// # Errors
/// A fault that names the file.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let write = || {
        let mut file = File::create(partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| Error::io(partial, error))?;
    fs::rename(partial, path).map_err(|error| Error::io(path, error))
}
