//! Cold adapters load beside the step: while some requests wait 50 ms for their adapter, the base
//! and resident adapters are served as if nobody did.
//!
//! 64 adapters, room for 8, Zipf traffic. The slow disk is a pause where a load reads rows of the
//! base weights (DoRA). A short run only checks that everybody is answered. A soak measures p99 of
//! the time to first token in eight runs of 10 seconds, in turns with runs in which all 64 have
//! room, and then the medians of these may differ by a fifth.

use polylora::adapters::registry::{Registry, RegistryOptions};
use polylora::adapters::version::Publish;
use polylora::adapters::{BaseRows, BaseText};
use polylora::checkpoint::Checkpoint;
use polylora::database::Storage;
use polylora::engine::EngineOptions;
use polylora::engine::{EngineHandle, Event, Request, Sampling, probe};
use polylora::metrics::Metrics;
use polylora::model::weights::Weights;
use polylora::model::{Model, ModelOptions};
use polylora::shape::{ModelShape, Projection, Site};
use polylora_kernels::Device;
use serde_json::json;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::adapters::Noise;
use support::soak::{rounds, soak};
use support::tiny;

const ADAPTERS: usize = 64;
const ROOM: u64 = 8;
const LOAD: Duration = Duration::from_millis(50);
const CONTEXT: usize = 256;
/// Between two arrivals, on average.
const GAP: f32 = 0.0125;

/// A DoRA adapter on q_proj: loading it reads rows of the base.
fn write_dora(dir: &Path, shape: &ModelShape, seed: u64) {
    let mut noise = Noise(seed);
    let mut tensors = Vec::new();
    for layer in 0..shape.layers {
        let (inputs, outputs) = shape.site_dims(Site::Layer(layer, Projection::Q));
        let module = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        let magnitude = vec![outputs];
        for (name, dims) in [
            ("lora_A.weight", vec![8, inputs]),
            ("lora_B.weight", vec![outputs, 8]),
            ("lora_magnitude_vector", magnitude),
        ] {
            let values = noise.floats(dims.iter().product(), 0.3);
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.abs().to_le_bytes()).collect();
            tensors.push((format!("{module}.{name}"), dims, bytes));
        }
    }
    let views = tensors.iter().map(|(name, dims, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, dims.clone(), bytes);
        (name.clone(), view.expect("tensor view"))
    });
    let file = dir.join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &file).expect("safetensors");
    let config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": true,
                        "target_modules": ["q_proj"], "bias": "none"});
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).expect("config");
}

/// An engine and a registry with room for so many of the adapters.
struct Fixture {
    engine: EngineHandle,
    registry: Registry,
    metrics: Arc<Metrics>,
    _dir: tempfile::TempDir,
}

/// No bundle comes with these adapters, so nobody asks.
fn no_bundles(vocab: usize) -> BaseText {
    let (check_template, token_id) = (Arc::new(|_: &_| Ok(())), Arc::new(|_: &str| None));
    BaseText { check_template, token_id, vocab, context: CONTEXT }
}

impl Fixture {
    async fn new(weights: &Arc<Weights>, room: Option<u64>) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let metrics = Arc::new(Metrics::new());
        let kv_pages = 1024;
        let options = EngineOptions {
            rows_max: 64,
            logit_rows_max: 64,
            sequences_max: 32,
            quantum_tokens: 512,
            waiting_max: 256,
            waiting_tokens_max: 1 << 16,
            kv_pages,
            context: CONTEXT,
            stream_events_max: 256,
            slots_max: ADAPTERS,
            prefix_cache: false,
            prefix_share: false,
            background_share: 0.05,
            probe_prompts: vec![vec![5, 6, 7]],
        };
        let model = ModelOptions {
            threads: 1,
            rows_max: 64,
            logit_rows_max: 64,
            kv_pages: kv_pages + probe::pages_needed(1),
            kv_dtype: weights.dtype.into(),
            context: CONTEXT,
        };
        let model = Model::new(weights.clone(), Device::cpu(1), &model).expect("model");
        let engine = EngineHandle::start(model, weights.digest, options, metrics.clone());
        let engine = engine.expect("engine");
        let slow = Arc::new(AtomicBool::new(false));
        let (rows, pauses) = (weights.base_rows(), slow.clone());
        let rows: BaseRows = Arc::new(move |site, row, out| {
            let first = row == 0 && site == Site::Layer(0, Projection::Q);
            if first && pauses.load(Ordering::Relaxed) {
                std::thread::sleep(LOAD);
            }
            rows(site, row, out);
        });
        let one = Self::bytes_of_one(weights, dir.path()).await;
        let options = RegistryOptions {
            storage: Storage::of(dir.path().join("data")),
            base_name: "tiny".to_owned(),
            base_digest: weights.digest,
            text: no_bundles(weights.shape.vocab),
            shape: Arc::new(weights.shape.clone()),
            factors: weights.dtype.into(),
            resident_bytes_max: one * room.unwrap_or(ADAPTERS as u64),
            residents_max: ADAPTERS,
            load_wait_max: Duration::from_secs(10),
            load_patience: Duration::from_millis(500),
            upload_bytes_max: 1 << 20,
            versions_kept: 3,
            adapters_max: 1000,
            other_bytes: Arc::new(|_| 0),
            metrics: metrics.clone(),
        };
        let bias = weights.base_bias();
        let registry = Registry::open(options, rows, bias, engine.bank()).await.expect("registry");
        for i in 0..ADAPTERS {
            let staging = registry.stage(&format!("a{i}")).expect("a name");
            write_dora(&staging.dir, &weights.shape, i as u64);
            registry.publish(staging, Publish::default()).await.expect("published");
        }
        slow.store(true, Ordering::Relaxed);
        Self { engine, registry, metrics, _dir: dir }
    }

    async fn bytes_of_one(weights: &Arc<Weights>, dir: &Path) -> u64 {
        let dir = dir.join("one");
        std::fs::create_dir(&dir).expect("directory");
        write_dora(&dir, &weights.shape, 0);
        let (rows, bias) = (weights.base_rows(), weights.base_bias());
        let shape = &weights.shape;
        let made = polylora::adapters::format::prepare(&dir, shape, weights.dtype, &rows, &bias);
        made.expect("prepared").1.bytes as u64
    }

    /// The time to the first token, and who it was for.
    async fn ask(&self, adapter: Option<usize>, seed: u64) -> (Class, Duration) {
        let name = adapter.map(|i| format!("a{i}"));
        let begun = Instant::now();
        let mut class = Class::Base;
        let mut lease = None;
        if let Some(name) = name {
            let here = self.registry.versions(&name).iter().any(|e| e.current && e.resident);
            class = if here { Class::Resident } else { Class::Cold };
            lease = Some(self.registry.acquire(&name).await.expect("served"));
        }
        let mut noise = Noise(seed);
        let request = Request {
            prompt: (0..48).map(|_| 3 + noise.below(120) as u32).collect(),
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            tokens_max: 32,
            tokens_min: 0,
            stop_tokens: Vec::new(),
            lease: lease.map(Into::into),
            tenant: String::new(),
            weight: 1,
        };
        let mut stream = self.engine.submit(request).expect("room");
        let first = stream.next().await;
        let waited = begun.elapsed();
        assert!(matches!(first, Some(Event::Token(_))), "{first:?}");
        let mut last = first;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        assert!(matches!(last, Some(Event::Finished { .. })), "{last:?}");
        (class, waited)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Base,
    Resident,
    Cold,
}

/// p99 in milliseconds of the base, of residents, and of the cold, with how many there were.
type Figures = [(f64, usize); 3];

/// Two in five for the base, the others by Zipf's law; the same arrivals every time.
async fn traffic(fixture: &Arc<Fixture>, seconds: u64) -> Figures {
    let mut noise = Noise(7);
    let weight: Vec<f32> = (1..=ADAPTERS).map(|rank| 1.0 / rank as f32).collect();
    let total: f32 = weight.iter().sum();
    let waits: Arc<Mutex<Vec<(Class, Duration)>>> = Arc::default();
    let mut requests = tokio::task::JoinSet::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut uniform = move || (noise.float() + 1.0) / 2.0;
    for seed in 0.. {
        if Instant::now() > end {
            break;
        }
        let adapter = (uniform() >= 0.4).then(|| {
            let mut left = uniform() * total;
            weight.iter().position(|w| {
                left -= w;
                left <= 0.0
            })
        });
        let adapter = adapter.map(|found| found.unwrap_or(0));
        let (fixture, waits) = (fixture.clone(), waits.clone());
        requests.spawn(async move {
            let seen = fixture.ask(adapter, seed).await;
            waits.lock().unwrap().push(seen);
        });
        tokio::time::sleep(Duration::from_secs_f32(-GAP * uniform().max(1e-3).ln())).await;
    }
    while let Some(done) = requests.join_next().await {
        done.expect("answered");
    }
    let waits = waits.lock().unwrap();
    [Class::Base, Class::Resident, Class::Cold].map(|class| {
        let mut of: Vec<f64> =
            waits.iter().filter(|w| w.0 == class).map(|w| w.1.as_secs_f64() * 1e3).collect();
        of.sort_by(f64::total_cmp);
        (p99(&of), of.len())
    })
}

/// Between two of the sorted values where it lies between them: of runs of different lengths the
/// next value itself would be another quantile of each, and of a hundred values the largest.
fn p99(sorted: &[f64]) -> f64 {
    let at = sorted.len().saturating_sub(1) as f64 * 0.99;
    let value = |at: f64| sorted.get(at as usize).copied().unwrap_or(0.0);
    value(at.floor()) + (value(at.ceil()) - value(at.floor())) * at.fract()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2] + values[(values.len() - 1) / 2]) / 2.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_waits_for_a_cold_adapter() {
    let (rounds, seconds) = (rounds(1, 8), rounds(1, 10) as u64);
    let dir = tempfile::tempdir().expect("directory");
    let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                      "max_position_embeddings": CONTEXT});
    tiny::write(dir.path(), &case, tiny::Storage::F32, 1);
    let checkpoint = Checkpoint::open(dir.path()).expect("checkpoint");
    let weights =
        Arc::new(Weights::load(&checkpoint, None, &Device::cpu(2), &|_, _| ()).expect("weights"));
    let tight = Arc::new(Fixture::new(&weights, Some(ROOM)).await);
    let roomy = Arc::new(Fixture::new(&weights, None).await);
    let mut figures: [Vec<Figures>; 2] = Default::default();
    for _ in 0..rounds {
        for (fixture, of) in [&roomy, &tight].into_iter().zip(&mut figures) {
            let seen = traffic(fixture, seconds).await;
            eprintln!(
                "p99 ms (count): base {:?}, resident {:?}, cold {:?}",
                seen[0], seen[1], seen[2]
            );
            of.push(seen);
        }
    }
    assert!(tight.metrics.adapter_evictions.get() > 0, "the tight fixture has no room for all");
    assert!(figures[0].iter().all(|f| f[2].1 == 0), "the roomy fixture has");
    let typical = |of: &[Figures], class: usize| median(of.iter().map(|f| f[class].0).collect());
    for (class, name) in ["base", "resident"].into_iter().enumerate() {
        let (alone, beside) = (typical(&figures[0], class), typical(&figures[1], class));
        eprintln!("{name}: p99 {alone:.2} ms without misses, {beside:.2} ms beside them");
        if soak() {
            assert!(beside <= 1.2 * alone, "{name}: {beside} ms after {alone} ms");
        }
    }
}
