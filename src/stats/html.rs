//! The report as one HTML page: inline CSS and SVG, no scripts, nothing fetched.

use std::fmt::Write;

use super::format::{cell, count, cut, joules, known, percent, plural, rate, seconds};
use super::{Event, JobStats, RankStats};

/// Ranks that the plots show; of a bigger job the first ones (all are in `ranks.csv`).
const RANKS_SHOWN: usize = 64;
/// Geometry of the plots, pixels.
const WIDTH: f64 = 900.0;
const LABEL_WIDTH: f64 = 190.0;
const ROW_HEIGHT: f64 = 20.0;
const VALUE_WIDTH: f64 = 90.0;

/// The kinds of time in a rank's bar: CSS class and name.
const PHASES: [(&str, &str); 7] = [
    ("start", "start"),
    ("stage", "stage"),
    ("load", "load"),
    ("prefill", "prefill"),
    ("decode", "decode"),
    ("wait", "waiting and overhead"),
    ("tail", "idle tail"),
];

/// The page. `table` is the closing table, shown as it is printed.
pub fn page(job: &JobStats, ranks: &[RankStats], events: &[Event], table: &str) -> String {
    let shown = &ranks[..ranks.len().min(RANKS_SHOWN)];
    let facts = &job.facts;
    let title = escape(&format!("farm {} — {}", facts.command, facts.model));
    let mut body = format!("<h1>{title}</h1>\n{}", tiles(job));
    section(&mut body, "Where the time went", &(legend() + &time_bars(shown)));
    section(&mut body, "Decode tokens per second", &rate_bars(shown));
    if !events.is_empty() {
        section(&mut body, "Timeline", &timeline(events));
    }
    if shown.len() < ranks.len() {
        let _ = writeln!(body, "<p>The plots show {} of {} ranks.</p>", shown.len(), ranks.len());
    }
    section(&mut body, "All figures", &format!("<pre>{}</pre>\n", escape(table)));
    document(&title, &body)
}

/// A page that needs nothing else; the title is escaped already.
pub fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
         <style>{CSS}</style></head>\n<body>\n{body}</body></html>\n"
    )
}

const CSS: &str = "
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em}
h1{font-size:1.3em;overflow-wrap:anywhere}h2{font-size:1.05em;margin-top:2em}
.tiles{display:flex;flex-wrap:wrap;gap:.6em}
.tile{border:1px solid #8885;border-radius:6px;padding:.5em .8em;min-width:8em}
.tile b{display:block;font-size:1.25em}.tile span,.legend{font-size:.85em;opacity:.8}
svg{width:100%;height:auto;display:block}svg text{font-size:12px;fill:currentColor}
.legend i{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em;border-radius:2px}
.start{fill:#b8b8b8;background:#b8b8b8}.stage{fill:#8e6bbf;background:#8e6bbf}
.load{fill:#4f83cc;background:#4f83cc}.prefill{fill:#2a9d8f;background:#2a9d8f}
.decode{fill:#57b957;background:#57b957}.wait{fill:#e9b949;background:#e9b949}
.tail{fill:#d1495b;background:#d1495b}.grid{stroke:#8884}
pre{font-size:12px;overflow-x:auto;border:1px solid #8885;border-radius:6px;padding:.8em}
";

/// Adds a heading and what belongs to it.
pub fn section(body: &mut String, title: &str, content: &str) {
    let _ = write!(body, "<h2>{title}</h2>\n{content}");
}

/// The figures that people look for first.
fn tiles(job: &JobStats) -> String {
    let facts = &job.facts;
    let state = if facts.complete { "complete" } else { "stopped early" };
    let mut figures = vec![
        (format!("{} ({state})", count(job.records)), "records"),
        (count(job.records_failed), "failed"),
        (known(job.tokens_per_second, rate), "generated tokens/s"),
        (known(job.decode_tokens_per_second, rate), "decode tokens/s"),
        (known(job.prefill_tokens_per_second, rate), "prefill tokens/s"),
        (known(job.busy_share_mean, percent), "busy"),
        (known(job.idle_tail_seconds_max, seconds), "longest idle tail"),
        (seconds(job.total_seconds), "total"),
        (plural(job.ranks as u64, "rank"), "processes"),
        (known(facts.slurm.job_id, |id| id.to_string()), "Slurm job"),
    ];
    if job.device_memory_bytes_min.is_some() {
        figures.extend([
            (cut(&facts.devices, 40), "devices"),
            (known(job.device_busy_share_mean, percent), "devices busy"),
            (known(job.device_joules, joules), "energy of the devices"),
            (known(job.tokens_per_joule, rate), "tokens/J"),
        ]);
    }
    tiles_of(&figures)
}

/// Figures with what they are, side by side.
pub fn tiles_of(figures: &[(String, &str)]) -> String {
    let mut html = "<div class=\"tiles\">\n".to_owned();
    for (value, name) in figures {
        let _ =
            writeln!(html, "<div class=\"tile\"><b>{}</b><span>{name}</span></div>", escape(value));
    }
    html + "</div>\n"
}

fn legend() -> String {
    let entries: String =
        PHASES.iter().map(|(class, name)| format!("<i class=\"{class}\"></i>{name}")).collect();
    format!("<p class=\"legend\">{entries}</p>\n")
}

fn label(rank: &RankStats) -> String {
    format!("{} {}", rank.rank, cut(&rank.host, 20))
}

/// A stacked bar a rank: the sums of its kinds of time.
fn time_bars(ranks: &[RankStats]) -> String {
    let bars: Vec<Bar> = ranks
        .iter()
        .map(|rank| {
            let tail = rank.idle_tail_seconds.unwrap_or(0.0);
            let named = [
                rank.start_seconds,
                rank.stage_seconds,
                rank.load_seconds,
                rank.prefill_seconds,
                rank.decode_seconds,
            ];
            let waiting = (rank.total_seconds - named.iter().sum::<f64>() - tail).max(0.0);
            let parts = PHASES.iter().map(|p| p.0).zip(named.into_iter().chain([waiting, tail]));
            Bar {
                label: label(rank),
                parts: parts.collect(),
                value: cell(rank.busy_share, |share| format!("busy {}", percent(share))),
            }
        })
        .collect();
    bar_chart(&bars, "s")
}

/// A bar a tensor-parallel group.
fn rate_bars(ranks: &[RankStats]) -> String {
    let bars: Vec<Bar> = ranks
        .iter()
        .filter(|rank| rank.leads_group())
        .map(|rank| Bar {
            label: label(rank),
            parts: vec![("decode", rank.decode_tokens_per_second.unwrap_or(0.0))],
            value: known(rank.decode_tokens_per_second, rate),
        })
        .collect();
    bar_chart(&bars, "tokens/s")
}

struct Bar {
    label: String,
    /// CSS class and length of each part.
    parts: Vec<(&'static str, f64)>,
    /// Text at the end.
    value: String,
}

/// Horizontal stacked bars on one scale.
fn bar_chart(bars: &[Bar], unit: &str) -> String {
    let longest =
        bars.iter().map(|bar| bar.parts.iter().map(|p| p.1).sum::<f64>()).fold(0.0, f64::max);
    let axis = Axis::new(longest);
    let mut svg = svg_open(bars.len());
    axis.draw(&mut svg, bars.len(), unit);
    for (i, bar) in bars.iter().enumerate() {
        let y = i as f64 * ROW_HEIGHT;
        text(&mut svg, 0.0, y, &bar.label);
        let mut x = LABEL_WIDTH;
        for &(class, length) in &bar.parts {
            let width = axis.pixels(length);
            if width > 0.0 {
                let _ = writeln!(
                    svg,
                    "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" \
                     height=\"{:.1}\"><title>{class} {length:.3} {unit}</title></rect>",
                    y + 3.0,
                    ROW_HEIGHT - 6.0
                );
            }
            x += width;
        }
        text(&mut svg, x + 6.0, y, &bar.value);
    }
    svg + "</svg>\n"
}

/// A lane a rank, a dot an event, in the order of the ranks.
fn timeline(events: &[Event]) -> String {
    let mut lanes: Vec<(usize, &str)> =
        events.iter().map(|event| (event.rank, event.host.as_str())).collect();
    lanes.sort_unstable();
    lanes.dedup_by_key(|lane| lane.0);
    lanes.truncate(RANKS_SHOWN);
    let axis = Axis::new(events.iter().map(|event| event.at_seconds).fold(0.0, f64::max));
    let mut svg = svg_open(lanes.len());
    axis.draw(&mut svg, lanes.len(), "s");
    for (i, (rank, host)) in lanes.iter().enumerate() {
        let y = i as f64 * ROW_HEIGHT;
        text(&mut svg, 0.0, y, &format!("{rank} {}", cut(host, 20)));
        for event in events.iter().filter(|event| event.rank == *rank) {
            let _ = writeln!(
                svg,
                "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"><title>{} at {}</title></circle>",
                event_class(&event.event),
                LABEL_WIDTH + axis.pixels(event.at_seconds),
                y + ROW_HEIGHT / 2.0,
                escape(&event.event),
                escape(&seconds(event.at_seconds))
            );
        }
    }
    svg += "</svg>\n";

    svg += "<details><summary>Events</summary><pre>";
    for event in events {
        let fields = serde_json::to_string(&event.fields).unwrap_or_default();
        let fields = if event.fields.is_empty() { "" } else { fields.as_str() };
        let line = format!(
            "{:>12.3} s  {:>5}  {:<14} {fields}",
            event.at_seconds, event.rank, event.event
        );
        let _ = writeln!(svg, "{}", escape(line.trim_end()));
    }
    svg + "</pre></details>\n"
}

/// Events that end a phase have its colour.
fn event_class(name: &str) -> &'static str {
    match name {
        "stage" => "stage",
        "load" => "load",
        "first_token" => "prefill",
        "drain" => "wait",
        "done" => "decode",
        _ => "start",
    }
}

/// The scale of a plot, 0 to a round number.
struct Axis {
    step: f64,
    max: f64,
}

impl Axis {
    /// About five steps of 1, 2 or 5 times a power of ten.
    fn new(longest: f64) -> Self {
        let longest = if longest.is_finite() && longest > 0.0 { longest } else { 1.0 };
        let raw = longest / 5.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= raw * 0.999);
        let step = step.unwrap_or(power * 10.0);
        Self { step, max: (longest / step).ceil() * step }
    }

    fn pixels(&self, value: f64) -> f64 {
        value.max(0.0) / self.max * (WIDTH - LABEL_WIDTH - VALUE_WIDTH)
    }

    fn draw(&self, svg: &mut String, rows: usize, unit: &str) {
        let bottom = rows as f64 * ROW_HEIGHT;
        let steps = (self.max / self.step).round() as usize;
        for i in 0..=steps {
            let value = i as f64 * self.step;
            let x = LABEL_WIDTH + self.pixels(value);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom}\"/>"
            );
            // Steps are 1, 2 or 5 times a power of ten: as many decimals as that power asks.
            let decimals = (-self.step.log10().floor()).clamp(0.0, 6.0) as usize;
            let unit = if i == steps { format!(" {unit}") } else { String::new() };
            text(svg, x, bottom, &format!("{value:.decimals$}{unit}"));
        }
    }
}

fn svg_open(rows: usize) -> String {
    let height = (rows + 1) as f64 * ROW_HEIGHT;
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n")
}

/// Text in the row whose top is `y`.
fn text(svg: &mut String, x: f64, y: f64, content: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{:.1}\">{}</text>", y + 14.0, escape(content));
}

/// Text as it is written in a page.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{EventLog, JobFacts};
    use serde_json::json;
    use std::time::Duration;

    fn rank(rank: usize) -> RankStats {
        RankStats {
            rank,
            host: "n<1>".into(),
            load_seconds: 1.0,
            decode_seconds: 6.0,
            ready_at_seconds: 1.0,
            last_work_at_seconds: Some(8.0 - rank as f64),
            total_seconds: 9.0,
            decode_tokens_per_second: (rank == 0).then_some(120.0),
            ..RankStats::default()
        }
    }

    /// Names come from users and clusters; the page must neither break nor fetch anything.
    #[test]
    fn the_page_is_self_contained_and_escaped() {
        let mut ranks = vec![rank(0), rank(1)];
        let facts = JobFacts {
            command: "generate".into(),
            model: "<script>".into(),
            ..JobFacts::default()
        };
        let job = JobStats::new(facts, None, &mut ranks);
        let mut log = EventLog::new(0, "n<1>");
        log.emit(Duration::from_secs(2), "first_token", json!({"note": "</pre>"}));
        let html = page(&job, &ranks, log.events(), "a < b\n");
        for forbidden in ["<script", "n<1>", "http:", "https:", "src=", "\"</pre>\"", "NaN", "inf"]
        {
            assert!(!html.contains(forbidden), "{forbidden} in {html}");
        }
        for expected in
            ["&lt;script&gt;", "a &lt; b", "class=\"tail\"", "unavailable", "first_token at 2.0 s"]
        {
            assert!(html.contains(expected), "{expected} in {html}");
        }
        assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
        assert_eq!(html.matches("<svg").count(), 3);
    }

    #[test]
    fn axes_end_at_round_numbers() {
        for (longest, step, max) in
            [(9.0, 2.0, 10.0), (0.31, 0.1, 0.4), (100.0, 20.0, 100.0), (0.0, 0.2, 1.0)]
        {
            let axis = Axis::new(longest);
            assert!(
                (axis.step - step).abs() < 1e-9 && (axis.max - max).abs() < 1e-9,
                "{longest}: {} {}",
                axis.step,
                axis.max
            );
        }
        assert!(Axis::new(f64::NAN).max.is_finite());
    }

    #[test]
    fn big_jobs_keep_the_page_small() {
        let mut ranks: Vec<_> = (0..1000).map(rank).collect();
        let job = JobStats::new(JobFacts::default(), None, &mut ranks);
        let html = page(&job, &ranks, &[], "");
        assert!(html.contains("The plots show 64 of 1000 ranks.") && html.len() < 200_000);
    }
}
