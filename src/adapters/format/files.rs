//! Which files make an adapter, and the digest over them.
//!
//! Owns the canonical names and their order. Never judges what is in a file. The thing to know:
//! nothing but these files is part of an adapter, so nothing but these files is hashed, stored or
//! read; a `tokenizer_config.json` is one of them only where there is a chat template, and
//! `tokenizer.json` is compared with the base's and not kept.

use super::names::*;
use super::tokenizer_config::holds_template;
use crate::adapters::Digest;
use crate::error::{Error, Result};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where the factors are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FactorFiles {
    Peft { config: PathBuf, tensors: PathBuf },
    Gguf { path: PathBuf },
}

/// The files of one adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    pub factors: FactorFiles,
    pub template: Option<PathBuf>,
    /// Where there is a template, here or in it.
    pub tokenizer_config: Option<PathBuf>,
    pub generation: Option<PathBuf>,
}

/// The name under which an uploaded file is kept; `None` for a file that is no part of an adapter.
pub fn canonical_name(uploaded: &str) -> Option<&'static str> {
    if let Some(name) = NAMED.iter().find(|n| **n == uploaded) {
        return Some(name);
    }
    match uploaded {
        _ if is_plain(uploaded) && uploaded.ends_with(".gguf") => Some(GGUF),
        _ => None,
    }
}

/// Whether a file name is one of torch's pickle containers.
pub fn is_pickle(name: &str) -> bool {
    PICKLES.iter().any(|p| name.ends_with(p))
}

fn is_plain(name: &str) -> bool {
    !name.contains(['/', '\\', '\0'])
}

impl AdapterFiles {
    /// Finds the adapter in a directory. Errors: `pickle_not_allowed`, `missing_file`,
    /// `ambiguous_adapter`, `not_a_regular_file`.
    pub fn find(dir: &Path) -> Result<Self> {
        let names = names(dir)?;
        let factors = FactorFiles::find(dir, &names)?;
        let path = |name: &str| names.iter().any(|n| n == name).then(|| dir.join(name));
        let template = path(TEMPLATE);
        let counts = |p: &PathBuf| template.is_some() || holds_template(p);
        Ok(Self {
            factors,
            tokenizer_config: path(TOKENIZER_CONFIG).filter(counts),
            generation: path(GENERATION),
            template,
        })
    }

    /// Canonical name and path of each file, in the order in which they are hashed.
    pub fn list(&self) -> Vec<(&'static str, &Path)> {
        let mut list = match &self.factors {
            FactorFiles::Peft { config, tensors } => {
                vec![(CONFIG, config.as_path()), (TENSORS, tensors)]
            }
            FactorFiles::Gguf { path } => vec![(GGUF, path.as_path())],
        };
        let more = [
            (TEMPLATE, &self.template),
            (TOKENIZER_CONFIG, &self.tokenizer_config),
            (GENERATION, &self.generation),
        ];
        list.extend(more.into_iter().filter_map(|(name, path)| Some((name, path.as_deref()?))));
        list
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for (_, path) in self.list() {
            sum += fs::metadata(path).map_err(|e| unreadable(path, &e))?.len();
        }
        Ok(sum)
    }

    /// SHA-256(domain ‖ for each file: length of name ‖ name ‖ length of content ‖ content),
    /// lengths as u64 LE.
    pub fn digest(&self) -> Result<Digest> {
        let mut hash = Sha256::new();
        hash.update(DOMAIN);
        let mut block = vec![0; 64 << 10];
        for (name, path) in self.list() {
            let mut file = File::open(path).map_err(|e| unreadable(path, &e))?;
            let len = file.metadata().map_err(|e| unreadable(path, &e))?.len();
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update(len.to_le_bytes());
            loop {
                let n = file.read(&mut block).map_err(|e| unreadable(path, &e))?;
                if n == 0 {
                    break;
                }
                hash.update(&block[..n]);
            }
        }
        Ok(Digest(hash.finalize().into()))
    }
}

/// Names in the directory. Errors: `not_a_regular_file`.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| unreadable(dir, &e))? {
        let entry = entry.map_err(|e| unreadable(dir, &e))?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let part = canonical_name(&name).is_some();
        if part && !entry.file_type().is_ok_and(|t| t.is_file()) {
            return Err(Error::unprocessable(
                "not_a_regular_file",
                format!("`{name}` must be a regular file, not a link or a directory"),
            ));
        }
        names.push(name);
    }
    Ok(names)
}

impl FactorFiles {
    fn find(dir: &Path, names: &[String]) -> Result<Self> {
        let has = |wanted: &str| names.iter().any(|n| n == wanted);
        let ggufs: Vec<&String> = names.iter().filter(|n| n.ends_with(".gguf")).collect();
        if !ggufs.is_empty() {
            if ggufs.len() > 1 || has(TENSORS) || has(CONFIG) {
                return Err(Error::unprocessable(
                    "ambiguous_adapter",
                    "the adapter must be one .gguf file, or adapter_config.json with \
                     adapter_model.safetensors, not both",
                ));
            }
            let path = dir.join(ggufs[0]);
            return Ok(Self::Gguf { path });
        }
        if has(TENSORS) && has(CONFIG) {
            return Ok(Self::Peft { config: dir.join(CONFIG), tensors: dir.join(TENSORS) });
        }
        if let (false, Some(pickle)) = (has(TENSORS), names.iter().find(|n| is_pickle(n))) {
            return Err(Error::unprocessable(
                "pickle_not_allowed",
                format!(
                    "`{pickle}` is a pickle, which can run code when it is read; save the adapter \
                     with safe_serialization=True and upload adapter_model.safetensors"
                ),
            ));
        }
        let missing = if has(TENSORS) { CONFIG } else { TENSORS };
        Err(Error::unprocessable(
            "missing_file",
            format!(
                "`{missing}` is missing: an adapter is adapter_config.json with \
                 adapter_model.safetensors, or one .gguf file"
            ),
        ))
    }
}

/// Whether a file so named is unpacked.
pub fn is_archive(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [".zip", ".tar", ".tar.gz", ".tgz"].iter().any(|end| name.ends_with(end))
}
