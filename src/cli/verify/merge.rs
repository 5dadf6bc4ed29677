//! Weights with an adapter merged in, for the reference.
//!
//! Owns a second, deliberately plain reading of PEFT files: W + scale · B · A, with DoRA's column
//! norms, straight from the tensors. Never shares code with `adapters::format`, which it checks.
//! The thing to know: whether an adapter is allowed at all was decided there before; here an
//! unknown part is `unsupported_reference`.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Kind, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};
use safetensors::SafeTensors;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// What candle asks for tensors.
pub struct Merged<'a> {
    checkpoint: &'a Checkpoint,
    adapter: Option<Adapter>,
}

struct Adapter {
    config: Value,
    /// By name below `base_model.model.`: (dims, values).
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl<'a> Merged<'a> {
    /// Reads the adapter's files, if there is one. Errors name the file.
    pub fn new(checkpoint: &'a Checkpoint, adapter: Option<&Path>) -> Result<Self> {
        let adapter = adapter.map(Adapter::read).transpose()?;
        if let Some(adapter) = &adapter {
            let own = |n: &String| n.contains("embed_tokens") || n.contains("lm_head");
            if checkpoint.shape.family == "gemma3" && adapter.tensors.keys().any(own) {
                let what = "an adapter of gemma3's table or head (candle's gemma3 has them in one)";
                return Err(no_reference(what));
            }
        }
        Ok(Self { checkpoint, adapter })
    }

    /// A tensor as the adapted model has it; the head is there even where it is tied.
    fn tensor(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let tied = name == "lm_head.weight" && self.checkpoint.shape.tied_head;
        let stored = match tied {
            true => "model.embed_tokens.weight",
            false => name,
        };
        let base = self
            .checkpoint
            .values(stored, dims)?
            .ok_or_else(|| Error::fault(format!("candle asks for {name}, which is not there")))?;
        match (&self.adapter, name.strip_suffix(".weight")) {
            (Some(adapter), Some(module)) => Ok(adapter.merge(module, base, dims)),
            _ => Ok(base),
        }
    }
}

impl SimpleBackend for Merged<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let values = self.tensor(name, shape.dims());
        let values = values.map_err(|e| candle_core::Error::Msg(e.message))?;
        Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} is asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        name == "lm_head.weight" || self.checkpoint.names().iter().any(|n| n == name)
    }
}

impl Adapter {
    fn read(dir: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|e| {
                let message = format!("{}: {e} (verify reads PEFT directories)", path.display());
                Error::invalid("invalid_adapter", message)
            })
        };
        let invalid = |e: String| Error::invalid("invalid_adapter", e);
        let config = open("adapter_config.json")?;
        let config = serde_json::from_slice(&config)
            .map_err(|e| invalid(format!("adapter_config.json: {e}")))?;
        let bytes = open("adapter_model.safetensors")?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| invalid(format!("adapter_model.safetensors: {e}")))?;
        let mut tensors = HashMap::new();
        for (name, view) in file.iter() {
            let name = name.strip_prefix("base_model.model.").unwrap_or(name);
            if name.ends_with(".lora_B.bias") {
                return Err(no_reference(format!("the bias {name}")));
            }
            let dims = view.shape().to_vec();
            tensors.insert(name.to_owned(), (dims, floats(name, &view)?));
        }
        Ok(Self { config, tensors })
    }

    /// alpha / r or alpha / √r, alpha by the first matching pattern.
    fn scale(&self, module: &str, rank: usize) -> f64 {
        let of_pattern = |(key, value): (&String, &Value)| {
            let regex = fancy_regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).ok()?;
            let matches = regex.is_match(module).unwrap_or(false);
            value.as_f64().filter(|_| matches)
        };
        let patterns = self.config["alpha_pattern"].as_object();
        let alpha = patterns
            .and_then(|map: &Map<String, Value>| map.iter().find_map(of_pattern))
            .or(self.config["lora_alpha"].as_f64())
            .unwrap_or(8.0);
        match self.config["use_rslora"] == true {
            true => alpha / (rank as f64).sqrt(),
            false => alpha / rank as f64,
        }
    }

    /// Left `[O, R]` and right `[R, I]` of the change of a module's weight. The embedding's factors
    /// map a token to a column, so its table changes by their transposes.
    fn factors(&self, module: &str) -> Option<(Vec<f32>, Vec<f32>)> {
        let get = |part: &str| self.tensors.get(&format!("{module}.{part}"));
        let values = |t: &(Vec<usize>, Vec<f32>)| t.1.clone();
        if let (Some(a), Some(b)) = (get("lora_A.weight"), get("lora_B.weight")) {
            return Some((values(b), values(a)));
        }
        let (a, b) = (get("lora_embedding_A")?, get("lora_embedding_B")?);
        Some((transpose(a), transpose(b)))
    }

    /// The weight `[O, I]` of a module (or a norm `[H]`) with its part of the adapter merged in.
    fn merge(&self, module: &str, mut base: Vec<f32>, dims: &[usize]) -> Vec<f32> {
        let get = |part: &str| self.tensors.get(&format!("{module}.{part}"));
        if dims.len() == 1 {
            return get("weight").map_or(base, |(_, values)| values.clone());
        }
        let (outputs, inputs) = (dims[0], dims[1]);
        let (left, right) = match self.factors(module) {
            Some(factors) => factors,
            None => return base,
        };
        let rank = right.len() / inputs;
        let scale = self.scale(module, rank);
        let mut delta = vec![0.0f64; inputs];
        for o in 0..outputs {
            delta.fill(0.0);
            for (l, r) in left[o * rank..].iter().zip(right.chunks(inputs)).take(rank) {
                let l = scale * f64::from(*l);
                let products = delta.iter_mut().zip(r);
                products.for_each(|(d, r)| *d += l * f64::from(*r));
            }
            let row = &mut base[o * inputs..(o + 1) * inputs];
            for (w, d) in row.iter_mut().zip(&delta) {
                *w = (f64::from(*w) + d) as f32;
            }
            let magnitude = get("lora_magnitude_vector");
            if let Some((_, magnitude)) = magnitude {
                let squares = row.iter().map(|w| f64::from(*w).powi(2));
                let gain = f64::from(magnitude[o]) / squares.sum::<f64>().sqrt();
                row.iter_mut().for_each(|w| *w = (f64::from(*w) * gain) as f32);
            }
        }
        base
    }
}

fn transpose((dims, values): &(Vec<usize>, Vec<f32>)) -> Vec<f32> {
    let (rows, width) = (dims[0], dims[1]);
    let column = |c: usize| (0..rows).map(move |r| values[r * width + c]);
    (0..width).flat_map(column).collect()
}

fn floats(name: &str, view: &safetensors::tensor::TensorView) -> Result<Vec<f32>> {
    use half::{bf16, f16};
    use safetensors::Dtype;
    let data = view.data();
    let pairs = || data.as_chunks::<2>().0.iter();
    Ok(match view.dtype() {
        Dtype::F32 => {
            let quads = data.as_chunks::<4>().0.iter();
            quads.map(|b| f32::from_le_bytes(*b)).collect()
        }
        Dtype::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(no_reference(format!("{name} stored as {other:?}"))),
    })
}

/// 400 `unsupported_reference`: the model is fine, the reference cannot compute it.
pub fn no_reference(what: impl std::fmt::Display) -> Error {
    let message = format!("verify has no reference for {what}: candle-transformers lacks it");
    Error::new(Kind::Invalid, "unsupported_reference", message)
}
