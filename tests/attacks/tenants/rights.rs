//! A key that may use an adapter tries every route that changes one.

use super::{OPERATOR, ask, chat, get, key, upload};
use reqwest::Method;
use serde_json::{Value, json};
use support::live::Live;

/// Every way to change what `name`, or the alias `alias`, means.
fn changes(name: &str, alias: &str) -> Vec<(Method, String, Value)> {
    let adapter = format!("/v1/adapters/{name}");
    let weights = json!({"weights": {"acme-own@1": 1}});
    let merge = json!({"sources": [{"model": "acme-own"}], "method": "svd", "name": name,
                       "options": {"rank": 1}});
    vec![
        (Method::DELETE, adapter.clone(), Value::Null),
        (Method::DELETE, format!("{adapter}?drain_seconds=1"), Value::Null),
        (Method::DELETE, format!("/v1/models/{name}"), Value::Null),
        (Method::POST, format!("{adapter}/rollback"), json!({})),
        (Method::POST, format!("{adapter}/rollback"), json!({"version": 1})),
        (Method::POST, format!("{adapter}/pin"), json!({})),
        (Method::POST, format!("{adapter}/unpin"), json!({})),
        (Method::PUT, format!("/v1/aliases/{name}"), weights.clone()),
        (Method::PUT, format!("/v1/aliases/{alias}"), weights),
        (Method::POST, format!("/v1/aliases/{alias}/promote"), json!({"version": 1})),
        (Method::POST, format!("/v1/aliases/{alias}/rollback"), Value::Null),
        (Method::DELETE, format!("/v1/aliases/{alias}"), Value::Null),
        (Method::POST, "/v1/merges".to_owned(), merge),
        (Method::POST, "/v1/unload_lora_adapter".to_owned(), json!({"lora_name": name})),
        (
            Method::POST,
            "/v1/load_lora_adapter".to_owned(),
            json!({"lora_name": name, "lora_path": "/tmp", "load_inplace": true}),
        ),
    ]
}

/// What others get of a name: its versions, and the words of an answer.
async fn state(live: &Live, key: &str, name: &str) -> (Value, Value) {
    let shown = get(live, OPERATOR, &format!("/v1/adapters/{name}")).await;
    let versions = shown["versions"].as_array().expect("versions").clone();
    let fixed = ["id", "digest", "current", "pinned", "owner"];
    let versions = versions.iter().map(|v| fixed.map(|f| v[f].clone())).collect();
    let answer = chat(live, key, name).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    (versions, answer.json()["choices"].clone())
}

#[tokio::test]
async fn what_a_tenant_may_use_it_may_not_change() {
    let live = Live::start(&["--api-key", OPERATOR]);
    // As docs/keys.md has it.
    let acme = key(&live, "acme", &["acme-*", "shared-*"], json!({})).await;
    let globex = key(&live, "globex", &["globex-*", "shared-*"], json!({})).await;
    assert_eq!(upload(&live, &acme, "acme-own", 4, 9).await.status, 201);
    let mut refused = 0;
    // The operator's, and another tenant's.
    for (n, (name, owner)) in [("shared-sql", OPERATOR), ("shared-web", &globex)].iter().enumerate()
    {
        for seed in [1, 2] {
            let put = upload(&live, owner, name, 4, 10 * n as u64 + seed).await;
            assert!(put.status < 300, "{}", put.text);
        }
        let alias = format!("{name}-prod");
        for weights in [json!({"1": 1, "2": 1}), json!({"1": 1, "2": 3})] {
            let body = json!({"adapter": name, "weights": weights});
            let put = ask(&live, owner, Method::PUT, &format!("/v1/aliases/{alias}"), body).await;
            assert!(put.status < 300, "{}", put.text);
        }
        let before = state(&live, &globex, name).await;
        let led = get(&live, OPERATOR, &format!("/v1/aliases/{alias}")).await;
        for (method, path, body) in changes(name, &alias) {
            let answer = ask(&live, &acme, method.clone(), &path, body).await;
            assert_eq!(answer.status, 403, "{method} {path}: {}", answer.text);
            if !path.contains("lora_adapter") {
                assert_eq!(answer.error(), "403 name_not_allowed name", "{method} {path}");
            }
            refused += 1;
        }
        let put = upload(&live, &acme, name, 4, 99).await;
        assert_eq!(put.error(), "403 name_not_allowed name");
        refused += 1;
        assert_eq!(state(&live, &globex, name).await, before, "{name}");
        assert_eq!(get(&live, OPERATOR, &format!("/v1/aliases/{alias}")).await, led);
        assert_eq!(chat(&live, &acme, name).await.status, 200, "it may still use it");
    }
    println!("{refused} changes of 2 names and 2 aliases by a tenant that may use them: all 403");
}

#[tokio::test]
async fn a_tenant_changes_what_is_its_own_and_what_it_was_given() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let acme = key(&live, "acme", &["acme-*", "shared-*"], json!({})).await;
    let second = key(&live, "acme", &["acme-*"], json!({})).await;
    let globex = key(&live, "globex", &["shared-*"], json!({})).await;
    let given = json!({"manage": ["shared-sql", "other"]});
    let given = key(&live, "globex", &["shared-*"], given).await;
    let nothing = key(&live, "acme", &["acme-*"], json!({"manage": []})).await;
    let owner = async |key: &str, name: &str| {
        get(&live, key, &format!("/v1/adapters/{name}")).await["versions"][0]["owner"].clone()
    };
    let delete = async |key: &str, name: &str| {
        let path = format!("/v1/adapters/{name}");
        ask(&live, key, Method::DELETE, &path, Value::Null).await.status
    };
    assert_eq!(upload(&live, OPERATOR, "shared-sql", 4, 1).await.status, 201);
    // Own names, by whichever key of the tenant; new ones that nobody has.
    for (key, name, status) in [
        (&acme, "acme-a", 201),
        (&second, "acme-a", 200),
        (&acme, "shared-new", 201),
        (&globex, "shared-new", 403),
        (&globex, "shared-sql", 403),
        (&given, "shared-sql", 200),
        (&given, "other", 201),
        (&given, "shared-other", 403),
        (&nothing, "acme-b", 403),
        (&nothing, "acme-a", 403),
    ] {
        let put = upload(&live, key, name, 4, 20 + u64::from(status)).await;
        assert_eq!(put.status, status, "{name}: {}", put.text);
    }
    assert_eq!(chat(&live, &given, "other").await.status, 200, "what it manages it also sees");
    assert_eq!(owner(OPERATOR, "shared-new").await, "acme");
    assert_eq!(owner(&acme, "shared-new").await, "acme");
    assert_eq!(owner(&globex, "shared-new").await, Value::Null, "another's is not told");
    assert_eq!(owner(OPERATOR, "shared-sql").await, Value::Null, "a change is no new owner");
    // What a tenant gives up is anybody's; what the operator takes away stays the operator's.
    assert_eq!(delete(&acme, "shared-new").await, 200);
    assert_eq!(upload(&live, &globex, "shared-new", 4, 5).await.status, 201);
    assert_eq!(owner(OPERATOR, "shared-new").await, "globex");
    assert_eq!(delete(OPERATOR, "shared-sql").await, 200);
    let grabbed = upload(&live, &acme, "shared-sql", 4, 6).await;
    assert_eq!(grabbed.error(), "403 name_not_allowed name");
    let live = live.crash_and_restart(&["--api-key", OPERATOR]);
    assert_eq!(upload(&live, &acme, "shared-sql", 4, 6).await.status, 403, "also after a restart");
    assert_eq!(upload(&live, &acme, "acme-a", 4, 7).await.status, 200, "what is its own is so too");
    assert_eq!(upload(&live, &acme, "shared-new", 4, 7).await.status, 403);
}

#[tokio::test]
async fn an_alias_of_who_may_only_use_a_name_does_not_keep_it() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let owner = key(&live, "globex", &["shared-*"], json!({})).await;
    let mallory = key(&live, "mallory", &["mallory-*", "shared-*"], json!({})).await;
    for name in ["shared-a", "shared-b"] {
        assert_eq!(upload(&live, &owner, name, 4, 1).await.status, 201);
    }
    let alias = async |key: &str, name: &str, target: &str| {
        let body = json!({"weights": {target: 1}});
        let put = ask(&live, key, Method::PUT, &format!("/v1/aliases/{name}"), body).await;
        assert_eq!(put.status, 201, "{}", put.text);
    };
    alias(&mallory, "mallory-x", "shared-a@1").await;
    alias(&owner, "shared-prod", "shared-b@1").await;
    let delete = async |name: &str| {
        let path = format!("/v1/adapters/{name}");
        ask(&live, &owner, Method::DELETE, &path, Value::Null).await
    };
    assert_eq!(delete("shared-a").await.status, 200);
    assert_eq!(chat(&live, &mallory, "mallory-x").await.status, 404);
    assert_eq!(delete("shared-b").await.error(), "409 adapter_aliased name");
}
