//! Adapters made in test code: a tiny model's shape, files written by the safetensors crate, and
//! what a prepared delta does to an input.

use polylora::adapters::{BaseBias, BaseRows, BaseText};
use polylora::error::Error;
use polylora::shape::{Activation, ModelShape, Rope, RopeScaling, Site};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// A tied llama with heads of 4, two query heads for one kv head.
pub fn tiny() -> ModelShape {
    ModelShape {
        family: "llama",
        layers: 2,
        hidden: 8,
        ffn: 12,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        vocab: 10,
        context: 64,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        rope_local: None,
        windows: vec![None; 2],
        activation: Activation::Silu,
        attention_scale: 0.5,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        post_norms: false,
        norm_plus_one: false,
        embedding_scale: 1.0,
        tied_head: true,
    }
}

/// Values in about -1..1 that differ for each seed and index.
pub fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A seed for each site.
pub fn site_seed(site: Site) -> u64 {
    match site {
        Site::Layer(l, p) => 1000 + l as u64 * 10 + p as u64,
        Site::Head => 999,
    }
}

/// A text side whose tokens are `a` to `j`, and which likes every template but an empty one.
pub fn base_text() -> BaseText {
    BaseText {
        check_template: Arc::new(|template| match template.text.is_empty() {
            false => Ok(()),
            true => Err(Error::unprocessable("invalid_chat_template", "it is empty")),
        }),
        token_id: Arc::new(|token| match token.as_bytes() {
            [byte @ b'a'..=b'j'] => Some(u32::from(byte - b'a')),
            _ => None,
        }),
        vocab: 10,
        context: 64,
    }
}

/// The tiny model's weights by row; each site has its own.
pub fn base_rows(shape: &ModelShape) -> BaseRows {
    let shape = shape.clone();
    Arc::new(move |site, row, out| {
        let (inputs, outputs) = shape.site_dims(site);
        let all = values(site_seed(site), inputs * outputs);
        out.copy_from_slice(&all[row * inputs..(row + 1) * inputs]);
    })
}

/// Biases where the shape has them.
pub fn base_bias(shape: &ModelShape) -> BaseBias {
    let shape = shape.clone();
    Arc::new(move |site| {
        let (_, outputs) = shape.site_dims(site);
        shape.qkv_bias.then(|| values(site_seed(site) + 500, outputs))
    })
}

/// One adapter to be written.
#[derive(Clone)]
pub struct Files {
    pub config: Value,
    pub tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl Files {
    /// Rank-2 factors on q_proj and v_proj of both layers; alpha 4, so the scale is 2.
    pub fn plain(seed: u64) -> Self {
        let mut files = Self {
            config: json!({
                "peft_type": "LORA", "r": 2, "lora_alpha": 4,
                "target_modules": ["q_proj", "v_proj"],
                "bias": "none", "inference_mode": true, "base_model_name_or_path": "tiny",
            }),
            tensors: Vec::new(),
        };
        for l in 0..2 {
            for (name, outputs) in [("q_proj", 8), ("v_proj", 4)] {
                let module = format!("model.layers.{l}.self_attn.{name}");
                files.factors(&module, 2, 8, outputs, seed + l * 10 + outputs as u64);
            }
        }
        files
    }

    /// The same with DoRA; magnitudes under both names that PEFT has used.
    pub fn dora(seed: u64) -> Self {
        let mut files = Self::plain(seed);
        let config = files.config.as_object_mut().unwrap();
        config.insert("use_dora".into(), json!(true));
        for (l, suffix) in [(0, ""), (1, ".weight")] {
            for (name, n) in [("q_proj", 8), ("v_proj", 4)] {
                let module = format!("model.layers.{l}.self_attn.{name}");
                let positive = values(40 + l, n).iter().map(|v| v.abs() + 0.5).collect();
                files.push(&format!("{module}.lora_magnitude_vector{suffix}"), &[n], positive);
            }
        }
        files
    }

    pub fn push(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> &mut Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let name = format!("base_model.model.{name}");
        self.tensors.push((name, shape.to_vec(), values));
        self
    }

    pub fn factors(&mut self, module: &str, r: usize, i: usize, o: usize, seed: u64) -> &mut Self {
        self.push(&format!("{module}.lora_A.weight"), &[r, i], values(seed, r * i));
        self.push(&format!("{module}.lora_B.weight"), &[o, r], values(seed + 1, o * r))
    }

    pub fn drop_tensor(&mut self, part: &str) -> &mut Self {
        self.tensors.retain(|t| !t.0.contains(part));
        self
    }

    pub fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.config.as_object_mut().unwrap().insert(key.into(), value);
        self
    }

    pub fn get(&mut self, part: &str) -> &mut (String, Vec<usize>, Vec<f32>) {
        self.tensors.iter_mut().find(|t| t.0.contains(part)).unwrap()
    }

    pub fn write(&self, dir: &Path) {
        std::fs::write(dir.join("adapter_config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("adapter_model.safetensors"), self.safetensors()).unwrap();
    }

    pub fn safetensors(&self) -> Vec<u8> {
        use safetensors::tensor::{Dtype, TensorView, serialize};
        let bytes: Vec<Vec<u8>> = self
            .tensors
            .iter()
            .map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let views = self
            .tensors
            .iter()
            .zip(&bytes)
            .map(|(t, b)| (t.0.clone(), TensorView::new(Dtype::F32, t.1.clone(), b).unwrap()));
        serialize(views, None).unwrap()
    }
}
