//! GPT-2's byte-level spelling, and the regular expressions that cut a text into words
//! before its bytes are merged.

use std::ops::Range;

use tokenizers::utils::SysRegex;

use crate::{Error, Result};

/// Cuts a text into words and spells their bytes.
#[derive(Debug)]
pub(super) struct ByteLevel {
    patterns: Vec<SysRegex>,
    alphabet: Box<[char; 256]>,
}

impl ByteLevel {
    /// Errors (fault): a pattern does not compile; they are farm's own.
    pub fn new(patterns: &[&str]) -> Result<Self> {
        let compile = |pattern: &&str| {
            SysRegex::new(pattern)
                .map_err(|error| Error::fault(format!("pre-tokenizer {pattern}: {error}")))
        };
        let patterns = patterns.iter().map(compile).collect::<Result<_>>()?;
        Ok(Self { patterns, alphabet: Box::new(alphabet()) })
    }

    /// The words of a text. Each pattern cuts what the one before left; what lies
    /// between two matches is a word too.
    pub fn split(&self, text: &str) -> Vec<Range<usize>> {
        let whole = 0..text.len();
        let mut words = vec![whole];
        for pattern in &self.patterns {
            let mut finer = Vec::with_capacity(words.len());
            for word in words {
                let mut end = word.start;
                for (from, to) in pattern.find_iter(&text[word.clone()]) {
                    let (from, to) = (word.start + from, word.start + to);
                    finer.push(end..from);
                    finer.push(from..to);
                    end = to;
                }
                finer.push(end..word.end);
            }
            finer.retain(|word| !word.is_empty());
            words = finer;
        }
        words
    }

    /// The character that stands for a byte.
    pub fn spell(&self, byte: u8) -> char {
        self.alphabet[usize::from(byte)]
    }
}

/// GPT-2's `bytes_to_unicode`: the printable Latin-1 characters stand for themselves,
/// the other 68 bytes, in order, are U+0100 and up.
fn alphabet() -> [char; 256] {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| {
        // At most 255.
        let byte = byte as u8;
        if printable(byte) { char::from(byte) } else { others.next().unwrap_or('\0') }
    })
}

fn printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// Undoes the spelling. A character that is outside of the alphabet stands for its UTF-8.
pub(super) fn byte_level_bytes(token: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for character in token.chars() {
        let code = character as u32;
        let byte = match u8::try_from(code) {
            Ok(byte) => printable(byte).then_some(byte),
            Err(_) => (0..=u8::MAX).filter(|&byte| !printable(byte)).nth(code as usize - 0x100),
        };
        match byte {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(character.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    bytes
}

/// A pre-tokenizer that `tokenizer.ggml.pre` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PreTokenizer {
    pub patterns: &'static [&'static str],
    /// A word that is a token stays whole, whatever the merges say.
    pub whole_words: bool,
    /// A text begins with BOS unless the file says otherwise.
    pub add_bos: bool,
}

impl PreTokenizer {
    /// llama.cpp's `default`.
    pub const DEFAULT: Self = Self::of(&[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]);

    const fn of(patterns: &'static [&'static str]) -> Self {
        Self { patterns, whole_words: false, add_bos: false }
    }

    const fn whole_words(self) -> Self {
        Self { whole_words: true, ..self }
    }

    const fn add_bos(self) -> Self {
        Self { add_bos: true, ..self }
    }

    /// By the names of llama.cpp (`llama_vocab::impl::load`, `llm_tokenizer_bpe`), of
    /// which those are left out that need more than regular expressions.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "default" => Self::DEFAULT,
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" | "jina-v5-nano" => Self::of(&[LLAMA3]).whole_words().add_bos(),
            "dbrx" | "smaug-bpe" | "chatglm-bpe" => Self::of(&[LLAMA3]),
            "glm4" | "glm5" => Self::of(&[LLAMA3]).whole_words(),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "stablelm2" | "megrez"
            | "hunyuan" | "solar-open" | "grok-2" => Self::of(&[QWEN2]),
            "qwen35" => Self::of(&[QWEN35]),
            "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "jina-v2-es" | "jina-v2-de"
            | "gigachat" | "a.x-4.0" | "mellum" | "exaone4" | "mpt" | "olmo" | "jais"
            | "trillion" | "granite-docling" => Self::of(&[GPT2]),
            "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone"
            | "minerva-7b" | "mellum2" => Self::of(&[r"\p{N}", GPT2]),
            "falcon" => Self::of(&[r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"]),
            "tekken" => Self::of(&[TEKKEN]).whole_words().add_bos(),
            "gpt-4o" | "llama4" | "kanana2" | "minimax-m2" => Self::of(&[GPT4O]),
            "deepseek-llm" => Self::of(&DEEPSEEK_LLM),
            "deepseek-coder" => Self::of(&DEEPSEEK_CODER),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => Self::of(&DEEPSEEK3),
            "bailingmoe" | "bailingmoe2" | "llada-moe" => Self::of(&[BAILING]),
            "seed-coder" => Self::of(&[SEED_CODER]),
            _ => return None,
        })
    }
}

/// Llama 3's pattern as its own tokenizer and tiktoken have it. (`(?i:…)` folds `ſ` to
/// `s`, which llama.cpp's [`LLAMA3`] does not.)
pub(super) const LLAMA3_TIKTOKEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
// llama.cpp knows no letter case beyond ASCII: other letters are upper and lower.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];
const DEEPSEEK_LLM: [&str; 6] = [
    r"[\r\n]",
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u{3001}-。]+",
    r"\s+$",
    CJK,
    r"\p{N}+",
];
const DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"];
// To llama.cpp white space beyond ASCII is a vertical tab, so no class by code points has it.
const CJK: &str = r"[[一-龥\u{800}-一가-\u{d7ff}]&&\S]+";

#[cfg(test)]
mod tests {
    use super::*;

    /// Logprobs report tokens by their bytes.
    #[test]
    fn the_spelling_is_undone() {
        assert_eq!(byte_level_bytes("Ġthe"), b" the");
        assert_eq!(byte_level_bytes("Ċ"), b"\n");
        assert_eq!(byte_level_bytes("Ã©"), "é".as_bytes());
        assert_eq!(byte_level_bytes("\u{143}"), [0xad]);
        for (byte, character) in (0..=u8::MAX).zip(alphabet()) {
            assert_eq!(byte_level_bytes(&character.to_string()), [byte]);
        }
    }

    #[test]
    fn words_cover_the_text() {
        let bytes = ByteLevel::new(PreTokenizer::named("falcon").unwrap().patterns).unwrap();
        let text = "It's  12345,  ok";
        let words: Vec<_> = bytes.split(text).into_iter().map(|range| &text[range]).collect();
        assert_eq!(words, ["It", "'", "s", " ", " ", "123", "45", ",", " ", " ok"]);
    }
}
