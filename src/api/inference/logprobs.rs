//! Scores as the two formats show them.
//!
//! Owns token texts and the forms of both. Never computes a probability. The thing to know: JSON
//! has no infinity, so what is less likely than e^-9999 is shown as -9999, as OpenAI does.

use super::choice::Scored;
use crate::api::wire::{Alternatives, ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob};
use crate::text::Text;

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
            let mut top: Vec<(String, f32)> = Vec::with_capacity(s.top.len() + 1);
            for &(other, logprob) in s.top.iter().chain([&(s.token, s.logprob)]) {
                let (other, _) = text.token_text(other);
                // Two tokens may look alike; the likelier comes first and stays.
                if top.iter().all(|(token, _)| *token != other) {
                    top.push((other, finite(logprob)));
                }
            }
            Alternatives(top)
        }));
        out.tokens.push(token);
        out.text_offset.push(s.offset);
    }
    out
}
