//! Who works on what, where several launches of farm share one run directory.
//!
//! `RUN_DIR/claims/` is all that launches know of each other: files that appear by one
//! atomic operation, no locks, no server, no network between jobs.
//!
//! # Claims
//!
//! A resource (`block-00000012`, `merge`) is a chain of *generations*, files `NAME.0001`,
//! `NAME.0002`, …; the newest says how it stands: `held` by a launch, `free`, or `done` with
//! a value. To take a resource, to give it back, to finish it or to take it over from an
//! owner that is gone is one operation: create the generation after the newest one seen.
//! Creation is exclusive, so of two launches that saw the same generation one succeeds and
//! the other learns that the world moved on. A claim is never renamed, rewritten or removed:
//! a name once seen means the same for ever (no ABA), may be cached, and a chain has no gaps.
//! Nobody goes past `done`, since to create a generation one must have read the one before.
//!
//! What this does not exclude: an owner that only *seems* gone (stopped, cut off from the
//! file system) may come back and work on what others took over. It finds out by
//! [`Claims::lost`]; until then a record may be generated twice, and the journal keeps one.
//! So claims save work, and the output does not depend on them, except that a merge ends in
//! a rename of equal bytes.
//!
//! # Owners
//!
//! A *launch* is one start of farm on the run. Its number is given by the exclusive
//! creation of `owner-LLLLL.json`, which says who it is ([`Owner`]), whether it left, and
//! how far it is; the file is replaced every few seconds, and its time is the heartbeat
//! ([`Heartbeat`]). [`judge`] says when an owner is gone: at once where something proves it
//! (it left; its process is no more; a newer restart of its job is here; its step has
//! ended), else when its heartbeat has stopped. Slurm is asked only about owners without a
//! heartbeat for one and a half periods. Stopped means
//! - older than the timeout, *and* watched without a beat for six periods: after a file
//!   server was away for minutes all heartbeats are old, and all owners alive. For the same
//!   reason a clock that is wrong by hours makes nobody seem dead; or
//! - watched without a beat for the whole timeout, however young it claims to be.
//!
//! A heartbeat that goes on revives an owner for everybody; proofs are final.
//!
//! `wish-LLLLL` says that launch L has nothing to do and would take blocks that others give
//! back. It is the only file that is removed.
//!
//! # Why each step holds on NFS and Lustre
//!
//! - **Create** writes a temporary file, closes it, and hard-links it to the name.
//!   `link` is one operation of the server (of Lustre's MDS): it fails where the name is
//!   taken, and readers see the whole content or no file. It is not forced to the disk: a
//!   claim that a power failure took or cut is worth no more than its owner, who died of the
//!   same. An NFS reply may get lost and the
//!   repeated request then say "exists" (or anything else): so after every error we look
//!   whether the name is our temporary file (same inode), and then it was ours. No `flock`,
//!   no `fcntl`: they need a lock service and client mounts that agree.
//! - Where the file system has **no hard links**: `O_CREAT|O_EXCL` on the name itself, which
//!   is exclusive on NFS from version 3 on, but the content comes after the name. A claim
//!   therefore ends in a checksum line, and one without is nobody's yet: it counts as held by
//!   an unknown launch, and as abandoned when its file is as old as a heartbeat that stopped.
//!   The same goes for a claim that the disk has damaged; a damaged `done` is done again.
//! - **Replace** is a temporary file and `rename`, atomic for readers on both; a reader that
//!   holds the old file on NFS gets `ESTALE` and reads again.
//! - **Read**: NFS clients remember for up to a minute that a name was *not* there. So a miss
//!   counts only after the directory has been opened, which makes the client ask the server
//!   whether it changed (close-to-open), and the name looked up once more. Lustre's locks
//!   keep clients coherent by themselves. Should a reader see an old state all the same, its
//!   next creation fails and it looks again.
//! - **Age** is the file's modification time against that of a file written just before, so
//!   that on NFS both are the server's clock; this machine's is not used. Lustre takes times
//!   from the clients: there their clocks should agree within the timeout, and where they do
//!   not, the rule above about watching still tells who beats.
//! - The directory is known by its inode: if the run directory is moved or replaced under a
//!   running job, that is an error, never a write into another run's claims.
//!
//! Temporary files are `.tmp-HOST-…`; one that a killed process left is passed over, and
//! stays: a few hundred bytes, and removing it could hit a slow process between write and
//! link.
//!
//! Left out: what a block is and who merges (the callers'), asking Slurm (given to
//! [`HostEvidence`]), clocks ([`Claims`] takes `now_seconds`; only the heartbeat thread waits
//! on its own).

mod heartbeat;
mod owner;
#[cfg(test)]
pub(crate) mod sim_store;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod watch;

pub use heartbeat::Heartbeat;
pub use owner::{
    Evidence, Findings, Gone, HostEvidence, JobRef, LaunchId, Owner, OwnerFile, OwnerProgress,
    OwnerState, ProcessId, UNKNOWN_LAUNCH, judge,
};
pub use store::{ClaimStore, FsStore};
pub use table::{Claims, ClaimsConfig, Standing};
pub use watch::SeenOwner;
