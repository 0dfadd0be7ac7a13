//! Sampling fields: their names, types and ranges.
//!
//! One table serves the fields of a record and, through [`check`], the flags and
//! `generation_config.json`.
//!
//! | field                                               | type and range                    |
//! |-----------------------------------------------------|-----------------------------------|
//! | `max_new_tokens`, `max_completion_tokens`, `max_tokens` | integer ≥ 1 (the first that is there) |
//! | `temperature`                                       | 0 to 100; 0 is greedy             |
//! | `top_p`                                             | above 0, to 1                     |
//! | `top_k`                                             | integer ≥ 0; 0 (and -1) is off    |
//! | `min_p`                                             | 0 to 1                            |
//! | `repetition_penalty`                                | above 0, to 100                   |
//! | `presence_penalty`, `frequency_penalty`             | -2 to 2                           |
//! | `seed`                                              | integer, 0 to 2^64 - 1            |
//! | `stop`                                              | a string or a list, none empty    |
//! | `ignore_eos`, `return_token_ids`                    | boolean                           |
//! | `logprobs`                                          | boolean, or integer 0 to 20       |
//! | `top_logprobs`                                      | integer 0 to 20                   |
//! | `n`                                                 | integer 1 to 16                   |
//! | `response_format`, `json_schema`, `regex`, `choices` | see [`super::guide`]             |
//!
//! `null` counts as absent, as OpenAI clients mean it.

use serde_json::{Map, Value};

use super::{ErrorCode, Problem, guide};
use crate::engine::SamplingParams;

/// Every field that overrides a sampling parameter. Where fields mean the same, the
/// later one wins.
pub const FIELDS: [&str; 21] = [
    "max_tokens",
    "max_completion_tokens",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "return_token_ids",
    "n",
    "top_logprobs",
    "logprobs",
    guide::FIELDS[0],
    guide::FIELDS[1],
    guide::FIELDS[2],
    guide::FIELDS[3],
];

/// Whether a field of a record overrides a sampling parameter.
pub fn is_override(field: &str) -> bool {
    FIELDS.contains(&field)
}

/// `defaults` with the overrides in `fields`. Errors are `wrong_type` and
/// `out_of_range`, and name the field, the value and what is allowed.
pub fn apply(
    defaults: &SamplingParams,
    fields: &Map<String, Value>,
) -> Result<SamplingParams, Problem> {
    let mut params = defaults.clone();
    for field in FIELDS {
        if let Some(value) = fields.get(field).filter(|value| !value.is_null()) {
            set(&mut params, field, value)?;
        }
    }
    if let Some(guide) = guide::of_record(fields)? {
        params.guide = guide;
    }
    Ok(params)
}

/// Checks the ranges of parameters that did not come from a record.
pub fn check(params: &SamplingParams) -> Result<(), Problem> {
    for (field, value) in [
        ("temperature", params.temperature),
        ("top_p", params.top_p),
        ("min_p", params.min_p),
        ("repetition_penalty", params.repetition_penalty),
        ("presence_penalty", params.presence_penalty),
        ("frequency_penalty", params.frequency_penalty),
    ] {
        in_float_range(field, value, &value)?;
    }
    let integers = [
        ("max_new_tokens", Some(params.max_new_tokens)),
        ("top_k", Some(params.top_k)),
        ("n", Some(params.n)),
        ("logprobs", params.logprobs),
    ];
    for (field, value) in integers {
        if let Some(value) = value {
            integer(field, &Value::from(value))?;
        }
    }
    params.stop.iter().try_for_each(|stop| not_empty(stop))
}

fn set(params: &mut SamplingParams, field: &str, value: &Value) -> Result<(), Problem> {
    match field {
        "max_new_tokens" | "max_completion_tokens" | "max_tokens" => {
            params.max_new_tokens = integer(field, value)?;
        }
        "temperature" => params.temperature = float(field, value)?,
        "top_p" => params.top_p = float(field, value)?,
        "top_k" if value.as_i64() == Some(-1) => params.top_k = 0,
        "top_k" => params.top_k = integer(field, value)?,
        "min_p" => params.min_p = float(field, value)?,
        "repetition_penalty" => params.repetition_penalty = float(field, value)?,
        "presence_penalty" => params.presence_penalty = float(field, value)?,
        "frequency_penalty" => params.frequency_penalty = float(field, value)?,
        "seed" => params.seed = seed(value)?,
        "stop" => params.stop = stops(value)?,
        "ignore_eos" => params.ignore_eos = boolean(field, value)?,
        "return_token_ids" => params.return_token_ids = boolean(field, value)?,
        "n" => params.n = integer(field, value)?,
        "top_logprobs" => params.logprobs = Some(integer(field, value)?),
        // Comes after `top_logprobs`: `true` keeps its number, `false` takes it back.
        "logprobs" => {
            params.logprobs = match value {
                Value::Bool(true) => Some(params.logprobs.unwrap_or(0)),
                Value::Bool(false) => None,
                Value::Number(_) => Some(integer(field, value)?),
                _ => return Err(wrong_type(field, "a boolean or an integer", value)),
            }
        }
        _ => {}
    }
    Ok(())
}

fn integer(field: &str, value: &Value) -> Result<usize, Problem> {
    // The engine counts tokens in 32 bits at its borders (MPI, block tables).
    let (low, high) = match field {
        "n" => (1, 16),
        "logprobs" | "top_logprobs" => (0, 20),
        "top_k" => (0, u32::MAX as u64),
        _ => (1, u32::MAX as u64),
    };
    if !value.is_i64() && !value.is_u64() {
        return Err(wrong_type(field, "an integer", value));
    }
    match value.as_u64().filter(|value| (low..=high).contains(value)) {
        Some(value) => Ok(value as usize),
        None => Err(out_of_range(field, &format!("{low} to {high}"), value)),
    }
}

fn float(field: &str, value: &Value) -> Result<f32, Problem> {
    let number = value.as_f64().ok_or_else(|| wrong_type(field, "a number", value))? as f32;
    in_float_range(field, number, value)?;
    Ok(number)
}

fn in_float_range(field: &str, number: f32, shown: &impl std::fmt::Display) -> Result<(), Problem> {
    // (lowest, whether the lowest itself is allowed, highest)
    let (low, low_allowed, high) = match field {
        "top_p" => (0.0, false, 1.0),
        "min_p" => (0.0, true, 1.0),
        "repetition_penalty" => (0.0, false, 100.0),
        "presence_penalty" | "frequency_penalty" => (-2.0, true, 2.0),
        _ => (0.0, true, 100.0),
    };
    // Not a number compares false with everything.
    let above = if low_allowed { number >= low } else { number > low };
    if above && number <= high {
        return Ok(());
    }
    let range =
        if low_allowed { format!("{low} to {high}") } else { format!("above {low}, to {high}") };
    Err(out_of_range(field, &range, shown))
}

fn seed(value: &Value) -> Result<u64, Problem> {
    match value {
        Value::Number(number) if number.is_u64() => Ok(number.as_u64().unwrap_or_default()),
        Value::Number(number) if number.is_i64() => {
            Err(out_of_range("seed", "0 to 18446744073709551615", value))
        }
        _ => Err(wrong_type("seed", "an integer from 0 to 18446744073709551615", value)),
    }
}

fn stops(value: &Value) -> Result<Vec<String>, Problem> {
    let one = |value: &Value| {
        let text = value
            .as_str()
            .ok_or_else(|| wrong_type("stop", "a string or a list of strings", value))?;
        not_empty(text)?;
        Ok(text.to_string())
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => one(value).map(|stop| vec![stop]),
    }
}

fn not_empty(stop: &str) -> Result<(), Problem> {
    match stop.is_empty() {
        true => Err(Problem::new(ErrorCode::OutOfRange, "a \"stop\" string must not be empty")),
        false => Ok(()),
    }
}

fn boolean(field: &str, value: &Value) -> Result<bool, Problem> {
    value.as_bool().ok_or_else(|| wrong_type(field, "a boolean", value))
}

/// `field` must be `expected`, and is `value`.
pub(crate) fn wrong_type(field: &str, expected: &str, value: &Value) -> Problem {
    let message = format!("{field:?} must be {expected}, got {}", shortened(value));
    Problem::new(ErrorCode::WrongType, message)
}

fn out_of_range(field: &str, range: &str, value: &impl std::fmt::Display) -> Problem {
    Problem::new(ErrorCode::OutOfRange, format!("{field:?} must be {range}, got {value}"))
}

/// A value for a message: whole if short, else its start.
pub(crate) fn shortened(value: &Value) -> String {
    const LONGEST_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::Guide;

    fn applied(fields: Value) -> Result<SamplingParams, &'static str> {
        let Value::Object(fields) = fields else { panic!("an object") };
        apply(&SamplingParams::default(), &fields).map_err(|problem| {
            let field = fields.keys().next().unwrap();
            assert!(problem.message.contains(field.as_str()), "{}", problem.message);
            problem.code.as_str()
        })
    }

    #[test]
    fn every_field_arrives_in_its_parameter() {
        let params = applied(json!({
            "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.25,
            "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2,
            "seed": u64::MAX, "stop": ["a", "b"], "ignore_eos": true, "logprobs": 3,
            "return_token_ids": true, "n": 2, "regex": "a+"
        }));
        let expected = SamplingParams {
            max_new_tokens: 7,
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            seed: u64::MAX,
            stop: vec!["a".into(), "b".into()],
            ignore_eos: true,
            logprobs: Some(3),
            return_token_ids: true,
            n: 2,
            guide: Some(Guide::Regex("a+".into())),
        };
        assert_eq!(params, Ok(expected));
    }

    #[test]
    fn aliases_and_nulls() {
        let tokens = |fields| applied(fields).unwrap().max_new_tokens;
        assert_eq!(tokens(json!({"max_tokens": 3})), 3);
        assert_eq!(tokens(json!({"max_new_tokens": 5, "max_tokens": 3})), 5);
        assert_eq!(tokens(json!({"max_tokens": null})), 256);
        let logprobs = |fields| applied(fields).unwrap().logprobs;
        assert_eq!(logprobs(json!({"logprobs": true})), Some(0));
        assert_eq!(logprobs(json!({"logprobs": true, "top_logprobs": 4})), Some(4));
        assert_eq!(logprobs(json!({"logprobs": false, "top_logprobs": 4})), None);
        assert_eq!(applied(json!({"top_k": -1})).unwrap().top_k, 0);
        assert_eq!(applied(json!({"stop": "x"})).unwrap().stop, ["x"]);
    }

    #[test]
    fn wrong_types_and_ranges_are_told_apart() {
        let wrong = [
            json!({"temperature": "hot"}),
            json!({"max_new_tokens": 1.5}),
            json!({"max_tokens": "9"}),
            json!({"top_k": [1]}),
            json!({"seed": 1.0}),
            json!({"stop": [1]}),
            json!({"stop": {}}),
            json!({"ignore_eos": 1}),
            json!({"logprobs": "yes"}),
            json!({"n": true}),
        ];
        for fields in wrong {
            assert_eq!(applied(fields.clone()), Err("wrong_type"), "{fields}");
        }
        let out = [
            json!({"temperature": -0.1}),
            json!({"temperature": 1e300}),
            json!({"top_p": 0}),
            json!({"top_p": 1e-60}),
            json!({"top_p": 1.01}),
            json!({"min_p": -1}),
            json!({"repetition_penalty": 0}),
            json!({"presence_penalty": 2.5}),
            json!({"max_new_tokens": 0}),
            json!({"max_new_tokens": -1}),
            json!({"max_new_tokens": u64::MAX}),
            json!({"top_k": -2}),
            json!({"seed": -1}),
            json!({"stop": [""]}),
            json!({"logprobs": 21}),
            json!({"n": 17}),
            json!({"n": 0}),
        ];
        for fields in out {
            assert_eq!(applied(fields.clone()), Err("out_of_range"), "{fields}");
        }
    }

    #[test]
    fn parameters_from_flags_meet_the_same_ranges() {
        assert_eq!(check(&SamplingParams::default()), Ok(()));
        let cases = [
            SamplingParams { temperature: f32::NAN, ..Default::default() },
            SamplingParams { top_p: 0.0, ..Default::default() },
            SamplingParams { max_new_tokens: 0, ..Default::default() },
            SamplingParams { stop: vec![String::new()], ..Default::default() },
        ];
        for params in cases {
            assert_eq!(check(&params).unwrap_err().code, ErrorCode::OutOfRange, "{params:?}");
        }
    }
}
