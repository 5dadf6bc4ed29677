//! Names, disk and pins: a greedy tenant takes all it can get, the other keeps its share.

use super::{OPERATOR, ask, chat, get, key, number, upload, upload_all};
use reqwest::Method;
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use support::live::Live;

#[tokio::test]
async fn names_are_shared_by_tenants() {
    let live = Live::start(&["--api-key", OPERATOR, "--adapters-max", "12"]);
    let mallory = key(&live, "mallory", &["mallory-*"], json!({})).await;
    let more = key(&live, "mallory", &["mallory2-*"], json!({})).await;
    let canary = key(&live, "canary", &["canary-*"], json!({})).await;
    let (taken, refused) = upload_all(&live, &mallory, "mallory", 1).await;
    assert_eq!(refused.error(), "507 tenant_share_exceeded -");
    assert_eq!(taken, 6, "half of 12");
    // Neither another key of the same tenant nor aliases are a way around.
    assert_eq!(upload(&live, &more, "mallory2-x", 1, 1).await.status, 507);
    let alias = json!({"weights": {"mallory-0@1": 1}});
    let alias = ask(&live, &mallory, Method::PUT, "/v1/aliases/mallory-alias", alias).await;
    assert_eq!(alias.error(), "507 tenant_share_exceeded -");
    let order = json!({"sources": [{"model": "mallory-0"}], "method": "svd", "name": "mallory-m"});
    let order = ask(&live, &mallory, Method::POST, "/v1/merges", order).await;
    assert_eq!(order.error(), "507 tenant_share_exceeded -");
    assert_eq!(upload(&live, &mallory, "mallory-0", 1, 77).await.status, 200, "versions are free");
    let (kept, _) = upload_all(&live, &canary, "canary", 1).await;
    assert_eq!(kept, 3, "half of the rest");
    let (rest, refused) = upload_all(&live, OPERATOR, "ops", 1).await;
    assert_eq!((rest, refused.error().as_str()), (3, "507 adapter_limit_reached -"));
    println!("names, 12: mallory {taken}, canary {kept}, then the operator {rest}");
}

#[tokio::test]
async fn a_keys_own_bounds_are_for_all_that_its_tenant_holds() {
    let live = Live::start(&["--api-key", OPERATOR]);
    let free = key(&live, "acme", &["acme-*"], json!({})).await;
    let put = upload(&live, &free, "acme-free", 8, 1).await.json();
    let (file, resident) = (number(&put["file_bytes"]), number(&put["resident_bytes"]));
    let bounded =
        async |limits: Value| key(&live, "acme", &["acme-*"], json!({"limits": limits})).await;
    let names = bounded(json!({"adapters_max": 3})).await;
    let (taken, refused) = upload_all(&live, &names, "acme-n", 1).await;
    assert_eq!((taken, refused.error().as_str()), (2, "507 tenant_share_exceeded -"));
    for n in 0..2 {
        let path = format!("/v1/adapters/acme-n-{n}");
        assert_eq!(ask(&live, &names, Method::DELETE, &path, Value::Null).await.status, 200);
    }
    // 3 and a half: one is there, two more fit, by versions as by names.
    let disk = bounded(json!({"disk_bytes_max": 7 * file / 2})).await;
    for (name, seed, status) in [("acme-d", 2, 201), ("acme-d", 3, 200), ("acme-e", 4, 507)] {
        let put = upload(&live, &disk, name, 8, seed).await;
        assert_eq!(put.status, status, "{}", put.text);
    }
    let memory = bounded(json!({"resident_bytes_max": 3 * resident / 2})).await;
    let pin = async |name: &str| {
        let path = format!("/v1/adapters/{name}/pin");
        ask(&live, &memory, Method::POST, &path, json!({})).await
    };
    assert_eq!(pin("acme-free").await.status, 200);
    assert_eq!(pin("acme-d").await.error(), "507 tenant_share_exceeded -");
    let little = bounded(json!({"resident_bytes_max": resident / 2})).await;
    let chat = chat(&live, &little, "acme-d@1").await;
    assert!(chat.status == 200 || chat.error().starts_with("507 tenant"), "{}", chat.text);
    let name = json!({"adapters_max": 3});
    let of_name = ask(&live, OPERATOR, Method::PUT, "/v1/limits/acme-d", name).await;
    assert_eq!(of_name.error(), "400 invalid_value adapters_max");
    println!("own bounds: 3 names, 3.5 adapters of disk, 1.5 of memory: 3, 3 and 1 held");
}

#[tokio::test]
async fn pins_are_shared_by_tenants() {
    let live = Live::start(&["--api-key", OPERATOR, "--adapter-bytes-max", "1MiB"]);
    let mallory = key(&live, "mallory", &["mallory-*"], json!({})).await;
    let canary = key(&live, "canary", &["canary-*"], json!({})).await;
    let mut bytes = 0;
    for n in 0..12 {
        let put = upload(&live, &mallory, &format!("mallory-{n}"), 32, n + 1).await;
        assert_eq!(put.status, 201, "{}", put.text);
        bytes = number(&put.json()["resident_bytes"]);
    }
    let pin = async |key: &str, name: &str| {
        ask(&live, key, Method::POST, &format!("/v1/adapters/{name}/pin"), json!({})).await
    };
    let (mut pinned, mut refused) = (0, 0);
    for n in 0..12 {
        let answer = pin(&mallory, &format!("mallory-{n}")).await;
        match answer.status {
            200 => pinned += 1,
            _ => {
                assert_eq!(answer.error(), "507 tenant_share_exceeded -");
                refused += 1;
            }
        }
    }
    assert_eq!(pinned, ((1 << 20) / bytes).div_ceil(2), "half of what there is");
    assert_eq!(upload(&live, &canary, "canary-a", 32, 50).await.status, 201);
    assert_eq!(pin(&canary, "canary-a").await.status, 200);
    assert_eq!(chat(&live, &canary, "canary-a").await.status, 200);
    println!("pins of {bytes} bytes in 1 MiB: mallory {pinned}, {refused} refused; canary 1 of 1");
}

#[tokio::test]
async fn pins_that_are_asked_for_together_share_as_well() {
    let live = Live::start(&["--api-key", OPERATOR, "--adapter-bytes-max", "1MiB"]);
    let mallory = key(&live, "mallory", &["mallory-*"], json!({})).await;
    let mut bytes = 0;
    for n in 0..8 {
        let put = upload(&live, &mallory, &format!("mallory-{n}"), 32, n + 1).await;
        assert_eq!(put.status, 201, "{}", put.text);
        bytes = number(&put.json()["resident_bytes"]);
    }
    let paths: Vec<_> = (0..8).map(|n| format!("/v1/adapters/mallory-{n}/pin")).collect();
    let pins = paths.iter().map(|path| ask(&live, &mallory, Method::POST, path, json!({})));
    let answers = futures::future::join_all(pins).await;
    let pinned = answers.iter().filter(|answer| answer.status == 200).count() as u64;
    assert_eq!(pinned, ((1 << 20) / bytes).div_ceil(2), "half of what there is");
    println!("8 pins at once: {pinned} came through");
}

/// A small file system below the server's data directory, where this process may mount one.
fn small_disk(live: Live) -> Result<(tempfile::TempDir, Mounted), tempfile::TempDir> {
    let dir = live.crash();
    let data = dir.path().join("data");
    std::fs::remove_dir_all(&data).expect("removed");
    std::fs::create_dir(&data).expect("made");
    let options = ["-t", "tmpfs", "-o", "size=16m", "tmpfs"];
    let mounted = Command::new("mount").args(options).arg(&data).stderr(Stdio::null()).status();
    let mounted = mounted.is_ok_and(|s| s.success());
    if mounted { Ok((dir, Mounted(data))) } else { Err(dir) }
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn the_disk_is_shared_by_tenants() {
    let flags = ["--api-key", OPERATOR];
    let Ok((dir, _disk)) = small_disk(Live::start(&flags)) else {
        println!("not tried: this process may not mount a small disk");
        return;
    };
    let live = Live::start_in(dir, &flags, Stdio::inherit());
    let mallory = key(&live, "mallory", &["mallory-*"], json!({})).await;
    let canary = key(&live, "canary", &["canary-*"], json!({})).await;
    let (taken, refused) = upload_all(&live, &mallory, "mallory", 256).await;
    assert_eq!(refused.error(), "507 tenant_share_exceeded -");
    let list = get(&live, OPERATOR, "/v1/adapters").await;
    let file = number(&list["data"][0]["file_bytes"]);
    let (kept, refused) = upload_all(&live, &canary, "canary", 256).await;
    assert_eq!(refused.error(), "507 tenant_share_exceeded -");
    // Mallory leaves as much as it has, and canary gets half of that; the databases and the reserve
    // of a sixteenth take some.
    assert!((taken + 1) * file <= 8 << 20, "{taken} of {file} bytes are not more than half");
    assert!(kept >= 2 && taken >= kept, "canary {kept}, mallory {taken}");
    // The rest is the operator's but for the reserve, in which the databases still write.
    let (rest, refused) = upload_all(&live, OPERATOR, "ops", 256).await;
    assert_eq!(refused.error(), "507 disk_nearly_full -");
    assert_eq!(chat(&live, &canary, "canary-0").await.status, 200);
    let made = key(&live, "late", &["late-*"], json!({})).await;
    assert_eq!(ask(&live, &made, Method::GET, "/v1/adapters", Value::Null).await.status, 200);
    println!("disk of 16 MiB, {file} bytes each: mallory {taken}, canary {kept}, operator {rest}");
}
