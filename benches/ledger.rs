//! What the ledger costs: how soon and with how much memory a run of a million records is
//! resumed, and the share of a run's time that goes into it.
//! `cargo bench --bench ledger [-- resume|overhead]`.
//!
//! All files lie in a temporary folder (`TMPDIR` says on which file system), which is removed.
//! The program measured is the farm built beside this bench, or `FARM_BIN`.

#[path = "support/ledger_overhead.rs"]
mod overhead;
#[path = "support/ledger_resume.rs"]
mod resume;

use std::path::{Path, PathBuf};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {
            resume::run();
            overhead::run();
        }
        ["resume"] => resume::run(),
        ["overhead"] => overhead::run(),
        [resume::LOST_LAUNCH, folder] => resume::lost_launch(Path::new(folder)),
        _ => panic!("cargo bench --bench ledger [-- resume|overhead]"),
    }
}

/// The smallest model there is: of all models the ledger's share is the highest with it.
fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")
}

/// The middle one; of an even number the mean of the two.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}
