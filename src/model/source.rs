//! Where `--model` leads: a path, a Hub id, or the demo model by name, obtained once and cached.

use crate::error::Result;
use std::path::PathBuf;

/// Name of the demo model.
pub const DEMO: &str = "smollm2-135m-instruct";

/// A model to open and the name it is served under.
#[derive(Debug, Clone)]
pub struct Located {
    pub path: PathBuf,
    /// Default served name: the demo's name, the Hub id, or the file or directory stem.
    pub name: String,
}

/// Resolves `--model`: an existing path; the demo's name; `org/name[@revision]` on the Hub (cache first, offline once
/// cached). Downloads show a progress bar on stderr, resume, and are verified.
pub fn locate(_model: &str) -> Result<Located> {
    unimplemented!()
}
