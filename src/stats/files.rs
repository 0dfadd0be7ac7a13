//! Ranks' figures travel to rank 0, become `stats.json` and `ranks.csv`, and are read again.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Event, JobStats, RankStats};
use crate::comm::Communicator;
use crate::files::replace_file;
use crate::{Error, Result};

/// Name of the job's file in the run directory.
pub const STATS_FILE: &str = "stats.json";

/// Name of the ranks' file in the run directory.
pub const RANKS_FILE: &str = "ranks.csv";

/// What a rank sends to rank 0 at the end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RankReport {
    /// Its figures.
    pub stats: RankStats,
    /// Its events (empty at rank 0, which wrote them already).
    pub events: Vec<Event>,
}

/// Brings every rank's report to rank 0, in rank order; `None` elsewhere. Collective.
///
/// # Errors
/// A fault at rank 0 where a report does not parse (ranks of unequal versions).
pub fn gather(comm: &dyn Communicator, report: &RankReport) -> Result<Option<Vec<RankReport>>> {
    let bytes = serde_json::to_vec(report).expect("plain data serialises");
    comm.gather(0, &bytes).map(|all| parse_reports(&all)).transpose()
}

/// The ranks' reports, in rank order.
fn parse_reports(all: &[Vec<u8>]) -> Result<Vec<RankReport>> {
    let parse = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::fault(format!("statistics of rank {rank}: {error}")))
    };
    all.iter().enumerate().map(parse).collect()
}

/// Writes `stats.json` and `ranks.csv` into the run directory, each whole or not at all.
///
/// # Errors
/// A fault that names the file.
pub fn write_run(run_dir: &Path, job: &JobStats, ranks: &[RankStats]) -> Result<()> {
    // ranks.csv first: a run directory with stats.json has both.
    let mut table = csv::Writer::from_writer(Vec::new());
    for rank in ranks {
        table.serialize(rank).map_err(|error| Error::fault(format!("{RANKS_FILE}: {error}")))?;
    }
    let table =
        table.into_inner().map_err(|error| Error::fault(format!("{RANKS_FILE}: {error}")))?;
    replace_file(&run_dir.join(RANKS_FILE), &table)?;

    let mut text = serde_json::to_vec_pretty(job)
        .map_err(|error| Error::fault(format!("{STATS_FILE}: {error}")))?;
    text.push(b'\n');
    replace_file(&run_dir.join(STATS_FILE), &text)
}

/// Reads both files of a run directory.
///
/// # Errors
/// Input errors that name the file and line.
pub fn read_run(run_dir: &Path) -> Result<(JobStats, Vec<RankStats>)> {
    let unusable = |path: &Path, error: &dyn std::fmt::Display| {
        Error::input(format!("{}: {error}", path.display()))
    };
    let path = run_dir.join(STATS_FILE);
    let text = std::fs::read(&path).map_err(|error| unusable(&path, &error))?;
    let job = serde_json::from_slice(&text).map_err(|error| unusable(&path, &error))?;
    let path = run_dir.join(RANKS_FILE);
    let mut table = csv::Reader::from_path(&path).map_err(|error| unusable(&path, &error))?;
    let ranks =
        table.deserialize().collect::<Result<_, _>>().map_err(|error| unusable(&path, &error))?;
    Ok((job, ranks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{JobFacts, StageStats};

    /// Unknown figures stay unknown on the way through both files.
    #[test]
    fn files_give_back_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut ranks = vec![
            RankStats {
                host: "node,1".into(),
                last_work_at_seconds: Some(2.5),
                batch_mean: Some(0.1),
                ..Default::default()
            },
            RankStats {
                rank: 1,
                host: "node2".into(),
                kernel_tier: Some("avx2".into()),
                ..Default::default()
            },
        ];
        let facts = JobFacts { command: "generate".into(), complete: true, ..Default::default() };
        let job = JobStats::new(facts, Some(StageStats::new(1, 2, 0, 0.5)), &mut ranks);
        write_run(dir.path(), &job, &ranks).unwrap();
        assert_eq!(read_run(dir.path()).unwrap(), (job, ranks));
        assert!(!dir.path().join("stats.json.partial").exists());

        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join(STATS_FILE)).unwrap()).unwrap();
        assert_eq!(json["stage"]["bytes_staged"], 2);
        assert_eq!(json["command"], "generate");
        assert!(json["device_copied_bytes"].is_null());
    }

    #[test]
    fn a_rank_whose_report_does_not_parse_is_named() {
        let report = RankReport::default();
        let bytes = serde_json::to_vec(&report).unwrap();
        assert_eq!(
            parse_reports(&[bytes.clone(), bytes.clone()]),
            Ok(vec![report.clone(), report])
        );
        let error = parse_reports(&[bytes, b"{".to_vec()]).unwrap_err();
        assert!(error.message.starts_with("statistics of rank 1: "), "{error}");
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(STATS_FILE), "{").unwrap();
        let error = read_run(dir.path()).unwrap_err();
        assert_eq!(error.kind, crate::ErrorKind::Input);
        assert!(error.message.contains("stats.json"), "{error}");
    }
}
