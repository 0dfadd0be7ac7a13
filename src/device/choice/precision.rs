//! What a device computes in: from `--dtype`, the checkpoint and the card.

use serde::{Deserialize, Serialize};

/// A type to compute in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Float {
    /// 32-bit.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Float {
    /// The name that `--dtype` takes.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::Bf16 => "bf16",
        }
    }
}

/// What a checkpoint's matrices are stored as, most of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Floats.
    Float(Float),
    /// Blocks of few bits, widened as they are used.
    Quantized,
}

/// A type to compute in, and what the user should know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Precision {
    /// The type.
    pub float: Float,
    /// Why it is another one than asked for or stored.
    pub note: Option<String>,
}

/// The first compute capability with arithmetic in bf16 (Ampere).
const BF16_FROM: (u32, u32) = (8, 0);

/// The type to compute in where `asked` is the flag (`None`: auto) and `capability` the least
/// of the job's cards, so that no record depends on the card that it comes to.
///
/// Auto keeps the checkpoint's own, f32 included: its author may have had a reason, and
/// `--dtype bf16` is one word. Quantized weights have more room in bf16 than they need.
/// A card without bf16 takes f16, whose largest value is 65504.
pub fn precision(asked: Option<Float>, stored: Stored, capability: (u32, u32)) -> Precision {
    let wanted = asked.unwrap_or(match stored {
        Stored::Float(float) => float,
        Stored::Quantized if capability < BF16_FROM => Float::F16,
        Stored::Quantized => Float::Bf16,
    });
    if wanted == Float::Bf16 && capability < BF16_FROM {
        let (major, minor) = capability;
        let note = format!(
            "computing in f16: a card of compute capability {major}.{minor} has no bf16 (from 8.0 \
             on); where texts come out broken, values are past f16's range: --dtype f32"
        );
        return Precision { float: Float::F16, note: Some(note) };
    }
    let note = (wanted == Float::F32 && asked.is_none()).then(|| {
        "computing in f32 as the checkpoint is stored; --dtype bf16 takes half the memory and the \
         tensor cores"
            .to_owned()
    });
    Precision { float: wanted, note }
}

#[cfg(test)]
mod tests {
    use super::Float::{Bf16, F16, F32};
    use super::*;

    const VOLTA: (u32, u32) = (7, 0);
    const HOPPER: (u32, u32) = (9, 0);

    /// (flag, checkpoint, card, computed in, whether that is said)
    #[test]
    fn the_card_bounds_what_the_flag_and_the_checkpoint_ask_for() {
        let float = Stored::Float;
        for (asked, stored, card, expected, said) in [
            (None, float(Bf16), HOPPER, Bf16, false),
            (None, float(Bf16), (8, 0), Bf16, false),
            (None, float(Bf16), (7, 5), F16, true),
            (None, float(Bf16), VOLTA, F16, true),
            (None, float(F16), HOPPER, F16, false),
            (None, float(F16), VOLTA, F16, false),
            (None, float(F32), HOPPER, F32, true),
            (None, float(F32), VOLTA, F32, true),
            (None, Stored::Quantized, HOPPER, Bf16, false),
            (None, Stored::Quantized, VOLTA, F16, false),
            (Some(F32), float(Bf16), HOPPER, F32, false),
            (Some(F32), float(F32), VOLTA, F32, false),
            (Some(Bf16), float(F32), HOPPER, Bf16, false),
            (Some(Bf16), float(F32), VOLTA, F16, true),
            (Some(Bf16), Stored::Quantized, VOLTA, F16, true),
            (Some(F16), float(Bf16), HOPPER, F16, false),
            (Some(F32), Stored::Quantized, HOPPER, F32, false),
        ] {
            let found = precision(asked, stored, card);
            let name = format!("{asked:?} {stored:?} {card:?}");
            assert_eq!((found.float, found.note.is_some()), (expected, said), "{name}");
        }
    }

    #[test]
    fn a_card_without_bf16_says_so() {
        let note = precision(None, Stored::Float(Bf16), VOLTA).note.unwrap();
        assert!(note.contains("f16") && note.contains("7.0"), "{note}");
    }
}
