//! What tells one input from another, and the spool for standard input.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Files up to this size are hashed as a whole.
const HASHED_BYTES: u64 = 256 << 20;
/// Bytes of each end of a longer file that [`InputIdentity::of_file`] reads.
const SAMPLE_BYTES: u64 = 1 << 20;

/// Whether an input is the one that a run was started with.
///
/// For a file: its size and the hash of all bytes, so that a job script that writes the
/// same prompts again before each start goes on with its run. Beyond `HASHED_BYTES` a
/// full hash would hold up the start: there its size, its modification time, and a hash
/// of its first and last MiB; a change in the middle that keeps both goes unnoticed.
/// For standard input, which is read completely into the spool anyway: the size and
/// the hash of all bytes, so that the same stream finds its run again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputIdentity {
    /// Size of the input.
    pub size_bytes: u64,
    /// Modification time since 1970-01-01 UTC; 0 where the digest is of all bytes.
    pub modified_ns: u64,
    /// BLAKE3, as hex, of what is said above.
    pub digest: String,
}

impl InputIdentity {
    /// The identity of a regular file. Errors (input) name the file.
    pub fn of_file(path: &Path) -> Result<Self> {
        Self::read(path, HASHED_BYTES)
            .map_err(|e| Error::input(format!("prompts file {}: {e}", path.display())))
    }

    fn read(path: &Path, hashed_bytes: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        let size_bytes = metadata.len();
        let mut hasher = blake3::Hasher::new();
        let mut modified = Duration::ZERO;
        if size_bytes <= hashed_bytes {
            io::copy(&mut file.take(hashed_bytes), &mut hasher)?;
        } else {
            modified = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            io::copy(&mut (&mut file).take(SAMPLE_BYTES), &mut hasher)?;
            file.seek(SeekFrom::Start(size_bytes.saturating_sub(SAMPLE_BYTES).max(SAMPLE_BYTES)))?;
            io::copy(&mut file.take(SAMPLE_BYTES), &mut hasher)?;
        }
        Ok(Self {
            size_bytes,
            modified_ns: u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX),
            digest: hasher.finalize().to_hex().to_string(),
        })
    }
}

/// Copies standard input to `to` (by way of `to` + `.partial`), so that it can be
/// read again after a kill; see [`spool`].
pub fn spool_stdin(to: &Path) -> Result<InputIdentity> {
    spool(io::stdin().lock(), to)
}

/// Copies a stream to the file `to`, which appears only when it is complete, and
/// tells the stream's identity. Its folder is created. Memory does not grow with the stream.
///
/// Errors: the stream is empty (input); reading or writing fails (fault).
pub fn spool(mut stream: impl Read, to: &Path) -> Result<InputIdentity> {
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    let mut file = File::create(&partial).map_err(|e| Error::io(&partial, e))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    let mut size_bytes = 0;
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::fault(format!("standard input: {error}"))),
        };
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(|e| Error::io(&partial, e))?;
        size_bytes += count as u64;
    }
    file.sync_all().map_err(|e| Error::io(&partial, e))?;
    if size_bytes == 0 {
        let _ = std::fs::remove_file(&partial);
        return Err(Error::input("standard input is empty: there are no prompts"));
    }
    std::fs::rename(&partial, to).map_err(|e| Error::io(to, e))?;
    Ok(InputIdentity { size_bytes, modified_ns: 0, digest: hasher.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_has_another_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.txt");
        let identity = |content: &[u8], seconds: u64, hashed_bytes: u64| {
            std::fs::write(&path, content).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
            InputIdentity::read(&path, hashed_bytes).unwrap()
        };
        let large = vec![b'a'; 3 << 20];
        let with = |at: usize| {
            let mut other = large.clone();
            other[at] = b'b';
            other
        };
        for hashed_bytes in [HASHED_BYTES, 1 << 20] {
            let before = identity(&large, 1, hashed_bytes);
            assert_eq!(before.size_bytes, 3 << 20);
            assert_eq!(identity(&large, 1, hashed_bytes), before);
            assert_ne!(identity(&with(large.len() - 1), 1, hashed_bytes), before, "the last byte");
            assert_ne!(identity(&large[1..], 1, hashed_bytes), before, "the size");
        }
        let before = identity(&large, 1, HASHED_BYTES);
        assert_eq!(identity(&large, 2, HASHED_BYTES), before, "written again, the same");
        assert_ne!(identity(&with(3 << 19), 1, HASHED_BYTES), before, "a byte in the middle");
        assert_ne!(identity(&large, 2, 1 << 20), identity(&large, 1, 1 << 20), "the time");
    }

    #[test]
    fn a_spooled_stream_is_complete_and_known_by_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("stdin");
        let first = spool(&b"one\ntwo\n"[..], &to).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"one\ntwo\n");
        assert_eq!(spool(&b"one\ntwo\n"[..], &to).unwrap(), first);
        assert_ne!(spool(&b"one\ntwo"[..], &to).unwrap(), first);
        let empty = dir.path().join("empty");
        assert_eq!(spool(&b""[..], &empty).unwrap_err().kind, crate::ErrorKind::Input);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    }
}
