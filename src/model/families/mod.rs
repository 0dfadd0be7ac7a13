//! The families of models: what a `config.json` of each means, and its tensors' names.
//!
//! A family is a function from the file's fields to a [`ModelConfig`]; the computation is
//! one for all, [`super::decoder`]. To add a family, add its file and a line in
//! `FAMILIES`; if it needs a new switch, the decoder gets it.

mod falcon;
mod gemma;
mod llama;
mod mixture;
mod phi;
mod qwen;
mod raw;

use std::path::Path;

use raw::RawConfig;
use serde_json::Value;

use super::config::ModelConfig;
use super::small_file;
use crate::{Error, Result};

type Build = fn(&RawConfig) -> Result<ModelConfig>;

/// `model_type`s, what they mean, and what a field means that the file leaves out: the
/// defaults of the family's configuration class in transformers, where they are not Llama's.
/// (Gemma 3's published files leave out most of what equals them.)
const FAMILIES: &[(&str, Build, &str)] = &[
    ("llama", llama::llama, "{}"),
    (
        "mistral",
        llama::mistral,
        r#"{"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}"#,
    ),
    ("falcon", falcon::falcon, r#"{"vocab_size": 65024}"#),
    // The names in the first files of Falcon 40B and 7B.
    ("RefinedWeb", falcon::falcon, r#"{"vocab_size": 65024, "new_decoder_architecture": true}"#),
    ("RefinedWebModel", falcon::falcon, r#"{"vocab_size": 65024}"#),
    ("qwen2", qwen::qwen2, r#"{"sliding_window": 4096, "max_position_embeddings": 32768}"#),
    (
        "qwen3",
        qwen::qwen3,
        r#"{"sliding_window": 4096, "max_position_embeddings": 32768, "head_dim": 128}"#,
    ),
    ("phi3", phi::phi3, r#"{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}"#),
    (
        "gemma2",
        gemma::gemma2,
        r#"{"vocab_size": 256000, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096,
            "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0}"#,
    ),
    (
        "gemma3_text",
        gemma::gemma3,
        r#"{"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "max_position_embeddings": 131072, "sliding_window": 4096,
            "query_pre_attn_scalar": 256}"#,
    ),
    (
        "mixtral",
        mixture::mixtral,
        r#"{"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "num_local_experts": 8, "num_experts_per_tok": 2}"#,
    ),
    (
        "qwen3_moe",
        mixture::qwen3_moe,
        r#"{"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096,
            "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}"#,
    ),
];

impl ModelConfig {
    /// Reads `DIR/config.json`.
    ///
    /// # Errors
    /// Input errors that name the file: missing, not JSON, a family or a setting
    /// that is not supported, sizes that do not fit together.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = small_file::read(&path)
            .map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
        let value = serde_json::from_slice(&text)
            .map_err(|e| Error::input(format!("{}: not valid JSON: {e}", path.display())))?;
        Self::from_json(value).map_err(|e| e.context(path.display()))
    }

    /// Reads a configuration in the form of HF's config.json.
    ///
    /// # Errors
    /// See [`ModelConfig::from_dir`].
    pub fn from_json(mut value: Value) -> Result<Self> {
        // Multimodal models: the language model's part, if it is one that stands alone.
        if let Some(text) = value.get_mut("text_config").map(Value::take) {
            let quantized = value.get("quantization_config").cloned();
            value = text;
            if let (Some(quantized), Some(fields)) = (quantized, value.as_object_mut()) {
                fields.insert("quantization_config".into(), quantized);
            }
        }
        raw::respell(&mut value);
        let family = family_of(&value)?;
        let Some((_, build, defaults)) = FAMILIES.iter().find(|(name, ..)| *name == family) else {
            return Err(Error::input(format!(
                "model_type {family:?} is not supported; supported: {}",
                supported()
            )));
        };
        fill_in(&mut value, defaults);
        let raw: RawConfig =
            serde_json::from_value(value).map_err(|e| Error::input(format!("not usable: {e}")))?;
        refuse_quantized(&raw)?;
        let config = build(&raw)?;
        config.check_sizes()?;
        Ok(config)
    }
}

/// `model_type`; without one, Llama if `architectures` does not say otherwise.
fn family_of(config: &Value) -> Result<String> {
    if let Some(family) = config.get("model_type").and_then(Value::as_str) {
        return Ok(family.to_owned());
    }
    let named = |name: &Value| name.as_str().unwrap_or_default().to_lowercase();
    match config.get("architectures").and_then(|names| names.get(0)).map(named) {
        Some(name) if !name.starts_with("llama") => Err(Error::input(format!(
            "model_type is missing, and architectures names {name}: add the model_type"
        ))),
        _ => Ok("llama".to_owned()),
    }
}

/// Adds the fields of `defaults` that the file leaves out. (One that is null is off.)
fn fill_in(config: &mut Value, defaults: &str) {
    let defaults: Value = serde_json::from_str(defaults).unwrap_or_default();
    if let (Some(fields), Some(defaults)) = (config.as_object_mut(), defaults.as_object()) {
        for (name, value) in defaults {
            fields.entry(name.as_str()).or_insert_with(|| value.clone());
        }
    }
}

/// The supported families' names.
pub fn supported() -> String {
    let mut names: Vec<&str> =
        FAMILIES.iter().map(|(name, ..)| *name).filter(|name| !name.starts_with("Ref")).collect();
    names.dedup();
    names.join(", ")
}

fn refuse_quantized(raw: &RawConfig) -> Result<()> {
    let Some(config) = &raw.quantization_config else { return Ok(()) };
    let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
    Err(Error::input(format!(
        "quantization_config: weights quantized by {method:?} are not read; use the original \
         model (with --quantize to save memory) or a GGUF file"
    )))
}

#[cfg(test)]
mod tests {
    use super::super::config::RopeScaling;
    use super::*;

    const SHAPE: &str = r#""hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100"#;

    fn parse(rest: &str) -> Result<ModelConfig> {
        ModelConfig::from_json(serde_json::from_str(&format!("{{{SHAPE}, {rest}}}")).unwrap())
    }

    #[test]
    fn both_spellings_of_the_rotary_configuration_mean_the_same() {
        let old = parse(
            r#""rope_theta": 5e5, "max_position_embeddings": 4096, "rope_scaling":
               {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                "original_max_position_embeddings": 1024}"#,
        );
        let new = parse(
            r#""max_position_embeddings": 4096, "rope_parameters":
               {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "low_freq_factor": 1,
                "high_freq_factor": 4, "original_max_position_embeddings": 1024}"#,
        );
        assert_eq!(old.unwrap(), new.unwrap());
        let old = parse(
            r#""model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 2e4,
               "sliding_window": 8, "head_dim": 8, "rope_scaling": {"rope_type": "linear", "factor": 8}"#,
        );
        let new = parse(
            r#""model_type": "gemma3_text", "sliding_window": 8, "head_dim": 8, "rope_parameters":
               {"full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}"#,
        );
        assert_eq!(old.unwrap(), new.unwrap());
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (json, word) in [
            (r#""model_type": "gpt2""#, "gpt2"),
            (r#""model_type": "gpt2""#, "llama, mistral, falcon, qwen2"),
            (r#""rope_scaling": {"rope_type": "ntk-by-parts"}"#, "ntk-by-parts"),
            (r#""rope_scaling": {"rope_type": "longrope"}"#, "short_factor"),
            (r#""rope_scaling": {"rope_type": "linear"}"#, "factor"),
            (r#""quantization_config": {"quant_method": "gptq"}"#, "gptq"),
            (r#""quantization_config": {}"#, "quantization_config"),
            (r#""hidden_act": "relu""#, "relu"),
            (r#""head_dim": 3"#, "head_dim"),
            (r#""rope_theta": 0"#, "rope_theta"),
            (
                r#""model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3"#,
                "3 of 2",
            ),
            (
                r#""model_type": "gemma2", "layer_types": ["full_attention"], "sliding_window": 4"#,
                "layer_types",
            ),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.message.contains(word), "{error}");
            assert_eq!(error.kind, crate::ErrorKind::Input);
        }
    }

    #[test]
    fn tensor_parallel_sizes_that_do_not_divide_are_refused_with_those_that_do() {
        let config = parse(r#""rope_theta": 1e4"#).unwrap();
        for good in [1, 2, 4, 8] {
            config.check_tensor_parallel(good).unwrap();
        }
        let error = config.check_tensor_parallel(3).unwrap_err();
        assert!(error.message.ends_with("sizes that work: 1, 2, 4, 8"), "{error}");
    }

    #[test]
    fn a_field_in_two_spellings_is_no_error() {
        let both = r#""hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh", "n_head": 8"#;
        assert_eq!(parse(both).unwrap().activation, crate::kernels::ops::Activation::Silu);
        let falcon = r#""model_type": "falcon", "n_layer": 2, "activation": "gelu""#;
        assert_eq!(parse(falcon).unwrap().activation, crate::kernels::ops::Activation::Gelu);
    }

    /// Falcon 7B: 71 heads share one key; its attention is not split, its MLP is.
    #[test]
    fn falcon_7b_splits_its_mlp_alone() {
        let config = ModelConfig::from_json(serde_json::json!({
            "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
            "num_attention_heads": 71, "vocab_size": 65024, "multi_query": true,
            "parallel_attn": true, "bias": false, "alibi": false,
        }))
        .unwrap();
        config.check_tensor_parallel(4).unwrap();
        assert_eq!((config.local_heads(4), config.local_kv_heads(4)), (71, 1));
        assert_eq!((config.head_dim, config.intermediate_size), (64, 18176));
    }

    /// The text part of Gemma 3 4B's file: all that it says.
    #[test]
    fn what_a_file_leaves_out_is_the_familys_default() {
        let config = ModelConfig::from_json(serde_json::json!({
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        }))
        .unwrap();
        assert_eq!((config.num_attention_heads, config.num_key_value_heads), (8, 4));
        assert_eq!(
            (config.head_dim, config.vocab_size, config.max_context()),
            (256, 262208, 131072)
        );
        let windows = |config: &ModelConfig| config.layer_windows.iter().flatten().count();
        assert_eq!(windows(&config), 29);
        let mistral = parse(r#""model_type": "mistral""#).unwrap();
        assert_eq!(mistral.layer_windows, [Some(4096); 2]);
        let null = parse(r#""model_type": "mistral", "sliding_window": null"#).unwrap();
        assert_eq!(windows(&null), 0);
        let gemma2 = parse(r#""model_type": "gemma2", "head_dim": 8"#).unwrap();
        assert_eq!(gemma2.attn_logit_softcapping, Some(50.0));
        let qwen = parse(r#""architectures": ["Qwen2ForCausalLM"]"#).unwrap_err();
        assert!(qwen.message.contains("model_type"), "{qwen}");
        // Falcon 40B's first file.
        let falcon = parse(r#""model_type": "RefinedWeb", "n_head_kv": 4"#).unwrap();
        assert_eq!((falcon.num_key_value_heads, falcon.model_type.as_str()), (4, "falcon"));
    }

    #[test]
    fn sizes_and_factors_are_bounded() {
        for (json, word) in [
            (r#""rope_scaling": {"rope_type": "dynamic", "factor": 1e18}"#, "factor"),
            (r#""rope_scaling": {"rope_type": "linear", "factor": 0}"#, "factor"),
            (r#""rms_norm_eps": -1"#, "eps"),
            (r#""head_dim": 1073741824"#, "head_dim"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.message.contains(word), "{json}: {error}");
        }
    }

    #[test]
    fn a_multimodal_file_gives_its_language_model() {
        let config = parse(&format!(
            r#""model_type": "gemma3", "text_config": {{{SHAPE}, "model_type": "gemma3_text",
               "head_dim": 8, "sliding_window": 4,
               "rope_scaling": {{"rope_type": "linear", "factor": 8}}}}"#
        ))
        .unwrap();
        assert_eq!(config.model_type, "gemma3_text");
        let super::super::config::Positions::Rotary { global, local } = config.positions else {
            panic!("Gemma rotates");
        };
        assert_eq!(global.scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(local.unwrap().scaling, RopeScaling::Default);
    }
}
