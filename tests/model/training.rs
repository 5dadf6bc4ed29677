//! Training against Hugging Face PEFT: losses and gradients in f64 of tiny models of every family
//! and of the demo model, and the demo model's curves in f32.
//!
//! Numbers come from `golden/train/`. Never tests a single op: the kernels' tests do. The thing to
//! know: `make soak` trains every step of the curves, `make test` the first few.

use polylora::model::weights::Weights;
use polylora::shape::{Projection, Site};
use polylora::train::{
    Adapter, Decay, Example, Norms, Optimiser, OptimiserSettings, Pass, PassOptions, Purpose,
    Schedule,
};
use polylora_kernels::Device;
use serde_json::Value;
use std::sync::{Arc, LazyLock};
use support::decoder::{ids, tiny_checkpoint};
use support::golden;
use support::soak::rounds;
use support::tiny::Storage;
use support::training::{
    adapter, all_linears, demo, dora_adapter, f32_weights, finish, update_norms, worst,
};

/// Tokens, with the weight of each.
type Row = (Vec<u32>, Vec<f32>);

fn row(ids: Vec<u32>, supervised_from: usize) -> Row {
    let weights = (0..ids.len()).map(|i| f32::from(u8::from(i >= supervised_from))).collect();
    (ids, weights)
}

fn supervised(rows: &[Row]) -> f64 {
    rows.iter().flat_map(|(_, weights)| weights).map(|w| f64::from(*w)).sum()
}

fn pass(weights: &Arc<Weights>, dev: &Device, rows: usize, adapters: &[Adapter]) -> Pass {
    let options = PassOptions { rows_max: rows, sequences_max: 8, adapters_max: adapters.len() };
    Pass::new(weights.clone(), dev, options, adapters).expect("a pass")
}

/// The loss of rows of adapter 0, whose gradients are added to.
fn run(pass: &mut Pass, dev: &Device, adapters: &mut [Adapter], rows: &[Row], total: f64) -> f64 {
    let batch = pass.begin(Purpose::Train);
    for (ids, weights) in rows {
        batch.push(Example { ids, weights }, total);
    }
    finish(pass, dev, adapters);
    pass.sums(0).loss
}

/// The shape and rows of a tiny model of the oracle.
fn tiny(name: &str) -> (Arc<Weights>, Vec<Row>) {
    let config = &golden("models.json")["models"][name]["config"];
    let oracle = golden("train/tiny.json");
    let from = ids(&oracle["supervised_from"]);
    let rows = oracle["rows"].as_array().expect("rows").iter().zip(from);
    let rows = rows.map(|(tokens, from)| row(ids(tokens), from as usize)).collect();
    (f32_weights(&tiny_checkpoint(config, Storage::F32, 1)), rows)
}

#[test]
fn tiny_models_of_every_family_have_the_loss_and_the_gradients_of_peft() {
    let oracle = golden("train/tiny.json");
    let dev = Device::cpu(2);
    let mut wrong = Vec::new();
    for (name, case) in oracle["models"].as_object().expect("cases") {
        let (model, kind) = name.split_once('/').expect("a model and a kind");
        let (weights, rows) = tiny(model);
        let shape = &weights.shape;
        let mut adapters = [match kind {
            "dora" => dora_adapter(&dev, &weights, (3, 2.0), [0.2, 0.2]).0,
            _ => adapter(shape, &all_linears(shape), 3, 2.0, 0.2),
        }];
        let mut pass = pass(&weights, &dev, 64, &adapters);
        let total = supervised(&rows);
        assert_eq!(Some(total), case["tokens"].as_f64());
        let loss = run(&mut pass, &dev, &mut adapters, &rows, total);
        let expected = case["loss"].as_f64().expect("a loss");
        let of_loss = (loss - expected).abs() / expected;
        let (of_gradients, whose) = worst(&adapters[0], &adapters[0].gradients, &case["grads"]);
        eprintln!("{name}: loss {of_loss:.1e}, gradients {of_gradients:.1e} ({whose})");
        if !(of_loss < 1e-6 && of_gradients < 1e-4) {
            wrong.push(format!("{name}: loss {loss} not {expected}; {of_gradients}: {whose}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn example(set: &str, index: usize) -> Row {
    static DATA: LazyLock<Value> = LazyLock::new(|| golden("train/data.json"));
    let example = &DATA[set][index];
    let from = example["supervised_from"].as_u64().expect("an index");
    row(ids(&example["ids"]), from as usize)
}

/// Loss and gradients of a case of `grads.json`; `bar` is that of each of a gradient's numbers.
fn beside_gradients(case: &str, dev: &Device, mut adapters: [Adapter; 1], bar: f64) {
    let case = &golden("train/grads.json")["cases"][case];
    let rows: Vec<Row> =
        ids(&case["examples"]).iter().map(|&i| example("train", i as usize)).collect();
    let mut pass = pass(&demo(), dev, 512, &adapters);
    let total = supervised(&rows);
    assert_eq!(Some(total), case["tokens"].as_f64());
    let loss = run(&mut pass, dev, &mut adapters, &rows, total);
    let expected = case["loss"].as_f64().expect("a loss");
    let (of_gradients, whose) = worst(&adapters[0], &adapters[0].gradients, &case["grads"]);
    let of_loss = (loss - expected).abs() / expected;
    let of_all = case["grads"].as_object().expect("gradients").values();
    let norm: f64 = of_all.map(|three| three[0].as_f64().expect("a norm").powi(2)).sum();
    let ours = adapters[0].gradients.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
    let of_norm = (ours / norm).sqrt() - 1.0;
    eprintln!("demo: loss {of_loss:.1e}, norm {of_norm:.1e}, worst {of_gradients:.1e} ({whose})");
    assert!(of_norm.abs() < 1e-4, "the norm of all gradients: {of_norm}");
    assert!(of_loss < 1e-5, "{loss}, expected {expected}");
    assert!(of_gradients < bar, "{of_gradients}: {whose}");
}

#[test]
fn the_demo_model_has_the_loss_and_the_gradients_of_peft() {
    let shape = &demo().shape;
    let adapters = [adapter(shape, &all_linears(shape), 8, 2.0, 0.2)];
    beside_gradients("lora", &Device::cpu(2), adapters, 5e-4);
}

#[test]
fn magnitudes_have_the_gradients_of_peft() {
    let dev = Device::cpu(2);
    let (adapter, _) = dora_adapter(&dev, &demo(), (4, 4.0), [0.2, 0.0]);
    // One tensor of 630 (layers.27 k_proj's magnitudes) is 6.6e-4 away, all others below 4e-4.
    beside_gradients("dora", &dev, [adapter], 7e-4);
}

/// All that a run gives, bit by bit.
fn bits(adapter: &Adapter) -> Vec<u32> {
    adapter.gradients.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn threads_neighbours_and_unadapted_layers_change_no_bit() {
    for name in ["qwen3", "gemma3", "llama-biases"] {
        let (weights, rows) = tiny(name);
        let shape = &weights.shape;
        let make = |rank: usize| adapter(shape, &all_linears(shape), rank, 2.0, 0.2);
        let total = supervised(&rows);
        let alone = |threads: usize| {
            let dev = Device::cpu(threads);
            let mut adapters = [make(3)];
            let mut pass = pass(&weights, &dev, 64, &adapters);
            let loss = run(&mut pass, &dev, &mut adapters, &rows, total);
            (loss.to_bits(), bits(&adapters[0]))
        };
        let one = alone(1);
        assert!(one == alone(2), "{name}: threads");
        // Beside another adapter's rows, and the base's.
        let dev = Device::cpu(2);
        let mut adapters = [make(5), make(3)];
        let mut both = pass(&weights, &dev, 128, &adapters);
        let batch = both.begin(Purpose::Train);
        batch.push(Example { ids: &rows[1].0, weights: &rows[1].1 }, 3.0);
        batch.next_adapter();
        for (ids, weights) in &rows {
            batch.push(Example { ids, weights }, total);
        }
        batch.next_adapter();
        batch.push(Example { ids: &rows[0].0, weights: &rows[0].1 }, 3.0);
        finish(&mut both, &dev, &mut adapters);
        assert_eq!(both.sums(1).rows, total as usize);
        assert!(one == (both.sums(1).loss.to_bits(), bits(&adapters[1])), "{name}: neighbours");
    }
}

#[test]
fn a_pass_stops_at_the_lowest_adapted_site() {
    let (weights, rows) = tiny("gemma3");
    let (shape, dev) = (&weights.shape, Device::cpu(2));
    let total = supervised(&rows);
    let gradients = |sites: &[Site]| {
        // B is zero elsewhere, so what is adapted alone is adapted alone in both.
        let mut adapters = [adapter(shape, sites, 3, 2.0, 0.0)];
        let mut pass = pass(&weights, &dev, 64, &adapters);
        let before = dev.op_calls();
        run(&mut pass, &dev, &mut adapters, &rows, total);
        let ops = dev.op_calls() - before;
        let [adapter] = adapters;
        (adapter, ops)
    };
    let (whole, ops_of_all) = gradients(&all_linears(shape));
    for site in [
        Site::Layer(0, Projection::Q),
        Site::Layer(1, Projection::O),
        Site::Layer(2, Projection::Up),
        Site::Layer(2, Projection::Down),
    ] {
        let (part, ops) = gradients(&[site]);
        assert!(ops < ops_of_all, "{site:?}: {ops} ops of {ops_of_all}");
        for tensor in part.tensors() {
            let mut of_whole = whole.tensors().iter();
            let same = of_whole.find(|t| t.site == site && t.part == tensor.part);
            let same = &whole.gradients[same.expect("it is there").range.clone()];
            assert!(same == &part.gradients[tensor.range.clone()], "{site:?} {:?}", tensor.part);
        }
    }
}

#[test]
fn a_pass_that_evaluates_has_the_same_loss_and_no_gradient() {
    let (weights, rows) = tiny("qwen2");
    let (shape, dev) = (&weights.shape, Device::cpu(2));
    let mut adapters = [adapter(shape, &all_linears(shape), 3, 2.0, 0.2)];
    let mut pass = pass(&weights, &dev, 64, &adapters);
    let total = supervised(&rows);
    let trained = run(&mut pass, &dev, &mut adapters, &rows, total);
    adapters[0].gradients.fill(0.0);
    let batch = pass.begin(Purpose::Evaluate);
    for (ids, weights) in &rows {
        batch.push(Example { ids, weights }, total);
    }
    finish(&mut pass, &dev, &mut adapters);
    assert_eq!(pass.sums(0).loss.to_bits(), trained.to_bits());
    assert!(adapters[0].gradients.iter().all(|g| *g == 0.0));
}

#[test]
fn micro_batches_do_not_change_what_an_optimizer_batch_gives() {
    let (weights, mut rows) = tiny("llama");
    rows[1].1.fill(1.0);
    let (shape, dev) = (&weights.shape, Device::cpu(2));
    let total = supervised(&rows);
    let gradients = |micro: usize| {
        let mut adapters = [adapter(shape, &all_linears(shape), 3, 2.0, 0.2)];
        let mut pass = pass(&weights, &dev, 64, &adapters);
        let losses = rows.chunks(micro);
        let losses = losses.map(|rows| run(&mut pass, &dev, &mut adapters, rows, total));
        (losses.sum::<f64>(), std::mem::take(&mut adapters[0].gradients))
    };
    let ((one, whole), (two, parts)) = (gradients(2), gradients(1));
    assert!((one - two).abs() < 1e-6 * one, "{one} and {two}");
    let norm = |of: &mut dyn Iterator<Item = f32>| of.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let apart = norm(&mut whole.iter().zip(&parts).map(|(a, b)| a - b)).sqrt();
    assert!(apart < 1e-6 * norm(&mut whole.iter().copied()).sqrt(), "{apart}");
}

/// Trains as a file of the oracle says, for so many steps at most, in micro-batches of `micro`;
/// returns how far losses, norms and, after the last step, factors and the held-out loss are from
/// PEFT's, each over its bar.
fn beside_peft(
    file: &str,
    settings: OptimiserSettings,
    schedule: Schedule,
    micro: usize,
    most: usize,
) -> f64 {
    let shape = &demo().shape;
    let adapter = adapter(shape, &all_linears(shape), 8, 2.0, 0.0);
    let norms = Norms::new(&Device::cpu(2), &demo(), &adapter).expect("no norms");
    trains_as_peft(file, settings, schedule, (micro, most), (adapter, norms))
}

/// The same of an adapter as it starts.
fn trains_as_peft(
    file: &str,
    settings: OptimiserSettings,
    schedule: Schedule,
    (micro, most): (usize, usize),
    (adapter, mut norms): (Adapter, Norms),
) -> f64 {
    let oracle = golden(&format!("train/{file}.json"));
    let all = |key: &str| oracle[key].as_array().expect("a list");
    let number = |value: &Value| value.as_f64().expect("a number");
    let (dev, weights, mut adapters) = (Device::cpu(2), demo(), [adapter]);
    let mut pass = pass(&weights, &dev, 512, &adapters);
    let mut optimiser = Optimiser::new(settings, &adapters[0]);
    let mut worst_bars: f64 = 0.0;
    for (step, batch) in all("batches").iter().enumerate().take(most) {
        let rows: Vec<Row> = ids(batch).into_iter().map(|i| example("train", i as usize)).collect();
        let total = supervised(&rows);
        let micro = rows.chunks(micro);
        let loss: f64 = micro.map(|rows| run(&mut pass, &dev, &mut adapters, rows, total)).sum();
        let lr = schedule.at(step as u64);
        assert!((lr - number(&all("lr")[step])).abs() < 1e-12, "{file}: step {step}: lr {lr}");
        let norm = optimiser.update(&mut adapters[0], lr);
        update_norms(&dev, &weights, &mut adapters[0], &mut norms);
        let bar = if step < 20 { 1e-4 } else { 1e-3 };
        for (what, ours) in [("loss", loss), ("grad_norm", norm)] {
            let theirs = number(&all(what)[step]);
            let bars = (ours - theirs).abs() / theirs / bar;
            eprintln!("{file} {step}: {what} {ours:.6}, PEFT {theirs:.6}: {bars:.4} of the bar");
            worst_bars = worst_bars.max(if bars.is_nan() { f64::INFINITY } else { bars });
        }
    }
    if most >= all("batches").len() {
        let (distance, whose) = worst(&adapters[0], &adapters[0].values, &oracle["factors"]);
        let heldout = held_out(&mut pass, &dev, &mut adapters);
        let theirs = number(&oracle["heldout_after"]);
        eprintln!("{file}: factors {distance:.1e} ({whose}); held out {heldout}, PEFT {theirs}");
        worst_bars = worst_bars.max((heldout - theirs).abs() / theirs / 1e-3);
    }
    worst_bars
}

/// The mean loss of the held-out examples.
fn held_out(pass: &mut Pass, dev: &Device, adapters: &mut [Adapter]) -> f64 {
    let count = golden("train/data.json")["heldout"].as_array().expect("examples").len();
    let rows: Vec<Row> = (0..count).map(|i| example("heldout", i)).collect();
    let total = supervised(&rows);
    let mut loss = 0.0;
    for rows in rows.chunks(8) {
        let batch = pass.begin(Purpose::Evaluate);
        for (ids, weights) in rows {
            batch.push(Example { ids, weights }, total);
        }
        finish(pass, dev, adapters);
        loss += pass.sums(0).loss;
    }
    loss
}

fn constant(lr: f64) -> Schedule {
    Schedule { lr, decay: Decay::Constant, warmup: 0, steps: 50 }
}

#[test]
fn a_constant_rate_gives_the_curve_of_peft() {
    let bars = beside_peft(
        "curve-lora",
        OptimiserSettings::default(),
        constant(5e-4),
        8,
        rounds(3, usize::MAX),
    );
    assert!(bars < 1.0, "{bars} of the bars");
}

#[test]
fn warm_up_cosine_decay_and_micro_batches_give_the_curve_of_peft() {
    let settings = OptimiserSettings { weight_decay: 0.01, ..OptimiserSettings::default() };
    let schedule = Schedule { lr: 1e-3, decay: Decay::Cosine, warmup: 5, steps: 20 };
    let bars = beside_peft("curve-lora-cosine", settings, schedule, 4, rounds(4, usize::MAX));
    assert!(bars < 1.0, "{bars} of the bars");
}

#[test]
fn two_rates_give_the_curve_of_peft() {
    let settings = OptimiserSettings { ratio: 16.0, ..OptimiserSettings::default() };
    let bars = beside_peft("curve-loraplus", settings, constant(1e-4), 8, rounds(3, usize::MAX));
    assert!(bars < 1.0, "{bars} of the bars");
}

#[test]
fn magnitudes_give_the_curve_of_peft() {
    let dev = Device::cpu(2);
    let start = dora_adapter(&dev, &demo(), (4, 4.0), [0.0, 0.0]);
    let (settings, steps) = (OptimiserSettings::default(), rounds(3, usize::MAX));
    let bars = trains_as_peft("curve-rslora-dora", settings, constant(5e-4), (8, steps), start);
    assert!(bars < 1.0, "{bars} of the bars");
}
