//! What is trained: the settings of an adapter, and which modules of a model they mean.
//!
//! Names and rules are PEFT's (`tuners/tuners_utils.py`, `check_target_module_exists`), so
//! that a configuration means the same here and there.

use std::collections::BTreeSet;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::model::adapter::modules::Role;
use crate::{Error, Result};

/// The settings of a LoRA adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank of the products.
    pub r: usize,
    /// The products are scaled by alpha / r.
    pub lora_alpha: f64,
    /// Share of a module's inputs that its product does not see, in training.
    pub lora_dropout: f32,
    /// Which modules have one.
    pub target_modules: TargetModules,
    /// Scale by alpha / √r (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Train magnitudes apart from directions (Liu et al. 2024).
    pub use_dora: bool,
    /// Only these layers; `None` is all.
    pub layers_to_transform: Option<BTreeSet<usize>>,
    /// Modules that are trained as a whole: the embedding, the output projection.
    pub modules_to_save: Vec<String>,
}

/// Which modules are adapted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetModules {
    /// Every linear layer but the output projection.
    AllLinear,
    /// Modules with one of these names, or whose name ends in `.` and one of them.
    Names(Vec<String>),
    /// Modules whose whole name this regular expression matches.
    Pattern(String),
}

impl TargetModules {
    /// Reads `all-linear`, names between commas, or a regular expression.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "all-linear" {
            return Ok(Self::AllLinear);
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        if names.iter().all(|name| !name.is_empty() && name.chars().all(is_name)) {
            return Ok(Self::Names(names.into_iter().map(str::to_owned).collect()));
        }
        whole(text).map_err(|error| format!("neither names nor a regular expression: {error}"))?;
        Ok(Self::Pattern(text.to_owned()))
    }
}

fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

impl LoraConfig {
    /// The factor of B A.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Of the modules `names` (with what they are for) those that are adapted, in order.
    ///
    /// # Errors
    /// An input error that lists the modules there are, where none is meant, or a name that
    /// means none.
    pub fn targets<'a>(&self, names: &[(&'a str, Role)]) -> Result<Vec<&'a str>> {
        let chosen: Vec<&str> = match &self.target_modules {
            TargetModules::AllLinear => {
                let linear = names.iter().filter(|(_, role)| *role == Role::Linear);
                linear.map(|(name, _)| *name).collect()
            }
            TargetModules::Names(wanted) => {
                let is = |name: &str, wanted: &String| {
                    name.strip_suffix(wanted.as_str())
                        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                };
                if let Some(nothing) =
                    wanted.iter().find(|wanted| !names.iter().any(|(name, _)| is(name, wanted)))
                {
                    return Err(no_such(nothing, names));
                }
                let meant = |name: &&str| wanted.iter().any(|wanted| is(name, wanted));
                names.iter().map(|(name, _)| *name).filter(meant).collect()
            }
            TargetModules::Pattern(pattern) => {
                let pattern = whole(pattern)
                    .map_err(|e| Error::usage(format!("--target-modules {pattern}: {e}")))?;
                names.iter().map(|(name, _)| *name).filter(|name| pattern.is_match(name)).collect()
            }
        };
        let saved = self.saved(names)?;
        let in_layers = |name: &&str| match (&self.layers_to_transform, layer_of(name)) {
            (Some(layers), Some(layer)) => layers.contains(&layer),
            (Some(_), None) => false,
            (None, _) => true,
        };
        let not_saved = |name: &&str| !saved.contains(name);
        let chosen: Vec<&str> = chosen.into_iter().filter(in_layers).filter(not_saved).collect();
        if chosen.is_empty() && saved.is_empty() {
            return Err(no_such(&format!("{:?}", self.target_modules), names));
        }
        if let Some(name) = chosen.iter().find(|name| {
            names.iter().any(|(other, role)| other == *name && *role == Role::Embedding)
        }) {
            return Err(Error::input(format!(
                "--target-modules: {name} is the embedding, which farm does not train"
            )));
        }
        Ok(chosen)
    }
}

impl LoraConfig {
    /// Of the modules `names` those that are trained as a whole.
    ///
    /// # Errors
    /// An input error: one is neither the embedding nor the output projection.
    pub fn saved<'a>(&self, names: &[(&'a str, Role)]) -> Result<Vec<&'a str>> {
        let find = |wanted: &String| {
            let found = names.iter().find(|(name, _)| is(name, wanted));
            match found {
                Some((name, Role::Embedding | Role::Output)) => Ok(*name),
                Some((name, Role::Linear)) => Err(Error::input(format!(
                    "--modules-to-save: {name} is a linear layer; farm trains only the embedding \
                     and the output projection as a whole"
                ))),
                None => Err(no_such(wanted, names)),
            }
        };
        self.modules_to_save.iter().map(find).collect()
    }
}

/// Whether `wanted` is the module's name, or what follows a dot in it.
fn is(name: &str, wanted: &str) -> bool {
    name.strip_suffix(wanted).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn no_such(what: &str, names: &[(&str, Role)]) -> Error {
    let ends: BTreeSet<&str> =
        names.iter().map(|(name, _)| name.rsplit('.').next().unwrap_or(name)).collect();
    let ends: Vec<&str> = ends.into_iter().collect();
    Error::input(format!(
        "--target-modules: {what} is no module of this model, which has {}",
        ends.join(", ")
    ))
}

/// The number of the layer that a module is in.
pub fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [(&str, Role); 5] = [
        ("model.layers.0.self_attn.q_proj", Role::Linear),
        ("model.layers.0.mlp.up_proj", Role::Linear),
        ("model.layers.1.self_attn.q_proj", Role::Linear),
        ("model.embed_tokens", Role::Embedding),
        ("lm_head", Role::Output),
    ];

    fn config(targets: &str) -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::parse(targets).unwrap(),
            use_rslora: false,
            use_dora: false,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
        }
    }

    #[test]
    fn targets_mean_what_they_mean_to_peft() {
        let [q0, up0, q1, _, head] = NAMES.map(|(name, _)| name);
        for (targets, expected) in [
            ("all-linear", vec![q0, up0, q1]),
            ("q_proj", vec![q0, q1]),
            ("lm_head, up_proj", vec![up0, head]),
            (r".*layers\.1\..*", vec![q1]),
            (r"model\.layers\.[0-9]+\.self_attn\.(q|v)_proj", vec![q0, q1]),
        ] {
            assert_eq!(config(targets).targets(&NAMES).unwrap(), expected, "{targets}");
        }
        let layers = Some(BTreeSet::from([1]));
        let of_layer = LoraConfig { layers_to_transform: layers, ..config("all-linear") };
        assert_eq!(of_layer.targets(&NAMES).unwrap(), [q1]);
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_is() {
        for targets in ["proj", "q_proj,gate_proj", ".*nothing.*", "embed_tokens"] {
            let error = config(targets).targets(&NAMES).unwrap_err();
            assert!(error.message.contains("--target-modules"), "{targets}: {error}");
        }
        assert!(config("q").targets(&NAMES).unwrap_err().message.contains("q_proj"));
        assert!(TargetModules::parse("(").is_err());
    }

    #[test]
    fn scales() {
        assert_eq!(config("q_proj").scale(), 2.0);
        let stabilized = LoraConfig { use_rslora: true, ..config("q_proj") };
        assert!((stabilized.scale() - 16.0 / 8f32.sqrt()).abs() < 1e-6);
    }
}
