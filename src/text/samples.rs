//! A template's trial: a few small conversations, as an upload is checked.
//!
//! Owns the conversations and what counts as passing. Never renders for a client. The thing to
//! know: a template may refuse a conversation in its own words (no system role, no tools), but a
//! lone question of a user it must show.

use super::template::{ChatInputs, ChatTemplate, OUTPUT_BYTES_MAX, raised, refused};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::time::UNIX_EPOCH;

/// What the user asks; the first prompt must hold it.
const QUESTION: &str = "Which river flows through Vienna?";

impl ChatTemplate {
    /// Renders the conversations. Errors: `invalid_chat_template`, with the line and the reason.
    pub fn check(&self) -> Result<()> {
        for (i, (what, messages, tools)) in conversations().iter().enumerate() {
            let inputs = ChatInputs {
                messages: messages.as_array().map_or(&[], Vec::as_slice),
                tools: tools.as_ref(),
                add_generation_prompt: true,
                now: UNIX_EPOCH,
            };
            let failed = |why: String| invalid(format!("{why} (tried on {what})"));
            let text = match self.attempt(&inputs, OUTPUT_BYTES_MAX)? {
                Ok(text) => text,
                Err(e) if i > 0 && raised(&e).is_some() => continue,
                Err(e) => return Err(failed(refused(&e).message)),
            };
            if i == 0 && !text.contains(QUESTION) {
                return Err(failed("the prompt lacks the user's message".into()));
            }
        }
        Ok(())
    }
}

pub(super) fn invalid(message: String) -> Error {
    Error::unprocessable("invalid_chat_template", message).param("chat_template")
}

/// (what it is, messages, tools)
fn conversations() -> [(&'static str, Value, Option<Value>); 3] {
    let user = json!({"role": "user", "content": QUESTION});
    let tools = json!([{"type": "function", "function": {
        "name": "look_up", "description": "Looks a word up.",
        "parameters": {"type": "object", "required": ["word"],
            "properties": {"word": {"type": "string", "description": "The word."}}}}}]);
    let call = json!({"id": "call00001", "type": "function",
        "function": {"name": "look_up", "arguments": {"word": "river"}}});
    [
        ("one question", json!([user]), None),
        (
            "a system message and two turns",
            json!([
                {"role": "system", "content": "Be brief."},
                user,
                {"role": "assistant", "content": "The Danube."},
                {"role": "user", "content": "And Paris?"},
            ]),
            None,
        ),
        (
            "a tool call",
            json!([
                user,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "{}"},
            ]),
            Some(tools),
        ),
    ]
}
