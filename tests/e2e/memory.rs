//! Memory does not grow with the input.

use std::fmt::Write;

use crate::common::farm::{Farm, Launch, Scratch, golden};
use crate::common::has_mpirun;

/// Most resident memory of a rank over a run of `lines` short prompts.
fn peak_bytes(scratch: &Scratch, launch: Launch, lines: usize) -> f64 {
    let mut text = String::new();
    for i in 0..lines {
        let _ = writeln!(text, "{{\"id\":\"record {i}\",\"prompt\":\"cat {}\"}}", i % 97);
    }
    let name = format!("{launch:?} {lines}");
    let farm: Farm = scratch.farm(&name, launch, "generate").model(golden("llama_gqa"));
    let farm = farm.prompts(scratch.file(&format!("{name}.jsonl"), text));
    let farm = farm.args(["--max-new-tokens", "1", "--max-seq-len", "64"]);
    farm.ends_with(0);
    assert_eq!(farm.records().len(), lines);
    let stats = farm.stats();
    assert_eq!(stats["records"], lines);
    stats["peak_resident_bytes_max"].as_f64().expect("a number")
}

/// The hand-out looks ahead by a bounded number of records, which both runs exceed.
#[test]
fn three_times_the_lines_take_no_more_memory() {
    let scratch = Scratch::new();
    let launch = if has_mpirun() { Launch::Mpirun(2) } else { Launch::Alone };
    let [small, large] = [20_000, 60_000].map(|lines| peak_bytes(&scratch, launch, lines));
    assert!(large <= 1.1 * small, "{small} bytes, then {large}");
}
