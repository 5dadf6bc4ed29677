//! The binary as a person meets it: exit codes, messages, settings, and the clients against a server made here.
//!
//! The fake server answers with fixed pieces at fixed times, so that what the clients show can be predicted.

use axum::Json;
use axum::extract::{Multipart, Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn polylora(args: &[&str]) -> Output {
    polylora_with(args, &[])
}

/// Runs the binary without any setting of the surrounding environment.
fn polylora_with(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polylora"));
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("POLYLORA_")) {
        command.env_remove(name);
    }
    let given = variables.iter().copied();
    command
        .args(args)
        .envs(given)
        .output()
        .expect("the binary runs")
}

fn out(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

/// Fails with exactly this code and one `error:` line; returns the line.
fn refused(o: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(code), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("error: "), "{said}");
    said
}

fn config_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new()
        .suffix(".toml")
        .tempfile()
        .expect("a file");
    std::fs::write(file.path(), text).expect("written");
    file
}

/// What `--print-config` says of a key: its line.
fn printed(page: &str, key: &str) -> String {
    let found = |l: &&str| l.trim_start_matches("# ").starts_with(&format!("{key} = "));
    page.lines()
        .find(found)
        .unwrap_or_else(|| panic!("{key} in {page}"))
        .to_owned()
}

#[test]
fn every_command_teaches_by_example() {
    let commands = ["serve", "chat", "adapter", "verify", "bench", "health"];
    let top = out(&polylora(&["--help"]));
    for command in commands {
        assert!(top.contains(command), "{command} in {top}");
        let page = out(&polylora(&[command, "--help"]));
        assert!(page.contains("Examples:"), "{command}: {page}");
        assert!(
            page.contains(&format!("polylora {command}")),
            "{command}: {page}"
        );
    }
}

#[test]
fn wrong_arguments_are_one_line_and_exit_code_2() {
    let said = refused(&polylora(&["serve", "--prot", "80"]), 2);
    assert!(said.contains("--prot") && said.contains("--port"), "{said}");
    refused(&polylora(&["serve", "--kv-bytes", "lots"]), 2);
    refused(&polylora(&["serve", "--adapter", "pirate"]), 2);
    refused(&polylora(&["frobnicate"]), 2);
    refused(&polylora(&["bench", "--popularity", "zipf"]), 2);
    refused(&polylora(&["bench", "--rate", "0"]), 2);
    refused(&polylora(&["bench", "--contender", "nonsense"]), 2);
    refused(&polylora(&["adapter", "show", "../secrets"]), 2);
    refused(&polylora(&["adapter", "push", "a", "Cargo.toml"]), 2);
}

#[test]
fn mistakes_in_the_file_name_file_key_and_line() {
    let check = |text: &str, line: usize, parts: &[&str]| {
        let file = config_file(text);
        let name = file.path().to_string_lossy().into_owned();
        let said = refused(&polylora(&["serve", "--config", &name]), 2);
        let place = format!("{name}:{line}: ");
        assert!(said.contains(&place), "{said} should name {place}");
        assert!(
            parts.iter().all(|p| said.contains(p)),
            "{said} should say {parts:?}"
        );
    };
    check("port = 80\nkv_byte = 5\n", 2, &["kv_byte", "kv_bytes"]);
    check("\n\nport = \"eighty\"\n", 3, &["port", "eighty"]);
    check(
        "host = \"::1\"\nrows_max = 0\n",
        2,
        &["rows_max", "0", "1 to 8192"],
    );
    check(
        "kv_bytes = \"5 parsecs\"\n",
        1,
        &["kv_bytes", "5 parsecs", "512MiB"],
    );
    check("adapters = 3\n", 1, &["adapters"]);
    let said = refused(&polylora(&["serve", "--config", "no-such.toml"]), 2);
    assert!(said.contains("no-such.toml"), "{said}");
}

#[test]
fn settings_that_cannot_be_name_the_key_and_what_was_expected() {
    let check = |args: &[&str], parts: &[&str]| {
        let said = refused(&polylora(&[&["serve"], args].concat()), 2);
        assert!(
            parts.iter().all(|p| said.contains(p)),
            "{said} should say {parts:?}"
        );
    };
    check(
        &["--threads", "0"],
        &["threads", "--threads", "POLYLORA_THREADS", "1 to 1024"],
    );
    check(&["--dtype", "int3"], &["dtype", "int3", "auto, f32, bf16"]);
    check(
        &["--sequences-max", "512"],
        &["sequences_max", "512", "rows_max = 256"],
    );
    check(
        &["--stream-events-max", "64"],
        &["stream_events_max", "rows_max = 256"],
    );
    check(
        &["--host", "0.0.0.0"],
        &["host", "0.0.0.0", "POLYLORA_API_KEY", "allow_open"],
    );
    check(&["--api-key", ""], &["api_key", "empty"]);
    check(
        &["--adapter", "a=x", "--adapter", "a=y"],
        &["adapters", "'a' twice"],
    );
    check(&["--log-format", "xml"], &["log_format", "xml", "json"]);
}

#[test]
fn an_open_address_wants_a_key_or_the_operators_word() {
    let print = |args: &[&str]| polylora(&[&["serve", "--print-config"], args].concat());
    assert!(
        print(&["--host", "0.0.0.0", "--api-key", "k"])
            .status
            .success()
    );
    assert!(
        print(&["--host", "0.0.0.0", "--allow-open"])
            .status
            .success()
    );
    assert!(print(&["--host", "::1"]).status.success());
    refused(&print(&["--host", "example.org"]), 2);
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let file = config_file(
        "port = 1\nrows_max = 111\nsequences_max = 11\nkv_bytes = \"64MiB\"\n\
         [adapters]\na = \"file-a\"\nb = \"file-b\"\n",
    );
    let name = file.path().to_string_lossy().into_owned();
    let args = [
        "serve",
        "--print-config",
        "--config",
        &name,
        "--port",
        "3",
        "--adapter",
        "a=flag-a",
    ];
    let env = [("POLYLORA_PORT", "2"), ("POLYLORA_ROWS_MAX", "222")];
    let page = out(&polylora_with(&args, &env));
    assert_eq!(printed(&page, "port"), "port = 3");
    assert_eq!(printed(&page, "rows_max"), "rows_max = 222");
    assert_eq!(printed(&page, "sequences_max"), "sequences_max = 11");
    assert_eq!(
        printed(&page, "kv_bytes"),
        format!("kv_bytes = {}", 64 << 20)
    );
    assert_eq!(printed(&page, "versions_kept"), "# versions_kept = 3");
    assert!(
        page.contains("\"a\" = \"flag-a\"") && page.contains("\"b\" = \"file-b\""),
        "{page}"
    );
}

#[test]
fn the_printed_file_has_every_key_and_is_accepted_with_every_line_uncommented() {
    let page = out(&polylora_with(
        &["serve", "--print-config"],
        &[("POLYLORA_API_KEY", "hush")],
    ));
    assert!(!page.contains("hush"), "the key is not printed");
    for key in polylora::config::keys() {
        assert!(
            page.contains(&format!("--{}", key.flag)),
            "{} in {page}",
            key.name
        );
        assert!(
            page.contains(&key.env) && !key.help.is_empty(),
            "{}",
            key.name
        );
    }
    for range in polylora::config::RANGES {
        assert!(page.contains(&range.expected()), "{}", range.key);
    }
    // A setting is `# key = value`; prose has spaces before its first `=`, if any.
    let is_setting = |rest: &str| {
        let key = rest.split_once(" = ").map(|(key, _)| key);
        key.is_some_and(|k| !k.contains(' ')) || rest.starts_with("[adapters]")
    };
    let live = |l: &str| match l.strip_prefix("# ") {
        Some(rest) if is_setting(rest) => rest.to_owned(),
        _ => l.to_owned(),
    };
    let text: Vec<String> = page.lines().map(live).collect();
    let set = text
        .iter()
        .filter(|l| is_setting(l) && l.contains(" = "))
        .count();
    assert_eq!(
        set,
        polylora::config::keys().len(),
        "one line per key, adapters with its example"
    );
    let file = config_file(&text.join("\n"));
    let name = file.path().to_string_lossy().into_owned();
    let again = polylora(&["serve", "--print-config", "--config", &name]);
    assert!(
        again.status.success(),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
}

#[test]
fn the_default_model_is_the_demo() {
    assert_eq!(polylora::config::MODEL, polylora::model::source::DEMO);
}

#[test]
fn a_server_that_is_not_there_is_one_line_that_says_what_to_do() {
    for args in [
        vec!["chat", "hello"],
        vec!["adapter", "list"],
        vec!["health"],
        vec!["bench"],
    ] {
        let said = refused(
            &polylora(&[args, vec!["--url", "http://127.0.0.1:9"]].concat()),
            1,
        );
        assert!(
            said.contains("127.0.0.1:9") && said.contains("polylora serve"),
            "{said}"
        );
    }
    refused(&polylora(&["chat", "hello", "--url", "localhost"]), 2);
}

/// What the fake server saw: (route, body or part names).
type Seen = Arc<Mutex<Vec<(String, Value)>>>;

/// Before the first piece, and between pieces.
const FIRST: Duration = Duration::from_millis(120);
const GAP: Duration = Duration::from_millis(40);

fn refusal(status: StatusCode, code: &str) -> Response {
    let kind = "invalid_request_error";
    let error = json!({"message": "no, not that", "type": kind, "param": "model", "code": code});
    (status, Json(json!({ "error": error }))).into_response()
}

/// Four pieces of text, but five tokens by the server's count. Some models fail in their own way.
async fn chat(State(seen): State<Seen>, Json(body): Json<Value>) -> Response {
    let model = body["model"].as_str().unwrap_or_default().to_owned();
    seen.lock().expect("lock").push(("chat".into(), body));
    if model == "busy" {
        return refusal(StatusCode::TOO_MANY_REQUESTS, "queue_full");
    }
    let piece =
        |text: &str| json!({"choices": [{"delta": {"content": text}, "finish_reason": null}]});
    let end = json!({"choices": [{"delta": {}, "finish_reason": "stop"}]});
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}});
    let mut events: Vec<(Duration, Event)> = vec![(FIRST, piece("Avast"))]
        .into_iter()
        .chain([", ", "ye ", "lubber"].map(|t| (GAP, piece(t))))
        .chain([end, usage].map(|v| (Duration::ZERO, v)))
        .map(|(wait, v)| (wait, Event::default().data(v.to_string())))
        .collect();
    if model == "breaks" {
        events.truncate(2);
        let error = json!({"error": {"message": "step failed", "code": "internal_error"}});
        events.push((GAP, Event::default().event("error").data(error.to_string())));
    } else if model == "vanishes" {
        events.truncate(2);
    } else {
        events.push((Duration::ZERO, Event::default().data("[DONE]")));
    }
    let stream = stream::iter(events).then(|(wait, event)| async move {
        tokio::time::sleep(wait).await;
        Ok::<_, Infallible>(event)
    });
    Sse::new(stream).into_response()
}

async fn upload(
    State(seen): State<Seen>,
    Path(name): Path<String>,
    mut form: Multipart,
) -> Response {
    let mut parts = Vec::new();
    while let Some(part) = form.next_field().await.expect("multipart") {
        let name = part.name().unwrap_or_default().to_owned();
        parts.push(json!({"name": name, "bytes": part.bytes().await.expect("bytes").len()}));
    }
    if name == "refused" {
        return refusal(StatusCode::UNPROCESSABLE_ENTITY, "shape_mismatch");
    }
    seen.lock()
        .expect("lock")
        .push((name.clone(), json!(parts)));
    Json(json!({"id": format!("{name}@1"), "name": name, "state": "ready"})).into_response()
}

/// Starts the fake server on a free port; it ends with the test process.
fn server() -> (String, Seen) {
    let seen = Seen::default();
    let models = json!({"data": [{"id": "base"}, {"id": "pirate"}]});
    let app = axum::Router::new()
        .route("/v1/models", get(move || async move { Json(models) }))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/adapters/{name}", put(upload))
        .with_state(seen.clone());
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
                .await
                .expect("a port");
            send.send(listener.local_addr().expect("an address"))
                .expect("sent");
            axum::serve(listener, app).await.expect("serving");
        });
    });
    (
        format!("http://{}", receive.recv().expect("the address")),
        seen,
    )
}

/// Runs a bench and returns its JSON report and its table.
fn bench(url: &str, args: &[&str]) -> (Value, String) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_string_lossy().into_owned();
    let o = polylora(&[&["bench", "--url", url, "--json", &path], args].concat());
    let report = std::fs::read_to_string(file.path()).expect("a report");
    let report = serde_json::from_str(&report)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&o.stderr)));
    (report, out(&o))
}

#[test]
fn one_question_prints_one_answer() {
    let (url, seen) = server();
    let args = [
        "chat",
        "--url",
        &url,
        "--model-name",
        "pirate",
        "--system",
        "Be brief",
        "Who?",
    ];
    assert_eq!(out(&polylora(&args)), "Avast, ye lubber\n");
    let body = seen.lock().expect("lock")[0].1.clone();
    assert_eq!(body["model"], "pirate");
    let system = json!({"role": "system", "content": "Be brief"});
    assert_eq!(
        body["messages"],
        json!([system, {"role": "user", "content": "Who?"}])
    );
    polylora(&["chat", "--url", &format!("{url}/v1/"), "Who?"]);
    assert_eq!(
        seen.lock().expect("lock")[1].1["model"],
        "base",
        "the first that the server lists"
    );
}

#[test]
fn a_refusal_is_shown_in_the_servers_words() {
    let (url, _) = server();
    let said = refused(
        &polylora(&["chat", "--url", &url, "--model-name", "busy", "Who?"]),
        1,
    );
    assert_eq!(said, "error: no, not that (429 queue_full)\n");
    let o = polylora(&["chat", "--url", &url, "--model-name", "breaks", "Who?"]);
    assert_eq!(out(&o), "Avast, \n", "what came stays on its own line");
    assert!(refused(&o, 1).contains("step failed (stream: internal_error)"));
}

#[test]
fn a_directory_is_pushed_as_its_two_files_and_nothing_else() {
    let (url, seen) = server();
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let path = dir.path().to_string_lossy().into_owned();
    std::fs::write(at("adapter_config.json"), "{}").expect("written");
    let said = refused(
        &polylora(&["adapter", "push", "mine", &path, "--url", &url]),
        2,
    );
    assert!(
        said.contains("adapter_model.safetensors is missing"),
        "{said}"
    );
    std::fs::write(at("adapter_model.safetensors"), "12345").expect("written");
    std::fs::write(at("optimizer.pt"), "secret").expect("written");
    let o = polylora(&["adapter", "push", "mine", &path, "--url", &url]);
    assert_eq!(out(&o), "mine@1  ready\n");
    let expected = json!([
        {"name": "adapter_config.json", "bytes": 2},
        {"name": "adapter_model.safetensors", "bytes": 5},
    ]);
    assert_eq!(*seen.lock().expect("lock"), [("mine".to_owned(), expected)]);
    let said = refused(
        &polylora(&["adapter", "push", "refused", &path, "--url", &url]),
        1,
    );
    assert_eq!(said, "error: no, not that (422 shape_mismatch)\n");
}

#[test]
fn bench_times_what_the_server_did_and_counts_what_it_counted() {
    let (url, seen) = server();
    let counts = [
        "--requests",
        "8",
        "--concurrency",
        "4",
        "--warmup",
        "3",
        "--seed",
        "5",
    ];
    let args = [&["--models", "auto"], &counts[..]].concat();
    let (report, table) = bench(&url, &args);
    let round = &report["contenders"][0]["rounds"][0];
    assert_eq!(round["answered"], 8);
    assert_eq!(
        round["output_tokens"], 40,
        "five each by usage, not four pieces"
    );
    assert_eq!(round["prompt_tokens_mean"], 9.0);
    assert_eq!(round["asked"], json!({"base": 4, "pirate": 4}));
    let p50 = |key: &str| round[key]["p50"].as_f64().expect("a figure");
    // A sleep is hardly shorter than asked; how much longer depends on the machine.
    assert!(
        (0.119..0.5).contains(&p50("time_to_first_token_seconds")),
        "{round:#}"
    );
    assert!(
        (0.030..0.2).contains(&p50("inter_token_seconds")),
        "{round:#}"
    );
    assert!((0.230..1.2).contains(&p50("latency_seconds")), "{round:#}");
    assert!(table.contains("8/8"), "{table}");
    assert_eq!(
        seen.lock().expect("lock").len(),
        11,
        "three of them to warm up"
    );

    let prompts = |seen: &Seen| -> Vec<String> {
        let seen = seen.lock().expect("lock");
        let mut all: Vec<String> = seen
            .iter()
            .map(|(_, b)| b["messages"].to_string())
            .collect();
        all.sort();
        all
    };
    let first = prompts(&seen);
    seen.lock().expect("lock").clear();
    bench(&url, &args);
    assert_eq!(prompts(&seen), first, "same seed, same requests");
}

#[test]
fn bench_counts_errors_by_kind() {
    let (url, _) = server();
    let args = [
        "--models",
        "busy,breaks,vanishes,base",
        "--requests",
        "8",
        "--warmup",
        "0",
    ];
    let (report, table) = bench(&url, &args);
    let round = &report["contenders"][0]["rounds"][0];
    let kinds = [
        "429 queue_full",
        "stream: ended early",
        "stream: internal_error",
    ];
    assert_eq!(
        round["errors"],
        json!({kinds[0]: 2, kinds[1]: 2, kinds[2]: 2})
    );
    assert_eq!(round["answered"], 2);
    assert!(table.contains("bench: 2 x 429 queue_full"), "{table}");
    let o = polylora(&[
        "bench",
        "--url",
        &url,
        "--models",
        "busy",
        "--requests",
        "2",
    ]);
    assert_eq!(o.status.code(), Some(1), "nothing was answered");
    assert!(out(&o).contains("0/2"), "{}", out(&o));
}

#[test]
fn contenders_take_turns_and_are_compared_round_by_round() {
    let (url, seen) = server();
    let (one, two) = (
        format!("one={url},model=base"),
        format!("two={url},model=pirate,model=base"),
    );
    let counts = ["--rounds", "2", "--requests", "2", "--warmup", "0"];
    let args = [&["--contender", &one, "--contender", &two], &counts[..]].concat();
    let (report, table) = bench(&url, &args);
    assert_eq!(report["contenders"][1]["models"], json!(["pirate", "base"]));
    assert_eq!(
        report["contenders"][1]["rounds"].as_array().map(Vec::len),
        Some(2)
    );
    let ratio = report["contenders"][1]["ratio_to_first"]["median"]
        .as_f64()
        .expect("a ratio");
    assert!((0.3..3.0).contains(&ratio), "{report:#}");
    assert!(table.contains("one") && table.contains("two"), "{table}");
    // Round 1: one, two; round 2: two, one. Only two asks `pirate`.
    let seen = seen.lock().expect("lock");
    let pirates: Vec<usize> = (0..8).filter(|i| seen[*i].1["model"] == "pirate").collect();
    assert_eq!(pirates.len(), 2);
    assert!(pirates.iter().all(|i| (2..6).contains(i)), "{pirates:?}");
}

#[test]
fn with_a_rate_a_stalled_server_is_charged_for_what_had_to_wait() {
    use std::io::{Read, Write};
    // One connection at a time, 100 ms each, ten requests due within a few milliseconds.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = [0; 65536];
            let _ = stream.read(&mut request).expect("a request");
            std::thread::sleep(Duration::from_millis(100));
            let choice =
                "{\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"stop\"}]}";
            let page = format!("data: {choice}\n\ndata: [DONE]\n\n");
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close";
            write!(
                stream,
                "{head}\r\ncontent-length: {}\r\n\r\n{page}",
                page.len()
            )
            .expect("sent");
        }
    });
    let args = [
        "--models",
        "m",
        "--rate",
        "1000",
        "--requests",
        "10",
        "--warmup",
        "0",
    ];
    let (report, _) = bench(&url, &args);
    let round = &report["contenders"][0]["rounds"][0];
    assert_eq!(round["answered"], 10, "{round:#}");
    let at = |p: &str| round["latency_seconds"][p].as_f64().expect("a figure");
    assert!(
        at("p50") > 0.4,
        "the fifth waited for four others: {round:#}"
    );
    assert!(at("max") > 0.9, "the last waited for all others: {round:#}");
}
