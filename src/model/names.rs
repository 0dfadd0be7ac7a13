//! Where a family keeps its tensors: tables of names, one a family in Hugging Face's form,
//! one for GGUF, one for Meta's form.
//!
//! `{}` stands for the layer, `{e}` for the expert. Names are those of modules: `.weight`
//! and `.bias` follow.

use std::ops::Range;

/// The names of a checkpoint's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Embedding `[vocab, hidden]`.
    pub embed_tokens: &'static str,
    /// Norm before the output projection.
    pub norm: &'static str,
    /// Output projection `[vocab, hidden]`.
    pub lm_head: &'static str,
    /// Norm before attention.
    pub input_norm: &'static str,
    /// Norm before the MLP (none where a parallel block shares the first).
    pub mlp_norm: &'static str,
    /// Norms of attention's and the MLP's output.
    pub post_norms: [&'static str; 2],
    /// Queries, keys and values.
    pub qkv: Qkv,
    /// Norms of queries and keys.
    pub qk_norms: [&'static str; 2],
    /// Attention's output projection.
    pub o_proj: &'static str,
    /// The MLP's way in.
    pub gate_up: GateUp,
    /// The MLP's way out.
    pub down_proj: &'static str,
    /// Scores of the experts.
    pub router: &'static str,
    /// Gate, up and down of the experts.
    pub experts: ExpertNames,
}

/// How queries, keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qkv {
    /// A tensor each.
    Split([&'static str; 3]),
    /// One tensor: all queries, all keys, all values.
    Concatenated(&'static str),
    /// One tensor, a KV head after another: its queries, its key, its value.
    Grouped(&'static str),
}

/// How gate and up are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateUp {
    /// A tensor each.
    Split([&'static str; 2]),
    /// One tensor: gate, then up.
    Concatenated(&'static str),
    /// There is no gate.
    Up(&'static str),
}

/// How experts are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertNames {
    /// Gate, up and down of an expert each.
    Each([&'static str; 3]),
    /// Gate, up and down of all experts stacked.
    Stacked([&'static str; 3]),
}

/// A part of a stored tensor: its name and the rows in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The module's name.
    pub name: String,
    /// Rows of the whole stored tensor.
    pub stored_rows: usize,
    /// The rows that are meant, in order.
    pub rows: Vec<Range<usize>>,
}

impl Place {
    /// Rows `rows` of a tensor of `stored_rows`.
    pub fn new(name: String, stored_rows: usize, rows: Range<usize>) -> Self {
        Self { name, stored_rows, rows: vec![rows] }
    }

    /// Number of rows that are meant.
    pub fn len(&self) -> usize {
        self.rows.iter().map(ExactSizeIterator::len).sum()
    }

    /// The rows of both, one after the other; they lie in one tensor.
    pub fn and(mut self, other: Place) -> Place {
        self.rows.extend(other.rows);
        joined(self)
    }

    /// Whether no row is meant.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A name with its layer.
pub fn at(template: &str, layer: usize) -> String {
    template.replace("{}", &layer.to_string())
}

/// A name with its layer and expert.
pub fn at_expert(template: &str, layer: usize, expert: usize) -> String {
    at(template, layer).replace("{e}", &expert.to_string())
}

/// Llama's, which most families share.
pub const LLAMA: Names = Names {
    embed_tokens: "model.embed_tokens",
    norm: "model.norm",
    lm_head: "lm_head",
    input_norm: "model.layers.{}.input_layernorm",
    mlp_norm: "model.layers.{}.post_attention_layernorm",
    post_norms: ["", ""],
    qkv: Qkv::Split([
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ]),
    qk_norms: ["model.layers.{}.self_attn.q_norm", "model.layers.{}.self_attn.k_norm"],
    o_proj: "model.layers.{}.self_attn.o_proj",
    gate_up: GateUp::Split(["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"]),
    down_proj: "model.layers.{}.mlp.down_proj",
    router: "model.layers.{}.mlp.gate",
    experts: ExpertNames::Each([
        "model.layers.{}.mlp.experts.{e}.gate_proj",
        "model.layers.{}.mlp.experts.{e}.up_proj",
        "model.layers.{}.mlp.experts.{e}.down_proj",
    ]),
};

/// llama.cpp's, for all architectures (gguf-py's tensor_mapping.py); families differ in
/// what is fused.
pub const GGUF: Names = Names {
    embed_tokens: "token_embd",
    norm: "output_norm",
    lm_head: "output",
    input_norm: "blk.{}.attn_norm",
    mlp_norm: "blk.{}.ffn_norm",
    post_norms: ["blk.{}.post_attention_norm", "blk.{}.post_ffw_norm"],
    qkv: Qkv::Split(["blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"]),
    qk_norms: ["blk.{}.attn_q_norm", "blk.{}.attn_k_norm"],
    o_proj: "blk.{}.attn_output",
    gate_up: GateUp::Split(["blk.{}.ffn_gate", "blk.{}.ffn_up"]),
    down_proj: "blk.{}.ffn_down",
    router: "blk.{}.ffn_gate_inp",
    experts: ExpertNames::Stacked([
        "blk.{}.ffn_gate_exps",
        "blk.{}.ffn_up_exps",
        "blk.{}.ffn_down_exps",
    ]),
};

/// Phi-3's in GGUF.
pub const GGUF_PHI3: Names =
    Names { qkv: GGUF_FUSED_QKV, gate_up: GateUp::Concatenated("blk.{}.ffn_up"), ..GGUF };

/// Falcon's in GGUF, with one norm a layer.
pub const GGUF_FALCON: Names =
    Names { qkv: GGUF_FUSED_QKV, gate_up: GateUp::Up("blk.{}.ffn_up"), ..GGUF };

/// Falcon's in GGUF, with two: the one that all files call the first is the MLP's.
pub const GGUF_FALCON_TWO_NORMS: Names =
    Names { input_norm: "blk.{}.attn_norm_2", mlp_norm: "blk.{}.attn_norm", ..GGUF_FALCON };

/// Queries, keys and values in one tensor of a GGUF file.
pub const GGUF_FUSED_QKV: Qkv = Qkv::Concatenated("blk.{}.attn_qkv");

/// The original Llama checkpoints'.
pub const META: Names = Names {
    embed_tokens: "tok_embeddings",
    norm: "norm",
    lm_head: "output",
    input_norm: "layers.{}.attention_norm",
    mlp_norm: "layers.{}.ffn_norm",
    qkv: Qkv::Split(["layers.{}.attention.wq", "layers.{}.attention.wk", "layers.{}.attention.wv"]),
    o_proj: "layers.{}.attention.wo",
    gate_up: GateUp::Split(["layers.{}.feed_forward.w1", "layers.{}.feed_forward.w3"]),
    down_proj: "layers.{}.feed_forward.w2",
    ..LLAMA
};

impl Qkv {
    /// Where the rows of `heads` query heads and `kv_heads` KV heads (ranges of the whole
    /// model's `num_heads` and `num_kv_heads`) of width `d` lie: queries, keys, values.
    pub fn places(
        &self,
        layer: usize,
        [num_heads, num_kv_heads, d]: [usize; 3],
        heads: Range<usize>,
        kv_heads: Range<usize>,
    ) -> [Place; 3] {
        let rows =
            |first: usize, heads: &Range<usize>| first + heads.start * d..first + heads.end * d;
        let total = (num_heads + 2 * num_kv_heads) * d;
        match self {
            Qkv::Split([q, k, v]) => [
                Place::new(at(q, layer), num_heads * d, rows(0, &heads)),
                Place::new(at(k, layer), num_kv_heads * d, rows(0, &kv_heads)),
                Place::new(at(v, layer), num_kv_heads * d, rows(0, &kv_heads)),
            ],
            Qkv::Concatenated(name) => {
                let (k, v) = (num_heads * d, (num_heads + num_kv_heads) * d);
                [rows(0, &heads), rows(k, &kv_heads), rows(v, &kv_heads)]
                    .map(|rows| Place::new(at(name, layer), total, rows))
            }
            Qkv::Grouped(name) => {
                let group = num_heads / num_kv_heads;
                let start = |kv: usize| kv * (group + 2) * d;
                let place = |rows: Vec<Range<usize>>| Place {
                    name: at(name, layer),
                    stored_rows: total,
                    rows,
                };
                let head = |h: usize| {
                    let first = start(h / group) + h % group * d;
                    first..first + d
                };
                let kv = |part: usize| {
                    let first = move |g: usize| start(g) + (group + part) * d;
                    kv_heads.clone().map(|g| first(g)..first(g) + d).collect()
                };
                [place(heads.map(head).collect()), place(kv(0)), place(kv(1))].map(joined)
            }
        }
    }
}

impl Qkv {
    /// The same rows one KV head after another: its queries, its key, its value. That is how
    /// [`Qkv::Grouped`] has them, in one piece; all lie in one tensor.
    pub fn place_by_group(
        &self,
        layer: usize,
        shape: [usize; 3],
        heads: Range<usize>,
        kv_heads: Range<usize>,
    ) -> Place {
        let group = heads.len() / kv_heads.len().max(1);
        let parts = kv_heads.clone().flat_map(|kv| {
            let first = heads.start + (kv - kv_heads.start) * group;
            self.places(layer, shape, first..first + group, kv..kv + 1)
        });
        let all = parts.reduce(Place::and);
        all.unwrap_or_else(|| Place::new(String::new(), 0, 0..0))
    }
}

impl GateUp {
    /// Where the inner features `share` of the `inner` of a layer lie: gate, if there is one,
    /// and up.
    pub fn places(
        &self,
        layer: usize,
        inner: usize,
        share: Range<usize>,
    ) -> (Option<Place>, Place) {
        let place = |name: &str, parts: usize, part: usize| {
            let rows = part * inner + share.start..part * inner + share.end;
            Place::new(at(name, layer), parts * inner, rows)
        };
        match self {
            GateUp::Split([gate, up]) => (Some(place(gate, 1, 0)), place(up, 1, 0)),
            GateUp::Concatenated(both) => (Some(place(both, 2, 0)), place(both, 2, 1)),
            GateUp::Up(up) => (None, place(up, 1, 0)),
        }
    }
}

/// The same rows in as few ranges as possible.
fn joined(mut place: Place) -> Place {
    let mut rows: Vec<Range<usize>> = Vec::new();
    for next in place.rows {
        match rows.last_mut() {
            Some(last) if last.end == next.start => last.end = next.end,
            _ => rows.push(next),
        }
    }
    place.rows = rows;
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_rows_are_found_in_each_layout() {
        let shape = [4, 2, 8];
        let part = |stored_rows: usize, rows: Range<usize>| (stored_rows, rows);
        let names = |qkv: Qkv| {
            qkv.places(3, shape, 2..4, 1..2).map(|p| {
                assert_eq!(p.rows.len(), 1);
                (p.stored_rows, p.rows[0].clone())
            })
        };
        assert_eq!(
            names(Qkv::Split(["q", "k", "v"])),
            [part(32, 16..32), part(16, 8..16), part(16, 8..16)]
        );
        assert_eq!(
            names(Qkv::Concatenated("a")),
            [part(64, 16..32), part(64, 40..48), part(64, 56..64)]
        );
        // [q0 q1 k0 v0 | q2 q3 k1 v1], 8 rows each.
        assert_eq!(
            names(Qkv::Grouped("a")),
            [part(64, 32..48), part(64, 48..56), part(64, 56..64)]
        );
        let all = Qkv::Grouped("l.{}.a").places(3, shape, 0..4, 0..2);
        assert_eq!(all[0].rows, [0..16, 32..48]);
        assert_eq!((all[0].name.as_str(), all[0].len(), all[1].len()), ("l.3.a", 32, 16));
    }

    #[test]
    fn by_group_the_rows_of_a_grouped_tensor_are_one_piece() {
        let (shape, grouped) = ([4, 2, 8], Qkv::Grouped("l.{}.a"));
        let whole = grouped.place_by_group(3, shape, 0..4, 0..2);
        assert_eq!(whole, Place::new("l.3.a".into(), 64, 0..64));
        let last = grouped.place_by_group(3, shape, 2..4, 1..2);
        assert_eq!(last, Place::new("l.3.a".into(), 64, 32..64));
        // Half a group's queries, and the key and value that two ranks share.
        assert_eq!(grouped.place_by_group(3, shape, 2..3, 1..2).rows, [32..40, 48..64]);
        let concatenated = Qkv::Concatenated("a").place_by_group(3, shape, 0..4, 0..2);
        assert_eq!(concatenated.rows, [0..16, 32..40, 48..56, 16..32, 40..48, 56..64]);
    }
}
