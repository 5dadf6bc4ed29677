//! `DELETE /v1/files/{id}`: a file alone, or with all that rests on it.
//!
//! Owns the route, what it tells of others, and its records in the audit log. Never decides what
//! rests on what: `jobs` does. The thing to know: others' things go as well, and are told by count.

use super::files::touched;
use crate::access::Caller;
use crate::access::audit::Record;
use crate::adapters::version::Entry;
use crate::api::Api;
use crate::api::http::errors::{invalid_value, told};
use crate::api::http::request::Origin;
use crate::api::http::touched::Touched;
use crate::api::wire::{CascadeName, CascadeOthers, CascadeShown, ErrorBody, FileDeleted};
use crate::clock::Now;
use crate::error::{Error, Result};
use crate::jobs::{Deletion, Gone, Job};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use std::sync::Arc;

/// What records of things that went with a file have as their action.
const ACTION: &str = "DELETE /v1/files/{id}?cascade=true";

/// Query of a removal.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveQuery {
    #[serde(default)]
    cascade: bool,
    #[serde(default)]
    dry_run: bool,
}

/// Deletes a file. What was made from it stays.
///
/// With `cascade` all of it goes: versions that learnt from the file and what was made of them,
/// whoever owns it; the jobs, with events, reports and tables of steps; and the prefixes that the
/// engine keeps. It also works for a file that is gone, and again where it ended in the middle.
#[utoipa::path(
    delete,
    path = "/v1/files/{id}",
    params(
        ("id" = String, Path),
        ("cascade" = Option<bool>, Query, description = "Delete what rests on it as well"),
        ("dry_run" = Option<bool>, Query, description = "With `cascade`: only say what would go"),
    ),
    responses(
        (status = 200, body = FileDeleted),
        (status = 409, description = "A job uses it, or an alias what rests on it",
            body = ErrorBody),
        (status = "4XX", body = ErrorBody),
    )
)]
pub async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Extension(origin): Extension<Origin>,
    Path(id): Path<String>,
    query: Result<Query<RemoveQuery>, QueryRejection>,
) -> Result<Response> {
    let wrong = "the query may hold `cascade` and `dry_run`, each true or false";
    let Query(query) = query.map_err(|_| invalid_value("cascade", wrong))?;
    if !query.cascade {
        if query.dry_run {
            return Err(invalid_value("dry_run", "`dry_run` is for `cascade=true`"));
        }
        let file = api.files.remove(&id, caller.tenant()).await?;
        return Ok((touched(&file), Json(shown(file.id, true, None))).into_response());
    }
    let mut deletion = api.jobs.deletion(&id, caller.tenant()).await?;
    let plan = planned(&deletion, &caller);
    let allowed = deletion.check().map_err(|error| named(error, &caller));
    if query.dry_run {
        let blocked_by = allowed.err().map(|error| error.message);
        let plan = CascadeShown { blocked_by, ..plan };
        // The log does not say that it was deleted.
        let touched = Touched { name: Some(format!("{id} (dry run)")), digest: None };
        let body = Json(shown(id, false, Some(plan)));
        return Ok((Extension(touched), body).into_response());
    }
    allowed?;
    let touched = Extension(Touched {
        name: Some(id.clone()),
        digest: deletion.file.as_ref().map(|file| format!("sha256:{}", file.digest)),
    });
    while let Some(gone) = deletion.next().await.map_err(|error| named(error, &caller))? {
        let record = record(&gone, &caller, &origin);
        // The file itself is what the request's own record is of.
        if record.name.as_ref() != Some(&id) {
            let line = serde_json::to_string(&record).unwrap_or_default();
            tracing::info!(target: "polylora::audit", "{line}");
            // One that cannot be written now is kept and written later.
            let _ = api.access.record(&record).await;
        }
    }
    Ok((touched, Json(shown(id, true, Some(plan)))).into_response())
}

fn shown(id: String, deleted: bool, cascade: Option<CascadeShown>) -> FileDeleted {
    FileDeleted { id, object: "file", deleted, cascade }
}

/// An alias is named to whoever may know of it.
fn named(error: Error, caller: &Caller) -> Error {
    let alias = error.message.split('`').nth(1).unwrap_or_default();
    if caller.sees(alias) { error } else { told(error, caller) }
}

fn knows_version(caller: &Caller, entry: &Entry) -> bool {
    caller.sees_version(&entry.version.id())
}

fn knows_job(caller: &Caller, job: &Job) -> bool {
    job.owner.known_to(caller.tenant())
}

/// What would go, as the caller may know of it.
fn planned(deletion: &Deletion, caller: &Caller) -> CascadeShown {
    let known = |entry: &&Entry| knows_version(caller, entry);
    let versions: Vec<_> = deletion.versions.iter().filter(known).collect();
    let jobs: Vec<_> = deletion.jobs.iter().filter(|job| knows_job(caller, job)).collect();
    let own = caller.tenant();
    let results = deletion.results.iter().filter(|f| own.is_none() || f.tenant.as_deref() == own);
    let names = deletion.moved.iter().filter(|(name, _)| caller.sees(name));
    CascadeShown {
        others: CascadeOthers {
            versions: deletion.versions.len() - versions.len(),
            jobs: deletion.jobs.len() - jobs.len(),
        },
        versions: versions.iter().map(|entry| entry.version.id()).collect(),
        jobs: jobs.iter().map(|job| job.id.clone()).collect(),
        files: results.map(|file| file.id.clone()).collect(),
        names: names.map(|(name, to)| CascadeName { name: name.clone(), version: *to }).collect(),
        blocked_by: None,
    }
}

/// One thing that went. Of what the caller may not know only operators read.
fn record(gone: &Gone, caller: &Caller, origin: &Origin) -> Record {
    let (name, digest, known) = match gone {
        Gone::Version(entry) => {
            let version = &entry.version;
            (version.id(), Some(version.digest.to_string()), knows_version(caller, entry))
        }
        Gone::Job(job) => (job.id.clone(), None, knows_job(caller, job)),
        Gone::File(file) => {
            let known = caller.tenant().is_none_or(|own| file.tenant.as_deref() == Some(own));
            (file.id.clone(), Some(format!("sha256:{}", file.digest)), known)
        }
    };
    Record {
        id: 0,
        at: Now::read().wall.as_millis() as u64,
        key: caller.id().to_owned(),
        tenant: caller.tenant().filter(|_| known).map(str::to_owned),
        action: ACTION.to_owned(),
        name: Some(name),
        digest,
        outcome: "ok".to_owned(),
        status: 200,
        request_id: origin.request_id.to_string(),
        count: 1,
    }
}
