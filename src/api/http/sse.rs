//! Server-sent events, framed as OpenAI frames them.
//!
//! Owns the bytes of a frame and the headers of a stream. Never says `[DONE]` by itself: a stream
//! that failed must not, because clients take that for success.

use super::errors;
use crate::error::Error;
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, HeaderValue};

/// A body of events, with the headers that keep it from being held back on its way.
pub fn event_stream(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    let event_stream = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(CONTENT_TYPE, event_stream);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that gather a response before passing it on are told not to.
    let name = HeaderName::from_static("x-accel-buffering");
    headers.insert(name, HeaderValue::from_static("no"));
    response
}

/// One event.
pub fn data(json: &str) -> Bytes {
    Bytes::from(format!("data: {json}\n\n"))
}

/// The last event of a stream that failed.
pub fn failure(error: &Error) -> Bytes {
    let json = serde_json::to_string(&errors::body(error)).unwrap_or_default();
    Bytes::from(format!("event: error\ndata: {json}\n\n"))
}
