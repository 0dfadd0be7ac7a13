//! TensorBoard's event files.
//!
//! A file is a row of TFRecords (TensorFlow, `core/lib/io/record_writer.h`), each an `Event`
//! message (`core/util/event.proto`). The handful of fields that scalars need are encoded
//! here: protobuf is a tag byte and a value each.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::comm::host_name;
use crate::{Error, Result};

/// The first event's `file_version`. From 2 on, TensorBoard heeds session logs.
const VERSION: &str = "brain.Event:2";

/// A file that scalars are appended to.
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `dir`. TensorBoard forgets what older files there say of `first_step`
    /// and later ones.
    pub fn create(dir: &Path, first_step: u64) -> Result<Self> {
        let name = format!("events.out.tfevents.{}.{}", unix_seconds() as u64, host_name());
        let (path, file) = create_new(dir, &name)?;
        let mut events = Self { path, file };
        let mut start = record(&event(unix_seconds(), 0, 3, VERSION.as_bytes()));
        // SessionLog { status = START }.
        start.extend(record(&event(unix_seconds(), first_step, 7, &[0x08, 1])));
        events.append(&start)?;
        Ok(events)
    }

    /// Appends values under their tags.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        self.append(&record(&event(unix_seconds(), step, 5, &summary(scalars))))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.path, error))
    }
}

/// A file of this name, numbered where another launch began in the same second.
fn create_new(dir: &Path, name: &str) -> Result<(PathBuf, File)> {
    let mut path = dir.join(name);
    for n in 1.. {
        match File::create_new(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                path = dir.join(format!("{name}.{n}"));
            }
            file => return Ok((path.clone(), file.map_err(|error| Error::io(&path, error))?)),
        }
    }
    Err(Error::fault(format!("{}: no free name", path.display())))
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// `Event { wall_time = 1, step = 2, what }` with the length-delimited field number `field`.
fn event(wall_time: f64, step: u64, field: u8, what: &[u8]) -> Vec<u8> {
    let mut message = vec![0x09];
    message.extend(wall_time.to_le_bytes());
    message.push(0x10);
    varint(step, &mut message);
    delimited(field, what, &mut message);
    message
}

/// `Summary { value = 1: [Value { tag = 1, simple_value = 2 }] }`.
fn summary(scalars: &[(&str, f64)]) -> Vec<u8> {
    let mut message = Vec::new();
    for (tag, value) in scalars {
        let mut scalar = Vec::new();
        delimited(1, tag.as_bytes(), &mut scalar);
        scalar.push(0x15);
        scalar.extend((*value as f32).to_le_bytes());
        delimited(1, &scalar, &mut message);
    }
    message
}

/// A field of wire type 2: string, bytes or message.
fn delimited(field: u8, content: &[u8], message: &mut Vec<u8>) {
    message.push(field << 3 | 2);
    varint(content.len() as u64, message);
    message.extend(content);
}

fn varint(mut value: u64, message: &mut Vec<u8>) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// Length, its checksum, the data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc32c(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc32c(data).to_le_bytes());
    record
}

/// CRC-32C (Castagnoli), turned and shifted as TFRecords want it.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Bit by bit: a record is some hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 }
        })
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the algorithm, and iSCSI's for 32 zeros (RFC 3720, B.4).
    #[test]
    fn crc32c_gives_the_published_answers() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    /// The bytes are those of TensorBoard's own writer (2.21) for the same event.
    #[test]
    fn a_scalar_is_written_as_tensorboard_writes_it() {
        let bytes = record(&event(1.5, 300, 5, &summary(&[("train/loss", 0.25)])));
        let tensorboard = b"\x21\0\0\0\0\0\0\0\x01\x7b\xec\xf6\x09\0\0\0\0\0\0\xf8\x3f\x10\xac\x02\
            \x2a\x13\x0a\x11\x0a\x0atrain/loss\x15\0\0\x80\x3e\x65\x57\x98\x1f";
        assert_eq!(bytes, tensorboard);
    }

    /// Two launches within a second have a file each, and the second hides what the first
    /// said of the steps that come again.
    #[test]
    fn each_launch_has_its_file() {
        let dir = tempfile::tempdir().unwrap();
        for first_step in [0, 7] {
            EventFile::create(dir.path(), first_step).unwrap();
        }
        let mut files: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        assert_eq!(files.len(), 2);
        let bytes = std::fs::read(&files[1]).unwrap();
        assert!(bytes[..bytes.len() - 4].ends_with(&[0x10, 7, 0x3a, 2, 8, 1]));
    }
}
