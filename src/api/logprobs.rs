//! Scores as the two formats show them.
//!
//! Owns token texts and the forms of both. Never computes a probability. The thing to know: JSON
//! has no infinity, so what is less likely than e^-9999 is shown as -9999, as OpenAI does.

use super::choice::Scored;
use super::wire::{ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob};
use crate::text::Text;
use serde_json::{Map, Value};

const LOGPROB_MIN: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// `choices[].logprobs` of chat.
pub fn chat(text: &Text, scored: &[Scored]) -> ChatLogprobs {
    let content = scored.iter().map(|s| {
        let (token, bytes) = text.token_text(s.token);
        let top = s.top.iter().map(|&(token, logprob)| {
            let (token, bytes) = text.token_text(token);
            TopLogprob { token, logprob: finite(logprob), bytes }
        });
        ChatLogprob { token, logprob: finite(s.logprob), bytes, top_logprobs: top.collect() }
    });
    ChatLogprobs { content: content.collect(), refusal: None }
}

/// `choices[].logprobs` of plain completions.
pub fn completion(text: &Text, scored: &[Scored]) -> CompletionLogprobs {
    let mut out = CompletionLogprobs::default();
    for s in scored {
        let (token, _) = text.token_text(s.token);
        let known = !s.logprob.is_nan();
        out.token_logprobs.push(known.then(|| finite(s.logprob)));
        out.top_logprobs.push(known.then(|| {
            let mut top = Map::new();
            for &(token, logprob) in &s.top {
                let (token, _) = text.token_text(token);
                // Two tokens may look alike; the likelier comes first and stays.
                top.entry(token).or_insert_with(|| Value::from(finite(logprob)));
            }
            top.entry(token.clone()).or_insert_with(|| Value::from(finite(s.logprob)));
            top
        }));
        out.tokens.push(token);
        out.text_offset.push(s.offset);
    }
    out
}
