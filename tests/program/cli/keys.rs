//! Keys across restarts, and the command that makes them while no server runs.

use polylora::access::{Access, NewKey, Scope};
use polylora::database::Storage;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

const NOW: Duration = Duration::from_secs(1_800_000_000);

fn later(seconds: u64) -> Duration {
    NOW + Duration::from_secs(seconds)
}

fn operator() -> NewKey {
    NewKey { scopes: vec![Scope::Admin], weight: 1, ..NewKey::default() }
}

fn tenant() -> NewKey {
    NewKey {
        label: "the shop".into(),
        scopes: vec![Scope::Metrics, Scope::Inference],
        tenant: Some("acme".into()),
        adapters: vec!["acme-*".into(), "shared".into()],
        weight: 7,
        lifetime_seconds: Some(100),
        ..NewKey::default()
    }
}

#[tokio::test]
async fn keys_survive_a_restart_with_all_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let access = Access::open(dir.path(), None).await.unwrap();
    let (admin, _) = access.create(operator(), NOW).await.unwrap();
    let (key, secret) = access.create(tenant(), NOW).await.unwrap();
    let (other, gone) = access.create(tenant(), NOW).await.unwrap();
    access.revoke(&other.id, later(5)).await.unwrap();
    assert!(access.authenticate(Some(secret.reveal()), later(61)).is_ok());
    access.flush().await.unwrap();
    drop(access);

    let access = Access::open(dir.path(), None).await.unwrap();
    let keys = access.keys();
    assert_eq!(keys[0].id, admin.id);
    let used = Some(later(61).as_secs() / 60 * 60);
    assert_eq!(keys[1], polylora::access::Key { last_used: used, ..key.clone() });
    assert_eq!(keys[2].revoked, Some(later(5).as_secs()));
    let caller = access.authenticate(Some(secret.reveal()), later(99)).unwrap();
    assert_eq!((caller.id(), caller.tenant(), caller.weight()), (&*key.id, Some("acme"), 7));
    assert!(caller.sees("acme-x") && caller.sees("shared") && !caller.sees("globex-x"));
    assert!(caller.has(Scope::Inference) && !caller.has(Scope::Admin));
    for (secret, now) in [
        (Some(secret.reveal()), later(100)), // expired
        (Some(gone.reveal()), later(6)),
        (Some(""), NOW),
        (None, NOW),
    ] {
        let refused = access.authenticate(secret, now).map(|_| ()).unwrap_err();
        assert_eq!(refused.code, "invalid_api_key");
    }
}

#[tokio::test]
async fn the_store_keeps_hashes_and_never_a_secret() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::of(dir.path());
    let access = Access::open_in(&storage, Some("configured-secret")).await.unwrap();
    let (_, secret) = access.create(tenant(), NOW).await.unwrap();
    assert!(!format!("{secret:?}").contains(&secret.reveal()[3..]));
    assert_eq!(secret.reveal().len(), 3 + 64, "256 bits");
    // A connection that is only dropped is closed later, on a thread of its own, and its files go
    // away while they are listed.
    storage.close().await;
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for secret in [secret.reveal(), "configured-secret"] {
            assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()));
        }
    }
}

#[tokio::test]
async fn an_overlap_ends_on_the_second() {
    let dir = tempfile::tempdir().unwrap();
    let access = Access::open(dir.path(), Some("configured")).await.unwrap();
    let (key, first) = access.create(operator(), NOW).await.unwrap();
    let (_, second) = access.rotate(&key.id, 10, NOW).await.unwrap();
    let good = |secret: &str, now| access.authenticate(Some(secret), now).is_ok();
    assert!(good(first.reveal(), later(9)) && !good(first.reveal(), later(10)));
    assert!(good(second.reveal(), later(1_000_000)));
    // A second rotation does not lengthen the first one's overlap.
    let (_, third) = access.rotate(&key.id, 100, later(5)).await.unwrap();
    assert!(!good(first.reveal(), later(10)) && good(second.reveal(), later(104)));
    assert!(!good(second.reveal(), later(105)) && good(third.reveal(), later(105)));
}

fn key(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(support::command::program());
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("POLYLORA_")) {
        command.env_remove(name);
    }
    command.arg("key").args(args).arg("--data-dir").arg(dir).output().expect("the binary runs")
}

#[test]
fn the_command_makes_lists_rotates_and_revokes_while_nobody_serves() {
    let dir = tempfile::tempdir().unwrap();
    let out = |o: &Output| String::from_utf8_lossy(&o.stdout).trim().to_owned();
    let weak = key(dir.path(), &["add", "--scope", "inference"]);
    assert_eq!(weak.status.code(), Some(1), "the first key is an operator's");
    assert_eq!(key(dir.path(), &["add", "--scope", "root"]).status.code(), Some(2));
    let secret = out(&key(dir.path(), &["add", "--scope", "admin,inference", "--label", "ops"]));
    assert!(secret.starts_with("pl-"), "{secret}");
    let patterns = ["add", "--scope", "inference", "--tenant", "acme", "--adapters", "acme-*,x"];
    assert!(key(dir.path(), &patterns).status.success());
    let list = out(&key(dir.path(), &["list"]));
    let lines: Vec<&str> = list.lines().collect();
    assert!(lines[0].ends_with("good  inference,admin  operator  ops"), "{list}");
    assert!(lines[1].ends_with("good  inference  tenant acme  acme-*,x"), "{list}");
    let id = lines[0].split_whitespace().next().unwrap();
    let newer = out(&key(dir.path(), &["rotate", id]));
    assert!(newer.starts_with("pl-") && newer != secret);
    assert_eq!(out(&key(dir.path(), &["revoke", id])), format!("revoked {id}"));
    assert!(out(&key(dir.path(), &["list"])).contains("revoked  inference,admin"));
    let lock = polylora::database::lock(dir.path()).unwrap();
    let refused = key(dir.path(), &["list"]);
    assert_eq!(refused.status.code(), Some(1), "a server has it");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by another server"));
    drop(lock);
}
