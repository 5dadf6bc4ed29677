//! Adapters at a start: those that the operator names, and whose the ones are that are there.
//!
//! Owns the copy of a directory into an upload. Never publishes by another way than an upload's.
//! The thing to know: a start undoes nothing that was published since the last one.

use crate::access::Access;
use crate::adapters::format::files::canonical_name;
use crate::adapters::registry::Registry;
use crate::adapters::version::{Entry, Lineage, Publish, START};
use crate::config::Adapters;
use crate::database::FULL;
use crate::error::{Error, Result};
use crate::jobs::Jobs;
use std::path::{Path, PathBuf};

/// Brings in the adapters that the operator names. Errors as an upload's, but a disk that is full
/// stops no start: what is on it is served all the same.
pub async fn load_adapters(registry: &Registry, named: &Adapters) -> Result<()> {
    for (name, from) in named {
        match load_adapter(registry, name, from).await {
            Err(error) if error.code == FULL => tracing::error!(%error, "not brought in"),
            loaded => drop(loaded?),
        }
    }
    Ok(())
}

/// Brings an adapter in as an upload, but a restart undoes no upload, merge or
/// rollback: only a directory that has changed is news. A refusal stops the start and names the
/// adapter.
async fn load_adapter(registry: &Registry, name: &str, from: &Path) -> Result<Entry> {
    let blame =
        |e: Error| Error { message: format!("adapter {name} ({}): {e}", from.display()), ..e };
    let staging = registry.stage(name).map_err(blame)?;
    let files = copy_files(from, &staging.dir);
    let files = files.map_err(|e| blame(Error::invalid("invalid_config", e)))?;
    let lineage = Lineage::Uploaded { by: Some(START.to_owned()), files };
    let how = Publish { lineage, yields: true, ..Publish::default() };
    registry.publish(staging, how).await.map_err(blame)
}

/// Names from before names had owners go to the tenant of the key that uploaded them, or of the job
/// that made them, where these are still known.
pub async fn settle_owners(registry: &Registry, jobs: &Jobs, access: &Access) -> Result<()> {
    let of = |lineage: &Lineage| match lineage {
        Lineage::Uploaded { by: Some(key), .. } => access.key(key).ok()?.tenant,
        Lineage::Merged { job: Some(job), .. } | Lineage::Trained { job, .. } => {
            jobs.owner_of(job)?.tenant
        }
        _ => None,
    };
    registry.settle_owners(of).await
}

/// Copies what belongs to an adapter and nothing else; returns the names. Weights in other formats
/// come along to be refused by name.
fn copy_files(from: &Path, to: &Path) -> Result<Vec<String>, String> {
    let ours = |path: &Path| {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        canonical_name(name).is_some()
            || (name.starts_with("adapter_model.") && !name.ends_with(".json"))
    };
    let files: Vec<PathBuf> = if from.is_dir() {
        let entries = std::fs::read_dir(from).map_err(|e| format!("cannot be read: {e}"))?;
        entries.flatten().map(|e| e.path()).filter(|p| p.is_file() && ours(p)).collect()
    } else {
        vec![from.to_owned()]
    };
    if files.is_empty() {
        return Err("no adapter_config.json, adapter_model.safetensors or .gguf in it".to_owned());
    }
    let mut names = Vec::new();
    for file in files {
        let name = file.file_name().unwrap_or_default();
        std::fs::copy(&file, to.join(name)).map_err(|e| format!("{}: {e}", file.display()))?;
        names.push(name.to_string_lossy().into_owned());
    }
    Ok(names)
}
