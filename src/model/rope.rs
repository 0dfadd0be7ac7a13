//! Rotary position embedding: cos and sin tables, and its scaling variants.
//!
//! Formulas: transformers' modeling_rope_utils.py. Dynamic NTK and LongRoPE depend on the
//! length of the sequence; as in HF's generation with a cache, the prompt's tokens
//! use the prompt's length and each new token its own position, so that neither
//! chunks of the prefill nor a recomputation changes a value.

use super::config::{RopeConfig, RopeScaling};

/// The rotations of every position. They are computed when asked for: a table would take
/// longer to make and more memory (a context of 131,072 tokens: 64 MiB a rank) than it saves.
pub struct RotaryEmbedding {
    rotary_dim: usize,
    interleaved: bool,
    inv_freq: Vec<f32>,
    /// Factor of cos and sin.
    attention_factor: f32,
    by_length: ByLength,
}

/// What changes once a sequence has grown.
enum ByLength {
    Nothing,
    Dynamic { theta: f64, factor: f64, max_position_embeddings: usize },
    Longer { inv_freq: Vec<f32>, than: usize },
}

impl RotaryEmbedding {
    /// The embedding of a model that was trained on `max_position_embeddings`.
    pub fn new(rope: &RopeConfig, max_position_embeddings: usize) -> Self {
        let (inv_freq, attention_factor) = frequencies(rope);
        let by_length = match &rope.scaling {
            RopeScaling::Dynamic { factor } => {
                ByLength::Dynamic { theta: rope.theta, factor: *factor, max_position_embeddings }
            }
            RopeScaling::LongRope { long_factor, original_max_position_embeddings, .. } => {
                ByLength::Longer {
                    inv_freq: divided(rope, long_factor),
                    than: *original_max_position_embeddings,
                }
            }
            _ => ByLength::Nothing,
        };
        Self {
            rotary_dim: rope.rotary_dim,
            interleaved: rope.interleaved,
            inv_freq,
            attention_factor,
            by_length,
        }
    }

    /// Values at the head's start that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Whether pairs are neighbours.
    pub fn interleaved(&self) -> bool {
        self.interleaved
    }

    /// Whether the position alone says how a token of a prompt of `prompt_len` tokens, or one
    /// after it, is rotated: as one of a prompt of no tokens.
    pub fn is_by_position(&self, position: usize, prompt_len: usize) -> bool {
        match &self.by_length {
            ByLength::Nothing => true,
            ByLength::Dynamic { max_position_embeddings: max, .. } => {
                prompt_len <= *max || position + 1 >= prompt_len
            }
            ByLength::Longer { than, .. } => prompt_len <= *than || position + 1 > *than,
        }
    }

    /// Appends to `cos` and `sin` the `rotary_dim / 2` values each of `position`, in a
    /// sequence whose prompt has `prompt_len` tokens.
    pub fn push(&self, position: usize, prompt_len: usize, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        let seq_len = prompt_len.max(position + 1);
        let mut push = |inv_freq: &[f32]| {
            for f in inv_freq {
                let (c, s) = cos_sin(position as f32 * f, self.attention_factor);
                cos.push(c);
                sin.push(s);
            }
        };
        match &self.by_length {
            ByLength::Dynamic { theta, factor, max_position_embeddings: max } if seq_len > *max => {
                push(&dynamic(*theta, *factor, *max, seq_len, self.rotary_dim));
            }
            ByLength::Longer { inv_freq, than } if seq_len > *than => push(inv_freq),
            _ => push(&self.inv_freq),
        }
    }
}

fn dynamic(theta: f64, factor: f64, max: usize, seq_len: usize, dim: usize) -> Vec<f32> {
    let stretch = factor * seq_len as f64 / max as f64 - (factor - 1.0);
    let d = dim as f64;
    plain_frequencies(theta * stretch.powf(d / (d - 2.0)), dim)
}

/// In f64, then rounded: the C library's f32 functions differ between CPUs.
fn cos_sin(angle: f32, factor: f32) -> (f32, f32) {
    let angle = f64::from(angle);
    (angle.cos() as f32 * factor, angle.sin() as f32 * factor)
}

/// `theta^(2i/dim)`.
fn wavelengths(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    (0..dim / 2).map(move |i| theta.powf(f64::from(2.0 * i as f32 / dim as f32)) as f32)
}

/// `1 / theta^(2i/dim)`.
fn plain_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    wavelengths(theta, dim).map(|w| 1.0 / w).collect()
}

/// `1 / (divisor · theta^(2i/dim))`.
fn divided(rope: &RopeConfig, divisors: &[f32]) -> Vec<f32> {
    wavelengths(rope.theta, rope.rotary_dim).zip(divisors).map(|(w, d)| 1.0 / (d * w)).collect()
}

/// Inverse frequencies and the factor of cos and sin.
fn frequencies(rope: &RopeConfig) -> (Vec<f32>, f32) {
    let plain = plain_frequencies(rope.theta, rope.rotary_dim);
    match &rope.scaling {
        // Dynamic: plain until the sequence is longer than the trained context.
        RopeScaling::Default | RopeScaling::Dynamic { .. } => (plain, 1.0),
        RopeScaling::Linear { factor } => {
            (plain.into_iter().map(|f| f / *factor as f32).collect(), 1.0)
        }
        RopeScaling::Divisors(divisors) => (divided(rope, divisors), 1.0),
        RopeScaling::LongRope { short_factor, attention_factor, .. } => {
            (divided(rope, short_factor), *attention_factor as f32)
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            let original = *original as f64;
            let scale = |f: f32| {
                let f = f64::from(f);
                let wavelength = std::f64::consts::TAU / f;
                if wavelength < original / high {
                    return f as f32;
                }
                if wavelength > original / low {
                    return (f / factor) as f32;
                }
                let smooth = (original / wavelength - low) / (high - low);
                ((1.0 - smooth) * f / factor + smooth * f) as f32
            };
            (plain.into_iter().map(scale).collect(), 1.0)
        }
        RopeScaling::Yarn { attention_factor, .. } => {
            (yarn_frequencies(rope, &plain), *attention_factor as f32)
        }
    }
}

fn yarn_frequencies(rope: &RopeConfig, plain: &[f32]) -> Vec<f32> {
    let RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast,
        beta_slow,
        truncate,
        ..
    } = rope.scaling
    else {
        unreachable!("called for YaRN only")
    };
    let dim = rope.rotary_dim as f64;
    // The dimension that turns `rotations` times over the original context.
    let dimension = |rotations: f64| {
        dim * (original as f64 / (rotations * std::f64::consts::TAU)).ln() / (2.0 * rope.theta.ln())
    };
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(i, f): (usize, &f32)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let f = f64::from(*f);
        (f / factor * ramp + f * (1.0 - ramp)) as f32
    };
    plain.iter().enumerate().map(blend).collect()
}
