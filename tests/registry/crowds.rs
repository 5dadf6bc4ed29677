//! Many at once: one load, one order, clean books.

use super::adapter_files::Files;
use super::{House, code_of, plain_bytes, publish, until};
use polylora::adapters::registry::Lease;
use polylora::adapters::version::{Publish, Removal};
use polylora::error::Kind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_requests_for_a_cold_adapter_load_it_once() {
    let house = House::new().await;
    let staging = house.registry.stage("sql").unwrap();
    Files::dora(1).write(&staging.dir);
    let how = Publish::default();
    house.registry.publish(staging, how).await.unwrap();
    let rows_of_one = house.seen.rows_read.load(Ordering::SeqCst);
    assert_eq!(rows_of_one, 2 * (8 + 4));
    let house = house.restarted().await;
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let registry = house.registry.clone();
            tokio::spawn(async move { registry.acquire("sql").await })
        })
        .collect();
    let mut leases: Vec<Lease> = Vec::new();
    for task in tasks {
        leases.push(task.await.unwrap().unwrap());
    }
    assert_eq!(house.counts(), (1, 0, 1));
    let rows_read = house.seen.rows_read.load(Ordering::SeqCst);
    assert_eq!(rows_read, rows_of_one, "it was prepared more than once");
    assert!(leases.iter().all(|l| l.slot() == leases[0].slot()));
    assert_eq!(house.state("sql")[0].3, 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_publishes_of_one_name_are_fifty_versions_or_one() {
    let house = House::with(1000, |o| o.versions_kept = 100).await;
    for (name, distinct) in [("many", true), ("same", false)] {
        let tasks: Vec<_> = (0..50)
            .map(|i| {
                let registry = house.registry.clone();
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
        assert_eq!(house.registry.versions(name).iter().filter(|e| e.current).count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_storm_of_everything_ends_with_clean_books() {
    let one = plain_bytes().await;
    let house = House::with(1000, |o| o.resident_bytes_max = 5 * one).await;
    let tasks: Vec<_> = (0..50u64)
        .map(|task| {
            let (registry, seen) = (house.registry.clone(), house.seen.clone());
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
    assert!(house.registry.list().iter().all(|e| e.leases == 0));
    for n in 0..7 {
        let _ = house.registry.delete(&format!("n{n}"), Removal::default()).await;
    }
    until("all is free", || {
        house.registry.residency().0 == 0 && house.counts().2 == 0 && house.blobs() == 0
    })
    .await;
    let (installs, removes, _) = house.counts();
    assert_eq!(installs, removes);
    assert_eq!(house.staged(), 0);
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_stop_a_publish_in_the_middle() {
    let house = House::new().await;
    let staging = house.registry.stage("sql").unwrap();
    Files::plain(1).write(&staging.dir);
    let publish = house.registry.publish(staging, Publish::default());
    let _ = tokio::time::timeout(Duration::from_micros(1), publish).await;
    until("it is published", || house.state("sql").len() == 1).await;
    house.registry.acquire("sql").await.unwrap();
}

#[tokio::test]
async fn a_bank_full_by_slots_evicts_as_well() {
    let house = House::with(2, |_| {}).await;
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        house.put(name, i as u64).await;
    }
    assert_eq!(house.counts().2, 2);
    let held =
        [house.registry.acquire("a").await.unwrap(), house.registry.acquire("b").await.unwrap()];
    assert_eq!(code_of(&house.registry, "c").await, ("insufficient_capacity", Kind::Capacity));
    drop(held);
    house.registry.acquire("c").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_deleted_leaves_the_bank_however_its_last_lease_ends() {
    let house = House::new().await;
    // Others want the processors: the end of a lease may be interrupted anywhere.
    let busy = Arc::new(AtomicBool::new(true));
    for _ in 0..4 {
        let busy = busy.clone();
        std::thread::spawn(move || while busy.load(Ordering::Relaxed) {});
    }
    for _ in 0..60 {
        house.put("sql", 1).await;
        let lease = house.registry.acquire("sql").await.unwrap();
        house.registry.delete("sql", Removal::default()).await.unwrap();
        std::thread::spawn(move || drop(lease));
        until("its memory is free", || house.counts().2 == 0).await;
    }
    busy.store(false, Ordering::Relaxed);
}
