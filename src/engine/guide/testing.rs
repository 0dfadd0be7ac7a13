//! A vocabulary and schemas for the tests of guided texts.

use serde_json::{Value, json};

use crate::engine::TokenDecoder;

#[path = "../../../tests/common/schema.rs"]
pub mod schema;

/// Tokens of more than a byte; some end one thing and begin another.
const PIECES: [&str; 24] = [
    "\": ", "\": \"", "\", \"", "{\"", "}}", "]}", "], ", "[[", ": [", "true", "false", "null",
    "name", "abc", " the", "é", "\\n", "10", "255", "yes", "no", "may", "ab", "-",
];
/// The last token.
pub const EOS: u32 = 256 + PIECES.len() as u32;
/// Tokens: each byte by its id, the pieces, EOS.
pub const VOCAB_SIZE: usize = EOS as usize + 1;

/// The bytes of each token.
pub fn words() -> Vec<Vec<u8>> {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let pieces = PIECES.iter().map(|piece| piece.as_bytes().to_vec());
    bytes.chain(pieces).chain([Vec::new()]).collect()
}

/// Decodes tokens of [`words`].
pub struct Words(pub Vec<Vec<u8>>);

impl TokenDecoder for Words {
    fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| &self.0[id as usize]).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Nested objects, arrays with bounds, enums, references (to itself, too), patterns,
/// numbers with bounds, optional and unnamed properties.
pub fn schemas() -> Vec<Value> {
    vec![
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 130},
                "kind": {"enum": ["cat", "dog", 7, null]},
                "place": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}, "flat": {"type": "boolean"}},
                    "required": ["x"], "additionalProperties": false,
                },
            },
            "required": ["name", "kind", "place"], "additionalProperties": false,
        }),
        json!({
            "type": "array", "minItems": 2, "maxItems": 4,
            "items": {"$ref": "#/$defs/item"},
            "$defs": {"item": {
                "type": "object",
                "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, "note": {"type": "string"}},
                "required": ["code"], "additionalProperties": false,
            }},
        }),
        json!({
            "$ref": "#/$defs/tree",
            "$defs": {"tree": {
                "type": "object",
                "properties": {
                    "value": {"type": ["integer", "null"]},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3},
                },
                "required": ["value", "children"], "additionalProperties": false,
            }},
        }),
        json!({
            "type": "object",
            "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "boolean"}}]}},
            "required": ["a"], "additionalProperties": {"type": "integer"},
        }),
        json!({"type": "object"}),
    ]
}
