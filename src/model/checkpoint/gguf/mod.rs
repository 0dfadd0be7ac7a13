//! GGUF: llama.cpp's file format (ggml's docs/gguf.md), versions 2 and 3.

pub mod metadata;

pub use metadata::{Metadata, Value};
