//! The flags that take one of a few words.

use clap::ValueEnum;

use crate::kernels::quant::QuantType;

/// `--prompts-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PromptsFormat {
    /// By the file's ending.
    Auto,
    /// One prompt a line.
    Txt,
    /// One JSON object a line.
    Jsonl,
    /// Comma-separated values with a header.
    Csv,
}

/// `--generation-config`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum GenerationConfigSource {
    /// The model's generation_config.json sets defaults.
    #[default]
    Model,
    /// farm's own defaults alone.
    #[value(name = "none")]
    Ignore,
}

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// The checkpoint's own.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// A GPU where there is one that this farm can use.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, else an error.
    Cuda,
    /// GPU kernels on the CPU, for tests: slow.
    #[cfg(feature = "emulator")]
    #[value(hide = true)]
    Emulator,
}

/// `--quantize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    /// 8.5 bits a weight, blocks of 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits a weight, blocks of 256.
    #[value(name = "q4_k")]
    Q4K,
    /// 6.6 bits a weight, blocks of 256.
    #[value(name = "q6_k")]
    Q6K,
}

impl From<Quantize> for QuantType {
    fn from(quantize: Quantize) -> Self {
        match quantize {
            Quantize::Q8_0 => QuantType::Q8_0,
            Quantize::Q4K => QuantType::Q4_K,
            Quantize::Q6K => QuantType::Q6_K,
        }
    }
}

/// `--activations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActivationType {
    /// Rounded to generate, as they are to score.
    Auto,
    /// Rounded to 8 bits beside quantized weights, to bf16 beside bf16.
    Rounded,
    /// As they are.
    F32,
}

/// `--kernel-tier`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KernelTier {
    /// The best that the CPU has.
    Auto,
    /// Portable code.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512.
    Avx512,
}

/// `--stage-fallback`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StageFallback {
    /// Stop with an error.
    Error,
    /// Read the model where it lies.
    InPlace,
}

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `--schedule`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScheduleName {
    /// The learning rate stays.
    Constant,
    /// It falls to 0 in a straight line.
    Linear,
    /// It falls to 0 along half a cosine.
    Cosine,
}

/// `--format` of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdapterFormat {
    /// PEFT's directory.
    Peft,
    /// The same and a file for llama.cpp.
    Gguf,
}
