//! The decoder on the device, from a step's token ids to logits.
//!
//! A decode step (one row a sequence, all logits wanted) runs as recorded work: one copy of
//! its integers, one replay. It is recorded once for each shape ([`StepShape`]): batches are
//! rounded up to a bucket with rows of padding, which belong to no sequence. Left to separate
//! launches are chunks of prompts, steps with adapters, experts whose rows the host
//! has to count, and groups whose sums go through the host.

use std::collections::HashMap;
use std::sync::Arc;

use super::inputs::{Inputs, Packed, StepShape};
use super::layer::{Layer, Pass, Widths, Workspace};
use super::linear::{AdapterGroup, Context, Linear};
use super::rotations::RotationTables;
use super::upload::Uploader;
use crate::device::attention::{self, BLOCK_SIZE, Cache, Shape};
use crate::device::linear::{Matrix, embed};
use crate::device::{Array, Device, DeviceComm, Dtype, Graph, collectives, experts, ops};
use crate::model::StepBatch;
use crate::model::adapter::{AdapterRows, RowAdapters};
use crate::model::attention::{Attention, GroupedQkv};
use crate::model::decoder::{DecoderLayer, load_vocabulary, wanted_rows};
use crate::model::layers::{Loader, Norm, VocabParallel};
use crate::model::ops::with_values;
use crate::{Error, Result};

/// Recorded shapes that are kept; beyond, all are dropped and recorded anew.
const MAX_GRAPHS: usize = 256;

/// What a decoder on a device needs to know before it loads.
#[derive(Clone)]
pub struct DeviceOptions {
    /// The device.
    pub device: Device,
    /// The tensor-parallel group's sums.
    pub comm: Arc<dyn DeviceComm>,
    /// The type of products, norms' results and the KV cache: f32, f16 or bf16.
    pub dtype: Dtype,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most rows of a step whose logits are wanted, as far as memory is set aside for them.
    pub max_logits_rows: usize,
    /// Whether decode steps are recorded.
    pub uses_graphs: bool,
}

/// A model, or a tensor-parallel rank's share of one, on a device.
pub struct DeviceDecoder {
    /// First, so that it goes first: NCCL's communicator waits until no recorded work has sums
    /// of its group.
    graphs: HashMap<StepShape, Graph>,
    options: DeviceOptions,
    heads: Shape,
    vocab_size: usize,
    hidden_size: usize,
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: ops::Norm,
    lm_head: Linear,
    final_logit_softcapping: Option<f32>,
    rotations: RotationTables,
    weight_bytes: u64,
    buffers: Buffers,
    /// Keys and values of each layer.
    cache: Vec<[Array; 2]>,
    num_blocks: usize,
}

struct Embedding {
    table: Matrix,
    first_id: usize,
    scale: Option<f32>,
    /// The host's, where adapters change it: their rows are looked up there.
    adapted: Option<VocabParallel>,
}

/// Memory for any step.
struct Buffers {
    work: Workspace,
    integers: Array,
    scratch: Array,
    attention_scratch: Array,
    experts_scratch: Option<experts::Scratch>,
    /// Rows whose logits are wanted: the stream, and after the last norm.
    rows: [Array; 2],
    /// This rank's logits, those of all ranks, and whole rows of them.
    logits: [Array; 3],
}

impl DeviceDecoder {
    /// Loads this rank's share, for sequences of up to `max_seq_len` tokens. There is no KV
    /// cache yet: see [`DeviceDecoder::reserve_cache`].
    ///
    /// # Errors
    /// Those of [`super::super::decoder::Decoder::load`]; no memory on the device.
    pub fn load(l: &Loader, options: DeviceOptions, max_seq_len: usize) -> Result<Self> {
        let config = l.source.config();
        config.check_tensor_parallel(l.comm.size())?;
        if config.head_dim > attention::MAX_HEAD_DIM {
            return Err(Error::input(format!(
                "heads of {} values are too wide for a device (at most {}): --device cpu",
                config.head_dim,
                attention::MAX_HEAD_DIM
            )));
        }
        let device = options.device.clone();
        let uploader = Uploader::new(&device, options.dtype);
        let (embed_tokens, lm_head) = load_vocabulary(l)?;
        let tied = lm_head.shares_weight_with(&embed_tokens);
        let embed_tokens = embed_tokens.with_embedding_adapters(l)?;
        let lm_head = lm_head.with_logits_adapters(l)?;
        let table = uploader.matrix(embed_tokens.weight())?;
        let head = if tied { table.clone() } else { uploader.matrix(lm_head.weight())? };
        let lm_head = Linear::of_matrix(&uploader, head, &lm_head.of_logits)?;
        let embed_tokens = Embedding {
            table,
            first_id: embed_tokens.shared().1.start,
            scale: config.embedding_scale,
            adapted: (!embed_tokens.of_embedding.is_empty()).then_some(embed_tokens),
        };
        // One at a time: what a layer had to copy on the host goes before the next is read.
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let host = DecoderLayer::load(l, config, i, GroupedQkv::Apart)?;
                Layer::load(&uploader, &host)
            })
            .collect::<Result<Vec<_>>>()?;
        let heads = Attention::heads(config, l.comm.size());
        let heads = Shape {
            heads: heads.heads,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            scale: heads.scale,
        };
        let norm = Norm::load(l, config, config.names.norm, config.hidden_size)?;
        let max_rows = options.max_rows;
        let vocabulary = [config.hidden_size, config.vocab_size];
        let buffers = Buffers::new(&options, heads, &layers, &lm_head, max_seq_len, vocabulary)?;
        device.synchronize()?;
        Ok(Self {
            heads,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            embed_tokens,
            norm: uploader.norm(&norm)?,
            lm_head,
            final_logit_softcapping: config.final_logit_softcapping,
            rotations: RotationTables::new(&device, config, max_seq_len, max_rows)?,
            weight_bytes: uploader.bytes(),
            layers,
            buffers,
            cache: Vec::new(),
            num_blocks: 0,
            graphs: HashMap::new(),
            options,
        })
    }

    /// Reserves `num_blocks` blocks of the KV cache.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve_cache(&mut self, num_blocks: usize) -> Result<()> {
        let len = num_blocks * self.heads.block_len();
        let device = &self.options.device;
        let pool = || device.array(self.options.dtype, len);
        self.cache =
            self.layers.iter().map(|_| Ok([pool()?, pool()?])).collect::<Result<Vec<_>>>()?;
        self.num_blocks = num_blocks;
        self.graphs.clear();
        Ok(())
    }

    /// Bytes of a block of the KV cache, over all layers.
    pub fn block_bytes(&self) -> usize {
        2 * self.layers.len() * self.heads.block_len() * self.options.dtype.bytes()
    }

    /// Blocks of the KV cache.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.options.device
    }

    /// What products take.
    pub fn dtype(&self) -> Dtype {
        self.options.dtype
    }

    /// Heads on this rank.
    pub fn heads(&self) -> Shape {
        self.heads
    }

    /// Bytes of weights that went to the device, as the host had them.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of weights that a step streams: all but the embedding's look-ups.
    pub fn step_weight_bytes(&self) -> u64 {
        (self.layers.iter().map(Layer::bytes).sum::<usize>() + self.lm_head.bytes()) as u64
    }

    /// One step: f32 logits of the wanted rows, `[rows, vocab]`, on the device until the next
    /// step.
    ///
    /// # Errors
    /// A fault of the driver or of the group; no memory for as many rows.
    pub fn forward(&mut self, batch: &StepBatch) -> Result<Array> {
        let device = self.options.device.clone();
        let wanted = batch.num_logits_rows();
        let table_rows = self.rotations.prepare(&device, batch)?;
        let (dtype, max_rows) = (self.options.dtype, self.options.max_rows);
        let packed = Packed::new(&device, self.heads, dtype, batch, table_rows, max_rows);
        self.make_room(&packed)?;
        let inputs = packed.send(&device, &self.buffers.integers)?;
        let shape = packed.shape;
        let adapters = self.groups(&RowAdapters::new(batch))?;
        if !self.can_be_captured(shape, &adapters) {
            self.launch(&inputs, shape, &adapters, Some(batch))?;
        } else if let Some(graph) = self.graphs.get(&shape) {
            graph.replay()?;
        } else {
            // The libraries' first calls may allocate, which cannot be recorded.
            self.launch(&inputs, shape, &adapters, Some(batch))?;
            self.record(&inputs, shape);
        }
        Ok(self.whole_logits().first(wanted * self.vocab_size))
    }

    /// Records a step that has just run, for the next one of its shape.
    fn record(&mut self, inputs: &Inputs, shape: StepShape) {
        if self.graphs.len() >= MAX_GRAPHS {
            self.graphs.clear();
        }
        let device = self.options.device.clone();
        match device.capture(|| self.launch(inputs, shape, &[], None)) {
            Ok(graph) => {
                self.graphs.insert(shape, graph);
            }
            Err(error) => {
                tracing::warn!("steps are launched one kernel at a time from here on: {error}");
                self.options.uses_graphs = false;
            }
        }
    }

    fn can_be_captured(&self, shape: StepShape, adapters: &[AdapterGroup]) -> bool {
        let (dtype, rows) = (self.options.dtype, shape.rows);
        let is_direct =
            |layer: &Layer| layer.experts().is_none_or(|experts| experts.is_direct(dtype, rows));
        self.options.uses_graphs
            && shape.is_decode
            && adapters.is_empty()
            && self.options.comm.can_be_captured()
            && self.layers.iter().all(is_direct)
    }

    /// Memory for a step's integers and logits; recorded work points at what it replaces.
    fn make_room(&mut self, packed: &Packed) -> Result<()> {
        let device = self.options.device.clone();
        if packed.num_values() > self.buffers.integers.len() {
            self.graphs.clear();
            self.buffers.integers =
                device.array(Dtype::I32, packed.num_values().next_power_of_two())?;
        }
        let rows = packed.shape.logits_rows;
        if rows * self.hidden_size > self.buffers.rows[0].len() {
            self.graphs.clear();
            self.buffers.reserve_logits(
                &self.options,
                rows.next_power_of_two(),
                [self.hidden_size, self.vocab_size],
            )?;
        }
        Ok(())
    }

    /// The rows of each adapter, on the device.
    fn groups(&self, rows: &RowAdapters) -> Result<Vec<AdapterGroup>> {
        let group = |group: &AdapterRows| {
            let rows: Vec<i32> = group.rows.iter().map(|row| *row as i32).collect();
            Ok(AdapterGroup { adapter: group.adapter, rows: self.options.device.upload(&rows)? })
        };
        rows.groups().iter().map(group).collect()
    }

    /// Queues the step. `batch` is given where it is not recorded.
    fn launch(
        &self,
        inputs: &Inputs,
        shape: StepShape,
        adapters: &[AdapterGroup],
        batch: Option<&StepBatch>,
    ) -> Result<()> {
        let DeviceOptions { device, comm, max_rows, .. } = &self.options;
        let buffers = &self.buffers;
        let work = buffers.work.first(shape.rows, *max_rows);
        let pass = Pass {
            device,
            comm: &**comm,
            heads: self.heads,
            inputs,
            max_blocks: shape.max_blocks,
            is_decode: shape.is_decode,
            rotations: &self.rotations,
            adapters,
            work: &work,
            scratch: &buffers.scratch,
            attention_scratch: &buffers.attention_scratch,
            experts_scratch: buffers.experts_scratch.as_ref(),
        };
        self.embed(inputs, &work, adapters, batch)?;
        if let Some(first) = self.layers.first() {
            ops::norm(device, &work.x, first.input_norm(), &work.normed)?;
        }
        for (i, (layer, [keys, values])) in self.layers.iter().zip(&self.cache).enumerate() {
            let next = self.layers.get(i + 1).map(Layer::input_norm);
            layer.forward(&pass, Cache { keys, values }, next)?;
        }
        if shape.logits_rows == 0 {
            return Ok(());
        }
        // The adapters of those rows, by their places among them.
        let among = match (batch, adapters.is_empty()) {
            (Some(batch), false) => {
                self.groups(&RowAdapters::new(batch).among(&wanted_rows(batch)))?
            }
            _ => Vec::new(),
        };
        self.logits(inputs, &work, shape.logits_rows, &among)
    }

    fn embed(
        &self,
        inputs: &Inputs,
        work: &Workspace,
        adapters: &[AdapterGroup],
        batch: Option<&StepBatch>,
    ) -> Result<()> {
        let DeviceOptions { device, comm, .. } = &self.options;
        let Embedding { table, first_id, scale, adapted } = &self.embed_tokens;
        if let (Some(host), Some(batch), false) = (adapted, batch, adapters.is_empty()) {
            // Summed over the group by the host's messages.
            let x = host.embed(&batch.token_ids, *scale, &RowAdapters::new(batch))?;
            return with_values(&x, |x| device.write(&work.x, x))?;
        }
        embed(device, table, *first_id, &inputs.token_ids, scale.unwrap_or(1.0), &work.x)?;
        if comm.size() > 1 {
            comm.all_reduce_sum(device, &work.x)?;
        }
        Ok(())
    }

    fn logits(
        &self,
        inputs: &Inputs,
        work: &Workspace,
        rows: usize,
        adapters: &[AdapterGroup],
    ) -> Result<()> {
        let DeviceOptions { device, comm, .. } = &self.options;
        let [stream, normed] = &self.buffers.rows;
        let len = rows * self.hidden_size;
        let (stream, normed) = (stream.first(len), normed.first(len));
        ops::gather_rows(device, &work.x, &inputs.wanted, &stream)?;
        ops::norm(device, &stream, &self.norm, &normed)?;
        let [local, gathered, whole] = &self.buffers.logits;
        let size = comm.size();
        let widest = self.vocab_size.div_ceil(size);
        let context = Context { device, scratch: &self.buffers.scratch, adapters };
        let local = local.first(rows * widest);
        self.lm_head.forward(&context, &normed, &local, widest)?;
        if let Some(cap) = self.final_logit_softcapping {
            ops::softcap(device, &local, cap)?;
        }
        if size > 1 {
            let gathered = gathered.first(size * rows * widest);
            comm.all_gather(device, &local, &gathered)?;
            let whole = whole.first(rows * self.vocab_size);
            collectives::join_shares(device, &gathered, [size, rows, self.vocab_size], &whole)?;
        }
        Ok(())
    }

    fn whole_logits(&self) -> &Array {
        let [local, _, whole] = &self.buffers.logits;
        if self.options.comm.size() == 1 { local } else { whole }
    }
}

impl Buffers {
    fn new(
        options: &DeviceOptions,
        heads: Shape,
        layers: &[Layer],
        lm_head: &Linear,
        max_seq_len: usize,
        vocabulary: [usize; 2],
    ) -> Result<Self> {
        let hidden_size = vocabulary[0];
        let DeviceOptions { device, dtype, max_rows, .. } = options;
        let (dtype, max_rows) = (*dtype, *max_rows);
        let widths = layers.iter().map(|l| l.widths(heads)).fold(Widths::default(), Widths::max);
        let array = |dtype, width: usize| device.array(dtype, max_rows * width);
        let work = Workspace {
            x: array(Dtype::F32, hidden_size)?,
            normed: array(dtype, hidden_size)?,
            normed_too: array(dtype, hidden_size)?,
            added: array(Dtype::F32, hidden_size)?,
            qkv: array(dtype, widths.qkv)?,
            attended: array(dtype, widths.queries)?,
            gate_up: array(dtype, widths.gate_up)?,
            inner: array(dtype, widths.inner)?,
            scores: array(Dtype::F32, widths.scores)?,
        };
        let scratch = layers.iter().map(|layer| layer.scratch_bytes(dtype, max_rows));
        let scratch = scratch.chain([lm_head.scratch_bytes(dtype, max_rows)]).max();
        // As `StepShape` rounds it.
        let max_blocks = max_seq_len.div_ceil(BLOCK_SIZE).max(1).next_power_of_two();
        let attention_scratch =
            attention::scratch_len(device.properties(), heads, dtype, max_rows, max_blocks);
        let experts = layers.iter().find_map(Layer::experts);
        let experts = experts.map(|experts| experts.scratch(device, max_rows, dtype));
        let nothing = || device.array(Dtype::F32, 0);
        // Tiles take fewer queries than 16 in no case (see `attention::Plan`).
        let group = heads.heads / heads.kv_heads.max(1);
        let sequences = options.max_logits_rows;
        let tiles = 2 * (max_rows * group / 16 + sequences);
        let integers = 8 * max_rows + sequences * (3 + max_blocks) + tiles;
        let mut buffers = Self {
            work,
            integers: device.array(Dtype::I32, integers)?,
            scratch: device.array(Dtype::U8, scratch.unwrap_or(0))?,
            attention_scratch: device.array(Dtype::F32, attention_scratch)?,
            experts_scratch: experts.transpose()?,
            rows: [nothing()?, nothing()?],
            logits: [nothing()?, nothing()?, nothing()?],
        };
        buffers.reserve_logits(options, options.max_logits_rows, vocabulary)?;
        Ok(buffers)
    }

    fn reserve_logits(
        &mut self,
        options: &DeviceOptions,
        rows: usize,
        [hidden_size, vocab_size]: [usize; 2],
    ) -> Result<()> {
        let DeviceOptions { device, comm, dtype, .. } = options;
        let size = comm.size();
        let widest = vocab_size.div_ceil(size);
        let among_ranks = |len: usize| device.array(Dtype::F32, if size > 1 { len } else { 0 });
        // What there was goes before its successor comes.
        let nothing = device.array(Dtype::F32, 0)?;
        self.rows = [nothing.clone(), nothing.clone()];
        self.logits = [nothing.clone(), nothing.clone(), nothing];
        self.rows = [
            device.array(Dtype::F32, rows * hidden_size)?,
            device.array(*dtype, rows * hidden_size)?,
        ];
        self.logits = [
            device.array(Dtype::F32, rows * widest)?,
            among_ranks(size * rows * widest)?,
            among_ranks(rows * vocab_size)?,
        ];
        Ok(())
    }
}
