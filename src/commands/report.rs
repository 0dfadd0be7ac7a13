//! `farm report RUN_DIR`: the tables of a finished run again, or how a training went
//! (`training`), and the HTML page.

mod training;

use std::path::Path;

use crate::cli::ReportArgs;
use crate::commands::print;
use crate::files::replace_file;
use crate::stats::events::{EVENTS_FILE, last_attempt};
use crate::stats::files::{STATS_FILE, read_run};
use crate::stats::{closing_table, html};
use crate::{Error, Result};

/// Prints the tables on standard output and writes the page.
///
/// # Errors
/// Input errors where the directory is not a run's, or the run wrote no statistics yet.
pub fn run(args: &ReportArgs) -> Result<()> {
    print(&write_page(args)?)
}

/// Writes the page; the text to print.
fn write_page(args: &ReportArgs) -> Result<String> {
    let dir = &args.run_dir;
    if let Some(report) = training::report(dir)? {
        return write(args, &report.text, &report.page);
    }
    if !dir.join(STATS_FILE).is_file() {
        return Err(no_statistics(dir));
    }
    let (job, ranks) = read_run(dir)?;
    // Without events the page has no timeline; everything else stands.
    let events = std::fs::read(dir.join(EVENTS_FILE)).unwrap_or_default();
    let events = last_attempt(&String::from_utf8_lossy(&events));

    let table = closing_table(&job, &ranks);
    write(args, &table, &html::page(&job, &ranks, &events, &table))
}

fn write(args: &ReportArgs, text: &str, page: &str) -> Result<String> {
    let path = args.html.clone().unwrap_or_else(|| args.run_dir.join("report.html"));
    replace_file(&path, page.as_bytes())?;
    Ok(format!("{text}\n  page: {}\n", path.display()))
}

/// Says what is there instead of statistics.
fn no_statistics(dir: &Path) -> Error {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => return Error::input(format!("{}: {error}", dir.display())),
    };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let shown = match names.len() {
        0 => "it is empty".to_owned(),
        n if n > 8 => format!("it holds {} and {} more", names[..8].join(", "), n - 8),
        _ => format!("it holds {}", names.join(", ")),
    };
    let begun = names.iter().any(|name| name == EVENTS_FILE || name == "run.json");
    let dir = dir.display();
    if begun {
        Error::input(format!(
            "{dir}: the run has not finished: no {STATS_FILE} yet ({shown}); \
             start the same farm command again to finish it"
        ))
    } else {
        Error::input(format!(
            "{dir}: not a run directory: no {STATS_FILE}, run.json or finetune.json \
             ({shown})"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::stats::{EventLog, JobFacts, JobStats, RankStats, write_run};

    fn report(dir: &Path) -> Result<String> {
        write_page(&ReportArgs { run_dir: dir.to_owned(), html: None })
    }

    #[test]
    fn a_finished_run_gets_its_page() {
        let dir = tempfile::tempdir().unwrap();
        let mut ranks = [RankStats { host: "<node>".into(), ..RankStats::default() }];
        let job =
            JobStats::new(JobFacts { complete: true, ..JobFacts::default() }, None, &mut ranks);
        write_run(dir.path(), &job, &ranks).unwrap();
        report(dir.path()).unwrap();
        let mut log = EventLog::new(0, "<node>");
        log.attach(dir.path()).unwrap();
        log.emit(std::time::Duration::from_secs(1), "load", serde_json::json!({}));
        assert!(report(dir.path()).unwrap().contains("report.html"));
        let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
        assert!(page.contains("&lt;node&gt;") && !page.contains("<node>"), "{page}");
    }

    #[test]
    fn what_is_there_instead_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let message = |dir: &Path| {
            let error = report(dir).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Input);
            error.message
        };
        assert!(message(&dir.path().join("missing")).contains("No such file"));
        assert!(message(dir.path()).contains("not a run directory"));
        for name in ["run.json", "part-0.jsonl"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let text = message(dir.path());
        assert!(text.contains("not finished") && text.contains("part-0.jsonl, run.json"), "{text}");
    }
}
