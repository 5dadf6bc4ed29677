//! The report as a picture: a heat-map one can look at.
//!
//! Owns the drawing. Never measures. The thing to know: plain SVG without scripts or fonts, one
//! cell a site, layers from left to right; hovering a cell says its numbers.

use super::report::{Report, SiteReport};
use std::fmt::Write;

const CELL: usize = 20;
const LEFT: usize = 110;
const TOP: usize = 60;
const GAP: usize = 70;

/// Rows in the order of a decoder layer.
const ROWS: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
    "embed_tokens",
];

/// What colours a cell, 0 to 1; `None` where there is nothing to say.
type Value<'a> = &'a dyn Fn(&SiteReport) -> Option<f64>;

/// Two maps: relative error against the exact sum, and alignment of the sources.
pub fn heat_map(report: &Report) -> String {
    let layers = report.sites.iter().filter_map(|s| s.layer).max().map_or(1, |l| l + 1);
    let rows: Vec<&str> =
        ROWS.into_iter().filter(|r| report.sites.iter().any(|s| s.projection == *r)).collect();
    let map_height = rows.len() * CELL + GAP;
    let (width, height) = (LEFT + layers.max(20) * CELL + 40, TOP + 2 * map_height);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let sources = report.spec.sources.iter().map(|s| format!("{}={}", s.name, s.weight));
    let title = format!(
        "{} of {}: relative error {:.4}",
        report.spec.method.name(),
        sources.collect::<Vec<_>>().join(" "),
        report.overall.relative_error
    );
    text(&mut out, 10, 22, 16, &title);
    let error = |s: &SiteReport| Some(s.relative_error);
    let alignment = |s: &SiteReport| s.survey.alignment;
    let maps: [(&str, Value<'_>); 2] = [
        ("relative error against the exact sum", &error),
        ("alignment of the sources", &alignment),
    ];
    for (i, (label, value)) in maps.into_iter().enumerate() {
        map(&mut out, report, &rows, TOP + i * map_height, label, value);
    }
    out.push_str("</svg>\n");
    out
}

fn map(
    out: &mut String,
    report: &Report,
    rows: &[&str],
    top: usize,
    label: &str,
    value: Value<'_>,
) {
    text(out, LEFT, top - 6, 12, &format!("{label} (white 0, dark 1), layers from left to right"));
    for (r, row) in rows.iter().enumerate() {
        text(out, 10, top + r * CELL + 15, 12, row);
    }
    for site in &report.sites {
        let Some(row) = rows.iter().position(|r| *r == site.projection) else { continue };
        let (x, y) = (LEFT + site.layer.unwrap_or(0) * CELL, top + row * CELL);
        let (fill, said) = match value(site) {
            Some(v) => (colour(v), format!("{v:.4}")),
            None => ("#eeeeee".to_owned(), "no two sources".to_owned()),
        };
        let size = CELL - 1;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{size}\" height=\"{size}\" fill=\"{fill}\">\
             <title>{}: {said}, rank {}</title></rect>",
            escaped(&site.site),
            site.rank
        );
    }
}

/// White to dark blue over 0 to 1.
fn colour(value: f64) -> String {
    let v = value.clamp(0.0, 1.0);
    let mix = |light: f64, dark: f64| (light + (dark - light) * v).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(255.0, 8.0), mix(255.0, 48.0), mix(255.0, 107.0))
}

fn text(out: &mut String, x: usize, y: usize, size: usize, said: &str) {
    let said = escaped(said);
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\">{said}</text>");
}

fn escaped(said: &str) -> String {
    said.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
