//! Never the neighbour's: streams over many adapters while others are uploaded and replaced, with
//! room for all of them and with room for three, through HTTP.
//!
//! Every answer must be, token for token, what the version named in its header says alone, computed
//! by the simplest runner there is from the very factors that were uploaded.

use polylora::adapters::format;
use polylora::checkpoint::Checkpoint;
use polylora::shape::{ModelShape, Projection};
use polylora::text::Text;
use polylora_kernels::{Device, Dtype};
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::adapters::{Noise, Recipe, write_adapter};
use support::runner::{Runner, Weights};
use support::server::Server;
use support::tiny;

const TOKENS: usize = 32;
/// Rounds go on until the uploads are through, within a bound.
const ROUNDS_MAX: usize = 200;

/// Who asks for what while what is replaced.
#[derive(Clone, Copy)]
struct Scene {
    flags: &'static [&'static str],
    adapters: usize,
    /// Of an adapter, by its edition.
    recipe: fn(usize, usize) -> Recipe,
    /// Streams open at once.
    streams: usize,
    rounds_min: usize,
    /// Uploads at once, each of adapters of its own, and how many of them.
    uploaders: usize,
    replacements: usize,
    /// Between two uploads.
    pause: Duration,
}

const SETS: [&[Projection]; 4] = [
    &[Projection::Q, Projection::V],
    &[Projection::K, Projection::O],
    &[Projection::Gate, Projection::Up],
    &[Projection::Down],
];

/// Ranks 1 to 64, four disjoint sets of modules.
fn everywhere(adapter: usize, edition: usize) -> Recipe {
    let ranks = [1, 2, 3, 5, 8, 13, 16, 24, 32, 48, 64];
    let seed = (adapter * 1000 + edition) as u64;
    let mut recipe = Recipe::new(ranks[(adapter + edition) % 11], SETS[adapter % 4], seed);
    recipe.strength = 0.6;
    recipe
}

/// Ranks 4 to 64, twelve disjoint sets of modules.
fn apart(adapter: usize, edition: usize) -> Recipe {
    let ranks = [4, 7, 8, 12, 16, 24, 32, 48, 64];
    let seed = (adapter * 1000 + edition) as u64;
    let mut recipe = Recipe::new(ranks[(adapter + edition) % 9], SETS[adapter % 4], seed);
    recipe.layer = Some(adapter / 4);
    recipe.strength = 1.0;
    recipe
}

/// What was uploaded under `name@version`.
type Uploaded = Arc<Mutex<HashMap<String, PathBuf>>>;

struct Uploader {
    client: reqwest::Client,
    url: String,
    shape: ModelShape,
    dir: PathBuf,
    recipe: fn(usize, usize) -> Recipe,
    uploaded: Uploaded,
}

impl Uploader {
    async fn put(&self, adapter: usize, edition: usize) {
        let dir = self.dir.join(format!("a{adapter}-{edition}"));
        write_adapter(&dir, &self.shape, &(self.recipe)(adapter, edition));
        let mut form = Form::new();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let bytes = std::fs::read(dir.join(file)).expect("just written");
            form = form.part(file, Part::bytes(bytes).file_name(file));
        }
        let url = format!("{}/v1/adapters/a{adapter}", self.url);
        let reply = self.client.put(url).multipart(form).send().await.expect("a reply");
        let status = reply.status();
        let id = header(&reply, "x-polylora-adapter");
        let body: Value = reply.json().await.expect("JSON");
        assert!(status.is_success(), "upload of a{adapter}: {status} {body}");
        let id = id.unwrap_or_else(|| body["id"].as_str().expect("an id").to_owned());
        self.uploaded.lock().expect("lock").insert(id, dir);
    }
}

fn header(reply: &reqwest::Response, name: &str) -> Option<String> {
    Some(reply.headers().get(name)?.to_str().expect("ASCII").to_owned())
}

/// One streamed completion: (version in the header, prompt, text).
struct Answer {
    version: String,
    prompt: Vec<u32>,
    text: String,
}

async fn ask(client: &reqwest::Client, url: &str, adapters: usize, seed: u64) -> Answer {
    let mut noise = Noise(seed);
    let prompt: Vec<u32> = (0..4 + noise.below(40)).map(|_| 40 + noise.below(80) as u32).collect();
    let adapter = noise.below(adapters + adapters / 10 + 1);
    // Now and then the base: it must stay the base.
    let model = if adapter < adapters { format!("a{adapter}") } else { "tiny".into() };
    let body = json!({"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
                      "ignore_eos": true, "stream": true, "skip_special_tokens": false});
    let reply = client.post(format!("{url}/v1/completions")).json(&body).send().await;
    let reply = reply.expect("a reply");
    let version = header(&reply, "x-polylora-adapter");
    let status = reply.status();
    let text = reply.text().await.expect("a whole stream");
    assert!(status.is_success(), "{model}: {status} {text}");
    assert!(text.trim_end().ends_with("data: [DONE]"), "{model}: cut short: {text}");
    let mut out = String::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("data: ")) {
        if let Ok(chunk) = serde_json::from_str::<Value>(line) {
            out += chunk["choices"][0]["text"].as_str().unwrap_or_default();
        }
    }
    Answer { version: version.expect("every answer names its version"), prompt, text: out }
}

/// What the version says alone.
fn expected(runner: &mut Runner, text: &Text, dir: Option<&Path>, prompt: &[u32]) -> String {
    let weights = runner.model.weights.clone();
    let slot = dir.map(|dir| {
        let (rows, bias) = (weights.base_rows(), weights.base_bias());
        let (_, prepared) =
            format::prepare(dir, &weights.shape, weights.dtype, &rows, &bias).expect("adapter");
        runner.bank.install(prepared).ok().expect("room")
    });
    runner.reset();
    let mut streams = vec![runner.stream(prompt, slot, prompt.len() + TOKENS)];
    let (tokens, _) = runner.greedy(&mut streams, TOKENS, u32::MAX).remove(0);
    if let Some(slot) = slot {
        runner.bank.remove(slot);
    }
    text.decode(&tokens, false).expect("text")
}

/// Plays the scene; every answer must be that of the version in its header. Returns how many
/// answers, of how many versions, and what is left on the server's page.
async fn play(scene: Scene) -> (usize, usize, String) {
    let dir = tempfile::tempdir().expect("directory");
    let model = dir.path().join("tiny");
    std::fs::create_dir(&model).expect("directory");
    let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
    tiny::write(&model, &case, tiny::Storage::F32, 1);
    let data = dir.path().join("data");
    let server = Server::start(&model, &data, scene.flags);
    let checkpoint = Checkpoint::open(&model).expect("checkpoint");
    let weights = Weights::load(&checkpoint, None, &Device::cpu(2), &|_, _| ()).expect("weights");
    let uploaded = Uploaded::default();
    let uploader = Arc::new(Uploader {
        client: support::client().build().expect("a client"),
        url: server.url.clone(),
        shape: weights.shape.clone(),
        dir: dir.path().to_owned(),
        recipe: scene.recipe,
        uploaded: uploaded.clone(),
    });
    for adapter in 0..scene.adapters {
        uploader.put(adapter, 0).await;
    }
    let churns: Vec<_> = (0..scene.uploaders)
        .map(|first| tokio::spawn(churn(scene, uploader.clone(), first)))
        .collect();
    let mut answers = Vec::new();
    let mut round = 0;
    while round < scene.rounds_min || !churns.iter().all(|c| c.is_finished()) {
        assert!(round < ROUNDS_MAX, "the uploads do not come through");
        let asked = (0..scene.streams).map(|i| {
            let (client, url) = (uploader.client.clone(), server.url.clone());
            let seed = (round * scene.streams + i) as u64;
            tokio::spawn(async move { ask(&client, &url, scene.adapters, seed).await })
        });
        for answer in asked.collect::<Vec<_>>() {
            answers.push(answer.await.expect("answered"));
        }
        round += 1;
    }
    for churn in churns {
        churn.await.expect("replaced");
    }
    let page = uploader.client.get(format!("{}/metrics", server.url)).send().await;
    let page = page.expect("an answer").text().await.expect("a page");
    let mut runner = Runner::new(Arc::new(weights), Dtype::F32, 1024);
    let text = Text::new(checkpoint.text).expect("text");
    let uploaded = uploaded.lock().expect("lock");
    let mut versions = std::collections::HashSet::new();
    for a in &answers {
        let source = (a.version != "base").then(|| uploaded[&a.version].as_path());
        let alone = expected(&mut runner, &text, source, &a.prompt);
        assert_eq!(a.text, alone, "answer of {}", a.version);
        versions.insert(a.version.clone());
    }
    eprintln!("{} answers of {} versions", answers.len(), versions.len());
    (answers.len(), versions.len(), page)
}

/// Replaces every so-manieth adapter, again and again.
async fn churn(scene: Scene, uploader: Arc<Uploader>, first: usize) {
    for edition in 1..=scene.replacements {
        let own = scene.adapters / scene.uploaders;
        uploader.put(first + (edition * 7) % own * scene.uploaders, edition).await;
        tokio::time::sleep(scene.pause).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stream_equals_the_solo_run_of_the_version_in_its_header() {
    let scene = Scene {
        flags: &["--kv-bytes", "64MiB"],
        adapters: 32,
        recipe: everywhere,
        streams: 64,
        rounds_min: 4,
        uploaders: 1,
        replacements: 32,
        pause: Duration::ZERO,
    };
    let (_, versions, _) = play(scene).await;
    assert!(versions > scene.adapters + 1, "only {versions} versions: no replacement seen");
}

/// Ten adapters are replaced; in a soak ten times as many.
///
/// That it sees what leases and the check in `engine/batch.rs` are for was tried by hand. Let
/// `Resident::idle` be true whatever is leased: steps fail, "slot 0 holds another adapter". Take
/// the check out as well: steps still fail where a slot is empty (`model/forward.rs`). Let a slot
/// that is not stand in for it: answers come from the wrong adapter, and this test says which.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_places_for_twelve_adapters_mix_nothing_up() {
    let rounds = support::soak::rounds(1, 10);
    let scene = Scene {
        flags: &[
            "--kv-bytes",
            "64MiB",
            "--resident-max",
            "3",
            "--adapter-patience-ms",
            "5",
            "--queue-seconds-max",
            "600",
        ],
        adapters: 12,
        recipe: apart,
        streams: 200,
        rounds_min: rounds,
        uploaders: 2,
        replacements: 5 * rounds,
        pause: Duration::from_millis(5),
    };
    let (_, versions, page) = play(scene).await;
    assert!(versions > scene.adapters + 1, "only {versions} versions: no replacement seen");
    let evictions = page.lines().find_map(|l| l.strip_prefix("polylora_adapter_evictions_total "));
    let evictions: usize = evictions.expect("a figure").parse().expect("a number");
    eprintln!("{evictions} evictions");
    assert!(evictions > 2 * scene.adapters, "{evictions} evictions");
}
