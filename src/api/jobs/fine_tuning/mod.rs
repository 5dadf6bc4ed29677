//! `/v1/fine_tuning/jobs`: order a training job, look at it, stop it, and read what it tells.
//!
//! Owns the routes. Never trains: `jobs` does, when requests leave the engine time. The thing to
//! know: an unmodified OpenAI client works against them; what is ours lies under `polylora`.

mod asked;
mod gate;
pub mod seen;
mod shown;
mod start;
mod stream;

use super::report::{ReportQuery, answer};
use crate::access::Caller;
use crate::adapters::actor::Right;
use crate::adapters::registry::PinnedSource;
use crate::adapters::version::Parent;
use crate::api::Api;
use crate::api::http::auth::actor;
use crate::api::http::body::{JsonObject, rest};
use crate::api::http::errors::{invalid_value, not_allowed};
use crate::api::http::request::{Origin, random_id};
use crate::api::http::sse;
use crate::api::http::touched::Touched;
use crate::api::wire::{
    ErrorBody, FineTuningCheckpointList, FineTuningEventList, FineTuningFields, FineTuningJob,
    FineTuningJobList,
};
use crate::error::{Error, Result, brief};
use crate::files::Purpose;
use crate::jobs::{FileUse, Job, Kind, Owner, Rights, Submission, TrainingSpec, Work};
use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use std::sync::Arc;

/// Of jobs and of events, where the client does not say.
const PAGE: u64 = 20;
const PAGE_MAX: u64 = 100;
/// Characters of a job's id that name its result, where nobody does.
const NAME_CHARS: usize = 8;

/// What part of a list is asked for.
struct Page {
    after: Option<String>,
    limit: u64,
    /// Events as they come instead of a page of them.
    stream: bool,
    /// Notes that a job must have: keys and values.
    metadata: Vec<(String, String)>,
}

impl Page {
    /// Leaves what fits; whether there was more.
    fn cut<T>(&self, all: &mut Vec<T>) -> bool {
        let has_more = all.len() > self.limit as usize;
        all.truncate(self.limit as usize);
        has_more
    }

    fn read(query: Result<Query<Vec<(String, String)>>, QueryRejection>) -> Result<Self> {
        let wrong =
            || invalid_value("limit", "the query may hold `after`, `limit` and `metadata[key]`");
        let Query(pairs) = query.map_err(|_| wrong())?;
        let mut page = Self { after: None, limit: PAGE, stream: false, metadata: Vec::new() };
        for (key, value) in pairs {
            let note = key.strip_prefix("metadata[").and_then(|key| key.strip_suffix(']'));
            match (&*key, note) {
                ("after", _) => page.after = Some(value),
                ("limit", _) => {
                    let limit = value.parse().ok().filter(|n| (1..=PAGE_MAX).contains(n));
                    let expected = || format!("`limit` must be a number from 1 to {PAGE_MAX}");
                    page.limit = limit.ok_or_else(|| invalid_value("limit", expected()))?;
                }
                ("stream", _) => {
                    let expected = || invalid_value("stream", "`stream` must be true or false");
                    page.stream = value.parse().map_err(|_| expected())?;
                }
                (_, Some(note)) => page.metadata.push((note.to_owned(), value)),
                // An empty filter of the official clients.
                ("metadata", None) if value.is_empty() || value == "null" => {}
                _ => return Err(invalid_value(&brief(&key), "there is no such parameter")),
            }
        }
        Ok(page)
    }
}

/// Orders a training job.
///
/// The base learns the examples of a file as an adapter. The job runs when requests leave the
/// engine time, and its result is published as an upload is.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs",
    request_body = FineTuningFields,
    responses(
        (status = 200, description = "The job", body = FineTuningJob),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
    )
)]
pub async fn create(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let fields: FineTuningFields = rest(body)?;
    let asked = asked::asked(&fields)?;
    let promote = fields.polylora.as_ref().and_then(|ours| ours.promote.as_deref());
    let promote = asked::promote(promote)?;
    let (validation_split, gate) = gate::gate(&fields, asked.beta.is_some())?;
    let metadata = asked::metadata(fields.metadata)?;
    let model = (&*fields.model, fields.polylora.as_ref());
    let (kept, asked) = start::start(&api, &caller, model, asked).await?;
    api.jobs.check_training()?;
    let id = random_id("ftjob-");
    let named = fields.suffix.is_some();
    let name = match &fields.suffix {
        Some(suffix) => suffix.clone(),
        None => format!("ft-{}", id[id.len() - NAME_CHARS..].to_lowercase()),
    };
    let by_suffix = |e: Error| if named { e.param("suffix") } else { e };
    if !caller.sees(&name) {
        return Err(by_suffix(not_allowed(&name)));
    }
    let by = actor(&caller, &name);
    api.registry.check_free(&name, &by).await.map_err(by_suffix)?;
    let tenant = caller.tenant();
    let training = used(&api, &fields.training_file, "training_file", tenant).await?;
    let validation = match &fields.validation_file {
        Some(id) => Some(used(&api, id, "validation_file", tenant).await?),
        None => None,
    };
    let owner = Owner { key: caller.id().to_owned(), tenant: tenant.map(str::to_owned) };
    let most = caller.limits().merges_max.filter(|_| owner.tenant.is_some());
    let spec = TrainingSpec {
        name,
        model: fields.model,
        from: kept.iter().map(parent).collect(),
        training,
        validation,
        asked,
        resolved: None,
        record: None,
        promote,
        validation_split,
        gate,
        metadata,
        suffix: fields.suffix,
        rights: Rights { given: by.right == Right::Given, bounds: by.tenant.bounds },
    };
    let work = Work::Train(Box::new(spec));
    let submission = Submission { id, owner, work, sets: Vec::new() };
    let kept = Arc::new(Vec::from_iter(kept));
    let job = api.jobs.submit(submission, kept, most).await?;
    let touched = Extension(Touched { name: Some(job.work.name().to_owned()), digest: None });
    Ok((touched, Json(told(&job)?)).into_response())
}

fn parent(kept: &PinnedSource) -> Parent {
    let version = kept.version();
    Parent { id: version.id(), digest: version.digest.to_string(), weight: None }
}

/// A file that is there to be learnt from.
async fn used(api: &Api, id: &str, param: &'static str, tenant: Option<&str>) -> Result<FileUse> {
    let file = api.files.get(id, tenant).await.map_err(|e| e.param(param))?;
    if file.purpose != Purpose::FineTune {
        let message =
            format!("`{}` has the purpose {}; expected fine-tune", file.id, file.purpose.name());
        return Err(invalid_value(param, message));
    }
    if let Some(why) = &file.problem {
        let message = format!("{param} ({}): {why}", file.id);
        return Err(Error::invalid("invalid_training_file", message).param(param));
    }
    Ok(FileUse { id: file.id, digest: file.digest })
}

/// Lists training jobs, newest first; a tenant's key sees its tenant's.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs",
    params(
        ("after" = Option<String>, Query, description = "Id of the last job of the page before"),
        ("limit" = Option<u64>, Query, description = "1 to 100, default 20"),
    ),
    responses((status = 200, body = FineTuningJobList), (status = 400, body = ErrorBody))
)]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<FineTuningJobList>> {
    let page = Page::read(query)?;
    let jobs = api.jobs.list(Kind::Train, caller.tenant());
    let start = match &page.after {
        None => 0,
        Some(after) => match jobs.iter().position(|job| job.id == *after) {
            Some(at) => at + 1,
            None => return Err(Kind::Train.not_found(after).param("after")),
        },
    };
    let shown = jobs[start..].iter().filter_map(shown::job);
    let fits = |job: &FineTuningJob| {
        page.metadata.iter().all(|(key, value)| job.metadata.get(key) == Some(value))
    };
    let mut data: Vec<_> = shown.filter(fits).take(page.limit as usize + 1).collect();
    let has_more = page.cut(&mut data);
    Ok(Json(FineTuningJobList { object: "list", data, has_more }))
}

/// Shows one training job.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = FineTuningJob), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<FineTuningJob>> {
    told(&api.jobs.get(Kind::Train, &id, caller.tenant())?).map(Json)
}

/// Ends a training job whose result is not published yet.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{id}/cancel",
    params(("id" = String, Path)),
    responses((status = 200, body = FineTuningJob), (status = "4XX", body = ErrorBody))
)]
pub async fn cancel(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<FineTuningJob>> {
    told(&api.jobs.cancel(Kind::Train, &id, caller.tenant()).await?).map(Json)
}

/// What a training job that is over says of itself: the last figures, how much the result changes
/// the base, and how it does on what was held out; or a picture of the loss.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{id}/report",
    params(
        ("id" = String, Path),
        ("format" = Option<String>, Query,
            description = "`json` or `svg`; default by `Accept`, else json"),
    ),
    responses(
        (status = 200, content((Object = "application/json"), (String = "image/svg+xml"))),
        (status = "4XX", body = ErrorBody),
    )
)]
pub async fn report(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    query: Result<Query<ReportQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response> {
    answer(&api, (Kind::Train, &id), &caller, query, &headers).await
}

/// Stops a training job after the step that it is at; what it has done is kept.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{id}/pause",
    params(("id" = String, Path)),
    responses((status = 200, body = FineTuningJob), (status = "4XX", body = ErrorBody))
)]
pub async fn pause(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<FineTuningJob>> {
    told(&api.jobs.pause(Kind::Train, &id, caller.tenant()).await?).map(Json)
}

/// Lets a paused training job go on.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{id}/resume",
    params(("id" = String, Path)),
    responses((status = 200, body = FineTuningJob), (status = "4XX", body = ErrorBody))
)]
pub async fn resume(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<FineTuningJob>> {
    told(&api.jobs.resume(Kind::Train, &id, caller.tenant()).await?).map(Json)
}

/// What a training job has told, newest first: messages, and the figures of every step. With
/// `stream=true` all of it from the first on, and what comes, as server-sent events until the job
/// is over.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{id}/events",
    params(
        ("id" = String, Path),
        ("after" = Option<String>, Query, description = "Id of the last event of the page before"),
        ("limit" = Option<u64>, Query, description = "1 to 100, default 20"),
        ("stream" = Option<bool>, Query, description = "Server-sent events instead of a page"),
    ),
    responses((status = 200, body = FineTuningEventList), (status = "4XX", body = ErrorBody))
)]
pub async fn events(
    State(api): State<Arc<Api>>,
    Extension(origin): Extension<Origin>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Response> {
    let page = Page::read(query)?;
    if page.stream {
        let tenant = caller.tenant().map(str::to_owned);
        let frames = stream::frames(api, id, tenant, origin.deadline)?;
        return Ok(sse::event_stream(Body::from_stream(frames)));
    }
    let before = match page.after.as_deref() {
        None => u64::MAX,
        Some(after) => {
            let number = after.strip_prefix("ftevent-").and_then(|n| n.parse().ok());
            number.ok_or_else(|| invalid_value("after", "`after` must be the id of an event"))?
        }
    };
    let limits = (before, page.limit + 1);
    let mut told = api.jobs.told(Kind::Train, &id, caller.tenant(), limits).await?;
    let has_more = page.cut(&mut told);
    let data = told.iter().map(shown::event).collect();
    Ok(Json(FineTuningEventList { object: "list", data, has_more }).into_response())
}

/// The versions that a training job left at the ends of epochs and that are still kept, newest
/// first. Each answers as any version does.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{id}/checkpoints",
    params(
        ("id" = String, Path),
        ("after" = Option<String>, Query, description = "Id of the last one of the page before"),
        ("limit" = Option<u64>, Query, description = "1 to 100, default 20"),
    ),
    responses((status = 200, body = FineTuningCheckpointList), (status = "4XX", body = ErrorBody))
)]
pub async fn checkpoints(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<FineTuningCheckpointList>> {
    let page = Page::read(query)?;
    let job = api.jobs.get(Kind::Train, &id, caller.tenant())?;
    let told = api.jobs.told(Kind::Train, &id, caller.tenant(), (u64::MAX, u64::MAX)).await?;
    let versions = api.registry.versions(job.work.name());
    let mut all = shown::checkpoints(&job, &versions, &told);
    if let Some(after) = &page.after {
        let at = all.iter().position(|checkpoint| checkpoint.id == *after);
        let at = at.ok_or_else(|| invalid_value("after", "`after` must be a checkpoint's id"))?;
        all.drain(..=at);
    }
    let has_more = page.cut(&mut all);
    let [first_id, last_id] = [all.first(), all.last()].map(|c| c.map(|c| c.id.clone()));
    Ok(Json(FineTuningCheckpointList { object: "list", data: all, has_more, first_id, last_id }))
}

fn told(job: &Job) -> Result<FineTuningJob> {
    shown::job(job).ok_or_else(|| Error::fault("a job of another kind"))
}
