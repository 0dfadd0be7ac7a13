//! Frames: how a record is laid into bytes, and how the whole ones are found again in a
//! stream of bytes of which some are damaged or still missing. The format is in the
//! [module's documentation](super). No file is touched here.

use std::io::{self, Read};
use std::ops::Range;

use super::RecordId;
use crate::{Error, Result};

/// Begins each frame. No byte of it ever stands in UTF-8, and none stands in it twice.
const MARKER: [u8; 4] = [0xF5, 0xC0, 0xFF, 0xF8];
/// Bytes of a frame before its payload.
const HEAD_BYTES: usize = 32;
/// Bytes of the head that its own checksum covers.
const CHECKED_BYTES: usize = 28;
/// Bytes of a frame that are not payload.
const OVERHEAD_BYTES: usize = HEAD_BYTES + 4;
/// The longest payload; so far beyond any record that a longer one can only be a mistake.
const PAYLOAD_BYTES_MAX: usize = 1 << 30;
/// Bytes read at a time.
const READ_BYTES: u64 = 1 << 20;

/// What a frame says of its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Not of a record: the journal's header, its first frame.
    Header = 1,
    /// Work on the record began. No payload.
    Started = 2,
    /// The payload is its output line.
    Finished = 3,
    /// The payload is its output line, an error.
    Failed = 4,
    /// The payload is an unfinished generation, to be continued.
    Saved = 5,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Kind::Header, Kind::Started, Kind::Finished, Kind::Failed, Kind::Saved]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// A frame without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What the payload is.
    pub kind: Kind,
    /// The record.
    pub id: RecordId,
    /// Length of the payload.
    pub payload_bytes: u32,
}

impl Head {
    /// Length of the whole frame.
    pub fn frame_bytes(&self) -> usize {
        OVERHEAD_BYTES + self.payload_bytes as usize
    }
}

/// What checksums of a run's frames begin with, so that those of another run are never
/// taken for this one's, even where the header of their file is damaged.
pub fn run_seed(run_key: &str) -> u32 {
    checksum(0, run_key.as_bytes())
}

/// Appends a frame to `out`. Fails (and appends nothing) where the payload is over 1 GiB.
pub fn encode(
    seed: u32,
    kind: Kind,
    id: RecordId,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<()> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        let bytes = payload.len();
        let message = format!("record {}: {bytes} bytes are too many for the journal", id.index);
        return Err(Error::fault(message));
    }
    let start = out.len();
    out.extend(MARKER);
    out.extend([kind as u8, 0]);
    out.extend(id.attempt.to_le_bytes());
    out.extend(id.index.to_le_bytes());
    out.extend(id.key.to_le_bytes());
    out.extend((payload.len() as u32).to_le_bytes());
    let head = checksum(seed_for(kind as u8, seed), &out[start..]);
    out.extend(head.to_le_bytes());
    out.extend(payload);
    out.extend(checksum(head, payload).to_le_bytes());
    Ok(())
}

/// Leaves the payload of the whole frame in `frame`; none, and all bytes as they are, where
/// it is damaged.
pub fn strip(seed: u32, frame: &mut Vec<u8>) -> Option<Head> {
    let Look::Whole(head) = look(frame, seed) else { return None };
    frame.truncate(payload_of(&head).end);
    frame.drain(..HEAD_BYTES);
    Some(head)
}

/// Bytes of the whole frames in `bytes`, which begin with a frame and hold no damage: where
/// to cut after a write that ended early.
pub fn whole_frames_bytes(bytes: &[u8]) -> usize {
    let mut end = 0;
    while let Some(head) = bytes.get(end..end + HEAD_BYTES) {
        let next = end + OVERHEAD_BYTES + u32_at(head, 24) as usize;
        if next > bytes.len() {
            break;
        }
        end = next;
    }
    end
}

/// What the bytes at a place are.
enum Look {
    /// A frame, whole and undamaged.
    Whole(Head),
    /// Perhaps a frame of which not all is there yet; with its head, it certainly is one.
    Short(Option<Head>),
    /// No frame, or (with its head) one whose payload is damaged.
    Bad(Option<Head>),
}

fn look(bytes: &[u8], seed: u32) -> Look {
    let start = &bytes[..bytes.len().min(MARKER.len())];
    if !MARKER.starts_with(start) {
        return Look::Bad(None);
    }
    let Some(head_bytes) = bytes.get(..HEAD_BYTES) else { return Look::Short(None) };
    let head_checksum = checksum(seed_for(bytes[4], seed), &bytes[..CHECKED_BYTES]);
    let payload_bytes = u32_at(head_bytes, 24);
    let Some(kind) = Kind::of(bytes[4]) else { return Look::Bad(None) };
    if head_checksum != u32_at(head_bytes, CHECKED_BYTES)
        || payload_bytes as usize > PAYLOAD_BYTES_MAX
    {
        return Look::Bad(None);
    }
    let attempt = u16::from_le_bytes([bytes[6], bytes[7]]);
    let id = RecordId { index: u64_at(head_bytes, 8), key: u64_at(head_bytes, 16), attempt };
    let head = Head { kind, id, payload_bytes };
    let Some(frame) = bytes.get(..head.frame_bytes()) else { return Look::Short(Some(head)) };
    let payload = payload_of(&head);
    match checksum(head_checksum, &frame[payload.clone()]) == u32_at(frame, payload.end) {
        true => Look::Whole(head),
        false => Look::Bad(Some(head)),
    }
}

/// The header is read before it is known whose file it is: its checksum has no seed.
fn seed_for(kind: u8, seed: u32) -> u32 {
    if kind == Kind::Header as u8 { 0 } else { seed }
}

fn payload_of(head: &Head) -> Range<usize> {
    HEAD_BYTES..HEAD_BYTES + head.payload_bytes as usize
}

/// CRC-32 of `bytes`, going on from `seed`.
fn checksum(seed: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(bytes);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// What comes next in a journal.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A whole frame.
    Frame {
        /// Where in the file it begins.
        offset: u64,
        /// Kind, record, length.
        head: Head,
        /// Its payload.
        payload: &'a [u8],
    },
    /// Bytes between frames that are none.
    Damage(Damage),
}

/// Bytes that were a frame, or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where in the file.
    pub bytes: Range<u64>,
    /// The first frame's head, where that is undamaged.
    pub head: Option<Head>,
}

/// What stands after the last whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// Where in the file it lies.
    pub bytes: Range<u64>,
    /// The head of the frame that it begins with, where that is whole.
    pub head: Option<Head>,
    /// More is wrong with it than that bytes are missing at its end.
    pub damaged: bool,
}

/// Finds the frames in a stream of bytes. What is damaged is passed over up to the next good
/// head. Bytes after the last frame are no damage but the [`tail`](Self::tail): they may be a
/// frame that is being written.
pub struct FrameReader<R> {
    source: R,
    seed: u32,
    buffer: Vec<u8>,
    /// What was passed of the buffer.
    start: usize,
    /// Where in the file `buffer[start]` lies.
    offset: u64,
    /// Where damage began that is not reported yet, and the head there.
    lost: Option<(u64, Option<Head>)>,
    /// The head of the frame that the stream ended in.
    cut: Option<Head>,
}

impl<R: Read> FrameReader<R> {
    /// Reads `source`, which stands at `offset` of the file, at a frame's start.
    pub fn new(source: R, offset: u64, seed: u32) -> Self {
        Self { source, seed, buffer: Vec::new(), start: 0, offset, lost: None, cut: None }
    }

    /// The next frame or damage; none at the end of what is there.
    pub fn next(&mut self) -> io::Result<Option<Event<'_>>> {
        loop {
            let found = look(&self.buffer[self.start..], self.seed);
            let (Look::Whole(head) | Look::Short(Some(head)) | Look::Bad(Some(head))) = found
            else {
                match found {
                    Look::Short(_) if !self.fill()? => return Ok(None),
                    Look::Short(_) => {}
                    _ => self.pass_bad(None),
                }
                continue;
            };
            // A good head shows that what lies before it will not become whole any more.
            if let Some((from, head)) = self.lost.take() {
                return Ok(Some(Event::Damage(Damage { bytes: from..self.offset, head })));
            }
            match found {
                Look::Whole(_) => {
                    let (offset, at) = (self.offset, self.start);
                    self.pass(head.frame_bytes());
                    let payload = payload_of(&head);
                    let payload = &self.buffer[at + payload.start..at + payload.end];
                    return Ok(Some(Event::Frame { offset, head, payload }));
                }
                Look::Short(_) => {
                    if !self.fill()? {
                        self.cut = Some(head);
                        return Ok(None);
                    }
                }
                Look::Bad(_) => self.pass_bad(Some(head)),
            }
        }
    }

    /// What is left when [`next`](Self::next) has returned none.
    pub fn tail(&self) -> Option<Tail> {
        let end = self.offset + (self.buffer.len() - self.start) as u64;
        let (from, head) = self.lost.unwrap_or((self.offset, self.cut));
        (from < end).then_some(Tail { bytes: from..end, head, damaged: self.lost.is_some() })
    }

    fn pass(&mut self, bytes: usize) {
        self.start += bytes;
        self.offset += bytes as u64;
    }

    /// Goes on to what could be the next marker.
    fn pass_bad(&mut self, head: Option<Head>) {
        self.lost.get_or_insert((self.offset, head));
        let rest = &self.buffer[self.start + 1..];
        let marker = rest.iter().position(|&byte| byte == MARKER[0]);
        self.pass(1 + marker.unwrap_or(rest.len()));
    }

    /// Reads on; false at the end. The buffer grows with what is there, never by what a head
    /// claims.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let read = self.source.by_ref().take(READ_BYTES).read_to_end(&mut self.buffer)?;
        Ok(read > 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEED: u32 = 77;

    /// An event that owns its bytes; damage by its place.
    #[derive(Debug, Clone, PartialEq)]
    enum Seen {
        Frame(u64, Head, Vec<u8>),
        Damage(Damage),
    }

    fn read(bytes: impl Read) -> (Vec<Seen>, Option<Tail>) {
        let mut reader = FrameReader::new(bytes, 0, SEED);
        let mut seen = Vec::new();
        while let Some(event) = reader.next().unwrap() {
            seen.push(match event {
                Event::Frame { offset, head, payload } => Seen::Frame(offset, head, payload.into()),
                Event::Damage(damage) => Seen::Damage(damage),
            });
        }
        (seen, reader.tail())
    }

    /// Frames of these payloads, and where each begins.
    fn journal(payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<u64>) {
        let (mut bytes, mut starts) = (Vec::new(), Vec::new());
        for (index, payload) in payloads.iter().enumerate() {
            starts.push(bytes.len() as u64);
            let id = RecordId { index: index as u64, key: 5, attempt: 2 };
            encode(SEED, Kind::Saved, id, payload, &mut bytes).unwrap();
        }
        starts.push(bytes.len() as u64);
        (bytes, starts)
    }

    fn frames(seen: &[Seen]) -> Vec<(u64, Vec<u8>)> {
        let frames = seen.iter().filter_map(|seen| match seen {
            Seen::Frame(_, head, payload) => Some((head.id.index, payload.clone())),
            Seen::Damage(_) => None,
        });
        frames.collect()
    }

    /// Pieces of markers and heads, zeros, and anything.
    fn payload() -> impl Strategy<Value = Vec<u8>> {
        let id = RecordId { index: 3, key: 0, attempt: 0 };
        let mut frame = Vec::new();
        encode(SEED + 1, Kind::Finished, id, b"{}", &mut frame).unwrap();
        let piece = prop_oneof![
            (0..=4usize).prop_map(|len| MARKER[..len].to_vec()),
            (0..=frame.len()).prop_map(move |len| frame[..len].to_vec()),
            (0..40usize).prop_map(|len| vec![0; len]),
            prop::collection::vec(any::<u8>(), 0..40),
        ];
        prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat())
    }

    /// A source that gives few bytes at a time.
    struct Dribble<'a>(&'a [u8], usize);

    impl Read for Dribble<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = self.1.min(buffer.len()).min(self.0.len());
            let (now, later) = self.0.split_at(len);
            buffer[..len].copy_from_slice(now);
            self.0 = later;
            Ok(len)
        }
    }

    #[test]
    fn the_bytes_of_a_frame_are_as_documented() {
        let id = RecordId { index: 0x0102, key: 0x0304, attempt: 0x0506 };
        let mut bytes = b"before".to_vec();
        encode(run_seed("k"), Kind::Finished, id, b"{}", &mut bytes).unwrap();
        let frame = &bytes[6..];
        assert_eq!(frame[..8], [0xF5, 0xC0, 0xFF, 0xF8, 3, 0, 6, 5]);
        assert_eq!(frame[8..24], [2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(frame[24..28], [2, 0, 0, 0]);
        // Seeds go on: each checksum is that of all bytes from the run's key up to itself, but
        // for the one before it.
        let head = crc32fast::hash(&[b"k", &frame[..28]].concat());
        assert_eq!(frame[28..32], head.to_le_bytes());
        let all = crc32fast::hash(&[b"k", &frame[..28], b"{}"].concat());
        assert_eq!(frame[32..], [b"{}".as_slice(), &all.to_le_bytes()].concat());
    }

    #[test]
    fn frames_of_another_run_are_none() {
        let (bytes, starts) = journal(&[b"{}".to_vec()]);
        assert_eq!(strip(SEED + 1, &mut bytes.clone()), None);
        let mut payload = bytes.clone();
        assert!(strip(SEED, &mut payload).is_some() && payload == b"{}");
        let mut reader = FrameReader::new(&bytes[..], 0, SEED + 1);
        assert_eq!(reader.next().unwrap(), None);
        assert_eq!(reader.tail(), Some(Tail { bytes: 0..starts[1], head: None, damaged: true }));
    }

    /// A claimed length costs nothing before its bytes are there.
    #[test]
    fn a_long_frame_that_is_missing_takes_no_memory() {
        let mut bytes = Vec::new();
        let id = RecordId { index: 0, key: 0, attempt: 0 };
        encode(SEED, Kind::Saved, id, &[], &mut bytes).unwrap();
        bytes[24..28].copy_from_slice(&(PAYLOAD_BYTES_MAX as u32).to_le_bytes());
        let head = checksum(SEED, &bytes[..28]);
        bytes[28..32].copy_from_slice(&head.to_le_bytes());
        let mut reader = FrameReader::new(&bytes[..], 0, SEED);
        assert_eq!(reader.next().unwrap(), None);
        assert!(reader.buffer.capacity() < 4 << 20);
        assert_eq!(reader.tail().unwrap().head.unwrap().payload_bytes, PAYLOAD_BYTES_MAX as u32);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn payloads_like_markers_come_back_however_the_bytes_arrive(
            payloads in prop::collection::vec(payload(), 0..8),
            step in 1usize..100,
        ) {
            let (bytes, starts) = journal(&payloads);
            let (seen, tail) = read(Dribble(&bytes, step));
            let plain: Vec<_> = (0..).zip(payloads).collect();
            prop_assert_eq!(frames(&seen), plain);
            prop_assert_eq!(seen.len() + 1, starts.len());
            prop_assert_eq!(tail, None);
        }

        #[test]
        fn a_cut_leaves_the_whole_frames_and_a_tail(
            payloads in prop::collection::vec(payload(), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let (bytes, starts) = journal(&payloads);
            let cut = cut.index(bytes.len());
            let whole = starts.iter().filter(|&&start| start <= cut as u64).count() - 1;
            let (seen, tail) = read(&bytes[..cut]);
            prop_assert_eq!(seen.len(), whole);
            prop_assert_eq!(frames(&seen).len(), whole);
            prop_assert_eq!(whole_frames_bytes(&bytes[..cut]) as u64, starts[whole]);
            match tail {
                None => prop_assert_eq!(cut as u64, starts[whole]),
                Some(tail) => {
                    prop_assert_eq!(tail.bytes, starts[whole]..cut as u64);
                    prop_assert!(!tail.damaged);
                    let index = tail.head.map(|head| head.id.index);
                    let has_head = cut as u64 >= starts[whole] + HEAD_BYTES as u64;
                    prop_assert_eq!(index, has_head.then_some(whole as u64));
                }
            }
        }

        /// Garbage costs the frames that it touches and no other; what is left out of the frames
        /// is in the reported places, and all of those touch the garbage's frames.
        #[test]
        fn garbage_costs_what_it_touches(
            payloads in prop::collection::vec(payload(), 1..8),
            spots in prop::collection::vec(
                (any::<prop::sample::Index>(), prop_oneof![
                    prop::collection::vec(any::<u8>(), 1..60),
                    (1usize..200).prop_map(|len| vec![0; len]),
                    payload(),
                ]),
                1..4,
            ),
        ) {
            let (whole, starts) = journal(&payloads);
            let mut bytes = whole.clone();
            for (at, garbage) in &spots {
                let at = at.index(bytes.len());
                let len = garbage.len().min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&garbage[..len]);
            }
            let (seen, tail) = read(&bytes[..]);
            let intact = |frame: usize| {
                let range = starts[frame] as usize..starts[frame + 1] as usize;
                bytes[range.clone()] == whole[range]
            };
            let plain: Vec<_> = (0..payloads.len()).filter(|&frame| intact(frame)).collect();
            let found: Vec<_> = frames(&seen).iter().map(|frame| frame.0 as usize).collect();
            prop_assert_eq!(&found, &plain);
            for (index, payload) in frames(&seen) {
                prop_assert_eq!(&payload, &payloads[index as usize]);
            }
            let mut lost: Vec<_> = seen.iter().filter_map(|seen| match seen {
                Seen::Damage(damage) => Some((damage.bytes.clone(), damage.head)),
                Seen::Frame(..) => None,
            }).collect();
            lost.extend(tail.map(|tail| (tail.bytes, tail.head)));
            for frame in (0..payloads.len()).filter(|&frame| !intact(frame)) {
                let place = lost.iter().find(|(bytes, _)| bytes.contains(&starts[frame]));
                prop_assert!(place.is_some_and(|(bytes, _)| bytes.end >= starts[frame + 1]));
            }
            for (bytes, head) in lost {
                let frame = starts.iter().position(|&start| start == bytes.start);
                prop_assert!(frame.is_some_and(|frame| !intact(frame)), "{:?}", bytes);
                let index = head.map(|head| head.id.index as usize);
                prop_assert!(index.is_none() || index == frame);
            }
        }

        /// Any bytes at all: an end without a panic, and no frame from nothing.
        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let (seen, tail) = read(&bytes[..]);
            prop_assert_eq!(seen, vec![]);
            prop_assert_eq!(tail.map(|tail| tail.bytes), (!bytes.is_empty()).then_some(0..bytes.len() as u64));
        }
    }

    /// One flipped bit costs one frame, which is reported where it stood.
    #[test]
    fn every_single_bit_costs_one_frame_at_most() {
        let payloads = [b"{\"a\":1}".to_vec(), vec![], MARKER.to_vec(), b"{}".to_vec()];
        let (whole, starts) = journal(&payloads);
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let hit = starts.iter().filter(|&&start| start <= bit as u64 / 8).count() - 1;
            let (seen, tail) = read(&bytes[..]);
            let expected: Vec<_> =
                (0..).zip(payloads.clone()).filter(|f| f.0 != hit as u64).collect();
            assert_eq!(frames(&seen), expected, "bit {bit}");
            let place = starts[hit]..starts[hit + 1];
            match seen.get(hit) {
                Some(Seen::Damage(damage)) => assert_eq!(damage.bytes, place, "bit {bit}"),
                _ => assert_eq!(tail.unwrap().bytes, place, "bit {bit}"),
            }
        }
    }
}
