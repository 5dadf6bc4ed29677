//! Merges and surveys: a tenant's many long orders, and another's small one.

use super::{OPERATOR, ask, get, key};
use polylora::shape::Projection;
use reqwest::Method;
use serde_json::{Value, json};
use support::live::{BASE, Live, form, hello, whole, with};

/// Sites of each source: seven projections of three layers.
const SITES: u64 = 21;

/// Rank of each of the two sources of a long order, which has as many starts as are allowed. That
/// is 0.64 of the comparisons that an order may ask for, a minute of a core, and so far more than
/// the two seconds after which it makes room; without optimisation a sixteenth of it is enough.
const LONG_RANK: usize = if cfg!(debug_assertions) { 32 } else { 128 };
const LONG_STARTS: usize = 1000;

/// A key of a tenant with two sources.
async fn tenant(live: &Live, name: &str, rank: usize) -> String {
    let key = key(live, name, &[&format!("{name}-*")], json!({})).await;
    for seed in 0..2 {
        let files = live.adapter_of(rank, &Projection::ALL, 100 * rank as u64 + seed, 0.3);
        let request = live.request(Method::PUT, &format!("/v1/adapters/{name}-{seed}"));
        let put = whole(request.bearer_auth(&key).multipart(form(&files))).await;
        assert_eq!(put.status, 201, "{}", put.text);
    }
    key
}

/// An order for the two sources: a long one has many starts of its clustering.
fn order(name: &str, restarts: usize) -> Value {
    let sources = json!([{"model": format!("{name}-0")}, {"model": format!("{name}-1")}]);
    json!({"sources": sources, "name": format!("{name}-out"), "method": "lego",
           "options": {"restarts": restarts}})
}

async fn submit(live: &Live, key: &str, order: Value) -> Result<String, String> {
    let answer = ask(live, key, Method::POST, "/v1/merges", order).await;
    match answer.status {
        202 => Ok(answer.json()["id"].as_str().expect("an id").to_owned()),
        _ => Err(answer.error()),
    }
}

async fn job(live: &Live, id: &str) -> Value {
    get(live, OPERATOR, &format!("/v1/merges/{id}")).await
}

/// Keeps the server at a long answer until it is dropped: a merge then rests after each site.
async fn occupied(live: &Live) -> reqwest::Response {
    let body = with(hello(BASE, 16_000), json!({"stream": true}));
    let request = live.request(Method::POST, "/v1/chat/completions").bearer_auth(OPERATOR);
    request.json(&body).send().await.expect("an answer")
}

#[tokio::test]
async fn a_small_merge_does_not_wait_behind_another_tenants_long_ones() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let mallory = tenant(&live, "mallory", LONG_RANK).await;
    let canary = tenant(&live, "canary", 2).await;
    let mut long = Vec::new();
    let refusal = loop {
        match submit(&live, &mallory, order("mallory", LONG_STARTS)).await {
            Ok(id) => long.push(id),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!((long.len(), refusal.as_str()), (8, "429 merge_queue_full -"), "half of 16");
    let own = json!({"limits": {"merges_max": 1}});
    let own = key(&live, "bounded", &["mallory-*", "bounded-*"], own).await;
    let sources = json!([{"model": "mallory-0"}]);
    for (n, expected) in [Ok(()), Err("429 merge_queue_full -".to_owned())].into_iter().enumerate()
    {
        let order = json!({"sources": sources, "method": "svd", "name": format!("bounded-{n}")});
        assert_eq!(submit(&live, &own, order).await.map(drop), expected, "its key allows one");
    }
    let small = submit(&live, &canary, order("canary", 1)).await.expect("a place in the queue");
    live.until("canary's merge is done", async || job(&live, &small).await["state"] == "done")
        .await;
    let first = job(&live, &long[0]).await;
    let waiting = ask(&live, &mallory, Method::GET, "/v1/merges", Value::Null).await.json();
    let waiting = waiting["data"].as_array().expect("jobs").iter();
    let waiting = waiting.filter(|j| j["state"] == "queued").count();
    assert_ne!(first["state"], "done", "it is still at its first order");
    println!(
        "8 long orders before: canary's {SITES} sites were done while mallory was at {}, {waiting} \
         waiting",
        first["progress"]
    );
}

#[tokio::test]
async fn a_third_tenants_merge_gets_its_turn() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let mut long = Vec::new();
    for name in ["one", "two"] {
        let key = tenant(&live, name, LONG_RANK).await;
        long.push(submit(&live, &key, order(name, LONG_STARTS)).await.expect("a place"));
    }
    let canary = tenant(&live, "canary", 2).await;
    let small = submit(&live, &canary, order("canary", 1)).await.expect("a place in the queue");
    live.until("canary's merge is done", async || job(&live, &small).await["state"] == "done")
        .await;
    let mut progress = Vec::new();
    for id in &long {
        let job = job(&live, id).await;
        assert!(job["state"] == "running" || job["state"] == "queued", "{job}");
        progress.push(job["progress"]["done"].clone());
    }
    println!("two tenants' long orders at {progress:?} of {SITES} sites when a third's was done");
}

#[tokio::test]
async fn a_survey_has_a_place_beside_another_tenants() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let mallory = tenant(&live, "mallory", 32).await;
    let canary = tenant(&live, "canary", 2).await;
    let _busy = occupied(&live).await;
    let survey = async |key: &str, name: &str| {
        let body = with(order(name, 1), json!({"dry_run": true}));
        ask(&live, key, Method::POST, "/v1/merges", body).await
    };
    let late = async {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        survey(&canary, "canary").await
    };
    let greedy = futures::future::join_all((0..6).map(|_| survey(&mallory, "mallory")));
    let (greedy, late) = tokio::join!(greedy, late);
    let made = greedy.iter().filter(|answer| answer.status == 200).count();
    let busy = greedy.iter().filter(|answer| answer.status == 429).count();
    assert_eq!((made, busy), (2, 4), "half of four places");
    assert_eq!(late.status, 200, "{}", late.text);
    println!("surveys, 4 places: mallory {made}, {busy} refused; canary 1 of 1");
}

#[tokio::test]
async fn an_order_without_bound_is_refused_by_name() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let key = tenant(&live, "acme", 32).await;
    for (options, param) in [
        (json!({"rank": 1_000_000}), "options.rank"),
        (json!({"rank": 513}), "options.rank"),
        (json!({"restarts": 1001}), "options.restarts"),
    ] {
        let body = with(order("acme", 1), json!({"options": options}));
        let refused = submit(&live, &key, body).await.expect_err("refused");
        assert_eq!(refused, format!("400 invalid_merge {param}"));
    }
}
