//! The program under attack, and how it is asked whether it is well.

use crate::hostile::adapters::{Case, Sent};
use crate::hostile::{requests, tiny};
use polylora::error::codes::GROUPS;
use polylora::shape::{ModelShape, Projection};
use reqwest::multipart::{Form, Part};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use support::adapters::{Recipe, write_adapter};
use support::live::PATIENCE;
use support::server::{Server, kilobytes};
use tempfile::TempDir;

/// The base, and an adapter that is always there.
pub const BASE: &str = "tiny";
pub const GOOD: &str = "good";
/// Memory that the server may take beyond what it had when it was ready.
const GROWTH_KB_MAX: u64 = 96 << 10;

pub struct Hostile {
    server: Server,
    dir: TempDir,
    client: Client,
    canary: Value,
    kilobytes: u64,
}

pub struct Answer {
    pub status: u16,
    pub text: String,
}

impl Answer {
    /// The code of an error.
    pub fn code(&self) -> Option<&str> {
        if self.status < 400 {
            return None;
        }
        let from = self.text.find("\"code\":\"")? + 8;
        self.text[from..].split('"').next()
    }
}

/// The model's config over the common one.
pub fn case() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
           "max_position_embeddings": 256})
}

pub fn shape() -> ModelShape {
    ModelShape::from_config(&tiny::config(&case())).expect("a shape")
}

impl Hostile {
    pub async fn start() -> Self {
        Self::with(&["--kv-bytes", "16MiB"]).await
    }

    pub async fn with(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let model = dir.path().join("model");
        std::fs::create_dir(&model).expect("a directory");
        tiny::write(&model, &case(), tiny::Storage::F32, 1);
        let mut all = vec!["--served-name", BASE, "--threads", "1", "--context", "256"];
        all.extend(["--upload-bytes-max", "1MiB", "--request-bytes-max", "16MiB"]);
        all.extend(["--adapter-bytes-max", "16MiB", "--log-filter", "off"]);
        all.extend(flags);
        let server = Server::start(&model, &dir.path().join("data"), &all);
        let client = support::client().build().expect("a client");
        let mut hostile = Self { server, dir, client, canary: Value::Null, kilobytes: 0 };
        let put = hostile.put(GOOD, &hostile.good(1)).await;
        assert_eq!(put.status, 201, "{}", put.text);
        hostile.canary = hostile.sing().await;
        hostile.kilobytes = kilobytes(hostile.server.id(), "VmRSS:");
        hostile
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.server.url))
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        whole(self.request(Method::POST, path).json(body)).await
    }

    pub async fn metric(&self, series: &str) -> f64 {
        let page = whole(self.request(Method::GET, "/metrics")).await.text;
        let line = page.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0.0, |v| v.parse().expect("a number"))
    }

    /// A random adapter's files.
    fn good(&self, seed: u64) -> Vec<(String, Vec<u8>)> {
        let dir = self.dir.path().join(format!("good-{seed}"));
        write_adapter(&dir, &shape(), &Recipe::new(4, &[Projection::Q, Projection::Down], seed));
        let names = ["adapter_config.json", "adapter_model.safetensors"];
        names.map(|n| (n.to_owned(), std::fs::read(dir.join(n)).expect("a file"))).to_vec()
    }

    pub async fn put(&self, name: &str, parts: &[(String, Vec<u8>)]) -> Answer {
        let mut form = Form::new();
        for (file, bytes) in parts {
            let part = Part::bytes(bytes.clone()).file_name(file.clone());
            form = form.part(file.clone(), part);
        }
        let path = format!("/v1/adapters/{name}");
        whole(self.request(Method::PUT, &path).multipart(form)).await
    }

    pub async fn upload(&self, case: &Case) -> Answer {
        match &case.sent {
            Sent::Parts(parts) => self.put("bad", parts).await,
            Sent::Body(kind, body) => {
                let request = self.request(Method::PUT, "/v1/adapters/bad");
                whole(request.header("content-type", *kind).body(body.clone())).await
            }
            Sent::Path(path) => {
                let body = self.good(2)[1].1.clone();
                let request = self.request(Method::PUT, &format!("/v1/adapters/{path}"));
                whole(request.header("content-type", "application/zip").body(body)).await
            }
        }
    }

    pub async fn send(&self, case: &requests::Case) -> Answer {
        let mut request = self.request(case.method.clone(), &case.path);
        for (name, value) in &case.headers {
            request = request.header(*name, value.as_slice());
        }
        let request = request.body(case.body.clone());
        match request.send().await {
            // A head beyond the server's bound is answered while it is still being written.
            Err(e) if case.what == "headers" && e.is_request() => {
                Answer { status: 431, text: String::new() }
            }
            sent => read(sent).await,
        }
    }

    /// Bytes on a socket of their own; what came back.
    pub fn speak(&self, bytes: &[u8]) -> String {
        let address = self.server.url.strip_prefix("http://").expect("http");
        let mut socket = TcpStream::connect(address).expect("connected");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // The server may answer and close before it has read everything.
        let _ = socket.write_all(bytes);
        let _ = socket.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// What the good adapter and the base say to a fixed question.
    async fn sing(&self) -> Value {
        let mut songs = Vec::new();
        for model in [GOOD, BASE] {
            let body = json!({"model": model, "prompt": "canary", "temperature": 0,
                              "max_tokens": 8, "logprobs": 2, "ignore_eos": true});
            let answer = self.post("/v1/completions", &body).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            let answer: Value = serde_json::from_str(&answer.text).expect("JSON");
            songs.push(answer["choices"].clone());
        }
        songs.into()
    }

    /// Panics unless the server says what it said when it was fresh.
    pub async fn canary(&self, after: &str) {
        assert_eq!(self.sing().await, self.canary, "after {after}");
        let live = whole(self.request(Method::GET, "/ready")).await;
        assert_eq!(live.status, 200, "after {after}: {}", live.text);
    }

    /// A refusal is the client's fault, in OpenAI's shape, and the table has its code and status.
    pub fn check_documented(&self, answer: &Answer, what: &str) {
        assert!((400..500).contains(&answer.status), "{what}");
        if answer.text.is_empty() {
            // What is no HTTP is answered below our routes, without a body.
            assert!([400, 408, 414, 431].contains(&answer.status), "{what}");
            return;
        }
        let body: Value = serde_json::from_str(&answer.text).expect(what);
        let error = body["error"].as_object().expect(what);
        let keys: Vec<&String> = error.keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "{what}");
        let code = error["code"].as_str().expect(what);
        let row = GROUPS.iter().flat_map(|g| g.codes).find(|row| row.code == code);
        let statuses = row.map_or(&[][..], |row| row.statuses);
        assert!(statuses.contains(&answer.status), "`{code}` with {}: {what}", answer.status);
        assert!(answer.text.len() < 16 << 10, "an answer of {} bytes", answer.text.len());
        let root = self.dir.path().display().to_string();
        assert!(!answer.text.contains(&root), "the server's paths stay its own: {what}");
    }

    pub fn staged(&self) -> usize {
        let staging = self.dir.path().join("data/staging");
        std::fs::read_dir(staging).expect("a directory").count()
    }

    pub fn check_memory(&self) {
        let (now, peak) =
            (kilobytes(self.server.id(), "VmRSS:"), kilobytes(self.server.id(), "VmHWM:"));
        println!("memory in kB: {} at first, {now} now, {peak} at most", self.kilobytes);
        assert!(
            peak < self.kilobytes + GROWTH_KB_MAX,
            "{peak} kB at most, {} first",
            self.kilobytes
        );
    }
}

async fn whole(request: RequestBuilder) -> Answer {
    read(request.send().await).await
}

async fn read(sent: reqwest::Result<reqwest::Response>) -> Answer {
    match sent {
        Ok(response) => {
            let status = response.status().as_u16();
            Answer { status, text: response.text().await.unwrap_or_else(|e| e.to_string()) }
        }
        // What a client's library will not send counts as refused by it.
        Err(e) if e.is_builder() => Answer { status: 400, text: String::new() },
        Err(e) => panic!("no answer: {e:?}"),
    }
}
