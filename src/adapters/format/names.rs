//! Names of the files that make an adapter.
//!
//! Owns the canonical names. Never opens a file.

use crate::error::Error;
use std::path::Path;

pub const CONFIG: &str = "adapter_config.json";
pub const TENSORS: &str = "adapter_model.safetensors";
pub const GGUF: &str = "adapter.gguf";
pub const TEMPLATE: &str = "chat_template.jinja";
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub const GENERATION: &str = "generation_config.json";
pub const TOKENIZER: &str = "tokenizer.json";
/// Names that are kept as they are.
pub const NAMED: [&str; 6] = [CONFIG, TENSORS, TEMPLATE, TOKENIZER_CONFIG, GENERATION, TOKENIZER];

/// Stands for an uploaded pickle, which is not kept.
pub const PICKLE_MARK: &str = "adapter_model.bin";

/// Separates this hash from every other use of SHA-256.
pub const DOMAIN: &[u8] = b"polylora adapter 1\0";
pub const PICKLES: [&str; 5] = [".bin", ".pt", ".pth", ".ckpt", ".pkl"];

/// A file of ours that cannot be read. Names only the file, never the server's directory.
pub fn unreadable(path: &Path, e: &std::io::Error) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Error::fault(format!("cannot read `{name}` of the adapter: {e}"))
}
