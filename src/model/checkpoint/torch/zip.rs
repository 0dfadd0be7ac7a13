//! The zip files that torch.save writes: every entry stored as it is, so that a tensor's
//! values can stay mapped.
//!
//! Read are the end record, its zip64 form and the central directory (PKWARE's APPNOTE.TXT,
//! sections 4.3.7 to 4.3.16 and 4.5.3). Left out: compressed, encrypted and multi-part
//! archives, which torch never writes.

use std::collections::HashMap;
use std::ops::Range;

use crate::{Error, Result};

const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const CENTRAL_HEADER: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const END64_LOCATOR: &[u8] = b"PK\x06\x07";

const LOCAL_HEADER_LEN: usize = 30;
const CENTRAL_HEADER_LEN: usize = 46;
const END_LEN: usize = 22;
const END64_LEN: usize = 56;
const END64_LOCATOR_LEN: usize = 20;

/// The entries of a zip file by name, each the range of its bytes in the file.
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    /// The folder that all of torch's records are in: the first entry's.
    folder: &'a str,
    entries: HashMap<&'a str, Range<usize>>,
}

impl<'a> Archive<'a> {
    /// Reads the directory; every entry is then known to lie inside the file and to share
    /// no byte with another.
    pub fn open(bytes: &'a [u8]) -> Result<Self> {
        let directory = Directory::find(bytes)?;
        let mut folder = None;
        let mut entries = HashMap::new();
        let mut taken = Vec::new();
        let mut at = directory.range.start;
        while at < directory.range.end {
            let (entry, next) = CentralEntry::read(bytes, at, directory.range.end)?;
            let (whole, data) = entry.locate(bytes, directory.range.start)?;
            folder.get_or_insert(entry.name.split('/').next().unwrap_or_default());
            if entries.insert(entry.name, data).is_some() {
                return Err(damaged(format!("two entries are called {:?}", entry.name)));
            }
            taken.push((whole, entry.name));
            at = next;
        }
        if entries.len() as u64 != directory.count {
            return Err(damaged(format!(
                "{} entries where the end record counts {}",
                entries.len(),
                directory.count
            )));
        }
        taken.sort_by_key(|(range, _)| range.start);
        if let Some(pair) = taken.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
            return Err(damaged(format!("entries {:?} and {:?} overlap", pair[0].1, pair[1].1)));
        }
        Ok(Self { bytes, folder: folder.unwrap_or_default(), entries })
    }

    /// Where the bytes of torch's record `name` are ("data.pkl", "data/0").
    pub fn range(&self, name: &str) -> Option<Range<usize>> {
        self.entries.get(format!("{}/{name}", self.folder).as_str()).cloned()
    }

    /// The bytes of torch's record `name`.
    pub fn record(&self, name: &str) -> Option<&'a [u8]> {
        self.range(name).map(|range| &self.bytes[range])
    }
}

/// Where the central directory is.
struct Directory {
    range: Range<usize>,
    count: u64,
}

impl Directory {
    fn find(bytes: &[u8]) -> Result<Self> {
        let end = find_end(bytes)?;
        let record = &bytes[end..];
        let [count, size, start] = [
            u64::from(u16_at(record, 10)?),
            u32_at(record, 12)?.into(),
            u32_at(record, 16)?.into(),
        ];
        let saturated = count == 0xffff || size == 0xffff_ffff || start == 0xffff_ffff;
        let locator =
            end.checked_sub(END64_LOCATOR_LEN).filter(|at| has(bytes, *at, END64_LOCATOR));
        let Some(locator) = locator else {
            if saturated {
                return Err(damaged("its zip64 end record is missing"));
            }
            return Self::ending_at(end, start, size, count);
        };
        let at = to_usize(u64_at(bytes, locator + 8)?)?;
        if !has(bytes, at, END64) || at.checked_add(END64_LEN).is_none_or(|e| e > locator) {
            return Err(damaged("its zip64 end record is not where it should be"));
        }
        let [count64, size64, start64] =
            [u64_at(bytes, at + 32)?, u64_at(bytes, at + 40)?, u64_at(bytes, at + 48)?];
        let agree = (count == 0xffff || count == count64)
            && (size == 0xffff_ffff || size == size64)
            && (start == 0xffff_ffff || start == start64);
        if !agree {
            return Err(damaged("its two end records contradict each other"));
        }
        Self::ending_at(at, start64, size64, count64)
    }

    fn ending_at(end: usize, start: u64, size: u64, count: u64) -> Result<Self> {
        if start.checked_add(size) != Some(end as u64) {
            return Err(damaged("its directory is not where the end record says"));
        }
        Ok(Self { range: to_usize(start)?..end, count })
    }
}

/// Where the end record begins: the last one whose comment reaches the end of the file.
fn find_end(bytes: &[u8]) -> Result<usize> {
    let last = bytes.len().checked_sub(END_LEN);
    let first = bytes.len().saturating_sub(END_LEN + usize::from(u16::MAX));
    last.and_then(|last| {
        (first..=last).rev().find(|at| {
            has(bytes, *at, END)
                && u16_at(bytes, at + 20)
                    .is_ok_and(|n| at + END_LEN + usize::from(n) == bytes.len())
        })
    })
    .ok_or_else(|| damaged("no end record"))
}

/// One line of the central directory.
struct CentralEntry<'a> {
    name: &'a str,
    /// Bytes of the entry.
    size: u64,
    /// Where its local header begins.
    header: u64,
}

impl<'a> CentralEntry<'a> {
    /// The entry at `at`, and where the next one begins; both before `end`.
    fn read(bytes: &'a [u8], at: usize, end: usize) -> Result<(Self, usize)> {
        let short = || damaged("its directory is cut short");
        let fixed = at + CENTRAL_HEADER_LEN;
        if fixed > end || !has(bytes, at, CENTRAL_HEADER) {
            return Err(short());
        }
        let len = |offset| u16_at(bytes, at + offset).map(usize::from);
        let name_end = fixed + len(28)?;
        let extra_end = name_end + len(30)?;
        let next = extra_end + len(32)?;
        if next > end {
            return Err(short());
        }
        let name = std::str::from_utf8(&bytes[fixed..name_end])
            .map_err(|_| damaged("the name of an entry is not UTF-8"))?;
        let (flags, method) = (len(8)?, len(10)?);
        if method != 0 || flags & 1 != 0 {
            return Err(Error::input(format!(
                "entry {name:?} is compressed or encrypted, which torch.save never does: load \
                 the weights and save them again with torch.save, or convert them to safetensors"
            )));
        }
        let [mut packed, mut size, mut header] =
            [20, 24, 42].map(|o| u32_at(bytes, at + o).map(u64::from));
        widen(&bytes[name_end..extra_end], [&mut size, &mut packed, &mut header])?;
        let (packed, size, header) = (packed?, size?, header?);
        if packed != size {
            return Err(damaged(format!("entry {name:?} is stored, yet has two sizes")));
        }
        Ok((Self { name, size, header }, next))
    }

    /// The bytes of the whole entry and those of its data, both before `limit`.
    fn locate(&self, bytes: &[u8], limit: usize) -> Result<(Range<usize>, Range<usize>)> {
        let outside = || damaged(format!("entry {:?} reaches beyond the end", self.name));
        let start = to_usize(self.header)?;
        let name_at = start.checked_add(LOCAL_HEADER_LEN).ok_or_else(outside)?;
        if name_at > limit || !has(bytes, start, LOCAL_HEADER) {
            return Err(outside());
        }
        let name_len = usize::from(u16_at(bytes, start + 26)?);
        let data = name_at + name_len + usize::from(u16_at(bytes, start + 28)?);
        let end = data.checked_add(to_usize(self.size)?).ok_or_else(outside)?;
        if end > limit {
            return Err(outside());
        }
        if &bytes[name_at..name_at + name_len] != self.name.as_bytes() {
            return Err(damaged(format!("entry {:?} has another name at its data", self.name)));
        }
        Ok((start..end, data..end))
    }
}

/// Takes from the zip64 extra field what its 32-bit `fields` leave to it, in that order.
fn widen(mut extra: &[u8], fields: [&mut Result<u64>; 3]) -> Result<()> {
    let mut wide: &[u8] = &[];
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0)?, usize::from(u16_at(extra, 2)?));
        let body = extra.get(4..4 + len).ok_or_else(|| damaged("an extra field is cut short"))?;
        if id == 1 {
            wide = body;
        }
        extra = &extra[4 + len..];
    }
    for field in fields {
        if matches!(field, Ok(0xffff_ffff)) {
            *field = Ok(u64_at(wide, 0)?);
            wide = &wide[8..];
        }
    }
    Ok(())
}

fn damaged(what: impl std::fmt::Display) -> Error {
    Error::input(format!("not a whole zip file ({what}): damaged or cut short?"))
}

fn has(bytes: &[u8], at: usize, signature: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(signature))
}

fn to_usize(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| damaged("a size or place that no file has"))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or_else(|| damaged("a record is cut short"))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}
