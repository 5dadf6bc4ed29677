//! Many at once: one load, one order, clean books.

use super::{Fixture, code_of, plain_bytes, publish, until};
use polylora::adapters::registry::Lease;
use polylora::adapters::version::{Publish, Removal};
use polylora::error::Kind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::files::Files;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_requests_for_a_cold_adapter_load_it_once() {
    let fixture = Fixture::new().await;
    let staging = fixture.registry.stage("sql").unwrap();
    Files::dora(1).write(&staging.dir);
    let how = Publish::default();
    fixture.registry.publish(staging, how).await.unwrap();
    let rows_of_one = fixture.seen.rows_read.load(Ordering::SeqCst);
    assert_eq!(rows_of_one, 2 * (8 + 4));
    let fixture = fixture.restarted().await;
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let registry = fixture.registry.clone();
            tokio::spawn(async move { registry.acquire("sql").await })
        })
        .collect();
    let mut leases: Vec<Lease> = Vec::new();
    for task in tasks {
        leases.push(task.await.unwrap().unwrap());
    }
    assert_eq!(fixture.counts(), (1, 0, 1));
    let rows_read = fixture.seen.rows_read.load(Ordering::SeqCst);
    assert_eq!(rows_read, rows_of_one, "it was prepared more than once");
    assert!(leases.iter().all(|l| l.slot() == leases[0].slot()));
    assert_eq!(fixture.state("sql")[0].3, 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_publishes_of_one_name_are_fifty_versions_or_one() {
    let fixture = Fixture::with(1000, |o| o.versions_kept = 100).await;
    for (name, distinct) in [("many", true), ("same", false)] {
        let tasks: Vec<_> = (0..50)
            .map(|i| {
                let registry = fixture.registry.clone();
                let seed = 500 + if distinct { i } else { 0 };
                tokio::spawn(async move { publish(&registry, name, seed, false).await.unwrap() })
            })
            .collect();
        let mut numbers = Vec::new();
        for task in tasks {
            numbers.push(task.await.unwrap().version.number);
        }
        numbers.sort();
        numbers.dedup();
        assert_eq!(numbers.len(), if distinct { 50 } else { 1 });
        assert_eq!(fixture.registry.versions(name).iter().filter(|e| e.current).count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_storm_of_everything_ends_with_clean_books() {
    let one = plain_bytes().await;
    let fixture = Fixture::with(1000, |o| o.resident_bytes_max = 5 * one).await;
    let tasks: Vec<_> = (0..50u64)
        .map(|task| {
            let (registry, seen) = (fixture.registry.clone(), fixture.seen.clone());
            tokio::spawn(async move {
                for round in 0..12 {
                    let roll = task * 31 + round * 17;
                    let name = format!("n{}", roll % 7);
                    match roll % 10 {
                        0 => drop(registry.delete(&name, Removal::default()).await),
                        1..=3 => drop(publish(&registry, &name, roll % 11, false).await),
                        _ => {
                            if let Ok(lease) = registry.acquire(&name).await {
                                tokio::task::yield_now().await;
                                let in_slot =
                                    seen.slots.lock().unwrap().get(&lease.slot()).copied();
                                assert_eq!(
                                    in_slot,
                                    Some(lease.version().digest),
                                    "the wrong adapter"
                                );
                                assert_eq!(lease.version().name, name);
                            }
                        }
                    }
                    assert!(registry.residency().0 <= registry.residency().1);
                }
            })
        })
        .collect();
    for task in tasks {
        tokio::time::timeout(Duration::from_secs(120), task).await.expect("no deadlock").unwrap();
    }
    assert!(fixture.registry.list().iter().all(|e| e.leases == 0));
    for n in 0..7 {
        let _ = fixture.registry.delete(&format!("n{n}"), Removal::default()).await;
    }
    until("all is free", || {
        fixture.registry.residency().0 == 0 && fixture.counts().2 == 0 && fixture.blobs() == 0
    })
    .await;
    let (installs, removes, _) = fixture.counts();
    assert_eq!(installs, removes);
    assert_eq!(fixture.staged(), 0);
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_stop_a_publish_in_the_middle() {
    let fixture = Fixture::new().await;
    let staging = fixture.registry.stage("sql").unwrap();
    Files::plain(1).write(&staging.dir);
    let publish = fixture.registry.publish(staging, Publish::default());
    let _ = tokio::time::timeout(Duration::from_micros(1), publish).await;
    until("it is published", || fixture.state("sql").len() == 1).await;
    fixture.registry.acquire("sql").await.unwrap();
}

#[tokio::test]
async fn a_bank_full_by_slots_evicts_as_well() {
    let fixture = Fixture::with(2, |_| {}).await;
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        fixture.put(name, i as u64).await;
    }
    assert_eq!(fixture.counts().2, 2);
    let held = [
        fixture.registry.acquire("a").await.unwrap(),
        fixture.registry.acquire("b").await.unwrap(),
    ];
    assert_eq!(code_of(&fixture.registry, "c").await, ("insufficient_capacity", Kind::Capacity));
    drop(held);
    fixture.registry.acquire("c").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_deleted_leaves_the_bank_however_its_last_lease_ends() {
    let fixture = Fixture::new().await;
    // Others want the processors: the end of a lease may be interrupted anywhere.
    let busy = Arc::new(AtomicBool::new(true));
    for _ in 0..4 {
        let busy = busy.clone();
        std::thread::spawn(move || while busy.load(Ordering::Relaxed) {});
    }
    for _ in 0..60 {
        fixture.put("sql", 1).await;
        let lease = fixture.registry.acquire("sql").await.unwrap();
        fixture.registry.delete("sql", Removal::default()).await.unwrap();
        std::thread::spawn(move || drop(lease));
        until("its memory is free", || fixture.counts().2 == 0).await;
    }
    busy.store(false, Ordering::Relaxed);
}
