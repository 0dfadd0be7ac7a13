//! CPU kernels with run-time dispatch.
