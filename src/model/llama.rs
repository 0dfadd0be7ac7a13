//! The Llama architecture (Llama 1 to 3.x, and models of the same shape).

use std::sync::Arc;

use candle_core::Tensor;

use super::batch::{LogitsWanted, StepBatch};
use super::config::ModelConfig;
use super::kv_cache::{KvCache, LayerCache};
use super::layers::{ColumnParallelLinear, LinearSpec, Loader, RowParallelLinear, VocabParallel};
use super::ops;
use super::rope::RotaryEmbedding;
use super::source::WeightSource;
use crate::Result;
use crate::comm::TensorComm;
use crate::kernels::attention::{self, Heads, Rows, Rule};
use crate::kernels::ops::{Activation, rotate};

/// A Llama model, or a tensor-parallel rank's share of one.
pub struct Llama {
    heads: Heads,
    embed_tokens: VocabParallel,
    layers: Vec<DecoderLayer>,
    norm: Vec<f32>,
    lm_head: VocabParallel,
    eps: f32,
    rope: RotaryEmbedding,
}

struct DecoderLayer {
    input_layernorm: Vec<f32>,
    self_attn: Attention,
    post_attention_layernorm: Vec<f32>,
    mlp: Mlp,
}

struct Attention {
    q_proj: ColumnParallelLinear,
    k_proj: ColumnParallelLinear,
    v_proj: ColumnParallelLinear,
    o_proj: RowParallelLinear,
}

struct Mlp {
    gate_proj: ColumnParallelLinear,
    up_proj: ColumnParallelLinear,
    down_proj: RowParallelLinear,
}

impl Llama {
    /// Loads this rank's share. `max_seq_len` bounds the positions.
    ///
    /// # Errors
    /// A tensor-parallel size that does not divide the model; a tensor that is
    /// missing or of another shape.
    pub fn load(
        config: &ModelConfig,
        source: &dyn WeightSource,
        comm: Arc<dyn TensorComm>,
        max_seq_len: usize,
    ) -> Result<Self> {
        config.check_tensor_parallel(comm.size())?;
        let l = Loader { source, comm };
        let shape = [config.vocab_size, config.hidden_size];
        let embed_tokens = VocabParallel::load(&l, "model.embed_tokens.weight", shape)?;
        // Some tied checkpoints carry the output projection all the same.
        let lm_head = if config.tie_word_embeddings && !source.contains("lm_head.weight") {
            embed_tokens.tied()
        } else {
            VocabParallel::load(&l, "lm_head.weight", shape)?
        };
        let layers = (0..config.num_hidden_layers)
            .map(|i| DecoderLayer::load(&l, config, &format!("model.layers.{i}")))
            .collect::<Result<_>>()?;
        let hidden = config.hidden_size;
        Ok(Self {
            heads: local_heads(config, l.comm.size()),
            embed_tokens,
            layers,
            norm: source.vector("model.norm.weight", hidden, 0..hidden)?,
            lm_head,
            eps: config.rms_norm_eps,
            rope: RotaryEmbedding::new(config, max_seq_len),
        })
    }

    /// Heads on this rank.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Bytes of weight matrices that this rank holds or maps.
    pub fn weight_bytes(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(DecoderLayer::bytes).sum();
        let head = if self.lm_head.shares_weight_with(&self.embed_tokens) {
            0
        } else {
            self.lm_head.bytes()
        };
        layers + self.embed_tokens.bytes() + head
    }

    /// Bytes of weights that a step streams: all but the embedding's look-ups.
    pub fn step_weight_bytes(&self) -> u64 {
        self.layers.iter().map(DecoderLayer::bytes).sum::<u64>() + self.lm_head.bytes()
    }

    /// One step: logits of the wanted rows, row-major over the vocabulary.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, batch: &StepBatch, cache: &mut KvCache) -> Result<Vec<f32>> {
        let mut x = self.embed_tokens.embed(&batch.token_ids)?;
        let step = Step::new(batch, &self.rope);
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &step, self.heads, self.eps, cache.layer(i))?;
        }
        let wanted = wanted_rows(batch);
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let x = ops::rms_norm(&ops::select_rows(&x, &wanted)?, &self.norm, self.eps)?;
        self.lm_head.logits(&x)
    }
}

/// Heads of one rank; a KV head is copied to several ranks where the group is larger.
fn local_heads(config: &ModelConfig, size: usize) -> Heads {
    Heads {
        heads: config.num_attention_heads / size,
        kv_heads: (config.num_key_value_heads / size).max(1),
        head_dim: config.head_dim,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
    }
}

/// What all layers of a step share: the sequences' rows, and each row's cos and sin.
struct Step<'a> {
    rows: Vec<Rows<'a>>,
    /// `[row][cos.. sin..]`, `head_dim` values a row.
    rotations: Vec<f32>,
}

impl<'a> Step<'a> {
    fn new(batch: &'a StepBatch, rope: &RotaryEmbedding) -> Self {
        let mut first = 0;
        let mut rotations = Vec::new();
        let mut rows = Vec::with_capacity(batch.sequences.len());
        for s in &batch.sequences {
            for position in s.start_position..s.start_position + s.num_tokens {
                rope.at(position, s.prompt_len, |cos, sin| {
                    rotations.extend_from_slice(cos);
                    rotations.extend_from_slice(sin);
                });
            }
            rows.push(Rows {
                first,
                len: s.num_tokens,
                start_position: s.start_position,
                block_table: &s.block_table,
            });
            first += s.num_tokens;
        }
        Self { rows, rotations }
    }

    fn rotate(&self, x: &mut [f32], row_width: usize, head_dim: usize) {
        let rotations = self.rotations.chunks_exact(head_dim);
        for (row, rotation) in x.chunks_exact_mut(row_width).zip(rotations) {
            let (cos, sin) = rotation.split_at(head_dim / 2);
            rotate(row, head_dim, head_dim, false, cos, sin);
        }
    }
}

fn wanted_rows(batch: &StepBatch) -> Vec<usize> {
    let mut rows = Vec::with_capacity(batch.num_logits_rows());
    let mut end = 0;
    for s in &batch.sequences {
        let first = end;
        end += s.num_tokens;
        match s.logits {
            LogitsWanted::None => {}
            LogitsWanted::Last => rows.push(end - 1),
            LogitsWanted::All => rows.extend(first..end),
        }
    }
    rows
}

impl DecoderLayer {
    fn load(l: &Loader, config: &ModelConfig, name: &str) -> Result<Self> {
        let hidden = config.hidden_size;
        let norm =
            |part: &str| l.source.vector(&format!("{name}.{part}.weight"), hidden, 0..hidden);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(l, config, &format!("{name}.self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(l, config, &format!("{name}.mlp"))?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        step: &Step,
        heads: Heads,
        eps: f32,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        let normed = ops::rms_norm(x, &self.input_layernorm, eps)?;
        let x = ops::residual(x, self.self_attn.forward(&normed, step, heads, cache)?)?;
        let normed = ops::rms_norm(&x, &self.post_attention_layernorm, eps)?;
        ops::residual(&x, self.mlp.forward(&normed)?)
    }

    fn bytes(&self) -> u64 {
        let (a, m) = (&self.self_attn, &self.mlp);
        [&a.q_proj, &a.k_proj, &a.v_proj, &m.gate_proj, &m.up_proj]
            .map(|c| c.bytes())
            .iter()
            .sum::<u64>()
            + a.o_proj.bytes()
            + m.down_proj.bytes()
    }
}

impl Attention {
    fn load(l: &Loader, config: &ModelConfig, name: &str) -> Result<Self> {
        let (hidden, d) = (config.hidden_size, config.head_dim);
        let local = local_heads(config, l.comm.size());
        let heads = config.num_attention_heads;
        let kv_heads = config.num_key_value_heads;
        let q = l.share(heads);
        // Where there are more ranks than KV heads, neighbours share one.
        let first_kv = l.comm.rank() * kv_heads / l.comm.size();
        let kv = first_kv * d..(first_kv + local.kv_heads) * d;
        let q = q.start * d..q.end * d;
        let spec = |part: &str, shape| LinearSpec {
            name: format!("{name}.{part}"),
            shape,
            bias: config.attention_bias,
        };
        let column = |part: &str, n: usize, rows| {
            ColumnParallelLinear::load(l, &spec(part, [n * d, hidden]), rows)
        };
        Ok(Self {
            q_proj: column("q_proj", heads, q.clone())?,
            k_proj: column("k_proj", kv_heads, kv.clone())?,
            v_proj: column("v_proj", kv_heads, kv)?,
            o_proj: RowParallelLinear::load(l, &spec("o_proj", [hidden, heads * d]), q)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        step: &Step,
        h: Heads,
        cache: &mut LayerCache,
    ) -> Result<Vec<f32>> {
        let mut q = self.q_proj.forward(x)?;
        let mut k = self.k_proj.forward(x)?;
        let v = self.v_proj.forward(x)?;
        step.rotate(&mut q, h.heads * h.head_dim, h.head_dim);
        step.rotate(&mut k, h.kv_heads * h.head_dim, h.head_dim);
        for rows in &step.rows {
            attention::write_kv(h, *rows, &k, &v, &mut cache.keys, &mut cache.values);
        }
        let mut out = vec![0.0; q.len()];
        attention::paged_attention(
            h,
            Rule::default(),
            &q,
            &cache.keys,
            &cache.values,
            &step.rows,
            &mut out,
        );
        self.o_proj.forward(&ops::from_values(out, h.heads * h.head_dim)?)
    }
}

impl Mlp {
    fn load(l: &Loader, config: &ModelConfig, name: &str) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let share = l.share(inner);
        let spec = |part: &str, shape| LinearSpec {
            name: format!("{name}.{part}"),
            shape,
            bias: config.mlp_bias,
        };
        let column =
            |part: &str| ColumnParallelLinear::load(l, &spec(part, [inner, hidden]), share.clone());
        Ok(Self {
            gate_proj: column("gate_proj")?,
            up_proj: column("up_proj")?,
            down_proj: RowParallelLinear::load(
                l,
                &spec("down_proj", [hidden, inner]),
                share.clone(),
            )?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Vec<f32>> {
        let gate = self.gate_proj.forward(x)?;
        let up = self.up_proj.forward(x)?;
        let cols = gate.len() / x.dim(0)?.max(1);
        self.down_proj.forward(&ops::gated(Activation::Silu, &gate, &up, cols)?)
    }
}
