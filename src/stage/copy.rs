//! Files in chunks: reading a source, writing and verifying a copy, and the record of
//! hashes (`manifest.json`) that says what a complete copy must be.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use serde::{Deserialize, Serialize};

use super::manifest::{FileEntry, Manifest};
use super::plan::Chunk;
use crate::{Error, Result};

/// BLAKE3 of a chunk.
pub type Hash = [u8; 32];

/// The name of the record in a copy.
const RECORD: &str = "manifest.json";

/// What a complete copy must be: files, and a hash for each chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRecord {
    key: String,
    files: Vec<FileEntry>,
    chunk_bytes: usize,
    hashes: Vec<Hash>,
}

/// A record as it is on disk, with a hash of itself.
#[derive(Serialize, Deserialize)]
struct SealedRecord {
    digest: String,
    record: CopyRecord,
}

impl CopyRecord {
    /// The record of a copy of `manifest`; `hashes` has one for each chunk of `chunk_bytes`.
    pub fn new(manifest: &Manifest, chunk_bytes: usize, hashes: Vec<Hash>) -> Self {
        let (key, files) = (manifest.key.clone(), manifest.files.clone());
        Self { key, files, chunk_bytes, hashes }
    }

    /// Of the copy in `directory`; `None` unless it is whole, undamaged and for this
    /// state of this model.
    pub fn load(directory: &Path, manifest: &Manifest, chunk_bytes: usize) -> Option<Self> {
        let path = directory.join(RECORD);
        let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        let text = is_file.then(|| fs::read(&path).ok()).flatten()?;
        let SealedRecord { digest, record } = serde_json::from_slice(&text).ok()?;
        let fits = digest == record.digest()
            && record.key == manifest.key
            && record.files == manifest.files
            && record.chunk_bytes == chunk_bytes;
        fits.then_some(record)
    }

    /// Writes the record into `directory`; last of all, as it vouches for the rest.
    pub fn save(&self, directory: &Path) -> Result<()> {
        let path = directory.join(RECORD);
        let sealed = SealedRecord { digest: self.digest(), record: self.clone() };
        let text = serde_json::to_vec(&sealed).map_err(|error| Error::io(&path, error.into()))?;
        let mut file = new_file(&path)?;
        std::io::Write::write_all(&mut file, &text).map_err(|error| Error::io(&path, error))
    }

    /// A hash of all that the record says.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.key.as_bytes());
        hasher.update(&(self.chunk_bytes as u64).to_le_bytes());
        for hash in &self.hashes {
            hasher.update(hash);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The chunks' hashes in order.
    pub fn hashes(&self) -> &[Hash] {
        &self.hashes
    }

    /// The chunks of the copy in `directory` that are not what their hash says, in
    /// order; `None` if a file is missing or has another length, so that there is
    /// nothing to mend.
    pub fn bad_chunks(&self, directory: &Path, chunks: &[Chunk]) -> Option<Vec<usize>> {
        if chunks.len() != self.hashes.len() {
            return None;
        }
        let files = ChunkFiles::open(directory, &self.files).ok()?;
        for (file, entry) in files.files.iter().zip(&self.files) {
            if file.metadata().ok()?.len() != entry.bytes {
                return None;
            }
        }
        Some(
            (0..chunks.len())
                .into_par_iter()
                .filter(|&index| {
                    !files.read(&chunks[index]).is_ok_and(|data| hash(&data) == self.hashes[index])
                })
                .collect(),
        )
    }
}

/// BLAKE3 of `data`.
pub fn hash(data: &[u8]) -> Hash {
    *blake3::hash(data).as_bytes()
}

/// Open files of a model or of a copy, read and written by chunk from any thread.
pub struct ChunkFiles {
    files: Vec<File>,
    paths: Vec<PathBuf>,
}

impl ChunkFiles {
    fn with(paths: Vec<PathBuf>, open: impl Fn(&Path) -> Result<File>) -> Result<Self> {
        let files = paths.iter().map(|path| open(path)).collect::<Result<_>>()?;
        Ok(Self { files, paths })
    }

    /// The files where they come from, to read; links are followed.
    pub fn open_source(entries: &[FileEntry]) -> Result<Self> {
        Self::with(entries.iter().map(|entry| entry.source.clone()).collect(), |path| {
            File::open(path).map_err(|error| Error::io(path, error))
        })
    }

    /// The files of a complete copy, to read and mend.
    pub fn open(directory: &Path, entries: &[FileEntry]) -> Result<Self> {
        Self::with(below(directory, entries), |path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(OFlags::NOFOLLOW.bits() as i32)
                .open(path)
                .map_err(|error| Error::io(path, error))
        })
    }

    /// New files, with all their space reserved: a shortage shows here, and not as a
    /// fault at a mapped page later.
    pub fn create(directory: &Path, entries: &[FileEntry]) -> Result<Self> {
        let files = Self::with(below(directory, entries), |path| {
            let parent = path.parent().unwrap_or(directory);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(|error| Error::io(parent, error))?;
            new_file(path)
        })?;
        for ((file, path), entry) in files.files.iter().zip(&files.paths).zip(entries) {
            reserve(file, entry.bytes).map_err(|error| {
                Error::io(path, error).context(format!("cannot reserve {} bytes", entry.bytes))
            })?;
        }
        Ok(files)
    }

    /// The bytes of `chunk`; room for a hash is left behind them.
    pub fn read(&self, chunk: &Chunk) -> Result<Vec<u8>> {
        let mut data = Vec::with_capacity(chunk.bytes + size_of::<Hash>() + 1);
        data.resize(chunk.bytes, 0);
        self.files[chunk.file].read_exact_at(&mut data, chunk.offset).map_err(|error| {
            let path = &self.paths[chunk.file];
            match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Error::input(format!(
                    "{}: ends before byte {}; was it cut or replaced while it was read?",
                    path.display(),
                    chunk.offset + chunk.bytes as u64
                )),
                _ => Error::io(path, error)
                    .context(format!("reading {} bytes at {}", chunk.bytes, chunk.offset)),
            }
        })?;
        Ok(data)
    }

    /// Writes `data` as `chunk`, reads it back and compares it with `expected`.
    pub fn write_verified(&self, chunk: &Chunk, data: &[u8], expected: &Hash) -> Result<()> {
        let path = &self.paths[chunk.file];
        self.files[chunk.file].write_all_at(data, chunk.offset).map_err(|error| {
            Error::io(path, error)
                .context(format!("writing {} bytes at {}", chunk.bytes, chunk.offset))
        })?;
        if hash(&self.read(chunk)?) != *expected {
            return Err(Error::fault(format!(
                "{}: {} bytes at {} are not what was read from the model: damaged on the way or \
                 in this node's memory",
                path.display(),
                chunk.bytes,
                chunk.offset
            )));
        }
        Ok(())
    }
}

fn below(directory: &Path, entries: &[FileEntry]) -> Vec<PathBuf> {
    entries.iter().map(|entry| directory.join(&entry.path)).collect()
}

fn new_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::io(path, error))
}

fn reserve(file: &File, bytes: u64) -> std::io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        // Some file systems cannot reserve; the length at least is set.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(bytes),
        result => Ok(result?),
    }
}
