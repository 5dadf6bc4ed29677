//! Loading, serving and unloading, over and over: what is taken is given back.
//!
//! Each cycle uploads one content three times at once, asks for up to 16 answers, hangs up here and
//! there, and deletes what it made. 24 cycles; in a soak 2,000, and then the server's memory is
//! judged as well: in the second half it may grow by 2 %.

use reqwest::Method;
use serde_json::json;
use std::io::Write;
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use support::adapters::Noise;
use support::live::{Live, form, hello, whole, with};
use support::server::kilobytes;

/// Cycles go on side by side, each with contents and names of its own.
const WORKERS: usize = 4;
const CONTENTS: usize = 4;
/// Memory is looked at so often.
const LOOKS: usize = 40;
/// Nothing in a cycle takes long: what does is stuck.
const STUCK: Duration = Duration::from_secs(120);

struct Worker {
    live: Arc<Live>,
    me: usize,
    contents: Vec<PathBuf>,
    noise: Noise,
}

impl Worker {
    async fn cycle(&mut self) {
        let content = self.contents[self.noise.below(CONTENTS)].clone();
        let [a, b] = ["a", "b"].map(|which| format!("w{}-{which}", self.me));
        let put = async |name: &str| {
            let put = || self.live.request(Method::PUT, &format!("/v1/adapters/{name}"));
            let answer = loop {
                let answer = whole(put().multipart(form(&content))).await;
                // Twelve come at once, for four places.
                if answer.status != 429 {
                    break answer;
                }
                assert_eq!(answer.error(), "429 uploads_busy -");
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            assert!((200..=201).contains(&answer.status), "{name}: {}", answer.text);
        };
        tokio::join!(put(&a), put(&b), put(&a));
        if self.noise.below(8) == 0 {
            self.break_off_an_upload();
        }
        let n = 1 + self.noise.below(16);
        let impatience = Duration::from_millis(self.noise.below(20) as u64);
        tokio::join!(self.answered(&a, n), self.left(&b, n, impatience), self.hung_up(&a, n));
        let delete = async |name: &str| {
            let path = format!("/v1/adapters/{name}?drain_seconds=60");
            let answer = whole(self.live.request(Method::DELETE, &path)).await;
            assert_eq!((answer.status, &answer.json()["cut"]), (200, &json!(0)), "{}", answer.text);
        };
        tokio::join!(delete(&a), delete(&b));
    }

    async fn answered(&self, name: &str, n: usize) {
        let answer = self.live.chat(with(hello(name, 12), json!({"n": n, "temperature": 1}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.json()["choices"].as_array().map(Vec::len), Some(n));
    }

    /// A stream whose reader leaves after its first bytes.
    async fn hung_up(&self, name: &str, n: usize) {
        let body = with(hello(name, 2000), json!({"n": n, "stream": true}));
        let ask = self.live.request(Method::POST, "/v1/chat/completions").json(&body);
        let mut answer = ask.send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
        assert!(answer.chunk().await.expect("bytes").is_some());
    }

    /// A request whose client does not wait for any answer.
    async fn left(&self, name: &str, n: usize, impatience: Duration) {
        let body = with(hello(name, 2000), json!({"n": n}));
        let ask = self.live.request(Method::POST, "/v1/chat/completions").json(&body);
        let _ = tokio::time::timeout(impatience, ask.send()).await;
    }

    fn break_off_an_upload(&self) {
        let address = self.live.server.url.strip_prefix("http://").expect("http");
        let mut socket = TcpStream::connect(address).expect("connected");
        let head = format!(
            "PUT /v1/adapters/w{}-c HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\
             content-type: application/octet-stream\r\n\r\nGGUF and no more",
            self.me
        );
        socket.write_all(head.as_bytes()).expect("sent");
    }
}

/// Bytes of memory of a process.
fn median(mut values: Vec<u64>) -> u64 {
    values.sort();
    values[values.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cycles_of_load_serve_and_unload_leave_nothing_behind() {
    let cycles = support::soak::rounds(24, 2_000);
    // Little KV memory: all of it is touched early on.
    let live = Arc::new(Live::start(&["--kv-bytes", "4MiB"]));
    let mut workers: Vec<Worker> = (0..WORKERS)
        .map(|me| Worker {
            live: live.clone(),
            me,
            contents: (0..CONTENTS)
                .map(|i| live.adapter_files((me * CONTENTS + i) as u64, 0.3))
                .collect(),
            noise: Noise(me as u64),
        })
        .collect();
    let each = usize::max(1, cycles / WORKERS / LOOKS);
    let looks = cycles / WORKERS / each;
    let mut memory = Vec::new();
    for _ in 0..looks {
        let rounds = workers.drain(..).map(|mut worker| {
            tokio::spawn(async move {
                for _ in 0..each {
                    let cycle = tokio::time::timeout(STUCK, worker.cycle()).await;
                    cycle.expect("nothing is stuck");
                }
                worker
            })
        });
        for round in rounds.collect::<Vec<_>>() {
            workers.push(round.await.expect("a round"));
        }
        live.idle().await;
        memory.push(kilobytes(live.server.id(), "VmRSS:"));
    }
    let done = looks * each * WORKERS;
    assert_eq!(live.metric("polylora_adapter_loads_total").await, done as f64, "one a content");
    assert_eq!(live.metric("polylora_adapter_evictions_total").await, 0.0);
    let list = live.get("/v1/adapters").await.json();
    assert_eq!((&list["data"], &list["resident_bytes"]), (&json!([]), &json!(0)));
    let staging = std::fs::read_dir(live.data().join("staging")).expect("a directory");
    assert_eq!(staging.count(), 0);
    eprintln!("{done} cycles, memory in kB: {memory:?}");
    if support::soak::soak() {
        let warm = looks / 2;
        let first = median(memory[warm..warm + 5].to_vec());
        let last = median(memory[looks - 5..].to_vec());
        assert!(last as f64 <= 1.02 * first as f64, "{first} kB became {last}");
    }
}
