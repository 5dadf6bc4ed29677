//! Bodies of many values, bodies that stall, and fields that are far too long.

use super::Two;
use serde_json::json;
use std::io::Write;
use std::time::Duration;
use support::live::{BASE, hello, rest, with};

const CHAT: &str = "/v1/chat/completions";

/// 3 MB of small values: none becomes a tree, whatever field they stand in.
#[tokio::test]
async fn a_body_of_a_million_values_is_refused_before_anything_is_made_of_it() {
    let two = Two::start(&[]).await;
    two.others_are_well().await;
    let before = two.peak();
    for (field, unit) in [
        ("messages", "{\"a\":{}},"),
        ("messages", "[[]],"),
        ("stop", "\"a\","),
        ("metadata", "[0],"),
        ("tools", "{},"),
        ("logit_bias", "null,"),
        ("whatever", "1,"),
        ("adapters", "[],"),
    ] {
        let list = unit.repeat(3_000_000 / unit.len());
        let body = format!("{{\"model\":\"{BASE}\",\"{field}\":[{}0]}}", list);
        let answer = two.raw(&two.mallory, CHAT, body).await;
        assert!(answer.error().starts_with("400 invalid_json "), "{unit}: {}", answer.text);
        assert!(answer.text.contains("values"), "{}", answer.text);
    }
    let deep = format!("{{\"messages\":{}", "{\"a\":".repeat(500_000));
    assert_eq!(two.raw(&two.mallory, CHAT, deep).await.error(), "400 invalid_json -");
    let grown = two.peak() - before;
    assert!(grown < 48 << 10, "{grown} kB for bodies of 3 MB, one after the other");
    two.others_are_well().await;
}

/// Bodies that are promised and do not come hold their tenant's share of memory, for a while.
#[tokio::test]
async fn bodies_that_stall_hold_their_tenants_share_and_are_given_up() {
    let two = Two::start(&["--request-bytes-max", "16MiB", "--body-seconds-max", "2"]).await;
    let head = |length: usize| {
        let key = &two.mallory;
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{{\"model\": "
        )
    };
    let address = two.live.server.url.strip_prefix("http://").expect("http").to_owned();
    let mut open: Vec<_> = (0..12)
        .map(|_| {
            let mut socket = std::net::TcpStream::connect(&address).expect("connected");
            socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
            socket.write_all(head(1 << 20).as_bytes()).expect("sent");
            socket
        })
        .collect();
    two.others_are_well().await;
    // One trickles: it is never silent.
    let mut slow = open.pop().expect("a socket").try_clone().expect("a second handle");
    let trickle = tokio::task::spawn_blocking(move || {
        while slow.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let ends = tokio::task::spawn_blocking(move || {
        let end = |socket| rest(socket).0.split(' ').nth(1).map(str::to_owned);
        open.into_iter().filter_map(end).collect::<Vec<String>>()
    });
    let ends = ends.await.expect("read");
    let count = |status: &str| ends.iter().filter(|s| *s == status).count();
    // 16 MiB, of which a tenant holds as much as it leaves free: eight bodies of 1 MiB.
    assert!(count("429") >= 3 && count("408") >= 7, "{ends:?}");
    trickle.await.expect("given up as well");
    two.others_are_well().await;
}

#[tokio::test]
async fn stops_names_and_users_have_sane_lengths() {
    let two = Two::start(&[]).await;
    let many: Vec<String> = (0..20).map(|i| format!("{i}{}", "b".repeat(1000))).collect();
    let parts = (0..8).map(|i| format!("mallory-{i}:0.{}", "5".repeat(400))).collect::<Vec<_>>();
    for (change, expected) in [
        (json!({"stop": "x".repeat(1025), "n": 16}), "400 invalid_value stop[0]"),
        (json!({"stop": ["ok", "ä".repeat(700)]}), "400 invalid_value stop[1]"),
        (json!({"stop": many}), "400 invalid_value stop"),
        (json!({"stop": "y".repeat(3_000_000)}), "400 invalid_value stop[0]"),
        (
            json!({"model": format!("mallory-x:1.{}", "0".repeat(3_000_000))}),
            "404 model_not_found model",
        ),
        (json!({"model": format!("mallory-x:{}1", "0".repeat(160))}), "404 model_not_found model"),
        (json!({"model": parts.join("+")}), "404 model_not_found model"),
        (json!({"user": "u".repeat(1025)}), "400 invalid_value user"),
        (json!({"repetition_penalty": 1e-38}), "400 invalid_value repetition_penalty"),
        (json!({"repetition_penalty": 0.009}), "400 invalid_value repetition_penalty"),
    ] {
        let body = with(hello(BASE, 4), change);
        let answer = two.post(&two.mallory, CHAT, &body).await;
        assert_eq!(answer.error(), expected, "{}", answer.text);
        assert!(answer.text.len() < 4096, "it is not told at length");
    }
    let most = json!({"stop": ["z".repeat(1024)], "n": 16, "user": "u".repeat(1024),
                      "repetition_penalty": 0.01});
    let answer = two.post(&two.mallory, CHAT, &with(hello(BASE, 4), most)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}
