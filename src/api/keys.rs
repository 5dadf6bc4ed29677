//! `/v1/keys` and `/v1/limits`: keys, and what all of them together may use of an adapter.
//!
//! Owns the routes and their answers. Never shows a secret but the moment it is made. The thing to
//! know: a key keeps its id, limits and usage through rotations; only the secret is new.

use super::audit::Touched;
use super::body::{JsonObject, rest};
use super::wire::{
    AdapterLimits, ErrorBody, KeyCreate, KeyLimits, KeyMade, KeyObject, KeyObjectList, KeyRotate,
};
use super::{Api, adapters, clock};
use crate::access::{Key, NewKey, Secret};
use crate::error::Result;
use axum::Json;
use axum::extract::{Extension, Path, State};
use http::StatusCode;
use http::header::CACHE_CONTROL;
use std::sync::Arc;

type Made = (StatusCode, Extension<Touched>, [(http::HeaderName, &'static str); 1], Json<KeyMade>);

/// Lists every key, revoked ones too; never a secret.
#[utoipa::path(get, path = "/v1/keys", responses((status = 200, body = KeyObjectList)))]
pub async fn list(State(api): State<Arc<Api>>) -> Json<KeyObjectList> {
    let data = api.app.access.keys().into_iter().map(shown).collect();
    Json(KeyObjectList { object: "list", data })
}

/// Makes a key. The answer holds its secret, which is shown this once.
#[utoipa::path(
    post,
    path = "/v1/keys",
    request_body = KeyCreate,
    responses((status = 201, body = KeyMade), (status = "4XX", body = ErrorBody))
)]
pub async fn create(State(api): State<Arc<Api>>, JsonObject(body): JsonObject) -> Result<Made> {
    let asked: KeyCreate = rest(body)?;
    let new = NewKey {
        label: asked.label.unwrap_or_default(),
        scopes: asked.scopes,
        tenant: asked.tenant,
        adapters: asked.adapters.unwrap_or_default(),
        manage: asked.manage,
        weight: asked.weight.unwrap_or(1),
        limits: asked.limits.unwrap_or_default().into(),
        lifetime_seconds: asked.lifetime_seconds,
    };
    Ok(made(StatusCode::CREATED, api.app.access.create(new, clock()).await?))
}

/// Shows one key.
#[utoipa::path(
    get,
    path = "/v1/keys/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = KeyObject), (status = 404, body = ErrorBody))
)]
pub async fn show(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<KeyObject>> {
    Ok(Json(shown(api.app.access.key(&id)?)))
}

/// Ends a key at once. Requests that run go on; the key stays listed.
#[utoipa::path(
    delete,
    path = "/v1/keys/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = KeyObject), (status = 404, body = ErrorBody))
)]
pub async fn revoke(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<KeyObject>> {
    Ok(Json(shown(api.app.access.revoke(&id, clock()).await?)))
}

/// Gives a key a new secret; the one before stays good for `overlap_seconds`.
#[utoipa::path(
    post,
    path = "/v1/keys/{id}/rotate",
    params(("id" = String, Path)),
    request_body = KeyRotate,
    responses((status = 200, body = KeyMade), (status = "4XX", body = ErrorBody))
)]
pub async fn rotate(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Made> {
    let asked: KeyRotate = rest(body)?;
    let overlap = asked.overlap_seconds.unwrap_or(0);
    Ok(made(StatusCode::OK, api.app.access.rotate(&id, overlap, clock()).await?))
}

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
    let limits = api.app.access.limits(&name);
    // Limits may come before their adapter, and stay after it.
    if limits.is_none() && api.app.registry.versions(&name).is_empty() {
        return Err(adapters::not_found(&name));
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
    api.app.access.set_limits(&name, limits.clone().into()).await?;
    Ok(Json(AdapterLimits { object: "limits", name, limits }))
}

fn made(status: StatusCode, (key, secret): (Key, Secret)) -> Made {
    let touched = Touched { name: Some(key.id.clone()), digest: None };
    let body = KeyMade { secret: secret.reveal().to_owned(), key: shown(key) };
    (status, Extension(touched), [(CACHE_CONTROL, "no-store")], Json(body))
}

fn shown(key: Key) -> KeyObject {
    KeyObject {
        object: "key",
        id: key.id,
        label: key.label,
        scopes: key.scopes.iter().map(|s| s.name()).collect(),
        tenant: key.tenant,
        adapters: key.adapters,
        manage: key.manage,
        weight: key.weight,
        limits: key.limits.into(),
        created: key.created,
        expires: key.expires,
        revoked: key.revoked,
        last_used: key.last_used,
    }
}
