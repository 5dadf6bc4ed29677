//! Killed at any moment: what was acknowledged is there, what was not is there whole or not at all.
//!
//! Clients upload, replace, roll back, pin, delete and set aliases, each among names of its own and
//! one request at a time, and keep a book of what they were told. The server gets SIGKILL somewhere
//! in it and starts again on what is on disk. Five times; in a soak 300.

use futures::StreamExt;
use polylora::adapters::format::files::AdapterFiles;
use reqwest::multipart::{Form, Part};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::adapters::Noise;
use support::live::{Live, hello};

const CLIENTS: usize = 4;
/// Names, and aliases, of each client.
const NAMES: usize = 3;
const CONTENTS: u64 = 16;
/// So many acknowledgements come before the kill, at most, and then up to so many milliseconds: a
/// life in milliseconds alone has room for hardly any beside other work.
const ACKNOWLEDGED: usize = 16;
const MORE_MS: usize = 30;
/// Four rounds keep every version, the fifth as few as is usual.
const ALL_KEPT: [&str; 2] = ["--versions-kept", "1000"];
const FEW_KEPT: [&str; 2] = ["--versions-kept", "3"];

fn flags(round: usize) -> [&'static str; 2] {
    if round % 5 < 4 { ALL_KEPT } else { FEW_KEPT }
}

/// By `name@number`.
type Digests = BTreeMap<String, String>;

/// Version `name@number` of an alias, and its weight.
type Weights = BTreeMap<String, u64>;

#[derive(Debug, Clone, Default, PartialEq)]
struct Name {
    /// Digest by number.
    versions: BTreeMap<u64, String>,
    current: u64,
    pinned: BTreeSet<u64>,
}

#[derive(Debug, Clone, PartialEq)]
struct Alias {
    targets: Weights,
    previous: Option<Weights>,
}

/// What is there, by the server's account or by a client's.
#[derive(Debug, Clone, Default, PartialEq)]
struct World {
    names: BTreeMap<String, Name>,
    aliases: BTreeMap<String, Alias>,
}

/// An upload's files and their digest.
struct Content {
    digest: String,
    files: Vec<(&'static str, Vec<u8>)>,
}

#[derive(Debug, Clone)]
enum Op {
    /// Which content, as which number, and whether its bytes come slowly.
    Put(String, usize, u64, bool),
    Turn(String, u64),
    Pin(String, u64, bool),
    Delete(String),
    SetAlias(String, Weights),
    Promote(String, String),
    RollBackAlias(String),
    DropAlias(String),
}

impl World {
    async fn read(live: &Live) -> Self {
        let mut world = Self::default();
        let text = |v: &Value| v.as_str().expect("text").to_owned();
        for v in live.get("/v1/adapters").await.json()["data"].as_array().expect("versions") {
            let name = world.names.entry(text(&v["name"])).or_default();
            let number = v["version"].as_u64().expect("a number");
            name.versions.insert(number, text(&v["digest"]));
            if v["current"] == true {
                name.current = number;
            }
            if v["pinned"] == true {
                name.pinned.insert(number);
                assert_eq!(v["resident"], true, "pinned, ready and cold: {v}");
            }
        }
        let weights = |v: &Value| -> Option<Weights> {
            let targets = v.as_array()?.iter();
            Some(targets.map(|t| (text(&t["id"]), t["weight"].as_u64().expect("one"))).collect())
        };
        for v in live.get("/v1/aliases").await.json()["data"].as_array().expect("aliases") {
            let targets = weights(&v["targets"]).expect("targets");
            let alias = Alias { targets, previous: weights(&v["previous"]) };
            world.aliases.insert(text(&v["name"]), alias);
        }
        world
    }

    /// The part that one client works on.
    fn of(&self, client: usize) -> Self {
        let own = |name: &String| name.starts_with(&format!("c{client}-"));
        let names = self.names.iter().filter(|(n, _)| own(n));
        let aliases = self.aliases.iter().filter(|(n, _)| own(n));
        Self {
            names: names.map(|(n, v)| (n.clone(), v.clone())).collect(),
            aliases: aliases.map(|(n, v)| (n.clone(), v.clone())).collect(),
        }
    }

    /// What it becomes.
    fn after(mut self, op: &Op, contents: &[Content]) -> Self {
        match op.clone() {
            Op::Put(name, content, number, _) => {
                let digest = &contents[content].digest;
                let name = self.names.entry(name).or_default();
                if name.versions.get(&name.current) != Some(digest) {
                    name.versions.insert(number, digest.clone());
                    name.current = number;
                }
            }
            Op::Turn(name, number) => {
                self.names.get_mut(&name).expect("a name").current = number;
            }
            Op::Pin(name, number, pinned) => {
                let all = &mut self.names.get_mut(&name).expect("a name").pinned;
                if pinned {
                    all.insert(number)
                } else {
                    all.remove(&number)
                };
            }
            Op::Delete(name) => drop(self.names.remove(&name)),
            Op::SetAlias(alias, targets) => self.set(alias, targets),
            Op::Promote(alias, id) => self.set(alias, Weights::from([(id, 100)])),
            Op::RollBackAlias(alias) => {
                let targets = self.aliases[&alias].previous.clone().expect("it had others");
                self.set(alias, targets);
            }
            Op::DropAlias(alias) => drop(self.aliases.remove(&alias)),
        }
        self
    }

    fn set(&mut self, alias: String, targets: Weights) {
        let before = self.aliases.get(&alias);
        let previous = match before {
            Some(before) if before.targets != targets => Some(before.targets.clone()),
            Some(before) => before.previous.clone(),
            None => None,
        };
        self.aliases.insert(alias, Alias { targets, previous });
    }

    /// Whether `seen` is this. Where versions may have been `pruned`, those that nothing keeps may
    /// lack, and those that went before may be back: a kill came before it was written down.
    fn is(&self, seen: &Self, pruned: Option<&Digests>) -> bool {
        let Some(ever) = pruned else { return self == seen };
        let led_to = |name: &str, number: u64| {
            let id = format!("{name}@{number}");
            self.aliases.values().any(|a| a.targets.contains_key(&id))
        };
        self.aliases == seen.aliases
            && self.names.keys().eq(seen.names.keys())
            && self.names.iter().zip(seen.names.values()).all(|((id, name), seen)| {
                name.current == seen.current
                    && name.pinned == seen.pinned
                    && seen.versions.iter().all(|(n, digest)| {
                        let once = || ever.get(&format!("{id}@{n}"));
                        name.versions.get(n).or_else(once) == Some(digest)
                    })
                    && name.versions.keys().all(|n| {
                        let kept = *n == name.current || name.pinned.contains(n) || led_to(id, *n);
                        !kept || seen.versions.contains_key(n)
                    })
            })
    }
}

/// One who changes things, and its book.
struct Changer {
    me: usize,
    http: Client,
    noise: Noise,
    contents: Arc<Vec<Content>>,
    world: World,
    /// The number that each name's next version gets; a deleted name goes on counting.
    next: BTreeMap<String, u64>,
    /// Every version that there was.
    ever: Digests,
    /// What has been sent and not been answered.
    pending: Option<Op>,
    /// Changes of all clients.
    acknowledged: Arc<AtomicUsize>,
}

impl Changer {
    /// Sends changes until the server is gone. While it prunes, versions may be gone before it is.
    async fn run(mut self, url: String, pruned: bool) -> Self {
        loop {
            let Some(op) = self.choose() else { continue };
            self.pending = Some(op.clone());
            let Ok(answer) = self.request(&url, &op).send().await else { return self };
            let status = answer.status().as_u16();
            match status {
                200..=202 => self.world = self.world.clone().after(&op, &self.contents),
                // What the alias led to before has been deleted.
                404 if pruned || matches!(op, Op::RollBackAlias(_)) => {}
                _ => panic!("{op:?}: {status} {}", answer.text().await.unwrap_or_default()),
            }
            if let (Op::Put(name, _, number, _), 200..=201) = (&op, status) {
                let came = self.world.names[name].current == *number;
                self.next.insert(name.clone(), number + u64::from(came));
            }
            self.remember();
            self.pending = None;
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn remember(&mut self) {
        for (id, name) in &self.world.names {
            let all = name.versions.iter().map(|(n, digest)| (format!("{id}@{n}"), digest.clone()));
            self.ever.extend(all);
        }
    }

    fn choose(&mut self) -> Option<Op> {
        let name = format!("c{}-{}", self.me, self.noise.below(NAMES));
        let alias = format!("c{}-alias-{}", self.me, self.noise.below(2));
        let roll = self.noise.below(20);
        let slow = self.noise.below(4) == 0;
        let content = self.noise.below(self.contents.len());
        let number = self.next.get(&name).copied().unwrap_or(1);
        let put = Op::Put(name.clone(), content, number, slow);
        let Some(held) = self.world.names.get(&name) else { return Some(put) };
        let numbers: Vec<u64> = held.versions.keys().copied().collect();
        let any = numbers[self.noise.below(numbers.len())];
        let known = self.world.aliases.get(&alias);
        let aliased = |a: &Alias| a.targets.keys().any(|id| id.split('@').next() == Some(&name));
        match roll {
            0..8 => Some(put),
            8..10 => Some(Op::Turn(name, any)),
            10..12 => Some(Op::Pin(name, any, true)),
            12 => Some(Op::Pin(name, any, false)),
            13..15 if !self.world.aliases.values().any(aliased) => Some(Op::Delete(name)),
            15..17 => {
                let other = numbers[self.noise.below(numbers.len())];
                let weights = [(any, 1 + self.noise.below(99)), (other, 1 + self.noise.below(99))];
                let target = |(n, w): (u64, usize)| (format!("{name}@{n}"), w as u64);
                Some(Op::SetAlias(alias, weights.map(target).into()))
            }
            17 => {
                let id = known?.targets.keys().next()?.clone();
                Some(Op::Promote(alias, id))
            }
            18 if known?.previous.is_some() => Some(Op::RollBackAlias(alias)),
            19 => known.map(|_| Op::DropAlias(alias)),
            _ => None,
        }
    }

    fn request(&self, url: &str, op: &Op) -> RequestBuilder {
        let at = |method: Method, path: String| self.http.request(method, format!("{url}{path}"));
        let post = |path: String, body: Value| at(Method::POST, path).json(&body);
        match op {
            Op::Put(name, content, _, slow) => {
                let put = at(Method::PUT, format!("/v1/adapters/{name}"));
                put.multipart(form(&self.contents[*content], *slow))
            }
            Op::Turn(name, n) => {
                post(format!("/v1/adapters/{name}/rollback"), json!({"version": n}))
            }
            Op::Pin(name, n, pinned) => {
                let verb = if *pinned { "pin" } else { "unpin" };
                post(format!("/v1/adapters/{name}/{verb}"), json!({"version": n}))
            }
            Op::Delete(name) => at(Method::DELETE, format!("/v1/adapters/{name}")),
            Op::SetAlias(alias, weights) => {
                let body = json!({"weights": weights});
                at(Method::PUT, format!("/v1/aliases/{alias}")).json(&body)
            }
            Op::Promote(alias, id) => {
                post(format!("/v1/aliases/{alias}/promote"), json!({"version": id}))
            }
            Op::RollBackAlias(alias) => post(format!("/v1/aliases/{alias}/rollback"), json!({})),
            Op::DropAlias(alias) => at(Method::DELETE, format!("/v1/aliases/{alias}")),
        }
    }

    /// Goes on from what the server has: what was acknowledged, and the change under way whole or
    /// not at all. Says whether that one is there, if there was one that would show.
    fn compare(&mut self, seen: &World, pruned: bool) -> Option<bool> {
        let seen = seen.of(self.me);
        let pruned = pruned.then_some(&self.ever);
        let done = match self.pending.take() {
            None => None,
            Some(op) => {
                let after = self.world.clone().after(&op, &self.contents);
                let there = after.is(&seen, pruned);
                let shows = after != self.world;
                if there && shows {
                    if let Op::Put(name, _, number, _) = &op {
                        self.next.insert(name.clone(), number + 1);
                    }
                    self.world = after;
                }
                shows.then_some(there)
            }
        };
        let (me, told) = (self.me, &self.world);
        assert!(told.is(&seen, pruned), "client {me} was told\n{told:?}\nand finds\n{seen:?}");
        self.world = seen;
        self.remember();
        done
    }
}

/// An upload; slowly, so that a kill finds it half received.
fn form(content: &Content, slow: bool) -> Form {
    content.files.iter().fold(Form::new(), |form, (name, bytes)| {
        let part = if slow {
            let chunks: Vec<Vec<u8>> = bytes.chunks(2048).map(<[u8]>::to_vec).collect();
            let chunks = futures::stream::iter(chunks).then(async |chunk| {
                tokio::time::sleep(Duration::from_millis(3)).await;
                Ok::<_, std::io::Error>(chunk)
            });
            Part::stream(reqwest::Body::wrap_stream(chunks))
        } else {
            Part::bytes(bytes.clone())
        };
        form.part(*name, part.file_name(*name))
    })
}

/// Asks this and that, so that versions are leased when their names move.
async fn chatter(http: Client, url: String, mut noise: Noise) {
    loop {
        let name = format!("c{}-{}", noise.below(CLIENTS), noise.below(NAMES));
        let ask = http.post(format!("{url}/v1/chat/completions")).json(&hello(&name, 8));
        match ask.send().await {
            Ok(answer) => drop(answer.bytes().await),
            Err(_) => return,
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(dir).into_iter().flatten();
    found.map(|e| e.expect("an entry").path()).collect()
}

/// Digests of the directories that hold files.
fn stored(data: &Path) -> BTreeMap<String, PathBuf> {
    let blobs = entries(&data.join("adapters/sha256")).into_iter().flat_map(|p| entries(&p));
    let named = |p: PathBuf| (format!("sha256:{}", p.file_name().unwrap().to_str().unwrap()), p);
    blobs.map(named).collect()
}

fn digests(world: &World) -> BTreeSet<String> {
    world.names.values().flat_map(|n| n.versions.values().cloned()).collect()
}

/// What kills have met.
#[derive(Default, Debug)]
struct Tally {
    acknowledged: usize,
    under_way_done: usize,
    under_way_undone: usize,
    staged: usize,
    orphans: usize,
    start_ms_max: u128,
}

/// The disk holds the files of what is named, whole, and nothing else.
async fn check_disk(live: &Live) {
    let data = live.data();
    let clean = async || {
        let named = digests(&World::read(live).await);
        let stored: BTreeSet<_> = stored(&data).into_keys().collect();
        stored == named && entries(&data.join("staging")).is_empty()
    };
    // What was replaced while few versions are kept goes in the background.
    live.until("files are those of the versions, and nothing is staged", clean).await;
    for (digest, dir) in stored(&data) {
        let read = AdapterFiles::find(&dir).and_then(|f| f.digest()).expect("whole files");
        assert_eq!(read.to_string(), digest);
    }
}

async fn round(live: Live, round: usize, changers: &mut Vec<Changer>, tally: &mut Tally) -> Live {
    let url = live.server.url.clone();
    let (http, acknowledged) = (changers[0].http.clone(), changers[0].acknowledged.clone());
    let mut noise = Noise(rand::random());
    let talk = tokio::spawn(chatter(http, url.clone(), Noise(round as u64)));
    let pruned = flags(round) == FEW_KEPT;
    let run = |changer: Changer| tokio::spawn(changer.run(url.clone(), pruned));
    let running: Vec<_> = changers.drain(..).map(run).collect();
    let enough = tally.acknowledged + noise.below(ACKNOWLEDGED);
    live.until("enough is acknowledged", async || acknowledged.load(Ordering::Relaxed) >= enough)
        .await;
    tokio::time::sleep(Duration::from_millis(1 + noise.below(MORE_MS) as u64)).await;
    let data = live.data();
    let dir = live.crash();
    for changer in running {
        changers.push(changer.await.expect("it keeps its book"));
    }
    talk.await.expect("it ends with the server");
    tally.acknowledged = acknowledged.load(Ordering::Relaxed);
    tally.staged += entries(&data.join("staging")).len();
    let left = stored(&data).len();
    let begun = Instant::now();
    let live = Live::start_in(dir, &flags(round + 1), Stdio::inherit());
    tally.start_ms_max = tally.start_ms_max.max(begun.elapsed().as_millis());
    assert_eq!(live.get("/ready").await.status, 200);
    let seen = World::read(&live).await;
    let pruned = pruned || flags(round + 1) == FEW_KEPT;
    for changer in changers.iter_mut() {
        match changer.compare(&seen, pruned) {
            Some(true) => tally.under_way_done += 1,
            Some(false) => tally.under_way_undone += 1,
            None => {}
        }
    }
    check_disk(&live).await;
    tally.orphans += left.saturating_sub(digests(&seen).len());
    for changer in changers.iter_mut() {
        // Pruned since.
        changer.world = World::read(&live).await.of(changer.me);
        let Some((name, held)) = changer.world.names.first_key_value() else { continue };
        let answer = live.chat(hello(name, 1)).await;
        assert_eq!(answer.header("x-polylora-adapter"), format!("{name}@{}", held.current));
    }
    live
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_outlives_a_kill_at_any_moment() {
    let rounds = support::soak::rounds(5, 300);
    let mut live = Live::start(&flags(0));
    let contents = (0..CONTENTS).map(|seed| {
        let dir = live.adapter_files(seed, 0.3);
        let digest = AdapterFiles::find(&dir).and_then(|f| f.digest()).expect("a digest");
        let files = ["adapter_config.json", "adapter_model.safetensors"];
        let files = files.map(|name| (name, std::fs::read(dir.join(name)).expect("a file")));
        Content { digest: digest.to_string(), files: files.into() }
    });
    let contents = Arc::new(contents.collect::<Vec<_>>());
    // While the catalogue names none a start leaves files where they are, which is what
    // `attacks::storage::starts` holds it to. From here on it names one.
    assert_eq!(live.upload("always-there", CONTENTS).await.status, 201);
    let http = support::client().build().expect("a client");
    let acknowledged = Arc::<AtomicUsize>::default();
    let mut changers: Vec<Changer> = (0..CLIENTS)
        .map(|me| Changer {
            me,
            http: http.clone(),
            noise: Noise(me as u64),
            contents: contents.clone(),
            world: World::default(),
            next: BTreeMap::new(),
            ever: Digests::new(),
            pending: None,
            acknowledged: acknowledged.clone(),
        })
        .collect();
    let mut tally = Tally::default();
    for at in 0..rounds {
        live = round(live, at, &mut changers, &mut tally).await;
    }
    eprintln!("{rounds} kills: {tally:?}");
    assert!(tally.acknowledged > rounds, "hardly anything was done: {tally:?}");
}
