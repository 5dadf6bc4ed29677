//! A client of another tenant that asks the same small thing over and over, and what it saw.

use reqwest::Method;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// What the canary asks for.
#[derive(Clone)]
pub enum Song {
    /// `GET /live`, without a key.
    Live,
    /// A greedy, streamed chat of four tokens with this model; its time is that to the first token.
    Chat(String),
}

/// A canary at work; it stops when told to.
pub struct Canary {
    on: Arc<AtomicBool>,
    task: JoinHandle<Seen>,
}

/// What it saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Sorted.
    pub times: Vec<Duration>,
    /// Statuses other than 200, and errors of the connection.
    pub bad: Vec<String>,
}

impl Seen {
    /// The time below which this share (0 to 1) of the answers came.
    pub fn quantile(&self, share: f64) -> Duration {
        let last = self.times.len().saturating_sub(1);
        self.times.get((last as f64 * share).ceil() as usize).copied().unwrap_or_default()
    }
}

impl Canary {
    /// Begins to ask the server at `url`, with `key` if there is one.
    pub fn start(url: &str, key: Option<&str>, song: Song) -> Self {
        let on = Arc::new(AtomicBool::new(true));
        let singing = on.clone();
        let (url, key) = (url.to_owned(), key.map(str::to_owned));
        let task = tokio::spawn(async move {
            let client = support::client().build().expect("a client");
            let mut seen = Seen::default();
            while singing.load(Ordering::Relaxed) {
                let request = match &song {
                    Song::Live => client.request(Method::GET, format!("{url}/live")),
                    Song::Chat(model) => {
                        let path = format!("{url}/v1/chat/completions");
                        client.request(Method::POST, path).json(&chat(model))
                    }
                };
                let request = match &key {
                    Some(key) => request.bearer_auth(key),
                    None => request,
                };
                let begun = Instant::now();
                match request.send().await {
                    Ok(answer) if answer.status().as_u16() == 200 => {
                        match first(answer, begun).await {
                            Ok(time) => seen.times.push(time),
                            Err(e) => seen.bad.push(e.to_string()),
                        }
                    }
                    Ok(answer) => seen.bad.push(answer.status().to_string()),
                    Err(e) => seen.bad.push(e.to_string()),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            seen.times.sort();
            seen
        });
        Self { on, task }
    }

    /// What it saw until now.
    pub async fn stop(self) -> Seen {
        self.on.store(false, Ordering::Relaxed);
        self.task.await.expect("the canary sings to its end")
    }
}

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Say hi."}],
           "temperature": 0, "max_tokens": 4, "stream": true})
}

/// Reads an answer to its end; the time until the first token, which is a stream's second event, or
/// until the end of what is no stream.
async fn first(mut answer: reqwest::Response, begun: Instant) -> reqwest::Result<Duration> {
    let (mut text, mut time) = (Vec::new(), None);
    while let Some(chunk) = answer.chunk().await? {
        text.extend_from_slice(&chunk);
        let events = String::from_utf8_lossy(&text).matches("data: ").count();
        if time.is_none() && events > 1 {
            time = Some(begun.elapsed());
        }
    }
    Ok(time.unwrap_or_else(|| begun.elapsed()))
}
