//! What several test binaries share. Each binary uses a part of it.
#![allow(dead_code, reason = "each test binary uses its own part of this module")]

pub mod adapters;
pub mod bank;
pub mod live;
pub mod runner;
pub mod server;
pub mod tiny;

/// The directory of a sample adapter, or of one that only tests use.
pub fn golden_adapter(name: &str) -> std::path::PathBuf {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let sample = root.join("adapters").join(name);
    if sample.is_dir() { sample } else { root.join("tests/golden/adapters").join(name) }
}
