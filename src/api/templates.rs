//! Conversations to tokens: by the base's chat template, or by the adapter version's own.
//!
//! Owns which template a chat is rendered with, and the texts of those in use. Never runs a
//! stranger's template itself: the sandbox does. The thing to know: strangers' templates have
//! places of their own to run in, so that a slow one delays its kind and no other text work.

use super::Api;
use crate::adapters::Digest;
use crate::adapters::registry::Version;
use crate::error::{Error, Result};
use crate::text::Text;
use crate::text::sandbox::TemplateSource;
use crate::text::template::ChatInputs;
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use tokio::sync::Semaphore;

/// Templates rendered at once, each in a process of its own.
const RENDERS_MAX: usize = 2;
/// Texts kept, of at most 256 KiB each.
const TEXTS_MAX: usize = 64;

/// What a template gets.
pub struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
    pub add_generation_prompt: bool,
}

impl Conversation {
    fn inputs(&self) -> ChatInputs<'_> {
        ChatInputs {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            now: SystemTime::now(),
        }
    }

    fn encode(&self, text: &Text) -> Result<Vec<u32>> {
        text.encode_chat(&self.messages, self.tools.as_ref(), self.add_generation_prompt)
    }
}

/// Templates of adapters by the digest of their content, last used last.
pub struct Templates {
    places: Arc<Semaphore>,
    texts: Mutex<VecDeque<(Digest, Arc<TemplateSource>)>>,
}

impl Templates {
    pub fn new() -> Self {
        Self { places: Arc::new(Semaphore::new(RENDERS_MAX)), texts: Mutex::new(VecDeque::new()) }
    }

    fn find(&self, digest: Digest) -> Option<Arc<TemplateSource>> {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let at = texts.iter().position(|(d, _)| *d == digest)?;
        let found = texts.remove(at)?;
        texts.push_back(found.clone());
        Some(found.1)
    }

    fn keep(&self, digest: Digest, source: Arc<TemplateSource>) {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if texts.len() == TEXTS_MAX {
            texts.pop_front();
        }
        texts.push_back((digest, source));
    }
}

impl Api {
    /// Tokens of a conversation for a version, `None` being the base. Errors: `no_chat_template`,
    /// `chat_template_error`.
    pub async fn encode_chat(
        self: &Arc<Self>,
        version: Option<Arc<Version>>,
        conversation: Conversation,
    ) -> Result<Vec<u32>> {
        let own = version.filter(|v| v.summary.chat_template);
        let encoded = match own {
            None => self.on_text(move |text| conversation.encode(text)).await,
            Some(version) => {
                let prompt = self.render(version, conversation).await?;
                self.on_text(move |text| text.encode(&prompt, false)).await
            }
        };
        encoded.map_err(|e| match e.param {
            Some(_) => e,
            None => e.param("messages"),
        })
    }

    async fn render(
        self: &Arc<Self>,
        version: Arc<Version>,
        conversation: Conversation,
    ) -> Result<String> {
        let closed = |_| Error::fault("the template threads are gone");
        let permit = self.templates.places.clone().acquire_owned().await.map_err(closed)?;
        let api = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let source = api.template(&version)?;
            api.app.sandbox.render(&source, &conversation.inputs())
        });
        work.await.map_err(|_| Error::fault("rendering the chat failed"))?
    }

    fn template(&self, version: &Version) -> Result<Arc<TemplateSource>> {
        if let Some(source) = self.templates.find(version.digest) {
            return Ok(source);
        }
        let found = self.app.registry.chat_template(version)?;
        let found = found.ok_or_else(|| Error::fault("a chat template vanished"))?;
        let (bos, eos) = self.app.text.template_tokens();
        let source = Arc::new(TemplateSource {
            text: found.text,
            bos_token: found.bos_token.or(bos),
            eos_token: found.eos_token.or(eos),
        });
        self.templates.keep(version.digest, source.clone());
        Ok(source)
    }
}
