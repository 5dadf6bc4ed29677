//! Writes plain PEFT: what a merge or a trainer made becomes the two files of an adapter.
//!
//! Owns the names, the patterns and the order in the files. Never decides a value. The thing to
//! know: alpha equals the rank everywhere, so the factors' product is the whole change, and equal
//! factors become equal bytes.

use super::factors::{FactorSite, ModuleFactors};
use super::names::{CONFIG, TENSORS};
use crate::database::write_failed;
use crate::error::{Error, Result};
use safetensors::SafeTensorError;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, which must exist. Every
/// scale must be 1. Errors: `storage_full`, or `internal_error` when the files cannot be written.
pub fn write(
    dir: &Path,
    modules: &BTreeMap<FactorSite, ModuleFactors>,
    base_model: Option<&str>,
) -> Result<()> {
    let tensors = modules.iter().flat_map(|(site, m)| tensors(*site, m));
    write_files(dir, &config(modules, base_model), tensors)
}

/// Writes a config and tensors under PEFT's names into `dir`. Errors: as [`write`].
pub fn write_files<'a>(
    dir: &Path,
    config: &Value,
    tensors: impl Iterator<Item = (String, Stored<'a>)>,
) -> Result<()> {
    let what = |what: &str| format!("cannot write {what} in {}", dir.display());
    let failed = |name: &str, e: std::io::Error| write_failed(&what(name), &e);
    std::fs::write(dir.join(CONFIG), format!("{config:#}\n")).map_err(|e| failed(CONFIG, e))?;
    safetensors::serialize_to_file(tensors, None, &dir.join(TENSORS)).map_err(|e| match e {
        SafeTensorError::IoError(e) => failed(TENSORS, e),
        e => Error::fault(format!("{}: {e}", what(TENSORS))),
    })?;
    // It makes the file its owner's only; the directory decides who reads an adapter.
    std::fs::metadata(dir.join(CONFIG))
        .and_then(|m| std::fs::set_permissions(dir.join(TENSORS), m.permissions()))
        .map_err(|e| failed(TENSORS, e))
}

/// The config that PEFT and this server read: alpha = r everywhere.
fn config(modules: &BTreeMap<FactorSite, ModuleFactors>, base_model: Option<&str>) -> Value {
    let rank = usual(modules.values().map(|m| m.dims.rank));
    let by_name = by_name(modules);
    let layers = modules.keys().filter_map(|p| p.layer()).max().map_or(0, |l| l + 1);
    let mut targets: Vec<String> = Vec::new();
    let mut ranks = BTreeMap::new();
    for (name, places) in &by_name {
        let everywhere = places.len() == layers || places[0].0.layer().is_none();
        if everywhere {
            targets.push((*name).to_owned());
        } else {
            targets.extend(places.iter().map(|(p, _)| p.path()));
        }
        let first = places[0].1;
        if everywhere && places.iter().all(|(_, r)| *r == first) {
            ranks.extend((first != rank).then(|| ((*name).to_owned(), first)));
        } else {
            let others = places.iter().filter(|(_, r)| *r != rank);
            ranks.extend(others.map(|(p, r)| (p.path().replace('.', "\\."), *r)));
        }
    }
    targets.sort();
    let pattern: Map<String, Value> = ranks.into_iter().map(|(k, r)| (k, json!(r))).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
    })
}

/// Modules of one name with their ranks, by name.
fn by_name(
    modules: &BTreeMap<FactorSite, ModuleFactors>,
) -> BTreeMap<&str, Vec<(FactorSite, usize)>> {
    let mut out: BTreeMap<&str, Vec<(FactorSite, usize)>> = BTreeMap::new();
    for (site, m) in modules {
        out.entry(site.name()).or_default().push((*site, m.dims.rank));
    }
    out
}

/// The most frequent value; the larger of two equally frequent ones. 1 for none.
fn usual(ranks: impl Iterator<Item = usize>) -> usize {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    ranks.for_each(|r| *counts.entry(r).or_default() += 1);
    counts.into_iter().max_by_key(|(rank, count)| (*count, *rank)).map_or(1, |(rank, _)| rank)
}

/// A and B under PEFT's names.
fn tensors(site: FactorSite, m: &ModuleFactors) -> [(String, Stored<'_>); 2] {
    let [a, b] = match site {
        FactorSite::Embedding => ["lora_embedding_A", "lora_embedding_B"],
        FactorSite::Site(_) => ["lora_A.weight", "lora_B.weight"],
    };
    let name = |part: &str| format!("base_model.model.{}.{part}", site.path());
    let d = m.dims;
    let stored = |shape: [usize; 2], values| Stored { shape: shape.to_vec(), values };
    [
        (name(a), stored([d.rank, d.inputs], Cow::Borrowed(&m.a[..]))),
        (name(b), stored([d.outputs, d.rank], Cow::Borrowed(&m.b[..]))),
    ]
}

/// One f32 tensor that is made into bytes when it is written.
pub struct Stored<'a> {
    pub shape: Vec<usize>,
    pub values: Cow<'a, [f32]>,
}

impl safetensors::View for Stored<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        safetensors::Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}
