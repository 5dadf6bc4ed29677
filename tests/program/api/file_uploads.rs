//! Files in parts: put together in the order that is named, or refused, and kept through a restart.

use crate::api::files::{content, held, line};
use crate::api::keys::{ask, make};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use support::live::{Answer, Live, whole};

async fn begin(live: &Live, key: &str, bytes: usize) -> Value {
    let body = json!({"bytes": bytes, "filename": "a/b.jsonl", "mime_type": "text/jsonl",
                      "purpose": "fine-tune"});
    let answer = ask(live, Method::POST, "/v1/uploads", key, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

fn id(shown: &Value) -> String {
    shown["id"].as_str().expect("an id").to_owned()
}

async fn add(live: &Live, key: &str, upload: &str, data: &str) -> Answer {
    let part = Part::bytes(data.as_bytes().to_vec()).file_name("upload");
    let request = live.request(Method::POST, &format!("/v1/uploads/{upload}/parts"));
    whole(request.bearer_auth(key).multipart(Form::new().part("data", part))).await
}

async fn part(live: &Live, upload: &str, data: &str) -> String {
    let answer = add(live, "-", upload, data).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let shown = answer.json();
    let created = shown["created_at"].as_u64().expect("a time");
    let expected = json!({"id": shown["id"], "object": "upload.part", "created_at": created,
                          "upload_id": upload});
    assert_eq!(shown, expected);
    id(&shown)
}

async fn complete(live: &Live, upload: &str, parts: &[&String], md5: Option<&str>) -> Answer {
    let body = json!({"part_ids": parts, "md5": md5});
    ask(live, Method::POST, &format!("/v1/uploads/{upload}/complete"), "-", body).await
}

async fn cancel(live: &Live, upload: &str) -> Answer {
    let path = format!("/v1/uploads/{upload}/cancel");
    ask(live, Method::POST, &path, "-", Value::Null).await
}

/// The text in three parts.
fn thirds(text: &str) -> [&str; 3] {
    let (a, rest) = text.split_at(text.len() / 3);
    let (b, c) = rest.split_at(rest.len() / 2);
    [a, b, c]
}

#[tokio::test]
async fn parts_that_came_in_any_order_are_the_file_in_the_order_that_is_named() {
    let live = Live::start(&[]);
    let text: String = (0..50).map(line).collect();
    let [a, b, c] = thirds(&text);
    let begun = begin(&live, "-", text.len()).await;
    let upload = id(&begun);
    let created = begun["created_at"].as_u64().expect("a time");
    let expected = json!({"id": upload, "object": "upload", "bytes": text.len(),
        "created_at": created, "expires_at": created + 3600, "filename": "b.jsonl",
        "purpose": "fine-tune", "status": "pending", "file": null});
    assert_eq!(begun, expected);
    let c = part(&live, &upload, c).await;
    let a = part(&live, &upload, a).await;
    // A client that did not hear of it sends it again.
    part(&live, &upload, b).await;
    let live = live.crash_and_restart(&[]);
    let b = part(&live, &upload, b).await;
    let wrong = complete(&live, &upload, &[&a, &b, &c], Some(&"0".repeat(32))).await;
    assert_eq!(wrong.error(), "400 upload_mismatch md5", "{}", wrong.text);
    let found = wrong.text.split("MD5 of the parts is ").nth(1).expect("it says which");
    let md5 = found[..32].to_uppercase();
    let done = complete(&live, &upload, &[&a, &b, &c], Some(&md5)).await;
    assert_eq!(done.status, 200, "{}", done.text);
    let done = done.json();
    assert_eq!(
        (&done["status"], &done["file"]["status"]),
        (&json!("completed"), &json!("processed"))
    );
    assert_eq!(done["file"]["filename"], "b.jsonl");
    let file = id(&done["file"]);
    assert_eq!(content(&live, "-", &file).await.text, text);
    assert_eq!(live.get(&format!("/v1/files/{file}")).await.json(), done["file"]);
    assert_eq!((held(&live, "files/parts"), held(&live, "files/incoming")), (0, 0));
    let again = complete(&live, &upload, &[&a, &b, &c], None).await;
    assert_eq!(again.json(), done, "whoever did not hear the answer asks again");
    assert_eq!(add(&live, "-", &upload, "x").await.error(), "409 upload_over -");
    assert_eq!(cancel(&live, &upload).await.error(), "409 upload_over -");
    // Of two files with the same content, whatever way they came, one can go.
    let path = format!("/v1/files/{file}");
    assert_eq!(ask(&live, Method::DELETE, &path, "-", Value::Null).await.status, 200);
    assert_eq!(held(&live, "files"), 0);
}

#[tokio::test]
async fn what_does_not_come_to_what_was_said_is_refused() {
    let live = Live::start(&[]);
    let text: String = (0..3).map(line).collect();
    let upload = id(&begin(&live, "-", text.len()).await);
    let [a, b, c] = thirds(&text);
    let (a, b) = (part(&live, &upload, a).await, part(&live, &upload, b).await);
    let other = id(&begin(&live, "-", 3).await);
    let foreign = part(&live, &other, "abc").await;
    let c = part(&live, &upload, c).await;
    let nobody = "part_0".to_owned();
    for (parts, expected) in [
        (&[][..], "400 upload_mismatch part_ids"),
        (&[&a, &b], "400 upload_mismatch part_ids"),
        (&[&a, &b, &a], "400 invalid_value part_ids[2]"),
        (&[&a, &foreign, &c], "400 invalid_value part_ids[1]"),
        (&[&nobody], "400 invalid_value part_ids[0]"),
    ] {
        let refused = complete(&live, &upload, parts, None).await;
        assert_eq!(refused.error(), expected, "{}", refused.text);
    }
    let refused = complete(&live, &upload, &[&a], Some("no digest")).await;
    assert_eq!(refused.error(), "400 invalid_value md5");
    assert_eq!(add(&live, "-", &other, "abcd").await.error(), "413 file_too_large -");
    assert_eq!(add(&live, "-", &other, "").await.error(), "400 invalid_value data");
    part(&live, &other, "abc").await;
    let refused = add(&live, "-", &other, "a").await;
    assert_eq!(refused.error(), "400 upload_mismatch data", "{}", refused.text);
    let cancelled = cancel(&live, &other).await.json();
    assert_eq!((&cancelled["status"], &cancelled["file"]), (&json!("cancelled"), &Value::Null));
    assert_eq!(cancel(&live, &other).await.json(), cancelled);
    assert_eq!(complete(&live, &other, &[&foreign], None).await.error(), "409 upload_over -");
    assert_eq!(held(&live, "files/parts"), 3);
    for (more, expected) in [
        (json!({"bytes": 0}), "400 invalid_value bytes"),
        (json!({"bytes": 1u64 << 40}), "413 file_too_large bytes"),
        (json!({"bytes": -1}), "400 invalid_type bytes"),
        (json!({"purpose": "vision"}), "400 unsupported_purpose purpose"),
        (json!({"filename": null}), "400 missing_parameter filename"),
        (json!({"mime_type": null}), "400 missing_parameter mime_type"),
        (json!({"colour": "red"}), "400 unknown_parameter colour"),
        (
            json!({"expires_after": {"anchor": "created_at", "seconds": 1}}),
            "400 invalid_value expires_after[seconds]",
        ),
    ] {
        let body = json!({"bytes": 1, "filename": "a", "mime_type": "b", "purpose": "fine-tune"});
        let refused = live.post("/v1/uploads", support::live::with(body, more)).await;
        assert_eq!(refused.error(), expected, "{}", refused.text);
    }
    // A file that nothing can be learned from is kept and says so, in parts as well.
    let bad = id(&begin(&live, "-", 3).await);
    let parts = [part(&live, &bad, "[").await, part(&live, &bad, "1]").await];
    let done = complete(&live, &bad, &[&parts[0], &parts[1]], None).await.json();
    assert_eq!(done["file"]["status_details"], "line 1: a line must be an object, not a list");
}

#[tokio::test]
async fn an_upload_is_its_tenants_and_there_are_only_so_many() {
    let live = Live::start(&["--api-key", "secret"]);
    let key =
        async |tenant: &str| make(&live, json!({"scopes": ["admin"], "tenant": tenant})).await.0;
    let (acme, globex) = (key("acme").await, key("globex").await);
    let upload = id(&begin(&live, &acme, 3).await);
    for foreign in [&upload, "upload_0"] {
        let body = json!({"part_ids": []});
        let path = |verb: &str| format!("/v1/uploads/{foreign}/{verb}");
        let answers = [
            add(&live, &globex, foreign, "abc").await,
            ask(&live, Method::POST, &path("complete"), &globex, body).await,
            ask(&live, Method::POST, &path("cancel"), &globex, Value::Null).await,
        ];
        for answer in answers {
            assert_eq!(answer.error(), "404 upload_not_found id");
        }
    }
    let body = json!({"bytes": 3, "filename": "a", "mime_type": "b", "purpose": "fine-tune"});
    let more = async |key: &str| ask(&live, Method::POST, "/v1/uploads", key, body.clone()).await;
    let mut own = 1;
    let refusal = loop {
        match more(&acme).await {
            answer if answer.status == 200 => own += 1,
            refusal => break refusal,
        }
    };
    assert_eq!((own, refusal.error().as_str()), (32, "507 tenant_share_exceeded -"));
    assert_eq!(more(&globex).await.status, 200, "the other finds something");
    let mut all = 33;
    let refusal = loop {
        match more("secret").await {
            answer if answer.status == 200 => all += 1,
            refusal => break refusal,
        }
    };
    assert_eq!((all, refusal.error().as_str()), (64, "429 upload_limit_reached -"));
    assert_eq!(add(&live, &acme, &upload, "abc").await.status, 200);
}
