//! Spans to an OpenTelemetry collector over OTLP/HTTP.
//!
//! Owns the exporter. Never logs. The thing to know: the standard environment variables decide:
//! without `OTEL_EXPORTER_OTLP_ENDPOINT` (or its `_TRACES_` form) nothing is sent, and the
//! exporter's own thread batches, so no request waits for the collector.

use crate::error::{Error, Result};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::registry::LookupSpan;

const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// The exporter, stopped when dropped.
pub struct Sending(Option<SdkTracerProvider>);

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.take().map(|provider| provider.shutdown()) {
            eprintln!("the last spans were not sent: {error}");
        }
    }
}

/// The layer that turns spans into OpenTelemetry's; empty when no collector is named.
pub fn layer<S>() -> Result<(impl Layer<S>, Sending)>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    if ENDPOINTS.iter().all(|name| std::env::var_os(name).is_none()) {
        return Ok((None, Sending(None)));
    }
    crate::tls::install();
    let exporter = SpanExporter::builder().with_http().build().map_err(|e| {
        Error::invalid("invalid_config", format!("OpenTelemetry cannot be set up: {e}"))
    })?;
    let resource = Resource::builder().with_service_name("polylora").build();
    let provider =
        SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("polylora"));
    Ok((Some(layer), Sending(Some(provider))))
}
