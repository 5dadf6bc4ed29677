//! From the fields of `POST /v1/fine_tuning/jobs` to what is to be trained.
//!
//! Owns the bounds of every field. Never looks at a file or a model. The thing to know: whatever
//! cannot be honoured is refused by name.

use crate::api::http::errors::invalid_value;
use crate::api::wire::{
    Auto, FineTuningFields, HyperparameterFields, LoraFields, MethodFields, MethodOptions,
};
use crate::error::{Error, Result, brief};
use crate::jobs::Promote;
use crate::shape::Projection;
use crate::train::asked::{self as bounds, Asked};
use crate::train::{Decay, Init, OptimiserKind};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;

/// Of a client's notes, as OpenAI bounds them.
const METADATA_MAX: usize = 16;
const METADATA_KEY_MAX: usize = 64;
const METADATA_VALUE_MAX: usize = 512;

/// Errors: `invalid_value`, `unsupported_parameter`, with the field's path.
pub fn asked(fields: &FineTuningFields) -> Result<Asked> {
    if fields.integrations.as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(unsupported("integrations", "this server has no integrations"));
    }
    let (path, given, dpo) = method(fields)?;
    let at = |name: &str| format!("{path}.{name}");
    let plain = LoraFields::default();
    let lora = fields.polylora.as_ref().unwrap_or(&plain);
    let rank = number("polylora.r", lora.r, bounds::RANKS)?.unwrap_or(bounds::RANK);
    if !dpo && auto(given.beta).is_some() {
        return Err(invalid_value(&at("beta"), "`beta` is DPO's; the method is supervised"));
    }
    if !dpo && lora.length_normalized == Some(true) {
        let why = "`length_normalized` is DPO's; the method is supervised";
        return Err(invalid_value("polylora.length_normalized", why));
    }
    let most = match lora.length_normalized {
        Some(true) => bounds::BETA_BY_LENGTH_MAX,
        _ => bounds::BETA_MAX,
    };
    let beta = positive(&at("beta"), auto(given.beta), most)?;
    Ok(Asked {
        epochs: whole(&at("n_epochs"), given.n_epochs, bounds::EPOCHS)?.map(|n| n as u32),
        batch: whole(&at("batch_size"), given.batch_size, bounds::BATCHES)?,
        lr_multiplier: positive(
            &at("learning_rate_multiplier"),
            auto(given.learning_rate_multiplier),
            bounds::MULTIPLIER_MAX,
        )?,
        lr: positive("polylora.lr", lora.lr, bounds::RATE_MAX)?,
        beta: dpo.then(|| beta.unwrap_or(bounds::BETA)),
        rank,
        alpha: positive("polylora.lora_alpha", lora.lora_alpha, bounds::ALPHA_MAX)?
            .unwrap_or(2.0 * rank as f64),
        rslora: lora.use_rslora.unwrap_or(false),
        dora: lora.use_dora.unwrap_or(false),
        targets: targets(lora.target_modules.as_ref())?,
        loraplus_ratio: positive(
            "polylora.loraplus_lr_ratio",
            lora.loraplus_lr_ratio,
            bounds::RATIO_MAX,
        )?
        .unwrap_or(1.0),
        decay: decay(lora.lr_scheduler_type.as_deref())?,
        warmup_ratio: part("polylora.warmup_ratio", lora.warmup_ratio)?.unwrap_or(0.0),
        weight_decay: part("polylora.weight_decay", lora.weight_decay)?.unwrap_or(0.0),
        max_grad_norm: max_grad_norm(lora.max_grad_norm)?,
        truncate: lora.truncate.unwrap_or(false),
        eval_steps: lora.eval_steps.unwrap_or(0),
        seed: fields.seed.unwrap_or(0),
        freeze_a: lora.freeze_a.unwrap_or(false),
        optimiser: optimiser(lora.optim.as_deref())?,
        nested: lora.nested_ranks.unwrap_or(false),
        init: init(lora.init_lora_weights.as_ref())?,
        by_length: lora.length_normalized.unwrap_or(false),
    })
}

/// Where the hyperparameters stand, what they are, and whether the method is DPO.
fn method(fields: &FineTuningFields) -> Result<(String, HyperparameterFields, bool)> {
    let old = fields.hyperparameters.clone();
    let Some(MethodFields { r#type, supervised, dpo, reinforcement }) = &fields.method else {
        return Ok(("hyperparameters".to_owned(), old.unwrap_or_default(), false));
    };
    if reinforcement.is_some() || r#type == "reinforcement" {
        let why = "reinforcement is not a method of this server; expected supervised or dpo";
        let error = Error::invalid("unsupported_method", why);
        return Err(error.param("method.type"));
    }
    let (given, other, is_dpo) = match r#type.as_str() {
        "supervised" => (supervised, dpo, false),
        "dpo" => (dpo, supervised, true),
        _ => return Err(invalid_value("method.type", "`type` must be supervised or dpo")),
    };
    let filled = |options: &Option<MethodOptions>| {
        options.as_ref().and_then(|options| options.hyperparameters.clone())
    };
    if filled(other).is_some() {
        let message = format!("the method is {}, and another one has hyperparameters", r#type);
        return Err(invalid_value("method", message));
    }
    match (filled(given), old) {
        (Some(_), Some(_)) => {
            Err(invalid_value("hyperparameters", "they stand in `method` as well"))
        }
        (None, Some(old)) => Ok(("hyperparameters".to_owned(), old, is_dpo)),
        (given, None) => {
            let path = format!("method.{}.hyperparameters", r#type);
            Ok((path, given.unwrap_or_default(), is_dpo))
        }
    }
}

/// A client's notes within bounds.
pub fn metadata(given: Option<BTreeMap<String, String>>) -> Result<BTreeMap<String, String>> {
    let given = given.unwrap_or_default();
    let wrong = |message: String| Err(invalid_value("metadata", message));
    if given.len() > METADATA_MAX {
        return wrong(format!("{} entries; at most {METADATA_MAX}", given.len()));
    }
    for (key, value) in &given {
        let (key_len, value_len) = (key.chars().count(), value.chars().count());
        if key_len > METADATA_KEY_MAX || value_len > METADATA_VALUE_MAX {
            return wrong(format!(
                "`{}` has {key_len} and its value {value_len} characters; at most \
                 {METADATA_KEY_MAX} and {METADATA_VALUE_MAX}",
                brief(key)
            ));
        }
    }
    Ok(given)
}

/// `auto` is the default.
pub fn promote(given: Option<&str>) -> Result<Promote> {
    match given {
        None | Some("auto") => Ok(Promote::Auto),
        Some("manual") => Ok(Promote::Manual),
        Some("never") => Ok(Promote::Never),
        Some(_) => {
            let why = "`promote` must be auto, manual or never";
            Err(invalid_value("polylora.promote", why))
        }
    }
}

fn auto(given: Option<Auto>) -> Option<f64> {
    match given {
        Some(Auto::Number(number)) => Some(number),
        Some(Auto::Word(_)) | None => None,
    }
}

/// A whole number; clients write `3.0` as well.
fn whole(param: &str, given: Option<Auto>, within: RangeInclusive<usize>) -> Result<Option<usize>> {
    let Some(number) = auto(given) else { return Ok(None) };
    let asked = number as usize;
    if asked as f64 != number || !within.contains(&asked) {
        let (first, last) = within.into_inner();
        let message = format!("{number} is not a whole number from {first} to {last}, or auto");
        return Err(invalid_value(param, message));
    }
    Ok(Some(asked))
}

fn number<T: PartialOrd + Display>(
    param: &str,
    given: Option<T>,
    within: RangeInclusive<T>,
) -> Result<Option<T>> {
    match given {
        Some(n) if !within.contains(&n) => {
            let (first, last) = within.into_inner();
            Err(invalid_value(param, format!("{n} is not within {first} to {last}")))
        }
        given => Ok(given),
    }
}

/// Above 0.
fn positive(param: &str, given: Option<f64>, max: f64) -> Result<Option<f64>> {
    match given {
        Some(n) if !(n > 0.0 && n <= max) => {
            Err(invalid_value(param, format!("{n} is not above 0 and at most {max}")))
        }
        given => Ok(given),
    }
}

fn part(param: &str, given: Option<f64>) -> Result<Option<f64>> {
    number(param, given, 0.0..=1.0)
}

fn max_grad_norm(given: Option<f64>) -> Result<f64> {
    Ok(number("polylora.max_grad_norm", given, 0.0..=bounds::NORM_MAX)?.unwrap_or(1.0))
}

fn decay(given: Option<&str>) -> Result<Decay> {
    match given {
        None | Some("linear") => Ok(Decay::Linear),
        Some("constant") => Ok(Decay::Constant),
        Some("cosine") => Ok(Decay::Cosine),
        Some(_) => {
            let why = "`lr_scheduler_type` must be constant, linear or cosine";
            Err(invalid_value("polylora.lr_scheduler_type", why))
        }
    }
}

fn optimiser(given: Option<&str>) -> Result<OptimiserKind> {
    let known = |name: &str| OptimiserKind::ALL.into_iter().find(|kind| kind.name() == name);
    let wrong =
        || invalid_value("polylora.optim", "`optim` must be adamw, lion, adafactor or frugal");
    given.map_or(Ok(OptimiserKind::default()), |name| known(name).ok_or_else(wrong))
}

/// As PEFT says it.
fn init(given: Option<&Value>) -> Result<Init> {
    match given {
        None | Some(Value::Bool(true)) => Ok(Init::Random),
        Some(Value::String(name)) if name == "eva" => Ok(Init::Eva),
        Some(_) => {
            let why = "`init_lora_weights` must be true or \"eva\"";
            Err(invalid_value("polylora.init_lora_weights", why))
        }
    }
}

/// Projections by PEFT's names, in the order of a layer.
fn targets(given: Option<&Value>) -> Result<Vec<Projection>> {
    let expected = || {
        let names = Projection::ALL.map(Projection::name).join(", ");
        let message = format!("`target_modules` must be \"all-linear\", or some of {names}");
        invalid_value("polylora.target_modules", message)
    };
    let names = match given {
        None => return Ok(Projection::ALL.to_vec()),
        Some(Value::String(all)) if all == "all-linear" => return Ok(Projection::ALL.to_vec()),
        Some(Value::Array(names)) if !names.is_empty() => names,
        Some(_) => return Err(expected()),
    };
    let mut found = Vec::new();
    for name in names {
        let name = name.as_str().ok_or_else(expected)?;
        let known = Projection::ALL.into_iter().find(|p| p.name() == name);
        found.push(known.ok_or_else(expected)?);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn unsupported(param: &str, message: &str) -> Error {
    Error::invalid("unsupported_parameter", message).param(param)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(fields: Value) -> Result<Asked> {
        let mut whole = json!({"model": "base", "training_file": "file-1"});
        whole.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        asked(&serde_json::from_value(whole).expect("fields"))
    }

    #[test]
    fn nothing_said_is_auto_and_a_small_lora_everywhere() {
        let plain = of(json!({})).unwrap();
        assert_eq!((plain.epochs, plain.batch, plain.lr_multiplier), (None, None, None));
        assert_eq!((plain.rank, plain.alpha, plain.targets.len()), (8, 16.0, 7));
        assert_eq!((plain.beta, plain.decay, plain.seed), (None, Decay::Linear, 0));
    }

    #[test]
    fn hyperparameters_stand_in_either_place_and_whole_floats_are_whole() {
        let given = json!({"n_epochs": 2.0, "batch_size": 4, "learning_rate_multiplier": "auto"});
        let old = of(json!({"hyperparameters": given})).unwrap();
        let new = json!({"type": "supervised", "supervised": {"hyperparameters": given}});
        let new = of(json!({"method": new})).unwrap();
        assert_eq!(old, new);
        assert_eq!((old.epochs, old.batch, old.lr_multiplier), (Some(2), Some(4), None));
        let dpo = of(json!({"method": {"type": "dpo", "dpo": {}}})).unwrap();
        assert_eq!(dpo.beta, Some(0.1));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let hyper = |name: &str, value: Value| json!({"hyperparameters": {name: value}});
        for (fields, param) in [
            (hyper("n_epochs", json!(51)), "hyperparameters.n_epochs"),
            (hyper("n_epochs", json!(1.5)), "hyperparameters.n_epochs"),
            (hyper("batch_size", json!(0)), "hyperparameters.batch_size"),
            (hyper("beta", json!(0.1)), "hyperparameters.beta"),
            (json!({"method": {"type": "reinforcement"}}), "method.type"),
            (json!({"method": {"type": "magic"}}), "method.type"),
            (
                json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.5}}}}),
                "method.dpo.hyperparameters.beta",
            ),
            (json!({"integrations": [{"type": "wandb"}]}), "integrations"),
            (json!({"polylora": {"r": 0}}), "polylora.r"),
            (json!({"polylora": {"lr": -1.0}}), "polylora.lr"),
            (json!({"polylora": {"target_modules": ["lm_head"]}}), "polylora.target_modules"),
            (json!({"polylora": {"lr_scheduler_type": "step"}}), "polylora.lr_scheduler_type"),
            (json!({"polylora": {"warmup_ratio": 2}}), "polylora.warmup_ratio"),
            (json!({"polylora": {"optim": "sgd"}}), "polylora.optim"),
            (json!({"polylora": {"init_lora_weights": "pissa"}}), "polylora.init_lora_weights"),
            (json!({"polylora": {"length_normalized": true}}), "polylora.length_normalized"),
        ] {
            let error = of(fields.clone()).expect_err("it is refused");
            assert_eq!(error.param.as_deref(), Some(param), "{fields}: {error}");
        }
    }

    #[test]
    fn notes_are_bounded() {
        let notes = |n: usize, len: usize| {
            Some((0..n).map(|i| (i.to_string(), "x".repeat(len))).collect::<BTreeMap<_, _>>())
        };
        assert_eq!(metadata(notes(16, 512)).unwrap().len(), 16);
        assert!(metadata(notes(17, 1)).is_err());
        assert!(metadata(notes(1, 513)).is_err());
    }
}
