//! The model with its KV cache on this rank, as the engine drives it.
//!
//! In a tensor-parallel group the leader's engine calls [`Runner::forward`], which
//! first broadcasts the step; the other ranks run [`ModelRunner::follow`] until the
//! leader is done. So every rank of the group runs the same steps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::adapter::Adapter;
use super::attention::Attention;
use super::batch::StepBatch;
use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::device::{DeviceDecoder, DeviceOptions};
use super::kv_cache::KvCache;
use super::layers::Loader;
use super::sampling::{RowChoices, RowSampling};
use super::weights::{Activations, Weight, WeightDtype};
use super::{Logits, Runner};
use crate::comm::TensorComm;
use crate::device::sampling::RowChooser;
use crate::kernels::attention::{BLOCK_SIZE, Heads};
use crate::{Error, Result};

/// How to load a model.
pub struct LoadOptions {
    /// Convert matrices to this type; `None` keeps the checkpoint's own.
    pub dtype: Option<WeightDtype>,
    /// What matrices are multiplied with.
    pub activations: Activations,
    /// Longest sequence, prompt and new tokens together.
    pub max_seq_len: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Where it computes; `None` is the CPU.
    pub device: Option<DeviceOptions>,
}

/// A loaded model, its cache and its group.
pub struct ModelRunner {
    config: ModelConfig,
    model: Model,
    max_seq_len: usize,
    bytes_read: u64,
    comm: Arc<dyn TensorComm>,
}

/// The model where it computes.
enum Model {
    Host { decoder: Box<Decoder>, cache: KvCache },
    Device { decoder: Box<DeviceDecoder>, chooser: Box<RowChooser> },
}

impl Model {
    fn load(l: &Loader, options: &LoadOptions) -> Result<Self> {
        let config = l.source.config();
        if let Some(device) = &options.device {
            let mut decoder = DeviceDecoder::load(l, device.clone(), options.max_seq_len)?;
            let chooser = RowChooser::new(decoder.device(), config.vocab_size)?;
            decoder.reserve_cache(options.num_blocks)?;
            return Ok(Self::Device { decoder: Box::new(decoder), chooser: Box::new(chooser) });
        }
        let decoder = Box::new(Decoder::load(l)?);
        let cache = KvCache::new(decoder.heads(), config.num_hidden_layers, options.num_blocks);
        Ok(Self::Host { decoder, cache })
    }

    /// Runs a step whose logits nobody on this rank wants.
    fn run(&mut self, batch: &StepBatch) -> Result<()> {
        match self {
            Self::Host { decoder, cache } => decoder.forward(batch, cache).map(drop),
            // The sums of the group wait for each other; errors of a step show at its end.
            Self::Device { decoder, .. } => {
                decoder.forward(batch)?;
                decoder.device().synchronize()
            }
        }
    }
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
        let source = checkpoint;
        // A device rounds floats itself.
        let is_quantized = |dtype: &WeightDtype| matches!(dtype, WeightDtype::Quant(_));
        let dtype = options.dtype.filter(|d| options.device.is_none() || is_quantized(d));
        let activations = options.activations;
        let loader = Loader { source, comm: comm.clone(), dtype, activations, adapters };
        let model = Model::load(&loader, options)?;
        let config = checkpoint.config().clone();
        let (max_seq_len, bytes_read) = (options.max_seq_len, checkpoint.tensors().bytes_read());
        Ok(Self { config, model, max_seq_len, bytes_read, comm })
    }

    /// Reserves the KV cache anew, when it is known what the weights leave: `num_blocks` blocks.
    ///
    /// # Errors
    /// No memory on the device.
    pub fn reserve_cache(&mut self, num_blocks: usize) -> Result<()> {
        match &mut self.model {
            Model::Host { decoder, cache } => {
                let layers = self.config.num_hidden_layers;
                *cache = KvCache::new(decoder.heads(), layers, num_blocks);
                Ok(())
            }
            Model::Device { decoder, .. } => decoder.reserve_cache(num_blocks),
        }
    }

    /// The model on its device, where it is on one.
    pub fn on_device(&self) -> Option<&DeviceDecoder> {
        match &self.model {
            Model::Host { .. } => None,
            Model::Device { decoder, .. } => Some(decoder),
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weight matrices that this rank holds or maps, or has on its device.
    pub fn weight_bytes(&self) -> u64 {
        match &self.model {
            Model::Host { decoder, .. } => decoder.weights().map(Weight::bytes).sum(),
            Model::Device { decoder, .. } => decoder.weight_bytes(),
        }
    }

    /// Those of them that are this rank's own on the host, not mapped from a file.
    pub fn owned_weight_bytes(&self) -> u64 {
        match &self.model {
            Model::Host { decoder, .. } => decoder.weights().map(Weight::owned_bytes).sum(),
            Model::Device { .. } => 0,
        }
    }

    /// Bytes of weights that a step streams: all but the embedding's look-ups.
    pub fn step_weight_bytes(&self) -> u64 {
        match &self.model {
            Model::Host { decoder, .. } => decoder.step_weights().map(Weight::bytes).sum(),
            Model::Device { decoder, .. } => decoder.step_weight_bytes(),
        }
    }

    /// Bytes of a key or value in the KV cache.
    pub fn kv_value_bytes(&self) -> usize {
        self.on_device().map_or(size_of::<f32>(), |decoder| decoder.dtype().bytes())
    }

    /// Ranks that share the model.
    pub fn group_size(&self) -> usize {
        self.comm.size()
    }

    /// Heads on this rank.
    pub fn heads(&self) -> Heads {
        Attention::heads(&self.config, self.comm.size())
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
            self.model.run(&batch)?;
            ran(&batch, start.elapsed());
        }
    }

    /// Lets the followers of this group's leader return.
    pub fn finish(&mut self) {
        if self.comm.size() > 1 {
            self.broadcast_step(Vec::new());
        }
    }

    /// Has the followers of this group's leader run the step, too.
    fn lead(&self, batch: &StepBatch) -> Result<()> {
        if self.comm.size() > 1 {
            self.broadcast_step(serde_json::to_vec(batch).map_err(Error::fault)?);
        }
        Ok(())
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
        match &self.model {
            Model::Host { cache, .. } => cache.num_blocks(),
            Model::Device { decoder, .. } => decoder.num_blocks(),
        }
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
        self.lead(batch)?;
        let alone = self.comm.size() == 1;
        let data = match &mut self.model {
            // On a pool thread the kernels' forks and joins need no sleep and wake-up each. Not
            // with a group: ranks that are threads share the pool, and one that waits for the
            // others' sums would hold a thread that they need.
            Model::Host { decoder, cache } if alone => {
                rayon::scope(|_| decoder.forward(batch, cache))
            }
            Model::Host { decoder, cache } => decoder.forward(batch, cache),
            Model::Device { decoder, .. } => {
                decoder.forward(batch).and_then(|logits| decoder.device().read(&logits))
            }
        }?;
        Ok(Logits { data, vocab_size: self.config.vocab_size })
    }

    fn chooses(&self) -> bool {
        matches!(self.model, Model::Device { .. })
    }

    fn forward_and_choose(
        &mut self,
        batch: &StepBatch,
        rows: &[RowSampling<'_>],
        eos_token_ids: &[u32],
    ) -> Result<RowChoices> {
        self.lead(batch)?;
        match &mut self.model {
            Model::Host { .. } => Err(Error::fault("the CPU's tokens are chosen by the engine")),
            Model::Device { decoder, chooser } => {
                let logits = decoder.forward(batch)?;
                if rows.is_empty() {
                    return decoder.device().synchronize().map(|()| Vec::new());
                }
                chooser.choose(&logits, self.config.vocab_size, rows, eos_token_ids)
            }
        }
    }
}
