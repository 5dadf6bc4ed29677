//! `ModelShape` from a Hugging Face config.json.
//!
//! Owns the families' defaults and every refusal by key and value. Never opens a file. The thing to
//! know: a key that would change the arithmetic is either understood or refused
//! (`unsupported_model`); absent keys take the defaults that the family has in transformers.

use crate::error::{Error, Result};
use crate::shape::{Activation, ModelShape, Rope, RopeScaling};
use half::bf16;
use serde_json::Value;

/// 400 `unsupported_model`: a value we know of and do not support.
pub fn unsupported(message: impl Into<String>) -> Error {
    Error::invalid("unsupported_model", message)
}

/// 400 `invalid_model`: a value that is missing or cannot be.
pub fn invalid(message: impl Into<String>) -> Error {
    Error::invalid("invalid_model", message)
}

/// One JSON object of the config; keys that are null count as absent.
#[derive(Clone, Copy)]
struct Keys<'a>(&'a Value);

impl<'a> Keys<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn expect<T>(
        self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(v) => Ok(Some(v)),
            None => Err(invalid(format!("config.json: `{key}` is {value}, expected {what}"))),
        }
    }

    fn count(self, key: &str) -> Result<Option<usize>> {
        let read = |v: &Value| v.as_u64().filter(|&n| n > 0 && n < 1 << 32);
        Ok(self.expect(key, "a positive integer", read)?.map(|n| n as usize))
    }

    fn number(self, key: &str) -> Result<Option<f64>> {
        self.expect(key, "a number", Value::as_f64)
    }

    /// A number that the arithmetic divides by or takes the logarithm of.
    fn positive(self, key: &str) -> Result<Option<f64>> {
        let read = |v: &Value| v.as_f64().filter(|&x| x > 0.0 && x.is_finite());
        self.expect(key, "a positive number", read)
    }

    fn flag(self, key: &str) -> Result<Option<bool>> {
        self.expect(key, "true or false", Value::as_bool)
    }

    fn text(self, key: &str) -> Result<Option<&'a str>> {
        self.expect(key, "a string", Value::as_str)
    }
}

/// What transformers assumes where the file is silent; `None` means that the file must say.
struct Defaults {
    count: fn(&str) -> Option<usize>,
    theta: f64,
    tied: bool,
}

fn defaults(family: &str) -> Defaults {
    match family {
        "gemma3" => Defaults {
            count: |key| {
                Some(match key {
                    "vocab_size" => 262_208,
                    "hidden_size" => 2304,
                    "intermediate_size" => 9216,
                    "num_hidden_layers" => 26,
                    "num_attention_heads" => 8,
                    "num_key_value_heads" => 4,
                    "head_dim" => 256,
                    "max_position_embeddings" => 131_072,
                    _ => return None,
                })
            },
            theta: 1e6,
            tied: true,
        },
        "qwen3" => {
            Defaults { count: |key| (key == "head_dim").then_some(128), theta: 1e4, tied: false }
        }
        _ => Defaults { count: |_| None, theta: 1e4, tied: false },
    }
}

impl ModelShape {
    /// Reads a config.json. Errors: `unsupported_model` names a key and its value that this server
    /// does not support, `invalid_model` a key that is missing or malformed.
    pub fn from_config(config: &Value) -> Result<ModelShape> {
        let root = Keys(config);
        let family = family(root)?;
        let keys = match (root.text("model_type")?, root.get("text_config")) {
            (Some("gemma3"), Some(text)) => Keys(text),
            (Some("gemma3"), None) => {
                return Err(invalid("config.json: `text_config` is missing"));
            }
            _ => root,
        };
        refuse_features(family, root)?;
        refuse_features(family, keys)?;
        let defaults = defaults(family);
        let count = |key: &str| -> Result<usize> {
            match keys.count(key)?.or_else(|| (defaults.count)(key)) {
                Some(n) => Ok(n),
                None => Err(invalid(format!("config.json: `{key}` is missing"))),
            }
        };
        let (hidden, heads) = (count("hidden_size")?, count("num_attention_heads")?);
        let kv_heads = match family {
            "llama" => keys.count("num_key_value_heads")?.unwrap_or(heads),
            _ => count("num_key_value_heads")?,
        };
        let head_dim = keys.count("head_dim")?.or((defaults.count)("head_dim"));
        let head_dim = head_dim.unwrap_or(hidden / heads);
        let layers = count("num_hidden_layers")?;
        let context = count("max_position_embeddings")?;
        let gemma = family == "gemma3";
        let bias = matches!(family, "llama" | "qwen3" | "gemma3")
            && keys.flag("attention_bias")?.unwrap_or(false);
        let (rope, rope_local) = ropes(family, keys, defaults.theta, context)?;
        let scalar = match gemma {
            true => keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
            false => head_dim as f64,
        };
        let tied = keys.flag("tie_word_embeddings")?;
        let shape = ModelShape {
            family,
            layers,
            hidden,
            ffn: count("intermediate_size")?,
            heads,
            kv_heads,
            head_dim,
            vocab: count("vocab_size")?,
            context,
            norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope,
            rope_local,
            windows: windows(family, keys, layers)?,
            activation: activation(family, keys)?,
            attention_scale: (1.0 / scalar.sqrt()) as f32,
            qkv_bias: bias || family == "qwen2",
            o_bias: bias,
            mlp_bias: family == "llama" && keys.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: matches!(family, "qwen3" | "gemma3"),
            post_norms: gemma,
            norm_plus_one: gemma,
            embedding_scale: embedding_scale(family, hidden),
            tied_head: match tied {
                Some(tied) => tied,
                None => root.flag("tie_word_embeddings")?.unwrap_or(defaults.tied),
            },
        };
        check(&shape)?;
        Ok(shape)
    }
}

/// Gemma multiplies embeddings by sqrt(H), in the bf16 it was trained in.
pub fn embedding_scale(family: &str, hidden: usize) -> f32 {
    match family {
        "gemma3" => bf16::from_f64((hidden as f64).sqrt()).to_f32(),
        _ => 1.0,
    }
}

/// What no family allows, whatever file the numbers came from.
pub fn check(shape: &ModelShape) -> Result<()> {
    if !shape.heads.is_multiple_of(shape.kv_heads) {
        return Err(invalid(format!(
            "{} attention heads cannot share {} key-value heads",
            shape.heads, shape.kv_heads
        )));
    }
    if shape.head_dim == 0 || !shape.head_dim.is_multiple_of(2) {
        return Err(invalid(format!(
            "the head dimension is {}, expected an even number",
            shape.head_dim
        )));
    }
    Ok(())
}

fn family(root: Keys) -> Result<&'static str> {
    let model_type =
        root.text("model_type")?.ok_or_else(|| invalid("config.json: `model_type` is missing"))?;
    Ok(match model_type {
        "llama" => "llama",
        "mistral" => "mistral",
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "gemma3" | "gemma3_text" => "gemma3",
        other => {
            return Err(unsupported(format!(
                "config.json: model_type = {other} is not supported; llama, mistral, qwen2, \
                 qwen3, gemma3 and gemma3_text are"
            )));
        }
    })
}

/// Keys that change the arithmetic in ways this decoder has not.
fn refuse_features(family: &str, keys: Keys) -> Result<()> {
    let refuse = |key: &str, value: &dyn std::fmt::Display| {
        Err(unsupported(format!("config.json: {key} = {value} is not supported")))
    };
    if let Some(q) = keys.get("quantization_config") {
        let method = q.get("quant_method").unwrap_or(q);
        return refuse("quantization_config.quant_method", method);
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(v) = keys.get(key) {
            return refuse(key, v);
        }
    }
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        if let Some(v) = keys.get(key).filter(|v| v.as_u64() != Some(0)) {
            return refuse(key, v);
        }
    }
    if keys.flag("use_bidirectional_attention")? == Some(true) {
        return refuse("use_bidirectional_attention", &true);
    }
    if let Some(v) = keys.number("partial_rotary_factor")?.filter(|&v| v != 1.0) {
        return refuse("partial_rotary_factor", &v);
    }
    if matches!(family, "mistral" | "qwen2") && keys.flag("attention_bias")? == Some(true) {
        return refuse("attention_bias", &true);
    }
    Ok(())
}

fn activation(family: &str, keys: Keys) -> Result<Activation> {
    let (key, default) = match family {
        "gemma3" => ("hidden_activation", "gelu_pytorch_tanh"),
        _ => ("hidden_act", "silu"),
    };
    match keys.text(key)?.unwrap_or(default) {
        "silu" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(unsupported(format!(
            "config.json: {key} = {other} is not supported; silu and gelu_pytorch_tanh are"
        ))),
    }
}

/// The window of every layer: by `layer_types` where the file has them, else by the family's older
/// keys.
fn windows(family: &str, keys: Keys, layers: usize) -> Result<Vec<Option<u32>>> {
    let sliding = match family {
        "mistral" => keys.count("sliding_window")?,
        "qwen2" | "qwen3" if keys.flag("use_sliding_window")? == Some(true) => {
            Some(keys.count("sliding_window")?.unwrap_or(4096))
        }
        "gemma3" => Some(keys.count("sliding_window")?.unwrap_or(4096)),
        _ => None,
    }
    .map(|w| w as u32);
    if let Some(types) = keys.get("layer_types") {
        return layer_types(types, sliding, layers);
    }
    let pattern = keys.count("sliding_window_pattern")?.unwrap_or(6);
    let first = keys.expect("max_window_layers", "an integer", Value::as_u64)?.unwrap_or(28);
    let has_window = |l: usize| match family {
        "mistral" => true,
        "gemma3" => !(l + 1).is_multiple_of(pattern),
        _ => l as u64 >= first,
    };
    Ok((0..layers).map(|l| sliding.filter(|_| has_window(l))).collect())
}

fn layer_types(types: &Value, sliding: Option<u32>, layers: usize) -> Result<Vec<Option<u32>>> {
    let list = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if list.len() != layers {
        return Err(invalid(format!(
            "config.json: `layer_types` has {} entries, expected {layers} (num_hidden_layers)",
            list.len()
        )));
    }
    let window = |t: &Value| match t.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => sliding.map(Some).ok_or_else(|| {
            invalid("config.json: `layer_types` has sliding_attention, but no window is in use")
        }),
        _ => Err(unsupported(format!(
            "config.json: layer_types entry {t} is not supported; full_attention and \
             sliding_attention are"
        ))),
    };
    list.iter().map(window).collect()
}

/// The rope of full-attention layers and, for Gemma 3, that of sliding-window layers.
fn ropes(family: &str, keys: Keys, theta: f64, context: usize) -> Result<(Rope, Option<Rope>)> {
    let theta = keys.positive("rope_theta")?.unwrap_or(theta);
    let parameters = keys.get("rope_parameters");
    let scaling = keys.get("rope_scaling");
    let by_kind = |kind: &str| parameters.and_then(|p| Keys(p).get(kind));
    let nested = by_kind("full_attention").is_some() || by_kind("sliding_attention").is_some();
    if family != "gemma3" {
        if nested {
            return Err(unsupported(
                "config.json: rope_parameters by attention kind is supported for gemma3 only",
            ));
        }
        return Ok((rope(scaling.or(parameters), keys, theta, context)?, None));
    }
    let local_theta = keys.positive("rope_local_base_freq")?.unwrap_or(1e4);
    let full = match nested {
        true => by_kind("full_attention"),
        false => scaling.or(parameters),
    };
    let local = rope(by_kind("sliding_attention"), keys, local_theta, context)?;
    Ok((rope(full, keys, theta, context)?, Some(local)))
}

/// One rope section (`rope_scaling`, or `rope_parameters` of newer files, which holds theta too).
fn rope(section: Option<&Value>, config: Keys, theta: f64, context: usize) -> Result<Rope> {
    let Some(section) = section else {
        let scaling = RopeScaling::None;
        return Ok(Rope { theta, scaling });
    };
    let keys = Keys(section);
    let theta = keys.positive("rope_theta")?.unwrap_or(theta);
    if let Some(v) = keys.number("partial_rotary_factor")?.filter(|&v| v != 1.0) {
        return Err(unsupported(format!(
            "config.json: partial_rotary_factor = {v} is not supported"
        )));
    }
    let kind = match keys.text("rope_type")? {
        Some(kind) => kind,
        None => keys.text("type")?.unwrap_or("default"),
    };
    let needed = |key: &str| -> Result<f64> {
        keys.positive(key)?
            .ok_or_else(|| invalid(format!("config.json: rope type {kind} needs `{key}`")))
    };
    let original_key = "original_max_position_embeddings";
    let original = || -> Result<usize> {
        let own = keys.count(original_key)?;
        Ok(config.count(original_key)?.or(own).unwrap_or(context))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_context: original()?,
        },
        "yarn" => yarn(keys, original()?, context)?,
        other => {
            return Err(unsupported(format!(
                "config.json: rope_type = {other} is not supported; default, linear, llama3 and \
                 yarn are"
            )));
        }
    };
    Ok(Rope { theta, scaling })
}

fn yarn(keys: Keys, original_context: usize, context: usize) -> Result<RopeScaling> {
    let factor = keys.positive("factor")?.unwrap_or(context as f64 / original_context as f64);
    // Zero means absent here, as in transformers.
    let given = |key: &str| -> Result<Option<f64>> { Ok(keys.number(key)?.filter(|&v| v != 0.0)) };
    let mscale = given("mscale")?.zip(given("mscale_all_dim")?);
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        original_context,
        attention_factor: keys
            .positive("attention_factor")?
            .unwrap_or_else(|| yarn_attention_factor(factor, mscale)),
        truncate: keys.flag("truncate")?.unwrap_or(true),
    })
}

/// The factor on cos and sin that yarn implies where a file names none.
pub fn yarn_attention_factor(factor: f64, mscale: Option<(f64, f64)>) -> f64 {
    let grow = |by: f64| {
        if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 }
    };
    match mscale {
        Some((m, all)) => grow(m) / grow(all),
        None => grow(1.0),
    }
}
