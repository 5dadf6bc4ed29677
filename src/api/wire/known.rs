//! Parameters of other servers that we know and do not have.
//!
//! Owns two lists: those that change no answer (dropped), and those that would (refused by name,
//! unless set to what asks for nothing). The thing to know: what is in neither list and in no body
//! is `unknown_parameter`.

use crate::error::{Error, Result};
use serde_json::Value;

/// They describe the caller or the books, never the answer.
const HARMLESS: &[&str] = &[
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
];

/// (name, values beside `false`, `""`, `[]`, `{}` that ask for nothing, as JSON).
const REFUSED: &[(&str, &[&str])] = &[
    ("allowed_token_ids", &[]),
    ("audio", &[]),
    ("bad_words", &[]),
    ("best_of", &["1"]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &[]),
    ("continue_final_message", &[]),
    ("documents", &[]),
    ("early_stopping", &[]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("functions", &[]),
    ("grammar", &[]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("json_schema", &[]),
    ("length_penalty", &["1", "1.0"]),
    ("lora", &[]),
    ("lora_path", &[]),
    ("modalities", &["[\"text\"]"]),
    ("moderation", &[]),
    ("prediction", &[]),
    ("prompt_logprobs", &[]),
    ("reasoning_effort", &["\"none\""]),
    ("regex", &[]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("structured_outputs", &[]),
    ("suffix", &[]),
    ("truncate_prompt_tokens", &[]),
    ("typical_p", &["1", "1.0"]),
    ("use_beam_search", &[]),
    ("verbosity", &["\"medium\""]),
    ("web_search_options", &[]),
];

/// The fields of other servers among these, given as name and JSON; refuses the first that would
/// change the answer.
pub fn settle<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Vec<&'static str>> {
    let fields: Vec<(&str, &str)> = fields.collect();
    let mut known = HARMLESS.to_vec();
    for (name, neutral) in REFUSED {
        known.push(*name);
        let Some((_, json)) = fields.iter().find(|(n, _)| n == name) else {
            continue;
        };
        if !asks_for_nothing(json, neutral) {
            return Err(Error::invalid(
                "unsupported_parameter",
                format!("`{name}` is not supported; leave it out"),
            )
            .param(*name));
        }
    }
    Ok(known)
}

/// Longest way to write a neutral value, spaces included.
const NEUTRAL_BYTES_MAX: usize = 1024;

fn asks_for_nothing(json: &str, neutral: &[&str]) -> bool {
    if json.len() > NEUTRAL_BYTES_MAX {
        return false;
    }
    let Ok(value) = serde_json::from_str::<Value>(json) else {
        return false;
    };
    let text = value.to_string();
    ["false", "\"\"", "[]", "{}"].contains(&text.as_str()) || neutral.contains(&text.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_would_change_the_answer_is_refused_and_what_asks_for_nothing_is_not() {
        let settle = |value: Value| {
            let fields = value.as_object().unwrap();
            let texts: Vec<_> = fields.iter().map(|(k, v)| (k.clone(), v.to_string())).collect();
            let known = settle(texts.iter().map(|(k, v)| (k.as_str(), v.as_str())));
            let left =
                |known: Vec<&str>| fields.keys().filter(|k| !known.contains(&k.as_str())).count();
            known.map(left).map_err(|e| e.param.unwrap())
        };
        assert_eq!(settle(json!({"response_format": {"type": "text"}, "store": true})), Ok(0));
        assert_eq!(
            settle(json!({"response_format": {"type": "json_object"}})),
            Err("response_format".to_owned())
        );
        assert_eq!(settle(json!({"best_of": 1})), Ok(0));
        assert_eq!(settle(json!({"best_of": 2})), Err("best_of".to_owned()));
    }
}
