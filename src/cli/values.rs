//! Parsers of flag values: each refuses what is out of range and says the range.

use std::time::Duration;

use clap::builder::{OsStringValueParser, RangedU64ValueParser, TypedValueParser};

use crate::model::AdapterSource;
use crate::slurm;

/// An integer from 1.
pub fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// `[NAME=]PATH` of an adapter.
pub fn adapter() -> impl TypedValueParser<Value = AdapterSource> {
    OsStringValueParser::new().try_map(|text| AdapterSource::parse(&text))
}

/// An integer from 1 to `most`: beyond that a number is a slip, and the threads, ranks or
/// buffers that it asks for would end the job in an obscure way.
pub fn one_to(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=most)
}

/// The number of alternatives to report, 0 to 20 (OpenAI's limit).
pub fn logprobs() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(0..=20)
}

/// A finite number ≥ 0.
pub fn non_negative(text: &str) -> Result<f32, String> {
    number(text, "at least 0", |x| x >= 0.0)
}

/// A finite number > 0.
pub fn positive(text: &str) -> Result<f32, String> {
    number(text, "above 0", |x| x > 0.0)
}

/// A number in (0, 1].
pub fn nucleus_mass(text: &str) -> Result<f32, String> {
    number(text, "above 0 and at most 1", |x| x > 0.0 && x <= 1.0)
}

/// A number in [0, 1].
pub fn fraction(text: &str) -> Result<f32, String> {
    number(text, "between 0 and 1", |x| (0.0..=1.0).contains(&x))
}

/// A number in [-2, 2], OpenAI's range of the additive penalties.
pub fn penalty(text: &str) -> Result<f32, String> {
    number(text, "between -2 and 2", |x| (-2.0..=2.0).contains(&x))
}

fn number(text: &str, range: &str, accept: impl Fn(f32) -> bool) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("must be a number {range}"))?;
    // A NaN fails every comparison; infinities are refused here.
    if value.is_finite() && accept(value) { Ok(value) } else { Err(format!("must be {range}")) }
}

/// A number of bytes: `1073741824`, `8GiB`, `8G` (both binary, as Slurm counts),
/// `8GB` (decimal), `1.5TiB`. At least 1.
pub fn bytes(text: &str) -> Result<u64, String> {
    let expected = || "must be a number of bytes such as 8GiB, 500MB or 1073741824".to_owned();
    let text = text.trim();
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at(unit_at);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(expected()),
    };
    let value = match digits.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor).ok_or("is too large")?,
        Err(_) => {
            let value = digits.parse::<f64>().map_err(|_| expected())? * factor as f64;
            // `as` saturates; 2^63 bytes is past any memory.
            if value < (1u64 << 63) as f64 {
                value as u64
            } else {
                return Err("is too large".into());
            }
        }
    };
    if value == 0 { Err("must be at least 1 byte".into()) } else { Ok(value) }
}

/// A time: `90s`, `15m`, `2h`, `1d`, or as Slurm writes it (`90` is minutes, `MM:SS`,
/// `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`). At least 1 second.
pub fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let factors = [("s", 1), ("m", 60), ("h", 3600), ("d", 86400)];
    let by_unit = factors.iter().find_map(|(unit, factor)| {
        let digits = text.strip_suffix(unit)?;
        digits.parse::<u64>().ok()?.checked_mul(*factor)
    });
    let seconds = by_unit.or_else(|| slurm::time_seconds(text)).ok_or(
        "must be a time such as 90s, 15m, 2h or 1d, or as in Slurm: minutes, MM:SS, HH:MM:SS, \
         D-HH, D-HH:MM or D-HH:MM:SS",
    )?;
    if seconds == 0 {
        Err("must be at least 1 second".into())
    } else {
        Ok(Duration::from_secs(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_come_with_a_unit_or_as_in_slurm() {
        for (text, expected) in [
            ("90s", Some(90)),
            ("15m", Some(900)),
            ("2h", Some(7200)),
            ("1d", Some(86400)),
            ("90", Some(5400)),
            (" 1:30 ", Some(90)),
            ("01:30:00", Some(5400)),
            ("1-12", Some(129_600)),
            ("0", None),
            ("0s", None),
            ("s", None),
            ("-5m", None),
            ("1.5h", None),
            ("2 hours", None),
            ("18446744073709551615d", None),
            ("UNLIMITED", None),
            ("", None),
        ] {
            assert_eq!(duration(text).ok().map(|d| d.as_secs()), expected, "{text}");
        }
        let error = duration("soon").unwrap_err();
        assert!(error.contains("90s") && error.contains("D-HH:MM:SS"), "{error}");
    }
}
