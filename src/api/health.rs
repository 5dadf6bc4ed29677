//! `/live`, `/ready`, `/health`, `/version`, `/metrics`.
//!
//! Owns what the server says of itself. Never says ok from habit: liveness is the engine thread's
//! own progress. The thing to know: a full queue is not ill; an engine that finishes no step is.

use super::Api;
use super::wire::{Health, Version};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// An engine that neither finished a step nor was idle for this long is stuck, not slow.
const STALL_TIME_MAX: Duration = Duration::from_secs(60);

fn state(api: &Api, drains_count: bool) -> Response {
    let stalled = api.app.engine.stalled_for();
    let status = if stalled > STALL_TIME_MAX {
        "stalled"
    } else if drains_count && api.draining.load(Ordering::Acquire) {
        "draining"
    } else {
        "ok"
    };
    let code = match status {
        "ok" => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = Health {
        status,
        stalled_seconds: stalled.as_secs_f64(),
        running: api.app.metrics.requests_running.get(),
        waiting: api.app.metrics.requests_waiting.get(),
    };
    (code, Json(body)).into_response()
}

/// Whether the process should be left alone: the engine moves.
#[utoipa::path(
    get,
    path = "/live",
    responses((status = 200, body = Health), (status = 503, body = Health))
)]
pub async fn live(State(api): State<Arc<Api>>) -> Response {
    state(&api, false)
}

/// Whether requests should be sent here: it moves and is not shutting down.
#[utoipa::path(
    get,
    path = "/ready",
    responses((status = 200, body = Health), (status = 503, body = Health))
)]
pub async fn ready(State(api): State<Arc<Api>>) -> Response {
    state(&api, true)
}

/// The same as `/ready`.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, body = Health), (status = 503, body = Health))
)]
pub async fn health(State(api): State<Arc<Api>>) -> Response {
    state(&api, true)
}

/// What runs here.
#[utoipa::path(get, path = "/version", responses((status = 200, body = Version)))]
pub async fn version(State(api): State<Arc<Api>>) -> Json<Version> {
    Json(Version {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        base: api.app.base_name.to_string(),
        base_digest: api.app.base_digest.to_string(),
        device: api.app.device.to_string(),
        max_model_len: api.app.context,
    })
}

/// Prometheus text.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let _one = api.scrape.lock().unwrap_or_else(|e| e.into_inner());
    let (stats, metrics) = (api.app.registry.stats(), &api.app.metrics);
    let unseen = stats.loads.saturating_sub(metrics.adapter_loads.get());
    metrics.adapter_loads.inc_by(unseen);
    metrics.adapters_resident.set(stats.residents as i64);
    metrics.adapter_resident_bytes.set(stats.resident_bytes as i64);
    let text = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, text)], metrics.render()).into_response()
}
