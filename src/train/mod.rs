//! Fine-tuning: LoRA adapters trained beside a frozen model, data parallel and tensor
//! parallel.
//!
//! [`data`] turns a file into examples and says which of them a step trains on. The model is
//! that of [`crate::model`] loaded again with what backward passes need: no tape, but a
//! forward that keeps a few tensors a layer and a backward written beside it.

pub mod adamw;
pub mod batch;
pub mod checkpoint;
pub mod data;
pub mod device;
pub mod dropout;
pub mod early_stopping;
pub mod layer;
pub mod linear;
pub mod lora;
pub mod loss;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod parameters;
pub mod schedule;
pub mod trainer;
