//! GGUF LoRA files: what their metadata says, and the places of their tensors.
//!
//! Owns the rules of an adapter's metadata, and the names of GGUF. Never reads values. The thing to
//! know: files of the llama architecture store rotated heads interleaved, so rows of B for q and k
//! are put back in Hugging Face's order later.

use super::modules::Module;
use super::names::unreadable;
use super::parsed::{Factors, Layout, Parsed, SiteParts, check_rank, check_shape, dims, summarize};
use super::tensors::{Storage, TENSORS_MAX, TensorFile, TensorId, refused};
use crate::error::{Error, Result, brief};
use crate::header::gguf::{Limits, Metadata, Value, read};
use crate::shape::{ModelShape, Projection, Site};
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

/// Nothing that is asked of an adapter's metadata is an array.
const LIMITS: Limits = Limits {
    tensors: TENSORS_MAX as u64,
    keys: 4096,
    string_bytes: 1 << 20,
    array_values: 1 << 16,
    keeps_arrays: false,
    mends_text: false,
};

/// Keys under `adapter.` that do not change the arithmetic, or are read.
const ADAPTER_KEYS: [&str; 4] =
    ["adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix"];

fn invalid(why: impl fmt::Display) -> Error {
    Error::unprocessable("invalid_gguf", format!("the GGUF file: {why}"))
}

/// Opens the file and maps every tensor. Errors: `invalid_gguf`, `unsupported_dtype`,
/// `architecture_mismatch`, and the tensor codes of PEFT files.
pub fn parse(path: &Path, shape: &ModelShape) -> Result<Parsed> {
    let (metadata, file) = open(path)?;
    let alpha = check_metadata(&metadata, shape)?;
    let pairs = pair(&file, shape)?;
    let mut sites = BTreeMap::new();
    let mut embedding = None;
    for (module, pair) in pairs {
        let factors = factors(&file, shape, module, &pair, alpha)?;
        match module {
            Module::Site(site) => {
                let parts =
                    SiteParts { path: pair.name, factors: Some(factors), ..SiteParts::default() };
                sites.insert(site, parts);
            }
            _ => embedding = Some(factors),
        }
    }
    if sites.is_empty() && embedding.is_none() {
        return Err(Error::unprocessable(
            "empty_adapter",
            "the file holds no tensor that changes the model",
        ));
    }
    let parameters = file.tensors.iter().map(|t| t.values() as u64).sum();
    let base = match metadata.get("general.base_model.0.name") {
        Some(Value::String(s)) => Some(s.clone()),
        _ => None,
    };
    let summary =
        summarize("gguf-lora", base, &sites, embedding.as_ref(), &BTreeMap::new(), parameters);
    Ok(Parsed { summary, file, sites, embedding, norms: BTreeMap::new(), copies: Vec::new() })
}

/// Returns `adapter.lora.alpha`.
fn check_metadata(metadata: &Metadata, shape: &ModelShape) -> Result<f32> {
    let text = |key: &str| match metadata.get(key) {
        Some(Value::String(s)) => Ok(s.as_str()),
        _ => Err(invalid(format!("the key `{key}` is missing or not a string"))),
    };
    let wanted = |key: &str, wanted: &str| match text(key)? {
        found if found == wanted => Ok(()),
        found => Err(invalid(format!("`{key}` is `{}`, not `{wanted}`", brief(found)))),
    };
    wanted("general.type", "adapter")?;
    wanted("adapter.type", "lora")?;
    let (found, expected) = (text("general.architecture")?, architecture(shape));
    if found != expected {
        return Err(Error::unprocessable(
            "architecture_mismatch",
            format!(
                "`general.architecture` is `{}`; the served model's is `{expected}`",
                brief(found)
            ),
        ));
    }
    let adapter_keys = metadata.keys().filter(|k| k.starts_with("adapter."));
    for key in adapter_keys {
        if !ADAPTER_KEYS.contains(&key.as_str()) {
            return Err(Error::unprocessable(
                "unsupported_config_field",
                format!("the GGUF key `{}` changes how the adapter applies", brief(key)),
            ));
        }
    }
    match metadata.get("adapter.lora.alpha").and_then(Value::number) {
        Some(n) if n.is_finite() => Ok(n as f32),
        _ => Err(invalid("the key `adapter.lora.alpha` is missing or not a finite number")),
    }
}

/// The name GGUF gives to the family.
fn architecture(shape: &ModelShape) -> &'static str {
    match shape.family {
        "mistral" => "llama",
        family => family,
    }
}

/// The two tensors of one module.
struct Pair {
    name: String,
    a: Option<TensorId>,
    b: Option<TensorId>,
}

fn pair(file: &TensorFile, shape: &ModelShape) -> Result<BTreeMap<Module, Pair>> {
    let mut pairs: BTreeMap<Module, Pair> = BTreeMap::new();
    for (id, tensor) in file.tensors.iter().enumerate() {
        let (name, is_a) = match tensor.name.strip_suffix(".lora_a") {
            Some(name) => (name, true),
            None => (tensor.name.strip_suffix(".lora_b").unwrap_or(""), false),
        };
        let module = module(name, shape.layers).map_err(|layer| match layer {
            Some(layer) => Error::unprocessable(
                "layer_out_of_range",
                format!("tensor `{}` is for layer {layer}, which the model lacks", tensor.name),
            ),
            None => Error::unprocessable(
                "unknown_tensor",
                format!(
                    "tensor `{}` fits no module of this model; names look like \
                     `blk.0.attn_q.weight.lora_a`",
                    brief(&tensor.name)
                ),
            ),
        })?;
        let pair =
            pairs.entry(module).or_insert_with(|| Pair { name: name.to_owned(), a: None, b: None });
        // Names are unique in the file and each module has one name, so no slot is taken twice.
        if is_a {
            pair.a = Some(id);
        } else {
            pair.b = Some(id);
        }
    }
    Ok(pairs)
}

/// The module of a base tensor's name; `Err(Some(layer))` when only the layer is out of range.
fn module(name: &str, layers: usize) -> Result<Module, Option<usize>> {
    let name = name.strip_suffix(".weight").ok_or(None)?;
    match name {
        "token_embd" => return Ok(Module::Embedding),
        "output" => return Ok(Module::Site(Site::Head)),
        _ => {}
    }
    let rest = name.strip_prefix("blk.").ok_or(None)?;
    let (layer, kind) = rest.split_once('.').ok_or(None)?;
    let number: usize = layer.parse().map_err(|_| None)?;
    if number.to_string() != layer {
        return Err(None);
    }
    let layer = number;
    let projection = match kind {
        "attn_q" => Projection::Q,
        "attn_k" => Projection::K,
        "attn_v" => Projection::V,
        "attn_output" => Projection::O,
        "ffn_gate" => Projection::Gate,
        "ffn_up" => Projection::Up,
        "ffn_down" => Projection::Down,
        _ => return Err(None),
    };
    if layer >= layers {
        return Err(Some(layer));
    }
    Ok(Module::Site(Site::Layer(layer, projection)))
}

fn factors(
    file: &TensorFile,
    shape: &ModelShape,
    module: Module,
    pair: &Pair,
    alpha: f32,
) -> Result<Factors> {
    let (Some(a), Some(b)) = (pair.a, pair.b) else {
        let (has, lacks) = if pair.a.is_some() { ("a", "b") } else { ("b", "a") };
        return Err(Error::unprocessable(
            "missing_factor",
            format!("tensor `{0}.lora_{has}` is in the file without `{0}.lora_{lacks}`", pair.name),
        ));
    };
    let rank = file.tensor(b).shape.last().copied().unwrap_or(0);
    check_rank(file, b, rank)?;
    let (inputs, outputs) = dims(shape, module);
    check_shape(file, b, &[outputs, rank])?;
    let layout = match module {
        Module::Embedding => Layout::TransposedA,
        Module::Site(Site::Layer(_, p)) if architecture(shape) == "llama" => match p {
            Projection::Q => Layout::RotatedRows { heads: shape.heads },
            Projection::K => Layout::RotatedRows { heads: shape.kv_heads },
            _ => Layout::Peft,
        },
        _ => Layout::Peft,
    };
    let a_shape = match layout {
        Layout::TransposedA => [inputs, rank],
        _ => [rank, inputs],
    };
    check_shape(file, a, &a_shape)?;
    Ok(Factors { a, b, rank, scale: scale(alpha, rank), layout })
}

/// alpha/rank; an alpha of 0 means that the factors are already scaled, as llama.cpp reads it.
fn scale(alpha: f32, rank: usize) -> f32 {
    if alpha == 0.0 { 1.0 } else { alpha / rank as f32 }
}

/// Opens the file and reads its header. Values stay in the file.
fn open(path: &Path) -> Result<(Metadata, TensorFile)> {
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let len = file.metadata().map_err(|e| unreadable(path, &e))?.len();
    let storage = |dtype: &GgmlDType| match dtype {
        GgmlDType::F32 => Some(Storage::F32),
        GgmlDType::F16 => Some(Storage::F16),
        GgmlDType::BF16 => Some(Storage::Bf16),
        GgmlDType::Q8_0 => Some(Storage::Q8_0),
        _ => None,
    };
    let refused =
        |wrong| refused(wrong, path, ("invalid_gguf", "the GGUF file"), "F32, F16, BF16 and Q8_0");
    let (metadata, entries) = read(&file, len, &LIMITS).map_err(refused)?;
    let tensors = entries.into_iter().map(|t| t.stored_as(storage)).collect::<Result<_, _>>();
    Ok((metadata, TensorFile::new(file, path, tensors.map_err(refused)?)))
}
