//! A data directory from before names had owners.

use super::{OPERATOR, ask, get, key, upload};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use std::path::Path;
use std::process::Stdio;
use support::live::Live;

/// Takes the tables of the catalogue back to the format before owners and the time of changes.
const CATALOGUE: &str = "DROP TABLE owners; DROP TABLE changed; PRAGMA user_version = 2;";

/// Runs statements on a database of a server that is down.
async fn change(file: &Path, statements: &'static str) {
    let options = SqliteConnectOptions::new().filename(file);
    let pool = SqlitePool::connect_with(options).await.expect("a database");
    sqlx::raw_sql(statements).execute(&pool).await.expect("changed");
    pool.close().await;
}

#[tokio::test]
async fn names_from_before_go_to_the_tenant_whose_key_or_job_made_them() {
    let flags = ["--api-key", OPERATOR];
    let live = Live::start(&flags);
    let acme = key(&live, "acme", &["acme-*", "shared-*"], json!({})).await;
    let globex = key(&live, "globex", &["shared-*"], json!({})).await;
    for (who, name, seed) in [(&*acme, "acme-a", 1), (&globex, "shared-b", 2), (OPERATOR, "ops", 3)]
    {
        assert_eq!(upload(&live, who, name, 4, seed).await.status, 201);
    }
    let order = json!({"sources": [{"model": "acme-a"}, {"model": "shared-b"}], "method": "svd",
                       "name": "acme-merged"});
    assert_eq!(ask(&live, &acme, Method::POST, "/v1/merges", order).await.status, 202);
    live.until("the merge is done", async || {
        get(&live, &acme, "/v1/merges").await["data"][0]["state"] == "done"
    })
    .await;
    for (alias, target) in [("acme-prod", "acme-a@1"), ("shared-prod", "ops@1")] {
        let body = json!({"weights": {target: 1}});
        let put = ask(&live, OPERATOR, Method::PUT, &format!("/v1/aliases/{alias}"), body).await;
        assert_eq!(put.status, 201, "{}", put.text);
    }
    // The tables as they were.
    let dir = live.crash();
    let data = dir.path().join("data");
    change(&data.join("polylora.db"), CATALOGUE).await;
    let access = "ALTER TABLE keys DROP COLUMN manage; ALTER TABLE audit DROP COLUMN count;
                  PRAGMA user_version = 2;";
    change(&data.join("access.db"), access).await;
    change(&data.join("jobs.db"), "UPDATE jobs SET spec = json_remove(spec, '$.rights');").await;

    let mut live = Live::start_in(dir, &flags, Stdio::inherit());
    for _ in 0..2 {
        let list = get(&live, OPERATOR, "/v1/adapters").await["data"].clone();
        let owners = list.as_array().expect("adapters").iter();
        let owners: Vec<_> = owners.map(|v| (v["name"].clone(), v["owner"].clone())).collect();
        let expected = [
            (json!("acme-a"), json!("acme")),
            (json!("acme-merged"), json!("acme")),
            (json!("ops"), Value::Null),
            (json!("shared-b"), json!("globex")),
        ];
        assert_eq!(owners, expected);
        for (alias, owner) in [("acme-prod", json!("acme")), ("shared-prod", Value::Null)] {
            let shown = get(&live, OPERATOR, &format!("/v1/aliases/{alias}")).await;
            assert_eq!(shown["owner"], owner, "{alias}");
        }
        assert_eq!(upload(&live, &acme, "shared-b", 4, 7).await.status, 403);
        let again = upload(&live, &globex, "shared-b", 4, 2).await;
        assert_eq!(again.status, 200, "{}", again.text);
        live = live.crash_and_restart(&flags);
    }
}
