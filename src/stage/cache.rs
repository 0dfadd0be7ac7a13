//! The directory of staged copies on a node: names, locks, removal.
//!
//! `<stage dir>/farm-<uid>/` holds for each copy NAME
//! - `NAME/`: the files and `manifest.json`; only ever appears by rename, complete;
//! - `NAME.partial/`: being written, or left by a dead job; nobody trusts it;
//! - `NAME.lock`: every job that uses the copy holds it shared; who gets it alone is
//!   the last and may remove the copy;
//! - `NAME.build`: who verifies, mends or writes the copy holds it alone;
//! - `NAME.keep`: `--keep-staged` was given: the last user leaves the copy.
//!
//! The locks are flocks, which the kernel drops with the process, however it dies: a
//! lock that can be had is a lease that has ended, with no process ids to compare
//! (they mean nothing between containers). Nothing here waits for a lock: two jobs that
//! stage to the same nodes could wait for each other.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::{Error, Result};

/// Makes and checks `<stage_dir>/farm-<uid>`. `/dev/shm` is open to all users, so a
/// directory that another one put there in this name is refused.
pub fn open_cache(stage_dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(stage_dir).map_err(|error| Error::io(stage_dir, error))?;
    let uid = rustix::process::getuid().as_raw();
    let cache = stage_dir.join(format!("farm-{uid}"));
    match fs::DirBuilder::new().mode(0o700).create(&cache) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::io(&cache, error));
        }
        _ => {}
    }
    let meta = fs::symlink_metadata(&cache).map_err(|error| Error::io(&cache, error))?;
    if !meta.is_dir() || meta.uid() != uid || meta.mode() & 0o022 != 0 {
        return Err(Error::fault(format!(
            "{}: not a directory that only this user can write; remove it or choose another \
             --stage-dir",
            cache.display()
        )));
    }
    Ok(cache)
}

/// A job's hold on one copy, from before it is verified until the job no longer needs
/// it. Dropping it, on success or failure, removes the copy if nobody else uses it and
/// it is not to be kept.
#[derive(Debug)]
pub struct Lease {
    cache: PathBuf,
    name: String,
    users: File,
    build: Option<File>,
}

impl Lease {
    /// The lease on copy `name` and the sole right to write it; `None` if another job
    /// is writing, verifying or removing it just now.
    pub fn try_new(cache: &Path, name: &str) -> Result<Option<Self>> {
        let path = cache.join(format!("{name}.lock"));
        let users = loop {
            let users = open_lock(&path)?;
            if !try_lock(&users, &path, FlockOperation::NonBlockingLockShared)? {
                return Ok(None);
            }
            // The last user of before may have removed the file between open and lock.
            if is_at(&users, &path) {
                break users;
            }
        };
        let mut lease = Self { cache: cache.to_owned(), name: name.to_owned(), users, build: None };
        let path = lease.beside("build");
        let build = open_lock(&path)?;
        if !try_lock(&build, &path, FlockOperation::NonBlockingLockExclusive)? {
            return Ok(None);
        }
        lease.build = Some(build);
        remove_dir(&lease.partial())?;
        Ok(Some(lease))
    }

    fn beside(&self, ending: &str) -> PathBuf {
        self.cache.join(format!("{}.{ending}", self.name))
    }

    /// Where the complete copy is, or will be.
    pub fn complete(&self) -> PathBuf {
        self.cache.join(&self.name)
    }

    /// Where a copy is written.
    pub fn partial(&self) -> PathBuf {
        self.beside("partial")
    }

    /// Makes the empty directory [`Lease::partial`].
    pub fn create_partial(&self) -> Result<PathBuf> {
        let partial = self.partial();
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&partial)
            .map_err(|error| Error::io(&partial, error))?;
        Ok(partial)
    }

    /// Removes a complete copy that cannot be trusted, to make room for a new one.
    pub fn discard(&self) -> Result<()> {
        remove_dir(&self.complete())
    }

    /// Puts the written copy in the place of the complete one. What other jobs have
    /// mapped of a copy that was there stays theirs until they unmap it.
    pub fn publish(&self) -> Result<()> {
        let complete = self.complete();
        remove_dir(&complete)?;
        fs::rename(self.partial(), &complete).map_err(|error| Error::io(&complete, error))
    }

    /// Lets others verify and use the copy.
    pub fn end_build(&mut self) {
        self.build = None;
    }

    /// Leaves the copy for later jobs, from now on.
    pub fn keep(&self) -> Result<()> {
        let path = self.beside("keep");
        open_lock(&path).map(drop)
    }

    /// Removes the copy if this is its last user and it is not to be kept.
    fn release(&mut self) -> Result<()> {
        if self.build.is_some() {
            remove_dir(&self.partial())?;
        }
        self.build = None;
        let path = self.beside("lock");
        if try_lock(&self.users, &path, FlockOperation::NonBlockingLockExclusive)?
            && is_at(&self.users, &path)
            && !self.beside("keep").exists()
        {
            remove_copy(&self.cache, &self.name)?;
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(copy = %self.complete().display(), "staged copy not removed: {error}");
        }
    }
}

/// Removes what dead jobs left: half-written copies, and whole ones that were not to be
/// kept and that nobody uses; not those of `except`. Returns the names of the copies.
pub fn collect(cache: &Path, except: &str) -> Result<Vec<String>> {
    remove_unused(cache, |name| name != except, |name| cache.join(format!("{name}.keep")).exists())
}

/// Removes all copies that nobody uses, kept ones too. Returns their names.
pub fn clear(cache: &Path) -> Result<Vec<String>> {
    remove_unused(cache, |_| true, |_| false)
}

fn remove_unused(
    cache: &Path,
    is_meant: impl Fn(&str) -> bool,
    is_kept: impl Fn(&str) -> bool,
) -> Result<Vec<String>> {
    let io = |error| Error::io(cache, error);
    let mut removed = Vec::new();
    for entry in fs::read_dir(cache).map_err(io)? {
        let file = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        let Some(name) = file.strip_suffix(".lock").filter(|name| is_meant(name)) else {
            continue;
        };
        let path = cache.join(&file);
        let users = open_lock(&path)?;
        if !try_lock(&users, &path, FlockOperation::NonBlockingLockExclusive)?
            || !is_at(&users, &path)
        {
            continue;
        }
        if is_kept(name) {
            remove_dir(&cache.join(format!("{name}.partial")))?;
        } else {
            remove_copy(cache, name)?;
            removed.push(name.to_owned());
        }
    }
    Ok(removed)
}

/// Removes all of a copy; the caller holds its `.lock` alone. The lock file goes last:
/// if this is cut short, the next [`collect`] finds the rest by it.
fn remove_copy(cache: &Path, name: &str) -> Result<()> {
    let partial = cache.join(format!("{name}.partial"));
    remove_dir(&partial)?;
    // Renamed first: a half-removed copy must not look like one.
    match fs::rename(cache.join(name), &partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io(&cache.join(name), error));
        }
        _ => remove_dir(&partial)?,
    }
    for ending in ["build", "keep", "lock"] {
        let path = cache.join(format!("{name}.{ending}"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&path, error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(path)
        .map_err(|error| Error::io(path, error))
}

/// Whether the lock could be had at once.
fn try_lock(file: &File, path: &Path, operation: FlockOperation) -> Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(Error::io(path, error.into())),
    }
}

/// Whether `file` is still what `path` names.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(named)) => (file.dev(), file.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged(cache: &Path, name: &str) -> Lease {
        let mut lease = Lease::try_new(cache, name).unwrap().unwrap();
        if !lease.complete().exists() {
            lease.create_partial().unwrap();
            lease.publish().unwrap();
        }
        lease.end_build();
        lease
    }

    fn names(cache: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(cache)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_last_user_removes_the_copy_and_every_trace() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open_cache(dir.path()).unwrap();
        let first = staged(&cache, "m");
        let second = staged(&cache, "m");
        drop(first);
        assert!(second.complete().exists());
        drop(second);
        assert_eq!(names(&cache), Vec::<String>::new());
    }

    #[test]
    fn one_job_at_a_time_writes_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open_cache(dir.path()).unwrap();
        let writing = Lease::try_new(&cache, "m").unwrap().unwrap();
        assert!(Lease::try_new(&cache, "m").unwrap().is_none());
        assert!(Lease::try_new(&cache, "other").unwrap().is_some());
        drop(writing);
        assert!(Lease::try_new(&cache, "m").unwrap().is_some());
    }

    #[test]
    fn a_kept_copy_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open_cache(dir.path()).unwrap();
        let lease = staged(&cache, "m");
        lease.keep().unwrap();
        let complete = lease.complete();
        drop(lease);
        drop(staged(&cache, "m"));
        assert!(complete.exists());
        assert!(collect(&cache, "").unwrap().is_empty());
        assert!(complete.exists());
        assert_eq!(clear(&cache).unwrap(), ["m"]);
        assert_eq!(names(&cache), Vec::<String>::new());
    }

    #[test]
    fn what_dead_jobs_left_is_collected_and_what_live_ones_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open_cache(dir.path()).unwrap();
        // As SIGKILL leaves them: locks gone, files there.
        for name in ["whole", "cut.partial"] {
            fs::create_dir(cache.join(name)).unwrap();
        }
        for name in ["whole.lock", "cut.lock"] {
            fs::write(cache.join(name), "").unwrap();
        }
        let live = staged(&cache, "live");
        let mut collected = collect(&cache, "mine").unwrap();
        collected.sort();
        assert_eq!(collected, ["cut", "whole"]);
        assert!(live.complete().exists());
        assert_eq!(names(&cache), ["live", "live.build", "live.lock"]);
    }

    #[test]
    fn a_half_written_copy_is_gone_before_the_next_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open_cache(dir.path()).unwrap();
        fs::create_dir(cache.join("m.partial")).unwrap();
        let lease = Lease::try_new(&cache, "m").unwrap().unwrap();
        assert!(!lease.partial().exists());
    }

    #[test]
    fn a_link_or_an_open_directory_in_our_name_is_refused() {
        let uid = rustix::process::getuid().as_raw();
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join(format!("farm-{uid}"));
        std::os::unix::fs::symlink("/tmp", &name).unwrap();
        assert!(open_cache(dir.path()).is_err());
        fs::remove_file(&name).unwrap();
        fs::create_dir(&name).unwrap();
        rustix::fs::chmod(&name, rustix::fs::Mode::from_raw_mode(0o777)).unwrap();
        assert!(open_cache(dir.path()).is_err());
    }
}
