//! The audit log over HTTP: every administrative request is recorded, and `GET /v1/audit` shows it.
//!
//! Owns when a record is made. Never asks a route to: whatever changes something for administrators
//! is recorded by its scope and method alone. The thing to know: such a request runs as a task of
//! its own, so that a client that hangs up cannot keep its deed out of the log.

use super::account::Origin;
use super::auth;
use super::body::{JsonObject, rest};
use super::errors::{Code, invalid_value};
use super::routes;
use super::wire::{AuditList, AuditRecord, AuditRotate, AuditRotated, ErrorBody};
use super::{Api, clock};
use crate::access::Caller;
use crate::access::audit::{Cut, Query as AuditQuery, Record};
use crate::clock::Now;
use crate::error::{Error, Result};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, MatchedPath, Query, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tracing::Instrument;

/// Records of one page.
const RECORDS_DEFAULT: u64 = 100;
const RECORDS_MAX: u64 = 1000;

/// On the answer to a deed whose record waits for room on the disk.
const AUDIT: HeaderName = HeaderName::from_static("x-polylora-audit");

/// Left on an answer by a route that knows what it was done to, where the path does not say.
#[derive(Clone, Default)]
pub struct Touched {
    pub name: Option<String>,
    pub digest: Option<String>,
}

/// Runs an administrative request to its end and records it, whether or not anyone still waits.
pub async fn recorded(
    api: Arc<Api>,
    caller: Caller,
    action: String,
    request: Request,
    next: Next,
) -> Response {
    let recording = async move {
        let origin = request.extensions().get::<Origin>();
        let request_id = origin.map_or(String::new(), |origin| origin.request_id.to_string());
        let path = request.extensions().get::<MatchedPath>();
        let scope = path.and_then(|path| routes::scope(request.method(), path.as_str()));
        let (mut response, subject) =
            match api.app.access.check_refusals(&caller, Now::read().monotonic) {
                Ok(()) => auth::judged(scope, &caller, request, next).await,
                Err(flood) => (flood.into_response(), None),
            };
        let touched = response.extensions().get::<Touched>().cloned().unwrap_or_default();
        let code = response.extensions().get::<Code>();
        let record = Record {
            id: 0,
            at: clock().as_millis() as u64,
            key: caller.id().to_owned(),
            tenant: caller.tenant().map(str::to_owned),
            action,
            name: touched.name.or(subject).map(|name| name.chars().take(160).collect()),
            digest: touched.digest,
            outcome: code.map_or("ok", |code| code.0).to_owned(),
            status: response.status().as_u16(),
            request_id,
            count: 1,
        };
        let Some(record) = api.app.access.sift(&caller, record, Now::read().monotonic) else {
            return response;
        };
        let line = serde_json::to_string(&record).unwrap_or_default();
        tracing::info!(target: "polylora::audit", "{line}");
        if let Err(error) = api.app.access.record(&record).await {
            // The deed is done and on disk, so the answer stands; it does not pass in silence.
            tracing::error!(%error, line, "an action is not yet in the audit log");
            response.headers_mut().insert(AUDIT, HeaderValue::from_static("deferred"));
        }
        response
    };
    // Its own task, so that the record is written even if the client hangs up.
    match tokio::spawn(recording.in_current_span()).await {
        Ok(response) => response,
        Err(_) => Error::fault("a bug ended the request").into_response(),
    }
}

/// Query of a page.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    before: Option<u64>,
    limit: Option<u64>,
}

/// What administrators did, newest first; a tenant's key sees its tenant's.
#[utoipa::path(
    get,
    path = "/v1/audit",
    params(
        ("before" = Option<u64>, Query, description = "Only records with a smaller id"),
        ("limit" = Option<u64>, Query, description = "1 to 1000, default 100"),
    ),
    responses((status = 200, body = AuditList), (status = "4XX", body = ErrorBody))
)]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    page: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<AuditList>> {
    let wrong = || invalid_value("limit", "the query may hold `before` and `limit`, 1 to 1000");
    let Query(page) = page.map_err(|_| wrong())?;
    let limit = page.limit.unwrap_or(RECORDS_DEFAULT);
    if !(1..=RECORDS_MAX).contains(&limit) {
        return Err(wrong());
    }
    let tenant = caller.tenant().map(str::to_owned);
    let query = AuditQuery { tenant, before: page.before, limit: limit + 1 };
    let mut records = api.app.access.records(&query).await?;
    let has_more = records.len() as u64 > limit;
    records.truncate(limit as usize);
    let data = records.into_iter().map(AuditRecord::from).collect();
    Ok(Json(AuditList { object: "list", data, has_more }))
}

/// Moves records out of the table into a file of the data directory, and says which.
#[utoipa::path(
    post,
    path = "/v1/audit/rotate",
    request_body = AuditRotate,
    responses((status = 200, body = AuditRotated), (status = "4XX", body = ErrorBody))
)]
pub async fn rotate(
    State(api): State<Arc<Api>>,
    JsonObject(body): JsonObject,
) -> Result<(Extension<Touched>, Json<AuditRotated>)> {
    let cut = match rest(body)? {
        AuditRotate { before: Some(id), keep_days: None } => Cut::Before(id),
        AuditRotate { before: None, keep_days: Some(days) } => {
            Cut::Older(Duration::from_secs(days.saturating_mul(86_400)))
        }
        _ => return Err(invalid_value("before", "say either `before` or `keep_days`")),
    };
    let archived = api.app.access.rotate_audit(cut, clock()).await?;
    if let Some(archived) = &archived {
        tracing::info!(file = archived.file, records = archived.records, "audit log rotated");
    }
    let touched = Touched { name: archived.as_ref().map(|a| a.file.clone()), digest: None };
    let body = AuditRotated {
        object: "audit.rotated",
        records: archived.as_ref().map_or(0, |a| a.records),
        first: archived.as_ref().map(|a| a.first),
        last: archived.as_ref().map(|a| a.last),
        file: archived.map(|a| a.file),
    };
    Ok((Extension(touched), Json(body)))
}
