//! `/openapi.json` and the page that shows it.
//!
//! Owns the document's head. Never describes a route by hand: paths and schemas come from the code.
//! The thing to know: the page is one file without anything from elsewhere, so it works on a
//! machine without a network.

use super::{
    adapters, aliases, audit, chat, compat, completions, health, keys, merges, models, tokenize,
    usage, versions,
};
use axum::Json;
use axum::response::Html;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(title = "polylora", description = "One base model, many adapters, one batch."),
    paths(
        chat::post,
        completions::post,
        models::list,
        models::show,
        adapters::list,
        adapters::show,
        adapters::put,
        adapters::remove,
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
        keys::list,
        keys::create,
        keys::show,
        keys::revoke,
        keys::rotate,
        usage::usage,
        keys::show_limits,
        keys::set_limits,
        audit::list,
        audit::rotate,
        compat::load,
        compat::unload,
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

pub async fn docs() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}
