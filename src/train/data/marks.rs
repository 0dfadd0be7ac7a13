//! What a chat template itself says the assistant generates: `{% generation %}` blocks.
//!
//! A template in use renders as if the tags were not there. For training it is compiled once
//! more with each tag turned into a mark, a character that no text has; cutting the marks out
//! of what it renders gives the text and the places of the blocks in it.

use std::ops::Range;

/// Begins and ends a block. Unicode keeps these two for a program's own use: they are never
/// characters of a text that is passed on.
const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';

/// The source of a chat template with its `{% generation %}` tags turned into marks; `None`
/// if it has none. White space around a tag is trimmed as before: the mark stands between two
/// tags, of which the first takes the tag's own way with what is before it, the second with
/// what is behind.
pub fn mark_generation(source: &str) -> Option<String> {
    let mut marked = String::with_capacity(source.len() + 256);
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length + 2;
        let inner = &rest[start + 2..end - 2];
        let is_control = |c: char| matches!(c, '-' | '+');
        let name = inner.trim_matches(|c: char| c.is_whitespace() || is_control(c));
        let mark = match name {
            "generation" => Some(("if true", OPEN)),
            "endgeneration" => Some(("endif", CLOSE)),
            _ => None,
        };
        match mark {
            Some((tag, mark)) => {
                let before = if inner.starts_with(is_control) { &inner[..1] } else { "" };
                let behind =
                    if inner.ends_with(is_control) { &inner[inner.len() - 1..] } else { "" };
                marked.push_str(&rest[..start]);
                marked.push_str(&format!(
                    "{{%{before} {tag} %}}{{{{ \"{mark}\" }}}}{{% {tag} {behind}%}}"
                ));
                found = true;
            }
            None => marked.push_str(&rest[..end]),
        }
        rest = &rest[end..];
    }
    marked.push_str(rest);
    found.then_some(marked)
}

/// A rendered text without its marks, and the bytes of it that each pair of marks enclosed.
/// `None` where they do not come in pairs: a text that was given them on purpose.
pub(super) fn cut_out(rendered: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(rendered.len());
    let mut blocks = Vec::new();
    let mut start = None;
    for part in rendered.split_inclusive([OPEN, CLOSE]) {
        let content = part.trim_end_matches([OPEN, CLOSE]);
        text.push_str(content);
        match part[content.len()..].chars().next() {
            None => {}
            Some(OPEN) if start.is_none() => start = Some(text.len()),
            Some(CLOSE) => blocks.push(start.take()?..text.len()),
            Some(_) => return None,
        }
    }
    start.is_none().then_some((text, blocks))
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::prompts::ChatTemplate;

    fn rendered(source: &str) -> String {
        let variables = Map::from_iter([("messages".to_string(), json!(["a\n", "b"]))]);
        ChatTemplate::new(source, Map::new(), 0).render_with(variables).unwrap()
    }

    /// The marks must not change a character of what the model will see in use.
    #[test]
    fn marks_stand_where_the_blocks_are_and_change_no_white_space() {
        let sources = [
            "x\n {% generation %}\n {{ messages[0] }} \n {% endgeneration %}\n y",
            "x\n {%- generation -%}\n {{ messages[0] }} \n {%- endgeneration -%}\n y",
            "x\n {%+ generation +%}\n {{ messages[0] }} \n {%+ endgeneration +%}\n y",
            "{% for m in messages %}\n  {%generation%}{{ m }}{%endgeneration%}\n{% endfor %}",
            "{% if true %} {% generation %}a{% endgeneration %} {% endif %}{% raw %}z{% endraw %}",
        ];
        for source in sources {
            let marked = rendered(&mark_generation(source).unwrap());
            let (text, blocks) = cut_out(&marked).unwrap();
            assert_eq!(text, rendered(source), "{source:?} {marked:?}");
            assert_eq!(blocks.len(), source.matches("{{ m }}").count() + 1, "{source:?}");
        }
        assert_eq!(mark_generation("{{ messages }}{% if a %}"), None);
    }

    #[test]
    fn marks_that_do_not_pair_are_refused() {
        let (text, blocks) = cut_out("a\u{FDD0}bü\u{FDD1}c\u{FDD0}\u{FDD1}").unwrap();
        assert_eq!((text.as_str(), blocks), ("abüc", vec![1..4, 5..5]));
        assert_eq!(cut_out("ab"), Some(("ab".into(), vec![])));
        for text in ["\u{FDD0}", "\u{FDD1}", "\u{FDD0}\u{FDD0}\u{FDD1}", "a\u{FDD1}\u{FDD0}"] {
            assert_eq!(cut_out(text), None, "{text:?}");
        }
    }
}
