//! Where a sampling parameter comes from when the record does not say: a flag beats
//! the model's `generation_config.json`, that beats farm's own default.

use std::path::Path;

use serde_json::Value;

use super::overrides;
use crate::engine::{Guide, SamplingParams};
use crate::model::tokenizer::read_json;
use crate::{Error, Result};

/// What the command line says about sampling; `None` where it is silent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingFlags {
    /// `--max-new-tokens`
    pub max_new_tokens: Option<usize>,
    /// `--temperature`
    pub temperature: Option<f32>,
    /// `--top-p`
    pub top_p: Option<f32>,
    /// `--top-k`
    pub top_k: Option<usize>,
    /// `--min-p`
    pub min_p: Option<f32>,
    /// `--repetition-penalty`
    pub repetition_penalty: Option<f32>,
    /// `--presence-penalty`
    pub presence_penalty: Option<f32>,
    /// `--frequency-penalty`
    pub frequency_penalty: Option<f32>,
    /// `--seed`
    pub seed: Option<u64>,
    /// `--stop`, once or more; empty where it is not given.
    pub stop: Vec<String>,
    /// `--ignore-eos`
    pub ignore_eos: bool,
    /// `--logprobs`
    pub logprobs: Option<usize>,
    /// `--return-token-ids`
    pub return_token_ids: bool,
    /// `--json-schema`, `--regex` or `--choices`
    pub guide: Option<Guide>,
}

/// The sampling parameters of a model's `generation_config.json`.
///
/// As in HF, `do_sample` false or absent means greedy: the temperature is not looked
/// at, and with `do_sample` true an absent one is 1. `top_p`, `top_k`, `min_p` are
/// kept either way, since a flag or a record may turn sampling on. Only what the file
/// says counts: HF's implied `top_k` of 50 does not. `max_length` is not used (it
/// counts the prompt).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// 0 unless `do_sample` is true.
    pub temperature: Option<f32>,
    /// As in the file.
    pub top_p: Option<f32>,
    /// As in the file.
    pub top_k: Option<usize>,
    /// As in the file.
    pub min_p: Option<f32>,
    /// As in the file.
    pub repetition_penalty: Option<f32>,
    /// As in the file.
    pub max_new_tokens: Option<usize>,
}

impl GenerationConfig {
    /// Reads a model directory's `generation_config.json`; empty if there is none.
    /// (`--generation-config none` is [`GenerationConfig::default`].)
    ///
    /// Errors (input) name the file and the field.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("generation_config.json");
        match read_json(&path)? {
            Some(config) => Self::from_json(&config).map_err(|error| error.context(path.display())),
            None => Ok(Self::default()),
        }
    }

    fn from_json(config: &Value) -> Result<Self> {
        let Value::Object(fields) = config else {
            return Err(Error::input("not a JSON object"));
        };
        let mut fields = fields.clone();
        fields.retain(|field, value| READ.contains(&field.as_str()) && !value.is_null());
        let do_sample = config.get("do_sample").and_then(Value::as_bool).unwrap_or(false);
        if !do_sample {
            fields.shift_remove("temperature");
        }
        let values = overrides::apply(&SamplingParams::default(), &fields)
            .map_err(|problem| Error::input(problem.message))?;
        let has = |field: &str| fields.contains_key(field);
        Ok(Self {
            temperature: match (do_sample, has("temperature")) {
                (false, _) => Some(0.0),
                (true, false) => Some(1.0),
                (true, true) => Some(values.temperature),
            },
            top_p: has("top_p").then_some(values.top_p),
            top_k: has("top_k").then_some(values.top_k),
            min_p: has("min_p").then_some(values.min_p),
            repetition_penalty: has("repetition_penalty").then_some(values.repetition_penalty),
            max_new_tokens: has("max_new_tokens").then_some(values.max_new_tokens),
        })
    }
}

const READ: [&str; 6] =
    ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"];

/// The parameters of a record that says nothing itself.
///
/// Errors (usage): a flag is out of its range.
pub fn resolve(flags: &SamplingFlags, model: &GenerationConfig) -> Result<SamplingParams> {
    let own = SamplingParams::default();
    let params = SamplingParams {
        max_new_tokens: flags.max_new_tokens.or(model.max_new_tokens).unwrap_or(own.max_new_tokens),
        temperature: flags.temperature.or(model.temperature).unwrap_or(own.temperature),
        top_p: flags.top_p.or(model.top_p).unwrap_or(own.top_p),
        top_k: flags.top_k.or(model.top_k).unwrap_or(own.top_k),
        min_p: flags.min_p.or(model.min_p).unwrap_or(own.min_p),
        repetition_penalty: flags
            .repetition_penalty
            .or(model.repetition_penalty)
            .unwrap_or(own.repetition_penalty),
        presence_penalty: flags.presence_penalty.unwrap_or(own.presence_penalty),
        frequency_penalty: flags.frequency_penalty.unwrap_or(own.frequency_penalty),
        seed: flags.seed.unwrap_or(own.seed),
        stop: flags.stop.clone(),
        ignore_eos: flags.ignore_eos,
        logprobs: flags.logprobs,
        return_token_ids: flags.return_token_ids,
        n: own.n,
        guide: flags.guide.clone(),
    };
    // The model's values have been checked as they were read: what is left are flags.
    overrides::check(&params)
        .map_err(|problem| Error::usage(format!("flags: {}", problem.message)))?;
    Ok(params)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_flag_beats_the_model_and_the_model_beats_farm() {
        let model = GenerationConfig::from_json(&json!({
            "do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2],
            "transformers_version": "4.40.0", "top_k": null
        }))
        .unwrap();
        let flags = SamplingFlags { temperature: Some(0.25), ..Default::default() };
        let params = resolve(&flags, &model).unwrap();
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.25, 0.9, 0));
        let params = resolve(&SamplingFlags::default(), &model).unwrap();
        assert_eq!((params.temperature, params.max_new_tokens), (0.6, 256));
        let own = resolve(&SamplingFlags::default(), &GenerationConfig::default()).unwrap();
        assert_eq!(own, SamplingParams::default());
    }

    /// HF's rule; a model that ships a temperature must not start to sample by it.
    #[test]
    fn without_do_sample_the_model_is_greedy() {
        let temperature = |config| GenerationConfig::from_json(&config).unwrap().temperature;
        assert_eq!(temperature(json!({"temperature": 0.6})), Some(0.0));
        assert_eq!(temperature(json!({"do_sample": false, "temperature": 0.6})), Some(0.0));
        assert_eq!(temperature(json!({"do_sample": true})), Some(1.0));
    }

    #[test]
    fn bad_values_name_the_file_or_the_flag() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::from_dir(dir.path()).unwrap(), GenerationConfig::default());
        std::fs::write(dir.path().join("generation_config.json"), r#"{"top_p": 7}"#).unwrap();
        let error = GenerationConfig::from_dir(dir.path()).unwrap_err();
        assert_eq!(error.kind, crate::ErrorKind::Input);
        assert!(
            error.message.contains("generation_config.json") && error.message.contains("top_p")
        );
        let flags = SamplingFlags { top_p: Some(0.0), ..Default::default() };
        let error = resolve(&flags, &GenerationConfig::default()).unwrap_err();
        assert_eq!(error.kind, crate::ErrorKind::Usage);
    }
}
