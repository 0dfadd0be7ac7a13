//! The part of C's `strftime` that chat templates use, in UTC.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Formats a moment (seconds since 1970-01-01 UTC) by a `strftime` format in the C
/// locale. A directive that is not known stays as it is.
pub(crate) fn strftime(unix_seconds: u64, format: &str) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let (year, month, day, day_of_year) = civil(days);
    let weekday = (days % 7) as usize;
    let hour12 = match second / 3600 % 12 {
        0 => 12,
        hour => hour,
    };
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        // glibc's `%-d`: no padding.
        let mut directive = rest.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = rest.next();
        }
        let number = |value: u64, width: usize| match unpadded {
            true => value.to_string(),
            false => format!("{value:0width$}"),
        };
        let part = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month as u64, 2),
            Some('d') => number(day, 2),
            Some('e') if unpadded => day.to_string(),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(second / 3600, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(second / 60 % 60, 2),
            Some('S') => number(second % 60, 2),
            Some('p') => if second < 43_200 { "AM" } else { "PM" }.to_string(),
            Some('B') => MONTHS[month - 1].to_string(),
            Some('b' | 'h') => MONTHS[month - 1][..3].to_string(),
            Some('A') => WEEKDAYS[weekday].to_string(),
            Some('a') => WEEKDAYS[weekday][..3].to_string(),
            Some('w') => ((weekday + 4) % 7).to_string(),
            Some('F') => strftime(unix_seconds, "%Y-%m-%d"),
            Some('D' | 'x') => strftime(unix_seconds, "%m/%d/%y"),
            Some('T' | 'X') => strftime(unix_seconds, "%H:%M:%S"),
            Some('R') => strftime(unix_seconds, "%H:%M"),
            Some('c') => strftime(unix_seconds, "%a %b %e %H:%M:%S %Y"),
            Some('Z') => "UTC".to_string(),
            Some('z') => "+0000".to_string(),
            Some('s') => unix_seconds.to_string(),
            Some('n') => "\n".to_string(),
            Some('t') => "\t".to_string(),
            Some('%') => "%".to_string(),
            Some(other) if unpadded => format!("%-{other}"),
            Some(other) => format!("%{other}"),
            None => "%".to_string(),
        };
        out.push_str(&part);
    }
    out
}

/// (year, month from 1, day from 1, day of the year from 1) of a day since
/// 1970-01-01 in the Gregorian calendar.
fn civil(days: u64) -> (u64, usize, u64, u64) {
    let leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    // 400 years are 146,097 days.
    let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let day_of_year = rest + 1;
    let february = if leap(year) { 29 } else { 28 };
    for (month, length) in
        [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate()
    {
        if rest < length {
            return (year, month + 1, rest + 1, day_of_year);
        }
        rest -= length;
    }
    unreachable!("the months' lengths add up to the year's")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_agree_with_date_1() {
        // `date -u -d @N +FORMAT`
        let cases = [
            (0, "%Y-%m-%d %H:%M:%S %a %j", "1970-01-01 00:00:00 Thu 001"),
            (951_782_400, "%F %A %e %B %y", "2000-02-29 Tuesday 29 February 00"),
            (1_767_225_599, "%d %b %Y %I:%M %p %j %w", "31 Dec 2025 11:59 PM 365 3"),
            (1_772_323_200, "%-d/%-m %e|%T %% %Q %-Q %", "1/3  1|00:00:00 % %Q %-Q %"),
        ];
        for (seconds, format, expected) in cases {
            assert_eq!(strftime(seconds, format), expected, "{seconds}");
        }
    }
}
