//! `/live`, `/ready`, `/health`, `/version`, `/metrics`.
//!
//! Owns what the server says of itself. Never says ok from habit: liveness is the engine thread's
//! own progress. The thing to know: a full queue is not ill, it only wants no more requests; an
//! engine that has work and finishes no step is.

use crate::adapters::Digest;
use crate::api::Api;
use crate::api::http::auth;
use crate::api::wire::{Health, Version};
use crate::clock::Now;
use crate::metrics::{Gateway, Loaded};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};
use polylora_kernels::KvCache;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Question {
    /// Should the process be left alone?
    Live,
    /// Is it well?
    Health,
    /// Should it get requests?
    Ready,
}

/// How many requests there are is for those only who may send some.
fn state(api: &Api, headers: &HeaderMap, question: Question) -> Response {
    let stalled = api.engine.stalled_for();
    let status = if stalled > api.config.stall_time_max() {
        "stalled"
    } else if question != Question::Live && api.requests.draining.load(Ordering::Acquire) {
        "draining"
    } else if question == Question::Ready && api.engine.is_full() {
        "saturated"
    } else {
        "ok"
    };
    let code = match status {
        "ok" => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let counts = auth::has_key(api, headers);
    let read_only = api.storage.read_only().is_some();
    let body = Health {
        status,
        stalled_seconds: stalled.as_secs_f64(),
        running: counts.then(|| api.metrics.requests_running.get()),
        waiting: counts.then(|| api.metrics.requests_waiting.get()),
        storage: if read_only { "read_only" } else { "writable" },
    };
    (code, Json(body)).into_response()
}

/// Whether the process should be left alone: the engine moves.
#[utoipa::path(
    get,
    path = "/live",
    responses((status = 200, body = Health), (status = 503, body = Health))
)]
pub async fn live(State(api): State<Arc<Api>>, headers: HeaderMap) -> Response {
    state(&api, &headers, Question::Live)
}

/// Whether requests should be sent here: it moves, is not shutting down, and its queue has room.
#[utoipa::path(
    get,
    path = "/ready",
    responses((status = 200, body = Health), (status = 503, body = Health))
)]
pub async fn ready(State(api): State<Arc<Api>>, headers: HeaderMap) -> Response {
    state(&api, &headers, Question::Ready)
}

/// Whether it moves and is not shutting down; a full queue does not count.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, body = Health), (status = 503, body = Health))
)]
pub async fn health(State(api): State<Arc<Api>>, headers: HeaderMap) -> Response {
    state(&api, &headers, Question::Health)
}

/// What runs here.
#[utoipa::path(get, path = "/version", responses((status = 200, body = Version)))]
pub async fn version(State(api): State<Arc<Api>>) -> Json<Version> {
    Json(Version {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        base: api.base_name.to_string(),
        base_digest: api.base_digest.to_string(),
        device: api.device.to_string(),
        max_model_len: api.context,
    })
}

/// Prometheus text.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let entries = api.registry.list();
    let metrics = &api.metrics;
    let mut files: HashMap<Digest, u64> = HashMap::new();
    let mut loaded = BTreeMap::new();
    for entry in &entries {
        let version = &entry.version;
        files.insert(version.digest, version.file_bytes);
        if entry.resident {
            let name = if entry.current { version.name.clone() } else { version.id() };
            loaded.insert(name, entry.pinned);
        }
    }
    let names: HashSet<&str> = entries.iter().map(|e| e.version.name.as_str()).collect();
    metrics.forget_adapters(|name| names.contains(name));
    let stats = api.registry.stats();
    for (tier, count, bytes) in [
        ("device", stats.residents as u64, stats.resident_bytes),
        ("disk", files.len() as u64, files.values().sum()),
    ] {
        metrics.adapters_resident.with_label_values(&[tier]).set(count as i64);
        metrics.adapter_resident_bytes.with_label_values(&[tier]).set(bytes as i64);
    }
    metrics.storage_read_only.set(i64::from(api.storage.read_only().is_some()));
    let (running, waiting) = api.requests.in_flight.adapters();
    let gateway = Gateway {
        model: api.base_name.to_string(),
        slots_max: api.config.resident_max,
        running,
        waiting,
        loaded: loaded.into_iter().map(|(name, pinned)| Loaded { name, pinned }).collect(),
        page_tokens: KvCache::PAGE,
        now: Now::read().wall.as_secs_f64(),
    };
    let text = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, text)], metrics.render(&gateway)).into_response()
}
