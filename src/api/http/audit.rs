//! The audit log: every request that changes something for administrators is recorded.
//!
//! Owns when a record is made. Never asks a route to: whatever changes something for administrators
//! is recorded by its scope and method alone. The thing to know: such a request runs as a task of
//! its own, so that a client that hangs up cannot keep its deed out of the log.

use super::auth::{changes, parameter};
use super::errors::Code;
use super::request::Origin;
use super::scope::{Matched, Scope};
use super::touched::Touched;
use crate::access::Caller;
use crate::access::audit::Record;
use crate::api::Api;
use crate::clock::Now;
use crate::database::FULL;
use crate::error::{Error, brief};
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue};
use std::sync::Arc;
use tracing::Instrument;

/// On the answer to a deed whose record waits for room on the disk.
const AUDIT: HeaderName = HeaderName::from_static("x-polylora-audit");

/// Records requests that change something for administrators; others pass.
pub async fn recorded(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let scope = Matched::of(&request).scope;
    let caller = request.extensions().get::<Caller>().cloned();
    let administers = matches!(scope, Some(Scope::Admin | Scope::Operator));
    let Some(caller) = caller.filter(|_| administers && changes(&request)) else {
        return next.run(request).await;
    };
    if let Err(error) = api.storage.check() {
        return error.into_response();
    }
    let path = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let action = format!("{} {}", request.method(), path.unwrap_or_default());
    // Its own task, so that the record is written even if the client hangs up.
    let recording = carry_out(api.clone(), caller, action.clone(), request, next);
    let response = match tokio::spawn(recording.in_current_span()).await {
        Ok(response) => response,
        Err(_) => Error::fault("a bug ended the request").into_response(),
    };
    // A function that writes a file may not know the storage that the file is in.
    if response.extensions().get::<Code>().is_some_and(|code| code.0 == FULL) {
        api.storage.make_read_only(&format!("what {action} brought could not be written"));
    }
    response
}

/// Runs an administrative request to its end and records it.
async fn carry_out(
    api: Arc<Api>,
    caller: Caller,
    action: String,
    request: Request,
    next: Next,
) -> Response {
    let origin = request.extensions().get::<Origin>();
    let request_id = origin.map_or(String::new(), |origin| origin.request_id.to_string());
    let (mut response, subject) = match api.access.check_refusals(&caller, Now::read().monotonic) {
        Ok(()) => {
            let (mut parts, content) = request.into_parts();
            let subject = parameter(&mut parts, &["name", "id"]).await;
            (next.run(Request::from_parts(parts, content)).await, subject)
        }
        Err(flood) => (flood.into_response(), None),
    };
    let touched = response.extensions().get::<Touched>().cloned().unwrap_or_default();
    let code = response.extensions().get::<Code>();
    let record = Record {
        id: 0,
        at: Now::read().wall.as_millis() as u64,
        key: caller.id().to_owned(),
        tenant: caller.tenant().map(str::to_owned),
        action,
        name: touched.name.or(subject).map(|name| brief(&name)),
        digest: touched.digest,
        outcome: code.map_or("ok", |code| code.0).to_owned(),
        status: response.status().as_u16(),
        request_id,
        count: 1,
    };
    let Some(record) = api.access.sift(&caller, record, Now::read().monotonic) else {
        return response;
    };
    let line = serde_json::to_string(&record).unwrap_or_default();
    tracing::info!(target: "polylora::audit", "{line}");
    if let Err(error) = api.access.record(&record).await {
        // The deed is done and on disk, so the answer stands; it does not pass in silence.
        tracing::error!(%error, line, "an action is not yet in the audit log");
        response.headers_mut().insert(AUDIT, HeaderValue::from_static("deferred"));
    }
    response
}
