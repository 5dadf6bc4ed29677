//! Jobs that go on from an adapter: where they start, what pairs are held against, and what is
//! refused by name.
//!
//! Never trains long. The thing to know: what a job ended with is validated by it, and read again
//! by the one that goes on.

use super::trainer::{examples, exported, rest, spec, step, tiny};
use polylora::adapters::format;
use polylora::error::Error;
use polylora::model::weights::Weights;
use polylora::shape::Projection;
use polylora::train::{Decay, Objective, TrainSpec, Trainer};
use polylora_kernels::Device;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::training::demo;

/// A job on the data named `data`, of the adapter in `dir`.
fn going_on(
    weights: &Arc<Weights>,
    dev: &Device,
    spec: TrainSpec,
    (data, dir): (&str, &Path),
) -> Result<Trainer, Error> {
    let spec = TrainSpec { start: Some("sha256:1".into()), ..spec };
    Trainer::new(weights.clone(), dev, spec, 64, examples(data, 4), None, Some(dir))
}

/// LoRA, and DoRA with its scale of rsLoRA.
fn specs() -> [TrainSpec; 2] {
    [spec(), TrainSpec { dora: true, rslora: true, ..spec() }]
}

/// Trains a job and leaves its export in `dir`; returns what it scored on `validation` at last.
fn trained(weights: &Arc<Weights>, dev: &Device, spec: &TrainSpec, dir: &Path) -> f64 {
    let (data, validation) = (examples("data", 10), Some(examples("validation", 4)));
    let job = Trainer::new(weights.clone(), dev, spec.clone(), 64, data, validation, None);
    let mut job = job.expect("a job");
    let reports = rest(&mut job, dev);
    exported(&job, dir);
    reports.last().and_then(|report| report.valid).expect("a validation").loss
}

#[test]
fn a_job_goes_on_where_another_ended() {
    let (weights, dev) = (tiny("qwen3"), Device::cpu(2));
    for spec in specs() {
        let dir = tempfile::tempdir().expect("a directory");
        let ended = trained(&weights, &dev, &spec, dir.path());
        let mut job = going_on(&weights, &dev, spec.clone(), ("validation", dir.path()));
        let first = step(job.as_mut().expect("a job"), &dev).expect("a step").loss;
        assert!((first - ended).abs() < 1e-6 * ended, "{first}, ended with {ended}");
        let fresh = Trainer::new(
            weights.clone(),
            &dev,
            spec.clone(),
            64,
            examples("validation", 4),
            None,
            None,
        );
        let other = step(&mut fresh.expect("a job"), &dev).expect("a step").loss;
        assert!((other - ended).abs() > 1e-3 * ended, "{other}: nothing was trained");
    }
}

#[test]
fn without_a_rate_a_job_ends_with_the_bytes_it_started_from() {
    let (weights, dev) = (tiny("llama"), Device::cpu(2));
    for spec in specs() {
        let [start, end] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        trained(&weights, &dev, &spec, start.path());
        let still = TrainSpec { lr: 0.0, weight_decay: 0.5, ..spec };
        let job = going_on(&weights, &dev, still, ("data", start.path()));
        let mut job = job.expect("a job");
        assert_eq!(rest(&mut job, &dev).len(), 2);
        exported(&job, end.path());
        let tensors = "adapter_model.safetensors";
        let [start, end] = [start, end].map(|dir| std::fs::read(dir.path().join(tensors)));
        assert!(start.expect("a file") == end.expect("a file"));
    }
}

/// At the start policy and reference say the same, whatever was trained before: a loss of ln 2.
/// Resumed, pairs are still held against the start.
#[test]
fn pairs_are_held_against_what_a_job_starts_from() {
    let (weights, dev) = (tiny("qwen2"), Device::cpu(2));
    for spec in specs() {
        let dir = tempfile::tempdir().expect("a directory");
        trained(&weights, &dev, &spec, dir.path());
        let objective = Objective::Dpo { beta: 0.5 };
        let (decay, batch) = (Decay::Constant, 2);
        let spec = TrainSpec { objective, decay, warmup_ratio: 0.0, batch, epochs: 3, ..spec };
        let new = || going_on(&weights, &dev, spec.clone(), ("data", dir.path())).expect("a job");
        let mut job = new();
        let first = step(&mut job, &dev).expect("a step");
        assert!((first.loss - 2f64.ln()).abs() < 1e-9, "{}", first.loss);
        let state = dir.path().join("state");
        job.save(&state).expect("saved");
        let others = rest(&mut job, &dev);
        assert!(others[0].loss < 2f64.ln() - 1e-3, "{}", others[0].loss);
        let mut resumed = new();
        resumed.restore(&state).expect("restored");
        assert_eq!(rest(&mut resumed, &dev), others);
    }
}

#[test]
fn a_start_that_differs_is_refused_by_what_differs() {
    let (weights, dev) = (tiny("llama"), Device::cpu(2));
    let [lora, dora] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let with = TrainSpec { dora: true, ..spec() };
    let few = TrainSpec { targets: vec![Projection::Q, Projection::Down], ..spec() };
    trained(&weights, &dev, &spec(), lora.path());
    trained(&weights, &dev, &with, dora.path());
    let wider = TrainSpec { rank: 4, alpha: 8.0, ..spec() };
    let louder = TrainSpec { alpha: 12.0, ..spec() };
    for (job, dir, named) in [
        (wider, &lora, "its rank on `model.layers.0.self_attn.q_proj` is 3, the job's is 4"),
        (louder, &lora, "scaled by 2 (alpha and rank make the scale), the job's by 4"),
        (few, &lora, "it adapts `model.layers.0.self_attn.k_proj`, which the job does not train"),
        (with, &lora, "it has no magnitudes on `model.layers.0.self_attn.q_proj`"),
        (spec(), &dora, "it has DoRA's magnitudes on `model.layers.0.self_attn.q_proj`"),
    ] {
        let refused = going_on(&weights, &dev, job, ("data", dir.path())).err().expect("refused");
        assert_eq!(refused.code, "incompatible_start");
        assert!(refused.message.contains(named), "{}", refused.message);
    }
    let few = TrainSpec { targets: vec![Projection::Q], ..spec() };
    trained(&weights, &dev, &few, dora.path());
    let refused = going_on(&weights, &dev, spec(), ("data", dora.path())).err().expect("refused");
    assert!(refused.message.contains("no factors on `model.layers.0.self_attn.k_proj`"));
}

/// Exports of the demo model, after two steps. `POLYLORA_EXPORTS` names a directory to leave them
/// in, where `benches/merge_in_peft.py` holds PEFT's answers against those of a server.
#[test]
fn exports_of_the_demo_model_are_adapters() {
    let kept = std::env::var_os("POLYLORA_EXPORTS").map(PathBuf::from);
    let temporary = tempfile::tempdir().expect("a directory");
    let root = kept.as_deref().unwrap_or(temporary.path());
    let (weights, dev) = (demo(), Device::cpu(2));
    let plain = TrainSpec { rank: 4, alpha: 16.0, epochs: 1, warmup_ratio: 0.0, ..spec() };
    for (name, rslora, dora) in
        [("lora", false, false), ("rslora", true, false), ("dora", false, true)]
    {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        let spec = TrainSpec { rslora, dora, ..plain.clone() };
        let data = examples("data", 8);
        let job = Trainer::new(weights.clone(), &dev, spec, 64, data, None, None);
        let mut job = job.expect("a job");
        assert_eq!(rest(&mut job, &dev).len(), 2);
        exported(&job, &dir);
        format::check(&dir, &weights.shape).expect("it is read");
    }
}
