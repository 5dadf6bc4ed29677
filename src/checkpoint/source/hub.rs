//! Models of the Hugging Face Hub, in the cache that its own tools share.
//!
//! Owns the choice of files. Never reads one but the index of shards. The thing to know: a snapshot
//! that holds all a model needs is used without a request; otherwise the revision is resolved to a
//! commit first, the small files come before the weights, and the branch points to the commit only
//! when all of it is there, so weights in the cache mean a whole model.

use super::download::{Progress, remove, sha256_of};
use super::locations::{Locations, lock};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Needed of a model kept as safetensors.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Taken where the repository has them.
const OPTIONAL: [&str; 4] = [
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const RETRIES: usize = 4;

/// `org/name[@revision]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    pub repo: String,
    pub revision: String,
}

impl HubId {
    /// `None` where it cannot be one.
    pub fn parse(model: &str) -> Option<Self> {
        let (repo, revision) = model.split_once('@').unwrap_or((model, "main"));
        let (organisation, name) = repo.split_once('/')?;
        let is_word = |word: &str| {
            !word.is_empty()
                && !word.starts_with('.')
                && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        // A revision becomes a path in the cache.
        (is_word(organisation) && is_word(name) && revision.split('/').all(is_word))
            .then(|| Self { repo: repo.into(), revision: revision.into() })
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, revision.into())
    }
}

/// The snapshot's directory, or the GGUF file in it. Errors say why, for a person.
pub fn obtain(locations: &Locations, id: &HubId) -> Result<PathBuf, String> {
    let directory = locations.hub_cache.join(id.at(&id.revision).folder_name());
    if let Some(path) = cached(&directory, &id.revision) {
        return Ok(path);
    }
    if locations.hub_offline {
        return Err(format!(
            "{} is not complete in the cache {} and HF_HUB_OFFLINE forbids to ask",
            id.repo,
            locations.hub_cache.display()
        ));
    }
    std::fs::create_dir_all(&directory)
        .map_err(|e| format!("cannot make the directory {}: {e}", directory.display()))?;
    let _lock = lock(&directory.join("polylora.lock"))?;
    match cached(&directory, &id.revision) {
        Some(path) => Ok(path),
        None => download(locations, id),
    }
}

/// What the cache holds of the revision, if that is a whole model.
fn cached(directory: &Path, revision: &str) -> Option<PathBuf> {
    let commit = std::fs::read_to_string(directory.join("refs").join(revision))
        .map_or_else(|_| revision.to_owned(), |text| text.trim().to_owned());
    let snapshot = directory.join("snapshots").join(commit);
    let has = |name: &str| snapshot.join(name).is_file();
    if REQUIRED.iter().all(|name| has(name)) {
        let shards = shards(&snapshot.join(INDEX)).ok();
        let all_shards = shards.is_some_and(|names| names.iter().all(|name| has(name)));
        if has(WEIGHTS) || all_shards {
            return Some(snapshot);
        }
    }
    let mut ggufs = std::fs::read_dir(&snapshot)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"));
    let only = ggufs.next()?;
    match ggufs.next() {
        None => Some(only),
        Some(_) => None,
    }
}

/// The files an index of shards names.
fn shards(index: &Path) -> Result<BTreeSet<String>, String> {
    let text = std::fs::read_to_string(index)
        .map_err(|e| format!("cannot read {}: {e}", index.display()))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| format!("{INDEX} is no JSON: {e}"))?;
    let map =
        json["weight_map"].as_object().ok_or_else(|| format!("{INDEX} has no `weight_map`"))?;
    let names: BTreeSet<String> =
        map.values().filter_map(|name| name.as_str().map(str::to_owned)).collect();
    match names.iter().find(|name| name.contains(['/', '\\'])) {
        Some(name) => Err(format!("{INDEX} names `{name}`, which is not beside it")),
        None => Ok(names),
    }
}

fn download(locations: &Locations, id: &HubId) -> Result<PathBuf, String> {
    let cache = Cache::new(locations.hub_cache.clone());
    let api = api(locations, &cache)?;
    let info = api
        .repo(id.at(&id.revision))
        .info()
        .map_err(|e| format!("{} at `{}`: {e}", id.repo, id.revision))?;
    let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
    let snapshot = Snapshot {
        api: api.repo(id.at(&info.sha)),
        directory: cache.repo(id.at(&info.sha)).pointer_path(&info.sha),
    };
    let path = if has(WEIGHTS) || has(INDEX) {
        if let Some(missing) = REQUIRED.iter().find(|name| !has(name)) {
            return Err(format!("{} has no {missing}", id.repo));
        }
        let small = REQUIRED.iter().chain(&OPTIONAL).filter(|name| has(name));
        for name in small {
            snapshot.take(name)?;
        }
        if has(INDEX) {
            snapshot.take(INDEX)?;
            for shard in shards(&snapshot.directory.join(INDEX))? {
                snapshot.take(&shard)?;
            }
        } else {
            snapshot.take(WEIGHTS)?;
        }
        snapshot.directory
    } else {
        let ggufs: Vec<&str> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.as_str())
            .filter(|name| name.ends_with(".gguf") && !name.contains('/'))
            .collect();
        match ggufs.as_slice() {
            [only] => snapshot.take(only)?,
            [] => {
                return Err(format!(
                    "{} holds neither {WEIGHTS} nor {INDEX} nor a .gguf file",
                    id.repo
                ));
            }
            several => {
                return Err(format!(
                    "{} holds several .gguf files; download one of them and give its path: {}",
                    id.repo,
                    several.join(", ")
                ));
            }
        }
    };
    cache
        .repo(id.at(&id.revision))
        .create_ref(&info.sha)
        .map_err(|e| format!("cannot note the revision in the cache: {e}"))?;
    Ok(path)
}

fn api(locations: &Locations, cache: &Cache) -> Result<Api, String> {
    let token = locations.hub_token.clone().or_else(|| cache.token());
    let mut builder = ApiBuilder::from_cache(cache.clone())
        .with_token(token)
        .with_progress(false)
        .with_retries(RETRIES)
        .with_user_agent("polylora", env!("CARGO_PKG_VERSION"));
    if let Some(endpoint) = &locations.hub_endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').into());
    }
    builder.build().map_err(|e| e.to_string())
}

/// A commit of a repository, on the Hub and in the cache.
struct Snapshot {
    api: ApiRepo,
    directory: PathBuf,
}

impl Snapshot {
    /// The file's path in the cache, downloaded if it is not there. Large files are named by their
    /// SHA-256 on the Hub and are checked against it.
    fn take(&self, name: &str) -> Result<PathBuf, String> {
        let path = self.directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
        let path = self
            .api
            .download_with_progress(name, Progress::new(name))
            .map_err(|e| format!("{name}: {e}"))?;
        let blob = path.canonicalize().map_err(|e| format!("{name} in the cache: {e}"))?;
        let etag = blob.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let is_sha256 = etag.len() == 64 && etag.chars().all(|c| c.is_ascii_hexdigit());
        if is_sha256 {
            let found = sha256_of(&blob)?;
            if found != etag {
                remove(&path);
                remove(&blob);
                return Err(format!("{name} has SHA-256 {found}, not {etag}, and was removed"));
            }
        }
        Ok(path)
    }
}
