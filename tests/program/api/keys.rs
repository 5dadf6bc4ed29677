//! Keys over the wire: scopes, tenants, rotation, revocation, and that no secret is ever logged.

use reqwest::Method;
use serde_json::{Value, json};
use support::live::{Answer, BASE, Live, form, hello, whole};

/// An answer to a request with `key`.
pub async fn ask(live: &Live, method: Method, path: &str, key: &str, body: Value) -> Answer {
    let request = live.request(method, path).bearer_auth(key);
    whole(if body.is_null() { request } else { request.json(&body) }).await
}

/// Makes a key with the configured one, `secret`; returns (secret, id).
pub async fn make(live: &Live, body: Value) -> (String, String) {
    let made = ask(live, Method::POST, "/v1/keys", "secret", body).await;
    assert_eq!(made.status, 201, "{}", made.text);
    assert_eq!(made.header("cache-control"), "no-store");
    let made = made.json();
    let text = |v: &Value| v.as_str().expect("text").to_owned();
    (text(&made["secret"]), text(&made["key"]["id"]))
}

pub async fn upload_as(live: &Live, key: &str, name: &str, seed: u64) -> Answer {
    let form = form(&live.adapter_files(seed, 0.3));
    let request = live.request(Method::PUT, &format!("/v1/adapters/{name}")).bearer_auth(key);
    whole(request.multipart(form)).await
}

#[tokio::test]
async fn a_key_opens_the_routes_of_its_scopes_and_no_other() {
    let live = Live::start(&["--api-key", "secret"]);
    let (infer, _) = make(&live, json!({"scopes": ["inference"]})).await;
    let (admin, _) = make(&live, json!({"scopes": ["admin"]})).await;
    let (metrics, _) = make(&live, json!({"scopes": ["metrics"]})).await;
    let (tenant, _) = make(
        &live,
        json!({"scopes": ["inference", "admin", "metrics"], "tenant": "acme",
               "adapters": ["acme-*"]}),
    )
    .await;
    let status = async |method: Method, path: &str, key: &str| {
        let answer = ask(&live, method, path, key, Value::Null).await;
        if answer.status == 403 {
            assert_eq!(answer.error(), "403 insufficient_scope -");
            assert_eq!(answer.json()["error"]["type"], "permission_error");
        }
        answer.status
    };
    let keys = [&infer, &admin, &metrics, &tenant];
    for (path, expected) in [
        ("/v1/models", [200, 403, 403, 200]),
        ("/v1/adapters", [403, 200, 403, 200]),
        ("/v1/keys", [403, 200, 403, 403]),
        ("/metrics", [403, 403, 200, 403]),
        ("/version", [200, 200, 200, 200]),
        ("/docs", [200, 200, 200, 200]),
        ("/nothing", [404, 404, 404, 404]),
    ] {
        for (key, expected) in keys.iter().zip(expected) {
            assert_eq!(status(Method::GET, path, key).await, expected, "{path}");
            // HEAD is GET without the body, and not a way around its scope.
            let head = live.request(Method::HEAD, path).bearer_auth(key).send().await;
            assert_eq!(head.expect("an answer").status(), expected, "HEAD {path}");
        }
    }
    assert_eq!(status(Method::PATCH, "/v1/adapters", &infer).await, 405);
}

#[tokio::test]
async fn a_rotated_secret_is_good_for_its_overlap_and_a_revoked_one_not_at_all() {
    let live = Live::start(&["--api-key", "secret"]);
    let (first, id) = make(&live, json!({"scopes": ["inference"]})).await;
    let rotate = format!("/v1/keys/{id}/rotate");
    let works = async |key: &str| {
        let answer = ask(&live, Method::GET, "/v1/models", key, Value::Null).await;
        if answer.status != 200 {
            assert_eq!(answer.error(), "401 invalid_api_key -");
        }
        answer.status == 200
    };
    let new = async |overlap: u64| {
        let body = json!({"overlap_seconds": overlap});
        let made = ask(&live, Method::POST, &rotate, "secret", body).await;
        assert_eq!((made.status, &made.json()["key"]["id"]), (200, &json!(id)), "{}", made.text);
        made.json()["secret"].as_str().expect("a secret").to_owned()
    };
    let second = new(3600).await;
    assert!(works(&first).await && works(&second).await && first != second);
    let third = new(0).await;
    assert!(!works(&first).await && !works(&second).await && works(&third).await);
    let path = format!("/v1/keys/{id}");
    let revoked = ask(&live, Method::DELETE, &path, "secret", Value::Null).await.json();
    assert!(revoked["revoked"].as_u64().is_some() && revoked.get("secret").is_none());
    assert!(!works(&third).await);
    let again = ask(&live, Method::POST, &rotate, "secret", json!({})).await;
    assert_eq!(again.error(), "409 key_revoked -");
    let list = ask(&live, Method::GET, "/v1/keys", "secret", Value::Null).await;
    assert_eq!(list.json()["data"][0]["id"], json!(id));
    for secret in [&first, &second, &third] {
        assert!(!list.text.contains(&secret[3..]), "a secret is shown once");
    }
    let nobody = ask(&live, Method::GET, "/v1/keys/key-0", "secret", Value::Null).await;
    assert_eq!(nobody.error(), "404 key_not_found id");
}

#[tokio::test]
async fn the_first_key_shuts_an_open_server_and_must_be_able_to_open_it() {
    let live = Live::start(&[]);
    let create = async |body: Value| live.post("/v1/keys", body).await;
    let weak = create(json!({"scopes": ["inference"]})).await;
    assert_eq!(weak.error(), "409 operator_key_missing -");
    let ends = create(json!({"scopes": ["admin"], "lifetime_seconds": 60})).await;
    assert_eq!(ends.error(), "409 operator_key_missing -");
    assert_eq!(live.get("/v1/models").await.status, 200, "a refusal changes nothing");
    let made = create(json!({"scopes": ["admin"]})).await.json();
    let admin = made["secret"].as_str().expect("a secret");
    assert_eq!(live.get("/v1/models").await.error(), "401 invalid_api_key -");
    let path = format!("/v1/keys/{}", made["key"]["id"].as_str().expect("an id"));
    assert_eq!(ask(&live, Method::DELETE, &path, admin, Value::Null).await.status, 200);
    // Nobody is left who could come in, and still the door is not open.
    assert_eq!(live.get("/v1/models").await.error(), "401 invalid_api_key -");
}

#[tokio::test]
async fn what_a_key_cannot_be_is_refused_by_field() {
    let live = Live::start(&["--api-key", "secret"]);
    for (body, expected) in [
        (json!({}), "400 missing_parameter scopes"),
        (json!({"scopes": []}), "400 invalid_value scopes"),
        (json!({"scopes": ["root"]}), "400 invalid_type scopes[0]"),
        (json!({"scopes": ["admin"], "tennant": "a"}), "400 unknown_parameter tennant"),
        (json!({"scopes": ["admin"], "tenant": "a b"}), "400 invalid_value tenant"),
        (json!({"scopes": ["admin"], "adapters": ["a"]}), "400 invalid_value adapters"),
        (json!({"scopes": ["admin"], "weight": 0}), "400 invalid_value weight"),
        (
            json!({"scopes": ["admin"], "limits": {"tokens_per_day": 0}}),
            "400 invalid_value tokens_per_day",
        ),
    ] {
        let answer = ask(&live, Method::POST, "/v1/keys", "secret", body.clone()).await;
        assert_eq!(answer.error(), expected, "{body}");
    }
}

#[tokio::test]
async fn tenants_share_no_prefix_pages_and_one_tenants_keys_do() {
    let live = Live::start(&["--api-key", "secret"]);
    let key = async |tenant: &str| {
        make(&live, json!({"scopes": ["inference"], "tenant": tenant})).await.0
    };
    let (acme, acme_too, globex) = (key("acme").await, key("acme").await, key("globex").await);
    let cached = async |key: &str| {
        let body = hello(BASE, 1);
        let answer = ask(&live, Method::POST, "/v1/chat/completions", key, body).await.json();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count")
    };
    assert_eq!(cached(&acme).await, 0);
    assert!(cached(&acme_too).await > 0, "positive control: reuse works at all");
    assert_eq!(cached(&globex).await, 0);
    assert_eq!(cached("secret").await, 0);
}

#[tokio::test]
async fn no_secret_reaches_the_log() {
    let log = tempfile::NamedTempFile::new().expect("a file");
    let out = log.reopen().expect("a file");
    let flags = ["--api-key", "bootstrap-hush", "--log-filter", "trace,hyper=info"];
    let live = Live::start_logging(&flags, out.into());
    let post =
        async |path: &str, key: &str, body: Value| ask(&live, Method::POST, path, key, body).await;
    let scopes = json!({"scopes": ["inference", "admin"]});
    let made = post("/v1/keys", "bootstrap-hush", scopes).await.json();
    let secret = made["secret"].as_str().expect("a secret").to_owned();
    let id = made["key"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(post("/v1/chat/completions", &secret, hello(BASE, 2)).await.status, 200);
    assert_eq!(upload_as(&live, &secret, "sql", 1).await.status, 201);
    assert_eq!(post("/v1/chat/completions", "wrong-hush", hello(BASE, 2)).await.status, 401);
    let path = format!("/v1/keys/{id}/rotate");
    let rotated = post(&path, &secret, json!({})).await.json();
    let newer = rotated["secret"].as_str().expect("a secret").to_owned();
    live.server.terminate();
    let said = std::fs::read_to_string(log.path()).expect("the log");
    assert!(said.contains("adapter published"), "the log was caught: {said}");
    for secret in [&secret[3..], &newer[3..], "bootstrap-hush", "wrong-hush"] {
        assert!(!said.contains(secret), "a secret is in the log");
    }
}
