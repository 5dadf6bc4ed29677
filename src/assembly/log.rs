//! Log lines and spans of `serve`.
//!
//! Owns where they go and in which format. Never decides what is logged: `log_filter` does. The
//! thing to know: whatever a line repeats of the outside is escaped and cut here, for every call
//! site; with the feature `otel` the same spans also go to a collector, if the environment names
//! one.

#[cfg(feature = "otel")]
use super::otel::{self, Sending};
use crate::config::{Config, LogFormat};
use crate::error::{Error, Result};
use crate::terminal::{self, Plain};
use serde_json::Value;
use std::fmt;
use std::io::IsTerminal;
use tracing::field::Field;
use tracing::{Event, Subscriber};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Of one field of a line.
const FIELD_CHARS_MAX: usize = 1000;
/// A line of JSON up to here has no field to cut.
const SHORT_LINE_BYTES: usize = FIELD_CHARS_MAX;

/// Spans on their way to a collector: there is none in this build.
#[cfg(not(feature = "otel"))]
pub struct Sending;

/// Sets the process's log up. What it returns is to be kept until the end: dropping it sends the
/// last spans.
pub fn start(config: &Config) -> Result<Sending> {
    let filter = EnvFilter::try_new(&config.log_filter).map_err(|e| {
        let message = format!("log_filter is '{}': {e}", config.log_filter);
        Error::invalid("invalid_config", message).param("log_filter")
    })?;
    // Lines go to stderr: stdout has the banner.
    let lines = tracing_subscriber::fmt::layer().with_ansi(std::io::stderr().is_terminal());
    let lines = lines.with_writer(std::io::stderr);
    let lines = match config.log_format {
        LogFormat::Json => lines.json().map_event_format(JsonLines).boxed(),
        LogFormat::Text => lines.fmt_fields(debug_fn(write_field).delimited(" ")).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(lines).with(filter);
    #[cfg(feature = "otel")]
    let (subscriber, sending) = {
        let (layer, sending) = otel::layer()?;
        (subscriber.with(layer), sending)
    };
    #[cfg(not(feature = "otel"))]
    let sending = Sending;
    subscriber.init();
    Ok(sending)
}

/// A field of an event or a span in a line of text.
fn write_field(to: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    if field.name() != "message" {
        write!(to, "{}=", field.name())?;
    }
    Plain::new(to, FIELD_CHARS_MAX).show(format_args!("{value:?}"))
}

/// Lines of JSON with long texts cut. JSON escapes most of what is harmful itself.
struct JsonLines<F>(F);

impl<S, N, F> FormatEvent<S, N> for JsonLines<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        scope: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(scope, Writer::new(&mut line), event)?;
        to.write_str(&harmless(line))
    }
}

/// A line of JSON whose texts are short, and which has no odd character outside an escape.
fn harmless(mut line: String) -> String {
    if line.len() > SHORT_LINE_BYTES
        && let Ok(mut value) = serde_json::from_str::<Value>(&line)
    {
        cut(&mut value);
        line = value.to_string() + "\n";
    }
    let odd = |c: char| c != '\n' && !terminal::is_harmless(c);
    if !line.contains(odd) {
        return line;
    }
    // All of them are in texts, and none is beyond the first plane of Unicode.
    let escaped = |c: char| match odd(c) {
        true => format!("\\u{:04x}", u32::from(c)),
        false => c.to_string(),
    };
    line.chars().map(escaped).collect()
}

fn cut(value: &mut Value) {
    match value {
        Value::String(text) => crate::error::cut(text, FIELD_CHARS_MAX),
        Value::Array(all) => all.iter_mut().for_each(cut),
        Value::Object(all) => all.values_mut().for_each(cut),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_stays_json_and_one_line_and_short() {
        let long = "ä\u{2028}\u{202e}\u{9b}\n".repeat(100_000);
        let line = serde_json::json!({"fields": {"message": long, "n": 1}}).to_string() + "\n";
        let line = harmless(line);
        assert!(line.len() < 10 * FIELD_CHARS_MAX);
        assert!(line.trim_end_matches('\n').chars().all(terminal::is_harmless), "{line}");
        let value: Value = serde_json::from_str(&line).expect("JSON");
        let text = value["fields"]["message"].as_str().expect("a text");
        assert!(text.starts_with("ä\u{2028}\u{202e}\u{9b}\nä") && text.ends_with('…'));
        assert_eq!(harmless("{\"a\":1}\n".to_owned()), "{\"a\":1}\n");
    }
}
