//! Log lines and spans of `serve`.
//!
//! Owns where they go and in which format. Never decides what is logged: `log_filter` does. The
//! thing to know: lines go to stderr (stdout has the banner); with the feature `otel` the same
//! spans also go to an OpenTelemetry collector, if the environment names one.

#[cfg(feature = "otel")]
use super::otel::{self, Sending};
use crate::config::Config;
use crate::error::{Error, Result};
use std::io::IsTerminal;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

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
    let lines = fmt::layer().with_ansi(std::io::stderr().is_terminal());
    let lines = lines.with_writer(std::io::stderr);
    let lines = match config.log_format.as_str() {
        "json" => lines.json().boxed(),
        _ => lines.boxed(),
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
