//! Bodies that nobody reads, and clients that end their side first: each sees its answer.

use super::{connect, exchange, header, outcome, request, until_closed};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use support::live::{BASE, ENDLESS, Live, hello, with};

const JSON: &str = "Content-Type: application/json\r\n";

/// An answer with a length, off a connection that may go on: its head and its body.
fn answer(reader: &mut BufReader<TcpStream>) -> Option<(String, String)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length: usize = header(&head, "content-length").parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((head, String::from_utf8(body).ok()?))
}

/// Requests that are refused before their body is read, and the outcome.
fn early() -> Vec<(&'static str, String, &'static str)> {
    let key = "Authorization: Bearer secret\r\n";
    let json = format!("{key}{JSON}");
    let plain = format!("{key}Content-Type: text/plain\r\n");
    vec![
        ("POST /v1/completions", JSON.to_owned(), "401 invalid_api_key"),
        ("POST /v1/keys", JSON.to_owned(), "401 invalid_api_key"),
        ("POST /v1/nothing", json.clone(), "404 unknown_route"),
        ("POST /v1/models", json.clone(), "405 method_not_allowed"),
        ("POST /v1/completions", plain.clone(), "415 unsupported_media_type"),
        ("POST /v1/aliases/x/rollback", plain, "415 unsupported_media_type"),
        ("PUT /v1/adapters/a%20b", key.to_owned(), "400 invalid_name"),
        ("POST /%FF", json, "404 unknown_route"),
    ]
}

#[tokio::test]
async fn a_client_that_sends_all_before_it_reads_sees_why_it_was_refused() {
    let live = Live::start(&["--api-key", "secret"]);
    let large = "x".repeat(24 << 20);
    let json = format!("Authorization: Bearer secret\r\n{JSON}");
    let beyond = ("POST /v1/completions", json, "413 body_too_large");
    for (line, headers, expected) in early().into_iter().chain([beyond]) {
        let mut stream = connect(&live);
        let text = request(line, "x", &headers, &large);
        let sent = stream.write_all(&text);
        let answer = until_closed(&mut stream);
        assert!(sent.is_ok(), "{line}: cut off while it sent: {sent:?}");
        assert_eq!(outcome(&answer), expected, "{line}");
        assert_eq!(header(&answer, "connection"), "close", "{line}");
        assert!(!answer.ends_with("<reset>"), "{line}");
    }
}

#[tokio::test]
async fn a_connection_is_reused_after_a_refusal_or_says_that_it_is_not() {
    let live = Live::start(&["--api-key", "secret"]);
    let good = json!({"model": BASE, "prompt": "hi", "max_tokens": 1}).to_string();
    let key = format!("Authorization: Bearer secret\r\n{JSON}");
    let open = |line: &str, headers: &str, body: &str| {
        let text = String::from_utf8(request(line, "x", headers, body)).expect("text");
        text.replace("Connection: close\r\n", "").into_bytes()
    };
    let mut reused = 0;
    for (line, headers, expected) in early() {
        for size in [1usize, 1 << 10, 60 << 10, 128 << 10, 1 << 20, 3 << 20] {
            let mut stream = connect(&live);
            let body = " ".repeat(size);
            stream.write_all(&open(line, &headers, &body)).expect("sent");
            let mut reader = BufReader::new(stream.try_clone().expect("the socket"));
            let (head, text) = answer(&mut reader).expect("an answer");
            assert_eq!(outcome(&format!("{head}{text}")), expected, "{line} {size}");
            if header(&head, "connection") == "close" {
                assert!(size > 60 << 10, "{line}: {size} bytes are read on");
                continue;
            }
            stream.write_all(&open("POST /v1/completions", &key, &good)).expect("sent");
            let (head, text) = answer(&mut reader).unwrap_or_default();
            assert!(head.contains(" 200 ") && text.contains("text_completion"), "{line} {size}");
            reused += 1;
        }
    }
    assert!(reused >= 3 * early().len(), "{reused}");
}

#[tokio::test]
async fn a_client_that_waits_for_100_is_not_asked_for_a_body_that_is_refused() {
    let live = Live::start(&["--api-key", "secret"]);
    let expect = "Content-Type: application/json\r\nExpect: 100-continue\r\n\
                  Content-Length: 1000000\r\n";
    let refused = exchange(&live, &request("POST /v1/completions", "x", expect, ""));
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    assert_eq!(header(&refused, "connection"), "close");
    let body = json!({"model": BASE, "prompt": "hi", "max_tokens": 1}).to_string();
    let mut stream = connect(&live);
    let key = format!("Authorization: Bearer secret\r\n{JSON}Expect: 100-continue\r\n");
    let text = request("POST /v1/completions", "x", &key, &body);
    let (head, body) = text.split_at(text.len() - body.len());
    stream.write_all(head).expect("sent");
    let mut asked = [0; 25];
    stream.read_exact(&mut asked).expect("asked for the body");
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body).expect("sent");
    assert_eq!(outcome(&until_closed(&mut stream)), "200");
}

/// Sends a request, ends its side, and reads to the end: the answer after any interim ones.
fn half_closed(live: &Live, text: &[u8]) -> (String, usize) {
    let mut stream = connect(live);
    stream.write_all(text).expect("sent");
    stream.shutdown(Shutdown::Write).expect("half closed");
    let answer = until_closed(&mut stream);
    let interim = "HTTP/1.1 102 Processing\r\n\r\n";
    let count = answer.matches(interim).count();
    (answer.replace(interim, ""), count)
}

#[tokio::test]
async fn a_client_that_ends_its_side_after_its_request_gets_the_answer() {
    let live = Live::start(&[]);
    let get = |line: &str| request(line, "localhost", "", "");
    let post = |line: &str, body: String| request(line, "localhost", JSON, &body);
    let chat = |n: usize, stream: bool| {
        let ask = with(hello(BASE, n), json!({"stream": stream}));
        post("POST /v1/chat/completions", ask.to_string())
    };
    for (what, text, end) in [
        ("health", get("GET /health"), "}"),
        ("models", get("GET /v1/models"), "}"),
        ("tokenize", post("POST /tokenize", json!({"prompt": "hi"}).to_string()), "}"),
        ("chat", chat(8, false), "}"),
        ("stream", chat(8, true), "[DONE]\n\n\r\n0\r\n\r\n"),
        ("long chat", chat(3000, false), "}"),
        ("long stream", chat(3000, true), "[DONE]\n\n\r\n0\r\n\r\n"),
    ] {
        let (answer, _) = half_closed(&live, &text);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{what}: {answer:.300}");
        assert!(answer.ends_with(end), "{what}: cut");
    }
    let old = String::from_utf8(chat(8, false)).expect("text").replace("HTTP/1.1", "HTTP/1.0");
    let (answer, _) = half_closed(&live, old.as_bytes());
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    // Without `connection: close` the connection ends all the same.
    let open =
        String::from_utf8(chat(8, false)).expect("text").replace("Connection: close\r\n", "");
    assert_eq!(outcome(&half_closed(&live, open.as_bytes()).0), "200");
}

#[tokio::test]
async fn a_waiting_client_that_ended_its_side_is_asked_and_one_that_left_is_noticed() {
    let live = Live::start(&["--sequences-max", "1"]);
    let endless = with(hello(BASE, ENDLESS), json!({"stream": true})).to_string();
    let first = live.socket("POST /v1/chat/completions", &endless);
    let running = async || live.metric("polylora_requests_running").await == 1.0;
    live.until("one runs", running).await;
    let small =
        request("POST /v1/chat/completions", "localhost", JSON, &hello(BASE, 2).to_string());
    let mut waits = connect(&live);
    waits.write_all(&small).expect("sent");
    waits.shutdown(Shutdown::Write).expect("half closed");
    let mut leaves = connect(&live);
    leaves.write_all(&small).expect("sent");
    let waiting = |n: f64| {
        let live = &live;
        async move { live.metric("polylora_requests_waiting").await == n }
    };
    live.until("both wait", async || waiting(2.0).await).await;
    drop(leaves);
    live.until("the one that left is gone", async || waiting(1.0).await).await;
    let mut asked = [0; 27];
    waits.read_exact(&mut asked).expect("asked");
    assert_eq!(&asked, b"HTTP/1.1 102 Processing\r\n\r\n");
    drop(first);
    let answer = until_closed(&mut waits);
    assert!(answer.contains("HTTP/1.1 200 OK\r\n") && answer.ends_with('}'), "{answer}");
}
