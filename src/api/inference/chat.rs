//! `POST /v1/chat/completions`.
//!
//! Owns the chat format: messages in, a message or deltas out. Never generates: `generate` does.
//! The thing to know: it has the same skeleton as `completions`: check, lease, encode, run, show.

use super::accounting::RequestMeter;
use super::choice::TextDelta;
use super::encode::Rendered;
use super::entry::Entry;
use super::generate::{AnswerHead, Prompt, ResponseFormat, Run, reason_word};
use super::sampling::{self, Checked};
use super::templates::Conversation;
use super::{logprobs, messages, model_ref, stream};
use crate::access::Caller;
use crate::api::Api;
use crate::api::http::body::JsonObject;
use crate::api::http::errors;
use crate::api::http::request::Origin;
use crate::api::wire::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatFields, ChatMessage,
    ChatRequest, ErrorBody, SamplingFields, Usage,
};
use crate::ending::FinishReason;
use crate::error::Result;
use axum::extract::{Extension, State};
use axum::response::Response;
use std::sync::Arc;

/// Continues a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer, or with `stream` its chunks", content(
            (ChatCompletion = "application/json"),
            (ChatChunk = "text/event-stream"),
        )),
        (status = "4XX", description = "Refused", body = ErrorBody),
        (status = "5XX", description = "Failed", body = ErrorBody),
    )
)]
pub async fn post(
    State(api): State<Arc<Api>>,
    Extension(origin): Extension<Origin>,
    Extension(caller): Extension<Caller>,
    Entry(mut ticket): Entry,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    body.count(&mut ticket);
    let (shared, own, held) = body.read(&api, &caller).await?;
    let ChatRequest { shared, own } = ChatRequest { shared, own };
    let (mut checked, conversation) = check(&api, shared.clone(), own)?;
    let asked = model_ref::asked(&shared, &api.base_name)?;
    let target = api.lease(&caller, asked, shared.user.as_deref()).await?;
    let tokens_default = checked.fill(&shared, &target, &api);
    let answer = async {
        // What would be refused is not encoded first.
        api.engine.check_room(checked.n, target.tenant())?;
        let (versions, ticket_at) = (target.versions(), Some(&mut ticket));
        let rendered = Rendered { caller: &caller, versions, held, ticket: ticket_at };
        let prompt = Prompt {
            param: "messages".to_owned(),
            tokens: api.encode_chat(rendered, conversation).await?,
            continued: false,
            echo: None,
        };
        ticket.worked(prompt.tokens.len() as u64);
        let head = AnswerHead::new(&api, "chatcmpl-", shared.model, &checked);
        let meter = RequestMeter::open(&api, &target, origin, &head.id, ticket)?;
        let run = Run::start(&api, &target, &checked, vec![prompt], tokens_default, meter)?;
        stream::respond(run, ChatShow(head), &checked).await
    };
    Ok(target.sign(answer.await))
}

fn check(
    api: &Api,
    mut shared: SamplingFields,
    own: ChatFields,
) -> Result<(Checked, Conversation)> {
    if let (Some(asked), Some(other)) = (own.max_completion_tokens, shared.max_tokens)
        && asked != other
    {
        return Err(errors::invalid_value(
            "max_completion_tokens",
            "`max_tokens` and `max_completion_tokens` disagree; set one of them",
        ));
    }
    sampling::tokens_max("max_completion_tokens", own.max_completion_tokens, 1)?;
    sampling::tokens_max("max_tokens", shared.max_tokens, 1)?;
    shared.max_tokens = shared.max_tokens.or(own.max_completion_tokens);
    let mut checked = sampling::check(&shared, api)?;
    let top = sampling::alternatives("top_logprobs", own.top_logprobs)?;
    let wanted = own.logprobs.unwrap_or(false);
    if top.is_some_and(|n| n > 0) && !wanted {
        return Err(errors::invalid_value("top_logprobs", "`top_logprobs` needs `logprobs: true`"));
    }
    checked.sampling.logprobs = wanted.then_some(top.unwrap_or(0));
    let conversation = Conversation {
        messages: messages::check(own.messages)?,
        tools: messages::tools(own.tools, own.tool_choice.as_ref())?,
        add_generation_prompt: own.add_generation_prompt.unwrap_or(true),
    };
    Ok((checked, conversation))
}

/// The chat format.
struct ChatShow(AnswerHead);

impl ChatShow {
    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> String {
        let chunk = ChatChunk {
            id: self.0.id.clone(),
            object: "chat.completion.chunk",
            created: self.0.created,
            model: self.0.model.clone(),
            system_fingerprint: self.0.fingerprint.clone(),
            choices,
            usage: self.0.include_usage.then_some(usage),
        };
        serde_json::to_string(&chunk).expect("chunks are plain data")
    }

    fn one(&self, index: usize, delta: ChatDelta, end: Option<FinishReason>) -> String {
        let choice =
            ChatChunkChoice { index, delta, logprobs: None, finish_reason: end.map(reason_word) };
        self.chunk(vec![choice], None)
    }
}

impl ResponseFormat for ChatShow {
    fn opening(&self, index: usize) -> Option<String> {
        let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
        Some(self.one(index, delta, None))
    }

    fn piece(&self, index: usize, piece: &TextDelta) -> String {
        let choice = ChatChunkChoice {
            index,
            delta: ChatDelta { role: None, content: Some(piece.text.clone()) },
            logprobs: self.0.scores.then(|| logprobs::chat(&self.0.text, &piece.scored)),
            finish_reason: None,
        };
        self.chunk(vec![choice], None)
    }

    fn ending(&self, index: usize, reason: FinishReason) -> String {
        self.one(index, ChatDelta::default(), Some(reason))
    }

    fn usage(&self, usage: Usage) -> String {
        self.chunk(Vec::new(), Some(usage))
    }

    fn whole(&self, choices: Vec<(TextDelta, FinishReason)>, usage: Usage) -> String {
        let choices = choices.into_iter().enumerate().map(|(index, (piece, reason))| ChatChoice {
            index,
            logprobs: self.0.scores.then(|| logprobs::chat(&self.0.text, &piece.scored)),
            message: ChatMessage { role: "assistant", content: piece.text, refusal: None },
            finish_reason: reason_word(reason),
        });
        let completion = ChatCompletion {
            id: self.0.id.clone(),
            object: "chat.completion",
            created: self.0.created,
            model: self.0.model.clone(),
            system_fingerprint: self.0.fingerprint.clone(),
            choices: choices.collect(),
            usage,
        };
        serde_json::to_string(&completion).expect("answers are plain data")
    }
}
