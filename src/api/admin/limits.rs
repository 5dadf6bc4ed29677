//! `/v1/limits`: what all keys together may use of an adapter.
//!
//! Owns the routes and their answers. Never counts: `access` does.

use crate::api::Api;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::errors::not_found;
use crate::api::wire::{AdapterLimits, ErrorBody, KeyLimits};
use crate::error::Result;
use axum::Json;
use axum::extract::{Path, State};
use std::sync::Arc;

/// Shows the limits of an adapter, over all keys together.
#[utoipa::path(
    get,
    path = "/v1/limits/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = AdapterLimits), (status = 404, body = ErrorBody))
)]
pub async fn show_limits(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
) -> Result<Json<AdapterLimits>> {
    let limits = api.access.limits(&name);
    // Limits may come before their adapter, and stay after it.
    if limits.is_none() && api.registry.versions(&name).is_empty() {
        return Err(not_found(&name));
    }
    let limits = limits.unwrap_or_default().into();
    Ok(Json(AdapterLimits { object: "limits", name, limits }))
}

/// Sets the limits of a name, over all keys together, whether an adapter has it yet or not; `{}`
/// takes them away.
#[utoipa::path(
    put,
    path = "/v1/limits/{name}",
    params(("name" = String, Path)),
    request_body = KeyLimits,
    responses((status = 200, body = AdapterLimits), (status = "4XX", body = ErrorBody))
)]
pub async fn set_limits(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Json<AdapterLimits>> {
    let limits: KeyLimits = rest(body)?;
    api.access.set_limits(&name, limits.clone().into()).await?;
    Ok(Json(AdapterLimits { object: "limits", name, limits }))
}
