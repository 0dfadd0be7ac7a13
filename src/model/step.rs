//! What all layers of a step share: the sequences' rows, and each row's rotations.

use super::adapter::RowAdapters;
use super::batch::StepBatch;
use super::config::{ModelConfig, Positions};
use super::rope::RotaryEmbedding;
use crate::kernels::attention::Rows;
use crate::kernels::backward;
use crate::kernels::ops::rotate;

/// The rotary embeddings of a model: one for all layers, or another for those with a window.
pub struct Rotations {
    global: Option<RotaryEmbedding>,
    local: Option<RotaryEmbedding>,
}

impl Rotations {
    /// The embeddings that the configuration describes.
    pub fn new(config: &ModelConfig) -> Self {
        let Positions::Rotary { global, local } = &config.positions else {
            return Self { global: None, local: None };
        };
        let new = |rope| RotaryEmbedding::new(rope, config.max_position_embeddings);
        Self { global: Some(new(global)), local: local.as_ref().map(new) }
    }
}

/// A step as the layers see it.
pub struct Step<'a> {
    /// The sequences.
    pub rows: Vec<Rows<'a>>,
    /// The rows' adapters.
    pub adapters: RowAdapters,
    global: Option<Table<'a>>,
    local: Option<Table<'a>>,
}

/// `[rows][rotary_dim / 2]` each.
struct Table<'a> {
    rope: &'a RotaryEmbedding,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl<'a> Step<'a> {
    /// Prepares the step.
    pub fn new(batch: &'a StepBatch, rotations: &'a Rotations) -> Self {
        let mut first = 0;
        let mut rows = Vec::with_capacity(batch.sequences.len());
        for s in &batch.sequences {
            rows.push(Rows {
                first,
                len: s.num_tokens,
                start_position: s.start_position,
                block_table: &s.block_table,
            });
            first += s.num_tokens;
        }
        let table =
            |rope: &'a Option<RotaryEmbedding>| rope.as_ref().map(|rope| Table::new(batch, rope));
        let adapters = RowAdapters::new(batch);
        Self { rows, adapters, global: table(&rotations.global), local: table(&rotations.local) }
    }

    /// The rotations of layers with or without a window: how heads are rotated, and cos and sin,
    /// `[rows, rotary_dim / 2]` each.
    pub fn table(&self, has_window: bool) -> Option<(&RotaryEmbedding, &[f32], &[f32])> {
        let local = self.local.as_ref().filter(|_| has_window);
        let table = local.or(self.global.as_ref())?;
        Some((table.rope, &table.cos, &table.sin))
    }

    /// Rotates the heads of each row of `x`, `row_width` values wide.
    pub fn rotate(&self, x: &mut [f32], row_width: usize, head_dim: usize, has_window: bool) {
        self.rotate_by(rotate, x, row_width, head_dim, has_window);
    }

    /// The gradient of what [`Step::rotate`] took, from that of what it gave.
    pub fn rotate_back(&self, x: &mut [f32], row_width: usize, head_dim: usize, has_window: bool) {
        self.rotate_by(backward::rotate, x, row_width, head_dim, has_window);
    }

    fn rotate_by(
        &self,
        rotate: impl Fn(&mut [f32], usize, usize, bool, &[f32], &[f32]),
        x: &mut [f32],
        row_width: usize,
        head_dim: usize,
        has_window: bool,
    ) {
        let Some((rope, cos, sin)) = self.table(has_window) else { return };
        let half = rope.rotary_dim() / 2;
        let (cos, sin) = (cos.chunks_exact(half), sin.chunks_exact(half));
        for ((row, cos), sin) in x.chunks_exact_mut(row_width).zip(cos).zip(sin) {
            let (dim, interleaved) = (rope.rotary_dim(), rope.interleaved());
            rotate(row, head_dim, dim, interleaved, cos, sin);
        }
    }
}

impl<'a> Table<'a> {
    fn new(batch: &StepBatch, rope: &'a RotaryEmbedding) -> Self {
        let len = batch.token_ids.len() * rope.rotary_dim() / 2;
        let (mut cos, mut sin) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for s in &batch.sequences {
            for position in s.start_position..s.start_position + s.num_tokens {
                rope.push(position, s.prompt_len, &mut cos, &mut sin);
            }
        }
        Self { rope, cos, sin }
    }
}
