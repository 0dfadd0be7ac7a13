//! The model with its KV cache on this rank, as the engine drives it.
//!
//! In a tensor-parallel group the leader's engine calls [`Runner::forward`], which
//! first broadcasts the step; the other ranks run [`ModelRunner::follow`] until the
//! leader is done. So every rank of the group runs the same steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adapter::Adapter;
use super::batch::StepBatch;
use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::kv_cache::KvCache;
use super::layers::Loader;
use super::weights::{Weight, WeightDtype};
use super::{Logits, Runner};
use crate::comm::TensorComm;
use crate::kernels::attention::{BLOCK_SIZE, Heads};
use crate::{Error, Result};

/// How to load a model.
pub struct LoadOptions {
    /// Convert matrices to this type; `None` keeps the checkpoint's own.
    pub dtype: Option<WeightDtype>,
    /// Longest sequence, prompt and new tokens together.
    pub max_seq_len: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
}

/// A loaded model, its cache and its group.
pub struct ModelRunner {
    config: ModelConfig,
    model: Decoder,
    cache: KvCache,
    max_seq_len: usize,
    bytes_read: u64,
    comm: Arc<dyn TensorComm>,
}

impl ModelRunner {
    /// Loads this rank's share of the model.
    ///
    /// # Errors
    /// Input errors that name the file or the setting.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        comm: Arc<dyn TensorComm>,
    ) -> Result<Self> {
        Self::load_adapted(checkpoint, &[], options, comm)
    }

    /// The same with adapters, which sequences name by their place in `adapters`.
    ///
    /// # Errors
    /// See [`ModelRunner::load`].
    pub fn load_adapted(
        checkpoint: &Checkpoint,
        adapters: &[Adapter],
        options: &LoadOptions,
        comm: Arc<dyn TensorComm>,
    ) -> Result<Self> {
        let (source, dtype) = (checkpoint, options.dtype);
        let loader = Loader { source, comm: comm.clone(), dtype, adapters };
        let model = Decoder::load(&loader)?;
        let config = checkpoint.config().clone();
        let cache = KvCache::new(model.heads(), config.num_hidden_layers, options.num_blocks);
        let (max_seq_len, bytes_read) = (options.max_seq_len, checkpoint.tensors().bytes_read());
        Ok(Self { config, model, cache, max_seq_len, bytes_read, comm })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weight matrices that this rank holds or maps.
    pub fn weight_bytes(&self) -> u64 {
        self.model.weights().map(Weight::bytes).sum()
    }

    /// Those of them that are this rank's own, not mapped from a file.
    pub fn owned_weight_bytes(&self) -> u64 {
        self.model.weights().map(Weight::owned_bytes).sum()
    }

    /// Bytes of weights that a step streams: all but the embedding's look-ups.
    pub fn step_weight_bytes(&self) -> u64 {
        self.model.step_weights().map(Weight::bytes).sum()
    }

    /// Ranks that share the model.
    pub fn group_size(&self) -> usize {
        self.comm.size()
    }

    /// Heads on this rank.
    pub fn heads(&self) -> Heads {
        self.model.heads()
    }

    /// Bytes of the checkpoint that this rank read or mapped while loading.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Runs the leader's steps until it is done ([`ModelRunner::finish`]); `ran` hears
    /// of each step when it has run.
    ///
    /// # Errors
    /// A tensor fault, or a step that does not decode.
    pub fn follow(&mut self, mut ran: impl FnMut(&StepBatch, Duration)) -> Result<()> {
        loop {
            let bytes = self.broadcast_step(Vec::new());
            if bytes.is_empty() {
                return Ok(());
            }
            let batch: StepBatch = serde_json::from_slice(&bytes)
                .map_err(|e| Error::fault(format!("a step from the group's leader: {e}")))?;
            let start = Instant::now();
            self.model.forward(&batch, &mut self.cache)?;
            ran(&batch, start.elapsed());
        }
    }

    /// Lets the followers of this group's leader return.
    pub fn finish(&mut self) {
        if self.comm.size() > 1 {
            self.broadcast_step(Vec::new());
        }
    }

    /// The leader's bytes on every rank of the group.
    fn broadcast_step(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let mut len = (bytes.len() as u64).to_le_bytes();
        self.comm.broadcast_bytes(0, &mut len);
        bytes.resize(u64::from_le_bytes(len) as usize, 0);
        if !bytes.is_empty() {
            self.comm.broadcast_bytes(0, &mut bytes);
        }
        bytes
    }
}

impl Runner for ModelRunner {
    fn num_blocks(&self) -> usize {
        self.cache.num_blocks()
    }

    fn block_size(&self) -> usize {
        BLOCK_SIZE
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<Logits> {
        if self.comm.size() > 1 {
            let bytes = serde_json::to_vec(batch).map_err(Error::fault)?;
            self.broadcast_step(bytes);
        }
        // On a pool thread the kernels' forks and joins need no sleep and wake-up each. Not
        // with a group: ranks that are threads share the pool, and one that waits for the
        // others' sums would hold a thread that they need.
        let Self { model, cache, .. } = self;
        let data = match self.comm.size() {
            1 => rayon::scope(|_| model.forward(batch, cache)),
            _ => model.forward(batch, cache),
        }?;
        Ok(Logits { data, vocab_size: self.config.vocab_size })
    }
}
