//! Training against Hugging Face PEFT: losses and gradients in f64 of tiny models of every family
//! and of the demo model.
//!
//! Numbers come from `golden/train/`. Never tests a single op: the kernels' tests do.

use polylora::checkpoint::Checkpoint;
use polylora::checkpoint::source;
use polylora::model::weights::Weights;
use polylora::shape::{ModelShape, Projection, Site};
use polylora::train::{Adapter, Example, Pass, PassOptions, Purpose};
use polylora_kernels::{Device, WeightDtype};
use serde_json::Value;
use std::sync::{Arc, LazyLock};
use support::decoder::{ids, tiny_checkpoint};
use support::golden;
use support::tiny::Storage;
use support::training::{adapter, all_linears, finish, worst};

/// Tokens, with the weight of each.
type Row = (Vec<u32>, Vec<f32>);

fn row(ids: Vec<u32>, supervised_from: usize) -> Row {
    let weights = (0..ids.len()).map(|i| f32::from(u8::from(i >= supervised_from))).collect();
    (ids, weights)
}

fn supervised(rows: &[Row]) -> f64 {
    rows.iter().flat_map(|(_, weights)| weights).map(|w| f64::from(*w)).sum()
}

fn f32_weights(checkpoint: &Checkpoint) -> Arc<Weights> {
    let dtype = Some(WeightDtype::F32);
    Arc::new(Weights::load(checkpoint, dtype, &Device::cpu(2), &|_, _| ()).expect("weights"))
}

static DEMO: LazyLock<Arc<Weights>> = LazyLock::new(|| {
    let located = source::locate(source::DEMO).expect("the demo model");
    f32_weights(&Checkpoint::open(&located.path).expect("it opens"))
});

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
        let Some(name) = name.strip_suffix("/lora") else { continue };
        let (weights, rows) = tiny(name);
        let shape = &weights.shape;
        let mut adapters = [adapter(shape, &all_linears(shape), 3, 2.0, 0.2)];
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

#[test]
fn the_demo_model_has_the_loss_and_the_gradients_of_peft() {
    let case = &golden("train/grads.json")["cases"]["lora"];
    let dev = Device::cpu(2);
    let shape: &ModelShape = &DEMO.shape;
    let rows: Vec<Row> =
        ids(&case["examples"]).iter().map(|&i| example("train", i as usize)).collect();
    let mut adapters = [adapter(shape, &all_linears(shape), 8, 2.0, 0.2)];
    let mut pass = pass(&DEMO, &dev, 512, &adapters);
    let total = supervised(&rows);
    assert_eq!(Some(total), case["tokens"].as_f64());
    let loss = run(&mut pass, &dev, &mut adapters, &rows, total);
    let expected = case["loss"].as_f64().expect("a loss");
    let (of_gradients, whose) = worst(&adapters[0], &adapters[0].gradients, &case["grads"]);
    let of_loss = (loss - expected).abs() / expected;
    eprintln!("demo: loss {of_loss:.1e}, gradients {of_gradients:.1e} ({whose})");
    assert!(of_loss < 1e-5, "{loss}, expected {expected}");
    assert!(of_gradients < 5e-4, "{of_gradients}: {whose}");
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
