//! Adapters as the training oracle makes them (every factor is a formula of its name), and tensors
//! as the three numbers it keeps of them.
//!
//! Never knows an expected result.

use crate::tiny::uniform;
use polylora::checkpoint::{Checkpoint, source};
use polylora::model::weights::Weights;
use polylora::shape::{ModelShape, Projection, Site};
use polylora::train::data::Examples;
use polylora::train::{Adapter, Norms, Part, Pass, Progress, Tensor};
use polylora_kernels::{Device, WeightDtype};
use serde_json::Value;
use std::sync::{Arc, LazyLock};

/// In f32, as the oracle computes.
pub fn f32_weights(checkpoint: &Checkpoint) -> Arc<Weights> {
    let dtype = Some(WeightDtype::F32);
    Arc::new(Weights::load(checkpoint, dtype, &Device::cpu(2), &|_, _| ()).expect("weights"))
}

/// The demo model.
pub fn demo() -> Arc<Weights> {
    static DEMO: LazyLock<Arc<Weights>> = LazyLock::new(|| {
        let located = source::locate(source::DEMO).expect("the demo model");
        f32_weights(&Checkpoint::open(&located.path).expect("it opens"))
    });
    DEMO.clone()
}

/// Ids and weights as a job reads them.
pub fn examples_of(rows: impl IntoIterator<Item = (Vec<u32>, Vec<f32>)>) -> Examples {
    let mut examples = Examples::default();
    rows.into_iter().for_each(|(ids, weights)| examples.add(&ids, &weights));
    examples
}

/// All linears of all layers.
pub fn all_linears(shape: &ModelShape) -> Vec<Site> {
    (0..shape.layers).flat_map(|l| Projection::ALL.map(|p| Site::Layer(l, p))).collect()
}

/// The oracle's name of a tensor.
pub fn tensor_name(tensor: &Tensor) -> String {
    let Site::Layer(layer, projection) = tensor.site else { panic!("a site of a layer") };
    let part = match tensor.part {
        Part::A => "lora_A",
        Part::B => "lora_B",
        Part::Magnitude => "magnitude",
    };
    format!("layers.{layer}.{}.{part}", projection.module())
}

/// A as the oracle starts it; B = `b` times the numbers of its name.
pub fn adapter(shape: &ModelShape, sites: &[Site], rank: usize, scale: f32, b: f32) -> Adapter {
    let mut adapter = Adapter::new(shape, sites, rank, scale, false);
    start(&mut adapter, b);
    adapter
}

/// The same with magnitudes: the norms of W's rows, which differ from them by `m` times the numbers
/// of their names. The norms are those of the factors.
pub fn dora_adapter(
    dev: &Device,
    weights: &Weights,
    (rank, scale): (usize, f32),
    [b, m]: [f32; 2],
) -> (Adapter, Norms) {
    let shape = &weights.shape;
    let mut adapter = Adapter::new(shape, &all_linears(shape), rank, scale, true);
    let mut norms = Norms::new(dev, weights, &adapter).expect("norms");
    (0..norms.len()).for_each(|site| norms.measure(dev, weights, &mut adapter, site, true));
    start(&mut adapter, b);
    for tensor in adapter.tensors().to_vec() {
        if tensor.part == Part::Magnitude {
            let values = &mut adapter.values[tensor.range.clone()];
            let numbers = uniform(&tensor_name(&tensor), values.len());
            values.iter_mut().zip(numbers).for_each(|(value, u)| *value *= 1.0 + m * u);
        }
    }
    update_norms(dev, weights, &mut adapter, &mut norms);
    (adapter, norms)
}

/// As a job does after every step.
pub fn update_norms(dev: &Device, weights: &Weights, adapter: &mut Adapter, norms: &mut Norms) {
    (0..norms.len()).for_each(|site| norms.update(dev, weights, adapter, site));
}

fn start(adapter: &mut Adapter, b: f32) {
    for tensor in adapter.tensors().to_vec() {
        let [rank, width] = tensor.dims;
        let values: Vec<f32> = uniform(&tensor_name(&tensor), rank * width).collect();
        let out = &mut adapter.values[tensor.range];
        match tensor.part {
            Part::A => {
                let factor = (2.0 / (width as f64).sqrt()) as f32;
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value * factor);
            }
            // The oracle's B is `[O, R]`.
            Part::B => {
                for (i, value) in values.into_iter().enumerate() {
                    out[i % rank * width + i / rank] = value * b;
                }
            }
            Part::Magnitude => {}
        }
    }
}

/// [norm, two projections] of a tensor as it lies in an adapter, in the oracle's order.
pub fn three_numbers(tensor: &Tensor, values: &[f32]) -> [f64; 3] {
    let [rank, width] = tensor.dims;
    let ordered: Vec<f64> = (0..rank * width)
        .map(|i| match tensor.part {
            Part::A | Part::Magnitude => i,
            Part::B => i % rank * width + i / rank,
        })
        .map(|i| f64::from(values[i]))
        .collect();
    let name = tensor_name(tensor);
    let along = |which: usize| {
        let direction = uniform(&format!("{name}/{which}"), ordered.len());
        ordered.iter().zip(direction).map(|(x, u)| x * f64::from(u)).sum()
    };
    [ordered.iter().map(|x| x * x).sum::<f64>().sqrt(), along(1), along(2)]
}

/// The largest distance of an adapter's tensors from the oracle's three numbers, each relative to
/// the tensor's norm, and whose it is.
pub fn worst(adapter: &Adapter, values: &[f32], expected: &Value) -> (f64, String) {
    let mut worst = (0.0, String::new());
    for tensor in adapter.tensors() {
        let name = tensor_name(tensor);
        let ours = three_numbers(tensor, &values[tensor.range.clone()]);
        let theirs: [f64; 3] =
            serde_json::from_value(expected[&name].clone()).expect("three numbers");
        for (which, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let distance = (a - b).abs() / theirs[0];
            // A NaN is the worst of all.
            if distance > worst.0 || distance.is_nan() {
                worst = (distance, format!("{name}[{which}]: {a}, expected {b}"));
            }
        }
    }
    worst
}

/// Runs a pass to its end; returns how many ops that took.
pub fn finish(pass: &mut Pass, dev: &Device, adapters: &mut [Adapter]) -> usize {
    let mut ops = 1;
    while pass.step(dev, adapters).expect("a step") == Progress::Running {
        ops += 1;
    }
    ops
}
