//! Web pages in the operator's browser: names that rebind, foreign origins, forms; and those that
//! an operator lets in.

use super::{exchange, header, outcome, request};
use serde_json::{Value, json};
use std::process::Command;
use support::live::{BASE, Live, hello, with};

const JSON: &str = "Content-Type: application/json\r\n";

/// Twelve routes with a body that each would take.
fn routes() -> Vec<(&'static str, String)> {
    let chat = hello(BASE, 1).to_string();
    let plain = json!({"model": BASE, "prompt": "hi", "max_tokens": 1}).to_string();
    let empty = || "{}".to_owned();
    vec![
        ("POST /v1/chat/completions", chat),
        ("POST /v1/completions", plain),
        ("POST /tokenize", json!({"prompt": "hi"}).to_string()),
        ("POST /v1/keys", json!({"scopes": ["admin", "inference", "metrics"]}).to_string()),
        ("POST /v1/merges", json!({"sources": [{"model": "sql"}], "dry_run": true}).to_string()),
        ("POST /v1/merges/merge-x/cancel", empty()),
        ("POST /v1/adapters/sql/pin", empty()),
        ("POST /v1/adapters/sql/rollback", empty()),
        ("POST /v1/aliases/prod/rollback", empty()),
        ("POST /v1/load_lora_adapter", json!({"lora_name": "e", "lora_path": "/"}).to_string()),
        ("POST /v1/unload_lora_adapter", json!({"lora_name": "sql"}).to_string()),
        ("DELETE /v1/adapters/sql", String::new()),
    ]
}

/// Six shapes in which a page can send them: host, headers, whether the body stays.
fn shapes(own: &str) -> Vec<(&'static str, String, String, &'static str)> {
    let mine = format!("http://{own}");
    let from = |origin: &str, more: &str| format!("Origin: {origin}\r\n{more}");
    vec![
        ("rebinding", "evil.example:8080".into(), from("http://evil.example:8080", JSON), "host"),
        ("another origin", own.into(), from("http://localhost:3000", JSON), "origin"),
        ("a sandboxed page", own.into(), from("null", JSON), "origin"),
        (
            "a form",
            own.into(),
            from("https://evil.example", "Content-Type: application/x-www-form-urlencoded\r\n"),
            "origin",
        ),
        ("plain text", own.into(), from(&mine, "Content-Type: text/plain\r\n"), "type"),
        (
            "without origin",
            own.into(),
            format!("Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n{JSON}"),
            "origin",
        ),
    ]
}

async fn with_alias(live: &Live) {
    assert_eq!(live.upload("sql", 1).await.status, 201);
    assert_eq!(live.upload("sql", 2).await.status, 200);
    for version in ["1", "2"] {
        let body = json!({"adapter": "sql", "weights": {version: 1}}).to_string();
        let put = request("PUT /v1/aliases/prod", "localhost", JSON, &body);
        assert!(outcome(&exchange(live, &put)).starts_with('2'));
    }
}

#[tokio::test]
async fn no_page_of_another_site_does_anything_on_an_open_server() {
    let live = Live::start(&[]);
    with_alias(&live).await;
    let state = async || {
        let adapters = live.get("/v1/adapters").await.json();
        let alias = live.get("/v1/aliases/prod").await.json();
        let keys = live.get("/v1/keys").await.json();
        let versions = &adapters["data"].as_array().expect("a list").len();
        (*versions, alias["weights"].clone(), keys)
    };
    let before = state().await;
    let own = live.server.url.strip_prefix("http://").expect("http").to_owned();
    let (mut refused, mut wrong) = (0, Vec::new());
    for (line, body) in routes() {
        for (shape, host, headers, why) in shapes(&own) {
            let expected = match why {
                "host" => "403 host_not_allowed",
                "origin" => "403 origin_not_allowed",
                // A page cannot send DELETE without asking first.
                _ if line.starts_with("DELETE") => continue,
                _ => "415 unsupported_media_type",
            };
            let answer = exchange(&live, &request(line, &host, &headers, &body));
            refused += usize::from(outcome(&answer) == expected);
            if outcome(&answer) != expected {
                wrong.push(format!("{line}, {shape}: {}", outcome(&answer)));
            }
            assert_eq!(header(&answer, "access-control-allow-origin"), "");
        }
    }
    assert!(wrong.is_empty(), "{refused} refused, but not\n{}", wrong.join("\n"));
    assert_eq!(refused, 12 * 6 - 1);
    assert_eq!(state().await, before, "nothing was changed");
}

#[tokio::test]
async fn other_ways_to_hide_where_a_request_comes_from_are_refused() {
    let live = Live::start(&[]);
    let own = live.server.url.strip_prefix("http://").expect("http").to_owned();
    for host in ["", "169.254.169.254", "0.0.0.0", "localhost.evil.example", "127.0.0.1.nip.io"] {
        let answer = exchange(&live, &request("GET /v1/models", host, "", ""));
        assert_eq!(outcome(&answer), "403 host_not_allowed", "{host}");
    }
    for head in [
        "GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nHost: [::1]\r\n\r\n",
    ] {
        assert_eq!(outcome(&exchange(&live, head.as_bytes())), "400 missing_host", "{head}");
    }
    let whole = request("GET http://evil.example/v1/models", &own, "", "");
    assert_eq!(outcome(&exchange(&live, &whole)), "403 host_not_allowed");
    let two = format!("Origin: http://{own}\r\nOrigin: http://evil.example\r\n");
    let two = exchange(&live, &request("GET /v1/models", &own, &two, ""));
    assert_eq!(outcome(&two), "403 origin_not_allowed");
    let asked = "Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n";
    let asked = exchange(&live, &request("OPTIONS /v1/chat/completions", &own, asked, ""));
    assert_eq!(outcome(&asked), "403 origin_not_allowed");
    // Reading is refused as well, and health probes may call the server what they like.
    let read = request("GET /v1/models", &own, "Origin: http://evil.example\r\n", "");
    assert_eq!(outcome(&exchange(&live, &read)), "403 origin_not_allowed");
    for path in ["GET /live", "GET /ready", "GET /health"] {
        assert_eq!(outcome(&exchange(&live, &request(path, "10.1.2.3:8080", "", ""))), "200");
    }
    let message = exchange(&live, &request("GET /v1/models", "box.lan:80", "", ""));
    assert!(message.contains("--allow-hosts") && message.contains("box.lan"), "{message}");
}

#[tokio::test]
async fn what_people_use_is_not_in_the_way() {
    let live = Live::start(&["--allow-hosts", "box.lan,*.corp.example"]);
    with_alias(&live).await;
    let own = live.server.url.strip_prefix("http://").expect("http").to_owned();
    let chat = hello(BASE, 1).to_string();
    let post = |host: &str, headers: &str| {
        outcome(&exchange(&live, &request("POST /v1/chat/completions", host, headers, &chat)))
    };
    let port = own.rsplit(':').next().expect("a port");
    let local = format!("localhost:{port}");
    for host in [own.as_str(), &local, "[::1]:8080", "box.lan", "a.corp.example:443"] {
        assert_eq!(post(host, JSON), "200", "{host}");
    }
    // curl, OpenAI's clients for Python and Node (whose fetch names a mode), the page's own script.
    for headers in [
        "User-Agent: curl/8.5.0\r\nAccept: */*\r\n".to_owned(),
        "Authorization: Bearer none\r\nX-Stainless-Lang: python\r\nX-Stainless-Os: Linux\r\n"
            .into(),
        "Sec-Fetch-Mode: cors\r\nAccept-Language: *\r\nUser-Agent: node\r\n".into(),
        format!("Origin: http://{own}\r\nSec-Fetch-Site: same-origin\r\n"),
    ] {
        assert_eq!(post(&own, &format!("{headers}{JSON}")), "200", "{headers}");
    }
    // A link on another site may lead to the documentation; HTTP/1.0 needs no host.
    let link = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n";
    assert_eq!(outcome(&exchange(&live, &request("GET /docs", &own, link, ""))), "200");
    assert_eq!(outcome(&exchange(&live, b"GET /v1/models HTTP/1.0\r\n\r\n")), "200");
    // What changes something and needs no body.
    let roll = request("POST /v1/aliases/prod/rollback", &own, "", "");
    assert_eq!(outcome(&exchange(&live, &roll)), "200");
    let program = support::command::program();
    for args in [
        ["chat", "--url", &live.server.url, "--model-name", BASE, "--max-tokens", "2", "Hi"],
        [
            "chat",
            "--url",
            &format!("http://{local}"),
            "--model-name",
            BASE,
            "--max-tokens",
            "2",
            "Hi",
        ],
    ] {
        let done = Command::new(program).args(args).output().expect("it runs");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
}

#[tokio::test]
async fn with_keys_neither_host_nor_origin_matters_and_the_type_does() {
    let live = Live::start(&["--api-key", "secret"]);
    let key = "Authorization: Bearer secret\r\nOrigin: http://evil.example\r\n";
    let chat = hello(BASE, 1).to_string();
    let post = |line: &str, kind: &str, body: &str| {
        exchange(&live, &request(line, "api.example", &format!("{key}{kind}"), body))
    };
    let answer = post("POST /v1/chat/completions", JSON, &chat);
    assert_eq!(outcome(&answer), "200");
    assert_eq!(header(&answer, "access-control-allow-origin"), "", "it may not be read");
    for kind in [
        "",
        "Content-Type: text/plain\r\n",
        "Content-Type: text/plain; application/json\r\n",
        "Content-Type: application/json\r\nContent-Type: application/json\r\n",
    ] {
        for (line, body) in routes() {
            if !line.starts_with("DELETE") {
                assert_eq!(outcome(&post(line, kind, &body)), "415 unsupported_media_type");
            }
        }
    }
    let form = "Content-Type: application/x-www-form-urlencoded\r\n";
    let empty = post("POST /v1/aliases/prod/rollback", form, "");
    assert_eq!(outcome(&empty), "415 unsupported_media_type");
}

#[tokio::test]
async fn an_allowed_origin_asks_first_and_reads_answers_errors_and_streams() {
    let page = "https://chat.example";
    let live = Live::start(&["--api-key", "secret", "--allow-origins", page]);
    let origin = format!("Origin: {page}\r\n");
    let asked = format!(
        "{origin}Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: \
         authorization,content-type,x-stainless-os\r\n"
    );
    let answer = exchange(&live, &request("OPTIONS /v1/adapters/sql", "x", &asked, ""));
    assert_eq!(outcome(&answer), "204", "without a key: {answer}");
    for (name, value) in [
        ("access-control-allow-origin", page),
        ("access-control-allow-methods", "GET, PUT, DELETE"),
        ("access-control-allow-headers", "authorization,content-type,x-stainless-os"),
        ("access-control-max-age", "7200"),
        ("vary", "origin"),
        ("access-control-allow-credentials", ""),
    ] {
        assert_eq!(header(&answer, name), value, "{name}");
    }
    let key = format!("{origin}Authorization: Bearer secret\r\n{JSON}");
    let stream = with(hello(BASE, 2), json!({"stream": true})).to_string();
    for (headers, body, expected) in [
        (&key, hello(BASE, 1).to_string(), "200"),
        (&key, stream, "200"),
        (&key, "{".to_owned(), "400 invalid_json"),
        (&origin, hello(BASE, 1).to_string(), "401 invalid_api_key"),
    ] {
        let answer = exchange(&live, &request("POST /v1/chat/completions", "x", headers, &body));
        assert_eq!(outcome(&answer), expected);
        assert_eq!(header(&answer, "access-control-allow-origin"), page);
        assert!(header(&answer, "access-control-expose-headers").contains("x-request-id"));
        assert_eq!(header(&answer, "cross-origin-resource-policy"), "cross-origin");
    }
    for other in ["https://chat.example.evil", "http://chat.example", "null"] {
        let asked = asked.replace(page, other);
        let refused = exchange(&live, &request("OPTIONS /v1/adapters/sql", "x", &asked, ""));
        assert_eq!(outcome(&refused), "401 invalid_api_key", "{other}");
        assert_eq!(header(&refused, "access-control-allow-origin"), "", "{other}");
    }
    let nowhere = exchange(&live, &request("OPTIONS /v1/nothing", "x", &asked, ""));
    assert_eq!(outcome(&nowhere), "401 invalid_api_key");
}

#[tokio::test]
async fn every_answer_tells_browsers_to_guess_frame_and_run_nothing() {
    let live = Live::start(&[]);
    for path in ["/docs", "/openapi.json", "/metrics", "/v1/models", "/nothing", "/live"] {
        let answer = live.get(path).await;
        for (name, value) in [
            ("x-content-type-options", "nosniff"),
            ("x-frame-options", "DENY"),
            ("referrer-policy", "no-referrer"),
            ("cross-origin-resource-policy", "same-origin"),
        ] {
            assert_eq!(answer.header(name), value, "{path} {name}");
        }
        let policy = answer.header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'"), "{path}: {policy}");
        assert!(policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"));
        assert_eq!(policy.contains("script-src 'sha256-"), path == "/docs", "{policy}");
    }
}

#[tokio::test]
async fn counts_of_requests_are_told_to_those_who_may_send_some() {
    let open = Live::start(&[]);
    let keyed = Live::start(&["--api-key", "secret"]);
    for path in ["/live", "/ready", "/health"] {
        assert_eq!(open.get(path).await.json()["running"], 0);
        assert_eq!(keyed.get(path).await.json().get("running"), None, "{path}");
        let wrong = keyed.request(reqwest::Method::GET, path).bearer_auth("no");
        assert_eq!(support::live::whole(wrong).await.json().get("waiting"), None);
        let right = keyed.request(reqwest::Method::GET, path).bearer_auth("secret");
        let right: Value = support::live::whole(right).await.json();
        assert_eq!((&right["running"], &right["waiting"]), (&json!(0), &json!(0)));
    }
}

#[test]
fn settings_that_would_open_too_much_stop_the_start() {
    let data = tempfile::tempdir().expect("a directory");
    for (flag, value, told) in [
        ("--allow-origins", "*", "set an API key"),
        ("--allow-origins", "chat.example", "scheme"),
        ("--allow-hosts", "http://box.lan", "host names"),
    ] {
        let start = Command::new(support::command::program())
            .args(["serve", "--model", "nowhere", flag, value, "--data-dir"])
            .arg(data.path())
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&start.stderr).into_owned();
        assert_eq!(start.status.code(), Some(2), "{said}");
        assert!(said.contains(told) && said.contains(&flag[2..].replace('-', "_")), "{said}");
    }
}
