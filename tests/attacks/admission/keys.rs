//! Work that is refused counts against the key that asked for it.

use super::{Two, limited};
use serde_json::json;
use support::live::{BASE, CONTEXT, hello};

#[tokio::test]
async fn a_key_with_one_request_a_minute_makes_the_server_work_once() {
    let two = Two::start(&[]).await;
    let text = "word ".repeat(40_000);
    let tokens = vec![5; 1000];
    for (path, body, expected) in [
        ("/tokenize", json!({"prompt": "a b c"}), 200),
        ("/tokenize", json!({"prompt": text}), 400),
        ("/detokenize", json!({"tokens": tokens}), 200),
        ("/v1/completions", json!({"model": BASE, "prompt": text}), 400),
        ("/v1/completions", json!({"model": BASE, "prompt": vec![5; CONTEXT + 1]}), 400),
        (
            "/v1/chat/completions",
            json!({"model": BASE, "messages": [{"role": "user", "content": text}]}),
            400,
        ),
    ] {
        let limits = json!({"requests_per_minute": 1, "concurrent_max": 1});
        let key = limited(&two.live, json!({"scopes": ["inference"], "limits": limits})).await;
        let first = two.post(&key, path, &body).await;
        assert_eq!(first.status, expected, "{path}: {}", first.text);
        assert_eq!(first.header("x-ratelimit-remaining-requests"), "0", "{path}");
        let second = two.post(&key, path, &body).await;
        assert_eq!(second.error(), "429 rate_limit_exceeded -", "{path}");
    }
    // What was refused for little costs nothing, and what is answered costs one.
    let limits = json!({"requests_per_minute": 1});
    let key = limited(&two.live, json!({"scopes": ["inference"], "limits": limits})).await;
    let chat = "/v1/chat/completions";
    assert_eq!(two.post(&key, chat, &hello("nobody", 1)).await.status, 404);
    assert_eq!(two.raw(&key, chat, "{").await.status, 400);
    let good = two.post(&key, chat, &hello(BASE, 1)).await;
    assert_eq!((good.status, good.header("x-ratelimit-remaining-requests")), (200, "0"));
    assert_eq!(two.post(&key, chat, &hello(BASE, 1)).await.status, 429);
}

/// A place is taken before the body is read: requests on their way count.
#[tokio::test]
async fn a_body_on_its_way_holds_one_of_its_keys_places() {
    use std::io::Write;
    let two = Two::start(&["--body-seconds-max", "2"]).await;
    let limits = json!({"concurrent_max": 1});
    let key = limited(&two.live, json!({"scopes": ["inference"], "limits": limits})).await;
    let address = two.live.server.url.strip_prefix("http://").expect("http");
    let head = format!(
        "POST /tokenize HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
    );
    let chat = async || two.post(&key, "/v1/chat/completions", &hello(BASE, 1)).await.status;
    // Sent anew until it comes first: a chat under way holds the place as well.
    let taken = async || {
        let mut socket = std::net::TcpStream::connect(address).expect("connected");
        socket.write_all(head.as_bytes()).expect("sent");
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        chat().await == 429
    };
    two.live.until("the place is taken", taken).await;
    two.live.until("the place is free again", async || chat().await == 200).await;
}
