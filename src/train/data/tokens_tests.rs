//! Tokens and masks of the tiny model and of other kinds of tokenizer.

use std::path::Path;

use serde_json::{Map, json};

use super::*;
use crate::model::tokenizer::Tokenizer;
use crate::prompts::ChatTemplate;

fn tokenizer(dir: &str) -> Tokenizer {
    Tokenizer::from_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)).unwrap()
}

fn template(dir: &str) -> ChatTemplate {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    ChatTemplate::from_dir(&dir, 0).unwrap().unwrap()
}

fn formatting<'a>(tokenizer: &'a Tokenizer, template: Option<&'a ChatTemplate>) -> Formatting<'a> {
    Formatting {
        tokenizer,
        template,
        marked: None,
        max_seq_len: 100,
        train_on_prompt: false,
        vocab_size: tokenizer.vocab_size(),
    }
}

/// The example's tokens as text, learned ones in brackets.
fn shown(formatting: &Formatting<'_>, lesson: &Lesson) -> Result<String, &'static str> {
    let encoder = Encoder::new(formatting).unwrap();
    let (example, _) = encoder.example(lesson).map_err(|refusal| refusal.code)?;
    let mut shown = String::new();
    let mut was_target = false;
    for (&id, &is_target) in example.token_ids.iter().zip(&example.is_target) {
        if is_target != was_target {
            shown.push(if is_target { '[' } else { ']' });
        }
        shown.push_str(&String::from_utf8(formatting.tokenizer.token_bytes(id)).unwrap());
        was_target = is_target;
    }
    Ok(if was_target { shown + "]" } else { shown })
}

fn completion(prompt: &str, completion: &str) -> Lesson {
    Lesson::Completion { prompt: prompt.into(), completion: completion.into() }
}

fn chat(turns: &[(&str, &str)]) -> Lesson {
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    Lesson::Chat { messages: turns.iter().map(message).collect(), first: 0 }
}

const TINY: &str = "models/tiny";
const SENTENCEPIECE: &str = "tests/golden/tokenizers/spm_bpe";

#[test]
fn each_kind_of_lesson_has_its_targets() {
    let (tokenizer, template) = (tokenizer(TINY), template(TINY));
    let formatting = formatting(&tokenizer, Some(&template));
    let shown = |lesson| shown(&formatting, &lesson).unwrap();
    assert_eq!(shown(completion("copy: a =>", " a")), "<s>copy: a =>[ a<|end|>]");
    assert_eq!(shown(completion("copy: a =>", " a<|end|>")), "<s>copy: a =>[ a<|end|>]");
    assert_eq!(shown(Lesson::Text("a b".into())), "<s>[a b<|end|>]");
    let turns =
        [("system", "S"), ("user", "Q"), ("assistant", " A "), ("user", "R"), ("assistant", "B")];
    assert_eq!(
        shown(chat(&turns)),
        "<s><|system|>S<|end|><|user|>Q<|end|><|assistant|>[A<|end|>]<|user|>R<|end|><|assistant|>[B<|end|>]"
    );
}

/// In use the prompt is tokenized alone: the model must have learned to go on from there.
#[test]
fn the_prompts_tokens_are_those_of_the_prompt_alone() {
    for dir in [TINY, SENTENCEPIECE] {
        let tokenizer = tokenizer(dir);
        let formatting = formatting(&tokenizer, None);
        let encoder = Encoder::new(&formatting).unwrap();
        for (prompt, end) in
            [("the riv", "er stone"), ("the", " river"), ("a: ", "river"), ("", "a")]
        {
            let (example, _) = encoder.example(&completion(prompt, end)).unwrap();
            let alone = tokenizer.encode(prompt, true).unwrap();
            assert!(example.token_ids.starts_with(&alone), "{dir}: {prompt:?}");
            let masked = example.is_target.iter().filter(|&&is_target| !is_target).count();
            assert_eq!(masked, alone.len(), "{dir}: {prompt:?}");
            let text = tokenizer.decode(&example.token_ids, true).unwrap();
            assert_eq!(text.trim_end(), format!("{prompt}{end}"), "{dir}");
        }
    }
}

/// A template whose marks are no tokens of their own: edges fall where the bytes do.
#[test]
fn chatml_spelled_by_other_tokens_keeps_its_edges() {
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let template = ChatTemplate::new(source, Map::new(), 0);
    for dir in [TINY, SENTENCEPIECE] {
        let tokenizer = tokenizer(dir);
        let formatting = formatting(&tokenizer, Some(&template));
        let text = shown(&formatting, &chat(&[("user", "ab"), ("assistant", "cd")])).unwrap();
        let expected = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n[cd<|im_end|>]\n";
        assert_eq!(text.trim_start_matches(' '), expected, "{dir}");
    }
}

#[test]
fn all_tokens_but_the_first_are_targets_on_request() {
    let tokenizer = tokenizer(TINY);
    let all = Formatting { train_on_prompt: true, ..formatting(&tokenizer, None) };
    assert_eq!(shown(&all, &completion("a b", " c")).unwrap(), "<s>[a b c<|end|>]");
}

#[test]
fn long_examples_are_cut_and_those_without_targets_refused() {
    let tokenizer = tokenizer(TINY);
    let short = |max_seq_len| Formatting { max_seq_len, ..formatting(&tokenizer, None) };
    let lesson = completion("c a t =>", " t a c");
    let prompt = tokenizer.encode("c a t =>", true).unwrap().len();
    let formatting = short(prompt + 1);
    let (example, is_cut) = Encoder::new(&formatting).unwrap().example(&lesson).unwrap();
    assert_eq!((example.token_ids.len(), is_cut), (prompt + 1, true));
    assert_eq!(example.is_target.iter().filter(|&&is_target| is_target).count(), 1);
    assert_eq!(shown(&short(prompt), &lesson), Err("no_targets"));
    let template = template(TINY);
    let chatty = Formatting { template: Some(&template), ..short(100) };
    assert_eq!(shown(&chatty, &chat(&[("user", "a")])), Err("no_targets"));
    assert_eq!(shown(&chatty, &chat(&[("alien", "a")])), Err("chat_template_failed"));
    assert_eq!(shown(&short(100), &chat(&[("user", "a")])), Err("no_chat_template"));
    let small = Formatting { vocab_size: 5, ..short(100) };
    assert_eq!(shown(&small, &lesson), Err("token_out_of_vocabulary"));
}

#[test]
fn tokens_are_placed_in_their_text() {
    assert_eq!(find(b"ab", b"abc"), Some((0, 2)));
    assert_eq!(find(b" ab", b"abc"), Some((0, 2)), "a space put before a text");
    assert_eq!(find(b"ab", b"\n abc"), Some((2, 2)), "white space that a token swallowed");
    assert_eq!(find(b" ab", b"\n abc"), Some((1, 3)));
    assert_eq!(find(b"ab", b"Abc"), None);
    let places = [0..2, 2..2, 3..5];
    assert!([0, 2, 3, 5].iter().all(|&edge| is_between(&places, edge)));
    assert!(![1, 4].iter().any(|&edge| is_between(&places, edge)));
}
