//! The edge of every request: its id, its deadline, its count, and what happens when code panics.
//!
//! Owns what all routes share. Never looks into a body. The thing to know: a response head is due
//! before the deadline, and streams carry the same deadline on.

use super::connection::Connection;
use super::{browsers, errors, unread};
use crate::access::Standing;
use crate::api::Api;
use crate::error::Error;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::header::{CONNECTION, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tracing::{Instrument, field};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id of a client that we repeat.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// When a request must be over.
#[derive(Clone, Copy)]
pub struct Deadline {
    pub at: tokio::time::Instant,
    pub seconds_max: u64,
}

/// Where a request came in. Made at the edge.
#[derive(Clone)]
pub struct Origin {
    pub begun: Instant,
    pub deadline: Deadline,
    /// The `x-request-id` of the answer.
    pub request_id: Arc<str>,
    /// As the table of routes writes it.
    pub route: Arc<str>,
}

/// Counts a request even when its client hangs up before the answer.
struct Count<'a> {
    api: &'a Api,
    route: String,
    status: StatusCode,
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        let counter = &self.api.metrics.http_requests;
        counter.with_label_values(&[self.route.as_str(), self.status.as_str()]).inc();
    }
}

/// nginx's word for a client that closed the connection.
pub fn client_closed() -> StatusCode {
    StatusCode::from_u16(499).expect("a status has three digits")
}

/// The outermost layer.
pub async fn edge(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(&request);
    let matched = request.extensions().get::<MatchedPath>();
    let mut count = Count {
        api: &api,
        route: matched.map_or("unmatched", MatchedPath::as_str).to_owned(),
        status: client_closed(),
    };
    let method = request.method().clone();
    let seconds_max = api.config.request_seconds_max;
    let deadline = Deadline {
        at: tokio::time::Instant::now() + Duration::from_secs(seconds_max),
        seconds_max,
    };
    let sane = id.to_str().unwrap_or_default();
    request.extensions_mut().insert(Origin {
        begun,
        deadline,
        request_id: sane.into(),
        route: count.route.as_str().into(),
    });
    // A span of the highest level, so that no filter on levels takes the id off a line.
    let span = tracing::error_span!(
        "request",
        id = sane,
        route = count.route,
        adapter = field::Empty,
        status = field::Empty,
        prompt_tokens = field::Empty,
        completion_tokens = field::Empty,
    );
    let granted = browsers::granted(&api, request.headers());
    let connection = request.extensions().get::<Arc<Connection>>().cloned();
    let (request, loan) = unread::lend(request, connection.clone());
    let mut response = match is_text(request.uri().path()) {
        true => contained(deadline, next.run(request)).instrument(span.clone()).await,
        false => {
            drop(request);
            Error::not_found("unknown_route", "the path is not UTF-8").into_response()
        }
    };
    let whole = loan.settled().await;
    let _in_span = span.entered();
    tracing::Span::current().record("status", response.status().as_u16());
    count.status = response.status();
    response.headers_mut().insert(REQUEST_ID, id.clone());
    browsers::finish(&api, response.headers_mut(), granted);
    if !whole && let Some(connection) = connection {
        connection.leave_unread();
    }
    if !whole || api.requests.draining.load(Ordering::Acquire) {
        // Hyper ends the connection after such an answer.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(seconds) = retry_after(&api, response.status()) {
        let seconds = HeaderValue::from(seconds);
        response.headers_mut().entry(RETRY_AFTER).or_insert(seconds);
    }
    tracing::debug!(
        %method,
        status = count.status.as_u16(),
        ms = begun.elapsed().as_millis() as u64,
        "answered"
    );
    response
}

/// The answer, or what stands for it when it panics or is late.
async fn contained(deadline: Deadline, answer: impl Future<Output = Response>) -> Response {
    let answer = AssertUnwindSafe(answer).catch_unwind();
    match tokio::time::timeout_at(deadline.at, answer).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => Error::fault("a bug ended the request").into_response(),
        Err(_) => errors::timed_out(deadline.seconds_max).into_response(),
    }
}

/// Whether a path is UTF-8 once its escapes are undone. Extractors would refuse it in words of
/// their own.
fn is_text(path: &str) -> bool {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = after.get(..2).filter(|_| *first == b'%');
        let byte = escaped.and_then(|digits| hex::decode(digits).ok());
        rest = if byte.is_some() { &after[2..] } else { after };
        bytes.push(byte.map_or(*first, |b| b[0]));
    }
    std::str::from_utf8(&bytes).is_ok()
}

/// A fresh id such as `chatcmpl-0f3c…`.
pub fn random_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

/// The client's id when it is harmless to repeat, else a fresh one.
fn request_id(request: &Request) -> HeaderValue {
    let sane = |v: &&HeaderValue| {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"._:-".contains(b);
        (1..=REQUEST_ID_BYTES_MAX).contains(&v.len()) && v.as_bytes().iter().all(plain)
    };
    let given = request.headers().get(REQUEST_ID).filter(sane).cloned();
    given
        .unwrap_or_else(|| HeaderValue::from_str(&random_id("req-")).expect("an id is plain ASCII"))
}

/// Puts OpenAI's headers on an answer: what is left to its key.
pub fn tell(standing: &Standing, headers: &mut HeaderMap) {
    let both = [("requests", standing.requests), ("tokens", standing.tokens)];
    for (what, left) in both.into_iter().filter_map(|(what, left)| Some((what, left?))) {
        for (which, value) in [
            ("limit", left.limit.to_string()),
            ("remaining", left.remaining.to_string()),
            ("reset", reset(left.reset_ms)),
        ] {
            let name = HeaderName::try_from(format!("x-ratelimit-{which}-{what}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
    }
}

/// A time as OpenAI writes it: `20ms`, `7s`, `1m0s`.
fn reset(ms: u64) -> String {
    match ms {
        0..=999 => format!("{ms}ms"),
        1000..60_000 => format!("{}s", ms.div_ceil(1000)),
        _ => format!("{}m{}s", ms / 60_000, ms / 1000 % 60),
    }
}

/// Seconds after which trying again makes sense: the longer the queue against what runs, the later.
fn retry_after(api: &Api, status: StatusCode) -> Option<u64> {
    match status {
        StatusCode::TOO_MANY_REQUESTS => {
            let metrics = &api.metrics;
            let waiting = metrics.requests_waiting.get().max(0) as u64;
            let running = metrics.requests_running.get().max(1) as u64;
            Some((1 + waiting / running).min(30))
        }
        StatusCode::SERVICE_UNAVAILABLE => Some(5),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_text_after_its_escapes_are_undone() {
        for path in ["/", "/v1/models/s%C3%A4l", "/%", "/%4", "/%zz", "/100%25", "/a%00b"] {
            assert!(is_text(path), "{path}");
        }
        for path in ["/%FF", "/v1/adapters/%FF%FE", "/%C3", "/a%ed%a0%80"] {
            assert!(!is_text(path), "{path}");
        }
    }

    #[tokio::test]
    async fn a_panic_is_a_500_and_lateness_a_503_in_the_same_shape() {
        let code = async |response: Response| {
            let status = response.status().as_u16();
            let body = axum::body::to_bytes(response.into_body(), 1000).await;
            let body: serde_json::Value = serde_json::from_slice(&body.unwrap()).unwrap();
            (status, body["error"]["code"].as_str().unwrap().to_owned())
        };
        let deadline = |ms| Deadline {
            at: tokio::time::Instant::now() + Duration::from_millis(ms),
            seconds_max: 1,
        };
        let panics = async { panic!("planted") };
        let answer = code(contained(deadline(60_000), panics).await).await;
        assert_eq!(answer, (500, "internal_error".to_owned()));
        let late = std::future::pending();
        let answer = code(contained(deadline(1), late).await).await;
        assert_eq!(answer, (503, "request_timeout".to_owned()));
    }
}
