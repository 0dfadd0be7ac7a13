//! The key-value pairs of a GGUF file.

use std::collections::HashMap;

/// A value, with the widths of numbers forgotten.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8 text (other bytes replaced).
    String(String),
    /// Array of integers (or of booleans, as 0 and 1).
    Ints(Vec<i64>),
    /// Array of floats.
    Floats(Vec<f32>),
    /// Array of texts.
    Strings(Vec<String>),
}

/// The metadata of a GGUF file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(pub HashMap<String, Value>);

impl Metadata {
    /// An integer that is not negative.
    pub fn uint(&self, key: &str) -> Option<u64> {
        match self.0.get(key)? {
            Value::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.0.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Int(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.0.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// A text.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// Integers.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.0.get(key)? {
            Value::Ints(v) => Some(v),
            _ => None,
        }
    }

    /// Floats.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.0.get(key)? {
            Value::Floats(v) => Some(v),
            _ => None,
        }
    }

    /// Texts.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.0.get(key)? {
            Value::Strings(v) => Some(v),
            _ => None,
        }
    }
}
