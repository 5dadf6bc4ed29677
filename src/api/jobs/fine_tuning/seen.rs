//! `/v1/fine_tuning/seen`: which versions learnt from a record.
//!
//! Owns the route. Never keeps the record: digests are compared.

use crate::access::Caller;
use crate::adapters::version::Entry;
use crate::api::Api;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::errors::invalid_value;
use crate::api::wire::{ErrorBody, SeenBy, SeenFields, SeenVersion};
use crate::error::Result;
use crate::train::data::{Digest, digest_of};
use axum::Json;
use axum::extract::{Extension, State};
use serde_json::Value;
use std::sync::Arc;

/// Versions that learnt from a record, or were made of such; the record's file may be gone.
///
/// Spaces and the order of keys make no difference; everything else does. What was held out to
/// measure by was not learnt. A key with a tenant asks about its tenant's jobs.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/seen",
    request_body = SeenFields,
    responses((status = 200, body = SeenBy), (status = "4XX", body = ErrorBody))
)]
pub async fn seen(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    JsonObject(body): JsonObject,
) -> Result<Json<SeenBy>> {
    let SeenFields { record } = rest(body)?;
    let (jobs, versions) = api.jobs.seen(caller.tenant(), &digest(record)?).await?;
    let (known, others): (Vec<Entry>, Vec<Entry>) =
        versions.into_iter().partition(|entry| caller.sees_version(&entry.version.id()));
    let shown = |entry: &Entry| {
        let lineage = &entry.version.lineage;
        let own =
            lineage.is_trained() && lineage.job().is_some_and(|j| jobs.iter().any(|l| l == j));
        SeenVersion {
            id: entry.version.id(),
            by: if own { "training" } else { "descent" },
            jobs: lineage
                .training_jobs()
                .filter(|j| jobs.iter().any(|l| l == j))
                .map(str::to_owned)
                .collect(),
            current: entry.current,
        }
    };
    let data = known.iter().map(shown).collect();
    Ok(Json(SeenBy { object: "list", data, others: others.len() }))
}

/// Of a line of a file: JSON, or text that is JSON.
fn digest(record: Value) -> Result<Digest> {
    let wrong = || invalid_value("record", "`record` must be a line of a file: a JSON object");
    let record = match record {
        Value::String(line) => serde_json::from_str(&line).map_err(|_| wrong())?,
        record => record,
    };
    if !record.is_object() {
        return Err(wrong());
    }
    Ok(digest_of(record))
}
