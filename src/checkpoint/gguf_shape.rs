//! GGUF metadata read as numbers of a `ModelShape`.
//!
//! Owns the metadata keys of the arches we know and every refusal of a GGUF file by key and value.
//! Never reads tensors. The thing to know: integers come in any width, so all of them are read as
//! f64.

use super::config_json::{invalid, unsupported, yarn_attention_factor};
use crate::error::Result;
use crate::header::gguf::{self, Value};
use crate::shape::{Rope, RopeScaling};

/// The metadata of one arch; keys are given without the arch.
pub struct ArchMetadata<'a> {
    all: &'a gguf::Metadata,
    arch: &'a str,
}

impl<'a> ArchMetadata<'a> {
    pub fn new(all: &'a gguf::Metadata) -> Result<Self> {
        match all.get("general.architecture") {
            Some(Value::String(arch)) => Ok(Self { all, arch }),
            _ => Err(invalid("gguf: general.architecture is missing")),
        }
    }

    /// The family, after refusing what the arch may hold and we do not support.
    pub fn family(&self) -> Result<&'static str> {
        let family = match self.arch {
            "llama" => "llama",
            "qwen2" => "qwen2",
            "qwen3" => "qwen3",
            "gemma3" => "gemma3",
            other => {
                return Err(unsupported(format!(
                    "gguf: general.architecture = {other} is not supported; llama, qwen2, \
                     qwen3 and gemma3 are"
                )));
            }
        };
        for key in ["expert_count", "attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(v) = self.number_or(key)?.filter(|&v| v != 0.0) {
                return Err(unsupported(format!(
                    "gguf: {}.{key} = {v} is not supported",
                    self.arch
                )));
            }
        }
        Ok(family)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.all.get(&format!("{}.{key}", self.arch))
    }

    pub fn number_or(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        // A few writers store one value per layer; it must be the same one.
        let found = match value {
            Value::Array(list) => {
                let first = list.first().and_then(Value::number);
                first.filter(|_| list.iter().all(|v| v.number() == first))
            }
            one => one.number(),
        };
        match found {
            Some(v) => Ok(Some(v)),
            None => Err(unsupported(format!(
                "gguf: {}.{key} is {value:?}, expected one number",
                self.arch
            ))),
        }
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        self.number_or(key)?.ok_or_else(|| invalid(format!("gguf: {}.{key} is missing", self.arch)))
    }

    pub fn count_or(&self, key: &str) -> Result<Option<usize>> {
        let Some(v) = self.number_or(key)? else {
            return Ok(None);
        };
        if v < 1.0 || v.fract() != 0.0 || v > f64::from(u32::MAX) {
            return Err(invalid(format!(
                "gguf: {}.{key} is {v}, expected a positive integer",
                self.arch
            )));
        }
        Ok(Some(v as usize))
    }

    pub fn count(&self, key: &str) -> Result<usize> {
        self.count_or(key)?.ok_or_else(|| invalid(format!("gguf: {}.{key} is missing", self.arch)))
    }

    /// Gemma 3 has a full-attention layer every sixth; the other arches have a window everywhere or
    /// nowhere.
    pub fn windows(&self, layers: usize) -> Result<Vec<Option<u32>>> {
        let window = self.count_or("attention.sliding_window")?.map(|w| w as u32);
        let full = |l: usize| self.arch == "gemma3" && (l + 1).is_multiple_of(6);
        Ok((0..layers).map(|l| window.filter(|_| !full(l))).collect())
    }

    /// Rope of Gemma's sliding-window layers: never scaled.
    pub fn local_rope(&self) -> Result<Rope> {
        Ok(Rope {
            theta: self.number_or("rope.freq_base_swa")?.unwrap_or(1e4),
            scaling: RopeScaling::None,
        })
    }
}

/// The rope of full-attention layers. `factors`: the content of `rope_freqs.weight`, which Llama
/// 3.x files have.
pub fn rope(meta: &ArchMetadata, factors: Option<Vec<f32>>) -> Result<Rope> {
    let default = if meta.arch == "gemma3" { 1e6 } else { 1e4 };
    let theta = meta.number_or("rope.freq_base")?.unwrap_or(default);
    if let Some(factors) = factors {
        let scaling = RopeScaling::Factors(factors);
        return Ok(Rope { theta, scaling });
    }
    let factor = meta.number_or("rope.scaling.factor")?;
    let kind = match meta.get("rope.scaling.type") {
        Some(Value::String(kind)) => kind.as_str(),
        // Old files name only a factor; it was linear then.
        _ if factor.is_some_and(|f| f != 1.0) => "linear",
        _ => "none",
    };
    let needed = || {
        factor.ok_or_else(|| {
            invalid(format!("gguf: rope scaling {kind} needs {}.rope.scaling.factor", meta.arch))
        })
    };
    let scaling = match kind {
        "none" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed()? },
        "yarn" => {
            let factor = needed()?;
            let own = meta.number_or("rope.scaling.attn_factor")?.unwrap_or(1.0);
            let beta = |key: &str, default: f64| -> Result<f64> {
                Ok(meta.number_or(key)?.unwrap_or(default))
            };
            RopeScaling::Yarn {
                factor,
                beta_fast: beta("rope.scaling.yarn_beta_fast", 32.0)?,
                beta_slow: beta("rope.scaling.yarn_beta_slow", 1.0)?,
                original_context: meta.count("rope.scaling.original_context_length")?,
                attention_factor: own * yarn_attention_factor(factor, None),
                truncate: true,
            }
        }
        other => {
            return Err(unsupported(format!(
                "gguf: {}.rope.scaling.type = {other} is not supported; none, linear and yarn are",
                meta.arch
            )));
        }
    };
    Ok(Rope { theta, scaling })
}
