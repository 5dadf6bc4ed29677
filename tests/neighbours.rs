//! Never the neighbour's: 64 streams over 32 adapters while others are uploaded and replaced,
//! through HTTP.
//!
//! Every answer must be, token for token, what the version named in its header says alone, computed
//! by the simplest runner there is from the very factors that were uploaded.

mod common;

use common::adapters::{Noise, Recipe, write_adapter};
use common::runner::{Runner, Weights};
use common::server::Server;
use common::tiny;
use polylora::adapters::format;
use polylora::model::checkpoint::Checkpoint;
use polylora::shape::{ModelShape, Projection};
use polylora::text::Text;
use polylora_kernels::Dtype;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const ADAPTERS: usize = 32;
const STREAMS: usize = 64;
/// Rounds go on until so many adapters were replaced under them, within a bound.
const REPLACEMENTS: usize = 32;
const ROUNDS_MAX: usize = 200;
const TOKENS: usize = 32;

/// Ranks 1 to 64, disjoint module sets.
fn recipe(adapter: usize, edition: usize) -> Recipe {
    let sets: [&[Projection]; 4] = [
        &[Projection::Q, Projection::V],
        &[Projection::K, Projection::O],
        &[Projection::Gate, Projection::Up],
        &[Projection::Down],
    ];
    let ranks = [1, 2, 3, 5, 8, 13, 16, 24, 32, 48, 64];
    let seed = (adapter * 1000 + edition) as u64;
    let mut recipe = Recipe::new(ranks[(adapter + edition) % 11], sets[adapter % 4], seed);
    recipe.strength = 0.6;
    recipe
}

/// What was uploaded under `name@version`.
type Uploaded = Arc<Mutex<HashMap<String, PathBuf>>>;

struct Uploader {
    client: reqwest::Client,
    url: String,
    shape: ModelShape,
    dir: PathBuf,
    uploaded: Uploaded,
}

impl Uploader {
    async fn put(&self, adapter: usize, edition: usize) {
        let dir = self.dir.join(format!("a{adapter}-{edition}"));
        write_adapter(&dir, &self.shape, &recipe(adapter, edition));
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

async fn ask(client: &reqwest::Client, url: &str, seed: u64) -> Answer {
    let mut noise = Noise(seed);
    let prompt: Vec<u32> = (0..4 + noise.below(40)).map(|_| 40 + noise.below(80) as u32).collect();
    let adapter = noise.below(ADAPTERS + 2);
    // Now and then the base: it must stay the base.
    let model = if adapter < ADAPTERS { format!("a{adapter}") } else { "tiny".into() };
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_stream_equals_the_solo_run_of_the_version_in_its_header() {
    let dir = tempfile::tempdir().expect("directory");
    let model = dir.path().join("tiny");
    std::fs::create_dir(&model).expect("directory");
    let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
    tiny::write(&model, &case, tiny::Storage::F32, 1);
    let data = dir.path().join("data");
    let server = Server::start(&model, &data, &["--kv-bytes", "64MiB"]);
    let checkpoint = Checkpoint::open(&model).expect("checkpoint");
    let weights = Weights::load(&checkpoint, None, &mut |_, _| {}).expect("weights");
    let uploaded = Uploaded::default();
    let uploader = Arc::new(Uploader {
        client: reqwest::Client::new(),
        url: server.url.clone(),
        shape: weights.shape.clone(),
        dir: dir.path().to_owned(),
        uploaded: uploaded.clone(),
    });
    for adapter in 0..ADAPTERS {
        uploader.put(adapter, 0).await;
    }

    let churn = tokio::spawn({
        let uploader = uploader.clone();
        async move {
            for edition in 1..=REPLACEMENTS {
                uploader.put((edition * 7) % ADAPTERS, edition).await;
            }
        }
    });
    let mut answers = Vec::new();
    let mut round = 0;
    while round < 4 || !churn.is_finished() {
        assert!(round < ROUNDS_MAX, "the uploads do not come through");
        let asked = (0..STREAMS).map(|i| {
            let (client, url) = (uploader.client.clone(), server.url.clone());
            tokio::spawn(async move { ask(&client, &url, (round * STREAMS + i) as u64).await })
        });
        for answer in asked.collect::<Vec<_>>() {
            answers.push(answer.await.expect("answered"));
        }
        round += 1;
    }
    churn.await.expect("replaced");

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
    assert!(versions.len() > ADAPTERS + 1, "only {} versions: no replacement seen", versions.len());
}
