//! Routes beside the answers: the key, health, models, metrics, documentation.

use reqwest::Method;
use serde_json::Value;
use support::live::{BASE, Live, hello, whole};

#[tokio::test]
async fn a_key_guards_every_route_but_liveness() {
    let live = Live::start(&["--api-key", "secret"]);
    let ask = async |method: Method, path: &str, key: Option<&str>| {
        let mut request = live.request(method, path);
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        whole(request).await
    };
    let document = ask(Method::GET, "/openapi.json", Some("Bearer secret")).await.json();
    let mut routes = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            routes += 1;
            let method: Method = method.to_ascii_uppercase().parse().unwrap();
            let path = path.replace("{name}", "x").replace("{id}", "x");
            let public = ["/live", "/ready", "/health"].contains(&path.as_str());
            for key in [None, Some("Bearer wrong"), Some("Basic secret"), Some("Bearer ")] {
                let answer = ask(method.clone(), &path, key).await;
                if public {
                    assert_eq!(answer.status, 200, "{path}");
                } else {
                    assert_eq!(answer.error(), "401 invalid_api_key -", "{method} {path} {key:?}");
                    assert_eq!(answer.json()["error"]["type"], "authentication_error");
                    assert_eq!(answer.header("www-authenticate"), "Bearer");
                }
            }
            let right = ask(method.clone(), &path, Some("Bearer secret")).await;
            assert_ne!(right.status, 401, "{method} {path}");
        }
    }
    assert!(routes >= 15, "{routes}");
    for path in ["/docs", "/openapi.json", "/nothing"] {
        assert_eq!(ask(Method::GET, path, None).await.status, 401, "{path}");
    }
}

#[tokio::test]
async fn every_answer_carries_a_request_id_and_a_sane_one_is_kept() {
    let live = Live::start(&[]);
    let with_id = async |id: &str| {
        let request = live.request(Method::GET, "/health").header("x-request-id", id);
        whole(request).await.header("x-request-id").to_owned()
    };
    assert_eq!(with_id("abc-1:2.3_4").await, "abc-1:2.3_4");
    for odd in ["a b", "<script>", &"a".repeat(129)] {
        assert!(with_id(odd).await.starts_with("req-"), "{odd}");
    }
    assert!(live.get("/nothing").await.header("x-request-id").starts_with("req-"));
}

#[tokio::test]
async fn models_are_the_base_and_the_adapters_that_can_be_asked_for() {
    let live = Live::start(&[]);
    live.upload("sql", 1).await;
    let list = live.get("/v1/models").await.json();
    let models = list["data"].as_array().unwrap();
    let ids: Vec<&str> = models.iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [BASE, "sql"]);
    assert!(models[0]["parent"].is_null());
    assert_eq!(models[1]["parent"], BASE);
    assert_eq!(models[1]["root"], BASE);
    for model in models {
        assert_eq!(model["object"], "model");
        assert_eq!(model["owned_by"], "polylora");
        assert!(model["created"].as_u64().is_some_and(|t| t > 1_700_000_000));
    }
    let one = live.get("/v1/models/sql@1").await.json();
    assert_eq!((one["id"].as_str(), &one["polylora"]["version"]), (Some("sql@1"), &Value::from(1)));
    assert_eq!(live.get("/v1/models/tiny").await.json()["polylora"]["kind"], "base");
    assert_eq!(live.get("/v1/models/tiny%3Asql").await.json()["id"], "tiny:sql");
}

#[tokio::test]
async fn health_version_metrics_and_docs_answer() {
    let live = Live::start(&[]);
    live.chat(hello(BASE, 3)).await;
    live.chat(hello("nobody", 3)).await;
    for path in ["/live", "/ready", "/health"] {
        assert_eq!(live.get(path).await.json()["status"], "ok", "{path}");
    }
    let version = live.get("/version").await.json();
    assert_eq!(version["base"], BASE);
    assert!(version["base_digest"].as_str().unwrap().starts_with("sha256:"));
    assert!(version["device"].as_str().unwrap().starts_with("cpu"), "{version}");
    let route = "polylora_http_requests_total{route=\"/v1/chat/completions\",status=";
    assert_eq!(live.metric(&format!("{route}\"200\"}}")).await, 1.0);
    assert_eq!(live.metric(&format!("{route}\"404\"}}")).await, 1.0);
    // The engine counts after it has answered.
    let generated = async || live.metric("polylora_generation_tokens_total").await == 3.0;
    live.until("three tokens", generated).await;
    let docs = live.get("/docs").await;
    assert!(docs.header("content-type").starts_with("text/html"));
    let links = docs.text.matches("http").count();
    assert_eq!(links, 0, "the page needs nothing from elsewhere");
    let document = live.get("/openapi.json").await.json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let fields = &document["components"]["schemas"]["SamplingFields"]["properties"];
    assert!(fields["temperature"]["description"].as_str().is_some());
}
