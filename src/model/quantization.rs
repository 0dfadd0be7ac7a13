//! Which matrices `--quantize` changes, and to what: one decision for a rank that quantizes
//! while it loads and for a copy that is quantized when it is staged
//! ([`QuantizedFile`](super::checkpoint::QuantizedFile)), so that both hold the same bytes.
//!
//! Not quantized: routers of experts, whose scores choose; vectors; what is no part of the
//! decoder (a vision tower beside it).

use super::config::ModelConfig;
use super::names::{ExpertNames, GateUp, Qkv};
use super::weights::WeightDtype;
use crate::kernels::quant::QuantType;

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A projection in a layer.
    Layer,
    /// The embedding, or the projection to logits.
    Vocabulary,
}

/// What a matrix of `width` columns becomes where `asked` is asked for; `None`: it stays as it
/// is. Where the layers are quantized to four bits the vocabulary takes six: what it gives is
/// the last word. Rows that no block divides take blocks of 32, or keep their type (as
/// llama.cpp's quantizer falls back).
pub fn dtype_for(asked: WeightDtype, role: Role, width: usize) -> Option<WeightDtype> {
    let WeightDtype::Quant(asked) = asked else { return Some(asked) };
    let quant = match (asked, role) {
        (QuantType::Q4_K, Role::Vocabulary) => QuantType::Q6_K,
        (asked, _) => asked,
    };
    [quant, QuantType::Q8_0]
        .into_iter()
        .find(|quant| width.is_multiple_of(quant.block_len()))
        .map(WeightDtype::Quant)
}

/// The role of the tensor `name` of a model, if it is a matrix that may be quantized.
pub fn role(config: &ModelConfig, name: &str) -> Option<Role> {
    let module = name.strip_suffix(".weight")?;
    let names = &config.names;
    if [names.embed_tokens, names.lm_head].contains(&module) {
        return Some(Role::Vocabulary);
    }
    let template = template(module);
    let is_one_of = |names: &[&str]| names.contains(&template.as_str());
    let in_attention = match &names.qkv {
        Qkv::Split(parts) => is_one_of(parts),
        Qkv::Concatenated(name) | Qkv::Grouped(name) => is_one_of(&[name]),
    };
    let in_mlp = match &names.gate_up {
        GateUp::Split(parts) => is_one_of(parts),
        GateUp::Concatenated(name) | GateUp::Up(name) => is_one_of(&[name]),
    };
    let in_experts = || match &names.experts {
        ExpertNames::Each(parts) | ExpertNames::Stacked(parts) => is_one_of(parts),
    };
    let is_matrix = in_attention
        || in_mlp
        || is_one_of(&[names.o_proj, names.down_proj])
        || (config.experts.is_some() && in_experts());
    is_matrix.then_some(Role::Layer)
}

/// A module's name as tables of names have it: `{}` for the layer, `{e}` for the expert.
fn template(module: &str) -> String {
    let mut places = ["{}", "{e}"].into_iter();
    let part = |part: &str| match part.bytes().all(|byte| byte.is_ascii_digit()) {
        true => places.next().unwrap_or("").to_owned(),
        false => part.to_owned(),
    };
    module.split('.').map(part).collect::<Vec<_>>().join(".")
}
