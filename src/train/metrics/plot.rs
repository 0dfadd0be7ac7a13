//! The loss curve: as a picture that needs nothing else, and in characters.

use std::fmt::Write;

/// Size and margins of the picture, pixels.
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
/// Points of a curve at most: about one for two pixels.
const POINTS: usize = 400;
/// Curves up to this long have a dot at each point.
const DOTS: usize = 40;

/// Colours on light and on dark; a viewer that knows no media queries shows the light ones.
const CSS: &str = "
text{font:13px system-ui,sans-serif;fill:#444}.title{font-size:15px;font-weight:600}
.back{fill:#fff}.grid{stroke:#e4e4e4}.axis{stroke:#999}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.train{stroke:#3274c8}.eval{stroke:#d2691e}circle.train{fill:#3274c8}circle.eval{fill:#d2691e}
@media(prefers-color-scheme:dark){text{fill:#ccc}.back{fill:#16181d}.grid{stroke:#2e3138}
.axis{stroke:#777}.train{stroke:#6ea8f0}.eval{stroke:#f0a050}circle.train{fill:#6ea8f0}
circle.eval{fill:#f0a050}}
";

type Point = (f64, f64);

/// The curves of training and validation loss over the steps, as an SVG file. Long curves
/// show means of neighbouring points; what is not finite is left out.
pub fn loss_svg(train: &[Point], eval: &[Point]) -> String {
    let curves = [("train", "training", train), ("eval", "validation", eval)];
    let curves = curves.map(|(class, name, points)| (class, name, averaged(points, POINTS)));
    let all = || curves.iter().flat_map(|curve| &curve.2);
    let x = Axis::exact(all().map(|point| point.0));
    let y = Axis::round(all().map(|point| point.1));

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <title>Loss</title>\n<style>{CSS}</style>\n\
         <rect class=\"back\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    text(&mut svg, (LEFT, 26.0), "start", " class=\"title\"", "Loss");
    draw_axes(&mut svg, &x, &y);
    let mut legend = WIDTH - RIGHT;
    for (class, name, points) in curves.iter().rev().filter(|curve| !curve.2.is_empty()) {
        text(&mut svg, (legend, 26.0), "end", "", name);
        legend -= 8.0 * name.len() as f64 + 8.0;
        let _ = writeln!(
            svg,
            "<line class=\"curve {class}\" x1=\"{}\" x2=\"{legend}\" y1=\"22\" y2=\"22\"/>",
            legend - 22.0
        );
        legend -= 46.0;
        draw_curve(&mut svg, class, points, |point| {
            (LEFT + x.share(point.0) * (WIDTH - LEFT - RIGHT), height(y.share(point.1)))
        });
    }
    svg + "</svg>\n"
}

/// Pixels from the top of what is `share` of the way up.
fn height(share: f64) -> f64 {
    HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
}

fn draw_axes(svg: &mut String, x: &Axis, y: &Axis) {
    let right = WIDTH - RIGHT;
    for value in y.ticks() {
        let at = height(y.share(value));
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
        );
        text(svg, (LEFT - 8.0, at + 4.5), "end", "", &y.label(value));
    }
    let bottom = height(0.0);
    let _ = writeln!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>"
    );
    for value in x.ticks() {
        let at = LEFT + x.share(value) * (right - LEFT);
        let _ = writeln!(
            svg,
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\"/>",
            bottom + 5.0
        );
        text(svg, (at, bottom + 20.0), "middle", "", &x.label(value));
    }
    text(svg, ((LEFT + right) / 2.0, HEIGHT - 10.0), "middle", "", "step");
}

fn draw_curve(svg: &mut String, class: &str, points: &[Point], place: impl Fn(&Point) -> Point) {
    let line: Vec<String> = points
        .iter()
        .map(|point| {
            let (x, y) = place(point);
            format!("{x:.1},{y:.1}")
        })
        .collect();
    let _ = writeln!(svg, "<polyline class=\"curve {class}\" points=\"{}\"/>", line.join(" "));
    if points.len() <= DOTS {
        for point in points {
            let (x, y) = place(point);
            let _ = writeln!(
                svg,
                "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\">\
                 <title>step {}: {:.4}</title></circle>",
                point.0, point.1
            );
        }
    }
}

fn text(svg: &mut String, (x, y): Point, anchor: &str, more: &str, content: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{more}>{content}</text>"
    );
}

/// The finite points, or means of equally many neighbours where there are more than `most`.
fn averaged(points: &[Point], most: usize) -> Vec<Point> {
    let finite: Vec<Point> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let neighbours = finite.len().div_ceil(most.max(1)).max(1);
    let mean = |points: &[Point]| {
        let count = points.len() as f64;
        let sum = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    finite.chunks(neighbours).map(mean).collect()
}

/// A scale with ticks at round numbers.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

impl Axis {
    /// From the lowest to the highest value.
    fn exact(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = values
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        let (low, high) = match () {
            () if low > high => (0.0, 1.0),
            () if low == high => (low - 0.5, high + 0.5),
            () => (low, high),
        };
        // At most six steps of 1, 2 or 5 times a power of ten.
        let raw = (high - low) / 6.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0].map(|m| m * power).into_iter().find(|step| *step >= raw * 0.999);
        Self { low, high, step: step.unwrap_or(power * 10.0) }
    }

    /// The same, out to the next ticks.
    fn round(values: impl Iterator<Item = f64>) -> Self {
        let Self { low, high, step } = Self::exact(values);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    /// How far up the scale `value` is, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let first = (self.low / self.step - 1e-6).ceil() as i64;
        let last = (self.high / self.step + 1e-6).floor() as i64;
        (first..=last).map(|i| i as f64 * self.step)
    }

    /// As many decimals as the steps have.
    fn label(&self, value: f64) -> String {
        let decimals = (-self.step.log10().floor()).clamp(0.0, 9.0) as usize;
        // Adding 0 turns -0 into 0.
        format!("{:.decimals$}", value + 0.0)
    }
}

/// A curve for terminals, `width` × `height` characters: braille dots, the highest and lowest
/// value at the left, the first and last step below. Empty where there is nothing to show.
pub fn curve(points: &[Point], width: usize, height: usize) -> String {
    let all = averaged(points, usize::MAX);
    let (Some(first), Some(last)) = (all.first(), all.last()) else { return String::new() };
    let y = Axis::exact(all.iter().map(|point| point.1));
    let [top, bottom] = [y.high, y.low].map(|value| format!("{value:.4}"));
    let margin = top.len().max(bottom.len());
    let columns = width.saturating_sub(margin + 2).max(1);
    let rows = height.saturating_sub(1).max(1);

    let points = averaged(points, columns * 2);
    let x = Axis::exact(points.iter().map(|point| point.0));
    let mut canvas = Canvas::new(columns, rows);
    let place = |point: &Point| {
        let (right, down) = (columns * 2 - 1, rows * 4 - 1);
        let up = y.share(point.1).clamp(0.0, 1.0);
        (x.share(point.0) * right as f64, (1.0 - up) * down as f64)
    };
    let places: Vec<Point> = points.iter().map(place).collect();
    for pair in places.windows(2) {
        canvas.line(pair[0], pair[1]);
    }
    if let [only] = places[..] {
        canvas.line(only, only);
    }

    let mut drawn = String::new();
    for (row, line) in canvas.lines().enumerate() {
        let label = match row {
            0 => top.as_str(),
            row if row + 1 == rows => bottom.as_str(),
            _ => "",
        };
        let _ = writeln!(drawn, "{label:>margin$} │{}", line.trim_end_matches('\u{2800}'));
    }
    let (first, last) = (format!("{:.0}", first.0), format!("{:.0}", last.0));
    let gap = columns.saturating_sub(first.len());
    let _ = writeln!(drawn, "{:margin$}  {first}{last:>gap$}", "");
    drawn
}

/// Dots in braille characters, 2 × 4 each (Unicode, U+2800).
struct Canvas {
    columns: usize,
    cells: Vec<u8>,
}

impl Canvas {
    fn new(columns: usize, rows: usize) -> Self {
        Self { columns, cells: vec![0; columns * rows] }
    }

    fn line(&mut self, from: Point, to: Point) {
        let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).ceil().max(1.0);
        for i in 0..=steps as usize {
            let share = i as f64 / steps;
            let at = |from: f64, to: f64| (from + share * (to - from)).round() as usize;
            self.dot(at(from.0, to.0), at(from.1, to.1));
        }
    }

    fn dot(&mut self, x: usize, y: usize) {
        const BITS: [[u8; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
        if let Some(cell) = self.cells.get_mut(y / 4 * self.columns + x / 2) {
            *cell |= BITS[y % 4][x % 2];
        }
    }

    fn lines(&self) -> impl Iterator<Item = String> {
        let braille = |bits: &u8| char::from_u32(0x2800 + u32::from(*bits)).unwrap_or(' ');
        self.cells.chunks(self.columns).map(move |row| row.iter().map(braille).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn falling(count: usize) -> Vec<Point> {
        (1..=count).map(|step| (step as f64, 0.5 + 3.0 / step as f64)).collect()
    }

    /// It is opened from a run's folder on whatever viewer there is.
    #[test]
    fn the_picture_is_self_contained_and_bounded() {
        let mut train = falling(100_000);
        train[500].1 = f64::NAN;
        let svg = loss_svg(&train, &falling(7));
        for expected in ["<svg xmlns=", "prefers-color-scheme:dark", "validation", "step 7: 0.9286"]
        {
            assert!(svg.contains(expected), "{expected} in {svg}");
        }
        for forbidden in ["NaN", "inf", "href", "<script", "url("] {
            assert!(!svg.contains(forbidden), "{forbidden}");
        }
        assert!(svg.len() < 20_000, "{}", svg.len());
        assert_eq!(svg.matches("<polyline").count(), 2);
    }

    #[test]
    fn runs_without_points_have_a_picture_too() {
        for points in [&[][..], &[(1.0, f64::NAN)], &[(3.0, 2.0)], &[(1.0, 2.0), (2.0, 2.0)]] {
            let svg = loss_svg(points, &[]);
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"));
        }
    }

    #[test]
    fn ticks_are_round_and_within_the_scale() {
        let labels = |axis: Axis| axis.ticks().map(|tick| axis.label(tick)).collect::<Vec<_>>();
        assert_eq!(
            labels(Axis::round([0.31, 1.72].into_iter())),
            ["0.0", "0.5", "1.0", "1.5", "2.0"]
        );
        assert_eq!(labels(Axis::exact([1.0, 103.0].into_iter())), ["20", "40", "60", "80", "100"]);
        assert_eq!(labels(Axis::exact([1.0, 20.0].into_iter())), ["5", "10", "15", "20"]);
    }

    #[test]
    fn long_curves_become_means() {
        let points: Vec<Point> = (0..10).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert_eq!(
            averaged(&points, 5),
            [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5), (8.5, 0.5)]
        );
        assert_eq!(averaged(&points, 10), points);
    }

    #[test]
    fn a_terminal_shows_the_curve() {
        let drawn = curve(&[(1.0, 4.0), (2.0, 2.0), (3.0, 0.0)], 14, 4);
        assert_eq!(
            drawn,
            "4.0000 │⠑⢄\n       │\u{2800}\u{2800}⠑⢄\n0.0000 │\u{2800}\u{2800}\u{2800}\u{2800}⠑⢄\n        1    3\n"
        );
        assert_eq!(curve(&[(1.0, f64::NAN)], 40, 8), "");
        assert_eq!(curve(&[(5.0, 1.0)], 20, 2).lines().count(), 2);
        for line in curve(&falling(5000), 60, 10).lines() {
            assert!(line.chars().count() <= 60, "{line}");
        }
        assert!(!curve(&falling(50), 0, 0).is_empty());
    }
}
