//! Parameters of other servers that we know and do not have.
//!
//! Owns two lists: those that change no answer (dropped), and those that would (refused by name,
//! unless set to what asks for nothing). The thing to know: what is in neither list and in no body
//! is `unknown_parameter`.

use crate::error::{Error, Result};
use serde_json::{Map, Value};

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

/// Takes the known strangers out of `map`; refuses the first that would change the answer.
pub fn settle(map: &mut Map<String, Value>) -> Result<()> {
    for name in HARMLESS {
        map.remove(*name);
    }
    for (name, neutral) in REFUSED {
        let Some(value) = map.remove(*name) else {
            continue;
        };
        let text = value.to_string();
        let nothing = ["false", "\"\"", "[]", "{}"];
        if !nothing.contains(&text.as_str()) && !neutral.contains(&text.as_str()) {
            return Err(Error::invalid(
                "unsupported_parameter",
                format!("`{name}` is not supported; leave it out"),
            )
            .param(*name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_would_change_the_answer_is_refused_and_what_asks_for_nothing_is_not() {
        let settle = |value: Value| {
            let mut map = value.as_object().unwrap().clone();
            settle(&mut map).map(|()| map.len()).map_err(|e| e.param.unwrap())
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
