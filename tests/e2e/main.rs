//! farm through its binary, from a prompts file to what it leaves: alone, with ranks as
//! threads, and under mpirun. Without an mpirun that part is left out, and says so.

#[path = "../common/mod.rs"]
mod common;

mod adapters;
#[cfg(any(feature = "emulator", feature = "cuda"))]
mod device;
mod finetune;
mod formats;
mod guided;
mod identical;
mod memory;
mod merge;
mod records;
mod refusals;
mod resume;
mod score;
mod staging;
mod submit;
