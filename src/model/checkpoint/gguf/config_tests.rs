use super::super::testing::GgufBuilder;
use super::*;

/// A model of `arch` in the sizes that the tests share: 6 layers, width 64, 4 heads of 16,
/// 2 key-value heads, 100 tokens.
fn model(arch: &str) -> Model {
    let key = |name: &str| format!("{arch}.{name}");
    let builder = GgufBuilder::new(arch)
        .uint(&key("block_count"), 6)
        .uint(&key("context_length"), 2048)
        .uint(&key("embedding_length"), 64)
        .uint(&key("feed_forward_length"), 96)
        .uint(&key("attention.head_count"), 4)
        .uint(&key("attention.head_count_kv"), 2)
        .float(&key("attention.layer_norm_rms_epsilon"), 1e-5);
    let tensors = vec![("token_embd.weight", vec![100, 64]), ("output.weight", vec![100, 64])];
    Model { arch: arch.to_owned(), builder, tensors }
}

/// Metadata and shapes; keys are given without the architecture.
#[derive(Clone)]
struct Model {
    arch: String,
    builder: GgufBuilder,
    tensors: Vec<(&'static str, Vec<usize>)>,
}

impl Model {
    fn with(self, key: &str, value: impl Into<Json>) -> Self {
        let key = format!("{}.{key}", self.arch);
        self.with_key(&key, value)
    }

    fn with_key(mut self, key: &str, value: impl Into<Json>) -> Self {
        self.builder.pairs.retain(|(name, ..)| name != key);
        self.builder = match value.into() {
            Json::Null => self.builder,
            Json::Bool(b) => self.builder.bool(key, b),
            Json::String(s) => self.builder.str(key, &s),
            Json::Number(n) if n.is_f64() => self.builder.float(key, n.as_f64().unwrap() as f32),
            Json::Number(n) => self.builder.uint(key, n.as_u64().unwrap() as u32),
            Json::Array(all) if all.first().is_some_and(Json::is_string) => {
                let texts: Vec<&str> = all.iter().map(|s| s.as_str().unwrap()).collect();
                self.builder.strings(key, &texts)
            }
            Json::Array(all) => {
                let ints: Vec<i32> = all.iter().map(|n| n.as_i64().unwrap() as i32).collect();
                self.builder.ints(key, &ints)
            }
            Json::Object(_) => unreachable!("no such values"),
        };
        self
    }

    fn tensor(mut self, name: &'static str, shape: &[usize]) -> Self {
        self.tensors.push((name, shape.to_vec()));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|(other, _)| *other != name);
        self
    }

    fn config(&self) -> Result<Json> {
        let metadata = super::super::read(&self.builder.build()).unwrap().metadata;
        let shape = |name: &str| self.tensors.iter().find(|t| t.0 == name).map(|t| t.1.clone());
        hf_config(&metadata, shape)
    }

    /// The configuration has these values (`null`: has not).
    fn gives(&self, expected: Json) {
        let config = self.config().unwrap();
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(config.get(key).unwrap_or(&Json::Null), value, "{key}");
        }
    }

    fn refused(&self, why: &str) {
        let message = self.config().unwrap_err().to_string();
        assert!(message.contains(why), "{message:?} does not say {why:?}");
    }
}

#[test]
fn llama() {
    let llama = model("llama");
    llama.gives(json!({
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "rope_scaling": null,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": null,
        "eos_token_id": null,
    }));
    let changed = llama
        .clone()
        .with("attention.head_count_kv", Json::Null)
        .with("attention.key_length", 32)
        .with("attention.value_length", 32)
        .with("rope.dimension_count", 32)
        .with("rope.freq_base", 500_000.0)
        .tensor("rope_freqs.weight", &[16])
        .tensor("blk.0.attn_q.bias", &[128])
        .tensor("blk.0.attn_output.bias", &[64])
        .tensor("blk.0.ffn_up.bias", &[96])
        .without("output.weight");
    changed.gives(json!({
        "num_key_value_heads": 4,
        "head_dim": 32,
        "rope_theta": 500_000.0,
        "rope_scaling": null,
        "tie_word_embeddings": true,
        "attention_bias": true,
        "mlp_bias": true,
    }));
    llama
        .with("attention.sliding_window", 4096)
        .gives(json!({"model_type": "mistral", "sliding_window": 4096}));
}

#[test]
fn mixtral() {
    let mixtral = model("llama").with("expert_count", 8).with("expert_used_count", 2);
    mixtral.gives(json!({
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
    }));
    mixtral.clone().with("expert_used_count", 9).refused("llama.expert_used_count is 9 of 8");
    mixtral.clone().with("expert_used_count", Json::Null).refused("expert_used_count is missing");
    mixtral.clone().with("expert_gating_func", 2).refused("expert_gating_func is not softmax");
    mixtral.tensor("blk.0.ffn_down.0.weight", &[64, 96]).refused("separate tensors");
    model("llama").with("expert_count", 0).gives(json!({"model_type": "llama"}));
}

#[test]
fn rope_scaling() {
    let llama = model("llama");
    let linear = json!({"rope_scaling": {"rope_type": "linear", "factor": 2.5}});
    llama.clone().with("rope.scaling.factor", 2.5).gives(linear.clone());
    llama.clone().with("rope.scale_linear", 2.5).gives(linear);
    let none = json!({"rope_scaling": null});
    llama.clone().with("rope.scaling.factor", 1.0).gives(none.clone());
    llama.clone().with("rope.scaling.factor", 0.0).gives(none.clone());
    let named = |kind: &str| llama.clone().with("rope.scaling.type", kind);
    named("none").with("rope.scaling.factor", 4.0).gives(none);
    named("su").refused("llama.rope.scaling.type is \"su\"");
    let yarn = named("yarn").with("rope.scaling.factor", 4.0);
    yarn.gives(json!({"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048,
    }}));
    yarn.clone()
        .with("rope.scaling.original_context_length", 512)
        .with("rope.scaling.yarn_beta_fast", 16.0)
        .with("rope.scaling.yarn_beta_slow", 2.0)
        .with("rope.scaling.yarn_attn_factor", 1.5)
        .with("rope.scaling.attn_factor", 2.0)
        .gives(json!({"rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 3.0,
        }}));
    let plain = yarn.clone().with("rope.scaling.yarn_log_multiplier", 1.0).config().unwrap();
    assert_eq!(plain["rope_scaling"]["attention_factor"], 1.0);
    yarn.with("rope.scaling.yarn_ext_factor", 0.5).refused("yarn_ext_factor is not 1");
    llama.clone().with("rope.scaling.attn_factor", 2.0).refused("attn_factor is not 1");
    llama.clone().with("rope.freq_base", -1.0).refused("llama.rope.freq_base is -1");
    llama.clone().with("rope.freq_base", "x").refused("llama.rope.freq_base is no number");
    llama.clone().with("rope.dimension_count", 8).refused("rope.dimension_count is 8");
    llama.tensor("rope_freqs.weight", &[9]).refused("\"rope_freqs.weight\" has the shape [9], [8]");
}

#[test]
fn falcon() {
    let falcon = model("falcon")
        .with("attention.layer_norm_rms_epsilon", Json::Null)
        .with("attention.layer_norm_epsilon", 1e-5);
    falcon.gives(json!({
        "model_type": "falcon",
        "num_kv_heads": 2,
        "new_decoder_architecture": true,
        "num_ln_in_parallel_attn": 1,
        "multi_query": false,
        "parallel_attn": true,
        "bias": false,
        "alibi": false,
        "ffn_hidden_size": 96,
        "layer_norm_epsilon": 1e-5,
        "activation": "gelu",
        "rms_norm_eps": null,
        "num_key_value_heads": null,
    }));
    falcon
        .clone()
        .tensor("blk.0.attn_norm_2.weight", &[64])
        .gives(json!({"new_decoder_architecture": true, "num_ln_in_parallel_attn": 2}));
    falcon
        .clone()
        .with("attention.head_count_kv", 1)
        .gives(json!({"new_decoder_architecture": false, "multi_query": true, "num_kv_heads": 1}));
    falcon
        .with("attention.layer_norm_epsilon", Json::Null)
        .refused("falcon.attention.layer_norm_epsilon is missing");
}

#[test]
fn qwen() {
    let qwen2 = model("qwen2").tensor("blk.0.attn_q.bias", &[64]);
    qwen2.gives(json!({"model_type": "qwen2", "use_sliding_window": false}));
    model("qwen3").with("attention.key_length", 32).gives(json!({
        "model_type": "qwen3", "head_dim": 32, "attention_bias": false, "num_experts": null,
    }));
    model("qwen3").tensor("blk.0.attn_q.bias", &[64]).refused("not supported for qwen3");
    let moe = |arch: &str| {
        model(arch)
            .with("expert_count", 8)
            .with("expert_used_count", 4)
            .with("expert_feed_forward_length", 48)
    };
    moe("qwen3moe").gives(json!({
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "norm_topk_prob": true,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }));
    let default_width = moe("qwen3moe").with("expert_feed_forward_length", Json::Null);
    default_width.gives(json!({"moe_intermediate_size": 24}));
    moe("qwen3moe").with("feed_forward_length", Json::Null).gives(json!({"intermediate_size": 48}));
    moe("qwen2moe").refused("qwen2moe");
    moe("qwen3").refused("qwen3.expert_count is set");
    model("qwen3moe").refused("qwen3moe.expert_count is missing");
}

#[test]
fn phi3() {
    let phi3 = model("phi3")
        .with("rope.scaling.original_context_length", 512)
        .with("attention.sliding_window", 2047);
    phi3.gives(json!({
        "model_type": "phi3",
        "sliding_window": 2047,
        "original_max_position_embeddings": 512,
        "rope_scaling": null,
        "partial_rotary_factor": null,
    }));
    phi3.clone().with("attention.sliding_window", 0).gives(json!({"sliding_window": null}));
    let long = phi3
        .with("rope.dimension_count", 12)
        .with("rope.scaling.attn_factor", 1.19)
        .tensor("rope_factors_long.weight", &[6])
        .tensor("rope_factors_short.weight", &[6]);
    long.gives(json!({
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "rope_type": "longrope",
            "original_max_position_embeddings": 512,
            "attention_factor": 1.19,
        },
    }));
    long.clone().without("rope_factors_short.weight").refused("\"rope_factors_short.weight\"");
    long.with("rope.dimension_count", 16).refused("has the shape [6], [8] is expected");
}

#[test]
fn gemma2() {
    let gemma2 = model("gemma2").with("attention.key_length", 32).without("output.weight");
    let alternating = ["sliding_attention", "full_attention"].repeat(3);
    gemma2.gives(json!({
        "model_type": "gemma2",
        "hidden_act": null,
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 4096,
        "layer_types": alternating,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": true,
        "rope_local_base_freq": null,
    }));
    gemma2
        .clone()
        .with("attn_logit_softcapping", 20.0)
        .with("final_logit_softcapping", 0.0)
        .with("attention.sliding_window", 8)
        .gives(json!({
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": null,
            "sliding_window": 8,
        }));
    // The 27B model.
    gemma2.clone().with("block_count", 46).gives(json!({"query_pre_attn_scalar": 16}));
    gemma2.with("rope.freq_base_swa", 5.0).refused("gemma2.rope.freq_base_swa");
}

#[test]
fn gemma3() {
    let gemma3 = model("gemma3")
        .with("attention.key_length", 32)
        .with("rope.freq_base", 1e6)
        .with("rope.scaling.type", "linear")
        .with("rope.scaling.factor", 8.0);
    gemma3.gives(json!({
        "model_type": "gemma3_text",
        "layer_types": (["full_attention"; 6]),
        "sliding_window": null,
        "attn_logit_softcapping": null,
        "final_logit_softcapping": null,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }));
    let mut five_to_one = ["sliding_attention"; 6];
    five_to_one[5] = "full_attention";
    let windows = gemma3.with("attention.sliding_window", 512);
    windows.gives(json!({"sliding_window": 512, "layer_types": five_to_one}));
    windows
        .clone()
        .with("rope.freq_base_swa", 20_000.0)
        .with("attention.sliding_window_pattern", 2)
        .gives(json!({
            "rope_local_base_freq": 20_000.0,
            "layer_types": (["sliding_attention", "full_attention"].repeat(3)),
        }));
    windows
        .clone()
        .with("attention.sliding_window_pattern", json!([0, 1, 0, 1, 0, 1]))
        .gives(json!({"layer_types": (["full_attention", "sliding_attention"].repeat(3))}));
    windows
        .clone()
        .with("attention.sliding_window_pattern", json!([0, 1]))
        .refused("gemma3.attention.sliding_window_pattern has 2 entries for 6 layers");
    windows.with("block_count", 62).gives(json!({"query_pre_attn_scalar": 16}));
}

#[test]
fn tokens_that_end() {
    let vocabulary = |types: Json| {
        model("llama")
            .with_key("tokenizer.ggml.bos_token_id", 0)
            .with_key("tokenizer.ggml.eos_token_id", 1)
            .with_key("tokenizer.ggml.tokens", json!(["<s>", "</s>", "<|im_end|>", "<|eot_id|>"]))
            .with_key("tokenizer.ggml.token_type", types)
    };
    let plain = vocabulary(json!([3, 3, 1, 1]));
    plain.gives(json!({"bos_token_id": 0, "eos_token_id": 1}));
    vocabulary(json!([3, 3, 3, 4])).gives(json!({"eos_token_id": [1, 2, 3]}));
    plain
        .with_key("tokenizer.ggml.eot_token_id", 7)
        .with_key("tokenizer.ggml.eom_token_id", u32::MAX)
        .gives(json!({"eos_token_id": [1, 7]}));
}

#[test]
fn layers_that_differ_are_refused() {
    let key = "attention.head_count_kv";
    let each = |ints: Json| model("llama").with(key, ints);
    each(json!([2, 2, 2, 2, 2, 2])).gives(json!({"num_key_value_heads": 2}));
    each(json!([2, 2, 2, 1, 2, 2])).refused("llama.attention.head_count_kv differs between layers");
    each(json!([2, 2])).refused("has 2 entries for 6 layers");
    each(json!([-2, -2, -2, -2, -2, -2])).refused("out of range");
}

#[test]
fn what_is_not_supported_is_named() {
    let message = "GGUF architecture \"mamba\" is not supported; these are: llama, falcon";
    model("mamba").refused(message);
    model("llama").with_key("general.architecture", Json::Null).refused("general.architecture");
    model("llama").with_key("general.type", "adapter").refused("an adapter");
    let llama = model("llama");
    llama.clone().with("attention.causal", false).refused("llama.attention.causal is false");
    llama.clone().with("logit_scale", 0.5).refused("llama.logit_scale is set");
    llama.clone().with("nextn_predict_layers", 1).refused("llama.nextn_predict_layers is set");
    llama.clone().with("attention.value_length", 8).refused("attention.value_length is not 16");
    llama.clone().tensor("cls.output.weight", &[2, 64]).refused("classifier");
    llama.tensor("blk.0.attn_q.bias", &[64]).refused("attn_output");
}

#[test]
fn impossible_sizes_are_refused() {
    let llama = model("llama");
    for key in ["block_count", "context_length", "embedding_length", "feed_forward_length"] {
        llama.clone().with(key, Json::Null).refused(&format!("llama.{key} is missing"));
        llama.clone().with(key, 0).refused(&format!("llama.{key} is out of range"));
        llama.clone().with(key, u32::MAX).refused(&format!("llama.{key} is out of range"));
        llama.clone().with(key, "6").refused(&format!("llama.{key} is no integer"));
    }
    llama
        .clone()
        .with("attention.head_count", 5)
        .refused("head_count_kv is 2, which does not divide");
    llama
        .clone()
        .with("attention.head_count", 6)
        .refused("is 6, which does not divide the width 64");
    llama.clone().without("token_embd.weight").refused("\"token_embd.weight\" is missing");
    let narrow = llama.clone().without("token_embd.weight").tensor("token_embd.weight", &[100, 32]);
    narrow.refused("its rows should have 64 values");
    let eps = "attention.layer_norm_rms_epsilon";
    llama.clone().with(eps, Json::Null).refused("rms_epsilon is missing");
    llama.with(eps, 0.0).refused("rms_epsilon is 0");
}

#[test]
fn only_llama_rotates_neighbours() {
    for arch in ARCHITECTURES {
        let metadata = super::super::read(&GgufBuilder::new(arch).build()).unwrap().metadata;
        assert_eq!(interleaved_rope(&metadata), arch == "llama");
    }
}

#[test]
fn fractions_give_their_part_back() {
    for whole in 1..=256u64 {
        for part in 1..=whole {
            assert_eq!((fraction(part, whole) * whole as f64) as u64, part);
        }
    }
}
