use std::fs;

use super::*;

fn step(step: u64) -> TrainMetrics {
    TrainMetrics {
        step,
        epoch: step as f64 / 3.0,
        loss: 1.0 / step as f64,
        learning_rate: 1e-4,
        grad_norm: 0.1,
        tokens: 2048,
        tokens_per_second: 1e3,
        flop_share: None,
        memory_peak_bytes: Some(1 << 33),
        step_seconds: 2.048,
        skipped: false,
    }
}

fn lines(dir: &Path, name: &str) -> Vec<String> {
    fs::read_to_string(dir.join(name)).unwrap().lines().map(str::to_owned).collect()
}

/// Steps 1 to 4 and an evaluation after 2 and 4.
fn run(dir: &Path) -> MetricsLog {
    let mut log = MetricsLog::open(dir, None).unwrap();
    for n in 1..=4 {
        log.train(&step(n)).unwrap();
        if n % 2 == 0 {
            log.eval(&EvalMetrics::new(n, 0.5, 100)).unwrap();
        }
    }
    log
}

#[test]
fn what_was_noted_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let log = run(&dir.path().join("not/yet"));
    let dir = &dir.path().join("not/yet");
    let metrics = read_metrics(dir).unwrap();
    assert_eq!(metrics, *log.metrics());
    assert_eq!((metrics.train.len(), metrics.eval.len()), (4, 2));
    assert_eq!(metrics.eval[1].perplexity, 0.5f64.exp());
    assert_eq!(metrics.train_losses()[3], (4.0, 0.25));
    assert!(dir.join(PLOT_FILE).is_file());
    // An evaluation's row leaves the columns of a step empty.
    let table = lines(dir, CSV_FILE);
    assert_eq!(
        table[0],
        "kind,step,epoch,loss,perplexity,learning_rate,grad_norm,tokens,tokens_per_second,\
         flop_share,memory_peak_bytes,step_seconds,skipped"
    );
    assert_eq!(
        table[1],
        "train,1,0.3333333333333333,1.0,,0.0001,0.1,2048,1000.0,,8589934592,2.048,false"
    );
    assert_eq!(table[3], "eval,2,,0.5,1.6487212707001282,,,100,,,,,");
    assert_eq!(table.len(), 7);
}

/// Steps after the checkpoint come again; a kill may have torn the last line.
#[test]
fn a_resumed_run_drops_what_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    drop(run(dir.path()));
    let jsonl = dir.path().join(JSONL_FILE);
    let whole = fs::read_to_string(&jsonl).unwrap();
    fs::write(&jsonl, whole.trim_end().strip_suffix('}').unwrap()).unwrap();
    assert_eq!(read_metrics(dir.path()).unwrap().eval.len(), 1);

    let mut log = MetricsLog::open(dir.path(), Some(2)).unwrap();
    assert_eq!(log.metrics().train.len(), 2);
    for n in 3..=4 {
        log.train(&step(n)).unwrap();
    }
    log.eval(&EvalMetrics::new(4, 0.5, 100)).unwrap();
    assert_eq!(fs::read_to_string(&jsonl).unwrap(), whole);
    assert_eq!(lines(dir.path(), CSV_FILE).len(), 7);
}

#[test]
fn a_new_run_in_the_same_place_begins_empty() {
    let dir = tempfile::tempdir().unwrap();
    drop(run(dir.path()));
    drop(MetricsLog::open(dir.path(), None).unwrap());
    assert_eq!(read_metrics(dir.path()).unwrap(), Metrics::default());
    assert_eq!(lines(dir.path(), CSV_FILE).len(), 1);
}

#[test]
fn a_skipped_step_has_no_loss_but_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = MetricsLog::open(dir.path(), None).unwrap();
    let nothing =
        TrainMetrics { loss: f64::NAN, grad_norm: f64::INFINITY, skipped: true, ..step(1) };
    log.train(&nothing).unwrap();
    log.plot().unwrap();
    assert!(lines(dir.path(), JSONL_FILE)[0].contains("\"loss\":null"));
    let metrics = read_metrics(dir.path()).unwrap();
    assert!(metrics.train[0].loss.is_nan() && metrics.train[0].skipped);
    assert!(metrics.train_losses().is_empty());
}

/// A report names the damage; a run goes on without the line.
#[test]
fn a_damaged_line_is_named_or_dropped() {
    let dir = tempfile::tempdir().unwrap();
    drop(run(dir.path()));
    let mut damaged = lines(dir.path(), JSONL_FILE);
    damaged[1] = "{\"kind\":\"train\"}".into();
    fs::write(dir.path().join(JSONL_FILE), damaged.join("\n") + "\n").unwrap();
    let error = read_metrics(dir.path()).unwrap_err();
    assert_eq!(error.kind, crate::ErrorKind::Input);
    assert!(error.message.contains("metrics.jsonl:2: "), "{error}");
    let log = MetricsLog::open(dir.path(), Some(4)).unwrap();
    assert_eq!((log.metrics().train.len(), log.metrics().eval.len()), (3, 2));
    let error = read_metrics(&dir.path().join("none")).unwrap_err();
    assert!(error.message.contains("none/metrics.jsonl"), "{error}");
}
