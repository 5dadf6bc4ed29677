//! Limits and the audit log over the wire.

use crate::api::keys::{ask, make, upload_as};
use reqwest::Method;
use serde_json::{Value, json};
use support::live::{BASE, Live, hello};

#[tokio::test]
async fn a_key_over_its_rate_is_told_when_to_come_back_and_how_it_stands() {
    let live = Live::start(&["--api-key", "secret"]);
    let limits = json!({"requests_per_minute": 2, "tokens_per_minute": 6000});
    let (key, _) = make(&live, json!({"scopes": ["inference"], "limits": limits})).await;
    let chat = async |tokens: usize| {
        ask(&live, Method::POST, "/v1/chat/completions", &key, hello(BASE, tokens)).await
    };
    let first = chat(7).await;
    assert_eq!(first.status, 200, "{}", first.text);
    assert_eq!(first.header("x-ratelimit-limit-requests"), "2");
    assert_eq!(first.header("x-ratelimit-remaining-requests"), "1");
    assert_eq!(first.header("x-ratelimit-limit-tokens"), "6000");
    // 23 tokens of prompt and 7 of answer, perhaps filled up again a little.
    let left: u64 = first.header("x-ratelimit-remaining-tokens").parse().unwrap();
    assert!((5970..6000).contains(&left), "settled to what was used: {left}");
    assert!(first.header("x-ratelimit-reset-requests").ends_with('s'));
    let large = chat(5978).await;
    assert_eq!(large.error(), "400 request_exceeds_limit -");
    assert_eq!(chat(1).await.status, 200);
    let third = chat(1).await;
    assert_eq!(third.error(), "429 rate_limit_exceeded -");
    assert_eq!(third.header("x-ratelimit-remaining-requests"), "0");
    let after: u64 = third.header("retry-after").parse().unwrap();
    assert!((1..=30).contains(&after), "{after}");
    // Whoever has no limits is told of none.
    let free = ask(&live, Method::POST, "/v1/chat/completions", "secret", hello(BASE, 1)).await;
    assert_eq!((free.status, free.header("x-ratelimit-limit-requests")), (200, ""));
}

#[tokio::test]
async fn an_adapters_quota_holds_over_all_keys_and_survives_a_restart_of_nothing_else() {
    let live = Live::start(&["--api-key", "secret"]);
    assert_eq!(upload_as(&live, "secret", "sql", 1).await.status, 201);
    let path = "/v1/limits/sql";
    let set = ask(&live, Method::PUT, path, "secret", json!({"tokens_per_day": 40})).await;
    assert_eq!(set.status, 200, "{}", set.text);
    let shown = ask(&live, Method::GET, path, "secret", Value::Null).await.json();
    assert_eq!(shown["limits"]["tokens_per_day"], 40);
    let chat = async |model: &str| {
        ask(&live, Method::POST, "/v1/chat/completions", "secret", hello(model, 10)).await
    };
    assert_eq!(chat("sql").await.status, 200);
    assert_eq!(chat("sql").await.error(), "429 quota_exceeded -");
    assert_eq!(chat(BASE).await.status, 200, "the base has no such quota");
    let wrong = ask(&live, Method::PUT, path, "secret", json!({"tokens_per_day": 0})).await;
    assert_eq!(wrong.error(), "400 invalid_value tokens_per_day");
    let early = json!({"requests_per_minute": 7});
    ask(&live, Method::PUT, "/v1/limits/later", "secret", early).await;
    let early = ask(&live, Method::GET, "/v1/limits/later", "secret", Value::Null).await.json();
    assert_eq!(early["limits"]["requests_per_minute"], 7, "set before there is an adapter");
    let nobody = ask(&live, Method::GET, "/v1/limits/none", "secret", Value::Null).await;
    assert_eq!(nobody.error(), "404 adapter_not_found name");
}

#[tokio::test]
async fn every_administrative_deed_is_recorded_and_a_tenant_reads_its_own() {
    let live = Live::start(&["--api-key", "secret"]);
    let tenant =
        |t: &str| json!({"scopes": ["admin"], "tenant": t, "adapters": [format!("{t}-*")]});
    let (acme, acme_id) = make(&live, tenant("acme")).await;
    let (globex, _) = make(&live, tenant("globex")).await;
    assert_eq!(upload_as(&live, &acme, "acme-sql", 1).await.status, 201);
    assert_eq!(upload_as(&live, &acme, "globex-sql", 1).await.status, 403);
    ask(&live, Method::GET, "/v1/adapters", &acme, Value::Null).await;
    ask(&live, Method::DELETE, "/v1/adapters/acme-no", &acme, Value::Null).await;
    ask(&live, Method::POST, "/v1/keys", &acme, tenant("x")).await;
    let log = async |key: &str, query: &str| {
        let path = format!("/v1/audit{query}");
        ask(&live, Method::GET, &path, key, Value::Null).await.json()
    };
    let page = log(&acme, "").await;
    let text = |v: &Value| v.as_str().unwrap_or("-").to_owned();
    let lines: Vec<String> = page["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| format!("{} {} {}", text(&r["action"]), text(&r["name"]), text(&r["outcome"])))
        .collect();
    let expected = [
        "POST /v1/keys - insufficient_scope",
        "DELETE /v1/adapters/{name} acme-no adapter_not_found",
        "PUT /v1/adapters/{name} globex-sql name_not_allowed",
        "PUT /v1/adapters/{name} acme-sql ok",
    ];
    assert_eq!(lines, expected);
    let uploaded = &page["data"][3];
    assert_eq!((&uploaded["key"], &uploaded["tenant"]), (&json!(acme_id), &json!("acme")));
    assert!(text(&uploaded["digest"]).starts_with("sha256:"), "{uploaded}");
    assert!(text(&uploaded["request_id"]).starts_with("req-"));
    assert_eq!(log(&globex, "").await["data"], json!([]));
    let whole = log("secret", "?limit=1").await;
    assert_eq!((&whole["data"][0]["id"], &whole["has_more"]), (&json!(6), &json!(true)));
    let made = log("secret", "?before=2").await;
    assert_eq!(made["data"][0]["name"], json!(acme_id));
}
