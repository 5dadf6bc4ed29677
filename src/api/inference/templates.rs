//! Chat templates of adapters, and what a template is given.
//!
//! Owns the texts of those in use. Never renders one.

use crate::adapters::Digest;
use crate::text::sandbox::TemplateSource;
use crate::text::template::ChatInputs;
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Texts kept, of at most 256 KiB each.
const TEXTS_MAX: usize = 64;

/// What a template gets.
pub struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
    pub add_generation_prompt: bool,
}

impl Conversation {
    pub fn inputs(&self) -> ChatInputs<'_> {
        ChatInputs {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            now: SystemTime::now(),
        }
    }
}

/// Templates of adapters by the digest of their content, last used last.
pub struct Templates {
    texts: Mutex<VecDeque<(Digest, Arc<TemplateSource>)>>,
}

impl Templates {
    pub fn new() -> Self {
        Self { texts: Mutex::new(VecDeque::new()) }
    }

    pub fn find(&self, digest: Digest) -> Option<Arc<TemplateSource>> {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let at = texts.iter().position(|(d, _)| *d == digest)?;
        let found = texts.remove(at)?;
        texts.push_back(found.clone());
        Some(found.1)
    }

    pub fn keep(&self, digest: Digest, source: Arc<TemplateSource>) {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() == TEXTS_MAX {
            texts.pop_front();
        }
        texts.push_back((digest, source));
    }
}
