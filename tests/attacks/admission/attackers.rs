//! What the long run sends, and the clients that send it.
//!
//! Owns the attacks. Never judges. The thing to know: what the clients themselves compute gives way
//! to everything else on the machine, for it is the server that is judged.

use super::long::MODEL;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";
/// Between a refusal, or a connection that was closed, and the next try.
const PAUSE: Duration = Duration::from_millis(20);

/// What one tenant does.
#[derive(Clone)]
pub struct Attack {
    /// Its number in the list of attacks, and what it is.
    pub name: &'static str,
    pub clients: usize,
    pub does: Does,
    /// Whether its requests are ones that the server computes.
    pub within_bounds: bool,
}

#[derive(Clone)]
pub enum Does {
    /// Each client posts this to the path, over and over.
    Flood { path: &'static str, body: String },
    /// Each says this on a connection and then nothing; when it is closed, on the next.
    Stall { says: String },
}

impl Attack {
    /// Attacks the server at `url` until told to stop; how often a client began.
    pub fn until(&self, stop: &AtomicBool, url: &str, key: &str) -> usize {
        assert!(polylora_kernels::give_way(), "this thread gives way");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        // Its connections end with it.
        let client = support::client().build().expect("a client");
        let one = async || match &self.does {
            Does::Flood { path, body } => {
                let request = client.post(format!("{url}{path}")).bearer_auth(key);
                let request = request.header("content-type", "application/json");
                flood(stop, &request.body(body.clone())).await
            }
            Does::Stall { says } => stall(stop, url, &says.replace("KEY", key)).await,
        };
        let all = futures::future::join_all((0..self.clients).map(|_| one()));
        runtime.expect("a runtime").block_on(all).into_iter().sum()
    }
}

async fn flood(stop: &AtomicBool, request: &reqwest::RequestBuilder) -> usize {
    let mut sent = 0;
    while !stop.load(Relaxed) {
        if let Ok(answer) = request.try_clone().expect("a body of bytes").send().await {
            let busy = answer.status().as_u16() == 429;
            let _ = answer.bytes().await;
            if busy {
                tokio::time::sleep(PAUSE).await;
            }
        }
        sent += 1;
    }
    sent
}

async fn stall(stop: &AtomicBool, url: &str, says: &str) -> usize {
    let address = url.strip_prefix("http://").expect("http");
    let mut begun = 0;
    while !stop.load(Relaxed) {
        begun += 1;
        if let Ok(mut stream) = TcpStream::connect(address).await {
            let _ = stream.write_all(says.as_bytes()).await;
            let mut answer = [0; 1024];
            while !stop.load(Relaxed) {
                let read = tokio::time::timeout(10 * PAUSE, stream.read(&mut answer)).await;
                if matches!(read, Ok(Ok(0) | Err(_))) {
                    break;
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    begun
}

/// Words that no two requests share, of so many bytes and a few more.
fn words(bytes: usize) -> String {
    let (mut noise, mut text) = (88_172_645_463_325_252u64 + bytes as u64, String::new());
    while text.len() < bytes {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        text += &format!("{:x} ", noise & 0xff_ffff);
    }
    text
}

fn flood_of(name: &'static str, clients: usize, path: &'static str, body: String) -> Attack {
    Attack { name, clients, does: Does::Flood { path, body }, within_bounds: false }
}

/// A chat of eight tokens with more fields.
fn chat(more: Value) -> String {
    let mut body =
        json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("one").clone());
    body.to_string()
}

/// A head, and this much of a body that promises 3.9 MB.
fn begins(route: &str, kind: &str, bytes: usize) -> Does {
    let says = format!(
        "{route} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer KEY\r\ncontent-type: {kind}\r\n\
         content-length: 3900000\r\n\r\n{}",
        "[".repeat(bytes)
    );
    Does::Stall { says }
}

/// As many clients as the attacks have with ordinary chats, to compare with.
pub fn ordinary(clients: usize) -> Attack {
    flood_of("ordinary chats", clients, CHAT, chat(json!({})))
}

pub fn attacks() -> Vec<Attack> {
    let prompt = |bytes| json!({"model": MODEL, "prompt": words(bytes)}).to_string();
    let lists = format!("{{\"messages\":[{}0]}}", "[],".repeat(1_300_000));
    let part = json!({"type": "text", "text": "a"});
    let tree = chat(json!({"messages": [{"role": "user", "content": vec![part; 6000]}]}));
    let stop = chat(json!({"stop": "s".repeat(3_900_000), "n": 16}));
    let stops = chat(json!({"stop": vec!["e".repeat(1000); 16]}));
    let weight = format!("mallory-x:1.{}", "0".repeat(3_900_000));
    let weight = chat(json!({"model": weight, "n": 16, "stream": true}));
    let tokenize = json!({"prompt": words(60_000)}).to_string();
    let stall = |name, clients, does| Attack { name, clients, does, within_bounds: false };
    vec![
        flood_of("3 prompt of 3.9 MB", 4, "/v1/completions", prompt(3_900_000)),
        flood_of("3 prompt of 300 kB", 4, "/v1/completions", prompt(300_000)),
        flood_of("3 tokenize 60 kB", 8, "/tokenize", tokenize),
        flood_of("4 output without end", 6, CHAT, chat(json!({"model": "mallory-long"}))),
        flood_of("6 lists in messages", 8, CHAT, lists),
        Attack { within_bounds: true, ..flood_of("6 tree within bounds", 8, CHAT, tree) },
        stall(
            "7 bodies that stop",
            200,
            begins(&format!("POST {CHAT}"), "application/json", 1 << 18),
        ),
        flood_of("8 stop of 3.9 MB", 4, CHAT, stop),
        Attack { within_bounds: true, ..flood_of("8 stops within bounds", 4, CHAT, stops) },
        flood_of("9 weight of 3.9 MB", 4, CHAT, weight),
        stall("10 silent connections", 1100, Does::Stall { says: String::new() }),
        stall(
            "15 uploads that stop",
            16,
            begins("PUT /v1/adapters/mallory-u", "application/zip", 2),
        ),
        flood_of("17 slow template", 8, CHAT, chat(json!({"model": "mallory-slow"}))),
    ]
}
