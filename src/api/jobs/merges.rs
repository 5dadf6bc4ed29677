//! `/v1/merges`: order a merge, look at it, cancel it, read its report.
//!
//! Owns the routes and what an order may say. Never merges: `jobs` does, beside serving. The thing
//! to know: versions are fixed and everything that needs no computing is refused when the order
//! comes in, so a job that was accepted rarely fails.

use super::report::{ReportQuery, answer};
use super::watching::{self, Next, STILL};
use crate::access::Caller;
use crate::adapters::actor::Right;
use crate::adapters::registry::PinnedSource;
use crate::adapters::version::{Parent, Version};
use crate::api::Api;
use crate::api::http::auth::actor;
use crate::api::http::body::{JsonObject, missing, rest};
use crate::api::http::errors::{invalid_value, not_allowed};
use crate::api::http::request::{Deadline, Origin, random_id};
use crate::api::http::sse;
use crate::api::http::touched::Touched;
use crate::api::inference::encode::Rendered;
use crate::api::inference::messages;
use crate::api::inference::templates::Conversation;
use crate::api::wire::{
    ErrorBody, EvaluationExample, EvaluationFields, MergeFailure, MergeFields, MergeList,
    MergeProgress, MergeResult, MergeShown, MergeSource, MergeSourceShown,
};
use crate::error::{Error, Result, brief};
use crate::jobs::evaluate::{EvaluationSet, Example};
use crate::jobs::{
    Job, Kind, MergeSpec, Owner, Rights, State as JobState, Submission, Watch, Work,
};
use crate::merge::spec::{Method, Source, Spec};
use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;

/// Examples of one job, all sets together.
const EXAMPLES_MAX: usize = 1000;

/// Lists merges, newest first; a tenant's key sees its tenant's.
#[utoipa::path(get, path = "/v1/merges", responses((status = 200, body = MergeList)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<MergeList>> {
    let jobs = api.jobs.list(Kind::Merge, caller.tenant());
    let data = jobs.iter().map(shown).collect::<Result<_>>()?;
    Ok(Json(MergeList { object: "list", data }))
}

/// Orders a merge of adapters into one, done beside serving.
///
/// With `dry_run` nothing is made: the answer is the survey of the sources (per site and over all,
/// `alignment` 0 to 1: how much their leading singular directions overlap, and `cosine`: whether
/// they agree there).
#[utoipa::path(
    post,
    path = "/v1/merges",
    request_body = MergeFields,
    responses(
        (status = 202, description = "The job", body = MergeShown),
        (status = 200, description = "With `dry_run`: the survey", body = Object),
        (status = "4XX", description = "Refused, with what does not fit", body = ErrorBody),
    )
)]
pub async fn create(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let fields: MergeFields = rest(body)?;
    let dry = fields.dry_run.unwrap_or(false);
    let name = match (&fields.name, dry) {
        (Some(name), _) => name.clone(),
        (None, true) => String::new(),
        (None, false) => return Err(missing("name")),
    };
    if !dry {
        if !caller.sees(&name) {
            return Err(not_allowed(&name));
        }
        api.registry.check_free(&name, &actor(&caller, &name)).await?;
    }
    let tenant = caller.tenant().unwrap_or_default();
    let (spec, kept) = ordered(&api, &caller, &fields, name)?;
    let kept = Arc::new(kept);
    if dry {
        return Ok(Json(api.jobs.merge_compatibility(&spec, kept, tenant).await?).into_response());
    }
    let owner = Owner { key: caller.id().to_owned(), tenant: caller.tenant().map(str::to_owned) };
    let most = caller.limits().merges_max.filter(|_| owner.tenant.is_some());
    api.jobs.check_room(Kind::Merge, &owner, most)?;
    api.jobs.check_merge(&spec, kept.clone(), tenant).await?;
    let sets = sets(&api, &caller, &spec, &kept, fields.evaluation.unwrap_or_default()).await?;
    let work = Work::Merge(spec);
    let submission = Submission { id: random_id("merge-"), owner, work, sets };
    let job = api.jobs.submit(submission, kept, most).await?;
    let touched = Extension(Touched { name: Some(job.work.name().to_owned()), digest: None });
    Ok((StatusCode::ACCEPTED, touched, Json(shown(&job)?)).into_response())
}

/// Shows one merge.
#[utoipa::path(
    get,
    path = "/v1/merges/{id}",
    params(("id" = String, Path)),
    responses((status = 200, body = MergeShown), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<MergeShown>> {
    shown(&api.jobs.get(Kind::Merge, &id, caller.tenant())?).map(Json)
}

/// What a finished merge says of itself: as `merge_report.json` of `polylora merge`, with the
/// `evaluation` that was asked for, or as a picture.
#[utoipa::path(
    get,
    path = "/v1/merges/{id}/report",
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
    answer(&api, (Kind::Merge, &id), &caller, query, &headers).await
}

/// The merge as it stands, and again after each change until it is over.
///
/// Events are named by the state and carry the job; changes that come faster than they are read
/// are told as one.
#[utoipa::path(
    get,
    path = "/v1/merges/{id}/events",
    params(("id" = String, Path)),
    responses(
        (status = 200, content((MergeShown = "text/event-stream"))),
        (status = 404, body = ErrorBody),
    )
)]
pub async fn events(
    State(api): State<Arc<Api>>,
    Extension(origin): Extension<Origin>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response> {
    let watch = api.jobs.watch(Kind::Merge, &id, caller.tenant())?;
    let deadline = origin.deadline;
    let frames = futures::stream::unfold(Some(watch), move |watch| async move {
        let (frame, watch) = frame(watch?, deadline).await?;
        Some((Ok::<_, Infallible>(frame), watch))
    });
    Ok(sse::event_stream(Body::from_stream(frames)))
}

/// Cancels a merge that waits or computes. Once its result is published, only the evaluation ends.
#[utoipa::path(
    post,
    path = "/v1/merges/{id}/cancel",
    params(("id" = String, Path)),
    responses((status = 200, body = MergeShown), (status = "4XX", body = ErrorBody))
)]
pub async fn cancel(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<MergeShown>> {
    shown(&api.jobs.cancel(Kind::Merge, &id, caller.tenant()).await?).map(Json)
}

/// The next frame; without a watch to go on with, it is the last.
async fn frame(mut watch: Watch, deadline: Deadline) -> Option<(Bytes, Option<Watch>)> {
    let told = match watching::next(&mut watch, deadline).await {
        Next::Still => return Some((Bytes::from_static(STILL), Some(watch))),
        Next::Over => return None,
        Next::Changed(job) => shown(&job).map(|shown| (job.state.name(), shown)),
        Next::Failed(error) => Err(error),
    };
    match told {
        Ok((state, job)) => {
            let json = serde_json::to_string(&job).unwrap_or_default();
            let event = format!("event: {state}\n");
            let frame = [event.as_bytes(), &sse::data(&json)].concat();
            Some((Bytes::from(frame), Some(watch)))
        }
        Err(error) => Some((sse::failure(&error), None)),
    }
}

/// The order with its sources found and kept.
fn ordered(
    api: &Api,
    caller: &Caller,
    fields: &MergeFields,
    name: String,
) -> Result<(MergeSpec, Vec<PinnedSource>)> {
    let options = fields.options.as_ref().map(|o| o.options()).unwrap_or_default();
    let source =
        |s: &MergeSource| Source { name: brief(&s.model), weight: s.weight.unwrap_or(1.0) };
    let spec = Spec {
        method: Method::asked(fields.method.as_deref(), fields.sources.len())?,
        sources: fields.sources.iter().map(source).collect(),
        options,
        seed: fields.seed.unwrap_or(0),
    };
    spec.check()?;
    let (mut from, mut all) = (Vec::new(), Vec::new());
    for (i, source) in fields.sources.iter().enumerate() {
        let kept =
            kept(api, caller, &source.model).map_err(|e| e.param(format!("sources[{i}].model")))?;
        let version = kept.version();
        let (id, digest) = (version.id(), version.digest.to_string());
        from.push(Parent { id, digest, weight: Some(spec.sources[i].weight) });
        all.push(kept);
    }
    let any_base = fields.any_base.unwrap_or(false);
    let by = actor(caller, &name);
    let rights = Rights { given: by.right == Right::Given, bounds: by.tenant.bounds };
    Ok((MergeSpec { name, spec, from, any_base, rights }, all))
}

fn kept(api: &Api, caller: &Caller, model: &str) -> Result<PinnedSource> {
    let Some(entry) = api.look_up(caller, model)? else {
        let message = format!("`{model}` is the base: only adapters are merged");
        return Err(Error::invalid("invalid_merge", message));
    };
    api.registry.keep(&entry.version.name, entry.version.number)
}

/// Evaluation sets as tokens, each by the chat template of its source.
async fn sets(
    api: &Arc<Api>,
    caller: &Caller,
    spec: &MergeSpec,
    kept: &[PinnedSource],
    given: Vec<EvaluationFields>,
) -> Result<Vec<EvaluationSet>> {
    let count: usize = given.iter().map(|set| set.data.len()).sum();
    if count > EXAMPLES_MAX {
        let message = format!("{count} examples; at most {EXAMPLES_MAX} in all sets together");
        return Err(invalid_value("evaluation", message));
    }
    let mut sets: Vec<EvaluationSet> = Vec::with_capacity(given.len());
    for (i, set) in given.into_iter().enumerate() {
        let param = format!("evaluation[{i}].model");
        let source = spec.spec.sources.iter().position(|s| s.name == set.model);
        let source = source.filter(|_| sets.iter().all(|known| known.model != set.model));
        let source = source.ok_or_else(|| {
            invalid_value(&param, "`model` must be one of the sources, and only once")
        })?;
        if set.data.is_empty() {
            return Err(invalid_value(&format!("evaluation[{i}].data"), "`data` is empty"));
        }
        let mut examples = Vec::with_capacity(set.data.len());
        for (j, given) in set.data.into_iter().enumerate() {
            let version = kept[source].version().clone();
            let path = format!("evaluation[{i}].data[{j}]");
            let inside = |e: Error| Error { param: Some(within(&path, e.param.as_deref())), ..e };
            examples.push(example(api, caller, version, given).await.map_err(inside)?);
        }
        sets.push(EvaluationSet { model: set.model, examples });
    }
    Ok(sets)
}

fn within(path: &str, inner: Option<&str>) -> String {
    inner.map_or_else(|| path.to_owned(), |inner| format!("{path}.{inner}"))
}

async fn example(
    api: &Arc<Api>,
    caller: &Caller,
    version: Arc<Version>,
    given: EvaluationExample,
) -> Result<Example> {
    let mut all = messages::check(given.messages)?;
    if all.last().is_none_or(|m| m["role"] != "assistant") {
        let message = "an example ends with the assistant's right answer";
        return Err(invalid_value("messages", message));
    }
    let chat = |messages: Vec<Value>, add_generation_prompt: bool| Conversation {
        messages,
        tools: None,
        add_generation_prompt,
    };
    let whole = chat(all.clone(), false);
    let bytes = 2 * serde_json::to_string(&all).map_or(0, |json| json.len()) as u64;
    let rendered = |versions: Vec<Arc<Version>>| -> Result<Rendered<'_>> {
        Ok(Rendered {
            caller,
            versions,
            held: api.requests.intake.hold(caller, bytes)?,
            ticket: None,
        })
    };
    let mut tokens = api.encode_chat(rendered(vec![version.clone()])?, whole).await?;
    all.pop();
    let before = match all.is_empty() {
        true => Vec::new(),
        false => api.encode_chat(rendered(vec![version])?, chat(all, true)).await?,
    };
    // The answer ends with the model's own end: what the template puts behind it is nobody's word.
    let answer = tokens.iter().zip(&before).take_while(|(a, b)| a == b).count().max(1);
    let end = tokens.iter().skip(answer).position(|t| api.text.eos.contains(t));
    tokens.truncate(end.map_or(tokens.len(), |end| answer + end + 1));
    if answer >= tokens.len() {
        return Err(invalid_value("messages", "the answer has no tokens"));
    }
    if tokens.len() >= api.context {
        let message =
            format!("the context is {} tokens; the example has {}", api.context, tokens.len());
        return Err(Error::invalid("context_length_exceeded", message).param("messages"));
    }
    Ok(Example { tokens, answer, weights: Vec::new() })
}

fn shown(job: &Job) -> Result<MergeShown> {
    let Work::Merge(order) = &*job.work else {
        return Err(Error::fault("a job of another kind"));
    };
    let source = |(asked, was): (&Source, &Parent)| MergeSourceShown {
        model: asked.name.clone(),
        id: was.id.clone(),
        digest: was.digest.clone(),
        weight: asked.weight,
    };
    Ok(MergeShown {
        object: "merge",
        id: job.id.clone(),
        name: order.name.clone(),
        state: job.state.name(),
        stage: match job.state {
            JobState::Running(stage) => Some(stage.name()),
            _ => None,
        },
        progress: job.progress.map(|p| MergeProgress { done: p.done, total: p.total }),
        method: order.spec.method.name(),
        sources: order.spec.sources.iter().zip(&order.from).map(source).collect(),
        seed: order.spec.seed,
        restarted: job.restarts,
        created: job.created,
        started: job.started,
        ended: job.ended,
        result: job
            .outcome
            .as_ref()
            .map(|o| MergeResult { id: o.id.clone(), digest: o.digest.clone() }),
        error: job
            .failure
            .as_ref()
            .map(|f| MergeFailure { code: f.code.clone(), message: f.message.clone() }),
    })
}
