//! Who calls: the key becomes a `Caller`, and the route's scope and name are held against it.
//!
//! Owns every "no" that depends on the key and on nothing else. Never logs a key. The thing to
//! know: a name in a path is judged here by the caller's patterns alone, before anybody looks
//! whether it exists: so a forbidden name that exists and one that does not take the same way.

use super::connection::Connection;
use super::errors::{not_allowed, not_found};
use super::request;
use super::scope::{Matched, Scope};
use crate::access::{self, Caller, Reach};
use crate::adapters::actor::{Actor, Bounds, Right, Tenant};
use crate::api::Api;
use crate::clock::Now;
use crate::error::{Error, Kind, Result};
use axum::extract::{FromRequestParts, RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::AUTHORIZATION;
use http::request::Parts;
use http::{HeaderMap, Method};
use std::sync::Arc;

/// Finds out who calls, and leaves the `Caller` among the request's extensions. A public route lets
/// anybody through. An unknown path answers 401 too: nobody learns the routes without a key.
pub async fn require_key(
    State(api): State<Arc<Api>>,
    mut request: Request,
    next: Next,
) -> Response {
    let scope = Matched::of(&request).scope;
    if scope == Some(Scope::Public) {
        return next.run(request).await;
    }
    let caller = match api.access.authenticate(bearer(request.headers()), Now::read().wall) {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    if let Some(line) = request.extensions().get::<Arc<Connection>>() {
        line.admit();
    }
    let counted = scope == Some(Scope::Inference) && changes(&request);
    let teller = counted.then(|| caller.clone());
    request.extensions_mut().insert(caller);
    let mut response = next.run(request).await;
    if let Some(caller) = teller {
        request::tell(&api.access.standing(&caller, Now::read()), response.headers_mut());
    }
    response
}

/// Whether a request may change something.
pub fn changes(request: &Request) -> bool {
    !matches!(*request.method(), Method::GET | Method::HEAD)
}

/// Holds the route's scope and the name in its path against the caller.
pub async fn judge(request: Request, next: Next) -> Response {
    let Matched { scope, .. } = Matched::of(&request);
    let Some(caller) = request.extensions().get::<Caller>().cloned() else {
        return next.run(request).await; // a public route
    };
    if let Some(scope) = scope
        && let Err(error) = admit(scope, &caller)
    {
        return error.into_response();
    }
    let (mut parts, content) = request.into_parts();
    if let Some(name) = parameter(&mut parts, &["name"]).await.filter(|name| !caller.sees(name)) {
        return match parts.method == Method::PUT {
            true => not_allowed(&name).into_response(),
            false => not_found(&name).into_response(),
        };
    }
    next.run(Request::from_parts(parts, content)).await
}

/// A parameter of the path: the first of these that it has.
pub async fn parameter(parts: &mut Parts, keys: &[&str]) -> Option<String> {
    let params = RawPathParams::from_request_parts(parts, &()).await.ok()?;
    let of = |key: &&str| params.iter().find(|(k, _)| k == key).map(|(_, value)| value.to_owned());
    keys.iter().find_map(of)
}

/// Whether `caller` may use routes of `scope`. Errors: `insufficient_scope`.
fn admit(scope: Scope, caller: &Caller) -> Result<()> {
    let (wanted, whole) = match scope {
        Scope::Public | Scope::AnyKey => return Ok(()),
        Scope::Inference => (access::Scope::Inference, false),
        Scope::Admin => (access::Scope::Admin, false),
        Scope::Operator => (access::Scope::Admin, true),
        Scope::Metrics => (access::Scope::Metrics, true),
    };
    let operator = if whole { " and no tenant" } else { "" };
    if caller.has(wanted) && !(whole && caller.tenant().is_some()) {
        return Ok(());
    }
    let message = format!("this route wants a key with the scope `{}`{operator}", wanted.name());
    Err(Error::new(Kind::Forbidden, "insufficient_scope", message))
}

/// Whose requests are, for the registry.
pub fn tenant(caller: &Caller) -> Tenant {
    let limits = caller.limits();
    let bounds = Bounds {
        names: limits.adapters_max,
        disk_bytes: limits.disk_bytes_max,
        resident_bytes: limits.resident_bytes_max,
    };
    Tenant { name: caller.tenant().unwrap_or_default().into(), bounds }
}

/// The caller as one who changes `name`.
pub fn actor(caller: &Caller, name: &str) -> Actor {
    let right = match caller.reach(name) {
        Reach::Given => Right::Given,
        Reach::Own => Right::Own,
        Reach::Nothing => Right::Nothing,
    };
    Actor { tenant: tenant(caller), right }
}

/// Whether these headers have a good key, or none is needed.
pub fn has_key(api: &Api, headers: &HeaderMap) -> bool {
    api.access.authenticate(bearer(headers), Now::read().wall).is_ok()
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}
