//! The blocks of the paged KV cache: which are free, and who holds the others.
//! Only bookkeeping; the memory itself belongs to the model's runner.

/// Hands out blocks of `block_size` tokens. Every block is either free or in
/// exactly one table.
#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    /// Used as a stack: the block freed last is the warmest in cache.
    free: Vec<u32>,
    held: Vec<bool>,
}

impl BlockManager {
    /// All of `num_blocks` free, each for `block_size` (≥ 1) tokens.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        assert!(block_size > 0, "a KV block holds at least one token");
        Self {
            block_size,
            free: (0..num_blocks as u32).rev().collect(),
            held: vec![false; num_blocks],
        }
    }

    /// Number of free blocks.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Number of blocks, free or held.
    pub fn num_blocks(&self) -> usize {
        self.held.len()
    }

    /// Tokens that all blocks together hold.
    pub fn num_tokens(&self) -> usize {
        self.num_blocks() * self.block_size
    }

    /// Blocks that `num_tokens` tokens take.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Grows `table` until it holds `num_tokens` tokens. Gives false, and takes
    /// nothing, where too few blocks are free.
    #[must_use]
    pub fn grow(&mut self, table: &mut Vec<u32>, num_tokens: usize) -> bool {
        let missing = self.blocks_for(num_tokens).saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        for block in self.free.drain(self.free.len() - missing..).rev() {
            let held = &mut self.held[block as usize];
            assert!(!*held, "KV block {block} was handed out twice");
            *held = true;
            table.push(block);
        }
        true
    }

    /// Takes all blocks of `table` back.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let held = &mut self.held[block as usize];
            assert!(*held, "KV block {block} was freed twice");
            *held = false;
            self.free.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn growing_is_all_or_nothing() {
        let mut blocks = BlockManager::new(3, 16);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(blocks.grow(&mut a, 17));
        assert_eq!(a, [0, 1]);
        assert!(blocks.grow(&mut a, 32), "already large enough");
        assert!(!blocks.grow(&mut b, 17));
        assert_eq!((b.len(), blocks.num_free()), (0, 1));
        blocks.release(&mut a);
        assert_eq!((a.len(), blocks.num_free()), (0, 3));
    }

    proptest! {
        #![proptest_config(crate::engine::tests::config(64))]

        /// No block is in two tables and none is lost, whatever the order of use.
        #[test]
        fn every_block_is_free_or_in_one_table(
            num_blocks in 0usize..12,
            uses in prop::collection::vec((0usize..4, 0usize..60), 0..60),
        ) {
            let mut blocks = BlockManager::new(num_blocks, 4);
            let mut tables = vec![Vec::new(); 4];
            for (table, num_tokens) in uses {
                if num_tokens < 10 {
                    blocks.release(&mut tables[table]);
                } else {
                    let before = tables[table].len();
                    let grown = blocks.grow(&mut tables[table], num_tokens);
                    let enough = tables[table].len() >= blocks.blocks_for(num_tokens);
                    prop_assert_eq!(grown, enough);
                    prop_assert!(grown || tables[table].len() == before);
                }
                let mut held: Vec<u32> = tables.concat();
                held.sort_unstable();
                held.dedup();
                prop_assert_eq!(held.len(), tables.iter().map(Vec::len).sum::<usize>());
                prop_assert_eq!(held.len() + blocks.num_free(), blocks.num_blocks());
            }
        }
    }
}
