//! What a record costs, before (an estimate from its raw line) and after.
//!
//! The unit is one decoded token. The hand-out needs only that long records are
//! known to be long and that the unit is the same everywhere.

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::prompts::{RawBody, RawRecord};

/// Cost of one prompt token: prefill runs many rows against one read of the weights.
pub const PREFILL_TOKEN_COST: f64 = 0.25;

/// Bytes of English text a token, roughly.
const BYTES_A_TOKEN: f64 = 4.0;

/// Cost of this many tokens.
pub fn token_cost(prompt_tokens: u64, new_tokens: u64) -> f64 {
    prompt_tokens as f64 * PREFILL_TOKEN_COST + new_tokens as f64
}

/// The fields of a JSON record that say how much may be generated.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Limits {
    max_new_tokens: Option<u64>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    n: Option<u64>,
    body: Option<Box<Limits>>,
}

impl Limits {
    fn new_tokens(&self, default: u64) -> u64 {
        if let Some(body) = &self.body {
            return body.new_tokens(default);
        }
        let limit = self.max_new_tokens.or(self.max_completion_tokens).or(self.max_tokens);
        limit.unwrap_or(default).saturating_mul(self.n.unwrap_or(1).clamp(1, 16))
    }
}

/// The estimated cost of a record: its prompt by its length in bytes, and as many new
/// tokens as it may ask for (`default_max_new_tokens` where it does not say), at most
/// `max_seq_len`. A record that cannot be parsed costs next to nothing.
pub fn estimate_cost(record: &RawRecord, default_max_new_tokens: u64, max_seq_len: u64) -> f64 {
    let (num_bytes, new_tokens) = match &record.body {
        RawBody::Text(text) => (text.len(), default_max_new_tokens),
        RawBody::Json(json) => match serde_json::from_slice::<Limits>(json) {
            Ok(limits) => (json.len(), limits.new_tokens(default_max_new_tokens)),
            // A field of a wrong type fails later, without being generated; what is JSON but
            // unusual otherwise (duplicate keys, say) may still be generated.
            Err(_) if serde_json::from_slice::<IgnoredAny>(json).is_ok() => (json.len(), 0),
            Err(_) => (0, 0),
        },
        RawBody::Bad { .. } => (0, 0),
    };
    let prompt = (num_bytes as f64 / BYTES_A_TOKEN).min(max_seq_len as f64);
    1.0 + prompt * PREFILL_TOKEN_COST + (new_tokens as f64).min(16.0 * max_seq_len as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::ErrorCode;

    fn cost(body: RawBody) -> f64 {
        estimate_cost(&RawRecord { index: 0, line: 1, body }, 100, 1000)
    }

    #[test]
    fn the_limit_in_the_record_decides() {
        let json = |text: &str| cost(RawBody::Json(text.as_bytes().to_vec()));
        let long = json(r#"{"prompt":"a","max_new_tokens":900}"#);
        let default = json(r#"{"prompt":"a","max_new_tokenz":900}"#);
        let openai = json(r#"{"custom_id":"x","body":{"messages":[],"max_tokens":7,"n":2}}"#);
        assert!(long > 900.0 && long < 910.0, "{long}");
        assert!(default > 100.0 && default < 110.0, "{default}");
        assert!(openai > 14.0 && openai < 24.0, "{openai}");
    }

    #[test]
    fn what_cannot_be_generated_costs_little() {
        assert_eq!(cost(RawBody::Bad { code: ErrorCode::BadCsv, message: "row".into() }), 1.0);
        assert_eq!(cost(RawBody::Json(b"{oops".to_vec())), 1.0);
        assert!(cost(RawBody::Json(br#"{"max_new_tokens":"many"}"#.to_vec())) < 10.0);
    }

    #[test]
    fn a_longer_prompt_costs_more() {
        assert!(cost(RawBody::Text(vec![b'x'; 800])) > cost(RawBody::Text(vec![b'x'; 8])));
    }
}
