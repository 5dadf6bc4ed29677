//! `adapter_config.json` of PEFT: every field is applied, known to be neutral, or refuses the
//! adapter.
//!
//! Owns the meaning of the fields and the one function for the scale. Never looks at tensors. The
//! thing to know: a field that nobody here has heard of refuses the adapter unless it is null,
//! false or empty.

use super::json;
use super::pattern::Pattern;
use crate::error::{Error, Result, brief};
use serde_json::{Map, Value};

/// Ranks that the server multiplies with.
pub const RANKS: std::ops::RangeInclusive<u64> = 1..=RANK_MAX as u64;
/// Highest rank of an adapter at a site, and of all that are summed there.
pub const RANK_MAX: usize = 512;
const CONFIG_BYTES_MAX: usize = 1 << 20;
const ENTRIES_MAX: usize = 8192;

/// Fields that do not change what a forward pass computes.
const NEUTRAL: [&str; 14] = [
    "inference_mode",
    "lora_dropout",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "megatron_core",
    "eva_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "peft_type",
    "init_lora_weights",
    "fan_in_fan_out",
];

/// Known fields that change the arithmetic in a way that is not served, and why.
const REFUSED_WHEN_SET: [(&str, &str); 14] = [
    ("target_parameters", "factors on raw parameters (fused experts) are not served"),
    ("trainable_token_indices", "trained token embeddings are not served"),
    ("layer_replication", "replicated layers make another base model"),
    ("alora_invocation_tokens", "adapters that start at an invocation sequence are not served"),
    ("use_qalora", "QALoRA pools its inputs"),
    ("use_bdlora", "block-diagonal LoRA is not served"),
    ("velora_config", "VeLoRA is not served"),
    ("kasa_config", "KaSA is not served"),
    ("monteclora_config", "MonteCLoRA is not served"),
    ("arrow_config", "Arrow routes between several adapters"),
    ("corda_config", "CorDA changes the base weights"),
    ("lora_ga_config", "LoRA-GA changes the base weights"),
    ("loftq_config", "LoftQ changes the base weights"),
    ("megatron_config", "Megatron's parallel layers are not served"),
];

/// Initialisations that leave the base weights alone.
const HARMLESS_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "true"];

/// Which modules a field names.
#[derive(Debug)]
pub enum Targets {
    /// Equal, or ends with `.entry`.
    Names(Vec<String>),
    /// `re.fullmatch` over the path.
    Regex(Pattern),
    /// Every linear but the output head.
    AllLinear,
}

impl Targets {
    pub fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|n| names_module(n, path))),
            Self::Regex(pattern) => pattern.matches(path),
            Self::AllLinear => {
                Ok(!matches!(super::modules::short(path), "lm_head" | "embed_tokens"))
            }
        }
    }
}

/// PEFT's rule for list entries.
pub fn names_module(entry: &str, path: &str) -> bool {
    path.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Which base biases were trained and are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainedBias {
    None,
    All,
    LoraOnly,
}

/// The fields that decide the arithmetic of a LoRA adapter.
#[derive(Debug)]
pub struct PeftConfig {
    pub rank: usize,
    pub alpha: f64,
    /// In file order: the first match wins.
    pub rank_pattern: Vec<(Pattern, usize)>,
    pub alpha_pattern: Vec<(Pattern, f64)>,
    pub rslora: bool,
    pub dora: bool,
    pub targets: Targets,
    pub excluded: Option<Targets>,
    /// Layer numbers, when restricted.
    pub layers: Option<Vec<usize>>,
    /// Empty: PEFT's default of any `.name.number.`.
    pub layer_patterns: Vec<Pattern>,
    pub lora_bias: bool,
    pub bias: TrainedBias,
    pub modules_to_save: Vec<String>,
    /// PEFT then puts the factors of a tied embedding on the head as well.
    pub weight_tying: bool,
    pub base_model: Option<String>,
}

impl PeftConfig {
    /// Parses and checks `adapter_config.json`. Errors: `invalid_adapter_config`,
    /// `unsupported_peft_type`, `unsupported_config_field`, `base_weights_changed`,
    /// `rank_out_of_range`.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > CONFIG_BYTES_MAX {
            return Err(invalid(format!(
                "adapter_config.json has {} bytes; the limit is {CONFIG_BYTES_MAX}",
                bytes.len()
            )));
        }
        let map = json::object(bytes).map_err(|e| invalid(format!("adapter_config.json: {e}")))?;
        let mut fields = Fields(map);
        fields.check_method()?;
        let config = Self {
            rank: fields.rank()?,
            alpha: fields.number("lora_alpha")?.unwrap_or(8.0),
            rank_pattern: fields.rank_pattern()?,
            alpha_pattern: fields.alpha_pattern()?,
            rslora: fields.flag("use_rslora")?,
            dora: fields.flag("use_dora")?,
            targets: fields.targets("target_modules")?.ok_or_else(|| {
                invalid("`target_modules` must be a list of names, a pattern or \"all-linear\"")
            })?,
            excluded: fields.targets("exclude_modules")?,
            layers: fields.layers()?,
            layer_patterns: fields.layer_patterns()?,
            lora_bias: fields.flag("lora_bias")?,
            bias: fields.bias()?,
            modules_to_save: fields.strings("modules_to_save")?.unwrap_or_default(),
            weight_tying: matches!(fields.0.get("ensure_weight_tying"), Some(Value::Bool(true))),
            base_model: match fields.0.get("base_model_name_or_path") {
                Some(Value::String(s)) => Some(s.clone()),
                _ => None,
            },
        };
        fields.check_rest()?;
        config.check_combinations()?;
        Ok(config)
    }

    fn check_combinations(&self) -> Result<()> {
        let restricted = self.layers.is_some() || !self.layer_patterns.is_empty();
        if restricted && !matches!(self.targets, Targets::Names(_)) {
            return Err(invalid(
                "`layers_to_transform` and `layers_pattern` need `target_modules` to be a list",
            ));
        }
        if self.dora && self.lora_bias {
            return Err(unsupported(
                "lora_bias",
                "true together with `use_dora`, which PEFT does not define",
            ));
        }
        Ok(())
    }

    /// Rank of a module: the first key of `rank_pattern` that matches, else `r`.
    pub fn rank_of(&self, path: &str) -> Result<usize> {
        first_match(&self.rank_pattern, path).map(|found| found.unwrap_or(self.rank))
    }

    /// What the factors' product is multiplied with: alpha/r, or alpha/√r with `use_rslora`.
    pub fn scale(&self, path: &str) -> Result<f32> {
        let rank = self.rank_of(path)? as f64;
        let alpha = first_match(&self.alpha_pattern, path)?.unwrap_or(self.alpha);
        let divisor = if self.rslora { rank.sqrt() } else { rank };
        Ok((alpha / divisor) as f32)
    }

    /// Whether PEFT would put factors on the module of this path.
    pub fn targets_module(&self, path: &str) -> Result<bool> {
        if let Some(excluded) = &self.excluded
            && excluded.matches(path)?
        {
            return Ok(false);
        }
        if !self.targets.matches(path)? {
            return Ok(false);
        }
        let Targets::Names(names) = &self.targets else {
            return Ok(true);
        };
        // PEFT restricts by layer only where an entry matched as a suffix.
        match &self.layers {
            Some(layers) if !names.iter().any(|n| n == path) => {
                Ok(self.layer_of(path)?.is_some_and(|l| layers.contains(&l)))
            }
            _ => Ok(true),
        }
    }

    fn layer_of(&self, path: &str) -> Result<Option<usize>> {
        if self.layer_patterns.is_empty() {
            let parts: Vec<&str> = path.split('.').collect();
            let inner = parts.get(2..parts.len().saturating_sub(1)).unwrap_or(&[]);
            return Ok(inner.iter().rev().find_map(|p| p.parse().ok()));
        }
        for pattern in &self.layer_patterns {
            if let Some(layer) = pattern.layer_of(path)? {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::unprocessable("invalid_adapter_config", message)
}

fn unsupported(field: &str, why: &str) -> Error {
    Error::unprocessable("unsupported_config_field", format!("`{field}` is set: {why}"))
        .param(field)
}

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// The fields not yet looked at.
struct Fields(Map<String, Value>);

impl Fields {
    /// Takes a field out; `None` when it is absent or null.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|v| !v.is_null())
    }

    fn check_method(&self) -> Result<()> {
        match self.0.get("peft_type") {
            Some(Value::String(t)) if t == "LORA" => {}
            Some(Value::String(t)) => {
                let t = brief(t);
                return Err(Error::unprocessable(
                    "unsupported_peft_type",
                    format!("`peft_type` is {t}; only LORA is served"),
                )
                .param("peft_type"));
            }
            _ => return Err(invalid("`peft_type` must be \"LORA\"").param("peft_type")),
        }
        match self.0.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => {}
            Some(Value::String(s)) if HARMLESS_INITS.contains(&s.as_str()) => {}
            Some(other) => {
                return Err(Error::unprocessable(
                    "base_weights_changed",
                    format!(
                        "`init_lora_weights` is {other}: training began by changing the base \
                         weights, so these factors are wrong on the original base; save with \
                         path_initial_model_for_weight_conversion"
                    ),
                )
                .param("init_lora_weights"));
            }
        }
        if self.0.get("fan_in_fan_out").is_some_and(is_set) {
            return Err(unsupported(
                "fan_in_fan_out",
                "no linear of this model stores its weight transposed, so the adapter was made \
                 for another architecture (the factors' own shapes would not differ)",
            ));
        }
        Ok(())
    }

    fn check_rest(&self) -> Result<()> {
        for (name, value) in &self.0 {
            if NEUTRAL.contains(&name.as_str()) || !is_set(value) {
                continue;
            }
            let known = REFUSED_WHEN_SET.iter().find(|(n, _)| n == name);
            let why = known.map_or("nothing is known of this field", |(_, why)| why);
            let name = brief(name);
            return Err(unsupported(&name, why));
        }
        Ok(())
    }

    fn flag(&mut self, name: &str) -> Result<bool> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(b),
            Some(_) => Err(invalid(format!("`{name}` must be true or false")).param(name)),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<f64>> {
        match self.take(name) {
            None => Ok(None),
            Some(v) => number(name, &v).map(Some),
        }
    }

    fn rank(&mut self) -> Result<usize> {
        self.take("r").map_or(Ok(8), |v| rank("r", &v))
    }

    fn object(&mut self, name: &str) -> Result<Map<String, Value>> {
        match self.take(name) {
            None => Ok(Map::new()),
            Some(Value::Object(o)) if o.len() <= ENTRIES_MAX => Ok(o),
            Some(_) => {
                Err(invalid(format!("`{name}` must be a map of at most {ENTRIES_MAX} entries"))
                    .param(name))
            }
        }
    }

    fn rank_pattern(&mut self) -> Result<Vec<(Pattern, usize)>> {
        let name = "rank_pattern";
        let mut costs = Costs(0);
        let entry = |(key, value): (String, Value)| {
            let pattern = costs.count(name, Pattern::suffix(name, &key)?)?;
            Ok((pattern, rank(name, &value)?))
        };
        self.object(name)?.into_iter().map(entry).collect()
    }

    fn alpha_pattern(&mut self) -> Result<Vec<(Pattern, f64)>> {
        let name = "alpha_pattern";
        let mut costs = Costs(0);
        let entry = |(key, value): (String, Value)| {
            let pattern = costs.count(name, Pattern::suffix(name, &key)?)?;
            Ok((pattern, number(name, &value)?))
        };
        self.object(name)?.into_iter().map(entry).collect()
    }

    /// A list of strings, or one string as a list of one.
    fn strings(&mut self, name: &str) -> Result<Option<Vec<String>>> {
        let refuse = || invalid(format!("`{name}` must be a list of strings")).param(name);
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(vec![s])),
            Some(Value::Array(a)) if a.len() <= ENTRIES_MAX => a
                .into_iter()
                .map(|v| v.as_str().map(str::to_owned).ok_or_else(refuse))
                .collect::<Result<Vec<_>>>()
                .map(Some),
            Some(_) => Err(refuse()),
        }
    }

    fn targets(&mut self, name: &str) -> Result<Option<Targets>> {
        match self.0.get(name) {
            Some(Value::String(s)) if name == "target_modules" && s == "all-linear" => {
                self.take(name);
                Ok(Some(Targets::AllLinear))
            }
            Some(Value::String(s)) => {
                let pattern = Pattern::full(name, s)?;
                self.take(name);
                Ok(Some(Targets::Regex(pattern)))
            }
            _ => Ok(self.strings(name)?.filter(|names| !names.is_empty()).map(Targets::Names)),
        }
    }

    fn layers(&mut self) -> Result<Option<Vec<usize>>> {
        let name = "layers_to_transform";
        let refuse = || invalid(format!("`{name}` must be layer numbers")).param(name);
        let number = |v: &Value| v.as_u64().map(|n| n as usize).ok_or_else(refuse);
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(a)) if a.is_empty() => Ok(None),
            Some(Value::Array(a)) => a.iter().map(number).collect::<Result<_>>().map(Some),
            Some(v) => Ok(Some(vec![number(&v)?])),
        }
    }

    fn layer_patterns(&mut self) -> Result<Vec<Pattern>> {
        let texts = self.strings("layers_pattern")?.unwrap_or_default();
        let texts = texts.iter().filter(|t| !t.is_empty());
        let name = "layers_pattern";
        let mut costs = Costs(0);
        texts.map(|t| costs.count(name, Pattern::layer(name, t)?)).collect()
    }

    fn bias(&mut self) -> Result<TrainedBias> {
        match self.take("bias").as_ref().map(|v| v.as_str()) {
            None | Some(Some("none")) => Ok(TrainedBias::None),
            Some(Some("all")) => Ok(TrainedBias::All),
            Some(Some("lora_only")) => Ok(TrainedBias::LoraOnly),
            Some(_) => Err(invalid("`bias` must be none, all or lora_only").param("bias")),
        }
    }
}

/// Patterns of one field that are more than names: each takes memory, and time for every module.
/// One with look-around or back-references counts for 16.
const COSTLY_MAX: usize = 64;

/// What there were.
struct Costs(usize);

impl Costs {
    fn count(&mut self, field: &str, pattern: Pattern) -> Result<Pattern> {
        self.0 += pattern.cost();
        if self.0 <= COSTLY_MAX {
            return Ok(pattern);
        }
        let message = format!(
            "`{field}` has more than {COSTLY_MAX} regular expressions (one with look-around or \
             back-references counts for 16)"
        );
        Err(invalid(message).param(field))
    }
}

fn number(field: &str, value: &Value) -> Result<f64> {
    match value.as_f64() {
        Some(n) if n.is_finite() && n.abs() <= 1e6 => Ok(n),
        _ => Err(invalid(format!("`{field}`: {value} is not a number up to 1e6")).param(field)),
    }
}

fn rank(field: &str, value: &Value) -> Result<usize> {
    match value.as_u64() {
        Some(n) if RANKS.contains(&n) => Ok(n as usize),
        _ => Err(Error::unprocessable(
            "rank_out_of_range",
            format!("`{field}`: rank {value} is not from 1 to 512"),
        )
        .param(field)),
    }
}
