//! `tokenizer.model` of SentencePiece: the few fields of its `ModelProto` that encoding
//! needs, and the tokenizer they make.
//!
//! Pieces are those of the sentencepiece library, character map, dummy prefix and white
//! space included. Two things are Hugging Face's: control symbols (`<s>`) are recognised
//! where the text spells them, and what follows one gets no dummy prefix unless
//! `tokenizer_config.json` says `legacy`. transformers' own `LlamaTokenizer` is not
//! followed where it leaves the dummy prefix out before a text that begins with a space
//! (343 of the 5,000 golden texts; 353 with `legacy`): the models were trained with it.
//!
//! Left out: the models `word` and `char`, the denormalizer, sampling.

use super::files::{AddedToken, SidecarFlags};
use super::merge::{Pairs, score_priority};
use super::normalize::{Charsmap, Normalizer};
use super::pieces::{DummyPrefix, PieceTokenizer, Segmenter, Spelling};
use super::specials::{Special, Specials};
use super::unigram::Unigram;
use super::vocabulary::{Kind, Prefixes, Token, Vocabulary};
use super::{Built, MAX_VOCABULARY_GAP};
use crate::{Error, Result};

/// A wire-format reader: what is left of a message.
struct Message<'a>(&'a [u8]);

/// A field's value; the widths that are not needed are skipped.
enum Field<'a> {
    Number(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Message<'a> {
    /// The next field's number and value, `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Other
            }
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => {
                let mut bytes = [0; 4];
                bytes.copy_from_slice(self.take(4)?);
                Field::Fixed32(bytes)
            }
            wire => return Err(Error::input(format!("wire type {wire} is not protobuf's"))),
        };
        Ok(Some((key >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Error::input("a number has more than ten bytes"))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        match self.0.split_at_checked(length) {
            Some((head, rest)) => {
                self.0 = rest;
                Ok(head)
            }
            None => Err(Error::input(format!(
                "the file ends inside a field ({length} bytes wanted, {} left)",
                self.0.len()
            ))),
        }
    }
}

/// What is read of a `ModelProto`, with the defaults of sentencepiece_model.proto.
#[derive(Debug)]
struct Model<'a> {
    tokens: Vec<Token>,
    scores: Vec<f32>,
    model_type: u64,
    treat_whitespace_as_suffix: bool,
    byte_fallback: bool,
    bos_piece: String,
    eos_piece: String,
    pad_piece: String,
    charsmap: &'a [u8],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

impl<'a> Model<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut model = Self {
            tokens: Vec::new(),
            scores: Vec::new(),
            model_type: UNIGRAM,
            treat_whitespace_as_suffix: false,
            byte_fallback: false,
            bos_piece: "<s>".into(),
            eos_piece: "</s>".into(),
            pad_piece: "<pad>".into(),
            charsmap: &[],
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        let mut message = Message(bytes);
        while let Some((number, field)) = message.next()? {
            match (number, field) {
                (1, Field::Bytes(bytes)) => model.piece(bytes)?,
                (2, Field::Bytes(bytes)) => model.trainer_spec(bytes)?,
                (3, Field::Bytes(bytes)) => model.normalizer_spec(bytes)?,
                _ => {}
            }
        }
        Ok(model)
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<()> {
        let (mut text, mut score, mut kind) = (String::new(), 0.0, Kind::Normal);
        let id = self.tokens.len();
        let mut message = Message(bytes);
        while let Some((number, field)) = message.next()? {
            match (number, field) {
                (1, Field::Bytes(bytes)) => text = utf8(bytes, "a piece")?,
                (2, Field::Fixed32(bytes)) => score = f32::from_le_bytes(bytes),
                (3, Field::Number(n)) => {
                    kind = kind_of(n as i64)
                        .ok_or_else(|| Error::input(format!("piece {id} is of type {n}")))?;
                }
                _ => {}
            }
        }
        if text.is_empty() || score.is_nan() {
            return Err(Error::input(format!("piece {id} has no text or no score")));
        }
        self.tokens.push(Token { text: text.into(), kind });
        self.scores.push(score);
        Ok(())
    }

    fn trainer_spec(&mut self, bytes: &[u8]) -> Result<()> {
        let mut message = Message(bytes);
        while let Some((number, field)) = message.next()? {
            match (number, field) {
                (3, Field::Number(n)) => self.model_type = n,
                (24, Field::Number(n)) => self.treat_whitespace_as_suffix = n != 0,
                (35, Field::Number(n)) => self.byte_fallback = n != 0,
                (46, Field::Bytes(bytes)) => self.bos_piece = utf8(bytes, "bos_piece")?,
                (47, Field::Bytes(bytes)) => self.eos_piece = utf8(bytes, "eos_piece")?,
                (48, Field::Bytes(bytes)) => self.pad_piece = utf8(bytes, "pad_piece")?,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer_spec(&mut self, bytes: &'a [u8]) -> Result<()> {
        let mut message = Message(bytes);
        while let Some((number, field)) = message.next()? {
            match (number, field) {
                (2, Field::Bytes(bytes)) => self.charsmap = bytes,
                (3, Field::Number(n)) => self.add_dummy_prefix = n != 0,
                (4, Field::Number(n)) => self.remove_extra_whitespaces = n != 0,
                (5, Field::Number(n)) => self.escape_whitespaces = n != 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts in the tokens that JSON files beside the model name and returns those that
    /// are new to it. One that repeats a piece only says whether that is special.
    fn add(&mut self, added: Vec<AddedToken>) -> Result<Vec<AddedToken>> {
        let mut new = Vec::new();
        for token in added {
            let id = token.id as usize;
            if id > self.tokens.len() + MAX_VOCABULARY_GAP {
                return Err(Error::input(format!(
                    "the added token {:?} has id {id}, far behind the {} pieces",
                    token.content,
                    self.tokens.len()
                )));
            }
            while self.tokens.len() <= id {
                let text = format!("[unused {}]", self.tokens.len()).into();
                self.tokens.push(Token { text, kind: Kind::Unused });
                self.scores.push(f32::MIN);
            }
            let piece = &mut self.tokens[id];
            if *piece.text != *token.content {
                let kind = if token.special { Kind::Control } else { Kind::UserDefined };
                *piece = Token { text: token.content.as_str().into(), kind };
                new.push(token);
            } else if token.special && piece.kind != Kind::Unknown {
                piece.kind = Kind::Control;
                new.push(token);
            }
        }
        Ok(new)
    }
}

/// The kinds by their number, in SentencePiece and in GGUF.
pub(super) fn kind_of(number: i64) -> Option<Kind> {
    Some(match number {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => return None,
    })
}

fn utf8(bytes: &[u8], what: &str) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Error::input(format!("{what} is not UTF-8")))
}

/// The tokenizer of a SentencePiece model.
///
/// Errors (input): the file is damaged, or its model is neither unigram nor BPE.
pub(super) fn build(bytes: &[u8], added: Vec<AddedToken>, flags: SidecarFlags) -> Result<Built> {
    let mut model = Model::parse(bytes)?;
    if model.tokens.is_empty() {
        return Err(Error::input("holds no pieces; it is not a SentencePiece model"));
    }
    let added = model.add(added)?;
    let vocabulary = Vocabulary::new(std::mem::take(&mut model.tokens))?;
    let control = |piece: &str| {
        let id = vocabulary.id(piece)?;
        vocabulary.get(id).is_some_and(|token| token.kind == Kind::Control).then_some(id)
    };
    let (bos, eos) = (control(&model.bos_piece), control(&model.eos_piece));
    let pad = control(&model.pad_piece);
    let unknown = vocabulary.first(Kind::Unknown);
    let specials = specials(&vocabulary, &added);
    let add_dummy_prefix = flags.add_prefix_space != Some(false) && model.add_dummy_prefix;
    let normalizer = Normalizer {
        charsmap: Charsmap::parse(model.charsmap)?,
        user_defined: user_defined(&vocabulary, &added),
        add_dummy_prefix,
        remove_extra_whitespaces: model.remove_extra_whitespaces,
        escape_whitespaces: model.escape_whitespaces,
        treat_whitespace_as_suffix: model.treat_whitespace_as_suffix,
    };
    let segmenter = match model.model_type {
        UNIGRAM => Segmenter::Unigram(Unigram::new(&vocabulary, model.scores)),
        BPE => Segmenter::Merge {
            pairs: pairs(&vocabulary, &model.scores),
            whole_words: false,
            user_defined: user_defined(&vocabulary, &added),
        },
        _ => {
            return Err(Error::input(
                "is a SentencePiece model of type word or char; farm reads unigram and bpe",
            ));
        }
    };
    let spelling = Spelling::SentencePiece {
        normalizer,
        dummy_prefix: match flags.legacy {
            true => DummyPrefix::AfterSpecial,
            false => DummyPrefix::Start,
        },
        escaped_user_defined: true,
        byte_fallback: model.byte_fallback,
        unknown,
    };
    let named =
        [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", pad)];
    let pieces = PieceTokenizer {
        vocabulary,
        specials,
        spelling,
        segmenter,
        bos: bos.filter(|_| flags.add_bos_token != Some(false)),
        eos: eos.filter(|_| flags.add_eos_token == Some(true)),
    };
    Ok(Built { bos, eos: eos.into_iter().collect(), named: pieces.names(&named), pieces })
}

/// Neighbours that merge: those that are a normal, user-defined or unused piece together.
fn pairs(vocabulary: &Vocabulary, scores: &[f32]) -> Pairs {
    let mergeable = |kind| matches!(kind, Kind::Normal | Kind::UserDefined | Kind::Unused);
    let priority =
        |(token, &score): (&Token, &f32)| mergeable(token.kind).then(|| score_priority(score));
    let tokens = vocabulary.iter().map(|(_, token)| token);
    Pairs::ByToken(tokens.zip(scores).map(priority).collect())
}

/// Control symbols, the unknown piece (as in HF), and the tokens that were added.
fn specials(vocabulary: &Vocabulary, added: &[AddedToken]) -> Specials {
    let control = |kind| matches!(kind, Kind::Control | Kind::Unknown);
    let control = vocabulary.iter().filter(|(_, token)| control(token.kind));
    let control = control.map(|(id, token)| Special {
        text: token.text.clone(),
        id,
        lstrip: false,
        rstrip: false,
    });
    let is_added = |id| added.iter().any(|token| token.id == id);
    let added_specials = added.iter().map(|token| Special {
        text: token.content.as_str().into(),
        id: token.id,
        lstrip: token.lstrip,
        rstrip: token.rstrip,
    });
    Specials::new(control.filter(|special| !is_added(special.id)).chain(added_specials).collect())
}

/// The model's own user-defined pieces, which belong to the text around them.
fn user_defined(vocabulary: &Vocabulary, added: &[AddedToken]) -> Prefixes {
    let own = vocabulary.iter().filter(|(id, token)| {
        token.kind == Kind::UserDefined && !added.iter().any(|added| added.id == *id)
    });
    Prefixes::new(own.map(|(id, token)| (&*token.text, id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of length-delimited bytes.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend(bytes);
        out
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let mut out = field(1, text.as_bytes());
        out.push(2 << 3 | 5);
        out.extend(score.to_le_bytes());
        out.extend([3 << 3, kind]);
        field(1, &out)
    }

    fn model() -> Vec<u8> {
        let pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("▁", 1), ("a", 1), ("▁a", 1)];
        let mut bytes: Vec<u8> =
            pieces.iter().flat_map(|&(text, kind)| piece(text, -1.0, kind)).collect();
        bytes.extend(field(2, &[3 << 3, 2]));
        bytes.extend(field(3, &[4 << 3, 0]));
        bytes
    }

    #[test]
    fn a_model_is_read_and_added_tokens_are_put_behind_it() {
        let added =
            AddedToken { id: 7, content: "<|x|>".into(), special: true, ..Default::default() };
        let built = build(&model(), vec![added], SidecarFlags::default()).unwrap();
        let pieces = &built.pieces;
        assert_eq!(pieces.encode("a a", true), [1, 5, 5]);
        assert_eq!(pieces.encode("<s>a<|x|> a?", false), [1, 4, 7, 5, 0]);
        assert_eq!(pieces.decode(&[1, 5, 7, 5], true), "a a");
        assert_eq!((built.bos, built.eos.as_slice()), (Some(1), &[2][..]));
        assert_eq!(built.named["unk_token"], "<unk>");
        assert_eq!((pieces.vocabulary.len(), pieces.token_bytes(5)), (8, b" a".to_vec()));
        let legacy = SidecarFlags { legacy: true, add_eos_token: Some(true), ..Default::default() };
        let built = build(&model(), vec![], legacy).unwrap();
        assert_eq!(built.pieces.encode("<s>a", true), [1, 1, 5, 2]);
    }

    #[test]
    fn damaged_files_are_errors() {
        let sound = model();
        for end in 0..sound.len() {
            // Some beginnings are whole messages; none may panic.
            let _ = build(&sound[..end], vec![], SidecarFlags::default());
        }
        for bit in 0..sound.len() * 8 {
            let mut flipped = sound.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(built) = build(&flipped, vec![], SidecarFlags::default()) {
                built.pieces.decode(&built.pieces.encode(" a <s>aé\0", true), false);
            }
        }
        let huge =
            [&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f][..], b"x"].concat();
        for bytes in [&b""[..], b"\0\0\0", &[0xff; 40], &huge] {
            let error = build(bytes, vec![], SidecarFlags::default()).err().expect("damaged");
            assert_eq!(error.kind, crate::ErrorKind::Input);
        }
        let far = AddedToken { id: u32::MAX, content: "x".into(), ..Default::default() };
        assert!(build(&sound, vec![far], SidecarFlags::default()).is_err());
    }
}
