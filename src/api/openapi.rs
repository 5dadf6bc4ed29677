//! `/openapi.json` and the page that shows it.
//!
//! Owns the document's head. Never describes a route by hand: paths and schemas come from the code.
//! The thing to know: the page is one file without anything from elsewhere, so it works on a
//! machine without a network.

use super::adapters::{aliases, models, routes, versions, vllm};
use super::admin::{audit, health, keys, limits, usage};
use super::inference::{chat, completions, tokenize};
use super::jobs::{deletion, files, fine_tuning, merges, uploads};
use axum::Json;
use axum::response::{Html, IntoResponse};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::header::CONTENT_SECURITY_POLICY;
use sha2::{Digest, Sha256};
use std::sync::OnceLock;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(title = "polylora", description = "One base model, many adapters, one batch."),
    paths(
        chat::post,
        completions::post,
        models::list,
        models::show,
        routes::list,
        routes::show,
        routes::put,
        routes::remove,
        versions::roll_back,
        versions::pin,
        versions::unpin,
        aliases::list,
        aliases::show,
        aliases::put,
        aliases::remove,
        aliases::promote,
        aliases::roll_back,
        merges::list,
        merges::create,
        merges::show,
        merges::report,
        merges::events,
        merges::cancel,
        files::create,
        files::list,
        files::show,
        files::content,
        files::preview,
        deletion::remove,
        uploads::create,
        uploads::add_part,
        uploads::complete,
        uploads::cancel,
        fine_tuning::create,
        fine_tuning::list,
        fine_tuning::show,
        fine_tuning::report,
        fine_tuning::seen::seen,
        fine_tuning::cancel,
        fine_tuning::pause,
        fine_tuning::resume,
        fine_tuning::events,
        fine_tuning::checkpoints,
        keys::list,
        keys::create,
        keys::show,
        keys::revoke,
        keys::rotate,
        usage::usage,
        limits::show_limits,
        limits::set_limits,
        audit::list,
        audit::rotate,
        vllm::load,
        vllm::unload,
        models::remove,
        tokenize::tokenize,
        tokenize::detokenize,
        health::live,
        health::ready,
        health::health,
        health::version,
        health::metrics,
    )
)]
struct Document;

/// The document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

pub async fn json() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}

const PAGE: &str = include_str!("docs.html");

pub async fn docs() -> impl IntoResponse {
    static POLICY: OnceLock<HeaderValue> = OnceLock::new();
    ([(CONTENT_SECURITY_POLICY, POLICY.get_or_init(policy).clone())], Html(PAGE))
}

/// Lets the page run its own script and style, known by their digests, and read the document.
fn policy() -> HeaderValue {
    let digest = |tag: &str| {
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let inside = PAGE.split(&open).nth(1).and_then(|rest| rest.split(&close).next());
        STANDARD.encode(Sha256::digest(inside.unwrap_or_default()))
    };
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        digest("script"),
        digest("style"),
    );
    HeaderValue::try_from(policy).expect("base64 is plain ASCII")
}
