//! Uploads: hostile patterns, places held for nothing, indexes without files.

use super::Two;
use reqwest::Method;
use serde_json::json;
use std::io::{Cursor, Write};
use std::net::TcpStream;
use support::live::whole;

/// Patterns that compute for ever, one each of several kinds; the server ends when told to.
#[tokio::test]
async fn a_pattern_that_never_ends_is_an_answer_and_not_a_hang() {
    let two = Two::start(&[]).await;
    let deep = format!("{}a{}.*q_proj", "(?:".repeat(20), "{9})".repeat(20));
    let look = format!("(?=.*q)(?:{})*X", "(?:(?:.*)*(?:.*)*)*".repeat(20));
    let kinds: Vec<String> = [
        "()(?:\\1){1000000000000000000}.*q_proj",
        "(?:()\\2){99999999999}q_proj",
        "a{20000000}",
        "(?:a{0,1000}){0,1000}q_proj",
        "(?:(?>|y)){88888888888}q_proj",
        "(?:\\B(?=[a-z])){77777777777}.*",
        "(?:(?:(?!Z))){66666666666}.*",
        "((b{999}){999}){999}",
        "(?:(?:q*)*)*(?:(?:q*)*)*Y",
        "(?=(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!)",
        "(.*)(.*)(.*)(.*)(.*)(.*)\\6\\5\\4\\3\\2\\1!(?=x)",
        "(?<=(?:a|b)(?:a|b))(?:[^!]*[^!]*)*[^!]*!",
        "\\w{900}\\w{900}\\w{900}",
        &deep,
        &look,
    ]
    .map(str::to_owned)
    .to_vec();
    for pattern in kinds {
        let config = json!({"target_modules": pattern});
        let put = two.upload(&two.mallory, "mallory-p", config, &[]).await;
        let code = put.json()["error"]["code"].as_str().unwrap_or("-").to_owned();
        let refused = ["invalid_adapter_config", "target_not_found", "unknown_tensor"];
        assert!(put.status == 422 && refused.contains(&&*code), "{pattern}: {}", put.text);
    }
    let many: serde_json::Map<_, _> = (0..65).map(|i| (format!("x{i}.*"), json!(4))).collect();
    for field in ["rank_pattern", "alpha_pattern"] {
        let put = two.upload(&two.mallory, "mallory-p", json!({field: many}), &[]).await;
        assert_eq!(put.error(), format!("422 invalid_adapter_config {field}"), "{}", put.text);
    }
    let good = json!({"target_modules": ".*(?<!x)\\.(q_proj|down_proj)$"});
    let put = two.upload(&two.canary, "canary-p", good, &[]).await;
    assert_eq!(put.status, 201, "{}", put.text);
    two.others_are_well().await;
    assert!(two.live.server.terminate().success(), "it ends when it is told to");
}

/// A tenant's uploads that do not come hold half of the places at most, and not for long.
#[tokio::test]
async fn uploads_that_stall_leave_places_free_and_are_given_up() {
    let two = Two::start(&["--body-seconds-max", "3"]).await;
    let address = two.live.server.url.strip_prefix("http://").expect("http").to_owned();
    let open: Vec<TcpStream> = ["application/octet-stream", "multipart/form-data; boundary=b"]
        .iter()
        .cycle()
        .take(6)
        .enumerate()
        .map(|(i, kind)| {
            let mut socket = TcpStream::connect(&address).expect("connected");
            let key = &two.mallory;
            let head = format!(
                "PUT /v1/adapters/mallory-{i} HTTP/1.1\r\nhost: x\r\n\
                 authorization: Bearer {key}\r\ncontent-type: {kind}\r\n\
                 content-length: 100000\r\n\r\nPK"
            );
            socket.write_all(head.as_bytes()).expect("sent");
            socket
        })
        .collect();
    let put = two.upload(&two.canary, "canary-u", json!({}), &[]).await;
    assert_eq!(put.status, 201, "a place is free: {}", put.text);
    let ends = tokio::task::spawn_blocking(move || {
        let end = |socket| support::live::rest(socket).0.split(' ').nth(1).map(str::to_owned);
        open.into_iter().filter_map(end).collect::<Vec<String>>()
    });
    let mut ends = ends.await.expect("read");
    ends.sort();
    assert_eq!(ends, ["408", "408", "429", "429", "429", "429"]);
    let put = two.upload(&two.mallory, "mallory-u", json!({}), &[]).await;
    assert_eq!(put.status, 201, "the places are back: {}", put.text);
}

#[tokio::test]
async fn an_index_without_files_and_parts_without_content_are_refused_for_little() {
    let two = Two::start(&["--upload-bytes-max", "24MiB"]).await;
    two.others_are_well().await;
    let before = two.peak();
    let put = async |kind: &str, body: Vec<u8>| {
        let request = two.live.request(Method::PUT, "/v1/adapters/mallory-z");
        whole(request.bearer_auth(&two.mallory).header("content-type", kind).body(body)).await
    };
    let archive = "application/octet-stream";
    for (zip, expected) in [
        (index_only(300_000, 300_000), "400 invalid_archive -"),
        // As many as it claims are looked at.
        (index_only(300_000, 900), "422 missing_file -"),
        (sixty_four(1 << 40), "400 invalid_archive -"),
    ] {
        assert_eq!(put(archive, zip).await.error(), expected);
    }
    let answer = put(archive, twice()).await;
    assert_eq!(answer.error(), "400 duplicate_file -", "{}", answer.text);
    let part = "--b\r\nContent-Disposition: form-data; name=\"x\"; filename=\"y\"\r\n\r\n\r\n";
    let form = "multipart/form-data; boundary=b";
    let answer = put(form, format!("{}--b--\r\n", part.repeat(1100)).into_bytes()).await;
    assert_eq!(answer.error(), "400 incomplete_body -", "{}", answer.text);
    assert!(answer.text.contains("1000 parts"), "{}", answer.text);
    let head = format!("--b\r\nX-Y: {}\r\n\r\n\r\n--b--\r\n", "z".repeat(20 << 20));
    let answer = put(form, head.into_bytes()).await;
    assert_eq!(answer.error(), "400 incomplete_body -", "{}", answer.text);
    let grown = two.peak() - before;
    assert!(grown < 64 << 10, "{grown} kB");
}

/// A zip with nothing but a central directory, whose end claims `claimed` entries.
fn index_only(entries: usize, claimed: u64) -> Vec<u8> {
    let mut zip = b"PK\x03\x04".to_vec();
    let begin = zip.len() as u32;
    for i in 0..entries {
        let name = format!("{i:06}");
        let mut entry = b"PK\x01\x02".to_vec();
        entry.resize(28, 0);
        entry.extend_from_slice(&(name.len() as u16).to_le_bytes());
        entry.resize(46, 0);
        entry.extend_from_slice(name.as_bytes());
        zip.extend_from_slice(&entry);
    }
    let size = zip.len() as u32 - begin;
    let claimed = claimed.min(0xffff) as u16;
    zip.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    zip.extend_from_slice(&claimed.to_le_bytes());
    zip.extend_from_slice(&claimed.to_le_bytes());
    zip.extend_from_slice(&size.to_le_bytes());
    zip.extend_from_slice(&begin.to_le_bytes());
    zip.extend_from_slice(&[0, 0]);
    zip
}

/// A zip64 that claims so many entries and has none.
fn sixty_four(claimed: u64) -> Vec<u8> {
    let mut zip = b"PK\x03\x04".to_vec();
    zip.resize(4096, 0);
    let at = zip.len() as u64;
    zip.extend_from_slice(b"PK\x06\x06");
    zip.extend_from_slice(&44u64.to_le_bytes());
    zip.extend_from_slice(&[45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for number in [claimed, claimed, claimed * 46, claimed] {
        zip.extend_from_slice(&number.to_le_bytes());
    }
    zip.extend_from_slice(b"PK\x06\x07\0\0\0\0");
    zip.extend_from_slice(&at.to_le_bytes());
    zip.extend_from_slice(&1u32.to_le_bytes());
    zip.extend_from_slice(
        b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0",
    );
    zip
}

/// A zip that has one file under two names which become one.
fn twice() -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for name in ["adapter_config.json", "adapter_conf1g.json"] {
        zip.start_file(name, options).expect("an entry");
        zip.write_all(b"{}").expect("its content");
    }
    let mut zip = zip.finish().expect("a zip").into_inner();
    // The writer would not write one name twice.
    while let Some(at) = zip.windows(6).position(|w| w == b"conf1g") {
        zip[at + 4] = b'i';
    }
    zip
}
