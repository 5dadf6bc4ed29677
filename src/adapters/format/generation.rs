//! `generation_config.json`: an adapter's own defaults of generation.
//!
//! Owns which fields are applied, which change nothing and which are refused. Never applies them:
//! `api` does, where the client said nothing. The thing to know: a field that would change the
//! answer and cannot be applied in full refuses the adapter by its name, as everywhere here.

use super::json;
use crate::adapters::BaseText;
use crate::error::{Error, Result, brief};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;

/// Defaults that win over the server's and lose to the request's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Generation {
    /// 0 is greedy: `do_sample: false` says so too.
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// `max_new_tokens`, at least 1.
    pub tokens_max: Option<u32>,
    /// `eos_token_id`: ends the answer instead of the base's own.
    pub stop_tokens: Option<Vec<u32>>,
    /// Ends the answer as the base's own do: the eos of the bundle's tokenizer.
    pub stop_tokens_more: Vec<u32>,
    /// `stop_strings`
    pub stops: Vec<String>,
}

impl Generation {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Fields that change no token of an answer.
const IRRELEVANT: [&str; 21] = [
    "_from_model_config",
    "assistant_confidence_threshold",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "low_memory",
    "max_time",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
];

/// Fields that are not served, each with the value beside null, false and the empty that asks for
/// nothing.
const NEUTRAL: [(&str, f64); 15] = [
    ("diversity_penalty", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("guidance_scale", 1.0),
    ("length_penalty", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beam_groups", 1.0),
    ("num_beams", 1.0),
    ("num_return_sequences", 1.0),
    ("penalty_alpha", 0.0),
    ("typical_p", 1.0),
];

/// As a request's own.
const REPETITION_PENALTY: RangeInclusive<f64> = 0.01..=10.0;

/// Parses and checks the file. Errors: `invalid_generation_config`,
/// `unsupported_generation_field`, naming the field.
pub fn parse(bytes: &[u8], base: &BaseText) -> Result<Generation> {
    let map =
        json::object(bytes).map_err(|e| invalid("", format!("generation_config.json: {e}")))?;
    let mut fields = Fields(map);
    let sampled = fields.flag("do_sample")?;
    let temperature = fields.number("temperature", 0.0..=2.0)?;
    let generation = Generation {
        temperature: if sampled == Some(false) { Some(0.0) } else { temperature },
        top_p: fields.positive("top_p", 1.0)?,
        top_k: fields.integer("top_k", 0..=u64::from(u32::MAX))?.map(|n| n as u32),
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty: fields.number("repetition_penalty", REPETITION_PENALTY)?,
        tokens_max: fields.integer("max_new_tokens", 1..=u64::from(u32::MAX))?.map(|n| n as u32),
        stop_tokens: fields.tokens("eos_token_id", base.vocab)?,
        stop_tokens_more: Vec::new(),
        stops: fields.stops()?,
    };
    // The default that every file has which was written by an old version.
    let whole = fields.integer("max_length", 0..=u64::MAX)?;
    if let Some(n) = whole.filter(|&n| n != 20 && n < base.context as u64) {
        let why = format!("{n} tokens of prompt and answer; set `max_new_tokens` instead");
        return Err(unsupported("max_length", &why));
    }
    fields.check_rest()?;
    Ok(generation)
}

fn invalid(field: &str, message: String) -> Error {
    let error = Error::unprocessable("invalid_generation_config", message);
    if field.is_empty() { error } else { error.param(field) }
}

fn unsupported(field: &str, why: &str) -> Error {
    let message = format!("`{field}` of generation_config.json cannot be applied: {why}");
    Error::unprocessable("unsupported_generation_field", message).param(field)
}

fn wrong(field: &str, value: &Value, expected: &str) -> Error {
    let shown = brief(&value.to_string());
    invalid(field, format!("`{field}` of generation_config.json is {shown}; expected {expected}"))
}

/// The fields not yet looked at.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.shift_remove(name).filter(|v| !v.is_null())
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(v) => Err(wrong(name, &v, "true or false")),
        }
    }

    fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_f64().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n as f32)),
            None => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(wrong(name, &value, &expected))
            }
        }
    }

    fn positive(&mut self, name: &str, most: f64) -> Result<Option<f32>> {
        match self.number(name, 0.0..=most)? {
            Some(n) if n <= 0.0 => Err(wrong(name, &Value::from(0), "a number above 0")),
            other => Ok(other),
        }
    }

    fn integer(&mut self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_u64().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let expected = format!("an integer from {} to {}", range.start(), range.end());
                Err(wrong(name, &value, &expected))
            }
        }
    }

    /// One token id or a list of them.
    fn tokens(&mut self, name: &str, vocab: usize) -> Result<Option<Vec<u32>>> {
        let list = match self.take(name) {
            None => return Ok(None),
            Some(Value::Array(list)) if list.len() <= STOPS_MAX => list,
            Some(Value::Array(_)) => {
                return Err(invalid(name, format!("`{name}` lists more than {STOPS_MAX} tokens")));
            }
            Some(one) => vec![one],
        };
        let token = |v: &Value| {
            let id = v.as_u64().filter(|&id| id < vocab as u64);
            id.map(|id| id as u32).ok_or_else(|| wrong(name, v, "a token id of the model"))
        };
        list.iter().map(token).collect::<Result<_>>().map(Some)
    }

    fn stops(&mut self) -> Result<Vec<String>> {
        let name = "stop_strings";
        let list = match self.take(name) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) if list.len() <= STOPS_MAX => list,
            Some(one) => vec![one],
        };
        let stop = |v: &Value| {
            let fits = |s: &&str| (1..=STOP_BYTES_MAX).contains(&s.len());
            v.as_str().filter(fits).map(str::to_owned).ok_or_else(|| {
                wrong(name, v, &format!("at most {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes"))
            })
        };
        list.iter().map(stop).collect()
    }

    fn check_rest(&self) -> Result<()> {
        for (name, value) in &self.0 {
            let neutral = NEUTRAL.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
            let asks_nothing = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(text) => text.is_empty(),
                Value::Number(n) => n.as_f64().is_some_and(|n| Some(n) == neutral),
                Value::Bool(true) => false,
            };
            if !asks_nothing && !IRRELEVANT.contains(&name.as_str()) {
                let name = brief(name);
                let why = match neutral {
                    Some(_) => "it would change answers and is not served",
                    None => "nothing is known of it",
                };
                return Err(unsupported(&name, why));
            }
        }
        Ok(())
    }
}
