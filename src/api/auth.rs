//! The API key: one switch for every route that is not public.
//!
//! Owns the comparison. Never logs a key. The thing to know: with a key set, an unknown path also
//! answers 401, so that nobody learns the routes without it.

use super::Api;
use super::routes::{self, Scope};
use crate::error::{Error, Kind};
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// Lets a request through when its route is public, no key is set, or the key is right.
pub async fn require_key(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let Some(key) = &api.app.config.api_key else {
        return next.run(request).await;
    };
    let path = request.extensions().get::<MatchedPath>();
    let public = path.is_some_and(|path| routes::scope(path.as_str()) == Some(Scope::Public));
    if public || bearer(&request).is_some_and(|given| equal(given, key)) {
        return next.run(request).await;
    }
    Error::new(
        Kind::Unauthorized,
        "invalid_api_key",
        "this server wants `authorization: Bearer <key>` with its API key",
    )
    .into_response()
}

fn bearer(request: &Request) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// Hashes first: equal lengths, so that not even the key's length shows in the time this takes.
fn equal(given: &str, key: &str) -> bool {
    let (given, key) = (Sha256::digest(given), Sha256::digest(key));
    given.as_slice().ct_eq(key.as_slice()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_opens() {
        assert!(equal("secret", "secret"));
        for wrong in ["", "secre", "secrets", "Secret"] {
            assert!(!equal(wrong, "secret"));
        }
    }
}
