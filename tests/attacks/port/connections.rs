//! Connections that say nothing, or nothing more: others get in beside them.

use super::{connect, connect_from, header, outcome, request, until_closed};
use crate::canary::{Canary, Song};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use support::live::{BASE, ENDLESS, Live, PATIENCE, hello, with};
use support::soak::soak;

/// What an attacker's connection says before it says no more.
const SHAPES: [(&str, &[u8]); 6] = [
    ("nothing", b""),
    ("half a head", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-"),
    ("one request, then nothing", b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ("a wrong key", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\n\r\n"),
    (
        "a body that never comes, without a key",
        b"POST /v1/keys HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
          Content-Length: 1000000\r\n\r\n{",
    ),
    ("answers that nobody reads", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
];

/// Times that an attacker repeats what it says: pipelined requests.
fn times(shape: &str) -> usize {
    if shape.starts_with("answers") { 20_000 } else { 1 }
}

/// One attacker's connection. It may be closed while it is still speaking.
async fn attack(live: &Live, from: u8, shape: &str, says: &[u8]) -> Option<TcpStream> {
    let mut stream = connect_from(live, from).await.ok()?;
    stream.set_nonblocking(true).ok()?;
    let _ = stream.write_all(&says.repeat(times(shape)));
    Some(stream)
}

/// Answers of 200 to five requests of each kind, on new connections.
async fn answered(live: &Live, key: &str) -> (usize, usize) {
    let mut good = (0, 0);
    for _ in 0..5 {
        let client = support::client().timeout(PATIENCE).build();
        let client = client.expect("a client");
        let url = &live.server.url;
        let probe = client.get(format!("{url}/live")).send().await;
        good.0 += usize::from(probe.is_ok_and(|a| a.status() == 200));
        let chat = client.post(format!("{url}/v1/chat/completions")).bearer_auth(key);
        let chat = chat.json(&hello(BASE, 4)).send().await;
        good.1 += usize::from(chat.is_ok_and(|a| a.status() == 200));
    }
    good
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_keep_nobody_out() {
    // A head may take so long that no place comes free by itself.
    let flags = ["--api-key", "secret", "--connections-max", "24", "--body-seconds-max", "3600"];
    let live = Live::start(&flags);
    for (shape, says) in SHAPES {
        for addresses in [1, 200] {
            let mut held = Vec::new();
            for n in 0..100u8 {
                held.push(attack(&live, 1 + n % addresses, shape, says).await);
            }
            let seen = answered(&live, "secret").await;
            assert_eq!(seen, (5, 5), "{shape}, {addresses} addresses");
            drop(held);
        }
    }
    // A head that comes byte by byte.
    let mut held = Vec::new();
    for _ in 0..100 {
        held.push(attack(&live, 1, "", b"GET /live HTTP/1.1\r\n").await);
    }
    let trickle = std::thread::spawn(move || {
        for _ in 0..50 {
            held.iter_mut().flatten().for_each(|s| drop(s.write_all(b"x: y\r\n")));
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    assert_eq!(answered(&live, "secret").await, (5, 5), "trickled heads");
    trickle.join().expect("the attacker ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_under_way_is_not_cut_for_newcomers() {
    let flags = ["--connections-max", "8", "--body-seconds-max", "3600"];
    let live = Live::start(&flags);
    let whole = live.socket("POST /v1/chat/completions", &hello(BASE, 2000).to_string());
    let ask = with(hello(BASE, 2000), json!({"stream": true}));
    let stream = live.socket("POST /v1/chat/completions", &ask.to_string());
    live.until("both run", async || live.metric("polylora_requests_running").await == 2.0).await;
    for n in 0..500u32 {
        drop(attack(&live, 1 + (n % 200) as u8, "", b"GET /live HT").await);
    }
    let mut held = Vec::new();
    for _ in 0..50 {
        held.push(attack(&live, 1, "", b"").await);
    }
    let (_, body) = support::live::rest(stream);
    assert!(body.ends_with("data: [DONE]\n\n"), "the stream was cut");
    let (head, _) = support::live::rest(whole);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_answered_while_every_place_is_at_a_request() {
    let share = ["--connections-per-address-max", "100"];
    let flags = ["--connections-max", "3", "--body-seconds-max", "3600"];
    let live = Live::start(&[&flags[..], &share].concat());
    let endless = with(hello(BASE, ENDLESS), json!({"stream": true})).to_string();
    let ask = || live.socket("POST /v1/chat/completions", &endless);
    let mut streams: Vec<TcpStream> = (0..3).map(|_| ask()).collect();
    let mut first = [0; 15];
    for stream in &mut streams {
        stream.read_exact(&mut first).expect("it streams");
    }
    // More of those who say nothing than the reserve has places.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(attack(&live, 1, "", b"").await);
    }
    let get = |path: &str| super::exchange(&live, &request(path, "localhost", "", ""));
    for path in ["GET /live", "GET /ready", "GET /health"] {
        let answer = get(path);
        assert_eq!(outcome(&answer), "200", "{path}: {answer}");
    }
    let json = "Content-Type: application/json\r\n";
    let body = hello(BASE, 1).to_string();
    let chat = request("POST /v1/chat/completions", "localhost", json, &body);
    let refused = super::exchange(&live, &chat);
    assert_eq!(outcome(&refused), "503 connections_exhausted", "{refused}");
    assert_eq!((header(&refused, "connection"), header(&refused, "retry-after")), ("close", "1"));
    drop(streams);
    live.until("there is room again", async || outcome(&super::exchange(&live, &chat)) == "200")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_has_its_share_of_the_places() {
    let flags = ["--connections-max", "8", "--connections-per-address-max", "2"];
    let live = Live::start(&flags);
    let endless = with(hello(BASE, ENDLESS), json!({"stream": true})).to_string();
    let json = "Content-Type: application/json\r\n";
    let busy = request("POST /v1/chat/completions", "localhost", json, &endless);
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = connect_from(&live, 9).await.expect("connected");
        stream.write_all(&busy).expect("sent");
        stream.read_exact(&mut [0; 15]).expect("it streams");
        held.push(stream);
    }
    let small =
        request("POST /v1/chat/completions", "localhost", json, &hello(BASE, 1).to_string());
    let ask = async |from: u8, what: &[u8]| {
        let mut stream = connect_from(&live, from).await.expect("connected");
        stream.write_all(what).expect("sent");
        until_closed(&mut stream)
    };
    assert_eq!(outcome(&ask(9, &small).await), "429 too_many_connections");
    assert_eq!(outcome(&ask(9, &request("GET /live", "localhost", "", "")).await), "200");
    assert_eq!(outcome(&ask(10, &small).await), "200");
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_flood_of_silent_connections_is_not_felt() {
    if !soak() {
        return;
    }
    let live = Live::start(&["--api-key", "secret", "--body-seconds-max", "3600"]);
    let probes = Canary::start(&live.server.url, None, Song::Live);
    let chats = Canary::start(&live.server.url, Some("secret"), Song::Chat(BASE.to_owned()));
    let (mut held, begun) = (Vec::new(), std::time::Instant::now());
    while begun.elapsed() < Duration::from_secs(20) {
        let (shape, says) = SHAPES[held.len() % 4];
        held.push(attack(&live, 1, shape, says).await);
        if held.len() >= 1100 {
            held.drain(..100);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    for (what, seen) in [("live", probes.stop().await), ("chat", chats.stop().await)] {
        assert!(seen.bad.is_empty(), "{what}: {:?}", seen.bad);
        let (p50, p99) = (seen.quantile(0.5), seen.quantile(0.99));
        println!("{what}: {} answers, p50 {p50:?}, p99 {p99:?}", seen.times.len());
        assert!(what != "live" || p99 < Duration::from_millis(50), "{p99:?}");
    }
    drop(connect(&live));
}
