//! `/v1/keys`: who may call.
//!
//! Owns the routes and their answers. Never shows a secret but the moment it is made. The thing to
//! know: a key keeps its id, limits and usage through rotations; only the secret is new.

use crate::access::{Key, NewKey, Secret};
use crate::api::Api;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::touched::Touched;
use crate::api::wire::{ErrorBody, KeyCreate, KeyMade, KeyObject, KeyObjectList, KeyRotate};
use crate::clock::Now;
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
    let data = api.access.keys().into_iter().map(shown).collect();
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
    Ok(made(StatusCode::CREATED, api.access.create(new, Now::read().wall).await?))
}

/// Shows one key.
#[utoipa::path(
    get,
    path = "/v1/keys/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = KeyObject), (status = 404, body = ErrorBody))
)]
pub async fn show(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<KeyObject>> {
    Ok(Json(shown(api.access.key(&id)?)))
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
    Ok(Json(shown(api.access.revoke(&id, Now::read().wall).await?)))
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
    Ok(made(StatusCode::OK, api.access.rotate(&id, overlap, Now::read().wall).await?))
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
