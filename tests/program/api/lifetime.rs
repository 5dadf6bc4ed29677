//! How requests end: hang-ups, full queues, deadlines, and the server's own end.

use serde_json::{Value, json};
use std::io::Read;
use support::live::{BASE, CONTEXT, ENDLESS, Live, PATIENCE, hello, rest, with};

/// Runs far longer than any test.
fn endless(more: Value) -> String {
    with(hello(BASE, ENDLESS), more).to_string()
}

async fn running(live: &Live, count: f64) {
    live.until("it runs", async || live.metric("polylora_requests_running").await == count).await;
}

#[tokio::test]
async fn hanging_up_cancels_streams_and_whole_answers_with_all_their_choices() {
    let live = Live::start(&[]);
    for (more, count) in [
        (json!({}), 1.0),
        (json!({"n": 4}), 4.0),
        (json!({"stream": true}), 1.0),
        (json!({"stream": true, "n": 4}), 4.0),
    ] {
        let socket = live.socket("POST /v1/chat/completions", &endless(more.clone()));
        running(&live, count).await;
        drop(socket);
        live.idle().await;
    }
    let cancelled = "polylora_requests_finished_total{finished_reason=\"cancelled\"}";
    assert_eq!(live.metric(cancelled).await, 10.0);
    let computed = live.metric("polylora_generation_tokens_total").await;
    assert!(computed < 5.0 * ENDLESS as f64, "{computed} tokens of ten answers that nobody reads");
}

#[tokio::test]
async fn hanging_up_while_queued_leaves_the_queue() {
    let live = Live::start(&["--sequences-max", "1"]);
    let first = live.socket("POST /v1/chat/completions", &endless(json!({})));
    running(&live, 1.0).await;
    let second = live.socket("POST /v1/chat/completions", &endless(json!({})));
    let waiting = async |n: f64| {
        live.until("waiting", async || live.metric("polylora_requests_waiting").await == n).await;
    };
    waiting(1.0).await;
    drop(second);
    waiting(0.0).await;
    drop(first);
    live.idle().await;
}

/// Only who encodes these finds out that they are too long.
fn too_long() -> [(&'static str, Value); 2] {
    let words = "a".repeat(CONTEXT);
    let mut chat = hello(BASE, 1);
    chat["messages"][0]["content"] = json!(words);
    let text = json!({"model": BASE, "prompt": words, "max_tokens": 1});
    [("/v1/chat/completions", chat), ("/v1/completions", text)]
}

#[tokio::test]
async fn a_full_queue_answers_429_with_retry_after_and_encodes_nothing() {
    let live = Live::start(&["--sequences-max", "1", "--waiting-max", "1"]);
    let first = live.socket("POST /v1/chat/completions", &endless(json!({})));
    running(&live, 1.0).await;
    let second = live.socket("POST /v1/chat/completions", &endless(json!({})));
    live.until("one waits", async || live.metric("polylora_requests_waiting").await == 1.0).await;
    let refused = live.chat(hello(BASE, 1)).await;
    assert_eq!(refused.error(), "429 queue_full -");
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    let seconds: u64 = refused.header("retry-after").parse().expect("seconds");
    assert!((1..=30).contains(&seconds));
    assert_eq!(refused.header("x-polylora-adapter"), "base", "refused after it was resolved");
    for (path, body) in too_long() {
        assert_eq!(live.post(path, body).await.error(), "429 queue_full -", "{path}");
    }
    let ready = live.get("/ready").await;
    assert_eq!((ready.status, &ready.json()["status"]), (503, &json!("saturated")));
    for path in ["/live", "/health"] {
        assert_eq!(live.get(path).await.status, 200, "busy is not ill");
    }
    drop((first, second));
    live.idle().await;
    assert_eq!(live.chat(hello(BASE, 1)).await.status, 200);
    for (path, body) in too_long() {
        let refused = live.post(path, body).await;
        assert!(refused.error().starts_with("400 context_length_exceeded"), "{}", refused.text);
    }
}

#[tokio::test]
async fn a_deadline_ends_a_stream_with_an_error_event_and_an_answer_with_503() {
    let live = Live::start(&["--request-seconds-max", "1"]);
    let whole = live.socket("POST /v1/chat/completions", &endless(json!({})));
    let stream = live.socket("POST /v1/chat/completions", &endless(json!({"stream": true})));
    let (head, body) = rest(stream);
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(!body.contains("[DONE]"), "a failure must not look like success");
    let last = body.split_terminator("\n\n").last().unwrap();
    let data = last.strip_prefix("event: error\ndata: ").expect("an error event");
    let error: Value = serde_json::from_str(data).unwrap();
    assert_eq!(error["error"]["code"], "request_timeout");
    assert_eq!(error["error"]["type"], "service_unavailable_error");
    let (head, body) = rest(whole);
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    assert!(head.contains("x-should-retry: false"), "{head}");
    assert!(body.contains("request_timeout"));
    live.idle().await;
}

#[tokio::test]
async fn a_slow_upload_of_a_body_ends_at_the_deadline() {
    let live = Live::start(&["--request-seconds-max", "1"]);
    let address = live.server.url.strip_prefix("http://").unwrap();
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n\
                content-type: application/json\r\ncontent-length: 1000\r\n\r\n{";
    std::io::Write::write_all(&mut socket, head.as_bytes()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 503");
}

#[tokio::test]
async fn told_to_stop_the_server_finishes_what_runs_and_takes_nothing_new() {
    let live = Live::start(&["--drain-seconds", "20"]);
    let ask = with(hello(BASE, 3000), json!({"stream": true}));
    let stream = live.socket("POST /v1/chat/completions", &ask.to_string());
    running(&live, 1.0).await;
    live.server.ask_to_stop();
    live.until("it drains", async || live.get("/ready").await.status == 503).await;
    assert_eq!(live.get("/ready").await.json()["status"], "draining");
    assert_eq!(live.get("/live").await.status, 200);
    let late = live.chat(hello(BASE, 1)).await;
    assert_eq!(late.error(), "503 shutting_down -");
    assert_eq!((late.header("retry-after"), late.header("connection")), ("5", "close"));
    let (_, body) = rest(stream);
    assert!(body.ends_with("data: [DONE]\n\n"), "the stream was finished");
    assert!(body.contains("\"finish_reason\":\"length\""));
    assert!(live.server.wait().success(), "exit code 0");
}

#[tokio::test]
async fn fifty_streams_outlive_the_signal_and_each_has_its_record() {
    const STREAMS: usize = 50;
    // So many that the first still runs when the last begins.
    const TOKENS: usize = 1000;
    let live = Live::start(&["--drain-seconds", "60"]);
    let ask = with(hello(BASE, TOKENS), json!({"stream": true}));
    let socket = || live.socket("POST /v1/chat/completions", &ask.to_string());
    let streams: Vec<_> = (0..STREAMS).map(|_| socket()).collect();
    running(&live, STREAMS as f64).await;
    live.server.ask_to_stop();
    let readers: Vec<_> =
        streams.into_iter().map(|s| std::thread::spawn(move || rest(s).1)).collect();
    for reader in readers {
        let body = reader.join().expect("read");
        assert!(body.ends_with("data: [DONE]\n\n"), "truncated: {}", body.len());
    }
    let live = live.restart_after_its_end(&[]);
    let sums = live.get("/v1/usage").await.json();
    assert_eq!(sums["sums"][0]["requests"], STREAMS, "{sums}");
    assert_eq!(sums["sums"][0]["completion_tokens"], TOKENS * STREAMS);
}

#[tokio::test]
async fn a_second_signal_ends_what_still_runs() {
    let live = Live::start(&["--drain-seconds", "3600"]);
    let stream = live.socket("POST /v1/chat/completions", &endless(json!({"stream": true})));
    running(&live, 1.0).await;
    live.server.ask_to_stop();
    live.until("it drains", async || live.get("/ready").await.status == 503).await;
    live.server.ask_to_stop();
    let (_, body) = rest(stream);
    assert!(body.contains("shutting_down") && !body.contains("[DONE]"), "{body}");
    assert!(live.server.wait().success());
}

#[tokio::test]
async fn a_client_that_reads_nothing_loses_its_connection() {
    let live = Live::start(&["--body-seconds-max", "1"]);
    let ask = endless(json!({"stream": true, "n": 8, "logprobs": true, "top_logprobs": 20}));
    let socket = live.socket("POST /v1/chat/completions", &ask);
    let failed = "polylora_adapter_requests_total{adapter=\"base\",finished_reason=\"cancelled\"}";
    live.until("it is cut off", async || live.metric(failed).await == 1.0).await;
    live.idle().await;
    drop(socket);
}

#[tokio::test]
async fn a_head_that_never_ends_is_not_waited_for() {
    let live = Live::start(&["--body-seconds-max", "1"]);
    let address = live.server.url.strip_prefix("http://").unwrap();
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    std::io::Write::write_all(&mut socket, b"GET /live HTTP/1.1\r\nhost: localhost\r\n").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    // An answer or none, but an end.
    socket.read_to_end(&mut answer).expect("closed before the read times out");
}

#[tokio::test]
async fn what_outlasts_the_drain_is_told_so() {
    let live = Live::start(&["--drain-seconds", "1"]);
    let stream = live.socket("POST /v1/chat/completions", &endless(json!({"stream": true})));
    running(&live, 1.0).await;
    assert!(live.server.terminate().success());
    let (_, body) = rest(stream);
    assert!(!body.contains("[DONE]"));
    assert!(body.contains("event: error\ndata: ") && body.contains("shutting_down"), "{body}");
}

#[tokio::test]
async fn a_request_that_waits_too_long_is_told_so_before_its_head_is_sent() {
    let live = Live::start(&["--sequences-max", "1", "--queue-seconds-max", "1"]);
    let first = live.socket("POST /v1/chat/completions", &endless(json!({"stream": true})));
    running(&live, 1.0).await;
    for more in [json!({}), json!({"stream": true})] {
        let late = live.chat(with(hello(BASE, 4), more)).await;
        assert_eq!(late.error(), "429 queue_timeout -");
        assert!(!late.header("retry-after").is_empty());
    }
    let left = async || live.metric("polylora_requests_waiting").await == 0.0;
    live.until("they left the queue", left).await;
    assert_eq!(live.metric("polylora_requests_running").await, 1.0, "what runs may go on");
    drop(first);
    live.idle().await;
}
