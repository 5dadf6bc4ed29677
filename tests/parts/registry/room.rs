//! Waiting for room: what is leased is never evicted, nobody waits for ever, and who waits blocks
//! nobody.

use super::{Fixture, code_of, options, until};
use polylora::adapters::actor::Actor;
use polylora::adapters::version::{Publish, Removal};
use polylora::error::Kind;
use polylora::metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::files::Files;
use support::live::PATIENCE;

/// A fixture with this many places, where requests wait.
async fn fixture(places: usize, patience: Duration) -> Fixture {
    let fixture = Fixture::with(places, |o| {
        o.load_wait_max = Duration::from_secs(30);
        o.load_patience = patience;
    });
    fixture.await
}

const NEVER: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_request_waits_until_a_lease_ends() {
    let fixture = fixture(1, NEVER).await;
    fixture.put("a", 1).await;
    fixture.put("b", 2).await;
    let a = fixture.registry.acquire("a").await.unwrap();
    let registry = fixture.registry.clone();
    let b = tokio::spawn(async move { registry.acquire("b").await });
    until("it waits", || fixture.registry.stats().loads_waiting == 1).await;
    assert!(!b.is_finished());
    drop(a);
    assert_eq!(b.await.unwrap().unwrap().version().name, "b");
    assert_eq!(fixture.registry.stats().loads_waiting, 0);
    assert_eq!(fixture.counts().2, 1);
}

#[tokio::test]
async fn a_request_that_gives_up_waiting_leaves_the_line() {
    let fixture = fixture(1, Duration::ZERO).await;
    fixture.put("b", 2).await;
    fixture.put("a", 1).await;
    let a = fixture.registry.acquire("a").await.unwrap();
    let b = tokio::time::timeout(Duration::from_millis(200), fixture.registry.acquire("b")).await;
    assert!(b.is_err(), "there is no room");
    assert_eq!(fixture.registry.stats().loads_waiting, 0);
    // It had closed `a` to others, and gave that up too.
    let again = tokio::time::timeout(PATIENCE, fixture.registry.acquire("a")).await;
    drop((a, again.expect("at once").unwrap()));
    fixture.registry.acquire("b").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_unpopular_adapter_is_served_between_the_popular_ones() {
    let fixture = fixture(1, Duration::from_millis(50)).await;
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        fixture.put(name, seed as u64).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicUsize::new(0));
    // Requests for `a` overlap without a gap: without a claim its place would never come free.
    let crowd: Vec<_> = (0..8)
        .map(|_| {
            let (registry, stop, served) = (fixture.registry.clone(), stop.clone(), served.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let lease = registry.acquire("a").await.unwrap();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    drop(lease);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut most = 0;
    for _ in 0..5 {
        let before = served.load(Ordering::Relaxed);
        let b = fixture.registry.acquire("b").await.unwrap();
        most = most.max(served.load(Ordering::Relaxed) - before);
        tokio::time::sleep(Duration::from_millis(5)).await;
        drop(b);
    }
    let before = served.load(Ordering::Relaxed);
    until("the popular one goes on", || served.load(Ordering::Relaxed) > before + 8).await;
    stop.store(true, Ordering::Relaxed);
    for task in crowd {
        task.await.unwrap();
    }
    // Eight at a time, of 20 ms each: 20 in the 50 ms of patience, 20 in the 50 ms that the popular
    // one has at least, and the last eight. Ten times that is asked.
    assert!(most < 480, "{most} others were served while it waited");
}

#[tokio::test]
async fn without_room_for_long_the_answer_says_so() {
    let fixture = Fixture::with(1, |o| o.load_wait_max = Duration::from_millis(100)).await;
    fixture.put("b", 2).await;
    fixture.put("a", 1).await;
    let _a = fixture.registry.acquire("a").await.unwrap();
    assert_eq!(code_of(&fixture.registry, "b").await, ("insufficient_capacity", Kind::Capacity));
    fixture.registry.pin("a", None, &Actor::default()).await.unwrap();
    drop(_a);
    assert_eq!(code_of(&fixture.registry, "b").await.0, "insufficient_capacity", "a is pinned");
}

#[tokio::test]
async fn a_deleted_adapter_is_not_waited_for() {
    let fixture = fixture(1, NEVER).await;
    fixture.put("b", 2).await;
    fixture.put("a", 1).await;
    let _a = fixture.registry.acquire("a").await.unwrap();
    let registry = fixture.registry.clone();
    let b = tokio::spawn(async move { registry.acquire("b").await.map(drop) });
    until("it waits", || fixture.registry.stats().loads_waiting == 1).await;
    let removed = fixture.registry.delete("b", Removal::default()).await.unwrap();
    assert!(removed.gone && removed.file_bytes_freed > 0);
    assert_eq!(b.await.unwrap().unwrap_err().code, "model_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_slow_load_blocks_no_request_for_anything_else() {
    let first = Fixture::new().await;
    first.put("warm", 1).await;
    let staging = first.registry.stage("slow").unwrap();
    Files::dora(7).write(&staging.dir);
    first.registry.publish(staging, Publish::default()).await.unwrap();
    first.put("cold", 3).await;
    let Fixture { registry, dir, .. } = first;
    drop(registry);
    // Only DoRA reads rows of the base: each waits for the test's word.
    let go = Arc::new(AtomicBool::new(false));
    let (rows, word) = (super::base_rows(&super::tiny()), go.clone());
    let waiting: polylora::adapters::BaseRows = Arc::new(move |site, row, out| {
        while !word.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        rows(site, row, out);
    });
    let metrics = Arc::new(Metrics::new());
    let (registry, seen) = loop {
        let o = super::RegistryOptions { metrics: metrics.clone(), ..options(dir.path()) };
        match super::open_with(o, 1000, waiting.clone()).await {
            Ok(opened) => break opened,
            Err(e) => assert_eq!(e.code, "data_dir_locked"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    registry.acquire("warm").await.unwrap();
    let slow: Vec<_> = (0..10)
        .map(|_| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.acquire("slow").await.map(drop) })
        })
        .collect();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        for other in ["warm", "cold"] {
            let lease = tokio::time::timeout(PATIENCE, registry.acquire(other));
            lease.await.expect("not behind the slow one").unwrap();
        }
    }
    assert_eq!(seen.installs.load(Ordering::SeqCst), 2, "the slow one is still loading");
    go.store(true, Ordering::Relaxed);
    for request in slow {
        request.await.unwrap().unwrap();
    }
    assert_eq!(seen.installs.load(Ordering::SeqCst), 3, "and was loaded once");
    assert_eq!((cold(&metrics, "restart"), registry.stats().loads), (3, 3));
    assert_eq!(metrics.load_seconds.get_sample_count(), 3);
}

fn cold(metrics: &Metrics, why: &str) -> u64 {
    metrics.cold_starts.with_label_values(&[why]).get()
}

#[tokio::test]
async fn cold_starts_are_counted_by_why() {
    let one = super::plain_bytes().await;
    let metrics = Arc::new(Metrics::new());
    let fixture = Fixture::with(1000, |o| {
        o.resident_bytes_max = 2 * one;
        o.metrics = metrics.clone();
    });
    let fixture = fixture.await;
    let counts = || ["restart", "evicted", "replaced"].map(|why| cold(&metrics, why));
    fixture.put("a", 1).await;
    fixture.put("a", 2).await;
    until("1 left", || fixture.counts().2 == 1).await;
    assert_eq!(counts(), [0, 0, 0], "an upload is warm");
    drop(fixture.registry.acquire("a@1").await.unwrap());
    assert_eq!(counts(), [0, 0, 1]);
    fixture.put("b", 3).await;
    drop(fixture.registry.acquire("a@2").await.unwrap());
    assert_eq!(counts(), [0, 1, 1]);
    let Fixture { registry, dir, .. } = fixture;
    drop(registry);
    let registry = loop {
        let o = super::RegistryOptions { metrics: metrics.clone(), ..options(dir.path()) };
        match super::open(o, 1000).await {
            Ok((registry, _)) => break registry,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    registry.acquire("b").await.unwrap();
    assert_eq!(counts(), [1, 1, 1]);
}
