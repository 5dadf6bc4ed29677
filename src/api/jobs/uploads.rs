//! `/v1/uploads`: a file in parts, for clients that send large ones so.
//!
//! Owns the routes. Never joins a part: `files` does.

use super::files::{check_room, lifetime, purpose, shown, touched};
use super::form::{self, Form, plain_name};
use crate::access::Caller;
use crate::api::Api;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::errors::invalid_value;
use crate::api::http::intake::UPLOAD_BYTES;
use crate::api::http::touched::Touched;
use crate::api::wire::{CompleteFields, ErrorBody, PartShown, UploadFields, UploadShown};
use crate::error::Result;
use crate::files::{FileRow, NewFile, Upload};
use axum::Json;
use axum::extract::{Extension, Path, Request, State};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// Bytes of one part, as OpenAI's.
const PART_BYTES_MAX: u64 = 64 << 20;
/// It is not kept: a file is for its purpose, whatever its type is called.
const MIME_TYPE_BYTES_MAX: usize = 255;
/// Hex digits of an MD5.
const MD5_DIGITS: usize = 32;

/// Begins an upload in parts. It is forgotten after an hour.
#[utoipa::path(
    post,
    path = "/v1/uploads",
    request_body = UploadFields,
    responses(
        (status = 200, body = UploadShown),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
        (status = 507, description = "No room", body = ErrorBody),
    )
)]
pub async fn create(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let fields: UploadFields = rest(body)?;
    let new = NewFile {
        tenant: caller.tenant().map(str::to_owned),
        name: plain_name(&fields.filename),
        purpose: purpose(&fields.purpose)?,
        lifetime: fields.expires_after.as_ref().map(lifetime).transpose()?,
    };
    if fields.mime_type.len() > MIME_TYPE_BYTES_MAX {
        let message = format!("`mime_type` is longer than {MIME_TYPE_BYTES_MAX} bytes");
        return Err(invalid_value("mime_type", message));
    }
    if fields.bytes <= api.files.limits().file_bytes_max {
        check_room(&api, &caller, fields.bytes)?;
    }
    let upload = api.files.begin_upload(new, fields.bytes).await?;
    let touched = Extension(Touched { name: Some(upload.id.clone()), digest: None });
    Ok((touched, Json(state(upload, None))).into_response())
}

/// Adds a part, at most 64 MiB, in the form's field `data`.
#[utoipa::path(
    post,
    path = "/v1/uploads/{id}/parts",
    params(("id" = String, Path)),
    request_body(content = Vec<u8>, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The part, on disk", body = PartShown),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
        (status = 507, description = "No room", body = ErrorBody),
    )
)]
pub async fn add_part(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<PartShown>> {
    let _place = api.requests.intake.upload(&caller)?;
    let _held = api.requests.intake.hold(&caller, UPLOAD_BYTES)?;
    let form = Form {
        file: "data",
        texts: &[],
        check: |_, _| Ok(()),
        incoming: api.files.receive_part(&id, caller.tenant()).await?,
        bytes_max: PART_BYTES_MAX,
        api: &api,
        caller: &caller,
    };
    let filled = form::read(request, form).await?;
    let part = api.files.add_part(&id, caller.tenant(), filled.received).await?;
    Ok(Json(PartShown {
        id: part.id,
        object: "upload.part",
        created_at: part.created,
        upload_id: part.upload,
    }))
}

/// Puts the named parts together into a file.
#[utoipa::path(
    post,
    path = "/v1/uploads/{id}/complete",
    params(("id" = String, Path)),
    request_body = CompleteFields,
    responses(
        (status = 200, description = "With the `file`, on disk", body = UploadShown),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
        (status = 507, description = "No room", body = ErrorBody),
    )
)]
pub async fn complete(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let fields: CompleteFields = rest(body)?;
    let md5 = fields.md5.as_deref();
    if md5.is_some_and(|md5| md5.len() != MD5_DIGITS || !md5.bytes().all(|b| b.is_ascii_hexdigit()))
    {
        return Err(invalid_value("md5", "`md5` is 32 hex digits"));
    }
    // The disk is as busy with it as with an upload.
    let _place = api.requests.intake.upload(&caller)?;
    let (upload, file) = api.files.complete(&id, caller.tenant(), &fields.part_ids, md5).await?;
    let touched = touched(&file);
    Ok((touched, Json(state(upload, Some(file)))).into_response())
}

/// Ends an upload that is not completed, and removes its parts.
#[utoipa::path(
    post,
    path = "/v1/uploads/{id}/cancel",
    params(("id" = String, Path)),
    responses((status = 200, body = UploadShown), (status = "4XX", body = ErrorBody))
)]
pub async fn cancel(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<UploadShown>> {
    Ok(Json(state(api.files.cancel_upload(&id, caller.tenant()).await?, None)))
}

fn state(upload: Upload, file: Option<FileRow>) -> UploadShown {
    UploadShown {
        id: upload.id,
        object: "upload",
        bytes: upload.bytes,
        created_at: upload.created,
        expires_at: upload.expires,
        filename: upload.name,
        purpose: upload.purpose.name(),
        status: upload.state.name(),
        file: file.map(shown),
    }
}
