//! A running server on a tiny model, and the ways to talk to it.

use crate::adapters::{Recipe, write_adapter};
use crate::server::Server;
use crate::tiny;
use polylora::shape::{ModelShape, Projection};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The base's served name.
pub const BASE: &str = "tiny";
/// Long enough for an answer that is still running when the test acts on it.
pub const CONTEXT: usize = 32_768;
/// After so long what a test waits for will never come. No promise of the server's: only a way to
/// end a test that hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Tokens of such an answer.
pub const ENDLESS: usize = CONTEXT - 500;

/// A server and its directory.
pub struct Live {
    pub server: Server,
    dir: TempDir,
    client: Client,
}

/// An answer that was read whole.
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().expect("ASCII"))
    }
    /// `status code param`, after checking that all four keys are there.
    pub fn error(&self) -> String {
        let body = self.json();
        let error = body["error"].as_object().expect("an error object");
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()));
        let text = |key: &str| error[key].as_str().unwrap_or("-");
        format!("{} {} {}", self.status, text("code"), text("param"))
    }
}

/// The tiny model's config over the common one.
fn case() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
           "max_position_embeddings": CONTEXT})
}

impl Live {
    /// Starts the program with more flags.
    pub fn start(more: &[&str]) -> Self {
        Self::start_logging(more, Stdio::inherit())
    }

    /// The same, with the program's log going to `log`.
    pub fn start_logging(more: &[&str], log: Stdio) -> Self {
        Self::start_in(Self::home(), more, log)
    }

    /// Kills it, as a crash would; what is on disk stays.
    pub fn crash(self) -> TempDir {
        let Self { server, dir, .. } = self;
        drop(server);
        dir
    }

    /// Stops it as an operator would.
    pub fn stop(self) -> TempDir {
        let Self { server, dir, .. } = self;
        assert!(server.terminate().success(), "exit code 0");
        dir
    }

    /// Kills it and starts it again on what is on disk.
    pub fn crash_and_restart(self, more: &[&str]) -> Self {
        Self::start_in(self.crash(), more, Stdio::inherit())
    }

    /// Waits for the end it was asked for and starts it again.
    pub fn restart_after_its_end(self, more: &[&str]) -> Self {
        let Self { server, dir, .. } = self;
        assert!(server.wait().success(), "exit code 0");
        Self::start_in(dir, more, Stdio::inherit())
    }

    /// Starts it on what a server has left in `dir`.
    pub fn start_in(dir: TempDir, more: &[&str], log: Stdio) -> Self {
        Self::start_with(dir, more, log, &[])
    }

    /// A directory with the model in it, for a server that is to be started.
    pub fn home() -> TempDir {
        let dir = tempfile::tempdir().expect("directory");
        let model = dir.path().join("model");
        std::fs::create_dir(&model).expect("directory");
        tiny::write(&model, &case(), tiny::Storage::F32, 1);
        dir
    }

    /// The same with more in the program's environment.
    pub fn start_with(
        dir: TempDir,
        more: &[&str],
        log: Stdio,
        environment: &[(&str, String)],
    ) -> Self {
        let model = dir.path().join("model");
        let mut flags = vec!["--served-name", BASE, "--threads", "1"];
        for (flag, usual) in [("--kv-bytes", "64MiB"), ("--adapter-bytes-max", "16MiB")] {
            if !more.contains(&flag) {
                flags.extend_from_slice(&[flag, usual]);
            }
        }
        flags.extend_from_slice(more);
        let server = Server::start_in(&model, &dir.path().join("data"), &flags, log, environment);
        let client = crate::client().build().expect("a client");
        Self { server, dir, client }
    }

    /// Where the server keeps what it was given.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.server.url))
    }

    pub async fn get(&self, path: &str) -> Answer {
        whole(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        whole(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn chat(&self, body: Value) -> Answer {
        self.post("/v1/chat/completions", body).await
    }

    pub async fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", body).await
    }

    /// Files of a random adapter.
    pub fn adapter_files(&self, seed: u64, strength: f32) -> PathBuf {
        self.adapter_of(4, &[Projection::Q, Projection::Down], seed, strength)
    }

    /// The same of another rank, at other projections.
    pub fn adapter_of(
        &self,
        rank: usize,
        targets: &[Projection],
        seed: u64,
        strength: f32,
    ) -> PathBuf {
        let dir = self.dir.path().join(format!("adapter-{rank}-{seed}-{strength}"));
        let shape = ModelShape::from_config(&tiny::config(&case())).expect("a shape");
        let mut recipe = Recipe::new(rank, targets, seed);
        recipe.strength = strength;
        write_adapter(&dir, &shape, &recipe);
        dir
    }

    /// Uploads a random adapter as multipart.
    pub async fn upload(&self, name: &str, seed: u64) -> Answer {
        let form = form(&self.adapter_files(seed, 0.3));
        let path = format!("/v1/adapters/{name}");
        whole(self.request(Method::PUT, &path).multipart(form)).await
    }

    /// One figure of `/metrics`.
    pub async fn metric(&self, series: &str) -> f64 {
        let page = self.get("/metrics").await.text;
        let line = page.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |v| v.parse().expect("a number"))
    }

    /// Waits until nothing runs or waits; panics when it takes too long.
    pub async fn idle(&self) {
        self.until("nothing runs", async || {
            self.metric("polylora_requests_running").await == 0.0
                && self.metric("polylora_requests_waiting").await == 0.0
        })
        .await;
    }

    pub async fn until(&self, what: &str, is: impl AsyncFn() -> bool) {
        let begun = Instant::now();
        while !is().await {
            assert!(begun.elapsed() < PATIENCE, "never so: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A socket to the server with this request on its way.
    pub fn socket(&self, head: &str, body: &str) -> TcpStream {
        let address = self.server.url.strip_prefix("http://").expect("http");
        let mut socket = TcpStream::connect(address).expect("connected");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let length = body.len();
        let request = format!(
            "{head} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        socket.write_all(request.as_bytes()).expect("sent");
        socket
    }
}

/// The parts of an upload, named by their file names.
pub fn form(dir: &Path) -> reqwest::multipart::Form {
    let mut form = reqwest::multipart::Form::new();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let bytes = std::fs::read(dir.join(name)).expect("a file");
        let part = reqwest::multipart::Part::bytes(bytes).file_name(name);
        form = form.part(name, part);
    }
    form
}

pub async fn whole(request: RequestBuilder) -> Answer {
    let response = request.send().await.expect("an answer");
    Answer {
        status: response.status().as_u16(),
        headers: response.headers().clone(),
        text: response.text().await.expect("a body"),
    }
}

/// The rest of a socket: head, and body with its chunks put together.
pub fn rest(mut socket: TcpStream) -> (String, String) {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).expect("read to the end");
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, mut chunks) = text.split_once("\r\n\r\n").expect("a head");
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (head.to_owned(), chunks.to_owned());
    }
    let mut body = String::new();
    while let Some((size, after)) = chunks.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk size");
        body += &after[..size];
        chunks = after[size..].strip_prefix("\r\n").expect("a chunk's end");
    }
    (head.to_owned(), body)
}

/// A chat body with greedy choice, never ending by itself.
pub fn hello(model: &str, tokens: usize) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "hello"}],
           "temperature": 0, "max_tokens": tokens, "ignore_eos": true})
}

/// `base` with more fields.
pub fn with(mut base: Value, more: Value) -> Value {
    let fields = base.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    base
}
