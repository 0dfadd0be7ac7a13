//! Block-quantized weights as GGUF files hold them (ggml's types), used as they are.
//!
//! A row is a whole number of blocks. Formats and their arithmetic: ggml's
//! ggml-common.h and ggml-quants.c.

/// A type of block-quantized values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the field")]
pub enum QuantType {
    /// 32 values: f16 scale, 4 bits each, symmetric.
    Q4_0,
    /// 32 values: f16 scale and minimum, 4 bits each.
    Q4_1,
    /// 32 values: f16 scale, 5 bits each, symmetric.
    Q5_0,
    /// 32 values: f16 scale and minimum, 5 bits each.
    Q5_1,
    /// 32 values: f16 scale, 8 bits each.
    Q8_0,
    /// 256 values in 16 groups, 2 bits each.
    Q2_K,
    /// 256 values in 16 groups, 3 bits each.
    Q3_K,
    /// 256 values in 8 groups, 4 bits each.
    Q4_K,
    /// 256 values in 8 groups, 5 bits each.
    Q5_K,
    /// 256 values in 16 groups, 6 bits each.
    Q6_K,
}

use QuantType::*;

impl QuantType {
    /// All types.
    pub const ALL: [QuantType; 10] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K];

    /// The type with ggml's number `id` (`enum ggml_type`).
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Some(match id {
            2 => Q4_0,
            3 => Q4_1,
            6 => Q5_0,
            7 => Q5_1,
            8 => Q8_0,
            10 => Q2_K,
            11 => Q3_K,
            12 => Q4_K,
            13 => Q5_K,
            14 => Q6_K,
            _ => return None,
        })
    }

    /// The name that `--quantize` takes and logs show.
    pub fn name(self) -> &'static str {
        match self {
            Q4_0 => "q4_0",
            Q4_1 => "q4_1",
            Q5_0 => "q5_0",
            Q5_1 => "q5_1",
            Q8_0 => "q8_0",
            Q2_K => "q2_k",
            Q3_K => "q3_k",
            Q4_K => "q4_k",
            Q5_K => "q5_k",
            Q6_K => "q6_k",
        }
    }

    /// Values of a block.
    pub fn block_len(self) -> usize {
        match self {
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => 32,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Q4_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Bytes of a row of `cols` values, a whole number of blocks.
    pub fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_len() * self.block_bytes()
    }
}
