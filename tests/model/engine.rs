//! The engine as a whole, on a tiny model: no neighbour's influence, prefix reuse, preemption, and
//! what a step costs.

use polylora::adapters::bank::Slot;
use polylora::adapters::composition::{Composition, Part};
use polylora::adapters::format;
use polylora::adapters::registry::Lease;
use polylora::checkpoint::Checkpoint;
use polylora::ending::FinishReason;
use polylora::engine::EngineOptions;
use polylora::engine::{Background, EngineHandle, Event, EventStream, Request, Sampling, probe};
use polylora::metrics::Metrics;
use polylora::model::{Model, ModelOptions};
use polylora::shape::Projection;
use polylora_kernels::{Device, Dtype};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use support::adapters::{Noise, Recipe, write_adapter};
use support::runner::{Runner, Weights};
use support::{bank, tiny};

const CONTEXT: usize = 128;

/// An engine on a tiny Llama, and adapters of many ranks and module sets installed in it.
struct Bench {
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    weights: Arc<Weights>,
    leases: Vec<Lease>,
    /// The adapters' directories, in the order of `leases`.
    _dir: tempfile::TempDir,
}

struct Setup {
    dtype: Dtype,
    adapters: usize,
    kv_pages: usize,
    prefix_cache: bool,
    /// What the model's device failed at before the first step.
    failure: Option<polylora_kernels::Error>,
}

impl Default for Setup {
    fn default() -> Self {
        let (dtype, prefix_cache) = (Dtype::F32, true);
        Self { dtype, adapters: 8, kv_pages: 1024, prefix_cache, failure: None }
    }
}

fn recipe(i: usize) -> Recipe {
    let sets: [&[Projection]; 4] = [
        &Projection::ALL,
        &[Projection::Q, Projection::V],
        &[Projection::Gate, Projection::Up, Projection::Down],
        &[Projection::K, Projection::O],
    ];
    let ranks = [16, 1, 64, 3, 8, 32, 5, 24];
    Recipe::new(ranks[i % ranks.len()], sets[i % sets.len()], i as u64)
}

impl Bench {
    async fn new(setup: Setup) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let model_dir = dir.path().join("model");
        std::fs::create_dir(&model_dir).expect("directory");
        let case = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
        tiny::write(&model_dir, &case, tiny::Storage::Bf16, 1);
        let checkpoint = Checkpoint::open(&model_dir).expect("checkpoint");
        let weights =
            Weights::load(&checkpoint, Some(setup.dtype.into()), &Device::cpu(2), &|_, _| ());
        let weights = Arc::new(weights.expect("weights"));
        let prompts = vec![vec![5, 6, 7], vec![9, 8]];
        let options = ModelOptions {
            threads: 2,
            rows_max: 96,
            logit_rows_max: 96,
            kv_pages: setup.kv_pages + probe::pages_needed(prompts.len()),
            kv_dtype: setup.dtype.into(),
            context: CONTEXT,
        };
        let model = Model::new(weights.clone(), Device::cpu(2), &options).expect("model");
        setup.failure.into_iter().for_each(|failure| model.device().remember(failure));
        let metrics = Arc::new(Metrics::new());
        let options = EngineOptions {
            rows_max: 96,
            logit_rows_max: 96,
            sequences_max: 64,
            quantum_tokens: 512,
            waiting_max: 256,
            waiting_tokens_max: 1 << 16,
            kv_pages: setup.kv_pages,
            context: CONTEXT,
            stream_events_max: 256,
            slots_max: 64,
            prefix_cache: setup.prefix_cache,
            prefix_share: false,
            background_share: 0.05,
            probe_prompts: prompts,
        };
        let engine = EngineHandle::start(model, weights.digest, options, metrics.clone());
        let engine = engine.expect("engine");
        let mut leases = Vec::new();
        for i in 0..setup.adapters {
            let path = dir.path().join(format!("adapter-{i}"));
            write_adapter(&path, &weights.shape, &recipe(i));
            leases.push(bank::install(&engine, &weights, setup.dtype, &path).await);
        }
        Self { engine, metrics, weights, leases, _dir: dir }
    }

    fn request(&self, prompt: &[u32], adapter: Option<usize>, tokens_max: u32) -> Request {
        Request {
            prompt: prompt.to_vec(),
            sampling: Sampling { temperature: 0.0, logprobs: Some(3), ..Sampling::default() },
            tokens_max,
            tokens_min: 0,
            stop_tokens: Vec::new(),
            lease: adapter.map(|i| self.leases[i].clone().into()),
            tenant: String::new(),
            weight: 1,
        }
    }

    /// Some of the adapters, weighted and summed.
    fn sum(&self, parts: &[(usize, f32)]) -> Composition {
        let part = |&(i, weight): &(usize, f32)| Part { lease: self.leases[i].clone(), weight };
        Composition::new(parts.iter().map(part).collect()).expect("a sum")
    }
}

/// Everything a stream said.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    /// Bits of the chosen token's logprob and of its alternatives'.
    bits: Vec<u32>,
    cached: u32,
}

async fn collect(mut stream: EventStream) -> Answer {
    let mut answer = Answer { tokens: Vec::new(), bits: Vec::new(), cached: 0 };
    loop {
        match stream.next().await.expect("a last event") {
            Event::Prompt(_) => {}
            Event::Token(t) => {
                answer.tokens.push(t.token);
                answer.bits.push(t.logprob.to_bits());
                answer.bits.extend(t.top[..t.top_len as usize].iter().map(|x| x.1.to_bits()));
            }
            Event::Finished { cached_tokens, .. } => {
                answer.cached = cached_tokens;
                return answer;
            }
            Event::Failed(e) => panic!("{e}"),
        }
    }
}

fn prompt(seed: u64, len: usize) -> Vec<u32> {
    let mut noise = Noise(seed);
    (0..len).map(|_| 3 + noise.below(120) as u32).collect()
}

/// 64 requests of mixed lengths, adapters (sums of three and the base among them), temperatures and
/// seeds.
fn crowd(bench: &Bench) -> Vec<Request> {
    (0..64)
        .map(|i| {
            let adapter = (i % 9 != 8).then_some(i % 8);
            let mut r = bench.request(&prompt(i as u64, 5 + i % 40), adapter, 24);
            r.sampling.temperature = [0.0, 0.7, 1.3][i % 3];
            r.sampling.seed = i as u64;
            r.sampling.top_p = [1.0, 0.9][i % 2];
            if i % 4 == 1 {
                let parts = [(i % 8, 0.5), ((i + 3) % 8, -1.25), ((i + 6) % 8, 1.0)];
                r.lease = Some(bench.sum(&parts));
            }
            r
        })
        .collect()
}

async fn no_neighbour_changes_a_bit(dtype: Dtype) {
    let bench = Bench::new(Setup { dtype, prefix_cache: false, ..Setup::default() }).await;
    let requests = crowd(&bench);
    let mut alone = Vec::new();
    for r in &requests {
        alone.push(collect(bench.engine.submit(r.clone()).expect("room")).await);
    }
    let streams: Vec<EventStream> =
        requests.iter().map(|r| bench.engine.submit(r.clone()).expect("room")).collect();
    for (i, stream) in streams.into_iter().enumerate() {
        assert_eq!(collect(stream).await, alone[i], "request {i} among 64");
    }
}

#[tokio::test]
async fn no_neighbour_changes_a_bit_in_f32() {
    no_neighbour_changes_a_bit(Dtype::F32).await;
}

#[tokio::test]
async fn no_neighbour_changes_a_bit_in_bf16() {
    no_neighbour_changes_a_bit(Dtype::Bf16).await;
}

#[tokio::test]
async fn one_part_of_weight_one_is_the_adapter_itself() {
    let bench = Bench::new(Setup { adapters: 2, ..Setup::default() }).await;
    let alone: Composition = bench.leases[0].clone().into();
    let (one, sum) = (bench.sum(&[(0, 1.0)]), bench.sum(&[(0, 1.0), (1, 0.0)]));
    assert_eq!((one.digest(), one.id()), (alone.digest(), alone.id()));
    assert!(one.alone().is_some() && sum.alone().is_none());
    assert_ne!(sum.digest(), alone.digest());
    let ask = |lease: Composition| {
        let request = Request { lease: Some(lease), ..bench.request(&prompt(4, 40), None, 16) };
        collect(bench.engine.submit(request).expect("room"))
    };
    let (alone, sum) = (ask(alone).await, ask(sum).await);
    // A part of weight zero adds nothing but zeros.
    assert_eq!((sum.tokens, sum.bits), (alone.tokens, alone.bits));
}

/// The engine agrees with the model run by hand, adapter by adapter.
#[tokio::test]
async fn engine_says_what_the_model_alone_says() {
    let bench = Bench::new(Setup::default()).await;
    let mut runner = Runner::new(bench.weights.clone(), Dtype::F32, 4096);
    for i in 0..bench.leases.len() {
        let dir = bench.leases[i].version().name.clone();
        let (rows, bias) = (bench.weights.base_rows(), bench.weights.base_bias());
        let shape = &bench.weights.shape;
        let (_, prepared) =
            format::prepare(Path::new(&dir), shape, Dtype::F32, &rows, &bias).expect("adapter");
        let slot: Slot = runner.bank.install(prepared).ok().expect("room");
        let tokens = prompt(77, 30);
        let mut streams = vec![runner.stream(&tokens, Some(slot), 80)];
        let (expected, _) = runner.greedy(&mut streams, 40, u32::MAX).remove(0);
        let ours = bench.engine.submit(bench.request(&tokens, Some(i), 40)).expect("room");
        assert_eq!(collect(ours).await.tokens, expected, "adapter {i}");
    }
}

#[tokio::test]
async fn prefix_is_reused_within_an_identity_and_never_across() {
    let bench = Bench::new(Setup::default()).await;
    let tokens = prompt(1, 100);
    let single = |i: usize| Some(bench.leases[i].clone().into());
    let mut identities: Vec<Option<Composition>> = vec![None];
    identities.extend((0..4).map(single));
    let sums: [&[(usize, f32)]; 5] = [
        &[(0, 1.0), (1, 1.0)],
        &[(0, 0.5), (1, 1.0)],
        &[(0, 1.0), (1, 0.5)],
        &[(0, 1.0), (1, 1.0), (2, 0.0)],
        &[(0, 0.5)],
    ];
    identities.extend(sums.map(|parts| Some(bench.sum(parts))));
    let ask = |lease: &Option<Composition>| {
        let request = Request { lease: lease.clone(), ..bench.request(&tokens, None, 8) };
        collect(bench.engine.submit(request).expect("room"))
    };
    let mut first = Vec::new();
    for (i, identity) in identities.iter().enumerate() {
        let answer = ask(identity).await;
        assert_eq!(answer.cached, 0, "identity {i} must not find another's pages");
        first.push(answer);
    }
    // What is asked for in another order is the same.
    identities[5] = Some(bench.sum(&[(1, 1.0), (0, 1.0)]));
    for (i, identity) in identities.iter().enumerate() {
        let answer = ask(identity).await;
        assert_eq!(answer.cached, 96, "identity {i} finds its own pages");
        assert_eq!(answer.tokens, first[i].tokens);
        assert_eq!(answer.bits, first[i].bits, "cached pages hold the same bits");
    }
}

#[tokio::test]
async fn preempted_sequences_end_with_the_same_tokens() {
    let roomy = Bench::new(Setup::default()).await;
    let tight = Bench::new(Setup { kv_pages: 24, ..Setup::default() }).await;
    let requests: Vec<(Vec<u32>, Option<usize>)> =
        (0..16).map(|i| (prompt(i, 20), (i % 3 != 0).then_some(i as usize % 8))).collect();
    let run = async |bench: &Bench| {
        let streams: Vec<EventStream> = requests
            .iter()
            .map(|(p, a)| bench.engine.submit(bench.request(p, *a, 60)).expect("room"))
            .collect();
        let mut tokens = Vec::new();
        for s in streams {
            tokens.push(collect(s).await.tokens);
        }
        tokens
    };
    assert_eq!(run(&tight).await, run(&roomy).await);
    assert!(tight.metrics.preemptions.get() > 0, "24 pages cannot hold 16 sequences of 80 tokens");
    assert_eq!(roomy.metrics.preemptions.get(), 0);
}

#[tokio::test]
async fn dropping_the_stream_frees_its_pages() {
    let bench = Bench::new(Setup { prefix_cache: false, ..Setup::default() }).await;
    let mut streams = Vec::new();
    for i in 0..32 {
        let request = bench.request(&prompt(i, 40), Some(i as usize % 8), 80);
        streams.push(bench.engine.submit(request).expect("room"));
    }
    while bench.metrics.kv_pages_used.get() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(streams);
    for _ in 0..1000 {
        if bench.metrics.kv_pages_used.get() == 0 && bench.metrics.requests_running.get() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} pages are still held", bench.metrics.kv_pages_used.get());
}

#[tokio::test]
async fn full_queue_refuses_and_says_so() {
    let bench = Bench::new(Setup::default()).await;
    let request = bench.request(&prompt(1, 20), None, 100);
    let error = bench.engine.submit_n(request, 257).err().expect("more than waiting_max");
    assert_eq!(error.code, "queue_full");
    let too_long = bench.engine.submit(bench.request(&prompt(1, 120), None, 100));
    assert_eq!(too_long.err().expect("beyond the context").code, "context_length_exceeded");
}

#[tokio::test]
async fn drain_lets_the_running_finish_and_refuses_the_new() {
    let bench = Bench::new(Setup::default()).await;
    let running = bench.engine.submit(bench.request(&prompt(1, 20), Some(0), 100)).expect("room");
    let engine = bench.engine.clone();
    let drained = tokio::spawn(async move { engine.drain(Duration::from_secs(60)).await });
    tokio::time::sleep(Duration::from_millis(1)).await;
    let refused = bench.engine.submit(bench.request(&prompt(2, 5), None, 5));
    assert_eq!(refused.err().expect("refused").code, "shutting_down");
    assert_eq!(collect(running).await.tokens.len(), 100);
    drained.await.expect("drained");
}

#[tokio::test]
async fn a_step_that_fails_fails_its_own_requests_and_the_next_ones_run() {
    let bench = Bench::new(Setup::default()).await;
    let good = || bench.engine.submit(bench.request(&prompt(1, 20), Some(0), 12)).expect("room");
    let expected = collect(good()).await;
    // A lease on another version than the slot holds: the step that meets it panics.
    let mut wrong = bench.request(&prompt(2, 20), None, 12);
    let digest = bench.leases[1].version().digest;
    wrong.lease = Some(Lease::detached("another", digest, bench.leases[0].slot()).into());
    for round in 1..=3 {
        let mut stream = bench.engine.submit(wrong.clone()).expect("room");
        let Some(Event::Failed(error)) = stream.next().await else { panic!("it must fail") };
        assert_eq!(error.code, "step_failed");
        assert_eq!(bench.metrics.step_failures.get(), round);
        let after = collect(good()).await;
        assert_eq!((after.tokens, after.bits), (expected.tokens.clone(), expected.bits.clone()));
    }
    while bench.metrics.requests_running.get() + bench.metrics.kv_pages_used.get() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_device_that_fails_fails_the_step_that_asks_it_and_the_next_ones_run() {
    let failure = Some(polylora_kernels::Error::OnCpuOnly("what was planted"));
    let bench = Bench::new(Setup { adapters: 0, failure, ..Setup::default() }).await;
    let submit = || bench.engine.submit(bench.request(&prompt(1, 20), None, 12)).expect("room");
    let mut stream = submit();
    let Some(Event::Failed(error)) = stream.next().await else { panic!("it must fail") };
    assert_eq!(error.code, "step_failed");
    assert!(!error.message.contains("planted"), "a client is not told what: {error}");
    assert_eq!(bench.metrics.step_failures.get(), 1);
    let after = collect(submit()).await;
    assert_eq!((after.tokens.len(), bench.metrics.step_failures.get()), (12, 1));
    while bench.metrics.requests_running.get() + bench.metrics.kv_pages_used.get() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn echo_scores_every_prompt_token() {
    let bench = Bench::new(Setup::default()).await;
    let tokens = prompt(3, 110);
    let mut runner = Runner::new(bench.weights.clone(), Dtype::F32, 4096);
    let mut streams = vec![runner.stream(&tokens, None, 110)];
    let mut expected = vec![f64::NAN; tokens.len()];
    runner.advance(&mut streams, |_, position, logits| {
        if let Some(&next) = tokens.get(position + 1) {
            expected[position + 1] = support::runner::logprobs_at(logits, &[next])[0];
        }
    });
    // Twice: the second time the prefix is cached, and must be computed all the same.
    for _ in 0..2 {
        let mut request = bench.request(&tokens, None, 1);
        request.sampling.prompt_logprobs = Some(2);
        let mut stream = bench.engine.submit(request).expect("room");
        for (i, &token) in tokens.iter().enumerate() {
            let Some(Event::Prompt(event)) = stream.next().await else {
                panic!("prompt event {i}")
            };
            assert_eq!(event.token, token);
            let apart = (event.logprob as f64 - expected[i]).abs();
            assert!(apart < 1e-4 || i == 0 && event.logprob.is_nan(), "token {i}: {apart}");
        }
        assert!(matches!(stream.next().await, Some(Event::Token(_))));
        let last = stream.next().await;
        assert!(matches!(last, Some(Event::Finished { reason: FinishReason::Length, .. })));
    }
}

/// Work in pieces: so many, then it is over.
struct Pieces {
    left: u64,
    done: Arc<AtomicU64>,
    fails: bool,
    /// Dropped with it.
    _over: tokio::sync::oneshot::Sender<()>,
}

impl Background for Pieces {
    fn advance(&mut self, device: &Device) -> bool {
        assert_eq!(device.threads(), 2, "the engine's own device");
        assert!(!self.fails, "a planted failure");
        self.done.fetch_add(1, Ordering::AcqRel);
        self.left -= 1;
        self.left > 0
    }
}

#[tokio::test]
async fn work_in_the_background_gives_way_and_changes_no_bit() {
    let bench = Bench::new(Setup::default()).await;
    let request = || bench.request(&prompt(7, 30), Some(2), 40);
    let expected = collect(bench.engine.submit(request()).expect("room")).await;
    let give = |left, fails| {
        let (over, gone) = tokio::sync::oneshot::channel();
        let done = Arc::<AtomicU64>::default();
        let work = Pieces { left, done: done.clone(), fails, _over: over };
        bench.engine.background(Box::new(work)).expect("room");
        (done, gone)
    };
    // One after the other, to the end, and one that fails in between.
    let [(first, first_gone), (failed, failed_gone), (last, last_gone)] =
        [give(5, false), give(5, true), give(3, false)];
    let _ = tokio::join!(first_gone, failed_gone, last_gone);
    let done = [first, failed, last].map(|done| done.load(Ordering::Acquire));
    assert_eq!(done, [5, 0, 3]);
    // One that never ends gives way to requests, which say what they said without it.
    let (endless, gone) = give(u64::MAX, false);
    let streams: Vec<EventStream> =
        (0..4).map(|_| bench.engine.submit(request()).expect("room")).collect();
    for stream in streams {
        let answer = collect(stream).await;
        assert_eq!((answer.tokens, answer.bits), (expected.tokens.clone(), expected.bits.clone()));
    }
    let seen = endless.load(Ordering::Acquire);
    while endless.load(Ordering::Acquire) == seen {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(bench.metrics.background_seconds.get() > 0.0);
    bench.engine.drain(Duration::ZERO).await;
    gone.await.expect_err("it is dropped when the server stops");
}
