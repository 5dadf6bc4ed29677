//! `/v1/files`: upload, list, show, download, preview.
//!
//! Owns the routes and what a file may be for. Never opens a file by a client's name: `files` keeps
//! contents, and knows whose they are.

use super::form::{self, Form};
use crate::access::Caller;
use crate::api::Api;
use crate::api::http::auth::tenant;
use crate::api::http::body::missing;
use crate::api::http::errors::invalid_value;
use crate::api::http::intake::UPLOAD_BYTES;
use crate::api::http::touched::Touched;
use crate::api::wire::{ErrorBody, ExpiresAfter, FileList, FileShown, PreviewList, PreviewShown};
use crate::error::{Error, Result, brief};
use crate::files::{FileRow, NewFile, Page, Purpose};
use crate::jobs::Preview;
use crate::train::data::Kind;
use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::HeaderValue;
use http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE};
use serde::Deserialize;
use std::sync::Arc;
use tokio::io::AsyncReadExt;

/// Files of one page.
const PAGE_MAX: usize = 10_000;
/// Bytes of a content that are read at a time.
const PIECE: usize = 256 << 10;
/// Fields of the form beside the file.
const ANCHOR: &str = "expires_after[anchor]";
const SECONDS: &str = "expires_after[seconds]";
/// Shortest and longest life of a file that expires: an hour, 30 days.
const SECONDS_MIN: u64 = 3600;
const SECONDS_MAX: u64 = 30 * 86_400;

/// Examples of a preview.
const PREVIEWS: usize = 5;
const PREVIEWS_MAX: usize = 100;

/// Query of a preview.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreviewQuery {
    limit: Option<usize>,
    method: Option<String>,
    truncate: Option<bool>,
}

/// Query of a page.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    purpose: Option<String>,
    limit: Option<usize>,
    order: Option<String>,
    after: Option<String>,
}

/// Uploads a file: JSON Lines to train on.
///
/// Each line is looked at while it comes, as far as that needs no tokenizer. A file with a line
/// that nothing can be learned from is kept with the status `error`.
#[utoipa::path(
    post,
    path = "/v1/files",
    request_body(content = Vec<u8>, content_type = "multipart/form-data",
        description = "`file`, `purpose` (`fine-tune`), and perhaps `expires_after[anchor]` \
                       (`created_at`) and `expires_after[seconds]`"),
    responses(
        (status = 200, description = "The file, on disk", body = FileShown),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
        (status = 507, description = "No room", body = ErrorBody),
    )
)]
pub async fn create(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response> {
    let _place = api.requests.intake.upload(&caller)?;
    let _held = api.requests.intake.hold(&caller, UPLOAD_BYTES)?;
    let form = Form {
        file: "file",
        texts: &["purpose", ANCHOR, SECONDS],
        check: |name, text| if name == "purpose" { purpose(text).map(drop) } else { Ok(()) },
        incoming: api.files.receive(caller.tenant())?,
        bytes_max: api.files.limits().file_bytes_max,
        api: &api,
        caller: &caller,
    };
    let filled = form::read(request, form).await?;
    let said = |name: &str| filled.texts.get(name);
    let anchored = (said(ANCHOR), said(SECONDS));
    let lifetime = match anchored {
        (None, None) => None,
        (Some(_), None) => return Err(missing(SECONDS)),
        (anchor, Some(seconds)) => {
            let anchor = anchor.cloned().ok_or_else(|| missing(ANCHOR))?;
            let wrong = || invalid_value(SECONDS, format!("`{SECONDS}` must be an integer"));
            let seconds = seconds.trim().parse().map_err(|_| wrong())?;
            Some(lifetime(&ExpiresAfter { anchor, seconds })?)
        }
    };
    let new = NewFile {
        tenant: caller.tenant().map(str::to_owned),
        name: filled.filename,
        purpose: purpose(filled.texts.get("purpose").ok_or_else(|| missing("purpose"))?)?,
        lifetime,
    };
    let file = api.files.add(filled.received, new).await?;
    tracing::info!(file = file.id, bytes = file.bytes, "a file was uploaded");
    Ok((touched(&file), Json(shown(file))).into_response())
}

/// Lists files, newest first; a tenant's key sees its tenant's.
#[utoipa::path(
    get,
    path = "/v1/files",
    params(
        ("purpose" = Option<String>, Query, description = "Only files with this purpose"),
        ("limit" = Option<usize>, Query, description = "1 to 10000, default 10000"),
        ("order" = Option<String>, Query, description = "`desc` (default) or `asc`, by age"),
        ("after" = Option<String>, Query, description = "Id of the file before the first"),
    ),
    responses((status = 200, body = FileList), (status = "4XX", body = ErrorBody))
)]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<FileList>> {
    let wrong = "the query may hold `purpose`, `limit`, `order` and `after`";
    let Query(query) = query.map_err(|_| invalid_value("limit", wrong))?;
    let limit = query.limit.unwrap_or(PAGE_MAX);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(invalid_value("limit", format!("`limit` must be from 1 to {PAGE_MAX}")));
    }
    let ascending = match query.order.as_deref() {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(invalid_value("order", "`order` must be asc or desc")),
    };
    let after = match &query.after {
        None => None,
        Some(id) => {
            let file = api.files.get(id, caller.tenant()).await;
            let message = "`after` must be the id of a file that is there";
            Some(file.map_err(|_| invalid_value("after", message))?.number)
        }
    };
    let purpose = query.purpose.as_deref().map(Purpose::named);
    let (files, has_more) = match purpose {
        // Nothing is ever kept for another purpose.
        Some(None) => (Vec::new(), false),
        known => {
            let page = Page { purpose: known.flatten(), ascending, after, limit };
            api.files.page(caller.tenant(), &page).await?
        }
    };
    let data: Vec<FileShown> = files.into_iter().map(shown).collect();
    Ok(Json(FileList {
        object: "list",
        first_id: data.first().map(|file| file.id.clone()),
        last_id: data.last().map(|file| file.id.clone()),
        data,
        has_more,
    }))
}

/// Shows one file.
#[utoipa::path(
    get,
    path = "/v1/files/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = FileShown), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<FileShown>> {
    Ok(Json(shown(api.files.get(&id, caller.tenant()).await?)))
}

/// The content of a file, as it was uploaded.
#[utoipa::path(
    get,
    path = "/v1/files/{id}/content",
    params(("id" = String, Path)),
    responses(
        (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 404, body = ErrorBody),
    )
)]
pub async fn content(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response> {
    let (file, content) = api.files.open_content(&id, caller.tenant()).await?;
    let pieces =
        futures::stream::try_unfold(tokio::fs::File::from_std(content), |mut content| async move {
            let mut piece = vec![0; PIECE];
            let read = content.read(&mut piece).await?;
            piece.truncate(read);
            Ok::<_, std::io::Error>((read > 0).then(|| (Bytes::from(piece), content)))
        });
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(file.bytes));
    let plain = |c: &char| c.is_ascii_alphanumeric() || "._- ".contains(*c);
    let name: String = file.name.chars().filter(plain).collect();
    if let Ok(name) = HeaderValue::try_from(format!("attachment; filename=\"{name}\"")) {
        headers.insert(CONTENT_DISPOSITION, name);
    }
    Ok(response)
}

/// The first examples of a file as text, with what is learnt of each marked.
///
/// What a training job would refuse is refused here as well, as far as it is read.
#[utoipa::path(
    get,
    path = "/v1/files/{id}/preview",
    params(
        ("id" = String, Path),
        ("limit" = Option<usize>, Query, description = "Examples, 1 to 100, default 5"),
        ("method" = Option<String>, Query,
            description = "`supervised` or `dpo`; default: what the first line is for"),
        ("truncate" = Option<bool>, Query, description = "As a job's `truncate`"),
    ),
    responses((status = 200, body = PreviewList), (status = "4XX", body = ErrorBody))
)]
pub async fn preview(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    query: Result<Query<PreviewQuery>, QueryRejection>,
) -> Result<Json<PreviewList>> {
    let wrong = "the query may hold `limit`, `method` and `truncate`";
    let Query(query) = query.map_err(|_| invalid_value("limit", wrong))?;
    let limit = query.limit.unwrap_or(PREVIEWS);
    if !(1..=PREVIEWS_MAX).contains(&limit) {
        let message = format!("`limit` must be from 1 to {PREVIEWS_MAX}");
        return Err(invalid_value("limit", message));
    }
    let kind = match query.method.as_deref() {
        None => None,
        Some("supervised") => Some(Kind::Supervised),
        Some("dpo") => Some(Kind::Preference),
        Some(_) => return Err(invalid_value("method", "`method` must be supervised or dpo")),
    };
    let (file, content) = api.files.open_content(&id, caller.tenant()).await?;
    let truncate = query.truncate.unwrap_or(false);
    let how = Preview { kind, truncate, limit, now: file.created };
    let data = api.jobs.preview(content, how).await?.into_iter().map(PreviewShown::from);
    Ok(Json(PreviewList { object: "list", data: data.collect() }))
}

pub fn shown(file: FileRow) -> FileShown {
    FileShown {
        id: file.id,
        object: "file",
        bytes: file.bytes,
        created_at: file.created,
        expires_at: file.expires,
        filename: file.name,
        purpose: file.purpose.name(),
        status: if file.problem.is_none() { "processed" } else { "error" },
        status_details: file.problem,
    }
}

/// What a client's file may be for. Errors: `unsupported_purpose`.
pub fn purpose(asked: &str) -> Result<Purpose> {
    let message = match Purpose::named(asked) {
        Some(purpose @ Purpose::FineTune) => return Ok(purpose),
        Some(Purpose::FineTuneResults) => {
            "files with the purpose `fine-tune-results` are made by jobs only".to_owned()
        }
        None => {
            let shown = brief(asked);
            format!("nothing here uses a file with the purpose `{shown}`: send `fine-tune`")
        }
    };
    Err(Error::invalid("unsupported_purpose", message).param("purpose"))
}

/// How long a file is to live. Errors: `invalid_value`.
pub fn lifetime(after: &ExpiresAfter) -> Result<u64> {
    if after.anchor != "created_at" {
        return Err(invalid_value(ANCHOR, "`anchor` must be created_at"));
    }
    match after.seconds {
        seconds @ SECONDS_MIN..=SECONDS_MAX => Ok(seconds),
        _ => {
            let message = format!("`seconds` must be from {SECONDS_MIN} to {SECONDS_MAX}");
            Err(invalid_value(SECONDS, message))
        }
    }
}

/// For the audit log.
pub fn touched(file: &FileRow) -> Extension<Touched> {
    let digest = Some(format!("sha256:{}", file.digest));
    Extension(Touched { name: Some(file.id.clone()), digest })
}

/// Whether the caller may have `bytes` more on disk. Errors: `disk_nearly_full`,
/// `tenant_share_exceeded`.
pub fn check_room(api: &Api, caller: &Caller, bytes: u64) -> Result<()> {
    api.registry.check_bytes(&tenant(caller), bytes, 0)
}
