//! The paged KV cache: blocks of 16 tokens, a pool of them in every layer.

use crate::kernels::attention::{BLOCK_SIZE, Heads};

/// Keys and values of one layer, `num_blocks × [kv_heads][..16 tokens..]`.
pub struct LayerCache {
    /// See [`crate::kernels::attention`] for the layout.
    pub keys: Vec<f32>,
    /// See [`crate::kernels::attention`] for the layout.
    pub values: Vec<f32>,
}

/// All layers of this rank's heads.
pub struct KvCache {
    layers: Vec<LayerCache>,
    num_blocks: usize,
}

impl KvCache {
    /// Reserves the cache. Memory is zeroed pages from the system: a block that is
    /// never used takes none.
    pub fn new(heads: Heads, num_layers: usize, num_blocks: usize) -> Self {
        let len = num_blocks * heads.block_len();
        let layer = || LayerCache { keys: vec![0.0; len], values: vec![0.0; len] };
        Self { layers: (0..num_layers).map(|_| layer()).collect(), num_blocks }
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Tokens a block.
    pub fn block_size(&self) -> usize {
        BLOCK_SIZE
    }

    /// One layer's pool.
    pub fn layer(&mut self, i: usize) -> &mut LayerCache {
        &mut self.layers[i]
    }
}
