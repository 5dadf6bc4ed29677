//! Text to tokens and back: tokenizer, chat template, incremental detokeniser, stop strings.
//!
//! Owns everything that knows characters. Never sees a sequence, a page or an adapter's factors.
//! The thing to know: text comes back through the bytes of single tokens (`pieces`), so that a
//! stream and a whole answer are the same characters by construction.

pub mod bounded;
pub mod detokenizer;
pub mod messages;
mod pieces;
mod python;
mod samples;
pub mod sandbox;
pub mod stop;
pub mod template;

use crate::checkpoint::TextSource;
use crate::error::{Error, Result};
use pieces::Pieces;
use std::sync::Arc;
use std::time::SystemTime;
use template::{ChatInputs, ChatTemplate};

/// Tokenizer and template of the base model. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Text {
    pub tokenizer: Arc<tokenizers::Tokenizer>,
    pub bos: Option<u32>,
    pub eos: Arc<[u32]>,
    /// The bos token, where the tokenizer does not add it by itself and the model wants it.
    prepended: Option<u32>,
    pieces: Arc<Pieces>,
    template: Option<Arc<ChatTemplate>>,
    token_bytes_max: usize,
}

impl Text {
    /// Compiles the template; errors name what it uses that we do not support.
    ///
    /// `chat_template` is one template, or the JSON array of `{"name", "template"}` that some
    /// models ship. Errors: `unsupported_tokenizer`, `unsupported_chat_template`.
    pub fn new(source: TextSource) -> Result<Self> {
        let tokenizer = source.tokenizer;
        let pieces = Pieces::of(&tokenizer)?;
        let string_of = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        let template = match &source.chat_template {
            Some(template) => Some(Arc::new(ChatTemplate::new(
                template,
                string_of(source.bos),
                string_of(source.eos.first().copied()),
            )?)),
            None => None,
        };
        // tokenizer.json often adds bos itself, a GGUF's never does: ask it rather than guess.
        let of_nothing = tokenizer.encode_fast("", true).map_err(unencodable)?;
        let adds_bos = source.bos.is_some() && of_nothing.get_ids().first() == source.bos.as_ref();
        Ok(Self {
            prepended: source.bos.filter(|_| source.add_bos && !adds_bos),
            bos: source.bos,
            eos: source.eos.into(),
            template,
            token_bytes_max: token_bytes_max(&tokenizer, &pieces),
            pieces: Arc::new(pieces),
            tokenizer: Arc::new(tokenizer),
        })
    }

    /// Bytes of the longest text that one token can stand for.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// Tokens of a plain prompt; bos in front when the model wants one and `special` is set.
    /// Special tokens written out in the text are recognised in either case.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(unencodable)?;
        let front = self.prepended.filter(|_| special);
        Ok(front.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The text of one token as OpenAI's logprobs show it, and its bytes. A token that is part of a
    /// character shows U+FFFD; its bytes are exact.
    pub fn token_text(&self, token: u32) -> (String, Vec<u8>) {
        let mut bytes = Vec::new();
        if let Some(piece) = self.tokenizer.id_to_token(token) {
            self.pieces.append(&piece, false, &mut bytes);
        }
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }

    /// The start and end tokens as templates write them.
    pub fn template_tokens(&self) -> (Option<String>, Option<String>) {
        let text = |id: Option<u32>| id.and_then(|id| self.tokenizer.id_to_token(id));
        (text(self.bos), text(self.eos.first().copied()))
    }

    /// Whether the model has a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders OpenAI messages (JSON objects as they came) through the template.
    ///
    /// Errors: `no_chat_template`; `chat_template_error` with the template's own words where it
    /// refuses the messages; `unsupported_content_part` for a content part that is not text.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let now = SystemTime::now();
        let inputs = ChatInputs { messages, tools, add_generation_prompt, now };
        self.render_within(&inputs, template::OUTPUT_BYTES_MAX)
    }

    /// The same, with at most `bytes_max` bytes of prompt. Errors: also `context_length_exceeded`.
    pub fn render_within(&self, inputs: &ChatInputs, bytes_max: usize) -> Result<String> {
        let Some(template) = &self.template else {
            return Err(Error::invalid(
                "no_chat_template",
                "the base model has no chat template, so it cannot take messages; \
                 use /v1/completions with a prompt",
            ));
        };
        template.render_within(inputs, bytes_max)
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

/// A normalizer may make a text shorter: by half when it composes characters, by two thirds when it
/// writes `▁` as a space.
const SHORTENED: usize = 3;

fn token_bytes_max(tokenizer: &tokenizers::Tokenizer, pieces: &Pieces) -> usize {
    let mut longest = 1;
    let mut bytes = Vec::new();
    for id in 0..tokenizer.get_vocab_size(true) as u32 {
        if let Some(piece) = tokenizer.id_to_token(id) {
            bytes.clear();
            pieces.append(&piece, false, &mut bytes);
            longest = longest.max(bytes.len());
        }
    }
    if tokenizer.get_normalizer().is_some() { longest * SHORTENED } else { longest }
}

fn unencodable(e: tokenizers::Error) -> Error {
    Error::invalid("tokenizer_error", format!("the tokenizer refused the text: {e}"))
}
