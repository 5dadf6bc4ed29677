//! What two tenants share, one of them greedy: the other keeps its share.
//!
//! Owns how these tests make keys and ask. Never judges by time: places, bytes, records and states
//! are counted, and the figures printed.

mod audit;
mod jobs;
mod memory;
mod owners;
mod rights;
mod shares;

use polylora::shape::Projection;
use reqwest::Method;
use serde_json::{Value, json};
use support::live::{Answer, Live, form, whole};

/// The operator's key.
const OPERATOR: &str = "secret";

async fn ask(live: &Live, key: &str, method: Method, path: &str, body: Value) -> Answer {
    let request = live.request(method, path).bearer_auth(key);
    whole(if body.is_null() { request } else { request.json(&body) }).await
}

async fn get(live: &Live, key: &str, path: &str) -> Value {
    ask(live, key, Method::GET, path, Value::Null).await.json()
}

/// A tenant's key with both scopes; `more` is laid over it.
async fn key(live: &Live, tenant: &str, adapters: &[&str], more: Value) -> String {
    let body = json!({"label": "t", "scopes": ["inference", "admin"], "tenant": tenant,
                      "adapters": adapters});
    let body = support::live::with(body, more);
    let made = ask(live, OPERATOR, Method::POST, "/v1/keys", body).await;
    assert_eq!(made.status, 201, "{}", made.text);
    made.json()["secret"].as_str().expect("a secret").to_owned()
}

/// Uploads a random adapter of this rank.
async fn upload(live: &Live, key: &str, name: &str, rank: usize, seed: u64) -> Answer {
    let files = live.adapter_of(rank, &[Projection::Q, Projection::Down], seed, 0.3);
    let request = live.request(Method::PUT, &format!("/v1/adapters/{name}"));
    whole(request.bearer_auth(key).multipart(form(&files))).await
}

/// Uploads `prefix-0`, `prefix-1` … until one is refused; how many came in, and the refusal.
async fn upload_all(live: &Live, key: &str, prefix: &str, rank: usize) -> (u64, Answer) {
    // Contents of their own: those that others have take no room.
    let first = prefix.bytes().fold(0, |sum, byte| sum * 31 + u64::from(byte)) % 1000 * 1000;
    for n in 0.. {
        let put = upload(live, key, &format!("{prefix}-{n}"), rank, first + n).await;
        if put.status != 201 {
            return (n, put);
        }
    }
    unreachable!("there is an end to everything")
}

async fn chat(live: &Live, key: &str, model: &str) -> Answer {
    let body = support::live::hello(model, 2);
    ask(live, key, Method::POST, "/v1/chat/completions", body).await
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}
