//! A whole job, op by op: what its steps report, that it resumes with the same bits, what it
//! exports, and preference pairs against Hugging Face PEFT.
//!
//! Never tests a gradient: `training.rs` does. The thing to know: jobs of the oracle are made by
//! putting its examples where the job's own order reads them, and its factors into a saved state.

use polylora::adapters::format::{self, factors};
use polylora::model::weights::Weights;
use polylora::shape::Projection;
use polylora::train::data::Examples;
use polylora::train::{
    Adapter, Advance, Decay, Init, Objective, OptimiserKind, Order, StepReport, TrainSpec, Trainer,
};
use polylora_kernels::Device;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use support::decoder::{ids, tiny_checkpoint};
use support::golden;
use support::soak::rounds;
use support::tiny::{Storage, uniform};
use support::training::{adapter, all_linears, demo, examples_of, f32_weights};

pub(crate) fn tiny(name: &str) -> Arc<Weights> {
    let config = &golden("models.json")["models"][name]["config"];
    f32_weights(&tiny_checkpoint(config, Storage::F32, 1))
}

pub(crate) fn spec() -> TrainSpec {
    TrainSpec {
        rank: 3,
        alpha: 6.0,
        rslora: false,
        dora: false,
        targets: Projection::ALL.to_vec(),
        epochs: 2,
        batch: 4,
        seed: 7,
        lr: 0.01,
        loraplus_ratio: 1.0,
        decay: Decay::Cosine,
        warmup_ratio: 0.2,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        objective: Objective::Supervised,
        validate_every: 0,
        start: None,
        freeze_a: false,
        optimiser: OptimiserKind::AdamW,
        nested: false,
        init: Init::Random,
    }
}

/// So many examples of 3 to 12 tokens, made of their names.
pub(crate) fn examples(name: &str, count: usize) -> Arc<Examples> {
    let rows = (0..count).map(|i| {
        let mut numbers = uniform(&format!("{name}/{i}"), 13).map(|x| x + 0.5);
        let length = 3 + (numbers.next().expect("a number") * 10.0) as usize;
        let ids: Vec<u32> = numbers.take(length).map(|x| (x * 100.0) as u32).collect();
        let weights = (0..ids.len()).map(|i| f32::from(u8::from(i > 1))).collect();
        (ids, weights)
    });
    Arc::new(examples_of(rows))
}

pub(crate) fn new(weights: &Arc<Weights>, dev: &Device, spec: &TrainSpec, rows: usize) -> Trainer {
    let (data, validation) = (examples("data", 10), Some(examples("validation", 4)));
    Trainer::new(weights.clone(), dev, spec.clone(), rows, data, validation, None).expect("a job")
}

/// The next step's report; `None` where the job is done.
pub(crate) fn step(trainer: &mut Trainer, dev: &Device) -> Option<StepReport> {
    loop {
        match trainer.advance(dev).expect("an op") {
            Advance::Running => {}
            Advance::Stepped(report) => return Some(*report),
            Advance::Done => return None,
        }
    }
}

pub(crate) fn rest(trainer: &mut Trainer, dev: &Device) -> Vec<StepReport> {
    std::iter::from_fn(|| step(trainer, dev)).collect()
}

pub(crate) fn exported(trainer: &Trainer, dir: &Path) -> [Vec<u8>; 2] {
    trainer.export(dir, "a/base").expect("an export");
    ["adapter_config.json", "adapter_model.safetensors"]
        .map(|name| std::fs::read(dir.join(name)).expect("a file"))
}

/// Factors as they are in a job's saved state.
pub(crate) fn state_values(trainer: &Trainer, dir: &Path) -> Vec<f32> {
    let file = dir.join("state");
    trainer.save(&file).expect("saved");
    let state = std::fs::read(&file).expect("a file");
    let tensors = safetensors::SafeTensors::deserialize(&state).expect("tensors");
    let values = tensors.tensor("values").expect("values");
    values.data().as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

#[test]
fn steps_report_epochs_rates_and_validation() {
    let (weights, dev) = (tiny("llama"), Device::cpu(2));
    for (every, validated) in [(0, vec![3, 6]), (2, vec![2, 3, 4, 6])] {
        let spec = TrainSpec { validate_every: every, ..spec() };
        let mut trainer = new(&weights, &dev, &spec, 64);
        assert_eq!((trainer.step(), trainer.steps()), (0, 6));
        let reports = rest(&mut trainer, &dev);
        let steps: Vec<u64> = reports.iter().map(|r| r.step).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
        let of = |has: fn(&StepReport) -> bool| -> Vec<u64> {
            reports.iter().filter(|r| has(r)).map(|r| r.step).collect()
        };
        assert_eq!(of(|r| r.valid.is_some()), validated);
        assert_eq!(of(|r| r.epoch_end), [3, 6]);
        assert_eq!(reports[1].epoch, 2.0 / 3.0);
        let data = examples("data", 10);
        assert_eq!(reports[..3].iter().map(|r| r.tokens).sum::<u64>(), data.tokens());
        let supervised = data.tokens() - 2 * data.len() as u64;
        assert_eq!(reports[..3].iter().map(|r| r.supervised).sum::<u64>(), supervised);
        // Warm-up is 1.2 steps, rounded up: its first step has no rate, the next half of it.
        assert_eq!((reports[0].lr, reports[1].lr, reports[2].lr), (0.0, 0.005, 0.01));
        let valid = |i: usize| reports[i].valid.expect("validation").loss;
        assert!(valid(5) < valid(2), "{} and {}", valid(5), valid(2));
        assert!(step(&mut trainer, &dev).is_none(), "a job that is done stays so");
    }
}

#[test]
fn micro_batches_change_no_report_but_by_rounding() {
    let (weights, dev) = (tiny("qwen3"), Device::cpu(2));
    for objective in [Objective::Supervised, Objective::Dpo { beta: 0.1 }] {
        let spec = TrainSpec { objective, ..spec() };
        let of = |rows: usize| rest(&mut new(&weights, &dev, &spec, rows), &dev);
        // Alone, two at a time, all at once.
        let (one, some, whole) = (of(1), of(24), of(512));
        for ((one, some), whole) in one.iter().zip(&some).zip(&whole) {
            for parts in [one, some] {
                assert_eq!((parts.tokens, parts.supervised), (whole.tokens, whole.supervised));
                for (a, b) in [(parts.loss, whole.loss), (parts.grad_norm, whole.grad_norm)] {
                    assert!((a - b).abs() < 1e-4 * b.abs(), "{objective:?}: {a} and {b}");
                }
            }
        }
    }
}

/// LoRA, DoRA and pairs; then methods, some of them together.
fn specs() -> [TrainSpec; 9] {
    let objective = Objective::Dpo { beta: 0.1 };
    let by_length = Objective::LnDpo { beta: 0.5 };
    let [lion, adafactor] = [OptimiserKind::Lion, OptimiserKind::Adafactor];
    [
        spec(),
        TrainSpec { dora: true, rslora: true, ..spec() },
        TrainSpec { objective, ..spec() },
        TrainSpec { objective: by_length, freeze_a: true, ..spec() },
        TrainSpec { optimiser: lion, lr: 0.001, ..spec() },
        TrainSpec { optimiser: adafactor, freeze_a: true, dora: true, ..spec() },
        TrainSpec { optimiser: adafactor, nested: true, dora: true, ..spec() },
        TrainSpec { init: Init::Eva, objective, ..spec() },
        TrainSpec { optimiser: OptimiserKind::Frugal, dora: true, ..spec() },
    ]
}

#[test]
fn a_job_resumed_at_any_step_ends_with_the_same_bytes() {
    let (weights, dev) = (tiny("qwen2"), Device::cpu(2));
    let dir = tempfile::tempdir().expect("a directory");
    for spec in specs() {
        let mut trainer = new(&weights, &dev, &spec, 24);
        let state = |step: usize| dir.path().join(format!("{step}.state"));
        trainer.save(&state(0)).expect("saved");
        let mut reports = Vec::new();
        while let Some(report) = step(&mut trainer, &dev) {
            reports.push(report);
            trainer.save(&state(reports.len())).expect("saved");
            // A save in the midst of a step is of the border before it.
            (0..9).for_each(|_| drop(trainer.advance(&dev).expect("an op")));
            let again = dir.path().join("again");
            trainer.save(&again).expect("saved");
            let both = [&again, &state(reports.len())];
            let [again, border] = both.map(|file| std::fs::read(file).expect("a file"));
            assert!(again == border, "in the midst of step {}", reports.len());
        }
        let whole = exported(&trainer, dir.path());
        for from in 0..=reports.len() {
            // What this one did before is forgotten.
            let mut resumed = new(&weights, &dev, &spec, 24);
            (0..from * 7).for_each(|_| drop(resumed.advance(&dev).expect("an op")));
            resumed.restore(&state(from)).expect("restored");
            assert_eq!(resumed.step(), from as u64);
            assert_eq!(rest(&mut resumed, &dev), reports[from..], "from step {from}");
            assert!(whole == exported(&resumed, dir.path()), "from step {from}: {spec:?}");
        }
    }
}

#[test]
fn a_state_of_another_job_is_refused() {
    let (weights, dev) = (tiny("llama"), Device::cpu(1));
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("state");
    new(&weights, &dev, &spec(), 64).save(&file).expect("saved");
    let other = TrainSpec { lr: 0.02, ..spec() };
    let error = new(&weights, &dev, &other, 64).restore(&file).expect_err("refused");
    assert!(error.message.contains("another job"), "{error}");
    let other = tiny("qwen2");
    assert!(new(&other, &dev, &spec(), 64).restore(&file).is_err());
    let whole = std::fs::read(&file).expect("a file");
    for length in [0, 7, whole.len() - 1] {
        std::fs::write(&file, &whole[..length]).expect("written");
        assert!(new(&weights, &dev, &spec(), 64).restore(&file).is_err(), "{length} bytes");
    }
}

#[test]
fn an_export_is_an_adapter_that_this_server_reads() {
    let (weights, dev) = (tiny("llama"), Device::cpu(2));
    let dir = tempfile::tempdir().expect("a directory");
    for spec in &specs()[..2] {
        let mut trainer = new(&weights, &dev, spec, 64);
        rest(&mut trainer, &dev);
        exported(&trainer, dir.path());
        let summary = format::check(dir.path(), &weights.shape).expect("it is read");
        assert_eq!(summary.base_model.as_deref(), Some("a/base"));
        let open = factors::open(dir.path(), &weights.shape).expect("it opens");
        assert_eq!(open.modules().len(), 7 * weights.shape.layers);
        assert_eq!(open.beyond_factors().is_some(), spec.dora);
        let (site, _) = open.modules()[3];
        let module = open.read(site).expect("values").expect("a module");
        assert_eq!(module.scale, spec.scale() as f32);
        // Its B lies output by output, the job's rank by rank.
        let values = state_values(&trainer, dir.path());
        let (shape, rank) = (&weights.shape, spec.rank);
        let layout = Adapter::new(shape, &all_linears(shape), rank, 1.0, spec.dora);
        let b = &values[layout.tensors()[2 * 3 + 1].range.clone()];
        let outputs = b.len() / rank;
        for (i, value) in module.b.iter().enumerate() {
            assert_eq!(*value, b[i % rank * outputs + i / rank], "{i}");
        }
    }
}

/// The names, shapes and config of an adapter that PEFT itself trained and saved.
#[test]
fn an_export_has_the_tensors_and_the_fields_that_peft_writes() {
    let peft = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/sql");
    let config = |dir: &Path| -> Value {
        let json = std::fs::read(dir.join("adapter_config.json")).expect("a config");
        serde_json::from_slice(&json).expect("JSON")
    };
    let tensors = |dir: &Path| -> Vec<(String, Vec<usize>)> {
        let file = std::fs::read(dir.join("adapter_model.safetensors")).expect("tensors");
        let (_, header) = safetensors::SafeTensors::read_metadata(&file).expect("a header");
        let all = header.tensors().into_iter().map(|(name, info)| (name, info.shape.clone()));
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    };
    let theirs = config(&peft);
    let (weights, dev) = (demo(), Device::cpu(2));
    let spec = TrainSpec {
        rank: theirs["r"].as_u64().expect("a rank") as usize,
        alpha: theirs["lora_alpha"].as_f64().expect("alpha"),
        rslora: theirs["use_rslora"] == true,
        dora: theirs["use_dora"] == true,
        ..spec()
    };
    let trainer = new(&weights, &dev, &spec, 64);
    let dir = tempfile::tempdir().expect("a directory");
    exported(&trainer, dir.path());
    assert_eq!(tensors(dir.path()), tensors(&peft));
    let ours = config(dir.path());
    for (field, value) in ours.as_object().expect("fields") {
        match field.as_str() {
            "base_model_name_or_path" => {}
            // PEFT's is a set.
            "target_modules" => {
                let sorted = |value: &Value| {
                    let mut names: Vec<String> =
                        serde_json::from_value(value.clone()).expect("names");
                    names.sort();
                    names
                };
                assert_eq!(sorted(value), sorted(&theirs[field]));
            }
            _ => assert_eq!(Some(value), theirs.get(field), "{field}"),
        }
    }
}

#[test]
fn three_steps_that_are_not_finite_end_a_job() {
    let (weights, dev) = (tiny("llama"), Device::cpu(2));
    let dir = tempfile::tempdir().expect("a directory");
    let spec = TrainSpec { lr: 1e30, warmup_ratio: 0.0, decay: Decay::Constant, ..spec() };
    let mut trainer = new(&weights, &dev, &spec, 64);
    assert!(!step(&mut trainer, &dev).expect("a step").skipped);
    let first = exported(&trainer, dir.path());
    for number in [2, 3] {
        let report = step(&mut trainer, &dev).expect("a step");
        assert_eq!((report.step, report.skipped), (number, true));
    }
    assert!(first == exported(&trainer, dir.path()), "nothing was updated");
    let error = loop {
        match trainer.advance(&dev) {
            Ok(Advance::Running) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, "non_finite_loss");
}

/// Puts the oracle's factors into a job that has not begun.
fn start_as_the_oracle(trainer: &mut Trainer, weights: &Weights, spec: &TrainSpec) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("state");
    trainer.save(&file).expect("saved");
    let shape = &weights.shape;
    let scale = spec.scale() as f32;
    let values = adapter(shape, &all_linears(shape), spec.rank, scale, 0.0).values;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut state = std::fs::read(&file).expect("a file");
    let (header, read) = safetensors::SafeTensors::read_metadata(&state).expect("a header");
    let (start, end) = read.info("values").expect("values").data_offsets;
    state[8 + header + start..8 + header + end].copy_from_slice(&bytes);
    std::fs::write(&file, state).expect("written");
    trainer.restore(&file).expect("restored");
}

/// The oracle's entries, each where the job's order reads it.
pub(crate) fn in_order<T: Clone>(entries: &[T], batches: &Value, spec: &TrainSpec) -> Vec<T> {
    let mut order = Order::new(spec.seed, entries.len() as u32, spec.batch);
    let mut placed = entries.to_vec();
    for (step, batch) in batches.as_array().expect("batches").iter().enumerate() {
        for (at, from) in order.batch(step as u64).iter().zip(ids(batch)) {
            placed[*at as usize] = entries[from as usize].clone();
        }
    }
    placed
}

#[test]
fn a_job_gives_the_curve_of_peft() {
    let (oracle, data) = (golden("train/curve-lora.json"), golden("train/data.json"));
    let spec = TrainSpec {
        rank: 8,
        alpha: 16.0,
        epochs: 1,
        batch: 8,
        lr: 5e-4,
        decay: Decay::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        ..spec()
    };
    let train = data["train"].as_array().expect("examples").iter();
    let rows: Vec<(Vec<u32>, Vec<f32>)> = train
        .map(|example| {
            let from = example["supervised_from"].as_u64().expect("an index") as usize;
            let ids = ids(&example["ids"]);
            let weights = (0..ids.len()).map(|i| f32::from(u8::from(i >= from))).collect();
            (ids, weights)
        })
        .collect();
    // The first epoch's batches.
    let batches = oracle["batches"].as_array().expect("batches")[..rows.len() / 8].to_vec();
    let placed = in_order(&rows, &Value::Array(batches), &spec);
    let (weights, dev) = (demo(), Device::cpu(2));
    let data = Arc::new(examples_of(placed));
    let mut trainer =
        Trainer::new(weights.clone(), &dev, spec.clone(), 512, data, None, None).expect("a job");
    start_as_the_oracle(&mut trainer, &weights, &spec);
    for at in 0..3 {
        let report = step(&mut trainer, &dev).expect("a step");
        for (ours, key) in [(report.loss, "loss"), (report.grad_norm, "grad_norm")] {
            let theirs = oracle[key][at].as_f64().expect("a number");
            assert!((ours - theirs).abs() < 1e-4 * theirs, "{key} {at}: {ours}, PEFT {theirs}");
        }
    }
}

#[test]
fn preference_pairs_give_the_curve_of_peft() {
    let oracle = golden("train/dpo.json");
    let spec = TrainSpec {
        rank: 8,
        alpha: 16.0,
        epochs: 1,
        lr: 5e-4,
        decay: Decay::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.0,
        objective: Objective::Dpo { beta: 0.1 },
        ..spec()
    };
    let pairs: Vec<[(Vec<u32>, Vec<f32>); 2]> = oracle["pairs"]
        .as_array()
        .expect("pairs")
        .iter()
        .map(|pair| {
            let from = pair["prompt"].as_u64().expect("an index") as usize;
            ["chosen", "rejected"].map(|which| {
                let ids = ids(&pair[which]);
                let weights = (0..ids.len()).map(|i| f32::from(u8::from(i >= from))).collect();
                (ids, weights)
            })
        })
        .collect();
    let placed = in_order(&pairs, &oracle["batches"], &spec);
    let data = Arc::new(examples_of(placed.into_iter().flatten()));
    let (weights, dev) = (demo(), Device::cpu(2));
    let mut trainer =
        Trainer::new(weights.clone(), &dev, spec.clone(), 512, data, None, None).expect("a job");
    start_as_the_oracle(&mut trainer, &weights, &spec);
    for at in 0..rounds(3, trainer.steps() as usize) {
        let report = step(&mut trainer, &dev).expect("a step");
        let theirs = |key: &str| oracle[key][at].as_f64().expect("a number");
        eprintln!(
            "dpo {at}: loss {} PEFT {}, grad_norm {} PEFT {}",
            report.loss,
            theirs("loss"),
            report.grad_norm,
            theirs("grad_norm")
        );
        // Sums within 1e-3: the margin within 2e-3 times β, and the loss no further.
        assert!((report.loss - theirs("loss")).abs() < 2e-4, "{report:?}");
        let apart = (report.grad_norm - theirs("grad_norm")).abs();
        assert!(apart < 1e-3 * theirs("grad_norm").max(0.1), "{report:?}");
        assert_eq!(report.accuracy, theirs("accuracy"));
    }
}
