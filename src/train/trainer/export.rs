//! An adapter as PEFT writes it, out of a job.
//!
//! Owns the config's fields. Never rounds a value. The thing to know: what is written is what PEFT
//! would have trained (its alpha, its rsLoRA and DoRA), so PEFT goes on where this stopped.

use super::Trainer;
use crate::adapters::format::write::{Stored, write_files};
use crate::error::Result;
use crate::shape::Site;
use crate::train::adapter::{Adapter, Part, Tensor};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::Path;

impl Trainer {
    /// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, which must exist;
    /// `base` is what the config names as the base model. Of a DoRA job, after the first step.
    /// Errors: `storage_full`, or `internal_error` when the files cannot be written.
    pub fn export(&self, dir: &Path, base: &str) -> Result<()> {
        let adapter = &self.adapters[0];
        let tensors = adapter.tensors().iter().map(|tensor| stored(adapter, tensor));
        write_files(dir, &self.config(base), tensors)
    }

    fn config(&self, base: &str) -> Value {
        let spec = &self.spec;
        let mut targets: Vec<&str> = spec.targets.iter().map(|p| p.name()).collect();
        targets.sort_unstable();
        // PEFT's own type of it is an integer.
        let alpha = match spec.alpha.fract() == 0.0 && spec.alpha.abs() < 1e9 {
            true => json!(spec.alpha as i64),
            false => json!(spec.alpha),
        };
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": spec.rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": spec.dora,
            "use_rslora": spec.rslora,
        })
    }
}

/// A tensor under PEFT's name, in its order of values.
fn stored<'a>(adapter: &'a Adapter, tensor: &Tensor) -> (String, Stored<'a>) {
    let Site::Layer(layer, projection) = tensor.site else {
        unreachable!("the head is not trained")
    };
    let module = format!("base_model.model.model.layers.{layer}.{}", projection.module());
    let (values, [rank, width]) = (&adapter.values[tensor.range.clone()], tensor.dims);
    let (part, shape, values) = match tensor.part {
        Part::A => ("lora_A.weight", vec![rank, width], Cow::Borrowed(values)),
        Part::B => ("lora_B.weight", vec![width, rank], Cow::Owned(turned(values, width))),
        Part::Magnitude => ("lora_magnitude_vector", vec![width], Cow::Borrowed(values)),
    };
    (format!("{module}.{part}"), Stored { shape, values })
}

/// `[R, O]` as `[O, R]`.
fn turned(values: &[f32], width: usize) -> Vec<f32> {
    let ranks = values.len() / width;
    (0..values.len()).map(|i| values[i % ranks * width + i / ranks]).collect()
}
