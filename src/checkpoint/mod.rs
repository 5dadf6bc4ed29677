//! Checkpoints of base models: where they come from, and what is in their files.
//!
//! Owns the readers of Hugging Face directories and of GGUF, and downloads. Never computes with a
//! weight: it packs them as the kernels store them. The thing to know: a reader gives a shape,
//! tensors and a tokenizer, and everything it does not understand it refuses by name.

mod config_json;
mod gguf;
mod gguf_blocks;
mod gguf_shape;
mod gguf_tokenizer;
mod hf;
mod open;
mod parts;
pub mod source;
mod stored;
mod weight_file;

pub use config_json::{invalid, unsupported};
pub use open::Checkpoint;
pub use parts::TextSource;
pub use stored::Scratch;
