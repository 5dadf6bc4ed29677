//! `GET /v1/models`: the base and every adapter that can be asked for.
//!
//! Owns OpenAI's model object. Never lists a version that a request could not get. The thing to
//! know: `parent` is the base.

use super::shown;
use crate::access::Caller;
use crate::adapters::version::{Entry, Removal, State as AdapterState};
use crate::api::Api;
use crate::api::http::touched::Touched;
use crate::api::http::{auth, errors};
use crate::api::wire::{ErrorBody, Model, ModelDeleted, ModelIdentity, ModelList};
use crate::error::Result;
use axum::Json;
use axum::extract::{Extension, Path, State};
use std::sync::Arc;

const OWNER: &str = "polylora";

/// Lists what can be said as `model`.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Json<ModelList> {
    let entries = api.registry.list();
    let ready = entries.iter().filter(|e| e.current && e.state == AdapterState::Ready);
    let ready = ready.filter(|e| caller.sees(&e.version.name));
    let adapters = ready.map(|e| adapter(&api, &e.version.name, e));
    let aliases = api.registry.aliases();
    let aliases = aliases.iter().filter(|a| caller.sees(&a.name)).filter_map(|alias| {
        let entry = api.look_up(&caller, &alias.name).ok()??;
        Some(adapter(&api, &alias.name, &entry))
    });
    let data = std::iter::once(base(&api)).chain(adapters).chain(aliases).collect();
    Json(ModelList { object: "list", data })
}

/// Shows one model.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    params(("id" = String, Path, description = "The base's name, `name` or `name@version`")),
    responses((status = 200, body = Model), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Model>> {
    Ok(Json(match api.look_up(&caller, &id)? {
        None => base(&api),
        Some(entry) => adapter(&api, &id, &entry),
    }))
}

/// Removes an adapter, as OpenAI removes a fine-tuned model: running requests finish.
#[utoipa::path(
    delete,
    path = "/v1/models/{id}",
    params(("id" = String, Path, description = "The adapter's name, with all its versions")),
    responses((status = 200, body = ModelDeleted), (status = "4XX", body = ErrorBody))
)]
pub async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<(Extension<Touched>, Json<ModelDeleted>)> {
    let Some(entry) = api.look_up(&caller, &id)? else {
        return Err(errors::invalid_value("model", "the base model cannot be removed"));
    };
    if id.contains('@') {
        let message = "a model is removed with all its versions; leave `@version` out";
        return Err(errors::invalid_value("model", message));
    }
    let name = &entry.version.name;
    // Behind the base's name and a colon, if that was said too.
    if id.rsplit(':').next() != Some(name) {
        let message = format!("`{id}` is an alias: DELETE /v1/aliases/{id} removes it");
        return Err(errors::invalid_value("model", message));
    }
    let how = Removal { by: auth::actor(&caller, name), ..Removal::default() };
    let removed = api.registry.delete(name, how).await;
    removed.map_err(|e| errors::told(e, &caller))?;
    let touched = Touched { name: Some(entry.version.name.clone()), digest: None };
    Ok((Extension(touched), Json(ModelDeleted { id, object: "model", deleted: true })))
}

fn base(api: &Api) -> Model {
    let name = api.base_name.to_string();
    Model {
        id: name.clone(),
        object: "model",
        created: api.requests.started,
        owned_by: OWNER,
        parent: None,
        root: name,
        max_model_len: api.context,
        polylora: ModelIdentity {
            kind: "base",
            digest: api.base_digest.to_string(),
            version: None,
            state: "ready",
            resident: true,
        },
    }
}

fn adapter(api: &Api, id: &str, entry: &Entry) -> Model {
    let name = api.base_name.to_string();
    Model {
        id: id.to_owned(),
        object: "model",
        created: entry.version.created,
        owned_by: OWNER,
        parent: Some(name.clone()),
        root: name,
        max_model_len: api.context,
        polylora: ModelIdentity {
            kind: "adapter",
            digest: entry.version.digest.to_string(),
            version: Some(entry.version.number),
            state: shown::state_word(entry.state),
            resident: entry.resident,
        },
    }
}
