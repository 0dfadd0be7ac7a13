//! The journal: where a rank keeps for good what it did, and how it is all read again.
//!
//! A rank writes one file a launch, `journal/LLLLL-RRRRR.farm` (launch and rank, at least five
//! digits each), made exclusively by [`JournalWriter`] and never appended to by another: a torn
//! tail stays where it is and is passed over. [`Journals`] reads the files of all launches,
//! those still growing too; what it finds decides what is done, and [`StoredLines`] gives the
//! output lines in index order.
//!
//! # The format
//!
//! A file is a sequence of frames. All numbers are little-endian.
//!
//! | bytes | |
//! |---|---|
//! | 0..4 | marker `F5 C0 FF F8`, four bytes that never stand in UTF-8 |
//! | 4 | kind: 1 header, 2 STARTED, 3 FINISHED, 4 FAILED, 5 SAVED |
//! | 5 | 0 |
//! | 6..8 | attempt at the record, from 0 (header: version of the format, 1) |
//! | 8..16 | index of the record (header: launch) |
//! | 16..24 | key of the record (header: rank) |
//! | 24..28 | n, length of the payload, at most 2³⁰ |
//! | 28..32 | CRC-32 of the run's key and bytes 0..28 (header: of bytes 0..28 alone) |
//! | 32..32+n | payload |
//! | 32+n..36+n | CRC-32 of what the one before covers, and the payload |
//!
//! The first frame is the header, its payload a [`JournalHeader`] as JSON. STARTED has no
//! payload and says that work on the record began; the payload of FINISHED and FAILED is the
//! output line without its `\n`, that of SAVED an unfinished generation.
//!
//! # Reading
//!
//! Where a frame is not whole, the reader looks for the next marker with a good head: damage
//! costs the frames that it touches and no other, is reported with file, byte and (where the
//! head is good) record, and never gives a wrong line. What stands after the last good frame
//! may be a frame that is being written and is read again next time. A file is read without
//! its header, too; that checksums begin with the run's key keeps out another run's frames.
//!
//! Of several FINISHED or FAILED frames for an index that of the highest attempt counts. Those
//! of one attempt are equal, since output does not depend on who made it.
//!
//! Left out: who may work on which record, what a saved generation means, and removing files.

pub(super) mod frame;
pub(super) mod outcomes;
mod scan;
mod sorted;
mod stored;
#[cfg(test)]
mod tests;
mod writer;

use serde::{Deserialize, Serialize};

pub use super::claims::LaunchId;
pub use scan::{Journals, LaunchCounts, TornTail};
pub use stored::StoredLines;
pub use writer::{JournalWriter, RecordSink, SyncPolicy};

/// Version of the format.
const FORMAT: u16 = 1;

/// Who writes a journal file, and for which run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalHeader {
    /// Key of the run: a file with another is not read.
    pub run_key: String,
    /// The launch.
    pub launch: LaunchId,
    /// The rank, of those that keep records.
    pub rank: usize,
    /// Name of its host.
    pub host: String,
    /// Its Slurm job, if it is in one.
    pub slurm_job_id: Option<String>,
    /// When the file was made, in seconds since 1970.
    pub started_unix_seconds: u64,
}

/// A record in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordId {
    /// Position of the record in the input, from 0.
    pub index: u64,
    /// The record's key: what it is made from.
    pub key: u64,
    /// Which attempt at it this is: 0, and one more for each time that it was asked for again.
    pub attempt: u16,
}

/// Name of a rank's file.
fn file_name(launch: LaunchId, rank: usize) -> String {
    format!("{launch:05}-{rank:05}.farm")
}

/// Launch and rank of a file's name; none where it is not a journal's.
fn parse_file_name(name: &str) -> Option<(LaunchId, usize)> {
    let (launch, rank) = name.strip_suffix(".farm")?.split_once('-')?;
    let (launch, rank) = (launch.parse().ok()?, rank.parse().ok()?);
    (file_name(launch, rank) == name).then_some((launch, rank))
}
