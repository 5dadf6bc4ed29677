//! One GGUF file: its metadata as a `ModelShape`, its tensors under Hugging Face names and in
//! Hugging Face layout.
//!
//! Owns the name table, the undoing of what converters do to weights (rotary row order of `llama`,
//! Gemma's +1 on norms) and dequantisation. Never keeps a tensor. The thing to know: where tensors
//! of a file with quantised ones are dequantised, all are rounded to bf16, so that the model is the
//! same whatever is stored in f32 beside them.

use super::checkpoint::TensorData;
use super::config_json::{check, embedding_scale, invalid, unsupported};
use super::gguf_blocks::{Groups, kept_as, reordered};
use super::gguf_shape::{Metadata, rope};
use crate::error::{Error, Result};
use crate::shape::{Activation, ModelShape};
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use half::bf16;
use polylora_kernels::WeightDtype;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Rows are dequantised in pieces of about this many elements: the f32 form of a large table never
/// exists whole.
const PIECE_ELEMENTS: usize = 1 << 20;

/// An open GGUF file.
pub(super) struct Gguf {
    path: PathBuf,
    file: Mutex<BufReader<File>>,
    content: Content,
    /// Whether any tensor is stored in blocks.
    quantised: bool,
    gemma: bool,
    /// Heads whose q and k rows are interleaved, where they are: arch `llama`.
    interleaved: Option<(usize, usize)>,
}

impl Gguf {
    /// Opens the file and reads its header. Errors name the metadata key or the tensor.
    pub fn open(path: &Path) -> Result<(Self, ModelShape)> {
        let name = path.display();
        let file = File::open(path).map_err(|e| invalid(format!("{name}: {e}")))?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file).map_err(|e| invalid(format!("{name}: {e}")))?;
        let quantised = content.tensor_infos.values().any(|t| t.ggml_dtype.block_size() > 1);
        let mut gguf = Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            content,
            quantised,
            gemma: false,
            interleaved: None,
        };
        let shape = gguf.shape()?;
        gguf.gemma = shape.norm_plus_one;
        gguf.interleaved = (shape.family == "llama").then_some((shape.heads, shape.kv_heads));
        Ok((gguf, shape))
    }

    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }

    /// Of the most tensors, e.g. `gguf Q4_1`.
    pub fn storage(&self) -> String {
        let mut counts = BTreeMap::<String, usize>::new();
        for info in self.content.tensor_infos.values() {
            if info.shape.rank() > 1 {
                let dtype = format!("{:?}", info.ggml_dtype);
                *counts.entry(dtype).or_default() += 1;
            }
        }
        let most = counts.into_iter().max_by_key(|(_, n)| *n);
        let most = most.map_or_else(String::new, |(dtype, _)| format!(" {dtype}"));
        format!("gguf{most}")
    }

    /// Whether the embedding table is stored in f32.
    pub fn stored_f32(&self) -> bool {
        let table = self.content.tensor_infos.get("token_embd.weight");
        table.is_some_and(|t| t.ggml_dtype == GgmlDType::F32)
    }

    /// Hugging Face names of all tensors; a name this file's arch does not know comes as it is.
    pub fn names(&self) -> Vec<String> {
        let names = self.content.tensor_infos.keys();
        names
            .filter(|n| *n != "rope_freqs.weight")
            .map(|n| hf_name(n, self.gemma).unwrap_or_else(|| n.clone()))
            .collect()
    }

    /// See `Checkpoint::groups`.
    pub fn groups(&self, name: &str, dims: [usize; 2]) -> Result<Option<(WeightDtype, Groups)>> {
        let Some(info) = self.info(name, &dims)? else {
            return Ok(None);
        };
        let (dtype, [rows, width]) = (info.ggml_dtype, dims);
        let Some(kept) = kept_as(dtype) else {
            return Ok(None);
        };
        let mut groups = Groups::default();
        for (start, count) in pieces(rows, width) {
            let piece = self.read(info, name, start, count, width)?;
            let bytes = piece.data().map_err(|e| self.failed(name, &e))?;
            groups.extend(dtype, &bytes);
        }
        Ok(Some(match self.row_order(name, rows) {
            Some(order) => (kept, groups.reordered(&order)),
            None => (kept, groups),
        }))
    }

    /// Whether some matrix is kept as the integers it is stored as.
    pub fn packed(&self) -> bool {
        let matrices = self.content.tensor_infos.values().filter(|t| t.shape.rank() > 1);
        matrices.into_iter().any(|t| kept_as(t.ggml_dtype).is_some())
    }

    /// The entry of a tensor, by its Hugging Face name.
    fn info(&self, name: &str, dims: &[usize]) -> Result<Option<&TensorInfo>> {
        let stored = gguf_name(name, self.gemma);
        let Some(info) = stored.and_then(|n| self.content.tensor_infos.get(&n)) else {
            return Ok(None);
        };
        if info.shape.dims() != dims {
            return Err(invalid(format!(
                "{}: tensor {name} has shape {:?}, expected {dims:?}",
                self.path.display(),
                info.shape.dims()
            )));
        }
        Ok(Some(info))
    }

    /// See `Checkpoint::tensor`.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<Option<TensorData>> {
        let Some(info) = self.info(name, dims)? else {
            return Ok(None);
        };
        let round = self.quantised || info.ggml_dtype == GgmlDType::BF16;
        let (rows, width) = (dims[0], dims[1..].iter().product::<usize>());
        let order = self.row_order(name, rows);
        let minus_one = self.gemma && name.ends_with("norm.weight");
        let mut f32s = Vec::new();
        let mut bf16s = Vec::new();
        if round {
            bf16s.reserve_exact(rows * width);
        } else {
            f32s.reserve_exact(rows * width);
        }
        for (start, count) in pieces(rows, width) {
            let mut piece = self.floats(name, &self.read(info, name, start, count, width)?)?;
            if minus_one {
                piece.iter_mut().for_each(|w| *w -= 1.0);
            }
            if round {
                bf16s.extend(piece.into_iter().map(bf16::from_f32));
            } else {
                f32s.append(&mut piece);
            }
        }
        Ok(Some(match (round, order) {
            (true, None) => TensorData::Bf16(bf16s),
            (true, Some(order)) => TensorData::Bf16(reordered(&bf16s, &order)),
            (false, None) => TensorData::F32(f32s),
            (false, Some(order)) => TensorData::F32(reordered(&f32s, &order)),
        }))
    }

    fn failed(&self, name: &str, why: &candle_core::Error) -> Error {
        invalid(format!("{}: tensor {name}: {why}", self.path.display()))
    }

    /// What was read of a tensor, dequantised.
    fn floats(&self, name: &str, piece: &QTensor) -> Result<Vec<f32>> {
        let floats = piece.dequantize(&candle_core::Device::Cpu).and_then(|t| t.to_vec1());
        floats.map_err(|e| self.failed(name, &e))
    }

    /// Rows `start..start + count` of a tensor, as stored.
    fn read(
        &self,
        info: &TensorInfo,
        name: &str,
        start: usize,
        count: usize,
        width: usize,
    ) -> Result<QTensor> {
        let dtype = info.ggml_dtype;
        let block = dtype.block_size();
        // One-dimensional tensors come as one piece, so only a matrix's width has to be whole
        // blocks.
        if !(count * width).is_multiple_of(block) || !(start * width).is_multiple_of(block) {
            return Err(invalid(format!(
                "{}: tensor {name}: rows of {width} are not whole {dtype:?} blocks of {block}",
                self.path.display()
            )));
        }
        let piece = TensorInfo {
            ggml_dtype: dtype,
            shape: (count * width).into(),
            offset: info.offset + (start * width / block * dtype.type_size()) as u64,
        };
        let device = candle_core::Device::Cpu;
        let mut file = self.file.lock().expect("no panic while reading");
        let read = piece.read(&mut *file, self.content.tensor_data_offset, &device);
        read.map_err(|e| self.failed(name, &e))
    }

    /// For q and k of arch `llama`: the stored row of every Hugging Face row.
    fn row_order(&self, name: &str, rows: usize) -> Option<Vec<usize>> {
        let (heads, kv_heads) = self.interleaved?;
        let heads = match name {
            _ if name.contains("self_attn.q_proj.") => heads,
            _ if name.contains("self_attn.k_proj.") => kv_heads,
            _ => return None,
        };
        let head_dim = rows / heads;
        let half = head_dim / 2;
        // Stored [head, pair, half of pair], wanted [head, half, pair].
        let stored = |row: usize| {
            let (head, d) = (row / head_dim, row % head_dim);
            head * head_dim + (d % half) * 2 + d / half
        };
        Some((0..rows).map(stored).collect())
    }

    fn shape(&self) -> Result<ModelShape> {
        let meta = Metadata::new(&self.content.metadata)?;
        let family = meta.family()?;
        let (hidden, heads) =
            (meta.count("embedding_length")?, meta.count("attention.head_count")?);
        let gemma = family == "gemma3";
        let layers = meta.count("block_count")?;
        let head_dim = meta.count_or("attention.key_length")?.unwrap_or(hidden / heads);
        let vocab = match self.content.tensor_infos.get("token_embd.weight") {
            Some(info) => info.shape.dims()[0],
            None => return Err(invalid("gguf: tensor token_embd.weight is missing")),
        };
        let has = |name: &str| self.content.tensor_infos.contains_key(name);
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
        let info = &self.content.tensor_infos[name];
        if info.shape.dims() != [head_dim / 2] {
            return Err(invalid(format!(
                "{}: tensor {name} has shape {:?}, expected [{}]",
                self.path.display(),
                info.shape.dims(),
                head_dim / 2
            )));
        }
        self.floats(name, &self.read(info, name, 0, 1, head_dim / 2)?)
    }
}

fn pieces(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = match width {
        1 => rows,
        _ => (PIECE_ELEMENTS / width).max(1),
    };
    (0..rows).step_by(step).map(move |start| (start, step.min(rows - start)))
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
