//! Residency: a tenant that makes many adapters hot does not push out one that has few.

use super::{OPERATOR, ask, chat, get, key, number, upload};
use reqwest::Method;
use serde_json::{Value, json};
use support::live::Live;

async fn loads(live: &Live) -> u64 {
    let metrics = live.request(reqwest::Method::GET, "/metrics").bearer_auth(OPERATOR);
    let page = support::live::whole(metrics).await.text;
    let series = "polylora_adapter_loads_total ";
    let line = page.lines().find_map(|l| l.strip_prefix(series)).expect("the series");
    line.parse::<f64>().expect("a number") as u64
}

async fn version(live: &Live, key: &str, name: &str) -> Value {
    get(live, key, &format!("/v1/adapters/{name}")).await["versions"][0].clone()
}

#[tokio::test]
async fn a_tenant_with_many_hot_adapters_does_not_push_out_one_with_few() {
    let live = Live::start(&["--api-key", OPERATOR, "--adapter-bytes-max", "1MiB"]);
    let mallory = key(&live, "mallory", &["mallory-*", "shared-*"], json!({})).await;
    let canary = key(&live, "canary", &["canary-*"], json!({})).await;
    for n in 0..2 {
        assert_eq!(upload(&live, &canary, &format!("canary-{n}"), 32, 90 + n).await.status, 201);
    }
    // Half of them its own, half the operator's: who uses them is who holds them.
    let hot: Vec<String> = (0..12)
        .map(|n| if n % 2 == 0 { format!("mallory-{n}") } else { format!("shared-{n}") })
        .collect();
    for (n, name) in hot.iter().enumerate() {
        let who = if n % 2 == 0 { &mallory } else { OPERATOR };
        assert_eq!(upload(&live, who, name, 32, n as u64).await.status, 201);
    }
    let bytes = number(&version(&live, OPERATOR, "canary-0").await["resident_bytes"]);
    for n in 0..2 {
        assert_eq!(chat(&live, &canary, &format!("canary-{n}")).await.status, 200);
    }
    let (mut reloads, mut asked) = (0, 0);
    for _ in 0..3 {
        for name in &hot {
            assert_eq!(chat(&live, &mallory, name).await.status, 200);
        }
        let before = loads(&live).await;
        for n in 0..2 {
            assert_eq!(chat(&live, &canary, &format!("canary-{n}")).await.status, 200);
            asked += 1;
        }
        reloads += loads(&live).await - before;
    }
    let fit = (1 << 20) / bytes;
    assert_eq!(reloads, 0, "canary's two of {fit} places are its own");
    println!("memory for {fit} adapters, mallory uses 12 in turn: canary loaded {reloads}/{asked}");
}

#[tokio::test]
async fn one_that_needs_more_than_its_part_is_served_while_it_holds_nothing_else() {
    let live = Live::start(&["--api-key", OPERATOR, "--adapter-bytes-max", "1MiB"]);
    let large = key(&live, "large", &["large-*"], json!({})).await;
    let small = key(&live, "small", &["small-*"], json!({})).await;
    for n in 0..4 {
        assert_eq!(upload(&live, &small, &format!("small-{n}"), 32, n).await.status, 201);
    }
    // Of 1 MiB more than half.
    let put = upload(&live, &large, "large-a", 200, 70).await;
    assert_eq!(put.status, 201, "{}", put.text);
    assert!(number(&put.json()["resident_bytes"]) > 1 << 19);
    for _ in 0..2 {
        for n in 0..4 {
            assert_eq!(chat(&live, &small, &format!("small-{n}")).await.status, 200);
        }
        assert_eq!(chat(&live, &large, "large-a").await.status, 200);
    }
}

/// The same content as another tenant's does not say that the other uses it.
#[tokio::test]
async fn residency_shows_ones_own_use_only() {
    let live = Live::start(&["--api-key", OPERATOR, "--adapter-bytes-max", "1MiB"]);
    let acme = key(&live, "acme", &["acme-*"], json!({})).await;
    let globex = key(&live, "globex", &["globex-*"], json!({})).await;
    for (who, name) in [(&acme, "acme-same"), (&globex, "globex-same")] {
        assert_eq!(upload(&live, who, name, 32, 1).await.status, 201);
        assert_eq!(version(&live, who, name).await["resident"], true, "as any upload is");
    }
    // Others' adapters take all the room: acme's own, which brought the content in.
    for n in 0..12 {
        assert_eq!(upload(&live, &acme, &format!("acme-{n}"), 32, 10 + n).await.status, 201);
    }
    for (who, name) in [(&acme, "acme-same"), (&globex, "globex-same")] {
        assert_eq!(version(&live, who, name).await["resident"], false);
    }
    assert_eq!(chat(&live, &globex, "globex-same").await.status, 200);
    assert_eq!(version(&live, &globex, "globex-same").await["resident"], true);
    assert_eq!(version(&live, &acme, "acme-same").await["resident"], false);
    let list = get(&live, &acme, "/v1/adapters").await;
    let versions = list["data"].as_array().expect("versions").iter();
    let resident = versions.filter(|v| v["resident"] == true).map(|v| number(&v["resident_bytes"]));
    assert_eq!(number(&list["resident_bytes"]), resident.sum::<u64>(), "nor do sums");
}

/// Two that wait beyond their tenant's part give their place up to each other; what is in use all
/// the time makes room for them all the same.
#[tokio::test]
async fn one_tenants_requests_that_wait_for_memory_come_through() {
    let flags = ["--api-key", OPERATOR, "--resident-max", "1", "--adapter-patience-ms", "50"];
    let live = Live::start(&flags);
    let acme = key(&live, "acme", &["acme-*"], json!({})).await;
    for n in 0..3 {
        assert_eq!(upload(&live, &acme, &format!("acme-{n}"), 4, n).await.status, 201);
    }
    let over = std::sync::atomic::AtomicBool::new(false);
    let crowd = async || {
        let body = support::live::hello("acme-0", 200);
        while !over.load(std::sync::atomic::Ordering::Relaxed) {
            ask(&live, &acme, Method::POST, "/v1/chat/completions", body.clone()).await;
        }
    };
    let cold = async {
        let both = tokio::join!(chat(&live, &acme, "acme-1"), chat(&live, &acme, "acme-2"));
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        both
    };
    let (_, _, _, (one, two)) = tokio::join!(crowd(), crowd(), crowd(), cold);
    assert_eq!((one.status, two.status), (200, 200), "{} {}", one.text, two.text);
}
