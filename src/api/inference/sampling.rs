//! Shared parameters: from what the client wrote to what the engine trusts.
//!
//! Owns every range. Never clamps: a value out of range is refused, naming the parameter. The thing
//! to know: all floats that leave here are finite and all token ids are below the vocabulary.

use super::resolve::ResolvedModel;
use crate::api::Api;
use crate::api::http::errors::invalid_value;
use crate::api::wire::{SamplingFields, Stop};
use crate::config::limits::{CHOICES_MAX, LOGIT_BIAS_MAX, STOPS_MAX};
use crate::engine::Sampling;
use crate::engine::request::TOP_LOGPROBS_MAX;
use crate::error::{Error, Result, brief};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Below this the division by the temperature overflows long before the choice changes: greedy.
const TEMPERATURE_MIN: f64 = 1e-4;
/// Logits are divided by it: by less, large ones would come near to what an f32 holds.
pub const REPETITION_PENALTY_MIN: f64 = 0.01;
/// Longest stop string, and all of a request together: each choice watches for them.
const STOP_BYTES_MAX: usize = 1024;
/// Longest name of whose request it is.
const USER_CHARS_MAX: usize = 1024;

/// Shared parameters, checked.
pub struct Checked {
    /// Without logprobs: the endpoints set those.
    pub sampling: Sampling,
    pub n: usize,
    pub stops: Vec<String>,
    pub include_stop: bool,
    pub skip_special: bool,
    /// The model's own and the client's.
    pub stop_tokens: Vec<u32>,
    /// As asked; may be 0.
    pub tokens_max: Option<u32>,
    pub tokens_min: u32,
    pub stream: bool,
    pub include_usage: bool,
}

impl Checked {
    /// Fills in what the client left open from the adapter's own defaults. Returns its
    /// `max_new_tokens`, which the context may cut.
    pub fn fill(
        &mut self,
        asked: &SamplingFields,
        target: &ResolvedModel,
        api: &Api,
    ) -> Option<u32> {
        let own = target.generation()?;
        let sampling = &mut self.sampling;
        let or = |asked: Option<f64>, own: Option<f32>, now: f32| match asked {
            Some(_) => now,
            None => own.unwrap_or(now),
        };
        sampling.temperature = or(asked.temperature, own.temperature, sampling.temperature);
        sampling.top_p = or(asked.top_p, own.top_p, sampling.top_p);
        sampling.min_p = or(asked.min_p, own.min_p, sampling.min_p);
        let penalty = sampling.repetition_penalty;
        sampling.repetition_penalty = or(asked.repetition_penalty, own.repetition_penalty, penalty);
        if let (None, Some(top_k)) = (asked.top_k, own.top_k) {
            sampling.top_k = top_k;
        }
        if asked.stop.is_none() {
            self.stops.clone_from(&own.stops);
        }
        if !asked.ignore_eos.unwrap_or(false) {
            // The base's own come first in the list, the client's after them.
            let base = api.text.eos.len();
            let ends = own.stop_tokens.as_deref().unwrap_or(&api.text.eos);
            let ends = ends.iter().chain(&own.stop_tokens_more).copied();
            self.stop_tokens.splice(..base, ends);
        }
        own.tokens_max
    }
}

/// Checks everything but what depends on the prompt.
pub fn check(fields: &SamplingFields, api: &Api) -> Result<Checked> {
    let stream = fields.stream.unwrap_or(false);
    let options = fields.stream_options.as_ref();
    if options.is_some() && !stream {
        return Err(invalid_value("stream_options", "`stream_options` needs `stream: true`"));
    }
    if options.is_some_and(|o| o.include_obfuscation == Some(true)) {
        return Err(Error::invalid(
            "unsupported_parameter",
            "`stream_options.include_obfuscation` is not supported: events are not padded",
        )
        .param("stream_options.include_obfuscation"));
    }
    if fields.user.as_ref().is_some_and(|user| user.chars().nth(USER_CHARS_MAX).is_some()) {
        let message = format!("`user` is longer than {USER_CHARS_MAX} characters");
        return Err(invalid_value("user", message));
    }
    let tokens_max = tokens_max("max_tokens", fields.max_tokens, 0)?;
    let tokens_min = integer("min_tokens", fields.min_tokens, 0, 0..=i64::from(u32::MAX))? as u32;
    Ok(Checked {
        sampling: sampling(fields, api)?,
        n: integer("n", fields.n, 1, 1..=CHOICES_MAX as i64)? as usize,
        stops: stops(fields.stop.clone())?,
        include_stop: fields.include_stop_str_in_output.unwrap_or(false),
        skip_special: fields.skip_special_tokens.unwrap_or(true),
        stop_tokens: stop_tokens(fields, api)?,
        tokens_max,
        tokens_min,
        stream,
        include_usage: options.and_then(|o| o.include_usage).unwrap_or(false),
    })
}

fn sampling(fields: &SamplingFields, api: &Api) -> Result<Sampling> {
    let number = |name, value, default, range| number(name, value, default, range);
    let temperature = number("temperature", fields.temperature, 1.0, 0.0..=2.0)?;
    let top_p = number("top_p", fields.top_p, 1.0, 0.0..=1.0)?;
    if top_p == 0.0 {
        return Err(invalid_value(
            "top_p",
            "`top_p` must be above 0; for greedy choice use `temperature: 0`",
        ));
    }
    let penalties = REPETITION_PENALTY_MIN..=10.0;
    let repetition = number("repetition_penalty", fields.repetition_penalty, 1.0, penalties)?;
    let top_k = integer("top_k", fields.top_k, 0, -1..=i64::from(u32::MAX))?;
    Ok(Sampling {
        temperature: if f64::from(temperature) < TEMPERATURE_MIN { 0.0 } else { temperature },
        top_p,
        top_k: top_k.max(0) as u32,
        min_p: number("min_p", fields.min_p, 0.0, 0.0..=1.0)?,
        seed: fields.seed.map_or_else(rand::random, |s| s as u64),
        presence_penalty: number("presence_penalty", fields.presence_penalty, 0.0, -2.0..=2.0)?,
        frequency_penalty: number("frequency_penalty", fields.frequency_penalty, 0.0, -2.0..=2.0)?,
        repetition_penalty: repetition,
        logit_bias: logit_bias(fields.logit_bias.as_ref(), api)?,
        logprobs: None,
        prompt_logprobs: None,
    })
}

fn number(name: &str, value: Option<f64>, default: f32, range: RangeInclusive<f64>) -> Result<f32> {
    match value {
        None => Ok(default),
        Some(v) if range.contains(&v) => Ok(v as f32),
        Some(v) => Err(out_of_range(name, v, *range.start(), *range.end())),
    }
}

fn integer(
    name: &str,
    value: Option<i64>,
    default: i64,
    range: RangeInclusive<i64>,
) -> Result<i64> {
    Ok(optional(name, value, range)?.unwrap_or(default))
}

/// A bound on the answer's tokens, from `least` on.
pub fn tokens_max(name: &str, value: Option<i64>, least: i64) -> Result<Option<u32>> {
    Ok(optional(name, value, least..=i64::from(u32::MAX))?.map(|n| n as u32))
}

fn optional(name: &str, value: Option<i64>, range: RangeInclusive<i64>) -> Result<Option<i64>> {
    match value {
        Some(v) if !range.contains(&v) => Err(out_of_range(name, v, *range.start(), *range.end())),
        other => Ok(other),
    }
}

fn out_of_range<T: std::fmt::Display>(name: &str, got: T, low: T, high: T) -> Error {
    invalid_value(name, format!("`{name}` must be from {low} to {high}, not {got}"))
}

/// `top_logprobs` of chat, `logprobs` of plain completions.
pub fn alternatives(name: &str, value: Option<i64>) -> Result<Option<u8>> {
    Ok(optional(name, value, 0..=TOP_LOGPROBS_MAX as i64)?.map(|n| n as u8))
}

fn stops(stop: Option<Stop>) -> Result<Vec<String>> {
    let stops = match stop {
        None => Vec::new(),
        Some(Stop::One(s)) => vec![s],
        Some(Stop::Many(list)) => list,
    };
    if stops.len() > STOPS_MAX {
        return Err(invalid_value(
            "stop",
            format!("`stop` has {} strings; at most {STOPS_MAX}", stops.len()),
        ));
    }
    if let Some(i) = stops.iter().position(String::is_empty) {
        return Err(invalid_value(&format!("stop[{i}]"), "a stop string must not be empty"));
    }
    if let Some(i) = stops.iter().position(|s| s.len() > STOP_BYTES_MAX) {
        let message =
            format!("a stop string has {} bytes; at most {STOP_BYTES_MAX}", stops[i].len());
        return Err(invalid_value(&format!("stop[{i}]"), message));
    }
    Ok(stops)
}

fn stop_tokens(fields: &SamplingFields, api: &Api) -> Result<Vec<u32>> {
    let asked = fields.stop_token_ids.as_deref().unwrap_or_default();
    if asked.len() > STOPS_MAX {
        return Err(invalid_value(
            "stop_token_ids",
            format!("`stop_token_ids` has {} tokens; at most {STOPS_MAX}", asked.len()),
        ));
    }
    let mut tokens = Vec::new();
    if !fields.ignore_eos.unwrap_or(false) {
        tokens.extend_from_slice(&api.text.eos);
    }
    for (i, &token) in asked.iter().enumerate() {
        tokens.push(in_vocabulary(&format!("stop_token_ids[{i}]"), token, api)?);
    }
    Ok(tokens)
}

fn logit_bias(map: Option<&Map<String, Value>>, api: &Api) -> Result<Vec<(u32, f32)>> {
    let Some(map) = map else {
        return Ok(Vec::new());
    };
    if map.len() > LOGIT_BIAS_MAX {
        return Err(invalid_value(
            "logit_bias",
            format!("`logit_bias` has {} entries; at most {LOGIT_BIAS_MAX}", map.len()),
        ));
    }
    map.iter()
        .map(|(key, bias)| {
            let shown = brief(key);
            let path = format!("logit_bias.{shown}");
            let token = key
                .parse()
                .map_err(|_| invalid_value(&path, format!("`{shown}` is not a token id")))?;
            let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b)).ok_or_else(|| {
                invalid_value(&path, format!("`{path}` must be a number from -100 to 100"))
            })?;
            Ok((in_vocabulary(&path, token, api)?, bias as f32))
        })
        .collect()
}

/// The token id, when the model has it.
pub fn in_vocabulary(path: &str, token: i64, api: &Api) -> Result<u32> {
    let vocab = api.vocab;
    u32::try_from(token).ok().filter(|&t| (t as usize) < vocab).ok_or_else(|| {
        invalid_value(
            path,
            format!("`{path}` = {token} is not a token id of the model (0 to {})", vocab - 1),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_names_parameter_and_range() {
        let e = number("temperature", Some(2.5), 1.0, 0.0..=2.0).unwrap_err();
        assert_eq!(e.param.as_deref(), Some("temperature"));
        assert_eq!(e.message, "`temperature` must be from 0 to 2, not 2.5");
        assert!(number("temperature", Some(f64::NAN), 1.0, 0.0..=2.0).is_err());
        assert!(integer("n", Some(5_000_000), 1, 1..=16).is_err());
        assert!(alternatives("top_logprobs", Some(1_000_000_000)).is_err());
        assert!(alternatives("top_logprobs", Some(-1)).is_err());
    }

    #[test]
    fn an_empty_stop_string_is_refused_by_its_place() {
        let many = Stop::Many(vec!["a".into(), String::new()]);
        assert_eq!(stops(Some(many)).unwrap_err().param.as_deref(), Some("stop[1]"));
        let many = Stop::Many(vec!["a".into(); STOPS_MAX + 1]);
        assert_eq!(stops(Some(many)).unwrap_err().param.as_deref(), Some("stop"));
        let most = Stop::Many(vec!["a".into(); STOPS_MAX]);
        assert_eq!(stops(Some(most)).map(|all| all.len()).ok(), Some(STOPS_MAX));
    }
}
