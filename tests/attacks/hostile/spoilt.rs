//! A good adapter that can be spoilt in every way.
//!
//! Owns the bytes of its two files. Never knows what is wrong with them.

use crate::hostile::adapters::Sent;
use crate::hostile::server::shape;
use polylora::shape::{Projection, Site};
use serde_json::{Value, json};
use support::adapters::Noise;

/// A good adapter that can be spoilt in every way: nothing in it is checked.
pub struct Spoilt {
    pub config: Value,
    pub entries: Vec<Entry>,
    pub data: Vec<u8>,
    /// Replaces the true length of the header.
    pub header_length: Option<u64>,
    /// Replaces the true header.
    pub header: Option<String>,
}

/// A tensor as the header names it.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub begin: u64,
    pub end: u64,
}

impl Spoilt {
    pub fn new(noise: &mut Noise) -> Self {
        let shape = shape();
        let mut spoilt = Self {
            config: json!({
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4,
                "target_modules": ["q_proj", "down_proj"], "bias": "none",
            }),
            entries: Vec::new(),
            data: Vec::new(),
            header_length: None,
            header: None,
        };
        for layer in 0..shape.layers {
            for p in [Projection::Q, Projection::Down] {
                let (inputs, outputs) = shape.site_dims(Site::Layer(layer, p));
                let module = format!("base_model.model.model.layers.{layer}.{}", p.module());
                for (factor, dims) in [("A", [2, inputs]), ("B", [outputs, 2])] {
                    let values = noise.floats(dims[0] * dims[1], 0.3);
                    spoilt.push(&format!("{module}.lora_{factor}.weight"), &dims, &values);
                }
            }
        }
        spoilt
    }

    pub fn push(&mut self, name: &str, dims: &[usize], values: &[f32]) {
        let begin = self.data.len() as u64;
        self.data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.entries.push(Entry {
            name: name.to_owned(),
            dtype: "F32".into(),
            shape: dims.iter().map(|&d| d as u64).collect(),
            begin,
            end: self.data.len() as u64,
        });
    }

    pub fn any(&mut self, noise: &mut Noise) -> &mut Entry {
        let at = noise.below(self.entries.len());
        &mut self.entries[at]
    }

    pub fn safetensors(&self) -> Vec<u8> {
        let entry = |e: &Entry| {
            let name = Value::from(e.name.as_str());
            let dtype = Value::from(e.dtype.as_str());
            let (shape, begin, end) = (&e.shape, e.begin, e.end);
            format!(
                "{name}:{{\"dtype\":{dtype},\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}"
            )
        };
        let listed: Vec<String> = self.entries.iter().map(entry).collect();
        let header = self.header.clone().unwrap_or_else(|| format!("{{{}}}", listed.join(",")));
        let length = self.header_length.unwrap_or(header.len() as u64);
        [&length.to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }

    pub fn parts(&self) -> Vec<(String, Vec<u8>)> {
        vec![
            ("adapter_config.json".into(), self.config.to_string().into_bytes()),
            ("adapter_model.safetensors".into(), self.safetensors()),
        ]
    }

    pub fn sent(self) -> Sent {
        Sent::Parts(self.parts())
    }

    /// With this text in place of the config.
    pub fn with_config(self, config: impl Into<Vec<u8>>) -> Sent {
        let mut parts = self.parts();
        parts[0].1 = config.into();
        Sent::Parts(parts)
    }

    /// With these bytes in place of the tensors.
    pub fn with_tensors(self, tensors: Vec<u8>) -> Sent {
        let mut parts = self.parts();
        parts[1].1 = tensors;
        Sent::Parts(parts)
    }
}

/// One of them.
pub fn pick<'a, T>(noise: &mut Noise, from: &'a [T]) -> &'a T {
    &from[noise.below(from.len())]
}
