//! `GET /v1/usage`: what was used, by tenant and adapter or request by request.
//!
//! Owns the query and the answer. Never counts: it reads the log back. The thing to know: it waits
//! for records that are on their way to disk, so an answer that a client has read is in the sums
//! that it asks for next. A tenant's key sees its own records only.

use crate::access::Caller;
use crate::api::Api;
use crate::api::http::errors;
use crate::api::wire::{ErrorBody, UsagePage, UsageRecord, UsageSum};
use crate::error::Result;
use crate::usage::{Filter, Record, Sum};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

const LIMIT_DEFAULT: u64 = 100;
const LIMIT_MAX: u64 = 10_000;
/// For records that were handed over to be committed, and so seen.
const FLUSH_TIME: Duration = Duration::from_secs(5);

/// Query of a usage page.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsageQuery {
    since: Option<u64>,
    until: Option<u64>,
    adapter: Option<String>,
    tenant: Option<String>,
    view: Option<View>,
    limit: Option<u64>,
    after: Option<u64>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum View {
    Sums,
    Records,
}

/// Sums tokens by tenant and adapter, or lists records.
#[utoipa::path(
    get,
    path = "/v1/usage",
    params(
        ("since" = Option<u64>, Query, description = "Unix seconds of a request's end, inclusive"),
        ("until" = Option<u64>, Query, description = "Unix seconds, exclusive"),
        ("adapter" = Option<String>, Query, description = "Name without version, `base`, or a sum"),
        ("tenant" = Option<String>, Query),
        ("view" = Option<String>, Query, description = "`sums` (default) or `records`"),
        ("limit" = Option<u64>, Query, description = "Rows, 1 to 10000; default 100"),
        ("after" = Option<u64>, Query, description = "Records: `next_after` of the page before"),
    ),
    responses((status = 200, body = UsagePage), (status = 400, body = ErrorBody))
)]
pub async fn usage(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<UsageQuery>, QueryRejection>,
) -> Result<Json<UsagePage>> {
    let Query(q) = query.map_err(|e| errors::invalid_value("query", e.body_text()))?;
    let limit = q.limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        let message = format!("`limit` is {limit}; expected 1 to {LIMIT_MAX}");
        return Err(errors::invalid_value("limit", message));
    }
    let view = q.view.unwrap_or(View::Sums);
    if view == View::Sums && q.after.is_some() {
        return Err(errors::invalid_value("after", "`after` is for `view=records`"));
    }
    let milliseconds = |seconds: Option<u64>| seconds.map(|s| s.saturating_mul(1000));
    let filter = Filter {
        since_ms: milliseconds(q.since),
        until_ms: milliseconds(q.until),
        adapter: q.adapter,
        tenant: caller.tenant().map(str::to_owned).or_else(|| q.tenant.clone()),
    };
    let log = &api.usage;
    if api.storage.read_only().is_none() {
        // A disk that is behind delays what is shown, not the answer.
        let _ = tokio::time::timeout(FLUSH_TIME, log.flush()).await;
    }
    let mut page = UsagePage::default();
    if q.tenant.is_some_and(|asked| filter.tenant != Some(asked)) {
        // Another's: exactly as if nobody had that name.
        match view {
            View::Sums => page.sums = Some(Vec::new()),
            View::Records => page.records = Some(Vec::new()),
        }
        return Ok(Json(page));
    }
    // One more than asked for shows whether there is more.
    match view {
        View::Sums => {
            let mut sums = log.sums(&filter, limit + 1).await?;
            page.has_more = sums.len() as u64 > limit;
            sums.truncate(limit as usize);
            page.sums = Some(sums.into_iter().map(sum).collect());
        }
        View::Records => {
            let mut records = log.records(&filter, q.after.unwrap_or(0), limit + 1).await?;
            page.has_more = records.len() as u64 > limit;
            records.truncate(limit as usize);
            page.next_after = records.last().map(|(number, _)| *number);
            page.records = Some(records.into_iter().map(|(_, r)| record(r)).collect());
        }
    }
    Ok(Json(page))
}

fn sum(sum: Sum) -> UsageSum {
    UsageSum {
        tenant: sum.tenant,
        adapter: sum.adapter,
        requests: sum.requests,
        prompt_tokens: sum.prompt_tokens,
        cached_tokens: sum.cached_tokens,
        completion_tokens: sum.completion_tokens,
    }
}

fn record(r: Record) -> UsageRecord {
    UsageRecord {
        id: r.id,
        request_id: r.request_id,
        ended_ms: r.ended_ms,
        tenant: r.tenant,
        key_id: r.key_id,
        adapter: r.adapter,
        version: r.version,
        digest: r.digest,
        prompt_tokens: r.prompt_tokens,
        cached_tokens: r.cached_tokens,
        completion_tokens: r.completion_tokens,
        finish_reason: r.finish_reason.name().to_owned(),
        route: r.route,
        status: r.status,
    }
}
