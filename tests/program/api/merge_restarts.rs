//! Merges under a server that ends: stopped, killed at any moment, or with sources that go.
//!
//! It is killed three times; in a soak 50.

use crate::api::merges::{
    SOURCES, done, job, occupied, order, over, report_of, slow, staged, submit, upload_sources,
};
use polylora::config::limits::MERGES_KEPT;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::Instant;
use support::live::{Live, hello, whole, with};

#[tokio::test]
async fn merges_go_on_after_a_restart_and_fail_by_name_when_a_source_is_gone() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    live.upload("third", 3).await;
    let digest = done(&live, order("first", json!({}))).await["result"]["digest"].clone();
    let busy = occupied(&live);
    let running = submit(&live, slow("one")).await;
    let queued = submit(&live, order("two", json!({}))).await;
    let lonely = submit(&live, json!({"sources": [{"model": "third"}], "name": "three"})).await;
    live.until("it runs", async || job(&live, &running).await["progress"].is_object()).await;
    // The name goes; what is kept for the job goes with the process.
    let removed = whole(live.request(Method::DELETE, "/v1/adapters/third")).await;
    assert_eq!(removed.status, 202, "{}", removed.text);
    drop(busy);
    live.server.ask_to_stop();
    let live = live.restart_after_its_end(&[]);
    assert_eq!(job(&live, &lonely).await["error"]["code"], "merge_source_gone");
    let done = over(&live, &queued).await;
    assert_eq!((&done["state"], &done["result"]["digest"]), (&json!("done"), &digest), "{done}");
    let done = over(&live, &running).await;
    assert_eq!((&done["state"], &done["restarted"]), (&json!("done"), &json!(1)), "{done}");
    // What is over is kept over a restart, with its report.
    for n in 2..MERGES_KEPT {
        let id = submit(&live, order(&format!("more-{n}"), json!({}))).await;
        // Cancelled, or done already: over either way.
        live.post(&format!("/v1/merges/{id}/cancel"), json!({})).await;
        over(&live, &id).await;
    }
    let live = live.crash_and_restart(&[]);
    let list = live.get("/v1/merges").await.json();
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|j| &j["id"]).collect();
    assert_eq!(ids.len(), MERGES_KEPT);
    assert_eq!(ids[MERGES_KEPT - 2..], [&json!(lonely), &json!(queued)]);
    assert_eq!(live.get(&report_of(&done)).await.error(), "404 merge_not_found id");
    assert_eq!(live.get(&format!("/v1/merges/{queued}/report")).await.status, 200);
}

#[tokio::test]
async fn sources_that_are_replaced_or_deleted_stay_for_the_job_and_go_after_it() {
    let live = Live::start(&["--versions-kept", "1"]);
    upload_sources(&live).await;
    let expected = done(&live, order("first", json!({}))).await["result"]["digest"].clone();
    let busy = occupied(&live);
    let running = submit(&live, slow("one")).await;
    let queued = submit(&live, order("two", json!({}))).await;
    assert_eq!(live.upload(SOURCES[0].0, 9).await.json()["version"], 2);
    let path = format!("/v1/adapters/{}", SOURCES[1].0);
    let removed = whole(live.request(Method::DELETE, &path)).await.json();
    assert_eq!(removed["state"], "draining");
    let blobs: Vec<_> = job(&live, &queued).await["sources"]
        .as_array()
        .expect("sources")
        .iter()
        .map(|s| {
            let digest = s["digest"].as_str().expect("a digest").trim_start_matches("sha256:");
            live.data().join("adapters/sha256").join(&digest[..2]).join(digest)
        })
        .collect();
    assert!(blobs.iter().all(|b| b.exists()));
    live.post(&format!("/v1/merges/{running}/cancel"), json!({})).await;
    drop(busy);
    let done = over(&live, &queued).await;
    assert_eq!(done["result"]["digest"], expected, "{done}");
    live.until("the files are gone", async || blobs.iter().all(|b| !b.exists())).await;
}

#[tokio::test]
async fn a_server_killed_after_it_published_does_not_publish_again() {
    let live = Live::start(&[]);
    upload_sources(&live).await;
    let said = "a long answer ".repeat(35);
    let example = json!({"messages": [{"role": "user", "content": "hi"},
                                      {"role": "assistant", "content": said}]});
    let data: Vec<&Value> = std::iter::repeat_n(&example, 100).collect();
    let evaluation = json!([{"model": SOURCES[0].0, "data": data}]);
    let id = submit(&live, order("out", json!({"evaluation": evaluation}))).await;
    live.until("it evaluates", async || job(&live, &id).await["stage"] == "evaluating").await;
    // The name moves on before the server dies.
    assert_eq!(live.upload("out", 8).await.json()["version"], 2);
    assert_eq!(job(&live, &id).await["stage"], "evaluating");
    let live = live.crash_and_restart(&[]);
    let job = over(&live, &id).await;
    assert_eq!((&job["state"], &job["restarted"]), (&json!("done"), &json!(1)), "{job}");
    assert_eq!(job["result"]["id"], "out@1");
    // Only the evaluation of what is published can be cancelled.
    let id = submit(&live, order("more", json!({"evaluation": evaluation}))).await;
    let stage = async || crate::api::merges::job(&live, &id).await["stage"].clone();
    live.until("it evaluates", async || stage().await == "evaluating").await;
    let cancelled = live.post(&format!("/v1/merges/{id}/cancel"), json!({})).await.json();
    let result = (&cancelled["state"], &cancelled["result"]["id"]);
    assert_eq!(result, (&json!("done"), &json!("more@1")), "{cancelled}");
    let report = live.get(&report_of(&cancelled)).await.json();
    assert_eq!(report["evaluation"], Value::Null);
    let shown = live.get("/v1/adapters/out").await.json();
    assert_eq!(shown["versions"].as_array().expect("versions").len(), 2, "{shown}");
    let table = live.get(&report_of(&job)).await.json()["evaluation"].clone();
    assert_eq!(table[0]["scores"].as_array().expect("scores").len(), 4, "{table}");
}

#[tokio::test]
async fn a_server_killed_while_it_merges_makes_each_result_once_and_the_same() {
    let rounds = support::soak::rounds(3, 50);
    let mut live = Live::start(&[]);
    upload_sources(&live).await;
    // One that is published almost at once, and one that is merged for a while.
    let ways: [&dyn Fn(&str) -> Value; 2] = [&|name| order(name, json!({})), &|name| {
        with(slow(name), json!({"options": {"rank": 16, "restarts": 300}}))
    }];
    let mut references = Vec::new();
    for (name, way) in ["quick", "long"].iter().zip(ways) {
        done(&live, way(name)).await;
        let begun = Instant::now();
        let digest = done(&live, way(&format!("{name}-again"))).await["result"]["digest"].clone();
        references.push((digest, begun.elapsed()));
    }
    let mut killed = [[0; 2]; 2]; // by way: (waiting or running, already done)
    for round in 0..rounds {
        let name = format!("out-{round}");
        let way = round % 2;
        let (digest, takes) = &references[way];
        let id = submit(&live, ways[way](&name)).await;
        // From before its first site to about its end, in no order.
        tokio::time::sleep(takes.mul_f64(((round * 37 + 30) % 100) as f64 / 100.0)).await;
        let was_done = job(&live, &id).await["state"] == "done";
        killed[way][usize::from(was_done)] += 1;
        live = live.crash_and_restart(&[]);
        let job = over(&live, &id).await;
        assert_eq!(job["state"], "done", "{job}");
        assert_eq!(job["result"], json!({"id": format!("{name}@1"), "digest": digest}));
        let shown = live.get(&format!("/v1/adapters/{name}")).await.json();
        let versions = shown["versions"].as_array().expect("versions");
        assert_eq!(versions.len(), 1, "{shown}");
        assert_eq!(
            (&versions[0]["lineage"]["job"], &versions[0]["state"]),
            (&json!(id), &json!("ready"))
        );
        assert_eq!(live.get(&report_of(&job)).await.json()["overall"]["sites"], 6);
        assert_eq!(live.chat(hello(&name, 1)).await.status, 200);
        assert_eq!(staged(&live), 0);
    }
    eprintln!("{rounds} kills, by way [before the end, after it]: {killed:?}; {references:?}");
    assert!(killed[0][0] + killed[1][0] > 0, "no kill came before the end of a job");
}
