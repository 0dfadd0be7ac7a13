//! Devices.

pub mod choice;
