//! The figures of a training's steps: by name, as a table, and as a picture of the loss.
//!
//! Owns these forms. Never looks at a trainer. The thing to know: figures are JSON by the names of
//! OpenAI's, so what a journal kept of them makes the same table.

use super::trainer::StepReport;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// Columns of the table, and the figures of an event that fill them: first those of OpenAI's
/// result files.
const COLUMNS: [(&str, &[&str]); 10] = [
    ("step", &["step"]),
    ("train_loss", &["train_loss"]),
    ("train_accuracy", &["train_mean_token_accuracy"]),
    ("valid_loss", &["full_valid_loss", "valid_loss"]),
    ("valid_mean_token_accuracy", &["full_valid_mean_token_accuracy", "valid_mean_token_accuracy"]),
    ("lr", &["lr"]),
    ("grad_norm", &["grad_norm"]),
    ("tokens", &["tokens"]),
    ("seconds", &["seconds"]),
    ("tokens_per_second", &["tokens_per_second"]),
];

/// The figures of every step, in order.
pub struct Steps(Vec<Value>);

/// The figures of a step that took so long.
pub fn figures(report: &StepReport, took: Duration) -> Value {
    let seconds = took.as_secs_f64();
    let mut figures = json!({
        "step": report.step,
        "total_steps": report.steps,
        "train_loss": report.loss,
        "train_mean_token_accuracy": report.accuracy,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens": report.tokens,
        "seconds": seconds,
        "tokens_per_second": report.tokens as f64 / seconds,
    });
    if let Some(valid) = &report.valid {
        let full = if report.epoch_end { "full_" } else { "" };
        figures[format!("{full}valid_loss")] = json!(valid.loss);
        figures[format!("{full}valid_mean_token_accuracy")] = json!(valid.accuracy);
    }
    figures
}

impl Steps {
    /// Of figures in order.
    pub fn of(figures: impl Iterator<Item = Value>) -> Self {
        Self(figures.collect())
    }

    /// CSV with a head.
    pub fn csv(&self) -> String {
        let mut text = COLUMNS.map(|(name, _)| name).join(",");
        text.push('\n');
        for step in &self.0 {
            let cell = |names: &[&str]| {
                let value = names.iter().find_map(|name| step.get(*name));
                value.map(Value::to_string).unwrap_or_default()
            };
            text.push_str(&COLUMNS.map(|(_, names)| cell(names)).join(","));
            text.push('\n');
        }
        text
    }

    /// Tokens read, all steps together.
    pub fn tokens(&self) -> u64 {
        self.0.iter().filter_map(|step| step["tokens"].as_u64()).sum()
    }

    /// The last figures.
    pub fn last(&self) -> Option<&Value> {
        self.0.last()
    }

    /// An SVG of the loss over the steps: each step, and where the job measured itself on the
    /// validation file.
    pub fn picture(&self) -> String {
        let points = |names: &[&str]| -> Vec<(f64, f64)> {
            let point = |step: &Value| {
                let y = names.iter().find_map(|name| step.get(*name)?.as_f64())?;
                Some((step["step"].as_f64()?, y))
            };
            self.0.iter().filter_map(point).collect()
        };
        let train = points(&["train_loss"]);
        let valid = points(&["full_valid_loss", "valid_loss"]);
        let all = || train.iter().chain(&valid);
        let right = all().map(|p| p.0).fold(1.0, f64::max);
        let top = all().map(|p| p.1).filter(|y| y.is_finite()).fold(1e-9, f64::max);
        let at =
            |(x, y): (f64, f64)| (60.0 + 560.0 * x / right, 300.0 - 270.0 * (y / top).min(1.0));
        let mut svg = String::from(concat!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 340" "##,
            r##"font-family="sans-serif" font-size="12">"##,
            r##"<rect width="640" height="340" fill="#fff"/>"##,
        ));
        for part in 0..=4 {
            let value = top * f64::from(part) / 4.0;
            let (_, y) = at((0.0, value));
            let _ = write!(
                svg,
                concat!(
                    r##"<path d="M60 {:.1}H620" stroke="#ddd"/>"##,
                    r##"<text x="54" y="{:.1}" text-anchor="end" fill="#555">{:.2}</text>"##,
                ),
                y,
                y + 4.0,
                value
            );
        }
        let _ = write!(
            svg,
            concat!(
                r##"<text x="60" y="322" fill="#555">0</text>"##,
                r##"<text x="620" y="322" text-anchor="end" fill="#555">step {}</text>"##,
            ),
            right
        );
        let line = |points: &[(f64, f64)]| {
            let points = points.iter().filter(|p| p.1.is_finite()).map(|p| at(*p));
            points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ")
        };
        for (name, colour, y, points) in
            [("training loss", "#1f77b4", 24, &train), ("validation loss", "#d62728", 42, &valid)]
        {
            if points.is_empty() {
                continue;
            }
            let _ = write!(
                svg,
                concat!(
                    r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="1.5"/>"##,
                    r##"<text x="620" y="{}" text-anchor="end" fill="{colour}">{}</text>"##,
                ),
                line(points),
                y,
                name,
                colour = colour
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Steps {
        let steps = [
            json!({"step": 1, "train_loss": 2.5, "tokens": 20}),
            json!({"step": 2, "train_loss": 1.0, "tokens": 30, "full_valid_loss": 1.5}),
        ];
        Steps::of(steps.into_iter())
    }

    #[test]
    fn the_table_has_a_row_a_step_and_empty_cells_for_what_was_not_measured() {
        let csv = steps().csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert!(lines[0].starts_with("step,train_loss,train_accuracy,valid_loss,"), "{csv}");
        assert_eq!(lines[1..], ["1,2.5,,,,,,20,,", "2,1.0,,1.5,,,,30,,"], "{csv}");
        assert_eq!(steps().tokens(), 50);
    }

    #[test]
    fn the_picture_has_both_losses_and_one_without_steps_is_whole() {
        let svg = steps().picture();
        assert_eq!(svg.matches("<polyline").count(), 2, "{svg}");
        assert!(svg.contains("340.0,30.0 620.0,192.0"), "{svg}");
        let empty = Steps(Vec::new()).picture();
        assert!(!empty.contains("<polyline") && empty.ends_with("</svg>\n"), "{empty}");
    }
}
