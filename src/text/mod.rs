//! Text to tokens and back: tokenizer, chat template, incremental detokeniser, stop strings.
//!
//! Owns everything that knows characters. Never sees a sequence, a page or an adapter's factors.

pub mod detokenizer;
pub mod stop;
pub mod template;

use crate::error::Result;
use crate::model::checkpoint::TextSource;
use std::sync::Arc;

/// Tokenizer and template of the base model. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Text {
    pub tokenizer: Arc<tokenizers::Tokenizer>,
    pub bos: Option<u32>,
    pub eos: Arc<[u32]>,
}

impl Text {
    /// Compiles the template; errors name what it uses that we do not support.
    pub fn new(_source: TextSource) -> Result<Self> {
        unimplemented!()
    }
    /// Tokens of a plain prompt; bos in front when the model wants one and `special` is set.
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>> {
        unimplemented!()
    }
    /// Text of the tokens, special tokens skipped or not.
    pub fn decode(&self, _tokens: &[u32], _skip_special: bool) -> Result<String> {
        unimplemented!()
    }
    /// The text of one token as OpenAI's logprobs show it, and its bytes.
    pub fn token_text(&self, _token: u32) -> (String, Vec<u8>) {
        unimplemented!()
    }
    /// Whether the model has a chat template.
    pub fn has_template(&self) -> bool {
        unimplemented!()
    }
    /// Renders OpenAI messages (JSON objects as they came) through the template.
    pub fn render(
        &self,
        _messages: &[serde_json::Value],
        _tools: Option<&serde_json::Value>,
        _add_generation_prompt: bool,
    ) -> Result<String> {
        unimplemented!()
    }
    /// Renders and encodes (without adding special tokens: the template holds them).
    pub fn encode_chat(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        self.encode(&self.render(messages, tools, add_generation_prompt)?, false)
    }
}
