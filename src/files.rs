//! Whole files or none: what readers and later launches see is never half written.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::comm::host_name;
use crate::{Error, Result};

/// Writes `bytes` to a file beside `path`, waits until they are on the disk, and renames.
///
/// # Errors
/// A fault that names the file.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = &unique(path);
    let write = || {
        let mut file = File::create(partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| Error::io(partial, error))?;
    fs::rename(partial, path).map_err(|error| Error::io(path, error))
}

/// Creates `path` with `bytes` unless it exists; false if it does. Whole, also for readers:
/// a hard link of a finished file, where the file system has hard links.
///
/// # Errors
/// A fault that names the file.
pub fn create_file(path: &Path, bytes: &[u8]) -> Result<bool> {
    let partial = unique(path);
    let write = || {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| Error::io(&partial, error))?;
    let linked = fs::hard_link(&partial, path);
    // A reply that NFS lost leaves two links and an error.
    let is_ours = linked.is_ok() || fs::metadata(&partial).is_ok_and(|file| file.nlink() == 2);
    let outcome = match linked {
        _ if is_ours => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        // No hard links here.
        _ => match File::create_new(path).and_then(|mut file| file.write_all(bytes)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(Error::io(path, error)),
        },
    };
    let _ = fs::remove_file(&partial);
    outcome
}

/// A name beside `path` that no other process uses: several jobs may write the same file.
fn unique(path: &Path) -> PathBuf {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    with_suffix(path, &format!("{}-{}-{count}.partial", host_name(), std::process::id()))
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
