//! The log: every line of a request carries its id, and no line carries a prompt or an answer.

use reqwest::Method;
use serde_json::{Value, json};
use std::process::Stdio;
use support::live::{BASE, Live, hello, whole, with};
use tempfile::NamedTempFile;

const CANARY: &str = "xylophone-quartz-heron";

/// A file for a server's log.
fn log_file() -> (NamedTempFile, Stdio) {
    let file = NamedTempFile::new().expect("a file");
    let log = file.reopen().expect("the file again");
    (file, log.into())
}

/// Requests that succeed, fail and stream, under one id each, all with the canary in them.
async fn traffic(live: &Live) {
    live.upload("sql", 1).await;
    for (i, more) in
        [json!({}), json!({"stream": true}), json!({"n": 2}), json!({"temperature": 9})]
            .into_iter()
            .enumerate()
    {
        for model in [BASE, "sql", "nobody"] {
            let message = json!([{"role": "user", "content": CANARY}]);
            let ask = with(with(hello(model, 3), more.clone()), json!({"messages": message}));
            let request = live.request(Method::POST, "/v1/chat/completions");
            whole(request.header("x-request-id", format!("id-{i}-{model}")).json(&ask)).await;
        }
    }
    let ask = json!({"model": BASE, "prompt": CANARY, "max_tokens": 3, "echo": true});
    live.complete(ask).await;
    live.complete(json!({"model": BASE, "prompt": CANARY, "unheard": CANARY})).await;
    let request = live.request(Method::POST, "/v1/completions");
    let broken = format!("{{\"prompt\": \"{CANARY}");
    whole(request.header("content-type", "application/json").body(broken)).await;
}

#[tokio::test]
async fn every_line_of_a_request_has_its_id_and_none_has_its_text() {
    let (file, log) = log_file();
    let flags = ["--log-filter", "trace", "--log-format", "json", "--usage-sync"];
    let live = Live::start_logging(&flags, log);
    traffic(&live).await;
    let answer = live.chat(hello(BASE, 40)).await.json();
    let said = answer["choices"][0]["message"]["content"].as_str().expect("text");
    let log = std::fs::read_to_string(file.path()).expect("the log");
    assert!(!log.contains(CANARY), "a prompt is in the log");
    assert!(said.len() > 10 && !log.contains(said), "an answer is in the log");
    let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let (mut ours, mut ids) = (0, std::collections::BTreeSet::new());
    for line in lines {
        let target = line["target"].as_str().unwrap_or_default();
        let of_request = target.starts_with("polylora::") && target != "polylora::api::listener";
        let of_request = of_request && !line.to_string().contains("stopp");
        // Of the start.
        let of_start = ["polylora::cli", "polylora::assembly"];
        let of_request = of_request && !of_start.iter().any(|start| target.starts_with(start));
        if of_request {
            ours += 1;
            let id = line["span"]["id"].as_str().unwrap_or_else(|| panic!("no id: {line}"));
            ids.insert(id.to_owned());
        }
    }
    assert!(ours > 20, "{ours} lines");
    for id in ["id-0-tiny", "id-1-sql", "id-2-nobody", "id-3-tiny"] {
        assert!(ids.contains(id), "{id} is not in {ids:?}");
    }
}

#[tokio::test]
async fn a_text_log_has_the_id_on_its_warnings_even_when_it_shows_nothing_else() {
    let (file, log) = log_file();
    let live = Live::start_logging(&["--log-filter", "warn"], log);
    let request = live.request(Method::PUT, "/v1/adapters/bad").header("x-request-id", "mine-1");
    whole(request.body("not an archive")).await;
    let log = std::fs::read_to_string(file.path()).expect("the log");
    let line = log.lines().find(|l| l.contains("upload refused")).expect("a warning");
    assert!(line.contains("id=\"mine-1\"") && line.contains("WARN"), "{line}");
}

#[tokio::test]
async fn an_audit_line_names_the_request_as_the_audit_log_does() {
    let (file, log) = log_file();
    let live = Live::start_logging(&["--log-filter", "info", "--log-format", "json"], log);
    live.upload("sql", 1).await;
    let records = live.get("/v1/audit").await.json();
    let log = std::fs::read_to_string(file.path()).expect("the log");
    let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let said = lines.filter(|line| line["target"] == "polylora::audit");
    let said: Vec<String> =
        said.filter_map(|l| Some(l["fields"]["message"].as_str()?.to_owned())).collect();
    let [line] = &said[..] else { panic!("one action, {} lines", said.len()) };
    let line: Value = serde_json::from_str(line).expect("JSON");
    assert_eq!(line["action"], "PUT /v1/adapters/{name}");
    let recorded = records["data"][0]["request_id"].as_str().expect("an id");
    assert_eq!(line["request_id"], recorded);
    assert_eq!(line.get("id"), None, "the record has none yet");
}
