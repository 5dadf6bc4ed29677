//! Errors as clients see them: a status and OpenAI's four keys.
//!
//! Owns the map from `Kind` to status and type. Never invents a message and never echoes a body.
//! The thing to know: the SDKs choose their exception class by status, and read `code` and `param`
//! from the body.

use crate::access::Caller;
use crate::adapters::registry::ALIASED;
use crate::api::wire::{ErrorBody, ErrorDetail};
use crate::error::{Error, Kind, brief, cut};
use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode};

/// Longest message that leaves the server: parsers quote their input, and input can be megabytes.
const MESSAGE_CHARS_MAX: usize = 1000;

/// Codes that HTTP has its own status for, beside what `Kind` says.
pub const METHOD_NOT_ALLOWED: &str = "method_not_allowed";
pub const UNSUPPORTED_MEDIA_TYPE: &str = "unsupported_media_type";
pub const REQUEST_TIMEOUT: &str = "request_timeout";
pub const BODY_TIMEOUT: &str = "body_timeout";

/// Left on the answer of an error for whoever records how it ended.
#[derive(Clone, Copy)]
pub struct Code(pub &'static str);

/// The status of an error.
pub fn status(error: &Error) -> StatusCode {
    match error.code {
        METHOD_NOT_ALLOWED => return StatusCode::METHOD_NOT_ALLOWED,
        UNSUPPORTED_MEDIA_TYPE => return StatusCode::UNSUPPORTED_MEDIA_TYPE,
        BODY_TIMEOUT => return StatusCode::REQUEST_TIMEOUT,
        _ => {}
    }
    match error.kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Unauthorized => StatusCode::UNAUTHORIZED,
        Kind::Forbidden => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Conflict => StatusCode::CONFLICT,
        Kind::Precondition => StatusCode::PRECONDITION_FAILED,
        Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
        Kind::Busy => StatusCode::TOO_MANY_REQUESTS,
        Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Capacity => StatusCode::INSUFFICIENT_STORAGE,
        Kind::Fault => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// OpenAI's word for the kind of error.
fn type_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid | Kind::TooLarge | Kind::Unprocessable => "invalid_request_error",
        Kind::Unauthorized => "authentication_error",
        Kind::Forbidden => "permission_error",
        Kind::NotFound => "not_found_error",
        Kind::Conflict | Kind::Precondition => "conflict_error",
        Kind::Busy => "rate_limit_error",
        Kind::Unavailable => "service_unavailable_error",
        Kind::Capacity => "capacity_error",
        Kind::Fault => "server_error",
    }
}

/// The body of an error; also the data of an `error` event in a stream.
pub fn body(error: &Error) -> ErrorBody {
    let mut message = error.message.clone();
    cut(&mut message, MESSAGE_CHARS_MAX);
    ErrorBody {
        error: ErrorDetail {
            message,
            kind: type_of(error.kind).to_owned(),
            param: error.param.clone(),
            code: Some(error.code.to_owned()),
        },
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        if self.kind == Kind::Fault {
            tracing::error!(code = self.code, reason = %self.message, "request failed");
        }
        let mut response = (status(&self), Json(body(&self))).into_response();
        response.extensions_mut().insert(Code(self.code));
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(http::header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.kind == Kind::Unauthorized {
            let bearer = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(http::header::WWW_AUTHENTICATE, bearer);
        }
        if self.code == BODY_TIMEOUT {
            // The rest of the body may still come, and nobody reads it.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(http::header::CONNECTION, close);
        }
        if self.code == REQUEST_TIMEOUT {
            // The SDKs repeat every 5xx by themselves; a request that was too long stays too long.
            let name = HeaderName::from_static("x-should-retry");
            response.headers_mut().insert(name, HeaderValue::from_static("false"));
        }
        response
    }
}

/// The request ran longer than the server allows.
pub fn timed_out(seconds_max: u64) -> Error {
    Error::new(
        Kind::Unavailable,
        REQUEST_TIMEOUT,
        format!("the request took longer than request_seconds_max = {seconds_max} s"),
    )
}

/// The request waited for its first step longer than the server lets it.
pub fn queued_too_long(seconds_max: u64) -> Error {
    Error::new(
        Kind::Busy,
        "queue_timeout",
        format!("the request was still waiting after queue_seconds_max = {seconds_max} s"),
    )
}

/// A parameter has a value it must not have; `param` is its path.
pub fn invalid_value(param: &str, message: impl Into<String>) -> Error {
    Error::invalid("invalid_value", message).param(param)
}

/// The answer for a name that nobody has, or that the caller may not know of.
pub fn not_found(name: &str) -> Error {
    let shown = brief(name);
    Error::not_found("adapter_not_found", format!("there is no adapter or alias `{shown}`"))
        .param("name")
}

/// An error as the caller may read it: the alias that keeps an adapter may be another tenant's.
pub fn told(error: Error, caller: &Caller) -> Error {
    if error.code != ALIASED || caller.tenant().is_none() {
        return error;
    }
    Error { message: "an alias leads to it; change that first".to_owned(), ..error }
}

/// A name that the caller must not give, whether it exists or not.
pub fn not_allowed(name: &str) -> Error {
    let shown = brief(name);
    let message = format!("your key may not use the name `{shown}`");
    Error::new(Kind::Forbidden, "name_not_allowed", message).param("name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_body_has_all_four_keys_even_when_null() {
        let json = serde_json::to_value(body(&Error::fault("x"))).unwrap();
        let keys: Vec<_> = json["error"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(json["error"]["param"].is_null());
    }

    #[test]
    fn codes_with_a_status_of_their_own_have_it_in_the_table() {
        let made = [
            Error::invalid(METHOD_NOT_ALLOWED, ""),
            Error::invalid(UNSUPPORTED_MEDIA_TYPE, ""),
            Error::invalid(BODY_TIMEOUT, ""),
            timed_out(1),
        ];
        for error in made {
            let mut rows = crate::error::codes::GROUPS.iter().flat_map(|g| g.codes);
            let row = rows.find(|row| row.code == error.code).unwrap();
            assert_eq!(row.statuses, [status(&error).as_u16()], "{}", error.code);
        }
    }

    #[test]
    fn a_long_message_is_cut() {
        let json = serde_json::to_string(&body(&Error::fault("ä".repeat(100_000)))).unwrap();
        assert!(json.len() < 4 * MESSAGE_CHARS_MAX);
    }
}
