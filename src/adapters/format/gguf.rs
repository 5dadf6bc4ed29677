//! GGUF LoRA files: their header, read with limits, and the places of their tensors.
//!
//! Owns the metadata rules and the names of GGUF. Never reads values. The thing to know: files of
//! the llama architecture store rotated heads interleaved, so rows of B for q and k are put back in
//! Hugging Face's order later.

use super::modules::{Module, short};
use super::names::unreadable;
use super::parsed::{Factors, Layout, Parsed, SiteParts, check_rank, check_shape, dims, summarize};
use super::tensors::{Storage, TENSORS_MAX, Tensor, TensorFile, TensorId, check_layout};
use crate::error::{Error, Result, brief};
use crate::shape::{ModelShape, Projection, Site};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

const ENTRIES_MAX: u64 = 4096;
const STRING_BYTES_MAX: u64 = 1 << 20;
const ARRAY_VALUES_MAX: u64 = 1 << 16;
const DIMENSIONS_MAX: u32 = 4;

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
        Some(Value::Text(s)) => Some(s.clone()),
        _ => None,
    };
    let summary =
        summarize("gguf-lora", base, &sites, embedding.as_ref(), &BTreeMap::new(), parameters);
    Ok(Parsed { summary, file, sites, embedding, norms: BTreeMap::new(), copies: Vec::new() })
}

/// Returns `adapter.lora.alpha`.
fn check_metadata(metadata: &BTreeMap<String, Value>, shape: &ModelShape) -> Result<f32> {
    let text = |key: &str| match metadata.get(key) {
        Some(Value::Text(s)) => Ok(s.as_str()),
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

/// A metadata value, as far as the loader looks at it.
enum Value {
    Text(String),
    U32(u32),
    Number(f64),
    Other,
}

impl Value {
    fn number(&self) -> Option<f64> {
        match self {
            Self::U32(n) => Some(f64::from(*n)),
            Self::Number(n) => Some(*n),
            Self::Text(_) | Self::Other => None,
        }
    }
}

/// Reads the header. Values stay in the file.
fn open(path: &Path) -> Result<(BTreeMap<String, Value>, TensorFile)> {
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let len = file.metadata().map_err(|e| unreadable(path, &e))?.len();
    let mut r = Header(BufReader::new(file));
    if r.array::<4>()? != *b"GGUF" {
        return Err(invalid("it does not begin with GGUF"));
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        return Err(invalid(format!("version {version}; 2 and 3 are supported")));
    }
    let (tensors, entries) = (r.u64()?, r.u64()?);
    if tensors > TENSORS_MAX as u64 || entries > ENTRIES_MAX {
        return Err(invalid(format!(
            "{tensors} tensors and {entries} keys; the limits are {TENSORS_MAX} and {ENTRIES_MAX}"
        )));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..entries {
        let key = r.string()?;
        let kind = r.u32()?;
        let value = r.value(kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(invalid(format!("the key `{}` is there twice", brief(&key))));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::U32(n)) if n.is_power_of_two() && (8..=65536).contains(n) => u64::from(*n),
        Some(_) => {
            return Err(invalid(
                "`general.alignment` is not a power of two from 8 to 65536, stored as a uint32",
            ));
        }
    };
    let mut tensors = (0..tensors).map(|_| r.tensor()).collect::<Result<Vec<_>>>()?;
    let header = r.0.stream_position().map_err(|e| unreadable(path, &e))?;
    let start = header.next_multiple_of(alignment).min(len);
    for t in &mut tensors {
        let (Some(from), Some(to)) =
            (t.range.start.checked_add(start), t.range.end.checked_add(start))
        else {
            return Err(invalid(format!("the offset of tensor `{}` overflows", brief(&t.name))));
        };
        if !t.range.start.is_multiple_of(alignment) {
            return Err(invalid(format!("tensor `{}` is not aligned", brief(&t.name))));
        }
        t.range = from..to;
    }
    check_layout(&tensors, start..len, "invalid_gguf")?;
    Ok((metadata, TensorFile::new(r.0.into_inner(), path, tensors)))
}

/// The header's primitive values, little-endian, with limits.
struct Header(BufReader<File>);

impl Header {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).map_err(|_| invalid("it ends within the header"))?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<String> {
        let len = self.u64()?;
        if len > STRING_BYTES_MAX {
            return Err(invalid(format!("a string of {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        self.0.read_exact(&mut bytes).map_err(|_| invalid("it ends within a string"))?;
        String::from_utf8(bytes).map_err(|_| invalid("a string is not UTF-8"))
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        const ARRAY: u32 = 9;
        if kind != ARRAY {
            return self.scalar(kind);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        if kind == ARRAY || count > ARRAY_VALUES_MAX {
            return Err(invalid(format!("an array of {count} values of type {kind}")));
        }
        for _ in 0..count {
            self.scalar(kind)?;
        }
        Ok(Value::Other)
    }

    fn scalar(&mut self, kind: u32) -> Result<Value> {
        Ok(Value::Number(match kind {
            0 => f64::from(u8::from_le_bytes(self.array()?)),
            1 => f64::from(i8::from_le_bytes(self.array()?)),
            2 => f64::from(u16::from_le_bytes(self.array()?)),
            3 => f64::from(i16::from_le_bytes(self.array()?)),
            4 => return self.u32().map(Value::U32),
            5 => f64::from(i32::from_le_bytes(self.array()?)),
            6 => f64::from(f32::from_le_bytes(self.array()?)),
            7 => {
                self.array::<1>()?;
                return Ok(Value::Other);
            }
            8 => return self.string().map(Value::Text),
            10 => self.u64()? as f64,
            11 => i64::from_le_bytes(self.array()?) as f64,
            12 => f64::from_le_bytes(self.array()?),
            _ => return Err(invalid(format!("unknown value type {kind}"))),
        }))
    }

    /// A tensor with its range still relative to the data.
    fn tensor(&mut self) -> Result<Tensor> {
        let name = self.string()?;
        let count = self.u32()?;
        if count > DIMENSIONS_MAX {
            return Err(invalid(format!("tensor `{}` has {count} dimensions", brief(&name))));
        }
        let mut shape = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let dim = self.u64()?;
            shape.push(usize::try_from(dim).map_err(invalid)?);
        }
        shape.reverse(); // GGUF lists the fastest dimension first
        let storage = match self.u32()? {
            0 => Storage::F32,
            1 => Storage::F16,
            8 => Storage::Q8_0,
            30 => Storage::Bf16,
            other => {
                return Err(Error::unprocessable(
                    "unsupported_dtype",
                    format!(
                        "tensor `{}` has GGML type {other}; F32, F16, BF16 and Q8_0 are supported",
                        brief(short(&name))
                    ),
                ));
            }
        };
        let start = self.u64()?;
        let values = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = values.and_then(|n| storage.bytes(n)).map(|n| n as u64);
        let end = bytes.and_then(|n| start.checked_add(n));
        let Some(end) = end else {
            return Err(invalid(format!("tensor `{}` has shape {shape:?}", brief(&name))));
        };
        Ok(Tensor { name, storage, shape, range: start..end })
    }
}
