//! Reading the files that describe a model: settings, tokenizers, templates, indexes. They
//! are small, and come from elsewhere: what is no file, or far too large for one of them,
//! is refused before it fills the memory.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Many times the largest tokenizers and indexes that there are.
const MAX_BYTES: u64 = 256 << 20;

/// The content of `path`.
///
/// # Errors
/// The system's; it is no file, or larger than any that describes a model.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Before it is opened: that would wait for the other end of a pipe.
    let meta = std::fs::metadata(path)?;
    if !meta.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        let most = MAX_BYTES >> 20;
        return Err(io::Error::other(format!("{} bytes, more than {most} MiB", meta.len())));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_a_sane_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(read(&path).unwrap(), b"{}");
        File::options().write(true).open(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("256 MiB"));
        for other in [Path::new("/dev/zero"), dir.path()] {
            assert!(read(other).unwrap_err().to_string().contains("regular"), "{other:?}");
        }
    }
}
