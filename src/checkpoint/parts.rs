//! What a reader of checkpoints gives beside tensors.
//!
//! Owns the parts that text is made of. Never reads a file.

/// What `text::Text` is built from.
pub struct TextSource {
    /// tokenizer.json's content, or the one made from GGUF metadata.
    pub tokenizer: tokenizers::Tokenizer,
    pub chat_template: Option<String>,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    /// Whether a plain (non-chat) prompt gets the bos token in front.
    pub add_bos: bool,
}
