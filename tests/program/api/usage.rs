//! The usage log: what a record says, that pages hold all of them, and what a crash leaves.

use crate::api::keys::{ask, make};
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use support::live::{BASE, ENDLESS, Live, hello, with};
use support::soak::rounds;

/// Every record, page by page.
async fn records(live: &Live, page: u64) -> Vec<Value> {
    let (mut all, mut after) = (Vec::new(), 0);
    loop {
        let path = format!("/v1/usage?view=records&limit={page}&after={after}");
        let answer = live.get(&path).await.json();
        all.extend(answer["records"].as_array().expect("records").clone());
        if answer["has_more"] == false {
            return all;
        }
        after = answer["next_after"].as_u64().expect("a number");
    }
}

#[tokio::test]
async fn a_record_says_who_used_which_version_for_what() {
    let live = Live::start(&[]);
    live.upload("mine", 1).await;
    live.upload("mine", 2).await;
    let request = live.request(Method::POST, "/v1/chat/completions");
    let ask = with(hello("mine@1", 5), json!({"n": 2}));
    let answer = support::live::whole(request.header("x-request-id", "order-7").json(&ask)).await;
    // The gauge is set after a step's answers are out: it may count the last one still.
    live.idle().await;
    let socket = live.socket("POST /v1/completions", &endless("mine"));
    live.until("it runs", async || live.metric("polylora_requests_running").await == 1.0).await;
    drop(socket);
    live.idle().await;
    live.until("it is settled", async || records(&live, 10).await.len() == 2).await;
    let all = records(&live, 1).await;
    let (whole, cut) = (&all[0], &all[1]);
    let usage = &answer.json()["usage"];
    let expected = json!({
        "id": answer.json()["id"], "request_id": "order-7", "ended_ms": whole["ended_ms"],
        "tenant": "", "key_id": "anonymous", "adapter": "mine", "version": 1,
        "digest": answer.header("x-polylora-digest"),
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": 10, "finish_reason": "length",
        "route": "/v1/chat/completions", "status": 200,
    });
    assert_eq!(whole, &expected);
    assert!(whole["ended_ms"].as_u64().is_some_and(|t| t > 1_700_000_000_000));
    assert_eq!((&cut["version"], &cut["status"]), (&json!(2), &json!(499)));
    assert_eq!(cut["finish_reason"], "cancelled");
    for (query, count) in [("adapter=mine", 2), ("adapter=other", 0), ("tenant=x", 0)] {
        let page = live.get(&format!("/v1/usage?view=records&{query}")).await.json();
        assert_eq!(page["records"].as_array().map(Vec::len), Some(count), "{query}");
    }
    let end = whole["ended_ms"].as_u64().expect("a time") / 1000 + 3600;
    for (query, requests) in [(format!("until={end}"), 2), (format!("since={end}"), 0)] {
        let page = live.get(&format!("/v1/usage?{query}")).await.json();
        let sums = page["sums"].as_array().expect("sums");
        let total: u64 = sums.iter().filter_map(|s| s["requests"].as_u64()).sum();
        assert_eq!(total, requests, "{query}");
    }
    for bad in ["limit=0", "limit=10001", "view=all", "since=x", "who=me", "after=3"] {
        let refused = live.get(&format!("/v1/usage?{bad}")).await;
        assert!(refused.error().starts_with("400 invalid_value"), "{bad}: {}", refused.text);
    }
}

#[tokio::test]
async fn a_tenants_key_sees_its_own_usage_and_nobody_elses() {
    let live = Live::start(&["--api-key", "secret"]);
    let mut keys = Vec::new();
    for tenant in ["acme", "umbra"] {
        let body = json!({"scopes": ["inference", "admin"], "tenant": tenant});
        let (key, id) = make(&live, body).await;
        let answer = ask(&live, Method::POST, "/v1/chat/completions", &key, hello(BASE, 3)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        keys.push((key, id));
    }
    let page = async |key: &str, query: &str| {
        ask(&live, Method::GET, &format!("/v1/usage?{query}"), key, Value::Null).await.json()
    };
    let (acme, id) = &keys[0];
    for query in ["view=records", "view=records&tenant=acme"] {
        let own = page(acme, query).await;
        assert_eq!(own["records"].as_array().map(Vec::len), Some(1), "{own}");
        assert_eq!(own["records"][0]["tenant"], "acme");
        assert_eq!(own["records"][0]["key_id"], *id);
    }
    for view in ["sums", "records"] {
        let foreign = page(acme, &format!("view={view}&tenant=umbra")).await;
        assert_eq!(foreign, page(acme, &format!("view={view}&tenant=nobody")).await);
        assert_eq!(foreign[view], json!([]));
    }
    let all = page("secret", "").await;
    let tenants: Vec<_> = all["sums"].as_array().expect("sums").iter().collect();
    assert_eq!((&tenants[0]["tenant"], &tenants[1]["tenant"]), (&json!("acme"), &json!("umbra")));
}

fn endless(model: &str) -> String {
    json!({"model": model, "prompt": "x", "max_tokens": ENDLESS, "ignore_eos": true}).to_string()
}

#[tokio::test]
async fn nothing_that_was_answered_is_missing_or_counted_twice_after_a_crash() {
    let flags = ["--usage-sync"];
    let mut live = Live::start(&flags);
    let answered: Arc<Mutex<BTreeMap<String, u64>>> = Arc::default();
    for round in 0..rounds(2, 20) {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let (request, answered) =
                    (live.request(Method::POST, "/v1/chat/completions"), answered.clone());
                tokio::spawn(async move {
                    // Every answer has the same client's id: it is not what counts.
                    let request = request.header("x-request-id", "same");
                    while let Some(again) = request.try_clone() {
                        let Ok(answer) = again.json(&hello(BASE, 3)).send().await else { return };
                        let Ok(body) = answer.json::<Value>().await else { return };
                        let id = body["id"].as_str().expect("an id").to_owned();
                        let tokens = body["usage"]["completion_tokens"].as_u64();
                        answered.lock().unwrap().insert(id, tokens.expect("tokens"));
                    }
                })
            })
            .collect();
        // Killed at another count each time.
        let enough = answered.lock().unwrap().len() + 7 + 11 * (round % 9);
        live.until("it answers", async || answered.lock().unwrap().len() >= enough).await;
        live = live.crash_and_restart(&flags);
        for client in clients {
            client.await.expect("no client fails otherwise");
        }
        let logged = records(&live, 1000).await;
        let ids: BTreeMap<&str, u64> = logged
            .iter()
            .map(|r| (r["id"].as_str().unwrap(), r["completion_tokens"].as_u64().unwrap()))
            .collect();
        assert_eq!(ids.len(), logged.len(), "a record counts twice");
        let answered = answered.lock().unwrap();
        assert!(!answered.is_empty(), "nothing was answered");
        for (id, tokens) in answered.iter() {
            assert_eq!(ids.get(id.as_str()), Some(tokens), "{id} was answered");
        }
    }
    let count = answered.lock().unwrap().len();
    eprintln!("{count} answers, {} records", records(&live, 1000).await.len());
}
