//! Files that appear whole and exclusively: what claims need of a file system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::io::Errno;

use crate::comm::host_name;
use crate::{Error, Result};

/// Named contents that several launches share. Names are plain file names.
pub trait ClaimStore: Send {
    /// Creates `name` with `content` unless it exists; `false` if it does. Atomic, for
    /// readers too (see the [module](super) for file systems without hard links).
    ///
    /// # Errors
    /// The store could not be written; whether `name` exists now is then unknown.
    fn create(&mut self, name: &str, content: &[u8]) -> Result<bool>;

    /// Gives `name` this content, whatever it was; readers see the old or the new one.
    ///
    /// # Errors
    /// The store could not be written.
    fn replace(&mut self, name: &str, content: &[u8]) -> Result<()>;

    /// The content of `name`; `None` if there is no such name.
    ///
    /// # Errors
    /// The store could not be read, or is not there any more.
    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>>;

    /// All names, in any order, without temporary ones.
    ///
    /// # Errors
    /// The store could not be read.
    fn list(&mut self) -> Result<Vec<String>>;

    /// Removes `name` if it exists. Only for what is no claim.
    ///
    /// # Errors
    /// The store could not be written.
    fn remove(&mut self, name: &str) -> Result<()>;

    /// Seconds since `name` was created or last replaced, by the store's own clock;
    /// negative where clocks disagree; `None` if there is no such name. Never too much:
    /// the clock is read first. One `now_seconds` stands for one reading of the clock.
    ///
    /// # Errors
    /// The store could not be read, or its clock not be asked.
    fn age_seconds(&mut self, name: &str, now_seconds: f64) -> Result<Option<f64>>;
}

/// [`ClaimStore`] in `RUN_DIR/claims/`.
#[derive(Debug)]
pub struct FsStore {
    path: PathBuf,
    /// The directory itself: as long as it is open its inode is no other's.
    directory: File,
    may_write: bool,
    /// `false` once the file system has refused one.
    has_hard_links: bool,
    /// The file system's clock at a `now_seconds`.
    clock: Option<(f64, SystemTime)>,
}

impl FsStore {
    /// The claims of the run in `run_dir`, which must exist; makes `claims/` in it.
    ///
    /// # Errors
    /// A fault that names the directory.
    pub fn new(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join("claims");
        match fs::create_dir(&path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(Error::io(&path, error)),
            _ => Self::open(path, true),
        }
    }

    /// The same to look only: writes nothing, so that a directory of somebody else's will
    /// do. Ages are taken by this machine's clock.
    ///
    /// # Errors
    /// A fault that names the directory, also if there is none.
    pub fn view(run_dir: &Path) -> Result<Self> {
        Self::open(run_dir.join("claims"), false)
    }

    fn open(path: PathBuf, may_write: bool) -> Result<Self> {
        let directory = File::open(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, directory, may_write, has_hard_links: true, clock: None })
    }

    fn fault(&self, name: &str, error: io::Error) -> Error {
        Error::io(&self.path.join(name), error)
    }

    /// Opens the directory again, for two reasons: it must still be the one of the
    /// beginning, and an NFS client asks the server on this occasion whether it changed.
    fn check_directory(&self) -> Result<()> {
        let id = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let io = |error| Error::io(&self.path, error).context("the run directory has vanished");
        let now = File::open(&self.path).and_then(|file| id(&file)).map_err(io)?;
        if now == id(&self.directory).map_err(io)? {
            return Ok(());
        }
        Err(Error::fault(format!(
            "{}: another directory has taken the place of the one that this run began in; \
             start farm again on the one you want",
            self.path.display()
        )))
    }

    /// A new file of a name that no other process or host uses, with `content`, and closed (an NFS client would keep an open one as `.nfs…` when it is removed).
    fn write_temporary(&self, content: &[u8]) -> Result<Temporary> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let host = host_name().replace('/', "_");
        loop {
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = self.path.join(format!(".tmp-{host}-{}-{count}", std::process::id()));
            let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => file,
                // Left by a killed process of our id: another container, another boot.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io(&path, error)),
            };
            let written = (&file).write_all(content).and_then(|()| file.metadata());
            drop(file);
            let meta = written.map_err(|error| {
                let _ = fs::remove_file(&path);
                Error::io(&path, error)
            })?;
            return Ok(Temporary { path, meta });
        }
    }

    /// Creation where names cannot be linked: exclusive, but the content comes later.
    fn create_in_place(&self, name: &str, content: &[u8]) -> Result<bool> {
        match OpenOptions::new().write(true).create_new(true).open(self.path.join(name)) {
            Ok(mut file) => {
                file.write_all(content).map(|()| true).map_err(|error| self.fault(name, error))
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(self.fault(name, error)),
        }
    }

    /// The file system's clock: the time of a file written now.
    fn clock(&mut self, now_seconds: f64) -> Result<SystemTime> {
        if !self.may_write {
            return Ok(SystemTime::now());
        }
        if let Some((at, time)) = self.clock
            && at == now_seconds
        {
            return Ok(time);
        }
        let temporary = self.write_temporary(b"?")?;
        let time = temporary.meta.modified().map_err(|error| self.fault("", error))?;
        temporary.remove();
        self.clock = Some((now_seconds, time));
        Ok(time)
    }

    /// `read`, given a path; a miss is believed once the directory is known to be fresh.
    fn read_path<T>(
        &self,
        path: &Path,
        read: impl Fn(&Path) -> io::Result<T>,
    ) -> Result<Option<T>> {
        let mut directory_is_fresh = false;
        let mut tries_left = 5;
        loop {
            match read(path) {
                Ok(value) => return Ok(Some(value)),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    if directory_is_fresh {
                        return Ok(None);
                    }
                    self.check_directory()?;
                    directory_is_fresh = true;
                }
                // NFS: the file was replaced between open and read.
                Err(error) if is(&error, &[Errno::STALE]) && tries_left > 0 => tries_left -= 1,
                Err(error) => return Err(Error::io(path, error)),
            }
        }
    }
}

impl ClaimStore for FsStore {
    fn create(&mut self, name: &str, content: &[u8]) -> Result<bool> {
        self.check_directory()?;
        if !self.has_hard_links {
            return self.create_in_place(name, content);
        }
        let temporary = self.write_temporary(content)?;
        let path = self.path.join(name);
        let linked = fs::hard_link(&temporary.path, &path);
        let is_ours = linked.is_ok() || temporary.is_at(&path);
        temporary.remove();
        match linked {
            _ if is_ours => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) if is(&error, NO_HARD_LINKS) => {
                self.has_hard_links = false;
                self.create_in_place(name, content)
            }
            Err(error) => Err(Error::io(&path, error)),
            Ok(()) => Ok(true),
        }
    }

    fn replace(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.check_directory()?;
        let temporary = self.write_temporary(content)?;
        let path = self.path.join(name);
        match fs::rename(&temporary.path, &path) {
            Err(error) if !temporary.is_at(&path) => {
                temporary.remove();
                Err(Error::io(&path, error))
            }
            _ => Ok(()),
        }
    }

    fn read(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        self.read_path(&self.path.join(name), |path| fs::read(path))
    }

    fn list(&mut self) -> Result<Vec<String>> {
        self.check_directory()?;
        let io = |error| Error::io(&self.path, error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io)? {
            if let Ok(name) = entry.map_err(io)?.file_name().into_string()
                && !name.starts_with('.')
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(self.fault(name, error)),
            _ => Ok(()),
        }
    }

    fn age_seconds(&mut self, name: &str, now_seconds: f64) -> Result<Option<f64>> {
        let clock = self.clock(now_seconds)?;
        // Opened and not only asked for: an NFS client then fetches the times anew.
        let modified = |path: &Path| File::open(path)?.metadata()?.modified();
        let modified = self.read_path(&self.path.join(name), modified)?;
        Ok(modified.map(|modified| match clock.duration_since(modified) {
            Ok(age) => age.as_secs_f64(),
            Err(ahead) => -ahead.duration().as_secs_f64(),
        }))
    }
}

/// A temporary file, closed.
struct Temporary {
    path: PathBuf,
    meta: fs::Metadata,
}

impl Temporary {
    /// Whether `path` is this very file. After an error this tells an operation that failed
    /// from one whose reply got lost.
    fn is_at(&self, path: &Path) -> bool {
        let meta = File::open(path).and_then(|file| file.metadata());
        meta.is_ok_and(|meta| (meta.dev(), meta.ino()) == (self.meta.dev(), self.meta.ino()))
    }

    /// Removes it; where that fails it stays, and nobody minds.
    fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// What `link` says on file systems without hard links: FAT, some FUSE and object stores.
const NO_HARD_LINKS: &[Errno] = &[Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS, Errno::MLINK];

fn is(error: &io::Error, kinds: &[Errno]) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| kinds.contains(&errno))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn store() -> (tempfile::TempDir, FsStore) {
        let run = tempfile::tempdir().unwrap();
        let store = FsStore::new(run.path()).unwrap();
        (run, store)
    }

    #[test]
    fn a_name_is_created_once_and_keeps_its_content() {
        for has_hard_links in [true, false] {
            let (_run, mut store) = store();
            store.has_hard_links = has_hard_links;
            assert_eq!(store.read("merge.0001").unwrap(), None);
            assert!(store.create("merge.0001", b"first").unwrap());
            assert!(!store.create("merge.0001", b"second").unwrap());
            assert_eq!(store.read("merge.0001").unwrap().unwrap(), b"first");
            store.replace("owner", b"a").unwrap();
            store.replace("owner", b"b").unwrap();
            assert_eq!(store.read("owner").unwrap().unwrap(), b"b");
            store.create("wish-00001", b"").unwrap();
            store.remove("wish-00001").unwrap();
            store.remove("wish-00001").unwrap();
            let names: BTreeSet<_> = fs::read_dir(&store.path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            assert_eq!(names, ["merge.0001", "owner"].map(String::from).into());
        }
    }

    #[test]
    fn leftovers_of_killed_processes_are_passed_over() {
        let (_run, mut store) = store();
        // The names that this process takes next are taken already.
        let base = store.write_temporary(b"torn").unwrap();
        let (stem, count) = base.path.to_str().unwrap().rsplit_once('-').unwrap();
        let count: u64 = count.parse().unwrap();
        for later in 1..5 {
            let _ = File::create_new(format!("{stem}-{}", count + later));
        }
        assert!(store.create("merge.0001", b"whole").unwrap());
        assert_eq!(store.list().unwrap(), ["merge.0001"]);
    }

    #[test]
    fn a_lost_reply_is_told_from_a_lost_race() {
        let (_run, store) = store();
        let ours = store.write_temporary(b"same").unwrap();
        let theirs = store.write_temporary(b"same").unwrap();
        let name = store.path.join("merge.0001");
        assert!(!ours.is_at(&name));
        fs::hard_link(&ours.path, &name).unwrap();
        assert!(ours.is_at(&name));
        assert!(!theirs.is_at(&name));
    }

    #[test]
    fn ages_are_by_the_clock_of_the_file_system() {
        let (_run, mut store) = store();
        store.replace("owner", b"").unwrap();
        let hour = std::time::Duration::from_secs(3600);
        let table = [
            (1.0, SystemTime::now() - hour, 3600.0),
            // A second look at the same moment does not ask the clock again.
            (1.0, SystemTime::now() - 2 * hour, 7200.0),
            (2.0, SystemTime::now() + hour, -3600.0),
        ];
        for (now, modified, expected) in table {
            File::open(store.path.join("owner")).unwrap().set_modified(modified).unwrap();
            let age = store.age_seconds("owner", now).unwrap().unwrap();
            assert!((age - expected).abs() < 600.0, "{age} instead of {expected}");
        }
        assert_eq!(store.age_seconds("nobody", 1.0).unwrap(), None);
        assert_eq!(store.list().unwrap(), ["owner"], "the clock leaves nothing behind");
    }

    #[test]
    fn a_directory_that_vanished_or_was_replaced_is_an_error_that_says_so() {
        let (run, mut store) = store();
        assert!(store.create("merge.0001", b"").unwrap());
        fs::rename(run.path().join("claims"), run.path().join("old")).unwrap();
        for result in [
            store.create("merge.0002", b"").map(drop),
            store.replace("owner", b""),
            store.read("merge.0001").map(drop),
            store.list().map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(error.message.contains("the run directory has vanished"), "{error}");
            assert!(error.message.contains("claims"), "{error}");
        }
        fs::create_dir(run.path().join("claims")).unwrap();
        let error = store.replace("owner", b"").unwrap_err();
        assert!(error.message.contains("another directory"), "{error}");
        assert_eq!(fs::read_dir(run.path().join("claims")).unwrap().count(), 0);
    }

    #[test]
    fn a_viewer_makes_nothing() {
        let run = tempfile::tempdir().unwrap();
        assert!(FsStore::view(run.path()).is_err());
        FsStore::new(run.path()).unwrap().replace("owner", b"").unwrap();
        let mut view = FsStore::view(run.path()).unwrap();
        assert!(view.age_seconds("owner", 0.0).unwrap().unwrap() < 100.0);
        assert_eq!(fs::read_dir(run.path().join("claims")).unwrap().count(), 1);
        assert!(FsStore::new(&run.path().join("absent")).is_err(), "only claims/ is made");
    }
}
