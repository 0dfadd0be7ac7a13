//! PEFT's directories: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
//!
//! Names, scales and patterns are those of peft's `tuners/lora` and `utils/save_and_load.py`.
//! Which modules are adapted follows from the tensors that are there; `target_modules` and
//! its kin only say how they came to be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::{Map, Value};

use super::Contents;
use super::modules::{Parts, fit, modules};
use crate::model::checkpoint::{Format, TensorTable, language_model_name};
use crate::model::config::ModelConfig;
use crate::model::small_file;
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: [(&str, Format); 2] =
    [("adapter_model.safetensors", Format::Safetensors), ("adapter_model.bin", Format::Torch)];

/// What changes the result and is not computed here, unless null, false or empty.
const REFUSED: [&str; 11] = [
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
];
/// Ways to begin that leave the model's own weights as they are.
const PLAIN_BEGINNINGS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// The files of the adapter in `dir`: settings and weights.
///
/// # Errors
/// An input error: one of them is missing.
pub fn files(dir: &Path) -> Result<[PathBuf; 2]> {
    let weights = WEIGHTS.iter().map(|(name, _)| dir.join(name)).find(|path| path.is_file());
    match (dir.join(CONFIG), weights) {
        (config, Some(weights)) if config.is_file() => Ok([config, weights]),
        (config, weights) => Err(Error::input(format!(
            "{}: no {}; is it the right directory? A PEFT adapter has {CONFIG} and {}",
            dir.display(),
            if config.is_file() { WEIGHTS[0].0 } else { CONFIG },
            weights.map_or(WEIGHTS[0].0.into(), |p| p.display().to_string()),
        ))),
    }
}

/// Reads the adapter in `dir` of the model `base`.
pub fn open(dir: &Path, base: &ModelConfig) -> Result<Contents> {
    let [config_path, weights] = files(dir)?;
    let settings = read_settings(&config_path).map_err(|e| e.context(config_path.display()))?;
    let ending = weights.extension();
    let format = WEIGHTS.iter().find(|(name, _)| Path::new(name).extension() == ending);
    let format = format.map_or(Format::Safetensors, |(_, format)| *format);
    let (table, _) = TensorTable::of_file(&weights, format)?;
    let model = modules(base, &base.hf_names);
    let in_file = |e: Error| e.context(weights.display());
    let mut parts = parts(&table).map_err(in_file)?;
    share_tied(base, &settings, &mut parts);
    if let Some(module) =
        parts.values().find(|p| p.a.is_some() && p.magnitude.is_some() != settings.dora)
    {
        let what = if settings.dora { "has no" } else { "has a" };
        return Err(in_file(Error::input(format!(
            "{} {what} lora_magnitude_vector, but use_dora is {} in {CONFIG}",
            module.stored_name, settings.dora
        ))));
    }
    let scale = |module: &str, rank: usize| settings.scale(module, rank);
    let modules = fit(&table, parts, &model, false, scale).map_err(in_file)?;
    Ok(Contents { table, names: base.hf_names, interleaved: false, modules })
}

/// The tensors by module.
fn parts(table: &TensorTable) -> Result<BTreeMap<String, Parts>> {
    let mut modules: BTreeMap<String, Parts> = BTreeMap::new();
    for (tensor, _) in table.iter() {
        let name = tensor.strip_prefix("base_model.model.").unwrap_or(tensor);
        let known = [
            ".lora_A.weight",
            ".lora_B.weight",
            ".lora_embedding_A",
            ".lora_embedding_B",
            ".lora_magnitude_vector",
            ".lora_magnitude_vector.weight",
            ".base_layer.weight",
            ".modules_to_save.weight",
            ".weight",
        ];
        let found = known.iter().find_map(|suffix| Some((*suffix, name.strip_suffix(suffix)?)));
        let Some((suffix, module)) = found.filter(|(_, module)| !module.contains(".lora_")) else {
            return Err(Error::input(format!(
                "tensor {tensor} is no part of an adapter that farm reads"
            )));
        };
        let parts = modules.entry(language_model_name(module)).or_default();
        parts.stored_name = module.to_owned();
        let place = match suffix {
            ".lora_A.weight" | ".lora_embedding_A" => &mut parts.a,
            ".lora_B.weight" | ".lora_embedding_B" => &mut parts.b,
            ".lora_magnitude_vector" | ".lora_magnitude_vector.weight" => &mut parts.magnitude,
            _ => &mut parts.replaced,
        };
        *place = Some(tensor.to_owned());
        parts.of_embedding |= suffix.starts_with(".lora_embedding");
    }
    Ok(modules)
}

/// A matrix that was saved without being one of `modules_to_save` is the model's own, changed
/// (its tokens trained, say): where embedding and output projection are one, it is both.
fn share_tied(base: &ModelConfig, settings: &Settings, parts: &mut BTreeMap<String, Parts>) {
    let names = [base.hf_names.embed_tokens, base.hf_names.lm_head];
    let replaced = names.map(|name| parts.get(name)?.replaced.clone());
    let ([Some(one), None] | [None, Some(one)]) = replaced else { return };
    let is_saved = |name: &str| {
        let mut saved = settings.modules_to_save.iter();
        saved.any(|saved| name == saved || name.ends_with(&format!(".{saved}")))
    };
    if base.tie_word_embeddings && !names.into_iter().any(is_saved) {
        for name in names {
            parts.entry(name.to_owned()).or_default().replaced = Some(one.clone());
        }
    }
}

/// What `adapter_config.json` says that changes the result.
struct Settings {
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    dora: bool,
    modules_to_save: Vec<String>,
    rank_pattern: Vec<(Regex, f64)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

impl Settings {
    /// The factor of B A of a module, whose rank must be what the settings say.
    fn scale(&self, module: &str, rank: usize) -> Result<f32> {
        let of = |patterns: &[(Regex, f64)], default: f64| {
            patterns.iter().find(|(p, _)| p.is_match(module)).map_or(default, |(_, value)| *value)
        };
        let r = of(&self.rank_pattern, self.r as f64);
        if r != rank as f64 {
            return Err(Error::input(format!(
                "its rank is {rank}, but {CONFIG} says {r} (r, rank_pattern)"
            )));
        }
        let alpha = of(&self.alpha_pattern, self.lora_alpha);
        let divisor = if self.use_rslora { r.sqrt() } else { r };
        Ok((alpha / divisor) as f32)
    }
}

fn read_settings(path: &Path) -> Result<Settings> {
    let text = small_file::read(path).map_err(Error::input)?;
    let value = serde_json::from_slice(&text)
        .map_err(|error| Error::input(format!("not valid JSON: {error}")))?;
    let Value::Object(fields) = value else { return Err(Error::input("not a JSON object")) };
    refuse_unsupported(&fields)?;
    let flag = |name: &str| fields.get(name).and_then(Value::as_bool).unwrap_or(false);
    let r = number(&fields, "r", 8.0)?;
    if r < 1.0 || r.fract() != 0.0 || r > f64::from(1 << 20) {
        return Err(Error::input(format!("r is {r}; a whole number from 1 is wanted")));
    }
    let saved = fields.get("modules_to_save").and_then(Value::as_array);
    let names = saved.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
    Ok(Settings {
        r: r as usize,
        lora_alpha: number(&fields, "lora_alpha", 8.0)?,
        use_rslora: flag("use_rslora"),
        dora: flag("use_dora"),
        modules_to_save: names.collect(),
        rank_pattern: patterns(&fields, "rank_pattern")?,
        alpha_pattern: patterns(&fields, "alpha_pattern")?,
    })
}

fn refuse_unsupported(fields: &Map<String, Value>) -> Result<()> {
    match fields.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => {
            return Err(Error::input(format!(
                "peft_type {} is not supported; farm reads LORA",
                other.map_or("is missing: it".into(), |kind| format!("{kind:?}"))
            )));
        }
    }
    let refused = |name: &str, value: &Value| {
        Err(Error::input(format!("{name} {value} is not supported; merge the adapter with peft")))
    };
    match fields.get("bias") {
        None | Some(Value::Null) => {}
        Some(bias) if bias == "none" => {}
        Some(bias) => return refused("bias", bias),
    }
    let variants = fields.keys().map(String::as_str).filter(|name| {
        REFUSED.contains(name)
            || (name.starts_with("use_") && !matches!(*name, "use_rslora" | "use_dora"))
    });
    for name in variants {
        if !is_off(&fields[name]) {
            return refused(name, &fields[name]);
        }
    }
    match fields.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(way)) if PLAIN_BEGINNINGS.contains(&way.as_str()) => Ok(()),
        Some(way) => Err(Error::input(format!(
            "init_lora_weights {way} has changed the model's own weights too; save the adapter \
             with peft's path_initial_model_for_weight_conversion to make it a plain one"
        ))),
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(_) | Value::String(_) | Value::Bool(true) => false,
    }
}

fn number(fields: &Map<String, Value>, name: &str, default: f64) -> Result<f64> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => finite(name, value),
    }
}

fn finite(name: &str, value: &Value) -> Result<f64> {
    let number = value.as_f64().filter(|x| x.is_finite());
    number.ok_or_else(|| Error::input(format!("{name} is {value}; a number is wanted")))
}

/// Patterns in the order of the file: the first that matches counts. One matches a module if
/// it matches its whole name or what follows a dot (peft's `get_pattern_key`).
fn patterns(fields: &Map<String, Value>, name: &str) -> Result<Vec<(Regex, f64)>> {
    let entries = match fields.get(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => {
            return Err(Error::input(format!("{name} is {other}; an object is wanted")));
        }
    };
    let compiled = entries.iter().map(|(pattern, value)| {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).map_err(|error| {
            Error::input(format!("{name}: the pattern {pattern:?} cannot be read: {error}"))
        })?;
        Ok((regex, finite(name, value)?))
    });
    compiled.collect()
}
