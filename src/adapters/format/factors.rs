//! Factors as they lie in the file: for whoever computes with adapters instead of serving them.
//!
//! Owns the way from an adapter's directory to one module's A, B and scale, and the shape of a base
//! as far as its adapters show it. Never folds a scale in. The thing to know: only what is a
//! product of two factors comes out here; `beyond_factors` names what else an adapter holds.

use super::modules::short;
use super::parsed::{Factors, Parsed};
use super::tensors::TensorFile;
use super::{AdapterFiles, FactorFiles, Summary, parse, prepare, safetensors};
use crate::error::{Error, Result};
use crate::shape::{Activation, ModelShape, Rope, RopeScaling, Site};
use std::path::Path;

/// A module that factors can sit on. The order is the order of merging and of reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FactorSite {
    Site(Site),
    /// `embed_tokens`: A is `[R, V]`, B is `[H, R]`.
    Embedding,
}

impl FactorSite {
    /// Hugging Face's module path, e.g. `model.layers.3.self_attn.q_proj`.
    pub fn path(self) -> String {
        match self {
            Self::Site(Site::Layer(l, p)) => format!("model.layers.{l}.{}", p.module()),
            Self::Site(Site::Head) => "lm_head".into(),
            Self::Embedding => "model.embed_tokens".into(),
        }
    }

    /// Last part of the path, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Site(Site::Layer(_, p)) => short(p.module()),
            Self::Site(Site::Head) => "lm_head",
            Self::Embedding => "embed_tokens",
        }
    }

    /// The decoder layer, where it is in one.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Site(Site::Layer(l, _)) => Some(l),
            _ => None,
        }
    }
}

/// Sizes of one module's factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactorDims {
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
}

/// One module's factors: its weight changes by scale · B · A.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleFactors {
    pub dims: FactorDims,
    /// `[R, I]`
    pub a: Vec<f32>,
    /// `[O, R]`
    pub b: Vec<f32>,
    pub scale: f32,
}

/// An adapter whose header was read and checked; values are still in the file.
pub struct OpenAdapter {
    parsed: Parsed,
    modules: Vec<(FactorSite, FactorDims)>,
}

/// Opens the adapter in `dir` and checks its names and shapes against `shape`. Errors: every
/// refusal code of `docs/errors.md` but those that need values.
pub fn open(dir: &Path, shape: &ModelShape) -> Result<OpenAdapter> {
    let parsed = parse(&AdapterFiles::find(dir)?, shape)?;
    let dims = |f: &Factors, (inputs, outputs)| FactorDims { rank: f.rank, inputs, outputs };
    let mut modules: Vec<(FactorSite, FactorDims)> = Vec::new();
    for (&site, parts) in &parsed.sites {
        let factors = parts.factors.as_ref();
        modules.extend(factors.map(|f| (FactorSite::Site(site), dims(f, shape.site_dims(site)))));
    }
    let table = (shape.vocab, shape.hidden);
    modules.extend(parsed.embedding.as_ref().map(|f| (FactorSite::Embedding, dims(f, table))));
    Ok(OpenAdapter { parsed, modules })
}

impl OpenAdapter {
    pub fn summary(&self) -> &Summary {
        &self.parsed.summary
    }

    /// Every module with factors, in the order of `FactorSite`.
    pub fn modules(&self) -> &[(FactorSite, FactorDims)] {
        &self.modules
    }

    /// Reads one module's factors; `None` where the adapter has none. Errors: `non_finite_values`.
    pub fn read(&self, site: FactorSite) -> Result<Option<ModuleFactors>> {
        let Some((_, dims)) = self.modules.iter().find(|(p, _)| *p == site) else {
            return Ok(None);
        };
        let factors = match site {
            FactorSite::Site(site) => self.parsed.sites.get(&site).and_then(|s| s.factors.as_ref()),
            FactorSite::Embedding => self.parsed.embedding.as_ref(),
        };
        let factors = factors.expect("a module is listed for its factors");
        let (a, b) = prepare::read_factors(&self.parsed, factors)?;
        Ok(Some(ModuleFactors { dims: *dims, a, b, scale: factors.scale }))
    }

    /// DoRA's magnitudes of one module, `[O]`; `None` where it has none. Errors:
    /// `non_finite_values`.
    pub fn magnitude(&self, site: Site) -> Result<Option<Vec<f32>>> {
        let id = self.parsed.sites.get(&site).and_then(|parts| parts.magnitude);
        id.map(|id| self.parsed.file.read(id)).transpose()
    }

    /// What the adapter changes that is no product of two factors, in words: DoRA's magnitudes,
    /// biases, replaced norms, a table that may have been trained.
    pub fn beyond_factors(&self) -> Option<String> {
        let id = self.parsed.sites.values().find_map(|parts| parts.magnitude);
        let of = id.map(|id| format!("DoRA's magnitudes (`{}`)", self.parsed.file.tensor(id).name));
        of.or_else(|| self.beyond_magnitudes())
    }

    /// The same, but for DoRA's magnitudes.
    pub fn beyond_magnitudes(&self) -> Option<String> {
        let name = |id| &self.parsed.file.tensor(id).name;
        for parts in self.parsed.sites.values() {
            if let Some(id) = parts.factor_bias.or(parts.base_bias) {
                return Some(format!("a bias (`{}`)", name(id)));
            }
        }
        if let Some(&id) = self.parsed.norms.values().next() {
            return Some(format!("a replaced norm (`{}`)", name(id)));
        }
        let copy = self.parsed.copies.iter().find(|c| !c.frozen)?;
        Some(format!("a whole table (`{}`)", name(copy.tensor)))
    }
}

/// The base model's shape as far as the adapters in `dirs` show it: enough to check and merge them,
/// not to run a model. Errors: `base_mismatch` when two tensors need different bases, and what
/// opening the files refuses.
pub fn infer_shape(dirs: &[&Path]) -> Result<ModelShape> {
    let mut seen = Seen::default();
    for dir in dirs {
        let named = |e: Error| Error { message: format!("{}: {}", dir.display(), e.message), ..e };
        let found = AdapterFiles::find(dir).map_err(named)?;
        let FactorFiles::Peft { tensors, .. } = found.factors else {
            return Err(Error::invalid(
                "invalid_merge",
                format!("{} is a GGUF file: name the base with --model", dir.display()),
            ));
        };
        let file = safetensors::open(&tensors).map_err(named)?;
        seen.file(&file, &dir.display().to_string())?;
    }
    let Seen { layers, sizes } = seen;
    let size = |what: Size| sizes[what as usize].as_ref().map_or(1, |(n, _)| *n);
    Ok(ModelShape {
        family: "unknown",
        layers,
        hidden: size(Size::Hidden),
        ffn: size(Size::Ffn),
        heads: size(Size::Query),
        kv_heads: size(Size::KeyValue),
        head_dim: 1,
        vocab: size(Size::Vocab),
        context: 0,
        norm_eps: 0.0,
        rope: Rope { theta: 0.0, scaling: RopeScaling::None },
        rope_local: None,
        windows: vec![None; layers],
        activation: Activation::Silu,
        attention_scale: 1.0,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        post_norms: true,
        norm_plus_one: false,
        embedding_scale: 1.0,
        tied_head: true,
    })
}

/// A number that several tensors agree on.
#[derive(Clone, Copy)]
enum Size {
    Hidden,
    Ffn,
    Query,
    KeyValue,
    Vocab,
}

/// Sizes found so far, each with the tensor that showed it.
#[derive(Default)]
struct Seen {
    layers: usize,
    sizes: [Option<(usize, String)>; 5],
}

impl Seen {
    fn file(&mut self, file: &TensorFile, source: &str) -> Result<()> {
        for tensor in &file.tensors {
            let key = tensor.name.strip_prefix("base_model.model.").unwrap_or(&tensor.name);
            // The axis that is not the rank: A's inputs, B's outputs.
            let parts = [(".lora_A.weight", 1), (".lora_B.weight", 0)];
            let tables = [(".lora_embedding_A", 1), (".lora_embedding_B", 0)];
            let found = parts.into_iter().chain(tables);
            let Some((path, axis)) = found
                .filter(|_| tensor.shape.len() == 2)
                .find_map(|(end, axis)| Some((key.strip_suffix(end)?, axis)))
            else {
                continue;
            };
            if let Some(layer) = layer_of(path) {
                self.layers = self.layers.max(layer + 1);
            }
            if let Some(size) = size_of(path, axis) {
                self.agree(size, tensor.shape[axis], format!("`{}` of {source}", tensor.name))?;
            }
        }
        Ok(())
    }

    fn agree(&mut self, size: Size, n: usize, tensor: String) -> Result<()> {
        match &self.sizes[size as usize] {
            Some((known, other)) if *known != n => Err(Error::unprocessable(
                "base_mismatch",
                format!(
                    "{tensor} is made for a size of {n} where {other} has {known}: they are not \
                     adapters of one base model"
                ),
            )),
            _ => {
                self.sizes[size as usize] = Some((n, tensor));
                Ok(())
            }
        }
    }
}

fn layer_of(path: &str) -> Option<usize> {
    let (number, _) = path.split_once("layers.")?.1.split_once('.')?;
    number.parse().ok().filter(|l| *l < 65_536)
}

/// Which number of the base the axis of a factor shows: 1 is A's, 0 is B's.
fn size_of(path: &str, axis: usize) -> Option<Size> {
    let (input, output) = match short(path) {
        "q_proj" => (Size::Hidden, Size::Query),
        "k_proj" | "v_proj" => (Size::Hidden, Size::KeyValue),
        "o_proj" => (Size::Query, Size::Hidden),
        "gate_proj" | "up_proj" => (Size::Hidden, Size::Ffn),
        "down_proj" => (Size::Ffn, Size::Hidden),
        "lm_head" => (Size::Hidden, Size::Vocab),
        "embed_tokens" => (Size::Vocab, Size::Hidden),
        _ => return None,
    };
    Some(if axis == 1 { input } else { output })
}
