//! Rotary position embedding: cos and sin tables, and its scaling variants.
//!
//! Formulas: transformers' modeling_rope_utils.py. Dynamic NTK depends on the
//! length of the sequence; as in HF's generation with a cache, the prompt's tokens
//! use the prompt's length and each new token its own position, so that neither
//! chunks of the prefill nor a recomputation changes a value.

use super::config::{ModelConfig, RopeScaling};

/// Tables of cos and sin for every position up to the longest sequence.
pub struct RotaryEmbedding {
    half: usize,
    /// `[positions][head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    dynamic: Option<Dynamic>,
}

struct Dynamic {
    theta: f64,
    factor: f64,
    max_position_embeddings: usize,
}

impl RotaryEmbedding {
    /// Tables for positions `0..max_seq_len`.
    pub fn new(config: &ModelConfig, max_seq_len: usize) -> Self {
        let dim = config.head_dim;
        let (inv_freq, attention_factor) = frequencies(config);
        let angles = (0..max_seq_len)
            .flat_map(|p| inv_freq.iter().map(move |f| p as f32 * f))
            .map(|a| cos_sin(a, attention_factor));
        let (cos, sin) = angles.unzip();
        let dynamic = match config.rope.scaling {
            RopeScaling::Dynamic { factor } => Some(Dynamic {
                theta: config.rope.theta,
                factor,
                max_position_embeddings: config.max_position_embeddings,
            }),
            _ => None,
        };
        Self { half: dim / 2, cos, sin, dynamic }
    }

    /// Calls `f(cos, sin)` with the `head_dim / 2` values of `position`, in a
    /// sequence whose prompt has `prompt_len` tokens.
    pub fn at<R>(
        &self,
        position: usize,
        prompt_len: usize,
        f: impl FnOnce(&[f32], &[f32]) -> R,
    ) -> R {
        if let Some(dynamic) = &self.dynamic {
            let seq_len = prompt_len.max(position + 1);
            if seq_len > dynamic.max_position_embeddings {
                let (cos, sin): (Vec<f32>, Vec<f32>) = dynamic
                    .frequencies(seq_len, self.half * 2)
                    .iter()
                    .map(|f| position as f32 * f)
                    .map(|a| cos_sin(a, 1.0))
                    .unzip();
                return f(&cos, &sin);
            }
        }
        let range = position * self.half..(position + 1) * self.half;
        f(&self.cos[range.clone()], &self.sin[range])
    }
}

impl Dynamic {
    fn frequencies(&self, seq_len: usize, dim: usize) -> Vec<f32> {
        let stretch = self.factor * seq_len as f64 / self.max_position_embeddings as f64
            - (self.factor - 1.0);
        let d = dim as f64;
        plain_frequencies(self.theta * stretch.powf(d / (d - 2.0)), dim)
    }
}

/// In f64, then rounded: the C library's f32 functions differ between CPUs.
fn cos_sin(angle: f32, factor: f32) -> (f32, f32) {
    let angle = f64::from(angle);
    (angle.cos() as f32 * factor, angle.sin() as f32 * factor)
}

/// `1 / theta^(2i/dim)`.
fn plain_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| 1.0 / (theta.powf(f64::from(2.0 * i as f32 / dim as f32)) as f32))
        .collect()
}

/// Inverse frequencies and the factor of cos and sin.
fn frequencies(config: &ModelConfig) -> (Vec<f32>, f32) {
    let plain = plain_frequencies(config.rope.theta, config.head_dim);
    match config.rope.scaling {
        // Dynamic: plain until the sequence is longer than the trained context.
        RopeScaling::Default | RopeScaling::Dynamic { .. } => (plain, 1.0),
        RopeScaling::Linear { factor } => {
            (plain.into_iter().map(|f| f / factor as f32).collect(), 1.0)
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        } => {
            let original = original as f64;
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
            (yarn_frequencies(config, &plain), attention_factor as f32)
        }
    }
}

fn yarn_frequencies(config: &ModelConfig, plain: &[f32]) -> Vec<f32> {
    let RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast,
        beta_slow,
        truncate,
        ..
    } = config.rope.scaling
    else {
        unreachable!("called for YaRN only")
    };
    let dim = config.head_dim as f64;
    // The dimension that turns `rotations` times over the original context.
    let dimension = |rotations: f64| {
        dim * (original as f64 / (rotations * std::f64::consts::TAU)).ln()
            / (2.0 * config.rope.theta.ln())
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
