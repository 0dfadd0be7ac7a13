//! Matchers over a vocabulary of bytes and words, with tokens drawn at random: every
//! text ends, and is what its guide asks for.

use serde_json::{Value, json};

use super::testing::schema::{matches, validate};
use super::testing::{EOS, Words, schemas, words};
use super::*;
use crate::engine::TokenDecoder;

fn guides() -> Guides {
    Guides::new(words, &[EOS])
}

/// A stream of numbers below `end`.
struct Draws(u64);

impl Draws {
    fn next(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

/// A text of random allowed tokens with room for `room`; its tokens, and whether it is whole.
fn draw(matcher: &mut Matcher, room: usize, draws: &mut Draws) -> (Vec<u32>, bool) {
    draw_some(matcher, room, room, draws)
}

/// The same, cut after `count` tokens.
fn draw_some(
    matcher: &mut Matcher,
    room: usize,
    count: usize,
    draws: &mut Draws,
) -> (Vec<u32>, bool) {
    let mut tokens = Vec::new();
    while tokens.len() < count && !matcher.is_complete() {
        let allowed = matcher.allowed(false).unwrap().to_list();
        let token = allowed[draws.next(allowed.len())];
        tokens.push(matcher.take(token, room - tokens.len()).unwrap());
    }
    (tokens, matcher.is_accepting())
}

fn text(tokens: &[u32]) -> String {
    let tokens: Vec<u32> = tokens.iter().copied().filter(|&id| id != EOS).collect();
    Words(words()).decode(&tokens)
}

/// Random tokens would write for ever: the room decides the end, and there is one.
#[test]
fn every_text_ends_within_its_room_and_is_valid() {
    let guides = guides();
    let mut draws = Draws(1);
    for schema in schemas() {
        let grammar = guides.compile(&Guide::json_schema(&schema)).unwrap();
        let shortest = grammar.start().shortest();
        for room in [shortest, shortest + 1, shortest + 7, 2 * shortest + 20, 200, 400] {
            for _ in 0..4 {
                let (tokens, whole) = draw(&mut grammar.start(), room, &mut draws);
                let text = text(&tokens);
                assert!(whole, "{schema} in {room}: {text}");
                let value: Value = serde_json::from_str(&text).expect(&text);
                assert_eq!(validate(&schema, &schema, &value), Ok(()), "{text}");
            }
        }
    }
}

#[test]
fn patterns_and_choices_are_kept_to_the_last_character() {
    let guides = guides();
    let mut draws = Draws(2);
    for pattern in ["^[a-c]{3,9}x$", "[a-z]+@[a-z]+[.]com", "(?i)yes", "[é-ü ]*!", "a+", "[0-9]{3}"]
    {
        let grammar = guides.compile(&Guide::Regex(pattern.into())).unwrap();
        for room in [24, 25, 60] {
            let (tokens, whole) = draw(&mut grammar.start(), room, &mut draws);
            let text = text(&tokens);
            assert!(whole, "{pattern}: {text}");
            match pattern.strip_prefix("(?i)") {
                Some(word) => assert_eq!(text.to_lowercase(), word),
                None => assert!(matches(pattern, &text), "{pattern}: {text:?}"),
            }
        }
    }
    let choices = ["yes", "no", "maybe", "may", "a, b \\ \"c\"\n", "é😀", " /$^"].map(String::from);
    let grammar = guides.compile(&Guide::Choices(choices.to_vec())).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let (tokens, whole) = draw(&mut grammar.start(), 20, &mut draws);
        assert!(whole);
        seen.insert(text(&tokens));
    }
    assert_eq!(seen, choices.into_iter().collect());
}

/// A text ends as soon as nothing can follow, and at EOS where something could.
#[test]
fn the_end_is_seen_at_once() {
    let guides = guides();
    let run = |guide: Guide, tokens: &[u32]| {
        let mut matcher = guides.compile(&guide).unwrap().start();
        let steps = tokens.iter().map(|&token| {
            assert!(matcher.allowed(false).unwrap().is_allowed(token));
            assert_eq!(matcher.take(token, 1000), Ok(token));
            (matcher.is_accepting(), matcher.is_complete())
        });
        steps.collect::<Vec<_>>()
    };
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    assert_eq!(run(Guide::Regex("ab?".into()), &bytes("ab")), [(true, false), (true, true)]);
    let eos = [b'a'.into(), EOS];
    assert_eq!(run(Guide::Regex("ab?".into()), &eos), [(true, false), (true, true)]);
    let choices = Guide::Choices(vec!["n".into(), "no".into()]);
    assert_eq!(run(choices, &bytes("no")), [(true, false), (true, true)]);
    let empty = run(Guide::JsonObject, &bytes("{}"));
    assert_eq!(empty, [(false, false), (true, true)]);
    let integer = Guide::json_schema(&json!({"type": "integer"}));
    assert_eq!(run(integer, &bytes("12"))[1], (true, false));
}

/// Only what is not allowed is taken away; EOS stays where there is nothing else.
#[test]
fn eos_can_be_left_out_while_the_text_can_go_on() {
    let mut matcher = guides().compile(&Guide::Regex("a|ab".into())).unwrap().start();
    assert_eq!(matcher.allowed(false).unwrap().to_list()[0], u32::from(b'a'));
    matcher.take(b'a'.into(), 10).unwrap();
    assert_eq!(matcher.allowed(false).unwrap().to_list(), [u32::from(b'b'), EOS]);
    assert_eq!(matcher.allowed(true).unwrap().to_list(), [u32::from(b'b')]);
    let mut empty = guides().compile(&Guide::Regex("(a{0})".into())).unwrap().start();
    assert_eq!(empty.allowed(true).unwrap().to_list(), [EOS]);
}

/// What was taken is taken again, whatever was known of the way out.
#[test]
fn a_replayed_text_goes_on_as_the_first_would() {
    let guides = guides();
    let mut draws = Draws(3);
    for schema in schemas() {
        let grammar = guides.compile(&Guide::json_schema(&schema)).unwrap();
        let room = grammar.start().shortest() + 50;
        for _ in 0..6 {
            let (mut first, mut second) = (grammar.start(), grammar.start());
            let half = draws.next(room);
            let begin = Draws(draws.0);
            let (tokens, _) = draw_some(&mut first, room, half, &mut Draws(begin.0));
            for (place, &token) in tokens.iter().enumerate() {
                assert!(second.replay(token, room - place), "{}", text(&tokens));
            }
            let rest = room - tokens.len();
            let ends = [&mut first, &mut second].map(|m| draw(m, rest, &mut Draws(begin.0 ^ 1)));
            assert_eq!(ends[0], ends[1]);
        }
    }
    let mut matcher = guides.compile(&Guide::JsonObject).unwrap().start();
    assert!(!matcher.replay(b'['.into(), 100));
}

#[test]
fn what_cannot_be_followed_is_refused_with_a_reason() {
    for (guide, word) in [
        (Guide::Regex("a(b".into()), "unclosed group"),
        (Guide::Regex("a\\".into()), "escape"),
        (Guide::Regex("^$".into()), "empty"),
        (Guide::Regex(String::new()), "empty"),
        (Guide::Regex("x".repeat(Guide::MAX_PATTERN_BYTES + 1)), "bytes"),
        (Guide::Regex("(?=a)b".into()), "look"),
        (Guide::json_schema(&json!({"pattern": "x".repeat(9000)})), "9000"),
        (Guide::JsonSchema(" ".repeat(Guide::MAX_BYTES + 1)), "bytes"),
        (Guide::Choices(vec![]), "no choices"),
        (Guide::Choices(vec!["a".into(), String::new()]), "empty"),
        (Guide::JsonSchema("[1]".into()), "object"),
        (Guide::JsonSchema("{".into()), "JSON"),
        (Guide::JsonSchema("false".into()), "nothing"),
        (Guide::json_schema(&json!({"type": "strin"})), "strin"),
        (Guide::json_schema(&json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
        (Guide::json_schema(&json!({"$ref": "#/$defs/missing"})), "missing"),
        (Guide::json_schema(&json!({"type": "string", "pattern": "("})), "unclosed"),
        (Guide::json_schema(&json!({"type": "integer", "minimum": 3, "maximum": 2})), "3"),
    ] {
        let error = check(&guide).expect_err(&format!("{guide:?}"));
        assert!(error.contains(word) && !error.contains('\n') && error.len() < 400, "{error}");
    }
}

/// A vocabulary that cannot write what the guide asks for.
#[test]
fn missing_bytes_are_told_when_the_grammar_is_made() {
    let guides = Guides::new(|| vec![b"a".to_vec(), b"b".to_vec(), Vec::new()], &[2]);
    assert!(guides.compile(&Guide::Regex("[ab]+".into())).is_ok());
    let error = guides.compile(&Guide::JsonObject).unwrap_err();
    assert!(error.contains("tokens can write no text"), "{error}");
}

#[test]
fn equal_guides_share_a_grammar_and_few_are_kept() {
    let guides = guides();
    let guide = |i: usize| Guide::Regex(format!("a{i}"));
    let first = guides.compile(&guide(0)).unwrap();
    for i in 1..40 {
        guides.compile(&guide(i)).unwrap();
        assert!(std::sync::Arc::ptr_eq(&first, &guides.compile(&guide(0)).unwrap()));
    }
    let again = guides.compile(&guide(1)).unwrap();
    assert_eq!(again.start().shortest(), first.start().shortest());
}

/// Where a text of random tokens begins with just enough room, it ends in time, whatever
/// the pattern: the room of the fewest tokens suffices.
#[test]
fn the_fewest_tokens_suffice() {
    let guides = guides();
    let mut draws = Draws(4);
    for (pattern, fewest) in [
        ("[0-9]+x", 2),
        ("[0-9]+x|abc", 1),
        ("(x|y){5}", 5),
        // Fewer bytes, more tokens.
        ("name|xy", 1),
        ("true(true|false|xyz){3}", 4),
        ("a{3,}b{3,}c", 6),
        ("(a|b)*a(a|b){9}", 5),
        (".*255", 1),
        ("[^x]*x[^y]*y", 2),
        ("(ab){40}", 40),
        ("é+(no|null)z", 3),
    ] {
        let grammar = guides.compile(&Guide::Regex(pattern.into())).unwrap();
        for room in [fewest, fewest + 1, fewest + 3, fewest + 20, 100] {
            for _ in 0..8 {
                let (tokens, whole) = draw(&mut grammar.start(), room, &mut draws);
                assert!(whole && tokens.len() <= room, "{pattern} in {room}: {}", text(&tokens));
            }
        }
        if fewest > 1 {
            let (tokens, whole) = draw(&mut grammar.start(), fewest - 1, &mut draws);
            assert!(!whole, "{pattern}: {}", text(&tokens));
        }
    }
}

/// A schema of whatever kind, at most so deep.
fn any_schema(draws: &mut Draws, depth: usize) -> Value {
    let kinds = if depth == 0 { 7 } else { 11 };
    match draws.next(kinds) {
        0 => json!({"type": "integer", "minimum": draws.next(200), "maximum": 300}),
        1 => json!({"type": ["number", "null"]}),
        2 => json!({"type": "string", "minLength": draws.next(6), "maxLength": 6 + draws.next(9)}),
        3 => {
            let patterns = ["^[A-Z]{2}-[0-9]{3}$", "^a+b?c{3}$", "^[0-9]*yes$"];
            json!({"type": "string", "pattern": patterns[draws.next(3)]})
        }
        4 => json!({"enum": ["a longer one than the others", 12.5, null, "ab", ["x"]]}),
        5 => json!({"type": "boolean"}),
        6 => json!({"$ref": "#/$defs/pair"}),
        7 | 8 => {
            let least = draws.next(4);
            let items = any_schema(draws, depth - 1);
            json!({"type": "array", "minItems": least, "maxItems": least + 3, "items": items})
        }
        9 => {
            let alternatives: Vec<Value> = (0..2).map(|_| any_schema(draws, depth - 1)).collect();
            json!({"anyOf": alternatives})
        }
        _ => {
            let names = ["name", "no", "é", "a b", "true"];
            let properties: serde_json::Map<String, Value> =
                names.iter().map(|name| ((*name).into(), any_schema(draws, depth - 1))).collect();
            let required: Vec<&str> = names.into_iter().filter(|_| draws.next(2) == 0).collect();
            let more = draws.next(3) == 0;
            json!({"type": "object", "properties": properties, "required": required,
                   "additionalProperties": more})
        }
    }
}

/// From the least room in which a text is whole on, every text is.
#[test]
fn any_schema_is_followed_in_any_room() {
    let guides = guides();
    let mut draws = Draws(5);
    let mut too_open = 0;
    for _ in 0..40 {
        let mut schema = any_schema(&mut draws, 3);
        let pair =
            json!({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2});
        schema["$defs"] = json!({"pair": pair});
        let grammar = guides.compile(&Guide::json_schema(&schema)).unwrap();
        let shortest = grammar.start().shortest();
        if shortest == 0 {
            // Not found within the bound of work.
            too_open += 1;
            continue;
        }
        let mut suffices = false;
        for room in (1..=shortest + 2).chain([shortest + 9, 2 * shortest + 40]) {
            for _ in 0..2 {
                let (tokens, whole) = draw(&mut grammar.start(), room, &mut draws);
                let text = text(&tokens);
                assert!(whole || !suffices, "{schema} in {room} of {shortest}: {text}");
                suffices = whole;
                if whole {
                    let value: Value = serde_json::from_str(&text).expect(&text);
                    assert_eq!(validate(&schema, &schema, &value), Ok(()), "{text}");
                }
            }
            assert!(suffices || room < shortest, "{schema}: not even {shortest} tokens do");
        }
    }
    assert!(too_open <= 2, "{too_open} of 40");
}

/// A pattern of whatever kind, at most so deep.
fn any_pattern(draws: &mut Draws, depth: usize) -> String {
    let inner = |draws: &mut Draws| any_pattern(draws, depth - 1);
    match draws.next(if depth == 0 { 3 } else { 7 }) {
        0 => ["a", "true", "yes", "-", "é", "10"][draws.next(6)].into(),
        1 => ["[0-9]", "[a-z]", "[ab]", "[^x]", "[é-ü]"][draws.next(5)].into(),
        2 => "(name|no|abcabc)".into(),
        3 => format!("{}{}", inner(draws), inner(draws)),
        4 => format!("({}|{})", inner(draws), inner(draws)),
        5 => {
            format!("({}){}", inner(draws), ["*", "+", "?", "{3}", "{2,}", "{0,9}"][draws.next(6)])
        }
        _ => format!("{}+{}", ["[0-9]", "(a|b)", "[a-z]"][draws.next(3)], inner(draws)),
    }
}

#[test]
fn any_pattern_is_followed_in_any_room() {
    let guides = guides();
    let mut draws = Draws(6);
    for _ in 0..150 {
        let pattern = any_pattern(&mut draws, 4);
        let grammar = guides.compile(&Guide::Regex(pattern.clone())).unwrap();
        let regex = regex::Regex::new(&format!("^(?s:{pattern})$")).unwrap();
        let mut suffices = false;
        for room in 1..40 {
            let (tokens, whole) = draw(&mut grammar.start(), room, &mut draws);
            let text = text(&tokens);
            assert!(whole || !suffices, "{pattern} in {room}: {text}");
            suffices = whole;
            assert!(!whole || regex.is_match(&text), "{pattern}: {text:?}");
        }
        assert!(suffices || grammar.start().shortest() > 39, "{pattern}");
    }
}

/// What is made to exhaust time or memory is an error, or followed; never waited for.
#[test]
fn hostile_guides_are_refused_or_followed() {
    let guides = guides();
    let nested = |n: usize| {
        (0..n).fold(json!({"type": "null"}), |s, _| json!({"type": "array", "items": s}))
    };
    let mut all: Vec<Guide> = [
        "a{1000000000}",
        "((a{1000}){1000}){1000}",
        "((a*)*)*b",
        "(.*a){50}",
        ".{0,100000}x",
        "(a|b)*a(a|b){25}",
        "(a|b)*a(a|b){250}x",
        "(?:a?){2000}a{2000}",
        "(a*b*c*d*e*f*g*h*)*z{50}",
    ]
    .map(|pattern| Guide::Regex(pattern.into()))
    .to_vec();
    all.push(Guide::Regex("(".repeat(3000) + "a" + &")".repeat(3000)));
    for schema in [
        nested(100),
        nested(400),
        json!({"type": "string", "minLength": 1_000_000_000}),
        json!({"type": "array", "minItems": 1_000_000_000}),
        json!({"type": "array", "maxItems": 1_000_000_000_000u64}),
        json!({"type": "object", "minProperties": 1_000_000}),
        json!({"type": "number", "multipleOf": 1e-300}),
        json!({"$ref": "#"}),
        json!({"type": "string", "pattern": "(a|b)*a(a|b){25}"}),
        json!({"type": "object", "properties": {"a": {}, "b": {}, "c": {}, "d": {}},
               "required": ["a", "b", "c", "d"]}),
    ] {
        all.push(Guide::json_schema(&schema));
    }
    let mut draws = Draws(7);
    for guide in all {
        let Ok(grammar) = guides.compile(&guide) else { continue };
        let mut matcher = grammar.start();
        for room in (1..=40).rev() {
            let Ok(allowed) = matcher.allowed(false) else { break };
            let allowed = allowed.to_list();
            if matcher.take(allowed[draws.next(allowed.len())], room).is_err() {
                break;
            }
            if matcher.is_complete() {
                break;
            }
        }
    }
}
