//! The rotary embedding's tables on the device.
//!
//! Row `position` of a table holds the rotation of a token at that position, and further rows
//! are filled anew in each step, for the prompts whose rotations depend on their length (see
//! [`crate::model::rope`]).

use rayon::prelude::*;

use crate::Result;
use crate::device::attention::Rotation;
use crate::device::{Array, Device, Dtype};
use crate::model::StepBatch;
use crate::model::config::{ModelConfig, Positions};
use crate::model::rope::RotaryEmbedding;

/// The tables: one for all layers, or another for those with a window.
pub struct RotationTables {
    global: Option<Table>,
    local: Option<Table>,
}

struct Table {
    rope: RotaryEmbedding,
    cos: Array,
    sin: Array,
    /// Rows that positions take.
    positions: usize,
}

/// Rows of the tables for a step's rows; empty where there is no such table.
#[derive(Default)]
pub struct TableRows {
    /// In the table for all layers.
    pub global: Vec<i32>,
    /// In that of layers with a window, where it is another.
    pub local: Vec<i32>,
}

impl RotationTables {
    /// Tables for sequences of up to `positions` tokens and steps of up to `max_rows` rows.
    ///
    /// # Errors
    /// No memory; a fault of the driver.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        positions: usize,
        max_rows: usize,
    ) -> Result<Self> {
        let Positions::Rotary { global, local } = &config.positions else {
            return Ok(Self { global: None, local: None });
        };
        let table = |rope| {
            let rope = RotaryEmbedding::new(rope, config.max_position_embeddings);
            Table::new(device, rope, positions, max_rows)
        };
        Ok(Self { global: Some(table(global)?), local: local.as_ref().map(table).transpose()? })
    }

    /// Finds the rows of a step, and fills what its prompts need of their own.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn prepare(&self, device: &Device, batch: &StepBatch) -> Result<TableRows> {
        let rows = |table: &Option<Table>| {
            table.as_ref().map_or(Ok(Vec::new()), |table| table.prepare(device, batch))
        };
        Ok(TableRows { global: rows(&self.global)?, local: rows(&self.local)? })
    }

    /// The rotation of a layer's rows, from the step's rows of the tables.
    pub fn of_layer<'a>(
        &'a self,
        has_window: bool,
        global: &'a Array,
        local: &'a Array,
    ) -> Option<Rotation<'a>> {
        let (table, table_row) = match (&self.local, has_window) {
            (Some(table), true) => (table, local),
            _ => (self.global.as_ref()?, global),
        };
        Some(Rotation {
            cos: &table.cos,
            sin: &table.sin,
            table_row,
            rotary_dim: table.rope.rotary_dim(),
            interleaved: table.rope.interleaved(),
        })
    }
}

impl Table {
    fn new(
        device: &Device,
        rope: RotaryEmbedding,
        positions: usize,
        max_rows: usize,
    ) -> Result<Self> {
        let half = rope.rotary_dim() / 2;
        let len = (positions + max_rows) * half;
        let (cos, sin) = (device.array(Dtype::F32, len)?, device.array(Dtype::F32, len)?);
        let rows: Vec<(Vec<f32>, Vec<f32>)> = (0..positions)
            .into_par_iter()
            .map(|position| {
                let mut row = (Vec::with_capacity(half), Vec::with_capacity(half));
                rope.push(position, 0, &mut row.0, &mut row.1);
                row
            })
            .collect();
        let (all_cos, all_sin): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        device.write(&cos, &all_cos.concat())?;
        device.write(&sin, &all_sin.concat())?;
        Ok(Self { rope, cos, sin, positions })
    }

    fn prepare(&self, device: &Device, batch: &StepBatch) -> Result<Vec<i32>> {
        let half = self.rope.rotary_dim() / 2;
        let mut rows = Vec::with_capacity(batch.token_ids.len());
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for s in &batch.sequences {
            for position in s.start_position..s.start_position + s.num_tokens {
                if self.rope.is_by_position(position, s.prompt_len) {
                    rows.push(position as i32);
                } else {
                    rows.push((self.positions + cos.len() / half) as i32);
                    self.rope.push(position, s.prompt_len, &mut cos, &mut sin);
                }
            }
        }
        let own = self.positions * half..self.cos.len();
        device.write(&self.cos.slice(own.clone()), &cos)?;
        device.write(&self.sin.slice(own), &sin)?;
        Ok(rows)
    }
}
