//! Every record is done: of the launches that find this, one writes the output.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::OutputCounts;
use super::claims::{Claims, Standing};
use super::membership::Membership;
use crate::{Error, Result};

/// Writes the output by `write`, or waits for the launch that writes the same file. `None` if
/// `stop` says so meanwhile. A launch whose output is no file always writes its own.
///
/// # Errors
/// Those of `write` and of the run directory.
pub fn merge(
    claims: &mut Claims,
    membership: &mut Membership,
    file: Option<&Path>,
    now_seconds: f64,
    stop: &dyn Fn() -> bool,
    mut write: impl FnMut() -> Result<OutputCounts>,
) -> Result<Option<OutputCounts>> {
    let begun = Instant::now();
    let file = file.map(std::path::absolute).transpose().map_err(Error::fault)?;
    let file = file.map(|file| file.display().to_string());
    loop {
        let name = membership.merge_name();
        match claims.claim(&name, now_seconds + begun.elapsed().as_secs_f64())? {
            Standing::Mine => {
                let counts = write()?;
                let OutputCounts { records, errors } = counts;
                let done = json!({ "output": file, "records": records, "errors": errors });
                claims.complete(&name, &done)?;
                return Ok(Some(counts));
            }
            Standing::Done(done) if file.is_some() && done["output"] == json!(file) => {
                return Ok(Some(counts_of(&done)));
            }
            Standing::Done(_) => membership.next_merge(),
            _ if stop() => return Ok(None),
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// What a merge wrote, by its claim.
pub(super) fn counts_of(done: &Value) -> OutputCounts {
    let count = |name: &str| done[name].as_u64().unwrap_or_default();
    OutputCounts { records: count("records"), errors: count("errors") }
}
