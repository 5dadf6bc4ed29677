//! Who calls: the key becomes a `Caller`, and the route's scope and name are held against it.
//!
//! Owns every "no" that depends on the key and on nothing else. Never logs a key. The thing to
//! know: a name in a path is judged here by the caller's patterns alone, before anybody looks
//! whether it exists: so a forbidden name that exists and one that does not take the same way.

use super::errors::Code;
use super::line::Line;
use super::routes::{self, Scope};
use super::{Api, adapters, audit, clock, limits};
use crate::access::{self, Caller, Reach};
use crate::adapters::registry::{Actor, Bounds, Right, Tenant};
use crate::clock::Now;
use crate::database::FULL;
use crate::error::{Error, Kind, Result};
use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method};
use std::sync::Arc;

/// Lets a request through, with its `Caller` among its extensions, when its route is public or its
/// key may use it. An unknown path answers 401 too: nobody learns the routes without a key.
pub async fn require_key(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>();
    let scope = path.and_then(|path| routes::scope(request.method(), path.as_str()));
    if scope == Some(Scope::Public) {
        return next.run(request).await;
    }
    let caller = match api.app.access.authenticate(bearer(request.headers()), clock()) {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    if let Some(line) = request.extensions().get::<Arc<Line>>() {
        line.admit();
    }
    let action = path.map(|path| format!("{} {}", request.method(), path.as_str()));
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    match scope {
        Some(Scope::Admin | Scope::Operator) if changes => {
            if let Err(error) = api.app.storage.check() {
                return error.into_response();
            }
            let action = action.unwrap_or_default();
            let what = action.clone();
            let response = audit::recorded(api.clone(), caller, action, request, next).await;
            // A function that writes a file may not know the storage that the file is in.
            if response.extensions().get::<Code>().is_some_and(|code| code.0 == FULL) {
                api.app.storage.turn(&format!("what {what} brought could not be written"));
            }
            response
        }
        Some(Scope::Inference) if changes => {
            let mut response = judged(scope, &caller, request, next).await.0;
            limits::tell(&api.app.access.standing(&caller, Now::read()), response.headers_mut());
            response
        }
        _ => judged(scope, &caller, request, next).await.0,
    }
}

/// Holds scope and name against `caller`; the answer, and the name in the path.
pub async fn judged(
    scope: Option<Scope>,
    caller: &Caller,
    request: Request,
    next: Next,
) -> (Response, Option<String>) {
    let (mut parts, content) = request.into_parts();
    let params = RawPathParams::from_request_parts(&mut parts, &()).await.ok();
    let of = |key: &str| {
        let params = params.as_ref()?;
        params.iter().find(|(k, _)| *k == key).map(|(_, value)| value.to_owned())
    };
    let name = of("name");
    let subject = name.clone().or_else(|| of("id"));
    if let Some(scope) = scope
        && let Err(error) = admit(scope, caller)
    {
        return (error.into_response(), subject);
    }
    if let Some(name) = name.filter(|name| !caller.sees(name)) {
        if parts.method == Method::PUT {
            return (not_allowed(&name).into_response(), subject);
        }
        return (adapters::not_found(&name).into_response(), subject);
    }
    parts.extensions.insert(caller.clone());
    (next.run(Request::from_parts(parts, content)).await, subject)
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

/// A name that the caller must not give, whether it exists or not.
pub fn not_allowed(name: &str) -> Error {
    let shown: String = name.chars().take(160).collect();
    let message = format!("your key may not use the name `{shown}`");
    Error::new(Kind::Forbidden, "name_not_allowed", message).param("name")
}

/// Whether these headers have a good key, or none is needed.
pub fn has_key(api: &Api, headers: &HeaderMap) -> bool {
    api.app.access.authenticate(bearer(headers), clock()).is_ok()
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}
