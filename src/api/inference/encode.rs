//! Conversations and texts to tokens, where it delays no other request.
//!
//! Owns which template a chat is rendered with, and which permit text work takes. Never runs an
//! untrusted template itself: the sandbox does. The thing to know: untrusted templates have permits
//! of their own, shared by tenants, so that a slow one delays its tenant's and no other text work.

use super::templates::Conversation;
use crate::access::{Caller, Ticket};
use crate::adapters::version::Version;
use crate::api::Api;
use crate::api::http::intake::{Held, SHORT_TEXT_BYTES, apart};
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::text::Text;
use crate::text::sandbox::TemplateSource;
use std::sync::Arc;

/// For whom a conversation is encoded, and what is held for it.
pub struct Rendered<'a> {
    pub caller: &'a Caller,
    /// None is the base.
    pub versions: Vec<Arc<Version>>,
    /// What the conversation takes as it is.
    pub held: Held,
    /// Where the work counts, if it does.
    pub ticket: Option<&'a mut Ticket>,
}

impl Api {
    /// Runs text work for `caller`, which begins by holding what encoding so many bytes takes. One
    /// that is `long` gives way to all that serves. Errors: `request_memory_exhausted` and the
    /// work's own.
    pub async fn on_text<T: Send + 'static>(
        &self,
        caller: &Caller,
        bytes: usize,
        long: bool,
        work: impl FnOnce(&Text, &mut Held) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.requests.intake.permit(caller, long).await;
        let mut held =
            self.requests.intake.hold(caller, self.requests.intake.bounds.encoding(bytes))?;
        let text = self.text.clone();
        apart(permit, long, move || work(&text, &mut held)).await
    }

    /// Tokens of a conversation for these versions. Several render with their own template only if
    /// all bring the same. Errors: `no_chat_template`, `chat_template_error`,
    /// `context_length_exceeded`, `request_memory_exhausted`.
    pub async fn encode_chat(
        self: &Arc<Self>,
        rendered: Rendered<'_>,
        conversation: Conversation,
    ) -> Result<Vec<u32>> {
        let Rendered { caller, versions, mut held, ticket } = rendered;
        // A template makes values of its own of the conversation's.
        held.resize(2 * held.bytes())?;
        let (bounds, context) = (self.requests.intake.bounds, self.context);
        let bytes = held.bytes() as usize;
        let own = self.own_template(versions).await?;
        match (ticket, &own) {
            (Some(ticket), Some(_)) => ticket.worked_hard(),
            (Some(ticket), None) => ticket.worked(0),
            (None, _) => {}
        }
        let encoded = match own {
            None => {
                let work = move |text: &Text, encoding: &mut Held| {
                    let prompt = text.render_within(&conversation.inputs(), bounds.text_bytes)?;
                    drop((conversation, held));
                    encoding.resize(bounds.encoding(prompt.len()))?;
                    text.encode_within(&prompt, false, context)
                };
                self.on_text(caller, 0, bytes > SHORT_TEXT_BYTES, work).await
            }
            Some(source) => {
                let (prompt, held) = self.render(caller, source, conversation, held).await?;
                let bytes = prompt.len();
                let work = move |text: &Text, _: &mut Held| {
                    let _held = held;
                    text.encode_within(&prompt, false, context)
                };
                self.on_text(caller, bytes, bytes > SHORT_TEXT_BYTES, work).await
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
        let work = move || {
            let sources = versions.iter().map(|version| api.template(version));
            let sources = sources.collect::<Result<Vec<_>>>()?;
            let same = sources.windows(2).all(|two| two[0] == two[1]);
            Ok(sources.into_iter().next().filter(|_| same))
        };
        blocking(work).await
    }

    async fn render(
        self: &Arc<Self>,
        caller: &Caller,
        source: Arc<TemplateSource>,
        conversation: Conversation,
        held: Held,
    ) -> Result<(String, Held)> {
        let permit = self.requests.intake.renders.take(caller.tenant().unwrap_or_default()).await;
        let (api, bytes_max) = (self.clone(), self.requests.intake.bounds.text_bytes);
        // The prompt has room in what the conversation leaves.
        let mut held = held;
        held.resize(held.bytes().max(2 * bytes_max as u64))?;
        let work = move || {
            let inputs = conversation.inputs();
            let prompt = api.sandbox.render_within(&source, &inputs, bytes_max)?;
            drop(conversation);
            held.resize(prompt.len() as u64)?;
            Ok((prompt, held))
        };
        apart(permit, false, work).await
    }

    fn template(&self, version: &Version) -> Result<Arc<TemplateSource>> {
        if let Some(source) = self.requests.templates.find(version.digest) {
            return Ok(source);
        }
        let found = self.registry.chat_template(version)?;
        let found = found.ok_or_else(|| Error::fault("a chat template vanished"))?;
        let (bos, eos) = self.text.template_tokens();
        let source = Arc::new(TemplateSource {
            text: found.text,
            bos_token: found.bos_token.or(bos),
            eos_token: found.eos_token.or(eos),
        });
        self.requests.templates.keep(version.digest, source.clone());
        Ok(source)
    }
}
