//! How much more a node can take: the file system's free space and, where the stage
//! directory is memory, the tightest limit up the tree of control groups, because
//! pages of /dev/shm count against the job's `--mem`.

use std::fs;
use std::path::Path;

use super::plan::Space;
use crate::{Error, Result};

/// `f_type` of tmpfs and ramfs (linux/magic.h).
const MEMORY_FILE_SYSTEMS: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Room in `directory`, which exists.
pub fn free_space(directory: &Path) -> Result<Space> {
    let io = |error: rustix::io::Errno| Error::io(directory, error.into());
    let stat = rustix::fs::statvfs(directory).map_err(io)?;
    let in_memory = rustix::fs::statfs(directory).map_err(io)?.f_type;
    let mut space = Space {
        free_bytes: stat.f_bavail * stat.f_frsize,
        limited_by: format!("free in {}", directory.display()),
    };
    if MEMORY_FILE_SYSTEMS.contains(&(in_memory as u64)) {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        if let Some(memory) = cgroup_space(&groups, Path::new("/sys/fs/cgroup"))
            && memory.free_bytes < space.free_bytes
        {
            space = memory;
        }
    }
    Ok(space)
}

/// The tightest memory limit over the groups that `/proc/self/cgroup`'s text names.
fn cgroup_space(groups: &str, mount: &Path) -> Option<Space> {
    groups
        .lines()
        .filter_map(|line| {
            // "0::/path" is version 2; "4:memory:/path" version 1.
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let path = path.trim_start_matches('/');
            if controllers.is_empty() {
                tightest(mount, path, &VERSION_2)
            } else if controllers.split(',').any(|name| name == "memory") {
                tightest(&mount.join("memory"), path, &VERSION_1)
            } else {
                None
            }
        })
        .min_by_key(|space| space.free_bytes)
}

/// Names of a control group's files.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Entries of memory.stat that the kernel gives back under pressure.
    reclaimable: [&'static str; 2],
}

const VERSION_2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
};
const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
};

/// The least headroom from the group `path` up to `mount`.
fn tightest(mount: &Path, path: &str, files: &Files) -> Option<Space> {
    let group = mount.join(path);
    group
        .ancestors()
        .take_while(|group| group.starts_with(mount))
        .filter_map(|group| {
            Some(Space {
                free_bytes: headroom(group, files)?,
                limited_by: format!(
                    "memory limit of the job, {}",
                    group.join(files.limit).display()
                ),
            })
        })
        .min_by_key(|space| space.free_bytes)
}

fn headroom(group: &Path, files: &Files) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    // "max" and a group without the file mean no limit.
    let limit: u64 = read(files.limit)?.trim().parse().ok()?;
    let usage: u64 = read(files.usage)?.trim().parse().ok()?;
    let cache: u64 = read("memory.stat")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| files.reclaimable.contains(name))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_limit_up_the_tree_counts_and_page_cache_does_not() {
        let root = tempfile::tempdir().unwrap();
        let job = root.path().join("slurm/job_7");
        group(
            &job,
            &[
                ("memory.max", "1000\n"),
                ("memory.current", "900\n"),
                ("memory.stat", "anon 100\ninactive_file 300\nactive_file 50\nshmem 450\n"),
            ],
        );
        group(&job.join("step_0"), &[("memory.max", "max\n"), ("memory.current", "900\n")]);
        let space = cgroup_space("0::/slurm/job_7/step_0\n", root.path()).unwrap();
        assert_eq!(space.free_bytes, 450);
        assert!(space.limited_by.contains("job_7/memory.max"), "{}", space.limited_by);
    }

    #[test]
    fn version_1_is_understood_and_no_limit_is_none() {
        let root = tempfile::tempdir().unwrap();
        group(
            &root.path().join("memory/job"),
            &[("memory.limit_in_bytes", "500"), ("memory.usage_in_bytes", "100")],
        );
        let groups = "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n";
        assert_eq!(cgroup_space(groups, root.path()).unwrap().free_bytes, 400);
        assert_eq!(cgroup_space("0::/none\n", root.path()), None);
    }

    #[test]
    fn a_real_directory_has_room() {
        assert!(free_space(&std::env::temp_dir()).unwrap().free_bytes > 0);
    }
}
