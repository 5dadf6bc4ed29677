//! What both file formats become: which tensor of the file changes what, and by how much.
//!
//! Owns the common form and the checks that do not depend on the format. Never reads values. The
//! thing to know: a `Parsed` is complete; every tensor of the file is mentioned in it once.

use super::config::RANKS;
use super::modules::{Module, short};
use super::summary::Summary;
use super::tensors::{TensorFile, TensorId};
use crate::error::{Error, Result};
use crate::shape::{ModelShape, Norm, Projection, Site};
use std::collections::BTreeMap;

/// A checked adapter whose values are still in the file.
pub struct Parsed {
    pub summary: Summary,
    pub file: TensorFile,
    pub sites: BTreeMap<Site, SiteParts>,
    pub embedding: Option<Factors>,
    /// Whole norm weights.
    pub norms: BTreeMap<Norm, TensorId>,
    /// Copies of base weights that some tools save beside the factors.
    pub copies: Vec<BaseCopy>,
}

/// The tensors of one site.
#[derive(Debug, Default)]
pub struct SiteParts {
    /// Module path as the file has it, for messages.
    pub path: String,
    pub factors: Option<Factors>,
    /// DoRA's magnitude `[O]`.
    pub magnitude: Option<TensorId>,
    /// `lora_B.bias` `[O]`, to be scaled.
    pub factor_bias: Option<TensorId>,
    /// The trained bias of the base `[O]`.
    pub base_bias: Option<TensorId>,
}

/// Two factors and what their product is multiplied with.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `[R, I]`
    pub a: TensorId,
    /// `[O, R]`
    pub b: TensorId,
    pub rank: usize,
    pub scale: f32,
    pub layout: Layout,
}

/// How the factors lie when not as PEFT has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Peft,
    /// Rows of B in GGUF's order for rotated heads of the llama architecture.
    RotatedRows {
        heads: usize,
    },
    /// A is `[I, R]` (GGUF's token table).
    TransposedA,
}

/// A base weight found in the file.
#[derive(Debug, Clone, Copy)]
pub struct BaseCopy {
    pub tensor: TensorId,
    pub table: Table,
    /// `….base_layer.weight`: training could not have changed it. A plain `….weight` it could.
    pub frozen: bool,
}

/// The two tables that are saved with adapters on them. `[V, H]` both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    Head,
    Embedding,
}

/// Refuses a tensor whose shape is not the expected one.
pub fn check_shape(file: &TensorFile, id: TensorId, expected: &[usize]) -> Result<()> {
    let tensor = file.tensor(id);
    if tensor.shape == expected {
        return Ok(());
    }
    Err(Error::unprocessable(
        "shape_mismatch",
        format!("tensor `{}` has shape {:?}, expected {expected:?}", tensor.name, tensor.shape),
    ))
}

/// Refuses ranks the server does not multiply with, naming the tensor.
pub fn check_rank(file: &TensorFile, id: TensorId, rank: usize) -> Result<()> {
    if RANKS.contains(&(rank as u64)) {
        return Ok(());
    }
    Err(Error::unprocessable(
        "rank_out_of_range",
        format!("tensor `{}` has rank {rank}, not from 1 to 512", file.tensor(id).name),
    ))
}

/// What the adapter says of itself.
pub fn summarize(
    method: &str,
    base_model: Option<String>,
    sites: &BTreeMap<Site, SiteParts>,
    embedding: Option<&Factors>,
    norms: &BTreeMap<Norm, String>,
    parameters: u64,
) -> Summary {
    let factors = sites.values().filter_map(|s| s.factors.as_ref());
    let mut targets: Vec<String> = Vec::new();
    for p in Projection::ALL {
        if sites.keys().any(|s| matches!(s, Site::Layer(_, q) if *q == p)) {
            targets.push(short(p.module()).to_owned());
        }
    }
    if sites.contains_key(&Site::Head) {
        targets.push("lm_head".into());
    }
    if embedding.is_some() {
        targets.push("embed_tokens".into());
    }
    for path in norms.values() {
        let name = short(path).to_owned();
        if !targets.contains(&name) {
            targets.push(name);
        }
    }
    Summary {
        method: method.to_owned(),
        rank_max: factors.chain(embedding).map(|f| f.rank).max().unwrap_or(0),
        sites: sites.len() + usize::from(embedding.is_some()),
        targets,
        parameters,
        base_model,
        ..Summary::default()
    }
}

/// (inputs, outputs) of the module's linear map, as its factors see it.
pub fn dims(shape: &ModelShape, module: Module) -> (usize, usize) {
    match module {
        Module::Site(site) => shape.site_dims(site),
        Module::Norm(norm) => (1, super::modules::norm_len(shape, norm)),
        Module::Embedding => (shape.vocab, shape.hidden),
    }
}
