//! Sends a round's requests and times every piece of every answer.
//!
//! Owns the clock of the bench. Never sums up. The thing to know: with a rate, a request's time
//! starts when it was due: a server that stalls is charged for everything that had to wait (no
//! coordinated omission).

use super::plan::{Endpoint, Plan, Shot};
use crate::cli::client::{Client, Refusal};
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// What became of one request.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub asked: String,
    /// The refusal's label when it failed.
    pub answer: Result<Timing, String>,
}

/// The times of one answer, in seconds from when it was due (or sent).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Timing {
    /// To the first piece of text; `None` when the answer was empty.
    pub first: Option<f64>,
    /// To the end of the stream.
    pub total: f64,
    /// Between pieces.
    pub gaps: Vec<f64>,
    /// As the server counted them, else the pieces.
    pub tokens: u64,
    pub prompt_tokens: Option<u64>,
}

/// Runs a round; the outcomes and the time from its start to its last byte.
pub async fn run(client: &Client, plan: &Plan) -> (Vec<Outcome>, Duration) {
    let start = Instant::now();
    let outcomes = match plan.rate {
        None => closed(client, plan, start).await,
        Some(_) => open(client, plan, start).await,
    };
    (outcomes, start.elapsed())
}

/// Workers that each send their next request when the last one ended.
async fn closed(client: &Client, plan: &Plan, start: Instant) -> Vec<Outcome> {
    let next = Cell::new(0);
    let worker = || async {
        let mut outcomes = Vec::new();
        loop {
            let i = next.get();
            let over = plan.requests.is_some_and(|n| i >= n)
                || plan.duration.is_some_and(|d| start.elapsed() >= d);
            if over {
                return outcomes;
            }
            next.set(i + 1);
            outcomes.push(outcome(client, plan, i, Instant::now()).await);
        }
    };
    join_all((0..plan.concurrency).map(|_| worker())).await.concat()
}

/// Every request at its time, however many are still unanswered.
async fn open(client: &Client, plan: &Plan, start: Instant) -> Vec<Outcome> {
    let shots = plan.arrivals().into_iter().enumerate().map(|(i, at)| async move {
        let due = start + at;
        tokio::time::sleep_until(due.into()).await;
        outcome(client, plan, i, due).await
    });
    join_all(shots).await
}

async fn outcome(client: &Client, plan: &Plan, i: usize, due: Instant) -> Outcome {
    let shot = plan.shot(i);
    let answer = fire(client, plan, &shot, due).await.map_err(|e| e.label);
    Outcome { asked: shot.target.to_string(), answer }
}

async fn fire(client: &Client, plan: &Plan, shot: &Shot, due: Instant) -> Result<Timing, Refusal> {
    let request = client.request(Method::POST, plan.endpoint.path()).json(&body(plan, shot));
    let mut events = client.events(request).await?;
    let mut timing = Timing::default();
    let (mut last, mut pieces, mut counted, mut finished) = (0.0, 0, None, false);
    while let Some(event) = events.next().await? {
        let at = due.elapsed().as_secs_f64();
        if has_text(plan.endpoint, &event) {
            match timing.first {
                None => timing.first = Some(at),
                Some(_) => timing.gaps.push(at - last),
            }
            (last, pieces) = (at, pieces + 1);
        }
        finished |= event["choices"][0]["finish_reason"].is_string();
        counted = event["usage"]["completion_tokens"].as_u64().or(counted);
        timing.prompt_tokens = event["usage"]["prompt_tokens"].as_u64().or(timing.prompt_tokens);
    }
    if !finished {
        let label = "stream: ended early".to_owned();
        return Err(Refusal { message: label.clone(), label });
    }
    timing.total = due.elapsed().as_secs_f64();
    timing.tokens = counted.unwrap_or(pieces);
    Ok(timing)
}

fn body(plan: &Plan, shot: &Shot) -> Value {
    let mut body = json!({
        "model": shot.target.model,
        "max_tokens": plan.tokens_max,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    match plan.endpoint {
        Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": shot.prompt}]),
        Endpoint::Completions => body["prompt"] = json!(shot.prompt),
    }
    if let Some(index) = shot.target.lora {
        body["lora"] = json!([{"id": index, "scale": 1.0}]);
    }
    if plan.ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    body
}

fn has_text(endpoint: Endpoint, event: &Value) -> bool {
    let choice = &event["choices"][0];
    let text = match endpoint {
        Endpoint::Chat => &choice["delta"]["content"],
        Endpoint::Completions => &choice["text"],
    };
    text.as_str().is_some_and(|t| !t.is_empty())
}
