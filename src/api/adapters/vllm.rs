//! vLLM's two routes for adapters that lie on the server: `load_lora_adapter` and its counterpart.
//!
//! Owns their bodies, statuses and plain-text answers, which tools compare byte by byte; so errors
//! here have vLLM's types and numeric codes. Never reads a path that the operator did not allow.
//! The thing to know: a path is resolved, links and `..` included, before it is compared, and every
//! path outside gets one answer, whether something is there or not.

use crate::access::Caller;
use crate::adapters::registry::Staging;
use crate::adapters::version::{Publish, Removal};
use crate::api::Api;
use crate::api::http::body::{JsonObject, typed};
use crate::api::http::touched::Touched;
use crate::api::http::{auth, errors};
use crate::api::wire::{LoadLora, PeerError, PeerErrorBody, UnloadLora};
use crate::database::write_failed;
use crate::error::{Error, Kind, Result, brief};
use axum::Json;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Loads an adapter from a directory below one of `adapter_dirs`.
#[utoipa::path(
    post,
    path = "/v1/load_lora_adapter",
    request_body = LoadLora,
    responses(
        (status = 200, description = "Loaded", body = String, content_type = "text/plain"),
        (status = "4XX", body = PeerErrorBody),
        (status = 500, body = PeerErrorBody),
    )
)]
pub async fn load(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let asked: LoadLora = typed(body)?;
    let name = asked.lora_name.clone().unwrap_or_default();
    Ok(match load_checked(&api, &caller, asked).await {
        Ok(()) => said(name.clone(), format!("Success: LoRA adapter '{name}' added successfully.")),
        Err(failure) => failure.answer(name),
    })
}

/// Removes an adapter by its name.
#[utoipa::path(
    post,
    path = "/v1/unload_lora_adapter",
    request_body = UnloadLora,
    responses(
        (status = 200, description = "Removed", body = String, content_type = "text/plain"),
        (status = "4XX", body = PeerErrorBody),
        (status = 500, body = PeerErrorBody),
    )
)]
pub async fn unload(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    JsonObject(mut body): JsonObject,
) -> Result<Response> {
    // vLLM's own number of the adapter: read over there too.
    body.remove("lora_int_id");
    let asked: UnloadLora = typed(body)?;
    let name = asked.lora_name.unwrap_or_default();
    let absent = || {
        Failure::new(
            StatusCode::NOT_FOUND,
            "NotFoundError",
            format!("The lora adapter '{}' cannot be found.", brief(&name)),
        )
    };
    if name.is_empty() {
        let message = "'lora_name' needs to be provided to unload a LoRA adapter.";
        return Ok(Failure::input(message).answer(name));
    }
    if !caller.sees(&name) {
        return Ok(absent().answer(name));
    }
    let how = Removal { by: auth::actor(&caller, &name), ..Removal::default() };
    Ok(match api.registry.delete(&name, how).await {
        Ok(_) => {
            said(name.clone(), format!("Success: LoRA adapter '{name}' removed successfully."))
        }
        Err(e) if e.kind == Kind::NotFound => absent().answer(name),
        Err(e) => Failure::from(errors::told(e, &caller)).answer(name),
    })
}

async fn load_checked(
    api: &Arc<Api>,
    caller: &Caller,
    asked: LoadLora,
) -> std::result::Result<(), Failure> {
    let (name, path) = (asked.lora_name.unwrap_or_default(), asked.lora_path.unwrap_or_default());
    if name.is_empty() || path.is_empty() {
        return Err(Failure::input("Both 'lora_name' and 'lora_path' must be provided."));
    }
    if asked.is_3d_lora_weight.unwrap_or(false) {
        return Err(Failure::input("'is_3d_lora_weight' is not supported."));
    }
    if !caller.sees(&name) {
        let message = format!("Your key may not use the name '{}'.", brief(&name));
        return Err(Failure::new(StatusCode::FORBIDDEN, "InvalidUserInput", message));
    }
    let permit = api.requests.intake.upload(caller)?;
    let staging = api.registry.stage(&name).map_err(|e| Failure::input(e.message))?;
    let by = auth::actor(caller, &name);
    api.registry.check_right(&name, &by).await?;
    let there = !api.registry.versions(&name).is_empty();
    if there && !asked.load_inplace.unwrap_or(false) {
        return Err(Failure::input(format!(
            "The lora adapter '{}' has already been loaded. If you want to load the adapter in \
             place, set 'load_inplace' to True.",
            brief(&name)
        )));
    }
    let (dirs, most) = (api.config.adapter_dirs.clone(), api.config.upload_bytes_max.0);
    let registry = api.registry.clone();
    let copied = tokio::task::spawn_blocking(move || {
        let from = allowed(&dirs, Path::new(&path))?;
        registry.check_reserve()?;
        copy(&from, &staging, most)?;
        Ok::<_, Failure>((staging, permit))
    });
    let (staging, _permit) =
        copied.await.map_err(|_| Error::fault("copying the adapter failed"))??;
    api.registry.publish(staging, Publish { by, ..Publish::default() }).await?;
    Ok(())
}

/// The real place of `path`, if it lies below one of `dirs`.
fn allowed(dirs: &[PathBuf], path: &Path) -> std::result::Result<PathBuf, Failure> {
    let outside = || {
        let message = "'lora_path' is not below a directory that the operator allowed \
                       (adapter_dirs).";
        Failure::input(message)
    };
    let dirs: Vec<PathBuf> = dirs.iter().filter_map(|dir| dir.canonicalize().ok()).collect();
    let below = |path: &Path| dirs.iter().any(|dir| path.starts_with(dir));
    match path.canonicalize() {
        Ok(real) if below(&real) => Ok(real),
        Ok(_) => Err(outside()),
        // Nothing is there: only who asks below an allowed directory is told so.
        Err(_) => {
            let plain =
                path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
            if plain && below(path) { Err(Failure::absent()) } else { Err(outside()) }
        }
    }
}

/// Copies the files of an adapter, and nothing else, from a directory. Links are not followed.
fn copy(from: &Path, staging: &Staging, bytes_max: u64) -> std::result::Result<(), Failure> {
    let entries = std::fs::read_dir(from).map_err(|_| Failure::absent())?;
    let (mut copied, mut bytes) = (0, 0);
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let regular = entry.file_type().is_ok_and(|t| t.is_file());
        let Some(place) = regular.then(|| staging.file_path(&name)).flatten() else {
            continue;
        };
        bytes += entry.metadata().map_or(0, |m| m.len());
        if bytes > bytes_max {
            let message = format!("the adapter is larger than upload_bytes_max = {bytes_max}");
            return Err(Error::new(Kind::TooLarge, "upload_too_large", message).into());
        }
        std::fs::copy(entry.path(), place)
            .map_err(|e| write_failed(&format!("copying {name} failed"), &e))?;
        copied += 1;
    }
    if copied == 0 { Err(Failure::absent()) } else { Ok(()) }
}

/// What went wrong, in vLLM's words.
struct Failure {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// Our own code, for the audit log.
    code: &'static str,
}

impl Failure {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let code = match status {
            StatusCode::NOT_FOUND => "adapter_not_found",
            StatusCode::FORBIDDEN => "name_not_allowed",
            _ => "invalid_value",
        };
        Self { status, kind, message: message.into(), code }
    }

    fn input(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidUserInput", message)
    }

    fn absent() -> Self {
        let message = "No adapter files found at 'lora_path'.";
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message)
    }

    fn answer(self, name: String) -> Response {
        let body = PeerErrorBody {
            error: PeerError {
                message: self.message,
                kind: self.kind,
                param: None,
                code: self.status.as_u16(),
            },
        };
        let mut response = (self.status, touched(name), Json(body)).into_response();
        response.extensions_mut().insert(crate::api::http::errors::Code(self.code));
        response
    }
}

impl From<Error> for Failure {
    /// Names that stand in each other's way are the client's to settle, and names that its key may
    /// not change it must leave; whatever else goes wrong, a wrong rank included, is a 500 there.
    fn from(e: Error) -> Self {
        let code = e.code;
        if e.kind == Kind::Conflict {
            return Self { code, ..Self::input(e.message) };
        }
        if e.kind == Kind::Forbidden {
            return Self::new(StatusCode::FORBIDDEN, "InvalidUserInput", e.message);
        }
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self { code, ..Self::new(status, "InternalServerError", e.message) }
    }
}

fn said(name: String, text: String) -> Response {
    (touched(name), text).into_response()
}

fn touched(name: String) -> Extension<Touched> {
    Extension(Touched { name: Some(name), digest: None })
}
