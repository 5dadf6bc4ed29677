//! One GGUF file: its metadata as a `ModelShape`, its tensors under Hugging Face names and in
//! Hugging Face layout.
//!
//! Owns the name table and the undoing of what converters do to weights (rotary row order of
//! `llama`, Gemma's +1 on norms). Never keeps a tensor. The thing to know: where tensors of a file
//! with quantised ones are dequantised, all are rounded to bf16, so that the model is the same
//! whatever is stored in f32 beside them.

use super::config_json::{check, embedding_scale, invalid, unsupported};
use super::gguf_blocks::kept_as;
use super::gguf_shape::{ArchMetadata, rope};
use super::stored::{Form, Stored, interleaved};
use super::weight_file::WeightFile;
use crate::error::Result;
use crate::header::gguf::{Limits, Metadata, read};
use crate::header::{Entry, Wrong};
use crate::shape::{Activation, ModelShape};
use candle_core::quantized::GgmlDType;
use half::bf16;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What an operator chose is read as others read it: vocabularies in the wild are not all UTF-8.
const LIMITS: Limits = Limits {
    tensors: 1 << 20,
    keys: 1 << 16,
    string_bytes: 1 << 30,
    array_values: 1 << 24,
    keeps_arrays: true,
    mends_text: true,
};

/// An open GGUF file.
pub struct Gguf {
    file: WeightFile,
    metadata: Metadata,
    tensors: HashMap<String, Entry<GgmlDType>>,
    /// Whether any tensor is stored in blocks.
    quantised: bool,
    gemma: bool,
    /// Heads whose q and k rows are interleaved, where they are: arch `llama`.
    interleaved: Option<(usize, usize)>,
}

impl Gguf {
    /// Opens the file and reads its header. Errors name the metadata key or the tensor.
    pub fn open(path: &Path) -> Result<(Self, ModelShape)> {
        let file = WeightFile::open(path)?;
        let (metadata, tensors) =
            read(file.file(), file.bytes(), &LIMITS).map_err(|wrong| match wrong {
                Wrong::Stored { .. } => unsupported(file.wrong(&wrong).message),
                _ => file.wrong(&wrong),
            })?;
        let quantised = tensors.iter().any(|t| t.stored.block_size() > 1);
        let tensors = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        let mut gguf = Self { file, metadata, tensors, quantised, gemma: false, interleaved: None };
        let shape = gguf.shape()?;
        gguf.gemma = shape.norm_plus_one;
        gguf.interleaved = (shape.family == "llama").then_some((shape.heads, shape.kv_heads));
        Ok((gguf, shape))
    }

    pub fn file(&self) -> &WeightFile {
        &self.file
    }

    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Of the most tensors, e.g. `gguf Q4_1`.
    pub fn storage(&self) -> String {
        let mut counts = BTreeMap::<String, usize>::new();
        for info in self.tensors.values() {
            if info.shape.len() > 1 {
                let dtype = format!("{:?}", info.stored);
                *counts.entry(dtype).or_default() += 1;
            }
        }
        let most = counts.into_iter().max_by_key(|(_, n)| *n);
        let most = most.map_or_else(String::new, |(dtype, _)| format!(" {dtype}"));
        format!("gguf{most}")
    }

    /// Whether the embedding table is stored in f32.
    pub fn stored_f32(&self) -> bool {
        let table = self.tensors.get("token_embd.weight");
        table.is_some_and(|t| t.stored == GgmlDType::F32)
    }

    /// Hugging Face names of all tensors; a name this file's arch does not know comes as it is.
    pub fn names(&self) -> Vec<String> {
        let names = self.tensors.keys();
        names
            .filter(|n| *n != "rope_freqs.weight")
            .map(|n| hf_name(n, self.gemma).unwrap_or_else(|| n.clone()))
            .collect()
    }

    /// Whether some matrix is kept as the integers it is stored as.
    pub fn packed(&self) -> bool {
        let matrices = self.tensors.values().filter(|t| t.shape.len() > 1);
        matrices.into_iter().any(|t| kept_as(t.stored).is_some())
    }

    /// The entry of a tensor, by its Hugging Face name.
    fn info(&self, name: &str, dims: &[usize]) -> Result<Option<&Entry<GgmlDType>>> {
        let stored = gguf_name(name, self.gemma);
        let Some(info) = stored.and_then(|n| self.tensors.get(&n)) else {
            return Ok(None);
        };
        if info.shape != dims {
            let why = format!("tensor {name} has shape {:?}, expected {dims:?}", info.shape);
            return Err(self.file.wrong(&why));
        }
        Ok(Some(info))
    }

    /// A matrix as it lies in the file; `None` when the file has no such tensor.
    pub fn stored<'a>(&'a self, name: &'a str, dims: [usize; 2]) -> Result<Option<Stored<'a>>> {
        let Some(info) = self.info(name, &dims)? else {
            return Ok(None);
        };
        let mut stored = self.at(info, name, dims)?;
        stored.head_dim = self.head_dim(name, dims[0]);
        Ok(Some(stored))
    }

    fn at<'a>(
        &'a self,
        info: &Entry<GgmlDType>,
        name: &'a str,
        dims: [usize; 2],
    ) -> Result<Stored<'a>> {
        let form = Form::of(info.stored);
        let mut stored = Stored::new(&self.file, name, info.range.start, form, dims)?;
        stored.rounded |= self.quantised;
        Ok(stored)
    }

    /// All values of a norm or a bias; `None` when the file has no such tensor.
    pub fn vector(&self, name: &str, width: usize) -> Result<Option<Vec<f32>>> {
        let Some(info) = self.info(name, &[width])? else {
            return Ok(None);
        };
        let mut stored = self.at(info, name, [1, width])?;
        let rounded = std::mem::take(&mut stored.rounded);
        let mut values = stored.values()?;
        if self.gemma && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|w| *w -= 1.0);
        }
        if rounded {
            values.iter_mut().for_each(|w| *w = bf16::from_f32(*w).to_f32());
        }
        Ok(Some(match self.head_dim(name, width) {
            None => values,
            Some(head_dim) => (0..width).map(|i| values[interleaved(i, head_dim)]).collect(),
        }))
    }

    /// For q and k of arch `llama`, whose rows are interleaved: the width of a head.
    fn head_dim(&self, name: &str, rows: usize) -> Option<usize> {
        let (heads, kv_heads) = self.interleaved?;
        match name {
            _ if name.contains("self_attn.q_proj.") => Some(rows / heads),
            _ if name.contains("self_attn.k_proj.") => Some(rows / kv_heads),
            _ => None,
        }
    }

    fn shape(&self) -> Result<ModelShape> {
        let meta = ArchMetadata::new(&self.metadata)?;
        let family = meta.family()?;
        let (hidden, heads) =
            (meta.count("embedding_length")?, meta.count("attention.head_count")?);
        let gemma = family == "gemma3";
        let layers = meta.count("block_count")?;
        let head_dim = meta.count_or("attention.key_length")?.unwrap_or(hidden / heads);
        let vocab = match self.tensors.get("token_embd.weight") {
            Some(Entry { shape, .. }) if !shape.is_empty() => shape[0],
            _ => return Err(invalid("gguf: tensor token_embd.weight is missing")),
        };
        let has = |name: &str| self.tensors.contains_key(name);
        let factors = match has("rope_freqs.weight") {
            true => Some(self.rope_factors(head_dim)?),
            false => None,
        };
        // Gemma 3 27B alone scales by the width of a head before projection.
        let scaled_by = match gemma && layers == 62 {
            true => hidden / heads,
            false => head_dim,
        };
        let shape = ModelShape {
            family,
            layers,
            hidden,
            ffn: meta.count("feed_forward_length")?,
            heads,
            kv_heads: meta.count_or("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab,
            context: meta.count("context_length")?,
            norm_eps: meta.number("attention.layer_norm_rms_epsilon")? as f32,
            rope: rope(&meta, factors)?,
            rope_local: match gemma {
                true => Some(meta.local_rope()?),
                false => None,
            },
            windows: meta.windows(layers)?,
            activation: match gemma {
                true => Activation::GeluTanh,
                false => Activation::Silu,
            },
            attention_scale: (1.0 / (scaled_by as f64).sqrt()) as f32,
            qkv_bias: has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            qk_norm: matches!(family, "qwen3" | "gemma3"),
            post_norms: gemma,
            norm_plus_one: gemma,
            embedding_scale: embedding_scale(family, hidden),
            tied_head: !has("output.weight"),
        };
        check(&shape)?;
        if let Some(rotated) = meta.count_or("rope.dimension_count")?
            && rotated != head_dim
        {
            return Err(unsupported(format!(
                "gguf: {family}.rope.dimension_count = {rotated} with heads of {head_dim} is not \
                 supported"
            )));
        }
        Ok(shape)
    }

    fn rope_factors(&self, head_dim: usize) -> Result<Vec<f32>> {
        let name = "rope_freqs.weight";
        let info = &self.tensors[name];
        if info.shape != [head_dim / 2] {
            let (there, half) = (&info.shape, head_dim / 2);
            let why = format!("tensor {name} has shape {there:?}, expected [{half}]");
            return Err(self.file.wrong(&why));
        }
        let mut stored = self.at(info, name, [1, head_dim / 2])?;
        stored.rounded = false;
        stored.values()
    }
}

/// Parts of a layer: (Hugging Face, GGUF). The norms around the blocks differ by family.
const LAYER_PARTS: [(&str, &str); 10] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
const GEMMA_NORMS: [(&str, &str); 3] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const PLAIN_NORMS: [(&str, &str); 1] = [("post_attention_layernorm", "ffn_norm")];
const MODEL_PARTS: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("lm_head.weight", "output.weight"),
    ("model.norm.weight", "output_norm.weight"),
];

fn parts(gemma: bool) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    let norms: &[_] = if gemma { &GEMMA_NORMS } else { &PLAIN_NORMS };
    LAYER_PARTS.iter().chain(norms)
}

fn gguf_name(name: &str, gemma: bool) -> Option<String> {
    if let Some((_, stored)) = MODEL_PARTS.iter().find(|(hf, _)| *hf == name) {
        return Some((*stored).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (_, stored) = parts(gemma).find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{stored}.{kind}"))
}

fn hf_name(name: &str, gemma: bool) -> Option<String> {
    if let Some((hf, _)) = MODEL_PARTS.iter().find(|(_, stored)| *stored == name) {
        return Some((*hf).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (hf, _) = parts(gemma).find(|(_, stored)| *stored == module)?;
    Some(format!("model.layers.{layer}.{hf}.{kind}"))
}
