//! Every route, in one table, with its scope.
//!
//! Owns the table and the layers around it. Never handles a request. The thing to know: the router
//! is built from the table and from nothing else, so a route that is not in it does not exist.

use super::adapters::{self, aliases, models, versions, vllm};
use super::admin::{self, health, keys, limits, usage};
use super::app::Api;
use super::http::errors::METHOD_NOT_ALLOWED;
use super::http::scope::{Matched, Scope};
use super::http::{audit, auth, browsers, request};
use super::inference::{chat, completions, tokenize};
use super::jobs::{deletion, files, fine_tuning, merges, uploads};
use super::openapi;
use crate::error::{Error, brief};
use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use http::header::ALLOW;
use http::{HeaderValue, Method, Uri};
use std::sync::Arc;

/// One row of the table.
pub struct Route {
    /// As OpenAPI writes it, in lower case.
    pub method: &'static str,
    /// As axum writes it.
    pub path: &'static str,
    pub scope: Scope,
    attach: fn() -> MethodRouter<Arc<Api>>,
}

const fn row(
    method: &'static str,
    path: &'static str,
    scope: Scope,
    attach: fn() -> MethodRouter<Arc<Api>>,
) -> Route {
    Route { method, path, scope, attach }
}

/// Where contents are uploaded to. These count their own bytes while they write them to disk.
const UPLOADS: &[(Method, &str)] = &[
    (Method::PUT, "/v1/adapters/{name}"),
    (Method::POST, "/v1/files"),
    (Method::POST, "/v1/uploads/{id}/parts"),
];

/// The table.
pub const ROUTES: &[Route] = &[
    row("post", "/v1/chat/completions", Scope::Inference, || post(chat::post)),
    row("post", "/v1/completions", Scope::Inference, || post(completions::post)),
    row("get", "/v1/models", Scope::Inference, || get(models::list)),
    row("get", "/v1/models/{*id}", Scope::Inference, || get(models::show)),
    row("delete", "/v1/models/{*id}", Scope::Admin, || delete(models::remove)),
    row("post", "/v1/load_lora_adapter", Scope::Admin, || post(vllm::load)),
    row("post", "/v1/unload_lora_adapter", Scope::Admin, || post(vllm::unload)),
    row("get", "/v1/adapters", Scope::Admin, || get(adapters::routes::list)),
    row("get", "/v1/adapters/{name}", Scope::Admin, || get(adapters::routes::show)),
    row("put", "/v1/adapters/{name}", Scope::Admin, || {
        put(adapters::routes::put).layer(DefaultBodyLimit::disable())
    }),
    row("delete", "/v1/adapters/{name}", Scope::Admin, || delete(adapters::routes::remove)),
    row("get", "/v1/usage", Scope::Admin, || get(usage::usage)),
    row("post", "/v1/adapters/{name}/rollback", Scope::Admin, || post(versions::roll_back)),
    row("post", "/v1/adapters/{name}/pin", Scope::Admin, || post(versions::pin)),
    row("post", "/v1/adapters/{name}/unpin", Scope::Admin, || post(versions::unpin)),
    row("get", "/v1/aliases", Scope::Admin, || get(aliases::list)),
    row("get", "/v1/aliases/{name}", Scope::Admin, || get(aliases::show)),
    row("put", "/v1/aliases/{name}", Scope::Admin, || put(aliases::put)),
    row("delete", "/v1/aliases/{name}", Scope::Admin, || delete(aliases::remove)),
    row("post", "/v1/aliases/{name}/promote", Scope::Admin, || post(aliases::promote)),
    row("post", "/v1/aliases/{name}/rollback", Scope::Admin, || post(aliases::roll_back)),
    row("get", "/v1/merges", Scope::Admin, || get(merges::list)),
    row("post", "/v1/merges", Scope::Admin, || post(merges::create)),
    row("get", "/v1/merges/{id}", Scope::Admin, || get(merges::show)),
    row("get", "/v1/merges/{id}/report", Scope::Admin, || get(merges::report)),
    row("get", "/v1/merges/{id}/events", Scope::Admin, || get(merges::events)),
    row("post", "/v1/merges/{id}/cancel", Scope::Admin, || post(merges::cancel)),
    row("get", "/v1/files", Scope::Admin, || get(files::list)),
    row("post", "/v1/files", Scope::Admin, || {
        post(files::create).layer(DefaultBodyLimit::disable())
    }),
    row("get", "/v1/files/{id}", Scope::Admin, || get(files::show)),
    row("delete", "/v1/files/{id}", Scope::Admin, || delete(deletion::remove)),
    row("get", "/v1/files/{id}/content", Scope::Admin, || get(files::content)),
    row("get", "/v1/files/{id}/preview", Scope::Admin, || get(files::preview)),
    row("post", "/v1/uploads", Scope::Admin, || post(uploads::create)),
    row("post", "/v1/uploads/{id}/parts", Scope::Admin, || {
        post(uploads::add_part).layer(DefaultBodyLimit::disable())
    }),
    row("post", "/v1/uploads/{id}/complete", Scope::Admin, || post(uploads::complete)),
    row("post", "/v1/uploads/{id}/cancel", Scope::Admin, || post(uploads::cancel)),
    row("get", "/v1/fine_tuning/jobs", Scope::Admin, || get(fine_tuning::list)),
    row("post", "/v1/fine_tuning/jobs", Scope::Admin, || post(fine_tuning::create)),
    row("get", "/v1/fine_tuning/jobs/{id}", Scope::Admin, || get(fine_tuning::show)),
    row("get", "/v1/fine_tuning/jobs/{id}/report", Scope::Admin, || get(fine_tuning::report)),
    row("post", "/v1/fine_tuning/jobs/{id}/cancel", Scope::Admin, || post(fine_tuning::cancel)),
    row("post", "/v1/fine_tuning/jobs/{id}/pause", Scope::Admin, || post(fine_tuning::pause)),
    row("post", "/v1/fine_tuning/jobs/{id}/resume", Scope::Admin, || post(fine_tuning::resume)),
    row("get", "/v1/fine_tuning/jobs/{id}/events", Scope::Admin, || get(fine_tuning::events)),
    row("get", "/v1/fine_tuning/jobs/{id}/checkpoints", Scope::Admin, || {
        get(fine_tuning::checkpoints)
    }),
    row("post", "/v1/fine_tuning/seen", Scope::Admin, || post(fine_tuning::seen::seen)),
    row("post", "/tokenize", Scope::Inference, || post(tokenize::tokenize)),
    row("post", "/detokenize", Scope::Inference, || post(tokenize::detokenize)),
    row("get", "/live", Scope::Public, || get(health::live)),
    row("get", "/ready", Scope::Public, || get(health::ready)),
    row("get", "/health", Scope::Public, || get(health::health)),
    row("get", "/v1/keys", Scope::Operator, || get(keys::list)),
    row("post", "/v1/keys", Scope::Operator, || post(keys::create)),
    row("get", "/v1/keys/{id}", Scope::Operator, || get(keys::show)),
    row("delete", "/v1/keys/{id}", Scope::Operator, || delete(keys::revoke)),
    row("post", "/v1/keys/{id}/rotate", Scope::Operator, || post(keys::rotate)),
    row("get", "/v1/limits/{name}", Scope::Admin, || get(limits::show_limits)),
    row("put", "/v1/limits/{name}", Scope::Operator, || put(limits::set_limits)),
    row("get", "/v1/audit", Scope::Admin, || get(admin::audit::list)),
    row("post", "/v1/audit/rotate", Scope::Operator, || post(admin::audit::rotate)),
    row("get", "/version", Scope::AnyKey, || get(health::version)),
    row("get", "/metrics", Scope::Metrics, || get(health::metrics)),
    row("get", "/openapi.json", Scope::AnyKey, || get(openapi::json)),
    row("get", "/docs", Scope::AnyKey, || get(openapi::docs)),
];

/// The scope of a method of a matched path; `None` where it will be answered 405.
fn scope(method: &Method, path: &str) -> Option<Scope> {
    // GET's routes answer HEAD as well.
    let method = if method == Method::HEAD { &Method::GET } else { method };
    let same = |r: &&Route| r.path == path && r.method.eq_ignore_ascii_case(method.as_str());
    ROUTES.iter().find(same).map(|r| r.scope)
}

/// The methods of a path, as a header lists them.
fn methods(path: &str) -> String {
    let rows = ROUTES.iter().filter(|r| r.path == path);
    rows.map(|r| r.method.to_ascii_uppercase()).collect::<Vec<_>>().join(", ")
}

/// The router over the table.
pub fn router(api: Arc<Api>) -> Router {
    let mut router = Router::new();
    for route in ROUTES {
        router = router.route(route.path, (route.attach)());
    }
    layered(router, api)
}

/// What stands around every route, from the inside out.
fn layered(router: Router<Arc<Api>>, api: Arc<Api>) -> Router {
    router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(browsers::typed))
        .layer(from_fn(auth::judge))
        .layer(from_fn_with_state(api.clone(), audit::recorded))
        .layer(from_fn_with_state(api.clone(), auth::require_key))
        .layer(from_fn_with_state(api.clone(), browsers::guard))
        .layer(from_fn(matched))
        .layer(from_fn_with_state(api.clone(), request::edge))
        .with_state(api)
}

/// Says what the table knows of a request to the layers further in.
async fn matched(mut request: Request, next: Next) -> Response {
    if let Some(path) = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str) {
        let method = request.method();
        let asks = *method == Method::OPTIONS;
        let matched = Matched {
            scope: scope(method, path),
            upload: UPLOADS.iter().any(|(m, p)| m == method && *p == path),
            methods: asks.then(|| methods(path)),
        };
        request.extensions_mut().insert(matched);
    }
    next.run(request).await
}

async fn unknown(method: Method, uri: Uri) -> Error {
    let path = brief(uri.path());
    let hint = match below_v1(uri.path()) {
        true => format!("; every route of the API begins with /v1: {method} /v1{path}"),
        false => "; see /docs".to_owned(),
    };
    Error::not_found("unknown_route", format!("there is no {method} {path}{hint}"))
}

/// Whether `/v1` before it makes a path of the table: the client's base URL lacks it.
fn below_v1(path: &str) -> bool {
    let alike = |route: &&str| {
        let mut parts = path.split('/');
        let matches = route.split('/').all(|part| match parts.next() {
            Some(given) => part == given || (part.starts_with('{') && !given.is_empty()),
            None => false,
        });
        matches && (parts.next().is_none() || route.ends_with("*id}"))
    };
    let mut below = ROUTES.iter().filter_map(|row| row.path.strip_prefix("/v1"));
    below.any(|route| alike(&route))
}

async fn wrong_method(method: Method, path: MatchedPath) -> Response {
    let path = path.as_str();
    let allowed = methods(path);
    let message = format!("{path} takes {allowed}, not {method}");
    let mut response = Error::invalid(METHOD_NOT_ALLOWED, message).into_response();
    if let Ok(allowed) = HeaderValue::from_str(&allowed) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_route_is_documented_and_every_documented_route_exists() {
        let document = serde_json::to_value(openapi::document()).unwrap();
        let documented: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap().keys();
                methods.map(|m| (m.clone(), path.clone())).collect::<Vec<_>>()
            })
            .collect();
        let listed: BTreeSet<(String, String)> = ROUTES
            .iter()
            .filter(|r| !r.path.starts_with("/docs") && !r.path.starts_with("/openapi"))
            .map(|r| (r.method.to_owned(), r.path.replace("{*", "{")))
            .collect();
        assert_eq!(documented, listed);
    }

    #[test]
    fn no_route_is_made_outside_the_table() {
        let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut folders = vec![here];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let table = path.ends_with("api/routes.rs");
                let ways = ["route", "route_service", "nest", "nest_service", "fallback_service"];
                for way in ways {
                    let made = text.matches(&format!(".{way}(")).count();
                    let allowed = usize::from(table && way == "route");
                    assert!(made <= allowed, "{} makes a route by {way}", path.display());
                }
            }
        }
    }

    /// Whoever adds a route that is not an administrator's must write it down here too.
    #[test]
    fn what_is_not_listed_here_is_for_administrators() {
        let of = |scope: Scope| -> Vec<String> {
            let routes = ROUTES.iter().filter(|r| r.scope == scope);
            routes.map(|r| format!("{} {}", r.method, r.path)).collect()
        };
        assert_eq!(of(Scope::Public), ["get /live", "get /ready", "get /health"]);
        assert_eq!(of(Scope::AnyKey), ["get /version", "get /openapi.json", "get /docs"]);
        assert_eq!(of(Scope::Metrics), ["get /metrics"]);
        let inference = [
            "post /v1/chat/completions",
            "post /v1/completions",
            "get /v1/models",
            "get /v1/models/{*id}",
            "post /tokenize",
            "post /detokenize",
        ];
        assert_eq!(of(Scope::Inference), inference);
    }

    #[test]
    fn each_method_of_a_path_has_its_own_scope_and_each_route_is_listed_once() {
        let mut seen = BTreeSet::new();
        for route in ROUTES {
            assert!(seen.insert((route.method, route.path)), "{} twice", route.path);
            let method = route.method.to_ascii_uppercase().parse().unwrap();
            assert_eq!(scope(&method, route.path), Some(route.scope), "{}", route.path);
        }
        assert_eq!(scope(&Method::HEAD, "/version"), Some(Scope::AnyKey));
        assert_eq!(scope(&Method::PATCH, "/version"), None);
    }
}
