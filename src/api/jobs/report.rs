//! What a job says of itself when it is over, as JSON or as a picture.
//!
//! Owns the choice between the two. Never makes a report: jobs write theirs down.

use crate::access::Caller;
use crate::api::Api;
use crate::api::http::errors::invalid_value;
use crate::error::{Error, Result};
use crate::jobs::Kind;
use axum::Json;
use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE};
use serde::Deserialize;
use serde_json::Value;

/// Query of a report.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportQuery {
    format: Option<String>,
}

/// The report of a job. Errors: those of [`crate::jobs::Jobs::report`], `invalid_value`.
pub async fn answer(
    api: &Api,
    (kind, id): (Kind, &str),
    caller: &Caller,
    query: Result<Query<ReportQuery>, QueryRejection>,
    headers: &HeaderMap,
) -> Result<Response> {
    let wrong = || invalid_value("format", "the query may hold `format`, json or svg");
    let Query(query) = query.map_err(|_| wrong())?;
    let accepts = headers.get(ACCEPT).and_then(|v| v.to_str().ok());
    let picture = match query.format.as_deref() {
        Some("json") => false,
        Some("svg") => true,
        None => accepts.is_some_and(|types| types.contains("image/svg+xml")),
        Some(_) => return Err(wrong()),
    };
    let stored = api.jobs.report(kind, id, caller.tenant()).await?;
    if picture {
        return Ok(([(CONTENT_TYPE, "image/svg+xml")], stored.picture).into_response());
    }
    let value = |text: &str| {
        serde_json::from_str::<Value>(text).map_err(|e| Error::fault(format!("a report: {e}")))
    };
    let mut report = value(&stored.report)?;
    report["evaluation"] = stored.evaluation.as_deref().map_or(Ok(Value::Null), value)?;
    Ok(Json(report).into_response())
}
