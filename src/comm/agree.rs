//! Agreement on failure: no collective follows fallible local work without it.

use serde::{Deserialize, Serialize};

use super::{Communicator, broadcast_vec};
use crate::{Error, Result};

/// What a rank that failed tells the others.
#[derive(Serialize, Deserialize)]
struct Failure {
    who: String,
    error: Error,
}

/// All ranks get their own value if all were `Ok`; else all get the same error, that of
/// the lowest failing rank, with its rank and host and the number of ranks that failed.
/// Every rank returns it, so that all leave alike; rank 0 prints it. Collective.
pub fn agree<T>(comm: &dyn Communicator, result: Result<T>) -> Result<T> {
    agree_as(comm, comm.rank(), result)
}

/// [`agree`] in a group whose members are known to the user by their `world_rank`.
pub(crate) fn agree_as<T>(
    comm: &dyn Communicator,
    world_rank: usize,
    result: Result<T>,
) -> Result<T> {
    if comm.size() == 1 {
        return result;
    }
    let mine = match &result {
        Ok(_) => Vec::new(),
        Err(error) => encode(&Failure {
            who: format!("rank {world_rank} on {}", comm.host()),
            error: error.clone(),
        }),
    };
    let verdict = comm
        .gather(0, &mine)
        .map(|all| verdict(&all).map_or_else(Vec::new, |error| encode(&error)))
        .unwrap_or_default();
    let verdict = broadcast_vec(comm, 0, verdict);
    match (verdict.is_empty(), result) {
        (true, result) => result,
        (false, _) => Err(decode(&verdict).unwrap_or_else(unreadable)),
    }
}

/// The one error that `reports` (a rank each, empty if it is fine) amount to.
fn verdict(reports: &[Vec<u8>]) -> Option<Error> {
    let failures: Vec<Failure> = reports
        .iter()
        .enumerate()
        .filter(|(_, report)| !report.is_empty())
        .map(|(rank, report)| {
            let unknown =
                |reason| Failure { who: format!("rank {rank}"), error: unreadable(reason) };
            decode(report).unwrap_or_else(unknown)
        })
        .collect();
    let first = failures.first()?;
    let ranks = reports.len();
    // What fails alike everywhere is no matter of one rank.
    let alike = failures.iter().all(|failure| failure.error == first.error);
    if failures.len() == ranks && alike {
        return Some(first.error.clone());
    }
    let mut error = first.error.clone().context(&first.who);
    if failures.len() > 1 {
        error.message += &format!(" ({} of {ranks} ranks failed)", failures.len());
    }
    Some(error)
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_else(|error| error.to_string().into_bytes())
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> std::result::Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

fn unreadable(reason: String) -> Error {
    Error::fault(format!("a rank's failure could not be read: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(who: &str, error: Option<Error>) -> Vec<u8> {
        error.map_or_else(Vec::new, |error| encode(&Failure { who: who.into(), error }))
    }

    #[test]
    fn the_lowest_failing_rank_speaks_for_all() {
        let fine = report("rank 0 on n0", None);
        let disk = |who| report(who, Some(Error::fault("disk full")));
        let text = |reports: &[Vec<u8>]| verdict(reports).map(|error| error.message);
        assert_eq!(text(&[fine.clone(), fine.clone()]), None);
        assert_eq!(
            text(&[fine.clone(), disk("rank 1 on n1"), fine.clone()]).as_deref(),
            Some("rank 1 on n1: disk full")
        );
        assert_eq!(
            text(&[fine, disk("rank 1 on n1"), disk("rank 2 on n2")]).as_deref(),
            Some("rank 1 on n1: disk full (2 of 3 ranks failed)")
        );
    }

    #[test]
    fn a_failure_shared_by_all_names_no_rank_and_keeps_its_kind() {
        let missing = |who| report(who, Some(Error::input("no such model")));
        assert_eq!(
            verdict(&[missing("rank 0 on n0"), missing("rank 1 on n1")]),
            Some(Error::input("no such model"))
        );
    }
}
