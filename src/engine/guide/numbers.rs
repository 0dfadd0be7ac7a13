//! Numbers in JSON stay within what readers take. JSON's grammar allows `1e999` and
//! hundreds of digits, which most readers refuse or turn into infinity, and which a
//! model that repeats itself does write.

/// Most digits before the point.
const MAX_DIGITS: u8 = 100;
/// Most digits of an exponent: with [`MAX_DIGITS`] less than the largest f64, 1.8e308.
const MAX_EXPONENT_DIGITS: u8 = 2;

/// Where in a JSON text its next byte stands, as far as numbers are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Place {
    /// Between values, or in a word.
    #[default]
    Outside,
    /// In a string.
    Text,
    /// In a string, after a backslash.
    Escape,
    /// After so many digits of a number.
    Digits(u8),
    /// After the point of a number.
    Fraction,
    /// In an exponent, after so many digits.
    Exponent(u8),
}

impl Place {
    /// The place after `bytes`; `None` where a number among them grows too long.
    pub(super) fn after(self, bytes: &[u8]) -> Option<Self> {
        bytes.iter().try_fold(self, |place, &byte| place.next(byte))
    }

    fn next(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Escape, _) => Self::Text,
            (Self::Text, b'\\') => Self::Escape,
            (Self::Text, b'"') => Self::Outside,
            (Self::Text, _) => Self::Text,
            (Self::Digits(MAX_DIGITS), b'0'..=b'9')
            | (Self::Exponent(MAX_EXPONENT_DIGITS), b'0'..=b'9') => return None,
            (Self::Digits(count), b'0'..=b'9') => Self::Digits(count + 1),
            (Self::Exponent(count), b'0'..=b'9') => Self::Exponent(count + 1),
            (Self::Fraction, b'0'..=b'9') => Self::Fraction,
            (Self::Outside, b'0'..=b'9') => Self::Digits(1),
            (Self::Digits(_), b'.') => Self::Fraction,
            (Self::Digits(_) | Self::Fraction, b'e' | b'E') => Self::Exponent(0),
            (Self::Exponent(0), b'+' | b'-') => self,
            (_, b'"') => Self::Text,
            _ => Self::Outside,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_end_before_readers_give_up() {
        let fits = |text: &str| Place::default().after(text.as_bytes()).is_some();
        let digits = "9".repeat(100);
        for text in [
            "[1, 2.5, 1e99]",
            "-1.5E-12",
            "true",
            r#"{"e1234": "1e1234\"1e1234", "a": 1}"#,
            &format!("[{digits}e99, {digits}.{digits}{digits}]"),
        ] {
            assert!(fits(text), "{text}");
            assert!(serde_json::from_str::<serde_json::Value>(text).is_ok(), "{text}");
        }
        for text in ["1e100", "[0, 1.25E+123]", &format!("{digits}9"), r#"{"a\\": 1e-100"#] {
            assert!(!fits(text), "{text}");
        }
    }
}
