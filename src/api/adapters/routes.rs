//! `/v1/adapters`: upload, list, show, remove.
//!
//! Owns the routes and their answers. Never reads an adapter's files: `upload` puts them into
//! staging, the registry judges them. The thing to know: the registry runs a publication, once
//! begun, to its end even if the client hangs up.

use super::shown::version;
use super::{upload, versions};
use crate::access::Caller;
use crate::adapters::actor::Actor;
use crate::adapters::version::{Lineage, Publish, Removal};
use crate::api::Api;
use crate::api::http::intake::UPLOAD_BYTES;
use crate::api::http::touched::Touched;
use crate::api::http::{auth, errors};
use crate::api::wire::{Adapter, AdapterDeleted, AdapterList, AdapterPut, ErrorBody, FreedBytes};
use crate::error::Result;
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// Query of an upload.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutQuery {
    force: Option<bool>,
    expected_version: Option<u64>,
}

/// Query of a removal.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveQuery {
    drain_seconds: Option<u64>,
    expected_version: Option<u64>,
}

/// Uploads an adapter: a new name, or a new version of one.
///
/// The body is multipart, or one tar, tar.gz or zip of the files, or a `.gguf` file as it is. A
/// part is `adapter_config.json`, `adapter_model.safetensors` or one `.gguf` by its own name; if
/// that is none of them, by its file name.
#[utoipa::path(
    put,
    path = "/v1/adapters/{name}",
    params(
        ("name" = String, Path, description = "1 to 128 of A-Z a-z 0-9 . _ -"),
        ("force" = Option<bool>, Query, description = "Serve it even if the probe sees no change"),
        ("expected_version" = Option<u64>, Query,
            description = "Refuse unless it is current; 0: unless there is none"),
        ("if-match" = Option<String>, Header, description = "Refuse unless this ETag is current"),
        ("if-none-match" = Option<String>, Header, description = "`*`: refuse if the name exists"),
    ),
    request_body(content = Vec<u8>, content_type = "multipart/form-data"),
    responses(
        (status = 201, description = "A new name", body = AdapterPut),
        (status = 200, description = "A new version, or the same content again", body = AdapterPut),
        (status = 412, description = "Not what was expected", body = ErrorBody),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
        (status = 507, description = "No room", body = ErrorBody),
    )
)]
pub async fn put(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    query: Result<Query<PutQuery>, QueryRejection>,
    request: Request,
) -> Result<Response> {
    let published = publish(&api, &caller, &name, query, request).await;
    if let Err(error) = &published {
        let counter = &api.metrics.adapters_refused;
        counter.with_label_values(&[error.code]).inc();
        tracing::warn!(name, code = error.code, reason = %error.message, "upload refused");
    }
    published
}

async fn publish(
    api: &Arc<Api>,
    caller: &Caller,
    name: &str,
    query: Result<Query<PutQuery>, QueryRejection>,
    request: Request,
) -> Result<Response> {
    let Query(query) = query.map_err(|_| {
        let message = "the query may only hold `force` (true or false) and `expected_version`";
        errors::invalid_value("force", message)
    })?;
    let expected = versions::expected(request.headers(), query.expected_version)?;
    let _permit = api.requests.intake.upload(caller)?;
    let _held = api.requests.intake.hold(caller, UPLOAD_BYTES)?;
    let by = auth::actor(caller, name);
    admit(api, name, &by, request.headers()).await?;
    let staging = api.registry.stage(name)?;
    let files = upload::receive(request, staging, api).await?;
    let before = api.registry.versions(name);
    let lineage = Lineage::Uploaded { by: Some(caller.id().to_owned()), files: files.names };
    let force = query.force.unwrap_or(false);
    let how = Publish { force, expected, lineage, by, ..Publish::default() };
    let entry = api.registry.publish(files.staging, how).await?;
    let (status, result) = if before.is_empty() {
        (StatusCode::CREATED, "created")
    } else if before.iter().any(|e| e.version.number == entry.version.number) {
        (StatusCode::OK, "unchanged")
    } else {
        (StatusCode::OK, "updated")
    };
    tracing::info!(
        id = entry.version.id(),
        digest = %entry.version.digest,
        result,
        "adapter published"
    );
    let digest = Some(entry.version.digest.to_string());
    let touched = Extension(Touched { name: None, digest });
    let body =
        AdapterPut { adapter: version(&entry, caller), result, ignored_files: files.ignored };
    Ok((status, versions::etag(&entry), touched, Json(body)).into_response())
}

/// Refuses before it is received what would be refused after.
async fn admit(api: &Api, name: &str, by: &Actor, headers: &HeaderMap) -> Result<()> {
    let registry = &api.registry;
    registry.check_right(name, by).await?;
    let length = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    registry.check_disk(name, by, length.unwrap_or(0))
}

/// Lists every version of every adapter.
#[utoipa::path(get, path = "/v1/adapters", responses((status = 200, body = AdapterList)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Json<AdapterList> {
    let (mut resident_bytes, resident_bytes_max) = api.registry.residency();
    let mut entries = api.registry.list();
    entries.retain(|e| caller.sees(&e.version.name));
    if caller.tenant().is_some() {
        // The whole would tell of others.
        let resident = entries.iter().filter(|e| e.resident);
        resident_bytes = resident.map(|e| e.version.resident_bytes).sum();
    }
    let data = entries.iter().map(|e| version(e, &caller)).collect();
    Json(AdapterList { object: "list", data, resident_bytes, resident_bytes_max })
}

/// Shows one adapter with its versions.
#[utoipa::path(
    get,
    path = "/v1/adapters/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = Adapter), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Response> {
    let entries = api.registry.versions(&name);
    if entries.is_empty() {
        return Err(errors::not_found(&name));
    }
    let current = entries.iter().find(|e| e.current);
    let body = Json(Adapter {
        object: "adapter",
        current: current.map(|e| e.version.number),
        versions: entries.iter().map(|e| version(e, &caller)).collect(),
        name,
    });
    Ok(match current {
        Some(current) => (versions::etag(current), body).into_response(),
        None => body.into_response(),
    })
}

/// Takes an adapter's name away: new requests get 404 at once.
///
/// Without `drain_seconds` the answer comes at once, and running requests finish in their own time.
/// With it, the answer waits for them so long; what still runs then is cut: its stream gets an
/// `error` event with the code `adapter_deleted` and ends.
#[utoipa::path(
    delete,
    path = "/v1/adapters/{name}",
    params(
        ("name" = String, Path),
        ("drain_seconds" = Option<u64>, Query, description = "Wait so long, then cut"),
        ("expected_version" = Option<u64>, Query, description = "Refuse unless it is current"),
        ("if-match" = Option<String>, Header, description = "Refuse unless this ETag is current"),
    ),
    responses(
        (status = 200, description = "Gone, memory and files too", body = AdapterDeleted),
        (status = 202, description = "Running requests hold it still", body = AdapterDeleted),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
pub async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    query: Result<Query<RemoveQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response> {
    let most = api.config.request_seconds_max;
    let Query(query) = query.map_err(|e| errors::invalid_value("drain_seconds", e.body_text()))?;
    if query.drain_seconds.is_some_and(|s| s > most) {
        let message = format!("`drain_seconds` may be at most request_seconds_max = {most}");
        return Err(errors::invalid_value("drain_seconds", message));
    }
    let how = Removal {
        expected: versions::expected(&headers, query.expected_version)?,
        drain: query.drain_seconds.map(Duration::from_secs),
        by: auth::actor(&caller, &name),
    };
    let removed = api.registry.delete(&name, how).await;
    let removed = removed.map_err(|e| errors::told(versions::named(e, &name), &caller))?;
    let status = if removed.gone { StatusCode::OK } else { StatusCode::ACCEPTED };
    let body = AdapterDeleted {
        object: "adapter",
        name,
        deleted: true,
        state: if removed.gone { "gone" } else { "draining" },
        freed_bytes: FreedBytes {
            resident: removed.resident_bytes_freed,
            file: removed.file_bytes_freed,
        },
        cut: removed.cut,
        versions: removed.entries.iter().map(|e| version(e, &caller)).collect(),
    };
    Ok((status, Json(body)).into_response())
}
