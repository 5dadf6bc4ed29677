//! Writes small random PEFT adapters, so that tests need no training.

use polylora::shape::{ModelShape, Projection, Site};
use serde_json::json;
use std::path::Path;

/// What a random adapter changes and how strongly.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub rank: usize,
    pub targets: Vec<Projection>,
    pub seed: u64,
    /// Standard deviation of the factors' entries, about.
    pub strength: f32,
    /// Only this layer, else every one.
    pub layer: Option<usize>,
}

impl Recipe {
    pub fn new(rank: usize, targets: &[Projection], seed: u64) -> Self {
        Self { rank, targets: targets.to_vec(), seed, strength: 0.3, layer: None }
    }
}

/// Deterministic noise in -1..1 (SplitMix64).
pub struct Noise(pub u64);

impl Noise {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }
    pub fn float(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.float() * scale).collect()
    }
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`.
pub fn write_adapter(dir: &Path, shape: &ModelShape, recipe: &Recipe) {
    std::fs::create_dir_all(dir).expect("adapter directory");
    let mut noise = Noise(recipe.seed);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for layer in recipe.layer.map_or(0..shape.layers, |only| only..only + 1) {
        for &p in &recipe.targets {
            let (inputs, outputs) = shape.site_dims(Site::Layer(layer, p));
            let module = format!("base_model.model.model.layers.{layer}.{}", p.module());
            for (name, dims) in [("A", [recipe.rank, inputs]), ("B", [outputs, recipe.rank])] {
                let values = noise.floats(dims[0] * dims[1], recipe.strength);
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                tensors.push((format!("{module}.lora_{name}.weight"), dims.to_vec(), bytes));
            }
        }
    }
    let views = tensors.iter().map(|(name, dims, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, dims.clone(), bytes);
        (name.clone(), view.expect("tensor view"))
    });
    let file = dir.join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &file).expect("safetensors");
    let targets: Vec<&str> = recipe
        .targets
        .iter()
        .map(|p| p.module().rsplit('.').next().expect("module name"))
        .collect();
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": recipe.rank, "lora_alpha": recipe.rank,
        "target_modules": targets, "bias": "none", "inference_mode": true,
    });
    if let Some(only) = recipe.layer {
        config["layers_to_transform"] = json!([only]);
    }
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).expect("config");
}
