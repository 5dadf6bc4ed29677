//! What the tests share: tiny models, random adapters, the program as a child, and ways to talk to
//! it. Never knows an expected result.

pub mod adapters;
pub mod bank;
pub mod command;
pub mod decoder;
pub mod files;
pub mod fuzz;
pub mod gguf;
pub mod live;
pub mod peft;
pub mod runner;
pub mod server;
pub mod soak;
pub mod tiny;
pub mod training;

use serde_json::Value;
use std::path::{Path, PathBuf};

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The beginning of a client of a server here.
pub fn client() -> reqwest::ClientBuilder {
    polylora::tls::client().no_proxy()
}

/// The directory of a sample adapter, or of one that only tests use.
pub fn golden_adapter(name: &str) -> PathBuf {
    let sample = root().join("adapters").join(name);
    if sample.is_dir() { sample } else { root().join("tests/golden/adapters").join(name) }
}

/// A file of `tests/golden`.
pub fn golden(name: &str) -> Value {
    let text = std::fs::read(root().join("tests/golden").join(name)).expect("a golden file");
    serde_json::from_slice(&text).expect("golden JSON")
}
