//! What a request asks to be computed by: `model`, and the other fields that name adapters.
//!
//! Owns the spelling of names, weights and compositions. Never looks a name up. The thing to know:
//! what is spelled as no name can be is answered like a name that nobody has; what LoRAX's
//! `merged_adapters` means is accepted where it is the weighted sum, and refused where it is not.

use super::resolve::not_found;
use crate::adapters::bank::PARTS_MAX;
use crate::adapters::composition::weight;
use crate::api::http::errors::invalid_value;
use crate::api::wire::{MergedAdapters, SamplingFields};
use crate::error::{Error, Result, brief};

/// Longest part of a sum, its weight included: answers repeat it with each of their events.
const PART_BYTES_MAX: usize = 160;

/// Whom a request asks for, before anything is looked up.
#[derive(Debug, PartialEq)]
pub struct ModelRef {
    /// None: the base.
    pub parts: Vec<ModelPart>,
    /// The field that says so.
    pub param: &'static str,
}

/// `name` or `name@version`, and how much of it.
#[derive(Debug, PartialEq)]
pub struct ModelPart {
    pub name: String,
    pub weight: f32,
    /// What an error calls it.
    pub shown: String,
}

impl ModelPart {
    fn new(name: &str, weight: f32) -> Self {
        Self { name: name.to_owned(), weight, shown: name.to_owned() }
    }
}

/// Reads a `model`: the base's name, or `name`, `name@version`, each perhaps with `:weight`, joined
/// by `+`, perhaps all behind `base:`. Errors: `model_not_found`, `invalid_weight`,
/// `too_many_adapters`.
pub fn read(model: &str, base: &str) -> Result<ModelRef> {
    let asked = |parts| ModelRef { parts, param: "model" };
    if model == base {
        return Ok(asked(Vec::new()));
    }
    // The base's name may hold a colon or a plus itself, so it is taken off as a whole.
    let names = model.strip_prefix(base).and_then(|rest| rest.strip_prefix(':')).unwrap_or(model);
    check_count(names.split('+').count(), "model")?;
    let mut parts = Vec::new();
    for part in names.split('+') {
        if part.len() > PART_BYTES_MAX {
            return Err(not_found(model));
        }
        let (name, factor) = match part.split_once(':') {
            None => (part, 1.0),
            Some((name, text)) => (name, text.parse::<f64>().map_err(|_| not_found(model))?),
        };
        if !is_plain(name) {
            return Err(not_found(model));
        }
        parts.push(ModelPart::new(name, weight(name, factor).map_err(|e| e.param("model"))?));
    }
    if let [alone] = &mut parts[..] {
        alone.shown = model.to_owned();
    }
    Ok(asked(parts))
}

/// Whether it is spelled as `name` or `name@version` may be.
fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    !name.is_empty() && name.len() <= PART_BYTES_MAX && name.chars().all(plain)
}

fn check_count(parts: usize, param: &str) -> Result<()> {
    if parts <= PARTS_MAX {
        return Ok(());
    }
    let message = format!("{parts} adapters are named; at most {PARTS_MAX} can be summed");
    Err(Error::invalid("too_many_adapters", message).param(param))
}

/// What a completion asks for: `model`, or beside the base's name `adapters`, LoRAX's `adapter_id`
/// or `merged_adapters`.
pub fn asked(fields: &SamplingFields, base: &str) -> Result<ModelRef> {
    if fields.adapter_source.as_deref().is_some_and(|source| source != "local") {
        let message = "`adapter_source` may only be `local`: adapters are uploaded, never fetched";
        return Err(Error::invalid("unsupported_parameter", message).param("adapter_source"));
    }
    let id = fields.adapter_id.as_deref().filter(|id| !id.is_empty());
    let list = fields.adapters.as_deref().filter(|list| !list.is_empty());
    let merged = fields.merged_adapters.as_ref().filter(|merged| !merged.asks_nothing());
    let beside = [
        ("adapter_id", id.is_some()),
        ("adapters", list.is_some()),
        ("merged_adapters", merged.is_some()),
    ];
    let mut beside = beside.into_iter().filter(|(_, given)| *given).map(|(field, _)| field);
    let (Some(field), more) = (beside.next(), beside.next()) else {
        return read(&fields.model, base);
    };
    if let Some(more) = more {
        let message = format!("`{field}` and `{more}` both name adapters; send one of them");
        return Err(invalid_value(more, message));
    }
    let same = id.is_some_and(|id| fields.model == id);
    if fields.model != base && !fields.model.is_empty() && !same {
        let message =
            format!("`model` and `{field}` name two; `model` may be the base's name here");
        return Err(invalid_value(field, message));
    }
    if let Some(id) = id {
        return read(id, base);
    }
    let (named, param) = match (list, merged) {
        (Some(list), _) => {
            let part = |(i, part): (usize, &crate::api::wire::AdapterPart)| {
                (part.name.clone(), part.weight.unwrap_or(1.0), format!("adapters[{i}].weight"))
            };
            (list.iter().enumerate().map(part).collect(), "adapters")
        }
        (None, Some(merged)) => (merged_parts(merged)?, "merged_adapters"),
        (None, None) => return read(base, base),
    };
    listed(named, param)
}

/// (name, weight, the path of the weight) of each part.
type Named = Vec<(String, f64, String)>;

fn listed(named: Named, param: &'static str) -> Result<ModelRef> {
    check_count(named.len(), param)?;
    let part = |(name, factor, path): (String, f64, String)| {
        if !is_plain(&name) {
            return Err(not_found(&name));
        }
        Ok(ModelPart::new(&name, weight(&name, factor).map_err(|e| e.param(path))?))
    };
    Ok(ModelRef { parts: named.into_iter().map(part).collect::<Result<_>>()?, param })
}

/// The parts of LoRAX's `merged_adapters`, where it is their weighted sum.
fn merged_parts(merged: &MergedAdapters) -> Result<Named> {
    let ids = &merged.ids;
    // LoRAX's own default.
    let weights = match merged.weights.as_deref() {
        None | Some([]) => vec![1.0; ids.len()],
        Some(weights) => weights.to_vec(),
    };
    if weights.len() != ids.len() {
        let message = format!("{} weights for {} adapters", weights.len(), ids.len());
        return Err(invalid_value("merged_adapters.weights", message));
    }
    let strategy = merged.merge_strategy.as_deref().unwrap_or("linear");
    let itself = weights == [1.0];
    let whole = merged.density == Some(1.0);
    let why = match strategy {
        "cat" => None,
        "linear" if itself => None,
        "ties" | "dare_linear" | "dare_ties" if itself && whole => None,
        "linear" => Some(
            "it weights and adds A and B each for itself, which gives w² and A's of one times \
             B's of another",
        ),
        "ties" | "dare_linear" | "dare_ties" => Some("it prunes and adds A and B each for itself"),
        other => {
            let shown = brief(other);
            let message = format!("`{shown}` is no merge strategy; only `cat` is served here");
            return Err(invalid_value("merged_adapters.merge_strategy", message));
        }
    };
    if let Some(why) = why {
        let message = format!(
            "`{strategy}` is not the weighted sum of the adapters: {why}. Ask for `cat`, or merge \
             them beforehand (`POST /v1/merges`, `polylora merge`)"
        );
        let path = "merged_adapters.merge_strategy";
        return Err(Error::invalid("inexact_merge", message).param(path));
    }
    let path = |i: usize| format!("merged_adapters.weights[{i}]");
    let named = ids.iter().zip(weights).enumerate();
    Ok(named.map(|(i, (id, weight))| (id.clone(), weight, path(i))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(model: &str, base: &str) -> Vec<(String, f32)> {
        let asked = read(model, base).unwrap_or_else(|e| panic!("{model}: {e}"));
        asked.parts.into_iter().map(|part| (part.name, part.weight)).collect()
    }

    fn part(name: &str, weight: f32) -> (String, f32) {
        (name.to_owned(), weight)
    }

    #[test]
    fn the_base_is_only_meant_by_its_own_name() {
        assert!(parts("org/base:7b", "org/base:7b").is_empty());
        assert_eq!(parts("org/base:7b:sql@2", "org/base:7b"), [part("sql@2", 1.0)]);
        assert_eq!(parts("sql", "base"), [part("sql", 1.0)]);
        for attack in ["", "other:sql", "base:", "../sql", "sqⅼ", "a b", "base:base:sql", "a+", "+"]
        {
            let e = read(attack, "base").expect_err("refused");
            assert_eq!(
                (e.code, e.param.as_deref()),
                ("model_not_found", Some("model")),
                "{attack}"
            );
        }
        let long = "a".repeat(4096);
        assert!(read(&long, "base").unwrap_err().message.len() < 300);
    }

    #[test]
    fn names_are_joined_and_weighted() {
        let sum = [part("pirate@3", 0.7), part("sql", -0.25), part("x", 1.0)];
        assert_eq!(parts("pirate@3:0.7+sql:-.25+x", "base"), sum);
        assert_eq!(parts("a+b:pirate@3:0.7+sql:-.25+x", "a+b"), sum, "behind the base's name");
        assert_eq!(parts("sql:-0", "base")[0].1.to_bits(), 0, "no negative zero");
        for (model, code) in [
            ("sql:nan", "invalid_weight"),
            ("sql+x:inf", "invalid_weight"),
            ("sql:1e39", "invalid_weight"),
            ("a+a+a+a+a+a+a+a+a", "too_many_adapters"),
            (&format!("sql:1.{}", "0".repeat(200)), "model_not_found"),
            (&format!("sql:{}1", "0".repeat(200)), "model_not_found"),
        ] {
            let e = read(model, "base").expect_err(model);
            assert_eq!((e.code, e.param.as_deref()), (code, Some("model")), "{model}");
        }
    }
}
