//! A Hugging Face model directory: config, safetensors (one file or shards), tokenizer and template
//! files.
//!
//! Owns the rules about which file says what. Never maps or keeps weights: a tensor is read when it
//! is asked for. The thing to know: names are those of the text model; what multimodal files put in
//! front of them is cut off here.

use super::config_json::{invalid, unsupported};
use super::parts::TextSource;
use super::stored::{Form, Stored};
use super::weight_file::WeightFile;
use crate::error::Result;
use crate::header::safetensors::{Limits, read};
use crate::header::{Entry, Wrong};
use crate::shape::ModelShape;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// A header larger than this is no header.
const LIMITS: Limits = Limits { bytes: 100 << 20, tensors: 1 << 20, dimensions: 8 };
/// Tensors of multimodal files that the text model never reads.
const OTHER_TOWERS: [&str; 4] = [
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
];

pub struct Directory {
    config: WeightFile,
    shards: Vec<WeightFile>,
    /// Text-model name → shard and entry.
    tensors: HashMap<String, (usize, Entry<Dtype>)>,
}

impl Directory {
    pub fn open(path: &Path) -> Result<(Self, ModelShape, TextSource)> {
        let config_path = path.join("config.json");
        let config = read_json(&config_path)?
            .ok_or_else(|| invalid(format!("config.json is missing in {}", path.display())))?;
        let shape = ModelShape::from_config(&config)?;
        let text = text_source(path, &config)?;
        let mut shards = Vec::new();
        let mut tensors = HashMap::new();
        for path in weight_files(path)? {
            let file = WeightFile::open(&path)?;
            let entries =
                read(file.file(), file.bytes(), &LIMITS, Some).map_err(|wrong| match wrong {
                    Wrong::Stored { .. } => unsupported(file.wrong(&wrong).message),
                    _ => file.wrong(&wrong),
                })?;
            let entries = entries.into_iter().map(|t| (text_name(&t.name), (shards.len(), t)));
            tensors.extend(entries);
            shards.push(file);
        }
        let directory = Self { config: WeightFile::open(&config_path)?, shards, tensors };
        Ok((directory, shape, text))
    }

    /// What the digest is over: config.json, then the weight files by name.
    pub fn files(&self) -> impl Iterator<Item = &WeightFile> {
        std::iter::once(&self.config).chain(&self.shards)
    }

    pub fn storage(&self) -> String {
        let dtype = match self.table() {
            Some(Dtype::BF16) => "bf16",
            Some(Dtype::F16) => "f16",
            _ => "f32",
        };
        format!("safetensors {dtype}, {} file(s)", self.shards.len())
    }

    pub fn stored_f32(&self) -> bool {
        self.table() == Some(Dtype::F32)
    }

    /// How the embedding table is stored.
    fn table(&self) -> Option<Dtype> {
        let (_, info) = self.tensors.get("model.embed_tokens.weight")?;
        Some(info.stored)
    }

    pub fn names(&self) -> Vec<String> {
        let other = |name: &str| {
            OTHER_TOWERS.iter().any(|t| name.starts_with(t))
                || name.ends_with("rotary_emb.inv_freq")
        };
        let names = self.tensors.keys();
        names.filter(|name| !other(name)).cloned().collect()
    }

    /// See `Gguf::stored`.
    pub fn stored<'a>(&'a self, name: &'a str, dims: [usize; 2]) -> Result<Option<Stored<'a>>> {
        self.at(name, &dims, dims)
    }

    /// See `Gguf::vector`.
    pub fn vector(&self, name: &str, width: usize) -> Result<Option<Vec<f32>>> {
        let stored = self.at(name, &[width], [1, width])?;
        stored.map(|stored| stored.values()).transpose()
    }

    fn at<'a>(
        &'a self,
        name: &'a str,
        dims: &[usize],
        as_rows: [usize; 2],
    ) -> Result<Option<Stored<'a>>> {
        let Some((shard, info)) = self.tensors.get(name) else {
            return Ok(None);
        };
        let file = &self.shards[*shard];
        if info.shape != dims {
            let why = format!("tensor {name} has shape {:?}, expected {dims:?}", info.shape);
            return Err(file.wrong(&why));
        }
        let form = match info.stored {
            Dtype::BF16 => Form::Bf16,
            Dtype::F16 => Form::F16,
            Dtype::F32 => Form::F32,
            other => {
                let why = format!(
                    "tensor {name} is stored as {other:?}; BF16, F16 and F32 are supported"
                );
                return Err(unsupported(file.wrong(&why).message));
            }
        };
        Stored::new(file, name, info.range.start, form, as_rows).map(Some)
    }
}

/// The name in a text-only checkpoint of a tensor of a multimodal one.
fn text_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("language_model.") {
        rest.to_owned()
    } else if let Some(rest) = name.strip_prefix("model.language_model.") {
        format!("model.{rest}")
    } else {
        name.to_owned()
    }
}

/// The files of the index, or the one file, by name.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let index_path = dir.join("model.safetensors.index.json");
    if let Some(index) = read_json(&index_path)? {
        let map = index
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| invalid(format!("{}: no `weight_map`", index_path.display())))?;
        let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
        // A shard is a file beside the index, never a path elsewhere.
        let strange = |n: &&str| Path::new(n).file_name().is_none_or(|f| f != *n);
        if let Some(name) = names.iter().copied().find(strange) {
            return Err(invalid(format!("{}: {name:?} is not a file name", index_path.display())));
        }
        return Ok(names.into_iter().map(|n| dir.join(n)).collect());
    }
    let single = dir.join("model.safetensors");
    match single.is_file() {
        true => Ok(vec![single]),
        false => Err(invalid(format!(
            "model.safetensors (or model.safetensors.index.json) is missing in {}; other \
             weight files are not read",
            dir.display()
        ))),
    }
}

/// The content of a JSON file, `None` where there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(invalid(format!("{}: {e}", path.display()))),
    };
    match serde_json::from_slice(&text) {
        Ok(value) => Ok(Some(value)),
        Err(e) => Err(invalid(format!("{}: {e}", path.display()))),
    }
}

fn text_source(dir: &Path, config: &Value) -> Result<TextSource> {
    let path = dir.join("tokenizer.json");
    if !path.is_file() {
        return Err(invalid(format!("tokenizer.json is missing in {}", dir.display())));
    }
    let tokenizer = tokenizers::Tokenizer::from_file(&path)
        .map_err(|e| invalid(format!("{}: {e}", path.display())))?;
    let own = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or_default();
    let named = |key: &str| {
        let token = own.get(key)?;
        let token = token.get("content").unwrap_or(token).as_str()?;
        tokenizer.token_to_id(token)
    };
    let text_config = config.get("text_config").unwrap_or(&Value::Null);
    let configs = [&generation, config, text_config];
    let ids = |key: &'static str| configs.into_iter().flat_map(move |c| ids(c.get(key)));
    let mut eos = Vec::new();
    // The tokenizer's own first: it is what chat templates mean by `eos_token`.
    for id in named("eos_token").into_iter().chain(ids("eos_token_id")) {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    let bos = named("bos_token").or_else(|| ids("bos_token_id").next());
    let add_bos = match own.get("add_bos_token").and_then(Value::as_bool) {
        Some(add) => add,
        None => adds_bos(&tokenizer, bos),
    };
    Ok(TextSource { chat_template: chat_template(dir, &own)?, bos, eos, add_bos, tokenizer })
}

/// One id or a list of them.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(v) => one(v).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Whether the tokenizer itself puts bos in front.
fn adds_bos(tokenizer: &tokenizers::Tokenizer, bos: Option<u32>) -> bool {
    let encoded = tokenizer.encode("a", true).ok();
    bos.is_some() && encoded.is_some_and(|e| e.get_ids().first().copied() == bos)
}

/// From chat_template.jinja, or the tokenizer's config: text, or a list of named templates as JSON.
fn chat_template(dir: &Path, own: &Value) -> Result<Option<String>> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        let text = std::fs::read_to_string(&path);
        return match text {
            Ok(text) => Ok(Some(text)),
            Err(e) => Err(invalid(format!("{}: {e}", path.display()))),
        };
    }
    let beside = read_json(&dir.join("chat_template.json"))?.unwrap_or_default();
    let template = beside.get("chat_template").or_else(|| own.get("chat_template"));
    Ok(match template {
        Some(Value::String(text)) => Some(text.clone()),
        Some(list @ Value::Array(_)) => Some(list.to_string()),
        _ => None,
    })
}
