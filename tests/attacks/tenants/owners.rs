//! A data directory from before names had owners.

use super::{OPERATOR, ask, get, key, upload};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};
use std::path::Path;
use std::process::Stdio;
use support::live::Live;

/// Takes the tables back to the formats before training, files, owners and the time of changes,
/// when access and jobs had databases of their own.
const BEFORE: &str = "
    CREATE TABLE access.keys AS SELECT number, id, label, scopes, tenant, adapters, weight, limits,
        created, expires, revoked, last_used FROM main.keys;
    CREATE TABLE access.secrets AS SELECT * FROM main.secrets;
    CREATE TABLE access.limits AS SELECT * FROM main.limits;
    CREATE TABLE access.usage AS SELECT * FROM main.usage;
    CREATE TABLE access.audit AS SELECT id, at, key, tenant, action, name, digest, outcome, status,
        request FROM main.audit;
    PRAGMA access.user_version = 2;
    CREATE TABLE jobs.jobs AS SELECT number, id, key, tenant, json_remove(spec, '$.rights') AS spec,
        sets, state, restarts, created, started, ended, outcome, failure FROM main.jobs;
    CREATE TABLE jobs.reports AS SELECT * FROM main.reports;
    PRAGMA jobs.user_version = 1;
    DROP TABLE main.secrets; DROP TABLE main.keys; DROP TABLE main.limits; DROP TABLE main.usage;
    DROP TABLE main.audit; DROP TABLE main.reports; DROP TABLE main.jobs;
    DROP TABLE events; DROP TABLE learnt;
    DROP TABLE parts; DROP TABLE uploads; DROP TABLE files;
    DROP TABLE owners; DROP TABLE changed;
    PRAGMA main.user_version = 2;";

/// The databases of a server that is down, as they were.
async fn take_back(data: &Path) {
    let options = SqliteConnectOptions::new().create_if_missing(true);
    let options = options.filename(data.join("polylora.db"));
    let mut connection = options.connect().await.expect("a database");
    for name in ["access", "jobs"] {
        let file = data.join(format!("{name}.db")).to_str().expect("UTF-8").to_owned();
        let attach = sqlx::query("ATTACH DATABASE ? AS ?").bind(file).bind(name);
        attach.execute(&mut connection).await.expect("attached");
    }
    sqlx::raw_sql(BEFORE).execute(&mut connection).await.expect("as it was");
    connection.close().await.expect("closed");
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
    take_back(&data).await;

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
