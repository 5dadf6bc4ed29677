//! `/v1/audit`: what administrators did.
//!
//! Owns the page and the rotation. Never makes a record: the layer `http/audit` does.

use crate::access::Caller;
use crate::access::audit::{Cut, Query as AuditQuery};
use crate::api::Api;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::errors::invalid_value;
use crate::api::http::touched::Touched;
use crate::api::wire::{AuditList, AuditRecord, AuditRotate, AuditRotated, ErrorBody};
use crate::clock::Now;
use crate::error::Result;
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// Records of one page.
const RECORDS_DEFAULT: u64 = 100;
const RECORDS_MAX: u64 = 1000;

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
    let mut records = api.access.records(&query).await?;
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
    let archived = api.access.rotate_audit(cut, Now::read().wall).await?;
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
