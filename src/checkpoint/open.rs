//! A base model on disk: a Hugging Face directory or one GGUF file, read tensor by tensor under
//! Hugging Face names.
//!
//! Owns the choice between the two and the digest. Never holds weights. The thing to know: whatever
//! the file, tensors come in the layout that Hugging Face checkpoints have.

use super::config_json::invalid;
use super::gguf::Gguf;
use super::gguf_tokenizer;
use super::hf::Directory;
use super::parts::TextSource;
use super::stored::Stored;
use super::weight_file::WeightFile;
use crate::adapters::Digest;
use crate::error::Result;
use crate::shape::ModelShape;
use sha2::{Digest as _, Sha256};
use std::path::Path;

/// An opened model: shape known, tensors readable, text parts at hand.
pub struct Checkpoint {
    pub shape: ModelShape,
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

impl Checkpoint {
    /// Opens a directory or a .gguf file. Errors (`unsupported_model`, `invalid_model`) name the
    /// file, the config key or the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let (directory, shape, text) = Directory::open(path)?;
            return Ok(Self {
                shape,
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
            text: gguf_tokenizer::text_source(gguf.metadata())?,
            storage: gguf.storage(),
            store: Store::Gguf(Box::new(gguf)),
        })
    }

    /// All values of a tensor by its Hugging Face name (`model.norm.weight`), row-major `[O, I]`,
    /// q/k rows of GGUF llama files un-permuted, Gemma norms without their +1; `None` when the file
    /// has no such tensor.
    pub fn values(&self, name: &str, dims: &[usize]) -> Result<Option<Vec<f32>>> {
        match (&self.store, dims) {
            (Store::Directory(d), &[width]) => d.vector(name, width),
            (Store::Gguf(g), &[width]) => g.vector(name, width),
            (_, &[outputs, inputs]) => {
                let stored = self.stored(name, [outputs, inputs])?;
                stored.map(|stored| stored.values()).transpose()
            }
            _ => Ok(None),
        }
    }

    /// The same of a matrix, as it lies in its file.
    pub fn stored<'a>(&'a self, name: &'a str, dims: [usize; 2]) -> Result<Option<Stored<'a>>> {
        match &self.store {
            Store::Directory(d) => d.stored(name, dims),
            Store::Gguf(g) => g.stored(name, dims),
        }
    }

    fn files(&self) -> Vec<&WeightFile> {
        match &self.store {
            Store::Directory(d) => d.files().collect(),
            Store::Gguf(g) => vec![g.file()],
        }
    }

    /// Bytes of the files that the digest is over.
    pub fn bytes(&self) -> u64 {
        self.files().into_iter().map(WeightFile::bytes).sum()
    }

    /// SHA-256 over config.json and the weight files (of the GGUF file itself). Reads them all.
    pub fn digest(&self) -> Result<Digest> {
        self.digest_told(&|_| true)
    }

    /// The same. `told` hears of bytes that are hashed, and says whether to go on.
    pub fn digest_told(&self, told: &dyn Fn(u64) -> bool) -> Result<Digest> {
        let mut hash = Sha256::new();
        self.files().into_iter().try_for_each(|file| file.hash(&mut hash, told))?;
        Ok(Digest(hash.finalize().into()))
    }

    /// Errors (`invalid_model`) when a file was written to since it was opened, naming it.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files().into_iter().try_for_each(WeightFile::check_unchanged)
    }

    /// Whether some matrix is stored as integers that are multiplied as they are.
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
