//! An inspection as people read it.

use super::{Inspection, RankMemory, TensorInfo, Token, TokenizerInfo, Unused};
use crate::model::ModelConfig;
use crate::model::config::{Block, NormKind, Positions, RopeConfig, RopeScaling};
use crate::stats::format::{bytes, count, memory, percent, plural};

/// Lines of `name  value`, the table of memory, the tensors.
pub fn render(inspection: &Inspection) -> String {
    let mut text = String::new();
    for (name, value) in rows(inspection) {
        text.push_str(&format!("{name:<15}{value}\n"));
    }
    if !inspection.memory.is_empty() {
        text.push_str(&memory_table(inspection));
    }
    if let Some(tensors) = &inspection.tensors {
        text.push_str(&tensor_table(tensors));
    }
    text
}

fn rows(inspection: &Inspection) -> Vec<(&'static str, String)> {
    let files = match inspection.files.as_slice() {
        [only] => only.file.clone(),
        [first, .., last] => {
            format!(
                "{} … {} ({})",
                first.file,
                last.file,
                plural(inspection.files.len() as u64, "file")
            )
        }
        [] => String::new(),
    };
    let mut rows = vec![
        ("model", inspection.model.display().to_string()),
        ("format", format!("{}, {}, {files}", inspection.format, bytes(inspection.bytes))),
    ];
    let mut known = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    known("family", inspection.family.clone());
    known("architecture", inspection.architecture.clone());
    known("parameters", inspection.parameters.map(parameters));
    let shares = inspection.dtypes.iter().map(|d| format!("{} {}", d.dtype, percent(d.share)));
    known("stored as", Some(shares.collect::<Vec<_>>().join(", ")));
    known("quantized", Some(inspection.quantization.clone().unwrap_or_else(|| "no".into())));
    known("context", inspection.context_length.map(|n| format!("{} tokens", count(n as u64))));
    known("vocabulary", inspection.vocab_size.map(|n| count(n as u64)));
    if let Some(tokenizer) = &inspection.tokenizer {
        rows.extend(tokenizer_rows(tokenizer));
    }
    if let Some(Unused { tensors, examples }) = &inspection.unused {
        let more = if *tensors > examples.len() { ", …" } else { "" };
        let tensors = plural(*tensors as u64, "tensor");
        rows.push(("not used", format!("{tensors}: {}{more}", examples.join(", "))));
    }
    rows.extend(inspection.problems.iter().map(|problem| ("not usable", problem.clone())));
    rows
}

fn tokenizer_rows(tokenizer: &TokenizerInfo) -> [(&'static str, String); 3] {
    let shown = |token: &Token| match &token.token {
        Some(text) => format!("{} {text:?}", token.id),
        None => token.id.to_string(),
    };
    let eos: Vec<String> = tokenizer.eos.iter().map(shown).collect();
    let eos = if eos.is_empty() { "none".to_owned() } else { eos.join(", ") };
    let tokens = count(tokenizer.vocab_size as u64);
    [
        ("tokenizer", format!("{}, {tokens} tokens", tokenizer.kind)),
        ("chat template", if tokenizer.chat_template { "yes" } else { "no" }.to_owned()),
        ("ends a text", eos),
    ]
}

fn parameters(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.1} B ({})", n as f64 / 1e9, count(n)),
        1_000_000.. => format!("{:.1} M ({})", n as f64 / 1e6, count(n)),
        _ => count(n),
    }
}

fn memory_table(inspection: &Inspection) -> String {
    let context = count(inspection.context_length.unwrap_or_default() as u64);
    let mut text = format!(
        "\nmemory of a rank (ranks of a node map one copy of weights that are used as stored)\n\
         {:>15}  {:>10}  {:>10}  {:>10}\n",
        "tensor parallel",
        "weights",
        "KV of 1",
        format!("KV of {}", inspection.batch_size),
    );
    let row = |r: &RankMemory| {
        format!(
            "{:>15}  {:>10}  {:>10}  {:>10}\n",
            r.tensor_parallel,
            memory(r.weight_bytes),
            memory(r.kv_sequence_bytes),
            memory(r.kv_batch_bytes)
        )
    };
    text.extend(inspection.memory.iter().map(row));
    text.push_str(&format!(
        "KV: keys and values of sequences of {context} tokens; --max-seq-len makes them shorter\n"
    ));
    text
}

fn tensor_table(tensors: &[TensorInfo]) -> String {
    let shape = |tensor: &TensorInfo| format!("{:?}", tensor.shape);
    let width = |of: &dyn Fn(&TensorInfo) -> usize| tensors.iter().map(of).max().unwrap_or(0);
    let names = width(&|tensor| tensor.name.len());
    let shapes = width(&|tensor| shape(tensor).len());
    let mut text = "\ntensors\n".to_owned();
    for tensor in tensors {
        text.push_str(&format!(
            "{:names$}  {:shapes$}  {:<5}  {:>12}  {}\n",
            tensor.name,
            shape(tensor),
            tensor.dtype,
            tensor.bytes.map_or_else(|| "-".to_owned(), count),
            tensor.file
        ));
    }
    text
}

/// The shape in a line.
pub fn architecture(config: &ModelConfig) -> String {
    let mut parts = vec![
        format!("{} × {}", plural(config.num_hidden_layers as u64, "layer"), config.hidden_size),
        format!(
            "{} of {} over {}",
            plural(config.num_attention_heads as u64, "head"),
            config.head_dim,
            plural(config.num_key_value_heads as u64, "KV head")
        ),
        mlp(config),
        norm(config).to_owned(),
        positions(config),
    ];
    let windows: Vec<usize> = config.layer_windows.iter().filter_map(|w| *w).collect();
    if let Some(window) = windows.iter().max() {
        parts.push(format!("window {window} in {}", plural(windows.len() as u64, "layer")));
    }
    let switches = [
        (config.qk_norm, "QK norm"),
        (config.attention_bias, "QKV biases"),
        (matches!(config.block, Block::Parallel | Block::ParallelTwoNorms), "parallel blocks"),
        (config.attn_logit_softcapping.is_some(), "capped scores"),
        (config.final_logit_softcapping.is_some(), "capped logits"),
        (config.tie_word_embeddings, "tied embeddings"),
    ];
    parts.extend(switches.iter().filter(|(on, _)| *on).map(|(_, name)| (*name).to_owned()));
    parts.join(", ")
}

fn mlp(config: &ModelConfig) -> String {
    let activation = format!("{:?}", config.activation).to_lowercase();
    let gated = if config.gated_mlp { "gated " } else { "" };
    let dense = format!("MLP {} ({gated}{activation})", config.intermediate_size);
    let Some(experts) = &config.experts else { return dense };
    let routed = format!(
        "{} experts of {} ({gated}{activation}), {} a token",
        experts.num_experts, experts.moe_intermediate_size, experts.num_experts_per_tok
    );
    match experts.dense_layers.len() {
        0 => routed,
        n => format!("{routed}; in {} {dense}", plural(n as u64, "layer")),
    }
}

fn norm(config: &ModelConfig) -> &'static str {
    match config.norm {
        NormKind::Rms | NormKind::RmsPlusOne => "RMS norm",
        NormKind::Layer => "layer norm",
    }
}

fn positions(config: &ModelConfig) -> String {
    let Positions::Rotary { global, local } = &config.positions else {
        return "ALiBi".to_owned();
    };
    let local = local.as_ref().map(|local| format!(" (windows: {})", rope(local, config)));
    format!("RoPE {}{}", rope(global, config), local.unwrap_or_default())
}

fn rope(rope: &RopeConfig, config: &ModelConfig) -> String {
    let scaling = match &rope.scaling {
        RopeScaling::Default => String::new(),
        RopeScaling::Linear { factor } => format!(" linear × {factor}"),
        RopeScaling::Dynamic { factor } => format!(" dynamic × {factor}"),
        RopeScaling::Llama3 { factor, .. } => format!(" llama3 × {factor}"),
        RopeScaling::Yarn { factor, .. } => format!(" yarn × {factor}"),
        RopeScaling::LongRope { .. } => " longrope".to_owned(),
        RopeScaling::Divisors(_) => " with divisors".to_owned(),
    };
    let part = match rope.rotary_dim {
        whole if whole == config.head_dim => String::new(),
        part => format!(" of {part}"),
    };
    format!("{}{part}{scaling}", rope.theta)
}
