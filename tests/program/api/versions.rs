//! Rollback, pins, aliases, preconditions and removal, by the bytes.

use reqwest::Method;
use serde_json::{Value, json};
use support::live::{Answer, Live, hello, rest, whole, with};

async fn upload(live: &Live, name: &str, seed: u64, header: (&str, &str)) -> Answer {
    let form = support::live::form(&live.adapter_files(seed, 0.3));
    let request = live.request(Method::PUT, &format!("/v1/adapters/{name}")).multipart(form);
    whole(request.header(header.0, header.1)).await
}

async fn delete(live: &Live, path: &str) -> Answer {
    whole(live.request(Method::DELETE, path)).await
}

/// Who answered.
async fn answers(live: &Live, model: &str) -> String {
    let answer = live.chat(hello(model, 1)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.header("x-polylora-adapter").to_owned()
}

#[tokio::test]
async fn a_change_of_what_is_no_longer_so_is_answered_412_and_names_both() {
    let live = Live::start(&[]);
    let first = upload(&live, "sql", 1, ("if-none-match", "*")).await;
    assert_eq!(first.status, 201, "{}", first.text);
    let tag = first.header("etag").to_owned();
    assert_eq!(tag, format!("\"{}\"", first.json()["digest"].as_str().unwrap()));
    assert_eq!(live.get("/v1/adapters/sql").await.header("etag"), tag);
    let again = upload(&live, "sql", 2, ("if-none-match", "*")).await;
    assert_eq!(again.error(), "412 version_conflict -");
    let second = upload(&live, "sql", 2, ("if-match", &tag)).await;
    assert_eq!(second.status, 200, "{}", second.text);
    let stale = upload(&live, "sql", 3, ("if-match", &tag)).await;
    assert_eq!(stale.error(), "412 version_conflict -");
    for digest in [tag.trim_matches('"'), second.header("etag").trim_matches('"')] {
        assert!(stale.text.contains(digest), "{}", stale.text);
    }
    let refused = delete(&live, "/v1/adapters/sql?expected_version=1").await;
    assert_eq!(refused.error(), "412 version_conflict -");
    let rollback = "/v1/adapters/sql/rollback?expected_version=1";
    assert_eq!(live.post(rollback, json!({})).await.error(), "412 version_conflict -");
    assert_eq!(delete(&live, "/v1/adapters/sql?expected_version=2").await.status, 200);
}

#[tokio::test]
async fn a_name_rolls_back_and_a_version_is_pinned() {
    let live = Live::start(&[]);
    let first = live.upload("sql", 1).await.json();
    let lineage = json!({"kind": "uploaded", "by": "anonymous",
                         "files": ["adapter_config.json", "adapter_model.safetensors"]});
    assert_eq!((&first["lineage"], &first["pinned"]), (&lineage, &json!(false)));
    live.upload("sql", 2).await;
    assert_eq!(answers(&live, "sql").await, "sql@2");
    let back = live.post("/v1/adapters/sql/rollback", json!({})).await;
    assert_eq!((back.status, &back.json()["version"]), (200, &json!(1)), "{}", back.text);
    assert_eq!(back.header("etag"), format!("\"{}\"", first["digest"].as_str().unwrap()));
    assert_eq!(answers(&live, "sql").await, "sql@1");
    let none = live.post("/v1/adapters/sql/rollback", json!({})).await;
    assert_eq!(none.error(), "409 nothing_to_roll_back -");
    let none = live.post("/v1/adapters/sql/rollback", json!({"version": 9})).await;
    assert_eq!(none.error(), "404 adapter_not_found name");
    let wrong = live.post("/v1/adapters/sql/rollback", json!({"version": "x"})).await;
    assert_eq!(wrong.error(), "400 invalid_type version");
    let pinned = live.post("/v1/adapters/sql/pin", json!({"version": 2})).await.json();
    assert_eq!((&pinned["pinned"], &pinned["resident"]), (&json!(true), &json!(true)));
    let unpinned = live.post("/v1/adapters/sql/unpin", json!({"version": 2})).await.json();
    assert_eq!(unpinned["pinned"], json!(false));
    assert_eq!(
        live.post("/v1/adapters/no/pin", json!({})).await.error(),
        "404 adapter_not_found name"
    );
}

#[tokio::test]
async fn a_version_is_written_in_one_way_wherever_a_model_is_named() {
    let live = Live::start(&[]);
    live.upload("pirate", 1).await;
    for model in ["pirate@01", "pirate@0", "pirate@-1", "pirate@1x", "pirate@", "pirate@1@1"] {
        let asked = live.chat(hello(model, 1)).await;
        assert_eq!(asked.error(), "404 model_not_found model", "{model}: {}", asked.text);
        let path = format!("/v1/models/{model}");
        for told in [live.get(&path).await, delete(&live, &path).await] {
            assert_eq!((told.status, told.text), (asked.status, asked.text.clone()), "{model}");
        }
    }
    assert_eq!(answers(&live, "pirate@1").await, "pirate@1");
    assert_eq!(live.get("/v1/models/pirate@1").await.status, 200);
}

#[tokio::test]
async fn an_alias_spreads_users_and_keeps_each_where_it_is() {
    let live = Live::start(&[]);
    live.upload("acme", 1).await;
    live.upload("acme", 2).await;
    let put =
        async |body: Value| whole(live.request(Method::PUT, "/v1/aliases/prod").json(&body)).await;
    let made = put(json!({"adapter": "acme", "weights": {"1": 50, "2": 50}})).await;
    assert_eq!(
        (made.status, &made.json()["targets"][1]["share"]),
        (201, &json!(0.5)),
        "{}",
        made.text
    );
    let mut served = std::collections::BTreeMap::new();
    for user in 0..16 {
        let body = || with(hello("prod", 1), json!({"user": format!("u{user}")}));
        let mut seen = Vec::new();
        for _ in 0..2 {
            seen.push(live.chat(body()).await.header("x-polylora-adapter").to_owned());
        }
        assert_eq!(seen[0], seen[1]);
        *served.entry(seen.remove(0)).or_insert(0) += 1;
    }
    assert_eq!(served.keys().collect::<Vec<_>>(), ["acme@1", "acme@2"]);
    let models = live.get("/v1/models").await.json();
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["tiny", "acme", "prod"]);
    let promoted = live.post("/v1/aliases/prod/promote", json!({"version": 1})).await;
    assert_eq!(promoted.json()["targets"][0]["id"], "acme@1");
    assert_eq!(answers(&live, "prod").await, "acme@1");
    let back = live.post("/v1/aliases/prod/rollback", json!({})).await.json();
    assert_eq!(back["targets"].as_array().unwrap().len(), 2);
    assert_eq!(delete(&live, "/v1/adapters/acme").await.error(), "409 adapter_aliased name");
    let told = delete(&live, "/v1/models/prod").await;
    assert_eq!(told.error(), "400 invalid_value model");
    assert!(told.text.contains("/v1/aliases/prod"), "{}", told.text);
    let unload = live.post("/v1/unload_lora_adapter", json!({"lora_name": "acme"})).await;
    assert_eq!((unload.status, &unload.json()["error"]["type"]), (400, &json!("InvalidUserInput")));
    assert_eq!(live.upload("prod", 3).await.error(), "409 name_taken name");
    let refused = [
        (json!({"weights": {"7": 1}}), "400 invalid_alias weights"),
        (json!({"weights": {"acme@01": 1}}), "400 invalid_alias weights"),
        (json!({"weights": {"acme@1": 0}}), "400 invalid_alias weights"),
        (json!({"weights": {"acme@9": 1}}), "404 model_not_found model"),
        (json!({"weights": {"acme@1": -1}}), "400 invalid_type weights.acme@1"),
        (json!({"weights": {}, "x": 1}), "400 unknown_parameter x"),
    ];
    for (body, expected) in refused {
        assert_eq!(put(body).await.error(), expected);
    }
    assert_eq!(delete(&live, "/v1/aliases/prod").await.status, 200);
    assert_eq!(live.get("/v1/aliases/prod").await.error(), "404 adapter_not_found name");
    assert_eq!(live.chat(hello("prod", 1)).await.error(), "404 model_not_found model");
}

#[tokio::test]
async fn a_delete_with_a_drain_ends_what_still_runs_and_one_without_does_not() {
    let live = Live::start(&[]);
    for (name, drain) in [("cut", "?drain_seconds=0"), ("left", "")] {
        let uploaded = live.upload(name, 1).await.json();
        let body = with(hello(name, 8000), json!({"stream": true}));
        let socket = live.socket("POST /v1/chat/completions", &body.to_string());
        live.until("it runs", async || live.metric("polylora_requests_running").await == 1.0).await;
        let deleted = delete(&live, &format!("/v1/adapters/{name}{drain}")).await;
        let body = deleted.json();
        if drain.is_empty() {
            assert_eq!((deleted.status, &body["state"]), (202, &json!("draining")));
            assert_eq!(body["freed_bytes"], json!({"resident": 0, "file": 0}));
            drop(socket);
        } else {
            assert_eq!(
                (deleted.status, &body["state"], &body["cut"]),
                (200, &json!("gone"), &json!(1))
            );
            assert_eq!(body["freed_bytes"]["resident"], uploaded["resident_bytes"]);
            assert_eq!(body["freed_bytes"]["file"], uploaded["file_bytes"]);
            let (_, events) = rest(socket);
            let last = events.trim_end().rsplit("\n\n").next().unwrap();
            assert!(last.starts_with("event: error\ndata: "), "{last}");
            assert!(last.contains("adapter_deleted") && !events.contains("[DONE]"), "{last}");
        }
        live.idle().await;
        assert_eq!(live.chat(hello(name, 1)).await.error(), "404 model_not_found model");
    }
    live.upload("idle", 2).await;
    let gone = delete(&live, "/v1/adapters/idle").await;
    assert_eq!((gone.status, &gone.json()["state"]), (200, &json!("gone")));
    let wrong = delete(&live, "/v1/adapters/idle?drain_seconds=x").await;
    assert_eq!(wrong.error(), "400 invalid_value drain_seconds");
    let wrong = delete(&live, "/v1/adapters/idle?drain_seconds=601").await;
    assert_eq!(wrong.error(), "400 invalid_value drain_seconds");
}

#[tokio::test]
async fn a_restart_undoes_nothing_that_was_published_after_the_directory() {
    let live = Live::start(&[]);
    let dir = live.adapter_files(1, 0.3);
    let flag = format!("sql={}", dir.display());
    let live = live.crash_and_restart(&["--adapter", &flag]);
    assert_eq!(answers(&live, "sql").await, "sql@1");
    assert_eq!(live.upload("sql", 2).await.json()["id"], "sql@2");
    let live = live.crash_and_restart(&["--adapter", &flag]);
    assert_eq!(answers(&live, "sql").await, "sql@2", "the upload stays");
    let other = live.adapter_files(3, 0.3);
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(other.join(file), dir.join(file)).expect("a changed directory");
    }
    let live = live.crash_and_restart(&["--adapter", &flag]);
    assert_eq!(answers(&live, "sql").await, "sql@3", "a changed directory is news");
}

#[tokio::test]
async fn an_upload_of_what_is_there_mends_files_that_have_rotted() {
    let live = Live::start(&[]);
    live.upload("sql", 1).await;
    let blobs = live.data().join("adapters/sha256");
    let first = |dir: &std::path::Path| {
        let entry = std::fs::read_dir(dir).expect("a directory").next().expect("one in it");
        entry.expect("readable").path()
    };
    let file = first(&first(&blobs)).join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).expect("the weights");
    *bytes.last_mut().expect("some") ^= 1;
    std::fs::write(&file, bytes).expect("rot");
    std::fs::write(blobs.join(".DS_Store"), "what a file browser leaves").expect("written");
    let live = live.crash_and_restart(&[]);
    assert_eq!(live.chat(hello("sql", 1)).await.error(), "500 corrupt_adapter model");
    let again = live.upload("sql", 1).await;
    assert_eq!((again.status, &again.json()["result"]), (200, &json!("unchanged")));
    assert_eq!(answers(&live, "sql").await, "sql@1");
}
