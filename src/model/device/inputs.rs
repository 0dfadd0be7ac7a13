//! A step's integers, packed into one copy to the device.

use crate::Result;
use crate::device::attention::{BLOCK_SIZE, Plan, Shape};
use crate::device::{Array, Device, Dtype};
use crate::model::StepBatch;
use crate::model::decoder::wanted_rows;

use super::rotations::TableRows;

/// The lengths of a step's arrays; steps of one shape are recorded together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows, those of padding among them.
    pub rows: usize,
    /// Sequences, likewise.
    pub sequences: usize,
    /// Rows whose logits are wanted, likewise.
    pub logits_rows: usize,
    /// Row length of the block tables.
    pub max_blocks: usize,
    /// Every sequence has one row: [`Inputs::tiles`] and [`Inputs::row_list`] are empty.
    pub is_decode: bool,
}

/// A step's arrays on the device, i32 all.
#[derive(Clone)]
pub struct Inputs {
    /// `[rows]`.
    pub token_ids: Array,
    /// `[rows]`; −1: padding.
    pub positions: Array,
    /// `[rows]`: places in the KV cache; −1: none.
    pub slots: Array,
    /// `[rows]`; −1: padding.
    pub sequence_of_row: Array,
    /// `[rows]`: rows of the rotations' table.
    pub table_rows: Array,
    /// `[rows]`: likewise, for layers with a window.
    pub local_table_rows: Array,
    /// `[logits_rows]`.
    pub wanted: Array,
    /// `[sequences]`.
    pub first_row: Array,
    /// `[sequences]`.
    pub num_rows: Array,
    /// `[sequences]`.
    pub start_position: Array,
    /// `[sequences][max_blocks]`.
    pub block_tables: Array,
    /// See [`Plan::rows`].
    pub row_list: Array,
    /// See [`Plan::tiles`].
    pub tiles: Array,
}

/// What a step's integers are before they go to the device.
pub struct Packed {
    /// Their lengths.
    pub shape: StepShape,
    values: Vec<i32>,
    plan: Plan,
}

impl StepShape {
    /// Whether every sequence of a batch has one row, whose logits are wanted.
    pub fn is_decode(batch: &StepBatch) -> bool {
        batch.num_logits_rows() == batch.sequences.len()
            && batch.token_ids.len() == batch.sequences.len()
    }

    /// The shape of a batch; a decode step's is rounded up to a bucket, as far as `max_rows` go.
    pub fn of(batch: &StepBatch, max_rows: usize) -> Self {
        let rows = batch.token_ids.len();
        let longest = batch.sequences.iter().map(|s| s.block_table.len()).max().unwrap_or(0);
        let is_decode = Self::is_decode(batch);
        let padded = if is_decode { bucket(rows).min(max_rows).max(rows) } else { rows };
        let padding = padded - rows;
        Self {
            rows: padded,
            sequences: batch.sequences.len() + padding,
            logits_rows: batch.num_logits_rows() + padding,
            max_blocks: longest.max(1).next_power_of_two(),
            is_decode,
        }
    }

    /// All lengths, in the order of [`Inputs`], without the plan's.
    fn lengths(&self) -> [usize; 11] {
        let Self { rows, sequences, logits_rows, max_blocks, .. } = *self;
        let blocks = sequences * max_blocks;
        [rows, rows, rows, rows, rows, rows, logits_rows, sequences, sequences, sequences, blocks]
    }
}

/// Steps of up to 8 rows by powers of two, then by eights: padding costs little beside the
/// weights that every step streams, and few shapes are recorded.
fn bucket(rows: usize) -> usize {
    if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(8) }
}

impl Packed {
    /// Packs a batch.
    pub fn new(
        device: &Device,
        heads: Shape,
        dtype: Dtype,
        batch: &StepBatch,
        table_rows: TableRows,
        max_rows: usize,
    ) -> Self {
        let shape = StepShape::of(batch, max_rows);
        let num_rows: Vec<usize> = batch.sequences.iter().map(|s| s.num_tokens).collect();
        let plan = match shape.is_decode {
            true => Plan::default(),
            false => Plan::new(device.properties(), heads, dtype, &num_rows),
        };
        let mut sections = Sections { values: Vec::new() };
        let ids = batch.token_ids.iter().map(|id| *id as i32);
        sections.push(ids, shape.rows, 0);
        sections.push(rows_of(batch, |_, _, position| position as i32), shape.rows, -1);
        sections.push(rows_of(batch, slot), shape.rows, -1);
        sections.push(rows_of(batch, |sequence, _, _| sequence as i32), shape.rows, -1);
        sections.push(table_rows.global.into_iter(), shape.rows, 0);
        sections.push(table_rows.local.into_iter(), shape.rows, 0);
        sections.push(wanted_rows(batch).into_iter().map(|row| row as i32), shape.logits_rows, 0);
        let firsts = num_rows.iter().scan(0, |first, rows| {
            let this = *first;
            *first += *rows as i32;
            Some(this)
        });
        sections.push(firsts, shape.sequences, 0);
        sections.push(num_rows.iter().map(|rows| *rows as i32), shape.sequences, 0);
        let starts = batch.sequences.iter().map(|s| s.start_position as i32);
        sections.push(starts, shape.sequences, 0);
        for s in &batch.sequences {
            let blocks = s.block_table.iter().map(|block| *block as i32);
            sections.push(blocks, shape.max_blocks, 0);
        }
        let padding = (shape.sequences - batch.sequences.len()) * shape.max_blocks;
        sections.push(std::iter::empty(), padding, 0);
        sections.values.extend_from_slice(&plan.rows);
        sections.values.extend_from_slice(&plan.tiles);
        Self { shape, values: sections.values, plan }
    }

    /// Room that they need.
    pub fn num_values(&self) -> usize {
        self.values.len()
    }

    /// Copies them into the start of `buffer`, and says where each array is.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn send(&self, device: &Device, buffer: &Array) -> Result<Inputs> {
        device.write(buffer, &self.values)?;
        let mut at = 0;
        let mut take = |len: usize| {
            at += len;
            buffer.slice(at - len..at)
        };
        let [
            token_ids,
            positions,
            slots,
            sequence_of_row,
            table_rows,
            local_table_rows,
            wanted,
            first_row,
            num_rows,
            start_position,
            block_tables,
        ] = self.shape.lengths().map(&mut take);
        Ok(Inputs {
            token_ids,
            positions,
            slots,
            sequence_of_row,
            table_rows,
            local_table_rows,
            wanted,
            first_row,
            num_rows,
            start_position,
            block_tables,
            row_list: take(self.plan.rows.len()),
            tiles: take(self.plan.tiles.len()),
        })
    }
}

struct Sections {
    values: Vec<i32>,
}

impl Sections {
    /// One array, filled up to `len`.
    fn push(&mut self, values: impl Iterator<Item = i32>, len: usize, padding: i32) {
        let end = self.values.len() + len;
        self.values.extend(values);
        debug_assert!(self.values.len() <= end);
        self.values.resize(end, padding);
    }
}

/// `value` of each row, from its sequence, that sequence's blocks and its position.
fn rows_of(
    batch: &StepBatch,
    value: impl Fn(usize, &[u32], usize) -> i32,
) -> impl Iterator<Item = i32> {
    batch.sequences.iter().enumerate().flat_map(move |(i, s)| {
        let positions = s.start_position..s.start_position + s.num_tokens;
        positions.map(|position| value(i, &s.block_table, position)).collect::<Vec<_>>()
    })
}

fn slot(_: usize, blocks: &[u32], position: usize) -> i32 {
    (blocks[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE) as i32
}
