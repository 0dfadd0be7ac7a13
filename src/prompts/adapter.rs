//! Which of the run's adapters answers a record: its field `adapter`, or the `model` of an
//! OpenAI body, or the one adapter that the run has.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::overrides::wrong_type;
use super::{ErrorCode, Problem};

/// The field of a record.
pub const FIELD: &str = "adapter";

/// The adapters that a run has loaded, by number.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterNames(Vec<Arc<str>>);

/// The adapter of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenAdapter {
    /// Its number.
    pub number: u32,
    /// Its name, as the output shows it.
    pub name: Arc<str>,
}

impl AdapterNames {
    /// The names in the order of the adapters' numbers.
    pub fn new(names: impl IntoIterator<Item = impl Into<Arc<str>>>) -> Self {
        Self(names.into_iter().map(Into::into).collect())
    }

    /// That of a record that does not say: the run's only one.
    pub fn by_default(&self) -> Option<ChosenAdapter> {
        if self.0.len() == 1 { self.find(&self.0[0]) } else { None }
    }

    /// That of a record: the one that it names, none if it says `null`.
    pub fn of_record(&self, fields: &Map<String, Value>) -> Result<Option<ChosenAdapter>, Problem> {
        match fields.get(FIELD) {
            None => Ok(self.by_default()),
            Some(Value::Null) => Ok(None),
            Some(Value::String(name)) => {
                self.find(name).map(Some).ok_or_else(|| self.unknown(name))
            }
            Some(other) => Err(wrong_type(FIELD, "a string (an adapter's name) or null", other)),
        }
    }

    /// That of an OpenAI body: what its `adapter` says, else the one that its `model` names.
    pub fn of_body(&self, body: &Map<String, Value>) -> Result<Option<ChosenAdapter>, Problem> {
        let model = body.get("model").and_then(Value::as_str).and_then(|name| self.find(name));
        match model {
            Some(chosen) if !body.contains_key(FIELD) => Ok(Some(chosen)),
            _ => self.of_record(body),
        }
    }

    fn find(&self, name: &str) -> Option<ChosenAdapter> {
        let number = self.0.iter().position(|known| **known == *name)?;
        Some(ChosenAdapter { number: number as u32, name: self.0[number].clone() })
    }

    fn unknown(&self, name: &str) -> Problem {
        let names: Vec<String> = self.0.iter().map(|name| format!("{name:?}")).collect();
        let loaded = match names.as_slice() {
            [] => "none is loaded; --adapter loads one".to_owned(),
            names => format!("loaded: {}", names.join(", ")),
        };
        Problem::new(ErrorCode::UnknownAdapter, format!("there is no adapter {name:?}; {loaded}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chosen(names: &[&str], fields: Value, body: bool) -> Result<Option<u32>, String> {
        let names = AdapterNames::new(names.iter().copied());
        let fields = fields.as_object().unwrap();
        let chosen = if body { names.of_body(fields) } else { names.of_record(fields) };
        chosen
            .map(|c| c.map(|c| c.number))
            .map_err(|p| format!("{}: {}", p.code.as_str(), p.message))
    }

    #[test]
    fn a_record_names_its_adapter_or_takes_the_only_one() {
        let two = ["a", "b"];
        assert_eq!(chosen(&two, json!({}), false), Ok(None));
        assert_eq!(chosen(&two, json!({"adapter": "b"}), false), Ok(Some(1)));
        assert_eq!(chosen(&["a"], json!({}), false), Ok(Some(0)));
        assert_eq!(chosen(&["a"], json!({"adapter": null}), false), Ok(None));
        let error = chosen(&two, json!({"adapter": "c"}), false).unwrap_err();
        assert!(error.starts_with("unknown_adapter") && error.contains(r#""a", "b""#), "{error}");
        let error = chosen(&[], json!({"adapter": "c"}), false).unwrap_err();
        assert!(error.contains("--adapter"), "{error}");
        let error = chosen(&two, json!({"adapter": 1}), false).unwrap_err();
        assert!(error.starts_with("wrong_type"), "{error}");
    }

    #[test]
    fn a_body_names_it_as_its_model() {
        let two = ["a", "b"];
        assert_eq!(chosen(&two, json!({"model": "b"}), true), Ok(Some(1)));
        assert_eq!(chosen(&two, json!({"model": "gpt"}), true), Ok(None));
        assert_eq!(chosen(&two, json!({"model": "b", "adapter": null}), true), Ok(None));
        assert_eq!(chosen(&["a"], json!({"model": "gpt"}), true), Ok(Some(0)));
    }
}
