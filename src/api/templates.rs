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
    /// Tokens of a conversation for these versions, none being the base. Several render with their
    /// own template only if all bring the same. Errors: `no_chat_template`, `chat_template_error`.
    pub async fn encode_chat(
        self: &Arc<Self>,
        versions: Vec<Arc<Version>>,
        conversation: Conversation,
    ) -> Result<Vec<u32>> {
        let encoded = match self.own_template(versions).await? {
            None => self.on_text(move |text| conversation.encode(text)).await,
            Some(source) => {
                let prompt = self.render(source, conversation).await?;
                self.on_text(move |text| text.encode(&prompt, false)).await
            }
        };
        encoded.map_err(|e| match e.param {
            Some(_) => e,
            None => e.param("messages"),
        })
    }

    /// The template that all of these brought, if they did.
    async fn own_template(
        self: &Arc<Self>,
        versions: Vec<Arc<Version>>,
    ) -> Result<Option<Arc<TemplateSource>>> {
        if versions.is_empty() || !versions.iter().all(|v| v.summary.chat_template) {
            return Ok(None);
        }
        let api = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let sources = versions.iter().map(|version| api.template(version));
            let sources = sources.collect::<Result<Vec<_>>>()?;
            let same = sources.windows(2).all(|two| two[0] == two[1]);
            Ok(sources.into_iter().next().filter(|_| same))
        });
        work.await.map_err(|_| Error::fault("reading a chat template failed"))?
    }

    async fn render(
        self: &Arc<Self>,
        source: Arc<TemplateSource>,
        conversation: Conversation,
    ) -> Result<String> {
        let closed = |_| Error::fault("the template threads are gone");
        let permit = self.templates.places.clone().acquire_owned().await.map_err(closed)?;
        let api = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
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
