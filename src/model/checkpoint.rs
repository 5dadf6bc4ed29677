//! A base model on disk: a Hugging Face directory or one GGUF file, read tensor by tensor under Hugging Face names.

use crate::adapters::Digest;
use crate::error::Result;
use crate::shape::ModelShape;
use half::bf16;
use std::path::Path;

/// Tensor data as stored, after dequantisation.
pub enum TensorData {
    Bf16(Vec<bf16>),
    /// f32 and f16 sources
    F32(Vec<f32>),
}

/// An opened model: shape known, tensors readable, text parts at hand.
pub struct Checkpoint {
    pub shape: ModelShape,
    /// SHA-256 over the weight files and config (the GGUF file itself).
    pub digest: Digest,
    /// How the tokenizer and the template are to be made.
    pub text: TextSource,
    /// e.g. "gguf Q4_1, dequantised to bf16"
    pub storage: String,
}

/// What `text::Text` is built from.
pub struct TextSource {
    /// tokenizer.json's content, or the one made from GGUF metadata.
    pub tokenizer: tokenizers::Tokenizer,
    pub chat_template: Option<String>,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    /// Whether a plain (non-chat) prompt gets the bos token in front.
    pub add_bos: bool,
}

impl Checkpoint {
    /// Opens a directory or a .gguf file. Errors name the file, the config key or the tensor.
    pub fn open(_path: &Path) -> Result<Self> {
        unimplemented!()
    }
    /// Reads a tensor by its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), row-major [O, I], q/k rows of
    /// GGUF llama files un-permuted; `None` when the file has no such tensor.
    pub fn tensor(&self, _name: &str, _dims: &[usize]) -> Result<Option<TensorData>> {
        unimplemented!()
    }
}
