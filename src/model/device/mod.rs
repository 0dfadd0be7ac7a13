//! The decoder on a device: what [`super::decoder`] computes on the CPU, by the kernels of
//! [`crate::device`].
//!
//! The layers are loaded by the same code, one at a time, and go to the device from where
//! they are mapped: families, formats, tensor-parallel shares and adapters are known to the
//! host's layers alone. [`decoder`] is a step from token ids to logits, [`layer`] a layer of it,
//! [`linear`] a projection with what adapters add to it. [`inputs`] packs a step's integers
//! into one copy, [`rotations`] keeps the tables of the rotary embedding, [`upload`] moves
//! weights.
//!
//! The residual stream is f32; norms round it to the type that products take (f32, f16 or
//! bf16), sums are f32 again. A decode step is recorded once for each bucket of batch sizes and
//! replayed, unless something in it asks the host (see [`decoder`]).
//!
//! Left out: layers spread over the devices of one rank, and weights that stay on the host.

pub mod decoder;
pub mod inputs;
pub mod layer;
pub mod linear;
pub mod rotations;
pub mod upload;

pub use decoder::{DeviceDecoder, DeviceOptions};
