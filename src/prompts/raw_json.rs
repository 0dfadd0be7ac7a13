//! The members of a JSON object as they are spelled.
//!
//! `serde_json::Value` keeps integers to 64 bits and floats to their nearest
//! double; fields that farm only passes on must not change, so they are cut out of
//! the text. The text has been parsed before: this only finds boundaries.

/// The (key, value) texts of the outer object's members, in order; keys are still
/// quoted and escaped. `text` must be a valid JSON object.
pub(crate) fn members(text: &str) -> Vec<(&str, &str)> {
    let mut members = Vec::new();
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    let (mut start, mut colon) = (0, None);
    for (at, byte) in text.bytes().enumerate() {
        if in_string {
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                depth += 1;
                if depth == 1 {
                    start = at + 1;
                }
            }
            b':' if depth == 1 => colon = Some(at),
            b',' | b'}' | b']' => {
                if depth == 1
                    && let Some(colon) = colon.take()
                {
                    members.push((text[start..colon].trim(), text[colon + 1..at].trim()));
                }
                if byte == b',' {
                    if depth == 1 {
                        start = at + 1;
                    }
                } else {
                    depth = depth.saturating_sub(1);
                }
            }
            _ => {}
        }
    }
    members
}

/// A JSON object of these members, on one line. A line break inside a valid JSON
/// text is only ever space between tokens, so it can go.
pub(crate) fn object(members: &[(&str, &str)]) -> String {
    let mut text = String::from("{");
    for (i, (key, value)) in members.iter().enumerate() {
        if i > 0 {
            text.push(',');
        }
        let part = [key, ":", value].concat();
        text.extend(part.chars().filter(|c| !matches!(c, '\n' | '\r')));
    }
    text.push('}');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_cut_as_they_are_spelled() {
        let text = r#" { "a" : 1e400 , "b\"}" : {"x":[1,{"y":"],}"}]}, "c":"\\", "d":
            12345678901234567890123 } "#;
        assert_eq!(
            members(text),
            [
                ("\"a\"", "1e400"),
                (r#""b\"}""#, r#"{"x":[1,{"y":"],}"}]}"#),
                ("\"c\"", r#""\\""#),
                ("\"d\"", "12345678901234567890123"),
            ]
        );
        assert!(members("{}").is_empty());
    }

    #[test]
    fn an_object_is_put_together_on_one_line() {
        assert_eq!(object(&members("{\"a\":[1,\r\n2],\"b\":\"x\"}")), r#"{"a":[1,2],"b":"x"}"#);
    }
}
