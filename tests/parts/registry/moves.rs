//! Names that move without an upload: expectations, rollback, pins, aliases, removal with a drain.

use super::{Fixture, code_of, open, options, plain_bytes, publish, until};
use polylora::adapters::Digest;
use polylora::adapters::actor::Actor;
use polylora::adapters::alias::Target;
use polylora::adapters::version::{Expected, Lineage, Parent, Publish, Removal, State};
use polylora::error::{Error, Kind};
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::files::Files;

async fn put_if(
    fixture: &Fixture,
    name: &str,
    seed: u64,
    expected: Expected,
) -> Result<u64, Error> {
    let staging = fixture.registry.stage(name)?;
    Files::plain(seed).write(&staging.dir);
    let how = Publish { expected: vec![expected], ..Publish::default() };
    Ok(fixture.registry.publish(staging, how).await?.version.number)
}

fn refusal<T>(done: Result<T, Error>) -> (&'static str, Kind) {
    let error = done.map(drop).unwrap_err();
    (error.code, error.kind)
}

const CONFLICT: (&str, Kind) = ("version_conflict", Kind::Precondition);

#[tokio::test]
async fn a_change_that_expects_another_version_is_refused_and_changes_nothing() {
    let fixture = Fixture::new().await;
    assert_eq!(refusal(put_if(&fixture, "sql", 1, Expected::Present).await), CONFLICT);
    assert_eq!(refusal(put_if(&fixture, "sql", 1, Expected::Version(1)).await), CONFLICT);
    assert_eq!(put_if(&fixture, "sql", 1, Expected::Absent).await.unwrap(), 1);
    let first = fixture.registry.versions("sql")[0].version.digest;
    assert_eq!(refusal(put_if(&fixture, "sql", 2, Expected::Absent).await), CONFLICT);
    assert_eq!(put_if(&fixture, "sql", 2, Expected::Content(vec![first])).await.unwrap(), 2);
    let stale = put_if(&fixture, "sql", 3, Expected::Content(vec![first])).await.unwrap_err();
    let second = fixture.registry.versions("sql")[1].version.digest;
    for named in [first.to_string(), second.to_string()] {
        assert!(stale.message.contains(&named), "{stale} does not name {named}");
    }
    assert_eq!(refusal(put_if(&fixture, "sql", 3, Expected::Content(vec![])).await), CONFLICT);
    assert_eq!(put_if(&fixture, "sql", 3, Expected::Version(2)).await.unwrap(), 3);
    let expected = || vec![Expected::Version(2)];
    assert_eq!(
        refusal(fixture.registry.roll_back("sql", None, expected(), &Actor::default()).await),
        CONFLICT
    );
    let how = Removal { expected: expected(), ..Removal::default() };
    assert_eq!(refusal(fixture.registry.delete("sql", how).await), CONFLICT);
    assert_eq!(fixture.registry.acquire("sql").await.unwrap().version().number, 3);
    assert_eq!((fixture.blobs(), fixture.staged()), (3, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_fifty_changes_that_expect_one_version_one_comes_through() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    let tasks: Vec<_> = (0..50)
        .map(|i| {
            let registry = fixture.registry.clone();
            tokio::spawn(async move {
                let staging = registry.stage("sql").unwrap();
                Files::plain(100 + i).write(&staging.dir);
                let expected = vec![Expected::Version(1)];
                registry.publish(staging, Publish { expected, ..Publish::default() }).await.is_ok()
            })
        })
        .collect();
    let mut came_through = 0;
    for task in tasks {
        came_through += usize::from(task.await.unwrap());
    }
    assert_eq!((came_through, fixture.state("sql").len()), (1, 2));
}

#[tokio::test]
async fn a_rollback_moves_the_name_back_and_running_requests_stay_where_they_are() {
    let fixture = Fixture::with(1000, |o| o.versions_kept = 4).await;
    for seed in 1..=2 {
        fixture.put("sql", seed).await;
    }
    fixture.seen.changes.lock().unwrap().push(0.0);
    fixture.put("sql", 3).await;
    fixture.put("sql", 4).await;
    let running = fixture.registry.acquire("sql").await.unwrap();
    // 3 has no effect, so the one before 4 is 2.
    let back = fixture.registry.roll_back("sql", None, vec![], &Actor::default()).await.unwrap();
    assert_eq!((back.version.number, back.current, back.resident), (2, true, true));
    assert_eq!(running.version().number, 4);
    assert_eq!(fixture.registry.acquire("sql").await.unwrap().version().number, 2);
    assert_eq!(
        fixture
            .registry
            .roll_back("sql", None, vec![], &Actor::default())
            .await
            .unwrap()
            .version
            .number,
        1
    );
    let none = fixture.registry.roll_back("sql", None, vec![], &Actor::default()).await;
    assert_eq!(refusal(none), ("nothing_to_roll_back", Kind::Conflict));
    let flat = fixture.registry.roll_back("sql", Some(3), vec![], &Actor::default()).await;
    assert_eq!(refusal(flat), ("adapter_ineffective", Kind::Conflict));
    for missing in [Some(9), Some(0)] {
        let missing = fixture.registry.roll_back("sql", missing, vec![], &Actor::default()).await;
        assert_eq!(refusal(missing).0, "model_not_found");
    }
    assert_eq!(
        refusal(fixture.registry.roll_back("no", None, vec![], &Actor::default()).await).0,
        "model_not_found"
    );
    fixture.registry.roll_back("sql", Some(2), vec![], &Actor::default()).await.unwrap();
    drop(running);
    let fixture = fixture.restarted().await;
    assert_eq!(fixture.registry.acquire("sql").await.unwrap().version().number, 2);
    // The next upload is a new number, whatever the name means.
    assert_eq!(fixture.put("sql", 5).await.version.number, 5);
}

#[tokio::test]
async fn a_pinned_version_is_never_evicted_pruned_or_cold() {
    let one = plain_bytes().await;
    let change = |o: &mut polylora::adapters::registry::RegistryOptions| {
        o.resident_bytes_max = 2 * one;
        o.versions_kept = 1;
    };
    let fixture = Fixture::with(1000, change).await;
    fixture.put("sql", 1).await;
    assert!(fixture.registry.pin("sql", None, &Actor::default()).await.unwrap().pinned);
    for seed in 2..5 {
        fixture.put("sql", seed).await;
        fixture.put("other", 10 + seed).await;
    }
    until("the others are pruned", || fixture.blobs() == 3).await;
    let states = fixture.state("sql");
    assert_eq!(states.iter().map(|s| s.0).collect::<Vec<_>>(), [1, 4]);
    let first = || fixture.registry.versions("sql").into_iter().next().unwrap();
    assert!(first().pinned && first().resident && first().state == State::Ready);
    let dir = fixture.dir.path().to_owned();
    let fixture = fixture.restarted().await;
    let entry = fixture.registry.versions("sql").remove(0);
    assert!(entry.pinned && entry.resident, "pinned over a restart");
    assert_eq!(fixture.registry.stats().pinned, 1);
    let loads = fixture.counts().0;
    fixture.registry.acquire("sql@1").await.unwrap();
    assert_eq!(fixture.counts().0, loads, "it was not cold");
    assert!(!fixture.registry.unpin("sql", Some(1), &Actor::default()).await.unwrap().pinned);
    until("unpinned, it leaves", || !fixture.registry.versions("sql")[0].resident).await;
    // What cannot be loaded stays pinned, and does not keep the server from starting.
    fixture.registry.pin("sql", Some(1), &Actor::default()).await.unwrap();
    let hex = hex::encode(entry.version.digest.0);
    let blob = dir.join("adapters/sha256").join(&hex[..2]).join(&hex);
    std::fs::remove_file(blob.join("adapter_model.safetensors")).unwrap();
    let fixture = fixture.restarted().await;
    let entry = fixture.registry.versions("sql").remove(0);
    assert!(entry.pinned && !entry.resident);
    fixture.registry.delete("sql", Removal::default()).await.unwrap();
    assert_eq!(fixture.registry.stats().pinned, 0);
}

#[tokio::test]
async fn a_deleted_pinned_adapter_leaves_memory() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    fixture.registry.pin("sql", None, &Actor::default()).await.unwrap();
    let removed = fixture.registry.delete("sql", Removal::default()).await.unwrap();
    assert!(removed.gone);
    assert_eq!((fixture.registry.residency().0, fixture.counts().2, fixture.blobs()), (0, 0, 0));
}

fn target(id: &str, weight: u32) -> Target {
    let (name, number) = id.split_once('@').unwrap();
    Target { name: name.into(), number: number.parse().unwrap(), weight }
}

#[tokio::test]
async fn an_alias_leads_each_caller_to_one_version_and_keeps_it() {
    let fixture = Fixture::with(1000, |o| o.versions_kept = 1).await;
    fixture.put("acme", 1).await;
    let first = vec![target("acme@1", 1)];
    assert!(fixture.registry.put_alias("prod", first, &Actor::default()).await.unwrap().1);
    fixture.put("acme", 2).await;
    let both = || vec![target("acme@1", 50), target("acme@2", 50)];
    let (alias, new) = fixture.registry.put_alias("prod", both(), &Actor::default()).await.unwrap();
    assert!(!new && alias.previous == Some(vec![target("acme@1", 1)]));
    fixture.put("acme", 3).await;
    assert_eq!(fixture.state("acme").len(), 3, "an alias keeps what it leads to");
    let mut seen = std::collections::HashSet::new();
    for user in 0..40 {
        let user = format!("user-{user}");
        let number = async || {
            let lease = fixture.registry.acquire_for("prod", Some(&user)).await.unwrap();
            lease.version().number
        };
        let number_once = number().await;
        assert_eq!(number().await, number_once);
        seen.insert(number_once);
    }
    assert_eq!(seen, [1, 2].into());
    let promoted = fixture.registry.promote_alias("prod", "2", &Actor::default()).await.unwrap();
    assert_eq!(promoted.targets, [target("acme@2", 100)]);
    until("1 is pruned", || fixture.state("acme").iter().all(|s| s.0 != 1)).await;
    let back = fixture.registry.roll_back_alias("prod", &Actor::default()).await;
    assert_eq!(refusal(back).0, "model_not_found", "1 is not kept any more");
    assert_eq!(fixture.registry.acquire("prod").await.unwrap().version().number, 2);
    fixture.registry.put_alias("prod", vec![target("acme@3", 1)], &Actor::default()).await.unwrap();
    until("2 is pruned", || fixture.state("acme").len() == 1).await;
    let swapped = fixture.registry.roll_back_alias("prod", &Actor::default()).await.unwrap_err();
    assert_eq!(swapped.code, "model_not_found", "2 went when nothing led to it");
    let alias = fixture.registry.alias("prod").unwrap();
    let fixture = fixture.restarted().await;
    assert_eq!(fixture.registry.aliases(), [alias]);
    assert_eq!(fixture.registry.acquire("prod").await.unwrap().version().number, 3);
}

#[tokio::test]
async fn aliases_and_adapters_do_not_get_in_each_others_way() {
    let fixture = Fixture::with(1000, |o| o.adapters_max = 3).await;
    fixture.put("acme", 1).await;
    let to = || vec![target("acme@1", 1)];
    fixture.registry.put_alias("prod", to(), &Actor::default()).await.unwrap();
    let refused = async |name: &str, to| {
        refusal(fixture.registry.put_alias(name, to, &Actor::default()).await).0
    };
    assert_eq!(refused("acme", to()).await, "name_taken");
    assert_eq!(refused("base", to()).await, "invalid_name");
    assert_eq!(refused("x", vec![target("acme@2", 1)]).await, "model_not_found");
    assert_eq!(refused("x", vec![target("prod@1", 1)]).await, "model_not_found");
    assert_eq!(refused("x", vec![]).await, "invalid_alias");
    let taken = publish(&fixture.registry, "prod", 2, false).await;
    assert_eq!(refusal(taken), ("name_taken", Kind::Conflict));
    let led_to = fixture.registry.delete("acme", Removal::default()).await;
    assert_eq!(refusal(led_to), ("adapter_aliased", Kind::Conflict));
    fixture.put("other", 3).await;
    assert_eq!(refused("y", to()).await, "adapter_limit_reached");
    assert_eq!(code_of(&fixture.registry, "prod@1").await.0, "model_not_found");
    assert_eq!(
        refusal(fixture.registry.promote_alias("prod", "2", &Actor::default()).await).0,
        "invalid_alias"
    );
    assert_eq!(
        refusal(fixture.registry.roll_back_alias("prod", &Actor::default()).await).0,
        "nothing_to_roll_back"
    );
    assert_eq!(
        refusal(fixture.registry.promote_alias("no", "1", &Actor::default()).await).0,
        "adapter_not_found"
    );
    fixture.registry.delete_alias("prod", &Actor::default()).await.unwrap();
    assert_eq!(
        refusal(fixture.registry.delete_alias("prod", &Actor::default()).await).0,
        "adapter_not_found"
    );
    assert_eq!(code_of(&fixture.registry, "prod").await.0, "model_not_found");
    fixture.registry.delete("acme", Removal::default()).await.unwrap();
}

#[tokio::test]
async fn a_delete_waits_for_running_requests_and_says_what_came_free() {
    let fixture = Fixture::new().await;
    let entry = fixture.put("sql", 1).await;
    fixture.put("twin", 1).await;
    fixture.put("sql", 2).await;
    let lease = fixture.registry.acquire("sql").await.unwrap();
    let registry = fixture.registry.clone();
    let delete = tokio::spawn(async move {
        let how = Removal { drain: Some(Duration::from_secs(3600)), ..Removal::default() };
        registry.delete("sql", how).await
    });
    until("the name is gone", || fixture.state("sql").iter().all(|s| !s.2)).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!delete.is_finished(), "a request runs");
    drop(lease);
    let removed = delete.await.unwrap().unwrap();
    assert_eq!((removed.gone, removed.cut), (true, 0));
    // The first version's content is the twin's as well: neither memory nor disk came free of it.
    assert_eq!(removed.resident_bytes_freed, entry.version.resident_bytes);
    assert_eq!(removed.file_bytes_freed, entry.version.file_bytes);
    assert_eq!((fixture.blobs(), fixture.counts().2), (1, 1));
}

#[tokio::test]
async fn what_still_runs_when_the_drain_is_over_is_cut() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    fixture.put("other", 2).await;
    let other = fixture.registry.acquire("other").await.unwrap();
    let leases = [
        fixture.registry.acquire("sql").await.unwrap(),
        fixture.registry.acquire("sql").await.unwrap(),
    ];
    let runs = leases.map(|lease| {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                if let Some(error) = lease.revoked() {
                    return error.code;
                }
            }
        })
    });
    let drain = Some(Duration::from_millis(100));
    let how = Removal { drain, ..Removal::default() };
    let removed = fixture.registry.delete("sql", how).await.unwrap();
    assert_eq!((removed.gone, removed.cut), (true, 2));
    for run in runs {
        assert_eq!(run.await.unwrap(), "adapter_deleted");
    }
    assert_eq!(fixture.counts().2, 1);
    assert!(other.revoked().is_none(), "only what was deleted is cut");
}

#[tokio::test]
async fn where_a_version_came_from_is_kept() {
    let fixture = Fixture::new().await;
    let parent = Parent { id: "a@1".into(), digest: "sha256:0".into(), weight: Some(0.5) };
    let all = [
        Lineage::Uploaded { by: Some("key-1".into()), files: vec!["x.gguf".into()] },
        Lineage::Merged {
            method: "ties".into(),
            from: vec![parent.clone(), parent.clone()],
            job: None,
            rests_on: vec!["job-1".into()],
        },
        Lineage::Trained {
            from: Some(parent),
            job: "job-1".into(),
            step: None,
            rests_on: Vec::new(),
            record: None,
        },
    ];
    for (seed, lineage) in all.iter().enumerate() {
        let staging = fixture.registry.stage("sql").unwrap();
        Files::plain(seed as u64).write(&staging.dir);
        let how = Publish { lineage: lineage.clone(), ..Publish::default() };
        fixture.registry.publish(staging, how).await.unwrap();
    }
    let fixture = fixture.restarted().await;
    let kept: Vec<Lineage> =
        fixture.registry.versions("sql").iter().map(|e| e.version.lineage.clone()).collect();
    assert_eq!(kept, all);
}

#[tokio::test]
async fn a_directory_of_another_base_is_refused() {
    let fixture = Fixture::new().await;
    fixture.put("sql", 1).await;
    let Fixture { registry, dir, .. } = fixture;
    drop(registry);
    let opened = async |base: u8| loop {
        let mut o = options(dir.path());
        o.base_digest = Digest([base; 32]);
        match open(o, 1000).await {
            Err(e) if e.code == "data_dir_locked" => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            other => return other,
        }
    };
    let error = opened(8).await.map(drop).unwrap_err();
    assert_eq!((error.code, error.kind), ("data_dir_other_base", Kind::Conflict));
    assert!(error.message.contains(&Digest([7; 32]).to_string()), "{error}");
    let (registry, seen) = opened(7).await.unwrap();
    registry.acquire("sql").await.unwrap();
    assert_eq!(seen.installs.load(Ordering::SeqCst), 1);
    // Without versions it is anybody's.
    registry.delete("sql", Removal::default()).await.unwrap();
    drop(registry);
    let opened = opened(8).await;
    opened.unwrap();
}
