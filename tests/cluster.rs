//! farm on a real Slurm cluster that tests/cluster/e2e.sh starts in namespaces. Where the
//! machine does not allow it, the script says why and the test counts as passed.

use std::path::Path;
use std::process::Command;

/// What the script leaves with where it cannot run.
const SKIPPED: i32 = 77;

#[test]
fn farm_under_slurm() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/e2e.sh");
    let ended = Command::new(&script).env("FARM_BIN", env!("CARGO_BIN_EXE_farm")).output();
    let ended = ended.unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    let said = [ended.stdout, ended.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    match ended.status.code() {
        Some(0) => println!("{said}"),
        Some(SKIPPED) => println!("skipped: {}", said.trim()),
        code => panic!("{} left with {code:?}:\n{said}", script.display()),
    }
}
