//! The long run: each attack in turn on the demo model, beside a canary of another tenant.

use super::attackers::{Attack, attacks, ordinary};
use crate::canary::{Canary, Seen, Song};
use reqwest::{Client, Method};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use support::live::whole;
use support::server::Server;
use support::server::kilobytes;
use support::soak::soak;

pub const MODEL: &str = "smollm2-135m-instruct";
/// How long each attack lasts, and after the last one until memory is looked at again.
const ATTACK_TIME: Duration = Duration::from_secs(20);
const CALM_TIME: Duration = Duration::from_secs(60);
/// Memory beside what the table of the start lists: the program, its threads, its databases.
const BESIDE_BYTES: u64 = 256 << 20;

struct Rig {
    server: Server,
    client: Client,
    mallory: String,
    canary: String,
    ledger_kb: u64,
    _dir: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let log = dir.path().join("log");
        let file = std::fs::File::create(&log).expect("a log");
        let flags =
            ["--api-key", "secret", "--kv-bytes", "128MiB", "--adapter-bytes-max", "128MiB"];
        let data = dir.path().join("data");
        let server = Server::start_logging(Path::new(MODEL), &data, &flags, file.into());
        let table = std::fs::read_to_string(&log).expect("the log");
        let sum = table.lines().find_map(|l| l.trim().strip_prefix("sum")).expect("a sum");
        let mut words = sum.split_whitespace();
        let number: f64 = words.next().and_then(|n| n.parse().ok()).expect("a number");
        let unit = if words.next() == Some("GiB") { 1 << 20 } else { 1 << 10 };
        let ledger_kb = (number * f64::from(unit)) as u64;
        let client = support::client().build().expect("a client");
        let mut rig = Self {
            server,
            client,
            mallory: String::new(),
            canary: String::new(),
            ledger_kb,
            _dir: dir,
        };
        for tenant in ["mallory", "canary"] {
            let body = json!({"scopes": ["inference", "admin"], "tenant": tenant,
                              "adapters": [format!("{tenant}-*")]});
            let made = rig.request("secret", Method::POST, "/v1/keys").json(&body);
            let secret = whole(made).await.json()["secret"].as_str().expect("a secret").to_owned();
            if tenant == "mallory" { rig.mallory = secret } else { rig.canary = secret }
        }
        rig
    }

    fn request(&self, key: &str, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.server.url)).bearer_auth(key)
    }

    fn kb(&self, line: &str) -> u64 {
        kilobytes(self.server.id(), line)
    }

    /// What the canary and a health probe see while nothing or this happens.
    async fn during(&self, attack: Option<&Attack>) -> (Seen, Seen, usize) {
        let stop = Arc::new(AtomicBool::new(false));
        let attackers = attack.cloned().map(|attack| {
            let (url, key) = (self.server.url.clone(), self.mallory.clone());
            let stop = stop.clone();
            std::thread::spawn(move || attack.until(&stop, &url, &key))
        });
        if attackers.is_some() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let chat =
            Canary::start(&self.server.url, Some(&self.canary), Song::Chat(MODEL.to_owned()));
        let live = Canary::start(&self.server.url, None, Song::Live);
        tokio::time::sleep(ATTACK_TIME).await;
        let seen = (chat.stop().await, live.stop().await);
        stop.store(true, Relaxed);
        let sent = attackers.map_or(0, |thread| thread.join().expect("the attackers end"));
        (seen.0, seen.1, sent)
    }

    /// As `during`, and what was seen is printed.
    async fn told(&self, attack: &Attack) -> (Seen, Seen) {
        let (canary, live, sent) = self.during(Some(attack)).await;
        println!(
            "{}: {sent} sent; canary n {} p50 {:?} p99 {:?} bad {}; /live p99 {:?} max {:?}; \
             now {} kB, peak {} kB",
            attack.name,
            canary.times.len(),
            canary.quantile(0.5),
            canary.quantile(0.99),
            canary.bad.len(),
            live.quantile(0.99),
            live.quantile(1.0),
            self.kb("VmRSS:"),
            self.kb("VmHWM:")
        );
        (canary, live)
    }
}

/// Uploads the two templates; the demo's own sample adapter brings the factors.
async fn templates(rig: &Rig) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/pirate");
    let guard = "{% if messages[0].content == 'hi' %}";
    let sober = "{% else %}{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}";
    for (name, harm) in [
        ("mallory-long", "{% for i in range(30) %}{{ 'lorem ipsum dolor ' * 50000 }}{% endfor %}"),
        (
            "mallory-slow",
            "{% for i in range(90000) %}{% set x = (messages|tojson) * 20000 %}{% endfor %}",
        ),
    ] {
        let mut form = reqwest::multipart::Form::new();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let bytes = std::fs::read(root.join(file)).expect("a sample adapter");
            form = form.part(file, reqwest::multipart::Part::bytes(bytes).file_name(file));
        }
        let template = format!("{guard}{harm}{sober}").into_bytes();
        let file = "chat_template.jinja";
        form = form.part(file, reqwest::multipart::Part::bytes(template).file_name(file));
        let put = rig.request(&rig.mallory, Method::PUT, &format!("/v1/adapters/{name}"));
        let put = whole(put.multipart(form)).await;
        assert!(put.status == 201 || put.status == 200, "{}", put.text);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_attack_in_turn_beside_a_canary() {
    if !soak() {
        return;
    }
    let rig = Rig::start().await;
    templates(&rig).await;
    let (alone, live, _) = rig.during(None).await;
    let solo = alone.quantile(0.99);
    let before = rig.kb("VmRSS:");
    println!(
        "alone: canary p50 {:?} p99 {solo:?}, /live p99 {:?}, {before} kB, ledger {} kB",
        alone.quantile(0.5),
        live.quantile(0.99),
        rig.ledger_kb
    );
    let ordinary = rig.told(&ordinary(4)).await.0.quantile(0.99);
    let mut wrong = Vec::new();
    for attack in attacks() {
        let (canary, live) = rig.told(&attack).await;
        let (p99, live99) = (canary.quantile(0.99), live.quantile(0.99));
        // What is within bounds is computed, as a share of what the machine computes.
        let bar = if attack.within_bounds { ordinary + ordinary / 5 } else { 2 * solo };
        let slow = p99 > bar || live99 > Duration::from_millis(50);
        if slow || !canary.bad.is_empty() || !live.bad.is_empty() {
            let name = attack.name;
            wrong.push(format!("{name}: {p99:?} {live99:?} {:?} {:?}", canary.bad, live.bad));
        }
    }
    let calm = Instant::now();
    while calm.elapsed() < CALM_TIME {
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    let (after, peak) = (rig.kb("VmRSS:"), rig.kb("VmHWM:"));
    println!("after {CALM_TIME:?}: {after} kB of {before}; peak {peak} kB");
    if after > before + before / 20 {
        wrong.push(format!("memory is {after} kB, before it was {before} kB"));
    }
    if peak > rig.ledger_kb + rig.ledger_kb / 10 {
        wrong.push(format!("the peak is {peak} kB, the ledger {} kB", rig.ledger_kb));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// With hardly more address space than the ledger, every attack is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_ends_a_process_of_little_address_space() {
    if !soak() {
        return;
    }
    let rig = Rig::start().await;
    templates(&rig).await;
    let limit = rig.ledger_kb * 1024 + BESIDE_BYTES;
    let pid = rig.server.id().to_string();
    let set = std::process::Command::new("prlimit")
        .args(["--pid", &pid, &format!("--as={limit}")])
        .status();
    assert!(set.expect("prlimit").success());
    for attack in attacks() {
        let (canary, ..) = rig.during(Some(&attack)).await;
        println!(
            "{}: canary n {} bad {:?}; {} kB mapped of {}",
            attack.name,
            canary.times.len(),
            canary.bad.first(),
            rig.kb("VmSize:"),
            limit >> 10
        );
        let live = whole(rig.client.get(format!("{}/live", rig.server.url))).await;
        assert_eq!(live.status, 200, "{}: the server lives", attack.name);
    }
}
