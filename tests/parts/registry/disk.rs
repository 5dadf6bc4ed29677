//! What is on disk: content and digests, restarts, damage, staging and names.

use super::{Fixture, code_of, open, options, publish, until};
use polylora::adapters::version::{Publish, Removal};
use polylora::error::Kind;
use std::path::Path;
use std::sync::atomic::Ordering;
use support::files::Files;

#[tokio::test]
async fn the_digest_is_of_content_and_not_of_names_or_neighbours() {
    let fixture = Fixture::new().await;
    let staging = fixture.registry.stage("a").unwrap();
    Files::plain(1).write(&staging.dir);
    std::fs::write(staging.dir.join("README.md"), "hello").unwrap();
    std::fs::create_dir(staging.dir.join("logs")).unwrap();
    let how = Publish::default();
    let first = fixture.registry.publish(staging, how).await.unwrap();
    let dir = fixture.dir.path().join("adapters/sha256");
    let hex = hex::encode(first.version.digest.0);
    let files = std::fs::read_dir(dir.join(&hex[..2]).join(&hex)).unwrap();
    let mut names: Vec<_> = files.map(|f| f.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors"]);
    let second = fixture.put("b", 1).await;
    assert_eq!(first.version.digest, second.version.digest);
    assert_ne!(fixture.put("c", 2).await.version.digest, first.version.digest);
    // Two names, one content: one blob, one slot, one load, one probe.
    let probes = fixture.seen.probes.load(Ordering::SeqCst);
    assert_eq!((fixture.blobs(), fixture.counts().0, probes), (2, 2, 2));
    fixture.registry.delete("a", Removal::default()).await.unwrap();
    let lease = fixture.registry.acquire("b").await.unwrap();
    assert_eq!(lease.version().digest, first.version.digest);
    assert_eq!((fixture.blobs(), fixture.counts()), (2, (2, 0, 2)));
}

#[tokio::test]
async fn everything_published_survives_a_restart_and_nothing_else() {
    let fixture = Fixture::new().await;
    fixture.put("a", 1).await;
    fixture.put("a", 2).await;
    fixture.put("b", 3).await;
    until("settled", || fixture.counts().2 == 2).await;
    let before = fixture.registry.list();
    // As a crash leaves it: an upload half written, and files moved into place but never named.
    let staging = fixture.registry.stage("c").unwrap();
    Files::plain(5).write(&staging.dir);
    std::mem::forget(staging);
    let orphan = fixture.dir.path().join("adapters/sha256/ab").join("ab".repeat(32));
    std::fs::create_dir_all(&orphan).unwrap();
    Files::plain(6).write(&orphan);
    // The mark by which a start knows that its upload was cut off.
    let mark = format!("staging/naming-{}", "ab".repeat(32));
    std::fs::write(fixture.dir.path().join(mark), "").unwrap();
    let fixture = fixture.restarted().await;
    let after = fixture.registry.list();
    assert_eq!(before.len(), 3);
    for (x, y) in before.iter().zip(&after) {
        assert_eq!((&x.version, x.state, x.current), (&y.version, y.state, y.current));
        assert!(!y.resident);
    }
    assert_eq!((fixture.blobs(), fixture.staged(), fixture.registry.residency().0), (3, 0, 0));
    let aside = std::fs::read_dir(fixture.dir.path().join("orphans")).unwrap();
    assert_eq!(aside.count(), 1, "set aside, not removed");
    assert_eq!(fixture.registry.acquire("a").await.unwrap().version().number, 2);
    assert_eq!(fixture.registry.acquire("a@1").await.unwrap().version().number, 1);
    assert_eq!(fixture.seen.probes.load(Ordering::SeqCst), 0, "the catalogue knows the probe");
}

#[tokio::test]
async fn two_servers_do_not_share_a_data_directory() {
    let fixture = Fixture::new().await;
    let error = open(options(fixture.dir.path()), 10).await.map(|_| ()).unwrap_err();
    assert_eq!((error.code, error.kind), ("data_dir_locked", Kind::Conflict));
    fixture.put("still", 1).await;
}

#[tokio::test]
async fn files_that_changed_on_disk_are_not_served() {
    let fixture = Fixture::new().await;
    let entry = fixture.put("sql", 1).await;
    let fixture = fixture.restarted().await;
    let hex = hex::encode(entry.version.digest.0);
    let blob = fixture.dir.path().join("adapters/sha256").join(&hex[..2]).join(&hex);
    let file = blob.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    assert_eq!(code_of(&fixture.registry, "sql").await, ("corrupt_adapter", Kind::Fault));
    assert_eq!(fixture.counts().0, 0);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(code_of(&fixture.registry, "sql").await.0, "corrupt_adapter");
    // The same content under another name mends the files of both.
    fixture.put("mended", 1).await;
    fixture.registry.acquire("sql").await.unwrap();
}

#[tokio::test]
async fn a_failed_publish_leaves_no_trace() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    fixture.seen.refuse_installs.store(true, Ordering::SeqCst);
    assert!(publish(&fixture.registry, "sql", 2, false).await.is_err());
    assert!(publish(&fixture.registry, "new", 2, false).await.is_err());
    fixture.seen.refuse_installs.store(false, Ordering::SeqCst);
    let staging = fixture.registry.stage("sql").unwrap();
    let mut files = Files::plain(9);
    files.drop_tensor("lora_B");
    files.write(&staging.dir);
    let error = fixture.registry.publish(staging, Publish::default()).await.unwrap_err();
    assert_eq!(error.code, "missing_factor");
    drop(fixture.registry.stage("unused").unwrap());
    assert_eq!(fixture.registry.list().len(), 1);
    assert_eq!((fixture.blobs(), fixture.staged(), fixture.counts().2), (1, 0, 1));
    assert_eq!(fixture.put("sql", 3).await.version.number, 2);
    let fixture = fixture.restarted().await;
    assert_eq!(fixture.registry.list().len(), 2);
}

#[tokio::test]
async fn names_that_could_mean_something_else_are_refused() {
    let fixture = Fixture::new().await;
    let long = "a".repeat(129);
    let attacks = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "a b",
        " a",
        "a ",
        "a\n",
        "a\0b",
        "a:b",
        "a@1",
        "base",
        "BASE",
        "default",
        "auto",
        "None",
        "null",
        "tiny-base",
        "Tiny-Base",
        "аdmin",
        "a\u{202e}b",
        "é",
        "-rf",
        "_x",
        ".hidden",
        "a%2fb",
        "a;b",
        "a'b",
        "$(x)",
        "~",
        "*",
        "?",
        &long,
        "a\u{200b}",
        "‥",
    ];
    for name in attacks {
        let error = fixture.registry.stage(name).map(drop).unwrap_err();
        assert_eq!((error.code, error.kind), ("invalid_name", Kind::Invalid), "{name:?}");
        assert!(error.message.is_ascii() && error.message.len() < 600, "{error}");
    }
    let longest = "a".repeat(128);
    for name in ["a", "7b", "A.b-c_d", "bases", longest.as_str()] {
        fixture.registry.stage(name).unwrap();
    }
    assert_eq!(fixture.staged(), 0, "unpublished uploads are removed");
}

#[tokio::test]
async fn only_the_files_of_an_adapter_are_staged() {
    let fixture = Fixture::new().await;
    let staging = fixture.registry.stage("sql").unwrap();
    let kept = |name: &str| {
        staging.file_path(name).map(|p| p.strip_prefix(&staging.dir).unwrap().to_owned())
    };
    assert_eq!(kept("adapter_config.json").unwrap(), Path::new("adapter_config.json"));
    assert_eq!(kept("adapter_model.safetensors").unwrap(), Path::new("adapter_model.safetensors"));
    assert_eq!(kept("my lora.gguf").unwrap(), Path::new("adapter.gguf"));
    // Read to see whether it is the base's, see `format::bundle`.
    assert_eq!(kept("tokenizer.json").unwrap(), Path::new("tokenizer.json"));
    for other in ["README.md", "vocab.txt", "../x.gguf", "a/adapter_config.json", "..", ""] {
        assert!(kept(other).is_none(), "{other}");
    }
    assert!(kept("adapter_model.bin").is_none());
    let error = fixture.registry.publish(staging, Publish::default()).await.unwrap_err();
    assert_eq!(error.code, "pickle_not_allowed");
}

#[tokio::test]
async fn limits_on_bytes_and_names_are_kept() {
    let fixture = Fixture::with(1000, |o| o.adapters_max = 2).await;
    fixture.put("a", 1).await;
    fixture.put("b", 2).await;
    let error = publish(&fixture.registry, "c", 3, false).await.unwrap_err();
    assert_eq!((error.code, error.kind), ("adapter_limit_reached", Kind::Capacity));
    fixture.put("b", 3).await;
    let fixture = Fixture::with(1000, |o| o.upload_bytes_max = 100).await;
    let error = publish(&fixture.registry, "c", 3, false).await.unwrap_err();
    assert_eq!((error.code, error.kind), ("upload_too_large", Kind::TooLarge));
}
