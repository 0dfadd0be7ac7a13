//! The places of turns, over the templates of the goldens and those that make it hard.

use serde_json::json;

use super::super::marks::mark_generation;
use super::*;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes thoughts before the last turn only, as Qwen3's template does.
const THINKING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
    {% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}\
    {{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn conversation() -> Vec<Value> {
    [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
        .map(|(role, content)| json!({"role": role, "content": content}))
        .to_vec()
}

fn template(source: &str) -> ChatTemplate {
    let variables = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let variables = variables.map(|(name, text)| (name.to_string(), json!(text)));
    ChatTemplate::new(source, Map::from_iter(variables), 0)
}

fn learned_from(source: &str, messages: &[Value], first: usize) -> Result<Vec<String>, Problem> {
    let marked = mark_generation(source).map(|source| template(&source));
    let rendered = render(&template(source), marked.as_ref(), messages, first)?;
    Ok(rendered.turns.into_iter().map(|turn| rendered.text[turn].to_string()).collect())
}

fn learned(source: &str, messages: &[Value]) -> Vec<String> {
    learned_from(source, messages, 0).unwrap()
}

#[test]
fn a_turn_is_its_text_and_the_mark_that_ends_it() {
    let messages = conversation();
    assert_eq!(learned(CHATML, &messages), ["A1<|im_end|>", "A2<|im_end|>"]);
    assert_eq!(learned(CHATML, &messages[..3]), ["A1<|im_end|>"]);
    let unmarked = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}\
        {% if add_generation_prompt %}assistant:{% endif %}";
    assert_eq!(learned(unmarked, &messages), [" A1\n\n", " A2\n\n"]);
}

#[test]
fn an_eos_is_learned_where_it_alone_ends_the_turn() {
    let source = "{% for m in messages %}{{ m.role }}> {{ m.content }}END{% endfor %}\
        {% if add_generation_prompt %}ASK{% else %}</s>{% endif %}";
    let mut messages = conversation()[..2].to_vec();
    messages[1]["content"] = json!("x > 1\ny");
    // What asks for a turn may be how it begins, or something else.
    for ask in ["assistant> ", "<a>"] {
        let turn = |end| learned(&source.replace("END", end).replace("ASK", ask), &messages);
        assert_eq!(turn(""), ["x > 1\ny</s>"], "{ask}");
        assert_eq!(turn("<|end|>"), ["x > 1\ny<|end|>"], "{ask}");
    }
}

/// Every template of the goldens that takes such a conversation.
#[test]
fn turns_are_found_in_the_templates_in_use() {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/cases.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut found = std::collections::BTreeMap::new();
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let source = case["template"].as_str().unwrap();
        if let Ok(turns) = learned_from(source, &conversation(), 0) {
            found.insert(name, turns);
        }
    }
    for (name, turns) in &found {
        assert_eq!(turns.len(), 2, "{name}: {turns:?}");
        for (turn, content) in turns.iter().zip(["A1", "A2"]) {
            assert!(turn.contains(content) && !turn.contains("Q2"), "{name}: {turns:?}");
        }
    }
    for name in ["chatml default system", "llama-2 system", "llama-3", "gemma", "phi-3", "thinking"]
    {
        assert!(found.contains_key(name), "{name}");
    }
    assert_eq!(found["llama-3"], ["A1<|eot_id|>", "A2<|eot_id|>"]);
    // Its conversations end with an EOS, which is no turn's.
    assert_eq!(found["phi-3"], ["A1<|end|>", "A2<|end|>"]);
    assert_eq!(found["gemma"], ["A1<end_of_turn>", "A2<end_of_turn>"]);
}

#[test]
fn a_turn_that_is_written_otherwise_in_the_middle_is_found_by_a_stand_in() {
    let mut messages = conversation();
    let expected = ["A1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"];
    assert_eq!(learned(THINKING, &messages), expected);
    messages[1]["content"] = json!("<think>\nhm\n</think>\n\nA1");
    assert_eq!(learned(THINKING, &messages), expected);
}

#[test]
fn marks_of_the_template_go_before_all_else() {
    let source = CHATML.replace(
        "{{ m.content | trim }}",
        "{% if m.role == 'assistant' %}So: {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
    );
    assert_eq!(learned(&source, &conversation()), ["A1", "A2"]);
    assert_eq!(learned_from(&source, &conversation(), 2).unwrap(), ["A2"]);
    // Marks around some of the turns, or given by a message, tell nothing.
    let some = source.replace("== 'assistant'", "== 'assistant' and loop.last");
    assert_eq!(learned(&some, &conversation()), ["A1<|im_end|>", "So: A2<|im_end|>"]);
    let mut hostile = conversation();
    hostile[0]["content"] = json!("\u{FDD0}x\u{FDD1}");
    assert_eq!(learned(&source, &hostile), ["So: A1<|im_end|>", "So: A2<|im_end|>"]);
}

#[test]
fn turns_of_the_prompt_without_weight_or_text_are_not_learned() {
    let mut messages = conversation();
    assert_eq!(learned_from(CHATML, &messages, 2).unwrap(), ["A2<|im_end|>"]);
    messages[1]["weight"] = json!(0);
    assert_eq!(learned(CHATML, &messages), ["A2<|im_end|>"]);
    messages[3]["content"] = json!(" ");
    assert_eq!(learned(CHATML, &messages), [""; 0]);
}

#[test]
fn a_template_that_hides_its_turns_is_refused_and_names_the_message() {
    let source = "{{ messages | length }} messages";
    let problem = learned_from(source, &conversation()[..2], 0).unwrap_err();
    assert_eq!(problem.code, ErrorCode::ChatTemplateFailed);
    assert!(problem.message.contains("messages[1]"), "{}", problem.message);
    let source = "{{ raise_exception('roles must alternate') }}";
    let problem = learned_from(source, &conversation(), 0).unwrap_err();
    assert!(problem.message.contains("roles must alternate"), "{}", problem.message);
}
