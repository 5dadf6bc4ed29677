//! What admins do to versions that are there: roll back, pin, unpin; and what a change may expect.
//!
//! Owns preconditions as HTTP says them (`If-Match`, `If-None-Match`, `?expected_version`). Never
//! compares them: the registry does, in the name's own turn. The thing to know: an ETag is the
//! digest of the current version.

use super::shown;
use crate::access::Caller;
use crate::adapters::Digest;
use crate::adapters::version::{Entry, Expected, model_not_found};
use crate::api::Api;
use crate::api::http::auth::actor;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::errors::{invalid_value, not_found};
use crate::api::wire::{AdapterVersion, ErrorBody, VersionFields};
use crate::error::{Error, Result};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::header::{ETAG, IF_MATCH, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use std::sync::Arc;

/// Query of a rollback.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedQuery {
    expected_version: Option<u64>,
}

/// Moves the name to another of its versions; running requests finish on theirs.
#[utoipa::path(
    post,
    path = "/v1/adapters/{name}/rollback",
    params(
        ("name" = String, Path),
        ("expected_version" = Option<u64>, Query, description = "Refuse unless it is current"),
        ("if-match" = Option<String>, Header, description = "Refuse unless this ETag is current"),
    ),
    request_body = VersionFields,
    responses(
        (status = 200, description = "The version that is now current", body = AdapterVersion),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
pub async fn roll_back(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    query: Result<Query<ExpectedQuery>, QueryRejection>,
    headers: HeaderMap,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let Query(query) = query.map_err(|e| invalid_value("expected_version", e.body_text()))?;
    let expected = expected(&headers, query.expected_version)?;
    let VersionFields { version } = rest(body)?;
    let by = actor(&caller, &name);
    shown(&name, &caller, api.registry.roll_back(&name, version, expected, &by).await)
}

/// Keeps a version resident and on disk until it is unpinned, restarts included.
#[utoipa::path(
    post,
    path = "/v1/adapters/{name}/pin",
    params(("name" = String, Path)),
    request_body = VersionFields,
    responses(
        (status = 200, body = AdapterVersion),
        (status = "4XX", description = "Refused", body = ErrorBody),
        (status = 507, description = "No room", body = ErrorBody),
    )
)]
pub async fn pin(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let VersionFields { version } = rest(body)?;
    let by = actor(&caller, &name);
    shown(&name, &caller, api.registry.pin(&name, version, &by).await)
}

/// Undoes a pin.
#[utoipa::path(
    post,
    path = "/v1/adapters/{name}/unpin",
    params(("name" = String, Path)),
    request_body = VersionFields,
    responses((status = 200, body = AdapterVersion), (status = "4XX", body = ErrorBody))
)]
pub async fn unpin(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let VersionFields { version } = rest(body)?;
    let by = actor(&caller, &name);
    shown(&name, &caller, api.registry.unpin(&name, version, &by).await)
}

fn shown(name: &str, caller: &Caller, done: Result<Entry>) -> Result<Response> {
    let entry = done.map_err(|e| named(e, name))?;
    Ok((etag(&entry), Json(shown::version(&entry, caller))).into_response())
}

/// The registry speaks of models; an admin asked for an adapter.
pub fn named(error: Error, name: &str) -> Error {
    match error.code {
        "model_not_found" if error.message == model_not_found(name).message => not_found(name),
        // A version is missing, which only the registry's message says.
        "model_not_found" => Error { message: error.message, ..not_found(name) },
        _ => error,
    }
}

/// The header that names a version's content.
pub fn etag(entry: &Entry) -> [(HeaderName, HeaderValue); 1] {
    let tag = format!("\"{}\"", entry.version.digest);
    [(ETAG, HeaderValue::from_str(&tag).expect("a digest is plain ASCII"))]
}

/// What the caller takes the name for. `expected_version = 0` says that there is none yet.
pub fn expected(headers: &HeaderMap, version: Option<u64>) -> Result<Vec<Expected>> {
    let mut all: Vec<Expected> = version
        .map(|n| if n == 0 { Expected::Absent } else { Expected::Version(n) })
        .into_iter()
        .collect();
    let text = |header: HeaderName| {
        let values = headers.get_all(header).iter();
        let values: Vec<&str> = values.filter_map(|v| v.to_str().ok()).collect();
        (!values.is_empty()).then(|| values.join(","))
    };
    if let Some(tags) = text(IF_MATCH) {
        let tags: Vec<&str> = tags.split(',').map(str::trim).collect();
        all.push(match tags.contains(&"*") {
            true => Expected::Present,
            // A tag that is none of ours matches nothing, and a weak one never does.
            false => Expected::Content(tags.iter().filter_map(|t| digest(t)).collect()),
        });
    }
    match text(IF_NONE_MATCH).as_deref().map(str::trim) {
        None => {}
        Some("*") => all.push(Expected::Absent),
        Some(_) => return Err(invalid_value("if-none-match", "`If-None-Match` may only be `*`")),
    }
    Ok(all)
}

fn digest(tag: &str) -> Option<Digest> {
    Digest::parse(tag.strip_prefix('"')?.strip_suffix('"')?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preconditions_are_read_as_http_says_them() {
        let digest = Digest([1; 32]);
        let read = |name: &str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HeaderName::try_from(name).unwrap(), value.parse().unwrap());
            expected(&headers, None)
        };
        let tag = format!("\"{digest}\"");
        assert_eq!(read("if-match", &tag).unwrap(), [Expected::Content(vec![digest])]);
        let two = format!("\"other\", {tag}");
        assert_eq!(read("if-match", &two).unwrap(), [Expected::Content(vec![digest])]);
        let weak = format!("W/{tag}");
        assert_eq!(read("if-match", &weak).unwrap(), [Expected::Content(vec![])]);
        assert_eq!(read("if-match", "*").unwrap(), [Expected::Present]);
        assert_eq!(read("if-none-match", "*").unwrap(), [Expected::Absent]);
        assert_eq!(read("if-none-match", &tag).unwrap_err().code, "invalid_value");
        let both = expected(&HeaderMap::new(), Some(7)).unwrap();
        assert_eq!(both, [Expected::Version(7)]);
        assert_eq!(expected(&HeaderMap::new(), Some(0)).unwrap(), [Expected::Absent]);
    }
}
