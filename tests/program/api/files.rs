//! Files to train on: there and back, pages, whose they are, what is refused, what a kill leaves.

use crate::api::keys::{ask, make};
use polylora::config::limits::FILE_BYTES_MAX;
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use support::live::{Answer, Live, whole};

/// One example, different for each `n`.
pub fn line(n: usize) -> String {
    let messages = json!([{"role": "user", "content": format!("{n}?")},
                          {"role": "assistant", "content": "yes"}]);
    format!("{}\n", json!({ "messages": messages }))
}

fn form(name: &str, content: impl Into<Vec<u8>>) -> Form {
    let part = Part::bytes(content.into()).file_name(name.to_owned());
    Form::new().text("purpose", "fine-tune").part("file", part)
}

async fn send(live: &Live, key: &str, form: Form) -> Answer {
    whole(live.request(Method::POST, "/v1/files").bearer_auth(key).multipart(form)).await
}

/// Uploads with a key; the file.
pub async fn upload(live: &Live, key: &str, name: &str, content: &str) -> Value {
    let answer = send(live, key, form(name, content)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

pub async fn content(live: &Live, key: &str, id: &str) -> Answer {
    ask(live, Method::GET, &format!("/v1/files/{id}/content"), key, Value::Null).await
}

/// What lies below a directory of the data directory, files only.
pub fn held(live: &Live, below: &str) -> usize {
    fn count(dir: &Path) -> usize {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| if e.path().is_dir() { count(&e.path()) } else { 1 }).sum()
    }
    count(&live.data().join(below))
}

/// The beginning of an upload that has more to come.
fn half(content: &str) -> String {
    format!(
        "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\
         content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\ncontent-disposition: \
         form-data; name=\"file\"; filename=\"a\"\r\n\r\n{content}"
    )
}

#[tokio::test]
async fn a_file_is_as_it_was_sent_until_it_is_deleted() {
    let live = Live::start(&[]);
    let text: String = (0..100).map(line).collect();
    let file = upload(&live, "-", "../../up\\train.jsonl", &text).await;
    let id = file["id"].as_str().expect("an id").to_owned();
    assert!(id.starts_with("file-"), "{id}");
    let created = file["created_at"].as_u64().expect("a time");
    assert_eq!(
        file,
        json!({"id": id, "object": "file", "bytes": text.len(), "created_at": created,
               "expires_at": null, "filename": "train.jsonl", "purpose": "fine-tune",
               "status": "processed", "status_details": null})
    );
    assert_eq!(live.get(&format!("/v1/files/{id}")).await.json(), file);
    let whole = content(&live, "-", &id).await;
    assert_eq!((whole.status, whole.text == text), (200, true));
    assert_eq!(whole.header("content-length"), text.len().to_string());
    assert_eq!(whole.header("content-type"), "application/octet-stream");
    assert_eq!(whole.header("content-disposition"), "attachment; filename=\"train.jsonl\"");
    // The same content again is another file, and lies there once.
    let again = upload(&live, "-", "b", &text).await;
    assert_eq!(held(&live, "files/sha256"), 1);
    let deleted = ask(&live, Method::DELETE, &format!("/v1/files/{id}"), "-", Value::Null).await;
    assert_eq!(deleted.json(), json!({"id": id, "object": "file", "deleted": true}));
    for path in [format!("/v1/files/{id}"), format!("/v1/files/{id}/content")] {
        assert_eq!(live.get(&path).await.error(), "404 file_not_found id");
    }
    let again = again["id"].as_str().expect("an id");
    assert_eq!(content(&live, "-", again).await.text, text);
    ask(&live, Method::DELETE, &format!("/v1/files/{again}"), "-", Value::Null).await;
    assert_eq!(held(&live, "files"), 0, "nothing is left of a deleted file");
    let record = live.get("/v1/audit?limit=10").await.json();
    let record = record["data"].as_array().expect("records").iter().find(|r| r["name"] == id);
    assert!(record.is_some_and(|r| r["digest"].as_str().is_some_and(|d| d.len() == 71)));
}

#[tokio::test]
async fn pages_are_in_order_and_end() {
    let live = Live::start(&[]);
    let mut ids = Vec::new();
    for n in 0..5 {
        let file = upload(&live, "-", &format!("{n}"), &line(n)).await;
        ids.push(file["id"].as_str().expect("an id").to_owned());
    }
    let page = async |query: &str| {
        let page = live.get(&format!("/v1/files{query}")).await.json();
        let data = page["data"].as_array().expect("files");
        let names: String = data.iter().map(|f| f["filename"].as_str().expect("a name")).collect();
        assert_eq!(page["first_id"], data.first().map_or(Value::Null, |f| f["id"].clone()));
        assert_eq!(page["last_id"], data.last().map_or(Value::Null, |f| f["id"].clone()));
        (names, page["has_more"] == true)
    };
    let is = |names: &str, more: bool| (names.to_owned(), more);
    assert_eq!(page("").await, is("43210", false));
    assert_eq!(page("?order=asc&limit=5").await, is("01234", false));
    assert_eq!(page("?limit=2").await, is("43", true));
    assert_eq!(page(&format!("?limit=2&after={}", ids[3])).await, is("21", true));
    assert_eq!(page(&format!("?limit=2&after={}", ids[1])).await, is("0", false));
    assert_eq!(page(&format!("?order=asc&after={}", ids[3])).await, is("4", false));
    assert_eq!(page("?purpose=fine-tune&limit=1").await, is("4", true));
    assert_eq!(page("?purpose=fine-tune-results").await, is("", false));
    assert_eq!(page("?purpose=batch").await, is("", false));
    for (query, param) in [
        ("?limit=0", "limit"),
        ("?limit=10001", "limit"),
        ("?order=up", "order"),
        ("?after=file-0", "after"),
        ("?before=x", "limit"),
    ] {
        let refused = live.get(&format!("/v1/files{query}")).await.error();
        assert_eq!(refused, format!("400 invalid_value {param}"));
    }
}

#[tokio::test]
async fn a_tenant_finds_its_own_files_and_no_others() {
    let live = Live::start(&["--api-key", "secret"]);
    let key = async |tenant: &str| {
        let body = json!({"scopes": ["admin", "inference"], "tenant": tenant});
        make(&live, body).await.0
    };
    let (acme, globex) = (key("acme").await, key("globex").await);
    let text = line(1);
    let file = upload(&live, &acme, "a", &text).await;
    // The same content of another tenant: neither notices.
    let other = upload(&live, &globex, "b", &text).await;
    let operators = upload(&live, "secret", "c", &line(2)).await;
    let id = |file: &Value| file["id"].as_str().expect("an id").to_owned();
    for (key, own, foreign) in
        [(&acme, &file, [&other, &operators]), (&globex, &other, [&file, &operators])]
    {
        let list = ask(&live, Method::GET, "/v1/files", key, Value::Null).await.json();
        assert_eq!(list["data"], json!([own]));
        for id in foreign.map(id).into_iter().chain(["file-0".to_owned()]) {
            for (method, path) in [
                (Method::GET, format!("/v1/files/{id}")),
                (Method::GET, format!("/v1/files/{id}/content")),
                (Method::DELETE, format!("/v1/files/{id}")),
            ] {
                let answer = ask(&live, method, &path, key, Value::Null).await;
                assert_eq!(answer.error(), "404 file_not_found id");
                let message = format!("there is no file `{id}`");
                assert_eq!(answer.json()["error"]["message"], message);
            }
            let after = format!("/v1/files?after={id}");
            let answer = ask(&live, Method::GET, &after, key, Value::Null).await;
            assert_eq!(answer.error(), "400 invalid_value after");
        }
    }
    let path = format!("/v1/files/{}", id(&other));
    assert_eq!(ask(&live, Method::DELETE, &path, &globex, Value::Null).await.status, 200);
    assert_eq!(content(&live, &acme, &id(&file)).await.text, text, "still there for the other");
    let all = ask(&live, Method::GET, "/v1/files", "secret", Value::Null).await.json();
    assert_eq!(all["data"], json!([operators, file]), "an operator sees all");
    let (inference, _) = make(&live, json!({"scopes": ["inference"]})).await;
    let answer = ask(&live, Method::GET, "/v1/files", &inference, Value::Null).await;
    assert_eq!(answer.error(), "403 insufficient_scope -");
}

#[tokio::test]
async fn adapters_and_files_of_a_tenant_share_its_bytes_on_disk() {
    let live = Live::start(&["--api-key", "secret"]);
    let files = live.adapter_files(1, 0.3);
    let adapter: u64 = ["adapter_config.json", "adapter_model.safetensors"]
        .iter()
        .map(|name| std::fs::metadata(files.join(name)).expect("a file").len())
        .sum();
    let limits = json!({"disk_bytes_max": 2 * adapter});
    let body = json!({"scopes": ["admin"], "tenant": "acme", "adapters": ["acme-*"],
                      "limits": limits});
    let (acme, _) = make(&live, body).await;
    let put = crate::api::keys::upload_as(&live, &acme, "acme-1", 1).await;
    assert_eq!(put.status, 201, "{}", put.text);
    let of = |bytes: u64| {
        let start = "{\"prompt\": \"a\", \"completion\": \"";
        let blank = "b".repeat(bytes as usize - start.len() - 3);
        format!("{start}{blank}\"}}\n")
    };
    let first = upload(&live, &acme, "half", &of(adapter / 2)).await;
    for bytes in [adapter, adapter * 3 / 4] {
        let refused = send(&live, &acme, form("more", of(bytes))).await;
        assert_eq!(refused.error(), "507 tenant_share_exceeded -", "{}", refused.text);
        let limit = format!("its key allows {}", 2 * adapter);
        assert!(refused.text.contains(&limit), "{}", refused.text);
    }
    let put = crate::api::keys::upload_as(&live, &acme, "acme-2", 2).await;
    assert_eq!(put.error(), "507 tenant_share_exceeded -", "{}", put.text);
    assert_eq!(held(&live, "files/incoming"), 0, "what was refused is gone");
    let path = format!("/v1/files/{}", first["id"].as_str().expect("an id"));
    assert_eq!(ask(&live, Method::DELETE, &path, &acme, Value::Null).await.status, 200);
    let refused = send(&live, &acme, form("more", of(adapter + 9999))).await;
    assert_eq!(refused.error(), "507 tenant_share_exceeded -", "{}", refused.text);
    upload(&live, &acme, "fits", &of(adapter * 3 / 4)).await;
}

#[tokio::test]
async fn a_line_that_nothing_can_be_learned_from_is_named() {
    let live = Live::start(&[]);
    for (bad, details) in [
        ("{\"messages\": [{\"content\": \"a\"}]}", "line 2: `messages[0].role` is required"),
        ("[]", "line 2: a line must be an object, not a list"),
        ("{\"prompt\": \"a\"}", "line 2: `completion` is required"),
    ] {
        let file = upload(&live, "-", "bad", &format!("{}{bad}\n", line(0))).await;
        assert_eq!((&file["status"], &file["status_details"]), (&json!("error"), &json!(details)));
        let id = file["id"].as_str().expect("an id");
        assert_eq!(live.get(&format!("/v1/files/{id}")).await.json(), file);
    }
    let mut bytes = line(0).into_bytes();
    bytes.extend_from_slice(b"{\"prompt\": \"\xff\", \"completion\": \"\"}");
    let file = send(&live, "-", form("latin1", bytes)).await.json();
    assert_eq!(file["status_details"], "line 2: byte 13 is not UTF-8");
}

#[tokio::test]
async fn forms_that_are_not_one_file_for_training_are_refused_by_what_is_wrong() {
    let live = Live::start(&[]);
    let file = || Part::bytes(line(0).into_bytes()).file_name("a.jsonl");
    let lasts = |anchor: &'static str, seconds: &'static str| {
        form("a", line(0))
            .text("expires_after[anchor]", anchor)
            .text("expires_after[seconds]", seconds)
    };
    for (form, expected) in [
        (Form::new().part("file", file()), "400 missing_parameter purpose"),
        (Form::new().text("purpose", "fine-tune"), "400 missing_parameter file"),
        (form("a", line(0)).part("file", file()), "400 duplicate_file file"),
        (form("a", line(0)).text("purpose", "fine-tune"), "400 invalid_value purpose"),
        (form("a", line(0)).text("porpoise", "x"), "400 unknown_parameter porpoise"),
        (form("a", Vec::new()), "400 invalid_value file"),
        (
            form("a", line(0)).text("expires_after[seconds]", "3600"),
            "400 missing_parameter expires_after[anchor]",
        ),
        (
            form("a", line(0)).text("expires_after[anchor]", "created_at"),
            "400 missing_parameter expires_after[seconds]",
        ),
        (lasts("created_at", "60"), "400 invalid_value expires_after[seconds]"),
        (lasts("created_at", "soon"), "400 invalid_value expires_after[seconds]"),
        (lasts("last_active_at", "3600"), "400 invalid_value expires_after[anchor]"),
        (
            Form::new().text("purpose", "x".repeat(5000)).part("file", file()),
            "400 invalid_value purpose",
        ),
    ] {
        let refused = send(&live, "-", form).await;
        assert_eq!(refused.error(), expected, "{}", refused.text);
    }
    let others = ["batch", "user_data", "evals", "vision", "assistants", "fine-tune-results", ""];
    for purpose in others {
        let form = Form::new().text("purpose", purpose).part("file", file());
        let refused = send(&live, "-", form).await;
        assert_eq!(refused.error(), "400 unsupported_purpose purpose", "{}", refused.text);
        assert!(refused.text.contains("fine-tune"), "{}", refused.text);
    }
    for (header, value) in [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")] {
        let request = live.request(Method::POST, "/v1/files").header(header, value);
        let page = whole(request.multipart(form("a", line(0)))).await;
        assert_eq!(page.error(), "403 origin_not_allowed -", "a form of another site");
    }
    let json = live.post("/v1/files", json!({"purpose": "fine-tune"})).await;
    assert_eq!(json.error(), "415 unsupported_media_type -");
    let many = (0..20).fold(Form::new(), |form, n| form.text(format!("x{n}"), ""));
    assert_eq!(send(&live, "-", many).await.error(), "400 unknown_parameter x0");
    let parts = "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n";
    let cut = live.request(Method::POST, "/v1/files").body(parts);
    let cut = whole(cut.header("content-type", "multipart/form-data; boundary=b")).await;
    assert_eq!(cut.error(), "400 incomplete_body -", "{}", cut.text);
    let mut socket = TcpStream::connect(live.server.url.strip_prefix("http://").expect("http"))
        .expect("connected");
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\
         content-type: multipart/form-data; boundary=b\r\n\r\n",
        FILE_BYTES_MAX + (1 << 20)
    );
    socket.write_all(head.as_bytes()).expect("sent");
    let (head, _) = support::live::rest(socket);
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let kept = lasts("created_at", "3600");
    let kept = send(&live, "-", kept).await.json();
    let times = (kept["created_at"].as_u64(), kept["expires_at"].as_u64());
    assert_eq!(times.1, times.0.map(|t| t + 3600));
    assert_eq!((held(&live, "files/incoming"), held(&live, "files/sha256")), (0, 1));
}

/// Uploads of files take the places that uploads of adapters take, and lose them alike.
#[tokio::test]
async fn a_file_that_stalls_is_given_up_and_leaves_nothing() {
    let live = Live::start(&["--body-seconds-max", "1"]);
    let address = live.server.url.strip_prefix("http://").expect("http").to_owned();
    let open: Vec<TcpStream> = (0..5)
        .map(|_| {
            let mut socket = TcpStream::connect(&address).expect("connected");
            socket.write_all(half("{").as_bytes()).expect("sent");
            socket
        })
        .collect();
    let ends = tokio::task::spawn_blocking(move || {
        let status = |socket| support::live::rest(socket).0.split(' ').nth(1).map(str::to_owned);
        let mut ends: Vec<String> = open.into_iter().filter_map(status).collect();
        ends.sort();
        ends
    });
    assert_eq!(ends.await.expect("read"), ["408", "408", "408", "408", "429"]);
    assert_eq!(held(&live, "files"), 0);
    upload(&live, "-", "a", &line(0)).await;
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_kill_and_nothing_else() {
    let mut live = Live::start(&[]);
    let mut told = Vec::new();
    for round in 0..4 {
        let text: String = (0..200).map(|n| line(1000 * round + n)).collect();
        told.push((upload(&live, "-", &format!("{round}"), &text).await, text));
        if round == 2 {
            let (gone, _) = told.remove(0);
            let path = format!("/v1/files/{}", gone["id"].as_str().expect("an id"));
            assert_eq!(ask(&live, Method::DELETE, &path, "-", Value::Null).await.status, 200);
        }
        // One that is half here.
        let mut cut = TcpStream::connect(live.server.url.strip_prefix("http://").expect("http"))
            .expect("connected");
        cut.write_all(half(&line(0)).as_bytes()).expect("sent");
        live.until("it is being written", async || held(&live, "files/incoming") == 1).await;
        live = live.crash_and_restart(&[]);
        let listed = live.get("/v1/files?order=asc").await.json();
        let files: Vec<&Value> = told.iter().map(|(file, _)| file).collect();
        assert_eq!(listed["data"], json!(files));
        for (file, text) in &told {
            let id = file["id"].as_str().expect("an id");
            assert_eq!(&content(&live, "-", id).await.text, text);
        }
        let left = (held(&live, "files/incoming"), held(&live, "files/sha256"));
        assert_eq!(left, (0, told.len()));
    }
}
