//! Ten times more than it can do: the server goes on doing what it can and says no to the rest at
//! once.
//!
//! A short run only checks that every answer is whole or a refusal that says when to come back. A
//! soak measures for 60 seconds: goodput at least 95 % of the peak, refusals in under 20 ms (p99),
//! memory flat.

use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::live::PATIENCE;
use support::server::{Server, kilobytes};
use support::soak::{rounds, soak};
use support::tiny;

/// Running at once, and waiting: what the peak is measured with is between the two.
const RUNNING: usize = 16;
const WAITING: usize = 32;
const CLIENTS: usize = 32;
const TOKENS: usize = 800;
/// Requests under way, so that a client on a slow machine does not run out of files.
const IN_FLIGHT_MAX: usize = 400;

/// One answer.
#[derive(Clone, Copy)]
struct Seen {
    ended: Instant,
    took: Duration,
    whole: bool,
}

struct Load {
    client: reqwest::Client,
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Load {
    fn has_served_and_refused(&self) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.iter().any(|s| s.whole) && seen.iter().any(|s| !s.whole)
    }

    async fn ask(&self) {
        let body = json!({"model": "tiny", "prompt": "go on", "max_tokens": TOKENS,
                          "ignore_eos": true, "temperature": 0});
        let begun = Instant::now();
        let request = self.client.post(format!("{}/v1/completions", self.url)).json(&body);
        let answer = request.send().await.expect("an answer");
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body: Value = answer.json().await.expect("JSON");
        match status {
            200 => assert_eq!(body["usage"]["completion_tokens"], TOKENS),
            429 => {
                assert_eq!(body["error"]["code"], "queue_full");
                let seconds = headers.get("retry-after").expect("when to come back");
                assert!(seconds.to_str().is_ok_and(|s| s.parse::<u32>().is_ok_and(|s| s > 0)));
            }
            _ => panic!("{status} {body}"),
        }
        let ended = Instant::now();
        let seen = Seen { ended, took: ended - begun, whole: status == 200 };
        self.seen.lock().unwrap().push(seen);
    }
}

/// Whole answers a second between two instants.
fn goodput(seen: &[Seen], from: Instant, to: Instant) -> f64 {
    let whole = seen.iter().filter(|s| s.whole && (from..to).contains(&s.ended)).count();
    whole as f64 / (to - from).as_secs_f64()
}

async fn peak(load: &Arc<Load>, time: Duration) -> f64 {
    let begun = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let load = load.clone();
            tokio::spawn(async move {
                while begun.elapsed() < time {
                    load.ask().await;
                }
            })
        })
        .collect();
    for client in clients {
        client.await.expect("answered");
    }
    // The first fifth is filling up, and after the end it empties.
    let seen = std::mem::take(&mut *load.seen.lock().unwrap());
    goodput(&seen, begun + time / 5, begun + time)
}

/// Sends one more request if so many may be under way, and looks at those that ended.
fn keep_asking(requests: &mut tokio::task::JoinSet<()>, load: &Arc<Load>) {
    if requests.len() < IN_FLIGHT_MAX {
        let load = load.clone();
        requests.spawn(async move { load.ask().await });
    }
    while let Some(done) = requests.try_join_next() {
        done.expect("answered");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_times_too_much_is_refused_at_once_and_the_rest_is_served() {
    let seconds = rounds(2, 60) as u64;
    let dir = tempfile::tempdir().expect("directory");
    let model = dir.path().join("model");
    std::fs::create_dir(&model).expect("directory");
    let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                      "max_position_embeddings": 1024});
    tiny::write(&model, &case, tiny::Storage::F32, 1);
    let (running, waiting) = (RUNNING.to_string(), WAITING.to_string());
    let flags = [
        "--served-name",
        "tiny",
        "--threads",
        "1",
        "--kv-bytes",
        "64MiB",
        "--sequences-max",
        &running,
        "--waiting-max",
        &waiting,
    ];
    let server = Server::start(&model, &dir.path().join("data"), &flags);
    // Idle connections would hold places that new ones wait for.
    let client = support::client().pool_max_idle_per_host(CLIENTS);
    let client = client.build().expect("a client");
    let load = Arc::new(Load { client, url: server.url.clone(), seen: Arc::default() });

    let time = Duration::from_secs(seconds);
    let peak = peak(&load, (time / 3).max(Duration::from_secs(1))).await;
    let (begun, gap) = (Instant::now(), Duration::from_secs_f64(0.1 / peak.max(1.0)));
    let (mut requests, mut sizes) = (tokio::task::JoinSet::new(), Vec::new());
    let mut due = begun;
    // On a machine with much else to do it takes longer until there are both.
    while begun.elapsed() < time || !load.has_served_and_refused() {
        assert!(begun.elapsed() < PATIENCE, "some are served and some refused");
        keep_asking(&mut requests, &load);
        if sizes.len() as u64 <= begun.elapsed().as_secs() {
            sizes.push(kilobytes(server.id(), "VmRSS:"));
        }
        due += gap;
        tokio::time::sleep_until(due.into()).await;
    }
    let end = Instant::now();
    while let Some(done) = requests.join_next().await {
        done.expect("answered");
    }
    let seen = load.seen.lock().unwrap();
    let good = goodput(&seen, begun + time / 10, end);
    let mut refused: Vec<Duration> = seen.iter().filter(|s| !s.whole).map(|s| s.took).collect();
    refused.sort();
    let p99 = refused[refused.len() * 99 / 100];
    let (first, last) = (sizes[sizes.len() / 5], sizes[sizes.len() - 1]);
    let offered = seen.len() as f64 / (end - begun).as_secs_f64();
    eprintln!(
        "peak {peak:.1}/s; offered {offered:.1}/s: {good:.1}/s served ({:.3} of the peak), {} \
         refused, p50 {:?}, p99 {p99:?}; memory {:.1} then {:.1} MiB",
        good / peak,
        refused.len(),
        refused[refused.len() / 2],
        first as f64 / 1024.0,
        last as f64 / 1024.0,
    );
    if soak() {
        assert!(good >= 0.95 * peak, "{good} of {peak}");
        assert!(p99 < Duration::from_millis(20), "{p99:?}");
        assert!(last as f64 <= 1.02 * first as f64, "{first} then {last} kB");
    }
}
