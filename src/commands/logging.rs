//! The log on stderr, as lines for people or as JSON.
//!
//! In a job of several ranks every line says rank and host; ranks other than 0 say
//! warnings and errors only, unless `FARM_LOG` or `RUST_LOG` asks for more
//! (`FARM_LOG=debug`, `FARM_LOG=farm::stage=debug,warn`). Ranks that are threads
//! (`--local-ranks`) name themselves with [`name_thread`].

use std::cell::RefCell;
use std::fmt::{self, Write as _};
use std::io::{self, Write};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::cli::LogFormat;
use crate::stats::progress::with_bar_hidden;
use crate::{Error, Result};

/// Who logs: filled in for every rank of a job of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankName {
    /// Rank in the world.
    pub rank: usize,
    /// Its host.
    pub host: String,
}

thread_local! {
    static THREAD_RANK: RefCell<Option<RankName>> = const { RefCell::new(None) };
}

/// Lines of this thread are of this rank (the process's own name stands otherwise).
pub fn name_thread(name: RankName) {
    THREAD_RANK.with(|cell| *cell.borrow_mut() = Some(name));
}

/// Starts logging; once a process, after the rank is known. `process` is `None` where one
/// process is the whole job.
///
/// # Errors
/// A usage error where `FARM_LOG` or `RUST_LOG` does not parse.
pub fn init(format: LogFormat, quiet: bool, process: Option<RankName>) -> Result<()> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let asked = ["FARM_LOG", "RUST_LOG"].into_iter().find_map(|n| Some((n, variable(n)?)));
    let filter = filter(asked.as_ref().map(|(name, text)| (*name, text.as_str())), quiet)?;
    let subscriber = tracing_subscriber::registry()
        .with(layer(format, process, asked.is_some(), StderrWriter).with_filter(filter));
    subscriber.try_init().map_err(|error| Error::fault(format!("starting the log: {error}")))
}

fn filter(asked: Option<(&str, &str)>, quiet: bool) -> Result<EnvFilter> {
    let (name, text) = asked.unwrap_or(("", if quiet { "warn" } else { "info" }));
    EnvFilter::try_new(text).map_err(|error| {
        Error::usage(format!("{name}={text}: {error}; use error, warn, info, debug or trace"))
    })
}

fn layer<S, W>(
    format: LogFormat,
    process: Option<RankName>,
    every_rank: bool,
    writer: W,
) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    tracing_subscriber::fmt::layer().with_writer(writer).event_format(Line {
        format,
        process,
        every_rank,
    })
}

/// Writes whole lines to stderr, with the progress bar taken away meanwhile.
struct StderrWriter;

impl<'a> MakeWriter<'a> for StderrWriter {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for StderrWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The formatter hands over one line at a time: written at once, lines of
        // several processes do not mix.
        // Where stderr takes no more (its disk is full) the run goes on without a log.
        let _ = with_bar_hidden(|| io::stderr().write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Formats an event: `2026-01-02T03:04:05.678901Z  INFO rank 3 node2: message key=value`, or a
/// JSON object with `time`, `level`, `rank`, `host`, `target`, `message` and the fields.
struct Line {
    format: LogFormat,
    process: Option<RankName>,
    every_rank: bool,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let thread = THREAD_RANK.with(|cell| cell.borrow().clone());
        let name = thread.as_ref().or(self.process.as_ref());
        let level = *event.metadata().level();
        // An empty line is not written at all.
        if !self.every_rank && level > Level::WARN && name.is_some_and(|name| name.rank != 0) {
            return Ok(());
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        match self.format {
            LogFormat::Text => text_line(&mut writer, level, name, &fields),
            LogFormat::Json => {
                let target = event.metadata().target();
                json_line(&mut writer, level, name, target, fields)
            }
        }
    }
}

fn text_line(
    writer: &mut Writer<'_>,
    level: Level,
    name: Option<&RankName>,
    fields: &Fields,
) -> fmt::Result {
    SystemTime.format_time(writer)?;
    write!(writer, " {level:>5} ")?;
    match name {
        Some(RankName { rank, host }) => write!(writer, "rank {rank} {host}: ")?,
        None => write!(writer, "farm: ")?,
    }
    // A message of several lines stays one line of the log.
    write!(writer, "{}", fields.message.trim_end().replace('\n', " | "))?;
    for (key, value) in &fields.others {
        match value {
            Value::String(text) => write!(writer, " {key}={text}")?,
            value => write!(writer, " {key}={value}")?,
        }
    }
    writeln!(writer)
}

fn json_line(
    writer: &mut Writer<'_>,
    level: Level,
    name: Option<&RankName>,
    target: &str,
    fields: Fields,
) -> fmt::Result {
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    let mut line = Map::new();
    line.insert("time".into(), time.into());
    line.insert("level".into(), level.as_str().to_lowercase().into());
    if let Some(name) = name {
        line.insert("rank".into(), name.rank.into());
        line.insert("host".into(), name.host.as_str().into());
    }
    line.insert("target".into(), target.into());
    line.insert("message".into(), fields.message.into());
    for (key, value) in fields.others {
        // The line's own keys win.
        line.entry(key).or_insert(value);
    }
    writeln!(writer, "{}", Value::Object(line))
}

/// The message and the other fields of an event.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => self.others.push((name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        // Writing to a String fails only where the value's own Debug does.
        let _ = write!(text, "{value:?}");
        self.add(field, text.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, rank: Option<usize>, every_rank: bool) -> String {
        let buffer = Buffer::default();
        let out = buffer.clone();
        let process = rank.map(|rank| RankName { rank, host: "node7".into() });
        let subscriber =
            tracing_subscriber::registry()
                .with(layer(format, process, every_rank, move || out.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(bytes = 12u64, file = "a b", "staged\nall");
            tracing::warn!("slow");
        });
        let text = buffer.0.lock().unwrap().clone();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn text_names_rank_and_host() {
        let text = logged(LogFormat::Text, Some(0), false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].ends_with("  INFO rank 0 node7: staged | all bytes=12 file=a b"),
            "{text}"
        );
        assert!(lines[1].ends_with("  WARN rank 0 node7: slow"), "{text}");
        assert!(logged(LogFormat::Text, None, false).contains(" INFO farm: staged"));
    }

    /// A thousand ranks that all say the same would bury what matters.
    #[test]
    fn other_ranks_only_warn_unless_asked() {
        let text = logged(LogFormat::Text, Some(3), false);
        assert!(text.lines().count() == 1 && text.contains("rank 3 node7: slow"), "{text}");
        assert_eq!(logged(LogFormat::Text, Some(3), true).lines().count(), 2);
    }

    #[test]
    fn json_lines_parse() {
        let text = logged(LogFormat::Json, Some(0), false);
        let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!((&line["rank"], &line["bytes"]), (&Value::from(0), &Value::from(12)));
        assert_eq!((&line["level"], &line["message"]), (&"info".into(), &"staged\nall".into()));
        assert_eq!((&line["host"], &line["file"]), (&"node7".into(), &"a b".into()));
    }

    #[test]
    fn a_thread_that_is_a_rank_says_so() {
        let text = std::thread::spawn(|| {
            name_thread(RankName { rank: 2, host: "here".into() });
            logged(LogFormat::Text, None, false)
        })
        .join()
        .unwrap();
        assert!(text.lines().count() == 1 && text.contains("rank 2 here: slow"), "{text}");
    }

    #[test]
    fn a_wrong_level_is_a_usage_error() {
        let error = filter(Some(("FARM_LOG", "farm=loud")), false).unwrap_err();
        assert_eq!(error.kind, crate::ErrorKind::Usage);
        assert!(error.message.starts_with("FARM_LOG=farm=loud: "), "{error}");
        assert!(
            filter(None, true).is_ok()
                && filter(Some(("RUST_LOG", "farm::stage=debug")), false).is_ok()
        );
    }
}
