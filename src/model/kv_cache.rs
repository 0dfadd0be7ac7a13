//! The paged KV cache: blocks of 16 tokens, a pool of them in every layer.

use crate::kernels::attention::{BLOCK_SIZE, Heads};

/// Keys and values of one layer, `num_blocks × [kv_heads][..16 tokens..]`.
pub struct LayerCache {
    /// See [`crate::kernels::attention`] for the layout.
    pub keys: Vec<f32>,
    /// See [`crate::kernels::attention`] for the layout.
    pub values: Vec<f32>,
}

/// Blocks lie all over the pool: in pages of 4 KiB each would cost the CPU a walk of the
/// page tables, and the prefetchers stop at each page's end. Refused is no harm.
fn ask_for_huge_pages(pool: &mut [f32]) {
    const PAGE: usize = 4096;
    let bytes = pool.as_mut_ptr().cast::<u8>();
    let skip = bytes.align_offset(PAGE);
    let len = (size_of_val(pool).saturating_sub(skip)) / PAGE * PAGE;
    if len > 0 {
        // SAFETY: whole pages inside the pool; the advice changes no content.
        let _ = unsafe {
            rustix::mm::madvise(bytes.add(skip).cast(), len, rustix::mm::Advice::LinuxHugepage)
        };
    }
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
        let pool = || {
            let mut pool = vec![0.0; len];
            ask_for_huge_pages(&mut pool);
            pool
        };
        let layer = || LayerCache { keys: pool(), values: pool() };
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
