//! The tensors of a PEFT file: each one finds its place, or the adapter is refused.
//!
//! Owns PEFT's key names. Never reads values. The thing to know: the path that PEFT's patterns see
//! is the key without `base_model.model.`, kept as the file has it.

use super::config::{PeftConfig, Targets, TrainedBias, names_module};
use super::modules::{Module, Modules};
use super::parsed::{
    BaseCopy, Factors, Layout, Parsed, SiteParts, Table, check_shape, dims, summarize,
};
use super::tensors::{TensorFile, TensorId};
use crate::error::{Error, Result, brief};
use crate::shape::{ModelShape, Site};
use std::collections::BTreeMap;

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    A,
    B,
    FactorBias,
    Magnitude,
    FrozenWeight,
    Weight,
    Bias,
}

/// Longest first where one ends like another.
const SUFFIXES: [(&str, Role); 12] = [
    (".lora_A.weight", Role::A),
    (".lora_B.weight", Role::B),
    (".lora_B.bias", Role::FactorBias),
    (".lora_embedding_A", Role::A),
    (".lora_embedding_B", Role::B),
    (".lora_magnitude_vector", Role::Magnitude),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".base_layer.weight", Role::FrozenWeight),
    (".base_layer.bias", Role::Bias),
    (".modules_to_save.weight", Role::Weight),
    (".weight", Role::Weight),
    (".bias", Role::Bias),
];

/// The tensors of one module of the file.
#[derive(Default)]
struct Group {
    path: String,
    roles: BTreeMap<Role, TensorId>,
}

/// Maps every tensor. Errors: every tensor code of `docs/errors.md`.
pub fn parse(config: &PeftConfig, file: TensorFile, shape: &ModelShape) -> Result<Parsed> {
    let modules = Modules::new(shape);
    check_saved_modules(config, &modules)?;
    let groups = group(&file, &modules)?;
    check_targets(config, &groups)?;
    let mut parsed = Parsed {
        summary: Default::default(),
        file,
        sites: BTreeMap::new(),
        embedding: None,
        norms: BTreeMap::new(),
        copies: Vec::new(),
    };
    let mut norm_paths = BTreeMap::new();
    for (&module, group) in &groups {
        let place = ModuleTensors { config, shape, file: &parsed.file, module, group };
        match module {
            Module::Norm(norm) => {
                parsed.norms.insert(norm, place.norm()?);
                norm_paths.insert(norm, group.path.clone());
            }
            Module::Embedding => {
                parsed.embedding = place.factors()?;
                parsed.copies.extend(place.copy(Table::Embedding)?);
            }
            Module::Site(site) => {
                if site == Site::Head {
                    parsed.copies.extend(place.copy(Table::Head)?);
                }
                parsed.sites.extend(place.site()?.map(|parts| (site, parts)));
            }
        }
    }
    if parsed.sites.is_empty() && parsed.embedding.is_none() && parsed.norms.is_empty() {
        return Err(Error::unprocessable(
            "empty_adapter",
            "the file holds no tensor that changes the model",
        ));
    }
    check_tying(config, shape, &parsed)?;
    let copied = |id: &TensorId| parsed.copies.iter().any(|c| c.tensor == *id);
    let ids = (0..parsed.file.tensors.len()).filter(|id| !copied(id));
    let parameters = ids.map(|id| parsed.file.tensor(id).values() as u64).sum();
    let method = match (config.dora, config.rslora) {
        (true, _) => "dora",
        (false, true) => "rslora",
        (false, false) => "lora",
    };
    parsed.summary = summarize(
        method,
        config.base_model.clone(),
        &parsed.sites,
        parsed.embedding.as_ref(),
        &norm_paths,
        parameters,
    );
    Ok(parsed)
}

/// Sorts the tensors by module. Errors: `unknown_tensor`, `layer_out_of_range`, `duplicate_tensor`.
fn group(file: &TensorFile, modules: &Modules) -> Result<BTreeMap<Module, Group>> {
    let mut groups: BTreeMap<Module, Group> = BTreeMap::new();
    let mut unknown = Vec::new();
    for (id, tensor) in file.tensors.iter().enumerate() {
        let key = tensor.name.strip_prefix("base_model.model.").unwrap_or(&tensor.name);
        let parts =
            SUFFIXES.iter().find_map(|(suffix, role)| Some((key.strip_suffix(suffix)?, *role)));
        let Some((path, role)) = parts else {
            unknown.push((tensor.name.as_str(), key));
            continue;
        };
        let Some(module) = modules.find(path) else {
            if let Some(layer) = modules.layer_beyond(path) {
                return Err(Error::unprocessable(
                    "layer_out_of_range",
                    format!("tensor `{}` is for layer {layer}, which the model lacks", tensor.name),
                ));
            }
            unknown.push((tensor.name.as_str(), path));
            continue;
        };
        let group = groups.entry(module).or_default();
        if group.path.is_empty() {
            group.path = path.to_owned();
        }
        if group.path != path || group.roles.insert(role, id).is_some() {
            return Err(Error::unprocessable(
                "duplicate_tensor",
                format!("tensor `{}` is for a module that another key names too", tensor.name),
            ));
        }
    }
    match unknown.first() {
        None => Ok(groups),
        Some((_, path)) => {
            let names: Vec<String> =
                unknown.iter().take(5).map(|(n, _)| format!("`{}`", brief(n))).collect();
            Err(Error::unprocessable(
                "unknown_tensor",
                format!(
                    "{} tensors fit no module of this model, first {}; the nearest module is `{}`",
                    unknown.len(),
                    names.join(", "),
                    modules.nearest(path)
                ),
            ))
        }
    }
}

/// Each entry of `target_modules` must have found a tensor.
fn check_targets(config: &PeftConfig, groups: &BTreeMap<Module, Group>) -> Result<()> {
    let with_factors = || groups.values().filter(|g| g.roles.contains_key(&Role::A));
    let missing = match &config.targets {
        Targets::Names(names) => names
            .iter()
            .find(|n| !with_factors().any(|g| names_module(n, &g.path)))
            .map(String::as_str),
        Targets::Regex(pattern) if with_factors().next().is_none() => Some(pattern.text()),
        Targets::AllLinear if with_factors().next().is_none() => Some("all-linear"),
        _ => None,
    };
    match missing {
        None => Ok(()),
        Some(entry) => Err(Error::unprocessable(
            "target_not_found",
            format!("`target_modules` names `{}`, but no tensor is for it", brief(entry)),
        )
        .param("target_modules")),
    }
}

/// `modules_to_save` may name norms and nothing else. PEFT matches its entries as suffixes of the
/// path.
fn check_saved_modules(config: &PeftConfig, modules: &Modules) -> Result<()> {
    for entry in &config.modules_to_save {
        let mut named = modules.all().filter(|(path, _)| path.ends_with(entry.as_str()));
        let other = named.clone().find(|(_, m)| !matches!(m, Module::Norm(_)));
        if other.is_some() || named.next().is_none() {
            return Err(Error::unprocessable(
                "unsupported_modules_to_save",
                format!(
                    "`modules_to_save` names `{}`; only norms can be replaced whole. Train a LoRA \
                     on it instead, or merge it into the base",
                    brief(entry)
                ),
            )
            .param("modules_to_save"));
        }
    }
    Ok(())
}

/// With `ensure_weight_tying` PEFT also ties the factors of tied tables, which is not served.
fn check_tying(config: &PeftConfig, shape: &ModelShape, parsed: &Parsed) -> Result<()> {
    let on_tables = parsed.embedding.is_some() || parsed.sites.contains_key(&Site::Head);
    if config.weight_tying && shape.tied_head && on_tables {
        return Err(Error::unprocessable(
            "unsupported_config_field",
            "`ensure_weight_tying` is set: factors that embed_tokens and lm_head share are \
             not served",
        )
        .param("ensure_weight_tying"));
    }
    Ok(())
}

/// One module of the file on its way into `Parsed`.
struct ModuleTensors<'a> {
    config: &'a PeftConfig,
    shape: &'a ModelShape,
    file: &'a TensorFile,
    module: Module,
    group: &'a Group,
}

impl ModuleTensors<'_> {
    fn role(&self, role: Role) -> Option<TensorId> {
        self.group.roles.get(&role).copied()
    }

    fn name(&self, id: TensorId) -> &str {
        &self.file.tensor(id).name
    }

    fn unknown(&self, id: TensorId, why: &str) -> Error {
        Error::unprocessable(
            "unknown_tensor",
            format!("tensor `{}` has no use: {why}", brief(self.name(id))),
        )
    }

    /// A and B with their shapes, rank and scale checked; `None` when the module has neither.
    fn factors(&self) -> Result<Option<Factors>> {
        let (a, b) = match (self.role(Role::A), self.role(Role::B)) {
            (Some(a), Some(b)) => (a, b),
            (None, None) => {
                let stray = self.role(Role::Magnitude).or(self.role(Role::FactorBias));
                return stray.map_or(Ok(None), |id| Err(self.missing(id, "its lora_A and lora_B")));
            }
            (Some(a), None) => return Err(self.missing(a, "its lora_B")),
            (None, Some(b)) => return Err(self.missing(b, "its lora_A")),
        };
        self.check_kind(a, b)?;
        let path = &self.group.path;
        if !self.config.targets_module(path)? {
            return Err(
                self.unknown(a, "`target_modules` and its restrictions leave this module out")
            );
        }
        let rank = self.config.rank_of(path)?;
        let (inputs, outputs) = dims(self.shape, self.module);
        check_shape(self.file, a, &[rank, inputs])?;
        check_shape(self.file, b, &[outputs, rank])?;
        Ok(Some(Factors { a, b, rank, scale: self.config.scale(path)?, layout: Layout::Peft }))
    }

    /// Factors of the embedding have names of their own, and DoRA is not defined on it here.
    fn check_kind(&self, a: TensorId, b: TensorId) -> Result<()> {
        let embedding = self.module == Module::Embedding;
        for id in [a, b] {
            if self.name(id).contains(".lora_embedding_") != embedding {
                return Err(self.unknown(id, "this kind of factor does not fit the module"));
            }
        }
        if !embedding {
            return Ok(());
        }
        if self.config.dora {
            return Err(Error::unprocessable(
                "unsupported_config_field",
                "`use_dora` is set and `embed_tokens` has factors: DoRA is served on linears only",
            )
            .param("use_dora"));
        }
        let stray = self.role(Role::Magnitude).or(self.role(Role::FactorBias));
        stray.map_or(Ok(()), |id| Err(self.unknown(id, "an embedding has none")))
    }

    fn missing(&self, id: TensorId, what: &str) -> Error {
        Error::unprocessable(
            "missing_factor",
            format!("tensor `{}` is in the file without {what}", brief(self.name(id))),
        )
    }

    fn site(&self) -> Result<Option<SiteParts>> {
        let factors = self.factors()?;
        let (magnitude, factor_bias) = (self.role(Role::Magnitude), self.role(Role::FactorBias));
        let bias = self.role(Role::Bias);
        if let Some(a) = factors.as_ref().map(|f| f.a) {
            match (self.config.dora, magnitude) {
                (true, None) => return Err(self.missing(a, "its lora_magnitude_vector")),
                (false, Some(m)) => return Err(self.unknown(m, "`use_dora` is false")),
                _ => {}
            }
            match (self.config.lora_bias, factor_bias) {
                (true, None) => return Err(self.missing(a, "its lora_B.bias")),
                (false, Some(b)) => return Err(self.unknown(b, "`lora_bias` is false")),
                _ => {}
            }
        }
        let (_, outputs) = dims(self.shape, self.module);
        for id in [magnitude, factor_bias, bias].into_iter().flatten() {
            check_shape(self.file, id, &[outputs])?;
        }
        if let Some(id) = bias {
            self.check_bias(id, factors.is_some())?;
        }
        let weight = self.role(Role::Weight).or(self.role(Role::FrozenWeight));
        if let (Some(id), false) = (weight, self.module == Module::Site(Site::Head)) {
            return Err(self.unknown(id, "it would replace a weight of the base"));
        }
        Ok((factors.is_some() || bias.is_some()).then(|| SiteParts {
            path: self.group.path.clone(),
            factors,
            magnitude,
            factor_bias,
            base_bias: bias,
        }))
    }

    fn check_bias(&self, id: TensorId, has_factors: bool) -> Result<()> {
        match self.config.bias {
            TrainedBias::None => Err(self.unknown(id, "`bias` is \"none\"")),
            TrainedBias::LoraOnly if !has_factors => {
                Err(self.unknown(id, "`bias` is \"lora_only\" and its module has no factors"))
            }
            _ if !has_bias(self.shape, self.module) => {
                Err(self.unknown(id, "the base has no bias there"))
            }
            _ => Ok(()),
        }
    }

    fn norm(&self) -> Result<TensorId> {
        let id = self.role(Role::Weight);
        if let Some(other) = self.group.roles.values().find(|&&other| Some(other) != id) {
            return Err(self.unknown(*other, "a norm can only be replaced whole"));
        }
        let id = id.expect("a group has at least one tensor");
        let path = &self.group.path;
        if !self.config.modules_to_save.iter().any(|m| path.ends_with(m.as_str())) {
            return Err(self.unknown(id, "`modules_to_save` does not name this norm"));
        }
        let (_, len) = dims(self.shape, self.module);
        check_shape(self.file, id, &[len])?;
        Ok(id)
    }

    /// The base's own table, saved beside the factors on it.
    fn copy(&self, table: Table) -> Result<Option<BaseCopy>> {
        let (weight, frozen) = (self.role(Role::Weight), self.role(Role::FrozenWeight));
        if let (Some(id), Some(_)) = (weight, frozen) {
            return Err(self.unknown(id, "the same weight is in the file as base_layer.weight"));
        }
        if let (Some(id), Module::Embedding) = (self.role(Role::Bias), self.module) {
            return Err(self.unknown(id, "an embedding has no bias"));
        }
        let Some(tensor) = weight.or(frozen) else {
            return Ok(None);
        };
        check_shape(self.file, tensor, &[self.shape.vocab, self.shape.hidden])?;
        let frozen = frozen.is_some();
        if !frozen && table == Table::Embedding && !self.shape.tied_head {
            return Err(Error::unprocessable(
                "base_weights_changed",
                format!("tensor `{}` may differ from the base's table", brief(self.name(tensor))),
            ));
        }
        Ok(Some(BaseCopy { tensor, table, frozen }))
    }
}

fn has_bias(shape: &ModelShape, module: Module) -> bool {
    use crate::shape::Projection::{Down, Gate, K, O, Q, Up, V};
    match module {
        Module::Site(Site::Layer(_, Q | K | V)) => shape.qkv_bias,
        Module::Site(Site::Layer(_, O)) => shape.o_bias,
        Module::Site(Site::Layer(_, Gate | Up | Down)) => shape.mlp_bias,
        Module::Site(Site::Head) | Module::Norm(_) | Module::Embedding => false,
    }
}
