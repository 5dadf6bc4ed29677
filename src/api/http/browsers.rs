//! What web pages may do, and what is said to the browsers that show them.
//!
//! Owns the layers that judge `Host`, `Origin` and content types, the answers to preflights, and
//! the headers of every answer. Never looks at a key. The thing to know: without keys whoever
//! reaches the port is the operator, and every page in the operator's browser reaches it.

use super::connection::Connection;
use super::errors::UNSUPPORTED_MEDIA_TYPE;
use super::permits::Full;
use super::scope::{Matched, Scope};
use super::sites::{self, Names};
use crate::api::Api;
use crate::error::{Error, Kind, Result, brief};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, CONNECTION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY,
    CONTENT_TYPE, HOST, ORIGIN, REFERRER_POLICY, TRANSFER_ENCODING, VARY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use std::sync::Arc;

const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const PRIVATE_ASKED: HeaderName = HeaderName::from_static("access-control-request-private-network");
const PRIVATE_ALLOWED: HeaderName = HeaderName::from_static("access-control-allow-private-network");
/// What scripts of an allowed origin may read of an answer, beside its body.
const EXPOSED: &str = "x-request-id, retry-after, x-should-retry, etag, location, allow, \
    x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, \
    x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, \
    x-polylora-adapter, x-polylora-digest";
/// Browsers keep a preflight's answer at most two hours.
const PREFLIGHT_SECONDS: u64 = 7200;
/// Longest list of header names that is repeated in a preflight's answer.
const ASKED_BYTES_MAX: usize = 4096;
/// Nothing that we send runs, loads or is framed, but for the page at `/docs`.
const POLICY: &str = "default-src 'none'; frame-ancestors 'none'";

/// Holds a request against the place its connection has, and against the names of this server.
pub async fn guard(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let Matched { scope, methods, .. } = Matched::of(&request);
    let public = scope == Some(Scope::Public);
    let connection = request.extensions().get::<Arc<Connection>>();
    if let Some(full) = connection.and_then(|connection| connection.reserved)
        && !public
    {
        let mut response = exhausted(&api, full).into_response();
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        return response;
    }
    if !public
        && !api.access.required()
        && let Err(error) = known(&api, &request)
    {
        return error.into_response();
    }
    if let Some(methods) = methods
        && let Some(answer) = preflight(&api, &request, methods)
    {
        return answer;
    }
    next.run(request).await
}

/// No place but in the reserve, which is for health probes.
fn exhausted(api: &Api, full: Full) -> Error {
    let config = &api.config;
    let mut error = match full {
        Full::Server => Error::new(
            Kind::Unavailable,
            "connections_exhausted",
            format!("all connections_max = {} connections are at requests", config.connections_max),
        ),
        Full::Address => Error::new(
            Kind::Busy,
            "too_many_connections",
            format!(
                "all connections_per_address_max = {} connections of this address are at requests",
                config.connections_per_address_max
            ),
        ),
    };
    error.retry_after = Some(1);
    error
}

/// Refuses what a page of another site makes a browser send to a server without keys. Errors:
/// `missing_host`, `host_not_allowed`, `origin_not_allowed`.
fn known(api: &Api, request: &Request) -> Result<()> {
    let config = &api.config;
    let connection = request.extensions().get::<Arc<Connection>>();
    let names = Names {
        own: &config.host,
        allowed: &config.allow_hosts,
        local: connection.map(|connection| connection.local),
    };
    let headers = request.headers();
    let hosts: Vec<&[u8]> = headers.get_all(HOST).iter().map(HeaderValue::as_bytes).collect();
    let of_header = match hosts[..] {
        [one] => Some(String::from_utf8_lossy(one)),
        [] if request.version() < Version::HTTP_11 => None,
        _ => {
            let message = "HTTP/1.1 wants one header `Host`";
            return Err(Error::invalid("missing_host", message));
        }
    };
    let of_target = request.uri().authority().map(|a| a.as_str().into());
    for host in of_header.iter().chain(&of_target) {
        if !names.include(host) {
            return Err(host_not_allowed(host));
        }
    }
    let host = of_target.or(of_header).unwrap_or_default();
    for origin in headers.get_all(ORIGIN) {
        let origin = String::from_utf8_lossy(origin.as_bytes());
        if !sites::allows(&config.allow_origins, &origin) && !sites::is_own(&origin, &host) {
            return Err(origin_not_allowed(&origin));
        }
    }
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    let site = headers.get(FETCH_SITE).map_or(&b"none"[..], HeaderValue::as_bytes);
    if changes && !headers.contains_key(ORIGIN) && !matches!(site, b"none" | b"same-origin") {
        return Err(origin_not_allowed(&String::from_utf8_lossy(site)));
    }
    Ok(())
}

fn host_not_allowed(host: &str) -> Error {
    let shown = brief(host);
    let message = format!(
        "a server without keys answers to localhost, to its own address and to `host`, not to \
         '{shown}': add that name to allow_hosts (--allow-hosts or POLYLORA_ALLOW_HOSTS), or set \
         an API key"
    );
    Error::new(Kind::Forbidden, "host_not_allowed", message)
}

fn origin_not_allowed(origin: &str) -> Error {
    let shown = brief(origin);
    let message = format!(
        "web pages of other origins ('{shown}') may not call a server without keys: add the \
         origin to allow_origins (--allow-origins or POLYLORA_ALLOW_ORIGINS)"
    );
    Error::new(Kind::Forbidden, "origin_not_allowed", message)
}

/// The answer to a browser that asks whether a page of an allowed origin may send something.
fn preflight(api: &Api, request: &Request, methods: String) -> Option<Response> {
    let headers = request.headers();
    let asks = headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    if !asks || granted(api, headers).is_none() {
        return None;
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    let answer = response.headers_mut();
    let methods = HeaderValue::try_from(methods);
    answer.extend(methods.ok().map(|methods| (ACCESS_CONTROL_ALLOW_METHODS, methods)));
    let asked = headers.get(ACCESS_CONTROL_REQUEST_HEADERS);
    if let Some(asked) = asked.filter(|asked| is_list_of_names(asked.as_bytes())) {
        answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    if headers.contains_key(PRIVATE_ASKED) {
        answer.insert(PRIVATE_ALLOWED, HeaderValue::from_static("true"));
    }
    answer.insert(ACCESS_CONTROL_MAX_AGE, PREFLIGHT_SECONDS.into());
    Some(response)
}

fn is_list_of_names(bytes: &[u8]) -> bool {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_., ".contains(b);
    bytes.len() <= ASKED_BYTES_MAX && bytes.iter().all(plain)
}

/// `access-control-allow-origin` for the page that sent this, if its origin is allowed.
pub fn granted(api: &Api, headers: &HeaderMap) -> Option<HeaderValue> {
    let origins = &api.config.allow_origins;
    let mut sent = headers.get_all(ORIGIN).iter();
    let (origin, None) = (sent.next()?, sent.next()) else { return None };
    if !sites::allows(origins, origin.to_str().ok()?) {
        return None;
    }
    Some(match origins.iter().any(|o| o == "*") {
        true => HeaderValue::from_static("*"),
        false => origin.clone(),
    })
}

/// Puts on every answer what browsers should know.
pub fn finish(api: &Api, headers: &mut HeaderMap, granted: Option<HeaderValue>) {
    let fixed = HeaderValue::from_static;
    headers.entry(X_CONTENT_TYPE_OPTIONS).or_insert(fixed("nosniff"));
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(fixed(POLICY));
    headers.entry(X_FRAME_OPTIONS).or_insert(fixed("DENY"));
    headers.entry(REFERRER_POLICY).or_insert(fixed("no-referrer"));
    let resources = if granted.is_some() { "cross-origin" } else { "same-origin" };
    headers.insert(RESOURCE_POLICY, fixed(resources));
    if !api.config.allow_origins.is_empty() {
        headers.append(VARY, fixed("origin"));
    }
    if let Some(origin) = granted {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, fixed(EXPOSED));
    }
}

/// Refuses a change whose body is not declared as what its route takes: a page can send a form or
/// plain text to any server without asking, but not JSON. Errors: `unsupported_media_type`.
pub async fn typed(request: Request, next: Next) -> Response {
    let Matched { scope, upload, .. } = Matched::of(&request);
    let changes = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH);
    if changes && scope.is_some() && !is_typed(request.headers(), upload) {
        let message = "the body must be JSON: send `content-type: application/json`, once";
        return Error::invalid(UNSUPPORTED_MEDIA_TYPE, message).into_response();
    }
    next.run(request).await
}

/// Of an upload only that its type is said once: which, is judged where it is received.
fn is_typed(headers: &HeaderMap, upload: bool) -> bool {
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let (first, None) = (types.next(), types.next()) else { return false };
    let Some(first) = first else {
        let length = headers.get(CONTENT_LENGTH).map_or(&b"0"[..], HeaderValue::as_bytes);
        return upload || (length == b"0" && !headers.contains_key(TRANSFER_ENCODING));
    };
    let kind = first.to_str().ok().and_then(|v| v.split(';').next()).unwrap_or_default();
    upload || kind.trim().eq_ignore_ascii_case("application/json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(upload: bool, given: &[(&str, &str)]) -> bool {
        let named = |(k, v): &(&str, &str)| (k.parse::<HeaderName>().unwrap(), v.parse().unwrap());
        is_typed(&given.iter().map(named).collect(), upload)
    }

    #[test]
    fn a_body_is_json_and_says_so_once() {
        let json = ("content-type", "application/json");
        let body = ("content-length", "2");
        assert!(judged(false, &[]) && judged(false, &[("content-length", "0")]));
        assert!(judged(false, &[json, body]) && judged(false, &[json]));
        assert!(judged(false, &[("content-type", "Application/JSON; charset=utf-8"), body]));
        assert!(!judged(false, &[body]));
        assert!(!judged(false, &[("transfer-encoding", "chunked")]));
        for kind in [
            "text/plain",
            "text/plain; application/json",
            "application/json, text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "",
        ] {
            assert!(!judged(false, &[("content-type", kind)]), "{kind}");
        }
        let mut twice = HeaderMap::new();
        twice.append(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        twice.append(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        assert!(!is_typed(&twice, false) && !is_typed(&twice, true));
        assert!(judged(true, &[body]) && judged(true, &[("content-type", "text/plain"), body]));
    }
}
