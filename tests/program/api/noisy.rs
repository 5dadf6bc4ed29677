//! A noisy neighbour, measured: two quiet tenants' time to a first token, alone and beside a third
//! that asks a hundred times as often.
//!
//! A short run only checks that quiet tenants are always served. In a soak each asks a hundred
//! times, and the 99th percentile beside the flood may be twice the one alone. What fairness
//! promises in steps is in `parts/turns`.

use crate::api::keys::make;
use reqwest::{Method, RequestBuilder};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::live::{BASE, Live, whole};
use tokio::sync::Semaphore;

/// Between two requests of a quiet tenant; the flood's come a hundred times as often.
const PERIOD: Duration = Duration::from_millis(400);
/// Requests that the flood has open at once, at most.
const FLOOD_OPEN_MAX: usize = 100;

fn asking(live: &Live, key: &str, text: String, tokens: usize) -> RequestBuilder {
    let body = json!({"model": BASE, "prompt": text, "max_tokens": tokens, "temperature": 0,
                      "ignore_eos": true});
    live.request(Method::POST, "/v1/completions").bearer_auth(key).json(&body)
}

async fn once(live: &Live, key: &str, text: String, tokens: usize) -> (u16, Duration) {
    let begun = Instant::now();
    let answer = whole(asking(live, key, text, tokens)).await;
    (answer.status, begun.elapsed())
}

/// Latencies of single-token answers of two tenants, in order of size.
async fn quiet(live: &Live, keys: &[String; 2], rounds: usize, mark: &str) -> Vec<Duration> {
    let mut times = Vec::new();
    for round in 0..rounds {
        let text = |who: usize| format!("{mark} {who} {round} {}", "lorem ipsum ".repeat(100));
        let (a, b) =
            tokio::join!(once(live, &keys[0], text(0), 1), once(live, &keys[1], text(1), 1));
        assert_eq!((a.0, b.0), (200, 200), "a quiet tenant is always served");
        times.extend([a.1, b.1]);
        tokio::time::sleep(PERIOD).await;
    }
    times.sort_unstable();
    times
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quiet_tenants_are_served_beside_a_flood() {
    let rounds = support::soak::rounds(3, 100);
    let flags =
        ["--api-key", "secret", "--rows-max", "64", "--sequences-max", "16", "--waiting-max", "64"];
    let live = Arc::new(Live::start(&flags));
    let key = async |tenant: &str| {
        make(&live, json!({"scopes": ["inference"], "tenant": tenant})).await.0
    };
    let keys = [key("one").await, key("two").await];
    let flooder = key("flood").await;
    let alone = quiet(&live, &keys, rounds, "alone").await;

    let (served, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let flood = tokio::spawn({
        let (live, served, refused) = (live.clone(), served.clone(), refused.clone());
        async move {
            let mut ticks = tokio::time::interval(PERIOD / 100);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let places = Arc::new(Semaphore::new(FLOOD_OPEN_MAX));
            for i in 0.. {
                ticks.tick().await;
                let Ok(place) = places.clone().try_acquire_owned() else {
                    continue; // as many as it may have open
                };
                let (served, refused) = (served.clone(), refused.clone());
                let text = format!("{i} {}", "dolor sit amet ".repeat(16));
                let request = asking(&live, &flooder, text, 128);
                tokio::spawn(async move {
                    let answer = request.send().await.ok().filter(|a| a.status() == 200);
                    let whole = match answer {
                        Some(answer) => answer.bytes().await.is_ok(),
                        None => false,
                    };
                    let counter = if whole { served } else { refused };
                    counter.fetch_add(1, Ordering::Relaxed);
                    drop(place);
                });
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let flooded = quiet(&live, &keys, rounds, "flooded").await;
    flood.abort();
    let p = |times: &[Duration], q: usize| times[(times.len() * q / 100).min(times.len() - 1)];
    println!(
        "quiet, alone: p50 {:?} p99 {:?}; beside the flood: p50 {:?} p99 {:?}; flood: {} served, \
         {} refused",
        p(&alone, 50),
        p(&alone, 99),
        p(&flooded, 50),
        p(&flooded, 99),
        served.load(Ordering::Relaxed),
        refused.load(Ordering::Relaxed)
    );
    if support::soak::soak() {
        assert!(p(&flooded, 99) <= 2 * p(&alone, 99), "the flood is felt");
    }
}
