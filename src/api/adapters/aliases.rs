//! `/v1/aliases`: set, show, promote, roll back, remove.
//!
//! Owns the routes and how weights are written. Never chooses a version: the registry does, for
//! each request. The thing to know: an alias leads to versions, not to names, so nothing that is
//! uploaded later moves it.

use super::shown::owner;
use crate::access::Caller;
use crate::adapters::alias::{Alias, Target};
use crate::adapters::version::VersionRef;
use crate::adapters::version::model_not_found;
use crate::api::Api;
use crate::api::http::auth::actor;
use crate::api::http::body::{JsonObject, rest};
use crate::api::wire::{
    AliasDeleted, AliasFields, AliasList, AliasShown, AliasTarget, ErrorBody, PromoteFields,
    VersionOrId,
};
use crate::error::{Error, Result, brief};
use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use std::sync::Arc;

/// Lists every alias.
#[utoipa::path(get, path = "/v1/aliases", responses((status = 200, body = AliasList)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
) -> Json<AliasList> {
    let aliases = api.registry.aliases();
    let seen = aliases.iter().filter(|a| caller.sees(&a.name));
    Json(AliasList { object: "list", data: seen.map(|a| shown(a, &caller)).collect() })
}

/// Shows one alias.
#[utoipa::path(
    get,
    path = "/v1/aliases/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = AliasShown), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<AliasShown>> {
    Ok(Json(shown(&api.registry.alias(&name)?, &caller)))
}

/// Makes an alias, or gives one new weights.
///
/// Requests for the alias are spread over its versions by weight; the same `user` (else the same
/// key, else each request by itself) is always led to the same version, and a shift of weights
/// moves only those it must.
#[utoipa::path(
    put,
    path = "/v1/aliases/{name}",
    params(("name" = String, Path, description = "1 to 128 of A-Z a-z 0-9 . _ -")),
    request_body = AliasFields,
    responses(
        (status = 201, description = "A new alias", body = AliasShown),
        (status = 200, description = "New weights", body = AliasShown),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
pub async fn put(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    let targets = targets(rest(body)?)?;
    if let Some(hidden) = targets.iter().find(|t| !caller.sees(&t.name)) {
        return Err(model_not_found(&hidden.id()));
    }
    let (alias, new) = api.registry.put_alias(&name, targets, &actor(&caller, &name)).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(shown(&alias, &caller))).into_response())
}

/// Gives one of the alias's versions everything.
#[utoipa::path(
    post,
    path = "/v1/aliases/{name}/promote",
    params(("name" = String, Path)),
    request_body = PromoteFields,
    responses((status = 200, body = AliasShown), (status = "4XX", body = ErrorBody))
)]
pub async fn promote(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    JsonObject(body): JsonObject,
) -> Result<Json<AliasShown>> {
    let PromoteFields { version } = rest(body)?;
    let to = match version {
        VersionOrId::Version(number) => number.to_string(),
        VersionOrId::Id(id) => id,
    };
    let by = actor(&caller, &name);
    Ok(Json(shown(&api.registry.promote_alias(&name, &to, &by).await?, &caller)))
}

/// Gives the alias the weights that it had before its last change.
#[utoipa::path(
    post,
    path = "/v1/aliases/{name}/rollback",
    params(("name" = String, Path)),
    responses((status = 200, body = AliasShown), (status = "4XX", body = ErrorBody))
)]
pub async fn roll_back(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<AliasShown>> {
    let by = actor(&caller, &name);
    Ok(Json(shown(&api.registry.roll_back_alias(&name, &by).await?, &caller)))
}

/// Takes the alias away; its versions stay.
#[utoipa::path(
    delete,
    path = "/v1/aliases/{name}",
    params(("name" = String, Path)),
    responses((status = 200, body = AliasDeleted), (status = 404, body = ErrorBody))
)]
pub async fn remove(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<AliasDeleted>> {
    api.registry.delete_alias(&name, &actor(&caller, &name)).await?;
    Ok(Json(AliasDeleted { object: "alias", name, deleted: true }))
}

/// The targets that the weights name.
fn targets(fields: AliasFields) -> Result<Vec<Target>> {
    let target = |(key, weight): (&String, &u32)| {
        let written = match &fields.adapter {
            Some(adapter) if !key.contains('@') => format!("{adapter}@{key}"),
            _ => key.clone(),
        };
        let named = VersionRef::parse(&written).filter(|version| !version.name.is_empty());
        let Some(VersionRef { name, number: Some(number) }) = named else {
            let message = format!(
                "`{}` names no version: expected name@version, or with `adapter` a number",
                brief(key)
            );
            return Err(Error::invalid("invalid_alias", message).param("weights"));
        };
        Ok(Target { name: name.to_owned(), number, weight: *weight })
    };
    fields.weights.iter().map(target).collect()
}

/// An alias as `caller` may see it: not the versions of adapters that it may not know of.
fn shown(alias: &Alias, caller: &Caller) -> AliasShown {
    AliasShown {
        object: "alias",
        name: alias.name.clone(),
        owner: owner(&alias.owner, caller),
        targets: shares(&alias.targets, caller),
        previous: alias.previous.as_deref().map(|p| shares(p, caller)),
        created: alias.created,
        updated: alias.updated,
    }
}

fn shares(targets: &[Target], caller: &Caller) -> Vec<AliasTarget> {
    let sum: f64 = targets.iter().map(|t| f64::from(t.weight)).sum();
    let share = |t: &Target| AliasTarget {
        id: t.id(),
        name: t.name.clone(),
        version: t.number,
        weight: t.weight,
        share: f64::from(t.weight) / sum,
    };
    targets.iter().filter(|t| caller.sees(&t.name)).map(share).collect()
}
