//! What became of data: which versions saw a record, and what goes when a file is deleted.

use crate::api::files::held;
use crate::api::fine_tuning_gate::{done, file, good, job, lines, submit};
use crate::api::keys::{ask, make, upload_as};
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use support::live::{Live, hello, whole, with};

async fn seen(live: &Live, key: &str, record: Value) -> Value {
    let body = json!({ "record": record });
    let answer = ask(live, Method::POST, "/v1/fine_tuning/seen", key, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

async fn delete(live: &Live, key: &str, id: &str, query: &str) -> support::live::Answer {
    ask(live, Method::DELETE, &format!("/v1/files/{id}{query}"), key, Value::Null).await
}

/// A merge of these into `name`, done.
async fn merge(live: &Live, key: &str, name: &str, sources: &[&str]) -> String {
    let sources: Vec<Value> = sources.iter().map(|s| json!({"model": s})).collect();
    let order = json!({"sources": sources, "name": name, "method": "cat", "any_base": true});
    let made = ask(live, Method::POST, "/v1/merges", key, order).await;
    assert_eq!(made.status, 202, "{}", made.text);
    let id = made.json()["id"].as_str().expect("an id").to_owned();
    let shown =
        async || ask(live, Method::GET, &format!("/v1/merges/{id}"), key, Value::Null).await.json();
    live.until("it is merged", async || shown().await["state"] == "done").await;
    id
}

fn list(value: &Value) -> BTreeSet<String> {
    let all = value.as_array().unwrap_or_else(|| panic!("{value}")).iter();
    all.map(|v| v.as_str().or_else(|| v["id"].as_str()).expect("a text").to_owned()).collect()
}

fn set(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|text| (*text).to_owned()).collect()
}

#[tokio::test]
async fn who_saw_a_record_has_an_answer_after_its_file_and_its_versions_are_gone() {
    let live = Live::start(&["--api-key", "secret"]);
    let (key, _) = make(
        &live,
        json!({"scopes": ["inference", "admin"], "tenant": "acme", "adapters": ["acme-*"]}),
    )
    .await;
    let train = file(&live, "secret", &lines(0, 8)).await;
    let mut order = good("yes", &train, json!({"validation_split": 0.25}));
    order["hyperparameters"]["n_epochs"] = json!(2);
    let post = ask(&live, Method::POST, "/v1/fine_tuning/jobs", "secret", order).await;
    let path = format!("/v1/fine_tuning/jobs/{}", post.json()["id"].as_str().expect("an id"));
    let show = async || ask(&live, Method::GET, &path, "secret", Value::Null).await.json();
    live.until("it is over", async || !show().await["finished_at"].is_null()).await;
    let trained = show().await;
    assert_eq!(trained["status"], "succeeded", "{trained}");
    assert_eq!(upload_as(&live, "secret", "other", 1).await.status, 201);
    merge(&live, "secret", "both", &["yes", "other"]).await;

    // What the version says of itself.
    let shown = ask(&live, Method::GET, "/v1/adapters/yes", "secret", Value::Null).await.json();
    let lineage = &shown["versions"][1]["lineage"];
    let record = &lineage["record"];
    assert_eq!((&lineage["job"], &lineage["step"]), (&trained["id"], &Value::Null));
    assert_eq!((&record["seed"], &record["steps"]), (&json!(3), &trained["polylora"]["steps"]));
    let kept = std::fs::read_dir(live.data().join("files/sha256")).expect("files");
    let kept: Vec<String> = kept
        .flatten()
        .flat_map(|part| std::fs::read_dir(part.path()).expect("a part").flatten())
        .map(|file| format!("sha256:{}", file.file_name().display()))
        .collect();
    assert_eq!(record["training_file"]["id"], json!(train));
    let digest = record["training_file"]["digest"].as_str().expect("a digest");
    assert!(kept.iter().any(|k| k == digest), "{digest} is none of {kept:?}");
    for digest in ["spec", "base"] {
        assert!(record[digest].as_str().is_some_and(|d| d.len() == 71), "{record}");
    }

    assert_eq!(delete(&live, "secret", &train, "").await.status, 200);
    let line = |n: usize| json!({"completion": "yes", "prompt": format!("{n}?")});
    let mut learnt = Vec::new();
    for n in 0..8 {
        let answer = seen(&live, "secret", line(n)).await;
        if !answer["data"].as_array().expect("versions").is_empty() {
            assert_eq!(list(&answer["data"]), set(&["both@1", "yes@1", "yes@2"]), "{answer}");
            assert_eq!(answer["data"][0]["by"], "descent");
            assert_eq!(answer["data"][1]["by"], "training");
            assert_eq!(answer["data"][0]["jobs"], json!([trained["id"]]));
            learnt.push(n);
        }
    }
    assert_eq!(learnt.len(), 6, "a quarter was held out");
    let text = format!("{{ \"prompt\":\"{}?\",   \"completion\" : \"y\\u0065s\"}}", learnt[0]);
    assert_eq!(seen(&live, "secret", json!(text)).await["data"].as_array().unwrap().len(), 3);
    assert_eq!(seen(&live, "secret", line(99)).await["data"], json!([]));
    // Another tenant learns nothing, not even that there is somebody.
    let theirs = seen(&live, &key, line(learnt[0])).await;
    assert_eq!((&theirs["data"], &theirs["others"]), (&json!([]), &json!(0)));
    let wrong =
        ask(&live, Method::POST, "/v1/fine_tuning/seen", "secret", json!({"record": 7})).await;
    assert_eq!(wrong.error(), "400 invalid_value record");
    // The trained versions go; what was merged of them still says what it rests on.
    let gone = ask(&live, Method::DELETE, "/v1/adapters/yes", "secret", Value::Null).await;
    assert_eq!(gone.status, 200, "{}", gone.text);
    assert_eq!(list(&seen(&live, "secret", line(learnt[0])).await["data"]), set(&["both@1"]));
}

/// The plan of a deletion that an alias is in the way of; the alias goes after it.
async fn planned(live: &Live, train: &str, [job, merged, table]: [&str; 3]) {
    let alias = json!({"weights": {"both@1": 1}});
    let put = whole(live.request(Method::PUT, "/v1/aliases/live").json(&alias)).await;
    assert_eq!(put.status, 201, "{}", put.text);
    let refused = delete(live, "-", train, "?cascade=true").await;
    assert_eq!(refused.error(), "409 adapter_aliased name");
    assert!(refused.text.contains("`live`") && refused.text.contains("both@1"), "{}", refused.text);
    let plan = delete(live, "-", train, "?cascade=true&dry_run=true").await.json();
    let cascade = &plan["cascade"];
    assert_eq!(plan["deleted"], false);
    assert_eq!(list(&cascade["versions"]), set(&["yes@2", "yes@3", "both@1", "twice@1"]), "{plan}");
    assert!(list(&cascade["jobs"]).is_superset(&set(&[job, merged])), "{plan}");
    assert_eq!(
        (cascade["jobs"].as_array().unwrap().len(), &cascade["files"]),
        (3, &json!([table]))
    );
    let name = |name: &str, version: Value| json!({"name": name, "version": version});
    assert_eq!(
        cascade["names"],
        json!([name("both", Value::Null), name("twice", Value::Null), name("yes", json!(1))])
    );
    assert_eq!(cascade["others"], json!({"versions": 0, "jobs": 0}));
    assert!(cascade["blocked_by"].as_str().is_some_and(|why| why.contains("`live`")), "{plan}");
    assert_eq!(whole(live.request(Method::DELETE, "/v1/aliases/live")).await.status, 200);
}

/// A job that reads the file keeps it; afterwards it is over.
async fn kept_by_a_job(live: &Live, train: &str, order: Value) -> String {
    let long = json!({"suffix": "more", "hyperparameters": {"n_epochs": 50, "batch_size": 1}});
    let running = submit(live, with(order, long)).await;
    live.post(&format!("/v1/fine_tuning/jobs/{running}/pause"), json!({})).await;
    assert_eq!(job(live, &running).await["polylora"]["paused"], true);
    assert_eq!(delete(live, "-", train, "?cascade=true").await.error(), "409 file_in_use -");
    live.post(&format!("/v1/fine_tuning/jobs/{running}/cancel"), json!({})).await;
    let over = async || !job(live, &running).await["finished_at"].is_null();
    live.until("it is over", over).await;
    running
}

/// The audit log has each of these once, and what was asked for.
async fn recorded(live: &Live, gone: &[&str], train: &str) {
    let audit = live.get("/v1/audit?limit=100").await.json();
    let records = audit["data"].as_array().expect("records");
    let of = |name: &str| {
        let ours = records.iter().filter(|r| {
            r["name"] == name
                && r["outcome"] == "ok"
                && r["action"].as_str().is_some_and(|a| a.starts_with("DELETE /v1/files"))
                && r["status"] == 200
        });
        ours.count()
    };
    for name in gone {
        assert_eq!(of(name), 1, "{name}");
    }
    assert_eq!(of(train), 1);
    assert_eq!(of(&format!("{train} (dry run)")), 1);
}

#[tokio::test]
async fn a_deleted_file_takes_along_what_rests_on_it_and_nothing_else() {
    let live = Live::start(&[]);
    let (train, other) =
        (file(&live, "-", &lines(0, 8)).await, file(&live, "-", &lines(50, 8)).await);
    assert_eq!(live.upload("yes", 1).await.status, 201);
    let mut order = good("yes", &train, json!({}));
    order["hyperparameters"]["n_epochs"] = json!(2);
    let first = done(&live, order.clone()).await;
    let apart = done(&live, good("apart", &other, json!({}))).await;
    let kept = apart["fine_tuned_model"].as_str().expect("a version");
    merge(&live, "-", "both", &["yes", kept]).await;
    let merged = merge(&live, "-", "twice", &["both", "both@1"]).await;
    let id = first["id"].as_str().expect("an id");
    let table = first["result_files"][0].as_str().expect("a table").to_owned();
    let blobs = held(&live, "adapters/sha256");

    planned(&live, &train, [id, &merged, &table]).await;
    let running = kept_by_a_job(&live, &train, order).await;

    let said = json!({"role": "user", "content": "the same long question ".repeat(8)});
    let chat = with(hello(kept, 1), json!({"messages": [said]}));
    let cached = async || {
        let usage = live.chat(chat.clone()).await.json()["usage"]["prompt_tokens_details"].clone();
        usage["cached_tokens"].as_u64().expect("a number")
    };
    cached().await;
    assert!(cached().await > 0, "prefixes are kept");
    let gone = delete(&live, "-", &train, "?cascade=true").await;
    assert_eq!((gone.status, &gone.json()["deleted"]), (200, &json!(true)), "{}", gone.text);
    assert_eq!(cached().await, 0, "no prefix from before is found");
    for path in [
        format!("/v1/files/{train}"),
        format!("/v1/files/{table}"),
        format!("/v1/fine_tuning/jobs/{id}"),
        format!("/v1/fine_tuning/jobs/{id}/events"),
        format!("/v1/fine_tuning/jobs/{running}"),
        format!("/v1/merges/{merged}"),
        "/v1/adapters/both".to_owned(),
        "/v1/adapters/twice".to_owned(),
    ] {
        assert_eq!(live.get(&path).await.status, 404, "{path}");
    }
    let yes = live.get("/v1/adapters/yes").await.json();
    assert_eq!((&yes["current"], yes["versions"].as_array().unwrap().len()), (&json!(1), 1));
    assert_eq!(live.chat(hello("yes", 1)).await.status, 200);
    assert_eq!(live.chat(hello(kept, 1)).await.status, 200, "what rests on other data stays");
    assert_eq!(live.get(&format!("/v1/files/{other}")).await.status, 200);
    let record = json!({"prompt": "1?", "completion": "yes"});
    assert_eq!(seen(&live, "-", record).await["data"], json!([]));
    assert!(held(&live, "adapters/sha256") + 8 <= blobs, "files of four versions are gone");
    recorded(&live, &["yes@2", "yes@3", "both@1", "twice@1", id, &merged, &table], &train).await;
    assert_eq!(delete(&live, "-", &train, "?cascade=true").await.error(), "404 file_not_found id");
    assert_eq!(
        delete(&live, "-", &other, "?dry_run=true").await.error(),
        "400 invalid_value dry_run"
    );
}

#[tokio::test]
async fn a_tenant_deletes_what_others_made_of_its_data_and_learns_only_how_much() {
    let live = Live::start(&["--api-key", "secret"]);
    let (key, _) = make(
        &live,
        json!({"scopes": ["inference", "admin"], "tenant": "acme", "adapters": ["acme-*"]}),
    )
    .await;
    let (other, _) = make(
        &live,
        json!({"scopes": ["inference", "admin"], "tenant": "glob", "adapters": ["glob-*"]}),
    )
    .await;
    let train = file(&live, &key, &lines(0, 8)).await;
    let mut order = good("acme-yes", &train, json!({}));
    order["hyperparameters"]["n_epochs"] = json!(1);
    let post = ask(&live, Method::POST, "/v1/fine_tuning/jobs", &key, order).await;
    assert_eq!(post.status, 200, "{}", post.text);
    let path = format!("/v1/fine_tuning/jobs/{}", post.json()["id"].as_str().expect("an id"));
    let show = async || ask(&live, Method::GET, &path, &key, Value::Null).await.json();
    live.until("it is over", async || !show().await["finished_at"].is_null()).await;
    assert_eq!(upload_as(&live, "secret", "house", 1).await.status, 201);
    merge(&live, "secret", "house-secret", &["acme-yes", "house"]).await;
    let denied = delete(&live, &other, &train, "?cascade=true").await;
    assert_eq!(denied.error(), "404 file_not_found id", "it is another's");
    // The file alone goes first: what its tenant's job learnt still leads to the rest.
    assert_eq!(delete(&live, &key, &train, "").await.status, 200);
    let denied = delete(&live, &other, &train, "?cascade=true").await;
    assert_eq!(denied.error(), "404 file_not_found id", "it was another's");
    let plan = delete(&live, &key, &train, "?cascade=true&dry_run=true").await;
    assert!(!plan.text.contains("house"), "{}", plan.text);
    let cascade = &plan.json()["cascade"];
    assert_eq!(cascade["versions"], json!(["acme-yes@1"]), "{cascade}");
    assert_eq!(cascade["others"], json!({"versions": 1, "jobs": 1}));
    let gone = delete(&live, &key, &train, "?cascade=true").await;
    assert!(gone.status == 200 && !gone.text.contains("house"), "{}", gone.text);
    for (name, status) in [("acme-yes", 404), ("house-secret", 404), ("house", 200)] {
        let path = format!("/v1/adapters/{name}");
        let shown = ask(&live, Method::GET, &path, "secret", Value::Null).await;
        assert_eq!(shown.status, status, "{name}");
    }
    let audit = async |key: &str| ask(&live, Method::GET, "/v1/audit", key, Value::Null).await.text;
    assert!(audit("secret").await.contains("house-secret@1"));
    let own = audit(&key).await;
    assert!(own.contains("acme-yes@1") && !own.contains("house"), "{own}");
}

#[tokio::test]
async fn a_deletion_that_a_kill_cut_off_is_finished_by_asking_again() {
    let rounds = support::soak::rounds(4, 40);
    let mut live = Live::start(&["--versions-kept", "100"]);
    let mut halves = 0;
    for round in 0..rounds {
        let train = file(&live, "-", &lines(0, 8)).await;
        let name = format!("yes-{round}");
        let trained = done(&live, good(&name, &train, json!({}))).await;
        merge(&live, "-", &format!("both-{round}"), &[&name, &format!("{name}@1")]).await;
        let path = format!("/v1/files/{train}?cascade=true");
        let sent = tokio::spawn(live.request(Method::DELETE, &path).send());
        tokio::time::sleep(Duration::from_millis(3 + 17 * (round as u64 % 8))).await;
        live = live.crash_and_restart(&["--versions-kept", "100"]);
        // Cut off or answered, as it came.
        let _ = sent.await;
        let adapters = live.get("/v1/adapters").await.text;
        halves += usize::from(adapters.contains(&name));
        let again = delete(&live, "-", &train, "?cascade=true").await;
        assert!([200, 404].contains(&again.status), "{}", again.text);
        let adapters = live.get("/v1/adapters").await.text;
        assert!(!adapters.contains(&format!("-{round}\"")), "{adapters}");
        let id = trained["id"].as_str().expect("an id");
        assert_eq!(live.get(&format!("/v1/fine_tuning/jobs/{id}")).await.status, 404);
        assert_eq!(live.get(&format!("/v1/files/{train}")).await.status, 404);
        assert_eq!(delete(&live, "-", &train, "?cascade=true").await.status, 404);
        let merges = live.get("/v1/merges").await.text;
        assert!(!merges.contains(&format!("both-{round}")), "{merges}");
    }
    eprintln!("{rounds} kills, {halves} before the last version was gone");
}
