//! What training needs of the server.
//!
//! Owns the list. Never uses any of it.

use crate::engine::EngineHandle;
use crate::files::Files;
use crate::model::weights::Weights;
use crate::text::Text;
use std::path::PathBuf;
use std::sync::Arc;

/// Jobs that may hold memory at once: as many as are under way.
const SHARES: u64 = 2;

/// See the file's head.
#[derive(Clone)]
pub struct Means {
    pub weights: Arc<Weights>,
    pub text: Text,
    pub files: Files,
    pub engine: EngineHandle,
    /// Of the base, as the API calls it.
    pub base_name: String,
    /// Most tokens of an example.
    pub context: usize,
    /// Of the engine's device.
    pub threads: usize,
    /// Memory of all jobs together.
    pub train_bytes: u64,
    /// Where states of jobs are kept.
    pub directory: PathBuf,
}

impl Means {
    /// Memory of one job.
    pub fn bytes_max(&self) -> u64 {
        self.train_bytes / SHARES
    }
}
