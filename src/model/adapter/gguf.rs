//! llama.cpp's adapter files (convert_lora_to_gguf.py, llama-adapter.cpp): the tensors
//! `WEIGHT.lora_a` and `WEIGHT.lora_b` for the tensor WEIGHT of a GGUF model, scaled by
//! alpha / rank.

use std::collections::BTreeMap;
use std::path::Path;

use super::Contents;
use super::modules::{Parts, fit, modules};
use crate::model::checkpoint::gguf::{self, Metadata};
use crate::model::checkpoint::{Format, TensorTable, gguf_model};
use crate::model::config::ModelConfig;
use crate::{Error, Result};

const EMBEDDING: &str = "token_embd";

/// Reads the adapter in the file `path` of the model `base`.
pub fn open(path: &Path, base: &ModelConfig) -> Result<Contents> {
    if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("gguf")) {
        return Err(Error::input(format!(
            "{}: neither a PEFT directory nor a .gguf file",
            path.display()
        )));
    }
    let (table, metadata) = TensorTable::of_file(path, Format::Gguf)?;
    read(table, &metadata, base).map_err(|e| e.context(path.display()))
}

fn read(table: TensorTable, metadata: &Metadata, base: &ModelConfig) -> Result<Contents> {
    check_kind(metadata, base)?;
    let alpha = metadata.float("adapter.lora.alpha").unwrap_or(0.0);
    if !alpha.is_finite() {
        return Err(Error::input(format!("adapter.lora.alpha is {alpha}")));
    }
    let parts = parts(&table)?;
    let fused_qkv = parts.keys().any(|name| name.ends_with(".attn_qkv"));
    let names = gguf_model::names(base, fused_qkv);
    // Without an alpha llama.cpp takes the factors as they are.
    let scale =
        |_: &str, rank: usize| Ok(if alpha == 0.0 { 1.0 } else { (alpha / rank as f64) as f32 });
    let modules = fit(&table, parts, &modules(base, &names), true, scale)?;
    Ok(Contents { table, names, interleaved: gguf::interleaved_rope(metadata), modules })
}

fn check_kind(metadata: &Metadata, base: &ModelConfig) -> Result<()> {
    if !gguf::is_adapter(metadata) {
        return Err(Error::input(
            "not an adapter: general.type is not \"adapter\" (a model goes to --model)",
        ));
    }
    match metadata.str("adapter.type") {
        Some("lora") => {}
        other => {
            let kind = other.unwrap_or("missing");
            return Err(Error::input(format!(
                "adapter.type {kind:?} is not supported; farm reads lora"
            )));
        }
    }
    if metadata.0.contains_key("adapter.alora.invocation_tokens") {
        return Err(Error::input(
            "adapter.alora.invocation_tokens: an activated LoRA is not supported",
        ));
    }
    let wanted = architecture(&base.model_type);
    match metadata.str("general.architecture") {
        Some(arch) if arch != wanted => Err(Error::input(format!(
            "the adapter is for the architecture {arch:?}, the model's is {wanted:?}"
        ))),
        _ => Ok(()),
    }
}

/// llama.cpp's name of a family.
pub fn architecture(model_type: &str) -> &str {
    match model_type {
        "mistral" | "mixtral" => "llama",
        "gemma3_text" => "gemma3",
        "qwen3_moe" => "qwen3moe",
        "qwen2_moe" => "qwen2moe",
        other => other,
    }
}

fn parts(table: &TensorTable) -> Result<BTreeMap<String, Parts>> {
    let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
    for (tensor, _) in table.iter() {
        let found = [".lora_a", ".lora_b"].iter().find_map(|suffix| {
            Some((*suffix, tensor.strip_suffix(suffix)?.strip_suffix(".weight")?))
        });
        let Some((suffix, module)) = found else {
            return Err(Error::input(format!(
                "tensor {tensor} is no lora_a or lora_b of a weight: farm computes nothing else"
            )));
        };
        let parts = modules.entry(module.to_owned()).or_default();
        parts.stored_name = module.to_owned();
        parts.of_embedding = module == EMBEDDING;
        let place = if suffix == ".lora_a" { &mut parts.a } else { &mut parts.b };
        *place = Some(tensor.to_owned());
    }
    Ok(modules)
}
