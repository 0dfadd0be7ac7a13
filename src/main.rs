//! The `farm` binary: parse, run, leave with the agreed exit code.

fn main() {}
