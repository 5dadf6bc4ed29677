//! A base model on disk: a Hugging Face directory or one GGUF file, read tensor by tensor under
//! Hugging Face names.
//!
//! Owns the choice between the two and the digest. Never holds weights: `Weights` packs what
//! `tensor` returns and drops it. The thing to know: whatever the file, tensors come in the layout
//! that Hugging Face checkpoints have.

use super::config_json::invalid;
use super::gguf::Gguf;
pub use super::gguf_blocks::Groups;
use super::gguf_tokenizer;
use super::hf::Directory;
use crate::adapters::Digest;
use crate::error::Result;
use crate::shape::ModelShape;
use half::bf16;
use polylora_kernels::WeightDtype;
use sha2::{Digest as _, Sha256};
use std::io::Read;
use std::path::Path;

/// Tensor data as stored, after dequantisation.
pub enum TensorData {
    Bf16(Vec<bf16>),
    /// f32 and f16 sources
    F32(Vec<f32>),
}

impl TensorData {
    /// The values as f32, whatever they were stored in.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        }
    }
}

/// An opened model: shape known, tensors readable, text parts at hand.
pub struct Checkpoint {
    pub shape: ModelShape,
    /// SHA-256 over config.json and the weight files (of the GGUF file itself).
    pub digest: Digest,
    /// How the tokenizer and the template are to be made.
    pub text: TextSource,
    /// e.g. "gguf Q4_1"
    pub storage: String,
    store: Store,
}

enum Store {
    Directory(Directory),
    Gguf(Box<Gguf>),
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
    /// Opens a directory or a .gguf file. Errors (`unsupported_model`, `invalid_model`) name the
    /// file, the config key or the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let (directory, shape, text) = Directory::open(path)?;
            return Ok(Self {
                shape,
                digest: directory.digest()?,
                text,
                storage: directory.storage(),
                store: Store::Directory(directory),
            });
        }
        if path.extension().is_none_or(|e| e != "gguf") {
            return Err(invalid(format!(
                "{} is neither a model directory nor a .gguf file",
                path.display()
            )));
        }
        let (gguf, shape) = Gguf::open(path)?;
        Ok(Self {
            shape,
            digest: digest([path])?,
            text: gguf_tokenizer::text_source(gguf.metadata())?,
            storage: gguf.storage(),
            store: Store::Gguf(Box::new(gguf)),
        })
    }

    /// Reads a tensor by its Hugging Face name (`model.layers.0.self_attn.q_proj.weight`),
    /// row-major `[O, I]`, q/k rows of GGUF llama files un-permuted, Gemma norms without their +1;
    /// `None` when the file has no such tensor.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<Option<TensorData>> {
        match &self.store {
            Store::Directory(d) => d.tensor(name, dims),
            Store::Gguf(g) => g.tensor(name, dims),
        }
    }

    /// The same of a matrix `[O, I]` that is stored as integers we multiply as they are; `None` for
    /// any other.
    pub fn groups(&self, name: &str, dims: [usize; 2]) -> Result<Option<(WeightDtype, Groups)>> {
        match &self.store {
            Store::Directory(_) => Ok(None),
            Store::Gguf(g) => g.groups(name, dims),
        }
    }

    /// Whether some matrix is stored as such integers.
    pub fn packed(&self) -> bool {
        match &self.store {
            Store::Directory(_) => false,
            Store::Gguf(g) => g.packed(),
        }
    }

    /// Whether the weights are stored in f32, so that bf16 would lose something.
    pub fn stored_f32(&self) -> bool {
        match &self.store {
            Store::Directory(d) => d.stored_f32(),
            Store::Gguf(g) => g.stored_f32(),
        }
    }

    /// Names of all tensors that belong to the language model, for the check that none is left
    /// unused.
    pub fn names(&self) -> Vec<String> {
        match &self.store {
            Store::Directory(d) => d.names(),
            Store::Gguf(g) => g.names(),
        }
    }
}

/// SHA-256 over the files' bytes, one after the other.
pub(super) fn digest<'a>(files: impl IntoIterator<Item = &'a Path>) -> Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let fail = |e: std::io::Error| invalid(format!("{}: {e}", path.display()));
        let mut file = std::fs::File::open(path).map_err(fail)?;
        loop {
            let n = file.read(&mut buffer).map_err(fail)?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
        }
    }
    Ok(Digest(hash.finalize().into()))
}
