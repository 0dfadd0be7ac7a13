//! Whole files or none: what readers and later launches see is never half written.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Writes `bytes` to `path` + `.partial`, waits until they are on the disk, and renames.
///
/// # Errors
/// A fault that names the file.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = &with_suffix(path, "partial");
    let write = || {
        let mut file = File::create(partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| Error::io(partial, error))?;
    fs::rename(partial, path).map_err(|error| Error::io(path, error))
}

/// `path` with `.suffix` put after its whole name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes a rename in the folder of `path` durable, where the file system lets it be asked for.
pub fn sync_folder(path: &Path) {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
        let _ = folder.sync_all();
    }
}
