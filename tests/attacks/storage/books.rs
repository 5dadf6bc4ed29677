//! What a client was told beside what the server has: the model of the world.
//!
//! Owns the changes that are tried and the book that is kept of their answers. Never looks into a
//! file. The thing to know: a change that was answered as done must be there after a kill, one that
//! was refused must not, and only one that a kill cut off may be either.

use super::disk::Disk;
use polylora::adapters::format::files::AdapterFiles;
use reqwest::multipart::{Form, Part};
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use support::adapters::Noise;
use support::live::{BASE, Live, form, hello};
use tempfile::TempDir;

/// The operator's key.
pub const OPERATOR: &str = "operator-secret";
const NAMES: usize = 4;
const CONTENTS: u64 = 6;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Name and which content.
    Put(String, usize),
    Delete(String),
    /// Where to: `name@number`.
    Alias(String, String),
    DropAlias(String),
    MakeKey,
    Revoke(String),
    Merge(String),
    /// A file with this text.
    File(usize),
    DropFile(String),
}

/// What is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// Digests by number, by name.
    pub adapters: BTreeMap<String, BTreeMap<u64, String>>,
    /// What each leads to.
    pub aliases: BTreeMap<String, String>,
    /// Good ones, by id.
    pub keys: BTreeSet<String>,
    pub merges: BTreeSet<String>,
    /// What each holds, as a number, by id.
    pub files: BTreeMap<String, u64>,
}

/// What a file holds: more than one write.
fn text_of(n: usize) -> String {
    format!("{{\"prompt\": \"{n}\", \"completion\": \"yes\"}}\n").repeat(20_000)
}

fn sum(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A server on a disk that fails, and the book.
pub struct Books {
    pub live: Option<Live>,
    pub disk: Disk,
    home: Option<TempDir>,
    http: Client,
    noise: Noise,
    contents: Vec<(String, PathBuf)>,
    flags: Vec<&'static str>,
    pub world: World,
    /// Secrets of keys, revoked ones too, by id.
    secrets: BTreeMap<String, String>,
    /// Records of usage that the server said are written; deeds that were answered as done, and
    /// those of them whose audit record was said to be late.
    pub written: u64,
    pub done: u64,
    pub late: u64,
    merges: usize,
    /// Where the log goes, if anywhere.
    pub log: Option<PathBuf>,
    pub tally: BTreeMap<String, usize>,
}

impl Books {
    /// A server with something in it.
    pub async fn new(seed: u64, flags: &[&'static str]) -> Self {
        let home = Live::home();
        let disk = Disk::new(&home.path().join("data"));
        let mut books = Self {
            live: None,
            disk,
            home: Some(home),
            http: support::client().build().expect("a client"),
            noise: Noise(seed),
            contents: Vec::new(),
            flags: [&["--versions-kept", "1000"], flags].concat(),
            world: World::default(),
            secrets: BTreeMap::new(),
            written: 0,
            done: 0,
            late: 0,
            merges: 0,
            log: None,
            tally: BTreeMap::new(),
        };
        books.start();
        for seed in 0..CONTENTS {
            let dir = books.live().adapter_files(seed, 0.3);
            let digest = AdapterFiles::find(&dir).and_then(|f| f.digest()).expect("a digest");
            books.contents.push((digest.to_string(), dir));
        }
        for change in [
            Change::Put("a0".into(), 0),
            Change::Put("a1".into(), 1),
            Change::MakeKey,
            Change::MakeKey,
            Change::File(0),
        ] {
            assert_eq!(books.try_one(&change).await, Some(true), "{change:?}");
        }
        books
    }

    pub fn live(&self) -> &Live {
        self.live.as_ref().expect("a server")
    }

    /// Starts the program on what is on disk.
    pub fn start(&mut self) {
        let mut environment = self.disk.environment();
        environment.push(("POLYLORA_API_KEY", OPERATOR.to_owned()));
        let home = self.home.take().expect("no server runs");
        let log = match (&self.log, std::env::var_os("POLYLORA_SHOW_LOG")) {
            (Some(path), _) => File::create(path).expect("a log").into(),
            (None, Some(_)) => Stdio::inherit(),
            (None, None) => Stdio::null(),
        };
        self.live = Some(Live::start_with(home, &self.flags, log, &environment));
    }

    /// SIGKILL. What the server said is written until then is kept in mind.
    pub async fn kill(&mut self) {
        self.note_written().await;
        self.end();
    }

    /// SIGTERM: every record that was handed over is written.
    pub fn stop(&mut self) {
        self.home = self.live.take().map(Live::stop);
    }

    fn end(&mut self) {
        self.home = self.live.take().map(Live::crash);
    }

    pub async fn note_written(&mut self) {
        let page = self.get("/metrics").await;
        let series = "polylora_usage_records_total ";
        let line = page.lines().find_map(|l| l.strip_prefix(series)?.parse::<f64>().ok());
        let own = line.expect("the series") as u64;
        self.written = self.written.max(self.before() + own);
    }

    /// Records of lives before this one, as it was started.
    fn before(&self) -> u64 {
        self.tally.get("usage at start").copied().unwrap_or(0) as u64
    }

    fn ask(&self, method: Method, path: &str, key: &str) -> RequestBuilder {
        let url = &self.live().server.url;
        self.http.request(method, format!("{url}{path}")).bearer_auth(key)
    }

    pub async fn get(&self, path: &str) -> String {
        let answer = self.ask(Method::GET, path, OPERATOR).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        answer.text().await.expect("a body")
    }

    async fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.get(path).await).expect("JSON")
    }

    /// Where the server keeps what it was given.
    pub fn data(&self) -> PathBuf {
        self.disk.dir().to_owned()
    }

    /// A chat on the base, which must be answered whatever the disk does.
    pub async fn chat(&self) -> StatusCode {
        self.chat_with(BASE).await
    }

    pub async fn chat_with(&self, model: &str) -> StatusCode {
        let ask = self.ask(Method::POST, "/v1/chat/completions", OPERATOR).json(&hello(model, 1));
        ask.send().await.expect("an answer").status()
    }

    /// Something that can be done now.
    pub fn choose(&mut self) -> Change {
        let name = format!("a{}", self.noise.below(NAMES));
        let alias = format!("alias{}", self.noise.below(2));
        let content = self.noise.below(self.contents.len());
        let led_to = |name: &str| self.world.aliases.values().any(|id| id.starts_with(name));
        let known = self.world.adapters.contains_key(&name);
        let key = self.world.keys.iter().next().cloned();
        let file = self.world.files.keys().next().cloned();
        match self.noise.below(13) {
            0 | 1 if known && !led_to(&format!("{name}@")) => Change::Delete(name),
            2 | 3 if known => {
                let numbers: Vec<u64> = self.world.adapters[&name].keys().copied().collect();
                let number = numbers[self.noise.below(numbers.len())];
                Change::Alias(alias, format!("{name}@{number}"))
            }
            4 if self.world.aliases.contains_key(&alias) => Change::DropAlias(alias),
            5 => Change::MakeKey,
            6 if self.world.keys.len() > 1 => Change::Revoke(key.expect("one")),
            7 if ["a0", "a1"].iter().all(|n| self.world.adapters.contains_key(*n)) => {
                self.merges += 1;
                Change::Merge(format!("m{}", self.merges))
            }
            8 | 9 => Change::File(content),
            10 if file.is_some() => Change::DropFile(file.expect("one")),
            _ => Change::Put(name, content),
        }
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.noise.below(n)
    }

    fn request(&self, change: &Change) -> RequestBuilder {
        let ask = |method, path: String| self.ask(method, &path, OPERATOR);
        match change {
            Change::Put(name, content) => ask(Method::PUT, format!("/v1/adapters/{name}"))
                .multipart(form(&self.contents[*content].1)),
            Change::Delete(name) => ask(Method::DELETE, format!("/v1/adapters/{name}")),
            Change::Alias(alias, to) => {
                ask(Method::PUT, format!("/v1/aliases/{alias}")).json(&json!({"weights": {to: 1}}))
            }
            Change::DropAlias(alias) => ask(Method::DELETE, format!("/v1/aliases/{alias}")),
            Change::MakeKey => ask(Method::POST, "/v1/keys".into())
                .json(&json!({"label": "t", "scopes": ["inference"]})),
            Change::Revoke(id) => ask(Method::DELETE, format!("/v1/keys/{id}")),
            Change::Merge(name) => ask(Method::POST, "/v1/merges".into())
                .json(&json!({"name": name, "sources": [{"model": "a0"}, {"model": "a1"}]})),
            Change::File(n) => {
                let part = Part::bytes(text_of(*n).into_bytes()).file_name("a.jsonl");
                let form = Form::new().text("purpose", "fine-tune").part("file", part);
                ask(Method::POST, "/v1/files".into()).multipart(form)
            }
            Change::DropFile(id) => ask(Method::DELETE, format!("/v1/files/{id}")),
        }
    }

    /// Tries one change; whether it was answered as done, `None` when no answer came.
    pub async fn try_one(&mut self, change: &Change) -> Option<bool> {
        let Ok(answer) = self.request(change).send().await else { return None };
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body: Value = answer.json().await.unwrap_or_default();
        *self.tally.entry(format!("{status}")).or_default() += 1;
        match status {
            200..=202 => {}
            507 => {
                assert_eq!(body["error"]["code"], "storage_full", "{change:?}: {body}");
                assert!(headers.contains_key("retry-after"), "{change:?}: {headers:?}");
                return Some(false);
            }
            // What the program before said of a full disk.
            500 => return Some(false),
            _ => panic!("{change:?}: {status} {body}"),
        }
        self.done += 1;
        self.late += u64::from(headers.contains_key("x-polylora-audit"));
        self.enter(change, &body);
        Some(true)
    }

    /// The change is done: `body` is its answer.
    fn enter(&mut self, change: &Change, body: &Value) {
        let text = |v: &Value| v.as_str().expect("text").to_owned();
        match change.clone() {
            Change::Put(name, content) => {
                let number = body["version"].as_u64().expect("a number");
                let digest = self.contents[content].0.clone();
                let before = self.world.adapters.entry(name).or_default().insert(number, digest);
                assert!(before.is_none_or(|b| b == self.contents[content].0), "{body}");
            }
            Change::Delete(name) => drop(self.world.adapters.remove(&name)),
            Change::Alias(alias, to) => drop(self.world.aliases.insert(alias, to)),
            Change::DropAlias(alias) => drop(self.world.aliases.remove(&alias)),
            Change::MakeKey => {
                let id = text(&body["key"]["id"]);
                self.secrets.insert(id.clone(), text(&body["secret"]));
                self.world.keys.insert(id);
            }
            Change::Revoke(id) => drop(self.world.keys.remove(&id)),
            Change::Merge(_) => drop(self.world.merges.insert(text(&body["id"]))),
            Change::File(n) => drop(self.world.files.insert(text(&body["id"]), sum(&text_of(n)))),
            Change::DropFile(id) => drop(self.world.files.remove(&id)),
        }
    }

    /// What the server has, merges' own adapters left out.
    pub async fn seen(&self) -> World {
        let mut world = World::default();
        let text = |v: &Value| v.as_str().expect("text").to_owned();
        let list = |page: Value| page["data"].as_array().expect("a list").clone();
        for v in list(self.json("/v1/adapters").await) {
            let name = text(&v["name"]);
            if !name.starts_with('m') {
                let number = v["version"].as_u64().expect("a number");
                world.adapters.entry(name).or_default().insert(number, text(&v["digest"]));
            }
        }
        for v in list(self.json("/v1/aliases").await) {
            world.aliases.insert(text(&v["name"]), text(&v["targets"][0]["id"]));
        }
        for v in list(self.json("/v1/keys").await) {
            if v["revoked"].is_null() {
                world.keys.insert(text(&v["id"]));
            }
        }
        for v in list(self.json("/v1/merges").await) {
            world.merges.insert(text(&v["id"]));
        }
        for v in list(self.json("/v1/files").await) {
            let id = text(&v["id"]);
            let held = self.get(&format!("/v1/files/{id}/content")).await;
            world.files.insert(id, sum(&held));
        }
        world
    }

    /// After a start: what was answered as done is there, what was refused is not; `pending` was
    /// cut off by the kill and may be either. Returns whether it is there.
    pub async fn compare(&mut self, pending: Option<&Change>) -> bool {
        let seen = self.seen().await;
        let mut there = false;
        if seen != self.world {
            let change = pending.unwrap_or_else(|| {
                panic!("told\n{:?}\nand finds\n{seen:?}\n{:?}", self.world, self.tally)
            });
            self.check_cut(change, &seen);
            self.world = seen;
            there = true;
        }
        for (id, secret) in &self.secrets {
            let ask = self.ask(Method::GET, "/v1/models", secret);
            let status = ask.send().await.expect("an answer").status();
            let good = self.world.keys.contains(id);
            assert_eq!(status == StatusCode::OK, good, "key {id}: {status}");
        }
        let sums = self.json("/v1/usage").await;
        let sums = sums["sums"].as_array().expect("sums");
        let usage: u64 = sums.iter().map(|s| s["requests"].as_u64().expect("a count")).sum();
        assert!(usage >= self.written, "{usage} records, but {} were written", self.written);
        self.tally.insert("usage at start".into(), usage as usize);
        self.written = usage;
        let audit = self.json("/v1/audit?limit=1000").await["data"].clone();
        let audit = audit.as_array().expect("a list").iter();
        let ok = audit.filter(|r| r["outcome"] == "ok").count() as u64;
        let (least, most) = (self.done - self.late, self.done + u64::from(pending.is_some()));
        assert!((least..=most).contains(&ok), "{ok} in the audit log, not {least} to {most}");
        (self.done, self.late) = (ok, 0);
        there
    }

    /// The world differs from the book by this change and nothing else.
    fn check_cut(&mut self, change: &Change, seen: &World) {
        let mut expected = self.world.clone();
        match change.clone() {
            Change::Put(name, content) => {
                let digest = self.contents[content].0.clone();
                let new = seen.adapters.get(&name).and_then(|all| all.last_key_value());
                let number = *new.expect("it is there").0;
                expected.adapters.entry(name).or_default().insert(number, digest);
            }
            Change::Delete(name) => drop(expected.adapters.remove(&name)),
            Change::Alias(alias, to) => drop(expected.aliases.insert(alias, to)),
            Change::DropAlias(alias) => drop(expected.aliases.remove(&alias)),
            // Its id and secret were in the answer that nobody got.
            Change::MakeKey => {
                expected.keys.extend(seen.keys.difference(&self.world.keys).take(1).cloned());
            }
            Change::Revoke(id) => drop(expected.keys.remove(&id)),
            Change::Merge(_) => {
                let new = seen.merges.difference(&self.world.merges);
                expected.merges.extend(new.take(1).cloned());
            }
            Change::File(n) => {
                let new = seen.files.iter().find(|(id, _)| !self.world.files.contains_key(*id));
                expected.files.extend(new.map(|(id, _)| (id.clone(), sum(&text_of(n)))));
            }
            Change::DropFile(id) => drop(expected.files.remove(&id)),
        }
        assert_eq!(&expected, seen, "but for {change:?}, which was cut off");
    }

    /// Kills the server while it is at `change`.
    pub async fn kill_during(&mut self, change: &Change) -> bool {
        self.note_written().await;
        let pid = self.live().server.id().to_string();
        let wait = Duration::from_micros(self.noise.below(60_000) as u64);
        let killer = tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            std::process::Command::new("kill").args(["-9", &pid]).status().expect("kill");
        });
        let answered = self.try_one(change).await.is_some();
        killer.await.expect("it kills");
        self.end();
        !answered
    }

    /// Waits until changes are taken again; the program before had no word for that.
    pub async fn writable(&self) {
        for _ in 0..2000 {
            let body = self.live().get("/ready").await.json();
            if body.get("storage").is_none_or(|s| s == "writable") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("there is room, and nothing is taken");
    }
}
