//! What the kernel counted for this process. Ranks of `--local-ranks` share a process
//! and so these figures.

/// Most resident memory so far: `VmHWM` of `/proc/self/status` (proc_pid_status(5)).
pub fn peak_resident_bytes() -> Option<u64> {
    kib_field(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Bytes fetched from storage so far: `read_bytes` of `/proc/self/io` (proc_pid_io(5)).
/// Pages that were cached already do not count; some network file systems do not count at all.
pub fn disk_read_bytes() -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/io").ok()?, "read_bytes:")?.parse().ok()
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read() {
        assert_eq!(kib_field("VmPeak: 9 kB\nVmHWM:\t   2048 kB\n", "VmHWM:"), Some(2 << 20));
        assert_eq!(kib_field("VmHWM: lots\n", "VmHWM:"), None);
        assert_eq!(field("rchar: 5\nread_bytes: 7\n", "read_bytes:"), Some("7"));
        assert!(peak_resident_bytes().is_some_and(|bytes| bytes > 0));
    }
}
