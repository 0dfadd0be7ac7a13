//! Attention of one layer: projections, norms and rotations of queries and keys, the KV
//! cache, the way out.

use std::ops::Range;

use candle_core::Tensor;

use super::adapter::RowAdapters;
use super::config::{AttentionSplit, ModelConfig, Positions};
use super::kv_cache::LayerCache;
use super::layers::{ColumnParallelLinear, Loader, Norm, RowParallelLinear, share};
use super::names::{Names, Place, Qkv, at};
use super::ops;
use super::step::Step;
use super::weights::Weight;
use crate::Result;
use crate::kernels::attention::{self as kernel, Heads, Rule};

/// The attention of a layer, or a rank's heads of it.
pub struct Attention {
    heads: Heads,
    pub(super) window: Option<usize>,
    pub(super) softcap: Option<f32>,
    /// ALiBi, a slope a head of this rank.
    pub(super) slopes: Option<Vec<f32>>,
    pub(super) qkv: Projections,
    pub(super) qk_norms: Option<[Norm; 2]>,
    pub(super) o_proj: OutputProjection,
}

/// The way in.
pub(super) enum Projections {
    /// Queries, keys, values.
    Apart(Box<[ColumnParallelLinear; 3]>),
    /// One matrix, a KV head after another: its queries, its key, its value (Falcon).
    Grouped(ColumnParallelLinear),
}

/// What a tensor that holds queries, keys and values by KV head is loaded as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupedQkv {
    /// One matrix in the order of the file, which stays mapped.
    AsStored,
    /// A copy of the rows of each.
    Apart,
}

/// The way out.
pub(super) enum OutputProjection {
    /// Heads are split over the ranks, whose products are summed.
    Split(RowParallelLinear),
    /// Every rank has all heads and all of the output.
    Replicated(ColumnParallelLinear),
}

/// A rank's place in its tensor-parallel group.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// This rank.
    pub rank: usize,
    /// Ranks.
    pub size: usize,
}

impl Group {
    /// The loader's.
    pub fn of(l: &Loader) -> Self {
        Self { rank: l.comm.rank(), size: l.comm.size() }
    }

    /// This rank's query heads and KV heads. Where there are more ranks than KV heads,
    /// neighbours share one.
    pub fn heads(self, config: &ModelConfig) -> (Range<usize>, Range<usize>) {
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if config.attention_split(self.size) != Some(AttentionSplit::Heads) {
            return (0..heads, 0..kv_heads);
        }
        let first_kv = self.rank * kv_heads / self.size;
        let kv = first_kv..first_kv + config.local_kv_heads(self.size);
        (share(heads, self.rank, self.size), kv)
    }

    /// The same in the order of a tensor that holds them by KV head.
    fn grouped_place(self, config: &ModelConfig, names: &Names, layer: usize) -> Place {
        let shape = [config.num_attention_heads, config.num_key_value_heads, config.head_dim];
        let (q, kv) = self.heads(config);
        names.qkv.place_by_group(layer, shape, q, kv)
    }

    /// Where this rank's queries, keys and values of a layer lie.
    pub fn qkv_places(self, config: &ModelConfig, names: &Names, layer: usize) -> [Place; 3] {
        let shape = [config.num_attention_heads, config.num_key_value_heads, config.head_dim];
        let (q, kv) = self.heads(config);
        names.qkv.places(layer, shape, q, kv)
    }
}

impl Attention {
    /// Heads of a rank in a group of `size`.
    pub fn heads(config: &ModelConfig, size: usize) -> Heads {
        Heads {
            heads: config.local_heads(size),
            kv_heads: config.local_kv_heads(size),
            head_dim: config.head_dim,
            scale: config.attention_scale,
        }
    }

    /// Loads this rank's heads of layer `layer`.
    ///
    /// # Errors
    /// See [`super::checkpoint::TensorTable::matrix`].
    pub fn load(
        l: &Loader,
        config: &ModelConfig,
        layer: usize,
        grouped: GroupedQkv,
    ) -> Result<Self> {
        let (hidden, d, names) = (config.hidden_size, config.head_dim, config.names);
        let num_heads = config.num_attention_heads;
        let group = Group::of(l);
        let split = config.attention_split(group.size) == Some(AttentionSplit::Heads);
        let heads = Self::heads(config, group.size);
        let (q, _) = group.heads(config);
        let norm = |name: &str| Norm::load(l, config, &at(name, layer), d);
        let qk_norms =
            || Ok::<_, crate::Error>([norm(names.qk_norms[0])?, norm(names.qk_norms[1])?]);
        let out = |names: &Names| Place::new(at(names.o_proj, layer), hidden, 0..hidden);
        let (width, bias) = (num_heads * d, config.output_bias);
        Ok(Self {
            heads,
            window: config.layer_windows[layer],
            softcap: config.attn_logit_softcapping,
            slopes: (config.positions == Positions::Alibi)
                .then(|| kernel::alibi_slopes(num_heads)[q.clone()].to_vec()),
            qkv: Projections::load(l, config, layer, grouped)?,
            qk_norms: config.qk_norm.then(qk_norms).transpose()?,
            o_proj: match split {
                true => OutputProjection::Split(RowParallelLinear::load(
                    l,
                    &out,
                    width,
                    q.start * d..q.end * d,
                    bias,
                )?),
                false => OutputProjection::Replicated(ColumnParallelLinear::load(
                    l, &out, width, bias, None,
                )?),
            },
        })
    }

    /// `[m, hidden]` → the attention's output on every rank; keys and values go to the cache.
    ///
    /// # Errors
    /// A tensor fault.
    pub fn forward(&self, x: &Tensor, step: &Step, cache: &mut LayerCache) -> Result<Vec<f32>> {
        let h = self.heads;
        let [mut q, mut k, v] = self.qkv.forward(x, h, &step.adapters)?;
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            (q, k) = (q_norm.rows(&q), k_norm.rows(&k));
        }
        step.rotate(&mut q, h.heads * h.head_dim, h.head_dim, self.window.is_some());
        step.rotate(&mut k, h.kv_heads * h.head_dim, h.head_dim, self.window.is_some());
        for rows in &step.rows {
            kernel::write_kv(h, *rows, &k, &v, &mut cache.keys, &mut cache.values);
        }
        let rule =
            Rule { window: self.window, softcap: self.softcap, slopes: self.slopes.as_deref() };
        let mut out = vec![0.0; q.len()];
        kernel::paged_attention(h, rule, &q, &cache.keys, &cache.values, &step.rows, &mut out);
        let out = ops::from_values(out, h.heads * h.head_dim)?;
        match &self.o_proj {
            OutputProjection::Split(o_proj) => o_proj.forward(&out, &step.adapters),
            OutputProjection::Replicated(o_proj) => o_proj.forward(&out, &step.adapters),
        }
    }

    /// The weight matrices of this rank.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        let out = match &self.o_proj {
            OutputProjection::Split(o_proj) => o_proj.weight(),
            OutputProjection::Replicated(o_proj) => o_proj.weight(),
        };
        self.qkv.linears().iter().map(ColumnParallelLinear::weight).chain([out])
    }
}

impl Projections {
    fn load(l: &Loader, config: &ModelConfig, layer: usize, grouped: GroupedQkv) -> Result<Self> {
        let (group, width, bias) = (Group::of(l), config.hidden_size, config.attention_bias);
        if grouped == GroupedQkv::AsStored && matches!(config.names.qkv, Qkv::Grouped(_)) {
            let place = |names: &Names| group.grouped_place(config, names, layer);
            // Heads in this form are rotated in halves, whatever the form of an adapter.
            return ColumnParallelLinear::load(l, &place, width, bias, None).map(Self::Grouped);
        }
        let [q, k, v] = [0, 1, 2].map(|part| {
            let place = |names: &Names| group.qkv_places(config, names, layer)[part].clone();
            let rotated = (part < 2).then_some(config.head_dim);
            ColumnParallelLinear::load(l, &place, width, bias, rotated)
        });
        Ok(Self::Apart(Box::new([q?, k?, v?])))
    }

    /// `[m, hidden]` → queries, keys and values of each row.
    fn forward(&self, x: &Tensor, heads: Heads, adapters: &RowAdapters) -> Result<[Vec<f32>; 3]> {
        match self {
            Self::Apart(each) => {
                let [q, k, v] = &**each;
                Ok([q.forward(x, adapters)?, k.forward(x, adapters)?, v.forward(x, adapters)?])
            }
            Self::Grouped(linear) => Ok(apart(&linear.forward(x, adapters)?, heads)),
        }
    }

    pub(super) fn linears(&self) -> &[ColumnParallelLinear] {
        match self {
            Self::Apart(linears) => &**linears,
            Self::Grouped(linear) => std::slice::from_ref(linear),
        }
    }
}

/// Rows of queries, key and value of one KV head after another, as rows of each.
fn apart(grouped: &[f32], heads: Heads) -> [Vec<f32>; 3] {
    let d = heads.head_dim;
    let queries = heads.heads / heads.kv_heads * d;
    let len = grouped.len() / (queries + 2 * d);
    let (mut q, [mut k, mut v]) =
        (Vec::with_capacity(len * queries), [(); 2].map(|()| Vec::with_capacity(len * d)));
    for group in grouped.chunks_exact(queries + 2 * d) {
        let (of_q, of_kv) = group.split_at(queries);
        q.extend_from_slice(of_q);
        k.extend_from_slice(&of_kv[..d]);
        v.extend_from_slice(&of_kv[d..]);
    }
    [q, k, v]
}
