//! The messages between rank 0 and the other workers, and their encoding.
//!
//! Two tags, one each way, so that the messages of a pair stay in order. Numbers are
//! little-endian; byte strings carry their length before them; record bodies
//! and output lines travel as they are. Every read is checked: a damaged message is
//! an error, never a panic.

use std::borrow::Cow;

use crate::comm::{Tag, tags};
use crate::ledger::{Finished, Load, Task};
use crate::prompts::{RawBody, RawRecord};
use crate::{Error, Result};

/// Messages from workers to rank 0.
pub const TAG_TO_COORDINATOR: Tag = tags::FIRST_FREE;
/// Messages from rank 0 to workers.
pub const TAG_TO_WORKER: Tag = tags::FIRST_FREE + 1;

/// From a worker to rank 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Update {
    /// What the worker is doing: also its standing request for records.
    pub load: Load,
    /// Records that ever reached it.
    pub received_records: u64,
    /// The worker wants the run to drain (a signal, or a fault of its own).
    pub stop: bool,
    /// The worker's last message.
    pub goodbye: bool,
    /// Records finished since the last message.
    pub finished: Vec<Finished>,
}

/// From rank 0 to a worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Order {
    /// Records to work on.
    Block(Vec<Task>),
    /// No more records will come.
    NoMore {
        /// The run drains: what has not started is not to be started.
        stopped: bool,
    },
}

impl Update {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let lines: usize = self.finished.iter().map(|f| f.line.len() + 32).sum();
        let mut out = Encoder(Vec::with_capacity(64 + lines));
        let load = &self.load;
        for count in [load.slots, load.running, load.waiting] {
            out.u64(count as u64);
        }
        out.u64(load.processed_cost.to_bits());
        out.u64(self.received_records);
        out.u8(u8::from(self.stop));
        out.u8(u8::from(self.goodbye));
        out.u64(self.finished.len() as u64);
        for finished in &self.finished {
            out.u64(finished.index);
            out.u64(finished.cost.to_bits());
            out.u64(finished.new_tokens);
            out.u8(u8::from(finished.is_error));
            out.bytes(&finished.line);
        }
        out.0
    }

    /// Reads [`Update::encode`]'s bytes; an error if they are anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder(bytes);
        let load = Load {
            slots: input.u64()? as usize,
            running: input.u64()? as usize,
            waiting: input.u64()? as usize,
            processed_cost: f64::from_bits(input.u64()?),
        };
        let received_records = input.u64()?;
        let stop = input.bool()?;
        let goodbye = input.bool()?;
        let mut finished = Vec::new();
        for _ in 0..input.u64()? {
            let index = input.u64()?;
            let cost = f64::from_bits(input.u64()?);
            let new_tokens = input.u64()?;
            let is_error = input.bool()?;
            let line = input.bytes()?;
            finished.push(Finished { index, line, is_error, cost, new_tokens });
        }
        input.end()?;
        Ok(Self { load, received_records, stop, goodbye, finished })
    }
}

const BLOCK: u8 = 1;
const NO_MORE: u8 = 2;
const STOPPED: u8 = 3;

const TEXT: u8 = 1;
const JSON: u8 = 2;
const BAD: u8 = 3;

impl Order {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder(Vec::new());
        match self {
            Order::NoMore { stopped } => out.u8(if *stopped { STOPPED } else { NO_MORE }),
            Order::Block(tasks) => {
                out.u8(BLOCK);
                out.u64(tasks.len() as u64);
                for Task { record, attempt, saved } in tasks {
                    let (kind, body) = kind_and_bytes(&record.body);
                    out.u64(record.index);
                    out.u64(record.line);
                    out.u8(kind);
                    out.bytes(&body);
                    out.u64((*attempt).into());
                    out.u8(saved.is_some().into());
                    out.bytes(saved.as_deref().unwrap_or_default());
                }
            }
        }
        out.0
    }

    /// Reads [`Order::encode`]'s bytes; an error if they are anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder(bytes);
        let order = match input.u8()? {
            NO_MORE => Order::NoMore { stopped: false },
            STOPPED => Order::NoMore { stopped: true },
            BLOCK => {
                let mut tasks = Vec::new();
                for _ in 0..input.u64()? {
                    let (index, line, kind) = (input.u64()?, input.u64()?, input.u8()?);
                    let body = input.bytes()?;
                    let body = match kind {
                        TEXT => RawBody::Text(body),
                        JSON => RawBody::Json(body),
                        BAD => {
                            let (code, message) =
                                serde_json::from_slice(&body).map_err(|_| damaged())?;
                            RawBody::Bad { code, message }
                        }
                        _ => return Err(damaged()),
                    };
                    let record = RawRecord { index, line, body };
                    let attempt = input.u64()?.try_into().map_err(|_| damaged())?;
                    let is_saved = input.bool()?;
                    let saved = Some(input.bytes()?).filter(|_| is_saved);
                    tasks.push(Task { record, attempt, saved });
                }
                Order::Block(tasks)
            }
            _ => return Err(damaged()),
        };
        input.end()?;
        Ok(order)
    }
}

fn kind_and_bytes(body: &RawBody) -> (u8, Cow<'_, [u8]>) {
    match body {
        RawBody::Text(bytes) => (TEXT, Cow::Borrowed(bytes)),
        RawBody::Json(bytes) => (JSON, Cow::Borrowed(bytes)),
        RawBody::Bad { code, message } => {
            (BAD, Cow::Owned(serde_json::json!([code, message]).to_string().into()))
        }
    }
}

/// A record's key in the journal: of the run (which stands for prompts file, sampling, seed,
/// model and adapter), of its place in the input and of what it says. Equal lines have
/// different keys.
pub fn record_key(run_key: &str, record: &RawRecord) -> u64 {
    let (kind, body) = kind_and_bytes(&record.body);
    let mut hasher = blake3::Hasher::new();
    hasher.update(run_key.as_bytes());
    hasher.update(&record.index.to_le_bytes());
    hasher.update(&[kind]);
    hasher.update(&body);
    let mut key = [0; 8];
    key.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(key)
}

fn damaged() -> Error {
    Error::fault("a message between ranks is damaged; are all ranks the same farm binary?")
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.u64(bytes.len() as u64);
        self.0.extend(bytes);
    }
}

struct Decoder<'a>(&'a [u8]);

impl Decoder<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (head, tail) = self.0.split_at_checked(count).ok_or_else(damaged)?;
        self.0 = tail;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn bool(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(damaged()),
        }
    }

    fn u64(&mut self) -> Result<u64> {
        let bytes = self.take(8)?.try_into().map_err(|_| damaged())?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn bytes(&mut self) -> Result<Vec<u8>> {
        let length = usize::try_from(self.u64()?).map_err(|_| damaged())?;
        Ok(self.take(length)?.to_vec())
    }

    fn end(&self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(damaged()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::prompts::ErrorCode;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..40)
    }

    fn body() -> impl Strategy<Value = RawBody> {
        prop_oneof![
            bytes().prop_map(RawBody::Text),
            bytes().prop_map(RawBody::Json),
            ".{0,20}".prop_map(|message| RawBody::Bad { code: ErrorCode::BadCsv, message }),
        ]
    }

    fn task() -> impl Strategy<Value = Task> {
        let saved = prop::option::of(bytes());
        (any::<u64>(), any::<u64>(), body(), any::<u16>(), saved).prop_map(
            |(index, line, body, attempt, saved)| {
                let record = RawRecord { index, line, body };
                Task { record, attempt, saved }
            },
        )
    }

    fn finished() -> impl Strategy<Value = Finished> {
        (any::<u64>(), bytes(), any::<bool>(), 0.0f64..1e9, any::<u64>()).prop_map(
            |(index, line, is_error, cost, new_tokens)| Finished {
                index,
                line,
                is_error,
                cost,
                new_tokens,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn orders_arrive_as_sent(tasks in prop::collection::vec(task(), 0..6), stopped: bool) {
            for order in [Order::Block(tasks.clone()), Order::NoMore { stopped }] {
                prop_assert_eq!(Order::decode(&order.encode()).unwrap(), order);
            }
        }

        #[test]
        fn updates_arrive_as_sent(
            (counts, received_records, processed_cost) in (any::<[usize; 3]>(), any::<u64>(), 0.0f64..1e12),
            (stop, goodbye) in any::<(bool, bool)>(),
            finished in prop::collection::vec(finished(), 0..6),
        ) {
            let [slots, running, waiting] = counts;
            let load = Load { slots, running, waiting, processed_cost };
            let update = Update { load, received_records, stop, goodbye, finished };
            prop_assert_eq!(Update::decode(&update.encode()).unwrap(), update);
        }

        /// A cut or foreign message is refused without a panic or a huge allocation.
        #[test]
        fn damaged_messages_are_errors(
            tasks in prop::collection::vec(task(), 1..4), cut in any::<prop::sample::Index>(),
            noise in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let whole = Order::Block(tasks).encode();
            prop_assert!(Order::decode(&whole[..cut.index(whole.len())]).is_err());
            prop_assert!(Order::decode(&[whole, vec![0]].concat()).is_err());
            let _ = Order::decode(&noise);
            let _ = Update::decode(&noise);
        }
    }
}
