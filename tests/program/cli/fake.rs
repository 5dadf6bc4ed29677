//! A server that speaks enough of the API for the clients, with fixed pieces at fixed times.

use axum::Json;
use axum::extract::{Multipart, Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the fake server saw: (route, body or part names).
pub type Seen = Arc<Mutex<Vec<(String, Value)>>>;

/// Before the first piece, and between pieces.
const FIRST: Duration = Duration::from_millis(120);
const GAP: Duration = Duration::from_millis(40);

fn refusal(status: StatusCode, code: &str) -> Response {
    let kind = "invalid_request_error";
    let error = json!({"message": "no, not that", "type": kind, "param": "model", "code": code});
    (status, Json(json!({ "error": error }))).into_response()
}

/// Four pieces of text, but five tokens by the server's count. Some models fail in their own way.
async fn chat(State(seen): State<Seen>, Json(body): Json<Value>) -> Response {
    let model = body["model"].as_str().unwrap_or_default().to_owned();
    seen.lock().expect("lock").push(("chat".into(), body));
    if model == "busy" {
        return refusal(StatusCode::TOO_MANY_REQUESTS, "queue_full");
    }
    let piece =
        |text: &str| json!({"choices": [{"delta": {"content": text}, "finish_reason": null}]});
    let end = json!({"choices": [{"delta": {}, "finish_reason": "stop"}]});
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}});
    let mut events: Vec<(Duration, Event)> = vec![(FIRST, piece("Avast"))]
        .into_iter()
        .chain([", ", "ye ", "lubber"].map(|t| (GAP, piece(t))))
        .chain([end, usage].map(|v| (Duration::ZERO, v)))
        .map(|(wait, v)| (wait, Event::default().data(v.to_string())))
        .collect();
    if model == "breaks" {
        events.truncate(2);
        let error = json!({"error": {"message": "step failed", "code": "internal_error"}});
        events.push((GAP, Event::default().event("error").data(error.to_string())));
    } else if model == "vanishes" {
        events.truncate(2);
    } else {
        events.push((Duration::ZERO, Event::default().data("[DONE]")));
    }
    let stream = stream::iter(events).then(|(wait, event)| async move {
        tokio::time::sleep(wait).await;
        Ok::<_, Infallible>(event)
    });
    Sse::new(stream).into_response()
}

async fn upload(
    State(seen): State<Seen>,
    Path(name): Path<String>,
    mut form: Multipart,
) -> Response {
    let mut parts = Vec::new();
    while let Some(part) = form.next_field().await.expect("multipart") {
        let name = part.name().unwrap_or_default().to_owned();
        parts.push(json!({"name": name, "bytes": part.bytes().await.expect("bytes").len()}));
    }
    if name == "refused" {
        return refusal(StatusCode::UNPROCESSABLE_ENTITY, "shape_mismatch");
    }
    seen.lock().expect("lock").push((name.clone(), json!(parts)));
    Json(json!({"id": format!("{name}@1"), "name": name, "state": "ready"})).into_response()
}

/// Starts the fake server on a free port; it ends with the test process.
pub fn server() -> (String, Seen) {
    let seen = Seen::default();
    let models = json!({"data": [{"id": "base"}, {"id": "pirate"}]});
    let app = axum::Router::new()
        .route("/v1/models", get(move || async move { Json(models) }))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/adapters/{name}", put(upload))
        .with_state(seen.clone());
    let (send, receive) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            send.send(listener.local_addr().expect("an address")).expect("sent");
            axum::serve(listener, app).await.expect("serving");
        });
    });
    (format!("http://{}", receive.recv().expect("the address")), seen)
}
