//! Figures as people read them.

/// What stands for a figure that is not known.
pub const UNAVAILABLE: &str = "unavailable";

/// `show(value)`, or "unavailable".
pub fn known<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| UNAVAILABLE.to_owned(), show)
}

/// The same for the narrow columns of a table: "-" stands for unavailable.
pub fn cell<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

/// `1234567` as `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A rate: `1,235`, `12.3`, `0.123`.
pub fn rate(x: f64) -> String {
    match x {
        x if !x.is_finite() => UNAVAILABLE.to_owned(),
        x if x >= 1000.0 => count(x.round() as u64),
        x if x >= 1.0 => format!("{x:.1}"),
        x => format!("{x:.3}"),
    }
}

/// Seconds: `0.034 s`, `12.3 s`, `1:02:03`.
pub fn seconds(x: f64) -> String {
    match x {
        x if x < 1.0 => format!("{x:.3} s"),
        x if x < 600.0 => format!("{x:.1} s"),
        x => clock(x),
    }
}

/// Seconds as `h:mm:ss`.
pub fn clock(x: f64) -> String {
    let whole = x.max(0.0).round() as u64;
    format!("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60)
}

/// Bytes in decimal units, as rates are: `812 B`, `4.0 GB`.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1000.0, &["B", "kB", "MB", "GB", "TB", "PB"])
}

/// Bytes in binary units, as memory is: `1.5 GiB`.
pub fn memory(n: u64) -> String {
    scaled(n as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// Floating-point operations: `1.2 TFLOP`.
pub fn flop(x: f64) -> String {
    scaled(x, 1000.0, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])
}

/// Energy: `12.3 kJ`.
pub fn joules(x: f64) -> String {
    scaled(x, 1000.0, &["J", "kJ", "MJ", "GJ", "TJ"])
}

fn scaled(mut x: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while x >= step && unit + 1 < units.len() {
        x /= step;
        unit += 1;
    }
    if unit == 0 || x >= 100.0 {
        format!("{x:.0} {}", units[unit])
    } else {
        format!("{x:.1} {}", units[unit])
    }
}

/// A share: `98.1%`.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// `1 rank`, `2 ranks`.
pub fn plural(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// `text` cut to `width` characters, the last one `…` where something is missing.
pub fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.1234, 12.34, 1234.5].map(rate), ["0.123", "12.3", "1,235"]);
        assert_eq!([0.0341, 12.34, 3723.0].map(seconds), ["0.034 s", "12.3 s", "1:02:03"]);
        assert_eq!([812, 4_000_000_000, 123_400].map(bytes), ["812 B", "4.0 GB", "123 kB"]);
        assert_eq!(memory(3 << 29), "1.5 GiB");
        assert_eq!(flop(1.23e12), "1.2 TFLOP");
        assert_eq!([812.0, 12_345.0].map(joules), ["812 J", "12.3 kJ"]);
        assert_eq!(percent(0.9812), "98.1%");
        assert_eq!([plural(1, "rank"), plural(2, "rank")], ["1 rank", "2 ranks"]);
        assert_eq!(known(None::<f64>, rate), "unavailable");
        assert_eq!(
            (cut("node01", 6), cut("node001.example", 6)),
            ("node01".into(), "node0…".into())
        );
    }
}
