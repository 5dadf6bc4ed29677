//! The audit log: a flood of refusals, and a rotation.

use super::{OPERATOR, ask, get, number};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use support::live::Live;

/// Records of one key, all pages.
async fn records(live: &Live, id: &str) -> Vec<Value> {
    let (mut all, mut before) = (Vec::new(), String::new());
    loop {
        let page = get(live, OPERATOR, &format!("/v1/audit?limit=1000{before}")).await;
        let data = page["data"].as_array().expect("records").clone();
        before = format!("&before={}", data.last().map_or(0, |r| number(&r["id"])));
        all.extend(data.into_iter().filter(|r| r["key"] == id));
        if page["has_more"] != true {
            return all;
        }
    }
}

#[tokio::test]
async fn a_flood_of_refusals_leaves_sixty_records_and_a_sum() {
    const FLOOD: u64 = 1500;
    let live = Live::start(&["--api-key", OPERATOR]);
    // The least that a key can be: no tenant, no administrator's scope.
    let made = json!({"label": "t", "scopes": ["inference"]});
    let made = ask(&live, OPERATOR, Method::POST, "/v1/keys", made).await.json();
    let (key, id) = (made["secret"].as_str().expect("a secret"), &made["key"]["id"]);
    let id = id.as_str().expect("an id");
    let (mut forbidden, mut slowed) = (0, 0);
    for n in 0..FLOOD {
        let path = format!("/v1/adapters/{}{n}", "x".repeat(100));
        match ask(&live, key, Method::DELETE, &path, Value::Null).await.status {
            403 => forbidden += 1,
            429 => slowed += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!((forbidden, slowed), (1200, 300));
    let counted =
        async || -> u64 { records(&live, id).await.iter().map(|r| number(&r["count"])).sum() };
    live.until("the sums are written", async || counted().await == FLOOD).await;
    let all = records(&live, id).await;
    let single = all.iter().filter(|r| r["count"] == 1).count();
    assert!(single <= 61 && all.len() <= 70, "{single} single of {} records", all.len());
    // Nobody else is slowed.
    let delete = ask(&live, OPERATOR, Method::DELETE, "/v1/adapters/x", Value::Null).await;
    assert_eq!(delete.error(), "404 adapter_not_found name");
    println!("{FLOOD} refused requests: {forbidden} × 403, {slowed} × 429, {} records", all.len());
}

#[tokio::test]
async fn an_operator_rotates_the_log_into_a_file() {
    let live = Live::start(&["--api-key", OPERATOR]);
    for n in 0..30 {
        let path = format!("/v1/adapters/x{n}");
        assert_eq!(ask(&live, OPERATOR, Method::DELETE, &path, Value::Null).await.status, 404);
    }
    let rotate = async |key: &str, body: Value| {
        ask(&live, key, Method::POST, "/v1/audit/rotate", body).await
    };
    for wrong in [json!({}), json!({"before": 1, "keep_days": 1}), json!({"before": "x"})] {
        assert_eq!(rotate(OPERATOR, wrong).await.status, 400);
    }
    let tenant = super::key(&live, "acme", &["acme-*"], json!({})).await;
    let refused = rotate(&tenant, json!({"before": 10})).await;
    assert_eq!(refused.error(), "403 insufficient_scope -");
    let none = rotate(OPERATOR, json!({"keep_days": 1})).await.json();
    assert_eq!((&none["records"], &none["file"]), (&json!(0), &Value::Null));
    let moved = rotate(OPERATOR, json!({"before": 21})).await.json();
    assert_eq!(moved["file"], "audit/audit-1-20.jsonl");
    // Times are of milliseconds, and a record of this one would be kept.
    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    let rest = rotate(OPERATOR, json!({"keep_days": 0})).await.json();
    assert_eq!(number(&rest["first"]), 21);
    let mut lines = Vec::new();
    for moved in [&moved, &rest] {
        let file = live.data().join(moved["file"].as_str().expect("a file"));
        let text = std::fs::read_to_string(file).expect("it is there");
        let read = |line: &str| serde_json::from_str::<Value>(line).expect("a line of JSON");
        lines.extend(text.lines().map(read));
    }
    let ids: Vec<u64> = lines.iter().map(|line| number(&line["id"])).collect();
    assert_eq!(ids, (1..=number(&rest["last"])).collect::<Vec<_>>(), "each once, in order");
    assert_eq!(lines[0]["action"], "DELETE /v1/adapters/{name}");
    // What is left is the rotation itself, and the table refuses changes as before.
    let left = get(&live, OPERATOR, "/v1/audit").await["data"].clone();
    assert_eq!(left.as_array().expect("records").len(), 1);
    assert_eq!(left[0]["action"], "POST /v1/audit/rotate");
    assert_eq!(left[0]["name"], rest["file"]);
    let dir = live.crash();
    let file = SqliteConnectOptions::new().filename(dir.path().join("data/polylora.db"));
    let pool = SqlitePool::connect_with(file).await.expect("a database");
    let deleted = sqlx::query("DELETE FROM audit").execute(&pool).await.expect_err("refused");
    assert!(deleted.to_string().contains("append-only"), "{deleted}");
    println!("{} records moved into 2 files, 1 left", ids.len());
}
