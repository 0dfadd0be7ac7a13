//! Durations as Slurm writes and takes them (sbatch(1), `--time`).

/// Seconds of `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`. As in Slurm, a
/// number alone is minutes and a part may be above 59. `None` for everything else,
/// `UNLIMITED` and `INVALID` among it, and for more than 2^64 seconds.
pub fn time_seconds(text: &str) -> Option<u64> {
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(number(days)?), clock),
        None => (None, text),
    };
    let parts: Vec<u64> = clock.split(':').map(number).collect::<Option<_>>()?;
    let [hours, minutes, seconds] = match (days, &parts[..]) {
        (_, &[hours, minutes, seconds]) => [hours, minutes, seconds],
        (Some(_), &[hours, minutes]) => [hours, minutes, 0],
        (Some(_), &[hours]) => [hours, 0, 0],
        (None, &[minutes, seconds]) => [0, minutes, seconds],
        (None, &[minutes]) => [0, minutes, 0],
        _ => return None,
    };
    let hours = days.unwrap_or(0).checked_mul(24)?.checked_add(hours)?;
    let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
    minutes.checked_mul(60)?.checked_add(seconds)
}

/// Digits alone: `parse` would take `+5`, too.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_form_that_slurm_knows() {
        for (text, expected) in [
            ("90", Some(5400)),
            ("0:05", Some(5)),
            ("9:58", Some(598)),
            ("90:30", Some(5430)),
            ("01:00:00", Some(3600)),
            ("1-0", Some(86400)),
            ("1-02:03", Some(93780)),
            ("1-23:59:58", Some(172_798)),
            ("364-23:59:56", Some(31_535_996)),
            ("18446744073709551615-0", None),
            ("UNLIMITED", None),
            ("INVALID", None),
            ("NOT_SET", None),
            ("", None),
            ("-5", None),
            ("+5", None),
            ("1-", None),
            ("1:2:3:4", None),
            ("1-2:3:4:5", None),
            ("1::2", None),
            ("1-2-3", None),
        ] {
            assert_eq!(time_seconds(text), expected, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_squeue_prints_is_read_back(seconds in 0u64..100_000_000) {
            let (d, h, m, s) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
            prop_assert_eq!(time_seconds(&format!("{d}-{h:02}:{m:02}:{s:02}")), Some(seconds));
            prop_assert_eq!(time_seconds(&format!("{}:{s:02}", seconds / 60)), Some(seconds));
        }

        #[test]
        fn no_text_panics(text in "[0-9:+a-zé-]{0,30}") {
            time_seconds(&text);
        }
    }
}
